"""Norms, row spaces, projections and packed factors agree with the same done on a dense ΔW."""

from __future__ import annotations

import pytest
import torch
from cases import rand, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_dynfuse.core.delta import (
    Affine,
    Decomposed,
    Delta,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    Norm,
    OutputScale,
    Rotation,
    Rows,
    Scaled,
    Shift,
    Sum,
    low_rank_factors,
)

SAME_SIZE = Geometry(padding=(1, 1))
GROUPED = Geometry(padding=(1, 1), groups=2)


def with_a_weight() -> dict[str, Delta]:
    """Every kind that has a ΔW of its own."""
    lora = LowRank(rand(2, 6), rand(8, 2))
    conv = LowRank(rand(2, 6, 3, 3), rand(8, 2, 1, 1), None, SAME_SIZE)
    return {
        "LowRank": lora,
        "LowRank conv": conv,
        "LowRank CP": LowRank(rand(3, 6, 1, 1), rand(8, 2, 1, 1), rand(2, 3, 3, 3), SAME_SIZE),
        "LowRank grouped": LowRank(rand(2, 3, 3, 3), rand(8, 2, 1, 1), None, GROUPED),
        "Kronecker": Kronecker(rand(2, 3), rand(4, 2)),
        "Kronecker pair": Kronecker.from_lokr(w1=rand(2, 3), w2_a=rand(4, 1), w2_b=rand(1, 2)),
        "Kronecker conv": Kronecker(rand(2, 3), rand(4, 2, 3, 3), SAME_SIZE),
        "Kronecker grouped": Kronecker(rand(2, 3), rand(4, 1, 3, 3), GROUPED),
        "Dense": Dense(rand(8, 6), rand(8)),
        "Dense conv": Dense(rand(8, 6, 3, 3), None, SAME_SIZE),
        "Dense grouped": Dense(rand(8, 3, 3, 3), None, GROUPED),
        "Scaled": Scaled(-0.5, lora),
        "Scaled by a callable": Scaled(lambda: 0.3, conv),
        "Sum of low ranks": Sum(lora, Scaled(0.5, LowRank(rand(3, 6), rand(8, 3)))),
        "Sum of any": Sum(lora, Kronecker(rand(2, 3), rand(4, 2))),
        "Rows": Rows(LowRank(rand(2, 6), rand(3, 2)), 1, 4, 8),
    }


def without_a_weight() -> dict[str, Delta]:
    return {
        "OutputScale": OutputScale(rand(8)),
        "Rotation": Rotation(rand(2, 4, 4)),
        "Affine": Affine(rand(8), rand(8), Norm()),
        "Shift": Shift(rand(8)),
        "up grouped": Sum(LowRank(rand(4, 6, 3, 3), rand(8, 2, 1, 1), None, GROUPED), OutputScale(rand(8), 1)),
    }


def geometry_of(delta: Delta) -> Geometry | None:
    return getattr(delta, "geometry", None) or (geometry_of(delta.parts[0]) if delta.parts else None)


def dense(delta: Delta) -> Tensor:
    weight = delta.dense()
    assert weight is not None
    return weight


