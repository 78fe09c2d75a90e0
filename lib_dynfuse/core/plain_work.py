"""Deltas of any kind at work, each computed by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.loudness import Scaling
from lib_dynfuse.core.packed import as_tokens
from lib_dynfuse.core.rules import Features, Selection
from lib_dynfuse.core.sampling import picked
from lib_dynfuse.core.work import Work, squares, weighted


class PlainWork(Work):
    """Deltas of any kind, each computed by itself."""

    def __init__(
        self,
        deltas: Sequence[Delta],
        base: Tensor,
        x: Tensor,
        y: Tensor,
        channel_dim: int,
        rows: int,
        loudness: Scaling | None,
    ) -> None:
        """`base` is the layer's output as the deltas define it."""
        super().__init__(x, y, channel_dim, rows, loudness)
        self._deltas, self._base = deltas, base
        self._channel_dim = channel_dim
        self._computed: list[Tensor | None] = [None] * len(deltas)

    @property
    def has_both(self) -> bool:
        return all(found is not None for found in self._computed)

    def compute_both(self) -> None:
        for role in range(len(self._deltas)):
            self._delta(role)

    def _delta(self, role: int) -> Tensor:
        """A role's delta [B, T, C], computed once and within the limits."""
        with torch.set_grad_enabled(self._grad):
            return self._made(role)

    def _made(self, role: int) -> Tensor:
        found = self._computed[role]
        if found is None:
            found = self._computed[role] = self._alone(role)
            if self.loudness is not None:
                both = [one if one is not None else self._alone(k) for k, one in enumerate(self._computed)]

                def lengths() -> tuple[Tensor, Tensor]:
                    subject, style, base = (squares(one.detach(), self.dim) for one in (*both, self.tokens))
                    return torch.stack([subject, style]), base

                factors = self.loudness.factors(found.shape[0], lengths)
                self._computed = [
                    one if by is None else one * by.to(one.dtype) for one, by in zip(both, factors, strict=True)
                ]
                return self._made(role)
        return found

    def _alone(self, role: int) -> Tensor:
        found = self._deltas[role](self.x, self._base)
        if found.stride() != self._base.stride():
            found = torch.empty_like(self._base).copy_(found)
        return as_tokens(found, self._channel_dim)

    def look(self, sampled: int, rows: tuple[int, ...] | None = None, both: bool = False) -> Iterator[Features]:
        items = self._items(rows)
        whole = tuple(one[items] for one in (self.tokens, self._delta(0), self._delta(1)))
        index = self._places(sampled)
        if index is not None:
            base, subject, style = (picked(one, index).flatten(0, 1) for one in whole)
            yield Features(base, subject, style, -1, whole[0].shape[0])
            return
        for where in self._stretches(whole[0]):
            base, subject, style = (self._stretch(one, *where) for one in whole)
            yield Features(base, subject, style, self.dim, where[0].stop - where[0].start)

    def add(self, selection: Selection) -> None:
        target = self._native(self.tokens)
        weights = (selection.subject, selection.style)[: len(self._deltas)]
        if self.loudness is not None:
            self._delta(0)  # is measured against the output as it still is
        for role, weight in enumerate(weights):
            if isinstance(weight, Tensor):
                target.add_(weighted(self._native(self._delta(role)), self._native(self._column(weight))))
            elif weight:
                target.add_(self._native(self._delta(role)), alpha=weight)
