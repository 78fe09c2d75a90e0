"""Styles, placing and the split of the second bundled model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lab.testbed import split
from lab.testbed.autoencoder import batch, busiest, psnr
from lab.testbed.pictures import Drawings, Pictures, for_autoencoder, truths
from lab.testbed.placing import cut_out, place
from lab.testbed.styles import FILTERS, figure


def drawing(colour: str = "orange") -> np.ndarray:
    """A disc with an eye, 128 pixels, on white."""
    page = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(page)
    draw.ellipse((10, 20, 117, 110), fill=colour)
    draw.ellipse((40, 45, 60, 65), fill="white")
    return np.asarray(page)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Drawings:
    """Two base and two kept subjects in the three drawn styles; one of them lacks one."""
    names, styles = ["koala", "panda", "fox", "camel"], ["flat", "noto", "3d"]
    pairs = [(n, s) for n in range(4) for s in range(3) if (n, s) != (3, 1)]
    colours = ["orange", "teal", "purple", "brown"]
    file = tmp_path_factory.mktemp("data") / "drawings.npz"
    np.savez(
        file,
        x=np.stack([drawing(colours[n]) for n, _ in pairs]),
        subj=np.array([n for n, _ in pairs]),
        sty=np.array([s for _, s in pairs]),
        names=np.array(names),
        styles=np.array(styles),
    )
    return Drawings(file)


def test_a_white_eye_belongs_to_the_figure() -> None:
    inside = figure(drawing())
    assert inside[55, 50]
    assert not inside[2, 2]
    assert inside.mean() == pytest.approx(np.pi * 54 * 45 / 128**2, abs=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_a_placed_subject_is_wholly_inside_and_of_the_sizes_promised(seed: int) -> None:
    placed = place(cut_out(drawing()), np.random.default_rng(seed))
    rows, columns = np.nonzero(placed.inside)
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 0.68 * 128 - 3 <= longer <= 0.97 * 128 + 1
    assert placed.on(np.zeros(3)).shape == (128, 128, 3)


def test_seeds_place_a_subject_differently() -> None:
    pictures = [place(cut_out(drawing()), np.random.default_rng(seed)).on(np.full(3, 255)) for seed in range(4)]
    for one in range(4):
        for other in range(one):
            assert np.abs(pictures[one].astype(int) - pictures[other]).mean() > 2


@pytest.mark.parametrize("style", FILTERS)
def test_a_style_gives_a_whole_picture_that_repeats(style: str) -> None:
    picture = drawing()
    made = FILTERS[style](picture, figure(picture))
    assert made.shape == (128, 128, 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, FILTERS[style](picture, figure(picture)))


def test_styles_differ_at_a_glance() -> None:
    """Shrunk to 8 x 8, no style's picture is near another's or the drawing's own."""
    picture = drawing()
    made = {"drawn": picture, **{name: style(picture, figure(picture)) for name, style in FILTERS.items()}}
    small = {name: x.reshape(8, 16, 8, 16, 3).mean((1, 3)) for name, x in made.items()}
    near = [(a, b) for a in small for b in small if a < b and np.abs(small[a] - small[b]).mean() < 12]
    assert not near


def test_styles_survive_a_subject_that_is_not_there() -> None:
    empty = np.full((128, 128, 3), 255, np.uint8)
    for style in FILTERS.values():
        assert style(empty, figure(empty)).shape == (128, 128, 3)


def test_no_truth_picture_is_among_what_is_trained_on(drawings: Drawings) -> None:
    wanted = for_autoencoder(drawings, 600, seed=0)
    assert not [pair for pair in wanted if split.is_truth(*pair)]
    assert {"fox", "koala"} <= {name for name, _ in wanted}
    assert {style for _, style in wanted} == set(split.STYLES)
    assert not set(split.BASE_SUBJECTS) & set(split.KEPT_SUBJECTS)
    assert not set(split.BASE_STYLES) & set(split.KEPT_STYLES)


def test_subjects_that_rules_are_tuned_on_are_not_reported_on() -> None:
    assert not set(split.TUNING_SUBJECTS) & set(split.REPORT_SUBJECTS)


def test_every_truth_has_a_kept_subject_and_a_kept_style(drawings: Drawings) -> None:
    pairs = truths(drawings, ["fox", "camel"])
    assert len(pairs) == 2 * len(split.KEPT_STYLES)
    assert all(split.is_truth(*pair) for pair in pairs)


def test_a_missing_drawing_is_named(drawings: Drawings) -> None:
    with pytest.raises(LookupError, match="no drawing of camel for noto"):
        drawings.picture("camel", "noto", np.random.default_rng(0))


def test_pictures_are_made_once_and_depend_on_number_and_seed_alone(drawings: Drawings, tmp_path: Path) -> None:
    wanted = [("fox", "ink"), ("camel", "noto"), ("koala", "flat")]
    first = Pictures.made(tmp_path / "a", drawings, wanted, seed=1, bar=False)
    assert first.names == ["fox", "koala"]
    assert np.array_equal(first.x, Pictures.made(tmp_path / "b", drawings, wanted, seed=1, bar=False).x)
    assert not np.array_equal(first.x, Pictures.made(tmp_path / "c", drawings, wanted, seed=2, bar=False).x)
    written = (tmp_path / "a" / "x.npy").stat().st_mtime_ns
    Pictures.made(tmp_path / "a", drawings, wanted, seed=1, bar=False)
    assert (tmp_path / "a" / "x.npy").stat().st_mtime_ns == written


def test_a_step_draws_the_same_batch_every_time(drawings: Drawings, tmp_path: Path) -> None:
    pictures = Pictures.made(tmp_path, drawings, [("fox", "flat"), ("koala", "ink")] * 4, seed=1, bar=False)
    assert batch(pictures, 0, crops=3, whole=2).shape == (2, 3, 128, 128)
    crops = batch(pictures, 1, crops=3, whole=2)
    assert crops.shape == (3, 3, 64, 64)
    assert crops.abs().max() <= 1
    assert crops.equal(batch(pictures, 1, crops=3, whole=2))
    assert not crops.equal(batch(pictures, 2, crops=3, whole=2))


def test_a_crop_is_taken_where_something_is() -> None:
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[90:, 90:] = np.random.default_rng(0).integers(0, 255, (38, 38, 3))
    random, plain = np.random.default_rng(3), np.random.default_rng(3)

    def contrast(corners: Iterable[tuple[int, int]]) -> float:
        return float(np.mean([picture[top : top + 64, left : left + 64].std() for top, left in corners]))

    busy = contrast([busiest(picture, 64, random) for _ in range(40)])
    assert busy > 1.3 * contrast(plain.integers(0, 65, (40, 2)))


def test_decibel_of_a_known_error() -> None:
    true = np.full((2, 4, 4, 3), 100, np.uint8)
    made = true.copy()
    made[1] += 51
    assert psnr(made[1:], true[1:]) == pytest.approx([20 * np.log10(255 / 51)])
    assert psnr(true, true)[0] > 100
