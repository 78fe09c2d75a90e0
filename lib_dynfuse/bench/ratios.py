"""How much dearer one method is than another, from rounds in which each ran once, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# How often the interval's ends may miss the median.
_MISSED = 0.05


class Ratio(NamedTuple):
    """A median, and two ends between which it lies in 95 of 100 benchmarks (with less than six rounds in fewer)."""

    median: float
    low: float
    high: float


def paired(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """`seconds` over `reference`, round by round.

    What slows a machine down for minutes falls on both times of a round and leaves their ratio alone. The ends are
    order statistics (the sign test's interval), which suppose nothing of how times are distributed.
    """
    found = sorted(mine / other for mine, other in zip(seconds, reference, strict=True))
    left_out = _outside(len(found))
    return Ratio(statistics.median(found), found[left_out], found[-1 - left_out])


def _outside(rounds: int) -> int:
    """How many of the sorted rounds may be left out at either end."""
    ends, missed = 0, 2 / 2**rounds
    while missed <= _MISSED:
        ends += 1
        missed += 2 * math.comb(rounds, ends) / 2**rounds
    # The ends are the `ends`-th values from outside; of few rounds even the outermost ones miss too often.
    return max(0, ends - 1)
