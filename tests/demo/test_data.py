"""Reading the pictures, and making the file from the npm packages."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib_dynfuse.demo import data, source, split

FOX, SWAN = "1f98a", "1f9a2"


def test_smaller_pictures_are_averages(picture_file: Path) -> None:
    whole, small = data.load(picture_file, 16), data.load(picture_file, 8)
    block = whole.images[7, :, 2:4, 4:6].float().mean((1, 2))
    assert np.allclose(small.images[7, :, 1, 2], block, atol=0.51)


def test_a_size_that_does_not_divide_is_refused(picture_file: Path) -> None:
    with pytest.raises(ValueError, match="16 pixels, which 6 does not divide"):
        data.load(picture_file, 6)


def test_floats_run_from_minus_one_to_one(picture_file: Path) -> None:
    pictures = data.load(picture_file, 16)
    floats = pictures.floats(np.array([0, 1]))
    assert floats.shape == (2, 3, 16, 16)
    assert floats.min() == pytest.approx(pictures.images[:2].min() / 127.5 - 1)


def write_archive(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def icons(**bodies: str) -> bytes:
    aliases = {"swan": {"parent": "bird"}}
    return json.dumps(
        {"width": 4, "height": 4, "icons": {k: {"body": v} for k, v in bodies.items()}, "aliases": aliases}
    ).encode()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Archives that hold a fox in all styles, and a swan that noto files under another name."""
    characters = json.dumps({FOX: "fox", SWAN: "swan"}).encode()
    square = '<path fill="{}" d="M0 0h4v2H0z"/>'
    for style, package in source.PACKAGES.items():
        archive = tmp_path / source.archive(package)
        if style == "3d":
            picture = io.BytesIO()
            Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(picture, "WEBP", lossless=True)
            write_archive(archive, {f"assets/{FOX}-fe0f.webp": picture.getvalue()})
        else:
            bird = {"bird": square.format("#00f")} if style == "noto" else {}
            own = characters if source.NAMED_AS[style] == style else b"{}"
            fox = square.format("currentColor" if style == "hc" else "#f00")
            write_archive(archive, {"icons.json": icons(fox=fox, **bird), "chars.json": own})
    return tmp_path


def test_the_data_file_holds_what_the_packages_draw(packages: Path) -> None:
    file = packages / "made.npz"
    source.build(packages, file, pixels=8, bar=False)
    made = data.load(file, 8)
    shown = {(made.names[s], made.styles[t]): k for k, (s, t) in enumerate(zip(made.subject, made.style, strict=True))}
    assert shown.keys() == {*(("fox", style) for style in split.STYLES), ("swan", "noto")}

    def top(name: str, style: str) -> list[int]:
        return made.images[shown[name, style], :, 1, 4].tolist()

    assert top("fox", "noto") == [255, 0, 0]
    assert top("fox", "hc") == [17, 17, 17]  # a drawing without a colour of its own is near black
    assert top("swan", "noto") == [0, 0, 255]
    assert top("fox", "3d") == [255, 255, 255]  # transparent is white, whatever colour lies under it
    assert made.images[shown["fox", "noto"], :, 6, 4].tolist() == [255, 255, 255]


def test_other_hands_drawings_are_found_by_the_names_that_other_sets_give(packages: Path) -> None:
    own = {"twemoji": {"fox": "#0f0"}, "emojione": {"bird": "#00f"}, "fxemoji": {"fox": "#f0f"}}
    square = '<path fill="{}" d="M0 0h4v2H0z"/>'
    for hand, package in source.OTHER_HANDS.items():
        characters = json.dumps({FOX: "fox"}).encode() if hand == "twemoji" else b"{}"
        drawn = icons(**{name: square.format(colour) for name, colour in own[hand].items()})
        write_archive(packages / source.archive(package), {"icons.json": drawn, "chars.json": characters})
    file = packages / "other.npz"
    source.build_other_hands(packages, file, pixels=8, bar=False)
    with np.load(file) as made:
        names = [split.catalogue()[index][0] for index in made["subj"]]
        colours = made["x"][:, 1, 4].tolist()
    assert sorted(zip(names, colours, strict=True)) == [
        ("bird", [0, 0, 255]),  # by its own name
        ("fox", [0, 255, 0]),
        ("fox", [255, 0, 255]),
        ("swan", [0, 0, 255]),
    ]


def test_packages_that_are_there_are_not_fetched(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    source.fetch(packages)


def test_a_failed_fetch_names_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not fetch @lobehub/fluent-emoji-3d"):
        source.fetch(tmp_path)
