"""The panel in a browser, on a small page of each gradio that the hosts bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib_dynfuse.options import Options
from lib_dynfuse.webui.arguments import read_arguments

Seen = dict[str, Any]
UNTICKED = "roles do nothing yet: tick Dynamic LoRA Fusion"
REST = ", <lora:ink:0.9:0.8:dyn=3> (blue:1.2) <hypernet:x:1> <lyco:detail:0.6>"


def test_the_page_ran_without_errors_and_with_one_new_name_at_most(page_seen: Seen) -> None:
    assert page_seen["errors"] == []
    assert page_seen["newNames"] == 0


def test_an_empty_prompt_says_what_to_do(page_seen: Seen) -> None:
    assert page_seen["emptyStatus"] == ["no LoRA in the prompt: add one for the subject and one for the style"]


def test_chips_follow_the_typing(page_seen: Seen) -> None:
    assert page_seen["typed"] == {
        "chips": ["○ my_fox 1.0 plain", "○ ink 0.8 plain", "○ detail 0.6 plain"],
        "status": ["3 LoRAs, none has a role: click one"],
    }


def test_a_click_turns_a_role_round_and_touches_nothing_else(page_seen: Seen) -> None:
    assert page_seen["clicks"] == [
        "a fox <lora:my_fox:1:role=subject>" + REST,
        "a fox <lora:my_fox:1:role=style>" + REST,
        "a fox <lora:my_fox:1>" + REST,
    ]


def test_a_tags_other_parts_are_kept(page_seen: Seen) -> None:
    first, second = page_seen["secondTag"]
    assert "<lora:ink:0.9:0.8:dyn=3:role=subject>" in first
    assert "<lora:ink:0.9:0.8:dyn=3:role=style>" in second


def test_both_roles_are_told(page_seen: Seen) -> None:
    said = "subject: my_fox 1.0 · style: ink 0.8 · plain: detail"
    assert page_seen["both"] == {
        "chips": ["● my_fox 1.0 subject", "◆ ink 0.8 style", "○ detail 0.6 plain"],
        "unticked": [said, UNTICKED],
        "status": [said],
    }


def test_the_prompts_own_undo_takes_clicks_back_one_by_one(page_seen: Seen) -> None:
    assert page_seen["undone"] == [
        "a fox <lora:my_fox:1:role=subject>, <lora:ink:0.9:0.8:dyn=3:role=subject>"
        + REST[len(", <lora:ink:0.9:0.8:dyn=3>") :],
        "a fox <lora:my_fox:1:role=subject>" + REST,
    ]
    assert page_seen["undoneChips"][1] == "○ ink 0.8 plain"


def test_enter_and_space_do_what_a_click_does_and_stay_on_the_chip(page_seen: Seen) -> None:
    assert [value[-29:] for value in page_seen["keys"]] == [
        " <lyco:detail:0.6:role=subject>"[-29:],
        " <lyco:detail:0.6:role=style>",
    ]
    assert page_seen["focusAfterKeys"] == "detail 0.6: style. Press for plain."


def test_python_gets_the_prompt_as_clicked(page_seen: Seen) -> None:
    assert page_seen["inPython"] == page_seen["keys"][1]


def test_the_hires_prompt_has_chips_of_its_own(page_seen: Seen) -> None:
    hires = page_seen["hires"]
    assert hires["chips"][3:] == ["○ crisp 0.5 plain hires", "◆ ink 1.0 style hires"]
    assert hires["status"][1] == "hires: no LoRA with role=subject · style: ink 1.0 · plain: crisp"
    assert hires["after"] == "sharper <lora:crisp:0.5:role=subject> <lora:ink:1:role=style>"
    assert hires["prompt"] == page_seen["inPython"]


def test_an_unknown_role_is_named_with_what_is_allowed(page_seen: Seen) -> None:
    said = '<lora:fox:1:role=sbject>: unknown role "sbject"; allowed: subject, style, none'
    assert page_seen["wrong"] == {"status": [said], "chips": ["? fox 1.0 sbject"]}


def test_a_number_that_the_webui_cannot_read_is_named(page_seen: Seen) -> None:
    (said,) = page_seen["unreadable"]["status"]
    assert said.startswith('<lora:fox:1,0:role=subject>: strength "1,0" is not a number; write for example 0.8')
    assert page_seen["unreadable"]["chips"] == ["● fox 1,0 subject"]


def test_a_lora_that_is_not_there_is_named(page_seen: Seen) -> None:
    assert page_seen["unlisted"] == {
        "status": ["not in the WebUI's list: gone (refresh the list if the file is new)"],
        "chips": ["● fox 1.0 subject", "◆ gone 1.0 style"],
        "dashed": ["◆ gone 1.0 style"],
    }
    assert page_seen["listed"] == ["subject: fox 1.0 · style: ink 1.0"]


def test_a_lora_in_the_negative_prompt_is_hinted_at(page_seen: Seen) -> None:
    said = "negative prompt: <lora:detail:1> does nothing there; write it into the prompt"
    assert page_seen["negative"] == ["subject: fox 1.0 · style: ink 1.0", said]
    assert page_seen["emptied"] == ["no LoRA in the prompt: add one for the subject and one for the style"]


def test_each_tab_shows_its_own_prompt(page_seen: Seen) -> None:
    assert page_seen["tabs"] == {"txt2img": [], "img2img": ["◆ other 1.0 style"]}


def test_a_cards_corner_buttons_insert_it_with_a_role_or_change_the_role_it_has(page_seen: Seen) -> None:
    assert page_seen["card"] == ["<lora:my_fox:0.7:role=subject> a fox", "<lora:my_fox:0.7:role=style> a fox"]
    assert not page_seen["cardOpened"]


def test_a_cards_corner_buttons_tick_the_panel(page_seen: Seen) -> None:
    assert page_seen["cardTicks"] == {"box": True, "python": True}


def test_a_click_on_the_card_of_a_lora_with_a_role_takes_it_out_and_adds_no_second_tag(page_seen: Seen) -> None:
    first, second, third = page_seen["plainClicks"]
    assert (first, third) == ("", "")
    assert second.strip() == "<lora:my_fox:0.7> a fox"


def test_untouched_the_panel_gives_the_options_defaults(page_seen: Seen) -> None:
    defaults = {name: getattr(Options(), name) for name in page_seen["defaults"]}
    assert page_seen["defaults"] == {**defaults, "parameters": ""}


def test_what_is_chosen_arrives_under_its_own_name(page_seen: Seen) -> None:
    chosen = {name: value for name, value in page_seen["chosen"].items() if value != page_seen["defaults"][name]}
    assert chosen == {"enabled": True, "balance": 0.25, "auto_balance": False}


def test_a_preset_chosen_fills_the_panel(page_seen: Seen) -> None:
    assert page_seen["presets"] == [
        {"rule": "kl", "balance": 0},
        {"rule": "kl-cfg", "balance": -0.4},
        {"rule": "kl-cfg", "balance": 0},
    ]


def test_a_rule_says_what_it_does_and_greys_what_it_has_no_use_for(page_seen: Seen) -> None:
    assert page_seen["sum"]["help"].startswith("Adds both")
    assert page_seen["sum"]["greyed"]
    assert page_seen["kl"]["help"].startswith("Each layer goes to the role")
    assert not page_seen["kl"]["greyed"]


def test_a_pasted_picture_fills_panel_and_chips(page_seen: Seen) -> None:
    pasted = page_seen["pasted"]
    assert pasted["prompt"] == "pasted <lora:ink:0.9:role=style>"
    assert pasted["chips"] == ["◆ ink 0.9 style"]
    # The pictures are those that were given before: an infotext has none.
    assert pasted["values"] == {
        **page_seen["given"],
        "strategy": "kl-soft",
        "parameters": "softness=0.5",
        "balance": 0,
        "auto_balance": True,
        "nudge": True,
        "nudge_mode": "adam",
        "nudge_start": 0.8,
        "nudge_stop": 0.9,
        "keep_best": 0,
    }
    assert pasted["shown"] == {"compared": True, "nudged": True}


def test_a_picture_made_without_us_sets_back_what_was_pasted_but_no_pictures(page_seen: Seen) -> None:
    pictures = {name: page_seen["given"][name] for name in ("subject_references", "style_references")}
    assert all(pictures.values())
    assert page_seen["afterwards"] == {**page_seen["defaults"], **pictures}


def test_what_guidance_does_not_need_now_is_hidden(page_seen: Seen) -> None:
    hidden = {"compared": False, "nudged": False}
    assert page_seen["shown"] == {
        "atFirst": hidden,
        "nudged": {"compared": True, "nudged": True},
        "scored": {"compared": True, "nudged": False},
        "kept": {"compared": True, "nudged": False},
        "atLast": hidden,
    }


def test_several_pictures_of_each_role_arrive_as_files(page_seen: Seen) -> None:
    def names(role: str) -> list[str]:
        return sorted(Path(path).name for path in page_seen["given"][f"{role}_references"])

    assert [name.split(".")[-1] for name in names("subject")] == ["png", "png"]
    assert "panel" in names("subject")[0]
    assert "sheet-webui" in names("subject")[1]
    assert len(names("style")) == 1
    options = read_arguments([page_seen["given"]])
    assert options.subject_references == page_seen["given"]["subject_references"]


def test_another_rule_by_hand_drops_the_parameters_it_does_not_have(page_seen: Seen) -> None:
    assert page_seen["parametersOfAnotherRule"] == ""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_were_photographed(page_seen: Seen, theme: str, pictures: Any) -> None:
    assert list(pictures.rglob(f"{theme}.png"))
