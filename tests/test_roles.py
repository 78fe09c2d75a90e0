from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_dynfuse.roles import (
    MOST_PARTS,
    MOST_TAGS,
    LoraTag,
    Role,
    RoleError,
    lora_tags,
    parse_prompt,
    parse_role,
    strengths,
    strip_tags,
)


def only_tag(prompt: str) -> LoraTag:
    (tag,) = parse_prompt(prompt).tags
    return tag


def test_a_tag_is_taken_out_of_the_prompt_and_read():
    prompt = parse_prompt("a fox <lora:my_fox:0.8:role=subject> in snow <lora:ink:1:role=style>")
    assert prompt.text == "a fox  in snow "
    assert prompt.tags == (
        LoraTag("my_fox", 0.8, 0.8, Role.SUBJECT, "<lora:my_fox:0.8:role=subject>"),
        LoraTag("ink", 1.0, 1.0, Role.STYLE, "<lora:ink:1:role=style>"),
    )
    assert prompt.notices == ()


@pytest.mark.parametrize(
    ("tag", "te", "unet"),
    [
        ("<lora:a>", 1.0, 1.0),
        ("<lora:a:0.5>", 0.5, 0.5),
        ("<lora:a:0.5:0.7>", 0.5, 0.7),
        ("<lora:a:te=0.5>", 0.5, 0.5),
        ("<lora:a:0.9:te=0.5>", 0.5, 0.5),
        ("<lora:a:0.9:unet=0.5>", 0.9, 0.5),
        ("<lora:a:te=0:unet=1.5>", 0.0, 1.5),
        ("<lora:a:-0.5>", -0.5, -0.5),
        ("<lora:a:unet=0.5:0.9>", 0.9, 0.5),
    ],
)
def test_strengths_follow_the_webui_rules(tag: str, te: float, unet: float):
    read = only_tag(tag)
    assert (read.te, read.unet) == (te, unet)


@pytest.mark.parametrize(
    ("written", "role"),
    [
        ("role=subject", Role.SUBJECT),
        ("role=STYLE", Role.STYLE),
        ("Role=Style", Role.STYLE),
        ("role= style ", Role.STYLE),
        ("role=none", None),
        ("1", None),
    ],
)
def test_roles_are_read_in_any_case(written: str, role: Role | None):
    assert only_tag(f"<lora:a:{written}>").role is role


def test_the_tag_name_is_read_in_any_case_and_lyco_is_the_same_thing():
    assert only_tag("<LoRA:a:1:role=style>").role is Role.STYLE
    assert only_tag("<lyco:a:1>").name == "a"


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (
            "<lora:a:1:role=subjekt>",
            ["<lora:a:1:role=subjekt>", "'subjekt'", "did you mean subject?", "subject, style, none"],
        ),
        ("<lora:a:1:role=xyzzy>", ["'xyzzy'", "subject, style, none"]),
        ("<lora:a:1:role=>", ["''", "subject, style, none"]),
        ("<lora:a:1:role=a=b>", ["role=a=b", "more than one '='"]),
        ("<lora:a:1:rolle=style>", ["rolle=", "did you mean role=?"]),
        ("<lora:a:1:role=style:role=style>", ["role= is given twice"]),
        ("<lora:a:loud>", ["strength 'loud' is not a number"]),
        ("<lora:a:1,0>", ["strength '1,0' is not a number"]),
        ("<lora:a::1>", ["strength '' is not a number"]),
        ("<lora:a:1:1:many>", ["dyn 'many' is not a number"]),
        ("<lora:a:te=nan>", ["te 'nan' is not a number"]),
        ("<lora:a:unet=inf>", ["unet 'inf' is not a number"]),
        ("<lora:>", ["names no LoRA"]),
        ("<lora::1>", ["names no LoRA"]),
        ("<lora:role=style>", ["names no LoRA"]),
        ("<lora:a:1:1:1:1>", ["4 numbers"]),
    ],
)
def test_a_wrong_tag_is_refused_with_what_is_wrong_and_what_is_allowed(tag: str, words: list[str]):
    with pytest.raises(RoleError) as error:
        parse_prompt(f"a fox {tag} in snow")
    message = str(error.value)
    assert tag in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_the_engine_cannot_do_is_left_out_and_said():
    prompt = parse_prompt("<lora:a:1:dyn=8><lora:b:1:lbw=ALL>")
    assert [tag.name for tag in prompt.tags] == ["a", "b"]
    assert "dyn" in prompt.notices[0]
    assert "lbw=" in prompt.notices[1]


def test_a_role_alone_says_where_it_stood():
    with pytest.raises(RoleError, match="the panel: unknown role 'both'"):
        parse_role("both", "the panel")


@given(st.text())
@example("a (fox:1.2) [in:snow:0.5] BREAK <hypernet:x:1> <lora")
def test_text_without_tags_stays_letter_for_letter(text: str):
    if "<lora:" in text.lower() or "<lyco:" in text.lower():
        return
    prompt = parse_prompt(text)
    assert prompt.text == text
    assert prompt.tags == ()


