"""The panel's rules of thumb, and its inputs as the script gets them, on a gradio that only remembers what was made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lib_dynfuse.core.strategies import strategies
from lib_dynfuse.options import FIELDS, PRESETS, Options
from lib_dynfuse.webui import panel as panels
from lib_dynfuse.webui.arguments import ORDER, PICTURES, format_parameters, read_arguments
from lib_dynfuse.webui.panel import Panel, build, keep_known, own_parameters, parameters_hint, rule_has


class Remembered(SimpleNamespace):
    """A component: what it was made with, and the events it listens to."""

    def change(self, function: Any, **wiring: Any) -> None:
        self.on_change = (function, wiring)

    def input(self, function: Any, **wiring: Any) -> None:
        self.on_input = (function, wiring)


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake: Any = ModuleType("gradio")

    @contextmanager
    def block(*_: Any, **__: Any) -> Iterator[None]:
        yield

    for name in ("Row", "Column", "Accordion"):
        setattr(fake, name, block)
    fake.said = []
    for name in ("Textbox", "Checkbox", "File"):
        setattr(fake, name, lambda value, kind=name, **given: Remembered(kind=kind, value=value, **given))

    def text(value: str, **given: Any) -> Remembered:
        fake.said.append(value)
        return Remembered(kind="HTML", value=value, **given)

    fake.HTML = text
    fake.Dropdown = lambda choices, **given: Remembered(kind="Dropdown", choices=choices, **given)
    fake.Slider = lambda low, high, **given: Remembered(kind="Slider", minimum=low, maximum=high, **given)
    fake.update = lambda **changes: changes
    monkeypatch.setitem(sys.modules, "gradio", fake)
    return fake


@pytest.fixture
def panel(gradio: ModuleType) -> Panel:
    return build(False, lambda name: f"id_{name}")


def test_every_option_has_one_input_with_its_label_range_and_default(panel: Panel) -> None:
    assert ORDER[0] == "enabled"
    assert sorted(ORDER) == sorted(option.name for option in FIELDS)
    by_name = dict(zip(ORDER, panel.components, strict=True))
    for option in FIELDS:
        made = by_name[option.name]
        assert (made.label, made.elem_id) == (option.label, f"id_{option.name}")
        assert made.value == {"parameters": "", **dict.fromkeys(PICTURES)}.get(option.name, option.default)
        if option.minimum is not None:
            assert (made.minimum, made.maximum) == (option.minimum, option.maximum)


def test_an_untouched_panel_means_the_defaults(panel: Panel) -> None:
    assert read_arguments([made.value for made in panel.components]) == Options()


def test_a_whole_number_moves_in_whole_steps(panel: Panel) -> None:
    steps = {name: made.step for name, made in zip(ORDER, panel.components, strict=True) if made.kind == "Slider"}
    assert steps["sample_tokens"] == steps["decide_every"] == 1
    assert steps["balance"] == 0.01


def test_every_input_is_filled_from_an_infotext(panel: Panel) -> None:
    # Files cannot be copied to the other tab, and an infotext has none.
    files = [panel.components[ORDER.index(name)] for name in PICTURES]
    assert [made for made, _ in panel.infotext_fields] == [made for made in panel.components if made not in files]
    assert panel.paste_field_names == [target for _, target in panel.infotext_fields]
    balance = ORDER.index("balance")
    assert panel.infotext_fields[balance][1]({"DynFuse": "0.1.0", "DynFuse balance": "0.25"}) == 0.25


def test_several_pictures_of_each_role_can_be_given(panel: Panel) -> None:
    for name in PICTURES:
        made = panel.components[ORDER.index(name)]
        assert (made.kind, made.file_count, made.file_types) == ("File", "multiple", ["image"])


def test_the_script_finds_what_decides_over_the_rest_by_its_class(panel: Panel) -> None:
    script = (Path(__file__).parents[2] / "javascript" / "dynfuse.js").read_text(encoding="utf-8")
    for name in ("nudge", "score", "keep_best"):
        assert panel.components[ORDER.index(name)].elem_classes == [f"dynfuse-{name}"]
    assert 'ticked("nudge")' in script
    assert 'ticked("score")' in script
    assert ".dynfuse-keep_best" in script


def test_the_page_can_ask_which_loras_there_are_and_the_host_keeps_none_of_it(gradio: Any) -> None:
    made: dict[str, Any] = {}

    def textbox(value: str, **given: Any) -> Remembered:
        one = Remembered(kind="Textbox", value=value, **given)
        made.update(dict.fromkeys(given.get("elem_classes", ()), one))
        return one

    gradio.Textbox = textbox
    panel = build(True, str)
    question, answer = made["dynfuse-asks-img2img"], made["dynfuse-answers-img2img"]
    function, wiring = question.on_input
    assert (wiring["inputs"], wiring["outputs"]) == ([question], [answer])
    assert function('{"names": []}') == '{"unlisted": []}'
    script = (Path(__file__).parents[2] / "javascript" / "dynfuse.js").read_text(encoding="utf-8")
    style = (Path(__file__).parents[2] / "style.css").read_text(encoding="utf-8")
    for kind, one in (("asks", question), ("answers", answer)):
        assert one not in panel.components
        assert one.do_not_save_to_config
        assert f".dynfuse-{kind}-${{tab}}" in script
        assert "dynfuse-unseen" in one.elem_classes
    assert ".dynfuse-unseen" in style


@pytest.mark.parametrize(("why", "lines"), [("", 0), ("it works in place & more", 1)])
def test_a_host_that_cannot_nudge_through_its_unet_says_why(
    gradio: ModuleType, monkeypatch: pytest.MonkeyPatch, why: str, lines: int
) -> None:
    monkeypatch.setattr(panels, "detect", lambda: SimpleNamespace(no_xt=why))
    build(False, str)
    said = [text for text in gradio.said if "xt is not possible here" in text]
    assert len(said) == lines
    assert all("it works in place &amp; more" in text for text in said)


def test_a_host_that_does_not_say_can(gradio: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "detect", lambda: SimpleNamespace())
    build(False, str)
    assert not [text for text in gradio.said if "xt" in text]


@pytest.mark.parametrize("rule", strategies())
def test_a_chosen_rule_greys_exactly_what_it_does_not_have(panel: Panel, rule: str) -> None:
    function, wiring = panel.components[ORDER.index("strategy")].on_change
    changes = dict(zip([made.elem_id for made in wiring["outputs"]], function(rule), strict=True))
    for name in ("balance", "auto_balance", "schedule", "couple_cfg", "temperature", "sample_tokens", "decide_every"):
        assert changes[f"id_{name}"]["interactive"] == rule_has(rule, name)
    assert changes["id_parameters"]["interactive"] == bool(own_parameters(rule))
    assert strategies()[rule].help.split("'")[0] in changes["id_rule_help"]["value"]


@pytest.mark.parametrize("rule", strategies())
def test_the_hint_can_be_copied_into_the_box(rule: str) -> None:
    if own_parameters(rule):
        assert read_arguments([{"strategy": rule, "parameters": parameters_hint(rule)}]).strategy == rule
    else:
        assert parameters_hint(rule) == f"{rule} has none"


def test_turning_to_another_rule_keeps_the_parameters_that_it_shares() -> None:
    assert keep_known("kl", "softness=0.5, standardise=on") == "standardise=on"
    assert keep_known("sum", "softness=0.5") == ""
    assert keep_known("kl", "") == ""


def test_what_cannot_be_read_stays_for_the_person_to_mend() -> None:
    assert keep_known("kl", "softness") == "softness"


def test_a_preset_sets_what_it_names_and_the_rest_of_what_presets_name_to_its_default(gradio: Any) -> None:
    names = panels._OF_PRESETS
    assert {"strategy", "auto_balance", "couple_cfg", "parameters", "nudge"} <= set(names)
    for name, values in PRESETS.items():
        shown = dict(zip(names, [update["value"] for update in panels.preset_values(name)], strict=True))
        assert shown.pop("parameters") == format_parameters(values.get("parameters", {}))
        assert shown == {option: values.get(option, getattr(Options(), option)) for option in shown}
