"""The options: one table, which the panel, the API, the command line, the infotext and the README are made from.

Only what pydantic 1.10 and pydantic 2 share is used: hosts have the one or the other.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from lib_dynfuse import __version__
from lib_dynfuse.core.rules import Strategy
from lib_dynfuse.core.strategies import Parameter, StrategyInfo, strategies, strategy
from lib_dynfuse.errors import MOST_SHOWN, DynFuseError, quoted, shown, writable

INFOTEXT_KEY = "DynFuse"
# What tests/bench/NOTES.md speaks for, with the two switches and the sampled tokens below.
DEFAULT_STRATEGY = "kl-cfg"
# Settings by name, for who would not choose one by one; what a preset does not name has its default.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "strategy": "kl",
        "auto_balance": False,
        "couple_cfg": False,
        "sample_tokens": 0,
        "nudge": True,
        "nudge_mode": "xt",
        "nudge_start": 0.0,
        "nudge_stop": 1.0,
    },
    "subject first": {"balance": -0.4},
    "style first": {"balance": 0.4},
}
# They change no picture, so they are no part of a picture's description.
NOT_IN_INFOTEXT = ("enabled", "score", "keep_best", "trace")
# The first and the last step of something, as shares of all steps.
WINDOWS = (("start", "stop"), ("nudge_start", "nudge_stop"))
# Of many wrong options in one answer.
_MOST_WRONG = 8
_DIVERGENCE = {parameter.name: parameter for parameter in strategies()[DEFAULT_STRATEGY].parameters}


class OptionsError(DynFuseError):
    """A value that is not allowed; the message names the field, the value and what is allowed."""


def _shared(name: str, label: str, default: float | None = None) -> Any:
    """An option that is a parameter of the divergence rules: range, help and, without another, default are theirs."""
    parameter = _DIVERGENCE[name]
    return Field(
        parameter.default if default is None else default,
        title=label,
        ge=parameter.minimum,
        le=parameter.maximum,
        description=parameter.help,
    )


def _weight(label: str, default: float, of: str) -> Any:
    """An option that is the weight of one of guidance's terms."""
    return Field(default, title=label, ge=0.0, le=10.0, description=f"How much it counts to be near to {of}.")


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
    auto_balance: bool = _shared("auto_balance", "Even out strengths", default=True)
    schedule: float = _shared("schedule", "Subject early, style late")
    couple_cfg: bool = _shared("couple_cfg", "Prompt decides for negative prompt", default=True)
    temperature: float = _shared("temperature", "Temperature")
    sample_tokens: int = _shared("sample_tokens", "Tokens sampled", default=64)
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
    nudge: bool = Field(
        default=False,
        title="Nudge towards references",
        description="At some steps, move the picture a little towards reference pictures, as CLIP and DINO see them.",
    )
    nudge_mode: Literal["x0", "adam", "xt"] = Field(
        default="x0",
        title="Way of nudging",
        description="x0: one step on the denoised picture. adam: three smaller ones. "
        "xt: through the UNet, as in the paper; much memory, not on Forge.",
    )
    nudge_strength: float = Field(
        default=0.2, title="Nudge strength", ge=0.0, le=2.0, description="How far one nudge goes; 0 goes nowhere."
    )
    nudge_start: float = Field(
        default=0.3,
        title="Nudge from",
        ge=0.0,
        le=1.0,
        description="Where nudging begins: 0 at the first step, 1 at the last.",
    )
    nudge_stop: float = Field(
        default=1.0,
        title="Nudge until",
        ge=0.0,
        le=1.0,
        description="Where nudging ends: 0 at the first step, 1 at the last.",
    )
    nudge_every: int = Field(
        default=1, title="Nudge every", ge=1, le=100, description="Steps from one nudge to the next."
    )
    nudge_clamp: float = Field(
        default=0.03,
        title="Nudge at most",
        ge=0.0,
        le=1.0,
        description="No nudge moves the denoised picture by more than this share of its own size.",
    )
    nudge_decoder: Literal["taesd", "vae", "linear"] = Field(
        default="taesd",
        title="Nudge decoder",
        description="What the encoders look at. taesd: a small preview decoder. vae: the picture itself; much memory. "
        "linear: a rough one that needs no file.",
    )
    nudge_cutouts: int = Field(
        default=0,
        title="Cutouts",
        ge=0,
        le=32,
        description="Random parts of the picture that CLIP looks at; 0: the whole.",
    )
    weight_clip_subject: float = _weight("Weight of CLIP, subject", 1.0, "the subject, as CLIP sees it")
    weight_clip_style: float = _weight("Weight of CLIP, style", 1.0, "the style, as CLIP sees it")
    weight_dino_style: float = _weight("Weight of DINO, style", 1.0, "the style, as DINO sees it")
    weight_dino_subject: float = _weight("Weight of DINO, subject", 0.0, "the subject, as DINO sees it")
    weight_clip_text: float = _weight("Weight of CLIP, prompt", 0.0, "the prompt, as CLIP reads it")
    clip: str = Field(
        default="ViT-B-32:laion2b_s34b_b79k",
        title="CLIP",
        min_length=1,
        description="A folder or a file in models/dynfuse, or a name that the server allows; none leaves it out.",
    )
    dino: str = Field(
        default="facebook/dino-vits16",
        title="DINO",
        min_length=1,
        description="A folder or a file in models/dynfuse, or a name that the server allows; none leaves it out.",
    )
    references: Literal["auto", "given", "preview", "generated"] = Field(
        default="auto",
        title="References from",
        description="given: those that you give. preview: the LoRA's own on disk. "
        "generated: by that LoRA alone, once. auto: the first that is there.",
    )
    subject_references: list[str] = Field(
        default=[], title="Subject pictures", description="Pictures of the subject to be near to."
    )
    style_references: list[str] = Field(
        default=[], title="Style pictures", description="Pictures of the style to be near to."
    )
    score: bool = Field(
        default=False,
        title="Score pictures",
        description="Write into each infotext how near its picture came to the references; nudged ones have it anyway.",
    )
    keep_best: int = Field(
        default=0,
        title="Keep best",
        ge=0,
        le=100,
        description="Of each batch keep this many, by the harmonic mean of subject and style; 0 keeps all.",
    )
    trace: bool = Field(
        default=False, title="Show what was chosen", description="Record every choice and draw a heat map of it."
    )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Options:
        """Options from outside. Raises OptionsError that names every wrong field and what is allowed there."""
        unknown = [name for name in values if name not in _NAMES]
        wrong = [_unknown(name) for name in unknown[:_MOST_WRONG]]
        wrong += [said for option in FIELDS if (said := _would_change(option, values.get(option.name)))]
        if wrong:
            raise OptionsError(_together(wrong, len(unknown[_MOST_WRONG:])))
        try:
            options = cls(**values)
        except ValidationError as error:
            raise OptionsError(_together([_sentence(one) for one in error.errors()])) from error
        options.make_strategy()
        for start, stop in WINDOWS:
            first, last = getattr(options, start), getattr(options, stop)
            # In the panel a nudge's window is out of sight while there are no nudges.
            if first > last and options.matters(start):
                raise OptionsError(f"{start} {first:g} is after {stop} {last:g}: the step window is empty")
        return options

    @property
    def compares(self) -> bool:
        """Whether pictures are compared with references: to be nudged, to be scored, or to keep the best."""
        return self.nudge or self.score or self.keep_best > 0

    def matters(self, name: str) -> bool:
        """Whether an option of guidance does anything beside these; True for every other option."""
        if name.startswith("nudge_"):
            return self.nudge
        return self.compares or name not in _COMPARED_WITH

    def make_strategy(self) -> Strategy:
        """The fusion rule that these options describe. Raises OptionsError that lists what there is."""
        doubled = [name for name in self.parameters if name in _shared_names()]
        if doubled:
            raise OptionsError(f"parameters: {doubled[0]} is an option of its own; set it there")
        info = strategies().get(self.strategy)
        if info is None:
            raise OptionsError(
                f"strategy: unknown strategy {quoted(self.strategy)}{_hint(self.strategy, strategies(), repr)}; "
                f"there are: {', '.join(strategies())}"
            )
        _check_own(info, self.parameters)
        shared = {name: getattr(self, name) for name in _applying(self.strategy)}
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

    def infotext(self, fingerprints: Mapping[str, str] | None = None) -> dict[str, str]:
        """Infotext keys and values: the version, the rule, and whatever is not at its default; nothing when off.

        Options of guidance are written where they matter; reference pictures as their number and, where `fingerprints`
        has it by the option's name, what tells them from others. No picture is opened for it.
        """
        if not self.enabled:
            return {}
        defaults = Options()
        written = {INFOTEXT_KEY: __version__}
        for option in FIELDS:
            value = getattr(self, option.name)
            if option.name in NOT_IN_INFOTEXT or not self.matters(option.name):
                continue
            if option.name == "strategy" or value != getattr(defaults, option.name):
                own = (fingerprints or {}).get(option.name, "")
                written[option.key] = _file_name(value) if option.name in _OF_FILES else _written(value, own)
        return written


