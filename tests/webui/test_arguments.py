"""What arrives at the script, from the panel or the API, becomes the same options or a clear complaint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_dynfuse.options import FIELDS, Options, OptionsError
from lib_dynfuse.webui.arguments import ORDER, format_parameters, parse_parameters, read_arguments

DEFAULTS = [option.default for option in FIELDS]


def test_the_order_begins_with_enabled_and_names_every_option_once():
    assert ORDER[0] == "enabled"
    assert sorted(ORDER) == sorted(option.name for option in FIELDS)


def test_nothing_means_the_defaults():
    assert read_arguments([]) == Options()


def test_a_dict_names_its_options():
    options = read_arguments([{"enabled": True, "strategy": "js", "balance": 0.5}])
    assert options == Options(enabled=True, strategy="js", balance=0.5)


def test_the_defaults_that_the_host_puts_behind_a_dict_are_ignored():
    assert read_arguments([{"enabled": True}, *DEFAULTS[1:]]) == Options(enabled=True)


def test_a_list_follows_the_panel_and_may_be_short():
    assert read_arguments([True, "js", 0.5]) == Options(enabled=True, strategy="js", balance=0.5)
    assert read_arguments(DEFAULTS) == Options()


@pytest.mark.parametrize("nothing", [None, ""])
def test_none_or_an_emptied_box_in_a_list_is_the_default(nothing: Any):
    assert read_arguments([True, nothing, 0.5]) == Options(enabled=True, balance=0.5)
    assert read_arguments([True, *[nothing] * (len(ORDER) - 1)]) == Options(enabled=True)


def test_a_list_that_is_too_long_is_refused():
    with pytest.raises(OptionsError, match=f"{len(ORDER) + 1} arguments, at most {len(ORDER)}"):
        read_arguments([*DEFAULTS, 1])


def test_overrides_take_the_place_of_arguments_before_these_are_judged():
    assert read_arguments([True, "js", 9.0], {"balance": 0.5}) == Options(enabled=True, strategy="js", balance=0.5)


@pytest.mark.parametrize("given", ["softness=0.5, standardise=on", {"softness": 0.5, "standardise": True}])
def test_a_rules_own_parameters_are_text_or_a_dict(given: Any):
    options = read_arguments([{"strategy": "kl-soft", "parameters": given}])
    assert options.parameters == {"softness": 0.5, "standardise": True}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, []),
        ([], []),
        (["fox.png", "data:image/png;base64,AAAA"], ["fox.png", "data:image/png;base64,AAAA"]),
        ("fox.png", ["fox.png"]),
        (Path("in/fox.png"), [str(Path("in/fox.png"))]),
        ([SimpleNamespace(name="/tmp/fox.png", orig_name="fox.png"), "b.png"], ["/tmp/fox.png", "b.png"]),
        (SimpleNamespace(name="/tmp/fox.png"), ["/tmp/fox.png"]),
    ],
)
def test_pictures_are_paths_or_texts_or_the_files_of_either_gradio(given: Any, read: list[str]):
    options = read_arguments([{"subject_references": given}])
    assert options.subject_references == read
    panel = [None] * len(ORDER)
    panel[ORDER.index("style_references")] = given
    assert read_arguments(panel).style_references == read


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([{"blance": 1}], ["blance", "did you mean balance?"]),
        ([{"balance": 3}], ["balance", "-1 to 1"]),
        ([{"balance": True}], ["balance", "True is not a number", "-1 to 1"]),
        ([{"balance": None}], ["balance", "-1 to 1"]),
        ([{"sample_tokens": 64.5}], ["sample_tokens", "64.5 is not a whole number", "0 to 4096"]),
        ([{"sample_tokens": 1.5, "decide_every": True}], ["sample_tokens", "decide_every"]),
        ([True, "kll"], ["'kll'", "kl-token"]),
        ([True, "kl", "left"], ["balance", "-1 to 1"]),
        ([{"parameters": "softness"}], ["parameters", "'softness' is not name=value"]),
        ([{"parameters": "softness=1, softness=2"}], ["parameters", "softness is given twice"]),
        ([{"parameters": "softness=1"}], ["'kl-cfg'", "'softness'"]),
        ([{"subject_references": 3}], ["subject_references", "3 is no picture"]),
        ([{"style_references": ["a.png", None]}], ["style_references", "None is no picture"]),
    ],
)
def test_what_is_not_allowed_is_refused_by_name_with_what_is(args: list[Any], words: list[str]):
    with pytest.raises(OptionsError) as error:
        read_arguments(args)
    for word in words:
        assert word in str(error.value)


def test_a_whole_number_may_be_written_as_a_float():
    assert read_arguments([{"sample_tokens": 64.0}]).sample_tokens == 64


def test_parameters_as_text_know_switches_numbers_and_words():
    text = "alpha=1.5, every=5; pattern=s*\nstandardise=On, other = off,"
    parameters = {"alpha": 1.5, "every": 5, "pattern": "s*", "standardise": True, "other": False}
    assert parse_parameters(text) == parameters
    assert parse_parameters(format_parameters(parameters)) == parameters
    assert parse_parameters("") == {}
    assert format_parameters({}) == ""
