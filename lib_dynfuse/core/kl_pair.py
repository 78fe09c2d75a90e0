"""The KL divergences of two deltas against one base at once, as the layers of a running model need them.

`core.divergence` has the definition. Here everything that depends on the base alone is computed once, and a little
precision is given for fewer passes over memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib_dynfuse.core import devices, kernels
from lib_dynfuse.core.packed import Product
from lib_dynfuse.core.rules import Features
from lib_dynfuse.core.workspace import Workspace

_LN2 = math.log(2.0)
# Up to this, times the temperature, three cumulants are within 2e-5 relative.
_CUMULANTS_BELOW = 1 / 16
# The base's largest power is 1. Times 2 to this, or to minus this, it is a float32 whose sums lose nothing.
_POWERS_WITHIN = 32.0
# Away from a CPU: moments are within 5e-5 relative below the first; no power overflows below the second.
_MOMENTS_BELOW = 1 / 4
_POWERS_BELOW = 16.0
# How many elements of a delta that has not been computed are looked at together.
_STRETCH = 1 << 22


@torch.no_grad()
def kl_pair(features: Features, temperature: float = 1.0, work: Workspace | None = None) -> Tensor:
    """(D_s, D_t) per token, [2, n] float32 nats; for features that are [B, T, C], [2, B, T].

    A divergence near zero may come out slightly negative. On a CPU, where a delta is nowhere above 1/16 (times the
    temperature), the first three terms of the divergence's series in the delta's cumulants are taken, within 2e-5
    relative; elsewhere the closed form, which leaves an absolute error of a few times 1e-7 * max(1, |delta|). All
    tokens of an item take the same of the two, so that what comes out for one does not depend on the others. On other
    devices nothing is asked of the deltas. Deltas that have not been computed go to the fused kernels.
    """
    work = work or Workspace()
    base, first, second, dim = features.base, features.subject, features.style, features.dim
    if isinstance(first, Product) or isinstance(second, Product):
        assert isinstance(first, Product)
        assert isinstance(second, Product)
        return _of_products(base, first, second, temperature, work)
    # Counted from the end, a dimension is the same one in the base and in both deltas.
    dim = dim if dim < 0 else dim - base.dim()
    if not devices.readable(base.device):
        both = torch.stack([first, second]) if features.both is None else features.both
        return _unasked(base, both, temperature, dim, work)
    largest = features.largest or [_largest(delta, features.items) for delta in (first, second)]
    sizes = [[_size(value / temperature) for value in each] for each in largest]
    if any(len(set(each)) > 1 for each in sizes):
        return torch.cat([kl_pair(item, temperature, work) for item in features.each()], 1)
    against = _Base(base, temperature, dim, work)
    kinds = [each[0] for each in sizes]
    if features.both is not None and kinds[0] == kinds[1]:
        return against.divergences(features.both, kinds[0])
    found = [against.divergences(delta.unsqueeze(0), kind) for delta, kind in zip((first, second), kinds, strict=True)]
    return torch.cat(found)


def _of_products(base: Tensor, first: Product, second: Product, temperature: float, work: Workspace) -> Tensor:
    found = kernels.kl_pair(base, first, second, temperature)
    if found is not None:
        return torch.stack(found)
    stretches = zip(first.stretches(base, _STRETCH), second.stretches(base, _STRETCH), strict=True)
    each = [kl_pair(Features(here, one, other, -1), temperature, work) for (here, one), (_, other) in stretches]
    return torch.cat(each, 1).view(2, *base.shape[:-1])


def _largest(delta: Tensor, items: int) -> list[float]:
    """The largest absolute value in each of the items; a device that is not the host's memory would wait for it."""
    each = delta.reshape(items, -1)
    found: list[float] = torch.maximum(each.amax(1), -each.amin(1)).tolist()
    return found


# How large a delta is, over the temperature: where its cumulants do, where its powers do, or neither.
_SMALL, _MODERATE, _LARGE = range(3)


def _size(largest: float) -> int:
    if largest <= _CUMULANTS_BELOW:
        return _SMALL
    # What is not a number is large.
    return _MODERATE if largest / _LN2 <= _POWERS_WITHIN else _LARGE


