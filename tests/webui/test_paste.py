"""A picture's infotext, pasted back, gives the options that made it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_dynfuse.core.strategies import Parameter, strategies
from lib_dynfuse.infotext import infotext
from lib_dynfuse.options import FIELDS, WINDOWS, Options
from lib_dynfuse.webui.arguments import read_arguments
from lib_dynfuse.webui.infotext import NOT_PASTED, fields_from_infotext, paste_value

# The WebUI's own reader of an infotext's last line (modules/infotext_utils.py).
WEBUI_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SHARED = {option.name for option in FIELDS}


def read_by_the_webui(text: str) -> dict[str, str]:
    last = text.strip().split("\n")[-1]
    return {
        key: json.loads(value) if value.startswith('"') and value.endswith('"') else value
        for key, value in WEBUI_PAIR.findall(last)
    }


def written(options: Options) -> dict[str, str]:
    values = {"Steps": 20, "Sampler": "Euler a", **options.infotext(), "Version": "v1.10.1"}
    return read_by_the_webui(infotext("a fox, <lora:fox:1:role=subject>", "blurry", values))


def allowed(entry: Any) -> st.SearchStrategy[Any]:
    """Any value that an option or a rule's parameter may have."""
    if isinstance(entry.default, bool):
        return st.booleans()
    if entry.choices:
        return st.sampled_from(entry.choices)
    if isinstance(entry.default, str):
        return st.text('abcXYZ019-_.:/ ,\\"', min_size=1).map(str.strip).filter(lambda text: text.strip('"'))
    kind = st.integers if isinstance(entry.default, int) else st.floats
    return kind(entry.minimum, entry.maximum)


def own(rule: str) -> list[Parameter]:
    return [parameter for parameter in strategies()[rule].parameters if parameter.name not in SHARED]


@st.composite
def any_options(draw: st.DrawFn) -> Options:
    values = {option.name: draw(allowed(option)) for option in FIELDS if option.name not in ("parameters", *NOT_PASTED)}
    for start, stop in WINDOWS:
        values[start], values[stop] = sorted((values[start], values[stop]))
    parameters = {one.name: draw(allowed(one)) for one in own(values["strategy"])}
    chosen = draw(st.sets(st.sampled_from(sorted(parameters)))) if parameters else set()
    options = Options.read({**values, "enabled": True, "parameters": {name: parameters[name] for name in chosen}})
    # What does nothing without nudges is not told.
    return Options(**{option.name: getattr(options, option.name) for option in FIELDS if options.matters(option.name)})


@given(any_options())
def test_every_option_comes_back(options: Options):
    assert Options.read(fields_from_infotext(written(options))) == options


@given(any_options())
def test_what_the_panel_shows_after_pasting_is_read_as_the_same_options(options: Options):
    params = written(options)
    shown = [paste_value(option.name)(params) for option in FIELDS]
    assert read_arguments(shown) == options


@given(any_options())
def test_values_have_the_type_of_the_panels_component(options: Options):
    # The host makes the component's own type of what is pasted: an int there would cut 0.5 to 0.
    params = written(options)
    for option in FIELDS:
        value = paste_value(option.name)(params)
        if option.name in NOT_PASTED:
            assert value is None
        else:
            assert type(value) is (str if option.name == "parameters" else type(option.default))


def test_what_is_at_its_default_is_set_back_to_it():
    options = Options(enabled=True, balance=0.5, nudge=True)
    assert fields_from_infotext(written(options)) == {
        option.name: getattr(options, option.name) for option in FIELDS if option.name not in NOT_PASTED
    }


PASTED = [option for option in FIELDS if option.name not in NOT_PASTED]
OF_NUDGES = ("references", "nudge_strength", "nudge_mode", "nudge_clamp", "weight_clip_text")


def test_a_picture_made_without_nudges_sets_all_of_theirs_back():
    values = fields_from_infotext(written(Options(enabled=True, nudge_strength=1.0, nudge_mode="xt")))
    assert {name: values[name] for name in ("nudge", *OF_NUDGES)} == {
        name: getattr(Options(), name) for name in ("nudge", *OF_NUDGES)
    }


