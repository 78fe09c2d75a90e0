"""Prompts of every kind: read or refused, by Python and by the page alike, and never at length."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import assert_said, fuzz, texts
from hypothesis import strategies as st

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.generate import assignment
from lib_dynfuse.hosts.reading import read_tags
from lib_dynfuse.options import OptionsError
from lib_dynfuse.roles import RoleError, lora_tags, parse_prompt, strip_tags

SCRIPT = Path(__file__).parents[2] / "javascript" / "dynfuse.js"
TAG = re.compile("<(?:lora|lyco):[^>]*>", re.IGNORECASE)
words = st.sampled_from(
    [
        "<lora:",
        "<LYCO:",
        ">",
        ":",
        "=",
        "role=",
        "subject",
        "STYLE",
        "none",
        "te=",
        "unet=",
        "dyn=",
        "lbw=",
        "rolle=",
        "0.8",
        "-1",
        "nan",
        "1e999",
        "1_0",
        "1,0",
        "abc",
        " ",
        "\n",
        "a fox",
        "é",
        "<",
        "(x:1.2)",
        "[a:b:0.5]",
    ]
)
prompts = st.lists(words | texts, max_size=24).map("".join)
large = st.tuples(words.filter(bool), st.integers(1, 20_000), prompts).map(lambda one: one[0] * one[1] + one[2])


@fuzz(prompts | large)
def test_a_prompt_is_read_or_refused_in_few_words(prompt: str):
    assert lora_tags(prompt) == TAG.findall(prompt)
    assert strip_tags(prompt) == TAG.sub("", prompt).strip()
    try:
        read = parse_prompt(prompt)
    except RoleError as error:
        assert_said(str(error), 800)
        return
    assert read.text == TAG.sub("", prompt)
    assert [tag.raw for tag in read.tags] == lora_tags(prompt)
    assert all(tag.name and tag.name in tag.raw for tag in read.tags)
    assert all(abs(tag.te) < float("inf") and abs(tag.unet) < float("inf") for tag in read.tags)
    for notice in read.notices:
        assert_said(notice, 1600)


class Params:
    """A tag as the WebUI splits it (modules/extra_networks.py)."""

    def __init__(self, items: list[str]) -> None:
        self.items = items
        self.positional: list[str] = []
        self.named: dict[str, str] = {}
        for item in items:
            parts = item.split("=", 2)
            if len(parts) == 2:
                self.named[parts[0]] = parts[1]
            else:
                self.positional.append(item)


@fuzz(st.lists(st.lists(words | texts, max_size=6).map("".join), min_size=1, max_size=4))
def test_a_tag_that_a_webui_has_split_is_read_or_refused_in_few_words(bodies: list[str]):
    try:
        tags = read_tags({"lora": [Params(body.split(":")) for body in bodies]})
    except DynFuseError as error:
        assert_said(str(error), 800)
        return
    assert len(tags) == len(bodies)


@fuzz(st.lists(st.sampled_from(["name", "=", "=1", "9" * 400, "1e999", "on", " "]) | texts, max_size=5).map("".join))
def test_a_parameter_on_the_command_line_is_read_or_refused(text: str):
    try:
        name, value = assignment(text, "--set")
    except OptionsError as error:
        assert_said(str(error), 800)
        return
    assert name
    assert isinstance(value, (bool, int, float, str))


Ask = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def page() -> Iterator[Ask]:
    """dynfuse.js, asked in Node: a prompt in, what it makes of it out."""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here")
    program = f"""
        const d = require({json.dumps(str(SCRIPT))});
        require("readline").createInterface({{input: process.stdin}}).on("line", (line) => {{
            const prompt = JSON.parse(line);
            const tags = d.tags(prompt);
            const rewritten = tags.slice(0, 5).map((tag) => d.withRole(tag.raw, "style"));
            console.log(JSON.stringify({{raws: tags.map((tag) => tag.raw), rewritten, status: d.status(prompt).text}}));
        }});
    """
    with subprocess.Popen([node, "-e", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(prompt: str) -> dict[str, Any]:
            process.stdin.write(json.dumps(prompt) + "\n")
            process.stdin.flush()
            return dict(json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


@fuzz(prompt=prompts | large)
def test_the_page_finds_the_same_tags_and_says_few_words(page: Ask, prompt: str):
    seen = page(prompt)
    assert seen["raws"] == lora_tags(prompt)
    assert len(seen["status"]) < 800
    for rewritten in seen["rewritten"]:
        assert lora_tags(rewritten) == [rewritten]
