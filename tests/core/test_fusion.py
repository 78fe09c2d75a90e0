"""Fusion on a small model: what is added where, for whom, and that everything is given back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Layers, Toy, as_dense, inputs, merged, random_lora, toy_layers

from lib_dynfuse.core import Fusion, Role, Row, strategies, strategy
from lib_dynfuse.core.delta import Affine, Dense, Geometry, LowRank, Norm, OutputScale, Rows, Scaled, Sum
from lib_dynfuse.core.divergence import kl_divergence
from lib_dynfuse.core.layer import sample_index

BOTH = (Role.SUBJECT, Role.STYLE)
CFG = [Row(0, cond=False, seed=5), Row(0, cond=True, seed=5)]


def fused(model: nn.Module, layers: Layers, name: str, x: Sequence[Tensor], **parameters: Any) -> Tensor:
    with torch.no_grad(), Fusion(layers, strategy(name, **parameters)):
        result: Tensor = model(*x)
    return result


class Log:
    """A trace that keeps what it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.passes: list[tuple[int, float, tuple[Row, ...]]] = []
        self.calls: list[tuple[int, Any, Any, Tensor | None, Tensor | None]] = []

    def attach(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def begin(self, step: int, progress: float, rows: Sequence[Row]) -> None:
        self.passes.append((step, progress, tuple(rows)))

    def add(self, layer: int, subject: Any, style: Any, d_subject: Tensor | None, d_style: Tensor | None) -> None:
        self.calls.append((layer, subject, style, d_subject, d_style))


# What is added.


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


def test_rows_that_do_not_exist_are_named_with_the_layer() -> None:
    layer = nn.Linear(8, 6)
    delta = Rows(random_lora(nn.Linear(8, 4), 2, 0.3, torch.Generator()), 4, 8)
    with pytest.raises(ValueError, match=r"layer mid\.qkv: rows 4 to 8 of a layer that has 6"):
        fused(layer, {"mid.qkv": (layer, {Role.STYLE: delta})}, "kl", [torch.randn(1, 2, 8)])


# Promises.


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


# Steps, windows, traces.


def test_outside_the_window_both_are_added() -> None:
    model, x = Toy(), inputs()
    layers = toy_layers(model)
    both = fused(model, layers, "sum", x)
    with torch.no_grad(), Fusion(layers, strategy("kl"), window=(0.4, 0.6)) as fusion:
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
