"""One covered layer at work: what the deltas add to its output, whole or sampled, and how a selection is applied."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lib_dynfuse.core import devices, kernels
from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.loudness import Loudness
from lib_dynfuse.core.packed import Packed, Product, add_product, as_tokens
from lib_dynfuse.core.rules import Features, Largest, Selection


@dataclass
class Part:
    """Output rows `start` to `stop` (None: to the end) of a layer, with one role's delta or both.

    `index` is the pair's number for the rule and the trace, None where only one role has a delta. `outside` is what
    stands in outside the step window, where a strategy has changed the deltas.
    """

    start: int
    stop: int | None
    deltas: tuple[Delta, ...]
    index: int | None
    outside: Part | None = None
    packed: Packed | None = field(init=False)

    def __post_init__(self) -> None:
        self.packed = Packed.of(self.deltas)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes if self.packed is not None else sum(delta.nbytes for delta in self.deltas)

    def at_work(self, module: nn.Module, x: Tensor, y: Tensor, rows: int, loudness: Loudness | None = None) -> Work:
        channel_dim = self.deltas[0].channel_dim
        if self.start or self.stop is not None:
            channels = y.shape[channel_dim]
            stop = channels if self.stop is None else self.stop
            if stop > channels:
                raise ValueError(f"rows {self.start} to {stop} of a layer that has {channels}")
            y = y.narrow(channel_dim, self.start, stop - self.start)
        for delta in self.deltas:
            delta.check(x, y)
        if self.packed is not None:
            return PackedWork(self.packed, x, y, channel_dim, rows, loudness)
        return PlainWork(self, module, x, y, channel_dim, rows, loudness)


@dataclass
class Layer:
    """A module, its name, and its parts."""

    name: str
    index: int
    module: nn.Module
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


# How many output elements are looked at together: 2 MiB of float32 on a CPU, elsewhere 10. There the scratch memory of
# the divergence (four times that) and two pairs of half-precision deltas stay below 64 MiB.
_STRETCH = {"cpu": 1 << 19}
_STRETCH_ELSEWHERE = 5 << 19
# How many numbers are squared together on a CPU.
_SQUARES = 1 << 19


class Work:
    """One part in one forward pass. `tokens` is the output as [B, T, C]; `add` changes it in place.

    The batch has `rows` rows, each of one batch item or of several tiles that follow one another. Everything is
    computed in the memory order of the layer's output: channels last for a Linear, first for most convolutions.
    `loudness` holds both deltas within the strategy's limits.
    """

    def __init__(self, x: Tensor, y: Tensor, channel_dim: int, rows: int, loudness: Loudness | None) -> None:
        self.loudness = loudness
        self.x = x if x.dtype == y.dtype else x.to(y.dtype)
        self.tokens = as_tokens(y, channel_dim)
        self.rows = rows
        self.size = (y.shape[2], y.shape[3]) if channel_dim == 1 and y.dim() == 4 else None
        self.dim = -1 if self.tokens.stride(-1) == 1 else 0

    def look(self, sampled: int, rows: tuple[int, ...] | None = None, both: bool = False) -> Iterator[Features]:
        """The features of `sampled` tokens of every batch item, or of all of them (0), stretch by stretch; of some rows
        only where `rows` says which. `both`: whatever is seen, both roles' products will be added."""
        raise NotImplementedError

    def add(self, selection: Selection) -> None:
        """Adds what the selection gives each role; its tensors are [rows] or [rows, T]."""
        raise NotImplementedError

    def _places(self, sampled: int) -> Tensor | None:
        """Which of the T tokens are looked at, None for all of them."""
        if self.size is not None:
            return lattice_index(*self.size, lattice_step(*self.size, sampled), self.tokens.device)
        return sample_index(self.tokens.shape[1], sampled, self.tokens.device)

    def _native(self, tokens: Tensor) -> Tensor:
        """[B, T, C] in the output's own memory order: itself, or [B, C, T]."""
        return tokens if self.dim == -1 else tokens.transpose(1, 2)

    def _items(self, rows: tuple[int, ...] | None) -> slice | list[int]:
        """The batch items of some rows; a slice where they follow one another, so that nothing is copied."""
        if rows is None:
            return slice(None)
        tiles = self.tokens.shape[0] // self.rows
        if rows == tuple(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0] * tiles, (rows[0] + len(rows)) * tiles)
        return [row * tiles + tile for row in rows for tile in range(tiles)]

    def _column(self, weight: Tensor) -> Tensor:
        """[rows] or [rows, T] as [B, 1 or T, 1], one weight per token, for the tiles of a row too."""
        batch = self.tokens.shape[0]
        if weight.dim() == 1:
            weight = weight if batch == self.rows else weight.repeat_interleave(batch // self.rows)
            return weight.view(batch, 1, 1)
        return weight.reshape(batch, -1, 1)

    def _stretches(self, y: Tensor) -> Iterator[tuple[slice, slice]]:
        """(items, tokens) of y [B, T, C], one after another: several items where they lie in one run of memory, or one
        or a part of one. So what is found of an item does not hang on which others are in the batch."""
        batch, tokens, channels = y.shape
        step = max(1, _STRETCH.get(y.device.type, _STRETCH_ELSEWHERE) // channels)
        together = max(1, step // tokens) if y.is_contiguous() else 1
        for item in range(0, batch, together):
            for start in range(0, tokens, step):
                yield slice(item, min(item + together, batch)), slice(start, min(start + step, tokens))

    def _stretch(self, values: Tensor, items: slice, tokens: slice) -> Tensor:
        """[n, C] of values [B, T, C], or [C, n] of one item where channels come first."""
        found = values[items, tokens]
        return found.flatten(0, 1) if self.dim == -1 else found[0].T


class PackedWork(Work):
    """Low-rank deltas: neither of them is ever made as a whole."""

    def __init__(
        self, packed: Packed, x: Tensor, y: Tensor, channel_dim: int, rows: int, loudness: Loudness | None
    ) -> None:
        super().__init__(x, y, channel_dim, rows, loudness)
        packed.ready(self.x)
        self._packed = packed
        self._hidden: Tensor | None = None

    def _both_hidden(self) -> Tensor:
        if self._hidden is None:
            self._hidden = self._packed.hidden(self.x)
            if self.loudness is not None:
                self._hidden = self._held(self._hidden, self.loudness)
        return self._hidden

    def _held(self, hidden: Tensor, loudness: Loudness) -> Tensor:
        """Both roles' hidden products within the limits. Called before anything is added to the output."""
        packed = self._packed
        factors = loudness.factors(
            hidden.shape[0], lambda: (packed.squares(hidden.detach()), _squares(self.tokens.detach(), self.dim))
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
                y, hidden = _picked(y, index), _picked(hidden, index)
            products = [Product(hidden[..., packed.columns(role)], packed.up(role)) for role in (0, 1)]
            yield Features(y, products[0], products[1], -1, y.shape[0])
            return
        if index is not None and early and self.size is None:
            hidden = packed.hidden(_picked(as_tokens(self.x, -1)[items], index))
        elif index is not None and early and self.size is not None and packed.strides:
            hidden = packed.hidden(self.x[items], step=lattice_step(*self.size, sampled))
        elif rows is not None and early:
            hidden = packed.hidden(self.x[items])
        else:
            hidden = self._both_hidden()[items]
        if index is not None:
            hidden = hidden if hidden.shape[1] == len(index) else _picked(hidden, index)
            base, largest = _picked(y, index).flatten(0, 1), self._largest(hidden)
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
        add_product(self.tokens, _weighted(hidden, shares), self._packed.up())


class PlainWork(Work):
    """Deltas of any kind, each computed by itself."""

    def __init__(
        self,
        part: Part,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        channel_dim: int,
        rows: int,
        loudness: Loudness | None,
    ) -> None:
        super().__init__(x, y, channel_dim, rows, loudness)
        self._deltas = part.deltas
        self._base = _without_bias(module, part, y) if any(delta.needs_base for delta in part.deltas) else y
        self._channel_dim = channel_dim
        self._computed: list[Tensor | None] = [None] * len(part.deltas)

    def _delta(self, role: int) -> Tensor:
        """A role's delta [B, T, C], computed once and within the limits."""
        found = self._computed[role]
        if found is None:
            found = self._computed[role] = self._alone(role)
            if self.loudness is not None:
                both = [one if one is not None else self._alone(k) for k, one in enumerate(self._computed)]

                def lengths() -> tuple[Tensor, Tensor]:
                    subject, style, base = (_squares(one.detach(), self.dim) for one in (*both, self.tokens))
                    return torch.stack([subject, style]), base

                factors = self.loudness.factors(found.shape[0], lengths)
                self._computed = [
                    one if by is None else one * by.to(one.dtype) for one, by in zip(both, factors, strict=True)
                ]
                return self._delta(role)
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
            base, subject, style = (_picked(one, index).flatten(0, 1) for one in whole)
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
                target.add_(_weighted(self._native(self._delta(role)), self._native(self._column(weight))))
            elif weight:
                target.add_(self._native(self._delta(role)), alpha=weight)


def _squares(tokens: Tensor, dim: int) -> Tensor:
    """The squared length of every token of [B, T, C], [B, T] float32."""
    if dim == -1 or not devices.readable(tokens.device):
        wide = tokens.float() if tokens.dtype == torch.float64 else tokens
        return torch.linalg.vector_norm(wide, dim=-1, dtype=torch.float32).square_()
    # A channel's neighbours lie far apart in memory; a CPU is faster at adding up whole channels, some at a time.
    native = tokens.transpose(1, 2)
    found = torch.zeros(native.shape[0], native.shape[2], dtype=torch.float32, device=tokens.device)
    for part in native.split(max(1, _SQUARES // max(1, native[:, 0].numel())), 1):
        found.add_(part.float().square().sum(1))
    return found


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """values * weights; a boolean weight keeps out what is not chosen, even where it is infinite."""
    return torch.where(weights, values, 0.0) if weights.dtype == torch.bool else values * weights.to(values.dtype)


def _without_bias(module: nn.Module, part: Part, y: Tensor) -> Tensor:
    """The base output as the deltas define it: without the layer's bias."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return y.clone()
    bias = bias[part.start : part.stop].to(y)
    channel_dim = part.deltas[0].channel_dim
    return y - (bias if channel_dim == -1 else bias.view(-1, *(1 for _ in y.shape[2:])))


def _picked(tokens: Tensor, index: Tensor) -> Tensor:
    """Some tokens of [B, T, C] as [B, n, C]; whole rows of memory are copied several times faster than by indexing."""
    return tokens.index_select(1, index) if tokens.stride(-1) == 1 else tokens[:, index]


_GOLDEN = 0.6180339887498949


@functools.cache
def sample_index(tokens: int, wanted: int, device: torch.device) -> Tensor | None:
    """Positions of `wanted` tokens spread evenly over `tokens`, None when all are looked at.

    One from each of `wanted` equal stretches, at an offset that walks by the golden section: a fixed stride would look
    at the same columns of a picture again and again.
    """
    if not 0 < wanted < tokens:
        return None
    return _on(device, [int((i + i * _GOLDEN % 1.0) * tokens / wanted) for i in range(wanted)])


def lattice_step(tall: int, wide: int, wanted: int) -> int:
    """The widest spacing of a square lattice that has at least `wanted` of tall x wide pixels; 1 for all of them."""
    step = 1
    while 0 < wanted <= -(-tall // (step + 1)) * -(-wide // (step + 1)):
        step += 1
    return step


@functools.cache
def lattice_index(tall: int, wide: int, step: int, device: torch.device) -> Tensor | None:
    """Positions of every step-th of tall x wide pixels, down and across; None when that is every one."""
    if step == 1:
        return None
    return _on(device, [y * wide + x for y in range(0, tall, step) for x in range(0, wide, step)])


def _on(device: torch.device, places: list[int]) -> Tensor:
    # It outlives the host's inference mode, and autograd may keep no inference tensor.
    with torch.inference_mode(False):
        return torch.tensor(places).to(device, non_blocking=True)
