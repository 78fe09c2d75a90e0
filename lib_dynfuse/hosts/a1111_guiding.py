"""AUTOMATIC1111 WebUI: its samplers hand out x0 (k-diffusion) or eps (DDIM, PLMS, UniPC) once CFG is done.

Everything runs under `torch.no_grad` alone, so gradients can be switched on in the middle of a denoiser call: the UNet
is then run once, with a graph from its input, where the mode xt asks for that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.decoders import Decoder, VaeDecoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.hosts.checkpointing import without_checkpointing
from lib_dynfuse.hosts.guiding import Activations, decoder, frozen, inside, spread_of
from lib_dynfuse.hosts.reading import place_of


class Automatic1111Guiding:
    """See `hosts.guiding.Guiding`."""

    def __init__(self) -> None:
        self._denoiser: Any = None
        self._input: Tensor | None = None  # [B], of each picture, as the UNet is fed
        self._sigma: Tensor | None = None
        self._uncond: Tensor | None = None
        self._leaf: Tensor | None = None
        self._schedule: tuple[Any, list[float]] = (None, [])
        self._activations: Activations | None = None
        self._place = 0
        self._remaining = 1.0

    def decoder(self, kind: str, download: bool) -> tuple[Decoder, str]:
        return decoder(kind, download, _vae)

    def begin(self, through_unet: bool) -> Callable[[], None]:
        from modules import shared

        with ExitStack() as stack:
            stack.enter_context(frozen(shared.sd_model.first_stage_model))
            if through_unet:
                unet = shared.sd_model.model.diffusion_model
                stack.enter_context(frozen(unet))
                _refuse_training()
                stack.enter_context(without_checkpointing(unet))
                self._activations = Activations(unet)
                stack.callback(self._activations.close)
            stack.callback(self._forget)
            return stack.pop_all().close

    def _forget(self) -> None:
        self._denoiser = self._input = self._sigma = self._uncond = self._leaf = None
        self._schedule = (None, [])

    def expect(self, params: Any, through_unet: bool) -> bool:
        if through_unet and self._activations is not None:
            if not self._activations.most:
                # The first call merges LoRAs into the weights, in place, which a graph would not bear.
                return False
            self._activations.check(params.x.device)
        denoiser = params.denoiser
        count = len(parts_of(denoiser)) or params.x.shape[0] // 2
        # Behind the rows of the prompts there is every picture once, for the negative prompt.
        self._denoiser, self._uncond, self._leaf = denoiser, None, None
        self._input, self._sigma = params.x[-count:], params.sigma[-count:]
        self._place = place_of(params).step
        if through_unet:
            self._remaining = self._share_of_prediction(params.total_sampling_steps)
            self._feed_leaf(params, count)
        return True

    def _feed_leaf(self, params: Any, count: int) -> None:
        images = [image for image, part in enumerate(parts_of(params.denoiser)) for _ in range(part)]
        if len(images) + count != params.x.shape[0]:
            images = [row % count for row in range(params.x.shape[0] - count)]
        leaf = params.x[-count:].detach().clone().requires_grad_()
        # The sampler's own `no_grad` ends this, whatever comes between.
        torch.set_grad_enabled(True)
        params.x = torch.stack([leaf[image] for image in (*images, *range(count))])
        self._leaf, self._input = leaf, params.x[-count:]

    def predicted(self, params: Any) -> None:
        if self._input is not None:
            self._uncond = params.x[-len(self._input) :]

    def nudge(self, params: Any, guide: Guide, step: int) -> None:
        denoiser, x, sigma, uncond = self._denoiser, self._input, self._sigma, self._uncond
        leaf, self._leaf, self._uncond = self._leaf, None, None
        if denoiser is None or x is None or sigma is None or len(params.x) != len(x):
            return
        try:
            given = params.x
            before = denoiser.get_pred_x0(x, given, sigma)
            if leaf is not None:
                after = guide.at_input(step, before, leaf, self._remaining)
            else:
                spread = None
                if uncond is not None and denoiser.p.cfg_scale > 1:
                    spread = spread_of(before, denoiser.get_pred_x0(x, uncond, sigma))
                after = guide.at(step, before, spread)
            before = before.detach()
            after = inside(getattr(denoiser, "nmask", None) if denoiser.mask is not None else None, before, after)
            params.x = given.detach() + _as_given(denoiser, sigma, after - before)
        finally:
            if leaf is not None:
                self._end_graph(denoiser)

    def _end_graph(self, denoiser: Any) -> None:
        """The host keeps a few of the call's tensors for its previews and samplers: they shall not hold the graph."""
        from modules import shared

        torch.set_grad_enabled(False)
        for holder, name in (
            (denoiser.sampler, "last_latent"),
            (denoiser, "last_noise_uncond"),
            (shared.state, "current_latent"),
        ):
            value = getattr(holder, name, None)
            if isinstance(value, Tensor):
                setattr(holder, name, value.detach())

    def _share_of_prediction(self, total: int) -> float:
        """1 − σ_next / σ at this call, of a sampler of the form x_next = (σ_next/σ)·x + (1 − σ_next/σ)·D."""
        if self._schedule[0] is not self._denoiser.sampler:
            self._schedule = (self._denoiser.sampler, _sigmas(self._denoiser, total))
        sigmas = self._schedule[1]
        place = min(self._place, len(sigmas) - 2)
        return 1.0 - sigmas[place + 1] / sigmas[place] if place >= 0 and sigmas[place] > 0 else 1.0


