"""The comparison of the rules: same seeds for all, the right LoRAs in each prompt, judged and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_dynfuse.core.strategies import strategies
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.demo import compare as comparing
from lib_dynfuse.demo.compare import GUIDED, METHODS, Alone, Method, Pair, Score, compare, wilson
from lib_dynfuse.guidance.decoders import linear
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.objectives import Each, Objective
from lib_dynfuse.guides import Guidance, nudge_of
from lib_dynfuse.options import Options
from lib_dynfuse.roles import parse_prompt
from lib_dynfuse.trace import Trace

FOX = Pair("fox", "hc")
CUP = Pair("hot beverage", "blob")


class Host:
    """Makes plain pictures: red is the subject's place in the judge's list, green the style's."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompt: str, *, trace: Trace | None, seeds: Sequence[int], **more: Any) -> Tensor:
        self.calls.append({"prompt": prompt, "seeds": list(seeds), "traced": trace is not None, **more})
        tags = {tag.name for tag in parse_prompt(prompt).tags}
        pictures = torch.zeros(len(seeds), 3, 8, 8)
        pictures[:, 0] = 0.1 if any(name.startswith("subject-") for name in tags) else 0.0
        # every other seed gets the style
        pictures[::2, 1] = 0.1 if any(name.startswith("style-") for name in tags) else 0.0
        if trace is not None:
            trace.attach(["down_blocks.0.a"])
            trace.begin(0, 0.0, [Row(image, True) for image in range(len(seeds))])
            trace.add(0, 0.25, 0.75)
        if guide := more["guide"]:
            guide.at(4, torch.zeros(len(seeds), 4, 8, 8))
        return pictures

    def decoder(self, name: str) -> Any:
        assert name == "vae"
        return linear("sd1")


class Colours:
    """An encoder: the mean colour."""

    def image(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)


class Judge:
    subjects = ("star", "fox")
    styles = ("fluent", "hc")

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.mean(dim=(2, 3))
        return (means[:, 0] * 10).round().long(), (means[:, 1] * 10).round().long()


def test_every_method_gets_the_same_seeds_steps_and_cfg() -> None:
    host = Host()
    compare(host, Judge(), [FOX], [3, 5, 8], steps=7, cfg=2.5)
    assert len(host.calls) == len(METHODS)
    assert all((call["seeds"], call["steps"], call["cfg"]) == ([3, 5, 8], 7, 2.5) for call in host.calls)


def test_each_column_has_its_loras_and_roles_only_where_a_rule_needs_them() -> None:
    prompts = {method.label: CUP.prompt(method) for method in METHODS}
    assert prompts["base"] == "hot beverage emoji, blob style"
    assert prompts["subject alone"].endswith("style <lora:subject-hot-beverage:1>")
    assert prompts["style alone"].endswith("style <lora:style-blob:1>")
    both = " <lora:subject-hot-beverage:1:role=subject> <lora:style-blob:1:role=style>"
    for label in ("sum", "random", "klora", "np", "kl", "kl balanced", "kl-soft", "default"):
        assert prompts[label] == prompts["base"] + both


def test_the_columns_are_the_rules_they_are_named_after() -> None:
    rules = {method.label: method.options for method in METHODS if method.options.enabled}
    assert {options.strategy for options in rules.values()} <= set(strategies())
    assert not rules["kl"].auto_balance
    assert rules["kl balanced"].auto_balance
    assert rules["kl balanced"].strategy == "kl"
    assert rules["default"] == Options(enabled=True)
    named = {label: options for label, options in rules.items() if label not in ("kl balanced", "default")}
    assert all(options.strategy == label for label, options in named.items())


def test_pictures_are_judged_for_the_pairs_own_subject_and_style() -> None:
    results = compare(Host(), Judge(), [FOX], range(5))
    scores = {result.method.label: Score.of([result]) for result in results}
    assert (scores["base"].subject, scores["base"].style, scores["base"].both) == (0, 0, 0)
    assert (scores["subject alone"].subject, scores["subject alone"].style) == (5, 0)
    assert (scores["style alone"].subject, scores["style alone"].style) == (0, 3)
    assert (scores["kl"].subject, scores["kl"].style, scores["kl"].both, scores["kl"].pictures) == (5, 3, 3, 5)


