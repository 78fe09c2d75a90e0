"""A small CLIP and a small DINO of the same pictures, for guidance to have a real signal in the box.

Neither sees what the judges never train on, nor a truth picture, nor what other hands drew: they know the emoji that
text encoder, autoencoder and LoRAs may know, and have to recognise a subject in a style they never saw it in.

Both look at 32 pixels in four large patches. Emoji sit in the middle of their pictures, so where a colour lies says
much; with smaller patches, which have to find that out first, the same minutes teach far less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, normalize, unfold
from transformers import ViTConfig, ViTModel

from lib_dynfuse.demo import judge, loop, split
from lib_dynfuse.demo.data import Pictures
from lib_dynfuse.guidance.libraries import library
from lib_dynfuse.guidance.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

CLIP_BOX, DINO_BOX = (Path(__file__).with_name(name) for name in ("clip", "dino"))
PIXELS = 32
PATCH = 16
# Those of OpenAI's CLIP and of Meta's DINO, which a loader takes for granted where a folder does not say.
DINO_MEAN, DINO_STD = IMAGENET_MEAN, IMAGENET_STD
# The words are most of it: 49,408 of them, so that open_clip's own tokenizer fits. No caption has more than 16.
CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": PIXELS, "patch_size": PATCH, "width": 128, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 28, "heads": 2, "layers": 2},
}
DINO: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
CHOSEN_STYLES = 3  # in which a batch shows each of its subjects
SHARPNESS = 16.0  # what cosines are multiplied by before their softmax, as training begins
SHARPEST = 40.0


def import_open_clip() -> Any:
    """`open_clip`, only when it is wanted: it takes seconds."""
    return library("open_clip", "open_clip_torch")


def taught(pictures: Pictures) -> np.ndarray:
    """Indices of the pictures that the encoders may learn from."""
    return np.flatnonzero(~(pictures.truth | judge.held_out(pictures)))


def prepared(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 as an encoder with this mean and deviation wants them."""
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images / 2 + 0.5 - shift) / scale


