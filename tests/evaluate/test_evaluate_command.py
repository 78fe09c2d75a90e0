"""`python -m lib_dynfuse evaluate`: what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lib_dynfuse.__main__ import app
from lib_dynfuse.evaluate import boxed
from lib_dynfuse.evaluate.plan import Pair
from lib_dynfuse.evaluate.runs import Job
from lib_dynfuse.guidance.objectives import TERMS

made: list[Job] = []


class Painter:
    """In place of the box: a method is as good as its name is long."""

    def __init__(self, steps: int, cfg: float, loras: Path) -> None:
        pass

    def make(self, job: Job) -> Tensor:
        made.append(job)
        return torch.full((len(job.seeds), 3, 8, 8), len(job.method.label) / 20)

    def judge(self, pair: Pair, pictures: Tensor) -> Sequence[Mapping[str, float]]:
        share = pictures.mean().item()
        return [dict(zip(boxed.MEASURES, (1.0, share, share, 1 - share), strict=True)) for _ in pictures]


Evaluate = Callable[..., Any]


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    made.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(boxed, "BoxedMaker", Painter)
    start = ["evaluate", "--pairs", "fox:hc,rocket:hc", "--seeds", "3", "--workers", "1", "--out", "out"]
    return lambda *words: CliRunner().invoke(app, [*start, *words])


def test_rows_a_table_a_plot_and_a_sheet_are_written(evaluate: Evaluate) -> None:
    result = evaluate("--methods", "sum,kl balanced", "--method", "sum .7: strategy=sum subject=.7 style=.7")
    assert result.exit_code == 0, result.output
    out = Path("out")
    written = {"table.md", "table.json", "subject-style.png", "sheet.png"}
    assert {path.name for path in out.iterdir()} == {*written, "settings.json", "pictures.jsonl", "pictures"}
    assert all(str(out / name) in result.stdout for name in written)
    assert (out / "table.md").read_text() in result.stdout
    assert len((out / "pictures.jsonl").read_text().splitlines()) == 2 * 3 * 3
    rows = {row["method"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert rows["kl balanced"]["both"][0] == pytest.approx(11 / 20)
    assert rows["kl balanced"]["both minus sum"][0] == pytest.approx(8 / 20)
    assert "the boxed judge" in result.stdout


def test_fresh_subjects_without_their_loras_are_told_how_to_get_them(evaluate: Evaluate) -> None:
    result = evaluate("--pairs", "taco:hc", "--methods", "sum")
    assert result.exit_code != 0
    assert "subject-taco" in result.output
    assert "--stage fresh" in result.output
    assert not Path("out").exists()


def test_it_goes_on_where_it_stopped(evaluate: Evaluate) -> None:
    assert evaluate("--methods", "sum").exit_code == 0
    first = len(made)
    refused = evaluate("--methods", "sum,kl")
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert len(made) == first
    result = evaluate("--methods", "sum,kl", "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after 6 pictures" in result.stderr
    assert {job.method.label for job in made[first:]} == {"kl"}


def test_a_comparison_that_is_done_is_only_told_again(evaluate: Evaluate) -> None:
    first = evaluate("--methods", "sum,kl")
    made.clear()
    again = evaluate("--methods", "sum,kl", "--resume")
    assert again.stdout == first.stdout
    assert made == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "best"], "best"),
        (["--pairs", "dog:hc"], "dog"),
        (["--model", "none", "--pairs", "none.json"], "none.json"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_is_made(evaluate: Evaluate, words: list[str], said: str) -> None:
    result = evaluate(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
    assert made == []
    assert not Path("out").exists()


def test_the_box_makes_and_judges_pictures(tmp_path: Path) -> None:
    words = ["evaluate", "--pairs", "fox:hc", "--methods", "sum", "--seeds", "2", "--steps", "1", "--workers", "1"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert row["both"] == row["subject"] * row["style"]
        assert 0 < row["distance"] < 1


def test_a_method_that_nudges_is_nudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["evaluate", "--pairs", "fox:hc", "--seeds", "1", "--steps", "4", "--workers", "1"]
    plain, nudged = "plain: strategy=sum", "nudged: strategy=sum nudge=true nudge_strength=1 nudge_clamp=1"
    result = CliRunner().invoke(app, [*words, "--method", plain, "--method", nudged, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    first, second = (tmp_path / "out" / "pictures").iterdir()
    assert first.read_bytes() != second.read_bytes()
    assert len(list((tmp_path / "dynfuse" / "references").iterdir())) == 2, "what each LoRA makes alone"


def test_nudges_that_nothing_is_left_of_are_refused(tmp_path: Path) -> None:
    words = ["evaluate", "--pairs", "fox:hc", "--seeds", "1", "--steps", "1", "--workers", "1"]
    none = " ".join(f"weight_{term}=0" for term in TERMS)
    result = CliRunner().invoke(app, [*words, "--method", f"x: strategy=sum nudge=true {none}", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "the method x: not nudged: the weights of all terms are 0" in result.stderr


def test_the_distance_to_the_truth_itself_is_nothing() -> None:
    true = boxed.truth("fox", "hc")
    grey = torch.full_like(true, 0.5)
    found = boxed.distance(torch.stack([true, grey]), true)
    assert found[0] == pytest.approx(0.0, abs=1e-4)
    assert found[1] == pytest.approx((true - 0.5).square().mean().sqrt().item(), rel=1e-4)
