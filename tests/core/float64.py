"""Random features, and their divergences from float64 log-softmaxes: not our code."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this the float64 reference itself has no digits left.
REFERENCE_NOISE = 1e-11


def features(seed: int, tokens: int, channels: int, spread: float) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed)) * spread


def kl_float64(base: Tensor, delta: Tensor, temperature: float = 1.0) -> Tensor:
    adapted = ((base.double() + delta.double()) / temperature).log_softmax(-1)
    return (adapted.exp() * (adapted - (base.double() / temperature).log_softmax(-1))).sum(-1)


def js_float64(base: Tensor, delta: Tensor, temperature: float = 1.0) -> Tensor:
    adapted = ((base.double() + delta.double()) / temperature).log_softmax(-1)
    plain = (base.double() / temperature).log_softmax(-1)
    middle = torch.logaddexp(adapted, plain) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    return ((adapted.exp() * (adapted - middle)).sum(-1) + (plain.exp() * (plain - middle)).sum(-1)) / 2


def relative(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected).abs() - REFERENCE_NOISE
    return float((error.clamp_min(0) / expected.abs().clamp_min(REFERENCE_NOISE)).max())
