"""How well the small CLIP and the small DINO tell real pictures apart that they have not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import ViTModel

from lib_dynfuse.demo import encoders, judge, split
from lib_dynfuse.demo.data import Pictures

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


def neighbours(features: torch.Tensor, pictures: Pictures) -> dict[str, float]:
    """Of all unseen pictures, the share whose nearest seen one agrees with them.

    Subject: nearest in another style. Style: nearest of another subject. Only subjects of the split take part.

    Args:
        features: [N, D] of all pictures, of length 1.
    """
    style = drawn_alike(pictures)
    known = np.intersect1d(encoders.taught(pictures), np.flatnonzero(of_split(pictures)))
    asked = unseen(pictures)
    near = (features[asked] @ features[known].T).numpy()
    same_subject = pictures.subject[asked][:, None] == pictures.subject[known]
    same_style = style[asked][:, None] == style[known]
    by_subject = np.where(same_style, -2.0, near).argmax(1)[:, None]
    by_style = np.where(same_subject, -2.0, near).argmax(1)[:, None]
    return {
        "subject of the nearest in another style": float(np.take_along_axis(same_subject, by_subject, 1).mean()),
        "style of the nearest of another subject": float(np.take_along_axis(same_style, by_style, 1).mean()),
    }


@torch.no_grad()
def clip_figures(folder: Path, pictures: Pictures) -> dict[str, float]:
    """What the CLIP in `folder` says of pictures by their captions, and by their neighbours."""
    open_clip = encoders.import_open_clip()
    model = open_clip.create_model(f"local-dir:{folder}").float().eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    parts = (encoders.sized(part) for part in pictures.images.split(BATCH))
    wanted = (encoders.prepared(part, encoders.CLIP_MEAN, encoders.CLIP_STD) for part in parts)
    images = torch.cat([model.encode_image(part, normalize=True) for part in wanted])
    subjects = [name for name in judge.SUBJECTS if name in pictures.names]
    judged = [split.JUDGED_AS[style] for style in pictures.styles]

    def named(texts: list[str], index: np.ndarray) -> list[int]:
        return (images[index] @ model.encode_text(tokenizer(texts), normalize=True).T).argmax(1).tolist()

    def right(index: np.ndarray) -> dict[str, float]:
        subject = named([f"{name} emoji" for name in subjects], index)
        style = named([f"{split.STYLE_WORDS[style]} style" for style in pictures.styles], index)
        are_subject = [subjects[k] == pictures.names[n] for k, n in zip(subject, pictures.subject[index], strict=True)]
        are_style = [judged[k] == judged[n] for k, n in zip(style, pictures.style[index], strict=True)]
        return {"subject": float(np.mean(are_subject)), "style": float(np.mean(are_style))}

    asked, truth = unseen(pictures), np.flatnonzero(pictures.truth)
    return {
        **{f"{what} by captions, {len(asked)} pictures": share for what, share in right(asked).items()},
        **{f"{what} by captions, {len(truth)} truth pictures": share for what, share in right(truth).items()},
        **neighbours(images, pictures),
    }


@torch.no_grad()
def dino_figures(folder: Path, pictures: Pictures) -> dict[str, float]:
    """What the DINO in `folder` takes for alike."""
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    parts = (encoders.sized(part) for part in pictures.images.split(BATCH))
    wanted = (encoders.prepared(part, encoders.DINO_MEAN, encoders.DINO_STD) for part in parts)
    return neighbours(normalize(torch.cat([model(part).last_hidden_state[:, 0] for part in wanted]), dim=1), pictures)
