"""What Fusion does where something is not as it should be: foreign batches, failures, threads, layers not called."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import BOTH, CFG, Layers, Log, Toy, as_dense, fused, inputs, merged, random_lora, toy_layers

from lib_dynfuse.core import ForeignBatch, Fusion, Role, Row, strategies, strategy
from lib_dynfuse.core.delta import Dense, LowRank
from lib_dynfuse.core.rules_divergence import KLItem
from lib_dynfuse.core.work import Work

STATEFUL = {"auto_balance": True, "couple_cfg": True, "decide_every": 2}


class Failures:
    """What a host is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Exception]] = []

    def __call__(self, layer: str, error: Exception) -> None:
        self.told.append((layer, error))

    @property
    def layers(self) -> list[str]:
        return [layer for layer, _ in self.told]


def parameters_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    known = {parameter.name for parameter in strategies()[name].parameters}
    return {key: value for key, value in given.items() if key in known}


def one_layer(size: float = 0.3) -> tuple[nn.Linear, Layers]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    generator = torch.Generator().manual_seed(1)
    return layer, {"mid.to_q": (layer, {role: random_lora(layer, 2, size, generator) for role in BOTH})}


def sum_of(layer: nn.Linear, layers: Layers, x: Tensor) -> Tensor:
    """The layer with both deltas merged, in float64."""
    deltas = [found for delta in layers["mid.to_q"][1].values() if (found := delta.dense()) is not None]
    weight = layer.weight.detach().double() + sum(delta.double() for delta in deltas)
    return nn.functional.linear(x.double(), weight, layer.bias.detach().double()).float()


# Batches that are not the pass's.


@pytest.mark.parametrize("name", sorted(strategies()))
def test_a_batch_that_is_no_multiple_of_the_rows_is_named_with_the_layer(name: str) -> None:
    layer, layers = one_layer()
    with torch.no_grad(), Fusion(layers, strategy(name)) as fusion:
        fusion.rows = CFG
        with pytest.raises(ForeignBatch, match=r"layer mid\.to_q: a batch of 3 where the forward pass has 2 rows"):
            layer(torch.randn(3, 4, 6))


@pytest.mark.parametrize("rows", [CFG, []])
def test_so_is_one_of_a_later_layer(rows: Sequence[Row]) -> None:
    first, second = nn.Linear(6, 8), nn.Linear(6, 8)
    generator = torch.Generator().manual_seed(1)
    layers: Layers = {
        name: (one, {role: random_lora(one, 2, 0.3, generator) for role in BOTH})
        for name, one in (("a", first), ("b", second))
    }
    with torch.no_grad(), Fusion(layers, strategy("kl-cfg")) as fusion:
        fusion.rows = rows
        first(torch.randn(2, 4, 6))
        with pytest.raises(ValueError, match="layer b: a batch of 1 where the forward pass has 2 rows"):
            second(torch.randn(1, 4, 6))


def test_a_layer_that_is_never_tiled_takes_no_multiple_for_tiles() -> None:
    layer, layers = one_layer()
    with torch.no_grad(), Fusion(layers, strategy("kl"), tiled=lambda name: "to_q" not in name) as fusion:
        fusion.rows = CFG
        layer(torch.randn(2, 4, 6))
        with pytest.raises(ForeignBatch, match="a batch of 4 where the forward pass has 2 rows"):
            layer(torch.randn(4, 4, 6))


@pytest.mark.parametrize("name", sorted(strategies()))
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_a_host_adds_both_there_and_is_told_once(name: str, form: str) -> None:
    layer, layers = one_layer()
    x, failures, log = torch.randn(3, 4, 6), Failures(), Log()
    expected = sum_of(layer, layers, x)
    given = layers if form == "low rank" else as_dense(layers)
    with torch.no_grad(), Fusion(given, strategy(name), log, failed=failures) as fusion:
        fusion.rows = CFG
        for step in range(3):
            fusion.at(step, 3)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert failures.layers == ["mid.to_q"]
    assert isinstance(failures.told[0][1], ForeignBatch)
    assert not log.calls


