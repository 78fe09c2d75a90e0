"""How far a delta moves a layer's features: KL, JS and cosine, one number per token.

Features become a distribution by a softmax over channels (METHOD.md, section 1). With `u = log p_r - log p_0` and
`p_r = softmax((base + delta) / temperature)`, the closed form of the KL divergence

    KL(p_r || p_0) = sum p_r * delta / temperature - (LSE((base + delta) / temperature) - LSE(base / temperature))

equals `sum p_r * (u - 1 + exp(-u))`. Every term of that sum is of second order in `u` and none is negative, so nothing
cancels when a delta is ten thousand times smaller than the features it changes. The functions here are that exact
form, for any size of delta; `kl_pair` is the closed form for two deltas at once, which the layers of a running
model use: fewer passes over memory for a little less precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib_dynfuse.core import devices, kernels
from lib_dynfuse.core.packed import Product

Divergence = Callable[..., Tensor]

# Where the second-order series and the direct form are both good to about 1e-6 relative.
_SERIES_BELOW = 0.25
_LN2 = math.log(2.0)
_CUMULANTS_BELOW = 1 / 16
# The same for two deltas at once: within 5e-5 relative below the first; no power overflows below the second.
_MOMENTS_BELOW = 1 / 4
_POWERS_BELOW = 16.0
# How many elements of a delta that has not been computed are looked at together by those who need it.
_STRETCH = 1 << 22
# The base's largest power is 1: float32 has room for 2 to this, times channels, and for 2 to minus this.
_POWERS_WITHIN = 64.0


def _log_ratio(base: Tensor, delta: Tensor, temperature: float, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(p_r, p_0, u) in float32, where u = log p_r - log p_0."""
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be above 0 and finite, not {temperature!r}")
    y = base.detach().float() / temperature
    d = delta.detach().float() / temperature
    log_p0 = y.log_softmax(dim)
    p0 = log_p0.exp()
    # A shift of all channels changes no probability; taking out the expected delta leaves differences only.
    d = d - (p0 * d).sum(dim, keepdim=True)
    # log p_r - log p_0 = d - log E_0[exp d]: exact through expm1 while d is small. Beyond that a direct difference of
    # log-softmaxes is the better conditioned one.
    near = d - torch.log1p((p0 * torch.expm1(d.clamp(max=1.0))).sum(dim, keepdim=True))
    far = (y + d).log_softmax(dim) - log_p0
    u = torch.where(d.abs().amax(dim, keepdim=True) <= 1.0, near, far)
    return (log_p0 + u).exp(), p0, u


