"""Text encoder and UNet of the bundled model: base subjects in base styles, on 16 x 16 x 4 latents.

Laid out as SD 1.x, so that every host can load it: 32 groups, two layers a block, four latent channels. The outer level
does not attend, which halves a pass: its 256 tokens cost more than all else together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from lab.testbed import split
from lib_dynfuse.demo import base, loop, model

WIDTHS = (32, 64, 96)
HEADS = 4
CONTEXT = 64
TEXT = model.Preset(context=CONTEXT, text_layers=2)
BATCH = 32


def network() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=32,
        attention_head_dim=HEADS,  # SD 1.x's config counts heads under this name
        cross_attention_dim=CONTEXT,
    )


class Base(nn.Module):
    """UNet and text encoder, trained together until the text encoder may rest."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = network()
        self.text = model.text_encoder(TEXT)


@dataclass(frozen=True)
class Latents:
    """`z`: [N, 4, 16, 16], mean 0 and deviation 1 per channel; `mean`, `std`: [4], of what the encoder gave."""

    z: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, raw: torch.Tensor, mean: torch.Tensor | None = None, std: torch.Tensor | None = None) -> Latents:
        """Normalises raw latents, by their own statistics unless some are given."""
        mean = raw.mean((0, 2, 3)) if mean is None else mean
        std = raw.std((0, 2, 3)) if std is None else std
        return cls((raw - mean[:, None, None]) / std[:, None, None], mean, std)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in vars(self).items()}, file)

    @classmethod
    def load(cls, file: Path) -> Latents:
        return cls(**load_file(file))


class Captions:
    """The captions of some pictures as token ids, each different one once; row 0 is the empty caption."""

    def __init__(self, names: Sequence[str], styles: Sequence[str], tokenizer: CLIPTokenizer) -> None:
        texts = [split.caption(name, style) for name, style in zip(names, styles, strict=True)]
        different = sorted(set(texts))
        self.rows = torch.tensor([different.index(text) + 1 for text in texts])
        """[N], the row of each picture's caption."""
        self.ids = model.tokens(["", *different], tokenizer)
        """[1 + M, 77] int64."""

    def drawn(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pictures [batch] and their captions' rows, the empty caption for one in ten."""
        chosen = torch.randint(len(self.rows), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < base.DROP_CAPTION
        return chosen, torch.where(dropped, 0, self.rows[chosen])


def train_text(
    file: Path, z: torch.Tensor, captions: Captions, *, schedule: loop.Schedule, bar: bool = True
) -> loop.Curve:
    """Trains UNet and text encoder together on normalised latents [N, 4, 16, 16]."""
    torch.manual_seed(1)
    trained, noise = Base(), base.Noise(torch.device("cpu"))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen, rows = captions.drawn(BATCH, generator)
        different, back = rows.unique(return_inverse=True)
        context = base.contexts(trained.text, captions.ids[different])[back]
        return base.v_loss(trained.unet, noise, z[chosen], context, generator)

    return loop.train(file, trained, loss, schedule, seed=1, bar=bar)


def after_text(file: Path) -> Base:
    """The pair as `train_text` left it."""
    trained = Base()
    loop.averaged(file, trained)
    return trained


@torch.no_grad()
def contexts(text: CLIPTextModel, captions: Captions, chunk: int = 64) -> torch.Tensor:
    """What the UNet attends to for each row of `captions`: [1 + M, 77, CONTEXT]."""
    return torch.cat([base.contexts(text, ids) for ids in captions.ids.split(chunk)])


def train_unet(
    file: Path,
    unet: UNet2DConditionModel,
    z: torch.Tensor,
    captions: Captions,
    context: torch.Tensor,
    *,
    batch: int,
    schedule: loop.Schedule,
    seed: int = 2,
    bar: bool = True,
) -> loop.Curve:
    """Trains what of the UNet requires a gradient, in place; `context`: a row for each of `captions`' rows."""
    noise = base.Noise(torch.device("cpu"))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen, rows = captions.drawn(batch, generator)
        return base.v_loss(unet, noise, z[chosen], context[rows], generator)

    return loop.train(file, unet, loss, schedule, seed=seed, bar=bar)