def test_what_was_chosen_is_recorded_for_rules_that_choose_alone() -> None:
    results = compare(Host(), Judge(), [FOX], range(2))
    chosen = {result.method.label: Score.of([result]).chosen for result in results}
    for label in ("random", "klora", "kl", "kl balanced", "kl-soft"):
        assert chosen[label] == pytest.approx(0.25)
    for label in ("base", "subject alone", "style alone", "sum", "np"):
        assert chosen[label] is None


def test_scores_of_several_pairs_are_pooled() -> None:
    results = compare(Host(), Judge(), [FOX, FOX], range(4), methods=[Method("both")])
    pooled = Score.of(results)
    assert (pooled.pictures, pooled.subject, pooled.style, pooled.both) == (8, 8, 4, 4)


@pytest.mark.parametrize(("pair", "missing"), [(Pair("dragon", "hc"), "dragon"), (Pair("fox", "blob"), "blob")])
def test_a_pair_that_the_judge_does_not_know_is_refused_before_anything_is_made(pair: Pair, missing: str) -> None:
    host = Host()
    with pytest.raises(ValueError, match=f"{missing}.*knows"):
        compare(host, Judge(), [FOX, pair], range(2))
    assert host.calls == []


@pytest.mark.parametrize(
    ("right", "of", "interval"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662))],
)
def test_the_interval_is_wilsons(right: int, of: int, interval: tuple[float, float]) -> None:
    """The last is the worked example of R. G. Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert wilson(right, of) == pytest.approx(interval, abs=5e-5)


@given(st.integers(0, 300).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_the_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    right, of = counts
    low, high = wilson(right, of)
    assert 0 <= low < high <= 1
    assert of == 0 or low - 1e-12 <= right / of <= high + 1e-12
    assert wilson(of - right, of) == pytest.approx((1 - high, 1 - low))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Options, Each, Each]]:
    """What guidance is asked to prepare; the encoders see colours."""
    asked: list[tuple[Options, Each, Each]] = []

    def prepare(options: Options, references: Any, prompts: list[str], *_: Any) -> Guidance:
        subject, style = (references(role) for role in (Role.SUBJECT, Role.STYLE))
        assert prompts == ["fox emoji, high contrast style"]
        asked.append((options, subject, style))
        return Guidance(nudge_of(options), Objective(Colours(), None, subject, style))  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "prepare", prepare)
    return asked


def test_guided_methods_go_towards_each_seed_s_own_pictures_of_each_lora_alone(
    prepared: list[tuple[Options, Each, Each]],
) -> None:
    host, alone = Host(), Alone(torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8))
    results = compare(host, Judge(), [FOX], [0, 1], methods=[*METHODS[:1], *GUIDED], alone={FOX: alone})
    assert [isinstance(call["guide"], Guide) for call in host.calls] == [False, True, True, True]
    for options, subject, style in prepared:
        assert (options.nudge, options.clip, options.dino) == (True, "clip", "dino")
        for each, pictures in ((subject, alone.subject), (style, alone.style)):
            assert [tuple(one.shape) for one in each.of] == [(1, 3, 8, 8)] * 2
            assert torch.equal(torch.cat(list(each.of)), pictures[:2])
    assert [len(result.record.nudges[4]) for result in results if result.record] == [2, 2]


def test_nudges_alone_add_both_loras_without_a_rule() -> None:
    prompts = {method.label: FOX.prompt(method) for method in GUIDED}
    both = "fox emoji, high contrast style <lora:subject-fox:1{0}> <lora:style-high-contrast:1{1}>"
    assert prompts["nudges alone"] == both.format("", "")
    assert prompts["kl + nudges"] == both.format(":role=subject", ":role=style")
    assert not any(method.guided for method in METHODS)


def test_a_guided_method_without_its_encoders_says_what_is_missing(tmp_path: Any) -> None:
    alone = Alone(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="nudges alone: not nudged: this CLIP may not be used"):
        compare(Host(), Judge(), [FOX], [0, 1], methods=GUIDED[:1], alone={FOX: alone}, encoders=tmp_path)
