"""A picture that a person or a request gives: what is read of it, how, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor

from lib_dynfuse.guidance.pictures import (
    MOST_PIXELS,
    SIDE,
    PictureError,
    PictureFile,
    fingerprints,
    in_text,
    open_picture,
    read_picture,
)


def noise(height: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    """[1, 3, H, W] of whole 255ths, as a file of pictures has them."""
    return torch.randint(256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def image_of(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy())


def bytes_of(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def colours(picture: Tensor) -> list[list[int]]:
    """The colour of each pixel, row by row."""
    return (picture[0] * 255).round().int().flatten(1).T.tolist()


def test_a_picture_is_read_alike_from_a_path_from_base64_and_from_a_data_url(tmp_path: Path) -> None:
    wanted = noise()
    data = bytes_of(image_of(wanted))
    path = tmp_path / "my picture.png"
    path.write_bytes(data)
    plain = base64.b64encode(data).decode()
    urlsafe = base64.urlsafe_b64encode(data).decode()
    lines = "\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    sources = [path, str(path), f'"{path}"', plain, plain.rstrip("="), urlsafe, f" {lines}\n"]
    urls = [f"data:image/png;base64,{plain}", f"DATA:image/png;charset=utf8;base64,{plain}"]
    for source in [*sources, *urls]:
        found = read_picture(source)
        assert (found.shape, found.dtype) == ((1, 3, 5, 4), torch.float32)
        assert torch.equal(found, wanted)


def test_a_path_with_base64s_letters_only_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image_of(noise()).save("abcd", "PNG")
    assert torch.equal(read_picture("abcd"), noise())


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF"])
def test_other_formats_are_read_too(kind: str) -> None:
    data = bytes_of(Image.new("RGB", (3, 2), (0, 0, 255)), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert colours(read_picture(base64.b64encode(data).decode())) == [[0, 0, 255]] * 6


def test_a_picture_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left side is the top
    image.save(tmp_path / "photo.png", exif=exif)
    found = read_picture(tmp_path / "photo.png")
    assert found.shape == (1, 3, 16, 8)
    assert found[0, :, :8].min() == 1
    assert found[0, :, 8:].max() == 0


def palette_with_a_hole() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.fromarray(np.array([[[9, 9, 9, 0], [255, 0, 0, 255]]], np.uint8)), [[255] * 3, [255, 0, 0]]),
        (Image.fromarray(np.array([[[0, 0, 0, 51]]], np.uint8)), [[204] * 3]),
        (Image.fromarray(np.array([[[0, 0], [50, 255]]], np.uint8), "LA"), [[255] * 3, [50] * 3]),
        (palette_with_a_hole(), [[255] * 3, [255, 0, 0]]),
    ],
)
def test_what_is_transparent_is_white(image: Image.Image, seen: list[list[int]]) -> None:
    data = bytes_of(image, transparency=0) if image.mode == "P" else bytes_of(image)
    assert colours(read_picture(base64.b64encode(data).decode())) == seen


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.new("L", (1, 1), 7), [[7] * 3]),
        (Image.new("1", (1, 1), 1), [[255] * 3]),
        (Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)), [[0] * 3, [100] * 3, [255] * 3]),
    ],
)
def test_grey_becomes_colour_in_full_depth(image: Image.Image, seen: list[list[int]]) -> None:
    assert colours(read_picture(base64.b64encode(bytes_of(image)).decode())) == seen


def test_of_a_moving_picture_the_first_frame_is_taken() -> None:
    first, second = (Image.new("RGB", (1, 1), colour) for colour in ("red", "blue"))
    data = bytes_of(first, "GIF", save_all=True, append_images=[second])
    assert colours(read_picture(base64.b64encode(data).decode())) == [[255, 0, 0]]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone.png", "gone.png: there is no such file"),
        (Path("gone"), "gone: there is no such file"),
        (".", ".: is a folder, not a picture"),
        ("text.png", "text.png: is not a picture, or not a whole one"),
        ("cut.png", "cut.png: is not a picture, or not a whole one"),
        ("!?", "!?: there is no such file, and it is not a picture in base64"),
        ("", ": there is no such file, and it is not a picture in base64"),
        ("a\0b.png", "a\0b.png: there is no such file"),
        ("A" * 5000, "A" * 80 + "...: there is no such file, and it is not a picture in base64"),
        ("." * 5000, "." * 500 + "...: there is no such file"),
        (
            "data:image/svg+xml,<svg/>",
            "data:image/svg+xml,<svg/>: a data URL has to be of the kind data:image/png;base",
        ),
        (
            "data:image/png;base64,!",
            "data:image/png;base64,!: a data URL has to be of the kind data:image/png;base64,",
        ),
    ],
)
def test_what_is_no_picture_is_named_in_one_short_line(
    source: str | Path, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(bytes_of(image_of(noise(40, 40)))[:-200])
    with pytest.raises(PictureError) as caught:
        read_picture(source)
    assert str(caught.value).startswith(said)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM", "ICO", "TGA", "PDF"])
def test_other_formats_are_refused_whatever_pil_could_read(kind: str) -> None:
    one = PictureFile("it", bytes_of(Image.new("RGB", (32, 32)), kind))
    for read in (one.check, one.decode):
        with pytest.raises(PictureError, match="it: is not a picture, or not a whole one; allowed are PNG, JPEG"):
            read()


def blank(width: int, height: int, mode: str = "1", kind: str = "PNG") -> PictureFile:
    return PictureFile(
        "it", bytes_of(Image.new(mode, (width, height)), kind, **({"method": 0} if kind == "WEBP" else {}))
    )


@pytest.mark.parametrize("limit_of_pil", [None, 1000])
def test_too_large_a_picture_is_refused_by_its_header_whatever_pils_own_limit_is(
    limit_of_pil: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = blank(8001, 8000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_pil)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for read in (large.check, large.decode):
        with pytest.raises(PictureError, match="it: is too large"):
            read()


def test_the_largest_that_is_allowed_passes_and_no_pixel_of_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = blank(8000, MOST_PIXELS // 8000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    one.check()


def test_a_webp_may_have_fewer_pixels_as_it_is_decoded_in_several_copies() -> None:
    with pytest.raises(PictureError, match="6000 x 4001 pixels; at most 24 megapixels"):
        blank(6000, 4001, "RGB", "WEBP").check()


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((3000, 2000), (683, 1024)),
        ((2000, 3000), (1024, 683)),
        ((5000, 40), (8, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((1100, 7), (7, 1024)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_large_picture_is_shrunk_to_what_encoders_may_see(
    size: tuple[int, int], seen: tuple[int, int], kind: str
) -> None:
    one = blank(*size, "RGB", kind)
    assert one.decode().shape[2:] == seen
    assert one.decode(None).shape[2:] == size[::-1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16"])
def test_shrinking_shows_what_pils_best_filter_shows(mode: str) -> None:
    rows, columns = np.mgrid[0:500, 0:4200] / 4200
    waves = (127.5 + 120 * np.sin(9 * rows + 40 * columns * rows)).astype(np.uint8)
    grey = Image.fromarray(waves)
    image = Image.fromarray(waves.astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    found = PictureFile("it", bytes_of(image)).decode()
    assert max(found.shape) == SIDE
    wanted = np.asarray(grey.resize((found.shape[3], found.shape[2]), Image.Resampling.LANCZOS)) / 255
    assert np.abs(found[0, 1].numpy() - wanted).max() < 0.02


def test_a_large_transparent_picture_is_on_white_before_it_is_shrunk() -> None:
    image = Image.new("RGBA", (4096, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2048, 4))
    found = PictureFile("it", bytes_of(image)).decode()
    assert found.shape == (1, 3, 1, 1024)
    assert found[0, 0, 0, [0, 500, 524, 1023]].tolist() == [0, 0, 1, 1]


def test_a_large_photo_is_turned_too(tmp_path: Path) -> None:
    image = Image.new("RGB", (4000, 2000), "black")
    image.paste("white", (0, 0, 2000, 2000))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    found = read_picture(tmp_path / "photo.jpg")
    assert found.shape == (1, 3, 1024, 512)
    assert found[0, :, :500].min() > 0.95
    assert found[0, :, 524:].max() < 0.05


_MEASURED = """
import sys
from lib_dynfuse.guidance.pictures import PictureFile
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
PictureFile("small", open(sys.argv[1], "rb").read()).decode()
before = peak()
PictureFile("large", open(sys.argv[2], "rb").read()).decode()
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read as Linux tells it")
def test_a_few_kilobytes_do_not_become_gigabytes(tmp_path: Path) -> None:
    for name, size in (("small", 64), ("large", 8000)):
        Image.new("RGBA", (size, size)).save(tmp_path / name, "PNG", compress_level=1)
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400  # MB; the decoded pixels alone are 256


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = bytes_of(Image.new("L", (6000, 6000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    PictureFile("it", data).check()
    with pytest.raises(PictureError, match=r"it: is a JPEG of \d+ scans"):
        PictureFile("it", data[:last] + data[last:-2] * 2000 + data[-2:]).decode()


SMALL = {
    kind: bytes_of(Image.fromarray(np.arange(20 * 12 * 3, dtype=np.uint8).reshape(20, 12, 3)), kind)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF")
}


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=6),
    st.integers(0, 400),
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_damaged_picture_is_a_picture_or_an_error_of_ours(
    kind: str, changes: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(SMALL[kind])
    for place, value in changes:
        place %= len(data)
        data[place : place + len(value)] = value
    said = "it: "
    try:
        found = PictureFile("it", bytes(data[: len(data) - cut])).decode()
    except PictureError as error:
        found, said = torch.zeros(1, 3, 1, 1), str(error)
    assert said.startswith("it: ")
    assert len(said.splitlines()) == 1
    assert max(found.shape) <= SIDE
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@settings(max_examples=100)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_what_is_no_picture_never_passes_for_one(data: bytes) -> None:
    for read in (PictureFile("it", data).check, PictureFile("it", data).decode):
        with pytest.raises(PictureError, match="it: "):
            read()


@pytest.mark.parametrize(
    "text", ["abcd", "models/Lora/fox", "", "AAAA" * 1000, "data:,abcd", "data:image/png;base64,!"]
)
def test_a_text_is_a_picture_only_where_its_first_bytes_are_a_pictures(text: str) -> None:
    assert in_text(text) is None


def test_a_fingerprint_is_of_the_bytes_wherever_they_are_from(tmp_path: Path) -> None:
    data = SMALL["PNG"]
    (tmp_path / "fox.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    found = {open_picture(source).fingerprint for source in (tmp_path / "fox.png", text, f"data:;base64,{text}")}
    assert found == {hashlib.sha256(data).hexdigest()[:10]}


def test_many_pictures_have_one_fingerprint_together() -> None:
    files = [PictureFile(str(number), bytes([number])) for number in range(200)]
    assert fingerprints(files[:2]) == f"{files[0].fingerprint} {files[1].fingerprint}"
    together = fingerprints(files)
    assert together.startswith("together ")
    assert len(together) < 20
    assert together != fingerprints(files[::-1])