def sized(images: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 at the encoders' size."""
    return interpolate(images, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(-1, 1)


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1, each moved, scaled and turned a little, on white."""
    count, device = len(images), images.device

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = draw(-0.08, 0.08), draw(0.92, 1.08)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    across, down = draw(-0.05, 0.05), draw(-0.05, 0.05)
    matrix = torch.stack([torch.stack([cosine, -sine, across], 1), torch.stack([sine, cosine, down], 1)], 1)
    # Around 1, which is white, so that what comes in from outside is paper.
    grid = affine_grid(matrix.to(device), list(images.shape), align_corners=False)
    return 1 + grid_sample(images - 1, grid, align_corners=False)


@dataclass(frozen=True)
class Batch:
    """Pictures of a few subjects, each in several styles.

    `images` [B, 3, 32, 32] in -1..1; `subject` and `style` [B] of each, `redrawn` [B] where it is only lines and so of
    no style; `subjects` [n] are those there are, each once, and `place` [B] says which of them a picture shows.
    """

    images: torch.Tensor
    subject: torch.Tensor
    style: torch.Tensor
    redrawn: torch.Tensor
    subjects: torch.Tensor
    place: torch.Tensor


class Lessons:
    """What the encoders learn from: the taught pictures as they are, and as line drawings, at the encoders' size."""

    def __init__(self, pictures: Pictures) -> None:
        generator = torch.Generator().manual_seed(7)
        known = torch.from_numpy(taught(pictures))
        plain, lines = [], []
        for part in pictures.images[known].split(256):
            images = part.float() / 127.5 - 1
            plain.append(sized(images))
            lines.append(sized(judge.line_art(images, generator)))
        self.plain, self.lines = torch.cat(plain), torch.cat(lines)
        self.subject, self.style = (torch.from_numpy(k).long()[known] for k in (pictures.subject, pictures.style))
        there = self.subject.unique()
        asked = torch.tensor([pictures.names.index(name) for name in judge.SUBJECTS if name in pictures.names])
        others = there[~torch.isin(there, asked)]
        self.kinds = asked, others if len(others) else asked

    def draw(self, batch: int, redrawn: float, generator: torch.Generator) -> Batch:
        """About `batch` pictures; half of the subjects are of the split. `redrawn`: the share that is only lines."""
        count = max(1, batch // CHOSEN_STYLES // 2)
        subjects = torch.cat([kind[torch.randperm(len(kind), generator=generator)[:count]] for kind in self.kinds])
        subjects = subjects.unique()
        # Of each subject the pictures with the highest lots.
        lots = torch.rand(len(subjects), len(self.subject), generator=generator)
        lots = lots.masked_fill(self.subject != subjects[:, None], -1.0)
        highest, index = lots.topk(min(CHOSEN_STYLES, lots.shape[1]), dim=1)
        place, column = (highest >= 0).nonzero(as_tuple=True)
        index = index[place, column]
        lined = torch.rand(len(index), generator=generator) < redrawn
        images = torch.where(lined[:, None, None, None], self.lines[index], self.plain[index])
        return Batch(images, self.subject[index], self.style[index], lined, subjects, place)


def telling_patches(images: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A first layer that keeps what patches differ in most: weight [width, 3, 16, 16] and bias [width].

    The principal components of the patches of `images` [N, 3, 32, 32], evened out, and mixed so that no head of the
    attention gets the strongest alone.
    """
    patches = unfold(images, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    _, strength, directions = torch.linalg.svd((patches - mean).T @ (patches - mean) / len(patches))
    even = directions[:width] / (strength[:width, None] + 0.02 * strength[0]).sqrt()
    weight = 0.5 * torch.linalg.qr(torch.randn(width, width))[0] @ even
    return weight.view(width, 3, PATCH, PATCH), -weight @ mean


def awake(layers: nn.Module) -> None:
    """Draws the matrices of transformer layers, in place, so wide that so narrow ones start to learn at once."""
    with torch.no_grad():
        for value in layers.parameters():
            if value.ndim == 2:
                value.normal_(std=0.7 / math.sqrt(value.shape[1]))


def train_clip(
    file: Path, pictures: Pictures, *, batch: int, schedule: loop.Schedule, device: torch.device, bar: bool = True
) -> tuple[nn.Module, loop.Curve]:
    """Trains pictures and captions to meet: a picture's subject, its style, and both in one caption.

    A subject is told from the batch's other subjects, a style from all styles, a picture with both from the batch's
    other pictures, and so is the caption (arXiv 2103.00020). Line drawings teach the subject alone.
    """
    open_clip = import_open_clip()
    torch.manual_seed(8)
    model = open_clip.CLIP(**CLIP)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    names = tokenizer([f"{name} emoji" for name in pictures.names])
    styles = tokenizer([f"{split.STYLE_WORDS[style]} style" for style in pictures.styles])
    both = tokenizer([split.caption(name, style) for name in pictures.names for style in pictures.styles])
    lessons = Lessons(pictures)
    with torch.no_grad():
        looked = model.visual
        weight, bias = telling_patches(prepared(lessons.plain, CLIP_MEAN, CLIP_STD), looked.conv1.out_channels)
        looked.conv1.weight.copy_(weight)
        places = looked.positional_embedding[1:]
        places.copy_(bias + 0.2 * torch.randn(places.shape))
        model.logit_scale.fill_(math.log(SHARPNESS))
    model.to(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        drawn = lessons.draw(batch, 0.15, generator)
        images = judge.blurred(shifted(drawn.images.to(device), generator), generator)
        styled = ~drawn.redrawn
        style = drawn.style[styled]
        captions = both[drawn.subject[styled] * len(styles) + style]
        tokens = torch.cat([names[drawn.subjects], styles, captions]).to(device)
        sizes = [len(drawn.subjects), len(styles), len(captions)]
        of_subject, of_style, of_both = model.encode_text(tokens, normalize=True).split(sizes)
        sharpness = model.logit_scale.exp().clamp(max=SHARPEST)
        seen = sharpness * model.encode_image(prepared(images, CLIP_MEAN, CLIP_STD), normalize=True)
        found = cross_entropy(seen @ of_subject.T, drawn.place.to(device))
        if not styled.any():
            return found
        seen = seen[styled.to(device)]
        met, own = seen @ of_both.T, torch.arange(len(seen), device=device)
        found = found + cross_entropy(seen @ of_style.T, style.to(device))
        return found + (cross_entropy(met, own) + cross_entropy(met.T, own)) / 2

    curve = loop.train(file, model, loss, schedule, seed=8, bar=bar)
    forget_unused_words(model, torch.cat([names, styles, both]))
    return model.cpu().eval(), curve


@torch.no_grad()
def forget_unused_words(model: Any, tokens: torch.Tensor) -> None:
    """Zeroes, in place, the embeddings of words that no caption uses: they compress away."""
    table = model.token_embedding.weight
    used = tokens.unique().to(table.device)
    rows = table[used].clone()
    table.zero_()
    table[used] = rows


class Contrasted(nn.Module):
    """The ViT, and a direction for every subject of the data that its pictures turn to while it learns."""

    def __init__(self, subjects: int) -> None:
        super().__init__()
        config = ViTConfig(**DINO, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.directions = nn.Parameter(normalize(torch.randn(subjects, config.hidden_size), dim=1))
        self.sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS)))
        for name, part in self.vit.named_children():
            if name != "embeddings":
                awake(part)

    @torch.no_grad()
    def begin_with(self, images: torch.Tensor) -> None:
        """Sets the first layer by pictures [N, 3, 32, 32] in -1..1."""
        entry = self.vit.embeddings
        projection, places = entry.patch_embeddings.projection, entry.position_embeddings
        weight, bias = telling_patches(prepared(images, DINO_MEAN, DINO_STD), projection.out_channels)
        projection.weight.copy_(weight)
        projection.bias.copy_(bias)
        places[0, 1:] = 0.2 * torch.randn(places.shape[1] - 1, places.shape[2])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, 32, 32] in -1..1 -> [B, D] of length 1, as guidance takes them."""
        return normalize(self.vit(prepared(images, DINO_MEAN, DINO_STD)).last_hidden_state[:, 0], dim=1)


def train_dino(
    file: Path, pictures: Pictures, *, batch: int, schedule: loop.Schedule, device: torch.device, bar: bool = True
) -> tuple[ViTModel, loop.Curve]:
    """Trains a ViT in DINO's place, but not in DINO's way: with labels, which takes far fewer pictures.

    Drawings of one subject by several hands are to be alike, and unlike those of the batch's other subjects
    (supervised contrast, arXiv 2004.11362), and like their subject's own direction among those of all subjects.
    Colours are changed at random, so that the shape has to do. A style is what it learns to look past.
    """
    torch.manual_seed(9)
    lessons = Lessons(pictures)
    model = Contrasted(len(pictures.names))
    model.begin_with(lessons.plain)
    model.to(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        drawn = lessons.draw(batch, 0.2, generator)
        images = judge.recoloured(shifted(drawn.images.to(device), generator), generator)
        seen = model(judge.blurred(images, generator))
        sharpness, place = model.sharpness.exp().clamp(max=SHARPEST), drawn.place.to(device)
        return contrast(sharpness * seen @ seen.T, place) + cross_entropy(
            sharpness * seen @ normalize(model.directions, dim=1).T, drawn.subject.to(device)
        )

    curve = loop.train(file, model, loss, schedule, seed=9, bar=bar)
    return model.vit.cpu().eval(), curve


def contrast(logits: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """How far pictures [B, B] are from being nearest to those of their own `kind` [B] (arXiv 2004.11362, equation 2).

    Those that are alone of their kind have nothing to be near to, and only stand in the others' way.
    """
    itself = torch.eye(len(kind), dtype=torch.bool, device=kind.device)
    same = (kind[:, None] == kind) & ~itself
    shares = logits.masked_fill(itself, -1e4).log_softmax(1)
    return -((shares * same).sum(1) / same.sum(1).clamp(min=1)).sum() / same.any(1).sum().clamp(min=1)


def save_clip(model: nn.Module, folder: Path) -> None:
    """Writes what `open_clip.create_model("local-dir:...")` loads, in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def save_dino(model: ViTModel, folder: Path) -> None:
    """Writes what `ViTModel.from_pretrained` and `ViTImageProcessor.from_pretrained` load, in fp16."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()
    size = {"height": PIXELS, "width": PIXELS}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        **{"do_resize": True, "size": size, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": DINO_MEAN, "image_std": DINO_STD},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
