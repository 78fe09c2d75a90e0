"""Methods in turn, round by round: whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from tqdm import tqdm

from lib_dynfuse.bench.rivals import FUSED, klora_published
from lib_dynfuse.bench.unets import Layers
from lib_dynfuse.core import Fusion, Row, kernels, strategy

# Behind the name of a fused method: never by the kernels, or by nothing else.
PATHS = ("-torch", "-triton")


def interleaved(
    methods: Sequence[str],
    layers: Layers,
    rows: Sequence[Row],
    forward: Callable[[], object],
    peft: Callable[[], object] | None,
    repeats: int,
    place: torch.device,
    bar: bool = True,
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Every method's seconds in every round, and the most memory of a GPU that it took in the last one, in MiB.

    `forward` runs the model whose `layers` are fused, `peft` its copy with peft's adapters.
    """
    runs: dict[str, tuple[AbstractContextManager[object], Callable[[], object]]] = {}
    fusions: dict[str, Fusion] = {}
    for method in methods:
        if method == "merged":
            # A merged network costs nothing per forward pass: this is the plain model.
            runs[method] = (nullcontext(), forward)
        elif method == "peft":
            assert peft is not None
            runs[method] = (nullcontext(), peft)
        elif method == "klora-published":
            runs[method] = (_Again(lambda: klora_published(layers)), forward)
        else:
            name, way = fused(method)
            rule, parameters = FUSED[name]
            fusion = fusions[method] = Fusion(layers, strategy(rule, **parameters))
            fusion.rows = rows
            runs[method] = (_Again(partial(_on_path, way, fusion)), forward)

    seconds: dict[str, list[float]] = {method: [] for method in methods}
    peaks: dict[str, float | None] = {}
    with torch.inference_mode():
        for round_ in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=not bar):
            for method in _turned(list(runs), round_):
                context, run = runs[method]
                if method in fusions:
                    fusions[method].at(round_, repeats + 1)
                with context:
                    elapsed, peaks[method] = _timed(run, place)
                # A round is a denoising step. The first one packs factors, picks kernels, fills the allocator, listens.
                if round_:
                    seconds[method].append(elapsed)
    return seconds, peaks


def _turned(methods: Sequence[str], by: int) -> list[str]:
    start = by % len(methods)
    return [*methods[start:], *methods[:start]]


def fused(method: str) -> tuple[str, str]:
    """(the method's name, which way it is computed)."""
    for ending in PATHS:
        if method.endswith(ending):
            return method.removesuffix(ending), ending[1:]
    return method, "auto"


@contextmanager
def _on_path(way: str, fusion: Fusion) -> Iterator[None]:
    with kernels.path(way), fusion:
        yield


class _Again:
    """A one-shot context manager made anew each time it is entered."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._context = self._make()
        self._context.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(None, None, None)


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds, and on a GPU the most memory that was taken, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000, torch.cuda.max_memory_allocated(device) / 2**20
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    run()
    if device.type == "mps":
        torch.mps.synchronize()
    return clock() - before, None
