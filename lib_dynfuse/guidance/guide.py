"""The nudges of one batch of pictures, step by step, and what they did."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.nudge import Nudge, Nudged
from lib_dynfuse.guidance.objectives import Objective


class Guide:
    """Nudges a batch's denoised predictions; a host calls it, after CFG, at the steps that it wants.

    `seeds`: each picture's, from which cutouts are drawn. Nothing is read from the device before `curve` and `reasons`.
    """

    def __init__(self, nudge: Nudge, objective: Objective, decode: Decoder, seeds: Sequence[int]) -> None:
        self.nudge = nudge
        self._objective = objective
        self._own = [objective.part([index]) for index in range(len(seeds))]
        self._decode = decode
        self._seeds = list(seeds)
        self._done: set[int] = set()
        self._nudges: list[tuple[int, Nudged]] = []

    @property
    def through_unet(self) -> bool:
        """Whether it wants the gradient by the UNet's input."""
        return self.nudge.mode == "xt"

    def wants(self, step: int, place: int, total: int) -> bool:
        """Whether to nudge at `place` of a sampling's `total` steps, from 0. `step`: its number among all the steps
        of the pictures, a hires pass counting on; each is nudged once, however often a sampler calls the UNet in it."""
        progress = place / (total - 1) if total > 1 else 0.0
        return step not in self._done and self.nudge.wants(place, progress)

    def at(self, step: int, denoised: Tensor, spread: Tensor | None = None) -> Tensor:
        """The denoised prediction [B, C, h, w], nudged; `spread` [B]: cfg · rms(D_cond − D_uncond), None without
        CFG. Picture by picture, so that a batch takes no more memory than one of its pictures."""
        return self._keep(step, _together([self._one(index, step, denoised, spread) for index in range(len(denoised))]))

    def _one(self, index: int, step: int, denoised: Tensor, spread: Tensor | None) -> Nudged:
        only = slice(index, index + 1)
        objective = partial(self._own[index], seeds=self._seeds[only], step=step)
        return self.nudge(denoised[only], objective, self._decode, None if spread is None else spread[only])

    def at_input(self, step: int, denoised: Tensor, x: Tensor, remaining: float) -> Tensor:
        """The same where the gradient goes through the UNet; see `Nudge.through_unet`."""
        objective = partial(self._objective, seeds=self._seeds, step=step)
        return self._keep(step, self.nudge.through_unet(denoised, x, objective, self._decode, remaining))

    def _keep(self, step: int, nudged: Nudged) -> Tensor:
        self._done.add(step)
        denoised = nudged.denoised
        # The prediction itself is not needed any more: what is kept of a nudge is a few numbers.
        self._nudges.append((step, Nudged(denoised.new_empty(0), nudged.r, nudged.failed, nudged.skipped)))
        return denoised

    def curve(self) -> dict[int, list[float]]:
        """Step -> R of each picture before that step's nudge, NaN where it is not known. Reads from the device."""
        if not self._nudges:
            return {}
        values = torch.stack([nudged.r.float() for _, nudged in self._nudges]).cpu().tolist()
        return {step: row for (step, _), row in zip(self._nudges, values, strict=True)}

    def reasons(self) -> list[str]:
        """Why nudges were left out, each reason once. Reads from the device."""
        found = {f"at least one nudge was left out: {why}": None for _, one in self._nudges if (why := one.reason())}
        return list(found)

    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """How near finished pictures [B, 3, H, W], 0..1, are to the references; see `Objective.scores`."""
        return self._objective.scores(images)


def _together(nudged: Sequence[Nudged]) -> Nudged:
    """What became of each picture, as of one batch."""
    return Nudged(
        torch.cat([one.denoised for one in nudged]),
        torch.cat([one.r for one in nudged]),
        torch.cat([one.failed for one in nudged]),
        next((one.skipped for one in nudged if one.skipped), ""),
    )
