"""What every delta can do, how deltas combine (`Scaled`, `Sum`, `Rows`, `Shift`), how a layer walks over its input.

The kinds themselves are in weights.py (computed from a layer's input) and outputs.py (computed from its output or, on
normalisation layers, from the normalised input). `lib_dynfuse.core.delta` has the public names of all three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """How a Conv2d walks over its input. A delta whose geometry is None belongs to a Linear layer."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    border: str = "zeros"
    """What lies around the picture: zeros, or what `torch.nn.functional.pad` calls circular, reflect or replicate."""

    @classmethod
    def of(cls, module: nn.Conv2d) -> Geometry:
        """The geometry of a layer. ValueError for a border other than zeros whose width is given in words."""
        border = module.padding_mode if module.padding != (0, 0) else "zeros"
        if border != "zeros" and isinstance(module.padding, str):
            raise ValueError(f"padding_mode {border!r} with padding {module.padding!r} is not supported")
        return cls(module.stride, module.padding, module.dilation, module.groups, border)

    def every(self, step: int) -> Geometry:
        """The geometry of a layer that makes only every step-th pixel, down and across; padding must be in numbers."""
        return replace(self, stride=tuple(stride * step for stride in self.stride))

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """`weight` over `x` with this stride, padding and dilation; the groups are the caller's to choose."""
        if self.border == "zeros" or isinstance(self.padding, str):
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        tall, wide = self.padding
        x = F.pad(x, (wide, wide, tall, tall), mode=self.border)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, groups)


@dataclass(frozen=True)
class Factors:
    """ΔW as one product, up·down, all fixed scales folded into `up`.

    Linear (geometry None): down [r, in], up [out, r]. Conv2d, 1x1 included: down [r, in, kh, kw] to be run with the
    geometry, up [out, r, 1, 1] to be run after it.
    """

    down: Tensor
    up: Tensor
    geometry: Geometry | None

    def frobenius_sq(self) -> float:
        """‖up·down‖_F² = Σ (upᵀup) ⊙ (down·downᵀ): two r x r matrices instead of ΔW."""
        up, down = wide(self.up).flatten(1), wide(self.down).flatten(1)
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))


class Delta(ABC):
    """What a network adds to one layer's output: d = delta(x, y), with x the layer's input and y its base output.

    y is the base output *without* the layer's bias, as the bias is no part of W. Linear: x [..., in], y [..., out];
    Conv2d: x [B, in, H, W], y [B, out, h, w]; normalisation layers: both of the input's shape. d has y's shape and x's
    dtype. Tensors stay in the dtype that they came in and are cast when they are used; the first use moves them to x's
    device. A delta holds no gradient of its own, yet lets gradients through to x and y.
    """

    channel_dim: int = -1
    """Where d has its channels: -1 (Linear, LayerNorm) or 1 (Conv2d, GroupNorm)."""
    needs_base: bool = False
    """Whether y's values are looked at; without it only y's shape is."""
    inputs: int | None = None
    """Channels of x, None when any number will do."""
    outputs: int | None = None
    """Channels of y, None when any number will do."""
    parts: tuple[Delta, ...] = ()
    """The deltas that this one is made of."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """d, of y's shape and x's dtype. ValueError when the channels are not those that the delta is made for."""

    def to(self, device: torch.device | str) -> None:
        """Moves the tensors, in place."""
        # They stay for longer than the host's inference mode, where autograd could not save what was made inside it.
        with torch.inference_mode(False), torch.no_grad():
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))
        for part in self.parts:
            part.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        own = sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))
        return own + sum(part.nbytes for part in self.parts)

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing at present, by a strength of exactly 0."""
        return False

    @property
    def rank(self) -> int | None:
        """Rank of the low-rank form (not of its value), None where there is no such form."""
        return None

    def dense(self) -> Tensor | None:
        """ΔW shaped like the layer's weight, float32 (float64 for float64 tensors).

        None where ΔW depends on the base weight (OutputScale, Rotation, Decomposed), is no convolution of the layer's
        own (a LowRank whose `down` ignores the layer's groups) or acts on a normalisation layer (Affine).
        """
        return None

    def frobenius_sq(self) -> float | None:
        """‖ΔW‖_F², None where `dense` is None for good; ΔW is not built where the mathematics allows. Synchronises."""
        return None

    def rows_basis(self) -> Tensor | None:
        """Q [in·kh·kw, r] with QᵀQ = I: the directions of the input that ΔW looks at; None where that is all of W's.

        For low-rank kinds the row space of `down` (NP-LoRA, arXiv 2511.11051), for Decomposed that of its inner delta.
        """
        return None

    def project_out(self, q: Tensor, kappa: float) -> Delta:
        """The delta x -> ΔW(x − κ·Q·Qᵀ·x), convolutions patch by patch (NP-LoRA, arXiv 2511.11051; κ = μ/(1+μ)).

        q: [in·kh·kw, r] as from another delta's `rows_basis` on the same layer, ValueError if its rows are another
        number. Kinds without a row space of their own return themselves.
        """
        return self

    def factors(self) -> Factors | None:
        """ΔW as one low-rank product, None where it is not one; callable scales are read now."""
        return None

    def check(self, x: Tensor, y: Tensor) -> None:
        """ValueError when the layer's channels are not those that the delta is made for."""
        got = x.shape[self.channel_dim], y.shape[self.channel_dim]
        if self.inputs not in (None, got[0]) or self.outputs not in (None, got[1]):
            made_for = "{} -> {}".format(*("any" if n is None else n for n in (self.inputs, self.outputs)))
            raise ValueError(
                f"{type(self).__name__} is made for {made_for} channels, the layer has {got[0]} -> {got[1]} "
                f"(x {list(x.shape)}, y {list(y.shape)})"
            )

    def _enter(self, x: Tensor, y: Tensor, held: Tensor) -> None:
        """Before the work: the channels must fit, and the tensors (`held` is one of them) must be where x is."""
        self.check(x, y)
        if held.device != x.device:
            self.to(x.device)