def _file_name(name: str) -> str:
    """Of an encoder that is named by its path, the last part: a picture does not tell of its maker's folders."""
    architecture, colon, path = name.rpartition(":")
    if colon and len(architecture) < 2:  # a drive
        architecture, colon, path = "", "", name
    parts = path.replace("\\", "/").rstrip("/").split("/")
    relative = "\\" not in path and not set(parts) & {"", ".", "..", "~"}
    return f"{architecture}{colon}{path if relative else parts[-1]}"


def _written(value: Any, fingerprints: str) -> str:
    if isinstance(value, list):
        return f"{len(value)} picture{'s' if len(value) > 1 else ''} {fingerprints}".strip()
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


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
        if isinstance(self.default, dict):
            return "see the rules"
        return (
            "a list of base64 or data URLs, and of paths where these are allowed"
            if isinstance(self.default, list)
            else "a name, a folder or a file"
        )


def _read_fields() -> tuple[Option, ...]:
    fields: Any = getattr(Options, "model_fields", None) or Options.__fields__
    kinds = inspect.get_annotations(Options, eval_str=True)
    return tuple(_option(name, getattr(field, "field_info", field), kinds[name]) for name, field in fields.items())


def _option(name: str, info: Any, kind: Any) -> Option:
    def limit(which: str) -> float | None:
        # pydantic 1 keeps limits on the field, pydantic 2 in its metadata.
        holders = [info, *getattr(info, "metadata", ())]
        return next((value for holder in holders if (value := getattr(holder, which, None)) is not None), None)

    choices = tuple(strategies()) if name == "strategy" else get_args(kind) if get_origin(kind) is Literal else ()
    return Option(name, info.title, info.default, limit("ge"), limit("le"), choices, info.description)


