"""What Fusion promises: everything is given back, pictures do not depend on batches, nothing waits or grows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import BOTH, CFG, Layers, Log, Toy, as_dense, fused, inputs, merged, random_lora, toy_layers

from lib_dynfuse.core import Fusion, Role, Row, strategies, strategy
from lib_dynfuse.core.delta import LowRank, Rows, Sum
from lib_dynfuse.core.divergence import kl_divergence


def test_on_exit_the_model_is_bit_for_bit_what_it_was_and_no_hook_is_left() -> None:
    model, x = Toy(), inputs()
    before, state = model(*x), copy.deepcopy(model.state_dict())
    fused(model, toy_layers(model), "kl", x)
    assert torch.equal(model(*x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_exception_in_mid_pass_leaves_nothing_behind() -> None:
    model, x = Toy(), inputs()
    before = model(*x)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.to_q.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), Fusion(toy_layers(model), strategy("kl")):
        model(*x)
    handle.remove()
    assert torch.equal(model(*x), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_closing_twice_is_harmless_and_a_fusion_may_be_entered_again() -> None:
    model, x = Toy(), inputs()
    fusion = Fusion(toy_layers(model), strategy("kl"))
    results = []
    with torch.no_grad():
        for _ in range(2):
            with fusion:
                results.append(model(*x))
            fusion.close()
    assert torch.equal(*results)


@pytest.mark.parametrize("name", sorted(strategies()))
@pytest.mark.parametrize("extra", [{}, {"auto_balance": True, "couple_cfg": True}])
def test_an_image_does_not_depend_on_what_else_is_in_its_batch(name: str, extra: dict[str, Any]) -> None:
    known = {parameter.name for parameter in strategies()[name].parameters}
    parameters = {key: value for key, value in extra.items() if key in known}
    model = Toy()
    layers = toy_layers(model)
    image, time = inputs(6)
    rows = [Row(i % 3, cond=i >= 3, seed=i % 3) for i in range(6)]

    def run(picked: Sequence[int]) -> list[Tensor]:
        seen = []
        with torch.no_grad(), Fusion(layers, strategy(name, **parameters)) as fusion:
            fusion.rows = [rows[i] for i in picked]
            for step in range(3):
                fusion.at(step, 3)
                seen.append(model(image[list(picked)], time[list(picked)]))
        return seen

    together = run(range(6))
    for one in range(3):
        alone = run([one, one + 3])
        for step in range(3):
            torch.testing.assert_close(together[step][[one, one + 3]], alone[step], rtol=1e-4, atol=1e-5)


def test_tiles_of_a_picture_are_one_item() -> None:
    layer, tiles = nn.Linear(8, 8), torch.randn(4, 5, 8)
    generator = torch.Generator().manual_seed(12)
    deltas = {role: random_lora(layer, 2, 0.1, generator) for role in BOTH}
    log = Log()
    with torch.no_grad(), Fusion({"l": (layer, dict(deltas))}, strategy("kl"), log) as fusion:
        fusion.rows = CFG
        layer(tiles)
    subject = log.calls[0][1]
    with torch.no_grad():
        base = layer(tiles)
        d = [kl_divergence(base, deltas[role](tiles, base)).view(2, -1).mean(1) for role in BOTH]
    assert subject.tolist() == (d[0] >= d[1]).tolist()


@pytest.mark.parametrize("name", ["kl", "kl-token", "np", "sum"])
def test_gradients_reach_the_input_through_a_fused_model(name: str) -> None:
    model = Toy().double()
    layers = toy_layers(model)
    image, time = (x.double().requires_grad_() for x in inputs())
    with Fusion(layers, strategy(name)):
        (gradient,) = torch.autograd.grad(model(image, time).square().sum(), image)
        direction = torch.randn_like(image)
        step = 1e-6
        with torch.no_grad():
            ahead, behind = (model(image + sign * step * direction, time).square().sum() for sign in (1, -1))
    numeric = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-6)


def test_runs_in_inference_mode_on_inference_tensors() -> None:
    with torch.inference_mode():
        model = Toy()
        layers = toy_layers(model)
        expected = merged(model, layers, BOTH)(*inputs())
        with Fusion(layers, strategy("sum")):
            torch.testing.assert_close(model(*inputs()), expected, rtol=1e-5, atol=1e-6)


class Forbidden(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on whatever would wait for a device: reading a tensor's values on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or "nonzero" in str(func):
            raise AssertionError(f"{func} reads a device's values")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(strategies()))
def test_nothing_in_the_loop_reads_a_devices_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU path may look at its own memory; what a GPU would run is the other one.
    monkeypatch.setattr("lib_dynfuse.core.devices.readable", lambda device: False)
    model, x = Toy(), inputs()
    known = {parameter.name for parameter in strategies()[name].parameters}
    extra = {k: v for k, v in {"auto_balance": True, "couple_cfg": True, "sample_tokens": 4}.items() if k in known}
    with torch.no_grad(), Fusion(toy_layers(model), strategy(name, **extra)) as fusion:
        fusion.rows = CFG
        for step in range(2):
            fusion.at(step, 2)
            with Forbidden():
                model(*x)


@pytest.mark.parametrize("extra", [{}, {"sample_tokens": 4}])
def test_the_paths_with_and_without_reading_the_choice_make_the_same_picture(
    extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Toy(), inputs(6)
    layers = toy_layers(model)
    with_reading = fused(model, layers, "kl", x, **extra)
    monkeypatch.setattr("lib_dynfuse.core.devices.readable", lambda device: False)
    torch.testing.assert_close(fused(model, layers, "kl", x, **extra), with_reading, rtol=1e-5, atol=1e-6)


def test_low_rank_deltas_are_never_made_dense() -> None:
    layer, x = nn.Linear(96, 80), torch.randn(1, 3, 96)
    generator = torch.Generator().manual_seed(3)
    layers: Layers = {"l": (layer, {role: random_lora(layer, 2, 0.1, generator) for role in BOTH})}
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    for name in ("sum", "kl", "kl-soft", "kl-token", "np", "random", "switch"):
        with torch.no_grad(), Fusion(layers, strategy(name)) as fusion:
            fusion.rows = [Row(0)]
            layer(x)
            made.clear()
            with Sizes():
                layer(x)
        # The layer itself transposes its weight; nothing else is as large.
        assert sorted(made)[-2] < 96 * 80, name


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_a_role_that_is_not_chosen_cannot_spoil_the_picture(
    form: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_dynfuse.core.devices.readable", lambda device: readable)
    layer = nn.Linear(6, 8)
    broken = LowRank(torch.full((2, 6), float("inf")), torch.ones(8, 2))
    layers: Layers = {"a": (layer, {Role.SUBJECT: broken, Role.STYLE: random_lora(layer, 2, 0.1, torch.Generator())})}
    found = fused(layer, layers if form == "low rank" else as_dense(layers), "kl", [torch.randn(2, 5, 6)])
    assert bool(found.isfinite().all())


def test_a_layer_may_be_called_by_keyword() -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 5, 6)
    layers: Layers = {"a": (layer, {Role.STYLE: random_lora(layer, 2, 0.1, torch.Generator())})}
    with torch.no_grad(), Fusion(layers, strategy("kl")):
        assert torch.equal(layer(input=x), layer(x))


# Halves in separate calls, silent layers, weak networks.


def decisions(log: Log) -> list[Tensor]:
    return [torch.as_tensor(subject) for _, subject, *_ in log.calls]


@pytest.mark.parametrize("seed", range(6))
def test_cond_decides_for_uncond_when_every_row_has_its_own_call(seed: int) -> None:
    torch.manual_seed(seed)
    layer, log = nn.Linear(16, 16), Log()
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = {"a": (layer, {role: random_lora(layer, 2, 0.3, generator) for role in BOTH})}
    with torch.no_grad(), Fusion(layers, strategy("kl", couple_cfg=True), log) as fusion:
        for cond in (True, False):
            for image in (0, 1):
                fusion.rows = [Row(image, cond)]
                layer(torch.randn(1, 5, 16))
    picks = [bool(one) for one in decisions(log)]
    assert picks[2:] == picks[:2]


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("name", ["kl", "kl-token", "kl-soft"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [3, 0, 1, 2]])
@pytest.mark.parametrize("sampled", [0, 3])
def test_coupled_rows_may_stand_in_any_order(
    order: list[int], name: str, sampled: int, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_dynfuse.core.devices.readable", lambda device: readable)
    model = Toy()
    layers = toy_layers(model)
    image, time = inputs(4)
    rows = [Row(0, False), Row(1, False), Row(0, True), Row(1, True)]
    parameters = {"sample_tokens": sampled} if sampled and name != "kl-token" else {}

    def run(order: list[int]) -> Tensor:
        with torch.no_grad(), Fusion(layers, strategy(name, couple_cfg=True, **parameters)) as fusion:
            fusion.rows = [rows[i] for i in order]
            found = model(image[order], time[order])
        result = torch.empty_like(found)
        result[order] = found
        return result

    torch.testing.assert_close(run(order), run([0, 1, 2, 3]), rtol=1e-4, atol=1e-5)


def test_decide_every_holds_when_the_halves_run_apart() -> None:
    layer, log = nn.Linear(16, 16), Log()
    layers: Layers = {"a": (layer, {role: random_lora(layer, 2, 0.3, torch.Generator()) for role in BOTH})}
    with torch.no_grad(), Fusion(layers, strategy("kl", decide_every=5), log) as fusion:
        for step in range(5):
            fusion.at(step, 5)
            for cond in (False, True):
                fusion.rows = [Row(0, cond)]
                layer(torch.randn(1, 5, 16))
    assert len({id(d_subject) for *_, d_subject, _ in log.calls}) == 2


@pytest.mark.parametrize("batches", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 1], [0, 2]]])
def test_auto_balance_does_not_depend_on_how_rows_are_batched(batches: list[list[int]]) -> None:
    layers_ = [nn.Linear(16, 16) for _ in range(6)]
    generator = torch.Generator().manual_seed(1)
    layers: Layers = {
        str(i): (layer, {role: random_lora(layer, 2, 0.3, generator) for role in BOTH})
        for i, layer in enumerate(layers_)
    }
    rows = [Row(image, cond) for cond in (False, True) for image in (0, 1)]
    x = torch.randn(3, 6, 4, 5, 16)

    def run(batches: list[list[int]]) -> Tensor:
        out = torch.empty(3, 6, 4, 5, 16)
        with torch.no_grad(), Fusion(layers, strategy("kl", auto_balance=True)) as fusion:
            for step in range(3):
                fusion.at(step, 3)
                for batch in batches:
                    fusion.rows = [rows[i] for i in batch]
                    for i, layer in enumerate(layers_):
                        out[step, i, batch] = layer(x[step, i, batch])
        return out

    torch.testing.assert_close(run(batches), run([[0, 1, 2, 3]]), rtol=1e-5, atol=1e-6)


def share_of_style(silent: bool) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    log, layers = Log(), {}
    for index in range(30):
        layer = nn.Linear(16, 16)
        deltas = {role: random_lora(layer, 2, 0.3, generator) for role in BOTH}
        if silent and index == 0:
            deltas[Role.STYLE] = LowRank(deltas[Role.STYLE].down, torch.zeros(16, 2))
        layers[str(index)] = (layer, dict(deltas))
    with torch.no_grad(), Fusion(layers, strategy("kl", auto_balance=True), log) as fusion:
        for step in range(4):
            fusion.at(step, 4)
            for layer, _ in layers.values():
                layer(torch.randn(4, 20, 16))
    picks = torch.stack([one.float() for (index, *_), one in zip(log.calls, decisions(log), strict=True) if index])
    return 1 - float(picks.mean())


def test_auto_balance_ignores_a_layer_on_which_a_role_says_nothing() -> None:
    assert abs(share_of_style(silent=True) - share_of_style(silent=False)) < 0.15


def test_weak_networks_are_compared_by_size_and_not_by_rounding() -> None:
    right = 0
    for trial in range(20):
        torch.manual_seed(trial)
        layer, log, x = nn.Linear(320, 320), Log(), torch.randn(1, 64, 320)
        with torch.no_grad():
            weak = LowRank(torch.randn(2, 320), torch.randn(320, 2))
            size = float(layer(x).std()) * 1e-4 / float((x @ weak.down.T @ weak.up.T).std())
            louder = LowRank(weak.down, weak.up * size * 4 / 3)
            rival = LowRank(weak.down, weak.up.flip(0) * size)
            with Fusion({"a": (layer, {Role.SUBJECT: louder, Role.STYLE: rival})}, strategy("kl"), log):
                layer(x)
        right += bool(decisions(log)[0])
    assert right >= 19


def test_a_part_may_reach_the_last_row_beside_a_network_of_the_whole_layer() -> None:
    layer, log = nn.Linear(4, 8), Log()
    generator = torch.Generator().manual_seed(3)
    whole = [random_lora(layer, 2, 0.3, generator) for _ in range(2)]
    part = random_lora(nn.Linear(4, 4), 2, 0.3, generator)
    deltas = {Role.SUBJECT: Sum(whole[0], Rows(part, 4, 8)), Role.STYLE: whole[1]}
    with torch.no_grad(), Fusion({"a": (layer, dict(deltas))}, strategy("kl"), log):
        layer(torch.randn(2, 3, 4))
    assert log.names == ["a[0:4]", "a[4:8]"]


def test_what_was_prepared_in_inference_mode_serves_gradients_later() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 37, 8)
    deltas = {role: random_lora(layer, 2, 0.3, torch.Generator().manual_seed(1)) for role in BOTH}
    for mode in (True, False):
        with torch.inference_mode(mode), Fusion({"l": (layer, dict(deltas))}, strategy("kl", sample_tokens=5)):
            found = layer(x.clone().requires_grad_(not mode))
    found.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("name", sorted(strategies()))
def test_a_run_in_inference_mode_leaves_nothing_that_one_outside_it_may_not_change(name: str) -> None:
    model = Toy()
    with torch.no_grad(), Fusion(toy_layers(model), strategy(name)):
        expected = [model(*inputs()) for _ in range(3)]
    with Fusion(toy_layers(model), strategy(name)) as fusion:
        for again, mode in zip(expected, (True, False, True), strict=True):
            fusion.at(0, 3)
            with torch.inference_mode(mode):
                torch.testing.assert_close(model(*inputs()), again)


def test_the_running_mean_may_be_kept_in_inference_mode_and_out_of_it() -> None:
    model = Toy()
    with Fusion(toy_layers(model), strategy("kl", auto_balance=True)) as fusion:
        for step, mode in enumerate((True, False, True)):
            fusion.at(step, 3)
            with torch.inference_mode(mode):
                assert model(*inputs()).isfinite().all()