@torch.no_grad()
def kl_divergence(base: Tensor, delta: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """KL(softmax((base + delta) / temperature) || softmax(base / temperature)), per token (arXiv 2602.15539).

    `base` and `delta`: any floating dtype, same shape, channels along `dim`. Returns float32 nats, the shape without
    `dim`; never negative, zero for a delta that is the same on every channel. No gradient flows through it.
    Raises `ValueError` for a temperature that is not above 0.
    """
    p, p0, u = _log_ratio(base, delta, temperature, dim)
    series = u * u * (0.5 - u * (1 / 6 - u * (1 / 24 - u * (1 / 120 - u / 720))))
    return torch.where(u.abs() < _SERIES_BELOW, p * series, p * (u - 1) + p0).sum(dim).clamp_min(0.0)


@torch.no_grad()
def js_divergence(base: Tensor, delta: Tensor | Product, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Jensen-Shannon divergence between adapted and base features, per token; arguments and result as `kl_divergence`.

    Bounded by log 2. Small differences go through sum (p - p0) u / 4 - (p + p0) log cosh(u / 2) / 2, which again has no
    first-order terms to cancel.
    """
    if isinstance(delta, Product):
        return _in_stretches(js_divergence, base, delta, temperature)
    p, p0, u = _log_ratio(base, delta, temperature, dim)
    near = u.clamp(-1.0, 1.0)
    log_cosh = torch.log1p(2.0 * torch.sinh(near / 4).square())
    small = -p * torch.expm1(-near) * near / 4 - (p + p0) * log_cosh / 2
    softplus = torch.nn.functional.softplus
    large = (p * (_LN2 - softplus(-u)) + p0 * (_LN2 - softplus(u))) / 2
    return torch.where(u.abs() < 1.0, small, large).sum(dim).clamp(0.0, _LN2)


@torch.no_grad()
def cosine_distance(base: Tensor, delta: Tensor | Product, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """1 - cos(base + delta, base), per token, in [0, 2]; `temperature` has no effect on an angle.

    Computed as half the squared distance of the unit vectors, which does not cancel for small deltas.
    """
    if isinstance(delta, Product):
        return _in_stretches(cosine_distance, base, delta, temperature)
    y = base.detach().float()
    a = torch.nn.functional.normalize(y + delta.detach().float(), dim=dim, eps=1e-20)
    b = torch.nn.functional.normalize(y, dim=dim, eps=1e-20)
    return (a - b).square().sum(dim) / 2


def _in_stretches(divergence: Divergence, base: Tensor, delta: Product, temperature: float) -> Tensor:
    """Of a delta that has not been computed, [B, T]: some tokens after others."""
    found = [divergence(*stretch, temperature) for stretch in delta.stretches(base, _STRETCH)]
    return torch.cat(found).view(base.shape[:-1])


DIVERGENCES: dict[str, Divergence] = {"kl": kl_divergence, "js": js_divergence, "cosine": cosine_distance}


class Workspace:
    """Float32 scratch memory that layers share, so that a forward pass allocates none of its own.

    A buffer handed out by `take` is valid until the same slot is taken again.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, str], Tensor] = {}

    def take(self, slot: str, like: Tensor) -> Tensor:
        """A float32 tensor of `like`'s shape and memory order, contents undefined."""
        key = (like.device, slot)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            # Hosts that sample in inference mode may still run a model outside it, where what was made inside is fixed.
            with torch.inference_mode(False):
                buffer = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
            self._buffers[key] = buffer
        return buffer[: like.numel()].view(like.shape)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


@torch.no_grad()
def kl_pair(
    base: Tensor,
    first: Tensor | Product,
    second: Tensor | Product,
    temperature: float = 1.0,
    dim: int = -1,
    work: Workspace | None = None,
    items: int = 1,
    both: Tensor | None = None,
) -> Tensor:
    """The KL divergences of two deltas against one base, sharing everything that depends on the base alone.

    Arguments as for `kl_divergence`; the result has both, [2, ...]. A divergence near zero may come out slightly
    negative. On a CPU, where a delta is nowhere above 1/16 (times the temperature), the first three terms of the
    divergence's series in the delta's cumulants are taken, within 2e-5 relative; elsewhere the closed form, which
    leaves an absolute error of a few times 1e-7 * max(1, |delta|). All tokens of an item take the same of the two. On
    other devices both deltas are computed with at once, by fewer and larger operators; `both` [2, ...] is the two in
    one tensor, where they lie in one. `items` says how many batch items follow one another in token-major features,
    with as many tokens each: what comes out for one of them does not depend on the others. Two deltas that have not
    been computed, with a base [B, T, C], go to the fused kernels and come back as [2, B, T].
    """
    work = work or Workspace()
    if isinstance(first, Product) or isinstance(second, Product):
        assert isinstance(first, Product)
        assert isinstance(second, Product)
        return _kl_products(base, first, second, temperature, work)
    if not devices.readable(base.device):
        return _kl_stacked(base, torch.stack([first, second]) if both is None else both, temperature, dim, work)
    largest = [_largest(delta, items) for delta in (first, second)]
    limit = _CUMULANTS_BELOW / (1.0 / temperature)
    if any(min(each) <= limit < max(each) for each in largest):
        parts = zip(base.chunk(items), first.chunk(items), second.chunk(items), strict=True)
        each = [kl_pair(one, first, second, temperature, dim, work) for one, first, second in parts]
        return torch.cat(each, 1)
    pair = _Pair(base, temperature, dim, work)
    return torch.stack([pair.divergence(first, max(largest[0])), pair.divergence(second, max(largest[1]))])


