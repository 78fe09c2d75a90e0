"""How near a picture is to what it should be: weighted cosines of CLIP and DINO embeddings (docs/method.md, section 3).

The first three terms are those of arXiv 2602.15539; the last two are optional.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TERMS = ("clip_subject", "clip_style", "dino_style", "dino_subject", "clip_text")
# The share of the shorter side that the smallest cutout has; the largest has all of it.
_SMALLEST_CUTOUT = 0.5

Pictures = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Each:
    """References that differ from picture to picture: those of the first, of the second, and so on."""

    of: Sequence[Pictures]

    def __len__(self) -> int:
        return len(self.of)


class ImageEncoder(Protocol):
    """What an objective needs of DINO: [B, 3, H, W] in 0..1 -> [B, D], L2-normalised, with a gradient."""

    def image(self, images: Tensor) -> Tensor: ...


class TextEncoder(ImageEncoder, Protocol):
    """What an objective needs of CLIP: besides pictures, prompts -> [B, D], L2-normalised."""

    def text(self, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Weights:
    """How much each term counts: the paper's three alike, the others not. 0 leaves a term out."""

    clip_subject: float = 1.0
    clip_style: float = 1.0
    dino_style: float = 1.0
    dino_subject: float = 0.0
    clip_text: float = 0.0


