"""The text functions of dynfuse.js, run in Node; roles.py, which reads the same tags, is the judge."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lib_dynfuse.roles import RoleError, parse_prompt

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
    ("<lora:a:1:role=subject> <lora:a:0.5>", "wrong",
     "a is there with a role and without one: write one tag for it"),
    ("<lora:a:1:role=subject> <lora:b:1> <lora:a:1:role=style>", "wrong",
     "a is subject and style at once: a LoRA can have one role only"),
    ("<lora:b:.9:role=style>", "missing", "no LoRA with role=subject · style: b 0.9"),
    ("<lora:a:1:role=subject> <lora:b:0.9:role=style> <lora:c:0.6>", "complete",
     "subject: a 1.0 · style: b 0.9 · plain: c"),
    ("<lora:a:1:role=>", "wrong", '<lora:a:1:role=>: unknown role ""; allowed: subject, style, none'),
    ("<lora:a:1:role=style=1>", "wrong",
     '<lora:a:1:role=style=1>: unknown role "style=1"; allowed: subject, style, none'),
]  # fmt: skip
# What the command line refuses and a WebUI gives all LoRAs up for: a tag, and the number that cannot be read.
UNREADABLE = [
    ("<lora:a:abc>", 'strength "abc"'),
    ("<lora:a:1,0:role=subject>", 'strength "1,0"'),
    ("<lora:a:>", 'strength ""'),
    ("<lora:a::role=style>", 'strength ""'),
    ("<lora:a:1:x>", 'unet "x"'),
    ("<lora:a:te=>", 'te ""'),
    ("<lora:a:1:unet=one>", 'unet "one"'),
    ("<lora:a:1:1:dyn>", 'dyn "dyn"'),
    ("<lora:a:1:dyn=all>", 'dyn "all"'),
    ("<lora:a:1.2.3>", 'strength "1.2.3"'),
    ("<lora:a:0x10>", 'strength "0x10"'),
    ("<lora:a:inf>", 'strength "inf"'),
    ("<lora:a:1e>", 'strength "1e"'),
    ("<lora:a:->", 'strength "-"'),
]
READABLE = ["1", "0", "-.5", "+1.", " 0.8 ", "1e-3", "007", "2E+1"]
BOTH = "<lora:a:1:role=subject> <lora:b:1:role=style>"
UNTICKED = "roles do nothing yet: tick Dynamic LoRA Fusion"
# Prompts, ticked or not, negative prompts, names that are not listed; the lines under the chips.
LINES = [
    ([BOTH], True, [], [], ["complete subject: a 1.0 · style: b 1.0"]),
    ([BOTH], None, [], [], ["complete subject: a 1.0 · style: b 1.0"]),
    ([BOTH], False, [], [], ["complete subject: a 1.0 · style: b 1.0", f"wrong {UNTICKED}"]),
    (["<lora:a:1:role=sbject>"], False, [], [],
     ['wrong <lora:a:1:role=sbject>: unknown role "sbject"; allowed: subject, style, none', f"wrong {UNTICKED}"]),
    (["<lora:a:1:role=none>"], False, [], [], ["missing one LoRA, it has no role: click it"]),
    ([BOTH], True, ["blurry", "<lora:c:1> <lora:d:1:role=style>"], [],
     ["complete subject: a 1.0 · style: b 1.0",
      "wrong negative prompt: <lora:c:1>, <lora:d:1:role=style> does nothing there; write it into the prompt"]),
    ([BOTH, BOTH], True, [], ["b", "c"],
     ["wrong not in the WebUI's list: b (refresh the list if the file is new)",
      "wrong hires: not in the WebUI's list: b (refresh the list if the file is new)"]),
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
        "unreadable": [tag for tag, _ in UNREADABLE],
        "readable": [f"<lora:a:{number}>" for number in READABLE],
        "lines": [line[:4] for line in LINES],
    }
    program = f"""
        const d = require({json.dumps(str(SCRIPT))});
        const asked = {json.dumps(asked)};
        console.log(JSON.stringify({{
            tags: asked.prompts.map((prompt) => d.tags(prompt)),
            rewritten: asked.tags.map((tag) => ["plain", "subject"].map((role) => d.withRole(tag, role))),
            statuses: asked.statuses.map((prompt) => d.status(prompt)),
            unreadable: asked.unreadable.map((tag) => d.status(tag)),
            readable: asked.readable.map((tag) => d.tags(tag)[0].unet),
            schedule: d.status("<lora:a:0@0,1@0.5:role=style>").text,
            lines: asked.lines.map(([prompts, ticked, negative, unlisted]) => d.lines(
                prompts.map((prompt, index) => ({{hires: index > 0, all: d.tags(prompt)}})),
                {{ticked, unlisted: new Set(unlisted), negative: negative.flatMap((prompt) => d.tags(prompt))}},
            ).map(({{level, text}}) => `${{level}} ${{text}}`)),
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


@pytest.mark.parametrize("index", range(len(UNREADABLE)))
def test_a_number_that_cannot_be_read_is_named_as_roles_py_names_it(answers: dict[str, Any], index: int) -> None:
    tag, number = UNREADABLE[index]
    said = f"{tag}: {number} is not a number; write for example 0.8"
    with pytest.raises(RoleError) as error:
        parse_prompt(tag)
    assert str(error.value).replace("'", '"') == said
    assert answers["unreadable"][index]["level"] == "wrong"
    assert answers["unreadable"][index]["text"].startswith(said)


@pytest.mark.parametrize("index", range(len(READABLE)))
def test_every_way_to_write_a_number_is_read_as_python_reads_it(answers: dict[str, Any], index: int) -> None:
    assert answers["readable"][index] == float(READABLE[index])


def test_a_schedule_of_another_extension_is_not_called_wrong(answers: dict[str, Any]) -> None:
    assert answers["schedule"] == "no LoRA with role=subject · style: a 1.0"


@pytest.mark.parametrize("index", range(len(LINES)))
def test_the_lines_say_what_keeps_roles_from_being_used(answers: dict[str, Any], index: int) -> None:
    assert answers["lines"][index] == LINES[index][4]


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
