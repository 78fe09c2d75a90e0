"""The options: one table, which the panel, the API, the command line, the infotext and the README are made from.

Only what pydantic 1.10 and pydantic 2 share is used: hosts have the one or the other.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from lib_dynfuse import __version__
from lib_dynfuse.core.rules import Strategy
from lib_dynfuse.core.strategies import Parameter, strategies, strategy
from lib_dynfuse.errors import DynFuseError

INFOTEXT_KEY = "DynFuse"
DEFAULT_STRATEGY = "kl"
# Switches that change no picture, so they are no part of a picture's description.
_NOT_IN_INFOTEXT = ("enabled", "trace")
_DIVERGENCE = {parameter.name: parameter for parameter in strategies()[DEFAULT_STRATEGY].parameters}


class OptionsError(DynFuseError):
    """A value that is not allowed; the message names the field, the value and what is allowed."""


def _shared(name: str, label: str) -> Any:
    """An option that is a parameter of the divergence rules: default, range and help are theirs."""
    parameter = _DIVERGENCE[name]
    return Field(parameter.default, title=label, ge=parameter.minimum, le=parameter.maximum, description=parameter.help)


class Options(BaseModel, extra="forbid"):
    """What a person chooses for one generation. `Options.read` is the way in for values from outside."""

    enabled: bool = Field(
        default=False, title="Dynamic LoRA Fusion", description="Choose between the subject LoRA and the style LoRA."
    )
    strategy: str = Field(
        default=DEFAULT_STRATEGY,
        title="Rule",
        description="How a layer is given to the subject, to the style or to both.",
    )
    balance: float = _shared("balance", "Subject to style")
    auto_balance: bool = _shared("auto_balance", "Even out strengths")
    schedule: float = _shared("schedule", "Subject early, style late")
    couple_cfg: bool = _shared("couple_cfg", "Prompt decides for negative prompt")
    temperature: float = _shared("temperature", "Temperature")
    sample_tokens: int = _shared("sample_tokens", "Tokens sampled")
    decide_every: int = _shared("decide_every", "Decide every")
    start: float = Field(
        default=0.0,
        title="From",
        ge=0.0,
        le=1.0,
        description="Where choosing begins: 0 at the first step, 1 at the last. Before, both are added.",
    )
    stop: float = Field(
        default=1.0,
        title="Until",
        ge=0.0,
        le=1.0,
        description="Where choosing ends: 0 at the first step, 1 at the last. After, both are added.",
    )
    parameters: dict[str, Any] = Field(
        default={}, title="Rule's own parameters", description="Parameters that only the chosen rule has, by name."
    )
    trace: bool = Field(
        default=False, title="Show what was chosen", description="Record every choice and draw a heat map of it."
    )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Options:
        """Options from outside. Raises OptionsError that names every wrong field and what is allowed there."""
        changed = [said for option in FIELDS if (said := _would_change(option, values.get(option.name)))]
        if changed:
            raise OptionsError("; ".join(changed))
        try:
            options = cls(**values)
        except ValidationError as error:
            raise OptionsError("; ".join(_sentence(one) for one in error.errors())) from error
        options.make_strategy()
        if options.start > options.stop:
            raise OptionsError(f"start {options.start:g} is after stop {options.stop:g}: the step window is empty")
        return options

    def make_strategy(self) -> Strategy:
        """The fusion rule that these options describe. Raises OptionsError that lists what there is."""
        doubled = [name for name in self.parameters if name in _shared_names()]
        if doubled:
            raise OptionsError(f"parameters: {doubled[0]} is an option of its own; set it there")
        info = strategies().get(self.strategy)
        shared = {} if info is None else {name: getattr(self, name) for name in _applying(self.strategy)}
        try:
            return strategy(self.strategy, **shared, **self.parameters)
        except ValueError as error:
            raise OptionsError(str(error)) from error

    def unused(self) -> list[str]:
        """Options that were moved from their default but mean nothing to the chosen rule."""
        applying = _applying(self.strategy)
        defaults = Options()
        return [
            name for name in _shared_names() if name not in applying and getattr(self, name) != getattr(defaults, name)
        ]

    def infotext(self) -> dict[str, str]:
        """Infotext keys and values: the version, the rule, and whatever is not at its default; nothing when off."""
        if not self.enabled:
            return {}
        defaults = Options()
        written = {INFOTEXT_KEY: __version__}
        for option in FIELDS:
            value = getattr(self, option.name)
            if option.name in _NOT_IN_INFOTEXT:
                continue
            if option.name == "strategy" or value != getattr(defaults, option.name):
                written[option.key] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
        return written


@dataclass(frozen=True)
class Option:
    """One row of the table. `key` is its name in a picture's infotext."""

    name: str
    label: str
    default: Any
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    help: str

    @property
    def key(self) -> str:
        return f"{INFOTEXT_KEY} {self.name.replace('_', ' ')}"

    @property
    def allowed(self) -> str:
        """What may be written here, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if isinstance(self.default, bool):
            return "on, off"
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        return "see the rules"


def _read_fields() -> tuple[Option, ...]:
    fields: Any = getattr(Options, "model_fields", None) or Options.__fields__
    return tuple(_option(name, getattr(field, "field_info", field)) for name, field in fields.items())


def _option(name: str, info: Any) -> Option:
    def limit(which: str) -> float | None:
        # pydantic 1 keeps limits on the field, pydantic 2 in its metadata.
        holders = [info, *getattr(info, "metadata", ())]
        return next((value for holder in holders if (value := getattr(holder, which, None)) is not None), None)

    default = {} if name == "parameters" else info.default
    choices = tuple(strategies()) if name == "strategy" else ()
    return Option(name, info.title, default, limit("ge"), limit("le"), choices, info.description)


FIELDS: tuple[Option, ...] = _read_fields()


def _shared_names() -> tuple[str, ...]:
    return tuple(option.name for option in FIELDS if option.name in _DIVERGENCE)


def _applying(name: str) -> list[str]:
    info = strategies().get(name)
    known = {parameter.name for parameter in info.parameters} if info else set()
    return [shared for shared in _shared_names() if shared in known]


def _would_change(option: Option, value: Any) -> str:
    """What to say of a value that pydantic takes for another: 1 cuts 64.5 to a whole 64, both take true for 1."""
    if option.minimum is None:
        return ""
    whole = isinstance(option.default, int)
    if not isinstance(value, bool) and not (whole and isinstance(value, float) and not value.is_integer()):
        return ""
    return f"{option.name}: {value!r} is not a {'whole ' if whole else ''}number; allowed: {option.allowed}"


def _sentence(error: Any) -> str:
    name = str(error["loc"][0])
    option = next((option for option in FIELDS if option.name == name), None)
    if option is None:
        names = [option.name for option in FIELDS]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{name}: unknown option{hint}; there are: {', '.join(names)}"
    return f"{name}: {error['msg'][:1].lower()}{error['msg'][1:]}; allowed: {option.allowed}"


def options_table() -> str:
    """The README's table of options, in Markdown."""
    rows = ["| Option | In the panel | Default | Allowed | What it does |", "|---|---|---|---|---|"]
    for option in FIELDS:
        default = {True: "on", False: "off"}[option.default] if isinstance(option.default, bool) else option.default
        shown = "none" if default == {} else f"{default:g}" if isinstance(default, float) else default
        rows.append(f"| `{option.name}` | {option.label} | {shown} | {option.allowed} | {option.help} |")
    return "\n".join(rows)


def rules_table() -> str:
    """The README's table of fusion rules and the parameters that are theirs alone, in Markdown."""
    rows = ["| Rule | What it does | Parameters | Source |", "|---|---|---|---|"]
    for info in strategies().values():
        own = [_described(one) for one in info.parameters if one.name not in _shared_names()]
        rows.append(f"| `{info.name}` | {info.help} | {'; '.join(own)} | {info.source} |")
    return "\n".join(rows)


def _described(parameter: Parameter) -> str:
    if isinstance(parameter.default, bool):
        return f"`{parameter.name}` {'on' if parameter.default else 'off'}"
    if parameter.choices:
        return f"`{parameter.name}` {parameter.default} ({', '.join(parameter.choices)})"
    return f"`{parameter.name}` {parameter.default:g} ({parameter.minimum:g} to {parameter.maximum:g})"
