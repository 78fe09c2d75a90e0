"""Tensors to compute with, and pairs of deltas, moments and features for the tests of fusion rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.core import Row, strategies, strategy
from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.core.divergence import kl_divergence
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.rules import Features, Pair, Rule, Selection
from lib_dynfuse.core.rules_divergence import DivergenceStrategy

CPU = torch.device("cpu")
DIVERGENCE_RULES = [name for name in strategies() if isinstance(strategy(name), DivergenceStrategy)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def same(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def low_rank(seed: int, size: float = 1.0, rank: int = 2, inputs: int = 6, outputs: int = 5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    return LowRank(down, torch.randn(outputs, rank, generator=generator) * size)


def pairs(sizes: list[tuple[float, float]], names: list[str] | None = None) -> list[Pair]:
    """One pair per (subject's size, style's size); the same two random deltas at different sizes."""
    names = names or [f"layer.{index}" for index in range(len(sizes))]
    return [
        Pair(name, low_rank(1, subject), low_rank(2, style))
        for name, (subject, style) in zip(names, sizes, strict=True)
    ]


def moment(step: int = 0, total: int = 10, rows: list[Row] | None = None) -> Moment:
    return Moment(step, step / (total - 1), tuple(rows or [Row(0)]), CPU)


def never(sampled: int, rows: tuple[int, ...] | None) -> Iterator[Features]:
    raise AssertionError("this rule does not look at the input")


def choices(rule: Rule, layers: int, now: Moment) -> str:
    """Who gets each layer: c for subject, s for style, + for both, - for neither."""
    rule.begin(now)
    found = [rule.select(layer, now, never) for layer in range(layers)]
    letters = {(1.0, 0.0): "c", (0.0, 1.0): "s", (1.0, 1.0): "+", (0.0, 0.0): "-"}
    return "".join(letters[one.subject, one.style] for one in found)  # type: ignore[index]


class Scene:
    """Features of `items` batch items in which the subject's delta has size `subject`, the style's `style`."""

    def __init__(self, subject: float, style: float, items: int = 1, tokens: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = (items, tokens)
        self.base = torch.randn(items * tokens, 16, generator=generator)
        self.subject = torch.randn(items * tokens, 16, generator=generator) * subject
        self.style = torch.randn(items * tokens, 16, generator=generator) * style
        self.asked: list[int] = []
        self.looked_at: list[int] = []

    def look(self, sampled: int, rows: tuple[int, ...] | None, both: bool = False) -> Iterator[Features]:
        self.asked.append(sampled)
        tokens = self.shape[1]
        for row in range(self.base.shape[0] // tokens) if rows is None else rows:
            self.looked_at.append(row)
            part = slice(row * tokens, (row + 1) * tokens)
            yield Features(self.base[part], self.subject[part], self.style[part], -1)

    def divergences(self) -> tuple[Tensor, Tensor]:
        found = (kl_divergence(self.base, delta) for delta in (self.subject, self.style))
        first, second = (one.view(self.shape) for one in found)
        return first, second


def select(name: str, scene: Scene, now: Moment | None = None, **parameters: Any) -> Selection:
    now = now or moment(rows=[Row(image) for image in range(scene.shape[0])])
    rule = strategy(name, **parameters).start(pairs([(1.0, 1.0)]))
    rule.begin(now)
    return rule.select(0, now, scene.look)


def subjects_share(name: str, selection: Selection) -> Tensor:
    """How far a layer leans to the subject: 1 where it is all the subject's, 0 where it is all the style's.

    kl-cfg leaves the loser a share of its own weight.
    """
    rule = strategy(name)
    full, loser = getattr(rule, "subject", 1.0), getattr(rule, "loser", 0.0)
    return (torch.as_tensor(selection.subject).float() / full - loser) / (1 - loser)
