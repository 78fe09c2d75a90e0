"""The panel in txt2img and img2img, made from the option table.

Works on gradio 3.41 and 4.40 alike. The prompt's roles at its top are filled in by `javascript/dynfuse.js`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lib_dynfuse.core.strategies import Parameter, strategies
from lib_dynfuse.hosts.base import Unsupported
from lib_dynfuse.hosts.detect import detect
from lib_dynfuse.options import DEFAULT_STRATEGY, FIELDS, Option, OptionsError
from lib_dynfuse.webui.arguments import ORDER, format_parameters, parse_parameters
from lib_dynfuse.webui.infotext import paste_value

_OPTIONS = {option.name: option for option in FIELDS}
# Not needed for a first picture, so folded away; two and two in a row.
_FINER = (
    ("schedule", "couple_cfg"),
    ("temperature", "sample_tokens"),
    ("start", "stop"),
    ("decide_every", "parameters"),
)
# Options that are parameters of rules, which not every rule has.
_OF_RULES = tuple(
    name for name in ORDER if any(name == one.name for info in strategies().values() for one in info.parameters)
)


@dataclass(frozen=True)
class Panel:
    """The panel's inputs in ORDER, and what the WebUI needs to fill them from a picture's infotext."""

    components: list[Any]
    infotext_fields: list[tuple[Any, Any]]
    paste_field_names: list[Any]


def build(is_img2img: bool, elem_id: Callable[[str], str]) -> Panel:
    """Make the panel inside the gradio block that is open. Changes nothing else, so it may be called repeatedly."""
    import gradio as gr

    tab = "img2img" if is_img2img else "txt2img"

    made: dict[str, Any] = {}
    with _switch(elem_id("enabled")) as made["enabled"]:
        if lacking := _lacking():
            gr.HTML(f'<p class="dynfuse-lacking">Nothing can be fused here: {html.escape(lacking)}</p>')
        # The script looks for this id, so the host has no say in it.
        gr.HTML("", elem_id=f"dynfuse_roles_{tab}")
        with gr.Row():
            with gr.Column():
                made["strategy"] = _component("strategy", elem_id)
                rule_help = gr.HTML(_help_line(DEFAULT_STRATEGY), elem_id=elem_id("rule_help"))
            with gr.Column():
                made["balance"] = _component("balance", elem_id)
                made["auto_balance"] = _component("auto_balance", elem_id)
        with gr.Accordion("Finer", open=False, elem_id=elem_id("finer")):
            for row in _FINER:
                with gr.Row():
                    for name in row:
                        made[name] = _component(name, elem_id)
        made["trace"] = _component("trace", elem_id)

    rule, parameters = made["strategy"], made["parameters"]
    rule.change(
        _follow_rule, inputs=[rule], outputs=[rule_help, parameters, *(made[name] for name in _OF_RULES)],
        show_progress="hidden", queue=False,
    )  # fmt: skip
    # Only when a person turns to another rule: a pasted picture brings its rule and that rule's parameters together.
    rule.input(keep_known, inputs=[rule, parameters], outputs=[parameters], show_progress="hidden", queue=False)
    components = [made[name] for name in ORDER]
    return Panel(
        components=components,
        infotext_fields=[(made[name], paste_value(name)) for name in ORDER],
        # The host looks for a field's own target here, to copy it to the other tab.
        paste_field_names=[paste_value(name) for name in ORDER],
    )


def rule_has(rule: str, name: str) -> bool:
    """Whether the option `name` means something to the rule."""
    return any(parameter.name == name for parameter in strategies()[rule].parameters)


def own_parameters(rule: str) -> list[Parameter]:
    """The parameters that have no control of their own in the panel."""
    return [one for one in strategies()[rule].parameters if one.name not in _OPTIONS]


def keep_known(rule: str, text: str) -> str:
    """Of parameters as written (`softness=0.5, standardise=on`), those that the rule has; all if they can't be read."""
    known = {parameter.name for parameter in own_parameters(rule)}
    try:
        written = parse_parameters(text or "")
    except OptionsError:
        return text
    return format_parameters({name: value for name, value in written.items() if name in known})


def parameters_hint(rule: str) -> str:
    """What may be written as the rule's own parameters, as an example to copy."""
    return format_parameters({one.name: one.default for one in own_parameters(rule)}) or f"{rule} has none"


def _follow_rule(rule: str) -> list[Any]:
    """Updates for the help line, the parameters and every option of rules: those without meaning are greyed."""
    import gradio as gr

    return [
        gr.update(value=_help_line(rule)),
        gr.update(placeholder=parameters_hint(rule), interactive=bool(own_parameters(rule))),
        *(gr.update(interactive=rule_has(rule, name)) for name in _OF_RULES),
    ]


def _help_line(rule: str) -> str:
    info = strategies()[rule]
    return f'<p class="dynfuse-help">{html.escape(info.help)} <em>{html.escape(info.source)}</em></p>'


@contextmanager
def _switch(elem_id: str) -> Iterator[Any]:
    """The panel's frame and the checkbox that ticks it: the host's own where there is one."""
    import gradio as gr

    option = _OPTIONS["enabled"]
    try:
        from modules.ui_components import InputAccordion
    except ImportError:
        with gr.Accordion(option.label, open=True):
            yield gr.Checkbox(option.default, label=option.label, info=option.help, elem_id=elem_id)
    else:
        with InputAccordion(option.default, label=option.label, elem_id=elem_id) as enabled:
            yield enabled


def _component(name: str, elem_id: Callable[[str], str]) -> Any:
    import gradio as gr

    option = _OPTIONS[name]
    shared = {"label": option.label, "info": option.help, "elem_id": elem_id(name)}
    if name == "parameters":
        return gr.Textbox(
            "", placeholder=parameters_hint(DEFAULT_STRATEGY), interactive=bool(own_parameters(DEFAULT_STRATEGY)),
            max_lines=1, **shared,
        )  # fmt: skip
    if option.choices:
        return gr.Dropdown(list(option.choices), value=option.default, **shared)
    enabled = name not in _OF_RULES or rule_has(DEFAULT_STRATEGY, name)
    if isinstance(option.default, bool):
        return gr.Checkbox(option.default, interactive=enabled, **shared)
    return gr.Slider(
        option.minimum, option.maximum, value=option.default, step=_step(option), interactive=enabled, **shared
    )


def _lacking() -> str:
    """Why this WebUI cannot be used, in words; empty if it can."""
    try:
        detect()
    except Unsupported as error:
        return str(error)
    return ""


def _step(option: Option) -> float:
    return 1 if isinstance(option.default, int) else 0.01