class Scaled(Delta):
    """s·d. A callable s is read at every call, so that a slider or a schedule may change it under way."""

    def __init__(self, scale: float | Callable[[], float], inner: Delta) -> None:
        self._scale = scale
        self.inner = inner
        self.parts = (inner,)
        self.channel_dim, self.needs_base = inner.channel_dim, inner.needs_base
        self.inputs, self.outputs = inner.inputs, inner.outputs

    @property
    def scale(self) -> float:
        return self._scale() if callable(self._scale) else self._scale

    @property
    def varies(self) -> bool:
        """Whether the scale may differ from call to call."""
        return callable(self._scale)

    @property
    def is_zero(self) -> bool:
        return self.scale == 0.0 or self.inner.is_zero

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale
        if scale == 0.0:
            return torch.zeros_like(y, dtype=x.dtype)
        d = self.inner(x, y)
        return d if scale == 1.0 else d.mul_(scale)

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def dense(self) -> Tensor | None:
        weight = self.inner.dense()
        return None if weight is None else weight * self.scale

    def frobenius_sq(self) -> float | None:
        norm = self.inner.frobenius_sq()
        return None if norm is None else norm * self.scale**2

    def rows_basis(self) -> Tensor | None:
        """That of the inner delta, whatever the scale."""
        return self.inner.rows_basis()

    def project_out(self, q: Tensor, kappa: float) -> Delta:
        return Scaled(self._scale, self.inner.project_out(q, kappa))

    def factors(self) -> Factors | None:
        inner = self.inner.factors()
        scale = self.scale
        if inner is None or scale == 1.0:
            return inner
        # Folded in float32: half a bit lost here would be lost in every picture.
        return Factors(inner.down, wide(inner.up) * scale, inner.geometry)


class Sum(Delta):
    """d₁ + d₂ + ...: several networks of one role on one layer. ValueError without a part, or for unlike layers."""

    def __init__(self, *parts: Delta) -> None:
        if not parts:
            raise ValueError("a Sum needs at least one delta")
        for name in ("channel_dim", "inputs", "outputs"):
            values = [getattr(part, name) for part in parts]
            if len(set(values) - {None}) > 1:
                raise ValueError(f"these deltas are not for one layer: {name} is {values}")
        self.parts = parts
        self.channel_dim = parts[0].channel_dim
        self.needs_base = any(part.needs_base for part in parts)
        self.inputs = next((part.inputs for part in parts if part.inputs is not None), None)
        self.outputs = next((part.outputs for part in parts if part.outputs is not None), None)

    @property
    def is_zero(self) -> bool:
        return all(part.is_zero for part in self.parts)

    @property
    def _present(self) -> Sequence[Delta]:
        """The parts that add something at present; all of them where none does."""
        return [part for part in self.parts if not part.is_zero] or self.parts

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        first, *others = self._present
        d = first(x, y)
        for part in others:
            d.add_(part(x, y))
        return d

    @property
    def rank(self) -> int | None:
        ranks = [part.rank for part in self.parts]
        return None if None in ranks else sum(rank for rank in ranks if rank is not None)

    def dense(self) -> Tensor | None:
        total: Tensor | None = None
        for part in self.parts:
            if isinstance(part, Shift):
                continue
            weight = part.dense()
            if weight is None:
                return None
            total = weight if total is None else total + weight
        return total

    def frobenius_sq(self) -> float | None:
        factors = self.factors()
        if factors is not None:
            return factors.frobenius_sq()
        weight = self.dense()
        return None if weight is None else frobenius_sq(weight)

    def rows_basis(self) -> Tensor | None:
        """The span of all parts that have a row space."""
        bases = [basis for basis in (part.rows_basis() for part in self.parts) if basis is not None]
        return orthonormal_rows(torch.cat([wide(basis).T for basis in bases])) if bases else None

    def project_out(self, q: Tensor, kappa: float) -> Delta:
        return Sum(*(part.project_out(q, kappa) for part in self.parts))

    def factors(self) -> Factors | None:
        """All factors side by side, so that one product does the work of all parts."""
        found = [factors for factors in (part.factors() for part in self.parts) if factors is not None]
        if len(found) < len(self.parts) or len({factors.geometry for factors in found}) > 1:
            return None
        if len({factors.down.shape[1:] for factors in found}) > 1:
            return None
        if not self.is_zero:
            found = [factors for factors, part in zip(found, self.parts, strict=True) if not part.is_zero]
        device = found[0].down.device
        down = torch.cat([factors.down.to(device) for factors in found])
        up = torch.cat([factors.up.to(device) for factors in found], dim=1)
        return Factors(down, up, found[0].geometry)


