"""Fusion: hooks onto a model's layers, asks the strategy at every forward pass, and gives everything back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_dynfuse.core import kernels
from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.layer import Layer, Part
from lib_dynfuse.core.loudness import Loudness
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.parts import Stretch, stretches, without_zeros
from lib_dynfuse.core.recompute import Decided, Decisions, recomputing
from lib_dynfuse.core.rules import Pair, Rule, Selection, Strategy, Weight
from lib_dynfuse.core.types import Role, Row


class TraceSink(Protocol):
    """What a record of selections has to offer; `lib_dynfuse.trace` has one."""

    def attach(self, names: Sequence[str]) -> None: ...

    def begin(self, step: int, progress: float, rows: Sequence[Row]) -> None: ...

    def add(
        self, layer: int, subject: Weight, style: Weight, d_subject: Tensor | None, d_style: Tensor | None
    ) -> None: ...


class ForeignBatch(ValueError):
    """A layer's batch is not that of the forward pass, so that nobody knows which item belongs to which picture."""


@dataclass
class _Run:
    """What a `Fusion` remembers from being entered until it is closed."""

    rule: Rule
    loudness: Loudness | None
    moment: Moment | None = None
    thread: int = 0
    fired: set[int] = field(default_factory=set)
    """Layers that have decided in the pass in progress."""
    reached: set[int] = field(default_factory=set)
    foreign: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    writing: bool = False
    """Whether the output of the layer at hand may be changed already."""
    decisions: Decisions = field(default_factory=Decisions)


