"""The benchmark: interleaved forward passes of every method, medians, a table and JSON rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lib_dynfuse.bench.ratios import paired
from lib_dynfuse.bench.rivals import FUSED, with_peft
from lib_dynfuse.bench.rounds import fused, interleaved
from lib_dynfuse.bench.unets import CONFIGS, COVERS, DTYPES, covered, make_inputs, make_layers, make_unet
from lib_dynfuse.core import Row, kernels
from lib_dynfuse.hosts.devices import check_device

UNETS = tuple(CONFIGS)
METHODS = ("merged", *FUSED, "peft", "klora-published")
DEFAULT = ("merged", "sum", "kl", "kl-sampled", "kl-cfg", "peft", "klora-published")
# What is to be known of a GPU: (unet, pixels), in float16, rank 32, without the convolutions of residual blocks.
ON_GPU = (("sdxl", 1024), ("sd15", 512))
METHODS_ON_GPU = (
    "merged", "sum", "kl-triton", "kl-torch", "kl-sampled-triton", "kl-sampled-torch", "kl-balanced",
    "kl-cfg-triton", "kl-cfg-torch", "kl-cfg-exact", "peft", "klora-published",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One row: `seconds` is the median time of a forward pass, `ratio` the median over the rounds of that over
    `merged`'s (the first method's where `merged` is not measured), `low` and `high` the ends of its interval
    (`bench.ratios`), `rounds` every round's seconds.

    `peak_mib` is the most memory of a GPU that the pass took at any time, weights and factors included; None elsewhere.
    """

    unet: str
    pixels: int
    batch: int
    rank: int
    cover: str
    device: str
    dtype: str
    method: str
    seconds: float
    ratio: float
    low: float
    high: float
    rounds: tuple[float, ...]
    peak_mib: float | None = None


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
    cover: str = "all",
) -> list[Result]:
    """Times `methods` on the UNet `unet` and returns a row for each; writes them to `out` as JSON.

    Every round runs each method once, beginning with another one each time, so that whatever else the machine does
    falls on all of them alike. On one CPU
    thread it is the process's own processor time that counts, on a GPU the time between two events, else the clock's.
    `threads` of the processor, 0 for torch's own number. A fused method's name may end in `-torch` (plain torch) or
    `-triton` (the fused kernels, also in Triton's interpreter); without, the engine takes what it would for a user.

    Raises `ValueError` for an unknown UNet, method, cover or dtype, naming what there is, and for `-triton` where the
    kernels do not run.
    """
    place = checked(unet, pixels, batch, rank, device, dtype, cover, methods, threads)
    model = make_unet(unet, place, getattr(torch, dtype))
    forward = make_inputs(model, pixels, batch)
    layers = make_layers(model, rank, cover)
    peft = partial(forward, with_peft(model, layers, rank)) if "peft" in methods else None
    seconds, peaks = interleaved(methods, layers, rows_of(batch), forward, peft, repeats, place)
    reference = seconds.get("merged", next(iter(seconds.values())))
    what = (unet, pixels, batch, rank, cover, _name(place), dtype)
    results = [
        Result(*what, method, statistics.median(rounds), *paired(rounds, reference), tuple(rounds), peaks[method])
        for method, rounds in seconds.items()
    ]
    if out is not None:
        write(out, results)
    return results


def checked(
    unet: str,
    pixels: int,
    batch: int,
    rank: int,
    device: str,
    dtype: str,
    cover: str,
    methods: Sequence[str],
    threads: int,
) -> torch.device:
    """The device, where all of this can be measured; else the ValueError that `bench` tells of. Sets the threads."""
    _among("unet", unet, UNETS)
    _among("dtype", dtype, DTYPES)
    _among("cover", cover, tuple(COVERS))
    for method in methods:
        if fused(method)[0] not in FUSED:
            _among("method", method, METHODS)
    if pixels % 64 or batch < 1 or rank < 1:
        raise ValueError(f"pixels must be a multiple of 64, batch and rank at least 1, not {pixels}, {batch}, {rank}")
    if threads:
        torch.set_num_threads(threads)
    check_device(device)
    place = torch.device(device)
    if any(fused(method)[1] == "triton" for method in methods):
        with kernels.path("triton"):
            if missing := kernels.why_not(place, getattr(torch, dtype)):
                raise ValueError(f"no method can end in -triton: {missing}")
    return place


def rows_of(batch: int) -> list[Row]:
    """Pictures with guidance, each half in turn."""
    return [Row(index // 2, cond=index % 2 == 1) for index in range(batch)]


def write(out: Path, rows: Sequence[Any]) -> None:
    """Dataclasses as a JSON list."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def on_gpu(out: Path | None = None, repeats: int = 20) -> list[list[Result]]:
    """All rows that tests/bench/NOTES.md asks of an NVIDIA GPU, a list for each UNet; written to `out` as JSON.

    Raises `ValueError` without a GPU or where the kernels do not run on it.
    """
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here")
    found = [
        bench(unet, pixels, 2, 32, "cuda", "float16", METHODS_ON_GPU, repeats, cover="attention")
        for unet, pixels in ON_GPU
    ]
    if out is not None:
        write(out, [row for rows in found for row in rows])
    return found


def table(results: Sequence[Result]) -> str:
    """The rows as a Markdown table."""
    first = results[0]
    memory = first.peak_mib is not None
    lines = [
        f"{first.unet}, {first.pixels} pixels, batch {first.batch}, rank {first.rank} on {first.cover} layers, "
        f"{first.device}, {first.dtype}",
        "",
        "| method | seconds per forward pass | ratio to merged | from .. to |" + (" MiB at most |" if memory else ""),
        "|---|---:|---:|---:|" + ("---:|" if memory else ""),
    ]
    for row in results:
        peak = f" {row.peak_mib:,.0f} |" if row.peak_mib is not None else ""
        lines.append(f"| {row.method} | {row.seconds:.3f} | {row.ratio:.2f} | {row.low:.2f} .. {row.high:.2f} |{peak}")
    return "\n".join(lines)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def _among(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")


__all__ = ["METHODS", "UNETS", "Result", "bench", "covered", "table"]
