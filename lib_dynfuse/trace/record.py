"""What was chosen: at every forward pass, for every layer and batch item, the roles' weights and divergences."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .blocks import block_of

Array = npt.NDArray[np.float32]
FORMAT = 1
FIELDS = ("subject", "style", "d_subject", "d_style")
SUBJECT, STYLE, D_SUBJECT, D_STYLE = range(4)


class Item(NamedTuple):
    """One item of a pass's batch: the picture it belongs to, and whether it is the prompt's half."""

    image: int
    cond: bool


@dataclass(frozen=True)
class Pass:
    """One forward pass. `progress`: 0 at the first step, 1 at the last; `sigma`: the host's, None if unknown."""

    step: int
    progress: float
    sigma: float | None
    rows: tuple[Item, ...]


@dataclass
class Record:
    """What a generation chose.

    layers: names, in the order of the last axes. passes: one entry a forward pass.
    values: float32 [passes, layers, rows, 4], the weights that were applied to subject and style (per token: their
        mean) and the roles' divergences from the base; NaN where a pass had no such row, or the rule no divergence.
    tokens: layer -> float32 [images, tokens], the subject's share of each token, its mean over passes, cond and uncond;
        only of layers that were decided token by token, and only if the trace was asked for tokens.
    nudges: step -> what a nudge makes smaller (R of arXiv 2602.15539) before that step's nudge, for each picture; NaN
        where it is not known. Only of steps that were nudged.
    weighed: whether a layer got some of both roles, so that shares are of weights and not of layers.
    names: role -> the names of its LoRAs, for a person to read; empty where they are not known.
    """

    layers: list[str]
    passes: list[Pass]
    values: Array
    tokens: dict[str, Array] = field(default_factory=dict)
    nudges: dict[int, list[float]] = field(default_factory=dict)
    weighed: bool = False
    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def images(self) -> list[int]:
        """The pictures that the record speaks of, ascending."""
        nudged = {image for row in self.nudges.values() for image in range(len(row))}
        return sorted({row.image for one in self.passes for row in one.rows} | nudged)

    def curve(self, image: int) -> tuple[list[int], list[float]]:
        """The steps at which a picture was nudged, and R there; of an item that could not be nudged nothing."""
        known = [(step, row[image]) for step, row in sorted(self.nudges.items()) if image < len(row)]
        known = [(step, value) for step, value in known if math.isfinite(value)]
        return [step for step, _ in known], [value for _, value in known]

    def style_share(self, image: int) -> Array:
        """[passes, layers]: the style's part of what was applied to a picture, style / (subject + style).

        The mean over the picture's rows; NaN where nothing was recorded or both weights are zero. Raises ValueError for
        a picture that is not in the record.
        """
        if image not in self.images:
            raise ValueError(f"picture {image} is not in the record; it has {self.images}")
        mine = np.zeros(self.values.shape[:3], dtype=bool)
        for index, one in enumerate(self.passes):
            for row, item in enumerate(one.rows):
                mine[index, :, row] = item.image == image
        weights = np.abs(self.values[..., : STYLE + 1])
        total = weights.sum(axis=-1)
        known = mine & (total > 0)  # False for NaN
        share = np.divide(weights[..., STYLE], total, out=np.zeros_like(total), where=known)
        count = known.sum(axis=-1)
        return np.divide(share.sum(axis=-1), count, out=np.full(count.shape, np.nan, np.float32), where=count > 0)

    def shares(self) -> dict[int, dict[str, float]]:
        """Picture -> {"subject": s, "style": t}, each role's part of what was applied; s + t = 1.

        The mean over passes and layers. A picture for which nothing was recorded is left out.
        """
        found = {}
        for image in self.images:
            share = self.style_share(image)
            if not np.isnan(share).all():
                style = float(np.nanmean(share))
                found[image] = {"subject": 1 - style, "style": style}
        return found

    def in_words(self, share: Mapping[str, float]) -> str:
        """One picture's part of `shares`, as in "subject fox 61% style ink 39%"; of weights it says so."""
        words = [" ".join([role, *self.names.get(role, ()), f"{part:.0%}"]) for role, part in share.items()]
        return " ".join([*words, *(["of the weights"] if self.weighed else [])])

    def dumps(self) -> str:
        """The record as JSON; numbers keep six significant digits, NaN and infinity become null."""
        content = {
            "format": FORMAT,
            "weighed": self.weighed,
            "names": self.names,
            "layers": self.layers,
            "passes": [
                {
                    "step": one.step,
                    "progress": _rounded(one.progress),
                    "sigma": None if one.sigma is None else _rounded(one.sigma),
                    "rows": [row._asdict() for row in one.rows],
                    **{name: _nested(self.values[p, :, : len(one.rows), k]) for k, name in enumerate(FIELDS)},
                }
                for p, one in enumerate(self.passes)
            ],
            "tokens": {layer: _nested(values) for layer, values in self.tokens.items()},
            "nudges": [{"step": step, "r": [_known(value) for value in row]} for step, row in self.nudges.items()],
        }
        return json.dumps(content, separators=(",", ":"), allow_nan=False)

    def to_json(self, path: Path) -> None:
        """Write what `dumps` says, the whole file or none of it."""
        _write(path, self.dumps())

    @classmethod
    def from_json(cls, path: Path) -> Record:
        """Read what `to_json` wrote. Raises ValueError, naming the file, when it is something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            return cls._from(content)
        except (KeyError, TypeError, IndexError, ValueError) as problem:
            raise ValueError(f"{path} is not a trace: {problem}") from problem

    @classmethod
    def _from(cls, content: Mapping[str, Any]) -> Record:
        layers = list(content["layers"])
        passes = [
            Pass(one["step"], one["progress"], one["sigma"], tuple(Item(**row) for row in one["rows"]))
            for one in content["passes"]
        ]
        most = max((len(one.rows) for one in passes), default=0)
        values = np.full((len(passes), len(layers), most, len(FIELDS)), np.nan, np.float32)
        for p, one in enumerate(content["passes"]):
            for k, name in enumerate(FIELDS):
                values[p, :, : len(passes[p].rows), k] = np.array(one[name], np.float32).reshape(len(layers), -1)
        tokens = {layer: np.array(rows, np.float32) for layer, rows in content["tokens"].items()}
        nudges = {
            int(one["step"]): [math.nan if value is None else float(value) for value in one["r"]]
            for one in content.get("nudges", ())  # older traces have none
        }
        names = {role: list(listed) for role, listed in content.get("names", {}).items()}
        return cls(layers, passes, values, tokens, nudges, bool(content.get("weighed", False)), names)

    def to_csv(self, path: Path) -> None:
        """Write one line for each pass, layer and batch item for which something was recorded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["pass", "step", "progress", "sigma", "block", "layer", "image", "cond", *FIELDS])
        blocks = [block_of(layer).label for layer in self.layers]
        for p, one in enumerate(self.passes):
            head = [p, one.step, _rounded(one.progress), "" if one.sigma is None else _rounded(one.sigma)]
            for index, layer in enumerate(self.layers):
                for row, item in enumerate(one.rows):
                    values = self.values[p, index, row]
                    if not np.isnan(values).all():
                        numbers = ["" if np.isnan(value) else _rounded(value) for value in values]
                        writer.writerow([*head, blocks[index], layer, item.image, int(item.cond), *numbers])
        _write(path, text.getvalue())


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _nested(values: Array) -> list[list[float | None]]:
    return [[_known(value) for value in row] for row in values.tolist()]


def _known(value: float) -> float | None:
    return _rounded(value) if math.isfinite(value) else None


def _write(path: Path, text: str) -> None:
    """Write the whole file or none of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
