"""Which reference pictures of a request are read, and that nothing else of the disk is as much as looked at."""

from __future__ import annotations

import base64
import builtins
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import ImageFile
from reference_files import png

import preload
from lib_dynfuse.guidance.pictures import PictureError
from lib_dynfuse.options import Options
from lib_dynfuse.webui import references
from lib_dynfuse.webui.arguments import ORDER, read_arguments

NUDGED = {"enabled": True, "nudge": True}


class NamedString(str):
    """As gradio 4 gives a file."""

    name: str

    def __new__(cls, path: str) -> NamedString:
        made = super().__new__(cls, path)
        made.name = path
        return made


def opened(path: Path | str, origin: Path | str = "") -> SimpleNamespace:
    """A file as gradio 3 gives it: its copy, and what the request named."""
    return SimpleNamespace(name=str(path), orig_name=str(origin or path))


def panel(**values: Any) -> list[Any]:
    """What the script is given by the page."""
    named = {**NUDGED, **values}
    return [named.get(name) for name in ORDER]


def given(args: list[Any]) -> references.Given:
    return references.given(read_arguments(args), references.uploads_in(args))


def refusal(source: Any, uploads: dict[str, str] | None = None) -> str:
    with pytest.raises(PictureError) as error:
        references.given(Options(**NUDGED, subject_references=[source]), uploads or {})
    return str(error.value)


@contextmanager
def disk_untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever asks the disk for anything fails the test."""

    def fail(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"the disk was asked for {args[0]!r}")

    with monkeypatch.context() as watched:
        for name in ("stat", "lstat", "open", "scandir", "listdir", "readlink"):
            watched.setattr(os, name, fail)
        watched.setattr(builtins, "open", fail)
        yield


@pytest.mark.parametrize("write", [str, "data:image/png;base64,{}".format, " {}\n".format])
def test_a_picture_in_base64_is_taken(
    write: Callable[[str], str], text: str, picture: bytes, allowed: list[str]
) -> None:
    found = references.given(Options(**NUDGED, style_references=[write(text)]), {})
    assert [one.data for one in found["style_references"]] == [picture]
    assert found["style_references"][0].name == "style_references: picture 1"


def test_no_path_is_taken_while_the_server_allows_no_folder(
    tmp_path: Path, picture: bytes, allowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fox.png").write_bytes(picture)
    (tmp_path / "text.txt").write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    sources = [str(tmp_path / name) for name in ("fox.png", "text.txt", "pipe", "none.png", "")]
    sources += ["fox.png", "../fox.png", "\\\\host\\share\\x.png", "C:\\x.png", "C:x.png", "/dev/zero", "\0", "~/x.png"]
    with disk_untouched(monkeypatch):
        said = {refusal(source) for source in sources}
    assert said == {f"subject_references: picture 1: {references.REFUSED}"}


@pytest.fixture
def folder(tmp_path: Path, allowed: list[str], picture: bytes) -> Path:
    """A folder that is allowed, with what an owner may have there."""
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "fox.png").write_bytes(picture)
    (inside / "deep" / "no.ending").write_bytes(picture)
    (inside / "text.txt").write_text("secret")
    os.mkfifo(inside / "pipe")
    (tmp_path / "outside.png").write_bytes(picture)
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    allowed.append(str(inside))
    return inside


@pytest.mark.parametrize("name", ["fox.png", "deep/no.ending", "deep/../fox.png", "./fox.png"])
def test_a_picture_below_an_allowed_folder_is_taken_by_its_path(name: str, folder: Path, picture: bytes) -> None:
    for source in (name, str(folder / name), f'"{folder / name}"'):
        found = references.given(Options(**NUDGED, subject_references=[source]), {})
        assert [one.data for one in found["subject_references"]] == [picture]


def test_everything_else_gets_one_answer(folder: Path) -> None:
    names = [
        "none.png",
        "deep",
        ".",
        "",
        "text.txt",
        "pipe",
        "link.png",
        "loop.png",
        "../outside.png",
        "a\0b",
        "x" * 5000,
    ]
    sources = [*names, *(str(folder / name) for name in names), str(folder), str(folder.parent / "outside.png")]
    assert {refusal(source) for source in sources} == {f"subject_references: picture 1: {references.REFUSED}"}


def test_outside_of_the_allowed_folders_the_disk_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = f"{folder}side/x.png"
    with disk_untouched(monkeypatch):
        said = {refusal(one) for one in ("/etc/hostname", str(folder.parent / "outside.png"), "../outside.png", beside)}
    assert len(said) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"enabled": False, "nudge": True},
        {"enabled": True},
        {"enabled": True, "nudge": True, "references": "preview"},
        {"enabled": True, "nudge": True, "references": "generated"},
    ],
)
def test_nothing_is_read_where_nothing_is_compared(
    values: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(**values, subject_references=[str(folder / "fox.png")], style_references=["/etc/passwd"])
    with disk_untouched(monkeypatch):
        assert references.given(options, {}) == {}


def test_at_most_so_many_pictures_of_a_role_are_taken(text: str) -> None:
    most = references.MOST_PICTURES
    full = Options(**NUDGED, subject_references=[text] * most, style_references=[text] * most)
    assert [len(one) for one in references.given(full, {}).values()] == [most, most]
    with pytest.raises(PictureError, match=f"style_references: {most + 1} pictures; at most {most}"):
        references.given(Options(**NUDGED, style_references=[text] * (most + 1)), {})


def padded(length: int) -> bytes:
    """A picture of so many bytes: what follows a PNG's end is ignored."""
    return png() + bytes(length - len(png()))


