"""Latent to picture, with a gradient: a linear approximation, a tiny autoencoder (TAESD), or the full VAE.

A latent is [B, C, h, w] as the sampler holds it, that is scaled; a picture is [B, 3, H, W], RGB in 0..1. Values outside
are cut off as they are when the picture is saved, so nothing is gained from a pixel that is white already.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

# 40 latent pixels are 320 pixels: more than an encoder sees (224), and autograd keeps 220 MiB of TAESD's activations
# instead of the 2.2 GiB for 1024 pixels.
PREVIEW_SIDE = 40

# Latent channel to R, G, B in -1..1, and what is added: least squares fits to the decoders, as ComfyUI's latent_formats
# publishes them. SD 2 has the latent space of SD 1.
_SD1 = ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177))
_SDXL = ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188))
_SD3 = (
    (-0.0922, -0.0175, 0.0749),
    (0.0311, 0.0633, 0.0954),
    (0.1994, 0.0927, 0.0458),
    (0.0856, 0.0339, 0.0902),
    (0.0587, 0.0272, -0.0496),
    (-0.0006, 0.1104, 0.0309),
    (0.0978, 0.0306, 0.0427),
    (-0.0042, 0.1038, 0.1358),
    (-0.0194, 0.0020, 0.0669),
    (-0.0488, 0.0130, -0.0268),
    (0.0922, 0.0988, 0.0951),
    (-0.0278, 0.0524, -0.0542),
    (0.0332, 0.0456, 0.0895),
    (-0.0069, -0.0030, -0.0810),
    (-0.0596, -0.0465, -0.0293),
    (-0.1448, -0.1463, -0.1189),
)
_FLUX = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
Factors = Sequence[Sequence[float]]
FACTORS: dict[str, tuple[Factors, Sequence[float]]] = {
    "sd1": (_SD1, (0.0, 0.0, 0.0)),
    "sd2": (_SD1, (0.0, 0.0, 0.0)),
    "sdxl": (_SDXL, (0.1084, -0.0175, -0.0011)),
    "sd3": (_SD3, (0.2394, 0.2135, 0.1925)),
    "flux": (_FLUX, (-0.0329, -0.0718, -0.0851)),
}


class Decoder(Protocol):
    """Makes pictures of latents, with a gradient from the one to the other."""

    def __call__(self, latent: Tensor) -> Tensor:
        """[B, C, h, w] as the sampler holds it -> [B, 3, H, W], RGB in 0..1."""
        ...


class LinearDecoder:
    """One picture pixel per latent pixel: `latent · factors + bias`, in -1..1 before it is brought to 0..1.

    `factors`: [C][3]; `bias`: [3]; `upscale`: bilinear enlargement of the picture, 8 for its full size. An encoder
    resizes anyway, so 1 costs least and loses nothing.
    """

    def __init__(self, factors: Factors, bias: Sequence[float], upscale: int = 1) -> None:
        self.upscale = upscale
        self._factors = torch.tensor(factors, dtype=torch.float64)
        self._bias = torch.tensor(bias, dtype=torch.float64)
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, latent: Tensor) -> Tensor:
        """See Decoder. Raises ValueError for a latent of another number of channels."""
        if latent.shape[1] != len(self._factors):
            raise ValueError(f"a latent of {latent.shape[1]} channels; these factors are for {len(self._factors)}")
        factors, bias = self._at(latent)
        picture = torch.einsum("bchw,cr->brhw", latent, factors) + bias.view(1, 3, 1, 1)
        if self.upscale != 1:
            picture = functional.interpolate(picture, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        return _to_unit(picture)

    def _at(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and bias beside the latent; sent once, since a copy from plain memory waits for the device."""
        where = (latent.device, latent.dtype)
        if where not in self._placed:
            self._placed[where] = (self._factors.to(*where), self._bias.to(*where))
        return self._placed[where]


def linear(kind: str, upscale: int = 1) -> LinearDecoder:
    """The linear approximation for a kind of latent: sd1, sd2, sdxl, sd3 or flux.

    Raises ValueError for another kind.
    """
    if kind not in FACTORS:
        raise ValueError(f"no linear decoder for {kind!r}; there are: {', '.join(FACTORS)}")
    return LinearDecoder(*FACTORS[kind], upscale=upscale)


class VaeDecoder:
    """The VAE of the model: the picture that will be saved, at the cost of the VAE's activations.

    `decode`: a latent in the VAE's own scale -> a picture [B, 3, H, W] in -1..1, as tensors that carry a gradient;
    the sampler's latent is divided by `scaling` and `shift` is added. `dtype` is what `decode` takes, None for float32.
    `side`: a latent whose longer side is more is shrunk to it first, 0 for never.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        scaling: float = 1.0,
        shift: float = 0.0,
        dtype: torch.dtype | None = None,
        side: int = 0,
    ) -> None:
        self.decode, self.scaling, self.shift, self.dtype, self.side = decode, scaling, shift, dtype, side

    def __call__(self, latent: Tensor) -> Tensor:
        """See Decoder."""
        own = _shrunk(latent, self.side) / self.scaling + self.shift
        return _to_unit(self.decode(own.to(self.dtype or own.dtype)).to(latent.dtype))


class TaesdDecoder:
    """A tiny autoencoder's decoder: nearly the VAE's picture for a hundredth of its work.

    `module` takes the sampler's latent as it is and gives a picture in 0..1, or in -1..1 where `signed` (diffusers'
    AutoencoderTiny). A latent whose longer side is above `side` is shrunk to it first, 0 for never.
    """

    def __init__(self, module: nn.Module, signed: bool = False, side: int = PREVIEW_SIDE) -> None:
        self.module, self.signed, self.side = differentiable(module), signed, side

    def __call__(self, latent: Tensor) -> Tensor:
        """See Decoder."""
        weight = next(self.module.parameters(), latent)
        picture = self.module(_shrunk(latent, self.side).to(weight.dtype)).to(latent.dtype)
        return _to_unit(picture) if self.signed else picture.clamp(0.0, 1.0)


def differentiable(module: nn.Module) -> nn.Module:
    """The module itself, or a copy where its weights were made in inference mode.

    A WebUI loads its preview decoder while sampling; autograd refuses to look at tensors from there.
    """
    if not any(tensor.is_inference() for tensor in itertools.chain(module.parameters(), module.buffers())):
        return module
    with torch.inference_mode(False):
        return copy.deepcopy(module)


def _to_unit(picture: Tensor) -> Tensor:
    return ((picture + 1.0) / 2.0).clamp(0.0, 1.0)


def _shrunk(latent: Tensor, side: int) -> Tensor:
    height, width = latent.shape[-2:]
    longer = max(height, width)
    if not side or longer <= side:
        return latent
    size = (max(1, round(height * side / longer)), max(1, round(width * side / longer)))
    return functional.interpolate(latent, size=size, mode="area")