class Fusion:
    """Fuses two roles' deltas in a model's forward passes, for as long as it is entered.

    `layers` names each covered layer: `{name: (module, {role: delta})}`. A delta on one role only is applied as it is,
    and so is a role's while the other one's strength is 0. Where both roles have one, `strategy` decides per batch
    item, and part by part where a delta covers `Rows` of a fused layer. Outside the window `(start, stop)` of
    `progress`, both ends included, both are added.

        with Fusion(layers, strategy("kl"), trace=None) as fusion:
            for step in range(steps):
                fusion.at(step, steps)
                model(x)

    `rows` says who is who in the batch; without it every batch item is a picture of its own and cond. A layer whose
    batch is a multiple of `len(rows)` is taken to see every row in that many tiles, if `tiled` says so of its name.
    On exit the model is bit for bit what it was, and what the rule has learnt is forgotten.

    `failed` is for hosts, whose pictures must not end here: it is called with a layer's name and what went wrong there,
    once for each layer, and the layer adds both of its deltas.

    Raises `ValueError` for a layer without a delta, or a window that is not within 0 to 1; `RuntimeError` when it is
    entered while it is. A forward pass raises, naming the layer, unless `failed` is given: `ValueError` for shapes that
    do not fit a delta, `ForeignBatch` for a batch that is no multiple of the rows, `RuntimeError` when two threads run
    the model at once. A layer that is computed again in a backward pass (gradient checkpointing) repeats what it
    decided; `RuntimeError` where that is not known.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, Mapping[Role, Delta]]],
        strategy: Strategy,
        trace: TraceSink | None = None,
        *,
        window: tuple[float, float] = (0.0, 1.0),
        tiled: Callable[[str], bool] = lambda name: True,
        failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        if not 0.0 <= window[0] <= window[1] <= 1.0:
            raise ValueError(f"window must be (start, stop) with 0 <= start <= stop <= 1, not {window!r}")
        self.strategy = strategy
        self._trace = trace
        self._window = window
        self._tiled = tiled
        self._failed = failed
        self._pairs: list[Pair] = []
        self._layers = [
            Layer(name, index, module, self._parts(name, deltas))
            for index, (name, (module, deltas)) in enumerate(layers.items())
        ]
        self.paused = False
        """Whether forward passes are left alone, as a host's own ones between those that are fused."""
        self.adds_both = False
        """Whether both deltas are added whatever the rule says, as where it is not known who is who in a batch."""
        self._rows: tuple[Row, ...] | None = None
        self._step, self._progress = 0, 0.0
        self._run: _Run | None = None
        self._stack = ExitStack()

    def _parts(self, name: str, deltas: Mapping[Role, Delta]) -> tuple[Part, ...]:
        try:
            kept = {role: found for role, delta in deltas.items() if (found := without_zeros(delta)) is not None}
            if deltas and not kept:
                return ()
            return tuple(self._part(name, stretch) for stretch in stretches(kept))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error

    def _part(self, name: str, stretch: Stretch) -> Part:
        start, stop, deltas = stretch
        if len(deltas) == 1:
            return Part(start, stop, tuple(deltas.values()), None)
        label = name if stretch.whole else f"{name}[{start}:{'' if stop is None else stop}]"
        given = Pair(label, deltas[Role.SUBJECT], deltas[Role.STYLE])
        pair = self.strategy.prepare(given)
        self._pairs.append(pair)
        unchanged = None if pair is given else (given.subject, given.style)
        return Part(start, stop, (pair.subject, pair.style), len(self._pairs) - 1, unchanged)

    # Where the generation stands: set by the host, read by the rules.

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = float(value)
        self._next_pass()

    @property
    def step(self) -> int:
        """The denoising step, from 0."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = int(value)
        self._next_pass()

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
        self._next_pass()

    def _next_pass(self) -> None:
        """Whatever fires next is of a new forward pass."""
        if self._run is not None:
            self._run.fired.clear()
            self._run.decisions.wanted = torch.is_grad_enabled()

    @property
    def names(self) -> list[str]:
        """The layers (and parts of layers) on which there is something to decide, in the trace's order."""
        return [pair.name for pair in self._pairs]

    @property
    def covered(self) -> list[str]:
        """The layers to which something may be added."""
        return [layer.name for layer in self._layers if layer.parts]

    @property
    def unreached(self) -> list[str]:
        """The covered layers that no forward pass has called since this was entered: all of them before the first
        pass; after it those that the model does not use, or not as modules, as when it is compiled."""
        reached: set[int] = set() if self._run is None else self._run.reached
        return [layer.name for layer in self._layers if layer.parts and layer.index not in reached]

    @property
    def nbytes(self) -> int:
        """Bytes held for the covered layers."""
        return sum(layer.nbytes for layer in self._layers)

    # On and off.

    def __enter__(self) -> Fusion:
        if self._run is not None:
            raise RuntimeError("this Fusion is entered already; close it first, or make another one")
        run = _Run(self.strategy.start(self._pairs), Loudness.of(self.strategy.limits))
        if self._trace is not None:
            self._trace.attach(self.names)
        if self._pairs:
            self._try_kernels()
        with ExitStack() as stack:
            for layer in self._layers:
                if layer.parts:
                    handle = layer.module.register_forward_hook(self._hook(layer, run), with_kwargs=True)
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        self._run = run
        return self

    def _try_kernels(self) -> None:
        """Before the first step, so that no step waits. What a host casts or moves later is tried when it comes."""
        weights = (next(layer.module.parameters(), None) for layer in self._layers)
        for device, dtype in {(weight.device, weight.dtype) for weight in weights if weight is not None}:
            kernels.try_out(device, dtype)

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes every hook off; safe to call again. What is entered after it starts afresh."""
        self._run = None
        self._stack.close()

    # One layer of one forward pass.

    def _hook(self, layer: Layer, run: _Run) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def fuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if self.paused:
                return y
            run.reached.add(layer.index)
            if self._failed is None or (layer.decides and recomputing()):
                return self._fuse(layer, run, _input(args, kwargs), y)
            run.writing = False
            try:
                if layer.index not in run.broken:
                    return self._fuse(layer, run, _input(args, kwargs), y)
                return self._add_both(layer, run, _input(args, kwargs), y)
            except ForeignBatch as error:
                self._report(layer, run.foreign, error, self._failed)
            # Whatever it is: a picture is worth more than our part in it.
            except Exception as error:
                self._report(layer, run.broken, error, self._failed)
            return self._fallen_back(layer, run, args, kwargs, y)

        return fuse

    def _report(
        self, layer: Layer, known: set[int], error: Exception, failed: Callable[[str, Exception], None]
    ) -> None:
        if layer.index not in known:
            known.add(layer.index)
            failed(layer.name, error)

    def _fallen_back(self, layer: Layer, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """The output with both deltas, or by itself where even that fails; computed anew where it was changed."""
        if run.writing:
            y = layer.module.forward(*args, **kwargs)
        try:
            return self._add_both(layer, run, _input(args, kwargs), y)
        except Exception:
            found: Tensor = layer.module.forward(*args, **kwargs) if run.writing else y
            return found

    def _fuse(self, layer: Layer, run: _Run, x: Tensor, y: Tensor) -> Tensor:
        if not y.numel():
            return y
        if layer.decides and recomputing():
            return self._repeat(layer, run, x, y)
        if self.adds_both or not layer.decides:
            return self._add_both(layer, run, x, y)
        run.writing = False
        moment = self._begin(layer, run, x)
        y = _own(x, y)
        decided: list[Decided | None] = []
        try:
            for part in layer.parts:
                decided.append(self._fuse_part(part, run, moment, layer.module, x, y))
        except (ValueError, IndexError) as error:
            raise ValueError(f"layer {layer.name}: {error}") from error
        run.decisions.keep(layer.index, x, len(moment.rows), decided)
        return y

    def _fuse_part(
        self, part: Part, run: _Run, moment: Moment, module: nn.Module, x: Tensor, y: Tensor
    ) -> Decided | None:
        inside = self._window[0] <= moment.progress <= self._window[1]
        if part.index is None or not inside or part.zeros:
            selection = self._add_part(part, run, module, x, y)
            if part.index is not None and not part.zeros and self._trace is not None:
                self._trace.add(part.index, *selection)
            return None
        work = part.at_work(module, x, y, len(moment.rows), run.loudness)
        with torch.no_grad():
            selection = run.rule.select(part.index, moment, work.look, work.per_row)
        had_both = work.has_both
        run.writing = True
        work.add(selection)
        if self._trace is not None:
            self._trace.add(part.index, *selection)
        return Decided(selection, None if run.loudness is None else run.loudness.held(), had_both)

    def _add_both(self, layer: Layer, run: _Run, x: Tensor, y: Tensor) -> Tensor:
        """As the host itself does with the networks."""
        run.writing = False
        y = _own(x, y)
        try:
            for part in layer.parts:
                self._add_part(part, run, layer.module, x, y)
        except (ValueError, IndexError) as error:
            raise ValueError(f"layer {layer.name}: {error}") from error
        if layer.decides:
            run.decisions.keep(layer.index, x, 1, [None] * len(layer.parts))
        return y

    def _add_part(self, part: Part, run: _Run, module: nn.Module, x: Tensor, y: Tensor) -> Selection:
        part = part.unchanged
        zeros = part.zeros
        selection = Selection(float(0 not in zeros), float(1 not in zeros))
        if len(zeros) < len(part.deltas):
            work = part.at_work(module, x, y, 1)
            run.writing = True
            work.add(selection)
        return selection

    def _repeat(self, layer: Layer, run: _Run, x: Tensor, y: Tensor) -> Tensor:
        """What was done in the forward pass of which this is the second computation; rule and trace see nothing."""
        rows, decided = run.decisions.of(layer.index, layer.name, x)
        y = _own(x, y)
        for part, found in zip(layer.parts, decided, strict=True):
            if found is None:
                self._add_part(part, run, layer.module, x, y)
            else:
                work = part.at_work(layer.module, x, y, rows, found.scaling)
                if found.had_both:
                    work.compute_both()
                work.add(found.selection)
        return y

    def _begin(self, layer: Layer, run: _Run, x: Tensor) -> Moment:
        """The moment of this forward pass; a layer that fires again starts a new one."""
        going_on = run.moment is not None and bool(run.fired) and layer.index not in run.fired
        if going_on and run.moment is not None:
            rows = run.moment.rows
        else:
            rows = self._rows or tuple(Row(image) for image in range(x.shape[0]))
        if x.shape[0] % len(rows) or (x.shape[0] > len(rows) and not self._tiled(layer.name)):
            raise ForeignBatch(
                f"layer {layer.name}: a batch of {x.shape[0]} where the forward pass has {len(rows)} rows"
            )
        if going_on and run.moment is not None:
            if run.thread != threading.get_ident():
                raise RuntimeError(
                    f"layer {layer.name}: two threads run the fused model at once; let one wait, or give each its own"
                )
            run.fired.add(layer.index)
            return run.moment
        run.thread = threading.get_ident()
        old = run.moment
        if old is not None and old.rows == rows and old.device == x.device:
            moment = old.at(self._step, self._progress)
        else:
            moment = Moment(self._step, self._progress, rows, x.device)
        run.moment, run.fired = moment, {layer.index}
        run.decisions.wanted |= torch.is_grad_enabled()
        run.rule.begin(moment)
        if run.loudness is not None:
            run.loudness.begin(moment)
        if self._trace is not None:
            self._trace.begin(self._step, self._progress, rows)
        return moment


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _own(x: Tensor, y: Tensor) -> Tensor:
    """The output to write into: a copy where autograd may have kept the layer's own."""
    return y.clone() if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad) else y