def _kl_products(base: Tensor, first: Product, second: Product, temperature: float, work: Workspace) -> Tensor:
    found = kernels.kl_pair(base, first, second, temperature)
    if found is not None:
        return torch.stack(found)
    stretches = zip(first.stretches(base, _STRETCH), second.stretches(base, _STRETCH), strict=True)
    each = [kl_pair(here, one, other, temperature, -1, work) for (here, one), (_, other) in stretches]
    return torch.cat(each, 1).view(2, *base.shape[:-1])


def _largest(delta: Tensor, items: int) -> list[float]:
    """The largest absolute value in each of the items; a device that is not the host's memory would wait for it."""
    each = delta.reshape(items, -1)
    found: list[float] = torch.maximum(each.amax(1), -each.amin(1)).tolist()
    return found


def _kl_stacked(base: Tensor, both: Tensor, temperature: float, dim: int, work: Workspace) -> Tensor:
    """The divergences [2, n] of both [2, ...] deltas in few operators, each token by what suits it without being asked;
    scratch memory of five times the base's size.

    With u = d - E_0[d], KL = E_0[u g] / (1 + q) - log(1 + q), where g = exp(u) - 1 and q = E_0[g]. For small u, q
    would come from terms that cancel: there it is E_0[u g] / 2 - E_0[u^2 g] / 12, the same up to u^5 / 720. Where
    exp(u) may not be a float32, the log-softmaxes with and without the delta are compared.
    """
    scale = 1.0 / temperature
    dim = -1 if dim in (-1, base.dim() - 1) else dim - base.dim()
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


class _Pair:
    """The base features of a layer, ready to be compared with deltas; scratch memory of four times their size."""

    def __init__(self, base: Tensor, temperature: float, dim: int, work: Workspace) -> None:
        self.scale = 1.0 / temperature
        self.dim = dim
        # Powers of two are about half as dear as exponentials, and the change of base comes free with the additions.
        self.bits = self.scale / _LN2
        self.shifted, self.base_powers, self.powers, self.centred = (
            work.take(slot, base) for slot in ("shifted", "base powers", "powers", "centred")
        )
        # The peak in float32, so that half-precision features are not rounded once more.
        peak = base.amax(dim, keepdim=True).float().mul_(-self.bits)
        torch.add(peak, base, alpha=self.bits, out=self.shifted)
        self.z0 = self._sum(torch.exp2(self.shifted, out=self.base_powers))

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(self.dim, keepdim=True)

    def divergence(self, delta: Tensor, largest: float) -> Tensor:
        """For a delta that is nowhere larger than this: one form for all tokens."""
        if largest <= _CUMULANTS_BELOW / self.scale:
            found = self._by_cumulants(delta)
        else:
            found = self._closed_form(delta, within=largest * self.bits <= _POWERS_WITHIN)
        return found.squeeze(self.dim)

    def _closed_form(self, delta: Tensor, within: bool = False) -> Tensor:
        """`within`: the delta is known to be small enough that no power overflows, nor all of a token's vanish."""
        powers = self.powers
        torch.add(self.shifted, delta, alpha=self.bits, out=powers)
        peak = None if within else powers.amax(self.dim, keepdim=True)
        torch.exp2(powers if peak is None else powers.sub_(peak), out=powers)
        z = self._sum(powers)
        mean = self._sum(powers.mul_(delta)).div_(z).mul_(self.scale)
        bits = z.div_(self.z0).log2_()
        return mean.sub_((bits if peak is None else bits.add_(peak)).mul_(_LN2))

    def _by_cumulants(self, delta: Tensor) -> Tensor:
        """With K(t) = log E_0[exp(t d)], KL = K'(1) - K(1) = k2 / 2 + k3 / 3 + k4 / 8 + ..., k the cumulants of d."""
        powers = torch.mul(self.base_powers, delta, out=self.powers)
        centred = torch.sub(delta, self._sum(powers).div_(self.z0), out=self.centred)
        torch.mul(self.base_powers, centred, out=powers)
        second, third, fourth = (self._sum(powers.mul_(centred)).div_(self.z0) for _ in range(3))
        s = self.scale
        return (second / 2 + third * (s / 3) + (fourth - 3 * second.square()) * (s * s / 8)) * (s * s)
