"""From a picture's infotext back to the options that made it: for the paste buttons and the API's `infotext`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from lib_dynfuse.options import FIELDS, INFOTEXT_KEY, NOT_IN_INFOTEXT, WINDOWS, Options, OptionsError
from lib_dynfuse.webui.arguments import PICTURES, format_parameters, read_values

# What an infotext does not say, or says of pictures that are not in it: pasting leaves it as it is. So it leaves what
# would open or fetch a file: that is for whoever sits here to choose, not for the maker of a picture.
_OPENS_FILES = ("clip", "dino", "nudge_decoder")
NOT_PASTED = (*(name for name in NOT_IN_INFOTEXT if name != "enabled"), *PICTURES, *_OPENS_FILES)
_KEYS = {option.name: option.key for option in FIELDS if option.name not in ("enabled", *NOT_PASTED)}


def fields_from_infotext(params: Mapping[str, str]) -> dict[str, Any]:
    """Option values that an infotext, parsed by the host, describes; empty if the picture was made without us.

    What is left out there, or cannot be used here because a newer version wrote it, has its default: of another picture
    that was pasted before nothing stays, least of all in what is folded away.
    """
    if INFOTEXT_KEY not in params:
        return {}
    return dict(_read(tuple((name, str(params[key])) for name, key in _KEYS.items() if key in params)))


# The host asks for each of the panel's inputs on its own.
@functools.lru_cache(maxsize=4)
def _read(described: tuple[tuple[str, str], ...]) -> Mapping[str, Any]:
    """Of the names of options and their texts, what `fields_from_infotext` gives."""
    texts = dict(described)
    values = _usable({"enabled": True}, texts)
    if values is None:
        values = {"enabled": True}
        # A window's ends are judged together too: the one alone may be beyond the other's default.
        windows = [pair for pair in WINDOWS if set(pair) <= set(texts)]
        for names in (*((name,) for name in texts), *windows):
            values = _usable(values, {name: texts[name] for name in names}) or values
    return _shown(Options(**values))


def _shown(options: Options) -> Mapping[str, Any]:
    return {name: getattr(options, name) for name in ("enabled", *_KEYS)}


def _usable(values: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any] | None:
    """Values with these beside them; None where that cannot be."""
    try:
        options = read_values({**values, **{name: _parsed(name, text) for name, text in texts.items()}})
    except OptionsError:
        return None
    return {**values, **{name: getattr(options, name) for name in texts}}


@functools.cache
def paste_value(name: str) -> Callable[[Mapping[str, str]], Any]:
    """For a Script's `infotext_fields`: what the option's component shows after pasting a parsed infotext.

    A picture made without us switches `enabled` off and sets the rest to its default. None, which leaves a component as
    it is, for what no infotext says.
    It is the same object each time: "Send to img2img" copies the fields of a tab that are in `paste_field_names` by
    equality, and where a field has a function it is this that has to stand there, not a key.
    """

    def read(params: Mapping[str, str]) -> Any:
        values = fields_from_infotext(params) or _shown(Options())
        return format_parameters(values[name]) if name == "parameters" else values.get(name)

    return read


def _parsed(name: str, text: str) -> Any:
    if name != "parameters":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # nested more deeply than Python reads
        raise OptionsError(f"{name}: not JSON") from error