class _Base:
    """The base features of a layer, ready to be compared with one delta or two; in scratch memory.

    Powers of two are about half as dear as exponentials: everything is counted in bits.
    """

    def __init__(self, base: Tensor, temperature: float, dim: int, work: Workspace) -> None:
        self._base, self._dim, self._work = base, dim, work
        self._scale = 1.0 / temperature
        self._bits = self._scale / _LN2
        # In float32, so that half-precision features are not rounded once more.
        self._peak = base.amax(dim, keepdim=True).float().mul_(-self._bits)
        self._powers = torch.add(self._peak, base, alpha=self._bits, out=work.take("powers", base)).exp2_()
        self._sum = self._powers.sum(dim, keepdim=True)

    def divergences(self, deltas: Tensor, size: int) -> Tensor:
        """[k, n] of deltas [k, ...] that are all of one size."""
        by = (self._by_cumulants, self._by_powers, self._by_shifted_powers)[size]
        return by(deltas, self._work.take("terms", deltas)).squeeze(self._dim)

    def _total(self, values: Tensor) -> Tensor:
        return values.sum(self._dim, keepdim=True)

    def _in_bits(self, deltas: Tensor, out: Tensor) -> Tensor:
        """Half-precision deltas would be rounded once more, were they not copied first."""
        if deltas.dtype == out.dtype:
            return torch.mul(deltas, self._bits, out=out)
        return out.copy_(deltas).mul_(self._bits)

    def _by_powers(self, deltas: Tensor, terms: Tensor) -> Tensor:
        """KL = E_r[d] - log E_0[exp d], where p_r is p_0 exp(d) over its sum."""
        self._in_bits(deltas, terms).exp2_().mul_(self._powers)
        adapted = self._total(terms)
        mean = self._total(terms.mul_(deltas)).div_(adapted)
        return mean.mul_(self._scale).sub_(adapted.div_(self._sum).log2_(), alpha=_LN2)

    def _by_shifted_powers(self, deltas: Tensor, terms: Tensor) -> Tensor:
        """The same where exp(d) may not be a float32: the adapted features have a peak of their own."""
        self._in_bits(deltas, terms).add_(self._base, alpha=self._bits).add_(self._peak)
        peak = terms.amax(self._dim, keepdim=True)
        adapted = self._total(terms.sub_(peak).exp2_())
        mean = self._total(terms.mul_(deltas)).div_(adapted)
        return mean.mul_(self._scale).sub_(adapted.div_(self._sum).log2_().add_(peak), alpha=_LN2)

    def _by_cumulants(self, deltas: Tensor, terms: Tensor) -> Tensor:
        """With K(t) = log E_0[exp(t d)], KL = K'(1) - K(1) = k2 / 2 + k3 / 3 + k4 / 8 + ..., k the cumulants of d."""
        mean = self._total(torch.mul(deltas, self._powers, out=terms)).div_(self._sum)
        centred = torch.sub(deltas, mean, out=self._work.take("centred", deltas))
        torch.mul(centred, self._powers, out=terms)
        second, third, fourth = (self._total(terms.mul_(centred)).div_(self._sum) for _ in range(3))
        s = self._scale
        return (second / 2 + third * (s / 3) + (fourth - 3 * second.square()) * (s * s / 8)) * (s * s)


def _unasked(base: Tensor, both: Tensor, temperature: float, dim: int, work: Workspace) -> Tensor:
    """The divergences [2, n] of both [2, ...] deltas in few operators, each token by what suits it without being asked;
    scratch memory of five times the base's size.

    With u = d - E_0[d], KL = E_0[u g] / (1 + q) - log(1 + q), where g = exp(u) - 1 and q = E_0[g]. For small u, q
    would come from terms that cancel: there it is E_0[u g] / 2 - E_0[u^2 g] / 12, the same up to u^5 / 720. Where
    exp(u) may not be a float32, the log-softmaxes with and without the delta are compared.
    """
    scale = 1.0 / temperature
    # One after the other in the same memory: (p_0, log p_0), (u, log p_r), and whatever is summed.
    plain, moved, terms = work.take("plain", base), work.take("moved", both), work.take("terms", both)

    def features() -> Tensor:
        if scale == 1.0 and base.dtype != torch.bfloat16:
            return base
        # A softmax would make a float32 copy of bfloat16 of its own.
        wide = terms[0].copy_(base)
        return wide if scale == 1.0 else wide.mul_(scale)

    torch.softmax(features(), dim, dtype=torch.float32, out=plain)
    expected = torch.mul(plain, both, out=terms).sum(dim, keepdim=True)
    torch.sub(both, expected, out=moved)
    if scale != 1.0:
        moved.mul_(scale)
    largest = torch.linalg.vector_norm(moved, math.inf, dim)
    grown = torch.expm1(moved, out=terms).mul_(plain).sum(dim)
    second = terms.mul_(moved).sum(dim)
    third = terms.mul_(moved).sum(dim)
    grown = torch.where(largest <= _MOMENTS_BELOW, third.mul_(-1 / 12).add_(second, alpha=0.5), grown)
    near = torch.addcdiv(torch.special.xlog1py(-1.0, grown), second, grown + 1)

    torch.log_softmax(features(), dim, dtype=torch.float32, out=plain)
    torch.add(moved, base, alpha=scale, out=terms)
    torch.log_softmax(terms, dim, out=moved)
    torch.sub(moved, plain, out=terms)
    far = terms.mul_(moved.exp_()).sum(dim)
    return torch.where(largest > _POWERS_BELOW, far, near)
