"""What came out: a table with intervals, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_dynfuse.evaluate.intervals import Array, Estimate, cube, differences, draws, estimates
from lib_dynfuse.evaluate.store import Row
from lib_dynfuse.guidance.scores import LABELS

# Shares of pictures, which a person reads in percent; all else keeps its own unit.
SHARES = ("subject", "style", "both")
_NAMES = {**LABELS, "csd": "CSD style", "harmonic_mean": "harmonic mean", "both": "both right", "distance": "distance"}


@dataclass(frozen=True)
class Report:
    """The measured values of a whole comparison, no picture missing.

    values: measure -> [methods, pairs, seeds]. `notes`: what a reader has to know of the numbers, a line each.
    `against`: the method that the others' differences in the `main` measure are to.
    """

    methods: list[str]
    pairs: list[str]
    seeds: int
    values: Mapping[str, Array]
    main: str
    against: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        methods: Sequence[str],
        pairs: Sequence[str],
        seeds: int,
        *,
        main: Sequence[str],
        against: str = "",
        notes: Sequence[str] = (),
    ) -> Report:
        """`main`: measures by preference, of which the first that was measured counts. Raises KeyError where a picture
        is missing; measures that not every picture has are left out."""
        wanted = set(methods), set(pairs)
        own = [row for row in rows if row.method in wanted[0] and row.pair in wanted[1] and row.seed < seeds]
        names = [name for name in own[0].values if all(name in row.values for row in own)]
        values = {name: cube(own, methods, pairs, seeds, name) for name in names}
        first = next((name for name in main if name in values), names[0])
        return cls(list(methods), list(pairs), seeds, values, first, against or methods[0], list(notes))

    def rows(self) -> list[dict[str, Any]]:
        """One object a method: each measure's mean and interval, and the difference in the main one."""
        drawn = draws(len(self.pairs), self.seeds)
        found: list[dict[str, Any]] = [{"method": method, "pictures": self.pictures} for method in self.methods]
        for name, values in self.values.items():
            for row, estimate in zip(found, estimates(values, drawn), strict=True):
                row[name] = _rounded(estimate)
        ahead = differences(self.values[self.main], drawn, self.methods.index(self.against))
        for row, estimate in zip(found, ahead, strict=True):
            row[f"{self.main} minus {self.against}"] = _rounded(estimate)
        return found

    @property
    def pictures(self) -> int:
        return len(self.pairs) * self.seeds

    def markdown(self) -> str:
        """The table as a person reads it: shares in percent, intervals in brackets."""
        difference = f"{self.main} minus {self.against}"
        columns = [*self.values, difference]
        heads = ["method", *(f"{name_of(name)} %" if _share(name) else name_of(name) for name in columns)]
        lines = [heads]
        for row in self.rows():
            signed = row["method"] != self.against
            cells = [_cell(row[name], _share(name), signed and name == difference) for name in columns]
            lines.append([row["method"], *cells[:-1], cells[-1] if signed else ""])
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        drawn = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = "|".join("-" * (width + 2) for width in widths)
        note = (
            f"{self.pictures} pictures a method: {len(self.pairs)} pairs, {self.seeds} seeds each, the same for every "
            "method. In brackets the 95 % interval of a paired bootstrap over pairs and seeds."
        )
        table = [f"| {drawn[0]} |", f"|{rule}|", *(f"| {line} |" for line in drawn[1:])]
        return "\n".join([*table, "", note, *self.notes]) + "\n"


def name_of(measure: str) -> str:
    """What a measure is called in a table."""
    return _NAMES.get(measure, measure)


def _share(name: str) -> bool:
    return name.partition(" minus ")[0] in SHARES


def _rounded(estimate: Estimate) -> list[float]:
    return [round(value, 4) for value in estimate]


def _cell(values: Sequence[float], share: bool, signed: bool) -> str:
    sign = "+" if signed else ""
    mean, low, high = (f"{100 * value:{sign}.0f}" if share else f"{value:{sign}.3f}" for value in values)
    return f"{mean} ({low} to {high})"
