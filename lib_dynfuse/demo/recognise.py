"""How well the small CLIP and the small DINO tell real pictures apart that they have not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

from lib_dynfuse.demo import encoders, judge, split
from lib_dynfuse.demo.data import Pictures
from lib_dynfuse.guidance.encoders import ClipEncoder, Encoder, load_clip, load_dino
from lib_dynfuse.guidance.sources import Source

BATCH = 128


def drawn_alike(pictures: Pictures) -> np.ndarray:
    """[N] indices into the judged styles, which count fluent's three shadings as one."""
    judged = [split.JUDGED_STYLES.index(split.JUDGED_AS[style]) for style in pictures.styles]
    return np.array(judged)[pictures.style]


def of_split(pictures: Pictures) -> np.ndarray:
    """[N] True for the subjects that the demo can be asked for."""
    return np.isin(pictures.subject, [pictures.names.index(name) for name in judge.SUBJECTS if name in pictures.names])


def unseen(pictures: Pictures) -> np.ndarray:
    """Indices of the pictures that no encoder has learnt from."""
    return np.setdiff1d(np.arange(len(pictures)), encoders.taught(pictures))


def seen(pictures: Pictures) -> np.ndarray:
    """Indices of the pictures that unseen ones are compared with: those taught, of subjects of the split."""
    return np.intersect1d(encoders.taught(pictures), np.flatnonzero(of_split(pictures)))


def neighbours(features: torch.Tensor, pictures: Pictures) -> dict[str, float]:
    """Of all unseen pictures, the share whose nearest seen one agrees with them.

    Subject: nearest in another style. Style: nearest of another subject. Only subjects of the split take part.

    Args:
        features: [N, D] of all pictures, of length 1.
    """
    style, known, asked = drawn_alike(pictures), seen(pictures), unseen(pictures)
    near = (features[asked] @ features[known].T).numpy()
    same_subject = pictures.subject[asked][:, None] == pictures.subject[known]
    same_style = style[asked][:, None] == style[known]
    by_subject = np.where(same_style, -2.0, near).argmax(1)[:, None]
    by_style = np.where(same_subject, -2.0, near).argmax(1)[:, None]
    return {
        "subject of the nearest in another style": float(np.take_along_axis(same_subject, by_subject, 1).mean()),
        "style of the nearest of another subject": float(np.take_along_axis(same_style, by_style, 1).mean()),
    }


def by_references(features: torch.Tensor, pictures: Pictures) -> dict[str, float]:
    """Of the truth pictures, the share that is nearer to its own subject's, its own style's reference than to others.

    A reference is what guidance would be given: the mean of a held-out subject's pictures in the styles that are
    taught, or of a style's pictures of the other subjects.

    Args:
        features: [N, D] of all pictures, of length 1.
    """
    asked, known = np.flatnonzero(pictures.truth), seen(pictures)
    shares = {}
    for what, kind in (("subject", pictures.subject), ("style", drawn_alike(pictures))):
        choices = np.unique(kind[asked] if what == "subject" else kind)
        means = torch.stack([features[known[kind[known] == choice]].mean(0) for choice in choices])
        found = choices[(features[asked] @ normalize(means, dim=1).T).argmax(1)]
        name = f"{what} of {len(asked)} truth pictures by references of {len(choices)}"
        shares[name] = float((found == kind[asked]).mean())
    return shares


@torch.no_grad()
def looked_at(encoder: Encoder, pictures: Pictures) -> torch.Tensor:
    """[N, D] of length 1, as guidance sees the pictures."""
    return torch.cat([encoder.image(part.float() / 255) for part in pictures.images.split(BATCH)])


def by_captions(clip: ClipEncoder, features: torch.Tensor, pictures: Pictures) -> dict[str, float]:
    """The share of unseen pictures, and of truth pictures, whose nearest caption names their subject, their style."""
    subjects = [name for name in judge.SUBJECTS if name in pictures.names]
    number = np.array([subjects.index(name) if name in subjects else -1 for name in pictures.names])
    judged = np.array([split.JUDGED_STYLES.index(split.JUDGED_AS[style]) for style in pictures.styles])
    named = clip.text([f"{name} emoji" for name in subjects])
    styled = clip.text([f"{split.STYLE_WORDS[style]} style" for style in pictures.styles])
    shares = {}
    for what, index in (("", unseen(pictures)), ("truth ", np.flatnonzero(pictures.truth))):
        subject = (features[index] @ named.T).argmax(1).numpy()
        style = judged[(features[index] @ styled.T).argmax(1).numpy()]
        end = f"by captions, {len(index)} {what}pictures"
        shares[f"subject {end}"] = float((subject == number[pictures.subject[index]]).mean())
        shares[f"style {end}"] = float((style == drawn_alike(pictures)[index]).mean())
    return shares


def clip_figures(folder: Path, pictures: Pictures) -> dict[str, float]:
    """What the CLIP in `folder` says of pictures by their captions, by their neighbours and by references."""
    clip = load_clip(folder.name, Source(folder.parent))
    features = looked_at(clip, pictures)
    captions = by_captions(clip, features, pictures)
    return {**captions, **neighbours(features, pictures), **by_references(features, pictures)}


def dino_figures(folder: Path, pictures: Pictures) -> dict[str, float]:
    """What the DINO in `folder` takes for alike."""
    features = looked_at(load_dino(folder.name, Source(folder.parent)), pictures)
    return {**neighbours(features, pictures), **by_references(features, pictures)}


def pixel_figures(pictures: Pictures) -> dict[str, float]:
    """What is alike pixel by pixel, at 8 x 8 of them: what an encoder has to beat."""
    small = torch.cat([adaptive_avg_pool2d(part.float(), 8).flatten(1) for part in pictures.images.split(BATCH)])
    features = normalize(small - small.mean(0), dim=1)
    return {**neighbours(features, pictures), **by_references(features, pictures)}
