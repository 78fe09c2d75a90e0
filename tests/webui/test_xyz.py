"""Every option is an axis of the host's X/Y/Z plot; the fake has the shape of the host's scripts/xyz_grid.py."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_dynfuse.options import FIELDS, Options, OptionsError
from lib_dynfuse.webui import xyz
from lib_dynfuse.webui.arguments import read_arguments


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


def scripts_data(name: str = "xyz_grid.py") -> list[Any]:
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Nothing", str, None)])
    plot = SimpleNamespace(script_class=type("Script", (), {"__module__": name}), module=module)
    other = SimpleNamespace(script_class=type("Script", (), {"__module__": "refiner.py"}), module=SimpleNamespace())
    return [other, plot]


def axes(name: str = "xyz_grid.py") -> dict[str, Any]:
    data = scripts_data(name)
    assert xyz.register(data)
    return {axis.label: axis for axis in data[-1].module.axis_options}


def typed(axis: Any, texts: list[str]) -> list[Any]:
    """What the host makes of the text in the plot's field."""
    return [axis.type(text) for text in texts]


@pytest.mark.parametrize("name", ["xyz_grid.py", "scripts.xyz_grid"])
def test_every_option_has_an_axis_beside_the_hosts(name: str):
    assert len(axes(name)) == 1 + len(FIELDS)
    assert {"Nothing", "[DynFuse] Enabled", "[DynFuse] Rule", "[DynFuse] Subject to style"} < set(axes(name))


def test_axes_are_not_registered_twice():
    data = scripts_data()
    xyz.register(data)
    xyz.register(data)
    assert len(data[-1].module.axis_options) == 1 + len(FIELDS)


def test_a_host_without_the_plot_is_no_error():
    assert xyz.register(scripts_data()[:1]) is False


def test_switches_and_rules_offer_their_choices():
    assert axes()["[DynFuse] Enabled"].choices() == ["on", "off"]
    assert axes()["[DynFuse] Rule"].choices()[:2] == ["sum", "sum-cfg"]
    assert axes()["[DynFuse] Way of nudging"].choices() == ["x0", "adam", "xt"]
    assert axes()["[DynFuse] Temperature"].choices is None


@pytest.mark.parametrize(
    ("label", "text", "expected"),
    [
        ("Enabled", "on", {"enabled": True}),
        ("Enabled", "False", {"enabled": False}),
        ("Rule", "js", {"strategy": "js"}),
        ("Subject to style", "-0.5", {"balance": -0.5}),
        ("Tokens sampled", "64", {"sample_tokens": 64}),
        ("Until", "0.5", {"stop": 0.5}),
        ("Rule's own parameters", "softness=2; standardise=on", {"parameters": {"softness": 2, "standardise": True}}),
        ("Show what was chosen", "on", {"trace": True}),
        ("Nudge towards references", "on", {"nudge": True}),
        ("Way of nudging", "adam", {"nudge_mode": "adam"}),
        ("Nudge strength", "0.4", {"nudge_strength": 0.4}),
        ("Nudge from", "0.8", {"nudge_start": 0.8}),
        ("Nudge every", "2", {"nudge_every": 2}),
        ("Nudge decoder", "linear", {"nudge_decoder": "linear"}),
        ("Weight of CLIP, prompt", "0.5", {"weight_clip_text": 0.5}),
        ("DINO", "none", {"dino": "none"}),
        ("Style pictures", "", {"style_references": []}),
    ],
)
def test_an_axis_sets_its_option_and_no_other(label: str, text: str, expected: dict[str, Any]):
    axis = axes()[f"[DynFuse] {label}"]
    p = SimpleNamespace()
    values = typed(axis, [text])
    axis.confirm(p, values)
    axis.apply(p, values[0], values)
    assert xyz.overrides(p) == expected


def test_a_picture_may_be_base64_or_below_a_folder_that_the_server_allows(
    text: str, allowed: list[str], tmp_path: Path
):
    axis = axes()["[DynFuse] Style pictures"]
    for refused in ("ink/one.png", "/etc/hostname", "\\\\host\\share\\x.png", str(tmp_path / "x.png")):
        with pytest.raises(OptionsError, match="style_references: the picture is neither"):
            axis.confirm(SimpleNamespace(), [text, refused])
    allowed.append(str(tmp_path))
    for value in (" ink/one.png ", text, str(tmp_path / "x.png")):
        axis.confirm(SimpleNamespace(), [value])
        p = SimpleNamespace()
        axis.apply(p, value, [value])
        assert xyz.overrides(p) == {"style_references": [value.strip()]}


def test_a_cell_leaves_no_trace_on_the_next_nor_on_the_whole():
    found = axes()
    p = SimpleNamespace()
    first, second = copy(p), copy(p)
    found["[DynFuse] Enabled"].apply(first, "on", ["on"])
    found["[DynFuse] Rule"].apply(first, "js", ["js"])
    found["[DynFuse] Enabled"].apply(second, "off", ["off"])
    again = copy(first)
    found["[DynFuse] Rule"].apply(again, "sum", ["sum"])
    assert xyz.overrides(p) == {}
    assert xyz.overrides(first) == {"enabled": True, "strategy": "js"}
    assert xyz.overrides(second) == {"enabled": False}
    assert read_arguments([True, "kl"], xyz.overrides(first)) == Options(enabled=True, strategy="js")


@pytest.mark.parametrize(
    ("label", "text", "words"),
    [
        ("Enabled", "perhaps", ["enabled", "on or off"]),
        ("Rule", "kll", ["'kll'", "kl-token"]),
        ("Subject to style", "2", ["balance", "-1 to 1"]),
        ("Decide every", "0", ["decide_every", "1 to 100"]),
        ("Nudge decoder", "full", ["nudge_decoder", "taesd, vae, linear"]),
        ("Rule's own parameters", "softness", ["parameters", "name=value"]),
        ("Rule's own parameters", "mind=3", ["parameters", "'mind'", "softness"]),
    ],
)
def test_what_is_not_allowed_is_refused_before_the_first_cell(label: str, text: str, words: list[str]):
    axis = axes()[f"[DynFuse] {label}"]
    with pytest.raises(OptionsError) as error:
        axis.confirm(SimpleNamespace(), typed(axis, [text]))
    for word in words:
        assert word in str(error.value)


def test_the_end_of_a_range_of_tenths_is_inside():
    axis = axes()["[DynFuse] Until"]
    end = sum([0.1] * 10) + 2e-16
    axis.confirm(SimpleNamespace(), [0.1 + 0.2, 1.0000000000000002, end])
    p = SimpleNamespace()
    axis.apply(p, 1.0000000000000002, [])
    assert xyz.overrides(p) == {"stop": 1.0}
