"""Means, intervals, the table, the plot and the sheet, from values of known content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_dynfuse.evaluate.intervals import cube, differences, draws, estimates
from lib_dynfuse.evaluate.pictures import scatter, sheet
from lib_dynfuse.evaluate.report import Report
from lib_dynfuse.evaluate.store import Row

METHODS, PAIRS, SEEDS = ["a", "b"], ["p", "q", "r"], 4


def rows() -> list[Row]:
    """Method b is right where a is and on every picture of the pair r as well."""
    return [
        Row(
            pair,
            method,
            seed,
            {
                "subject": 1.0,
                "style": 0.5,
                "both": float((pair == "p") or (method == "b" and pair == "r")),
                "distance": 0.25,
            },
        )
        for seed in reversed(range(SEEDS))
        for pair in PAIRS
        for method in METHODS
    ]


def test_the_cube_is_by_method_pair_and_seed() -> None:
    values = cube(rows(), METHODS, PAIRS, SEEDS, "both")
    assert values.shape == (2, 3, 4)
    assert values.mean(2).tolist() == [[1, 0, 0], [1, 0, 1]]


def test_a_missing_picture_is_an_error() -> None:
    with pytest.raises(KeyError):
        cube(rows()[1:], METHODS, PAIRS, SEEDS, "both")


def test_the_interval_of_independent_pairs_is_that_of_the_mean() -> None:
    """200 pairs that differ, one seed each: the bootstrap has to find 1.96 standard errors."""
    values = np.random.default_rng(1).normal(size=(1, 200, 1))
    (found,) = estimates(values, draws(200, 1))
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_pictures_of_one_pair_that_are_all_alike_count_as_one() -> None:
    """Forty seeds that change nothing must not make the interval narrower."""
    one = np.random.default_rng(1).normal(size=(1, 12, 1))
    few, many = (estimates(np.repeat(one, seeds, 2), draws(12, seeds))[0] for seeds in (1, 40))
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1)


def test_what_methods_have_in_common_is_not_in_their_difference() -> None:
    common = np.random.default_rng(1).normal(size=(1, 30, 2))
    values = np.concatenate([common, common + 0.1])
    drawn = draws(30, 2)
    ahead = differences(values, drawn, 0)[1]
    assert ahead.low == pytest.approx(0.1) == ahead.high
    assert estimates(values, drawn)[1].high - estimates(values, drawn)[1].low > 0.2


def report() -> Report:
    return Report.of(rows(), METHODS, PAIRS, SEEDS, main=("both",), against="a", notes=["Told so."])


def test_a_row_has_each_measure_with_its_interval_and_the_difference() -> None:
    first, second = report().rows()
    assert (first["method"], first["pictures"]) == ("a", 12)
    assert first["subject"] == [1, 1, 1]
    assert first["both"][0] == pytest.approx(1 / 3, abs=1e-4)
    assert first["both minus a"] == [0, 0, 0]
    mean, low, high = second["both minus a"]
    assert (mean, low, high) == (pytest.approx(1 / 3, abs=1e-4), 0.0, pytest.approx(1.0, abs=0.01))


def test_the_table_reads_shares_in_percent_and_says_what_it_is_of() -> None:
    text = report().markdown()
    drawn = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in drawn}) == 1
    head, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in drawn)
    assert head == ["method", "subject %", "style %", "both right %", "distance", "both minus a %"]
    assert first[:2] == ["a", "100 (100 to 100)"]
    assert (first[-2], first[-1]) == ("0.250 (0.250 to 0.250)", "")
    assert second[-1].startswith("+33 (+0 to +")
    assert "12 pictures a method: 3 pairs, 4 seeds each" in text
    assert text.endswith("Told so.\n")


def test_what_was_made_beyond_what_is_asked_for_is_left_out() -> None:
    more = [
        *rows(),
        Row("p", "c", 0, {"subject": 0.0}),
        Row("z", "a", 0, {"both": 9.0}),
        Row("p", "a", 7, {"both": 9.0}),
    ]
    assert Report.of(more, METHODS, PAIRS, SEEDS, main=("both",), against="a").rows() == report().rows()


def test_the_plot_has_a_named_point_a_method() -> None:
    figure = scatter(report())
    assert figure is not None
    (plot,) = figure.axes
    assert [handle.get_label() for handle in plot.containers] == METHODS
    containers: list[Any] = list(plot.containers)
    points = [container.lines[0].get_xydata().tolist() for container in containers]
    assert points == [[[1.0, 0.5]], [[1.0, 0.5]]]


def test_without_a_measure_of_the_style_there_is_no_plot() -> None:
    bare = [Row(row.pair, row.method, row.seed, {"clip_text": 0.2}) for row in rows()]
    assert scatter(Report.of(bare, METHODS, PAIRS, SEEDS, main=("clip_text",))) is None


def test_the_sheet_has_methods_across_pairs_down_and_the_truth_last(tmp_path: Path) -> None:
    colours = {("p", "a"): (255, 0, 0), ("p", "b"): (0, 255, 0), ("q", "a"): (0, 0, 255)}
    for (pair, method), colour in colours.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{pair}{method}.png")
    truth = np.zeros((8, 8, 3), np.uint8)
    page = sheet(["p", "q"], METHODS, lambda p, m: tmp_path / f"{p}{m}.png", lambda p: truth if p == "q" else None)
    left, head, step = 190, 96, 76

    def middle(row: int, column: int) -> object:
        return page.getpixel((left + column * step + 36, head + row * step + 36))

    assert [middle(0, 0), middle(0, 1), middle(1, 0)] == list(colours.values())
    assert middle(1, 1) == (255, 255, 255) == middle(0, 2)
    assert middle(1, 2) == (0, 0, 0)
    heads = np.asarray(page.convert("L"))[:head]
    assert all(heads[:, left + column * step : left + column * step + 72].min() < 128 for column in range(3))
