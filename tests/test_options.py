from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_dynfuse import __version__, options
from lib_dynfuse.core.strategies import strategies, strategy
from lib_dynfuse.guidance.nudge import MODES, Nudge
from lib_dynfuse.guidance.objectives import TERMS, Weights
from lib_dynfuse.options import FIELDS, PRESETS, Options, OptionsError, options_table, rules_table, with_preset

NUMBERS = [option for option in FIELDS if option.minimum is not None]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# Values that break something on their way: no float, no repr, no UTF-8, no hash, no end.
HOSTILE = [
    10**400,
    -(10**400),
    10**4299,
    "9" * 5000,
    "1e999",
    float("inf"),
    float("nan"),
    "\ud800",
    "x" * 100_000,
    nested(900),
    {"a": nested(900)},
    [10**400],
    [],
    {},
    [["a", 1]],
    None,
    True,
]


def test_defaults_are_what_was_measured_to_be_best_and_switched_off():
    options = Options.read({})
    assert options.enabled is False
    assert options.make_strategy() == strategy("kl-cfg", auto_balance=True, couple_cfg=True, sample_tokens=64)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_choice_of_options_and_what_is_said_beside_it_wins(name: str):
    chosen = Options.read(with_preset({"preset": name, "schedule": 0.5}))
    assert chosen.schedule == 0.5
    assert {key: getattr(chosen, key) for key in PRESETS[name]} == PRESETS[name]
    assert Options.read(with_preset({"preset": name, "balance": 0.1})).balance == 0.1


def test_the_paper_s_rule_is_unbalanced_uncoupled_and_hard():
    chosen = Options.read(with_preset({"preset": "paper"}))
    assert chosen.make_strategy() == strategy("kl")
    with pytest.raises(OptionsError, match="preset: 'papper' is not known; there are: default, paper"):
        with_preset({"preset": "papper"})


@pytest.mark.parametrize("name", strategies())
def test_every_rule_can_be_chosen_with_its_defaults(name: str):
    known = {parameter.name for parameter in strategies()[name].parameters}
    panel = {"auto_balance": True, "couple_cfg": True, "sample_tokens": 64}
    own = {name: value for name, value in panel.items() if name in known}
    assert Options.read({"strategy": name}).make_strategy() == strategy(name, **own)


def test_options_reach_the_rule():
    options = Options.read(
        {"strategy": "kl-soft", "balance": 0.25, "couple_cfg": False, "parameters": {"softness": 2.0}}
    )
    assert options.make_strategy() == strategy(
        "kl-soft", balance=0.25, auto_balance=True, sample_tokens=64, softness=2.0
    )


@given(st.sampled_from(NUMBERS), st.floats(allow_infinity=True, allow_nan=True))
def test_a_number_is_taken_inside_its_range_and_refused_with_the_range_outside(option: Any, value: float):
    whole = isinstance(option.default, int)
    allowed = option.minimum <= value <= option.maximum and (not whole or value == int(value))
    values = {option.name: value, "stop": 1.0} if option.name != "stop" else {"stop": value}
    if allowed:
        assert getattr(Options.read(values), option.name) == value
    else:
        with pytest.raises(OptionsError) as error:
            Options.read(values)
        assert option.name in str(error.value)
        assert option.allowed in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"blance": 1}, ["blance", "did you mean balance?", "auto_balance"]),
        ({"strategy": "kll"}, ["'kll'", "'kl'", "kl-token", "random"]),
        ({"parameters": {"softness": 1}}, ["'kl-cfg'", "'softness'"]),
        ({"strategy": "klora", "parameters": {"alpha": 99}}, ["alpha", "0.01 to 10"]),
        ({"parameters": {"balance": 1}}, ["balance", "an option of its own"]),
        ({"start": 0.6, "stop": 0.5}, ["start 0.6", "stop 0.5"]),
        ({"nudge": True, "nudge_start": 0.8, "nudge_stop": 0.7}, ["nudge_start 0.8", "nudge_stop 0.7"]),
        ({"nudge_mode": "xy"}, ["nudge_mode", "x0, adam, xt"]),
        ({"nudge_decoder": "full", "references": "mine"}, ["taesd, vae, linear", "auto, given, preview, generated"]),
        ({"nudge_strength": 2.5, "nudge_every": 0}, ["nudge_strength", "0 to 2", "nudge_every", "1 to 100"]),
        ({"weight_clip_text": -1}, ["weight_clip_text", "0 to 10"]),
        ({"clip": ""}, ["clip", "a name, a folder or a file"]),
        ({"subject_references": "fox.png"}, ["subject_references", "a list of base64 or data URLs, and of paths"]),
        ({"subject_references": ["fox.png", 3]}, ["subject_references", "3 is no picture"]),
        ({"style_references": [" "]}, ["style_references", "' ' is no picture"]),
        ({"subject_references": [{"data": "A" * 5000}]}, ["subject_references", "is no picture"]),
        ({"balance": 3, "temperature": 0}, ["balance", "-1 to 1", "temperature", "0.01 to 100"]),
        ({"sample_tokens": "many"}, ["sample_tokens", "0 to 4096"]),
        ({"sample_tokens": 64.5, "balance": True}, ["sample_tokens: 64.5", "whole number", "balance: True", "-1 to 1"]),
        ({"enabled": "perhaps"}, ["enabled", "on, off"]),
    ],
)
def test_what_is_not_allowed_is_refused_by_name_with_what_is(values: dict[str, Any], words: list[str]):
    with pytest.raises(OptionsError) as error:
        Options.read(values)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_options_that_mean_nothing_to_the_rule_are_known():
    assert Options(strategy="sum", balance=0.5, couple_cfg=False).unused() == ["balance", "couple_cfg"]
    assert Options(strategy="kl-token", balance=0.5, sample_tokens=32).unused() == ["sample_tokens"]
    assert Options(strategy="kl", balance=0.5).unused() == []


