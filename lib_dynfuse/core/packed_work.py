"""Low-rank deltas at work: what is added to a layer's output is never made as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lib_dynfuse.core import devices, kernels
from lib_dynfuse.core.loudness import Scaling
from lib_dynfuse.core.packed import Packed, Product, add_product, as_tokens
from lib_dynfuse.core.rules import Features, Largest, Selection
from lib_dynfuse.core.sampling import lattice_step, picked
from lib_dynfuse.core.work import Work, squares, weighted


class PackedWork(Work):
    """Low-rank deltas: neither of them is ever made as a whole."""

    def __init__(
        self, packed: Packed, x: Tensor, y: Tensor, channel_dim: int, rows: int, loudness: Scaling | None
    ) -> None:
        super().__init__(x, y, channel_dim, rows, loudness)
        packed.ready(self.x)
        self._packed = packed
        self._hidden: Tensor | None = None

    @property
    def has_both(self) -> bool:
        return self._hidden is not None

    def compute_both(self) -> None:
        self._both_hidden()

    def _both_hidden(self) -> Tensor:
        if self._hidden is None:
            with torch.set_grad_enabled(self._grad):
                self._hidden = self._packed.hidden(self.x)
                if self.loudness is not None:
                    self._hidden = self._held(self._hidden, self.loudness)
        return self._hidden

    def _held(self, hidden: Tensor, loudness: Scaling) -> Tensor:
        """Both roles' hidden products within the limits. Called before anything is added to the output."""
        packed = self._packed
        factors = loudness.factors(
            hidden.shape[0], lambda: (packed.squares(hidden.detach()), squares(self.tokens.detach(), self.dim))
        )
        if hidden.requires_grad:
            parts = (hidden[..., packed.columns(role)] for role in (0, 1))
            held = (part if by is None else part * by.to(part.dtype) for part, by in zip(parts, factors, strict=True))
            return torch.cat(list(held), -1)
        for role, by in enumerate(factors):
            if by is not None:
                hidden[..., packed.columns(role)].mul_(by)
        return hidden

    def look(self, sampled: int, rows: tuple[int, ...] | None = None, both: bool = False) -> Iterator[Features]:
        packed, items = self._packed, self._items(rows)
        # What is not looked at need not be multiplied yet, where it may turn out that one role alone is wanted.
        early = self._winners_only and not both and self.loudness is None
        y = self.tokens[items]
        index = self._places(sampled)
        if kernels.usable(self.tokens):
            hidden = self._both_hidden()[items]
            if index is not None:
                y, hidden = picked(y, index), picked(hidden, index)
            products = [Product(hidden[..., packed.columns(role)], packed.up(role)) for role in (0, 1)]
            yield Features(y, products[0], products[1], -1, y.shape[0])
            return
        if index is not None and early and self.size is None:
            hidden = packed.hidden(picked(as_tokens(self.x, -1)[items], index))
        elif index is not None and early and self.size is not None and packed.strides:
            hidden = packed.hidden(self.x[items], step=lattice_step(*self.size, sampled))
        elif rows is not None and early:
            hidden = packed.hidden(self.x[items])
        else:
            hidden = self._both_hidden()[items]
        if index is not None:
            hidden = hidden if hidden.shape[1] == len(index) else picked(hidden, index)
            base, largest = picked(y, index).flatten(0, 1), self._largest(hidden)
            yield self._features(base, hidden.flatten(0, 1), -1, y.shape[0], largest)
            return
        largest = self._largest(hidden)
        for where in self._stretches(y):
            base, here = self._stretch(y, *where), self._stretch(hidden, *where)
            of_these = largest and (largest[0][where[0]], largest[1][where[0]])
            yield self._features(base, here, self.dim, where[0].stop - where[0].start, of_these)

    @torch.no_grad()
    def _features(self, base: Tensor, hidden: Tensor, dim: int, items: int, largest: Largest | None) -> Features:
        """Both deltas of base and hidden [n, C] and [n, r], or with channels first, in one tensor."""
        packed, up = self._packed, self._packed.up()
        if packed.ranks[0] == packed.ranks[1]:
            # One product for both, in as many rows as a role has.
            hidden, up = hidden.unflatten(dim, (2, -1)), up.unflatten(0, (2, -1))
            both = torch.bmm(hidden.transpose(0, 1), up) if dim == -1 else torch.bmm(up.transpose(1, 2), hidden)
        else:
            both = base.new_empty(2, *base.shape)
            for role, delta in enumerate(both):
                columns = packed.columns(role)
                if dim == -1:
                    torch.mm(hidden[:, columns], up[columns], out=delta)
                else:
                    torch.mm(up[columns].T, hidden[columns], out=delta)
        return Features(base, both[0], both[1], dim, items, both, largest)

    def _largest(self, hidden: Tensor) -> Largest | None:
        """For either role and each item what no value of its delta is above, from hidden [B, T, r]; None where the host
        would have to wait for it."""
        if not devices.readable(hidden.device):
            return None
        found = self._packed.largest(hidden.detach()).tolist()
        return found[0], found[1]

    @property
    def _winners_only(self) -> bool:
        """Whether the decision can be read, so that of most tokens and rows only the winner's product is needed."""
        return devices.readable(self.tokens.device)

    def add(self, selection: Selection) -> None:
        subject, style = selection.subject, selection.style
        packed = self._packed
        if isinstance(subject, Tensor) and isinstance(style, Tensor):
            if kernels.usable(self.tokens) and self._add_by_kernels(subject, style):
                return
            if self._winners_only and subject.dtype == torch.bool and subject.dim() == 1:
                self._add_winners(self._column(subject).flatten().tolist())
            else:
                self._add_weighted(subject, style)
        elif len(packed.ranks) == 1 or subject == style == 1.0:
            packed.add(self.tokens, self._both_hidden())
        else:
            for role, weight in enumerate((subject, style)):
                if weight:
                    held = self.loudness is not None
                    hidden = self._both_hidden()[..., packed.columns(role)] if held else packed.hidden(self.x, role)
                    packed.add(self.tokens, hidden, role, float(weight))

    def _add_by_kernels(self, subject: Tensor, style: Tensor) -> bool:
        weights = (self._column(weight).squeeze(-1) for weight in (subject, style))
        return kernels.add(self.tokens, self._both_hidden(), self._packed.up(), self._packed.ranks[0], *weights)

    def _add_winners(self, subject_wins: list[bool]) -> None:
        """Each item's winner alone, neighbours with the same winner together."""
        batch = len(subject_wins)
        start = 0
        for stop in range(1, batch + 1):
            if stop < batch and subject_wins[stop] == subject_wins[start]:
                continue
            role, items = 0 if subject_wins[start] else 1, slice(start, stop)
            if self._hidden is None:
                hidden = self._packed.hidden(self.x[items], role)
            else:
                hidden = self._hidden[items, :, self._packed.columns(role)]
            self._packed.add(self.tokens[items], hidden, role)
            start = stop

    def _add_weighted(self, subject: Tensor, style: Tensor) -> None:
        """Without waiting for the device: both products in one, the hidden columns weighted (the loser's by zero)."""
        hidden = self._both_hidden()
        shares = torch.cat(
            [
                self._column(weight).expand(-1, -1, rank)
                for weight, rank in zip((subject, style), self._packed.ranks, strict=True)
            ],
            -1,
        )
        add_product(self.tokens, weighted(hidden, shares), self._packed.up())
