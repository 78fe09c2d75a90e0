"""Every divergence rule against its equation, and the parameters that all of them share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DIVERGENCE_RULES, Scene, moment, pairs, select, subjects_share
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_dynfuse.core import Row, strategy
from lib_dynfuse.core.divergence import kl_divergence
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.rules import Features, Rule


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


@pytest.mark.parametrize(
    "given", [{}, {"auto_balance": True, "balance": 0.1}, {"temperature": 2.0}, {"standardise": True}]
)
@pytest.mark.parametrize("name", ["kl", "kl-token", "kl-cfg"])
def test_away_from_the_cpu_the_selection_is_the_same(
    name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [
        Scene(0.5, size, items=32, tokens=20, seed=seed) for seed, size in enumerate((0.005, 0.45, 0.5, 0.55, 30.0))
    ]
    here = [torch.as_tensor(select(name, scene, **given).subject) for scene in scenes]
    assert len(torch.cat(here).unique()) == 2
    monkeypatch.setattr("lib_dynfuse.core.devices.readable", lambda device: False)
    there = [torch.as_tensor(select(name, scene, **given).subject) for scene in scenes]
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


def test_kl_cfg_adds_both_and_less_of_the_loser() -> None:
    scene = Scene(0.5, 0.5, items=8)
    wins = torch.as_tensor(select("kl", scene).subject).float()
    found = select("kl-cfg", scene, loser=0.5, subject=2.0, style=1.0)
    torch.testing.assert_close(torch.as_tensor(found.subject), 1.0 + wins)
    torch.testing.assert_close(torch.as_tensor(found.style), 1.0 - 0.5 * wins)


def test_kl_cfg_gives_the_negative_prompts_half_less_of_the_style() -> None:
    scene = Scene(0.5, 0.5, items=4)
    rows = [Row(0, False), Row(1, False), Row(0, True), Row(1, True)]
    even = select("kl-cfg", scene, moment(rows=rows), negative=1.0)
    found = select("kl-cfg", scene, moment(rows=rows), negative=0.25)
    assert torch.equal(torch.as_tensor(found.subject), torch.as_tensor(even.subject))
    shares = torch.as_tensor(found.style) / torch.as_tensor(even.style)
    assert shares.tolist() == [0.25, 0.25, 1.0, 1.0]


def test_kl_cfg_weighs_the_halves_also_where_one_decides_for_both_and_a_choice_is_kept() -> None:
    scene = Scene(0.5, 0.5, items=2)
    rows = [Row(0, False), Row(0, True)]
    rule = strategy("kl-cfg", couple_cfg=True, decide_every=3, negative=0.5).start(pairs([(1.0, 1.0)]))
    for step in range(3):
        now = moment(step, rows=rows)
        rule.begin(now)
        negative, positive = torch.as_tensor(rule.select(0, now, scene.look).style).tolist()
        assert negative == pytest.approx(positive / 2)


def test_kl_token_decides_every_token_by_itself() -> None:
    scene = Scene(0.5, 0.5, items=2, tokens=30)
    d_subject, d_style = scene.divergences()
    found = select("kl-token", scene)
    assert torch.equal(torch.as_tensor(found.subject), d_subject >= d_style)


def test_a_tie_goes_to_the_subject() -> None:
    scene = Scene(0.0, 0.0)
    for name in DIVERGENCE_RULES:
        assert bool((subjects_share(name, select(name, scene)) >= 0.5).all()), name


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
        float(subjects_share(name, select(name, scene, balance=lean)).mean())
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
        float(subjects_share(name, select(name, scene, moment(step, rows=rows), schedule=1.0)).mean())
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

    def look(sampled: int, rows: tuple[int, ...] | None, both: bool) -> Iterator[Features]:
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


@pytest.mark.parametrize("name", sorted(set(DIVERGENCE_RULES) - {"kl-token"}))
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
