"""What a forward pass costs at least, counted from the layers' shapes: operations, bytes, calls. Nothing is run.

Every operator of a forward pass on torch's `meta` device is counted as one call that reads its arguments once and
writes its result once, with the multiply-adds of products, convolutions and attention; views count nothing. At the
rates of a device's data sheet an operator lasts as long as its bytes or its products do, whichever is longer: a bound
for operators that are not fused, to which the host's time for that many calls comes on a fast device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_dynfuse.bench.rivals import FUSED, with_peft
from lib_dynfuse.bench.unets import CONFIGS, COVERS, DTYPES, Layers, make_inputs, make_layers, make_unet
from lib_dynfuse.core import Fusion, Role, Row, kernels, strategy
from lib_dynfuse.core.delta import LowRank

# NVIDIA's data sheet of the H200 (SXM): dense fp16 or bf16 products, float32 outside of the tensor cores, memory.
PRODUCTS_PER_SECOND = 989e12
ELEMENTWISE_PER_SECOND = 67e12
BYTES_PER_SECOND = 4.8e12
# Float32 operations per output element of the divergence of two deltas, an exponential counted as one.
_DIVERGENCE = 24


@dataclass
class Cost:
    """Of one forward pass. `operations`: two per multiply-add of a product; `seconds` at the data sheet's rates."""

    calls: int = 0
    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, operations: int, size: int, elementwise: int = 0) -> None:
        """One more call; `elementwise` float32 operations besides those of products."""
        self.calls += 1
        self.operations += operations + elementwise
        self.bytes += size
        work = operations / PRODUCTS_PER_SECOND + elementwise / ELEMENTWISE_PER_SECOND
        self.seconds += max(work, size / BYTES_PER_SECOND)


class Counting(TorchDispatchMode):
    """Counts the operators that run while it is entered; in inference mode, where torch does not take them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        made = _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in read}
        if func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in known for tensor in made):
            self.cost.add(_operations(func.overloadpacket.__name__, read, made), sum(map(_bytes, [*read, *made])))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What a tensor takes in memory; one that is expanded is read from less."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _operations(name: str, read: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """Two per multiply-add."""
    if name in ("linear", "conv2d"):
        return 2 * made[0].numel() * read[1][0].numel()
    if name in ("mm", "bmm", "matmul", "addmm_", "baddbmm_", "addmm", "baddbmm"):
        return 2 * made[0].numel() * read[-1].shape[-2]
    if name == "scaled_dot_product_attention":
        query, key, value = (tensor.shape for tensor in read[:3])
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def count(
    unet: str = "sdxl",
    pixels: int = 1024,
    batch: int = 2,
    rank: int = 32,
    dtype: str = "float16",
    cover: str = "attention",
    methods: Sequence[str] = ("sum", "kl", "kl-sampled", "kl-cfg", "peft"),
) -> dict[str, Cost]:
    """The cost of a forward pass by each method, as torch runs it on a GPU, and of three that are formulas:

    `both products`: merged, and two low-rank products that add to the output; `choice, one read`: merged, and the
    hidden products, the statistics in one read of the base output, the winner's product added; `choice, sampled`: the
    same with statistics of 64 tokens per item.

    unet, pixels, batch, rank, dtype, cover and the names of methods are those of `bench`; counting `kl` of a large UNet
    takes minutes. ValueError for an unknown UNet, dtype or cover.
    """
    for what, value, allowed in (("unet", unet, CONFIGS), ("cover", cover, COVERS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")
    place = torch.device("meta")
    model = make_unet(unet, place, getattr(torch, dtype))
    forward = make_inputs(model, pixels, batch)
    layers = make_layers(model, rank, cover)
    rows = [Row(index // 2, cond=index % 2 == 1) for index in range(batch)]
    found: dict[str, Cost] = {}
    with torch.inference_mode():
        with Shapes(layers) as shapes:
            found["merged"] = counted(forward)
        for method, sampled in (("both products", None), ("choice, one read", 0), ("choice, sampled", 64)):
            found[method] = shapes.at_least(found["merged"], sampled)
        for method in methods:
            if method == "peft":
                found[f"torch: {method}"] = counted(partial(forward, with_peft(model, layers, rank)))
                continue
            rule, parameters = FUSED[method]
            with kernels.path("torch"), Fusion(layers, strategy(rule, **parameters)) as fusion:
                fusion.rows = rows
                # The first step packs the factors, and may listen.
                fusion.at(0, 2)
                forward()
                fusion.at(1, 2)
                found[f"torch: {method}"] = counted(forward)
    return found


def counted(forward: Callable[[], object]) -> Cost:
    with Counting() as counting:
        forward()
    return counting.cost


class Shapes:
    """Notes the tokens that every covered layer makes in a forward pass."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._handles: list[Any] = []
        self._seen: list[tuple[LowRank, Tensor, Tensor]] = []

    def __enter__(self) -> Shapes:
        for module, deltas in self._layers.values():
            delta = deltas[Role.SUBJECT]
            assert isinstance(delta, LowRank)

            def note(module: nn.Module, args: tuple[Tensor, ...], y: Tensor, delta: LowRank = delta) -> None:
                self._seen.append((delta, args[0], y))

            self._handles.append(module.register_forward_hook(note))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def at_least(self, merged: Cost, sampled: int | None) -> Cost:
        """`merged` and what the layers add: both products (None), or the choice by so many tokens (0: all)."""
        total = Cost(**vars(merged))
        for delta, x, y in self._seen:
            rank, size = 2 * delta.rank, y.element_size()
            down, up = 2 * delta.down.numel(), 2 * delta.up.numel()
            channels = delta.outputs
            tokens = y.numel() // channels
            hidden = tokens * rank
            # Once for both roles, the downs side by side.
            total.add(2 * tokens * down, size * (x.numel() + down + hidden))
            if sampled is None:
                total.add(2 * tokens * up, size * (hidden + up + 2 * y.numel()))
                continue
            looked = min(tokens, sampled * y.shape[0]) if sampled else tokens
            statistics = size * (looked * (rank + channels) + up) + 2 * 4 * looked
            total.add(2 * looked * up, statistics, _DIVERGENCE * looked * channels)
            total.add(tokens * up, size * (hidden // 2 + up // 2 + 2 * y.numel()))
        return total


def table(costs: dict[str, Cost]) -> str:
    """The costs as a Markdown table. No ratios: they would leave out how long a device waits for calls."""
    lines = [
        "| method | calls | 10⁹ operations | GB moved | ms at least |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {cost.calls:,} | {cost.operations / 1e9:,.0f} | {cost.bytes / 1e9:.1f} | "
        f"{cost.seconds * 1e3:.1f} |"
        for name, cost in costs.items()
    ]
    return "\n".join(lines)
