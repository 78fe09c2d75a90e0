"""Reference pictures of every kind, as a request brings them: read or refused in few words."""

from __future__ import annotations

import base64
import io

import pytest
from fuzzing import assert_said, fuzz, texts
from hypothesis import strategies as st
from PIL import Image

pictures = pytest.importorskip("lib_dynfuse.guidance.pictures")


def made(format: str, mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format=format)
    return file.getvalue()


BY_FORMAT = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L"),
    "GIF": ("P", "L"),
}
ALLOWED = [made(format, mode, (5, 3)) for format, modes in BY_FORMAT.items() for mode in modes]
OTHERS = [made("TIFF", "RGB", (5, 3)), made("PPM", "RGB", (5, 3)), made("ICO", "RGB", (16, 16))]
changes = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5)


def damaged(whole: bytes, changed: list[tuple[int, int]], cut: int) -> bytes:
    content = bytearray(whole[: len(whole) - cut] if cut < len(whole) else whole)
    for place, value in changed:
        content[place % len(content)] = value
    return bytes(content)


contents = st.binary(max_size=80) | st.builds(
    damaged, st.sampled_from(ALLOWED + OTHERS), changes, st.just(0) | st.integers(0, 60)
)


@fuzz(contents)
def test_a_picture_is_read_or_refused_in_few_words(content: bytes):
    one = pictures.PictureFile("style_references: picture 2", content)
    try:
        one.check()
        found = one.decode()
    except pictures.PictureError as error:
        assert_said(str(error), 400, begins="style_references: picture 2: ")
        return
    assert found.shape[:2] == (1, 3)
    assert max(found.shape) <= 1024
    assert found.min() >= 0
    assert found.max() <= 1


def written(content: bytes, form: str) -> str:
    text = base64.b64encode(content).decode()
    forms = {
        "plain": text,
        "lines": "\n".join(text[at : at + 20] for at in range(0, len(text), 20)),
        "other alphabet": base64.urlsafe_b64encode(content).decode().rstrip("="),
        "data URL": f"data:image/png;base64,{text}",
    }
    return forms[form]


@fuzz(st.sampled_from(ALLOWED), st.sampled_from(["plain", "lines", "other alphabet", "data URL"]))
def test_a_picture_is_the_same_in_whatever_form_it_is_written(content: bytes, form: str):
    assert pictures.in_text(written(content, form)) == content


@fuzz(texts | st.builds(written, contents, st.just("plain")).map(lambda text: text[:-3]))
def test_a_text_is_a_picture_or_none(text: str):
    assert isinstance(pictures.in_text(text), bytes | None)
