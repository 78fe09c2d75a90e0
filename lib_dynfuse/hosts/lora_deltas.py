"""A network's tensors on one layer as a delta: every kind that the WebUIs read.

LoRA and LoCon (with a middle factor too), DoRA in kohya's and in peft's form, LoHa, LoKr, OFT and BOFT, GLoRA, (IA)³,
full differences and those of normalisation layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    OutputScale,
    Rotation,
    Scaled,
    Shift,
    Sum,
    row_norm,
)

_NORMS = (nn.LayerNorm, nn.GroupNorm)

Tensors = Mapping[str, Tensor]
AtStrength = Callable[[float], Delta]


class Unreadable(ValueError):
    """A tensor of the file that makes no network; `tensor` is what it is called here."""

    def __init__(self, tensor: str, reason: str) -> None:
        super().__init__(reason)
        self.tensor = tensor


class _Made(NamedTuple):
    """What a kind makes of its tensors: the delta without any scale, and its rank, by which alpha is divided."""

    delta: Delta
    rank: int | None
    scaled: bool = True


@dataclass(frozen=True)
class _Kind:
    needs: tuple[str, ...]
    may: tuple[str, ...]
    make: Callable[[Tensors, nn.Module], _Made]


def delta_at(tensors: Tensors, layer: nn.Module, scale: Callable[[int | None], float]) -> AtStrength:
    """What the tensors of one layer, by their names in lora_names.py, add to its output, for any strength.

    scale: from the network's rank (None where it has none) to alpha / rank, or what stands for it in the file.
    Raises Unreadable for tensors that are not all of one kind, or that do not fit the layer.
    """
    kind = next((kind for kind in _KINDS if any(name in tensors for name in kind.needs)), None)
    if kind is None:
        raise Unreadable(next(iter(tensors)), "stands alone; expected the other tensors of its network beside it")
    wrong = next((name for name in tensors if name not in (*kind.needs, *kind.may)), None)
    if wrong is not None:
        raise Unreadable(wrong, f"does not go with {next(name for name in kind.needs if name in tensors)}")
    tensors = {name: tensor.to(_weight(layer).device) for name, tensor in tensors.items()}
    try:
        made = kind.make(tensors, layer)
        _check_shape(made.delta, layer)
        by = scale(made.rank) if made.scaled else 1.0
        at = _decomposed(tensors, layer, made.delta, by)
        if "diff_b" in tensors and not isinstance(made.delta, (Affine, Shift)):
            return _with_bias(at, Shift(_own(tensors["diff_b"], layer), made.delta.channel_dim))
        return at
    except Unreadable:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        first = next(name for name in kind.needs if name in tensors)
        shape = list(_weight(layer).shape)
        raise Unreadable(first, f"does not fit its layer, whose weight is {shape}: {_sentence(error)}") from error


def _decomposed(tensors: Tensors, layer: nn.Module, delta: Delta, by: float) -> AtStrength:
    """With a DoRA's magnitudes where there are some.

    In kohya's form (`dora_scale`) a strength goes part of the way to the decomposed weight, as in the WebUIs; in peft's
    (`lora_magnitude_vector`) it is ΔW's, before the norm is taken (arXiv 2402.09353, equation 5), as in peft. At
    strength 1 both are the same.
    """
    if "magnitude" in tensors:
        magnitude = tensors["magnitude"]

        def at(strength: float) -> Delta:
            inner = Scaled(by * strength, delta)
            return Decomposed(inner, magnitude, row_norm(_weight(layer), inner))

        at(1.0)  # what does not fit is found now
        return at
    if "dora_scale" in tensors:
        whole = _kohya_dora(tensors["dora_scale"], layer, Scaled(by, delta))
        return lambda strength: Scaled(strength, whole)
    return lambda strength: Scaled(by * strength, delta)


def _with_bias(at: AtStrength, shift: Shift) -> AtStrength:
    return lambda strength: Sum(at(strength), Scaled(strength, shift))


def _kohya_dora(magnitude: Tensor, layer: nn.Module, inner: Delta) -> Delta:
    weight = wide(_weight(layer).detach())
    if magnitude.shape[0] == magnitude.numel() == weight.shape[0]:
        return Decomposed(inner, magnitude, row_norm(weight, inner))
    if magnitude.numel() != weight.shape[1]:
        raise Unreadable(
            "dora_scale", f"has the shape {list(magnitude.shape)}, the layer's weight {list(weight.shape)}"
        )
    update = inner.dense()
    if update is None:
        raise Unreadable("dora_scale", "does not go with this kind of network")
    # Magnitudes of inputs change what W sees: no function of the output.
    whole = weight + update
    norm = torch.linalg.vector_norm(whole.transpose(0, 1).flatten(1), dim=1)
    gain = (wide(magnitude).flatten() / norm).view(1, -1, *(1 for _ in weight.shape[2:]))
    return Dense(_own(whole * gain - weight, layer), None, _geometry(layer))


def _low_rank(tensors: Tensors, layer: nn.Module) -> _Made:
    _require(tensors, "down", "up")
    geometry = _geometry(layer)
    down, up = _own(tensors["down"], layer), _own(tensors["up"], layer)
    mid = _own(tensors["mid"], layer) if "mid" in tensors else None
    delta: Delta = LowRank(down, up, mid, geometry)
    _check_shape(delta, layer)
    if "up_bias" in tensors:
        if "magnitude" in tensors or "dora_scale" in tensors:
            raise Unreadable("up_bias", "does not go with a DoRA's magnitudes")
        delta = Sum(delta, Shift(_own(tensors["up_bias"], layer), delta.channel_dim))
    return _Made(delta, down.shape[0])


def _loha(tensors: Tensors, layer: nn.Module) -> _Made:
    _require(tensors, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    product = _hada(tensors, "1") * _hada(tensors, "2")
    return _Made(Dense(_own(_shaped(product, layer), layer), None, _geometry(layer)), tensors["hada_w1_b"].shape[0])


def _hada(tensors: Tensors, number: str) -> Tensor:
    a, b = wide(tensors[f"hada_w{number}_a"]), wide(tensors[f"hada_w{number}_b"])
    middle = tensors.get(f"hada_t{number}")
    if middle is None:
        return a.flatten(1) @ b.flatten(1)
    return torch.einsum("ijkl,jr,ip->prkl", wide(middle), b, a)


def _lokr(tensors: Tensors, layer: nn.Module) -> _Made:
    # What is multiplied here is multiplied in float32; what stays a factor takes the layer's precision.
    held = {name.removeprefix("lokr_"): wide(tensor) for name, tensor in tensors.items() if name.startswith("lokr_")}
    if "w1" not in held and {"w1_a", "w1_b"} <= held.keys():
        held["w1"] = held.pop("w1_a") @ held["w1_b"]
    rank = held["w2_b"].shape[0] if "w2_b" in held else held["w1_b"].shape[0] if "w1_b" in held else None
    held.pop("w1_b", None)
    kernel = tuple(layer.kernel_size) if isinstance(layer, nn.Conv2d) else ()
    own = {name: _own(tensor, layer) for name, tensor in held.items()}
    return _Made(Kronecker.from_lokr(**own, kernel=kernel, geometry=_geometry(layer)), rank)


def _oft(tensors: Tensors, layer: nn.Module) -> _Made:
    channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise ValueError("it turns the outputs of a grouped convolution")
    rescale = tensors.get("rescale")
    if "oft_diag" in tensors:  # LyCORIS's first form holds the rotations themselves
        return _Made(Rotation(wide(tensors["oft_diag"]).transpose(-1, -2), channel_dim, rescale), None, scaled=False)
    # Here alpha is no scale but how far the rotation may go.
    limit = float(tensors["alpha"]) * _weight(layer).shape[0] if "alpha" in tensors else 0.0
    return _Made(Rotation.from_oft(tensors["oft_blocks"], channel_dim, limit, rescale), None, scaled=False)


def _glora(tensors: Tensors, layer: nn.Module) -> _Made:
    """ΔW = W·a1·a2 + b1·b2; in its first form, which the WebUIs read too, a1 and a2, b1 and b2 are exchanged."""
    _require(tensors, "a1", "a2", "b1", "b2")
    a1, a2, b1, b2 = (wide(tensors[name]).flatten(1) for name in ("a1", "a2", "b1", "b2"))
    weight = wide(_weight(layer).detach())
    if b1.shape[0] != weight.shape[0] or b1.shape[1] != b2.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    inputs = torch.einsum("oi...,ij->oj...", torch.einsum("oi...,ij->oj...", weight, a1), a2)
    update = inputs + _shaped(b1 @ b2, layer)
    return _Made(Dense(_own(update, layer), None, _geometry(layer)), b2.shape[0])


def _ia3(tensors: Tensors, layer: nn.Module) -> _Made:
    _require(tensors, "weight", "on_input")
    v = tensors["weight"].flatten()
    if not bool(tensors["on_input"]):
        return _Made(OutputScale(_own(v, layer), 1 if isinstance(layer, nn.Conv2d) else -1), None, scaled=False)
    weight = wide(_weight(layer).detach())
    update = weight * wide(v).view(1, -1, *(1 for _ in weight.shape[2:]))
    return _Made(Dense(_own(update, layer), None, _geometry(layer)), None, scaled=False)


def _full(tensors: Tensors, layer: nn.Module) -> _Made:
    bias = _own(tensors["diff_b"], layer) if "diff_b" in tensors else None
    if "diff" not in tensors:
        assert bias is not None
        channel_dim = 1 if isinstance(layer, (nn.Conv2d, nn.GroupNorm)) else -1
        return _Made(Shift(bias, channel_dim), None, scaled=False)
    if isinstance(layer, _NORMS):
        return _Made(Affine(_own(tensors["diff"], layer), bias, Norm.of(layer)), None, scaled=False)
    return _Made(Dense(_own(tensors["diff"], layer), None, _geometry(layer)), None, scaled=False)


def _norm(tensors: Tensors, layer: nn.Module) -> _Made:
    if not isinstance(layer, _NORMS):
        raise Unreadable("w_norm", f"is for a normalisation layer, this is a {type(layer).__name__}")
    _require(tensors, "w_norm")
    bias = _own(tensors["b_norm"], layer) if "b_norm" in tensors else None
    return _Made(Affine(_own(tensors["w_norm"], layer), bias, Norm.of(layer)), None, scaled=False)


_EVERY = ("alpha", "dora_scale", "diff_b")
_LOHA = tuple(f"hada_w{number}_{letter}" for number in "12" for letter in "ab")
_LOKR = tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_KINDS = (
    _Kind(("down", "up"), ("mid", "up_bias", "magnitude", *_EVERY), _low_rank),
    _Kind(_LOHA, ("hada_t1", "hada_t2", *_EVERY), _loha),
    _Kind(_LOKR, _EVERY, _lokr),
    _Kind(("oft_blocks", "oft_diag"), ("rescale", "alpha", "diff_b"), _oft),
    _Kind(("a1", "a2", "b1", "b2"), _EVERY, _glora),
    _Kind(("weight", "on_input"), ("alpha", "diff_b"), _ia3),
    _Kind(("w_norm", "b_norm"), ("alpha",), _norm),
    _Kind(("diff", "diff_b"), ("alpha",), _full),
)


def _require(tensors: Tensors, *names: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        held = next(name for name in names if name in tensors) if len(missing) < len(names) else next(iter(tensors))
        raise Unreadable(held, f"stands alone; expected {' and '.join(missing)} beside it")


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _own(tensor: Tensor, layer: nn.Module) -> Tensor:
    """In the layer's own precision."""
    return tensor.detach().to(_weight(layer).dtype)


