"""The panel's inputs of pictures on a real gradio, as a person uses them and as a stranger would; else skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("httpx")

import gradio
from fastapi.testclient import TestClient
from reference_files import png

from lib_dynfuse.guidance.pictures import PictureError
from lib_dynfuse.webui import panel, references
from lib_dynfuse.webui.arguments import ORDER, read_arguments

ON = {"enabled": True, "nudge": True}


@pytest.fixture
def client(uploads: Path) -> TestClient:
    """A page with the panel, whose function `read` says what the script would read."""

    def read(*args: Any) -> str:
        try:
            found = references.given(read_arguments(args), references.uploads_in(args))
        except PictureError as error:
            return json.dumps({"error": str(error)})
        return json.dumps([[one.name, len(one.data)] for one in found["subject_references"]])

    with gradio.Blocks() as page:
        inputs = panel.build(False, lambda name: name).components
        gradio.Button().click(read, inputs=inputs, outputs=[gradio.Textbox()], api_name="read", queue=False)
    page.max_file_size = None  # as launching sets it in gradio 4
    return TestClient(gradio.routes.App.create_app(page))


def ask(client: TestClient, *files: dict[str, Any]) -> tuple[int, Any]:
    values = {**ON, "subject_references": list(files)}
    answer = client.post("/run/read", json={"data": [values.get(name) for name in ORDER], "session_hash": "x"})
    return answer.status_code, json.loads(answer.json()["data"][0]) if answer.status_code == 200 else answer.text


def file(path: Path | str, **more: Any) -> dict[str, Any]:
    """A file of the server as either gradio's page names it."""
    of_gradio_3 = {"name": str(path), "data": None, "is_file": True}
    return {**of_gradio_3, "path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def test_a_picture_that_was_uploaded_is_taken_under_its_name(client: TestClient) -> None:
    (path,) = client.post("/upload", files={"files": ("my fox.png", png(), "image/png")}).json()
    assert ask(client, file(path, orig_name="my fox.png")) == (200, [["subject_references: my fox.png", len(png())]])
    assert ask(client, file(path), file(path))[1] == [["subject_references: my fox.png", len(png())]] * 2


def test_a_file_of_the_server_is_neither_read_nor_copied(
    client: TestClient, uploads: Path, tmp_path: Path, allowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.png").write_bytes(png("blue"))
    monkeypatch.chdir(tmp_path)
    up = uploads / "0123" / ".." / ".."
    for path in (tmp_path / "secret.png", "secret.png", f"{up}/secret.png", "/dev/zero", "/etc/hostname"):
        for extra in ({}, {"orig_name": str(uploads / "fox.png")}):
            assert ask(client, file(path, **extra))[0] == 500
    assert [one for one in uploads.rglob("*") if one.is_file() and one.stat().st_size] == []


def test_a_file_whose_bytes_come_in_the_request_cannot_pass_for_an_upload(
    client: TestClient, tmp_path: Path, allowed: list[str]
) -> None:
    status, said = ask(client, {**file(tmp_path / "x.png"), "is_file": False, "data": "data:image/png;base64,AAAA"})
    assert status == 500 or said["error"].startswith("subject_references: picture 1: is neither")