pieces = st.lists(
    st.sampled_from(
        ["<lora:", ">", ":", "=", "role", "subject", "te", "unet", "1", "nan", " ", "<", "\n", "é", "lyco", "a"]
    )
    | st.text(max_size=4),
    max_size=14,
).map("".join)


@given(pieces)
@example("<lora:<lora:a:1>:role=subject>")
@example("<lora:a\n:1:role=style>")
@example("<lora:a:1e999>")
@example("<lora:a:１>")
def test_hostile_prompts_are_read_or_refused_never_worse(prompt: str):
    try:
        read = parse_prompt(prompt)
    except RoleError:
        return
    for tag in read.tags:
        assert tag.raw in prompt
        assert tag.name


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[A-Za-z0-9_\-. ]*[A-Za-z0-9]", fullmatch=True).map(str.strip),
            st.floats(-2, 2).map(lambda value: round(value, 3)),
            st.sampled_from(["subject", "style", "none"]),
        ),
        max_size=4,
    )
)
def test_what_is_written_is_what_is_read(tags: list[tuple[str, float, str]]):
    written = " and ".join(f"<lora:{name}:{strength}:role={role}>" for name, strength, role in tags)
    read = parse_prompt(written).tags
    assert [(tag.name, tag.unet, tag.role.value if tag.role else "none") for tag in read] == tags


def megabyte(piece: str) -> str:
    return piece * (1_000_000 // len(piece))


# Prompts of a megabyte, each of a kind that a reader could take the square of its length for, or answer at length.
LARGE = {
    "openings": megabyte("<lora:"),
    "openings and names": megabyte("<lora:a "),
    "openings and one end": megabyte("<lora:") + ">",
    "ends": megabyte(">"),
    "tags": megabyte("<lora:a:1>"),
    "tags with unknown parts": megabyte("<lora:a:lbw=1:bcde=2>"),
    "unknown parts": f"<lora:a{megabyte(':b=1')}>",
    "colons": f"<lora:{megabyte(':')}>",
    "a name": f"<lora:{megabyte('a')}>",
    "a role": f"<lora:a:role={megabyte('x')}>",
    "a part's name": f"<lora:a:{megabyte('r')}=1>",
    "a number": f"<lora:a:{megabyte('9')}>",
    "as many tags and parts as there may be": f"<lora:a{''.join(f':q{n}x=1' for n in range(MOST_PARTS - 1))}>"
    * MOST_TAGS,
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_prompt_of_a_megabyte_is_read_or_refused_in_a_second_and_answered_in_few_words(kind: str):
    prompt = LARGE[kind]
    began = time.process_time()
    try:
        said = list(parse_prompt(prompt).notices)
    except RoleError as error:
        said = [str(error)]
    assert len(strip_tags(prompt)) <= len(prompt)
    assert sum(len(tag) for tag in lora_tags(prompt)) <= len(prompt)
    assert time.process_time() - began < 1
    assert len(said) <= MOST_TAGS
    assert all(len(line) < 700 for line in said)


def test_more_tags_or_parts_than_anybody_writes_are_refused():
    tag = "<lora:a:1>"
    assert len(parse_prompt(tag * MOST_TAGS).tags) == MOST_TAGS
    with pytest.raises(RoleError, match=f"more than {MOST_TAGS} LoRA tags"):
        parse_prompt(tag * (MOST_TAGS + 1))
    with pytest.raises(RoleError, match=f"more than {MOST_PARTS} parts"):
        parse_prompt(f"<lora:a{':b=1' * MOST_PARTS}>")


@given(st.text(alphabet="<lora:yc>=1 L\n", max_size=40))
@example("<lora:<lora:a>b><lyco:c> <lora:d")
def test_tags_are_where_a_plain_pattern_finds_them(prompt: str):
    plain = re.compile("<(?:lora|lyco):[^>]*>", re.IGNORECASE)
    assert lora_tags(prompt) == plain.findall(prompt)
    assert strip_tags(prompt) == plain.sub("", prompt).strip()


def test_the_unknown_parts_of_a_tag_are_said_together():
    (notice,) = parse_prompt("<lora:a:1:lbw=ALL:start=3>").notices
    assert notice == "<lora:a:1:lbw=ALL:start=3>: lbw=, start= are not known here and were left out"


def test_strengths_are_read_of_what_a_host_has_split():
    assert strengths("<lora:a:1:0.5>", ["a", "1", "0.5"], {}) == (1.0, 0.5)
    assert strengths("<lora:a:te=2>", ["a"], {"te": "2", "role": "style"}) == (2.0, 2.0)
    with pytest.raises(RoleError, match="<lora:a:abc>: strength 'abc' is not a number"):
        strengths("<lora:a:abc>", ["a", "abc"], {})
