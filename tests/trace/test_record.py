"""Record: what was chosen, its shares, and its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lib_dynfuse.trace import Item, Pass, Record

NAN = float("nan")
FINITE = st.floats(0, 1e6, width=32) | st.just(NAN)


def record() -> Record:
    """Two passes, two layers; picture 0 in rows 0 and 1, picture 1 in row 2 of the first pass alone."""
    values = np.full((2, 2, 3, 4), np.nan, np.float32)
    values[:, 0, :2] = [1, 0, 0.5, 0.25]
    values[:, 1, :2] = [0.5, 1.5, NAN, NAN]
    values[0, 0, 2] = [0, 1, 0.125, 0.5]
    rows = (Item(0, False), Item(0, True))
    passes = [Pass(0, 0.0, 14.5, (*rows, Item(1, True))), Pass(1, 1.0, None, rows)]
    tokens = {"up_blocks.0.attn": np.array([[1, 0], [0.5, 0.25]], np.float32)}
    return Record(["down_blocks.0.attn", "up_blocks.0.attn"], passes, values, tokens)


def test_shares_are_each_roles_part_per_picture_and_add_up_to_one() -> None:
    shares = record().shares()
    assert shares[0] == pytest.approx({"subject": 0.625, "style": 0.375})
    assert shares[1] == pytest.approx({"subject": 0.0, "style": 1.0})


def test_the_style_share_of_a_picture_is_per_pass_and_layer_and_empty_where_nothing_was_recorded() -> None:
    np.testing.assert_array_equal(record().style_share(1), [[1, NAN], [NAN, NAN]])
    np.testing.assert_array_equal(record().style_share(0), [[0, 0.75], [0, 0.75]])


def test_weights_of_zero_on_both_roles_have_no_share() -> None:
    values = np.zeros((1, 1, 1, 4), np.float32)
    silent = Record(["layer"], [Pass(0, 0.0, None, (Item(0, True),))], values)
    assert np.isnan(silent.style_share(0)).all()
    assert silent.shares() == {}


def test_a_picture_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"picture 7 .*\[0, 1\]"):
        record().style_share(7)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    record().to_json(path)
    back = Record.from_json(path)
    assert (back.layers, back.passes) == (record().layers, record().passes)
    np.testing.assert_array_equal(back.values, record().values)
    np.testing.assert_array_equal(back.tokens["up_blocks.0.attn"], record().tokens["up_blocks.0.attn"])


@given(npst.arrays(np.float32, (2, 1, 2, 4), elements=FINITE))
def test_json_keeps_six_significant_digits_of_any_value(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    rows = (Item(0, True), Item(1, True))
    Record(["layer"], [Pass(0, 0.0, 1.0, rows), Pass(1, 1.0, 0.5, rows)], values).to_json(path)
    np.testing.assert_allclose(Record.from_json(path).values, values, rtol=1e-5, atol=1e-37)


def test_json_is_valid_for_readers_that_know_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    infinite = record()
    infinite.values[0, 0, 0, 2] = np.inf

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    infinite.to_json(path)
    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["passes"][0]["d_subject"][0] == [None, 0.5, 0.125]
    assert content["passes"][1]["sigma"] is None


def test_an_empty_record_survives_its_files(tmp_path: Path) -> None:
    empty = Record([], [], np.empty((0, 0, 0, 4), np.float32))
    empty.to_json(tmp_path / "trace.json")
    empty.to_csv(tmp_path / "trace.csv")
    assert Record.from_json(tmp_path / "trace.json").values.shape == (0, 0, 0, 4)
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "layers": 3, "passes": [1]}']
)
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a trace"):
        Record.from_json(path)


def test_csv_has_a_line_for_each_pass_layer_and_item_that_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    record().to_csv(path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    assert lines[0] == {
        "pass": "0",
        "step": "0",
        "progress": "0.0",
        "sigma": "14.5",
        "block": "down.0",
        "layer": "down_blocks.0.attn",
        "image": "0",
        "cond": "0",
        "subject": "1.0",
        "style": "0.0",
        "d_subject": "0.5",
        "d_style": "0.25",
    }
    assert lines[-1]["block"] == "up.0"
    assert (lines[-1]["sigma"], lines[-1]["d_style"]) == ("", "")


def test_files_leave_nothing_half_written(tmp_path: Path) -> None:
    record().to_json(tmp_path / "trace.json")
    record().to_csv(tmp_path / "trace.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.csv", "trace.json"]


def test_nudges_survive_the_file_and_a_picture_that_could_not_be_nudged_has_no_curve(tmp_path: Path) -> None:
    nudged = record()
    nudged.nudges = {4: [-1.25, NAN, -0.5], 2: [-1.0, NAN, -0.75]}
    nudged.to_json(tmp_path / "trace.json")
    found = Record.from_json(tmp_path / "trace.json")
    assert found.curve(0) == ([2, 4], [-1.0, -1.25])
    assert found.curve(1) == ([], [])
    assert found.curve(2) == ([2, 4], [-0.75, -0.5])
    assert found.images == [0, 1, 2]
    assert found.shares() == nudged.shares()


def test_a_trace_from_before_there_were_nudges_is_read(tmp_path: Path) -> None:
    record().to_json(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    del content["nudges"]
    (tmp_path / "trace.json").write_text(json.dumps(content))
    assert Record.from_json(tmp_path / "trace.json").nudges == {}


def test_a_share_in_words_names_the_loras_and_says_what_it_is_a_share_of(tmp_path: Path) -> None:
    one = Record([], [], np.empty((0, 0, 0, 4), np.float32), names={"subject": ["fox", "cat"], "style": ["ink"]})
    share = {"subject": 0.61, "style": 0.39}
    assert one.in_words(share) == "subject fox cat 61% style ink 39%"
    one.weighed = True
    one.to_json(tmp_path / "trace.json")
    back = Record.from_json(tmp_path / "trace.json")
    assert back.in_words(share) == "subject fox cat 61% style ink 39% of the weights"
    back.names = {}
    assert back.in_words(share) == "subject 61% style 39% of the weights"
