"""Limits of loudness: a ceiling for the style, token by token, and a level for each network as a whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import CFG, Toy, as_dense, fused, geometry_of, inputs, random_lora, toy_layers

from lib_dynfuse.core import Fusion, Role, Row, strategy
from lib_dynfuse.core.delta import Delta, Dense

NEUTRAL = {"subject": 1.0, "style": 1.0, "negative": 1.0}
LEVELS = {**NEUTRAL, "subject_level": 0.2, "style_level": 0.3}


def one_layer(module: nn.Module, x: Tensor, form: str, style: float, **parameters: Any) -> tuple[Tensor, ...]:
    """Of one layer in a fused pass: what is added to its output, and in float64 its output and both deltas alone."""
    generator = torch.Generator().manual_seed(7)
    loras = {role: random_lora(module, 3, size, generator) for role, size in ((Role.SUBJECT, 0.1), (Role.STYLE, style))}
    dense: dict[Role, Tensor] = {role: found for role, one in loras.items() if (found := one.dense()) is not None}
    deltas: dict[Role, Delta] = dict(loras)
    if form == "dense":
        deltas = {role: Dense(weight, None, geometry_of(module)) for role, weight in dense.items()}
    with torch.no_grad():
        before = module(x)
        with Fusion({"layer": (module, deltas)}, strategy("sum-cfg", **{**NEUTRAL, **parameters})):
            added = module(x) - before
        apart = []
        for role in Role:
            weight = dense[role].double()
            if isinstance(module, nn.Conv2d):
                given_ = {"stride": module.stride, "padding": module.padding}
                apart.append(nn.functional.conv2d(x.double(), weight, **given_))
            else:
                apart.append(nn.functional.linear(x.double(), weight))
    return added, before.double(), *apart


def layers() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(12, 16), torch.randn(2, 9, 12)),
        (nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6)),
        (nn.Conv2d(8, 12, 1, bias=False).to(memory_format=torch.channels_last), torch.randn(2, 8, 5, 5)),
    ]


@pytest.mark.parametrize("form", ["low rank", "dense"])
@pytest.mark.parametrize("number", [0, 1, 2])
@settings(deadline=None, max_examples=15)
@given(ceiling=st.floats(0.05, 5.0), style=st.floats(0.01, 10.0))
def test_the_style_is_pressed_down_as_it_is_written(number: int, form: str, ceiling: float, style: float) -> None:
    module, x = layers()[number]
    if number == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    added, base, subject, alone = one_layer(module, x, form, style, ceiling=ceiling)
    channels = -1 if isinstance(module, nn.Linear) else 1
    loudness = alone.norm(dim=channels, keepdim=True) / base.norm(dim=channels, keepdim=True)
    expected = subject + alone / (1 + (loudness / ceiling) ** 2).sqrt()
    torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_however_loud_the_style_is_it_stays_below_the_ceiling() -> None:
    module, x = layers()[0]
    for style in (0.1, 1.0, 1e3):
        added, base, subject, _ = one_layer(module, x, "low rank", style, ceiling=0.4)
        share = (added.double() - subject).norm(dim=-1) / base.norm(dim=-1)
        assert share.max() < 0.4 * 1.001


def test_a_style_that_is_hardly_heard_is_left_as_it_is() -> None:
    module, x = layers()[0]
    added, _, subject, alone = one_layer(module, x, "low rank", 1e-4, ceiling=0.4)
    torch.testing.assert_close(added.double(), subject + alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kl-cfg", "sum-cfg"])
def test_low_rank_and_dense_deltas_and_any_batch_come_to_the_same(name: str) -> None:
    model, (image, time) = Toy(), inputs(2)
    pairs = toy_layers(model, style=0.5)
    found = fused(model, pairs, name, (image, time), ceiling=0.3)
    torch.testing.assert_close(fused(model, as_dense(pairs), name, (image, time), ceiling=0.3), found)
    alone = torch.cat([fused(model, pairs, name, (image[k : k + 1], time[k : k + 1]), ceiling=0.3) for k in (0, 1)])
    torch.testing.assert_close(alone, found)
    assert not torch.allclose(fused(model, pairs, name, (image, time)), found, rtol=1e-3)


def test_tiles_of_a_picture_are_pressed_each_by_itself() -> None:
    module, x = layers()[0]
    x = torch.cat([x, x * 3])
    generator = torch.Generator().manual_seed(7)
    deltas: dict[Role, Delta] = {role: random_lora(module, 3, 1.0, generator) for role in Role}
    with torch.no_grad(), Fusion({"l": (module, deltas)}, strategy("sum-cfg", ceiling=0.4)) as fusion:
        fusion.rows = CFG
        found = module(x)
        fusion.rows = [row for row in CFG for _ in range(2)]
        torch.testing.assert_close(module(x), found)


def test_a_gradient_takes_the_pressing_for_a_constant() -> None:
    module, x = layers()[0]
    x.requires_grad_()
    generator = torch.Generator().manual_seed(7)
    deltas: dict[Role, Delta] = {role: random_lora(module, 3, 1.0, generator) for role in Role}
    with Fusion({"l": (module, deltas)}, strategy("sum-cfg", ceiling=0.4)):
        module(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def loudness(delta: Tensor, base: Tensor) -> Tensor:
    """Of whole batch items."""
    return delta.flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)


@pytest.mark.parametrize("form", ["low rank", "dense"])
@pytest.mark.parametrize("number", [0, 1, 2])
@settings(deadline=None, max_examples=15)
@given(level=st.floats(0.02, 5.0), lift=st.floats(1.0, 4.0), ceiling=st.sampled_from([0.0, 0.3]))
def test_networks_are_brought_to_their_levels(
    number: int, form: str, level: float, lift: float, ceiling: float
) -> None:
    module, x = layers()[number]
    limits = {"subject_level": level, "style_level": 2 * level, "lift": lift, "ceiling": ceiling}
    added, base, subject, style = one_layer(module, x, form, 0.3, **limits)
    each = [
        delta * (wanted / loudness(delta, base)).clamp(max=lift).view(-1, *(1 for _ in delta.shape[1:]))
        for delta, wanted in ((subject, level), (style, 2 * level))
    ]
    if ceiling:
        channels = -1 if isinstance(module, nn.Linear) else 1
        share = each[1].norm(dim=channels, keepdim=True) / base.norm(dim=channels, keepdim=True)
        each[1] = each[1] / (1 + (share / ceiling) ** 2).sqrt()
    expected = each[0] + each[1]
    torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_only_the_role_that_has_a_level_is_moved() -> None:
    module, x = layers()[0]
    added, base, subject, style = one_layer(module, x, "low rank", 0.3, subject_level=0.05)
    assert (loudness(added.double() - style, base) - 0.05).abs().max() < 1e-4
    added, base, subject, style = one_layer(module, x, "low rank", 0.3, style_level=0.05)
    assert (loudness(added.double() - subject, base) - 0.05).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["sum-cfg", "kl-cfg"])
def test_strengths_above_the_levels_make_no_difference(name: str) -> None:
    model, x = Toy(), inputs()
    found = [
        fused(model, toy_layers(model, subject, style), name, x, **LEVELS)
        for subject, style in ((0.5, 0.8), (1.0, 0.8), (0.5, 6.4), (2.0, 3.2))
    ]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


def test_the_mean_is_geometric_over_the_layers_of_the_first_step_and_kept_from_then_on() -> None:
    """An oracle in float64, one layer at a time, of three passes over two layers."""
    torch.manual_seed(0)
    modules = [nn.Linear(6, 6).double() for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    deltas = [
        {role: random_lora(one, 2, size, generator) for role in Role}
        for one, size in zip(modules, (0.1, 0.5), strict=True)
    ]
    given_ = {str(k): (one, dict(delta)) for k, (one, delta) in enumerate(zip(modules, deltas, strict=True))}
    logs: list[Tensor] = []
    with torch.no_grad(), Fusion(given_, strategy("sum-cfg", **NEUTRAL, subject_level=0.15, lift=1.5)) as fusion:
        for step in range(3):
            fusion.at(step, 3)
            for module, delta in zip(modules, deltas, strict=True):
                x = torch.randn(2, 5, 6, dtype=torch.float64)
                base = nn.functional.linear(x, module.weight, module.bias)
                subject, style = (delta[role](x, base) for role in Role)
                if step == 0:
                    logs.append(loudness(subject, base).log())
                gain = (math.log(0.15) - torch.stack(logs).mean(0)).clamp(max=math.log(1.5)).exp()
                torch.testing.assert_close(
                    module(x), base + gain[:, None, None] * subject + style, rtol=1e-5, atol=1e-6
                )


def test_a_network_is_heard_where_choosing_begins() -> None:
    module, x = layers()[0]
    generator = torch.Generator().manual_seed(7)
    deltas: dict[Role, Delta] = {role: random_lora(module, 3, 1.0, generator) for role in Role}
    with torch.no_grad():
        with Fusion({"l": (module, dict(deltas))}, strategy("sum-cfg", **LEVELS)):
            expected = module(x * 3)
        with Fusion({"l": (module, dict(deltas))}, strategy("sum-cfg", **LEVELS), window=(0.5, 1.0)) as fusion:
            for step in range(3):
                fusion.at(step, 3)
                found = module(x * (1, 3, 3)[step])
                assert torch.allclose(found, expected) == (step > 0)


def test_halves_and_pictures_have_means_of_their_own_in_one_batch_or_apart() -> None:
    model, (image, time) = Toy(), inputs(4)
    image = image * torch.tensor([1.0, 4.0, 0.2, 2.0]).view(4, 1, 1, 1)
    rows = [Row(k, cond=cond) for cond in (False, True) for k in (0, 1)]

    def run(*batches: list[int]) -> Tensor:
        found: dict[int, Tensor] = {}
        with torch.no_grad(), Fusion(toy_layers(model, 0.3, 0.3), strategy("sum-cfg", **LEVELS)) as fusion:
            for step in range(3):
                fusion.at(step, 3)
                for batch in batches:
                    fusion.rows = [rows[k] for k in batch]
                    found.update(zip(batch, model(image[batch], time[batch]), strict=True))
        return torch.stack([found[k] for k in range(4)])

    together = run([0, 1, 2, 3])
    torch.testing.assert_close(run([0, 1], [2, 3]), together)
    torch.testing.assert_close(run([2], [0], [3], [1]), together)


def test_a_step_of_several_passes_is_heard_as_a_whole() -> None:
    module, x = layers()[0]
    generator = torch.Generator().manual_seed(7)
    deltas: dict[Role, Delta] = {role: random_lora(module, 3, 1.0, generator) for role in Role}
    limits = {**NEUTRAL, "subject_level": 0.2}
    with torch.no_grad(), Fusion({"l": (module, dict(deltas))}, strategy("sum-cfg", **limits)) as fusion:
        for one in (x, x * 5):
            fusion.at(0, 2)
            module(one)
        fusion.at(1, 2)
        found = module(x)
    base = nn.functional.linear(x, module.weight, module.bias)
    subject, style = (deltas[role](x, base) for role in Role)
    louder = deltas[Role.SUBJECT](x * 5, base), nn.functional.linear(x * 5, module.weight, module.bias)
    mean = (loudness(subject, base) * loudness(*louder)).sqrt()
    torch.testing.assert_close(found, base + (0.2 / mean).clamp(max=1)[:, None, None] * subject + style)


def test_tiles_of_a_picture_share_its_loudness() -> None:
    module, x = layers()[0]
    x = torch.cat([x[:1], x[:1] * 3, x[1:], x[1:] * 0.1])
    generator = torch.Generator().manual_seed(7)
    deltas: dict[Role, Delta] = {role: random_lora(module, 3, 1.0, generator) for role in Role}
    with torch.no_grad(), Fusion({"l": (module, deltas)}, strategy("sum-cfg", **LEVELS)) as fusion:
        fusion.rows = CFG
        found = module(x)
    folded = x.view(2, 2, *x.shape[1:]).flatten(1, 2)
    with torch.no_grad(), Fusion({"l": (module, deltas)}, strategy("sum-cfg", **LEVELS)) as fusion:
        fusion.rows = CFG
        torch.testing.assert_close(module(folded).view_as(found), found)


def test_a_layer_on_which_a_network_is_silent_says_nothing_of_it() -> None:
    torch.manual_seed(0)
    silent, loud = nn.Linear(6, 6), nn.Linear(6, 6)
    generator = torch.Generator().manual_seed(1)
    deltas: dict[Role, Delta] = {role: random_lora(loud, 2, 0.5, generator) for role in Role}
    nothing: dict[Role, Delta] = {role: random_lora(silent, 2, 0.0, generator) for role in Role}
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        with Fusion({"b": (loud, dict(deltas))}, strategy("sum-cfg", **LEVELS)):
            expected = loud(x)
        base = silent(x)
        with Fusion({"a": (silent, nothing), "b": (loud, dict(deltas))}, strategy("sum-cfg", **LEVELS)):
            torch.testing.assert_close(silent(x), base)
            torch.testing.assert_close(loud(x), expected)


def test_one_layer_that_overflows_does_not_spoil_the_others() -> None:
    module = nn.Linear(6, 6)
    generator = torch.Generator().manual_seed(1)
    deltas: dict[Role, Delta] = {role: random_lora(module, 2, 0.5, generator) for role in Role}
    with torch.no_grad(), Fusion({"l": (module, deltas)}, strategy("sum-cfg", **LEVELS)):
        module(torch.full((2, 5, 6), math.nan))
        assert module(torch.randn(2, 5, 6)).isfinite().all()


def test_low_rank_and_dense_deltas_are_brought_to_the_same_levels() -> None:
    model = Toy()
    pairs = toy_layers(model, 0.3, 0.5)
    for name in ("kl-cfg", "sum-cfg"):
        found = fused(model, pairs, name, inputs(), **LEVELS)
        torch.testing.assert_close(fused(model, as_dense(pairs), name, inputs(), **LEVELS), found)
        assert not torch.allclose(fused(model, pairs, name, inputs(), **NEUTRAL), found, rtol=1e-3)
