"""Options of every kind, from the API, the panel and a pasted picture; run it under pydantic 1 and 2."""

from __future__ import annotations

import json
from typing import Any

from fuzzing import assert_said, fuzz, json_values, numbers, texts
from hypothesis import strategies as st

from lib_dynfuse.core.strategies import strategies
from lib_dynfuse.infotext import infotext
from lib_dynfuse.options import FIELDS, INFOTEXT_KEY, Options, OptionsError
from lib_dynfuse.webui.api import wrong_arguments
from lib_dynfuse.webui.arguments import PICTURES, format_parameters, parse_parameters, read_arguments, read_values
from lib_dynfuse.webui.infotext import fields_from_infotext, paste_value

NAMES = [option.name for option in FIELDS]
OWN = sorted({parameter.name for info in strategies().values() for parameter in info.parameters})
rules = st.sampled_from(list(strategies()))


def likely(name: str) -> st.SearchStrategy[Any]:
    """Values near to those that an option takes, and others."""
    option = next(option for option in FIELDS if option.name == name)
    if option.choices:
        return st.sampled_from(option.choices)
    if option.minimum is not None and option.maximum is not None:
        kind = st.integers if isinstance(option.default, int) else st.floats
        return kind(option.minimum, option.maximum) | numbers | numbers.map(str)
    if name == "parameters":
        own = st.dictionaries(
            st.sampled_from([*OWN, "name", "self"]) | texts, numbers | texts | json_values, max_size=3
        )
        return own | own.map(lambda values: ", ".join(f"{key}={value!s:.40}" for key, value in values.items()))
    return texts | st.booleans()


by_name = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), likely(name) | json_values))
values = st.builds(
    lambda pairs, more, rule: {**dict(pairs), **more, **({"strategy": rule} if rule else {})},
    # Pictures have tests of their own: a text here may be the name of a file.
    st.lists(by_name.filter(lambda pair: pair[0] not in PICTURES), max_size=5),
    st.dictionaries(st.just("preset") | texts, json_values, max_size=2) | st.just({}),
    st.none() | rules,
)


def assert_right(options: Options) -> None:
    """What was taken is right all through: within its limits, read again as itself, and fit for a picture's text."""
    for option in FIELDS:
        value = getattr(options, option.name)
        if option.minimum is not None and option.maximum is not None:
            assert option.minimum <= value <= option.maximum
        if option.choices:
            assert value in option.choices
    options.make_strategy()
    assert Options.read(vars(options)) == options
    text = infotext("a fox", "", Options(**{**vars(options), "enabled": True}).infotext())
    text.encode("utf-8")
    json.dumps({option.name: getattr(options, option.name) for option in FIELDS}, allow_nan=False)


@fuzz(values)
def test_options_are_taken_or_refused_in_few_words(given: dict[str, Any]):
    try:
        options = read_values(given)
    except OptionsError as error:
        assert_said(str(error))
        return
    assert_right(options)


@fuzz(st.lists(json_values, max_size=len(NAMES) + 2) | values.map(lambda one: [one]))
def test_arguments_are_taken_or_refused_in_few_words(args: list[Any]):
    try:
        options = read_arguments(args)
    except OptionsError as error:
        assert_said(str(error))
        return
    assert_right(options)


entries = st.one_of(
    json_values,
    st.fixed_dictionaries({"args": st.lists(values | json_values, max_size=2) | json_values}),
    st.dictionaries(st.just("args") | texts, json_values, max_size=2),
)


@fuzz(
    st.one_of(
        json_values,
        st.fixed_dictionaries({"alwayson_scripts": json_values}),
        entries.map(lambda entry: {"alwayson_scripts": {"DynFuse": entry}}),
    )
)
def test_a_request_is_right_or_answered_in_few_words(body: Any):
    if said := wrong_arguments(body):
        assert_said(said)


written = st.dictionaries(
    st.sampled_from([INFOTEXT_KEY, *(option.key for option in FIELDS)]) | texts,
    texts | numbers.map(lambda number: f"{number!s:.4000}" if abs(number) < 10**4000 else "9" * 4301)
    | st.sampled_from(["True", "False", '{"alpha": 1e999}', '{"softness": [[]]}', '{"name": 1}', "kl-soft", "klora"]),
    max_size=6,
).map(lambda params: {INFOTEXT_KEY: "9.9.9", **params})  # fmt: skip


@fuzz(written)
def test_a_pasted_picture_gives_options_that_are_right_or_none(params: dict[str, str]):
    found = fields_from_infotext(params)
    assert_right(Options.read(found))
    shown = {option.name: paste_value(option.name)(params) for option in FIELDS}
    assert read_arguments([shown[name] for name in NAMES]).enabled is True


@fuzz(st.lists(st.sampled_from([",", ";", "=", "on", "off", *OWN]) | texts | numbers.map(lambda one: f"{one!s:.30}"
      if abs(one) < 1e300 else "inf"), max_size=9).map("".join))  # fmt: skip
def test_the_panels_text_of_parameters_is_read_or_refused_in_few_words(text: str):
    try:
        parameters = parse_parameters(text)
    except OptionsError as error:
        assert_said(str(error))
        return
    assert all(name and not set(name) & set(",;=\n") for name in parameters)
    format_parameters(parameters)
