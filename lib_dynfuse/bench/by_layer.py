"""What a method adds to the covered layers: the versions of every layer timed one after the other.

A forward pass takes seconds on a CPU, and a machine's speed moves within them. Here the versions of one layer follow
one another within milliseconds, so that much smaller differences are seen than between whole passes. What no network
covers is the same for all and is not run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib_dynfuse.bench.rivals import with_peft
from lib_dynfuse.bench.rounds import interleaved
from lib_dynfuse.bench.run import checked, rows_of, write
from lib_dynfuse.bench.unets import Layers, make_inputs, make_layers, make_unet

DEFAULT = ("merged", "sum", "kl", "kl-sampled", "kl-cfg", "kl-cfg-exact", "peft")


@dataclass(frozen=True)
class Added:
    """Of all covered layers of one forward pass: `seconds` in them, of which `added` are more than merged."""

    method: str
    seconds: float
    added: float


@dataclass
class _Kind:
    """Layers that are alike: one of them by its name, what it was given, and how many there are."""

    name: str
    x: Tensor
    count: int = 0


def by_layer(
    unet: str = "sd15",
    pixels: int = 256,
    batch: int = 2,
    rank: int = 32,
    device: str = "cpu",
    dtype: str = "float32",
    methods: Sequence[str] = DEFAULT,
    repeats: int = 15,
    out: Path | None = None,
    threads: int = 0,
    cover: str = "attention",
) -> list[Added]:
    """A row for each of `methods`, `merged` among them whether named or not: medians over the rounds of each kind of
    layer, times how many of it there are. Arguments and errors are those of `bench.run.bench`."""
    methods = tuple(dict.fromkeys(("merged", *methods)))
    place = checked(unet, pixels, batch, rank, device, dtype, cover, methods, threads)
    model = make_unet(unet, place, getattr(torch, dtype))
    layers = make_layers(model, rank, cover)
    kinds = _kinds(make_inputs(model, pixels, batch), layers)
    rivals = dict(with_peft(model, layers, rank).named_modules()) if "peft" in methods else None
    seconds = dict.fromkeys(methods, 0.0)
    for kind in tqdm(kinds, desc="kinds of layers", leave=False):
        one = {kind.name: layers[kind.name]}
        peft = partial(rivals[kind.name], kind.x) if rivals is not None else None
        forward = partial(layers[kind.name][0], kind.x)
        found, _ = interleaved(methods, one, rows_of(batch), forward, peft, repeats, place, bar=False)
        for method, times in found.items():
            seconds[method] += kind.count * statistics.median(times)
    rows = [Added(method, value, value - seconds["merged"]) for method, value in seconds.items()]
    if out is not None:
        write(out, rows)
    return rows


def _kinds(forward: Callable[[], object], layers: Layers) -> list[_Kind]:
    """The covered layers by what they are and what they are given in a forward pass."""
    kinds: dict[tuple[str, torch.Size], _Kind] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], y: Tensor, name: str) -> None:
        key = (repr(module), args[0].shape)
        if key not in kinds:
            kinds[key] = _Kind(name, args[0].clone())
        kinds[key].count += 1

    handles = [module.register_forward_hook(partial(note, name=name)) for name, (module, _) in layers.items()]
    try:
        with torch.inference_mode():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(kinds.values())


def table(rows: Sequence[Added]) -> str:
    """The rows as a Markdown table."""
    lines = ["| method | seconds in the covered layers | added to merged |", "|---|---:|---:|"]
    lines += [f"| {row.method} | {row.seconds:.3f} | {row.added:.3f} |" for row in rows]
    return "\n".join(lines)
