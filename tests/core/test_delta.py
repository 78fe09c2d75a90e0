"""Every kind of delta does what its ΔW would do; float64 and a dense ΔW written out here are the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import rand, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_dynfuse.core.delta import (
    Affine,
    Decomposed,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    Norm,
    OutputScale,
    Rotation,
    Rows,
    Scaled,
    Sum,
    row_norm,
)

# Even kernels with padding "same" are among the geometries on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


geometries = st.builds(
    Geometry,
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
) | st.builds(
    Geometry,
    padding=st.sampled_from(["same", "valid"]),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
)
kernels = st.tuples(st.integers(1, 3), st.integers(1, 3))
small = st.integers(1, 4)


def conv_case(geometry: Geometry, weight: Tensor) -> tuple[Tensor, Tensor]:
    """An input for a layer with this ΔW and this geometry, and what nn.Conv2d itself makes of ΔW."""
    layer = nn.Conv2d(
        weight.shape[1] * geometry.groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        bias=False,
        dtype=torch.float64,
    )
    layer.weight.data = weight
    assert Geometry.of(layer) == geometry
    x = rand(2, layer.in_channels, 7, 8)
    return x, layer(x).detach()


class TestLowRank:
    @given(small, small, small)
    def test_on_a_linear_layer_it_is_up_times_down(self, n_in: int, n_out: int, rank: int) -> None:
        down, up, x = rand(rank, n_in), rand(n_out, rank), rand(2, 5, n_in)
        expected = x @ (up @ down).T
        same(LowRank(down, up)(x, expected), expected)

    @given(geometries, kernels, small, small, small)
    def test_on_a_convolution_it_follows_every_geometry(
        self, geometry: Geometry, kernel: tuple[int, int], n_in: int, n_out: int, rank: int
    ) -> None:
        down, up = rand(rank, n_in, *kernel), rand(n_out * geometry.groups, rank, 1, 1)
        x, expected = conv_case(geometry, torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down))
        same(LowRank(down, up, geometry=geometry)(x, expected), expected)

    @given(geometries, kernels, small, small)
    def test_a_cp_core_stands_between_two_1x1_convolutions(
        self, geometry: Geometry, kernel: tuple[int, int], rank_in: int, rank_out: int
    ) -> None:
        down, mid, up = rand(rank_in, 2, 1, 1), rand(rank_out, rank_in, *kernel), rand(geometry.groups, rank_out, 1, 1)
        weight = torch.einsum("oa,abkl,bi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
        x, expected = conv_case(geometry, weight)
        delta = LowRank(down, up, mid, geometry)
        same(delta(x, expected), expected)
        same(delta.dense(), weight)
        assert delta.rank == rank_out

    def test_the_last_two_axes_of_1x1_factors_may_be_there_or_not(self) -> None:
        down, up = rand(2, 3), rand(4, 2)
        x, image = rand(5, 3), rand(1, 3, 6, 6)
        on_linear = LowRank(down[:, :, None, None], up[:, :, None, None])
        same(on_linear(x, x @ (up @ down).T), x @ (up @ down).T)
        expected = F.conv2d(image, (up @ down)[:, :, None, None])
        same(LowRank(down, up, geometry=Geometry())(image, expected), expected)

    def test_a_grouped_up_sees_its_own_share_of_the_ranks(self) -> None:
        down, up = rand(4, 6, 3, 3), rand(2, 2, 1, 1)
        x = rand(2, 6, 5, 5)
        expected = torch.stack(
            [
                torch.einsum("r,brhw->bhw", up[0, :, 0, 0], F.conv2d(x, down[:2])),
                torch.einsum("r,brhw->bhw", up[1, :, 0, 0], F.conv2d(x, down[2:])),
            ],
            dim=1,
        )
        delta = LowRank(down, up, geometry=Geometry(groups=2))
        same(delta(x, expected), expected)
        assert delta.dense() is None
        assert delta.frobenius_sq() is None

    @pytest.mark.parametrize(
        ("down", "up", "mid", "geometry", "named"),
        [
            ((2, 3), (4, 3), None, None, r"up is \[4, 3\]: expected \[out, 2\]"),
            ((2, 3, 3, 3), (4, 2), None, None, r"down is \[2, 3, 3, 3\]: expected two axes"),
            ((2, 3, 3), (4, 2, 1, 1), None, Geometry(), r"down is \[2, 3, 3\]: expected four axes"),
            ((2, 3, 3, 3), (4, 2, 3, 3), None, Geometry(), r"up is \[4, 2, 3, 3\]: expected \[out, 2, 1, 1\]"),
            ((2, 3, 1, 1), (4, 2, 1, 1), (2, 5, 3, 3), Geometry(), r"mid is \[2, 5, 3, 3\].*expected \[r2, 2,"),
            ((2, 3, 3, 3), (4, 2, 1, 1), (2, 2, 3, 3), Geometry(), r"after a down of \[2, 3, 3, 3\]"),
            ((2, 3), (4, 2), (2, 2), None, r"a Linear layer has none"),
            ((0, 3), (4, 0), None, None, r"rank of at least 1"),
            ((2, 3, 1, 1), (3, 2, 1, 1), None, Geometry(groups=2), r"up is \[3, 2, 1, 1\].*2 groups"),
        ],
    )
    def test_shapes_that_do_not_chain_are_named(
        self,
        down: tuple[int, ...],
        up: tuple[int, ...],
        mid: tuple[int, ...] | None,
        geometry: Geometry | None,
        named: str,
    ) -> None:
        with pytest.raises(ValueError, match=named):
            LowRank(torch.zeros(down), torch.zeros(up), None if mid is None else torch.zeros(mid), geometry)


class TestKronecker:
    @given(small, small, small, small)
    def test_on_a_linear_layer_it_is_the_kronecker_product(self, a: int, b: int, c: int, d: int) -> None:
        w1, w2, x = rand(a, c), rand(b, d), rand(2, 3, c * d)
        expected = x @ torch.kron(w1, w2).T
        same(Kronecker(w1, w2)(x, expected), expected)

    @given(geometries, kernels, small, small, small, small)
    def test_on_a_convolution_it_follows_every_geometry(
        self, geometry: Geometry, kernel: tuple[int, int], a: int, b: int, c: int, d: int
    ) -> None:
        # One of the two halves carries the groups, so that their borders fall between and inside blocks of w2.
        w1, w2 = rand(a, c), rand(b * geometry.groups, d, *kernel)
        weight = torch.kron(w1[:, :, None, None], w2)
        x, expected = conv_case(geometry, weight)
        delta = Kronecker(w1, w2, geometry)
        same(delta(x, expected), expected)
        same(delta.dense(), weight)

    @given(geometries, kernels, small)
    def test_the_second_half_may_stay_a_pair(self, geometry: Geometry, kernel: tuple[int, int], rank: int) -> None:
        w1_a, w1_b = rand(2, rank), rand(rank, 3, seed=1)
        w2_a, w2_b = rand(2 * geometry.groups, rank), rand(rank, 2 * kernel[0] * kernel[1], seed=2)
        w2 = (w2_a @ w2_b).view(-1, 2, *kernel)
        x, expected = conv_case(geometry, torch.kron((w1_a @ w1_b)[:, :, None, None], w2))
        delta = Kronecker.from_lokr(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, kernel=kernel, geometry=geometry)
        same(delta(x, expected), expected)

    @given(geometries, kernels, small)
    def test_the_second_half_may_have_a_cp_core(self, geometry: Geometry, kernel: tuple[int, int], rank: int) -> None:
        w1, t2, w2_a, w2_b = rand(geometry.groups, 2), rand(rank, rank, *kernel), rand(rank, 3), rand(rank, 2, seed=1)
        weight = torch.einsum("ac,ijkl,ip,jr->apcrkl", w1, t2, w2_a, w2_b).reshape(-1, 4, *kernel)
        x, expected = conv_case(geometry, weight)
        delta = Kronecker.from_lokr(w1=w1, w2_a=w2_a, w2_b=w2_b, t2=t2, kernel=kernel, geometry=geometry)
        same(delta(x, expected), expected)
        assert delta.frobenius_sq() == pytest.approx(float(delta.dense().square().sum()))

    def test_a_missing_half_is_named(self) -> None:
        with pytest.raises(ValueError, match="first half is missing"):
            Kronecker.from_lokr(w1_a=rand(2, 1), w2=rand(2, 2))
        with pytest.raises(ValueError, match="second half is missing"):
            Kronecker.from_lokr(w1=rand(2, 2), w2_b=rand(1, 2))

    def test_wrong_shapes_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"w1 is \[2, 2, 1\]: expected \[a, c\]"):
            Kronecker(rand(2, 2, 1), rand(2, 2))
        with pytest.raises(ValueError, match=r"w2 is \[2, 2, 3\]: expected four axes"):
            Kronecker(rand(2, 2), rand(2, 2, 3), Geometry())
        with pytest.raises(ValueError, match="not both Linear or both Conv2d"):
            Kronecker(rand(2, 2), LowRank(rand(1, 2), rand(2, 1)), Geometry())
        with pytest.raises(ValueError, match="has 9 rows: they do not split into 2 groups"):
            Kronecker(rand(3, 2), rand(3, 2, 1, 1), Geometry(groups=2))


class TestDense:
    @given(geometries, kernels, small, small)
    def test_a_convolution_has_the_layers_geometry_and_groups(
        self, geometry: Geometry, kernel: tuple[int, int], n_in: int, n_out: int
    ) -> None:
        weight, bias = rand(n_out * geometry.groups, n_in, *kernel), rand(n_out * geometry.groups)
        x, expected = conv_case(geometry, weight)
        same(Dense(weight, geometry=geometry)(x, expected), expected)
        same(Dense(weight, bias, geometry)(x, expected), expected + bias[:, None, None])

    def test_a_linear_layer_gets_weight_and_bias(self) -> None:
        weight, bias, x = rand(4, 3), rand(4), rand(2, 3)
        same(Dense(weight, bias)(x, x @ weight.T), x @ weight.T + bias)

    def test_a_bias_of_another_length_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"bias is \[3\]: expected \[4\]"):
            Dense(rand(4, 3), rand(3))


@pytest.mark.parametrize(("channel_dim", "shape"), [(-1, (2, 5, 12)), (1, (2, 12, 4, 3))])
class TestFromTheOutput:
    def channels_last(self, y: Tensor, channel_dim: int) -> Tensor:
        return y.movedim(channel_dim, -1)

    def test_output_scale_scales_each_channel(self, channel_dim: int, shape: tuple[int, ...]) -> None:
        y, v = rand(*shape), rand(12)
        d = OutputScale(v.view(12, 1), channel_dim)(y, y)
        same(self.channels_last(d, channel_dim), self.channels_last(y, channel_dim) * v)

    def test_rotation_turns_block_by_block(self, channel_dim: int, shape: tuple[int, ...]) -> None:
        y, blocks, rescale = rand(*shape), rand(3, 4, 4), rand(12)
        turned = self.channels_last(y, channel_dim) @ torch.block_diag(*blocks).T
        last = self.channels_last(y, channel_dim)
        same(self.channels_last(Rotation(blocks, channel_dim)(y, y), channel_dim), turned - last)
        with_rescale = Rotation(blocks, channel_dim, rescale)(y, y)
        same(self.channels_last(with_rescale, channel_dim), rescale * turned - last)

    def test_butterfly_stages_pair_channels_ever_farther_apart(self, channel_dim: int, shape: tuple[int, ...]) -> None:
        """b = 2: stage i turns the pair of channels (n, n + 2^i) within each run of 2^(i+1)."""
        blocks, y = rand(2, 6, 2, 2), rand(*shape)
        matrix = torch.eye(12, dtype=torch.float64)
        pairs = [
            [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)],
            [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11)],
        ]
        for stage in range(2):
            step = torch.eye(12, dtype=torch.float64)
            for block, pair in zip(blocks[stage], pairs[stage], strict=True):
                step[torch.tensor(pair)[:, None], torch.tensor(pair)] = block
            matrix = step @ matrix
        last = self.channels_last(y, channel_dim)
        d = Rotation(blocks, channel_dim)(y, y)
        same(self.channels_last(d, channel_dim), last @ matrix.T - last)

    def test_a_rotation_from_a_file_keeps_lengths(self, channel_dim: int, shape: tuple[int, ...]) -> None:
        y = rand(*shape)
        for blocks in (rand(3, 4, 4), rand(2, 6, 2, 2)):
            turned = y + Rotation.from_oft(blocks, channel_dim)(y, y)
            same(turned.norm(dim=channel_dim), y.norm(dim=channel_dim))
            assert not torch.allclose(turned, y)

    def test_a_constraint_shrinks_the_rotation(self, channel_dim: int, shape: tuple[int, ...]) -> None:
        y, blocks = rand(*shape), rand(3, 4, 4)
        skew = blocks - blocks.mT
        shrunk = Rotation.from_oft(blocks * (0.1 / skew.norm()), channel_dim)(y, y)
        torch.testing.assert_close(Rotation.from_oft(blocks, channel_dim, 0.1)(y, y), shrunk, rtol=1e-6, atol=1e-6)
        same(Rotation.from_oft(blocks, channel_dim, 100.0)(y, y), Rotation.from_oft(blocks, channel_dim)(y, y))


def test_rotations_of_impossible_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"blocks is \[3, 4, 5\]"):
        Rotation(rand(3, 4, 5))
    with pytest.raises(ValueError, match="3 butterfly stages need an even b and a k that 4 divides"):
        Rotation(rand(3, 6, 2, 2))
    with pytest.raises(ValueError, match=r"rescale is \[5\]: expected 12 entries"):
        Rotation(rand(3, 4, 4), rescale=rand(5))


class TestDecomposed:
    @given(small, small, small)
    def test_rows_of_the_merged_linear_weight_have_the_magnitude(self, n_in: int, n_out: int, rank: int) -> None:
        weight, magnitude, x = rand(n_out, n_in, seed=1), rand(n_out).abs(), rand(2, 5, n_in)
        inner = Scaled(0.5, LowRank(rand(rank, n_in), rand(n_out, rank)))
        merged = weight + inner.dense()
        merged = magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
        y = x @ weight.T
        same(y + Decomposed(inner, magnitude[:, None], row_norm(weight, inner))(x, y), x @ merged.T)

    @given(geometries, kernels)
    def test_on_a_convolution_likewise(self, geometry: Geometry, kernel: tuple[int, int]) -> None:
        out = 2 * geometry.groups
        weight, magnitude = rand(out, 3, *kernel, seed=1), rand(out).abs()
        inner = LowRank(rand(2, 3, *kernel), rand(out, 2, 1, 1), geometry=geometry)
        merged = weight + inner.dense()
        merged = magnitude[:, None, None, None] * merged / merged.flatten(1).norm(dim=1)[:, None, None, None]
        x, y = conv_case(geometry, weight)
        delta = Decomposed(inner, magnitude.view(1, -1, 1, 1), row_norm(weight, inner))
        same(y + delta(x, y), conv_case(geometry, merged)[1])

    def test_a_magnitude_close_to_the_norm_counts_in_half_precision_too(self) -> None:
        silent = LowRank(rand(2, 3).bfloat16(), torch.zeros(4, 2).bfloat16())
        norm = rand(4).abs().float() + 1
        y = rand(2, 4).bfloat16()
        d = Decomposed(silent, norm * 1.0005, norm)(rand(2, 3).bfloat16(), y)
        torch.testing.assert_close(d.float(), y.float() * 0.0005, rtol=0.01, atol=0)

    def test_lengths_that_differ_are_named(self) -> None:
        inner = LowRank(rand(2, 3), rand(4, 2))
        with pytest.raises(ValueError, match=r"magnitude is \[3\], norm \[4\]: expected 4 entries"):
            Decomposed(inner, rand(3), rand(4))

    def test_a_norm_needs_an_inner_delta_with_a_weight(self) -> None:
        with pytest.raises(ValueError, match="OutputScale has no ΔW"):
            row_norm(rand(4, 3), OutputScale(rand(4)))


class TestAffine:
    @pytest.mark.parametrize(
        ("module", "x"),
        [
            (nn.LayerNorm(6, eps=0.1), rand(2, 5, 6)),
            (nn.LayerNorm((5, 6)), rand(2, 5, 6)),
            (nn.GroupNorm(3, 6, eps=1e-3), rand(2, 6, 4, 4)),
        ],
    )
    def test_the_layer_has_the_sum_of_both_weights_and_biases(self, module: nn.Module, x: Tensor) -> None:
        assert isinstance(module, nn.LayerNorm | nn.GroupNorm)
        module = module.double()
        module.weight.data, module.bias.data = rand(*module.weight.shape, seed=1), rand(*module.weight.shape, seed=2)
        module.weight.data.view(-1)[0] = 0.0
        dw, db = rand(*module.weight.shape, seed=3), rand(*module.weight.shape, seed=4)
        y = module(x).detach()
        d, without_bias = Affine(dw, db, Norm.of(module))(x, y), Affine(dw, None, Norm.of(module))(x, y)
        module.weight.data += dw
        same(y + without_bias, module(x).detach())
        module.bias.data += db
        same(y + d, module(x).detach())

    def test_a_bias_of_another_shape_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"bias is \[3\]: expected \[4\]"):
            Affine(rand(4), rand(3), Norm())


class TestScaled:
    def test_a_number_multiplies(self) -> None:
        x, inner = rand(2, 3), Dense(rand(4, 3))
        same(Scaled(-0.7, inner)(x, rand(2, 4)), -0.7 * inner(x, rand(2, 4)))

    def test_a_callable_is_read_at_every_call(self) -> None:
        strength = 1.0
        x, y, inner = rand(2, 3), rand(2, 4), Dense(rand(4, 3))
        delta = Scaled(lambda: strength, inner)
        assert delta.varies
        same(delta(x, y), inner(x, y))
        strength = 0.25
        same(delta(x, y), 0.25 * inner(x, y))
        same(delta.dense(), 0.25 * inner.dense())


class TestSum:
    def test_parts_add_up_whatever_their_kinds(self) -> None:
        x, y = rand(2, 6), rand(2, 4)
        parts = [
            LowRank(rand(2, 6), rand(4, 2)),
            Kronecker(rand(2, 3), rand(2, 2)),
            OutputScale(rand(4)),
            Scaled(0.5, Dense(rand(4, 6))),
        ]
        delta = Sum(*parts)
        same(delta(x, y), torch.stack([part(x, y) for part in parts]).sum(0))
        assert delta.needs_base
        assert not Sum(parts[0], parts[3]).needs_base

    def test_parts_are_unchanged_by_being_summed(self) -> None:
        x, y = rand(2, 6), rand(2, 4)
        part = LowRank(rand(2, 6), rand(4, 2))
        once = part(x, y)
        same(Sum(part, Scaled(2.0, part), part)(x, y), 4 * once)
        same(part(x, y), once)

    def test_nothing_or_unlike_parts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Sum()
        with pytest.raises(ValueError, match=r"channel_dim is \[-1, 1\]"):
            Sum(OutputScale(rand(4)), OutputScale(rand(4), 1))
        with pytest.raises(ValueError, match=r"outputs is \[4, None, 5\]"):
            Sum(Dense(rand(4, 3)), Rows(Dense(rand(2, 3)), 0, 2), OutputScale(rand(5)))


class TestRows:
    @given(st.integers(0, 4), st.integers(1, 4), st.integers(0, 4))
    def test_the_part_is_placed_and_the_rest_is_zero(self, before: int, rows: int, after: int) -> None:
        x, y = rand(2, 5, 3), rand(2, 5, before + rows + after)
        inner = Sum(Dense(rand(rows, 3)), OutputScale(rand(rows)))
        d = Rows(inner, before, before + rows)(x, y)
        expected = torch.zeros_like(y)
        part = slice(before, before + rows)
        expected[..., part] = inner(x, y[..., part])
        same(d, expected)

    def test_on_a_convolution_likewise(self) -> None:
        x, y, weight = rand(2, 3, 4, 5), rand(2, 6, 4, 5), rand(2, 3, 1, 1)
        d = Rows(Dense(weight, geometry=Geometry()), 3, 5)(x, y)
        same(d[:, 3:5], F.conv2d(x, weight))
        assert d[:, [0, 1, 2, 5]].count_nonzero() == 0

    def test_q_k_and_v_put_together_are_the_fused_weight(self) -> None:
        q, k, v = rand(2, 3), rand(4, 3), rand(2, 3, seed=1)
        fused = Sum(Rows(Dense(q), 0, 2, 8), Rows(Dense(k), 2, 6, 8), Rows(Dense(v), 6, 8, 8))
        same(fused.dense(), torch.cat([q, k, v]))
        assert fused.frobenius_sq() == pytest.approx(float(torch.cat([q, k, v]).square().sum()))
        assert Rows(Dense(q), 0, 2).dense() is None

    def test_rows_that_are_not_there_are_refused(self) -> None:
        with pytest.raises(ValueError, match="rows 4 to 2"):
            Rows(Dense(rand(2, 3)), 4, 2)
        with pytest.raises(ValueError, match="rows 0 to 3 are 3, the delta is made for 2"):
            Rows(Dense(rand(2, 3)), 0, 3)
        with pytest.raises(ValueError, match="rows 4 to 6 of a layer that has 5"):
            Rows(Dense(rand(2, 3)), 4, 6)(rand(1, 3), rand(1, 5))


@pytest.mark.parametrize("border", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_delta_follows_a_layer_around_the_picture_s_border(border: str, kernel: int) -> None:
    padding = (1, 2) if kernel == 3 else 0
    layer = nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=border, bias=False, dtype=torch.float64)
    down, up = rand(2, 3, kernel, kernel), rand(4, 2, 1, 1)
    x = rand(2, 3, 6, 5)
    y = layer(x)
    with torch.no_grad():
        layer.weight += (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    same(LowRank(down, up, geometry=Geometry.of(layer))(x, y), layer(x) - y)


def test_a_border_whose_width_is_given_in_words_is_refused() -> None:
    with pytest.raises(ValueError, match="padding_mode 'circular' with padding 'same' is not supported"):
        Geometry.of(nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"))
