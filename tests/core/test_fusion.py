"""Fusion on a small model: what is added where and for whom, over the steps, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import BOTH, CFG, Layers, Log, Toy, as_dense, fused, inputs, merged, random_lora, toy_layers

from lib_dynfuse.core import Fusion, Role, Row, strategies, strategy
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
    Rows,
    Scaled,
    Shift,
    Sum,
)
from lib_dynfuse.core.divergence import kl_divergence
from lib_dynfuse.core.sampling import lattice_index, lattice_step, sample_index


@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_sum_is_the_merged_model(form: str) -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    expected = merged(model, layers, BOTH)(*x)
    found = fused(model, layers if form == "low rank" else as_dense(layers), "sum", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sum_is_the_merged_model_within_half_precision(dtype: torch.dtype) -> None:
    model = Toy()
    layers = toy_layers(model)
    expected = merged(model, layers, BOTH)(*inputs())
    half = copy.deepcopy(model).to(dtype)
    modules = dict(half.named_modules())
    covered = {name: (modules[name], deltas) for name, (_, deltas) in layers.items()}
    found = fused(half, covered, "sum", [x.to(dtype) for x in inputs()])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_role_without_a_rival_is_applied_as_it_is() -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    subject_only: Layers = {name: (m, {Role.SUBJECT: d[Role.SUBJECT]}) for name, (m, d) in layers.items()}
    expected = merged(model, layers, (Role.SUBJECT,))(*x)
    for name in strategies():
        torch.testing.assert_close(fused(model, subject_only, name, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lean", "role"), [(-1.0, Role.SUBJECT), (1.0, Role.STYLE)])
@pytest.mark.parametrize("name", ["kl", "kl-token", "js", "cosine"])
def test_a_full_lean_gives_every_layer_to_one_role(name: str, lean: float, role: Role) -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    torch.testing.assert_close(
        fused(model, layers, name, x, balance=lean), merged(model, layers, (role,))(*x), rtol=1e-5, atol=1e-6
    )


def test_several_networks_of_one_role_add_up_before_the_choice() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 4, 6)
    one, two, rival = (random_lora(layer, 2, size, torch.Generator().manual_seed(7)) for size in (0.3, 0.2, 0.01))
    with torch.no_grad():
        base = layer(x)
        found = fused(layer, {"l": (layer, {Role.SUBJECT: Sum(one, Scaled(0.5, two)), Role.STYLE: rival})}, "kl", [x])
        torch.testing.assert_close(found, base + one(x, base) + 0.5 * two(x, base))


def test_a_multiplier_that_moves_is_read_at_every_pass() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 4, 6)
    delta = random_lora(layer, 2, 0.3, torch.Generator().manual_seed(7))
    strength = [1.0]
    layers: Layers = {"l": (layer, {Role.SUBJECT: Scaled(lambda: strength[0], delta)})}
    with torch.no_grad(), Fusion(layers, strategy("kl")):
        for strength[0] in (1.0, 0.25, 0.0):
            base = nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(layer(x), base + strength[0] * delta(x, base))


def test_kinds_that_look_at_the_base_output_see_it_without_bias() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 4, 6)
    v = torch.linspace(-1, 1, 5)
    with torch.no_grad():
        found = fused(layer, {"l": (layer, {Role.STYLE: OutputScale(v)})}, "kl", [x])
        torch.testing.assert_close(found, layer(x) + v * (layer(x) - layer.bias))


def test_normalisation_layers_are_fused_too() -> None:
    norm, x = nn.GroupNorm(2, 6), torch.randn(2, 6, 4, 4)
    delta = Affine(torch.randn(6), torch.randn(6), Norm.of(norm))
    with torch.no_grad():
        expected = nn.functional.group_norm(x, 2, norm.weight + delta.weight, norm.bias + torch.as_tensor(delta.bias))
        torch.testing.assert_close(fused(norm, {"n": (norm, {Role.STYLE: delta})}, "kl", [x]), expected)


@pytest.mark.parametrize("name", sorted(strategies()))
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_every_rule_runs_on_every_kind_of_layer_and_changes_the_picture(name: str, form: str) -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model) if form == "low rank" else as_dense(toy_layers(model))
    plain = model(*x)
    with torch.no_grad(), Fusion(layers, strategy(name)) as fusion:
        fusion.rows = CFG
        for step in range(3):
            fusion.at(step, 3)
            found = model(*x)
            assert bool(found.isfinite().all())
            assert not torch.equal(found, plain)


@pytest.mark.parametrize("name", sorted(set(strategies()) - {"np"}))
def test_the_low_rank_path_makes_the_same_picture_as_the_plain_one(name: str) -> None:
    # np alone builds another projection from a dense delta, whose row space is not that of the factors.
    model, x = Toy(), inputs(4)
    layers = toy_layers(model, ranks=(3, 3))
    torch.testing.assert_close(
        fused(model, layers, name, x), fused(model, as_dense(layers), name, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_in_either_memory_order_is_decided_alike(memory: torch.memory_format) -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1)
    layer.weight.data = layer.weight.data.to(memory_format=memory)
    x = torch.randn(3, 4, 6, 6).to(memory_format=memory)
    generator = torch.Generator().manual_seed(2)
    deltas = {role: random_lora(layer, 2, 0.2, generator) for role in BOTH}
    with torch.no_grad():
        base = layer(x)
        parts = {role: delta(x, base) for role, delta in deltas.items()}
        found = fused(layer, {"c": (layer, dict(deltas))}, "kl-token", [x])
        wins = kl_divergence(base, parts[Role.SUBJECT], dim=1) >= kl_divergence(base, parts[Role.STYLE], dim=1)
        expected = base + torch.where(wins.unsqueeze(1), parts[Role.SUBJECT], parts[Role.STYLE])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampled", [0, 4])
def test_the_louder_role_wins_an_item_as_a_whole(sampled: int) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(6, 10, 8)
    generator = torch.Generator().manual_seed(4)
    deltas = {role: random_lora(layer, 2, 0.1, generator) for role in BOTH}
    with torch.no_grad():
        base = layer(x)
        parts = [deltas[role](x, base) for role in BOTH]
        tokens = sample_index(10, sampled, x.device)
        seen = slice(None) if tokens is None else tokens
        d = [kl_divergence(base, part)[:, seen].mean(1) for part in parts]
        expected = base + torch.where((d[0] >= d[1]).view(-1, 1, 1), *parts)
        found = fused(layer, {"l": (layer, dict(deltas))}, "kl", [x], sample_tokens=sampled)
    assert 0 < int((d[0] >= d[1]).sum()) < 6, "the test needs winners of both roles"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sampled_tokens_are_distinct_spread_out_and_do_not_follow_a_pictures_columns() -> None:
    index = sample_index(1024, 64, torch.device("cpu"))
    assert index is not None
    assert len(set(index.tolist())) == 64
    assert index.diff().max() <= 32
    assert len({place % 32 for place in index.tolist()}) > 16
    assert sample_index(64, 64, torch.device("cpu")) is None


@pytest.mark.parametrize("form", ["low rank", "dense"])
@pytest.mark.parametrize(
    "shape",
    [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}],
)
def test_a_convolution_is_sampled_on_a_lattice(form: str, shape: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(4, 8, 3, **shape), torch.randn(6, 4, 11, 9)
    generator = torch.Generator().manual_seed(3)
    layers: Layers = {"c": (layer, {role: random_lora(layer, 2, 0.05, generator) for role in BOTH})}
    with torch.no_grad():
        base = layer(x)
        parts = [layers["c"][1][role](x, base) for role in BOTH]
        step = lattice_step(*base.shape[2:], 6)
        assert step > 1
        d = [kl_divergence(base, part, dim=1)[:, ::step, ::step].mean((1, 2)) for part in parts]
        expected = base + torch.where((d[0] >= d[1]).view(-1, 1, 1, 1), *parts)
        found = fused(layer, layers if form == "low rank" else as_dense(layers), "kl", [x], sample_tokens=6)
    assert 0 < int((d[0] >= d[1]).sum()) < 6, "the test needs winners of both roles"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_lattice_has_as_many_pixels_as_are_wanted_or_a_few_more() -> None:
    assert [lattice_step(32, 32, wanted) for wanted in (0, 64, 65, 1024, 2000)] == [1, 4, 3, 1, 1]
    assert lattice_step(96, 64, 64) == 10
    places = lattice_index(6, 4, 3, torch.device("cpu"))
    assert places is not None
    assert places.tolist() == [0, 3, 12, 15]
    assert lattice_index(6, 4, 1, torch.device("cpu")) is None


# Fused layers.


def test_a_fused_qkv_is_decided_part_by_part() -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 5, 8)
    generator = torch.Generator().manual_seed(6)
    part = nn.Linear(8, 4)
    loud = [random_lora(part, 2, 0.5, generator) for _ in range(3)]
    quiet = [random_lora(part, 2, 0.05, generator) for _ in range(3)]
    mixed = [loud[0], quiet[1], loud[2]], [quiet[0], loud[1], quiet[2]]
    deltas = {
        role: Sum(*(Rows(d, 4 * i, 4 * i + 4) for i, d in enumerate(listed)))
        for role, listed in zip(BOTH, mixed, strict=True)
    }
    log = Log()
    with torch.no_grad(), Fusion({"qkv": (layer, dict(deltas))}, strategy("kl"), log):
        found = layer(x)
    with torch.no_grad():
        base = nn.functional.linear(x, layer.weight, layer.bias)
        expected = base + torch.cat([d(x, base[..., :4]) for d in loud], -1)
    torch.testing.assert_close(found, expected)
    assert log.names == ["qkv[0:4]", "qkv[4:8]", "qkv[8:12]"]


def test_a_network_of_the_whole_layer_meets_one_of_its_parts() -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 5, 8)
    generator = torch.Generator().manual_seed(8)
    whole = random_lora(layer, 2, 0.3, generator)
    q_only = random_lora(nn.Linear(8, 4), 2, 0.01, generator)
    with torch.no_grad():
        base = layer(x)
        found = fused(layer, {"qkv": (layer, {Role.SUBJECT: whole, Role.STYLE: Rows(q_only, 0, 4)})}, "kl", [x])
        torch.testing.assert_close(found, base + whole(x, base))


@pytest.mark.parametrize(
    "whole",
    [
        Dense(torch.ones(12, 8), torch.ones(12)),
        Kronecker(torch.ones(3, 2), torch.eye(4)),
        Decomposed(LowRank(torch.ones(1, 8), torch.ones(12, 1)), torch.arange(1.0, 13), torch.ones(12)),
        Sum(LowRank(torch.ones(1, 8), torch.ones(12, 1)), Shift(torch.arange(12.0))),
    ],
    ids=lambda delta: type(delta).__name__,
)
def test_kinds_of_the_whole_layer_can_be_cut_where_another_network_divides_it(whole: Delta) -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 5, 8)
    part = random_lora(nn.Linear(8, 4), 2, 0.3, torch.Generator().manual_seed(8))
    with torch.no_grad():
        base = layer(x)
        expected = base + whole(x, base - layer.bias) + Rows(part, 4, 8)(x, base)
        deltas = {Role.SUBJECT: whole, Role.STYLE: Rows(part, 4, 8)}
        torch.testing.assert_close(fused(layer, {"qkv": (layer, deltas)}, "sum", [x]), expected)


def test_rows_that_do_not_exist_are_named_with_the_layer() -> None:
    layer = nn.Linear(8, 6)
    delta = Rows(random_lora(nn.Linear(8, 4), 2, 0.3, torch.Generator()), 4, 8)
    with pytest.raises(ValueError, match=r"layer mid\.qkv: rows 4 to 8 of a layer that has 6"):
        fused(layer, {"mid.qkv": (layer, {Role.STYLE: delta})}, "kl", [torch.randn(1, 2, 8)])


# Steps, windows, traces.


@pytest.mark.parametrize("name", sorted(set(strategies()) - {"sum"}))
def test_outside_the_window_both_are_added(name: str) -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    both = fused(model, layers, "sum", x)
    with torch.no_grad(), Fusion(layers, strategy(name), window=(0.4, 0.6)) as fusion:
        same = []
        for step in range(5):
            fusion.at(step, 5)
            same.append(torch.allclose(model(*x), both, rtol=1e-5, atol=1e-6))
    assert same == [True, True, False, True, True]


@pytest.mark.parametrize("window", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.4)])
def test_a_window_outside_the_steps_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="window must be"):
        Fusion({}, strategy("kl"), window=window)


def test_the_trace_hears_every_pass_and_every_decision() -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    layers["time"][1].pop(Role.STYLE)
    log = Log()
    with torch.no_grad(), Fusion(layers, strategy("kl"), log) as fusion:
        fusion.rows = CFG
        for step in range(2):
            fusion.at(step, 2)
            model(*x)
            model(*x)  # a second-order sampler asks twice in one step
    assert log.names == ["conv", "down", "to_q", "out"]
    assert [(step, progress) for step, progress, _ in log.passes] == [(0, 0.0), (0, 0.0), (1, 1.0), (1, 1.0)]
    assert all(rows == tuple(CFG) for _, _, rows in log.passes)
    assert [layer for layer, *_ in log.calls] == [0, 1, 2, 3] * 4
    for _, subject, style, d_subject, d_style in log.calls:
        assert d_subject is not None
        assert d_style is not None
        assert subject.shape == style.shape == d_subject.shape == d_style.shape == (2,)
        assert torch.equal(subject, d_subject >= d_style)
        assert torch.equal(subject, ~style)


def test_progress_is_zero_at_the_first_step_and_one_at_the_last() -> None:
    fusion = Fusion({}, strategy("sum"))
    seen = []
    for step in range(5):
        fusion.at(step, 5)
        seen.append((fusion.step, fusion.progress))
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    fusion.at(0, 1)
    assert fusion.progress == 0.0


def test_without_rows_every_item_is_its_own_picture() -> None:
    log = Log()
    model = Toy()
    with torch.no_grad(), Fusion(toy_layers(model), strategy("kl"), log):
        model(*inputs(3))
    assert log.passes == [(0, 0.0, (Row(0), Row(1), Row(2)))]


# Bad input.


def test_a_layer_without_a_delta_is_refused() -> None:
    with pytest.raises(ValueError, match="layer mid: no delta for any role"):
        Fusion({"mid": (nn.Linear(2, 2), {})}, strategy("kl"))


def test_a_delta_that_does_not_fit_is_named_with_the_layer() -> None:
    layer = nn.Linear(4, 4)
    bad = Dense(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"layer down\.0: .*5 -> 4 channels.*4 -> 4"):
        fused(layer, {"down.0": (layer, {Role.SUBJECT: bad})}, "kl", [torch.zeros(1, 2, 4)])


def test_a_low_rank_delta_that_does_not_fit_is_named_with_the_layer() -> None:
    layer = nn.Linear(4, 4)
    bad = LowRank(torch.zeros(2, 5), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"layer down\.0: .*5 -> 4 channels.*4 -> 4"):
        fused(layer, {"down.0": (layer, {Role.SUBJECT: bad})}, "kl", [torch.zeros(1, 2, 4)])


def test_no_memory_is_reported_as_what_it_is() -> None:
    layer = nn.Linear(4, 4)

    class Hungry(Dense):
        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fused(layer, {"l": (layer, {Role.SUBJECT: Hungry(torch.zeros(4, 4))})}, "kl", [torch.zeros(1, 2, 4)])


def test_bytes_held_are_the_factors_once() -> None:
    layer = nn.Conv2d(4, 6, 3)
    generator = torch.Generator().manual_seed(0)
    deltas = {role: random_lora(layer, 2, 0.1, generator) for role in BOTH}
    assert deltas[Role.STYLE].geometry == Geometry.of(layer)
    fusion = Fusion({"c": (layer, dict(deltas))}, strategy("kl"))
    with torch.no_grad(), fusion:
        layer(torch.randn(1, 4, 5, 5))
    assert fusion.nbytes == sum(delta.nbytes for delta in deltas.values())
