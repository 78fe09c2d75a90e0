"""A person's own model: its pictures' nearness to the subject's and the style's pictures and to the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.evaluate.csd import CsdEncoder, load_csd
from lib_dynfuse.evaluate.plan import Pair
from lib_dynfuse.evaluate.runs import Job
from lib_dynfuse.generate import quiet_libraries
from lib_dynfuse.guidance.encoders import ClipEncoder, DinoEncoder, EncoderError, load_clip, load_dino
from lib_dynfuse.guidance.objectives import Objective
from lib_dynfuse.guidance.pictures import PictureError, read_picture
from lib_dynfuse.guidance.scores import harmonic_mean
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.hosts.diffusers import Embedded, default_device

NONE = "none"


@dataclass(frozen=True)
class Encoders:
    """What pictures are measured with: as `score` names them, or none; `csd` only where its weights are."""

    clip: str
    dino: str
    csd: str
    models: Path
    device: str
    download: bool = False

    @property
    def source(self) -> Source:
        return Source.of_owner(self.models, self.download)

    def open(self) -> tuple[ClipEncoder | None, DinoEncoder | None, CsdEncoder | None]:
        """Raises DynFuseError for one that cannot be had."""
        where = self.device or default_device()
        try:
            return (
                None if self.clip == NONE else load_clip(self.clip, self.source, where),
                None if self.dino == NONE else load_dino(self.dino, self.source, where),
                None if self.csd == NONE else load_csd(self.csd, self.source, where),
            )
        except EncoderError as error:
            raise DynFuseError(str(error)) from error

    def names(self) -> dict[str, str]:
        """Whose numbers these are: a measure's kind to its backbone."""
        clip, dino, csd = self.open()
        found = {"CLIP": clip, "DINO": dino, "CSD": csd}
        return {kind: encoder.name for kind, encoder in found.items() if encoder is not None}


@dataclass(frozen=True)
class Own:
    """Opens the model and the encoders; travels to the worker processes."""

    model: Path
    lora_dir: Path | None
    config: Path | None
    encoders: Encoders
    picture: Mapping[str, Any]

    def __call__(self) -> OwnMaker:
        return OwnMaker(self)


class OwnMaker:
    """Makes pictures with a person's model and measures cosines, as `score` does, and CSD's style where it is there."""

    def __init__(self, own: Own) -> None:
        self._own = own
        device = own.encoders.device or None
        quiet_libraries()
        self._host = Embedded.load(
            own.model, own.lora_dir, device, config=own.config, say=lambda line: None, download=own.encoders.download
        )
        self._clip, self._dino, self._csd = own.encoders.open()

    def make(self, job: Job) -> Tensor:
        return job.pictures(self._host, self._own.picture, self._own.model, self._own.encoders.source, {})

    def judge(self, pair: Pair, pictures: Tensor) -> Sequence[Mapping[str, float]]:
        subject, style = (read_pictures(paths) for paths in (pair.subject_pictures, pair.style_pictures))
        scores = Objective(self._clip, self._dino, subject, style, [pair.prompt]).scores(pictures)
        scores.pop("R", None)
        if self._csd is not None and style:
            scores["csd"] = self._csd.nearness(pictures, style)
        columns = {name: values.tolist() for name, values in scores.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row in rows:
            if (mean := harmonic_mean(row)) is not None:
                row["harmonic_mean"] = mean
        return rows


def read_pictures(paths: Sequence[Path]) -> list[Tensor]:
    """Each [1, 3, H, W] from 0 to 1. Raises DynFuseError for what is no picture."""
    try:
        return [read_picture(path) for path in paths]
    except PictureError as error:
        raise DynFuseError(str(error)) from error
