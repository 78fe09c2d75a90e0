"""Deltas that are computed from a layer's base output (OutputScale, Rotation, Decomposed), and Affine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_dynfuse.core.algebra import Delta, wide


class OutputScale(Delta):
    """v ⊙ y: (IA)³ on a layer's outputs, W' = (1 + v) ⊙ W row by row; bias untouched, as in LyCORIS and the hosts.

    v has `out` entries in any shape; it is LyCORIS's `weight`, PEFT's `ia3_l` − 1 (PEFT scales the bias as well).
    (IA)³ on a layer's *inputs* depends on W: give the host's ΔW to Dense.
    """

    needs_base = True

    def __init__(self, v: Tensor, channel_dim: int = -1) -> None:
        self.channel_dim = channel_dim
        self.outputs = v.numel()
        self.v = _per_channel(v, channel_dim)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._enter(x, y, self.v)
        return y * self.v.to(y.dtype)


class Rotation(Delta):
    """(R − I)·y, R a rotation of the layer's *output* channels, and with `rescale` s ⊙ R·y − y: OFT, BOFT.

    blocks [k, b, b]: R is block-diagonal. blocks [m, k, b, b]: R is the product of m butterfly stages, the first
    applied first; stage i pairs channels 2^i·b/2 apart (BOFT, arXiv 2311.06243, as LyCORIS lays it out). rescale: `out`
    entries. Covered: kohya's and LyCORIS's OFT and LyCORIS's BOFT, which turn outputs; PEFT's OFT turns the layer's
    *input*, ΔW = W·(R − I), which y does not determine: give that ΔW to Dense. A block that straddles two groups of a
    grouped convolution turns outputs where the libraries' merged weight turns rows of W, which is not the same: Dense
    again. Strength: Scaled(s, ...) is I + s·(R − I), as the hosts have it. ValueError for other shapes.
    """

    needs_base = True

    def __init__(self, blocks: Tensor, channel_dim: int = -1, rescale: Tensor | None = None) -> None:
        self.channel_dim = channel_dim
        if blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise ValueError(f"blocks is {list(blocks.shape)}: expected [k, b, b] or [m, k, b, b]")
        self.outputs = out = blocks.shape[-3] * blocks.shape[-1]
        # R is close to I: the difference keeps the digits that half precision would drop.
        turn = wide(blocks.detach()) - torch.eye(blocks.shape[-1], device=blocks.device)
        if blocks.dim() == 4:
            stages, k, b, _ = blocks.shape
            if b % 2 or k % 2 ** (stages - 1):
                raise ValueError(
                    f"blocks is {list(blocks.shape)}: {stages} butterfly stages need an even b and "
                    f"a k that {2 ** (stages - 1)} divides"
                )
        self.turn = turn
        self.rescale: Tensor | None = None
        if rescale is not None:
            if rescale.numel() != out:
                raise ValueError(f"rescale is {list(rescale.shape)}: expected {out} entries")
            self.rescale = _per_channel(rescale, channel_dim)

    @classmethod
    def from_oft(
        cls, oft_blocks: Tensor, channel_dim: int = -1, constraint: float = 0.0, rescale: Tensor | None = None
    ) -> Rotation:
        """From a file's `oft_blocks`, [k, b, b] (OFT) or [m, k, b, b] (BOFT): R = (I + Q)(I − Q)⁻¹, Q = B − Bᵀ.

        constraint: the file's alpha times the layer's outputs; Q is shrunk to that norm when it is longer, 0 leaves it.
        """
        skew = wide(oft_blocks.detach())
        skew = skew - skew.transpose(-1, -2)
        if constraint > 0:
            norm = torch.linalg.vector_norm(skew) + 1e-8
            skew = skew * (constraint / norm).clamp(max=1)
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        blocks = torch.linalg.solve(eye - skew, eye + skew)
        # OFT files multiply from the right, y·R; BOFT files from the left.
        return cls(blocks if blocks.dim() == 4 else blocks.transpose(-1, -2), channel_dim, rescale)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._enter(x, y, self.turn)
        turn = self.turn.to(y.dtype)
        linear = self.channel_dim == -1
        # Channels first, as a small block times long rows of tokens is many times faster than the other way round.
        z = y.flatten(0, -2).T.contiguous().unsqueeze(0) if linear else y.flatten(2)
        if turn.dim() == 3:
            d = torch.matmul(turn, z.unflatten(1, turn.shape[:2])).view(z.shape)
        else:
            d = self._stage(turn[0], 0, z)
            for i in range(1, turn.shape[0]):
                d = d + self._stage(turn[i], i, z + d)
        d = d[0].T.reshape(y.shape) if linear else d.view(y.shape)
        if self.rescale is None:
            return d
        rescale = self.rescale.to(y.dtype)
        return torch.addcmul(rescale * d, rescale - 1, y)

    def _stage(self, turn: Tensor, i: int, z: Tensor) -> Tensor:
        """Channel (c, v, t, u) of z [B, C, N] goes to block (c, t), place (u, v): a contraction, not a permutation."""
        k, b, _ = turn.shape
        half, reach = b // 2, 2**i
        turn = turn.view(k // reach, reach, half, 2, half, 2)
        parts = z.unflatten(1, (k // reach, 2, reach, half))
        return torch.einsum("cthguv,zcvtun->zcgthn", turn, parts).reshape(z.shape)


class Decomposed(Delta):
    """(g − 1) ⊙ y + g ⊙ inner(x), g = magnitude / norm per output channel: DoRA, arXiv 2402.09353, section 4.

    magnitude, norm: `out` entries in any shape, norm = ‖W + ΔW‖ of each output row (see `row_norm`). inner: the
    unscaled-by-g delta, alpha and all. Magnitudes per *input* channel (LyCORIS's `wd_on_out=False`) change what W sees
    and are no function of y: give the host's ΔW to Dense. ValueError when the two lengths differ.
    """

    needs_base = True

    def __init__(self, inner: Delta, magnitude: Tensor, norm: Tensor) -> None:
        out = magnitude.numel()
        if norm.numel() != out or inner.outputs not in (None, out):
            raise ValueError(
                f"magnitude is {list(magnitude.shape)}, norm {list(norm.shape)}: "
                f"expected {'as many' if inner.outputs is None else inner.outputs} entries each"
            )
        self.inner = inner
        self.parts = (inner,)
        self.channel_dim, self.inputs, self.outputs = inner.channel_dim, inner.inputs, out
        gain = wide(magnitude.detach()).flatten() / wide(norm.detach()).flatten().to(magnitude.device)
        self.gain = _per_channel(gain, self.channel_dim)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._enter(x, y, self.gain)
        d = self.inner(x, y).mul_(self.gain.to(y.dtype))
        return d.addcmul_(y, (self.gain - 1).to(y.dtype))

    def rows_basis(self) -> Tensor | None:
        return self.inner.rows_basis()

    def project_out(self, q: Tensor, kappa: float) -> Decomposed:
        """The inner delta is projected, the magnitudes stay."""
        gain = self.gain.flatten()
        return Decomposed(self.inner.project_out(q, kappa), gain, torch.ones_like(gain))


def row_norm(weight: Tensor, inner: Delta) -> Tensor:
    """‖W + ΔW‖ of each output row, [out]: DoRA's norm. weight: the base layer's. ValueError when inner has no ΔW."""
    update = inner.dense()
    if update is None:
        raise ValueError(f"{type(inner).__name__} has no ΔW that does not depend on W")
    return torch.linalg.vector_norm((wide(weight.detach()).to(update.device) + update).flatten(1), dim=1)


@dataclass(frozen=True)
class Norm:
    """How a normalisation layer normalises: over the last axes (groups None) or within groups of channels."""

    groups: int | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.LayerNorm | nn.GroupNorm) -> Norm:
        return cls(module.num_groups if isinstance(module, nn.GroupNorm) else None, module.eps)


class Affine(Delta):
    """x̂ ⊙ Δw + Δb on a LayerNorm or GroupNorm, x̂ the normalised input: LyCORIS's norm.

    x̂ is normalised afresh from x by one call of the layer's own function with Δw and Δb in the place of w and b; from
    y = x̂ ⊙ w it could not be had where w is zero. weight [C] (LayerNorm: its normalized_shape), bias of the same shape.
    ValueError when the two differ.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
        if bias is not None and bias.shape != weight.shape:
            raise ValueError(f"bias is {list(bias.shape)}: expected {list(weight.shape)}")
        self.norm = norm
        self.channel_dim = -1 if norm.groups is None else 1
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.inputs = self.outputs = weight.shape[-1]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._enter(x, y, self.weight)
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.norm.groups is None:
            return F.layer_norm(x, weight.shape, weight, bias, self.norm.eps)
        return F.group_norm(x, self.norm.groups, weight, bias, self.norm.eps)


def _per_channel(v: Tensor, channel_dim: int) -> Tensor:
    """[C] to be multiplied with [..., C], or [C, 1, 1] with [B, C, H, W]."""
    v = v.detach().flatten()
    return v if channel_dim == -1 else v[:, None, None]
