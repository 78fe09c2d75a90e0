"""The registry of fusion rules, and every rule that does not look at the input against its equation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DIVERGENCE_RULES, choices, low_rank, moment, never, pairs
from torch import Tensor, nn

from lib_dynfuse.core import Fusion, Role, Row, strategies, strategy
from lib_dynfuse.core.delta import Dense, OutputScale
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.rules import Pair, Rule

NAMES = [
    "sum",
    "sum-cfg",
    "kl",
    "kl-cfg",
    "kl-soft",
    "kl-token",
    "js",
    "cosine",
    "klora",
    "est",
    "np",
    "switch",
    "blocks",
    "random",
]


def test_the_registry_has_every_rule_of_the_method() -> None:
    assert list(strategies()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_says_what_it_is_where_it_comes_from_and_what_may_be_set(name: str) -> None:
    info = strategies()[name]
    assert info.name == name
    assert info.help.endswith((".", ")."))
    assert info.source
    for parameter in info.parameters:
        assert parameter.help.endswith((".", ";"))
        parameter.check(name, parameter.default)
        if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
            assert parameter.minimum is not None
            assert parameter.maximum is not None
            assert parameter.minimum <= parameter.default <= parameter.maximum


def test_the_parameters_that_divergence_rules_share() -> None:
    shared = {"balance", "auto_balance", "schedule", "couple_cfg", "temperature"}
    for name in DIVERGENCE_RULES:
        assert shared <= {parameter.name for parameter in strategies()[name].parameters}


def test_an_unknown_rule_is_refused_with_the_list_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown strategy 'klorra' \(did you mean 'klora'\?\); there are: sum, sum-cfg, kl"
    ):
        strategy("klorra")


def test_an_unknown_parameter_is_refused_with_the_list_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'kl' has no parameter 'balanc' \(did you mean 'balance'\?\); it has: bal"):
        strategy("kl", balanc=0.5)
    with pytest.raises(ValueError, match="'sum' has no parameter 'balance'; it has: none"):
        strategy("sum", balance=0.5)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("kl", {"balance": 1.5}, r"balance must be a number from -1\.0 to 1\.0, not 1\.5"),
        ("kl", {"balance": "loud"}, "balance must be a number"),
        ("kl", {"balance": True}, "balance must be a number"),
        ("kl", {"balance": float("nan")}, "balance must be a number"),
        ("kl", {"auto_balance": 1}, "auto_balance must be true or false"),
        ("kl", {"sample_tokens": 2.5}, "sample_tokens must be a whole number from 0 to 4096"),
        ("klora", {"pattern": "t"}, r"pattern must be one of s, s\*, not 't'"),
        ("switch", {"every": 0}, "every must be a whole number from 1 to 1000"),
    ],
)
def test_a_value_that_is_not_allowed_names_the_parameter_and_the_range(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"strategy '{name}': {message}"):
        strategy(name, **parameters)


def test_strategies_are_values() -> None:
    assert strategy("kl", balance=0.5) == strategy("kl", balance=0.5)
    assert strategy("kl", balance=0.5) != strategy("kl")
    assert strategy("switch", every=2.0).every == 2  # type: ignore[attr-defined]


# Rules that do not look at the input.


@pytest.mark.parametrize("name", ["sum", "klora", "est", "np", "switch", "blocks"])
def test_input_independent_rules_never_look_and_decide_once_per_step(name: str) -> None:
    rule = strategy(name).start(pairs([(1.0, 1.0)] * 3))
    now = moment(2)
    rule.begin(now)
    row = [rule.select(layer, now, never) for layer in range(3)]
    rule.begin(now)
    assert all(rule.select(layer, now, never) is row[layer] for layer in range(3)), "tabulated, not computed again"


def klora_reference(sizes: list[tuple[float, float]], progress: float, alpha: float, beta: float, wrap: bool) -> str:
    scores = []
    for subject, style in sizes:
        dense = [low_rank(1, subject).dense(), low_rank(2, style).dense()]
        flat = [weight.double().abs().flatten() for weight in dense if weight is not None]
        top = [float(one.sort(descending=True).values[:4].sum()) for one in flat]
        scores.append((*top, float(flat[0].sum() / flat[1].sum())))
    mean = sum(ratio for *_, ratio in scores) / len(scores)
    kept = [ratio for *_, ratio in scores if ratio < 3 * mean]
    gamma = sum(kept) / len(kept)
    gain = alpha * progress + beta
    gain = gain % alpha if wrap else gain
    return "".join("c" if (s_c / gamma) / (s_s * gain) > 1 else "s" for s_c, s_s, _ in scores)


@pytest.mark.parametrize(("pattern", "beta"), [("s", 0.5), ("s*", 1.275)])
def test_klora_is_its_equation(pattern: str, beta: float) -> None:
    # One layer is far louder than the rest: it must be left out of gamma.
    sizes = [(1.0, 1.0), (1.3, 1.0), (0.7, 1.0), (1.0, 1.6), (40.0, 1.0)]
    rule = strategy("klora", pattern=pattern, beta=beta).start(pairs(sizes))
    found = [choices(rule, 5, moment(step)) for step in range(10)]
    assert found == [klora_reference(sizes, step / 9, 1.5, beta, pattern == "s*") for step in range(10)]
    assert len(set(found)) > 2, "the test needs layers that change hands"


def test_klora_adds_both_where_a_delta_has_no_weight_of_its_own() -> None:
    odd = Pair("odd", OutputScale(torch.ones(5)), low_rank(2))
    assert choices(strategy("klora").start([odd, *pairs([(9.0, 1.0)])]), 2, moment()) == "+c"


def test_est_is_its_equation() -> None:
    sizes = [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0)]
    energies = []
    for pair in pairs(sizes):
        dense = [delta.dense() for delta in (pair.subject, pair.style)]
        energies.append(tuple(float(weight.double().square().sum()) for weight in dense if weight is not None))
    gamma = sum(c for c, _ in energies) / sum(s for _, s in energies)
    rule = strategy("est").start(pairs(sizes))
    for step in range(10):
        gain = 1.5 * step / 9 + 0.5
        expected = "".join("c" if c >= gain * s * gamma else "s" for c, s in energies)
        assert choices(rule, 3, moment(step)) == expected


def test_np_takes_the_styles_row_space_out_of_the_subject() -> None:
    subject, style = low_rank(1), low_rank(2)
    layer, x = nn.Linear(6, 5), torch.randn(3, 4, 6)
    with torch.no_grad(), Fusion({"l": (layer, {Role.SUBJECT: subject, Role.STYLE: style})}, strategy("np", mu=0.5)):
        found = layer(x)
    q = torch.linalg.qr(style.down.double().T).Q
    kappa = 0.5 / 1.5
    seen = x.double() - kappa * x.double() @ q @ q.T
    weight_c, weight_s = ((one.up.double() @ one.down.double()) for one in (subject, style))
    with torch.no_grad():
        expected = layer(x).double() + x.double() @ weight_s.T + seen @ weight_c.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_np_with_mu_zero_is_the_sum() -> None:
    pair = pairs([(1.0, 1.0)])[0]
    assert strategy("np", mu=0.0).prepare(pair) is pair


def test_sum_cfg_gives_the_negative_prompts_half_less_of_the_style() -> None:
    rule = strategy("sum-cfg", subject=1.25, style=0.75, negative=0.5).start(pairs([(1.0, 1.0)] * 2))
    for rows in ([Row(0, False), Row(0, True), Row(1, True)], [Row(1, True), Row(1, False)]):
        rule.begin(moment(rows=rows))
        for layer in range(2):
            found = rule.select(layer, moment(rows=rows), never)
            assert torch.as_tensor(found.subject).tolist() == [1.25] * len(rows)
            assert torch.as_tensor(found.style).tolist() == [0.75 if row.cond else 0.375 for row in rows]


def test_sum_cfg_sends_its_weights_to_the_device_once_for_a_batch() -> None:
    rule = strategy("sum-cfg").start(pairs([(1.0, 1.0)]))
    found = []
    for step in range(3):
        rule.begin(moment(step))
        found.append(rule.select(0, moment(step), never).style)
    assert found[0] is found[1] is found[2]


def test_sum_cfg_with_neutral_weights_is_the_sum() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 4, 6)
    layers = {"l": (layer, {Role.SUBJECT: Dense(torch.randn(5, 6)), Role.STYLE: Dense(torch.randn(5, 6))})}
    rows = [Row(0, False), Row(0, True), Row(1, True)]
    made = []
    for rule in (strategy("sum"), strategy("sum-cfg", subject=1.0, style=1.0, negative=1.0)):
        with torch.no_grad(), Fusion(layers, rule) as fusion:
            fusion.rows = rows
            made.append(layer(x))
    torch.testing.assert_close(made[0], made[1])


def test_switch_takes_turns_subject_first() -> None:
    rule = strategy("switch", every=2).start(pairs([(1.0, 1.0)]))
    assert "".join(choices(rule, 1, moment(step)) for step in range(8)) == "ccssccss"


def test_blocks_on_sdxl_is_b_lora() -> None:
    names = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "up_blocks.0.attentions.0.transformer_blocks.9.attn1.to_q",
        "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ]
    assert choices(strategy("blocks").start(pairs([(1.0, 1.0)] * 5, names)), 5, moment()) == "-cs--"
    ldm = [
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "output_blocks.0.1.transformer_blocks.9.attn1.to_q",
        "output_blocks.1.1.transformer_blocks.0.ff.net.2",
        "output_blocks.2.1.transformer_blocks.0.attn1.to_q",
        "output_blocks.10.1.transformer_blocks.0.attn1.to_q",
    ]
    assert choices(strategy("blocks").start(pairs([(1.0, 1.0)] * 5, ldm)), 5, moment()) == "-cs--"


def test_blocks_elsewhere_gives_the_style_the_second_half_of_the_decoder() -> None:
    names = ["down_blocks.0.x", "mid_block.x", "up_blocks.1.x", "up_blocks.2.x", "up_blocks.3.x"]
    assert choices(strategy("blocks").start(pairs([(1.0, 1.0)] * 5, names)), 5, moment()) == "cccss"
    assert choices(strategy("blocks", preset="sdxl").start(pairs([(1.0, 1.0)] * 5, names)), 5, moment()) == "-----"


def coins(rule: Rule, layers: int, now: Moment) -> Tensor:
    rule.begin(now)
    return torch.stack([torch.as_tensor(rule.select(layer, now, never).subject) for layer in range(layers)])


def test_random_is_a_fair_coin_per_layer_step_and_item() -> None:
    layers, rows = 200, [Row(image, cond, seed=image) for image in range(4) for cond in (False, True)]
    rule = strategy("random").start(pairs([(1.0, 1.0)] * layers))
    tossed = torch.stack([coins(rule, layers, moment(step, rows=rows)) for step in range(10)]).float()
    share = float(tossed.mean())
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / tossed.numel())
    for dim in range(3):
        assert float(tossed.std(dim).mean()) > 0.4, "varies over steps, layers and items"


def test_random_follows_the_pictures_seed_alone() -> None:
    rule = strategy("random").start(pairs([(1.0, 1.0)] * 64))
    alone = coins(rule, 64, moment(3, rows=[Row(0, True, seed=42)]))
    among = coins(rule, 64, moment(3, rows=[Row(0, True, seed=7), Row(1, False, seed=42), Row(1, True, seed=42)]))
    assert torch.equal(among[:, 2], alone[:, 0])
    assert not torch.equal(among[:, 0], alone[:, 0])
    coupled = coins(strategy("random", couple_cfg=True).start(pairs([(1.0, 1.0)] * 64)), 64, moment(3, rows=[
        Row(0, False, seed=42), Row(0, True, seed=42)
    ]))  # fmt: skip
    assert torch.equal(coupled[:, 0], coupled[:, 1])


def test_a_dense_rule_knows_the_rank_of_a_weight_without_one() -> None:
    full = Pair("full", Dense(torch.randn(5, 6)), low_rank(2))
    assert choices(strategy("klora").start([full]), 1, moment()) in "cs"
