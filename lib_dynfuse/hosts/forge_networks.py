"""Forge's LoRA patches as deltas.

Forge keeps a network file as patches: by the name of a parameter a list of `[strength, patch, strength_model, offset,
function]`. `patch` is `(kind, tensors)`; `offset`, `(dim, start, length)`, is the part of the parameter that it is for,
and `function` puts the rows of ΔW in the model's order. Where the mathematics allows, a delta keeps the structure of
its patch; of all else the host's own merge makes ΔW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib_dynfuse.core.algebra import wide
from lib_dynfuse.core.delta import (
    Affine,
    Decomposed,
    Delta,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    Norm,
    Rows,
    Scaled,
    Shift,
    Sum,
)

Patch = Sequence[Any]
Function = Callable[[Tensor], Tensor]

_PREFIX = "diffusion_model."
_NORMS = (nn.LayerNorm, nn.GroupNorm)
_HALF = (torch.float16, torch.bfloat16)


def deltas_of(
    patches: Mapping[str, Sequence[Patch]],
    unet: nn.Module,
    weight: Callable[[str], Tensor],
    merge: Callable[[list[Patch], Tensor], Tensor],
    *,
    stored: Mapping[str, Tensor] | None = None,
    loaded: Collection[Mapping[str, Sequence[Patch]]] = (),
) -> tuple[dict[str, Delta], list[str]]:
    """What one network file adds to the layers of `unet`, by path, and the keys that have to stay merged.

    patches: by the parameter's key, `diffusion_model.<path>.weight` or `.bias`. weight(key): the parameter as it is
    with the plain networks merged in, unpacked; asked for only by kinds that depend on it: DoRA, GLoRA, `set`, whatever
    is not known here. merge: the host's `merge_lora_to_weight`. stored: the parameters that have something merged into
    them at present, as they are without. loaded: the patches of all networks of the prompt.
    """
    found: dict[str, list[Delta]] = {}
    left: list[str] = []
    for key, listed in patches.items():
        path, _, name = key.removeprefix(_PREFIX).rpartition(".")
        try:
            if not key.startswith(_PREFIX):
                raise ValueError(f"{key} is no parameter of the UNet")
            layer = unet.get_submodule(path)
            shape = _shape(layer, name, (stored or {}).get(key))
            if shape is not None and any(_widens(patch, shape) for other in loaded for patch in other.get(key, ())):
                raise ValueError("the layer takes more inputs as soon as this or another network is merged")
            parameter = _Parameter(layer, name, shape, functools.partial(weight, key), merge)
            together = [*found.get(path, ()), *map(parameter.delta, listed)]
            Sum(*together)  # they are for one layer
        # Whatever we, torch or the host's code may make of a patch that fits in no way: the others fit all the same.
        except Exception:
            left.append(key)
        else:
            found[path] = together
    return {path: parts[0] if len(parts) == 1 else Sum(*parts) for path, parts in found.items()}, left


class _Parameter:
    """A layer's weight or bias, and what patches for it add to the layer's output.

    ValueError for a parameter or a layer of another kind.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        shape: tuple[int, ...] | None,
        weight: Callable[[], Tensor],
        merge: Callable[[list[Patch], Tensor], Tensor],
    ) -> None:
        if name not in ("weight", "bias") or not (isinstance(layer, (nn.Conv2d, *_NORMS)) or _is_linear(layer)):
            raise ValueError(f"{name} of a {type(layer).__name__} changes no output that can be added to")
        self._layer = layer
        self._name = name
        self._geometry = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
        self._kernel = tuple(layer.kernel_size) if isinstance(layer, nn.Conv2d) else ()
        self._shape = shape
        self._weight = functools.cache(lambda: wide(weight()))
        self._merge = merge

    def delta(self, patch: Patch) -> Delta:
        """Raises ValueError, or what the host's own code raises, for a patch that cannot stand beside the layer."""
        strength, value, strength_model, offset, function = patch
        if strength_model != 1.0:
            raise ValueError("it changes the strength of the model's own weight")
        rows = None if offset is None else self._rows(*offset)
        try:
            inner = self._structured(value, function, rows)
        except (IndexError, RuntimeError, TypeError, ValueError):
            inner = None  # the host may know what to do with it
        if inner is None:
            inner = self._merged(patch, rows)
        elif isinstance(inner, Shift):
            inner = self._of(wide(inner.bias) * strength)
        else:
            inner = Scaled(strength, inner)
        if strength == 0.0:
            inner = Scaled(0.0, inner)  # also where the host made ΔW of it
        if rows is None:
            return inner
        return Rows(inner, rows.start, rows.stop, None if self._shape is None else self._shape[0])

    def _rows(self, dim: int, start: int, length: int) -> slice:
        if dim != 0 or (self._geometry is not None and self._geometry.groups > 1):
            raise ValueError("only rows of the output can be told apart, and not those of groups")
        return slice(start, start + length)

    def _fits(self, rows: slice | None, shape: Sequence[int]) -> None:
        """ValueError where the shape of ΔW is known and is another one."""
        if self._shape is None:
            return
        wanted = self._shape if rows is None else (rows.stop - rows.start, *self._shape[1:])
        if tuple(shape) != wanted:
            raise ValueError(f"{list(shape)} for a {self._name} of {list(wanted)}")

    def _structured(self, value: Any, function: Function | None, rows: slice | None) -> Delta | None:
        """The patch without its strength; None for kinds that have no structure. ValueError where it does not fit."""
        if isinstance(value, list):  # a patch for a patch
            return None
        kind, tensors = ("diff", value) if len(value) == 1 else value
        if kind == "diff":
            # The host applies no function to these, other hosts of the family do: left to their own merge.
            if function is not None:
                return None
            self._fits(rows, tensors[0].shape)
            return self._of(tensors[0])
        if self._name == "bias" or isinstance(self._layer, _NORMS):
            return None
        if kind == "lora":
            up, down, alpha, mid, magnitude = tensors
            inner: Delta = self._low_rank(up, down, mid, function, rows)
            scale = _scale(alpha, down)
        elif kind == "lokr" and function is None:
            *halves, magnitude = tensors
            scale, inner = self._kronecker(*halves, rows=rows)
        elif kind == "loha" and function is None:
            *halves, magnitude = tensors
            scale, inner = self._hadamard(*halves, rows=rows)
        else:
            return None
        inner = Scaled(scale, inner)
        return inner if magnitude is None else self._decomposed(inner, magnitude, rows)

    def _of(self, update: Tensor) -> Delta:
        """The delta of a changed weight or bias."""
        if self._name == "bias":
            return Shift(update, 1 if isinstance(self._layer, (nn.Conv2d, nn.GroupNorm)) else -1)
        if isinstance(self._layer, _NORMS):
            return Affine(update, None, Norm.of(self._layer))
        return Dense(update, None, self._geometry)

    def _low_rank(
        self, up: Tensor, down: Tensor, mid: Tensor | None, function: Function | None, rows: slice | None
    ) -> LowRank:
        if function is not None:
            up = _reordered(up, function)
        if self._geometry is None:
            up, down = up.flatten(1), down.flatten(1)
            missing = 0 if self._shape is None else self._shape[1] - down.shape[1]
            if missing > 0:  # a model that is fed more than a picture, and a network made for one that is not
                down = pad(down, (0, missing))
        delta = LowRank(down, up, mid, self._geometry)
        self._fits(rows, (delta.outputs, *delta.rows().shape[1:]))
        return delta

    def _kronecker(
        self,
        w1: Tensor | None,
        w2: Tensor | None,
        alpha: float | None,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        t2: Tensor | None,
        *,
        rows: slice | None,
    ) -> tuple[float, Kronecker]:
        # A half that is whole has no rank to divide by; of two ranks the host takes the second.
        scale = _scale(alpha, w2_b) if w2 is None else _scale(alpha, w1_b) if w1 is None else 1.0
        if w1 is None:
            w1 = wide(w1_a) @ wide(w1_b)  # a CPU may not multiply in half precision
        if t2 is not None and w2 is None and tuple(t2.shape[2:]) != self._kernel:
            raise ValueError(f"a core of {list(t2.shape)} for a kernel of {list(self._kernel)}")
        delta = Kronecker.from_lokr(
            w1=w1, w2=w2, w2_a=w2_a, w2_b=w2_b, t2=t2, kernel=self._kernel, geometry=self._geometry
        )
        groups = 1 if self._geometry is None else self._geometry.groups
        self._fits(rows, (delta.outputs, delta.inputs // groups, *self._kernel))
        return scale, delta

    def _hadamard(
        self,
        w1_a: Tensor,
        w1_b: Tensor,
        alpha: float | None,
        w2_a: Tensor,
        w2_b: Tensor,
        t1: Tensor | None,
        t2: Tensor | None,
        *,
        rows: slice | None,
    ) -> tuple[float, Delta]:
        update = _product(w1_a, w1_b, t1) * _product(w2_a, w2_b, t2)
        update = update.reshape(update.shape[0], -1, *self._kernel)
        self._fits(rows, update.shape)
        peak, update = _compact(update, w1_a.dtype)
        return peak * _scale(alpha, w1_b), self._of(update)

    def _decomposed(self, inner: Delta, magnitude: Tensor, rows: slice | None) -> Decomposed:
        """By the host's formula: the norm is that of the rows of W itself, without ΔW."""
        weight = self._weight() if rows is None else self._weight()[rows]
        per_output = (weight.shape[0], *(1 for _ in weight.shape[1:]))
        if tuple(magnitude.shape) != per_output:
            raise ValueError(f"magnitudes of {list(magnitude.shape)}: expected {list(per_output)}")
        norm = torch.linalg.vector_norm(weight.flatten(1), dim=1) + torch.finfo(weight.dtype).eps
        return Decomposed(inner, magnitude, norm)

    def _merged(self, patch: Patch, rows: slice | None) -> Delta:
        """ΔW as the host makes it, all strengths included. ValueError when that is nothing, or has another shape."""
        weight = self._weight()
        merged = self._merge([patch], weight)
        if merged.shape != weight.shape:
            raise ValueError(f"it widens the {self._name} from {list(weight.shape)} to {list(merged.shape)}")
        update = merged - weight
        if not update.any():
            raise ValueError("the host's own merge changes nothing")
        if rows is not None:
            update = update[rows]
        if self._name == "bias":
            return self._of(update)
        peak, update = _compact(update, _precision(patch[1]))
        return Scaled(peak, self._of(update))


def _is_linear(layer: nn.Module) -> bool:
    """The host has Linear classes of its own, for packed weights too, and derives from them under other names."""
    return any(base.__name__ == "Linear" for base in type(layer).__mro__)


def _shape(layer: nn.Module, name: str, stored: Tensor | None) -> tuple[int, ...] | None:
    """The shape of a layer's weight or bias without what is merged at present, None where it cannot be known."""
    if isinstance(layer, nn.LayerNorm):
        return tuple(layer.normalized_shape)
    if isinstance(layer, nn.GroupNorm):
        return (layer.num_channels,)
    if isinstance(layer, nn.Conv2d):
        whole: tuple[int, ...] | None = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    else:
        # Not by attribute: where memory is low, that would bring the weight onto the device.
        kept = layer._parameters.get("weight") if stored is None or name == "bias" else stored
        whole = _linear_shape(kept)
    return whole if whole is None or name == "weight" else whole[:1]


def _linear_shape(kept: Tensor | None) -> tuple[int, ...] | None:
    """A packed weight's own shape says nothing; those who pack it may keep the true one."""
    if kept is None:
        return None
    for holder, name in ((kept, "real_shape"), (getattr(kept, "quant_state", None), "shape")):
        told = getattr(holder, name, None)
        if told is not None:
            return tuple(told)
    return tuple(kept.shape) if kept.dim() == 2 and kept.is_floating_point() else None


def _widens(patch: Patch, shape: tuple[int, ...]) -> bool:
    """Whether the host's merge makes a Linear layer take more inputs: a model that is fed more than a picture."""
    value = patch[1]
    if len(shape) != 2 or not isinstance(value, tuple) or value[0] != "lora":
        return False
    return bool(value[1][1].flatten(1).shape[1] > shape[1])


def _scale(alpha: float | None, down: Tensor) -> float:
    return 1.0 if alpha is None else float(alpha) / down.shape[0]


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a·b [out, in·kh·kw], or with a core [i, j, kh, kw] the product of a [i, out], core and b [j, in]."""
    if core is None:
        return wide(a) @ wide(b)
    return torch.einsum("ijkl,jr,ip->prkl", wide(core), wide(b), wide(a))


def _compact(update: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    """(s, ΔW / s) in the file's precision where that is a half; s as half precision loses what is tiny."""
    if dtype not in _HALF:
        return 1.0, update
    peak = float(update.abs().amax()) or 1.0
    return peak, (update / peak).to(dtype)


def _precision(value: Any) -> torch.dtype:
    tensors = value[-1] if len(value) == 2 else value
    return next((one.dtype for one in tensors if isinstance(one, Tensor)), torch.float32)


def _reordered(up: Tensor, function: Function) -> Tensor:
    """`up` with its rows put in order as function(up·down) has them. ValueError for a function that does more."""
    out, rank = up.shape[0], up.shape[1]
    # A pattern without order; a random one would be drawn from the generator that pictures are made with.
    left, right = (torch.arange(a * b).square().sin().view(a, b) for a, b in ((out, rank), (rank, 3)))
    if not torch.allclose(function(left @ right), function(left) @ right, atol=1e-5):
        raise ValueError("its function does more than to reorder rows")
    return function(wide(up).flatten(1)).to(up.dtype).reshape(up.shape)
