"""The methods that are compared by name, and how a person writes one of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.generate import assignment
from lib_dynfuse.options import FIELDS, PRESETS, Options

_OPTIONS = tuple(field.name for field in FIELDS if field.name not in ("enabled", "parameters", "trace"))


class Method(NamedTuple):
    """One way to use both LoRAs: their strengths (0 leaves one out), and how they are fused."""

    label: str
    options: Options = Options(enabled=False)
    subject: float = 1.0
    style: float = 1.0

    @property
    def strengths(self) -> tuple[float, float]:
        return self.subject, self.style

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes its pictures, as JSON holds it."""
        return {"subject": self.subject, "style": self.style, "options": dict(self.options)}


def of(label: str, **values: Any) -> Method:
    """A method from strengths, options and the rule's own parameters, all by name.

    Without a strategy the LoRAs are added as the host does. Raises OptionsError.
    """
    subject, style = (float(values.pop(name, 1.0)) for name in ("subject", "style"))
    options = {name: values.pop(name) for name in _OPTIONS if name in values}
    given = {"enabled": True, **options, "parameters": values} if options or values else {"enabled": False}
    return Method(label, Options.read(given), subject, style)


# Spelled out, so that a method means the same whatever the defaults are.
_PLAIN = {
    **{"balance": 0.0, "auto_balance": False, "schedule": 0.0, "couple_cfg": False, "temperature": 1.0},
    **{"sample_tokens": 0, "decide_every": 1},
}
_EVEN = {**_PLAIN, "auto_balance": True, "couple_cfg": True}
# As the panel has it: 64 tokens of a layer are all that the boxed model's have, but for a prompt's 77.
_DEFAULT = {**_EVEN, "sample_tokens": 64}
# The default of the version before, which left both networks as loud as they were.
_BEFORE = {
    **{"loser": 0.5, "subject": 1.1, "style": 1.4, "negative": 0.4, "ceiling": 0.35},
    **{"subject_level": 0.0, "style_level": 0.0},
}

METHODS: dict[str, Method] = {
    method.label: method
    for method in (
        of("subject alone", style=0),
        of("style alone", subject=0),
        of("sum", strategy="sum"),
        of("sum 1/.8", strategy="sum", style=0.8),
        of("random", strategy="random"),
        of("klora", strategy="klora"),
        of("klora s*", strategy="klora", pattern="s*", beta=1.275),
        of("est", strategy="est"),
        of("np", strategy="np"),
        of("np 1/.8", strategy="np", style=0.8),
        of("switch", strategy="switch"),
        of("blocks", strategy="blocks"),
        of("kl", strategy="kl", **_PLAIN),
        of("kl balanced", strategy="kl", **_EVEN),
        of("sum-cfg", strategy="sum-cfg"),
        of("kl-cfg", strategy="kl-cfg", **_DEFAULT),
        of("kl-cfg before", strategy="kl-cfg", **_EVEN, **_BEFORE),
        of("paper", **{**_PLAIN, **PRESETS["paper"]}),
        of("kl-cfg + nudges", strategy="kl-cfg", nudge=True, **_DEFAULT),
    )
}


def chosen(names: str, written: Sequence[str]) -> list[Method]:
    """Methods by name, commas between them (empty: all, unless some are written), and those that a person wrote.

    Raises DynFuseError for an unknown name, for a label that is there twice, and what `parse` raises.
    """
    labels = [name.strip() for name in names.split(",") if name.strip()]
    if not labels and not written:
        labels = list(METHODS)
    for label in labels:
        if label not in METHODS:
            raise DynFuseError(f"--methods {label}: there are {', '.join(METHODS)}; write others with --method")
    found = [*(METHODS[label] for label in labels), *(parse(text) for text in written)]
    every = [method.label for method in found]
    if twice := next((label for label in every if every.count(label) > 1), None):
        raise DynFuseError(f"the method {twice} is there twice")
    return found


def parse(text: str) -> Method:
    """`LABEL: NAME=VALUE NAME=VALUE ...`: the strengths subject and style, options, the rule's own parameters."""
    label, colon, rest = text.partition(":")
    if not label.strip() or not colon:
        raise DynFuseError(f"--method {text}: write LABEL: NAME=VALUE ..., as in 'sum .7: strategy=sum subject=0.7'")
    values = dict(assignment(part, f"--method {label.strip()}") for part in rest.split())
    for name in ("subject", "style"):
        if not isinstance(values.get(name, 1), (int, float)) or isinstance(values.get(name), bool):
            raise DynFuseError(f"--method {label.strip()}: {name} is a strength, a number, not {values[name]!r}")
    return of(label.strip(), **values)
