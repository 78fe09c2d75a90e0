"""What the WebUIs' ways of nudging a denoised prediction have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_dynfuse.guidance.decoders import Decoder, TaesdDecoder, linear
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.libraries import in_a_line


class Guiding(Protocol):
    """Where the denoised predictions of a WebUI's sampler are nudged.

    Of every denoiser call whose prediction is to be nudged: `expect` before the UNet runs, `predicted` where the host
    tells of the UNet's results, `nudge` once cond and uncond have become one prediction.
    """

    def decoder(self, kind: str, download: bool) -> tuple[Decoder, str]:
        """The decoder that is called taesd, vae or linear, and what to tell where it had to be another. `download`: the
        WebUI may fetch its own file for it. Loads, so never to be asked for while sampling."""

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


def decoder(kind: str, download: bool, vae: Callable[[], Decoder]) -> tuple[Decoder, str]:
    """See `Guiding.decoder`; `vae` makes the one that only the host knows how to."""
    from modules import shared

    approximation = linear(latent_kind(shared.sd_model))
    if kind == "linear":
        return approximation, ""
    try:
        return (vae() if kind == "vae" else taesd(download)), ""
    except NotFetchedError as error:
        return approximation, f"nudged by the linear approximation: {error}"
    # Whatever a download, a damaged file or a model without a VAE raises.
    except Exception as error:
        said = f"the decoder {kind} could not be loaded ({in_a_line(error)})"
        return approximation, f"{said}; nudged by the linear approximation"


class NotFetchedError(Exception):
    """A file of the host's is missing and was not to be fetched; the message says which, and where it goes."""


def taesd(download: bool) -> Decoder:
    """The WebUI's own small decoder for live previews, which it fetches once where `download` allows it.

    Raises NotFetchedError where it does not.
    """
    from modules import sd_vae_taesd

    with nullcontext() if download else _nothing_fetched(sd_vae_taesd):
        module = sd_vae_taesd.decoder_model()
    if module is None:
        raise NotFetchedError("the WebUI has no preview decoder (TAESD) for this model")
    return TaesdDecoder(module)


@contextmanager
def _nothing_fetched(owner: Any) -> Iterator[None]:
    """The host knows itself which file a model needs, and fetches it unasked: in this thread, for now, it does not."""
    own, ours = getattr(owner, "download_model", None), threading.get_ident()
    if own is None:
        raise NotFetchedError("how this WebUI fetches its preview decoder is not known")

    def instead(path: Any, url: str) -> None:
        if threading.get_ident() != ours:
            return own(path, url)
        if not Path(path).is_file():
            name = Path(path).name
            raise NotFetchedError(
                f"the preview decoder (TAESD) is not on this machine: put {url} as models/VAE-taesd/{name}, or "
                "tick Download missing encoders in Settings, Dynamic LoRA Fusion"
            )

    owner.download_model = instead
    try:
        yield
    finally:
        owner.download_model = own


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
