"""How far a delta moves a layer's features: KL, JS and cosine, one number per token.

Features become a distribution by a softmax over channels (docs/method.md, section 1). With `u = log p_r - log p_0` and
`p_r = softmax((base + delta) / temperature)`, the closed form of the KL divergence

    KL(p_r || p_0) = sum p_r * delta / temperature - (LSE((base + delta) / temperature) - LSE(base / temperature))

equals `sum p_r * (u - 1 + exp(-u))`. Every term of that sum is of second order in `u` and none is negative, so nothing
cancels when a delta is ten thousand times smaller than the features it changes. The functions here are that exact
form, for any size of delta; for two deltas at once, as in a running model, there is `core.kl_pair`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib_dynfuse.core.packed import Product

Divergence = Callable[..., Tensor]

# Where the second-order series and the direct form are both good to about 1e-6 relative.
_SERIES_BELOW = 0.25
_LN2 = math.log(2.0)
# How many elements of a delta that has not been computed are looked at together by those who need it.
_STRETCH = 1 << 22


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
