"""Our routes, and what the host's txt2img and img2img answer to arguments of ours that are wrong."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib_dynfuse import __version__
from lib_dynfuse.core.strategies import strategies
from lib_dynfuse.options import FIELDS
from lib_dynfuse.trace import Item, Pass, Record
from lib_dynfuse.webui import api, traces
from lib_dynfuse.webui.arguments import ORDER


def record() -> Record:
    values = np.ones((1, 1, 1, 4), np.float32)
    return Record(["down_blocks.0.attn"], [Pass(0, 0.0, 14.5, (Item(0, True),))], values)


def request(entry: Any, title: str = "DynFuse") -> dict[str, Any]:
    return {"prompt": "a fox", "alwayson_scripts": {"ADetailer": {"args": [1]}, title: entry}}


def test_the_schema_is_json_and_names_every_option_and_rule():
    schema = json.loads(json.dumps(api.schema()))
    assert schema["title"] == "DynFuse"
    assert schema["version"] == __version__
    assert schema["order"] == list(ORDER)
    assert [option["name"] for option in schema["options"]] == [option.name for option in FIELDS]
    assert [rule["name"] for rule in schema["rules"]] == list(strategies())
    balance = next(option for option in schema["options"] if option["name"] == "balance")
    assert (balance["type"], balance["minimum"], balance["maximum"]) == ("number", -1, 1)
    assert balance["infotext"] == "DynFuse balance"
    pictures = next(option for option in schema["options"] if option["name"] == "subject_references")
    assert (pictures["type"], pictures["default"]) == ("array", [])
    mode = next(option for option in schema["options"] if option["name"] == "nudge_mode")
    assert (mode["type"], mode["choices"]) == ("string", ["x0", "adam", "xt"])
    soft = next(rule for rule in schema["rules"] if rule["name"] == "kl-soft")
    assert "softness" in [parameter["name"] for parameter in soft["parameters"]]


@pytest.mark.parametrize(
    "entry",
    [{}, {"args": []}, {"args": [{"enabled": True, "strategy": "js"}]}, {"args": [True, "js", 0.5]}],
)
def test_right_arguments_pass(entry: dict[str, Any]):
    assert api.wrong_arguments(request(entry)) == ""


@pytest.mark.parametrize("body", [None, [], "text", {}, {"alwayson_scripts": None}, {"alwayson_scripts": {"X": 1}}])
def test_a_request_that_says_nothing_to_us_is_no_matter_of_ours(body: Any):
    assert api.wrong_arguments(body) == ""


@pytest.mark.parametrize("title", ["DynFuse", "dynfuse", "DYNFUSE"])
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"args": [{"blance": 1}]}, ["blance", "did you mean balance?"]),
        ({"args": [{"balance": 3}]}, ["balance", "-1 to 1"]),
        ({"args": [{"sample_tokens": 64.5}]}, ["sample_tokens", "0 to 4096"]),
        ({"args": [True, "kll"]}, ["'kll'", "kl-token"]),
        ({"args": [{"nudge": True, "nudge_mode": "xy"}]}, ["nudge_mode", "x0, adam, xt"]),
        ({"args": [{"subject_references": [{"image": "fox"}]}]}, ["subject_references", "is no picture"]),
        ({"args": [None] * (len(ORDER) + 1)}, [f"{len(ORDER) + 1} arguments"]),
        ({"args": [{"parameters": {"name": "kl"}}]}, ["parameters", "'name'"]),
        ({"args": [{"preset": []}]}, ["preset", "[]", "default, paper"]),
        ({"args": [{"balance": 10**400}]}, ["balance", "-1 to 1"]),
        ({"args": [{"parameters": "softness" * 5000}]}, ["parameters", "is not name=value"]),
        ({"x" * 5000: 1}, ["xxx", "unknown"]),
        ({"args": [{"enabled": True}, "js"]}, ["args", "nothing may follow"]),
        ({"args": {"enabled": True}}, ["args", "a list is wanted"]),
        ({"arguments": [{"enabled": True}]}, ["arguments", "unknown"]),
        ([{"enabled": True}], ["an object is wanted"]),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(entry: Any, words: list[str], title: str):
    said = api.wrong_arguments(request(entry, title))
    assert said.startswith("alwayson_scripts.DynFuse: ")
    assert "\n" not in said
    assert len(said) < 1000
    for word in words:
        assert word in said


def nudged(**values: Any) -> dict[str, Any]:
    return request({"args": [{"enabled": True, "nudge": True, **values}]})


def test_reference_pictures_may_be_base64_and_data_urls(text: str):
    body = nudged(subject_references=[text, f"data:image/png;base64,{text}"], style_references=text)
    assert api.wrong_arguments(body) == ""


def test_reference_pictures_may_be_files_below_a_folder_that_the_server_allows(
    picture: bytes, tmp_path: Path, allowed: list[str]
):
    (tmp_path / "fox.png").write_bytes(picture)
    body = nudged(subject_references=[str(tmp_path / "fox.png"), "fox.png"])
    assert "subject_references: picture 1: is neither" in api.wrong_arguments(body)
    allowed.append(str(tmp_path))
    assert api.wrong_arguments(body) == ""


def test_a_reference_picture_that_cannot_be_used_is_named_by_its_number_alone(
    text: str, tmp_path: Path, allowed: list[str]
):
    wrongs = [str(tmp_path / "none.png"), text[:40], base64.b64encode(b"no picture").decode(), "data:text/plain,a"]
    for wrong in wrongs:
        said = api.wrong_arguments(nudged(style_references=[text, wrong]))
        assert said.startswith("alwayson_scripts.DynFuse: style_references: picture 2: is n")
        assert wrong[:20] not in said
        assert "\n" not in said


def test_pictures_are_not_looked_at_while_nothing_is_compared_with_them():
    for off in ({"nudge": False}, {"enabled": False}):
        assert api.wrong_arguments(nudged(subject_references=["/etc/passwd", "x"], **off)) == ""


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> traces.Traces:
    found = traces.Traces()
    monkeypatch.setattr(traces, "kept", found)
    return found


def test_the_trace_is_the_record_that_the_answer_names_as_json(kept: traces.Traces):
    (name,) = kept.keep(record(), [0])
    content, media_type = api.trace_content(name, "json", None)
    assert media_type == "application/json"
    assert json.loads(content)["layers"] == ["down_blocks.0.attn"]


def test_the_trace_as_png_is_the_heat_map_of_that_picture(kept: traces.Traces):
    (name,) = kept.keep(record(), [0])
    content, media_type = api.trace_content(name, "png", None)
    assert media_type == "image/png"
    assert content.startswith(b"\x89PNG")
    assert api.trace_content(name, "png", 0)[0] == content


@pytest.mark.parametrize(
    ("known", "format", "image", "status", "words"),
    [
        (False, "json", None, 404, ["id: there is no such trace", "DynFuse trace", "last 16"]),
        (True, "svg", None, 422, ["'svg'", "json, png"]),
        (True, "png", 3, 404, ["picture 3", "[0]"]),
    ],
)
def test_a_trace_that_cannot_be_given_says_why(
    known: bool, format: str, image: int | None, status: int, words: list[str], kept: traces.Traces
):
    (name,) = kept.keep(record(), [0])
    with pytest.raises(api.TraceError) as error:
        api.trace_content(name if known else "0", format, image)
    assert error.value.status == status
    for word in words:
        assert word in str(error.value)
