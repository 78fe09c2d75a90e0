"""Forge: every sampler hands out the denoised prediction once CFG is done, in inference mode.

The uncond prediction is seen by a function that hangs on the patcher, which Forge throws away after every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.decoders import Decoder, VaeDecoder, differentiable
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.hosts.guiding import decoder, inside, spread_of

NO_XT = "it samples in inference mode and its UNet writes in place, so no gradient comes through; x0 and adam need none"


class ForgeGuiding:
    """See `hosts.guiding.Guiding`."""

    def __init__(self, vae: Callable[[], Decoder] | None = None) -> None:
        self._load_vae = vae or backend_vae
        self._expecting = False
        self._denoiser: Any = None
        self._uncond: Tensor | None = None
        self._cfg = False

    def decoder(self, kind: str, download: bool) -> tuple[Decoder, str]:
        return decoder(kind, download, self._load_vae)

    def begin(self, through_unet: bool) -> Callable[[], None]:
        from modules import shared

        # Not a method: the host copies what hangs on a patcher, and with a method the object that it belongs to.
        def look(args: Any) -> Any:
            if self._expecting:
                self._uncond = args.get("uncond_denoised")
            return args["denoised"]

        objects = shared.sd_model.forge_objects
        patcher = objects.unet.clone()
        patcher.set_model_sampler_post_cfg_function(look)
        objects.unet = patcher
        return self._forget

    def _forget(self) -> None:
        self._expecting, self._denoiser, self._uncond = False, None, None

    def expect(self, params: Any, through_unet: bool) -> bool:
        self._expecting, self._denoiser, self._uncond = True, params.denoiser, None
        self._cfg = cfg_of(params.denoiser.p) > 1
        return True

    def predicted(self, params: Any) -> None:
        """Forge does not call it."""

    def nudge(self, params: Any, guide: Guide, step: int) -> None:
        denoiser, uncond = self._denoiser, self._uncond
        self._forget()
        before = params.x
        after = guide.at(step, before, spread_of(before, uncond if self._cfg else None))
        mask = getattr(denoiser, "nmask", None) if getattr(denoiser, "mask", None) is not None else None
        params.x = inside(mask, before, after)


def cfg_of(p: Any) -> float:
    """The guidance scale of the pass under way; a hires pass has its own under one of two names."""
    if getattr(p, "is_hr_pass", False):
        own = getattr(p, "hr_cfg", getattr(p, "hr_cfg_scale", None))
        if own:
            return float(own)
    return float(p.cfg_scale)


def backend_vae() -> Decoder:
    """Of Forge and Forge Neo."""
    from backend import memory_management
    from modules import shared

    vae = shared.sd_model.forge_objects.vae
    with torch.inference_mode(False):
        module: Any = differentiable(vae.first_stage_model).requires_grad_(False)
        module = module.to(device=memory_management.get_torch_device(), dtype=vae.vae_dtype)
    return VaeDecoder(lambda z: module.decode(module.process_out(z)), dtype=vae.vae_dtype)


def ldm_patched_vae() -> Decoder:
    """Of reForge and Forge Classic, which scale latents outside of the VAE."""
    from ldm_patched.modules import model_management
    from modules import shared

    objects = shared.sd_model.forge_objects
    latents = objects.unet.model.model_config.latent_format
    with torch.inference_mode(False):
        module: Any = differentiable(objects.vae.first_stage_model).requires_grad_(False)
        module = module.to(device=model_management.get_torch_device(), dtype=objects.vae.vae_dtype)
    return VaeDecoder(lambda z: module.decode(latents.process_out(z)), dtype=objects.vae.vae_dtype)
