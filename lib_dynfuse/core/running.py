"""Means over the layers of a generation, one for every picture's half, while a host's batches change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_dynfuse.core.types import Row


class RunningMeans:
    """The means of k numbers for every row of the batch, kept by picture and half: rows never see one another."""

    def __init__(self, start: Sequence[float], count: float = 0.0) -> None:
        """`start` counts like `count` numbers that were already seen."""
        # A hair above zero, so that a mean of nothing is no 0 / 0.
        self._new = torch.tensor([start, [max(count, 1e-9)] * len(start)])
        self._away: dict[tuple[int, bool], Tensor] = {}
        self._rows: tuple[Row, ...] = ()
        self._state = torch.empty(0)

    def lay_out(self, rows: tuple[Row, ...], device: torch.device) -> None:
        """Puts the former rows' means away and lays out those of `rows`."""
        if rows == self._rows and device == self._state.device:
            return
        for index, row in enumerate(self._rows):
            self._away[row.image, row.cond] = self._state[index].to(device)
        self._rows = rows
        # Changed in place from now on, in the host's inference mode and out of it.
        with torch.inference_mode(False):
            self._state = torch.stack([self._of(row, device) for row in rows])

    def _of(self, row: Row, device: torch.device) -> Tensor:
        """A row's means and counts, [2, k]; those of a new row are copied to the device once."""
        known = self._away.get((row.image, row.cond))
        if known is not None:
            return known
        if self._new.device != device:
            self._new = self._new.to(device, non_blocking=True)
        return self._new

    @property
    def now(self) -> Tensor:
        """The means [B, k]."""
        return self._state[:, 0]

    def update(self, values: Tensor, heard: Tensor) -> Tensor:
        """Takes in one more [B, k] where `heard` [B, k] says so, and returns the means [B, k]."""
        means, counts = self._state.unbind(1)
        counts += heard
        return means.addcdiv_(torch.where(heard, values - means, 0.0), counts)
