"""How loud each network may be in a layer: both brought towards a level of their own, the style below a ceiling."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.running import RunningMeans

# A delta of less than a millionth of the layer's output says nothing of how loud its network is.
_SILENT = 1e-12
_LOUDEST = 1e12


class Limits(NamedTuple):
    """What a strategy wants of both networks' loudness; a loudness is |delta| / |y0|, over the channels of one token
    or over a whole item. 0 leaves it as it is.

    `subject`, `style`: a network whose mean loudness over the layers is above its level is turned down to it, one below
    is turned up, by at most `lift`. The mean is geometric and runs over the generation, for every picture and half.
    `ceiling`: of the style, token by token: with q its loudness, it is divided by sqrt(1 + (q / ceiling)^2). So it is
    what it was where it is weak, and nowhere louder than `ceiling`.
    """

    subject: float = 0.0
    style: float = 0.0
    lift: float = 1.0
    ceiling: float = 0.0


class Loudness:
    """Holds both networks within a strategy's limits, for the life of one `Fusion`."""

    def __init__(self, limits: Limits) -> None:
        self._ceiling = limits.ceiling
        levels = limits.subject, limits.style
        self._levels = torch.tensor([math.log(level) if level else math.inf for level in levels])
        self._lifts = torch.tensor([math.log(limits.lift) if level else 0.0 for level in levels])
        self._means = RunningMeans([0.0, 0.0]) if any(levels) else None
        self._rows = 0

    @classmethod
    def of(cls, limits: Limits) -> Loudness | None:
        """None where there is nothing to hold."""
        return cls(limits) if limits.subject or limits.style or limits.ceiling else None

    def begin(self, moment: Moment) -> None:
        """Called once at the start of every forward pass, before any layer."""
        if self._means is None:
            return
        self._rows = len(moment.rows)
        self._means.lay_out(moment.rows, moment.device)
        if self._levels.device != moment.device:
            self._levels = self._levels.to(moment.device, non_blocking=True)
            self._lifts = self._lifts.to(moment.device, non_blocking=True)

    @torch.no_grad()
    def factors(self, squares: Tensor, base: Tensor) -> tuple[Tensor | None, Tensor]:
        """What to multiply both deltas of a layer by: [B, 1, 1] (None: leave it) and [B, T or 1, 1].

        `squares` [2, B, T] and `base` [B, T]: the squared lengths of both deltas and of the layer's own output at every
        token, float32. Tiles of one picture follow one another in the batch and share its row. No gradient flows
        through the factors.
        """
        if self._means is None:
            return None, self._pressed(squares[1], base)
        subject, style = self._gains(self._means, squares, base)
        if not self._ceiling:
            return subject, style
        return subject, self._pressed(squares[1] * style.square().squeeze(-1), base).mul_(style)

    def _pressed(self, squares: Tensor, base: Tensor) -> Tensor:
        # No length of a base output is zero but where there is nothing to see.
        below = base.mul(self._ceiling**2).clamp_min_(1e-20)
        return squares.div(below).add_(1.0).rsqrt_().unsqueeze(-1)

    def _gains(self, means: RunningMeans, squares: Tensor, base: Tensor) -> Tensor:
        """Both networks' gains, [2, B, 1, 1], by what was heard of them up to this layer."""
        loud = squares.view(2, self._rows, -1).sum(2).T
        whole = base.view(self._rows, -1).sum(1, keepdim=True)
        ratio = loud / whole.clamp_min_(1e-20)
        heard = ratio > _SILENT
        mean = means.update(ratio.clamp_(_SILENT, _LOUDEST).log_().mul_(0.5), heard)
        gains = torch.minimum(self._levels - mean, self._lifts).exp_().T
        if base.shape[0] != self._rows:
            gains = gains.repeat_interleave(base.shape[0] // self._rows, 1)
        return gains[..., None, None]
