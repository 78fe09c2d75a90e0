"""What arrives at the script, from the panel or the API, as `Options`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lib_dynfuse.errors import quoted, shown
from lib_dynfuse.guidance.sources import is_plain, not_allowed
from lib_dynfuse.options import FIELDS, Options, OptionsError, with_preset

# The panel's components stand in this order, so this is what a positional list means.
ORDER: tuple[str, ...] = tuple(option.name for option in FIELDS)
# Options whose values are pictures.
PICTURES = tuple(option.name for option in FIELDS if isinstance(option.default, list))
# Options that name files of weights.
ENCODERS = ("clip", "dino")
SWITCH = {"on": True, "true": True, "off": False, "false": False}


def read_arguments(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> Options:
    """The options of one generation.

    args: a single dict of options by name; or values in `ORDER`, of which the last may be missing and None or an
        emptied box means the default; or nothing. The WebUI puts the panel's defaults behind what the API was given,
        so a dict in the first place wins and what follows it is ignored.
    overrides: options that take the place of those in `args`, as an XYZ axis sets them.

    Raises OptionsError that names every wrong option and what is allowed.
    """
    return read_values({**_by_name(args), **(overrides or {})})


def read_values(values: Mapping[str, Any]) -> Options:
    """Options by name, as `Options.read`, where `parameters` may also be the panel's text, pictures its files, and a
    preset is named. An encoder is named, never pathed: whoever writes here may be a stranger."""
    values = with_preset(values)
    parameters = values.get("parameters")
    if isinstance(parameters, str):
        values = {**values, "parameters": parse_parameters(parameters)}
    options = Options.read({**values, **{name: pictures(values[name]) for name in PICTURES if name in values}})
    for name in ENCODERS:
        if not is_plain(getattr(options, name).strip()):
            raise OptionsError(f"{name}: {not_allowed(name.upper())}")
    return options


def pictures(given: Any) -> list[Any]:
    """Pictures as `Options` takes them, a path or a text each: of a list or of a single one.

    gradio 3 gives a file input's files as objects with a name, gradio 4 as paths, both None where there are none.
    What is none of these stays as it is, for `Options` to refuse.
    """
    if given is None:
        return []
    return [_source(one) for one in (given if isinstance(given, (list, tuple)) else [given])]


def _source(one: Any) -> Any:
    if isinstance(one, (str, os.PathLike)):
        return os.fspath(one)
    return getattr(one, "name", one)


def _by_name(args: Sequence[Any]) -> dict[str, Any]:
    if args and isinstance(args[0], Mapping):
        return dict(args[0])
    if len(args) > len(ORDER):
        raise OptionsError(f"{len(args)} arguments, at most {len(ORDER)} are allowed: {', '.join(ORDER)}")
    return {name: value for name, value in zip(ORDER, args, strict=False) if value is not None and value != ""}


def parse_parameters(text: str) -> dict[str, Any]:
    """`softness=0.5, standardise=on` -> {"softness": 0.5, "standardise": True}; commas or semicolons between.

    Raises OptionsError for a part that is not name=value, and for a name that is given twice.
    """
    parameters: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in re.split("[,;\n]", text))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise OptionsError(f"parameters: {quoted(part)} is not name=value; write for example softness=0.5")
        if name in parameters:
            raise OptionsError(f"parameters: {shown(name)} is given twice")
        parameters[name] = _value(value)
    return parameters


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """The text that `parse_parameters` reads, as the panel shows it."""
    words = {True: "on", False: "off"}
    return ", ".join(
        f"{name}={words[value] if isinstance(value, bool) else value}" for name, value in parameters.items()
    )


def _value(text: str) -> bool | int | float | str:
    if text.lower() in SWITCH:
        return SWITCH[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
