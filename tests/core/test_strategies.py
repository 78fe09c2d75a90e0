"""Every fusion rule against its equation, and the parameters that all divergence rules share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_dynfuse.core import Fusion, Role, Row, strategies, strategy
from lib_dynfuse.core.delta import Dense, LowRank, OutputScale
from lib_dynfuse.core.divergence import kl_divergence
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.rules import Features, Pair, Rule, Selection

CPU = torch.device("cpu")
DIVERGENCE_RULES = ["kl", "kl-soft", "kl-token", "js", "cosine"]
NAMES = ["sum", "kl", "kl-soft", "kl-token", "js", "cosine", "klora", "est", "np", "switch", "blocks", "random"]


def low_rank(seed: int, size: float = 1.0, rank: int = 2, inputs: int = 6, outputs: int = 5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    return LowRank(down, torch.randn(outputs, rank, generator=generator) * size)


def pairs(sizes: list[tuple[float, float]], names: list[str] | None = None) -> list[Pair]:
    """One pair per (subject's size, style's size); the same two random deltas at different sizes."""
    names = names or [f"layer.{index}" for index in range(len(sizes))]
    return [
        Pair(name, low_rank(1, subject), low_rank(2, style))
        for name, (subject, style) in zip(names, sizes, strict=True)
    ]


def moment(step: int = 0, total: int = 10, rows: list[Row] | None = None) -> Moment:
    return Moment(step, step / (total - 1), tuple(rows or [Row(0)]), CPU)


def never(sampled: int, rows: tuple[int, ...] | None) -> Iterator[Features]:
    raise AssertionError("this rule does not look at the input")


def choices(rule: Rule, layers: int, now: Moment) -> str:
    """Who gets each layer: c for subject, s for style, + for both, - for neither."""
    rule.begin(now)
    found = [rule.select(layer, now, never) for layer in range(layers)]
    letters = {(1.0, 0.0): "c", (0.0, 1.0): "s", (1.0, 1.0): "+", (0.0, 0.0): "-"}
    return "".join(letters[one.subject, one.style] for one in found)  # type: ignore[index]


class Scene:
    """Features of `items` batch items in which the subject's delta has size `subject`, the style's `style`."""

    def __init__(self, subject: float, style: float, items: int = 1, tokens: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = (items, tokens)
        self.base = torch.randn(items * tokens, 16, generator=generator)
        self.subject = torch.randn(items * tokens, 16, generator=generator) * subject
        self.style = torch.randn(items * tokens, 16, generator=generator) * style
        self.asked: list[int] = []
        self.looked_at: list[int] = []

    def look(self, sampled: int, rows: tuple[int, ...] | None) -> Iterator[Features]:
        self.asked.append(sampled)
        tokens = self.shape[1]
        for row in range(self.base.shape[0] // tokens) if rows is None else rows:
            self.looked_at.append(row)
            part = slice(row * tokens, (row + 1) * tokens)
            yield Features(self.base[part], self.subject[part], self.style[part], -1)

    def divergences(self) -> tuple[Tensor, Tensor]:
        found = (kl_divergence(self.base, delta) for delta in (self.subject, self.style))
        first, second = (one.view(self.shape) for one in found)
        return first, second


def select(name: str, scene: Scene, now: Moment | None = None, **parameters: Any) -> Selection:
    now = now or moment(rows=[Row(image) for image in range(scene.shape[0])])
    rule = strategy(name, **parameters).start(pairs([(1.0, 1.0)]))
    rule.begin(now)
    return rule.select(0, now, scene.look)


# The registry.


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
    with pytest.raises(ValueError, match=r"unknown strategy 'klorra' \(did you mean 'klora'\?\); there are: sum, kl"):
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


# Divergence rules.


def test_kl_gives_an_item_to_the_role_that_moves_it_further() -> None:
    scene = Scene(0.5, 0.5, items=8)
    d_subject, d_style = scene.divergences()
    found = select("kl", scene)
    expected = d_subject.mean(1) >= d_style.mean(1)
    assert 0 < int(expected.sum()) < 8
    assert torch.equal(torch.as_tensor(found.subject), expected)
    assert torch.equal(torch.as_tensor(found.style), ~expected)
    assert found.d_subject is not None
    torch.testing.assert_close(found.d_subject, d_subject.mean(1), rtol=1e-4, atol=1e-6)


def test_kl_token_decides_every_token_by_itself() -> None:
    scene = Scene(0.5, 0.5, items=2, tokens=30)
    d_subject, d_style = scene.divergences()
    found = select("kl-token", scene)
    assert torch.equal(torch.as_tensor(found.subject), d_subject >= d_style)


def test_a_tie_goes_to_the_subject() -> None:
    scene = Scene(0.0, 0.0)
    for name in DIVERGENCE_RULES:
        found = select(name, scene)
        assert bool((torch.as_tensor(found.subject).float() >= 0.5).all()), name


def test_kl_soft_is_a_softmax_of_log_divergences() -> None:
    scene = Scene(0.5, 0.3, items=4)
    d = torch.stack([one.mean(1) for one in scene.divergences()])
    for softness in (0.25, 1.0, 4.0):
        expected = (d.log() / softness).softmax(0)
        found = select("kl-soft", scene, softness=softness)
        torch.testing.assert_close(torch.as_tensor(found.subject), expected[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.as_tensor(found.style), expected[1], rtol=1e-3, atol=1e-4)


def test_kl_soft_with_little_softness_is_kl() -> None:
    scene = Scene(0.5, 0.5, items=8)
    soft, hard = select("kl-soft", scene, softness=0.01), select("kl", scene)
    assert torch.equal(torch.as_tensor(soft.subject) > 0.5, torch.as_tensor(hard.subject))


@pytest.mark.parametrize("name", DIVERGENCE_RULES)
def test_balance_moves_the_decision_from_all_subject_to_all_style(name: str) -> None:
    scene = Scene(0.5, 0.5, items=16)
    shares = [
        float(torch.as_tensor(select(name, scene, balance=lean).subject).float().mean())
        for lean in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
    ]
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert shares == sorted(shares, reverse=True)


@given(lean=st.floats(-0.95, 0.95), ratio=st.floats(0.05, 20))
def test_balance_is_a_factor_on_the_divergences_ratio(lean: float, ratio: float) -> None:
    scene = Scene(0.3 * math.sqrt(ratio), 0.3)
    d_subject, d_style = (float(one.mean()) for one in scene.divergences())
    margin = d_subject / d_style * (1 - lean) / (1 + lean)
    if abs(math.log(margin)) > 1e-3:
        assert bool(select("kl", scene, balance=lean).subject) == (margin > 1)


@pytest.mark.parametrize("name", DIVERGENCE_RULES)
def test_a_schedule_gives_the_subject_the_early_steps_and_the_style_the_late_ones(name: str) -> None:
    scene = Scene(0.5, 0.5, items=16)
    rows = [Row(image) for image in range(16)]
    shares = [
        float(torch.as_tensor(select(name, scene, moment(step, rows=rows), schedule=1.0).subject).float().mean())
        for step in range(10)
    ]
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert shares == sorted(shares, reverse=True)


def run(rule: Rule, sizes: list[tuple[float, float]], now: Moment, seed: int = 0) -> list[Tensor]:
    rule.begin(now)
    items = len(now.rows)
    return [
        torch.as_tensor(rule.select(layer, now, Scene(*size, items=items, seed=seed + layer).look).subject)
        for layer, size in enumerate(sizes)
    ]


def test_auto_balance_keeps_a_louder_network_from_winning_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(4 * float(a), float(b)) for a, b in torch.rand(60, 2, generator=generator).exp().mul(0.02)]
    weights = pairs(sizes)
    shares = {}
    for auto in (False, True):
        rule = strategy("kl", auto_balance=auto).start(weights)
        wins = [torch.stack(run(rule, sizes, moment(step), seed=100 * step)).float().mean() for step in range(4)]
        shares[auto] = float(torch.stack(wins).mean())
    assert shares[False] == 1.0
    assert 0.35 < shares[True] < 0.65


def test_auto_balance_does_not_depend_on_how_loud_a_network_is() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(float(a), float(b)) for a, b in torch.rand(30, 2, generator=generator).exp().mul(0.01)]
    louder = [(3 * a, b) for a, b in sizes]
    found = []
    for listed in (sizes, louder):
        rule = strategy("kl", auto_balance=True).start(pairs(listed))
        found.append(torch.stack([torch.stack(run(rule, listed, moment(step))) for step in range(3)]))
    assert float((found[0] == found[1]).float().mean()) > 0.97


def test_auto_balance_of_one_picture_is_not_another_pictures_business() -> None:
    sizes = [(0.3, 0.2), (0.1, 0.3), (0.2, 0.2), (0.4, 0.1)] * 4
    strategy_ = strategy("kl", auto_balance=True)

    def seen(rows: list[Row], keep: int) -> list[Tensor]:
        rule = strategy_.start(pairs(sizes))
        found = []
        for step in range(3):
            now = moment(step, rows=rows)
            rule.begin(now)
            for layer, size in enumerate(sizes):
                scene = Scene(*size, items=3, seed=layer + 50 * step)
                picked = slice(0, 18) if len(rows) == 3 else slice(6 * keep, 6 * keep + 6)
                scene.base, scene.subject, scene.style = (
                    one[picked] for one in (scene.base, scene.subject, scene.style)
                )
                subject = torch.as_tensor(rule.select(layer, now, scene.look).subject)
                found.append(subject[keep if len(rows) == 3 else 0])
        return found

    together = [Row(0), Row(1), Row(2)]
    for keep in range(3):
        assert seen(together, keep) == seen([Row(keep)], keep)


CFG = [Row(0, cond=False), Row(0, cond=True)]


def test_coupled_the_cond_half_decides_for_the_uncond_half() -> None:
    decided = []
    for seed in range(20):
        scene = Scene(0.5, 0.5, items=2, seed=seed)
        free, coupled = (select("kl", scene, moment(rows=CFG), couple_cfg=couple) for couple in (False, True))
        subject = torch.as_tensor(coupled.subject)
        assert subject[0] == subject[1] == torch.as_tensor(free.subject)[1]
        assert scene.looked_at == [0, 1, 1], "coupled, only the cond row is looked at"
        decided.append(bool(torch.as_tensor(free.subject)[0] != torch.as_tensor(free.subject)[1]))
    assert any(decided), "the test needs halves that would differ"


def test_coupled_halves_in_separate_batches_follow_the_last_cond_decision() -> None:
    rule = strategy("kl", couple_cfg=True).start(pairs([(1.0, 1.0)]))
    cond, uncond = (moment(0, rows=[row]) for row in (CFG[1], CFG[0]))
    loud_subject, loud_style = Scene(0.5, 0.1), Scene(0.1, 0.5)
    rule.begin(cond)
    assert bool(torch.as_tensor(rule.select(0, cond, loud_subject.look).subject))
    rule.begin(uncond)
    assert bool(torch.as_tensor(rule.select(0, uncond, loud_style.look).subject))


def test_an_uncond_half_that_has_seen_no_cond_half_decides_for_itself() -> None:
    rule = strategy("kl", couple_cfg=True).start(pairs([(1.0, 1.0)]))
    uncond = moment(0, rows=[CFG[0]])
    rule.begin(uncond)
    assert not bool(torch.as_tensor(rule.select(0, uncond, Scene(0.1, 0.5).look).subject))


def test_temperature_changes_what_counts() -> None:
    # At a low temperature only the strongest channel matters, at a high one the rest outweighs it.
    base = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    subject, style = torch.tensor([[-2.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.5, -1.5, 1.5]])

    def look(sampled: int, rows: tuple[int, ...] | None) -> Iterator[Features]:
        yield Features(base, subject, style, -1)

    wins = []
    for temperature in (1.0, 20.0):
        rule = strategy("kl", temperature=temperature).start(pairs([(1.0, 1.0)]))
        rule.begin(moment())
        wins.append(bool(torch.as_tensor(rule.select(0, moment(), look).subject)))
        expected = kl_divergence(base, subject, temperature) >= kl_divergence(base, style, temperature)
        assert wins[-1] == bool(expected)
    assert wins == [True, False]


def test_standardised_features_do_not_depend_on_a_layers_scale() -> None:
    scene = Scene(0.5, 0.5, items=8)
    small = select("kl", scene, standardise=True)
    for one in (scene.base, scene.subject, scene.style):
        one.mul_(37.0)
    large = select("kl", scene, standardise=True)
    assert small.d_subject is not None
    assert large.d_subject is not None
    torch.testing.assert_close(small.d_subject, large.d_subject, rtol=1e-3, atol=1e-5)


def test_decide_every_keeps_a_choice_for_that_many_steps() -> None:
    rule = strategy("kl", decide_every=3).start(pairs([(1.0, 1.0)]))
    asked = []
    for step in range(9):
        scene = Scene(0.5, 0.1) if step < 4 else Scene(0.1, 0.5)
        now = moment(step)
        rule.begin(now)
        subject = bool(torch.as_tensor(rule.select(0, now, scene.look).subject))
        asked.append((subject, bool(scene.asked)))
    assert [looked for _, looked in asked] == [True, False, False] * 3
    assert [subject for subject, _ in asked] == [True] * 6 + [False] * 3


def test_decide_every_decides_anew_for_another_batch() -> None:
    rule = strategy("kl", decide_every=10).start(pairs([(1.0, 1.0)]))
    for rows in ([Row(0)], [Row(1)]):
        now = moment(0, rows=rows)
        scene = Scene(0.5, 0.1)
        rule.begin(now)
        rule.select(0, now, scene.look)
        assert scene.asked == [0]


@pytest.mark.parametrize("name", ["kl", "kl-soft", "js", "cosine"])
def test_sample_tokens_is_asked_of_the_layer(name: str) -> None:
    scene = Scene(0.5, 0.1)
    select(name, scene, sample_tokens=64)
    assert scene.asked == [64]


def test_a_delta_that_is_not_a_number_does_not_win() -> None:
    scene = Scene(0.1, 0.5)
    scene.style[0, 0] = float("nan")
    assert bool(torch.as_tensor(select("kl", scene).subject))
    scene = Scene(0.5, 0.1)
    scene.subject[0, 0] = float("nan")
    assert not bool(torch.as_tensor(select("kl", scene).subject))


def test_a_dense_rule_knows_the_rank_of_a_weight_without_one() -> None:
    full = Pair("full", Dense(torch.randn(5, 6)), low_rank(2))
    assert choices(strategy("klora").start([full]), 1, moment()) in "cs"
