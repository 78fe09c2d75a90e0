"""How far a delta moves the features: against float64 log-softmaxes, for any size of delta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from float64 import features, js_float64, kl_float64, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_dynfuse.core.divergence import Divergence, cosine_distance, js_divergence, kl_divergence

DIVERGENCES: dict[str, Divergence] = {"kl": kl_divergence, "js": js_divergence, "cosine": cosine_distance}


@pytest.mark.parametrize("channels", [3, 320])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize(("found", "reference"), [(kl_divergence, kl_float64), (js_divergence, js_float64)])
def test_equals_float64_for_deltas_of_any_size(
    found: Callable[..., Tensor], reference: Callable[..., Tensor], size: float, channels: int
) -> None:
    base = features(1, 64, channels, 1.0)
    delta = features(2, 64, channels, size)
    assert relative(found(base, delta), reference(base, delta)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 0.1, 10.0])
def test_half_precision_input_loses_nothing_beyond_its_own_rounding(dtype: torch.dtype, size: float) -> None:
    base, delta = features(3, 32, 320, 2.0).to(dtype), features(4, 32, 320, size).to(dtype)
    found = kl_divergence(base, delta)
    assert found.dtype == torch.float32
    assert relative(found, kl_float64(base, delta)) < 1e-4


@given(
    seed=st.integers(0, 1000),
    spread=st.floats(0.01, 30),
    size=st.floats(1e-4, 100),
    temperature=st.floats(0.1, 10),
    name=st.sampled_from(sorted(DIVERGENCES)),
)
def test_is_never_negative_and_finite(seed: int, spread: float, size: float, temperature: float, name: str) -> None:
    found = DIVERGENCES[name](features(seed, 8, 16, spread), features(seed + 1, 8, 16, size), temperature)
    assert bool((found >= 0).all())
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_delta_of_zero_moves_nothing(name: str) -> None:
    base = features(5, 8, 16, 3.0)
    assert DIVERGENCES[name](base, torch.zeros_like(base)).abs().max() == 0


def test_a_delta_that_is_the_same_on_every_channel_is_no_change_of_the_distribution() -> None:
    base = features(5, 8, 16, 1.0)
    assert kl_divergence(base, torch.full_like(base, 3.0)).max() < 1e-10


@given(seed=st.integers(0, 100), temperature=st.floats(0.2, 5))
def test_temperature_divides_base_and_delta(seed: int, temperature: float) -> None:
    base, delta = features(seed, 8, 16, 1.0), features(seed + 1, 8, 16, 0.5)
    assert relative(kl_divergence(base, delta, temperature), kl_float64(base, delta, temperature)) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        kl_divergence(torch.zeros(1, 2), torch.ones(1, 2), temperature)


def test_channels_may_stand_along_any_dimension() -> None:
    base, delta = features(6, 5, 12, 1.0), features(7, 5, 12, 0.3)
    torch.testing.assert_close(kl_divergence(base.T, delta.T, dim=0), kl_divergence(base, delta))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_no_gradient_flows_through_a_divergence(name: str) -> None:
    base, delta = features(8, 4, 6, 1.0).requires_grad_(), features(9, 4, 6, 1.0).requires_grad_()
    assert not DIVERGENCES[name](base, delta).requires_grad


def test_js_is_bounded_by_log_two_and_symmetric() -> None:
    base = features(10, 64, 8, 1.0)
    delta = features(11, 64, 8, 50.0)
    assert float(js_divergence(base, delta).max()) <= 0.6931472
    torch.testing.assert_close(js_divergence(base, delta), js_divergence(base + delta, -delta), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 100), size=st.floats(1e-3, 10))
def test_cosine_distance_is_one_minus_the_cosine(seed: int, size: float) -> None:
    base, delta = features(seed, 16, 32, 1.0), features(seed + 1, 16, 32, size)
    expected = 1 - torch.cosine_similarity((base + delta).double(), base.double(), dim=-1)
    assert relative(cosine_distance(base, delta), expected) < 1e-3
