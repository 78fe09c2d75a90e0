"""What a comparison keeps in its folder: settings, judged pictures line by line, and some of the pictures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.output import write_whole

SETTINGS, ROWS, PICTURES = "settings.json", "pictures.jsonl", "pictures"
DAMAGED = "pictures.damaged.jsonl"
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
    before = _settings(file) if file.exists() else {}
    now = json.loads(json.dumps(settings))
    for name, old in before.items():
        if name in _GROWS:
            now[name] = {**old, **now[name]}
            changed = next((one for one in old if old[one] != now[name][one]), None)
            if changed is not None:
                raise DynFuseError(f"--resume: {name[:-1]} {changed} was another in {out}; take another --out")
        elif old != now[name]:
            raise DynFuseError(f"--resume: {name} was {old} in {out}, not {now[name]}; take another --out")
    write_whole(file, json.dumps(now, indent=1) + "\n")


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in _GROWS):
        raise DynFuseError(
            f"{SETTINGS} is damaged: what this comparison was made with is not known; take another --out"
        )
    return settings


def read_rows(out: Path, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """The pictures that were judged so far, each once.

    A last line that a kill has cut off is forgotten. Lines that are something else are moved to `DAMAGED` and `say`
    gets how many: their pictures are made again.
    """
    file = out / ROWS
    if not file.exists():
        return []
    whole, _, cut_off = file.read_bytes().rpartition(b"\n")
    lines = [line for line in whole.split(b"\n") if line.strip()]
    found = [_read(line) for line in lines]
    # A line may be whole and yet be of something else: it then has other measures than the others.
    measures = Counter(frozenset(row.values) for row in found if row is not None).most_common(1)
    good = [row is not None and frozenset(row.values) == measures[0][0] for row in found]
    rows = {row.key: row for row, is_good in zip(found, good, strict=True) if row is not None and is_good}
    damaged = [line for line, is_good in zip(lines, good, strict=True) if not is_good]
    if damaged:
        with open(out / DAMAGED, "ab") as kept:
            kept.write(b"".join(line + b"\n" for line in damaged))
        say(f"{len(damaged)} of {len(lines)} lines of {ROWS} are no judged pictures: they are in {DAMAGED} now")
    if damaged or cut_off:
        write_whole(file, "".join(row.dumps() for row in rows.values()))
    return list(rows.values())


def _read(line: bytes) -> Row | None:
    """None for a line that is no judged picture."""
    try:
        values = json.loads(line)
        row = Row(values.pop("pair"), values.pop("method"), values.pop("seed"), values)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    right = isinstance(row.pair, str) and isinstance(row.method, str) and type(row.seed) is int
    return row if right and row.values and all(type(one) in (int, float) for one in row.values.values()) else None


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
    part = file.with_name(f"{file.name}.part")
    Image.fromarray(scaled.permute(1, 2, 0).numpy()).save(part, format="PNG")
    os.replace(part, file)
