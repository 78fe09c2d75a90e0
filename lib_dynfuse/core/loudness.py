"""How loud each network may be in a layer: both brought towards a level of their own, the style below a ceiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.running import RunningMeans
from lib_dynfuse.core.types import Row

# Gives the squared lengths of both deltas [2, B, T] and of the layer's own output [B, T] at every token, float32.
Lengths = Callable[[], tuple[Tensor, Tensor]]

# A delta of less than a millionth of the layer's output says nothing of how loud its network is.
_SILENT = 1e-12
_LOUDEST = 1e12


class Limits(NamedTuple):
    """What a strategy wants of both networks' loudness; a loudness is |delta| / |y0|, over the channels of one token
    or over a whole item. 0 leaves it as it is.

    `subject`, `style`: a network whose loudness is above its level is turned down to it, one below is turned up, by at
    most `lift`. Its loudness is the geometric mean over the layers of a picture's first step, of each half by itself,
    and within that step over the layers so far.
    `ceiling`: of the style, token by token: with q its loudness, it is divided by sqrt(1 + (q / ceiling)^2). So it is
    what it was where it is weak, and nowhere louder than `ceiling`.
    """

    subject: float = 0.0
    style: float = 0.0
    lift: float = 1.0
    ceiling: float = 0.0


class _Gains(NamedTuple):
    """What both networks of a pass are multiplied by, [B, 1, 1], and the style's to the power of -2, [B, 1]."""

    subject: Tensor
    style: Tensor
    below: Tensor


class Scaling(Protocol):
    """What both deltas of a layer are multiplied by."""

    def factors(self, items: int, lengths: Lengths) -> tuple[Tensor | None, Tensor]:
        """What to multiply both deltas of a layer by: [B, 1, 1] (None: leave it) and [B, T or 1, 1].

        `items` is B: tiles of one picture follow one another in the batch and share its row. `lengths` is called where
        they are needed. No gradient flows through the factors.
        """


class Held(NamedTuple):
    """The same gains again, for a layer that is computed again."""

    gains: _Gains | None
    ceiling: float

    @torch.no_grad()
    def factors(self, items: int, lengths: Lengths) -> tuple[Tensor | None, Tensor]:
        return _factors(self.gains, lengths() if self.ceiling else None, self.ceiling)


class Loudness:
    """Holds both networks within a strategy's limits, for the life of one `Fusion`."""

    def __init__(self, limits: Limits) -> None:
        self._ceiling = limits.ceiling
        levels = limits.subject, limits.style
        self._levels = torch.tensor([math.log(level) if level else math.inf for level in levels])
        self._lifts = torch.tensor([math.log(limits.lift) if level else 0.0 for level in levels])
        self._means = RunningMeans([0.0, 0.0]) if any(levels) else None
        self._rows: tuple[Row, ...] = ()
        self._known: set[tuple[int, bool]] = set()
        self._heard: set[tuple[int, bool]] = set()
        self._step = -1
        # Rows of this pass whose loudness is still to be heard, [rows, 1]; None where all are known.
        self._new: Tensor | None = None
        self._gains: _Gains | None = None

    @classmethod
    def of(cls, limits: Limits) -> Loudness | None:
        """None where there is nothing to hold."""
        return cls(limits) if limits.subject or limits.style or limits.ceiling else None

    def begin(self, moment: Moment) -> None:
        """Called once at the start of every forward pass, before any layer."""
        if self._means is None:
            return
        if moment.step != self._step:
            self._known |= self._heard
            self._step = moment.step
        if self._levels.device != moment.device:
            self._levels = self._levels.to(moment.device, non_blocking=True)
            self._lifts = self._lifts.to(moment.device, non_blocking=True)
        new = [(row.image, row.cond) not in self._known for row in moment.rows]
        if moment.rows != self._rows or self._new is not None or self._gains is None:
            self._means.lay_out(moment.rows, moment.device)
            self._rows, self._gains = moment.rows, None
            self._new = torch.tensor(new).unsqueeze(1).to(moment.device, non_blocking=True) if any(new) else None

    @torch.no_grad()
    def factors(self, items: int, lengths: Lengths) -> tuple[Tensor | None, Tensor]:
        """See `Scaling`; what a layer of a picture's first step shows is taken in."""
        found = lengths() if self._ceiling or self._new is not None else None
        gains = None if self._means is None else self._gains_now(self._means, found, items)
        return _factors(gains, found, self._ceiling)

    def held(self) -> Held:
        """What the layer before was multiplied by."""
        return Held(self._gains, self._ceiling)

    def _gains_now(self, means: RunningMeans, lengths: tuple[Tensor, Tensor] | None, items: int) -> _Gains:
        """What both networks are multiplied by, by what was heard of them so far."""
        if self._new is not None and lengths is not None:
            squares, base = lengths
            rows = len(self._rows)
            loud = squares.view(2, rows, -1).sum(2).T
            ratio = loud / base.view(rows, -1).sum(1, keepdim=True).clamp_min_(1e-20)
            heard = (ratio > _SILENT) & self._new
            means.update(ratio.clamp_(_SILENT, _LOUDEST).log_().mul_(0.5), heard)
            self._heard.update((row.image, row.cond) for row in self._rows)
            self._gains = None
        if self._gains is None or self._gains.style.shape[0] != items:
            logs = torch.minimum(self._levels - means.now, self._lifts)
            tiles = items // len(self._rows)
            subject, style = (logs if tiles == 1 else logs.repeat_interleave(tiles, 0)).unbind(1)
            self._gains = _Gains(
                subject.exp()[:, None, None], style.exp()[:, None, None], style.mul(-2.0).exp_()[:, None]
            )
        return self._gains


def _factors(
    gains: _Gains | None, lengths: tuple[Tensor, Tensor] | None, ceiling: float
) -> tuple[Tensor | None, Tensor]:
    """See `Scaling.factors`."""
    subject, style = (None, None) if gains is None else (gains.subject, gains.style)
    if not ceiling or lengths is None:
        assert style is not None, "there is something to hold"
        return subject, style
    # g / sqrt(1 + (g q / ceiling)^2) with q = |d| / |y0|. No length of a base output is zero but where there is
    # nothing to see.
    squares, base = lengths[0][1], lengths[1].clamp_min(1e-20)
    if gains is None:
        below = squares.div(base).mul_(ceiling**-2).add_(1.0)
    else:
        below = torch.addcdiv(gains.below, squares, base, value=ceiling**-2)
    return subject, below.rsqrt_().unsqueeze(-1)
