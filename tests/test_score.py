"""`python -m lib_dynfuse score`: what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from typer.testing import CliRunner

from lib_dynfuse.__main__ import app
from lib_dynfuse.guidance import encoders
from lib_dynfuse.guidance.scores import harmonic_mean

RED, BLUE, DARK_RED = (255, 0, 0), (0, 0, 255), (120, 0, 0)

load_clip = encoders.load_clip


class Colours:
    """An encoder that sees the mean colour; a prompt is the name of one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def image(self, images: Tensor) -> Tensor:
        return normalize(interpolate(images, (1, 1), mode="area").flatten(1), dim=-1)

    def text(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(word in prompt) for word in ("red", "green", "blue")] for prompt in prompts])


Score = Callable[..., Result]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """Run `score` in a folder with pictures of one colour, with the encoders above."""
    for name, colour, size in (
        ("red", RED, (8, 8)),
        ("dark", DARK_RED, (20, 10)),
        ("blue", BLUE, (16, 16)),
        ("violet", (255, 0, 255), (8, 12)),
    ):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    monkeypatch.setattr(encoders, "load_clip", lambda where, *rest: Colours(f"{where} (open_clip)"))
    monkeypatch.setattr(encoders, "load_dino", lambda where, *rest: Colours(f"{where} (transformers)"))
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["score", *map(str, words)])


def test_a_table_has_a_row_for_each_picture_and_names_the_encoders(score: Score) -> None:
    result = score("red.png", "violet.png", "--subject", "red.png", "--style", "blue.png", "--prompt", "a blue one")
    assert result.exit_code == 0, result.output
    head, red, violet, blank, *notes = result.stdout.splitlines()
    titles = ["picture", "CLIP-I subject", "CLIP-I style", "DINO subject", "DINO style", "CLIP-T", "R", "harmonic mean"]
    assert [word.strip() for word in head.split("  ") if word.strip()] == titles
    assert red.split() == ["red.png", "1.0000", "0.0000", "1.0000", "0.0000", "0.0000", "-1.0000", "0.0000"]
    assert violet.split() == ["violet.png", *["0.7071"] * 5, "-2.1213", "0.7071"]
    assert blank == ""
    assert notes == [
        "CLIP: ViT-B-32:laion2b_s34b_b79k (open_clip)",
        "DINO: facebook/dino-vits16 (transformers)",
        "harmonic mean: of DINO subject and CLIP-I style",
        "R: what a nudge makes smaller",
    ]


def test_json_holds_the_same_numbers(score: Score) -> None:
    result = score("violet.png", "--subject", "red.png", "--style", "blue.png", "--clip", "my", "--json", "out.json")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out.json").read_text())
    assert report["clip"] == "my (open_clip)"
    assert report["dino"] == "facebook/dino-vits16 (transformers)"
    assert report["harmonic_mean_of"] == ["dino_subject", "clip_style"]
    (row,) = report["pictures"]
    assert row.pop("picture") == "violet.png"
    assert row.pop("R") == pytest.approx(-3 / 2**0.5)
    assert set(row) == {"clip_subject", "clip_style", "dino_subject", "dino_style", "harmonic_mean"}
    assert list(row.values()) == [pytest.approx(0.5**0.5)] * 5


def test_references_of_different_sizes_are_averaged(score: Score) -> None:
    assert score("violet.png", "--subject", "red.png", "--subject", "blue.png", "--dino", "none").exit_code == 0
    score("violet.png", "--subject", "red.png", "--subject", "blue.png", "--json", "out.json")
    assert json.loads(Path("out.json").read_text())["pictures"][0]["clip_subject"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["--prompt", "red"], ["CLIP-T"]),
        (["--subject", "red.png"], ["CLIP-I subject", "DINO subject", "R"]),
        (["--subject", "red.png", "--dino", "none"], ["CLIP-I subject", "R"]),
        (["--style", "red.png", "--clip", "none"], ["DINO style", "R"]),
    ],
)
def test_only_what_there_is_a_reference_and_an_encoder_for_is_shown(
    score: Score, words: list[str], columns: list[str]
) -> None:
    head = score("dark.png", *words).stdout.splitlines()[0]
    assert [word.strip() for word in head.split("  ") if word.strip()] == ["picture", *columns]


def test_dino_is_not_loaded_for_a_prompt_alone(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "load_dino", None)
    assert score("dark.png", "--prompt", "red").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["red.png"], "nothing to compare with; give --subject, --style or --prompt"),
        (["gone.png", "--prompt", "red"], "gone.png: there is no such file"),
        (["text.png", "--prompt", "red"], "text.png: is not a picture, or not a whole one"),
        (["cut.png", "--prompt", "red"], "cut.png: is not a picture, or not a whole one"),
        ([".", "--prompt", "red"], ".: is a folder, not a picture"),
        (["red.png", "--subject", "gone.png"], "gone.png: there is no such file"),
        (["red.png", "--prompt", "red", "--json", "no/such/out.json"], "no/such/out.json"),
        (["red.png", "--prompt", "red", "--device", "toaster"], "--device toaster: there is no such device here"),
        (["red.png", "--prompt", "red", "--clip", "none"], "every encoder or every reference is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(score: Score, words: list[str], said: str) -> None:
    result = score(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def fail() -> None:
    raise OSError("no network")


def test_missing_weights_are_said_with_what_to_put_where(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "load_clip", load_clip)
    result = score("red.png", "--prompt", "red", "--clip", "ViT-Nothing", "--models", "rooms")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "CLIP ViT-Nothing: there is no such file" in line


def test_without_download_nothing_is_fetched_and_the_files_are_named(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(encoders, "load_clip", load_clip)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names) or fail())
    words = ["red.png", "--prompt", "red", "--models", "rooms"]
    (line,) = score(*words).stderr.splitlines()
    assert line.startswith("error: CLIP is not on this machine: put https://huggingface.co/laion/")
    assert "as rooms/ViT-B-32-laion2b_s34b_b79k.safetensors, or have it downloaded with --download" in line
    assert asked == []
    result = score(*words, "--download")
    assert "could not be reached" in result.stderr
    assert asked == [("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors")]


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        ({"dino_subject": 0.8, "clip_style": 0.4, "clip_subject": 0.1, "dino_style": 0.1}, 2 * 0.32 / 1.2),
        ({"clip_subject": 0.5, "clip_style": 0.5}, 0.5),
        ({"dino_subject": -0.1, "clip_style": 0.9}, 0.0),
        ({"dino_subject": 0.9, "clip_text": 0.3}, None),
    ],
)
def test_the_harmonic_mean_wants_both_subject_and_style(scores: dict[str, float], mean: float | None) -> None:
    assert harmonic_mean(scores) == (mean if mean is None else pytest.approx(mean))
