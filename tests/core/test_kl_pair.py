"""Two deltas at once, as in a running model: against the exact form and float64, for any size, dtype and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from float64 import features, kl_float64, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.core.divergence import kl_divergence
from lib_dynfuse.core.kl_pair import kl_pair
from lib_dynfuse.core.packed import Packed
from lib_dynfuse.core.rules import Features
from lib_dynfuse.core.workspace import Workspace

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(base: Tensor, first: Tensor, second: Tensor, temperature: float = 1.0, dim: int = -1, **known: Any) -> Tensor:
    work = known.pop("work", None)
    return kl_pair(Features(base, first, second, dim, **known), temperature, work)


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_pair_of_a_running_model_equals_the_exact_form(dim: int, dtype: torch.dtype, temperature: float) -> None:
    base = features(12, 40, 24, 2.0).to(dtype)
    first, second = features(13, 40, 24, 0.2).to(dtype), features(14, 40, 24, 5.0).to(dtype)
    layout = (lambda t: t) if dim == -1 else (lambda t: t.T.contiguous())
    found = pair(layout(base), layout(first), layout(second), temperature, dim)
    for one, delta in zip(found, (first, second), strict=True):
        torch.testing.assert_close(one, kl_divergence(base, delta, temperature), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_pair_is_exact_for_weak_deltas_too(size: float, temperature: float) -> None:
    base, delta = features(15, 64, 320, 1.0), features(16, 64, 320, size)
    found = pair(base, delta, -delta, temperature)
    for one, signed in zip(found, (delta, -delta), strict=True):
        torch.testing.assert_close(one, kl_divergence(base, signed, temperature), rtol=1e-4, atol=1e-20)


@pytest.mark.parametrize("sizes", [(0.01, 0.01), (0.5, 0.5), (0.5, 0.001), (0.001, 0.5)])
def test_what_comes_out_for_an_item_does_not_depend_on_the_others(sizes: tuple[float, float]) -> None:
    base, first, second = (torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    loudness = torch.tensor(sizes).repeat_interleave(3).unsqueeze(1)
    first, second = first * loudness, second * 0.02
    together = pair(base, first, second, items=2)
    for item in range(2):
        part = slice(3 * item, 3 * item + 3)
        alone = pair(base[part], first[part], second[part])
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
    for one, signed in zip(pair(base, delta, -delta), (delta, -delta), strict=True):
        assert relative(one, kl_float64(base, signed)) < 1e-4


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_away_from_the_cpu_half_precision_layout_and_temperature_lose_nothing(
    dim: int, dtype: torch.dtype, temperature: float
) -> None:
    base = features(12, 40, 320, 2.0).to(dtype)
    both = torch.stack([features(13, 40, 320, 0.02), features(14, 40, 320, 5.0)]).to(dtype)
    lay = (lambda t: t) if dim == -1 else (lambda t: t.transpose(-1, -2).contiguous())
    laid = lay(both)
    found = pair(lay(base), laid[0], laid[1], temperature, dim)
    for one, delta in zip(found, both, strict=True):
        assert relative(one, kl_float64(base, delta, temperature)) < 1e-4
    assert torch.equal(found, pair(lay(base), laid[0], laid[1], temperature, dim, both=laid))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_away_from_the_cpu_each_token_takes_the_form_that_suits_it(spread: float) -> None:
    base = features(15, 64, 320, spread)
    delta = features(16, 64, 320, 1.0) * torch.logspace(-3, 3, 64).unsqueeze(1)
    found = pair(base, delta, delta)[0]
    torch.testing.assert_close(found.double(), kl_float64(base, delta), rtol=2e-4, atol=1e-6)


def test_scratch_memory_is_reused_and_bounded_by_the_largest_call() -> None:
    work = Workspace()
    for tokens in (10, 40, 20):
        base = features(17, tokens, 8, 1.0)
        pair(base, base, base, both=torch.stack([base, base]), work=work)
    # The base's powers, and one number more for each of both deltas.
    assert work.nbytes == 3 * 40 * 8 * 4


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("channels", [3, 320])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0])
def test_the_pair_equals_float64_for_deltas_of_any_size(size: float, channels: int, dim: int) -> None:
    base, delta = features(1, 64, channels, 1.0), features(2, 64, channels, size)
    laid = [one if dim == -1 else one.T.contiguous() for one in (base, delta, -delta)]
    for one, signed in zip(pair(*laid, dim=dim), (delta, -delta), strict=True):
        expected = kl_float64(base, signed)
        # What the closed form loses of a divergence is the same for a large one and a small one.
        assert ((one - expected).abs() <= 1e-4 * expected + 3e-7 * max(1.0, size)).all()


@given(seed=st.integers(0, 100), sizes=st.tuples(*[st.sampled_from([1e-3, 0.5, 30.0, 300.0])] * 2))
def test_both_deltas_in_one_tensor_and_known_bounds_change_nothing(seed: int, sizes: tuple[float, float]) -> None:
    base = features(seed, 12, 40, 1.0)
    both = torch.stack([features(seed + k, 12, 40, size) for k, size in enumerate(sizes, 1)])
    plain = pair(base, both[0], both[1], items=2)
    together = pair(base, both[0], both[1], items=2, both=both)
    torch.testing.assert_close(together, plain, rtol=1e-5, atol=1e-9)
    bounds = both.view(2, 2, -1).abs().amax(2).mul(3).tolist()
    known = pair(base, both[0], both[1], items=2, both=both, largest=(bounds[0], bounds[1]))
    torch.testing.assert_close(known, plain, rtol=1e-4, atol=3e-7 * max(1.0, *sizes))


def test_a_delta_that_is_not_a_number_spoils_its_own_divergence_only() -> None:
    base, first, second = (features(seed, 4, 8, 1.0) for seed in range(3))
    spoilt = first.clone()
    spoilt[1, 2] = torch.nan
    found = pair(base, spoilt, second)
    assert found[0].isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(found[1], kl_divergence(base, second), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 100), ranks=st.sampled_from([(1, 1), (4, 4), (2, 7)]), dtype=st.sampled_from(DTYPES))
def test_how_large_a_delta_can_be_is_known_before_it_is_made(
    seed: int, ranks: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [LowRank(torch.randn(r, 6, generator=generator), torch.randn(9, r, generator=generator)) for r in ranks]
    x = torch.randn(3, 5, 6, generator=generator).to(dtype)
    packed = Packed.of(deltas)
    assert packed is not None
    packed.ready(x)
    bounds = packed.largest(packed.hidden(x))
    base = torch.zeros(3, 5, 9, dtype=dtype)
    for bound, delta in zip(bounds, deltas, strict=True):
        actual = delta(x, base).float().abs()
        assert (bound * 1.01 >= actual.amax((1, 2))).all()
        # No looser than the two lengths multiplied.
        hidden = (x.float() @ delta.down.T).norm(dim=-1).amax(1)
        torch.testing.assert_close(bound, hidden * delta.up.norm(dim=1).amax(), rtol=0.03, atol=1e-6)
