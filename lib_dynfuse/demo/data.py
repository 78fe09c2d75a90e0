"""The emoji pictures: loading them, and picking the ones that a training stage may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from lib_dynfuse.demo import split


@dataclass(frozen=True)
class Pictures:
    """Emoji on white.

    `images`: uint8 [N, 3, H, W]; `subject` and `style`: [N] indices into `names` and `styles`.
    """

    images: torch.Tensor
    subject: np.ndarray
    style: np.ndarray
    names: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.subject)

    @property
    def truth(self) -> np.ndarray:
        """[N] True where a held-out subject is drawn in a held-out style."""
        return split.truth_mask(self.names, self.styles, self.subject, self.style)

    def where(self, subjects: tuple[str, ...], styles: tuple[str, ...]) -> np.ndarray:
        """Indices of the pictures of these subjects in these styles."""
        of_subject = np.isin(self.subject, [self.names.index(name) for name in subjects])
        return np.flatnonzero(of_subject & np.isin(self.style, [self.styles.index(name) for name in styles]))

    def caption(self, index: int) -> str:
        return split.caption(self.names[self.subject[index]], self.styles[self.style[index]])

    def floats(self, index: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """[n, 3, H, W] float32 in -1..1, as the autoencoder wants them."""
        return self.images[index].float() / 127.5 - 1

    def shrunk(self, factor: int) -> Pictures:
        """The same pictures, every square of `factor` x `factor` pixels averaged to one."""
        images = torch.cat(
            [avg_pool2d(part.float(), factor).round().to(torch.uint8) for part in self.images.split(256)]
        )
        return replace(self, images=images.contiguous())


def load(path: Path, pixels: int) -> Pictures:
    """Reads an npz with x, subj, sty, names, styles and averages its pictures down to `pixels` a side.

    Raises:
        ValueError: the file's pictures are not a whole multiple of `pixels`.
    """
    with np.load(path) as file:
        x = torch.from_numpy(file["x"]).permute(0, 3, 1, 2)
        subject, style = file["subj"], file["sty"]
        names, styles = [str(n) for n in file["names"]], [str(s) for s in file["styles"]]
    factor, rest = divmod(x.shape[-1], pixels)
    if rest or not factor:
        raise ValueError(f"{path} holds pictures of {x.shape[-1]} pixels, which {pixels} does not divide")
    pictures = Pictures(x.contiguous(), subject, style, names, styles)
    return pictures.shrunk(factor) if factor > 1 else pictures
