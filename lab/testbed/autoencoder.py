"""Pictures to latents and back: 128 x 128 x 3 to 16 x 16 x 4, laid out as SD 1.x's autoencoder.

Most of a batch are crops of 64 pixels round the figure: a plain ground teaches nothing and costs as much.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from lab.testbed.pictures import Pictures
from lib_dynfuse.demo import loop
from lib_dynfuse.demo.autoencoder import KL_WEIGHT, picture_loss

CROP = 64
WIDTHS = (32, 32, 64, 64)
SCALING = 0.18215  # of SD 1.x; some hosts assume it whatever the file says
WHOLE_EVERY = 5  # one batch in five is of whole pictures, so that the attention in the middle learns their size


def network() -> AutoencoderKL:
    count = len(WIDTHS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,  # which the hosts' code fixes
        sample_size=128,
        scaling_factor=SCALING,
    )


def busiest(picture: np.ndarray, side: int, random: np.random.Generator) -> tuple[int, int]:
    """Of three random crops of uint8 [H, W, 3], the corner (top, left) of the one with most contrast."""
    corners = [(int(top), int(left)) for top, left in random.integers(0, picture.shape[0] - side + 1, (3, 2))]
    return max(corners, key=lambda at: picture[at[0] : at[0] + side : 4, at[1] : at[1] + side : 4].std())


def batch(pictures: Pictures, step: int, crops: int, whole: int) -> torch.Tensor:
    """float [B, 3, h, w] in -1..1 that depends on `step` alone: `crops` crops, or now and then `whole` pictures."""
    random = np.random.default_rng([3, step])
    take_whole = step % WHOLE_EVERY == 0
    chosen = random.integers(0, len(pictures.x), whole if take_whole else crops)
    parts = []
    for number in chosen:
        picture = pictures.x[number]
        if not take_whole:
            top, left = busiest(picture, CROP, random)
            picture = picture[top : top + CROP, left : left + CROP]
        picture = picture[:, ::-1] if random.random() < 0.5 else picture
        if random.random() < 0.3:  # colours that no style has: the eye must not guess them from the style
            picture = picture[..., random.permutation(3)]
        parts.append(picture)
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    file: Path,
    model: AutoencoderKL,
    pictures: Pictures,
    *,
    schedule: loop.Schedule,
    crops: int = 8,
    whole: int = 2,
    bar: bool = True,
) -> loop.Curve:
    """Trains encoder and decoder together."""

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        true = batch(pictures, step, crops, whole)
        seen = model.encode(true).latent_dist
        made = model.decode(seen.mean + seen.std * torch.randn(seen.mean.shape, generator=generator)).sample
        return picture_loss(made, true) + KL_WEIGHT * seen.kl().mean()

    return loop.train(file, model, loss, schedule, seed=3, bar=bar)


def decoder_of(whole: AutoencoderKL) -> nn.ModuleList:
    """What turns latents into pictures, sharing its weights with `whole`."""
    return nn.ModuleList([whole.post_quant_conv, whole.decoder])


def train_decoder(
    file: Path,
    whole: AutoencoderKL,
    decoder: nn.ModuleList,
    pictures: Pictures,
    *,
    schedule: loop.Schedule,
    crops: int = 8,
    whole_pictures: int = 2,
    bar: bool = True,
) -> loop.Curve:
    """Trains `decoder`, a part of `whole`, on the latents that the encoder gives."""

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        true = batch(pictures, step, crops, whole_pictures)
        with torch.no_grad():
            seen = whole.encode(true).latent_dist
            z = seen.mean + seen.std * torch.randn(seen.mean.shape, generator=generator)
        return picture_loss(whole.decode(z).sample, true)

    return loop.train(file, decoder, loss, schedule, seed=4, bar=bar)


@torch.no_grad()
def encoded(model: AutoencoderKL, x: np.ndarray, chunk: int = 16) -> torch.Tensor:
    """The latents' means, raw, of uint8 [N, H, W, 3]: float [N, 4, H/8, W/8]."""
    means = []
    for start in range(0, len(x), chunk):
        pictures = torch.from_numpy(np.array(x[start : start + chunk])).permute(0, 3, 1, 2).float() / 127.5 - 1
        means.append(model.encode(pictures).latent_dist.mode())
    return torch.cat(means)


@torch.no_grad()
def redrawn(model: AutoencoderKL, x: np.ndarray, chunk: int = 8) -> np.ndarray:
    """uint8 [N, H, W, 3] through encoder and decoder."""
    made = []
    for start in range(0, len(x), chunk):
        true = torch.from_numpy(np.array(x[start : start + chunk])).permute(0, 3, 1, 2).float() / 127.5 - 1
        back = model.decode(model.encode(true).latent_dist.mode()).sample.clamp(-1, 1)
        made.append(((back + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)


def psnr(made: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Decibel of uint8 [N, H, W, 3] against uint8 of the same shape: [N]."""
    error = np.square(made.astype(np.float64) - true).mean((1, 2, 3)).clip(1e-9)
    return 10 * np.log10(255**2 / error)
