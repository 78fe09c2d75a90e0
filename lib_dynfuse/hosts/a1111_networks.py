"""AUTOMATIC1111's network modules as deltas.

Its modules know their factors (`up_model`, `w1a`, `oft_blocks`, ...) and how to make ΔW of them, `calc_updown(W)`,
which is linear in the multiplier whatever the kind. So every delta is `Scaled(multiplier, inner)`, read per forward
pass: another extension may move the multiplier with the steps. Where the mathematics allows, `inner` keeps the
structure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib_dynfuse.core.delta import (
    Affine,
    Delta,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    Norm,
    OutputScale,
    Rotation,
    Scaled,
)

NORMS = (nn.LayerNorm, nn.GroupNorm)


def delta_of(module: Any, layer: nn.Module, weight: Callable[[], Tensor]) -> Delta:
    """What a network module adds to its layer.

    `weight` gives the layer's weight as it is with the plain networks merged in; it is asked for only by kinds that
    depend on it: DoRA, GLoRA, (IA)³ on inputs, and whatever is not known here.
    Raises ValueError, or what the host's own code raises, for a module that fits the layer in no way.
    """
    structured = _STRUCTURES.get(type(module).__name__)
    plain = getattr(module, "dora_scale", None) is None and getattr(module, "bias", None) is None
    inner = structured(module, layer) if structured is not None and plain else None
    return Scaled(lambda: float(module.multiplier()), inner or _dense(module, layer, weight()))


def _dense(module: Any, layer: nn.Module, weight: Tensor) -> Delta:
    module = copy.copy(module) if weight.device.type != "cpu" else _in_float32(module)
    module.multiplier = lambda: 1.0  # ours to apply
    with torch.no_grad():
        update, bias = module.calc_updown(weight)
    if isinstance(layer, NORMS):
        return Affine(update, bias, Norm.of(layer))
    geometry = _geometry(layer)
    return Dense(_widened(update, layer, geometry), bias, geometry)


def _in_float32(module: Any) -> Any:
    """A copy whose factors a CPU can multiply: it cannot in half precision."""
    module = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            setattr(module, name, value.float())
    return module


def _geometry(layer: nn.Module) -> Geometry | None:
    return Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None


def _widened(weight: Tensor, layer: nn.Module, geometry: Geometry | None) -> Tensor:
    """An inpainting model's first layer sees mask and picture too; other models' networks say nothing there."""
    if isinstance(layer, nn.Conv2d) and geometry is not None and weight.dim() == 4:
        missing = layer.in_channels // geometry.groups - weight.shape[1]
        if (layer.in_channels, missing) == (9, 5):
            return pad(weight, (0, 0, 0, 0, 0, missing))
    return weight


def _low_rank(module: Any, layer: nn.Module) -> Delta | None:
    down, up = module.down_model.weight, module.up_model.weight
    mid = None if module.mid_model is None else module.mid_model.weight
    rank = module.network.dyn_dim
    if isinstance(rank, int) and mid is None:
        down, up = down[:rank], up[:, :rank]
    geometry = _geometry(layer)
    return Scaled(module.calc_scale(), LowRank(_widened(down, layer, geometry), up, mid, geometry))


def _kronecker(module: Any, layer: nn.Module) -> Delta | None:
    geometry = _geometry(layer)
    kernel = tuple(layer.kernel_size) if isinstance(layer, nn.Conv2d) else ()
    module = _in_float32(module)  # factors that are products themselves are multiplied here
    product = Kronecker.from_lokr(
        w1=module.w1,
        w1_a=module.w1a,
        w1_b=module.w1b,
        w2=module.w2,
        w2_a=module.w2a,
        w2_b=module.w2b,
        t2=module.t2,
        kernel=kernel,
        geometry=geometry,
    )
    return Scaled(module.calc_scale(), product)


def _output_scale(module: Any, layer: nn.Module) -> Delta | None:
    if module.on_input or isinstance(layer, NORMS):
        return None
    return Scaled(module.calc_scale(), OutputScale(module.w, 1 if isinstance(layer, nn.Conv2d) else -1))


def _rotation(module: Any, layer: nn.Module) -> Delta | None:
    channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return None
    if module.is_R:
        turn: Delta = Rotation(module.oft_blocks.transpose(-1, -2), channel_dim, module.rescale)
    else:
        turn = Rotation.from_oft(module.oft_blocks, channel_dim, float(module.constraint), module.rescale)
    return Scaled(module.calc_scale(), turn)


def _full(module: Any, layer: nn.Module) -> Delta | None:
    update = module.weight * module.calc_scale()
    if isinstance(layer, NORMS):
        return Affine(update, module.ex_bias, Norm.of(layer))
    geometry = _geometry(layer)
    return Dense(_widened(update, layer, geometry), module.ex_bias, geometry)


def _norm(module: Any, layer: nn.Module) -> Delta | None:
    if not isinstance(layer, NORMS):
        return None
    return Affine(module.w_norm * module.calc_scale(), module.b_norm, Norm.of(layer))


_STRUCTURES: dict[str, Callable[[Any, nn.Module], Delta | None]] = {
    "NetworkModuleLora": _low_rank,
    "NetworkModuleLokr": _kronecker,
    "NetworkModuleIa3": _output_scale,
    "NetworkModuleOFT": _rotation,
    "NetworkModuleFull": _full,
    "NetworkModuleNorm": _norm,
}