def test_the_infotext_has_the_version_the_rule_and_what_was_changed():
    assert Options().infotext() == {}
    assert Options(enabled=True, trace=True).infotext() == {"DynFuse": __version__, "DynFuse strategy": "kl-cfg"}
    written = Options(
        enabled=True, strategy="klora", auto_balance=False, start=0.25, parameters={"pattern": "s*", "alpha": 2.0}
    ).infotext()
    assert written == {
        "DynFuse": __version__,
        "DynFuse strategy": "klora",
        "DynFuse auto balance": "False",
        "DynFuse start": "0.25",
        "DynFuse parameters": '{"alpha": 2.0, "pattern": "s*"}',
    }


def test_the_infotext_says_of_guidance_what_matters():
    moved = {"nudge_strength": 0.5, "weight_clip_text": 1.0, "clip": "ViT-B-16", "keep_best": 0}
    plain = {"DynFuse": __version__, "DynFuse strategy": "kl-cfg"}
    judges = {"DynFuse weight clip text": "1.0", "DynFuse clip": "ViT-B-16"}
    assert Options(enabled=True, **moved).infotext() == plain
    for comparing in ({"score": True}, {"keep_best": 2}):
        assert Options(enabled=True, **{**moved, **comparing}).infotext() == {**plain, **judges}
    nudged = {"DynFuse nudge": "True", "DynFuse nudge strength": "0.5"}
    assert Options(enabled=True, nudge=True, **moved).infotext() == {**plain, **nudged, **judges}


def test_a_nudges_window_is_not_judged_while_there_are_no_nudges():
    assert Options.read({"nudge_start": 0.8, "nudge_stop": 0.7}).nudge_start == 0.8


def test_reference_pictures_are_written_as_their_number_and_what_tells_them_from_others():
    options = Options.read(
        {"enabled": True, "nudge": True, "subject_references": ["a", "b"], "style_references": ["/etc/passwd"]}
    )
    written = options.infotext({"subject_references": "0123456789 abcdef0123"})
    assert written["DynFuse subject references"] == "2 pictures 0123456789 abcdef0123"
    assert written["DynFuse style references"] == "1 picture"


@pytest.mark.parametrize(
    "rule", [info.name for info in strategies().values() if any(one.name == "balance" for one in info.parameters)]
)
def test_the_sliders_help_is_true_for_every_rule_that_has_it(rule: str):
    """At its ends one role wins every layer; that the other one is left with nothing may be said of no rule alone."""
    rule_at_work: Any = strategy(rule)
    (subject, left_of_style), (left_of_subject, style) = (
        [float(weight) for weight in rule_at_work.choose(torch.tensor([margin]))] for margin in (math.inf, -math.inf)
    )
    assert subject > left_of_subject
    assert style > left_of_style
    said = next(option.help for option in FIELDS if option.name == "balance")
    assert "win every layer" in said
    if left_of_style or left_of_subject:
        assert "gives" not in said
        assert "the rule says what the loser keeps" in said