class Objective:
    """R = -Σ w·cos per picture: lower is nearer to the references.

    `subject` and `style`: reference pictures [N, 3, H, W] in 0..1, or several such tensors where sizes differ; their
    embeddings are averaged. `Each`, where every picture made has references of its own. `text`: one prompt for all
    pictures or one for each, or their embeddings [1 or B, D].
    A term whose encoder or reference is missing is left out; ValueError if that leaves none.

    `cutouts`: CLIP's terms become the mean over so many random square crops. Their sides are spread evenly from half of
    the picture to all of it; where they lie comes from the picture's seed and the step, so that a picture is judged
    alike whatever else is in its batch.
    """

    def __init__(
        self,
        clip: TextEncoder | None = None,
        dino: ImageEncoder | None = None,
        subject: Pictures | Each | None = None,
        style: Pictures | Each | None = None,
        text: Tensor | Sequence[str] | None = None,
        weights: Weights | None = None,
        cutouts: int = 0,
    ) -> None:
        if cutouts < 0:
            raise ValueError(f"cutouts must be 0 or more, not {cutouts}")
        self._encoders: dict[str, ImageEncoder | None] = {"clip": clip, "dino": dino}
        self._cutouts = cutouts
        self._weights = weights or Weights()
        self._targets: dict[str, Tensor] = {}
        for role, pictures in (("subject", subject), ("style", style)):
            for name, encoder in self._encoders.items():
                if encoder is not None and pictures is not None and len(pictures):
                    self._targets[f"{name}_{role}"] = _embedded(encoder, pictures)
        if clip is not None and text is not None and len(text):
            self._targets["clip_text"] = _text_embedded(clip, text)
        if not self._targets:
            raise ValueError("nothing to compare a picture with: every encoder or every reference is missing")

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that count: those with an encoder, a reference and a weight."""
        return tuple(term for term in TERMS if term in self._targets and getattr(self._weights, term))

    def part(self, indices: Sequence[int]) -> Objective:
        """The same for some of the pictures, in this order; what all pictures share stays shared."""
        found = copy.copy(self)
        with _apart_from_the_sampler():
            found._targets = {
                term: target if len(target) == 1 else torch.cat([target[index : index + 1] for index in indices])
                for term, target in self._targets.items()
            }
        return found

    def __call__(self, images: Tensor, seeds: Sequence[int] | None = None, step: int = 0) -> Tensor:
        """R of each picture, [B]. `images`: [B, 3, H, W] in 0..1; `seeds`: each picture's, needed for cutouts.

        Raises ValueError where no term counts, or seeds are missing.
        """
        terms = self.terms
        if not terms:
            raise ValueError(f"no term counts; a weight is wanted for one of: {', '.join(self._targets)}")
        cosines: dict[str, Tensor] = {}
        for name in sorted({_encoder_of(term) for term in terms}):
            views = self._views(images, seeds, step) if name == "clip" else [images]
            embeddings = [self._embedding(name, view) for view in views]
            for term in terms:
                if _encoder_of(term) == name:
                    cosines[term] = torch.stack([self._cosine(term, one) for one in embeddings]).mean(0)
        return self._weighed(cosines)

    @torch.no_grad()
    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """How near whole pictures are, [B] for each name: the cosine of every term that has an encoder and a reference,
        whatever its weight, and "R" of those that count. `images`: [B, 3, H, W] in 0..1."""
        found = {name: self._embedding(name, images) for name in {_encoder_of(term) for term in self._targets}}
        scores = {term: self._cosine(term, found[_encoder_of(term)]) for term in TERMS if term in self._targets}
        return {**scores, "R": self._weighed(scores)} if self.terms else scores

    def _weighed(self, cosines: Mapping[str, Tensor]) -> Tensor:
        return -torch.stack([getattr(self._weights, term) * cosines[term] for term in self.terms]).sum(0)

    def _cosine(self, term: str, embedding: Tensor) -> Tensor:
        return (embedding * self._targets[term].to(embedding)).sum(-1)

    def _embedding(self, name: str, images: Tensor) -> Tensor:
        encoder = self._encoders[name]
        assert encoder is not None, f"{name} has a target, so it was there to make it"
        return encoder.image(images)

    def _views(self, images: Tensor, seeds: Sequence[int] | None, step: int) -> list[Tensor]:
        """What CLIP looks at: the whole pictures, or cutouts of them."""
        if not self._cutouts:
            return [images]
        if seeds is None or len(seeds) != len(images):
            given = "none" if seeds is None else len(seeds)
            raise ValueError(f"cutouts need the seed of each of {len(images)} pictures; {given} given")
        return [self._cutout(images, seeds, step, index) for index in range(self._cutouts)]

    def _cutout(self, images: Tensor, seeds: Sequence[int], step: int, index: int) -> Tensor:
        """One square of each picture, all of one side, so that the encoder takes them together."""
        height, width = images.shape[-2:]
        share = _SMALLEST_CUTOUT + (1.0 - _SMALLEST_CUTOUT) * (index + 0.5) / self._cutouts
        side = max(1, round(share * min(height, width)))
        squares = []
        for image, seed in zip(images, seeds, strict=True):
            # Drawn on the host: nothing has to be read from the device, and a text seed is the same on every platform.
            draw = random.Random(f"{seed} {step} {index}")
            top, left = draw.randint(0, height - side), draw.randint(0, width - side)
            squares.append(image[:, top : top + side, left : left + side])
        return torch.stack(squares)


def _encoder_of(term: str) -> str:
    """`clip_style` -> `clip`."""
    return term.partition("_")[0]


def _apart_from_the_sampler() -> ExitStack:
    """Autograd refuses tensors that were made in inference mode, where a WebUI may be when references are embedded."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def _embedded(encoder: ImageEncoder, pictures: Pictures | Each) -> Tensor:
    """The mean direction of all the pictures, [1, D]; of each one's, [B, D]."""
    if isinstance(pictures, Each):
        return torch.cat([_embedded(encoder, one) for one in pictures.of])
    with _apart_from_the_sampler():
        batches = [pictures] if isinstance(pictures, Tensor) else pictures
        mean = torch.cat([encoder.image(batch) for batch in batches]).mean(0, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)


def _text_embedded(clip: TextEncoder, text: Tensor | Sequence[str]) -> Tensor:
    """The direction of each prompt, [1 or B, D]."""
    with _apart_from_the_sampler():
        embedding = text.clone() if isinstance(text, Tensor) else clip.text(text)
        return torch.nn.functional.normalize(embedding, dim=-1)
