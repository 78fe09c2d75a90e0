"""A ceiling holds a loud style back, token by token, and leaves all else alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import CFG, Toy, as_dense, fused, geometry_of, inputs, random_lora, toy_layers

from lib_dynfuse.core import Fusion, Role, strategy
from lib_dynfuse.core.delta import Delta, Dense

NEUTRAL = {"subject": 1.0, "style": 1.0, "negative": 1.0}


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
