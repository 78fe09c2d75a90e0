"""A small CLIP and a small DINO of the same pictures, for guidance to have a real signal in the box.

Neither sees what the judges never train on, nor a truth picture, nor what other hands drew: they know the emoji that
text encoder, autoencoder and LoRAs may know, and have to recognise a subject in a style they never saw it in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn.functional import affine_grid, grid_sample, interpolate, normalize
from transformers import ViTConfig, ViTModel

from lib_dynfuse.demo import judge, loop, split
from lib_dynfuse.demo.data import Pictures
from lib_dynfuse.guidance.libraries import library
from lib_dynfuse.guidance.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

PIXELS = 64
# Those of OpenAI's CLIP and of Meta's DINO, which a loader takes for granted where a folder does not say.
DINO_MEAN, DINO_STD = IMAGENET_MEAN, IMAGENET_STD
# The words are most of it: 49,408 of them, so that open_clip's own tokenizer fits.
CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": 12, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
DINO: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "image_size": PIXELS,
    "patch_size": 16,
}
PROTOTYPES = 512
LOCAL = 32  # pixels of DINO's small views
CHOSEN_STYLES = 3  # in which a batch shows each of its subjects to CLIP, so that style tells pictures apart too


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
    """Bytes [B, 3, H, W] to -1..1 at the encoders' size."""
    images = images.float() / 127.5 - 1
    if images.shape[-1] == PIXELS:
        return images
    return interpolate(images, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(-1, 1)


class Captions:
    """Captions that name subject and style, or only one of the two, and which pictures each of them fits."""

    def __init__(self, pictures: Pictures, tokenizer: Any) -> None:
        names = [f"{name} emoji" for name in pictures.names]
        styles = [f"{split.STYLE_WORDS[style]} style" for style in pictures.styles]
        both = [split.caption(name, style) for name in pictures.names for style in pictures.styles]
        self.tokens = tokenizer([*names, *styles, *both])
        self.subjects, self.styles = len(names), len(styles)

    def draw(
        self, subject: torch.Tensor, style: torch.Tensor, redrawn: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For pictures of `subject` [B] in `style` [B]: tokens [B, 77], fits [B pictures, B captions], unsaid [B, B].

        Pictures that are `redrawn` [B] are of no style: their captions name none, and whether one that does would do
        for them is left unsaid.
        """
        lot = torch.rand(len(subject), generator=generator)
        no_style, no_subject = (lot < 0.2) | redrawn, (lot > 0.85) & ~redrawn
        row = self.subjects + self.styles + subject * self.styles + style
        row = torch.where(no_style, subject, torch.where(no_subject, self.subjects + style, row))
        fits_subject = (subject[:, None] == subject) | no_subject
        unsaid = redrawn[:, None] & fits_subject & ~no_style
        return self.tokens[row], fits_subject & ((style[:, None] == style) | no_style) & ~unsaid, unsaid


def train_clip(
    file: Path, pictures: Pictures, *, batch: int, schedule: loop.Schedule, device: torch.device, bar: bool = True
) -> tuple[nn.Module, loop.Curve]:
    """Trains pictures and captions to meet; a caption counts as right for every picture of the batch that it fits.

    Half of the pictures show subjects of the split; a fifth is redrawn as lines, so that a shape is known without its
    colours.
    """
    open_clip = import_open_clip()
    torch.manual_seed(8)
    model = open_clip.CLIP(**CLIP).to(device)
    captions = Captions(pictures, open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"]))
    known = taught(pictures)
    subject, style = (torch.from_numpy(kind).long() for kind in (pictures.subject, pictures.style))
    of_subject = {int(k): torch.from_numpy(known[pictures.subject[known] == k]) for k in np.unique(pictures.subject)}
    wanted = [pictures.names.index(name) for name in judge.SUBJECTS if name in pictures.names]
    kinds = wanted, sorted(set(of_subject) - set(wanted)) or wanted
    each = max(1, batch // CHOSEN_STYLES // 2)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        places = ((kind, k) for kind in kinds for k in torch.randperm(len(kind), generator=generator)[:each].tolist())
        chosen = (of_subject[kind[k]] for kind, k in places)
        index = torch.cat([of[torch.randperm(len(of), generator=generator)[:CHOSEN_STYLES]] for of in chosen])
        images = judge.moved(sized(pictures.images[index]).to(device), generator)
        redrawn = torch.rand(len(index), generator=generator) < 0.2
        images[redrawn] = judge.line_art(images[redrawn], generator)
        images = judge.blurred(images, generator)
        tokens, fits, unsaid = captions.draw(subject[index], style[index], redrawn, generator)
        seen = model.encode_image(prepared(images, CLIP_MEAN, CLIP_STD), normalize=True)
        read = model.encode_text(tokens.to(device), normalize=True)
        right = fits.float().to(device)
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
        logits = logits.masked_fill(unsaid.to(device), -1e4)
        by_picture = (logits.log_softmax(1) * right / right.sum(1, keepdim=True)).sum(1).mean()
        by_caption = (logits.log_softmax(0) * right / right.sum(0, keepdim=True)).sum(0).mean()
        return -(by_picture + by_caption) / 2

    curve = loop.train(file, model, loss, schedule, seed=8, bar=bar)
    settle(model, pictures, known, device)
    forget_unused_words(model, captions.tokens)
    return model.cpu().eval(), curve


@torch.no_grad()
def settle(model: Any, pictures: Pictures, known: np.ndarray, device: torch.device) -> None:
    """Measures, in place, the means and deviations that the batch norms of the averaged weights need."""
    generator = torch.Generator().manual_seed(9)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    for index in torch.from_numpy(known).split(128):
        images = judge.moved(sized(pictures.images[index]).to(device), generator)
        model.encode_image(prepared(images, CLIP_MEAN, CLIP_STD))
    for norm in norms:
        norm.eval()


@torch.no_grad()
def forget_unused_words(model: Any, tokens: torch.Tensor) -> None:
    """Zeroes, in place, the embeddings of words that no caption uses: they compress away."""
    table = model.token_embedding.weight
    used = tokens.unique().to(table.device)
    rows = table[used].clone()
    table.zero_()
    table[used] = rows


class Distilled(nn.Module):
    """A ViT that learns to say of a small or another view what its own slow average says of a large one (DINO)."""

    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(**DINO, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        width = config.hidden_size
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Linear(64, PROTOTYPES, bias=False)
        self.register_buffer("centre", torch.zeros(PROTOTYPES))
        # Buffers, for the loop learns every parameter and keeps every buffer.
        self.slow = {name: f"slow_{name.replace('.', '_')}" for name, _ in self.named_parameters()}
        for name, value in list(self.named_parameters()):
            self.register_buffer(self.slow[name], value.detach().clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.vit(prepared(images, DINO_MEAN, DINO_STD), interpolate_pos_encoding=images.shape[-1] != PIXELS)
        # Prototypes of length 1, or they grow instead of turning.
        directions = normalize(self.prototypes.weight, dim=1)
        return normalize(self.head(found.last_hidden_state[:, 0]), dim=1) @ directions.T

    @torch.no_grad()
    def taught_by_average(self, images: torch.Tensor, momentum: float) -> torch.Tensor:
        """What the slow average says, after it has followed a step."""
        buffers = dict(self.named_buffers())
        weights = {name: buffers[slow] for name, slow in self.slow.items()}
        for name, value in self.named_parameters():
            weights[name].lerp_(value, 1 - momentum)
        return functional_call(self, weights, (images,))


def view(images: torch.Tensor, pixels: int, least: float, most: float, generator: torch.Generator) -> torch.Tensor:
    """Square cuts [B, 3, pixels, pixels] of pictures in -1..1, `least` to `most` of their side, mirrored and tinted."""
    count, device = len(images), images.device
    side = least + (most - least) * torch.rand(count, generator=generator)
    place = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - side)[:, None]
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = side * mirror, side, place
    grid = affine_grid(matrix, [count, 3, pixels, pixels], align_corners=False).to(device)
    cut = grid_sample(images, grid, align_corners=False, padding_mode="border")
    tint = 0.85 + 0.3 * torch.rand(count, 3, 1, 1, generator=generator).to(device)
    return judge.blurred((1 + (cut - 1) * tint).clamp(-1, 1), generator)


def train_dino(
    file: Path, pictures: Pictures, *, batch: int, schedule: loop.Schedule, device: torch.device, bar: bool = True
) -> tuple[ViTModel, loop.Curve]:
    """Trains without a single label: two large views and two small ones of each picture."""
    torch.manual_seed(9)
    model = Distilled().to(device)
    known = torch.from_numpy(taught(pictures))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index = known[torch.randint(len(known), (batch,), generator=generator)]
        images = sized(pictures.images[index]).to(device)
        large = torch.cat([view(images, PIXELS, 0.6, 1.0, generator) for _ in range(2)])
        small = torch.cat([view(images, LOCAL, 0.35, 0.6, generator) for _ in range(2)])
        slow = model.taught_by_average(large, min(0.996, 1 - 1 / (step + 10)))
        target = ((slow - model.centre) / 0.05).softmax(1)
        model.centre.lerp_(slow.mean(0), 0.1)
        first, second = target.chunk(2)
        said = [part / 0.1 for part in (*model(large).chunk(2), *model(small).chunk(2))]
        pairs = [(second, said[0]), (first, said[1]), *((one, view) for one in (first, second) for view in said[2:])]
        return -torch.stack([(right * given.log_softmax(1)).sum(1).mean() for right, given in pairs]).mean()

    curve = loop.train(file, model, loss, schedule, seed=9, bar=bar)
    return model.vit.cpu().eval(), curve


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
