"""Making pictures: nothing twice, nothing lost by a kill, nothing mixed up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.evaluate import runs, store
from lib_dynfuse.evaluate.methods import METHODS
from lib_dynfuse.evaluate.plan import Pair, boxed_pairs
from lib_dynfuse.evaluate.runs import Job

PAIRS = boxed_pairs("fox:hc,rocket:hc")
TWO = [METHODS["sum"], METHODS["kl"]]


class Grey:
    """Pictures as light as their seed says; measures them."""

    def make(self, job: Job) -> Tensor:
        return torch.stack([torch.full((3, 4, 4), seed / 10) for seed in job.seeds])

    def judge(self, pair: Pair, pictures: Tensor) -> Sequence[Mapping[str, float]]:
        return [{"light": value, "fox": float("fox" in pair.subject)} for value in pictures.mean((1, 2, 3)).tolist()]


class Interrupted(Grey):
    """A machine that goes down at the third job."""

    count = 0

    def make(self, job: Job) -> Tensor:
        self.count += 1
        if self.count == 3:
            raise KeyboardInterrupt
        return super().make(job)


def measured(row: store.Row) -> dict[str, float]:
    return {"light": row.seed / 10, "fox": float("fox" in row.pair)}


def all_rows(done: Iterator[list[store.Row]]) -> list[store.Row]:
    return [row for rows in done for row in rows]


def test_every_picture_is_made_and_judged_once(tmp_path: Path) -> None:
    todo = runs.jobs(PAIRS, TWO, 6, set())
    assert sorted(len(job.seeds) for job in todo) == [2] * 4 + [4] * 4
    rows = all_rows(runs.run(tmp_path, todo, Grey, 1, shown=0))
    assert {row.key for row in rows} == {(p.name, m.label, s) for p in PAIRS for m in TWO for s in range(6)}
    assert len(rows) == 24
    assert all(row.values == measured(row) for row in rows)
    assert store.read_rows(tmp_path) == rows


def test_another_process_makes_the_same(tmp_path: Path) -> None:
    """One job starts one of them, which is dear enough."""
    rows = all_rows(runs.run(tmp_path, runs.jobs(PAIRS[:1], TWO[:1], 3, set()), Grey, 2, shown=1))
    assert [row.seed for row in rows] == [0, 1, 2]
    assert all(row.values == measured(row) for row in rows)
    assert store.picture_file(tmp_path, *rows[0].key).is_file()


def test_the_first_pictures_are_kept(tmp_path: Path) -> None:
    all_rows(runs.run(tmp_path, runs.jobs(PAIRS[:1], TWO, 3, set()), Grey, 1, shown=2))
    kept = [store.picture_file(tmp_path, PAIRS[0].name, method.label, seed) for method in TWO for seed in (0, 1)]
    assert sorted(kept) == sorted((tmp_path / store.PICTURES).iterdir())
    with Image.open(kept[1]) as image:
        assert image.getpixel((0, 0)) == (26, 26, 26)


def test_after_a_kill_only_what_is_missing_is_made(tmp_path: Path) -> None:
    todo = runs.jobs(PAIRS, TWO, 4, set())
    with pytest.raises(KeyboardInterrupt):
        all_rows(runs.run(tmp_path, todo, Interrupted, 1, shown=0))
    before = store.read_rows(tmp_path)
    assert len(before) == 8
    left = runs.jobs(PAIRS, TWO, 4, {row.key for row in before})
    assert left == todo[2:]
    all_rows(runs.run(tmp_path, left, Grey, 1, shown=0))
    assert {row.key for row in store.read_rows(tmp_path)} == {
        (p.name, m.label, s) for p in PAIRS for m in TWO for s in range(4)
    }


def test_a_line_that_was_cut_off_is_forgotten_and_the_file_goes_on_whole(tmp_path: Path) -> None:
    first, second = (store.Row("p", "m", seed, {"both": 1.0}) for seed in range(2))
    store.add_rows(tmp_path, [first])
    with open(tmp_path / store.ROWS, "a") as file:
        file.write(second.dumps()[:9])
    assert store.read_rows(tmp_path) == [first]
    store.add_rows(tmp_path, [second])
    assert store.read_rows(tmp_path) == [first, second]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"pair": "p"}',
        b'{"pair": "p", "method": "m", "seed": 1}',
        b'{"pair": "p", "method": "m", "seed": 1, "other": 1.0}',
        b'{"pair": "p", "method": "m", "seed": "1", "both": 1.0}',
        b'{"pair": "p", "method": "m", "seed": 1, "both": "1"}',
        b'{"pair": ["p"], "method": "m", "seed": 1, "both": 1.0}',
        b'{"pair": "p", "meth\x00\x00\x00\x00"both": 1.0}',
        b"\xff\xfe",
        b"[1]",
        b"null",
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_put_aside_and_said_and_its_picture_made_again(tmp_path: Path, damaged: bytes) -> None:
    rows = [store.Row("p", "m", seed, {"both": 1.0}) for seed in range(3)]
    lines = [row.dumps().encode() for row in rows]
    (tmp_path / store.ROWS).write_bytes(lines[0] + damaged + b"\n" + lines[2])
    said: list[str] = []
    assert store.read_rows(tmp_path, said.append) == [rows[0], rows[2]]
    assert said == ["1 of 3 lines of pictures.jsonl are no judged pictures: they are in pictures.damaged.jsonl now"]
    assert (tmp_path / store.DAMAGED).read_bytes() == damaged + b"\n"
    store.add_rows(tmp_path, [rows[1]])
    assert store.read_rows(tmp_path, said.append) == [rows[0], rows[2], rows[1]]
    assert len(said) == 1


def test_a_picture_that_was_judged_twice_counts_once(tmp_path: Path) -> None:
    row = store.Row("p", "m", 0, {"both": 1.0})
    store.add_rows(tmp_path, [row, row])
    assert store.read_rows(tmp_path) == [row]


@pytest.mark.parametrize("text", ["", '{"steps": 12', "[]", '{"methods": []}', "[" * 100_000])
def test_settings_that_are_damaged_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / store.SETTINGS).write_text(text)
    with pytest.raises(DynFuseError, match=r"settings\.json is damaged"):
        store.begin(tmp_path, SETTINGS, resume=True)
    assert (tmp_path / store.SETTINGS).read_text() == text


@pytest.mark.parametrize("broken", [json, os])
def test_settings_are_those_of_before_where_writing_them_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    """Before anything is written, and when all of it is but not yet in its place."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    store.begin(tmp_path, SETTINGS, resume=False)
    before = (tmp_path / store.SETTINGS).read_text()
    monkeypatch.setattr(broken, "replace" if broken is os else "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        store.begin(tmp_path, {**SETTINGS, "methods": {"kl": {}}}, resume=True)
    assert (tmp_path / store.SETTINGS).read_text() == before


def test_more_seeds_are_made_for_what_is_done() -> None:
    done = {(PAIRS[0].name, "sum", 0), (PAIRS[0].name, "sum", 2)}
    assert runs.jobs(PAIRS[:1], TWO[:1], 4, done) == [Job(PAIRS[0], TWO[0], (1, 3))]


SETTINGS = {"steps": 12, "methods": {"sum": {"style": 1.0}}, "pairs": {"p": ["a fox"]}}


def test_a_comparison_goes_on_with_more_methods_and_pairs(tmp_path: Path) -> None:
    store.begin(tmp_path / "new", SETTINGS, resume=False)
    more = {"steps": 12, "methods": {"kl": {}}, "pairs": {"q": []}}
    store.begin(tmp_path / "new", more, resume=True)
    kept = json.loads((tmp_path / "new" / store.SETTINGS).read_text())
    assert kept == {"steps": 12, "methods": {"sum": {"style": 1.0}, "kl": {}}, "pairs": {"p": ["a fox"], "q": []}}


def test_nothing_is_added_to_a_comparison_unasked_or_with_other_settings(tmp_path: Path) -> None:
    store.begin(tmp_path, SETTINGS, resume=False)
    with pytest.raises(DynFuseError, match="--resume or take another --out"):
        store.begin(tmp_path, SETTINGS, resume=False)
    with pytest.raises(DynFuseError, match="steps was 12"):
        store.begin(tmp_path, {**SETTINGS, "steps": 9}, resume=True)
    with pytest.raises(DynFuseError, match="method sum was another"):
        store.begin(tmp_path, {**SETTINGS, "methods": {"sum": {"style": 0.5}}}, resume=True)
    store.begin(tmp_path, SETTINGS, resume=True)
