"""Low-rank deltas of one layer as one product: both roles' downs side by side, their ups under each other.

`h = x · [A_s; A_t]^T` is computed once; the first columns belong to the subject, the others to the style. What a layer
then needs of `d_s = h_s · B_s^T` and `d_t = h_t · B_t^T` is added to the output in place, by one more product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib_dynfuse.core.delta import Delta, Factors, Geometry, Scaled, low_rank_factors


class Product(NamedTuple):
    """A delta that has not been computed: hidden [B, T, r] · up [r, C]. For kernels that never write it."""

    hidden: Tensor
    up: Tensor

    def __truediv__(self, divisor: Tensor) -> Product:
        """divisor: one number per token, [B, T, 1]."""
        return Product((self.hidden / divisor).to(self.up.dtype), self.up)

    def stretches(self, base: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(base, delta) of some tokens after others, [n, C] of at most so many elements, or of one token."""
        step = max(1, elements // base.shape[-1])
        for item, hidden in zip(base, self.hidden, strict=True):
            for start in range(0, item.shape[0], step):
                yield item[start : start + step], hidden[start : start + step] @ self.up


class Packed:
    """The low-rank factors of one or two deltas of a layer, cast and moved once, for a layer's whole life.

    `tokens` [B, T, C] and `hidden` [B, T, r] are token-major. A convolution in torch's default memory order has its
    channels first: there they are the transposed views of [B, C, T] and [B, r, T], so that no activation is copied.
    """

    def __init__(self, deltas: Sequence[Delta], factors: Sequence[Factors]) -> None:
        self.geometry: Geometry | None = factors[0].geometry
        self._varying = [scaled for delta in deltas for scaled in _varying(delta)]
        # Kept only to be packed again: the packed copies are all that a fixed strength needs.
        self._deltas = deltas if self._varying else ()
        self._scales = self._read_scales()
        self._factors: Sequence[Factors] | None = factors
        self._place: tuple[torch.dtype, torch.device] | None = None
        self.ranks = tuple(found.down.shape[0] for found in factors)
        self._down = self._up = torch.empty(0)
        self._grams: list[Tensor] = []
        self._reach = torch.empty(0)

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Packed | None:
        """None where one of the deltas is not a low-rank product, or they do not share one geometry."""
        factors = [low_rank_factors(delta) for delta in deltas]
        found = [one for one in factors if one is not None]
        if len(found) < len(deltas) or len({(one.geometry, one.down.shape[1:]) for one in found}) > 1:
            return None
        return cls(deltas, found)

    @property
    def nbytes(self) -> int:
        return self._down.nbytes + self._up.nbytes

    @property
    def strides(self) -> bool:
        """Whether `hidden` can leave pixels out: torch strides over no padding that is given in words."""
        return self.geometry is not None and not isinstance(self.geometry.padding, str)

    def _read_scales(self) -> tuple[float, ...]:
        return tuple(scaled.scale for scaled in self._varying)

    def ready(self, x: Tensor) -> None:
        """Packs on first use, for another dtype or device, and when a varying multiplier has moved."""
        scales = self._read_scales() if self._varying else ()
        if self._place == (x.dtype, x.device) and scales == self._scales:
            return
        factors = self._factors
        if self._varying and scales != self._scales:
            factors = [one for one in map(low_rank_factors, self._deltas) if one is not None]
            # Without a network whose strength is 0 now, or with one whose strength was, the ranks are others.
            self.ranks = tuple(found.down.shape[0] for found in factors)
        # Kept beyond the host's inference mode, where autograd could not save what was made inside it.
        with torch.inference_mode(False), torch.no_grad():
            if factors is None:
                self._down, self._up = self._down.to(x.device, x.dtype), self._up.to(x.device, x.dtype)
            else:
                self._down = torch.cat([one.down.to(x.device, x.dtype) for one in factors])
                self._up = torch.cat([one.up.to(x.device, x.dtype).flatten(1).T for one in factors])
        self._factors, self._scales, self._place = None, scales, (x.dtype, x.device)
        self._grams, self._reach = [], torch.empty(0)

    def hidden(self, x: Tensor, role: int | None = None, step: int = 1) -> Tensor:
        """x · A^T of both roles, or of one: [B, T, r]; of a convolution's every step-th pixel, down and across."""
        down = self._down if role is None else self._down[self.columns(role)]
        if self.geometry is None:
            return as_tokens(torch.nn.functional.linear(x, down), -1)
        return as_tokens(self.geometry.every(step).conv(x, down), 1)

    def columns(self, role: int) -> slice:
        """Where a role's rank stands in `hidden`."""
        return slice(0, self.ranks[0]) if role == 0 else slice(self.ranks[0], sum(self.ranks))

    def up(self, role: int | None = None) -> Tensor:
        """B^T of both roles, or of one: [r, C]."""
        return self._up if role is None else self._up[self.columns(role)]

    @torch.no_grad()
    def squares(self, hidden: Tensor) -> Tensor:
        """The squared lengths of both roles' deltas at every token, [2, B, T] float32, from `hidden` of both.

        |h B^T|^2 = h (B^T B) h^T: no delta need be made.
        """
        if not self._grams:
            with torch.inference_mode(False):
                self._grams = [up @ up.T for up in (self.up(role).float() for role in (0, 1))]
                if self.ranks[0] == self.ranks[1]:
                    self._grams = [torch.stack(self._grams)]
        if len(self._grams) == 1:
            wide = hidden.float().unflatten(-1, (2, -1)).movedim(2, 0).flatten(1, 2)
            found = torch.bmm(wide, self._grams[0]).mul_(wide).sum(-1)
        else:
            parts = [hidden[..., self.columns(role)].float() for role in (0, 1)]
            found = torch.stack([(h @ gram).mul_(h).sum(-1) for h, gram in zip(parts, self._grams, strict=True)])
        return found.clamp_min_(0.0).view(2, *hidden.shape[:2])

    @torch.no_grad()
    def largest(self, hidden: Tensor) -> Tensor:
        """What no absolute value of either role's delta is above in each item, [2, B] float32, from `hidden` of both.

        |h B_c| is at most |h| |B_c| (Cauchy and Schwarz): no delta need be made.
        """
        if not self._reach.numel():
            with torch.inference_mode(False):
                ups = (self.up(role).float() for role in (0, 1))
                self._reach = torch.stack([up.square().sum(0).amax().sqrt() for up in ups]).unsqueeze(1)
        if self.ranks[0] == self.ranks[1]:
            longest = torch.linalg.vector_norm(hidden.float().unflatten(-1, (2, -1)), dim=-1).amax(1).T
        else:
            each = (hidden[..., self.columns(role)].float() for role in (0, 1))
            longest = torch.stack([torch.linalg.vector_norm(part, dim=-1).amax(1) for part in each])
        return longest * self._reach

    def add(self, tokens: Tensor, hidden: Tensor, role: int | None = None, scale: float = 1.0) -> None:
        """tokens += scale * hidden · B^T, in place."""
        add_product(tokens, hidden, self.up(role), scale)


def add_product(tokens: Tensor, hidden: Tensor, up: Tensor, scale: float = 1.0) -> None:
    """tokens [B, T, C] += scale * hidden [B, T, r] · up [r, C], in place.

    Both tensors may be transposed views of channel-first memory; the product is then taken in that order.
    """
    if tokens.is_contiguous():
        # One product for all items; a role's columns of `hidden` are flattened without a copy.
        tokens.view(-1, tokens.shape[-1]).addmm_(hidden.flatten(0, 1), up, alpha=scale)
        return
    up = up.expand(tokens.shape[0], -1, -1)
    if tokens.stride(-1) == 1:
        tokens.baddbmm_(hidden, up, alpha=scale)
    else:
        tokens.transpose(1, 2).baddbmm_(up.transpose(1, 2), hidden.transpose(1, 2), alpha=scale)


def as_tokens(y: Tensor, channel_dim: int) -> Tensor:
    """A layer's output as a view [B, T, C]: tokens of a Linear, pixels of a convolution; [B, C] has one token."""
    if channel_dim == -1:
        return y.unsqueeze(1) if y.dim() == 2 else y if y.dim() == 3 else y.view(y.shape[0], -1, y.shape[-1])
    if y.dim() == 4 and y.stride(1) == 1 and y.shape[1] > 1:
        return y.permute(0, 2, 3, 1).view(y.shape[0], -1, y.shape[1])
    return y.view(y.shape[0], y.shape[1], -1).transpose(1, 2)


def _varying(delta: Delta) -> Iterator[Scaled]:
    if isinstance(delta, Scaled) and delta.varies:
        yield delta
    for part in delta.parts:
        yield from _varying(part)
