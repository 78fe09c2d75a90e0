"""Layers that are computed again in a backward pass (gradient checkpointing): they must do what they did before.

A rule that decided anew would decide otherwise, as its running means have moved on, and the gradient would be that of
another picture. So, where autograd is on, what each layer decided is kept with a summary of its input.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib_dynfuse.core.loudness import Held
from lib_dynfuse.core.rules import Selection

# Forward passes whose decisions are kept.
_PASSES = 16
# How far two summaries of one input may lie apart: devices do not always add up in the same order.
_CLOSE = 1e-3


def recomputing() -> bool:
    """Whether a backward pass is under way in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class Decided(NamedTuple):
    """What a part of a layer did: its selection, what its deltas were multiplied by before, and whether both of them
    were computed before anything was added (torch compares what is computed again with what was)."""

    selection: Selection
    scaling: Held | None
    had_both: bool


@dataclass
class _Record:
    shape: torch.Size
    summary: Tensor
    rows: int
    decided: Sequence[Decided | None]
    repeated: bool = False


class Decisions:
    """What the layers decided in the last forward passes, for the life of one entered `Fusion`."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether a backward pass may come."""
        self._records: defaultdict[int, deque[_Record]] = defaultdict(lambda: deque(maxlen=_PASSES))

    def keep(self, layer: int, x: Tensor, rows: int, decided: Sequence[Decided | None]) -> None:
        """What layer number `layer` did with its input `x`, part by part, None where both deltas were added as they
        are. Nothing is kept where autograd is off."""
        if self.wanted or torch.is_grad_enabled():
            self._records[layer].append(_Record(x.shape, _summary(x), rows, decided))

    def of(self, layer: int, name: str, x: Tensor) -> tuple[int, Sequence[Decided | None]]:
        """How many rows the batch had when the layer got `x`, and what it did. RuntimeError where that is not known.

        Where several passes had the same input, the last that was not repeated yet: backward passes go back in time.
        """
        mine = _summary(x)
        known = [record for record in reversed(self._records[layer]) if record.shape == x.shape]
        # Reads from the device; nothing else can tell the passes apart.
        apart = [float((record.summary - mine).norm() / mine.norm().clamp_min(1e-20)) for record in known]
        close = [record for record, distance in zip(known, apart, strict=True) if distance <= _CLOSE]
        if not close:
            raise RuntimeError(
                f"layer {name} is computed again in a backward pass, by gradient checkpointing, and what it decided in "
                "the forward pass is not known; switch checkpointing off"
            )
        nearest = min(distance for distance in apart if distance <= _CLOSE)
        same = [record for record, distance in zip(known, apart, strict=True) if distance <= nearest]
        found = next((record for record in same if not record.repeated), same[0])
        found.repeated = True
        return found.rows, found.decided


@torch.no_grad()
def _summary(x: Tensor) -> Tensor:
    """Two numbers that tell an input from those of other passes, [2] float32."""
    with torch.inference_mode(False):
        wide = x.detach().float()
        return torch.stack([torch.linalg.vector_norm(wide), wide.sum()])
