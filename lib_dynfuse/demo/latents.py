"""Pictures as latents: mean 0 and deviation 1 per channel, which is what the UNet learns on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from lib_dynfuse.demo.data import Pictures


@dataclass(frozen=True)
class Latents:
    """`z`: [N, 4, h, w], one for each picture of the data, and `flipped`, those of the pictures seen in a mirror.

    `mean`, `std`: [4], what was taken off, and what was then divided by.
    """

    z: torch.Tensor
    flipped: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def of(self, mask: np.ndarray) -> Latents:
        """Those of some of the pictures."""
        return Latents(self.z[mask], self.flipped[mask], self.mean, self.std)

    def to(self, device: torch.device) -> Latents:
        return Latents(*(value.to(device) for value in vars(self).values()))

    def at(self, index: torch.Tensor, mirrored: bool) -> torch.Tensor:
        """The latents of some pictures, or of their mirror images: [len(index), 4, h, w]."""
        return (self.flipped if mirrored else self.z)[index]

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in vars(self).items()}, file)

    @classmethod
    def load(cls, file: Path) -> Latents:
        return cls(**load_file(file))


@torch.no_grad()
def encode(model: AutoencoderKL, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Images [N, 3, H, W] in -1..1 to the mode of their latents [N, 4, h, w] float32 on the CPU, unscaled."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(part.to(device)).latent_dist.mode().float().cpu() for part in images.split(batch)])


def measure(model: AutoencoderKL, pictures: Pictures, of: np.ndarray) -> Latents:
    """Encodes every picture, plain and mirrored, normalised by the statistics of the pictures `of`."""
    images = pictures.floats()
    plain, flipped = encode(model, images), encode(model, images.flip(3))
    mean, std = plain[of].mean((0, 2, 3)), plain[of].std((0, 2, 3))

    def normal(z: torch.Tensor) -> torch.Tensor:
        return (z - mean[:, None, None]) / std[:, None, None]

    return Latents(normal(plain), normal(flipped), mean, std)
