"""Where the pictures come from that guidance compares with, and how those that were made are kept."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from lib_dynfuse.guidance.objectives import Each
from lib_dynfuse.guidance.pictures import PictureError, PictureFile, open_picture
from lib_dynfuse.guidance.references import Cache, Wanted, collect, find_preview

KEYS = [f"{number:064x}" for number in range(8)]


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


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ([], None),
        (["my.fox.preview.png"], "my.fox.preview.png"),
        (["my.fox.preview.png", "my.fox.png"], "my.fox.png"),
        (["my.fox.webp", "my.fox.preview.jpg"], "my.fox.preview.jpg"),
        (["my.fox.jpeg"], "my.fox.jpeg"),
        (["my.png", "my.fox2.png", "fox.png"], None),
    ],
)
def test_a_lora_s_preview_is_what_the_webuis_show(files: list[str], shown: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = find_preview(tmp_path / "my.fox.safetensors")
    assert found == (tmp_path / shown if shown else None)


WANTED = Wanted(
    "c0ffee", (("f0f0", 1.0), ("dada", 0.5)), "a fox", "ugly", 7, (64, 32), {"steps": 20, "sampler": "Euler"}
)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "decaf"},
        {"loras": (("f0f0", 1.0),)},
        {"loras": (("f0f0", 1.0), ("dada", 0.4))},
        {"loras": (("dada", 1.0), ("f0f0", 0.5))},
        {"prompt": "a foxugly", "negative": ""},
        {"negative": "blurred"},
        {"seed": 8},
        {"size": (32, 64)},
        {"settings": {"steps": 21, "sampler": "Euler"}},
        {"settings": {}},
    ],
)
def test_whatever_changes_a_picture_changes_its_key(change: dict[str, object]) -> None:
    assert dataclasses.replace(WANTED, **change).key != WANTED.key


def test_a_key_is_the_same_however_the_same_is_written() -> None:
    same = dataclasses.replace(WANTED, loras=(("f0f0", 1), ("dada", 0.5)), settings={"sampler": "Euler", "steps": 20})
    assert same.key == WANTED.key
    assert len(WANTED.key) == 64


def test_a_setting_that_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(TypeError):
        _ = dataclasses.replace(WANTED, settings={"sampler": object()}).key


def test_a_picture_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], noise(seed=1))
    cache.put(KEYS[1], noise(7, 3, seed=2))
    again = Cache(tmp_path / "new" / "folder")
    for key, picture in ((KEYS[0], noise(seed=1)), (KEYS[1], noise(7, 3, seed=2))):
        found = again.get(key)
        assert found is not None
        assert torch.equal(found, picture)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [f"{key}.png" for key in KEYS[:2]]


def test_a_picture_between_two_shades_is_kept_at_the_nearest(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEYS[0], torch.tensor([-0.5, 0.4999 / 255, 2.0]).view(1, 3, 1, 1).requires_grad_())
    found = cache.get(KEYS[0])
    assert found is not None
    assert found.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("damage", ["cut", "filled", "empty", "other"])
def test_a_damaged_file_is_not_there_and_is_replaced(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    cache.put(KEYS[0], noise(40, 40))
    path = tmp_path / f"{KEYS[0]}.png"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "other": b"text"}.get(damage, whole[:-300]))
    if damage == "filled":
        # What other programs in the same process may have told PIL: a file that is cut off is filled up.
        monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], noise(40, 40))
    assert torch.equal(cache.get(KEYS[0]), noise(40, 40))  # type: ignore[arg-type]


def test_what_was_not_asked_for_the_longest_is_thrown_away(tmp_path: Path) -> None:
    one = len(bytes_of(image_of(noise(32, 32))))
    cache = Cache(tmp_path, most_bytes=int(3.5 * one))
    others = [tmp_path / "mine.png", tmp_path / ".making-now"]
    for path in others:
        path.write_bytes(bytes(5 * one))
    for number in range(3):
        cache.put(KEYS[number], noise(32, 32, seed=number))
        os.utime(tmp_path / f"{KEYS[number]}.png", (number, number))
    cache.get(KEYS[0])  # asked for now
    cache.put(KEYS[3], noise(32, 32, seed=3))
    assert [cache.get(key) is not None for key in KEYS[:4]] == [True, False, True, True]
    assert all(path.exists() for path in others)


def test_the_newest_picture_stays_even_where_it_alone_is_too_large(tmp_path: Path) -> None:
    cache = Cache(tmp_path, most_bytes=10)
    cache.put(KEYS[0], noise())
    cache.put(KEYS[1], noise())
    assert [cache.get(key) is not None for key in KEYS[:2]] == [False, True]


def test_a_file_left_half_written_long_ago_is_swept_up(tmp_path: Path) -> None:
    forsaken = tmp_path / ".making-before"
    forsaken.touch()
    os.utime(forsaken, (0, 0))
    Cache(tmp_path).put(KEYS[0], noise())
    assert not forsaken.exists()


def test_a_picture_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    save = PngImagePlugin._save
    cache.put(KEYS[0], noise(seed=1))

    def interrupted(image: Image.Image, file: io.BytesIO, *rest: object, **more: object) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setitem(Image.SAVE, "PNG", interrupted)
    for key in KEYS[:2]:
        with pytest.raises(KeyboardInterrupt):
            cache.put(key, noise(seed=2))
    monkeypatch.setitem(Image.SAVE, "PNG", save)
    assert os.listdir(tmp_path) == [f"{KEYS[0]}.png"]
    assert torch.equal(cache.get(KEYS[0]), noise(seed=1))  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "folder")
    cache.put(KEYS[0], noise())
    assert cache.get(KEYS[0]) is None
    assert "cannot be kept on disk: " in caplog.text
    assert str(tmp_path) not in caplog.text


@pytest.fixture
def preview(tmp_path: Path) -> Path:
    image_of(noise(seed=8)).save(tmp_path / "fox.png")
    return tmp_path / "fox.png"


@pytest.fixture
def given(tmp_path: Path) -> list[PictureFile]:
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for number, path in enumerate(paths):
        image_of(noise(4 + number, 6, seed=number)).save(path)
    return [open_picture(path) for path in paths]


def made() -> Sequence[Tensor]:
    return [noise(seed=20), noise(seed=21)]


def never() -> Sequence[Tensor]:
    raise AssertionError("nothing was to be made")


def test_what_a_person_gave_comes_first_then_the_preview_then_what_is_made(
    given: list[PictureFile], preview: Path
) -> None:
    pictures, where = collect("auto", given, preview, never)
    assert where == "given 2"
    assert [picture.shape for picture in pictures] == [(1, 3, 4, 6), (1, 3, 5, 6)]  # type: ignore[union-attr]
    pictures, where = collect("auto", [], preview, never)
    assert where == "preview"
    assert torch.equal(pictures, noise(seed=8))  # type: ignore[arg-type]
    pictures, where = collect("auto", [], None, made)
    assert where == "generated"
    assert isinstance(pictures, Each)
    assert all(torch.equal(found, one) for found, one in zip(pictures.of, made(), strict=True))


@pytest.mark.parametrize(
    ("source", "where"), [("given", "given 2"), ("preview", "preview"), ("generated", "generated")]
)
def test_a_source_that_is_named_is_the_only_one(
    source: str, where: str, given: list[PictureFile], preview: Path
) -> None:
    assert collect(source, given, preview, made if source == "generated" else never)[1] == where
    nothing = {"given": ([], preview, made), "preview": (given, None, made), "generated": (given, preview, None)}
    assert collect(source, *nothing[source]) == (None, "")  # type: ignore[arg-type]


def test_where_there_is_nothing_there_is_nothing() -> None:
    assert collect("auto", [], None, None) == (None, "")
    assert collect("auto", [], None, list) == (None, "")


def test_a_given_picture_that_cannot_be_read_is_an_error_and_a_preview_is_passed_by(
    given: list[PictureFile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    with pytest.raises(PictureError, match=r"bad\.png: is not a picture"):
        collect("auto", [*given, open_picture(bad)], None, made)
    assert collect("auto", [], bad, made)[1] == "generated"
    assert collect("preview", [], bad, made) == (None, "")
    assert "bad.png: is not a picture" in caplog.text
    assert str(tmp_path) not in caplog.text