FIELDS: tuple[Option, ...] = _read_fields()
_NAMES = tuple(option.name for option in FIELDS)
# Options that say how LoRAs are fused.
OF_FUSION = tuple(
    option.name for option in FIELDS if option.name in ("strategy", "start", "stop", "parameters", *_DIVERGENCE)
)
# Options that may be the path of a file, on the command line.
_OF_FILES = ("clip", "dino")
# Options of guidance that say what pictures are compared with, and how.
_COMPARED_WITH = tuple(
    option.name
    for option in FIELDS
    if option.name.startswith("weight_") or option.name in ("clip", "dino", "references") or option.default == []
)


def _shared_names() -> tuple[str, ...]:
    return tuple(option.name for option in FIELDS if option.name in _DIVERGENCE)


def _applying(name: str) -> list[str]:
    info = strategies().get(name)
    known = {parameter.name for parameter in info.parameters} if info else set()
    return [shared for shared in _shared_names() if shared in known]


def _would_change(option: Option, value: Any) -> str:
    """What to say of a value that pydantic takes for another, or stumbles over.

    1 cuts 64.5 to a whole 64 and both take true for 1; 1 has no float for an integer of 400 digits, and takes half a
    surrogate pair, which no file can hold.
    """
    if isinstance(option.default, list) and isinstance(value, list):
        other = [one for one in value if not (isinstance(one, str) and one.strip())]
        return f"{option.name}: {quoted(other[0])} is no picture; allowed: {option.allowed}" if other else ""
    if isinstance(value, str) and writable(value) != value:
        return f"{option.name}: {quoted(value)} has half a surrogate pair; allowed: {option.allowed}"
    if option.minimum is None or option.maximum is None or not isinstance(value, (bool, int, float)):
        return ""
    whole = isinstance(option.default, int)
    if isinstance(value, bool) or (whole and isinstance(value, float) and not value.is_integer()):
        wrong = f"is not a {'whole ' if whole else ''}number"
    elif not option.minimum <= value <= option.maximum:
        wrong = "is out of its range"
    else:
        return ""
    return f"{option.name}: {quoted(value)} {wrong}; allowed: {option.allowed}"


