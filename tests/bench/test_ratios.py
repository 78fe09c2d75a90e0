"""How sure a ratio is: rounds are paired, and the interval's ends are what the sign test says."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_dynfuse.bench.ratios import paired


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    speeds = [1.0, 1.5, 3.0, 0.5, 2.0, 1.1, 1.2]
    found = paired([1.25 * speed for speed in speeds], speeds)
    assert found == pytest.approx((1.25, 1.25, 1.25))


@pytest.mark.parametrize(
    ("rounds", "left_out"),
    # The textbook's table of the sign test's intervals, 95 %.
    [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5), (25, 7), (50, 17)],
)
def test_the_ends_are_the_sign_tests(rounds: int, left_out: int) -> None:
    values = [float(value) for value in range(1, rounds + 1)]
    found = paired(random.Random(0).sample(values, rounds), [1.0] * rounds)
    assert found == (statistics.median(values), values[left_out], values[-1 - left_out])


@given(rounds=st.integers(6, 60))
def test_the_interval_misses_at_most_one_time_in_twenty_and_is_no_wider(rounds: int) -> None:
    found = paired([float(value) for value in range(rounds)], [1.0] * rounds)
    beyond = int(found.low)

    def missed(beyond: int) -> float:
        return 2 * sum(math.comb(rounds, below) for below in range(beyond + 1)) / 2**rounds

    assert missed(beyond) <= 0.05 < missed(beyond + 1)


def test_rounds_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])
