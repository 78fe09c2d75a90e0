"""The model in the box: judged by its judges, and by the distance to the picture that an artist of the style drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lib_dynfuse.demo.compare import Pair as DemoPair
from lib_dynfuse.demo.judge import Judge
from lib_dynfuse.demo.sheet import BOX, true_picture
from lib_dynfuse.demo.split import JUDGED_AS, MORE_SUBJECTS
from lib_dynfuse.evaluate.plan import Pair
from lib_dynfuse.evaluate.runs import Job
from lib_dynfuse.generate import quiet_libraries
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.hosts.diffusers import Embedded

MEASURES = ("subject", "style", "both", "distance")
# What nudges look through: the boxed ones, which have no part in judging.
ENCODERS = {"clip": "clip", "dino": "dino", "nudge_decoder": "vae"}


@dataclass(frozen=True)
class Boxed:
    """Opens the box; travels to the worker processes. `loras`: the folder of its LoRAs, or of the other subjects'."""

    steps: int
    cfg: float
    loras: Path

    def __call__(self) -> BoxedMaker:
        return BoxedMaker(self.steps, self.cfg, self.loras)


class BoxedMaker:
    """Makes pictures with the boxed model. Subject, style and both are 1 where they are judged right, else 0; distance
    is the root mean square over pixels and channels, which go from 0 to 1."""

    def __init__(self, steps: int, cfg: float, loras: Path) -> None:
        self._settings: dict[str, Any] = {"steps": steps, "cfg": cfg}
        quiet_libraries()
        # A model this small loses more to threads that wait for each other than it gains.
        torch.set_num_threads(1)
        self._host = Embedded.load(BOX / "model", loras, say=lambda line: None)
        self._judges = {fresh: Judge.load(BOX / "judge", fresh) for fresh in (False, True)}

    def make(self, job: Job) -> Tensor:
        return job.pictures(self._host, self._settings, BOX / "model", Source(BOX), ENCODERS)

    def judge(self, pair: Pair, pictures: Tensor) -> Sequence[Mapping[str, float]]:
        assert pair.truth is not None, "a pair of the box"
        subject, style = pair.truth
        judge = self._judges[subject in MORE_SUBJECTS]
        subjects, styles = judge(pictures)
        right_subject = subjects == judge.subjects.index(subject)
        right_style = styles == judge.styles.index(JUDGED_AS[style])
        values = torch.stack(
            [right_subject, right_style, right_subject & right_style, distance(pictures, truth(subject, style))]
        )
        return [dict(zip(MEASURES, column, strict=True)) for column in values.T.tolist()]


def truth(subject: str, style: str) -> Tensor:
    """The true picture, [3, H, W] from 0 to 1."""
    return torch.from_numpy(true_picture(DemoPair(subject, style))).permute(2, 0, 1).float() / 255


def distance(pictures: Tensor, true: Tensor) -> Tensor:
    """[N] from pictures [N, 3, H, W] to one [3, h, w] that is brought to their size: the root of the mean square."""
    resized = interpolate(true[None], pictures.shape[-2:], mode="bilinear", antialias=True)
    return (pictures - resized).square().mean((1, 2, 3)).sqrt()
