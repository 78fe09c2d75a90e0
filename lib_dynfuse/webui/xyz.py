"""An X/Y/Z plot axis for every option."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lib_dynfuse.core.strategies import strategies
from lib_dynfuse.errors import quoted
from lib_dynfuse.options import FIELDS, Option, OptionsError
from lib_dynfuse.webui.arguments import PICTURES, SWITCH, parse_parameters, read_values
from lib_dynfuse.webui.references import REFUSED, could_be_allowed

PREFIX = "[DynFuse]"
_ATTRIBUTE = "_dynfuse_overrides"
# The host loads its scripts under bare file names; its forks under the dotted one.
_MODULES = ("xyz_grid.py", "scripts.xyz_grid")


def register(scripts_data: Iterable[Any]) -> bool:
    """Add our axes to the host's X/Y/Z plot, once; whether it was found.

    scripts_data: `modules.scripts.scripts_data`. To be called when our script is loaded, since with `--nowebui` the
    callbacks come too late, and again before the UI is built.
    """
    found = False
    for data in scripts_data:
        if data.script_class.__module__ not in _MODULES or not hasattr(data.module, "axis_options"):
            continue
        found = True
        known = {option.label for option in data.module.axis_options}
        added = [option for option in FIELDS if axis_label(option) not in known]
        data.module.axis_options.extend(_axis(data.module.AxisOption, option) for option in added)
    return found


def overrides(p: Any) -> Mapping[str, Any]:
    """Options by name that the axes set for this cell; empty outside of a plot."""
    found: Mapping[str, Any] = getattr(p, _ATTRIBUTE, {})
    return found


def axis_label(option: Option) -> str:
    """The axis' name in the host's list."""
    return f"{PREFIX} {'Enabled' if option.name == 'enabled' else option.label}"


def _axis(kind: Callable[..., Any], option: Option) -> Any:
    choices: tuple[str, ...] = ("on", "off") if isinstance(option.default, bool) else option.choices
    number = option.minimum is not None
    return kind(
        axis_label(option),
        type(option.default) if number else str,
        _apply(option),
        confirm=_confirm(option),
        choices=(lambda: list(choices)) if choices else None,
    )


def _apply(option: Option) -> Callable[[Any, Any, Sequence[Any]], None]:
    def apply(p: Any, x: Any, xs: Sequence[Any]) -> None:
        # Cells are shallow copies of one p: a dict that is changed in place would reach all of them.
        setattr(p, _ATTRIBUTE, {**overrides(p), option.name: _value(option, x)})

    return apply


def _confirm(option: Option) -> Callable[[Any, Sequence[Any]], None]:
    def confirm(p: Any, xs: Sequence[Any]) -> None:
        for x in xs:
            value = _value(option, x)
            # What a rule's own parameters may be depends on the rule, which may be an axis too: judged in the cell.
            if option.name == "parameters":
                _confirm_names(value)
            elif option.name in PICTURES and not all(map(could_be_allowed, value)):
                raise OptionsError(f"{option.name}: the picture {REFUSED}")
            else:
                read_values({option.name: value})

    return confirm


def _confirm_names(parameters: Mapping[str, Any]) -> None:
    known = sorted({one.name for info in strategies().values() for one in info.parameters} - {o.name for o in FIELDS})
    for name in parameters:
        if name not in known:
            raise OptionsError(f"parameters: no rule has {quoted(name)}; there are: {', '.join(known)}")


def _value(option: Option, x: Any) -> Any:
    """An axis value, text or number, as the option's own."""
    if isinstance(option.default, bool):
        if str(x).strip().lower() not in SWITCH:
            raise OptionsError(f"{option.name}: {quoted(x)} is not {option.allowed.replace(', ', ' or ')}")
        return SWITCH[str(x).strip().lower()]
    if option.name == "parameters":
        return parse_parameters(x)
    if option.name in PICTURES:
        return [x.strip()] if x.strip() else []
    # The host's ranges add up steps: 0-1 (+0.1) ends a few 1e-16 beyond 1.
    return round(x, 8) if isinstance(x, float) else x
