"""A fused layer taken apart: the parts add up to the whole, and keep the form that makes them cheap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import rand, same
from torch import Tensor

from lib_dynfuse.core import Role
from lib_dynfuse.core.delta import (
    Decomposed,
    Delta,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    OutputScale,
    Rows,
    Scaled,
    Shift,
    Sum,
)
from lib_dynfuse.core.parts import divided, stretches

BOUNDS = [5, 6, 11]


def pair(b: int, d: int, *kernel: int) -> LowRank:
    return LowRank(rand(2, d, *kernel), rand(b, 2), None, Geometry() if kernel else None)


KINDS: dict[str, Callable[[], Delta]] = {
    "LowRank": lambda: LowRank(rand(2, 6), rand(12, 2)),
    "Scaled": lambda: Scaled(0.3, LowRank(rand(2, 6), rand(12, 2))),
    "Dense": lambda: Dense(rand(12, 6), rand(12)),
    "Decomposed": lambda: Decomposed(LowRank(rand(2, 6), rand(12, 2)), rand(12).abs(), rand(12, seed=1).abs()),
    "Sum": lambda: Sum(LowRank(rand(2, 6), rand(12, 2)), Shift(rand(12))),
    "one part": lambda: Rows(LowRank(rand(2, 6), rand(4, 2)), 4, 8, 12),
    "Kronecker, blocks of 1": lambda: Kronecker(rand(12, 6), rand(1, 1)),
    "Kronecker, blocks of 3": lambda: Kronecker(rand(4, 2), rand(3, 3)),
    "Kronecker, blocks of 4": lambda: Kronecker(rand(3, 3), pair(4, 2)),
    "Kronecker, one block": lambda: Kronecker(rand(1, 2), pair(12, 3)),
    "Kronecker of a convolution": lambda: Kronecker(rand(4, 2), rand(3, 3, 3, 3), Geometry(padding=(1, 1))),
}


def example(delta: Delta) -> tuple[Tensor, Tensor]:
    return (rand(2, 6, 4, 4), rand(2, 12, 4, 4)) if delta.channel_dim == 1 else (rand(2, 5, 6), rand(2, 5, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_a_divided_delta_adds_what_the_whole_one_adds(kind: str) -> None:
    whole = KINDS[kind]()
    x, y = example(whole)
    same(divided(whole, BOUNDS)(x, y), whole(x, y))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("Kronecker")])
def test_every_stretch_of_a_kronecker_product_is_one(kind: str) -> None:
    whole = KINDS[kind]()
    x, y = example(whole)
    expected = whole(x, y)
    for start in range(12):
        for stop in range(start + 1, 13):
            cut = next(
                one.deltas[Role.STYLE]
                for one in stretches({Role.STYLE: whole, Role.SUBJECT: Rows(Shift(rand(stop - start)), start, stop)})
                if one.start == start
            )
            assert not any(isinstance(one, Dense) for one in [cut, *cut.parts])
            dim = whole.channel_dim
            same(cut(x, y.narrow(dim, start, stop - start)), expected.narrow(dim, start, stop - start))


def test_a_layer_is_decided_between_the_bounds() -> None:
    deltas = {role: divided(KINDS[kind](), BOUNDS) for role, kind in zip(Role, ("LowRank", "one part"), strict=True)}
    found = [(one.start, one.stop, set(one.deltas)) for one in stretches(deltas)]
    one, both = {Role.SUBJECT}, set(Role)
    assert found == [(0, 4, one), (4, 5, both), (5, 6, both), (6, 8, both), (8, 11, one), (11, 12, one)]


def test_a_kind_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="covers the whole layer by a OutputScale"):
        divided(OutputScale(rand(12)), BOUNDS)
