"""The demo's sheet and table, from results of known content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_dynfuse.demo import sheet as sheets
from lib_dynfuse.demo.compare import GUIDED, METHODS, Alone, Method, Pair, Result
from lib_dynfuse.demo.sheet import boxed_encoders, demo, markdown, rows, sheet, true_picture, write
from lib_dynfuse.trace import Item, Pass, Record

FOX, CUP = Pair("fox", "hc"), Pair("hot beverage", "blob")
SETTINGS = {"seeds": 4, "steps": 6, "cfg": 3.0, "seconds": 12.3}
TRUTH = np.full((64, 64, 3), (0, 255, 0), np.uint8)


def record() -> Record:
    values = np.full((2, 1, 1, 4), 0.5, np.float32)
    return Record(["down_blocks.0.a"], [Pass(step, step, None, (Item(0, True),)) for step in range(2)], values)


def results(*pairs: Pair) -> list[Result]:
    """Method k is right on k % 5 of four subjects and on all styles; its pictures are a grey that tells the seed."""
    found = []
    for pair in pairs:
        for number, method in enumerate(METHODS):
            pictures = torch.stack([torch.full((3, 64, 64), seed / 4) for seed in range(4)])
            right = torch.arange(4) < number % 5
            chosen = record() if method.chooses else None
            found.append(Result(pair, method, pictures, right, torch.ones(4, dtype=torch.bool), 1.5, chosen))
    return found


def test_the_table_has_a_row_for_each_method_and_pair_and_one_for_all() -> None:
    table = rows(results(FOX, CUP))
    assert [(row["pair"], row["pictures"]) for row in table[:3]] == [
        ("fox in high contrast", 4),
        ("hot beverage in blob", 4),
        ("all", 8),
    ]
    assert [row["method"] for row in table[::3]] == [method.label for method in METHODS]
    third = table[3 * 2 + 2]
    assert (third["subject"], third["style"], third["both"], third["seconds"]) == (0.5, 1.0, 0.5, 3.0)
    assert third["both_interval"] == pytest.approx([0.2152, 0.7848], abs=1e-4)


def test_the_markdown_is_a_table_whose_columns_line_up_and_says_what_was_measured() -> None:
    text = markdown(results(FOX, CUP), SETTINGS)
    drawn = [line for line in text.splitlines() if line.startswith("|")]
    assert len(drawn) == 2 + len(METHODS)
    assert len({len(line) for line in drawn}) == 1
    assert len({line.count("|") for line in drawn}) == 1
    style_alone = [cell.strip() for cell in drawn[4].strip("|").split("|")]
    assert style_alone == ["style alone", "50", "100", "50 (22 to 78)", "50", "50", ""]
    random_choice = [cell.strip() for cell in drawn[6].strip("|").split("|")]
    assert random_choice[-1] == "50"
    assert "8 pictures a method (4 seeds a pair" in text
    assert "6 steps, cfg 3" in text


def test_the_sheet_shows_methods_across_seeds_down_and_the_truth_last() -> None:
    page = np.asarray(sheet(results(FOX), TRUTH)).astype(int)
    left, head, step = 58, 74, 102
    for column in range(len(METHODS)):
        for row in range(4):
            cell = page[head + row * step + 48, left + column * step + 48]
            assert abs(cell - 255 * row / 4).max() <= 1
    assert page[head + 48, left + len(METHODS) * step + 48].tolist() == [0, 255, 0]


def test_every_column_is_labelled_and_no_label_runs_into_the_next() -> None:
    """Between the columns stands a white gap over the labels' whole height, and under each head there is ink."""
    page = np.asarray(sheet(results(FOX), TRUTH).convert("L")).astype(int)
    left, step = 58, 102
    for column in range(len(METHODS) + 1):
        start = left + column * step
        assert page[34:50, start : start + 96].min() < 100
        if column:
            assert page[34:72, start - 4 : start - 1].min() == 255


def test_a_sheet_of_one_seed_has_one_row() -> None:
    one = [
        Result(r.pair, r.method, r.pictures[:1], r.right_subject[:1], r.right_style[:1], 1.0, None)
        for r in results(FOX)
    ]
    assert sheet(one, TRUTH).height == 74 + 102 + 6


