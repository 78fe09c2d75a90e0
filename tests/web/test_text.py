"""The text functions of dynfuse.js, run in Node; roles.py, which reads the same tags, is the judge."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lib_dynfuse.roles import parse_prompt

SCRIPT = Path(__file__).parents[2] / "javascript" / "dynfuse.js"
PROMPTS = [
    "",
    "no tags (blue:1.2) <hypernet:x:1>",
    "<lora:a>",
    "<lora:a:0.5>",
    "<lora:a:0.5:0.25>",
    "<lora:a:te=0.5>",
    "<lora:a:0.5:unet=0.25:role=style>",
    "<LORA:a:1:ROLE=Subject> and <lyco:b:1: role = style >",
    "<lora:a:1:role=none><lora:b c/d.e:-0.5:role=subject>",
    "line\n<lora:ä ö:1:role=style>\n🦊 <lora:b:1>",
]
# A tag, and how it is written with each role.
REWRITES = [
    ("<lora:a>", "<lora:a>", "<lora:a:role=subject>"),
    ("<lora:a:1>", "<lora:a:1>", "<lora:a:1:role=subject>"),
    ("<lora:a:1:role=style:dyn=3>", "<lora:a:1:dyn=3>", "<lora:a:1:role=subject:dyn=3>"),
    ("<LyCo:a: 0.50 :Role=none>", "<LyCo:a: 0.50 >", "<LyCo:a: 0.50 :role=subject>"),
    ("<lora:a:role=style:1:role=none>", "<lora:a:1>", "<lora:a:role=subject:1>"),
]
STATUSES = [
    ("", "missing", "no LoRA in the prompt: add one for the subject and one for the style"),
    ("<lora:a:1>", "missing", "one LoRA, it has no role: click it"),
    ("<lora:a:1> <lora:b:1>", "missing", "two LoRAs, none has a role: click one"),
    ("<lora:a:1:role=subject> <lora:b:1>", "missing", "subject: a 1.0 · no LoRA with role=style · plain: b"),
    ("<lora:b:.9:role=style>", "missing", "no LoRA with role=subject · style: b 0.9"),
    ("<lora:a:1:role=subject> <lora:b:0.9:role=style> <lora:c:0.6>", "complete",
     "subject: a 1.0 · style: b 0.9 · plain: c"),
    ("<lora:a:1:role=>", "wrong", '<lora:a:1:role=>: unknown role ""; allowed: subject, style, none'),
    ("<lora:a:1:role=style=1>", "wrong",
     '<lora:a:1:role=style=1>: unknown role "style=1"; allowed: subject, style, none'),
]  # fmt: skip
CARDS = [
    ("""cardClicked('txt2img', "<lora:fox:" + opts.extra_networks_default_multiplier + ">", "", false);""",
     {"tab": "txt2img", "tag": "<lora:fox:0.8>", "words": ""}),
    ("""cardClicked('img2img', "<lora:fox:" + 0.65 + ">" + " say \\"hi\\"", "(no:1)", false);""",
     {"tab": "img2img", "tag": "<lora:fox:0.65>", "words": ' say "hi"'}),
    ("""cardClicked('txt2img', "<hypernet:fox:" + 1 + ">", "", false);""", None),
    ("""selectCheckpoint("x")""", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What dynfuse.js makes of the tables above."""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here")
    asked = {
        "prompts": PROMPTS,
        "tags": [tag for tag, *_ in REWRITES],
        "statuses": [prompt for prompt, *_ in STATUSES],
        "cards": [card for card, _ in CARDS],
    }
    program = f"""
        const d = require({json.dumps(str(SCRIPT))});
        const asked = {json.dumps(asked)};
        console.log(JSON.stringify({{
            tags: asked.prompts.map((prompt) => d.tags(prompt)),
            rewritten: asked.tags.map((tag) => ["plain", "subject"].map((role) => d.withRole(tag, role))),
            statuses: asked.statuses.map((prompt) => d.status(prompt)),
            cards: asked.cards.map((card) => d.readCard(card, "name", 0.8)),
            turns: ["plain", "subject", "style", "unknown"].map(d.nextRole),
        }}));
    """
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_tags_are_read_as_roles_py_reads_them(answers: dict[str, Any], index: int) -> None:
    ours = [
        (tag.raw, tag.name, tag.unet, tag.role.value if tag.role else "plain")
        for tag in parse_prompt(PROMPTS[index]).tags
    ]
    assert [(tag["raw"], tag["name"], tag["unet"], tag["role"]) for tag in answers["tags"][index]] == ours


@pytest.mark.parametrize("index", range(len(REWRITES)))
def test_a_tag_is_rewritten_in_its_role_alone(answers: dict[str, Any], index: int) -> None:
    assert answers["rewritten"][index] == list(REWRITES[index][1:])


@pytest.mark.parametrize("index", range(len(STATUSES)))
def test_the_status_says_what_is_so_or_what_is_missing(answers: dict[str, Any], index: int) -> None:
    _, level, text = STATUSES[index]
    assert answers["statuses"][index] == {"level": level, "text": text}


@pytest.mark.parametrize("index", range(len(CARDS)))
def test_a_cards_click_handler_says_what_it_would_insert(answers: dict[str, Any], index: int) -> None:
    assert answers["cards"][index] == CARDS[index][1]


def test_clicks_go_round_and_an_unknown_role_starts_over(answers: dict[str, Any]) -> None:
    assert answers["turns"] == ["subject", "style", "plain", "plain"]


LARGE = ["<lora:", "<lora:a ", ">", "<lora:a:1>", "<lora:a:1:role=subject>", "<lora:a:role=x>", "<lora:>", ":", "<"]


def test_a_prompt_of_a_megabyte_is_read_in_a_second_and_its_status_is_short() -> None:
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here")
    program = f"""
        const d = require({json.dumps(str(SCRIPT))});
        const seconds = (work) => {{
            const began = process.cpuUsage().user;
            work();
            return (process.cpuUsage().user - began) / 1e6;
        }};
        console.log(JSON.stringify({json.dumps(LARGE)}.flatMap((piece) => {{
            const many = piece.repeat(1e6 / piece.length);
            return [many, `<lora:${{many}}>`].map((prompt) => {{
                let text = "";
                return [seconds(() => d.tags(prompt)), seconds(() => (text = d.status(prompt).text)), text.length];
            }});
        }})));
    """
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=120, check=True)
    for reading, saying, length in json.loads(done.stdout):
        assert reading < 1
        assert saying < 1
        assert length < 700
