"""Pictures of the testbed, made on demand and kept in files: who is on them, in which style, and the pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lab.testbed import split
from lab.testbed.placing import cut_out, place, tint
from lab.testbed.styles import FILTERS, SIZE


class Drawings:
    """The data file's pictures on white, opened once."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as data:
            self._x, self._subject, self._style = data["x"], data["subj"], data["sty"]
            self.names, self._styles = [str(n) for n in data["names"]], [str(s) for s in data["styles"]]
        self._cut: dict[int, Image.Image] = {}

    @cached_property
    def _index(self) -> dict[tuple[str, str], int]:
        return {
            (self.names[subject], self._styles[style]): number
            for number, (subject, style) in enumerate(zip(self._subject, self._style, strict=True))
        }

    def sources(self, name: str, style: str) -> list[int]:
        """The drawings that a picture of this subject in this style may be made from."""
        drawn = (style,) if style in split.DRAWN_STYLES else ("flat", "noto")
        return [self._index[name, one] for one in drawn if (name, one) in self._index]

    def cut(self, number: int) -> Image.Image:
        if number not in self._cut:
            self._cut[number] = cut_out(self._x[number])
        return self._cut[number]

    def picture(self, name: str, style: str, random: np.random.Generator) -> np.ndarray:
        """uint8 [128, 128, 3]. Raises LookupError where no set has a drawing of the subject for this style."""
        sources = self.sources(name, style)
        if not sources:
            raise LookupError(f"no drawing of {name} for {style}")
        placed = place(self.cut(sources[int(random.integers(len(sources)))]), random)
        if style in split.DRAWN_STYLES:
            return placed.on(tint(random))
        return FILTERS[style](placed.on(np.full(3, 255.0)), placed.inside)


@dataclass(frozen=True)
class Pictures:
    """`x`: uint8 [N, 128, 128, 3]; `names`, `styles`: what is on each picture."""

    x: np.ndarray
    names: list[str]
    styles: list[str]

    @classmethod
    def made(
        cls, folder: Path, drawings: Drawings, wanted: Sequence[tuple[str, str]], seed: int, bar: bool = True
    ) -> Pictures:
        """One picture for each (subject, style), read from `folder` where it was made before.

        Each picture depends on its number and on `seed` alone. Pairs without a drawing are left out.
        """
        wanted = [pair for pair in wanted if drawings.sources(*pair)]
        file = folder / "x.npy"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / "partial.npy"
            x = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(wanted), SIZE, SIZE, 3))
            for number, pair in enumerate(tqdm(wanted, desc=folder.name, disable=not bar, mininterval=10)):
                x[number] = drawings.picture(pair[0], pair[1], np.random.default_rng([seed, number]))
            x.flush()
            os.replace(partial, file)
        names, styles = zip(*wanted, strict=True)
        return cls(np.load(file, mmap_mode="r"), list(names), list(styles))


def for_autoencoder(drawings: Drawings, count: int, seed: int) -> list[tuple[str, str]]:
    """Random subjects in random styles, truth pictures left out: what the autoencoder learns to draw."""
    random = np.random.default_rng(seed)
    wanted: list[tuple[str, str]] = []
    while len(wanted) < count:
        pair = drawings.names[int(random.integers(len(drawings.names)))], str(random.choice(split.STYLES))
        if not split.is_truth(*pair) and drawings.sources(*pair):
            wanted.append(pair)
    return wanted


def truths(drawings: Drawings, subjects: Sequence[str] = split.KEPT_SUBJECTS) -> list[tuple[str, str]]:
    """Every kept subject in every kept style."""
    return [(name, style) for name in subjects for style in split.KEPT_STYLES if drawings.sources(name, style)]
