"""The boxed model's eyes and hands: pictures to latents and back."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from lib_dynfuse.demo import loop
from lib_dynfuse.demo.latents import Latents

KL_WEIGHT = 1e-6
LATENT_NOISE = 0.05  # deviation 1: the decoder has to forgive what encoder and UNet get slightly wrong

DRIFT_WEIGHT = (
    2.0  # five times as much error as the encoder has anyway (0.005) then costs a fifth of the picture's loss
)


def picture_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Scalar loss of pictures [B, 3, H, W]: value, edges, and the colour of every patch of 8 x 8.

    The patch term keeps large areas from drifting in hue, which the eye sees before it sees a soft edge.
    """
    edges = l1_loss(made.diff(dim=2), true.diff(dim=2)) + l1_loss(made.diff(dim=3), true.diff(dim=3))
    patches = l1_loss(avg_pool2d(made, 8), avg_pool2d(true, 8))
    return l1_loss(made, true) + 2 * mse_loss(made, true) + 0.5 * edges + patches


def psnr(made: torch.Tensor, true: torch.Tensor) -> float:
    """Mean over pictures [N, 3, H, W] in -1..1, in decibel of the full range."""
    error = (made.clamp(-1, 1) - true).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


class Decoder(nn.Module):
    """The half of an autoencoder that draws."""

    def __init__(self, whole: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = whole.post_quant_conv, whole.decoder

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))


class Encoder(nn.Module):
    """The half of an autoencoder that looks; gives the means [B, 4, h, w] alone."""

    def __init__(self, whole: AutoencoderKL) -> None:
        super().__init__()
        self.quant_conv, self.encoder = whole.quant_conv, whole.encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(images))[:, :4]


def halves(whole: AutoencoderKL) -> nn.ModuleList:
    """Encoder and decoder, for a checkpoint that has both."""
    return nn.ModuleList([Encoder(whole), Decoder(whole)])


def drawn(images: torch.Tensor, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, bool, torch.Tensor]:
    """A random batch of uint8 [N, 3, H, W]: its indices, whether it is mirrored, and the pictures in -1..1."""
    index = torch.randint(len(images), (batch,), generator=generator).to(images.device)
    mirrored = bool(torch.rand((), generator=generator) < 0.5)
    pictures = images[index].float() / 127.5 - 1
    return index, mirrored, pictures.flip(3) if mirrored else pictures


def train(
    file: Path,
    whole: AutoencoderKL,
    images: torch.Tensor,
    *,
    batch: int,
    schedule: loop.Schedule,
    autocast: bool = False,
    bar: bool = True,
) -> loop.Curve:
    """Trains encoder and decoder together.

    Args:
        images: uint8 [N, 3, H, W] on the device of `whole`.
    """

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        _, _, true = drawn(images, batch, generator)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            seen = whole.encode(true).latent_dist
            noise = torch.randn(seen.mean.shape, generator=generator).to(images.device)
            made = whole.decode(seen.mean + seen.std * noise).sample
        return picture_loss(made.float(), true) + KL_WEIGHT * seen.kl().mean()

    return loop.train(file, whole, loss, schedule, seed=3, bar=bar)


def train_decoder(
    file: Path,
    whole: AutoencoderKL,
    images: torch.Tensor,
    known: Latents,
    *,
    batch: int,
    schedule: loop.Schedule,
    bar: bool = True,
) -> loop.Curve:
    """Teaches `whole` to draw pictures back from latents that another encoder made.

    Args:
        images: uint8 [N, 3, H, W]; `known` holds their latents, plain and mirrored.
    """

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index, mirrored, true = drawn(images, batch, generator)
        z = known.at(index, mirrored)
        z = z + LATENT_NOISE * torch.randn(z.shape, generator=generator).to(z.device)
        return picture_loss(decoder(z), true)

    decoder = Decoder(whole)
    return loop.train(file, decoder, loss, schedule, seed=3, bar=bar)


def train_encoder(
    file: Path,
    whole: AutoencoderKL,
    images: torch.Tensor,
    known: Latents,
    *,
    batch: int,
    schedule: loop.Schedule,
    bar: bool = True,
) -> loop.Curve:
    """Teaches `whole` to see the latents that another encoder sees."""

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index, mirrored, seen = drawn(images, batch, generator)
        return mse_loss(encoder(seen), known.at(index, mirrored))

    encoder = Encoder(whole)
    return loop.train(file, encoder, loss, schedule, seed=4, bar=bar)


def train_together(
    file: Path,
    whole: AutoencoderKL,
    images: torch.Tensor,
    known: Latents,
    *,
    batch: int,
    schedule: loop.Schedule,
    bar: bool = True,
) -> loop.Curve:
    """Lets the two halves, each taught against adopted latents, learn from what comes out of both.

    Half of a batch holds the encoder to the latents it was taught, so that a UNet that speaks them is still understood.
    The other half is pictures turned and recoloured, which the adopted latents say nothing about.
    """

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index, mirrored, true = drawn(images, batch, generator)
        half = batch // 2
        turns, channels = int(torch.randint(4, (), generator=generator)), torch.randperm(3, generator=generator)
        true = torch.cat([true[:half], true[half:, channels.to(true.device)].rot90(turns, (2, 3))])
        z = encoder(true)
        drift = mse_loss(z[:half], known.at(index[:half], mirrored))
        noise = LATENT_NOISE * torch.randn(z.shape, generator=generator).to(z.device)
        return picture_loss(decoder(z + noise), true) + DRIFT_WEIGHT * drift

    encoder, decoder = both = halves(whole)
    return loop.train(file, both, loss, schedule, seed=6, bar=bar)


@torch.no_grad()
def redraw(whole: AutoencoderKL, z: torch.Tensor, noise: float = 0.2, batch: int = 32) -> torch.Tensor:
    """Normalised latents [N, 4, h, w], made noisy, as uint8 pictures [N, 3, H, W] on the CPU."""
    device = next(whole.parameters()).device
    generator = torch.Generator().manual_seed(6)
    made = []
    for part in z.split(batch):
        part = part + noise * torch.randn(part.shape, generator=generator)
        pictures = whole.decode(part.to(device) / whole.config.scaling_factor).sample
        made.append(((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(made)
