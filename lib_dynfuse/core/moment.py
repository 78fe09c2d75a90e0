"""Where a generation stands, and which batch item belongs to which picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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

    @property
    def cond_rows(self) -> dict[int, int]:
        """Where each picture's first cond row stands in the batch."""
        position: dict[int, int] = {}
        for index, row in enumerate(self.rows):
            if row.cond:
                position.setdefault(row.image, index)
        return position

    @property
    def orphans(self) -> list[int]:
        """The uncond rows whose picture has no cond row in this batch."""
        conds = self.cond_rows
        return [index for index, row in enumerate(self.rows) if not row.cond and row.image not in conds]

    @property
    def split(self) -> bool:
        """Whether a picture's cond row stands here without its uncond row, which then comes in another batch."""
        return any(row.cond for row in self.rows) and not {row.image for row in self.rows if not row.cond} >= set(
            self.cond_rows
        )

    def indices(self, values: Sequence[int]) -> Tensor:
        """`values` as an int64 tensor on the device: sent once, without waiting, and kept while the rows stay."""
        key = tuple(values)
        if key not in self._indices:
            self._indices[key] = torch.tensor(key, dtype=torch.int64).to(self.device, non_blocking=True)
        return self._indices[key]

    def coupled(self, values: Tensor) -> Tensor:
        """`values` [B, ...] with every uncond row replaced by its picture's cond row, where the batch has one."""
        conds = self.cond_rows
        partners = [index if row.cond else conds.get(row.image, index) for index, row in enumerate(self.rows)]
        if partners == list(range(len(self.rows))):
            return values
        return values.index_select(0, self.indices(partners))
