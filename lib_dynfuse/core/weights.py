"""Deltas that are computed from a layer's input by weights of their own: LowRank, Kronecker, Dense."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dynfuse.core.algebra import Delta, Factors, Geometry, Sum, frobenius_sq, orthonormal_rows, wide, without


class _FromInput(Delta):
    """d = f_ΔW(x), for a Linear (geometry None) or a Conv2d layer."""

    inputs: int
    outputs: int

    def __init__(self, geometry: Geometry | None, held: str) -> None:
        self.geometry = geometry
        self.channel_dim = -1 if geometry is None else 1
        self._held = held

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._enter(x, y, getattr(self, self._held))
        return self.apply(x, self.geometry)

    @abstractmethod
    def apply(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        """f_ΔW(x) with the tensors already on x's device, walking as `geometry` says."""


class LowRank(_FromInput):
    """up(mid(down(x))): LoRA, LoCon, and LoCon with a CP (Tucker) core. Never builds ΔW to be applied.

    Linear: down [r, in], up [out, r]. Conv2d: down [r, in, kh, kw] runs with the layer's geometry, up [out, r, 1, 1];
    with mid [r2, r, kh, kw] it is mid that runs with the geometry, between down [r, in, 1, 1] and up [out, r2, 1, 1].
    A factor of a 1x1 convolution may lack its last two axes, one of a Linear layer may have them.
    Groups: LyCORIS's down takes in/groups channels and serves every group, with up [out, r, 1, 1]; PEFT's takes all
    channels and it is up [out, r/groups, 1, 1] that is grouped, which is no convolution of the layer's shape (so
    `dense` is None). Strength and alpha/rank are not in here: wrap it in Scaled.
    ValueError for shapes that do not chain.
    """

    def __init__(self, down: Tensor, up: Tensor, mid: Tensor | None = None, geometry: Geometry | None = None) -> None:
        super().__init__(geometry, "down")
        self.down = _shaped("down", down, geometry)
        self.up = _shaped("up", up, geometry)
        self.mid = None if mid is None else _shaped("mid", mid, geometry)
        if geometry is None and mid is not None:
            raise ValueError(f"mid is {list(mid.shape)}: a Linear layer has none")
        groups = 1 if geometry is None else geometry.groups
        middle = self.down.shape[0]
        if self.mid is not None:
            if self.mid.shape[1] != middle or self.down.shape[2:] != (1, 1):
                raise ValueError(
                    f"mid is {list(self.mid.shape)} after a down of {list(self.down.shape)}: "
                    f"expected [r2, {middle}, kh, kw] after [{middle}, in, 1, 1]"
                )
            middle = self.mid.shape[0]
        self._grouped_up = groups > 1 and self.up.shape[1] * groups == middle
        wanted = middle // groups if self._grouped_up else middle
        if middle == 0 or self.up.shape[1] != wanted or any(n != 1 for n in self.up.shape[2:]):
            tail = "" if geometry is None else ", 1, 1"
            raise ValueError(
                f"up is {list(self.up.shape)}: expected [out, {middle}{tail}] with a rank of at least 1, "
                f"to follow {list((self.down if self.mid is None else self.mid).shape)}"
            )
        if self.up.shape[0] % groups:
            raise ValueError(f"up is {list(self.up.shape)}: its first axis does not split into {groups} groups")
        self.inputs = self.down.shape[1] * (1 if self._grouped_up else groups)
        self.outputs = self.up.shape[0]

    def apply(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if geometry is None:
            return F.linear(F.linear(x, down), up)
        groups, batch = geometry.groups, x.shape[0]
        shared = groups > 1 and not self._grouped_up
        if shared:
            x = x.reshape(batch * groups, -1, *x.shape[2:])
        h = geometry.conv(x, down) if self.mid is None else geometry.conv(F.conv2d(x, down), self.mid.to(x.dtype))
        if shared:
            h = h.reshape(batch, -1, *h.shape[2:])
        return F.conv2d(h, up, groups=groups)

    @property
    def rank(self) -> int:
        return (self.down if self.mid is None else self.mid).shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """(kh, kw), empty for a Linear layer."""
        return tuple((self.down if self.mid is None else self.mid).shape[2:])

    def rows(self) -> Tensor:
        """[r, in] or [r, in/groups, kh, kw]: `down`, with the CP core folded in."""
        if self.mid is None:
            return self.down
        rows = torch.einsum("abkl,bi->aikl", wide(self.mid), wide(self.down).flatten(1))
        return rows.to(self.down.dtype)

    def dense(self) -> Tensor | None:
        if self._grouped_up:
            return None
        rows = wide(self.rows())
        return (wide(self.up).flatten(1) @ rows.flatten(1)).view(-1, *rows.shape[1:])

    def frobenius_sq(self) -> float | None:
        # On the meta device there is nothing to add up.
        if self._grouped_up or self.up.is_meta:
            return None
        return Factors(self.rows(), self.up, self.geometry).frobenius_sq()

    def rows_basis(self) -> Tensor:
        return orthonormal_rows(self.rows().flatten(1))

    def project_out(self, q: Tensor, kappa: float) -> LowRank:
        return LowRank(without(self.rows(), q, kappa), self.up, None, self.geometry)

    def factors(self) -> Factors | None:
        """None with a CP core, which is cheaper left alone, and for grouped convolutions."""
        if self.mid is not None or (self.geometry is not None and self.geometry.groups > 1):
            return None
        return Factors(self.down, self.up, self.geometry)


class Kronecker(_FromInput):
    """(w1 ⊗ w2)·x by reshaping: LyCORIS's and PEFT's LoKr. Never builds ΔW to be applied.

    w1 [a, c]; w2 [b, d], for a convolution [b, d, kh, kw], or a LowRank of that shape; ΔW is [a·b, c·d(, kh, kw)], for
    a grouped convolution c·d = in/groups. ValueError for other shapes.
    """

    def __init__(self, w1: Tensor, w2: Tensor | LowRank, geometry: Geometry | None = None) -> None:
        super().__init__(geometry, "w1")
        if w1.dim() != 2:
            raise ValueError(f"w1 is {list(w1.shape)}: expected [a, c]")
        self.w1 = w1.detach()
        self.w2: Tensor | LowRank
        if isinstance(w2, LowRank):
            if (w2.geometry is None) != (geometry is None):
                raise ValueError("w2 and the layer are not both Linear or both Conv2d")
            self.w2, self.parts = w2, (w2,)
            b, *self._columns = w2.up.shape[0], w2.down.shape[1], *w2.kernel
        else:
            self.w2 = _shaped("w2", w2, geometry)
            b, *self._columns = self.w2.shape
        groups = 1 if geometry is None else geometry.groups
        self.outputs = w1.shape[0] * b
        self.inputs = w1.shape[1] * self._columns[0] * groups
        if self.outputs % groups:
            raise ValueError(f"w1 ⊗ w2 has {self.outputs} rows: they do not split into {groups} groups")

    @classmethod
    def from_lokr(
        cls,
        *,
        w1: Tensor | None = None,
        w1_a: Tensor | None = None,
        w1_b: Tensor | None = None,
        w2: Tensor | None = None,
        w2_a: Tensor | None = None,
        w2_b: Tensor | None = None,
        t2: Tensor | None = None,
        kernel: tuple[int, ...] = (),
        geometry: Geometry | None = None,
    ) -> Kronecker:
        """From a file's `lokr_*` tensors: each half whole, or as a pair.

        w1 = w1_a [a, r]·w1_b [r, c]. w2 = w2_a [b, r]·w2_b [r, d·kh·kw] (`kernel` = (kh, kw) for a convolution), or
        with t2 [r, r, kh, kw] as w2_a [r, b], t2, w2_b [r, d]; it stays a pair. ValueError when a half is missing.
        """
        if w1 is None:
            if w1_a is None or w1_b is None:
                raise ValueError("LoKr's first half is missing: neither lokr_w1 nor lokr_w1_a with lokr_w1_b")
            w1 = w1_a @ w1_b
        if w2 is not None:
            whole = w2 if geometry is None else w2.reshape(*w2.shape[:2], *(kernel or w2.shape[2:] or (1, 1)))
            return cls(w1, whole, geometry)
        if w2_a is None or w2_b is None:
            raise ValueError("LoKr's second half is missing: neither lokr_w2 nor lokr_w2_a with lokr_w2_b")
        walk = None if geometry is None else replace(geometry, groups=1)
        if t2 is not None:
            return cls(w1, LowRank(w2_b, w2_a.T, t2, walk), geometry)
        down = w2_b if geometry is None else w2_b.reshape(w2_b.shape[0], -1, *(kernel or (1, 1)))
        return cls(w1, LowRank(down, w2_a, None, walk), geometry)

    def apply(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        a, c = self.w1.shape
        w1 = self.w1.to(x.dtype)
        if geometry is None:
            return torch.matmul(w1, self._second(x.unflatten(-1, (c, -1)), None)).flatten(-2)
        groups, batch = geometry.groups, x.shape[0]
        h = self._second(x.reshape(batch * groups * c, -1, *x.shape[2:]), replace(geometry, groups=1))
        b, *size = h.shape[1:]
        h = h.reshape(batch, groups, c, -1)
        if a % groups == 0:
            return torch.matmul(w1.reshape(groups, a // groups, c), h).view(batch, a * b, *size)
        # A group's rows begin inside a block of w2: each group computes all rows and keeps its own.
        rows = torch.matmul(w1, h).view(batch, groups, groups, a * b // groups, *size)
        return rows.diagonal(dim1=1, dim2=2).movedim(-1, 1).flatten(1, 2)

    def _second(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        if isinstance(self.w2, LowRank):
            return self.w2.apply(x, geometry)
        w2 = self.w2.to(x.dtype)
        return F.linear(x, w2) if geometry is None else geometry.conv(x, w2)

    def _dense_second(self) -> Tensor:
        w2 = self.w2.dense() if isinstance(self.w2, LowRank) else wide(self.w2)
        assert w2 is not None  # its geometry has one group
        return w2

    def dense(self) -> Tensor:
        return _kron(self.w1, self._dense_second())

    def frobenius_sq(self) -> float:
        second = self.w2.frobenius_sq() if isinstance(self.w2, LowRank) else frobenius_sq(self.w2)
        assert second is not None
        return frobenius_sq(self.w1) * second

    def rows_basis(self) -> Tensor:
        second = self.w2.rows_basis() if isinstance(self.w2, LowRank) else orthonormal_rows(self.w2.flatten(1))
        return _kron(orthonormal_rows(self.w1), second)

    def project_out(self, q: Tensor, kappa: float) -> Delta:
        """w1 ⊗ w2 minus the low-rank κ·(ΔW·Q)·Qᵀ, or Dense where Q has so many columns that Dense is the smaller."""
        columns = self.w1.shape[1] * prod(self._columns)
        if q.dim() != 2 or q.shape[0] != columns:
            raise ValueError(f"q is {list(q.shape)}: expected [{columns}, r]")
        if q.shape[1] == 0:
            return self
        if q.shape[1] * (columns + self.outputs) > columns * self.outputs:
            return Dense(without(self.dense(), q, kappa).to(self.w1.dtype), None, self.geometry)
        # Each column of Q is one patch of the input: the layer's own arithmetic on it, once, gives ΔW·Q.
        patches = wide(q).to(self.w1.device).T.reshape(q.shape[1], -1, *self._columns[1:])
        image = self.apply(patches, None if self.geometry is None else Geometry())
        return Sum(self, LowRank(patches, image.flatten(1).T * -kappa, None, self.geometry))


class Dense(_FromInput):
    """f_ΔW(x) (+ Δb): full weights, LoHa, GLoRA, and whatever else the host can turn into ΔW.

    weight [out, in] or [out, in/groups, kh, kw], bias [out]. Also the way for what acts on the *input* of a layer,
    where d is no function of y alone: PEFT's OFT, ΔW = W·(R − I), and (IA)³ on inputs. ValueError for other shapes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, geometry: Geometry | None = None) -> None:
        super().__init__(geometry, "weight")
        self.weight = _shaped("weight", weight, geometry)
        self.bias = None if bias is None else bias.detach()
        groups = 1 if geometry is None else geometry.groups
        self.outputs, self.inputs = self.weight.shape[0], self.weight.shape[1] * groups
        if bias is not None and bias.shape != (self.outputs,):
            raise ValueError(f"bias is {list(bias.shape)}: expected [{self.outputs}]")

    def apply(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight, bias) if geometry is None else geometry.conv(x, weight, bias, geometry.groups)

    def dense(self) -> Tensor:
        return wide(self.weight)

    def frobenius_sq(self) -> float:
        return frobenius_sq(self.weight)

    def rows_basis(self) -> Tensor:
        return orthonormal_rows(self.weight.flatten(1))

    def project_out(self, q: Tensor, kappa: float) -> Dense:
        return Dense(without(self.weight, q, kappa), self.bias, self.geometry)


def _kron(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 [a, c] ⊗ w2 [b, d, ...] -> [a·b, c·d, ...]; torch.kron fails on tensors of some strides."""
    (a, c), (b, d, *kernel) = w1.shape, w2.shape
    return torch.einsum("ac,bdk->abcdk", wide(w1), wide(w2).reshape(b, d, -1)).reshape(a * b, c * d, *kernel)


def _shaped(name: str, tensor: Tensor, geometry: Geometry | None) -> Tensor:
    """A matrix for a Linear layer, four axes for a Conv2d; files disagree about the two last axes of 1x1 kernels."""
    tensor = tensor.detach()
    if geometry is None and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    if geometry is not None and tensor.dim() == 2:
        return tensor[:, :, None, None]
    if tensor.dim() != (2 if geometry is None else 4):
        wanted = "two axes for a Linear layer" if geometry is None else "four axes for a Conv2d layer"
        raise ValueError(f"{name} is {list(tensor.shape)}: expected {wanted}")
    return tensor