@pytest.mark.parametrize("after", [Options(), Options(enabled=True), Options(enabled=True, score=True)])
@given(any_options())
def test_nothing_of_a_pasted_picture_stays_after_the_next_one(after: Options, before: Options):
    panel: dict[str, Any] = {}
    for params in (written(before), written(after)):
        shown = {option.name: paste_value(option.name)(params) for option in FIELDS}
        panel.update({name: value for name, value in shown.items() if value is not None})
    for option in PASTED:
        expected = "" if option.name == "parameters" else getattr(after, option.name)
        assert panel[option.name] == expected


def test_what_pictures_were_scored_with_is_pasted_and_whether_they_are_scored_is_not():
    values = fields_from_infotext(written(Options(enabled=True, score=True, weight_clip_text=2.0, keep_best=2)))
    assert (values["nudge"], values["weight_clip_text"]) == (False, 2.0)
    assert not {"score", "keep_best", "clip", "dino"} & set(values)


def test_what_would_open_or_fetch_a_file_is_told_and_not_pasted():
    options = Options(enabled=True, nudge=True, clip="ViT-L-14:openai", dino="stranger/model", nudge_decoder="vae")
    params = written(options)
    assert (params["DynFuse clip"], params["DynFuse dino"]) == ("ViT-L-14:openai", "stranger/model")
    assert Options.read(fields_from_infotext(params)) == Options(enabled=True, nudge=True)
    assert {paste_value(name)(params) for name in ("clip", "dino", "nudge_decoder")} == {None}


def test_reference_pictures_are_named_and_not_pasted():
    params = written(Options(enabled=True, nudge=True, subject_references=["a", "b"], style_references=["c"]))
    assert params["DynFuse subject references"] == "2 pictures"
    assert Options.read(fields_from_infotext(params)) == Options(enabled=True, nudge=True)
    assert paste_value("subject_references")(params) is None


def test_a_picture_made_without_us_switches_us_off_and_sets_the_rest_back():
    params = written(Options(balance=0.5))
    assert fields_from_infotext(params) == {}
    assert paste_value("enabled")(params) is False
    assert read_arguments([paste_value(option.name)(params) for option in FIELDS]) == Options()
    assert {paste_value(name)(params) for name in NOT_PASTED} == {None}


def test_the_same_option_has_the_same_function_in_both_tabs():
    # The host's "Send to img2img" copies those fields whose target is in `paste_field_names`.
    assert [paste_value(option.name) for option in FIELDS] == [paste_value(option.name) for option in FIELDS]
    assert len({paste_value(option.name) for option in FIELDS}) == len(FIELDS)


@pytest.mark.parametrize(
    "newer",
    [
        {"DynFuse strategy": "telepathy", "DynFuse parameters": '{"mind": 3}'},
        {"DynFuse balance": "7"},
        {"DynFuse balance": "left"},
        {"DynFuse decide every": "2.5"},
        {"DynFuse auto balance": "perhaps"},
        {"DynFuse parameters": "{"},
        {"DynFuse parameters": '{"softness": 1}'},
        {"DynFuse parameters": '{"name": 1}'},
        {"DynFuse parameters": "[" * 100_000},
        {"DynFuse parameters": '{"softness": ' + "[" * 500 + "]" * 500 + "}"},
        {"DynFuse balance": "9" * 400},
        {"DynFuse clip": "\ud800"},
        {"DynFuse aura": "0.5", "DynFuse enabled": "False"},
    ],
)
def test_what_a_newer_version_wrote_is_left_at_its_default_and_the_rest_is_read(newer: dict[str, str]):
    params = {"DynFuse": "99.0.0", "DynFuse schedule": "0.5", **newer}
    assert Options.read(fields_from_infotext(params)) == Options(enabled=True, schedule=0.5)


@pytest.mark.parametrize(("start", "stop"), [(0.8, 0.9), (0.1, 0.2), (0.3, 0.3), (0.0, 1.0)])
def test_a_nudges_window_comes_back_wherever_it_lies(start: float, stop: float):
    options = Options(enabled=True, nudge=True, nudge_start=start, nudge_stop=stop)
    assert Options.read(fields_from_infotext(written(options))) == options


def test_an_empty_step_window_is_not_pasted():
    params = {"DynFuse": "99.0.0", "DynFuse start": "0.5", "DynFuse stop": "0.25"}
    assert Options.read(fields_from_infotext(params)) == Options(enabled=True, start=0.5)
