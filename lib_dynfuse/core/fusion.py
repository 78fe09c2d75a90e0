"""Fusion: hooks onto a model's layers, asks the strategy at every forward pass, and gives everything back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_dynfuse.core import kernels
from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.layer import Layer, Part
from lib_dynfuse.core.loudness import Loudness
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.parts import Stretch, stretches
from lib_dynfuse.core.rules import Pair, Rule, Strategy, Weight
from lib_dynfuse.core.rules_static import BOTH
from lib_dynfuse.core.types import Role, Row


class TraceSink(Protocol):
    """What a record of selections has to offer; `lib_dynfuse.trace` has one."""

    def attach(self, names: Sequence[str]) -> None: ...

    def begin(self, step: int, progress: float, rows: Sequence[Row]) -> None: ...

    def add(
        self, layer: int, subject: Weight, style: Weight, d_subject: Tensor | None, d_style: Tensor | None
    ) -> None: ...


class Fusion:
    """Fuses two roles' deltas in a model's forward passes, for as long as it is entered.

    `layers` names each covered layer: `{name: (module, {role: delta})}`. A delta on one role only is applied as it is.
    Where both roles have one, `strategy` decides per batch item, and part by part where a delta covers `Rows` of a
    fused layer. Outside the window `(start, stop)` of `progress`, both ends included, both are added.

        with Fusion(layers, strategy("kl"), trace=None) as fusion:
            for step in range(steps):
                fusion.at(step, steps)
                model(x)

    `rows` says who is who in the batch; without it every batch item is a picture of its own and cond. A batch of a
    multiple of `len(rows)` is taken as that many tiles per row. On exit the model is bit for bit what it was.

    Raises `ValueError` for a layer without a delta, or a window that is not within 0 to 1. A forward pass whose shapes
    do not fit a delta raises `ValueError` naming the layer.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, Mapping[Role, Delta]]],
        strategy: Strategy,
        trace: TraceSink | None = None,
        *,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not 0.0 <= window[0] <= window[1] <= 1.0:
            raise ValueError(f"window must be (start, stop) with 0 <= start <= stop <= 1, not {window!r}")
        self.strategy = strategy
        self._trace = trace
        self._window = window
        self._pairs: list[Pair] = []
        self._layers = [
            Layer(name, index, module, self._parts(name, deltas))
            for index, (name, (module, deltas)) in enumerate(layers.items())
        ]
        self._rule: Rule = strategy.start(self._pairs)
        self._loudness = Loudness.of(strategy.limits)
        self.paused = False
        """Whether forward passes are left alone, as a host's own ones between those that are fused."""
        self._rows: tuple[Row, ...] | None = None
        self._step, self._progress = 0, 0.0
        self._moment: Moment | None = None
        self._fired: set[int] = set()
        self._stack = ExitStack()

    def _parts(self, name: str, deltas: Mapping[Role, Delta]) -> tuple[Part, ...]:
        try:
            return tuple(self._part(name, stretch) for stretch in stretches(deltas))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error

    def _part(self, name: str, stretch: Stretch) -> Part:
        start, stop, deltas = stretch
        if len(deltas) == 1:
            return Part(start, stop, tuple(deltas.values()), None)
        label = name if stretch.whole else f"{name}[{start}:{'' if stop is None else stop}]"
        prepared_from = Pair(label, deltas[Role.SUBJECT], deltas[Role.STYLE])
        pair = self.strategy.prepare(prepared_from)
        self._pairs.append(pair)
        part = Part(start, stop, (pair.subject, pair.style), len(self._pairs) - 1)
        if prepared_from is not pair and self._window != (0.0, 1.0):
            part.outside = Part(start, stop, (prepared_from.subject, prepared_from.style), part.index)
        return part

    # Where the generation stands: set by the host, read by the rules.

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = float(value)
        self._fired.clear()

    @property
    def step(self) -> int:
        """The denoising step, from 0."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = int(value)
        self._fired.clear()

    def at(self, step: int, total: int) -> None:
        """Moves to `step` of `total`: sets `step` and `progress`."""
        self.step = step
        self.progress = step / (total - 1) if total > 1 else 0.0

    @property
    def rows(self) -> list[Row]:
        """Who is who in the batch; empty where every batch item is a picture of its own."""
        return list(self._rows or ())

    @rows.setter
    def rows(self, value: Sequence[Row]) -> None:
        self._rows = tuple(value) or None
        self._fired.clear()

    @property
    def names(self) -> list[str]:
        """The layers (and parts of layers) on which there is something to decide, in the trace's order."""
        return [pair.name for pair in self._pairs]

    @property
    def nbytes(self) -> int:
        """Bytes held for the covered layers."""
        return sum(layer.nbytes for layer in self._layers)

    # On and off.

    def __enter__(self) -> Fusion:
        if self._trace is not None:
            self._trace.attach(self.names)
        if self._pairs:
            self._try_kernels()
        with ExitStack() as stack:
            for layer in self._layers:
                handle = layer.module.register_forward_hook(self._hook(layer), with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def _try_kernels(self) -> None:
        """Before the first step, so that no step waits. What a host casts or moves later is tried when it comes."""
        weights = (next(layer.module.parameters(), None) for layer in self._layers)
        for device, dtype in {(weight.device, weight.dtype) for weight in weights if weight is not None}:
            kernels.try_out(device, dtype)

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes every hook off; safe to call again."""
        self._stack.close()

    # One layer of one forward pass.

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def fuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if self.paused:
                return y
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            moment = self._begin(layer.index, x)
            if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
                y = y.clone()
            try:
                for part in layer.parts:
                    self._fuse_part(part, moment, layer.module, x, y)
            except (ValueError, IndexError) as error:
                raise ValueError(f"layer {layer.name}: {error}") from error
            return y

        return fuse

    def _fuse_part(self, part: Part, moment: Moment, module: nn.Module, x: Tensor, y: Tensor) -> None:
        inside = self._window[0] <= moment.progress <= self._window[1]
        if not inside and part.outside is not None:
            part = part.outside
        loudness = self._loudness if inside and part.index is not None else None
        work = part.at_work(module, x, y, len(moment.rows), loudness)
        if part.index is None:
            work.add(BOTH)
            return
        selection = self._rule.select(part.index, moment, work.look) if inside else BOTH
        work.add(selection)
        if self._trace is not None:
            self._trace.add(part.index, *selection)

    def _begin(self, index: int, x: Tensor) -> Moment:
        """The moment of this forward pass; a layer that fires again starts a new one."""
        if self._moment is not None and self._fired and index not in self._fired:
            self._fired.add(index)
            return self._moment
        rows = self._rows
        if rows is None or x.shape[0] % len(rows):
            rows = tuple(Row(image) for image in range(x.shape[0]))
        old = self._moment
        if old is not None and old.rows == rows and old.device == x.device:
            self._moment = old.at(self._step, self._progress)
        else:
            self._moment = Moment(self._step, self._progress, rows, x.device)
        self._fired = {index}
        self._rule.begin(self._moment)
        if self._loudness is not None:
            self._loudness.begin(self._moment)
        if self._trace is not None and self._pairs:
            self._trace.begin(self._step, self._progress, rows)
        return self._moment
