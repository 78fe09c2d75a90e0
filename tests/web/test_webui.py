"""A running WebUI, given by `--webui URL`: tick, generate, see, paste back, plot, settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest

from lib_dynfuse.webui.settings import SETTINGS

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def networks(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A subject LoRA and a style LoRA that the WebUI has: the demo's, by their names."""
    url = request.config.getoption("--webui")
    if not url:
        pytest.skip("no --webui URL given")
    with build_opener(ProxyHandler({})).open(f"{url.rstrip('/')}/sdapi/v1/loras", timeout=30) as answer:
        names = sorted(str(one["name"]) for one in json.load(answer))
    found = [next((name for name in names if name.startswith(kind)), None) for kind in ("subject-", "style-high")]
    if None in found:
        pytest.skip("this WebUI has no subject-... and style-high... LoRA of the demo (export-demo)")
    return str(found[0]), str(found[1])


@pytest.fixture(scope="module")
def webui_seen(
    request: pytest.FixtureRequest, networks: tuple[str, str], browse: Callable[..., Seen], pictures: Path
) -> Seen:
    pictures.mkdir(parents=True, exist_ok=True)
    return browse("webui.cjs", request.config.getoption("--webui"), *networks, pictures)


@pytest.fixture(scope="module")
def plot_seen(
    request: pytest.FixtureRequest, networks: tuple[str, str], browse: Callable[..., Seen], pictures: Path
) -> Seen:
    pictures.mkdir(parents=True, exist_ok=True)
    return browse("plot.cjs", request.config.getoption("--webui"), *networks, pictures)


def test_the_webui_has_what_fusion_needs(webui_seen: Seen) -> None:
    assert webui_seen["lacking"] == []


def test_clicks_give_the_prompts_loras_their_roles(webui_seen: Seen, networks: tuple[str, str]) -> None:
    subject, style = networks
    assert webui_seen["ticked"]
    assert webui_seen["prompt"] == f"a {subject} <lora:{subject}:1:role=subject> <lora:{style}:0.9:role=style>"
    assert webui_seen["chips"] == [f"● {subject} 1.0 subject", f"◆ {style} 0.9 style"]
    assert webui_seen["status"] == [f"subject: {subject} 1.0 · style: {style} 0.9"]


def test_the_picture_and_its_trace_appear_and_the_infotext_says_how(webui_seen: Seen) -> None:
    assert webui_seen["pictures"] == 2
    for said in ("DynFuse: ", "DynFuse strategy: kl-cfg", "DynFuse balance: 0.25", "DynFuse auto balance: False"):
        assert said in webui_seen["info"]


def test_the_infotext_pasted_back_restores_prompt_and_panel(webui_seen: Seen) -> None:
    assert not webui_seen["afterReload"]
    assert webui_seen["pasted"] == {
        "prompt": webui_seen["prompt"],
        "enabled": True,
        "balance": "0.25",
        "autoBalance": False,
        "chips": webui_seen["chips"],
    }


def test_sending_it_to_img2img_takes_the_options_along(webui_seen: Seen) -> None:
    assert webui_seen["sent"] == {"prompt": webui_seen["prompt"], "balance": "0.25", "enabled": True, "chips": 2}


def test_the_hires_prompts_loras_are_shown_while_hires_fix_is_on(webui_seen: Seen, networks: tuple[str, str]) -> None:
    subject, style = networks
    plain = f"○ {subject} 1.0 plain"
    assert webui_seen["hires"] == {"used": [plain, f"◆ {style} 1.0 style hires"], "unused": [plain]}


def test_a_loras_card_inserts_it_with_a_role(webui_seen: Seen, networks: tuple[str, str]) -> None:
    assert webui_seen["card"].strip() == f"<lora:{networks[0]}:1:role=subject>"
    assert webui_seen["cardTicks"]


def test_a_click_on_a_card_takes_a_lora_with_a_role_out_again(webui_seen: Seen, networks: tuple[str, str]) -> None:
    tags = [text.strip() for text in webui_seen["plainClicks"]]
    assert tags == ["", f"<lora:{networks[0]}:1>", ""]


def test_roles_while_the_panel_is_unticked_are_said_to_do_nothing(webui_seen: Seen) -> None:
    unticked = webui_seen["unticked"]
    assert "the prompt gives roles: tick to use them" in unticked["header"]
    assert unticked["status"][-1] == "roles do nothing yet: tick Dynamic LoRA Fusion"
    for said in ("info", "comments"):
        assert unticked[said].count("LoRAs have roles, but Dynamic LoRA Fusion is not ticked") == 1
    assert "DynFuse strategy" not in unticked["info"]


def test_a_lora_that_is_not_there_and_a_number_that_is_none_are_named(webui_seen: Seen) -> None:
    assert '"1,0" is not a number' in webui_seen["unreadable"][0]
    assert webui_seen["unlisted"][0].startswith("not in the WebUI's list: no such")


def test_the_settings_page_has_a_section_of_ours(webui_seen: Seen) -> None:
    shown = [" ".join(text.split()) for text in webui_seen["settings"]]
    assert shown == [f"{setting.label} ({setting.help})" for setting in SETTINGS]


def test_a_dark_page_was_photographed(webui_seen: Seen, pictures: Path) -> None:
    assert webui_seen["dark"]
    assert (pictures / "webui-dark.png").exists()


def test_every_cell_of_a_plot_is_made_with_its_own_options(plot_seen: Seen) -> None:
    options = [(f"DynFuse strategy: {rule},", balance) for balance in (0.0, 0.5) for rule in ("kl", "random")]
    assert len(plot_seen["cells"]) == len(options)
    for cell, (rule, balance) in zip(plot_seen["cells"], options, strict=True):
        assert rule in cell
        assert ("DynFuse balance: 0.5" in cell) == (balance == 0.5)
        assert "DynFuse chosen: subject " in cell
    assert len({cell.split("DynFuse chosen: ")[1].split(",")[0] for cell in plot_seen["cells"][:2]}) == 2


def test_the_page_reports_no_error_of_ours(webui_seen: Seen, plot_seen: Seen) -> None:
    errors = webui_seen["errors"] + plot_seen["errors"]
    assert [error for error in errors if "dynfuse" in error.lower()] == []
