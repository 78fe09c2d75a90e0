"""The panel in txt2img and img2img, made from the option table.

Works on gradio 3.41 and 4.40 alike. The prompt's roles at its top are filled in by `javascript/dynfuse.js`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lib_dynfuse.core.strategies import Parameter, strategies
from lib_dynfuse.hosts.base import Host, Unsupported
from lib_dynfuse.hosts.detect import detect
from lib_dynfuse.options import DEFAULT_STRATEGY, FIELDS, PRESETS, Option, Options, OptionsError, with_preset
from lib_dynfuse.webui import loras
from lib_dynfuse.webui.arguments import ORDER, PICTURES, format_parameters, parse_parameters
from lib_dynfuse.webui.infotext import paste_value
from lib_dynfuse.webui.references import is_upload

_OPTIONS = {option.name: option for option in FIELDS}
# Not needed for a first picture, so folded away; two and two in a row.
_FINER = (
    ("schedule", "couple_cfg"),
    ("temperature", "sample_tokens"),
    ("start", "stop"),
    ("decide_every", "parameters"),
)
_FINER_NUDGES = (("nudge_start", "nudge_stop"), ("nudge_every", "nudge_clamp"), ("nudge_decoder", "nudge_cutouts"))
_TERMS = (
    ("weight_clip_subject", "weight_dino_subject"),
    ("weight_clip_style", "weight_dino_style"),
    ("weight_clip_text", "clip", "dino"),
)
# Those that `javascript/dynfuse.js` looks at; in pixels.
_LOOKED_AT = ("nudge", "score", "keep_best")
_FILES_HEIGHT = 120
# Options that are parameters of rules, which not every rule has.
_OF_RULES = tuple(
    name for name in ORDER if any(name == one.name for info in strategies().values() for one in info.parameters)
)
# A rule's own parameters go with the rule.
_OF_PRESETS = tuple(
    name for name in ORDER if name == "parameters" or any(name in values for values in PRESETS.values())
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
    host, lacking = _host()
    with _switch(elem_id("enabled"), tab) as made["enabled"]:
        if lacking:
            gr.HTML(f'<p class="dynfuse-lacking">Nothing can be fused here: {html.escape(lacking)}</p>')
        # The script looks for this id, so the host has no say in it.
        gr.HTML("", elem_id=f"dynfuse_roles_{tab}")
        _questions(tab)
        preset = gr.Dropdown(list(PRESETS), value="default", label="Preset", elem_id=elem_id("preset"))
        with gr.Row():
            with gr.Column():
                made["strategy"] = _component("strategy", elem_id)
                rule_help = gr.HTML(_help_line(DEFAULT_STRATEGY), elem_id=elem_id("rule_help"))
            with gr.Column():
                made["balance"] = _component("balance", elem_id)
                made["auto_balance"] = _component("auto_balance", elem_id)
        with gr.Accordion("Finer", open=False, elem_id=elem_id("finer")):
            made.update(_rows(_FINER, elem_id))
        made.update(_guidance(getattr(host, "no_xt", ""), elem_id))
        made["trace"] = _component("trace", elem_id)

    rule, parameters = made["strategy"], made["parameters"]
    rule.change(
        _follow_rule, inputs=[rule], outputs=[rule_help, parameters, *(made[name] for name in _OF_RULES)],
        show_progress="hidden", queue=False,
    )  # fmt: skip
    # Chosen, not an option of its own: what it sets is what the picture's infotext says.
    preset.input(
        preset_values, inputs=[preset], outputs=[made[name] for name in _OF_PRESETS],
        show_progress="hidden", queue=False,
    )  # fmt: skip
    # Only when a person turns to another rule: a pasted picture brings its rule and that rule's parameters together.
    rule.input(keep_known, inputs=[rule, parameters], outputs=[parameters], show_progress="hidden", queue=False)
    # The host cannot copy files from tab to tab, and an infotext has none.
    pasted = [name for name in ORDER if name not in PICTURES]
    return Panel(
        components=[made[name] for name in ORDER],
        infotext_fields=[(made[name], paste_value(name)) for name in pasted],
        # The host looks for a field's own target here, to copy it to the other tab.
        paste_field_names=[paste_value(name) for name in pasted],
    )


def _questions(tab: str) -> None:
    """Where the script asks which LoRAs the host has in its list. No route, which would be open to whoever may not see
    this page."""
    import gradio as gr

    question, answer = (
        gr.Textbox("", label=f"DynFuse {kind}", elem_classes=["dynfuse-unseen", f"dynfuse-{kind}-{tab}"])
        for kind in ("asks", "answers")
    )
    for made in (question, answer):
        made.do_not_save_to_config = True  # of the host's ui-config.json
    question.input(
        loras.answer, inputs=[question], outputs=[answer], show_progress="hidden", queue=False, api_name=False
    )


def _guidance(no_xt: str, elem_id: Callable[[str], str]) -> dict[str, Any]:
    """The inputs of nudges and scores, by name. `no_xt`: why that way of nudging cannot be had here.

    What has the class dynfuse-compared or dynfuse-nudged is hidden by `javascript/dynfuse.js` while nothing is compared
    or nudged: it looks at the inputs themselves, which a pasted picture or the host's saved defaults may have changed.
    """
    import gradio as gr

    made: dict[str, Any] = {}
    with gr.Column(elem_classes=["dynfuse-guidance"]):
        made.update(_rows((("nudge", "score"),), elem_id))
        with gr.Column(elem_classes=["dynfuse-compared"]):
            made.update(_rows((("subject_references", "style_references"), ("references", "keep_best")), elem_id))
            with gr.Column(elem_classes=["dynfuse-nudged"]):
                made.update(_rows((("nudge_strength", "nudge_mode"),), elem_id))
                if no_xt:
                    gr.HTML(f'<p class="dynfuse-help">xt is not possible here: {html.escape(no_xt)}</p>')
                with gr.Accordion("Finer nudges", open=False, elem_id=elem_id("finer_nudges")):
                    made.update(_rows(_FINER_NUDGES, elem_id))
            with gr.Accordion("What counts, and who judges it", open=False, elem_id=elem_id("terms")):
                made.update(_rows(_TERMS, elem_id))
    return made


def _rows(rows: Sequence[Sequence[str]], elem_id: Callable[[str], str]) -> dict[str, Any]:
    """The inputs of these options by name, a line for each row."""
    import gradio as gr

    made = {}
    for row in rows:
        with gr.Row():
            made.update({name: _component(name, elem_id) for name in row})
    return made


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


def preset_values(name: str) -> list[Any]:
    """What the inputs that presets are about show once this one is chosen."""
    import gradio as gr

    chosen = Options.read(with_preset({"preset": name}))
    values = {option: getattr(chosen, option) for option in _OF_PRESETS}
    values["parameters"] = format_parameters(values["parameters"])
    return [gr.update(value=values[option]) for option in _OF_PRESETS]


def _help_line(rule: str) -> str:
    info = strategies()[rule]
    return f'<p class="dynfuse-help">{html.escape(info.help)} <em>{html.escape(info.source)}</em></p>'


@contextmanager
def _switch(elem_id: str, tab: str) -> Iterator[Any]:
    """The panel's frame and the checkbox that ticks it: the host's own where there is one."""
    import gradio as gr

    option = _OPTIONS["enabled"]
    try:
        from modules.ui_components import InputAccordion
    except ImportError:
        with gr.Accordion(option.label, open=True):
            seen = {"elem_id": elem_id, "elem_classes": [f"dynfuse-enabled-{tab}"]}  # by the script
            yield gr.Checkbox(option.default, label=option.label, info=option.help, **seen)
    else:
        with InputAccordion(option.default, label=option.label, elem_id=elem_id) as enabled:
            yield enabled


def _component(name: str, elem_id: Callable[[str], str]) -> Any:
    import gradio as gr

    option = _OPTIONS[name]
    shared: dict[str, Any] = {"label": option.label, "info": option.help, "elem_id": elem_id(name)}
    if name in _LOOKED_AT:
        shared["elem_classes"] = [f"dynfuse-{name}"]
    if name == "parameters":
        return gr.Textbox(
            "", placeholder=parameters_hint(DEFAULT_STRATEGY), interactive=bool(own_parameters(DEFAULT_STRATEGY)),
            max_lines=1, **shared,
        )  # fmt: skip
    if name in PICTURES:
        del shared["info"]
        return _of_uploads(gr.File(None, file_count="multiple", file_types=["image"], height=_FILES_HEIGHT, **shared))
    if option.choices:
        return gr.Dropdown(list(option.choices), value=option.default, **shared)
    enabled = name not in _OF_RULES or rule_has(DEFAULT_STRATEGY, name)
    if isinstance(option.default, bool):
        return gr.Checkbox(option.default, interactive=enabled, **shared)
    if isinstance(option.default, str):
        return gr.Textbox(option.default, max_lines=1, **shared)
    return gr.Slider(
        option.minimum, option.maximum, value=option.default, step=_step(option), interactive=enabled, **shared
    )


def _of_uploads(files: Any) -> Any:
    """A file input that takes uploads alone: gradio 3 reads, copies and serves whatever file a request names."""
    if not hasattr(files, "make_temp_copy_if_needed"):
        return files  # gradio 4 looks itself
    preprocess = files.preprocess

    def checked(given: Any) -> Any:
        for one in given if isinstance(given, list) else [given]:
            if one is not None and one.get("is_file") and not is_upload(str(one.get("name"))):
                raise ValueError(f"{files.label}: this file was not uploaded here")
        return preprocess(given)

    files.preprocess = checked
    return files


def _host() -> tuple[Host | None, str]:
    """This WebUI, or why it cannot be used."""
    try:
        return detect(), ""
    except Unsupported as error:
        return None, str(error)


def _step(option: Option) -> float:
    return 1 if isinstance(option.default, int) else 0.01
