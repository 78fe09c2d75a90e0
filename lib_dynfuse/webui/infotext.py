"""From a picture's infotext back to the options that made it: for the paste buttons and the API's `infotext`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from lib_dynfuse.options import FIELDS, INFOTEXT_KEY, Options, OptionsError
from lib_dynfuse.webui.arguments import format_parameters, read_values

# It changes no picture, so an infotext says nothing of it and pasting leaves it as it is.
_NOT_DESCRIBED = ("trace",)


def fields_from_infotext(params: Mapping[str, str]) -> dict[str, Any]:
    """Option values that an infotext, parsed by the host, describes; empty if the picture was made without us.

    What is left out there, or cannot be used here because a newer version wrote it, has its default.
    """
    if INFOTEXT_KEY not in params:
        return {}
    values: dict[str, Any] = {"enabled": True}
    options = Options(**values)
    for option in FIELDS:
        if option.key not in params or option.name in ("enabled", *_NOT_DESCRIBED):
            continue
        try:
            options = read_values({**values, option.name: _parsed(option.name, params[option.key])})
        except OptionsError:
            continue
        values[option.name] = getattr(options, option.name)
    return {option.name: getattr(options, option.name) for option in FIELDS if option.name not in _NOT_DESCRIBED}


@functools.cache
def paste_value(name: str) -> Callable[[Mapping[str, str]], Any]:
    """For a Script's `infotext_fields`: what the option's component shows after pasting a parsed infotext.

    None, which leaves a component as it is, for a picture made without us; that one only switches `enabled` off.
    It is the same object each time: "Send to img2img" copies the fields of a tab that are in `paste_field_names` by
    equality, and where a field has a function it is this that has to stand there, not a key.
    """

    def read(params: Mapping[str, str]) -> Any:
        values = fields_from_infotext(params)
        if not values:
            return False if name == "enabled" else None
        return format_parameters(values[name]) if name == "parameters" else values.get(name)

    return read


def _parsed(name: str, text: str) -> Any:
    if name != "parameters":
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionsError(f"{name}: not JSON") from error