def _check_own(info: StrategyInfo, parameters: Mapping[str, Any]) -> None:
    """Raises OptionsError for a parameter that the rule has not, and for a value that is no switch, number or text."""
    known = {parameter.name: parameter for parameter in info.parameters}
    own = [name for name in known if name not in _shared_names()]
    for name, value in parameters.items():
        if name not in known:
            raise OptionsError(
                f"parameters: strategy {info.name!r} has no parameter {quoted(name)}{_hint(name, known, repr)}; "
                f"its own are: {', '.join(own) or 'none'}"
            )
        if not _is_plain(value):
            raise OptionsError(f"parameters: {name}: {quoted(value)} is no switch, number or short text")


def _is_plain(value: Any) -> bool:
    """Whether a value is what a rule's parameter may be, and can be written into a message as it is."""
    if isinstance(value, str):
        return len(value) <= MOST_SHOWN
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 2**63


def _hint(name: str, known: Iterable[str], write: Callable[[str], str] = str) -> str:
    """ " (did you mean balance?)", or nothing where no known name is near."""
    near = difflib.get_close_matches(name[:MOST_SHOWN], list(known), n=1)
    return f" (did you mean {write(near[0])}?)" if near else ""


def _unknown(name: str) -> str:
    """Said here, as pydantic 2 cannot name an option whose name has half a surrogate pair."""
    return f"{shown(name)}: unknown option{_hint(name, _NAMES)}; there are: {', '.join(_NAMES)}"


def _sentence(error: Any) -> str:
    name = str(error["loc"][0])
    option = next(option for option in FIELDS if option.name == name)
    return f"{name}: {shown(error['msg'][:1].lower() + error['msg'][1:])}; allowed: {option.allowed}"


def _together(sentences: Sequence[str], unsaid: int = 0) -> str:
    more = len(sentences) - _MOST_WRONG + unsaid
    return "; ".join([*sentences[:_MOST_WRONG], *([f"and {more} more"] if more > 0 else [])])


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` on top of the preset that they may name as "preset". Raises OptionsError for one that is not there."""
    chosen = dict(values)
    name = chosen.pop("preset", "default")
    if not isinstance(name, str) or name not in PRESETS:
        raise OptionsError(f"preset: {quoted(name)} is not known; there are: {', '.join(PRESETS)}")
    return {**PRESETS[name], **chosen}


def options_table() -> str:
    """The README's table of options, in Markdown."""
    rows = ["| Option | In the panel | Default | Allowed | What it does |", "|---|---|---|---|---|"]
    for option in FIELDS:
        default = {True: "on", False: "off"}[option.default] if isinstance(option.default, bool) else option.default
        shown = "none" if default in ({}, []) else f"{default:g}" if isinstance(default, float) else default
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
