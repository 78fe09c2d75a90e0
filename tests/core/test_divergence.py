"""How far a delta moves the features: against float64 log-softmaxes, for any size of delta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_dynfuse.core.divergence import DIVERGENCES, Workspace, cosine_distance, js_divergence, kl_divergence, kl_pair

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


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_pair_of_a_running_model_equals_the_exact_form(dim: int, dtype: torch.dtype, temperature: float) -> None:
    base = features(12, 40, 24, 2.0).to(dtype)
    first, second = features(13, 40, 24, 0.2).to(dtype), features(14, 40, 24, 5.0).to(dtype)
    layout = (lambda t: t) if dim == -1 else (lambda t: t.T.contiguous())
    found = kl_pair(layout(base), layout(first), layout(second), temperature, dim)
    for one, delta in zip(found, (first, second), strict=True):
        torch.testing.assert_close(one, kl_divergence(base, delta, temperature), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_pair_is_exact_for_weak_deltas_too(size: float, temperature: float) -> None:
    base, delta = features(15, 64, 320, 1.0), features(16, 64, 320, size)
    found = kl_pair(base, delta, -delta, temperature)
    for one, signed in zip(found, (delta, -delta), strict=True):
        torch.testing.assert_close(one, kl_divergence(base, signed, temperature), rtol=1e-4, atol=1e-20)


@pytest.mark.parametrize("sizes", [(0.01, 0.01), (0.5, 0.5), (0.5, 0.001), (0.001, 0.5)])
def test_what_comes_out_for_an_item_does_not_depend_on_the_others(sizes: tuple[float, float]) -> None:
    base, first, second = (torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    loudness = torch.tensor(sizes).repeat_interleave(3).unsqueeze(1)
    first, second = first * loudness, second * 0.02
    together = kl_pair(base, first, second, items=2)
    for item in range(2):
        part = slice(3 * item, 3 * item + 3)
        alone = kl_pair(base[part], first[part], second[part])
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[part], one, rtol=1e-5, atol=0.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that the host would have to wait for: both deltas at once, nothing asked of them."""
    monkeypatch.setattr("lib_dynfuse.core.devices.readable", lambda device: False)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("channels", [3, 320])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0])
def test_away_from_the_cpu_the_pair_equals_float64_for_deltas_of_any_size(size: float, channels: int) -> None:
    base, delta = features(1, 64, channels, 1.0), features(2, 64, channels, size)
    for one, signed in zip(kl_pair(base, delta, -delta), (delta, -delta), strict=True):
        assert relative(one, kl_float64(base, signed)) < 1e-4


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_away_from_the_cpu_half_precision_layout_and_temperature_lose_nothing(
    dim: int, dtype: torch.dtype, temperature: float
) -> None:
    base = features(12, 40, 320, 2.0).to(dtype)
    both = torch.stack([features(13, 40, 320, 0.02), features(14, 40, 320, 5.0)]).to(dtype)
    lay = (lambda t: t) if dim == -1 else (lambda t: t.transpose(-1, -2).contiguous())
    laid = lay(both)
    found = kl_pair(lay(base), laid[0], laid[1], temperature, dim)
    for one, delta in zip(found, both, strict=True):
        assert relative(one, kl_float64(base, delta, temperature)) < 1e-4
    assert torch.equal(found, kl_pair(lay(base), laid[0], laid[1], temperature, dim, both=laid))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_away_from_the_cpu_each_token_takes_the_form_that_suits_it(spread: float) -> None:
    base = features(15, 64, 320, spread)
    delta = features(16, 64, 320, 1.0) * torch.logspace(-3, 3, 64).unsqueeze(1)
    found = kl_pair(base, delta, delta)[0]
    torch.testing.assert_close(found.double(), kl_float64(base, delta), rtol=2e-4, atol=1e-6)


def test_scratch_memory_is_reused_and_bounded_by_the_largest_call() -> None:
    work = Workspace()
    for tokens in (10, 40, 20):
        base = features(17, tokens, 8, 1.0)
        kl_pair(base, base, base, work=work)
    assert work.nbytes == 4 * 40 * 8 * 4