def test_the_other_layers_decide_as_if_it_were_not_there() -> None:
    model, (image, time) = Toy(), inputs()
    layers = toy_layers(model)
    extra, log, alone = nn.Linear(6, 8), Log(), Log()
    generator = torch.Generator().manual_seed(9)
    more: Layers = {"region": (extra, {role: random_lora(extra, 2, 0.3, generator) for role in BOTH})}
    chosen = strategy("kl-cfg", auto_balance=True)

    def run(covered: Layers, log: Log) -> list[Tensor]:
        found = []
        with torch.no_grad(), Fusion(covered, chosen, log, failed=Failures()) as fusion:
            for step in range(3):
                fusion.at(step, 3)
                fusion.rows = CFG
                extra(torch.randn(1, 4, 6))
                found.append(model(image, time))
                extra(torch.randn(3, 4, 6))
        return found

    for one, other in zip(run({**layers, **more}, log), run(layers, alone), strict=True):
        assert torch.equal(one, other)
    assert len(log.passes) == len(alone.passes) == 3
    assert [layer for layer, *_ in log.calls] == [layer for layer, *_ in alone.calls]


def test_a_layer_of_one_role_takes_any_batch() -> None:
    layer, layers = one_layer()
    del layers["mid.to_q"][1][Role.STYLE]
    x = torch.randn(3, 4, 6)
    with torch.no_grad(), Fusion(layers, strategy("kl")) as fusion:
        fusion.rows = CFG
        torch.testing.assert_close(layer(x), sum_of(layer, layers, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(strategies()))
def test_a_batch_that_cannot_be_told_apart_is_the_sum(name: str) -> None:
    model, x = Toy(), inputs()
    layers, log = toy_layers(model), Log()
    expected = merged(model, layers, BOTH)(*x)
    with torch.no_grad(), Fusion(layers, strategy(name), log) as fusion:
        fusion.rows = CFG
        before = model(*x)
        fusion.adds_both = True
        torch.testing.assert_close(model(*x), expected, rtol=1e-5, atol=1e-6)
        assert len(log.passes) == 1
        fusion.adds_both = False
        fusion.at(0, 2)
        if not parameters_of(name, STATEFUL):
            assert torch.equal(model(*x), before)


# Failures inside a layer.


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_a_rule_that_fails_costs_no_picture(form: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, layers = one_layer()
    x, failures = torch.randn(2, 4, 6), Failures()
    expected = sum_of(layer, layers, x)

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("the kernel is not there")

    monkeypatch.setattr(KLItem, "criterion", broken)
    given = layers if form == "low rank" else as_dense(layers)
    with torch.set_grad_enabled(grad), Fusion(given, strategy("kl"), failed=failures) as fusion:
        fusion.rows = CFG
        for step in range(3):
            fusion.at(step, 3)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert [(name, str(error)) for name, error in failures.told] == [("mid.to_q", "the kernel is not there")]
    with torch.no_grad(), Fusion(given, strategy("kl")), pytest.raises(RuntimeError, match="the kernel is not there"):
        layer(x)


@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_half_of_a_failed_addition_is_taken_back(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, layers = one_layer()
    x, failures = torch.randn(2, 4, 6), Failures()
    expected = sum_of(layer, layers, x)
    given = layers if form == "low rank" else as_dense(layers)
    kinds = {
        type(part.at_work(layer, x, torch.empty(2, 4, 8), 2)) for part in Fusion(given, strategy("kl"))._layers[0].parts
    }
    (kind,) = kinds
    whole = kind.add
    calls = []

    def half(self: Work, selection: Any) -> None:
        calls.append(selection)
        if len(calls) > 1:
            return whole(self, selection)
        self.tokens.add_(17.0)
        raise RuntimeError("out of something")

    monkeypatch.setattr(kind, "add", half)
    with torch.no_grad(), Fusion(given, strategy("kl"), failed=failures):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert failures.layers == ["mid.to_q"]


def test_where_not_even_both_can_be_added_the_layer_is_left_alone() -> None:
    layer, failures, x = nn.Linear(4, 4), Failures(), torch.randn(1, 2, 4)
    layers: Layers = {"l": (layer, {role: Dense(torch.zeros(4, 5)) for role in BOTH})}
    with torch.no_grad():
        plain = layer(x)
        with Fusion(layers, strategy("kl"), failed=failures):
            for _ in range(2):
                assert torch.equal(layer(x), plain)
    assert failures.layers == ["l"]


def test_a_layer_that_gives_no_tensor_is_left_alone() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
            return super().forward(x), 7

    layer, failures = Two(6, 8), Failures()
    generator = torch.Generator().manual_seed(1)
    layers: Layers = {"l": (layer, {role: random_lora(layer, 2, 0.3, generator) for role in BOTH})}
    with torch.no_grad(), Fusion(layers, strategy("kl"), failed=failures):
        found, seven = layer(torch.randn(2, 4, 6))
    assert (found.shape, seven) == ((2, 4, 8), 7)
    assert failures.layers == ["l"]


def test_no_memory_for_the_rule_is_memory_enough_for_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, layers = one_layer()
    x, failures = torch.randn(2, 4, 6), Failures()

    def hungry(*_: Any, **__: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(KLItem, "criterion", hungry)
    with torch.no_grad(), Fusion(layers, strategy("kl"), failed=failures):
        torch.testing.assert_close(layer(x), sum_of(layer, layers, x), rtol=1e-5, atol=1e-6)
    assert failures.layers == ["mid.to_q"]


def test_an_interrupt_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, layers = one_layer()

    def stopped(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(KLItem, "criterion", stopped)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), Fusion(layers, strategy("kl"), failed=Failures()):
        layer(torch.randn(2, 4, 6))


# Entering, leaving, threads.


def test_entering_twice_is_refused_and_leaves_nothing_behind() -> None:
    model, x = Toy(), inputs()
    before = model(*x)
    fusion = Fusion(toy_layers(model), strategy("kl"))
    with fusion:
        once = model(*x)
        with pytest.raises(RuntimeError, match="entered already"), fusion:
            pass
        assert torch.equal(model(*x), once)
    assert torch.equal(model(*x), before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", sorted(strategies()))
def test_a_closed_fusion_starts_afresh(name: str) -> None:
    model, (image, time) = Toy(), inputs()
    fusion = Fusion(toy_layers(model), strategy(name, **parameters_of(name, STATEFUL)))
    rounds: list[list[Tensor]] = []
    with torch.no_grad():
        for _ in range(2):
            rounds.append([])
            with fusion:
                fusion.rows = CFG
                for step in range(4):
                    fusion.at(step, 4)
                    rounds[-1].append(model(image * (1 + step), time))
    for first, second in zip(*rounds, strict=True):
        assert torch.equal(first, second)


def test_two_threads_in_one_pass_are_refused() -> None:
    first, second = nn.Linear(6, 8), nn.Linear(6, 8)
    generator = torch.Generator().manual_seed(1)
    layers: Layers = {
        name: (one, {role: random_lora(one, 2, 0.3, generator) for role in BOTH})
        for name, one in (("a", first), ("b", second))
    }
    raised: list[Exception] = []

    def other() -> None:
        try:
            with torch.no_grad():
                second(torch.randn(2, 4, 6))
        except Exception as error:
            raised.append(error)

    with torch.no_grad(), Fusion(layers, strategy("kl")) as fusion:
        first(torch.randn(2, 4, 6))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert [str(error) for error in raised] == [
            "layer b: two threads run the fused model at once; let one wait, or give each its own"
        ]
        # One after the other they may.
        fusion.at(1, 2)
        raised.clear()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not raised


# Layers that are never called.


def test_layers_that_no_pass_reached_are_known() -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    with torch.no_grad(), Fusion(layers, strategy("kl")) as fusion:
        assert fusion.unreached == list(layers)
        model.time(x[1])
        assert fusion.unreached == ["conv", "down", "to_q", "out"]
        model(*x)
        assert fusion.unreached == []


def test_paused_passes_reach_nothing() -> None:
    model, x = Toy(), inputs()
    with torch.no_grad(), Fusion(toy_layers(model), strategy("kl")) as fusion:
        fusion.paused = True
        model(*x)
        assert len(fusion.unreached) == 5


# Strengths of 0, and prompts that change in length.


def scaled(delta: LowRank, strength: float, moving: bool) -> Any:
    from lib_dynfuse.core.delta import Scaled

    return Scaled((lambda: strength) if moving else strength, delta)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("silent", BOTH)
@pytest.mark.parametrize("form", ["low rank", "dense"])
@pytest.mark.parametrize("name", sorted(strategies()))
def test_strength_0_plays_nothing_and_leaves_the_other_as_it_is(
    name: str, form: str, silent: Role, moving: bool
) -> None:
    model, x = Toy(), inputs()
    plain = toy_layers(model) if form == "low rank" else as_dense(toy_layers(model))
    alone = {key: (module, {role: d for role, d in deltas.items() if role is not silent})
             for key, (module, deltas) in plain.items()}  # fmt: skip
    both = {key: (module, {**deltas, silent: scaled(deltas[silent], 0.0, moving)})
            for key, (module, deltas) in plain.items()}  # fmt: skip
    given = parameters_of(name, STATEFUL)
    log = Log()

    def run(layers: Any, log: Log) -> list[Tensor]:
        with torch.no_grad(), Fusion(layers, strategy(name, **given), log) as fusion:
            found = []
            for step in range(3):
                fusion.at(step, 3)
                fusion.rows = CFG
                found.append(model(*x))
        return found

    for found, expected in zip(run(both, log), run(alone, Log()), strict=True):
        assert torch.equal(found, expected)
    assert not log.calls, "there was nothing to choose"


@pytest.mark.parametrize("moving", [False, True])
def test_both_at_strength_0_are_the_plain_model_even_where_a_factor_overflows(moving: bool) -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 5, 6)
    broken = LowRank(torch.full((2, 6), float("inf")), torch.ones(8, 2))
    layers: Any = {"a": (layer, {role: scaled(broken, 0.0, moving) for role in BOTH})}
    with torch.no_grad():
        plain = layer(x)
        for name in strategies():
            assert torch.equal(fused(layer, layers, name, [x]), plain)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("form", ["low rank", "dense"])
@pytest.mark.parametrize("name", sorted(strategies()))
def test_one_of_several_networks_at_strength_0_plays_nothing(name: str, form: str, moving: bool) -> None:
    from lib_dynfuse.core.delta import Sum

    model, x = Toy(), inputs()
    plain = toy_layers(model) if form == "low rank" else as_dense(toy_layers(model))
    more = toy_layers(model, 3.0, 3.0, (4, 4))
    both = {
        key: (module, {role: Sum(delta, scaled(more[key][1][role], 0.0, moving)) for role, delta in deltas.items()})
        for key, (module, deltas) in plain.items()
    }
    if name == "np" and moving:
        return  # its basis is of all networks that may come to play
    found, expected = (fused(model, layers, name, x) for layers in (both, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_strength_that_moves_away_from_0_is_played_again() -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 5, 6)
    generator = torch.Generator().manual_seed(3)
    from lib_dynfuse.core.delta import Scaled, Sum

    first, second = (random_lora(layer, 2, 0.3, generator) for _ in range(2))
    now = [0.0]
    layers: Any = {"a": (layer, {Role.STYLE: Sum(first, Scaled(lambda: now[0], second))})}
    with torch.no_grad(), Fusion(layers, strategy("kl")):
        for now[0] in (0.0, 0.5, 0.0, 1.0):
            base = nn.functional.linear(x, layer.weight, layer.bias)
            expected = base + first(x, base) + now[0] * second(x, base)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "kl-cfg", "kl-soft", "kl-token", "js", "cosine"])
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_a_prompt_may_change_in_length_while_choices_are_kept(name: str, form: str) -> None:
    layer, layers = one_layer()
    given = layers if form == "low rank" else as_dense(layers)
    lengths = (7, 14, 14, 7, 7, 21)
    chosen = strategy(name, decide_every=6, couple_cfg=True)
    with torch.no_grad(), Fusion(given, chosen) as fusion:
        for step, tokens in enumerate(lengths):
            fusion.at(step, len(lengths))
            fusion.rows = CFG
            x = torch.randn(2, tokens, 6)
            assert layer(x).shape == (2, tokens, 8)


def test_with_as_many_tokens_a_choice_per_token_is_kept() -> None:
    layer, layers = one_layer()
    log = Log()
    with torch.no_grad(), Fusion(layers, strategy("kl-token", decide_every=6), log) as fusion:
        for step, tokens in enumerate((7, 14, 14)):
            fusion.at(step, 6)
            layer(torch.randn(2, tokens, 6))
    kept = [subject for _, subject, *_ in log.calls]
    assert kept[1].shape == (2, 14)
    assert kept[2] is kept[1]
