"""From options and references to what nudges and scores: what is missing is told, and the rest goes on without it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lib_dynfuse import guides
from lib_dynfuse.core.types import Role
from lib_dynfuse.guidance import encoders
from lib_dynfuse.guidance.decoders import linear
from lib_dynfuse.guidance.libraries import EncoderError
from lib_dynfuse.guidance.objectives import Each
from lib_dynfuse.guidance.sources import CLIPS, MissingError, Source
from lib_dynfuse.options import Options


class Mean:
    """An encoder whose directions are a picture's mean colours."""

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.device = "cpu"

    def image(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)).roll(self.turn, 1), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor([[1.0, len(prompt), 0.0] for prompt in prompts]), dim=-1)

    def to(self, device: Any) -> None:
        self.device = str(device)


class Shelf:
    """Where encoders come from; `loaded` has the names asked for, `missing` those that are not there."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.missing: set[str] = set()
        self.failure: Exception | None = None

    def load(self, where: str, source: Source, device: Any, dtype: Any) -> Mean:
        self.loaded.append(where)
        if self.failure is not None:
            raise self.failure
        if where in self.missing:
            raise EncoderError(f"{where} cannot be loaded")
        return Mean(len(self.loaded))


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    found = Shelf()
    monkeypatch.setattr(encoders, "load_clip", found.load)
    monkeypatch.setattr(encoders, "load_dino", found.load)
    monkeypatch.setattr(guides, "_kept", {})
    monkeypatch.setattr(guides, "_refused", {})
    return found


def colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 4, 4)


PICTURES = {Role.SUBJECT: colour(1, 0.2, 0.1), Role.STYLE: colour(0.1, 0.2, 1)}


def prepare(told: list[str], references: Any = PICTURES, folder: Path | None = None, **options: Any) -> Any:
    values = Options.read({"enabled": True, "clip": "a", "dino": "b", **options})
    find = references if callable(references) else references.get
    return guides.prepare(values, find, ["a fox"], Source(folder), "cpu", torch.float32, told.append)


def test_with_everything_there_nothing_is_told_and_every_term_counts(shelf: Shelf) -> None:
    told: list[str] = []
    found = prepare(told, nudge=True, weight_dino_subject=1.0)
    assert found.objective.terms == ("clip_subject", "clip_style", "dino_style", "dino_subject")
    assert (told, shelf.loaded) == ([], ["a", "b"])


def test_the_nudge_is_what_the_options_say(shelf: Shelf) -> None:
    nudge = prepare([], nudge=True, nudge_mode="adam", nudge_strength=0.5, nudge_start=0.1, nudge_every=2).nudge
    assert (nudge.mode, nudge.strength, nudge.start, nudge.stop, nudge.every, nudge.clamp) == (
        "adam", 0.5, 0.1, Options().nudge_stop, 2, Options().nudge_clamp,
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [{"score": True}, {"keep_best": 1}])
def test_pictures_can_be_scored_without_being_nudged(shelf: Shelf, wanted: dict[str, Any]) -> None:
    found = prepare([], **wanted)
    assert found.nudge is None
    with pytest.raises(ValueError, match="scored, not nudged"):
        found.guide([0], [1], linear("sd1"))
    (row,) = found.scores(colour(1, 0.2, 0.1).clone(), [0])
    assert row["clip_subject"] == pytest.approx(1.0)
    assert {"dino_subject", "clip_style", "dino_style", "clip_text", "R", "harmonic_mean"} <= set(row)


def test_an_encoder_that_is_missing_leaves_the_other_at_work(shelf: Shelf, tmp_path: Path) -> None:
    shelf.missing, told = {"a"}, []
    found = prepare(told, folder=tmp_path, nudge=True)
    assert found.objective.terms == ("dino_style",)
    assert told == ["a cannot be loaded; its terms are left out"]


def test_without_an_encoder_no_reference_is_asked_for(shelf: Shelf) -> None:
    shelf.missing, told = {"a", "b"}, []

    def references(role: Role) -> Any:
        raise AssertionError("references may take minutes to be made")

    assert prepare(told, references, nudge=True) is None
    assert told == ["not nudged: a cannot be loaded; b cannot be loaded"]


def test_what_could_not_be_loaded_is_not_tried_again_until_the_folder_changes(shelf: Shelf, tmp_path: Path) -> None:
    shelf.missing = {"a", "b"}
    for _ in range(2):
        told: list[str] = []
        assert prepare(told, folder=tmp_path, nudge=True) is None
        assert len(told) == 1
    assert shelf.loaded == ["a", "b"]
    (tmp_path / "a.safetensors").touch()
    shelf.missing = set()
    assert prepare([], folder=tmp_path, nudge=True) is not None


def test_missing_encoders_are_told_once_with_what_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    told: list[str] = []
    assert prepare(told, clip="ViT-B-32", dino="facebook/dino-vits16", nudge=True) is None
    (line,) = told
    assert line.startswith("not nudged: CLIP and DINO are not on this machine: put https://huggingface.co/laion/")
    assert "(605 MB) as models/dynfuse/ViT-B-32-laion2b_s34b_b79k.safetensors and https://" in line
    assert "(87 MB) as models/dynfuse/dino-vits16.safetensors" in line


def test_one_missing_encoder_is_told_and_the_other_serves(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(where: str, source: Source, *_: Any) -> Any:
        raise MissingError(CLIPS["ViT-B-32:laion2b_s34b_b79k"], source)

    monkeypatch.setattr(encoders, "load_clip", absent)
    for _ in range(2):
        told: list[str] = []
        assert prepare(told, nudge=True).objective.terms == ("dino_style",)
        (line,) = told
        assert line.startswith("CLIP is not on this machine: put ")
        assert line.endswith("; its terms are left out")
    assert guides._refused == {}


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "C:\\x", "\\\\server\\x", "x" * 100_000])
def test_a_foreign_name_is_refused_and_not_remembered(shelf: Shelf, name: str) -> None:
    told: list[str] = []
    assert prepare(told, nudge=True, clip=name, dino=name) is None
    assert shelf.loaded == []
    assert guides._refused == {}
    assert name not in told[0]


class Large:
    """Stands for a gigabyte; `alive` has those that are in memory."""

    alive: ClassVar[weakref.WeakSet[Large]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)


def test_refused_encoders_leave_memory_and_few_are_remembered(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(where: str, *_: Any) -> Any:
        state = Large()
        try:
            raise RuntimeError(f"{state} is of another size")
        except RuntimeError as error:
            raise EncoderError(f"{where} is of another architecture") from error

    monkeypatch.setattr(encoders, "load_clip", load)
    for number in range(30):
        prepare([], nudge=True, clip=f"spelling-{number}")
        prepare([], nudge=True, clip=f"spelling-{number}")
        assert not Large.alive
    assert len(guides._refused) <= 8
    assert all(isinstance(why, str) for _, why in guides._refused.values())


def test_no_memory_for_an_encoder_is_told(shelf: Shelf) -> None:
    shelf.failure, told = torch.cuda.OutOfMemoryError("CUDA out of memory"), []
    assert prepare(told, nudge=True) is None
    said = "could not be loaded (OutOfMemoryError: CUDA out of memory)"
    assert told == [f"not nudged: CLIP {said}; DINO {said}"]


def test_a_role_without_a_picture_is_told(shelf: Shelf) -> None:
    told: list[str] = []
    found = prepare(told, {Role.STYLE: PICTURES[Role.STYLE]}, nudge=True)
    assert found.objective.terms == ("clip_style", "dino_style")
    assert told == ["there is no picture of the subject to go by: its terms are left out"]


def test_an_encoder_that_no_term_needs_is_not_loaded(shelf: Shelf) -> None:
    prepare([], nudge=True, weight_dino_style=0.0)
    prepare([], nudge=True, clip="none")
    assert shelf.loaded == ["a", "b"]


def test_weights_that_are_all_zero_are_told(shelf: Shelf) -> None:
    told: list[str] = []
    zero = dict.fromkeys(("weight_clip_subject", "weight_clip_style", "weight_dino_style"), 0.0)
    assert prepare(told, nudge=True, **zero) is None
    assert told == ["not nudged: the weights of all terms are 0"]


def test_encoders_are_kept_moved_away_and_fetched_back(shelf: Shelf) -> None:
    prepare([], nudge=True)
    prepare([], nudge=True)
    assert shelf.loaded == ["a", "b"]
    kept = list(guides._kept.values())
    for encoder in kept:
        encoder.to("cuda")
    guides.rest()
    assert [encoder.device for encoder in kept] == ["cpu", "cpu"]
    prepare([], nudge=True, clip="c")
    assert shelf.loaded == ["a", "b", "c"]
    assert len(guides._kept) == 2


def test_a_picture_is_scored_by_its_own_references(shelf: Shelf) -> None:
    own = {Role.SUBJECT: Each([colour(1, 0, 0), colour(0, 1, 0)]), Role.STYLE: colour(0, 0, 1)}
    told: list[str] = []
    found = prepare(told, own, score=True)
    assert told == []
    rows = found.scores(torch.cat([colour(0, 1, 0), colour(1, 0, 0)]), [1, 0])
    assert [row["dino_subject"] for row in rows] == pytest.approx([1.0, 1.0])
    assert found.scores(colour(0, 1, 0).clone(), [0])[0]["dino_subject"] == pytest.approx(0.0, abs=1e-6)