def test_choices_are_what_guidance_knows():
    choices = {option.name: option.choices for option in FIELDS if option.choices}
    assert choices["nudge_mode"] == tuple(sorted(MODES, key=choices["nudge_mode"].index))
    terms = [option.name.removeprefix("weight_") for option in FIELDS if option.name.startswith("weight_")]
    assert tuple(terms) == TERMS


def test_defaults_are_those_of_guidance():
    defaults = Options()
    nudge = Nudge()
    for name in ("mode", "strength", "start", "stop", "every", "clamp"):
        assert getattr(defaults, f"nudge_{name}") == getattr(nudge, name)
    assert {term: getattr(defaults, f"weight_{term}") for term in TERMS} == asdict(Weights())


def test_infotext_keys_name_options_one_to_one():
    assert len({option.key for option in FIELDS}) == len(FIELDS)
    assert all(option.key.startswith("DynFuse ") for option in FIELDS)


def test_every_option_and_every_rule_is_in_the_tables_with_its_help():
    table = options_table()
    for option in FIELDS:
        assert f"| `{option.name}` | {option.label} |" in table
        assert option.help in table
        assert option.help.endswith(".")
    rules = rules_table()
    for info in strategies().values():
        assert f"| `{info.name}` | {info.help} |" in rules
    assert "`softness` 1 (0.01 to 10)" in rules


def test_options_survive_json():
    options = Options.read({"enabled": True, "strategy": "js", "schedule": -0.5})
    dumped = json.loads(options.model_dump_json() if hasattr(options, "model_dump_json") else options.json())
    assert Options.read(dumped) == options


@pytest.mark.parametrize("table", [options_table(), rules_table()], ids=["options", "rules"])
def test_the_readme_has_exactly_this_table(table: str):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{table}\n\n" in readme


def answer(values: dict[str, Any]) -> str:
    """What is said of values, empty where they are taken."""
    try:
        Options.read(with_preset(values))
    except OptionsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["preset", *(option.name for option in FIELDS)])
@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_no_value_is_worse_than_refused_and_little_of_it_is_echoed(name: str, index: int):
    said = answer({name: HOSTILE[index]})
    assert len(said.encode()) < 1000
    if said:
        assert said.startswith(name)


@pytest.mark.parametrize("index", range(len(HOSTILE)))
@pytest.mark.parametrize("name", ["alpha", "pattern"])
def test_no_value_of_a_rules_own_parameter_is_worse_than_refused(name: str, index: int):
    said = answer({"strategy": "klora", "parameters": {name: HOSTILE[index]}})
    assert name in said
    assert len(said.encode()) < 1000


@pytest.mark.parametrize("name", ["name", "self", "x" * 100_000, "\ud800", ""])
def test_a_parameter_that_the_rule_has_not_is_refused_whatever_its_name(name: str):
    said = answer({"strategy": "klora", "parameters": {name: 1}})
    assert said.startswith("parameters: strategy 'klora' has no parameter ")
    assert "alpha" in said
    assert len(said.encode()) < 1000


def test_an_unknown_option_is_echoed_in_part_and_of_many_a_few():
    assert len(answer({"x" * 100_000: 1})) < 1000
    assert answer({"\ud800": None}).startswith("\\ud800: unknown option; there are: enabled")
    said = answer({f"option{number}": 1 for number in range(1000)})
    assert "option0: unknown option" in said
    assert said.endswith("and 992 more")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("/home/ann/models/my-clip.pt", "my-clip.pt"),
        ("C:\\Users\\ann\\my-clip.pt", "my-clip.pt"),
        ("\\\\server\\ann\\clip", "clip"),
        ("~/clip", "clip"),
        ("../ann/clip/", "clip"),
        ("ViT-B-32:/home/ann/my.safetensors", "ViT-B-32:my.safetensors"),
        ("ViT-B-32:laion2b_e16", "ViT-B-32:laion2b_e16"),
        ("mine/dino-vits8", "mine/dino-vits8"),
    ],
)
def test_an_infotext_names_an_encoder_without_its_maker_s_folders(given: str, written: str) -> None:
    found = Options(enabled=True, nudge=True, clip=given, dino=given).infotext()
    assert (found["DynFuse clip"], found["DynFuse dino"]) == (written, written)


def test_of_thousands_of_unknown_options_a_few_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    real = options._unknown
    monkeypatch.setattr(options, "_unknown", lambda name: asked.append(name) or real(name))
    said = answer({f"option{number}": 1 for number in range(20_000)})
    assert said.endswith("and 19992 more")
    assert len(asked) == 8