def test_all_pictures_of_a_request_have_a_limit_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MOST_BYTES", 1 << 20)
    (folder / "half.png").write_bytes(padded(1 << 19))
    text = base64.b64encode(padded(1 << 19)).decode()
    for fits in (
        {"subject_references": ["half.png", text]},
        {"subject_references": [text], "style_references": [text]},
    ):
        references.given(Options(**NUDGED, **fits), {})
    for last in (base64.b64encode(png()).decode(), "fox.png", "A" * (3 << 20)):
        with pytest.raises(PictureError, match=r"style_references: picture 1: .* more than 1 MB come together"):
            references.given(Options(**NUDGED, subject_references=["half.png", text], style_references=[last]), {})


def test_the_header_is_looked_at_and_no_pixel_decoded(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    references.given(Options(**NUDGED, subject_references=[text]), {})
    assert "picture 1: is not a picture, or not a whole one" in refusal(text[:40])


@pytest.mark.parametrize("kind", [opened, NamedString])
def test_what_was_uploaded_on_the_page_is_taken_and_named_as_it_was(
    kind: Any, uploads: Path, picture: bytes, allowed: list[str]
) -> None:
    file = uploads / "0123456789abcdef" / "my fox (1).png"
    file.parent.mkdir()
    file.write_bytes(picture)
    found = given(panel(subject_references=[kind(str(file))]))
    assert [(one.name, one.data) for one in found["subject_references"]] == [
        ("subject_references: my fox (1).png", picture)
    ]
    file.write_bytes(b"GIF89a")
    with pytest.raises(PictureError, match=r"subject_references: my fox \(1\)\.png: is not a picture"):
        given(panel(subject_references=[kind(str(file))]))


def test_a_file_that_gradio_copied_for_a_request_is_not_taken(
    uploads: Path, tmp_path: Path, picture: bytes, allowed: list[str]
) -> None:
    copy = uploads / "sha1" / "secret.png"
    copy.parent.mkdir()
    copy.write_bytes(picture)
    (tmp_path / "secret.png").write_bytes(picture)
    origins = [tmp_path / "secret.png", uploads / ".." / "secret.png", "secret.png", "../secret.png", uploads]
    for origin in origins:
        with pytest.raises(PictureError) as error:
            given(panel(subject_references=[opened(copy, origin)]))
        assert str(error.value) == f"subject_references: picture 1: {references.REFUSED}"
    for path in (tmp_path / "secret.png", f"{uploads}/../secret.png"):
        with pytest.raises(PictureError, match=r"picture 1: is neither"):
            given(panel(subject_references=[NamedString(str(path))]))


def test_a_link_among_the_uploads_is_not_followed_out_of_them(
    uploads: Path, tmp_path: Path, allowed: list[str]
) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (uploads / "fox.png").symlink_to(tmp_path / "secret.png")
    assert not references.is_upload(str(uploads / "fox.png"))


def test_the_api_cannot_name_an_upload(uploads: Path, picture: bytes, allowed: list[str]) -> None:
    (uploads / "fox.png").write_bytes(picture)
    for args in (
        [{**NUDGED, "subject_references": [str(uploads / "fox.png")]}],
        panel(subject_references=[str(uploads / "fox.png")]),
    ):
        with pytest.raises(PictureError, match="picture 1: is neither"):
            given(args)


def test_an_upload_s_name_is_fit_for_a_message(uploads: Path, picture: bytes) -> None:
    file = uploads / ("<b>a; DynFuse note_ x" + "y" * 100 + ".png")
    file.write_bytes(picture)
    (name,) = references.uploads_in(panel(style_references=[opened(file)])).values()
    assert name.startswith("_b_a_ DynFuse note_ xyy")
    assert len(name) <= 80


def test_the_owner_allows_folders_on_the_command_line_alone() -> None:
    parser = ArgumentParser()
    preload.preload(parser)
    assert parser.parse_args([]).dynfuse_reference_folder == []
    read = parser.parse_args([references.FOLDER_FLAG, "/a", references.FOLDER_FLAG, "/b"])
    assert read.dynfuse_reference_folder == ["/a", "/b"]
