"""The registry of fusion rules: their names, parameters, ranges and help, and `strategy()` that makes one.

A strategy is an immutable description. `start()` turns it into a `Rule` that lives for one `Fusion` and holds what the
rule has to remember.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib_dynfuse.core.rules import Rule, Strategy
from lib_dynfuse.core.rules_divergence import Cosine, JensenShannon, KLCfg, KLItem, KLSoft, KLToken
from lib_dynfuse.core.rules_static import Blocks, Coin, Est, KLora, NullSpace, Sum, SumCfg, Switch

__all__ = ["Parameter", "Rule", "Strategy", "StrategyInfo", "strategies", "strategy"]

_REGISTRY: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        Sum, SumCfg, KLItem, KLCfg, KLSoft, KLToken, JensenShannon, Cosine, KLora, Est, NullSpace, Switch, Blocks, Coin,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter of a strategy: either a number between `minimum` and `maximum`, a flag, or one of `choices`."""

    name: str
    default: Any
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...] | None
    help: str

    def check(self, owner: str, value: Any) -> Any:
        """`value` in the default's type, or `ValueError` naming the parameter and what is allowed."""
        where = f"strategy {owner!r}: {self.name}"
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{where} must be true or false, not {value!r}")
            return value
        if isinstance(self.default, str):
            if not isinstance(value, str) or (self.choices is not None and value not in self.choices):
                allowed = f"one of {', '.join(self.choices)}" if self.choices else "a text"
                raise ValueError(f"{where} must be {allowed}, not {value!r}")
            return value
        whole = isinstance(self.default, int)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            not number
            or (whole and value != int(value))
            or not (self.minimum is None or value >= self.minimum)
            or not (self.maximum is None or value <= self.maximum)
        ):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{where} must be {kind} from {self.minimum} to {self.maximum}, not {value!r}")
        return int(value) if whole else float(value)


@dataclass(frozen=True)
class StrategyInfo:
    """What a person chooses from: the rule's name, one line of help, its source, and its parameters."""

    name: str
    help: str
    source: str
    parameters: tuple[Parameter, ...]


def _parameters(kind: type[Strategy]) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(
            name=field.name,
            default=field.default,
            minimum=field.metadata.get("minimum"),
            maximum=field.metadata.get("maximum"),
            choices=field.metadata.get("choices"),
            help=field.metadata["help"],
        )
        for field in dataclasses.fields(kind)
    )


def strategies() -> dict[str, StrategyInfo]:
    """Every rule there is, by name, in the order in which a panel should list them."""
    return {name: StrategyInfo(name, kind.help, kind.source, _parameters(kind)) for name, kind in _REGISTRY.items()}


def strategy(name: str, **parameters: Any) -> Strategy:
    """The rule `name` with `parameters`; what is not given keeps its default.

    Raises `ValueError` that lists what there is for an unknown name or parameter, or a value that is not allowed.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown strategy {name!r}{_close(name, _REGISTRY)}; there are: {', '.join(_REGISTRY)}")
    kind = _REGISTRY[name]
    known = {parameter.name: parameter for parameter in _parameters(kind)}
    for given in parameters:
        if given not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"strategy {name!r} has no parameter {given!r}{_close(given, known)}; it has: {listed}")
    return kind(**{given: known[given].check(name, value) for given, value in parameters.items()})


def _close(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