class Rows(Delta):
    """A delta on the output rows start to stop of a fused layer (q, k or v of a qkv), zero on the others.

    `inner` is made for those rows alone: it is called with its slice of y. ΔW of the whole layer (`dense`) is known
    only with `total`, the layer's number of rows. ValueError unless 0 <= start < stop <= rows of the layer.
    """

    def __init__(self, inner: Delta, start: int, stop: int, total: int | None = None) -> None:
        if not 0 <= start < stop or (total is not None and stop > total):
            raise ValueError(f"rows {start} to {stop} of {total or 'a layer'} are no part of it")
        if inner.outputs not in (None, stop - start):
            raise ValueError(f"rows {start} to {stop} are {stop - start}, the delta is made for {inner.outputs}")
        self.inner, self.start, self.stop, self.total = inner, start, stop, total
        self.parts = (inner,)
        self.channel_dim, self.needs_base = inner.channel_dim, inner.needs_base
        self.inputs, self.outputs = inner.inputs, total

    @property
    def is_zero(self) -> bool:
        return self.inner.is_zero

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        rows = y.shape[self.channel_dim]
        if self.stop > rows:
            raise ValueError(f"rows {self.start} to {self.stop} of a layer that has {rows} (y {list(y.shape)})")
        d = self.inner(x, y.narrow(self.channel_dim, self.start, self.stop - self.start))
        trailing = (0, 0) * (y.dim() - 2) if self.channel_dim == 1 else ()
        return F.pad(d, (*trailing, self.start, rows - self.stop))

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def dense(self) -> Tensor | None:
        weight = self.inner.dense()
        if weight is None or self.total is None:
            return None
        whole = weight.new_zeros(self.total, *weight.shape[1:])
        whole[self.start : self.stop] = weight
        return whole

    def frobenius_sq(self) -> float | None:
        return self.inner.frobenius_sq()

    def rows_basis(self) -> Tensor | None:
        return self.inner.rows_basis()

    def project_out(self, q: Tensor, kappa: float) -> Delta:
        return Rows(self.inner.project_out(q, kappa), self.start, self.stop, self.total)


class Shift(Delta):
    """Δb, whatever the input: a changed bias, which is no part of ΔW.

    bias [out]; channel_dim 1 on Conv2d and GroupNorm, -1 elsewhere.
    """

    def __init__(self, bias: Tensor, channel_dim: int = -1) -> None:
        self.channel_dim = channel_dim
        self.bias = bias.detach().flatten()
        self.outputs = bias.numel()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._enter(x, y, self.bias)
        bias = self.bias if self.channel_dim == -1 else self.bias.view(-1, *(1 for _ in y.shape[2:]))
        return torch.empty_like(y, dtype=x.dtype).copy_(bias)


def wide(tensor: Tensor) -> Tensor:
    """At least float32, for the mathematics that is done once per layer and not once per forward pass."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def frobenius_sq(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(wide(weight))) ** 2


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Q [n, k] with QᵀQ = I and the span of the rows of `matrix` [r, n], k their numerical rank.

    A thin QR; then, as QR makes up directions where rows are zero or depend on each other, the small triangular factor
    says which of them are real. Entries that are no numbers count as zero.
    """
    q, r = torch.linalg.qr(wide(matrix).nan_to_num(0.0, 0.0, 0.0).T)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, s > s.amax() * max(matrix.shape) * torch.finfo(s.dtype).eps]


def without(rows: Tensor, q: Tensor, kappa: float) -> Tensor:
    """A − κ·(A·Q)·Qᵀ, A the flattened `rows` [r, in] or [r, in, kh, kw], in their dtype. ValueError for a foreign Q."""
    flat = wide(rows).flatten(1)
    if q.dim() != 2 or q.shape[0] != flat.shape[1]:
        raise ValueError(f"q is {list(q.shape)}: expected [{flat.shape[1]}, r]")
    q = q.to(flat)
    return (flat - kappa * (flat @ q) @ q.T).view(rows.shape).to(rows.dtype)
