"""The benchmark: interleaved forward passes of every method, medians, a table and JSON rows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib_dynfuse.bench.rivals import klora_published, with_peft
from lib_dynfuse.bench.unets import CONFIGS, covered, make_inputs, make_layers, make_unet
from lib_dynfuse.core import Fusion, Row, strategy

UNETS = tuple(CONFIGS)
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("sum", {}),
    "kl": ("kl", {}),
    "kl-sampled": ("kl", {"sample_tokens": 64}),
    "kl-token": ("kl-token", {}),
    "kl-soft": ("kl-soft", {}),
    "kl-balanced": ("kl", {"auto_balance": True, "couple_cfg": True}),
    "klora": ("klora", {}),
    "np": ("np", {}),
}
METHODS = ("merged", *FUSED, "peft", "klora-published")
DEFAULT = ("merged", "sum", "kl", "kl-sampled", "kl-token", "peft", "klora-published")


@dataclass(frozen=True)
class Result:
    """One row: `seconds` is the median time of a forward pass, `ratio` that over `merged`'s."""

    unet: str
    pixels: int
    batch: int
    rank: int
    device: str
    dtype: str
    method: str
    seconds: float
    ratio: float


def bench(
    unet: str = "sd15",
    pixels: int = 256,
    batch: int = 2,
    rank: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    methods: Sequence[str] = DEFAULT,
    repeats: int = 7,
    out: Path | None = None,
    threads: int = 0,
) -> list[Result]:
    """Times `methods` on the UNet `unet` and returns a row for each; writes them to `out` as JSON.

    Every round runs each method once, so that whatever else the machine does falls on all of them alike. On one CPU
    thread it is the process's own processor time that counts, on a GPU the time between two events, else the clock's.
    `threads` of the processor, 0 for torch's own number.

    Raises `ValueError` for an unknown UNet, method or dtype, naming what there is.
    """
    _among("unet", unet, UNETS)
    _among("dtype", dtype, ("float32", "float16", "bfloat16"))
    for method in methods:
        _among("method", method, METHODS)
    if pixels % 64 or batch < 1 or rank < 1:
        raise ValueError(f"pixels must be a multiple of 64, batch and rank at least 1, not {pixels}, {batch}, {rank}")
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    model = make_unet(unet, place, getattr(torch, dtype))
    forward = make_inputs(model, pixels, batch)
    layers = make_layers(model, rank)
    rows = [Row(index // 2, cond=index % 2 == 1) for index in range(batch)]

    runs: dict[str, tuple[AbstractContextManager[object], Callable[[], object]]] = {}
    for method in methods:
        if method == "merged":
            # A merged network costs nothing per forward pass: this is the plain model.
            runs[method] = (nullcontext(), forward)
        elif method == "peft":
            runs[method] = (nullcontext(), partial(forward, with_peft(model, layers, rank)))
        elif method == "klora-published":
            runs[method] = (_Again(lambda: klora_published(layers)), forward)
        else:
            name, parameters = FUSED[method]
            fusion = Fusion(layers, strategy(name, **parameters))
            fusion.rows = rows
            runs[method] = (fusion, forward)

    seconds: dict[str, list[float]] = {method: [] for method in methods}
    with torch.inference_mode():
        for round_ in tqdm(range(repeats + 1), desc="rounds", leave=False):
            for method, (context, run) in runs.items():
                with context:
                    elapsed = _timed(run, place)
                # The first round warms up: packs factors, picks kernels, fills the allocator.
                if round_:
                    seconds[method].append(elapsed)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    reference = medians.get("merged", next(iter(medians.values())))
    results = [
        Result(unet, pixels, batch, rank, _name(place), dtype, method, median, median / reference)
        for method, median in medians.items()
    ]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return results


def table(results: Sequence[Result]) -> str:
    """The rows as a Markdown table."""
    first = results[0]
    lines = [
        f"{first.unet}, {first.pixels} pixels, batch {first.batch}, rank {first.rank}, {first.device}, {first.dtype}",
        "",
        "| method | seconds per forward pass | ratio to merged |",
        "|---|---:|---:|",
    ]
    lines += [f"| {row.method} | {row.seconds:.3f} | {row.ratio:.2f} |" for row in results]
    return "\n".join(lines)


class _Again:
    """A one-shot context manager made anew each time it is entered."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._context = self._make()
        self._context.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(None, None, None)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    run()
    if device.type == "mps":
        torch.mps.synchronize()
    return clock() - before


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def _among(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")


__all__ = ["METHODS", "UNETS", "Result", "bench", "covered", "table"]
