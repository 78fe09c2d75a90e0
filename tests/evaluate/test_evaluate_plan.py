"""Pairs and methods: what may be asked for, and what is said of a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib_dynfuse.demo.split import FRESH_SUBJECTS, HELD_STYLES, HELD_SUBJECTS, REPORTED_SUBJECTS
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.evaluate.methods import METHODS, chosen, of, parse
from lib_dynfuse.evaluate.plan import HALVES, boxed_pairs, half, read_pairs
from lib_dynfuse.roles import parse_prompt


def test_the_halves_share_no_subject_and_leave_none_out() -> None:
    tuning, reporting = (half(name) for name in HALVES)
    assert len(tuning) == len(reporting) == 12
    assert sorted(tuning + reporting) == sorted(HELD_SUBJECTS)


def test_the_halves_are_the_ones_that_were_drawn_before_tuning() -> None:
    assert half("tuning")[:3] == ["guitar", "rocket", "butterfly"]
    assert half("reporting")[:3] == ["umbrella", "anchor", "watermelon"]


def test_a_half_has_each_of_its_subjects_in_each_style() -> None:
    pairs = boxed_pairs("reporting")
    assert {pair.truth for pair in pairs} == {(a, b) for a in half("reporting") for b in HELD_STYLES}
    assert len(pairs) == 24
    assert len(boxed_pairs("all")) == 48


def test_fresh_subjects_are_in_neither_half() -> None:
    assert {pair.truth for pair in boxed_pairs("fresh")} == {(a, b) for a in FRESH_SUBJECTS for b in HELD_STYLES}
    assert {pair.truth for pair in boxed_pairs("reported")} == {(a, b) for a in REPORTED_SUBJECTS for b in HELD_STYLES}
    assert not {*FRESH_SUBJECTS} & {*REPORTED_SUBJECTS, *half("tuning"), *half("reporting")}
    assert boxed_pairs("ice cream:hc")[0].subject == "subject-ice-cream"


def test_pairs_are_written_with_a_colon() -> None:
    first, second = boxed_pairs("hot beverage:hc, fox:blob")
    assert (first.subject, first.style, first.prompt) == (
        "subject-hot-beverage",
        "style-high-contrast",
        "hot beverage emoji, high contrast style",
    )
    assert second.truth == ("fox", "blob")


@pytest.mark.parametrize(
    ("text", "named"), [("fox", "--pairs fox"), ("fox:3d", "3d"), ("dog:hc", "dog"), ("", "tuning")]
)
def test_a_pair_that_is_not_in_the_box_is_named(text: str, named: str) -> None:
    with pytest.raises(DynFuseError, match=named):
        boxed_pairs(text)


def test_a_pair_twice_is_refused() -> None:
    with pytest.raises(DynFuseError, match="twice"):
        boxed_pairs("fox:hc,fox:hc")


def test_a_prompt_has_the_loras_with_their_strengths_and_with_roles_where_it_fuses() -> None:
    (pair,) = boxed_pairs("fox:hc")
    fused = parse_prompt(pair.prompt_of(of("a", strategy="kl", subject=0.5)))
    assert [(tag.name, tag.unet, tag.role and tag.role.value) for tag in fused.tags] == [
        ("subject-fox", 0.5, "subject"),
        ("style-high-contrast", 1.0, "style"),
    ]
    assert fused.text.strip() == "fox emoji, high contrast style"
    alone = parse_prompt(pair.prompt_of(METHODS["style alone"]))
    assert [(tag.name, tag.role) for tag in alone.tags] == [("style-high-contrast", None)]


def own(tmp_path: Path, *entries: Any) -> Path:
    (tmp_path / "fox.png").write_bytes(b"")
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(list(entries)))
    return file


ENTRY = {"subject": "my_fox", "style": "ink", "prompt": "a fox", "subject_pictures": ["fox.png"]}


def test_a_persons_pairs_come_from_a_file_with_pictures_beside_it(tmp_path: Path) -> None:
    (pair,) = read_pairs(own(tmp_path, ENTRY))
    assert (pair.name, pair.prompt, pair.truth) == ("my_fox + ink", "a fox", None)
    assert pair.subject_pictures == (tmp_path / "fox.png",)
    assert pair.style_pictures == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"style": ""}, "entry 1: style is missing"),
        ({"prompt": "a fox <lora:x:1>"}, "LoRA tag"),
        ({"subject_pictures": ["none.png"]}, "no file"),
        ({"style_pictures": "fox.png"}, "style_pictures should be a list"),
        ({"seed": 1}, "has 'seed'"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DynFuseError, match=said):
        read_pairs(own(tmp_path, {**ENTRY, **change}))


def test_what_is_no_file_of_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("fox")
    for file in (tmp_path / "none.json", tmp_path / "text.json", own(tmp_path), own(tmp_path, "fox")):
        with pytest.raises(DynFuseError, match="--pairs"):
            read_pairs(file)


def test_all_methods_are_compared_where_none_is_asked_for() -> None:
    assert [method.label for method in chosen("", [])] == list(METHODS)
    assert [method.label for method in chosen("sum, kl", [])] == ["sum", "kl"]
    assert [method.label for method in chosen("", ["mine: strategy=kl"])] == ["mine"]


def test_every_rule_there_is_takes_part() -> None:
    rules = {method.options.strategy for method in METHODS.values() if method.options.enabled}
    assert rules >= {"sum", "random", "klora", "est", "np", "switch", "blocks", "kl"}


def test_a_persons_method_has_strengths_options_and_the_rules_own_parameters() -> None:
    method = parse("my kl: strategy=kl-soft subject=.5 balance=-0.2 couple_cfg=on softness=2")
    assert (method.label, method.strengths) == ("my kl", (0.5, 1.0))
    assert method.options.enabled
    assert (method.options.balance, method.options.couple_cfg) == (-0.2, True)
    assert method.options.parameters == {"softness": 2}


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "-1e999", "nan", "Infinity"])
@pytest.mark.parametrize("name", ["subject", "style", "loser", "balance"])
def test_a_number_that_nothing_can_be_computed_with_is_refused_in_one_line(name: str, number: str) -> None:
    with pytest.raises(DynFuseError, match=rf"^--method huge {name}=.{{3,200}}: the number is not finite$"):
        parse(f"huge: {name}={number}")


def test_without_an_option_the_loras_are_added_as_the_host_does() -> None:
    method = parse("added: subject=.5 style=.5")
    assert not method.options.enabled
    assert method.strengths == (0.5, 0.5)


@pytest.mark.parametrize(
    ("names", "written", "said"),
    [
        ("kl,best", [], "best: there are subject alone"),
        ("kl,kl", [], "kl is there twice"),
        ("kl", ["kl: strategy=kl"], "kl is there twice"),
        ("", ["no colon"], "write LABEL:"),
        ("", ["x: strategy"], "--method x strategy: write NAME=VALUE"),
        ("", ["x: subject=loud"], "subject is a strength"),
        ("", ["x: strategy=best"], "unknown strategy 'best'"),
        ("", ["x: strategy=kl sharp=1"], "no parameter 'sharp'"),
    ],
)
def test_a_mistake_in_a_method_is_named(names: str, written: list[str], said: str) -> None:
    with pytest.raises(DynFuseError, match=said):
        chosen(names, written)