def _geometry(layer: nn.Module) -> Geometry | None:
    if isinstance(layer, _NORMS):
        raise ValueError(f"it is a network for a Linear or Conv2d layer, this is a {type(layer).__name__}")
    return Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None


def _shaped(product: Tensor, layer: nn.Module) -> Tensor:
    shape = _weight(layer).shape
    if product.shape[0] != shape[0] or product.numel() != shape.numel():
        raise ValueError(f"it makes one of {list(product.shape)}")
    return product.reshape(shape)


def _check_shape(delta: Delta, layer: nn.Module) -> None:
    made, weight = _shape(delta), tuple(_weight(layer).shape)
    if made is not None and made != weight[: len(made)]:
        raise ValueError(f"it makes one of {list(made)}")


def _shape(delta: Delta) -> tuple[int, ...] | None:
    """The shape of ΔW, as far as the delta's tensors tell it."""
    if isinstance(delta, LowRank):
        return (delta.outputs, delta.down.shape[1], *delta.kernel)
    if isinstance(delta, Kronecker):
        second = _shape(delta.w2) if isinstance(delta.w2, LowRank) else tuple(delta.w2.shape)
        assert second is not None
        return (delta.w1.shape[0] * second[0], delta.w1.shape[1] * second[1], *second[2:])
    if isinstance(delta, Dense):
        return tuple(delta.weight.shape)
    return None if delta.outputs is None else (delta.outputs,)


def _sentence(error: Exception) -> str:
    """The first sentence of a library's message, whole."""
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
