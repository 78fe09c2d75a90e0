"""The base model: text encoder and UNet learn the base subjects in the base styles."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from lib_dynfuse.demo import loop, model

DROP_CAPTION = 0.1


class Base(nn.Module):
    """What the base stage trains."""

    def __init__(self, preset: model.Preset) -> None:
        super().__init__()
        self.unet = model.unet(preset)
        self.text = model.text_encoder(preset)


def contexts(text: CLIPTextModel, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [n, 77] to what the UNet attends to, [n, 77, context]."""
    return text(ids.to(text.device)).last_hidden_state


class Noise:
    """Draws noisy latents and the v that leads back from them."""

    def __init__(self, device: torch.device) -> None:
        self.scheduler = model.scheduler()
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        self.device = device

    def __call__(self, z: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean latents [B, 4, h, w] to (noisy, timesteps [B], v)."""
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        # One time from each of B equal parts: the loss varies far more over time than over pictures.
        steps = (torch.arange(len(z)) + torch.rand(len(z), generator=generator)) / len(z)
        times = (steps * len(self.scheduler.alphas_cumprod)).long().to(self.device)
        z = z.to(self.device)
        return self.scheduler.add_noise(z, noise, times), times, self.scheduler.get_velocity(z, noise, times)


def v_loss(
    unet: UNet2DConditionModel,
    noise: Noise,
    z: torch.Tensor,
    context: torch.Tensor,
    generator: torch.Generator,
    autocast: bool = False,
) -> torch.Tensor:
    """Mean squared error of the predicted v, a scalar."""
    noisy, times, target = noise(z, generator)
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=autocast):
        predicted = unet(noisy, times, encoder_hidden_states=context).sample
    return mse_loss(predicted.float(), target)


def train_text(
    file: Path,
    preset: model.Preset,
    z: torch.Tensor,
    captions: list[str],
    *,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    schedule: loop.Schedule,
    bar: bool = True,
) -> tuple[Base, loop.Curve]:
    """Trains text encoder and UNet together, for long enough that the text encoder can rest from then on.

    Args:
        z: normalised latents [N, 4, h, w] with one caption each.
    """
    torch.manual_seed(1)
    base = Base(preset).to(device)
    base.unet.to(memory_format=torch.channels_last)
    ids = model.tokens(["", *captions], tokenizer)
    noise = Noise(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index, chosen = draw(len(z), preset.base_batch, generator)
        return v_loss(base.unet, noise, z[index], contexts(base.text, ids[chosen]), generator, preset.autocast)

    return base, loop.train(file, base, loss, schedule, seed=1, bar=bar)


def train_unet(
    file: Path,
    unet: UNet2DConditionModel,
    z: torch.Tensor,
    context: torch.Tensor,
    *,
    batch: int,
    schedule: loop.Schedule,
    seed: int = 2,
    autocast: bool = False,
    bar: bool = True,
) -> loop.Curve:
    """Trains whatever of the UNet requires a gradient, in place, against captions that are encoded already.

    Args:
        z: normalised latents [N, 4, h, w].
        context: [1 + N, 77, context], first the empty caption's, then one for each latent.
    """
    noise = Noise(context.device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index, chosen = draw(len(z), batch, generator)
        return v_loss(unet, noise, z[index], context[chosen.to(context.device)], generator, autocast)

    return loop.train(file, unet, loss, schedule, seed=seed, bar=bar)


def draw(count: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks latents [batch] and their captions' rows, where row 0 is the empty caption, given to one in ten."""
    index = torch.randint(count, (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < DROP_CAPTION
    return index, torch.where(dropped, 0, index + 1)
