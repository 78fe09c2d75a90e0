"""One resumable training loop for every stage."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

Loss = Callable[[int, torch.Generator], torch.Tensor]


@dataclass
class Curve:
    """What a stage cost: `losses` holds the mean of every `every` steps."""

    steps: int = 0
    seconds: float = 0.0
    every: int = 20
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """How long a stage runs, and its learning rate (linear warm-up, then cosine to zero).

    `minutes` ends the stage early, and the cosine with it, where the machine is slower than the steps assume.
    """

    steps: int
    rate: float
    warmup: int = 100
    ema: float = 0.999
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(step / self.steps, by_time))

    def rate_at(self, step: int, seconds: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return self.rate * min(1.0, (step + 1) / max(1, self.warmup)) * cosine


def train(
    file: Path,
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    *,
    seed: int = 0,
    every_seconds: float = 60.0,
    bar: bool = True,
) -> Curve:
    """Trains `module` to the end of `schedule`, going on from `file` if it is there; leaves the averaged weights in it.

    `loss(step, generator)` returns a scalar; everything random in it comes from the generator, which is seeded from the
    step alone, so that an interrupted run continues as if it had never stopped. Parameters that get no gradient rest.

    Args:
        file: the checkpoint, replaced whole or not at all.
    """
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters: list[torch.Tensor] = list(learning.values())
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=1e-4, fused=True)
    curve, finished = Curve(), False
    if file.exists():
        state = torch.load(file, map_location=parameters[0].device, weights_only=True)
        module.load_state_dict(state["module"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        torch._foreach_copy_(average, state["average"])
        curve, finished = Curve(**state["curve"]), state["finished"]
    window: list[torch.Tensor] = []

    def save(finished: bool) -> None:
        state = {
            "module": {name: p.detach() for name, p in (*learning.items(), *module.named_buffers())},
            "average": average,
            "optimiser": optimiser.state_dict(),
            "curve": vars(curve),
            "finished": finished,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    module.train()
    started, saved, before = time.monotonic(), time.monotonic(), curve.seconds
    with tqdm(total=schedule.steps, initial=curve.steps, desc=file.stem, disable=not bar, mininterval=10) as progress:
        while not finished and schedule.progress(curve.steps, curve.seconds) < 1:
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate_at(curve.steps, curve.seconds)
            value = loss(curve.steps, torch.Generator().manual_seed(seed * 1_000_003 + curve.steps))
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            curve.steps += 1
            torch._foreach_lerp_(average, parameters, 1 - min(schedule.ema, curve.steps / (curve.steps + 10)))
            curve.seconds = before + time.monotonic() - started
            window.append(value.detach())
            if curve.steps % curve.every == 0:
                curve.losses.append(round(float(torch.stack(window).mean()), 5))
                window.clear()
                progress.set_postfix(loss=curve.losses[-1])
                # Between windows only, so that a resumed curve has no half-counted mean.
                if time.monotonic() - saved > every_seconds:
                    save(finished=False)
                    saved = time.monotonic()
            progress.update()
        if not finished:
            save(finished=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    module.eval()
    return curve


def averaged(file: Path, module: nn.Module) -> Curve:
    """Loads the averaged weights of a finished or running stage into `module`; returns the curve so far."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    with torch.no_grad():
        learning = (p for p in module.parameters() if p.requires_grad)
        for parameter, value in zip(learning, state["average"], strict=True):
            parameter.copy_(value)
    module.eval()
    return Curve(**state["curve"])
