"""The routes on a real FastAPI application with the shape of the host's; skipped where there is no FastAPI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import fastapi
from fastapi.testclient import TestClient
from pydantic import BaseModel
from reference_files import png
from test_api import record

from lib_dynfuse.webui import api, traces


class Request(BaseModel):
    prompt: str = ""
    alwayson_scripts: dict = {}


def password(key: str = "") -> None:
    if key != "secret":
        raise fastapi.HTTPException(401, "Incorrect username or password")


def host(*, with_api: bool = True, guarded: bool = False) -> TestClient:
    app = fastapi.FastAPI()

    def generate(request: Request) -> dict:
        return {"prompt": request.prompt}

    if with_api:
        dependencies = [fastapi.Depends(password)] if guarded else []
        for path in api.CHECKED_ROUTES:
            app.add_api_route(path, generate, methods=["POST"], dependencies=dependencies)
    api.on_app_started(None, app)
    api.on_app_started(None, app)
    return TestClient(app)


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a record that is kept."""
    monkeypatch.setattr(traces, "kept", traces.Traces())
    return traces.kept.keep(record(), [0])[0]


@pytest.mark.parametrize("path", api.CHECKED_ROUTES)
def test_wrong_arguments_answer_422_and_right_ones_reach_the_host(path: str):
    client = host()
    wrong = client.post(path, json={"prompt": "a", "alwayson_scripts": {"dynfuse": {"args": [{"balance": 3}]}}})
    assert wrong.status_code == 422
    assert wrong.json()["detail"].startswith("alwayson_scripts.DynFuse: balance: ")
    right = client.post(path, json={"prompt": "a", "alwayson_scripts": {"DynFuse": {"args": [{"balance": 0.5}]}}})
    assert right.json() == {"prompt": "a"}


@pytest.mark.parametrize(
    "option",
    [
        '"parameters": {"name": "kl"}',
        '"preset": []',
        f'"balance": {"9" * 400}',
        '"balance": Infinity',
        '"strategy": "\\ud800"',
        '"\\ud800": 1',
        f'"strategy": {"[" * 500}{"]" * 500}',
        f'"parameters": {{"softness": {"9" * 400}}}',
    ],
)
def test_what_breaks_a_reader_is_answered_422_too(option: str):
    body = f'{{"prompt": "a", "alwayson_scripts": {{"DynFuse": {{"args": [{{{option}}}]}}}}}}'
    answer = host().post(api.CHECKED_ROUTES[0], content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("alwayson_scripts.DynFuse: ")


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[1]", "application/json"),
        (b'{"alwayson_scripts": 3}', "application/json"),
        (b"a fox", "text/plain"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "application/json"),
    ],
)
def test_a_body_that_is_no_request_is_answered_by_the_host(content: bytes, media_type: str):
    answer = host().post(api.CHECKED_ROUTES[0], content=content, headers={"Content-Type": media_type})
    assert answer.status_code in (400, 422)
    assert "DynFuse" not in answer.text


def test_the_schema_is_served():
    assert host().get("/dynfuse/v1/schema").json() == api.schema()


def test_the_trace_is_served_as_json_and_as_png(name: str):
    client = host()
    assert client.get("/dynfuse/v1/trace").status_code == 404
    assert client.get("/dynfuse/v1/trace?id=guessed").status_code == 404
    assert client.get(f"/dynfuse/v1/trace?id={name}").json()["layers"] == ["down_blocks.0.attn"]
    picture = client.get(f"/dynfuse/v1/trace?id={name}&format=png")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    assert client.get(f"/dynfuse/v1/trace?id={name}&format=png&image=0").content == picture.content
    assert client.get(f"/dynfuse/v1/trace?id={name}&format=svg").status_code == 422
    assert client.get(f"/dynfuse/v1/trace?id={name}&format=png&image=3").status_code == 404
    assert client.get(f"/dynfuse/v1/trace?id={name}&format=png&image=x").status_code == 422


@pytest.mark.parametrize("path", ["/dynfuse/v1/schema?", "/dynfuse/v1/trace?id={}&"])
def test_our_routes_ask_for_the_hosts_password(path: str, name: str):
    address = path.format(name)
    assert host(guarded=True).get(address).status_code == 401
    assert host(guarded=True).get(f"{address}key=secret").status_code == 200


NUDGED = {"enabled": True, "nudge": True, "subject_references": ["/etc/hostname"]}


def test_a_form_of_another_site_reaches_nothing_of_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "wrong_arguments", lambda body: pytest.fail("looked at"))
    body = {"alwayson_scripts": {"DynFuse": {"args": [NUDGED]}}}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = host().post(api.CHECKED_ROUTES[0], content=json.dumps(body), headers={"Content-Type": kind})
        assert answer.status_code == 422


def test_pictures_are_looked_at_only_once_the_host_has_found_the_request_right(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "wrong_arguments", lambda body: pytest.fail("looked at"))
    answer = host().post(
        api.CHECKED_ROUTES[0], json={"prompt": [], "alwayson_scripts": {"DynFuse": {"args": [NUDGED]}}}
    )
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "prompt"]


@pytest.mark.parametrize("path", api.CHECKED_ROUTES)
def test_a_path_is_answered_without_a_word_of_what_is_there(path: str, tmp_path: Path, allowed: list[str]):
    (tmp_path / "there.png").write_bytes(png())
    answers = set()
    for name in ("there.png", "not.png", ""):
        given = {**NUDGED, "subject_references": [str(tmp_path / name)]}
        answer = host().post(path, json={"alwayson_scripts": {"DynFuse": {"args": [given]}}})
        assert answer.status_code == 422
        answers.add(answer.text)
    (said,) = answers
    assert str(tmp_path) not in said


def test_the_password_comes_before_our_complaint():
    wrong = {"alwayson_scripts": {"DynFuse": {"args": [{"balance": 3}]}}}
    assert host(guarded=True).post(api.CHECKED_ROUTES[0], json=wrong).status_code == 401


def test_a_host_without_its_api_gets_no_routes_of_ours():
    assert host(with_api=False).get("/dynfuse/v1/schema").status_code == 404
