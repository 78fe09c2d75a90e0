"""The layers that are covered: their parts, and which deltas each has."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.loudness import Loudness
from lib_dynfuse.core.packed import Packed
from lib_dynfuse.core.packed_work import PackedWork
from lib_dynfuse.core.plain_work import PlainWork
from lib_dynfuse.core.work import Work


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

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)
