"""What the WebUIs' ways of nudging a denoised prediction have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_dynfuse.guidance.decoders import Decoder, TaesdDecoder, linear
from lib_dynfuse.guidance.guide import Guide


class Guiding(Protocol):
    """Where the denoised predictions of a WebUI's sampler are nudged.

    Of every denoiser call whose prediction is to be nudged: `expect` before the UNet runs, `predicted` where the host
    tells of the UNet's results, `nudge` once cond and uncond have become one prediction.
    """

    def decoder(self, kind: str) -> tuple[Decoder, str]:
        """The decoder that is called taesd, vae or linear, and what to tell where it had to be another. Loads, so never
        to be asked for while sampling."""

    def begin(self, through_unet: bool) -> Callable[[], None]:
        """Sampling is about to begin; returns what ends it."""

    def expect(self, params: Any, through_unet: bool) -> bool:
        """The host's `cfg_denoiser` callback, and whether gradients are to go through the UNet. Returns whether this
        call can be nudged at all. Raises MemoryError where it can't be for good."""

    def predicted(self, params: Any) -> None:
        """The host's `cfg_denoised` callback, where it has one."""

    def nudge(self, params: Any, guide: Guide, step: int) -> None:
        """The host's `cfg_after_cfg` callback: what it holds is nudged."""


def latent_kind(model: Any) -> str:
    """Of a WebUI's loaded model: the kind of its latents, as `linear` calls it."""
    if getattr(model, "is_sd3", False):
        return "sd3"
    if getattr(model, "is_sdxl", False):
        return "sdxl"
    legacy = getattr(model, "is_webui_legacy_model", None)
    if legacy is not None and not legacy():
        return "flux"
    return "sd2" if getattr(model, "is_sd2", False) else "sd1"


def decoder(kind: str, vae: Callable[[], Decoder]) -> tuple[Decoder, str]:
    """See `Guiding.decoder`; `vae` makes the one that only the host knows how to."""
    from modules import shared

    approximation = linear(latent_kind(shared.sd_model))
    if kind == "linear":
        return approximation, ""
    try:
        return (vae() if kind == "vae" else taesd()), ""
    # Whatever a download, a damaged file or a model without a VAE raises.
    except Exception as error:
        said = " ".join(str(error).split())[:160] or type(error).__name__
        return approximation, f"the decoder {kind} could not be loaded ({said}); nudged by the linear approximation"


def taesd() -> Decoder:
    """The WebUI's own small decoder for live previews, which it downloads once."""
    from modules import sd_vae_taesd

    module = sd_vae_taesd.decoder_model()
    if module is None:
        raise FileNotFoundError("its file is missing in models/VAE-taesd")
    return TaesdDecoder(module)


class Activations:
    """What the layers of a UNet make in one call: about what autograd keeps of it, known before it is asked to."""

    def __init__(self, unet: nn.Module) -> None:
        self.most = 0
        """Bytes of the largest call so far; 0 before the first."""
        self._now = 0
        leaves = [module for module in unet.modules() if not any(True for _ in module.children())]
        self._handles = [
            unet.register_forward_pre_hook(self._begin),
            unet.register_forward_hook(self._end),
            *(leaf.register_forward_hook(self._add) for leaf in leaves),
        ]

    def _begin(self, *_: Any) -> None:
        self._now = 0

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._now += output.nbytes

    def _end(self, *_: Any) -> None:
        self.most = max(self.most, self._now)

    def check(self, device: torch.device) -> None:
        """Raises MemoryError where a GPU has not as much left; elsewhere nobody can tell."""
        if device.type != "cuda":
            return
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if self.most > free:
            raise MemoryError(
                f"a gradient through the UNet needs about {self.most / 2**30:.1f} GiB, {free / 2**30:.1f} are free; "
                "the ways x0 and adam need none"
            )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for a gradient: autograd then keeps only what the input's needs."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def spread_of(denoised: Tensor, uncond: Tensor | None) -> Tensor | None:
    """[B]: rms(D − D_uncond), which is cfg · rms(D_cond − D_uncond); for an AND, of the sum of its parts."""
    if uncond is None or uncond.shape != denoised.shape:
        return None
    return (denoised - uncond).float().square().flatten(1).mean(1).sqrt()


def inside(mask: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """Of an inpainting only what is painted is nudged; `mask` is 1 there."""
    return after if mask is None else before + (after - before) * mask