def layer(delta: Delta, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y for a layer that the delta fits, and what this weight makes of x there."""
    geometry = geometry_of(delta)
    if geometry is None:
        x = rand(2, 5, 6)
        return x, rand(2, 5, 8), x @ weight.T
    x = rand(2, 6, 5, 4)
    return x, rand(2, 8, 5, 4), geometry.conv(x, weight, groups=geometry.groups)


@pytest.mark.parametrize("name", with_a_weight())
class TestKindsWithAWeight:
    def test_dense_is_the_weight_that_the_call_applies(self, name: str) -> None:
        delta = with_a_weight()[name]
        x, y, expected = layer(delta, dense(delta))
        bias = delta.bias if isinstance(delta, Dense) else None
        same(delta(x, y), expected if bias is None else expected + bias)

    def test_the_norm_is_that_of_the_weight(self, name: str) -> None:
        delta = with_a_weight()[name]
        assert delta.frobenius_sq() == pytest.approx(float(dense(delta).square().sum()), rel=1e-9)

    def test_the_basis_is_orthonormal_and_spans_the_rows(self, name: str) -> None:
        delta = with_a_weight()[name]
        q, rows = delta.rows_basis(), dense(delta).flatten(1)
        assert q is not None
        same(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64))
        same(rows @ q @ q.T, rows)
        assert q.shape == (rows.shape[1], torch.linalg.matrix_rank(rows))

    @pytest.mark.parametrize("kappa", [0.0, 1 / 3, 1.0])
    def test_projecting_out_takes_that_share_of_the_directions(self, name: str, kappa: float) -> None:
        delta = with_a_weight()[name]
        weight = dense(delta)
        rows = weight.flatten(1)
        q = torch.linalg.qr(rand(rows.shape[1], 4, seed=1))[0]
        expected = (rows - kappa * rows @ q @ q.T).view(weight.shape)
        projected = delta.project_out(q, kappa)
        x, y, answer = layer(delta, expected)
        bias = delta.bias if isinstance(delta, Dense) else None
        same(projected(x, y), answer if bias is None else answer + bias)
        same(projected.dense(), expected)

    def test_projecting_out_its_own_rows_leaves_nothing(self, name: str) -> None:
        delta = with_a_weight()[name]
        q = delta.rows_basis()
        assert q is not None
        same(delta.project_out(q, 1.0).dense(), torch.zeros_like(dense(delta)))

    def test_a_basis_of_another_layer_is_refused(self, name: str) -> None:
        delta = with_a_weight()[name]
        with pytest.raises(ValueError, match=r"q is \[7, 2\]: expected \[\d+, r\]"):
            delta.project_out(rand(7, 2), 0.5)

    def test_float16_tensors_give_float32_results(self, name: str) -> None:
        delta = with_a_weight()[name]
        weight = dense(delta)
        halve(delta)
        half = dense(delta)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), weight, rtol=1e-2, atol=1e-2)
        q = delta.rows_basis()
        assert q is not None
        assert q.dtype == torch.float32
        projected = delta.project_out(q, 1.0).dense()
        assert projected is not None
        assert float(projected.abs().max()) < 1e-2 * float(half.abs().max())


def halve(delta: Delta) -> None:
    for name, value in vars(delta).items():
        if isinstance(value, Tensor):
            setattr(delta, name, value.half())
    for part in delta.parts:
        halve(part)


@pytest.mark.parametrize("name", without_a_weight())
def test_kinds_without_a_weight_say_so_and_are_not_projected(name: str) -> None:
    delta = without_a_weight()[name]
    assert delta.dense() is None
    assert delta.frobenius_sq() is None
    assert low_rank_factors(delta) is None
    if name != "up grouped":
        assert delta.rows_basis() is None
        assert delta.project_out(rand(6, 2), 0.5) is delta


def test_a_wrapped_kind_without_a_weight_has_none_either() -> None:
    scale = OutputScale(rand(8))
    for delta in (Scaled(0.5, scale), Sum(LowRank(rand(2, 6), rand(8, 2)), scale), Rows(scale, 0, 8, 8)):
        assert delta.dense() is None
        assert delta.frobenius_sq() is None
    assert Sum(scale, scale).rows_basis() is None


def test_dora_is_projected_inside() -> None:
    inner, magnitude, norm = LowRank(rand(2, 6), rand(8, 2)), rand(8), rand(8).abs() + 1
    delta = Decomposed(inner, magnitude, norm)
    q = delta.rows_basis()
    assert q is not None
    same(q @ q.T, inner.rows_basis() @ inner.rows_basis().T)
    x, y = rand(2, 6), rand(2, 8)
    same(delta.project_out(q, 1.0)(x, y), (magnitude / norm - 1) * y)
    assert delta.dense() is None


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_a_basis_has_as_many_directions_as_the_rows_have(n_in: int, real: int, rows: int) -> None:
    """Repeated, dependent and zero rows add nothing: a plain QR would make directions up."""
    independent = torch.linalg.qr(rand(n_in, min(n_in, real)))[0].T
    down = rand(rows, independent.shape[0], seed=1) @ independent
    down = torch.cat([down, torch.zeros(2, n_in, dtype=down.dtype), down[:1]])
    q = LowRank(down, rand(3, rows + 3)).rows_basis()
    assert q.shape == (n_in, torch.linalg.matrix_rank(down))
    same(down @ q @ q.T, down)


def test_an_untrained_network_has_an_empty_basis() -> None:
    subject, style = LowRank(rand(2, 6), rand(8, 2)), LowRank(torch.zeros(2, 6), rand(8, 2).float())
    q = style.rows_basis()
    assert q.shape == (6, 0)
    same(subject.project_out(q, 1.0).dense(), subject.dense())
    kronecker = Kronecker(rand(2, 3), rand(4, 2))
    assert kronecker.project_out(q, 1.0) is kronecker


def test_a_kronecker_product_projected_along_everything_holds_no_more_than_its_weight() -> None:
    subject, style = Kronecker(rand(2, 3), rand(4, 2)), Kronecker(rand(3, 3), rand(2, 2))
    q = style.rows_basis()
    assert q.shape == (6, 6)
    projected = subject.project_out(q, 0.25)
    same(projected.dense(), 0.75 * subject.dense())
    assert projected.nbytes == subject.dense().nbytes


class TestFactors:
    @pytest.mark.parametrize("name", ["LowRank", "LowRank conv", "Scaled", "Scaled by a callable", "Sum of low ranks"])
    def test_their_product_is_the_weight(self, name: str) -> None:
        delta = with_a_weight()[name]
        factors = low_rank_factors(delta)
        assert factors is not None
        assert factors.geometry == geometry_of(delta)
        weight = torch.einsum("or,r...->o...", factors.up.flatten(1), factors.down)
        same(weight, dense(delta))
        assert factors.up.shape == (8, delta.rank, *((1, 1) if factors.geometry else ()))

    @pytest.mark.parametrize("name", ["LowRank CP", "LowRank grouped", "Kronecker", "Dense", "Sum of any", "Rows"])
    def test_there_are_none_where_one_product_would_not_do(self, name: str) -> None:
        assert low_rank_factors(with_a_weight()[name]) is None

    def test_parts_that_walk_differently_are_not_put_together(self) -> None:
        conv, point = rand(2, 6, 3, 3), rand(2, 6, 1, 1)
        up = rand(8, 2, 1, 1)
        kernels = Sum(LowRank(conv, up, None, SAME_SIZE), LowRank(point, up, None, SAME_SIZE))
        geometries = Sum(LowRank(conv, up, None, SAME_SIZE), LowRank(conv, up, None, Geometry(stride=(2, 2))))
        assert low_rank_factors(kernels) is None
        assert low_rank_factors(geometries) is None

    def test_a_callable_scale_is_read_when_asked(self) -> None:
        strength = 2.0
        delta = Scaled(lambda: strength, LowRank(rand(2, 6), rand(8, 2)))
        first = low_rank_factors(delta)
        strength = 3.0
        second = low_rank_factors(delta)
        assert first is not None
        assert second is not None
        same(second.up, 1.5 * first.up)

    def test_a_scale_is_folded_in_float32(self) -> None:
        factors = low_rank_factors(Scaled(1 / 3, LowRank(rand(2, 6).half(), rand(8, 2).half())))
        assert factors is not None
        assert factors.up.dtype == torch.float32
        same(factors.up, rand(8, 2).half().float() * (1 / 3))

    def test_networks_of_different_dtypes_are_put_together(self) -> None:
        half = LowRank(rand(2, 6).half(), rand(8, 2).half())
        brain = LowRank(rand(3, 6).bfloat16(), rand(8, 3).bfloat16())
        factors = low_rank_factors(Sum(half, brain))
        assert factors is not None
        torch.testing.assert_close(factors.up @ factors.down, Sum(half, brain).dense())


def test_ranks_of_low_rank_kinds_add_up() -> None:
    kinds = with_a_weight()
    assert kinds["Scaled"].rank == 2
    assert kinds["Sum of low ranks"].rank == 5
    assert kinds["Rows"].rank == 2
    assert kinds["LowRank CP"].rank == 2
    assert kinds["Dense"].rank is kinds["Kronecker"].rank is kinds["Sum of any"].rank is None


def test_a_changed_bias_changes_no_weight() -> None:
    lora, shift = LowRank(rand(2, 6), rand(8, 2)), Shift(rand(8))
    both = Sum(shift, lora)
    x, y, basis = rand(2, 5, 6), rand(2, 5, 8), lora.rows_basis()
    same(both.dense(), dense(lora))
    same(both.rows_basis() @ both.rows_basis().T, basis @ basis.T)
    same(both.project_out(basis, 1.0)(x, y), shift(x, y))
    assert low_rank_factors(both) is None  # one product could not make the bias
    assert Sum(shift).dense() is None