def test_the_true_picture_is_found_by_subject_and_style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_dynfuse.demo.sheet.BOX", tmp_path)
    pictures = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    names, styles = np.array(["star", "fox", "hot beverage"]), np.array(["blob", "hc"])
    np.savez(tmp_path / "pictures.npz", x=pictures, subj=[1, 1, 2], sty=[0, 1, 0], names=names, styles=styles)
    assert true_picture(FOX)[0, 0].tolist() == [1, 1, 1]
    assert true_picture(CUP)[0, 0].tolist() == [2, 2, 2]
    for missing in (Pair("star", "hc"), Pair("dragon", "hc")):
        with pytest.raises(ValueError, match="no true picture"):
            true_picture(missing)


def test_everything_is_written_and_listed(tmp_path: Path) -> None:
    out = tmp_path / "new" / "demo"
    files = write(out, results(FOX, CUP), {FOX: TRUTH, CUP: TRUTH}, SETTINGS)
    assert sorted(files) == sorted(out.iterdir())
    assert {file.name for file in files} >= {
        "sheet-fox-high-contrast.png",
        "sheet-hot-beverage-blob.png",
        "chosen-fox-high-contrast-kl.png",
        "chosen-fox-high-contrast-kl-balanced.png",
        "table.md",
        "table.json",
    }
    assert not any("klora" in file.name or "random" in file.name for file in files)
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                picture.verify()
    content = json.loads((out / "table.json").read_text())
    assert content["steps"] == 6
    assert content["rows"] == rows(results(FOX, CUP))
    assert (out / "table.md").read_text() == markdown(results(FOX, CUP), SETTINGS)


def guided(pictures: int) -> list[Result]:
    """The guided methods' results on the fox, with fewer pictures than the others."""
    right = torch.ones(pictures, dtype=torch.bool)
    made = torch.rand(pictures, 3, 64, 64)
    return [Result(FOX, method, made, right, right, 2.0, record() if method.chooses else None) for method in GUIDED]


def test_guided_methods_stand_beside_the_others_and_the_table_says_what_they_were(tmp_path: Path) -> None:
    both = [*results(FOX), *guided(2)]
    text = markdown(both, SETTINGS)
    rows_of = {line.split("|")[1].strip(): line.split("|")[2:5] for line in text.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in rows_of["kl + nudges"]][:2] == ["100", "100"]
    assert "4 pictures a method" in text
    assert "Only 2 pictures each: nudges alone, kl + nudges, bal. + nudges." in text
    assert "nudged (x0, by at most 3% a step" in text
    assert "nudged" not in markdown(results(FOX), SETTINGS)
    assert sheet(both, TRUTH).height == 74 + 2 * 102 + 6
    names = {file.name for file in write(tmp_path, both, {FOX: TRUTH}, SETTINGS)}
    assert "chosen-fox-high-contrast-kl-nudges.png" in names


def test_guided_methods_come_last_and_get_what_each_lora_alone_made() -> None:
    jobs = [(pair, method) for pair in (FOX, CUP) for method in (*METHODS, *GUIDED)]
    asked: list[tuple[tuple[Pair, Method], Alone | None]] = []
    known = {(result.pair, result.method.label): result for result in [*results(FOX, CUP)]}
    for number, result in enumerate(known.values()):
        result.pictures[:] = number / 100

    def do_all(wave: list[tuple[tuple[Pair, Method], Alone | None]]) -> list[Result]:
        asked.extend(wave)
        return [known.get((pair, method.label), guided(2)[0]) for (pair, method), _ in wave]

    assert len(list(sheets._in_two_waves(jobs, do_all))) == len(jobs)
    assert [method.guided for (_, method), _ in asked] == [False] * 2 * len(METHODS) + [True] * 2 * len(GUIDED)
    for (pair, method), alone in asked:
        assert (alone is not None) == method.guided
        if alone is not None:
            assert torch.equal(alone.subject, known[pair, "subject alone"].pictures)
            assert torch.equal(alone.style, known[pair, "style alone"].pictures)


def test_the_demo_runs_on_the_boxed_model(tmp_path: Path) -> None:
    said: list[str] = []
    files = demo(tmp_path, seeds=1, pairs=[FOX], steps=2, say=said.append)
    assert all(str(file) in said[-1] for file in files)
    methods = [*METHODS, *(GUIDED if boxed_encoders() else ())]
    assert all(f"| {method.label} " in said[0] for method in methods)
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 2 * len(methods)
