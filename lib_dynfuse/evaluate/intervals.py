"""Means over pairs and seeds with their 95 % intervals, by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lib_dynfuse.evaluate.store import Row

Array = npt.NDArray[np.float64]
DRAWS = 4000


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def cube(rows: Sequence[Row], methods: Sequence[str], pairs: Sequence[str], seeds: int, measure: str) -> Array:
    """[methods, pairs, seeds] of one measure. Raises KeyError where a picture is missing."""
    values = {row.key: row.values[measure] for row in rows}
    found = [[[values[pair, method, seed] for seed in range(seeds)] for pair in pairs] for method in methods]
    return np.array(found, dtype=float)


def draws(pairs: int, seeds: int, number: int = DRAWS) -> tuple[Array, Array]:
    """How often each pair and each seed is drawn: [number, pairs] and [number, seeds], with repetition, by chance.

    The same for every measure and every method, which is what pairs them; from a fixed start, so that the same rows
    give the same interval.
    """
    generator = np.random.default_rng(0)
    return (
        generator.multinomial(pairs, [1 / pairs] * pairs, number).astype(float),
        generator.multinomial(seeds, [1 / seeds] * seeds, number).astype(float),
    )


def resampled(values: Array, drawn: tuple[Array, Array]) -> Array:
    """values [methods, pairs, seeds] -> [methods, draws]: the mean over pairs and seeds in each draw."""
    by_pair, by_seed = drawn
    total = np.einsum("mps,np,ns->mn", values, by_pair, by_seed, optimize=True)
    return np.asarray(total / (values.shape[1] * values.shape[2]))


def estimates(values: Array, drawn: tuple[Array, Array]) -> list[Estimate]:
    """Each method's mean with its interval: the middle 95 % of the draws."""
    return _estimates(values.mean((1, 2)), resampled(values, drawn))


def differences(values: Array, drawn: tuple[Array, Array], against: int) -> list[Estimate]:
    """Each method's mean minus that of the method in place `against`, in the same draws."""
    means, samples = values.mean((1, 2)), resampled(values, drawn)
    return _estimates(means - means[against], samples - samples[against])


def _estimates(means: Array, samples: Array) -> list[Estimate]:
    lows, highs = np.percentile(samples, [2.5, 97.5], axis=1)
    return [Estimate(float(m), float(low), float(high)) for m, low, high in zip(means, lows, highs, strict=True)]
