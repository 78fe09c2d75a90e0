"""Where a generation stands, and which batch item belongs to which picture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lib_dynfuse.core.types import Row


@dataclass(frozen=True)
class Moment:
    """One forward pass as the fusion rules see it: the step, who is who in the batch, and where the tensors live.

    `step` counts denoising steps from 0; `progress` is 0 at the first and 1 at the last.
    """

    step: int
    progress: float
    rows: tuple[Row, ...]
    device: torch.device
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def at(self, step: int, progress: float) -> Moment:
        """The same batch at another step; shares the index tensors."""
        return replace(self, step=step, progress=progress)

    @cached_property
    def cond_rows(self) -> dict[tuple[int, int], int]:
        """Where the first cond row of each picture (each of its tiles) stands in the batch."""
        position: dict[tuple[int, int], int] = {}
        for index, row in enumerate(self.rows):
            if row.cond:
                position.setdefault(row.place, index)
        return position

    @cached_property
    def deciders(self) -> tuple[int, ...]:
        """The rows that decide for themselves where cond decides for uncond: all but the uncond rows whose picture has
        a cond row in this batch."""
        return tuple(i for i, row in enumerate(self.rows) if row.cond or row.place not in self.cond_rows)

    @cached_property
    def decided_by(self) -> tuple[int, ...]:
        """For every row the place in `deciders` of the row that decides for it."""
        place = {row: index for index, row in enumerate(self.deciders)}
        return tuple(
            place[index] if index in place else place[self.cond_rows[row.place]] for index, row in enumerate(self.rows)
        )

    @cached_property
    def split(self) -> bool:
        """Whether a picture's cond row stands here without its uncond row, which then comes in another batch."""
        return not {row.place for row in self.rows if not row.cond} >= set(self.cond_rows)

    def indices(self, values: tuple[int, ...]) -> Tensor:
        """`values` as an int64 tensor on the device: sent once, without waiting, and kept while the rows stay."""
        if values not in self._indices:
            self._indices[values] = torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
        return self._indices[values]
