"""Small stand-ins for CLIP and DINO, differentiable and per picture, in the dtype of what they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class ToyEncoder:
    """Antialiased resize, one convolution, one nonlinearity, one projection; random weights that a seed fixes."""

    def __init__(self, seed: int, size: int = 16, width: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.kernel = torch.randn(width, 3, 4, 4, generator=generator, dtype=torch.float64) / 4
        self.projection = torch.randn(width, 12, generator=generator, dtype=torch.float64)
        self.seen: list[tuple[int, ...]] = []

    def image(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        small = functional.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        features = torch.tanh(functional.conv2d(small - 0.5, self.kernel.to(images), stride=2))
        return functional.normalize(features.mean((-2, -1)) @ self.projection.to(images), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        seeds = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
        return functional.normalize(torch.stack([torch.randn(12, generator=one) for one in seeds]), dim=-1)


def pictures(seed: int, count: int = 1, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def latents(seed: int, count: int = 1, side: int = 16, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


class TinyDecoder(nn.Sequential):
    """The shape of TAESD: convolutions and an upsampling, a picture in 0..1."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(
            nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        self[-1].bias.data.fill_(0.5)