def _refuse_training() -> None:
    """RuntimeError while the host trains: its checkpointing then is one that no gradient by the input goes through."""
    try:
        from modules import sd_hijack_checkpoint
    except ImportError:
        return
    if sd_hijack_checkpoint.stored:
        raise RuntimeError("the WebUI's gradient checkpointing for training is on; x0 and adam need none of the UNet")


def parts_of(denoiser: Any) -> list[int]:
    """Of each picture of a denoiser call, into how many parts an AND divides its prompt; empty where unknown."""
    return [len(one) for one in getattr(denoiser.sampler.sampler_extra_args["cond"], "batch", ())]


def _as_given(denoiser: Any, sigma: Tensor, change: Tensor) -> Tensor:
    """A change of x0 as a change of what the sampler goes on with: of eps, x0 = (x − √(1−a)·eps) / √a."""
    alphas = getattr(denoiser, "alphas", None)
    if alphas is None:
        return change
    a = alphas[sigma.long()][:, None, None, None]
    return -change * (a.sqrt() / (1 - a).sqrt()).to(change.dtype)


def _sigmas(denoiser: Any, total: int) -> list[float]:
    """The noise of a sampling's steps, and 0 behind: once per sampling, as it is read from the device."""
    sampler, alphas, steps = denoiser.sampler, getattr(denoiser, "alphas", None), _steps(denoiser.p)
    if alphas is None:
        found: list[float] = sampler.get_sigmas(denoiser.p, steps).tolist()
        return found[-(total + 1) :]
    times = sampler.get_timesteps(denoiser.p, steps).flip(0)[-total:]
    a = alphas[times]
    return [*((1 - a) / a).sqrt().tolist(), 0.0]


def _steps(p: Any) -> int:
    """How many steps the whole way from noise would have, of which img2img and a hires pass take the last ones."""
    hires = getattr(p, "is_hr_pass", False)
    if not hires and not getattr(p, "init_images", None):
        return int(p.steps)
    from modules.sd_samplers_common import setup_img2img_steps

    return int(setup_img2img_steps(p, (p.hr_second_pass_steps or p.steps) if hires else None)[0])


def _vae() -> Decoder:
    from modules import devices, shared

    model = shared.sd_model
    return VaeDecoder(model.first_stage_model.decode, scaling=model.scale_factor, dtype=devices.dtype_vae)
