"""`generate` with guidance, on the tiny pipeline and toy encoders: references, nudges, scores, the best of a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from lib_dynfuse import guides
from lib_dynfuse.__main__ import app
from lib_dynfuse.guidance import encoders
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.trace import Record

ROLES = "a fox <lora:fox:0.8:role=subject> in ink <lora:ink:0.6:role=style>"
NUDGED = ("--nudge", "--nudge-start", "0", "--nudge-stop", "1", "--nudge-strength", "0.05", "--clip", "toy-clip")


class Toy:
    """An encoder: the mean colours of the picture's nine parts."""

    name = "toy"

    def to(self, device: Any) -> None:
        pass

    def image(self, images: Tensor) -> Tensor:
        return functional.normalize(functional.adaptive_avg_pool2d(images.float(), 3).flatten(1), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        return functional.normalize(torch.tensor([[float(len(prompt))] * 27 for prompt in prompts]), dim=-1)


class Said:
    def __init__(self, result: Any, out: Path) -> None:
        self.code: int = result.exit_code
        self.notes: str = result.stderr
        self.files = sorted(path.name for path in out.glob("*")) if out.exists() else []
        self.out = out

    def text(self, name: str) -> str:
        with Image.open(self.out / name) as picture:
            return str(picture.info["parameters"])

    def pixels(self, name: str) -> bytes:
        with Image.open(self.out / name) as picture:
            return picture.tobytes()


Generate = Callable[..., Said]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Toy encoders in the place of CLIP and DINO; what was asked for."""
    asked: list[str] = []

    def load(where: str, *_: Any) -> Toy:
        asked.append(where)
        if where == "missing":
            raise encoders.EncoderError("CLIP missing: put the checkpoint at models/dynfuse/missing.safetensors")
        return Toy()

    monkeypatch.setattr(encoders, "load_clip", load)
    monkeypatch.setattr(encoders, "load_dino", load)
    monkeypatch.setattr(guides, "_kept", {})
    return asked


@pytest.fixture
def generate(
    sd_folder: Path, lora_dir: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> Generate:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*words: str, prompt: str = ROLES, out: str = "out", steps: int = 2) -> Said:
        always = ["--model", sd_folder, "--lora-dir", lora_dir, "--out", tmp_path / out, "--device", "cpu"]
        settings = ["--steps", steps, "--cfg", 3, "--seed", 7]
        given = ["generate", "--prompt", prompt, *map(str, always), *map(str, settings), *words]
        return Said(CliRunner().invoke(app, given), tmp_path / out)

    return run


def save(path: Path, colour: str) -> str:
    Image.new("RGB", (32, 32), colour).save(path)
    return str(path)


def scores(text: str) -> dict[str, float]:
    """Those in a picture's infotext."""
    written = text.split('DynFuse scores: "')[1].split('"')[0]
    return {name: float(value) for name, _, value in (one.rpartition(" ") for one in written.split(", "))}


def test_nudged_towards_given_pictures_the_picture_comes_nearer_and_the_trace_has_the_curve(
    generate: Generate, tmp_path: Path
):
    pictures = [
        "--subject-reference",
        save(tmp_path / "s.png", "red"),
        "--style-reference",
        save(tmp_path / "t.png", "black"),
    ]
    plain = generate("--score", "--no-trace", "--clip", "toy-clip", *pictures, out="plain")
    nudged = generate(*NUDGED, *pictures)
    assert nudged.code == 0, nudged.notes
    assert nudged.files == ["00000-7-chosen.png", "00000-7-trace.json", "00000-7.png"]
    before, after = scores(plain.text("00000-7.png")), scores(nudged.text("00000-7.png"))
    assert set(after) == {
        "CLIP-I subject",
        "CLIP-I style",
        "DINO subject",
        "DINO style",
        "CLIP-T",
        "R",
        "harmonic mean",
    }
    assert after["R"] < before["R"]
    assert "DynFuse nudge: True" in nudged.text("00000-7.png")
    record = Record.from_json(nudged.out / "00000-7-trace.json")
    assert [len(row) for row in record.nudges.values()] == [1, 1]
    assert list(record.nudges) == [0, 1]
    assert "pictures of the subject to compare with: given 1" in nudged.notes


def test_without_guidance_nothing_of_it_is_imported_and_no_score_is_written(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
):
    for name in ("open_clip", "lib_dynfuse.guidance.encoders", "lib_dynfuse.compared"):
        # Whoever imports it now gets an ImportError.
        monkeypatch.setitem(sys.modules, name, None)
    said = generate("--no-trace")
    assert said.code == 0, said.notes
    assert "DynFuse scores" not in said.text("00000-7.png")


def test_references_are_made_by_each_lora_alone_once(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, list[int]]] = []
    own = Embedded.generate

    def listens(self: Embedded, prompt: str, *rest: Any, **settings: Any) -> Any:
        asked.append((prompt, list(settings["seeds"])))
        return own(self, prompt, *rest, **settings)

    monkeypatch.setattr(Embedded, "generate", listens)
    first = generate(*NUDGED, "--no-trace", out="first")
    assert first.code == 0, first.notes
    subject, style = "a fox <lora:fox:0.8:role=subject> in ink ", "a fox  in ink <lora:ink:0.6:role=style>"
    assert asked == [(subject, [7]), (style, [7]), (ROLES, [7])]
    asked.clear()
    again = generate(*NUDGED, "--no-trace", "--batch", "2", out="again")
    assert asked == [(subject, [8]), (style, [8]), (ROLES, [7, 8])]
    assert "pictures of the style to compare with: generated" in again.notes
    pairs = zip(first.pixels("00000-7.png"), again.pixels("00000-7.png"), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= 1


def test_a_preview_on_disk_comes_before_generating(generate: Generate, lora_dir: Path):
    preview = lora_dir / "fox.preview.png"
    try:
        save(preview, "orange")
        said = generate(*NUDGED, "--no-trace")
        assert "pictures of the subject to compare with: preview" in said.notes
        assert "pictures of the style to compare with: generated" in said.notes
    finally:
        preview.unlink()


def test_only_the_best_of_a_batch_are_kept_and_they_are_the_best(generate: Generate, tmp_path: Path):
    given = [
        "--subject-reference",
        save(tmp_path / "s.png", "red"),
        "--style-reference",
        save(tmp_path / "t.png", "blue"),
    ]
    words = [*given, "--clip", "toy-clip", "--batch", "3"]
    every = generate("--score", "--no-trace", *words, out="all")
    kept = generate("--keep-best", "1", *words, out="kept")
    assert kept.code == 0, kept.notes
    best = max(every.files, key=lambda name: scores(every.text(name))["harmonic mean"])
    seed = best.removesuffix(".png").split("-")[1]
    assert kept.files == [f"00000-{seed}-chosen.png", f"00000-{seed}-trace.json", f"00000-{seed}.png"]
    assert kept.pixels(f"00000-{seed}.png") == every.pixels(best)


def test_without_fusion_the_nudge_alone_is_described_and_drawn(generate: Generate, tmp_path: Path):
    said = generate(
        *NUDGED, "--no-fuse", "--subject-reference", save(tmp_path / "s.png", "red"), "--references", "given"
    )
    assert said.code == 0, said.notes
    assert "DynFuse strategy: sum" in said.text("00000-7.png")
    record = Record.from_json(said.out / "00000-7-trace.json") if "00000-7-trace.json" in said.files else None
    assert record is not None
    assert record.layers == []
    assert len(record.nudges) == 2


def test_missing_weights_are_said_and_the_picture_is_made(generate: Generate):
    said = generate("--nudge", "--clip", "missing", "--dino", "none", "--references", "given")
    assert said.code == 0
    assert "put the checkpoint at models/dynfuse/missing.safetensors" in said.notes
    assert "not nudged" in said.notes
    assert "00000-7.png" in said.files


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nudge", "--subject-reference", "nowhere.png"], ["nowhere.png", "no such file"]),
        (["--nudge", "--nudge-mode", "y0"], ["nudge_mode", "x0, adam, xt"]),
        (["--weight", "clip=1"], ["--weight clip", "clip_subject", "clip_text"]),
        (["--weight", "clip_text=11"], ["weight_clip_text", "0 to 10"]),
        (["--nudge", "--nudge-start", "0.9", "--nudge-stop", "0.1"], ["nudge_start 0.9", "nudge_stop 0.1"]),
    ],
)
def test_a_wrong_option_of_guidance_is_one_clear_line(generate: Generate, words: list[str], named: list[str]):
    said = generate(*words)
    assert said.code == 2
    (line,) = [line for line in said.notes.splitlines() if line.startswith("error: ")]
    for word in named:
        assert word in line
    assert said.files == []
