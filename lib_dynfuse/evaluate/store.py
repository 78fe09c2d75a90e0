"""What a comparison keeps in its folder: settings, judged pictures line by line, and some of the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lib_dynfuse.errors import DynFuseError

SETTINGS, ROWS, PICTURES = "settings.json", "pictures.jsonl", "pictures"
# What a comparison may have more of when it goes on; what was there before has to be the same.
_GROWS = ("methods", "pairs")


@dataclass(frozen=True)
class Row:
    """One picture, judged. `values`: what was measured, by name."""

    pair: str
    method: str
    seed: int
    values: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.pair, self.method, self.seed

    def dumps(self) -> str:
        """A line of JSON."""
        return json.dumps({"pair": self.pair, "method": self.method, "seed": self.seed, **self.values}) + "\n"


def begin(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Writes the settings down, or sees to it that they are those of before.

    Raises DynFuseError where there is a comparison already and `resume` is off, or it was made with other settings.
    """
    file = out / SETTINGS
    if file.exists() and not resume:
        raise DynFuseError(f"{out} has a comparison already; go on with --resume or take another --out")
    out.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    now = json.loads(json.dumps(settings))
    for name, old in before.items():
        if name in _GROWS:
            now[name] = {**old, **now[name]}
            changed = next((one for one in old if old[one] != now[name][one]), None)
            if changed is not None:
                raise DynFuseError(f"--resume: {name[:-1]} {changed} was another in {out}; take another --out")
        elif old != now[name]:
            raise DynFuseError(f"--resume: {name} was {old} in {out}, not {now[name]}; take another --out")
    file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def read_rows(out: Path) -> list[Row]:
    """The pictures that were judged so far; mends a file whose last line a kill has cut off.

    Raises DynFuseError where a line is something else.
    """
    file = out / ROWS
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole, end, _ = text.rpartition("\n")
    if whole + end != text:
        file.write_text(whole + end, encoding="utf-8")
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            rows.append(Row(values.pop("pair"), values.pop("method"), values.pop("seed"), values))
        except (ValueError, AttributeError, KeyError) as error:
            raise DynFuseError(f"{file}, line {number}: is no judged picture; take another --out") from error
    return rows


def add_rows(out: Path, rows: Sequence[Row]) -> None:
    """In one write: a kill cuts a line off, never anything that stands before."""
    with open(out / ROWS, "a", encoding="utf-8") as file:
        file.write("".join(row.dumps() for row in rows))


def picture_file(out: Path, pair: str, method: str, seed: int) -> Path:
    """Where a kept picture lies. Labels may have any character, file names may not."""
    name = "".join(c if c.isalnum() or c in "-. " else "_" for c in f"{pair}, {method}, {seed}")
    return out / PICTURES / f"{name}.png"


def keep_picture(out: Path, row: Row, picture: Tensor) -> None:
    """picture: [3, H, W] from 0 to 1."""
    file = picture_file(out, *row.key)
    file.parent.mkdir(exist_ok=True)
    scaled = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(scaled.permute(1, 2, 0).numpy()).save(file)
