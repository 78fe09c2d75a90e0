"""The layers that are covered: their parts, and which deltas each has."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.loudness import Scaling
from lib_dynfuse.core.packed import Packed
from lib_dynfuse.core.packed_work import PackedWork
from lib_dynfuse.core.plain_work import PlainWork
from lib_dynfuse.core.work import Work


@dataclass
class Part:
    """Output rows `start` to `stop` (None: to the end) of a layer, with one role's delta or both.

    `index` is the pair's number for the rule and the trace, None where only one role has a delta. `given` are the
    deltas before a strategy changed them, None where it left them as they are.
    """

    start: int
    stop: int | None
    deltas: tuple[Delta, ...]
    index: int | None
    given: tuple[Delta, ...] | None = None
    packed: Packed | None = field(init=False)

    def __post_init__(self) -> None:
        self.packed = Packed.of(self.deltas)

    @cached_property
    def unchanged(self) -> Part:
        """The part with the deltas as they were given, for where the strategy has no say. Made when first asked for."""
        return self if self.given is None else Part(self.start, self.stop, self.given, self.index)

    @property
    def zeros(self) -> tuple[int, ...]:
        """Which of the deltas have a strength of 0 at present."""
        return tuple(place for place, delta in enumerate(self.deltas) if delta.is_zero)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes if self.packed is not None else sum(delta.nbytes for delta in self.deltas)

    def at_work(self, module: nn.Module, x: Tensor, y: Tensor, rows: int, loudness: Scaling | None = None) -> Work:
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
        base = self._without_bias(module, y) if any(delta.needs_base for delta in self.deltas) else y
        return PlainWork(self.deltas, base, x, y, channel_dim, rows, loudness)

    def _without_bias(self, module: nn.Module, y: Tensor) -> Tensor:
        """The base output as the deltas define it: without the layer's bias."""
        bias = getattr(module, "bias", None)
        if not isinstance(bias, Tensor):
            return y.clone()
        bias = bias[self.start : self.stop].to(y)
        channel_dim = self.deltas[0].channel_dim
        return y - (bias if channel_dim == -1 else bias.view(-1, *(1 for _ in y.shape[2:])))


@dataclass
class Layer:
    """A module, its name, and its parts."""

    name: str
    index: int
    module: nn.Module
    parts: tuple[Part, ...]

    @cached_property
    def decides(self) -> bool:
        """Whether both roles have something to add somewhere."""
        return any(part.index is not None for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)
