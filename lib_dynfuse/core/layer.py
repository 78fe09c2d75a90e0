"""One covered layer at work: what the deltas add to its output, whole or sampled, and how a selection is applied."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.packed import Packed, add_product, as_tokens
from lib_dynfuse.core.rules import Features, Selection, Weight


@dataclass
class Part:
    """Output rows `start` to `stop` (None: to the end) of a layer, with one role's delta or both.

    `index` is the pair's number for the rule and the trace, None where only one role has a delta.
    """

    start: int
    stop: int | None
    deltas: tuple[Delta, ...]
    index: int | None
    packed: Packed | None = field(init=False)

    def __post_init__(self) -> None:
        self.packed = Packed.of(self.deltas)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes if self.packed is not None else sum(delta.nbytes for delta in self.deltas)

    def at_work(self, module: nn.Module, x: Tensor, y: Tensor) -> Work:
        channel_dim = self.deltas[0].channel_dim
        if self.start or self.stop is not None:
            channels = y.shape[channel_dim]
            stop = channels if self.stop is None else self.stop
            if stop > channels:
                raise ValueError(f"rows {self.start} to {stop} of a layer that has {channels}")
            y = y.narrow(channel_dim, self.start, stop - self.start)
        if self.packed is not None:
            return PackedWork(self.packed, x, y, channel_dim)
        return PlainWork(self, module, x, y, channel_dim)


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


class Work:
    """One part in one forward pass. `tokens` is the output as [B, T, C]; `add` changes it in place.

    Everything is computed in the memory order of the layer's output: channels last for a Linear, first for most
    convolutions.
    """

    def __init__(self, x: Tensor, y: Tensor, channel_dim: int) -> None:
        self.x = x
        self.tokens = as_tokens(y, channel_dim)
        self.dim = -1 if self.tokens.stride(-1) == 1 else 1
        self._full: tuple[Tensor, Tensor] | None = None

    def features(self, sampled: int) -> Features:
        raise NotImplementedError

    def add(self, selection: Selection, rows: int) -> None:
        """Adds what the selection gives each role; its tensors are [rows] or [rows, T]."""
        raise NotImplementedError

    def _native(self, tokens: Tensor) -> Tensor:
        """[B, T, C] in the output's own memory order: itself, or [B, C, T]."""
        return tokens if self.dim == -1 else tokens.transpose(1, 2)

    def _column(self, weight: Tensor, rows: int) -> Tensor:
        """[rows] or [rows, T] as [B, 1 or T, 1], one weight per token, for the tiles of a row too."""
        batch = self.tokens.shape[0]
        if weight.dim() == 1:
            weight = weight if batch == rows else weight.repeat_interleave(batch // rows)
            return weight.view(batch, 1, 1)
        return weight.reshape(batch, -1, 1)

    def _add_full(self, deltas: tuple[Tensor, ...], weights: tuple[Weight, ...], rows: int) -> None:
        """tokens += w_s * d_s + w_t * d_t, with the deltas [B, T, C] at hand."""
        target = self._native(self.tokens)
        for delta, weight in zip(deltas, weights, strict=True):
            if isinstance(weight, Tensor):
                column = self._column(weight, rows).to(target.dtype)
                target.addcmul_(self._native(delta), self._native(column))
            elif weight:
                target.add_(self._native(delta), alpha=weight)


class PackedWork(Work):
    """Low-rank deltas: nothing of the output's size is made, but for the divergences of all tokens."""

    def __init__(self, packed: Packed, x: Tensor, y: Tensor, channel_dim: int) -> None:
        super().__init__(x if x.dtype == y.dtype else x.to(y.dtype), y, channel_dim)
        packed.ready(self.x)
        self._packed = packed
        self._hidden: Tensor | None = None

    def hidden(self) -> Tensor:
        if self._hidden is None:
            self._hidden = self._packed.hidden(self.x)
        return self._hidden

    def features(self, sampled: int) -> Features:
        tokens, hidden = self.tokens, self.hidden()
        index = sample_index(tokens.shape[1], sampled, tokens.device)
        if index is not None:
            # Gathered token-major: a handful of tokens, one copy.
            tokens, hidden = tokens[:, index], hidden[:, index]
            deltas = [hidden[..., self._packed.columns(role)] @ self._packed.up(role) for role in (0, 1)]
            return Features(tokens, deltas[0], deltas[1], -1)
        native = [self._product(hidden, role) for role in (0, 1)]
        self._full = (native[0], native[1])
        return Features(self._native(tokens), native[0], native[1], self.dim)

    def _product(self, hidden: Tensor, role: int) -> Tensor:
        """A role's delta in the output's memory order."""
        own, up = hidden[..., self._packed.columns(role)], self._packed.up(role)
        return own @ up if self.dim == -1 else up.T @ own.transpose(1, 2)

    def add(self, selection: Selection, rows: int) -> None:
        subject, style = selection.subject, selection.style
        packed = self._packed
        if isinstance(subject, Tensor) and isinstance(style, Tensor):
            if self._full is not None:
                deltas = tuple(self._native(delta) for delta in self._full)
                self._add_full(deltas, (subject, style), rows)
                return
            hidden = self.hidden()
            shares = [
                self._column(weight, rows).to(hidden.dtype).expand(-1, -1, rank)
                for weight, rank in zip((subject, style), packed.ranks, strict=True)
            ]
            add_product(self.tokens, hidden * torch.cat(shares, -1), packed.up())
        elif len(packed.ranks) == 1 or subject == style == 1.0:
            packed.add(self.tokens, self.hidden())
        else:
            for role, weight in enumerate((subject, style)):
                if weight:
                    packed.add(self.tokens, packed.hidden(self.x, role), role, float(weight))


class PlainWork(Work):
    """Deltas of any kind, each computed by itself."""

    def __init__(self, part: Part, module: nn.Module, x: Tensor, y: Tensor, channel_dim: int) -> None:
        super().__init__(x if x.dtype == y.dtype else x.to(y.dtype), y, channel_dim)
        self._deltas = part.deltas
        self._base = _without_bias(module, part, y) if any(delta.needs_base for delta in part.deltas) else y
        self._channel_dim = channel_dim

    def _compute(self) -> tuple[Tensor, ...]:
        return tuple(as_tokens(delta(self.x, self._base).contiguous(), self._channel_dim) for delta in self._deltas)

    def features(self, sampled: int) -> Features:
        subject, style = self._full = tuple(self._compute())  # type: ignore[assignment]
        base = self.tokens
        index = sample_index(base.shape[1], sampled, base.device)
        if index is not None:
            return Features(base[:, index], subject[:, index], style[:, index], -1)
        return Features(self._native(base), self._native(subject), self._native(style), self.dim)

    def add(self, selection: Selection, rows: int) -> None:
        weights = (selection.subject, selection.style)[: len(self._deltas)]
        if self._full is not None:
            self._add_full(self._full, weights, rows)
            return
        if all(not isinstance(weight, Tensor) and not weight for weight in weights):
            return
        self._add_full(self._compute(), weights, rows)


def _without_bias(module: nn.Module, part: Part, y: Tensor) -> Tensor:
    """The base output as the deltas define it: without the layer's bias."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return y.clone()
    bias = bias[part.start : part.stop].to(y)
    channel_dim = part.deltas[0].channel_dim
    return y - (bias if channel_dim == -1 else bias.view(-1, *(1 for _ in y.shape[2:])))


_GOLDEN = 0.6180339887498949


def sample_index(tokens: int, wanted: int, device: torch.device) -> Tensor | None:
    """Positions of `wanted` tokens spread evenly over `tokens`, None when all are looked at.

    One from each of `wanted` equal stretches, at an offset that walks by the golden section: a fixed stride would look
    at the same columns of a picture again and again.
    """
    if not 0 < wanted < tokens:
        return None
    key = (tokens, wanted, device)
    if key not in _INDICES:
        places = [int((i + i * _GOLDEN % 1.0) * tokens / wanted) for i in range(wanted)]
        _INDICES[key] = torch.tensor(places).to(device, non_blocking=True)
    return _INDICES[key]


_INDICES: dict[tuple[int, int, torch.device], Tensor] = {}
