"""Fusion rules that do not look at the features: decided once per layer, or once per layer and step."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.loudness import Limits
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.rules import (
    Look,
    Outcome,
    Pair,
    Rule,
    Selection,
    Strategy,
    energies_of,
    flag,
    lift,
    number,
    of_halves,
    text,
)
from lib_dynfuse.core.types import Row

BOTH = Selection(1.0, 1.0)
SUBJECT = Selection(1.0, 0.0)
STYLE = Selection(0.0, 1.0)
NEITHER = Selection(0.0, 0.0)


class Table(Rule):
    """One selection per layer, looked up; `decide(step, progress)` fills it once per step."""

    def __init__(self, decide: Callable[[int, float], Sequence[Selection]]) -> None:
        self._decide = decide
        self._moment: tuple[int, float] | None = None
        self._row: Sequence[Selection] = ()

    def begin(self, moment: Moment) -> None:
        now = (moment.step, moment.progress)
        if now != self._moment:
            self._row, self._moment = self._decide(*now), now

    def select(self, layer: int, moment: Moment, look: Look, tokens: int = 0) -> Selection:
        return self._row[layer]


def constant(row: Sequence[Selection]) -> Table:
    return Table(lambda step, progress: row)


@dataclass(frozen=True)
class Sum(Strategy):
    name: ClassVar[str] = "sum"
    help: ClassVar[str] = "Adds both, as the WebUI does without this extension."
    source: ClassVar[str] = "the hosts"

    @property
    def outcome(self) -> Outcome:
        return Outcome.NOTHING

    def start(self, pairs: Sequence[Pair]) -> Rule:
        return constant([BOTH] * len(pairs))


@dataclass(frozen=True)
class SumCfg(Strategy):
    """y0 + a d_s + b d_t, b smaller in the negative prompt's half: classifier-free guidance then brings the style out.

    Guidance goes from the negative half's prediction towards the prompt's. What a network adds to both halves alike is
    hardly amplified, what only the prompt's half has is; so the style can be weak enough to leave the subject alone.
    """

    name: ClassVar[str] = "sum-cfg"
    help: ClassVar[str] = "Adds both, the style less in the negative prompt's half, so that CFG brings it out."
    source: ClassVar[str] = "ours"

    subject: float = of_halves("subject", 1.2)
    style: float = of_halves("style", 0.8)
    negative: float = of_halves("negative", 0.5)
    ceiling: float = of_halves("ceiling", 0.0)
    subject_level: float = of_halves("subject_level", 0.0)
    style_level: float = of_halves("style_level", 0.0)
    lift: float = lift(1.0)

    @property
    def outcome(self) -> Outcome:
        return Outcome.WEIGHED

    def start(self, pairs: Sequence[Pair]) -> Rule:
        return _Halves(self.subject, self.style, self.style * self.negative)

    @property
    def limits(self) -> Limits:
        return Limits(self.subject_level, self.style_level, self.lift, self.ceiling)


class _Halves(Rule):
    """The subject's weight, and the style's by the half that a row belongs to; sent to the device when rows change."""

    def __init__(self, subject: float, style: float, negative: float) -> None:
        self._weights = (subject, style, negative)
        self._made: tuple[tuple[Row, ...], torch.device] | None = None
        self._selection = NEITHER

    def begin(self, moment: Moment) -> None:
        made_for = (moment.rows, moment.device)
        if made_for == self._made:
            return
        subject, style, negative = self._weights
        weights = torch.tensor([[subject, style if row.cond else negative] for row in moment.rows])
        self._selection = Selection(*weights.T.contiguous().to(moment.device, non_blocking=True))
        self._made = made_for

    def select(self, layer: int, moment: Moment, look: Look, tokens: int = 0) -> Selection:
        return self._selection


@dataclass(frozen=True)
class NullSpace(Sum):
    """y0 + d_t + dW_c (x - kappa Q Q^T x), kappa = mu / (1 + mu), Q a basis of the row space of the style's A."""

    name: ClassVar[str] = "np"
    help: ClassVar[str] = "Adds both, after taking out of the subject what overlaps with the style's inputs (NP-LoRA)."
    source: ClassVar[str] = "arXiv 2511.11051"

    mu: float = number(0.5, 0.0, 1000.0, "How much of the overlap is taken out: 0 none, large values all of it.")

    def prepare(self, pair: Pair) -> Pair:
        basis = pair.style.rows_basis()
        if basis is None or self.mu == 0:
            return pair
        return pair._replace(subject=pair.subject.project_out(basis, self.mu / (1 + self.mu)))


@dataclass(frozen=True)
class KLora(Strategy):
    """Subject where (S_c / gamma) / (S_s * s(t)) > 1, S the sum of the top rank_c * rank_s absolute entries of B A.

    s(t) = alpha * t + beta, or (alpha * t + beta) mod alpha for the pattern `s*`. Layers whose ratio of L1 norms is at
    least three times the mean are left out of gamma. A layer whose delta depends on the base weight adds both.
    """

    name: ClassVar[str] = "klora"
    help: ClassVar[str] = "Compares the largest entries of the two networks; subject early, style late (K-LoRA)."
    source: ClassVar[str] = "arXiv 2502.18461"

    alpha: float = number(1.5, 0.01, 10.0, "How fast the style gains over the steps.")
    beta: float = number(0.5, 0.0, 10.0, "Where the style starts from; 1.275 is recommended with the pattern s*.")
    pattern: str = text("s", "How the style's weight moves over the steps: s rises, s* rises and wraps.", ("s", "s*"))

    def start(self, pairs: Sequence[Pair]) -> Rule:
        scores = [_top_entries(pair) for pair in pairs]
        gamma = _trimmed_mean([subject_l1 / style_l1 for _, _, subject_l1, style_l1 in filter(None, scores)])
        ratios = [None if score is None else score[0] / (gamma * score[1]) for score in scores]

        def decide(step: int, progress: float) -> list[Selection]:
            style_gain = self.alpha * progress + self.beta
            if self.pattern == "s*":
                style_gain %= self.alpha
            return [BOTH if ratio is None else SUBJECT if ratio > style_gain else STYLE for ratio in ratios]

        return Table(decide)


def _top_entries(pair: Pair) -> tuple[float, float, float, float] | None:
    """(S_c, S_s, L1_c, L1_s) of one layer, None where a delta has no weight of its own, is all zero or not finite."""
    subject, style = pair.subject.dense(), pair.style.dense()
    if subject is None or style is None:
        return None
    subject, style = subject.abs().flatten(), style.abs().flatten()
    k = min(_rank(pair.subject, subject) * _rank(pair.style, style), subject.numel())
    scores = (subject.topk(k).values.sum(), style.topk(k).values.sum(), subject.sum(), style.sum())
    values = tuple(float(score) for score in scores)
    return values if all(0.0 < value < math.inf for value in values) else None  # type: ignore[return-value]


def _rank(delta: Delta, weight: Tensor) -> int:
    return delta.rank or max(1, int(weight.numel() ** 0.5))


def _trimmed_mean(ratios: Sequence[float]) -> float:
    """The mean of the ratios below three times the mean of all."""
    if not ratios:
        return 1.0
    mean = sum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < 3 * mean]
    return sum(kept) / len(kept)


@dataclass(frozen=True)
class Est(Strategy):
    """Subject while |dW_c|_F^2 >= (alpha * t + 1 - disc) * |dW_s|_F^2 * gamma.

    gamma, the ratio of the two networks' whole energies over all shared layers, puts them on one scale.
    """

    name: ClassVar[str] = "est"
    help: ClassVar[str] = "Compares the two networks' energies layer by layer; subject early, style late (EST-LoRA)."
    source: ClassVar[str] = "arXiv 2508.02165"

    alpha: float = number(1.5, 0.0, 10.0, "How fast the style gains over the steps.")
    disc: float = number(0.5, 0.0, 1.0, "The subject's head start.")

    def start(self, pairs: Sequence[Pair]) -> Rule:
        energies = [energies_of(pair) for pair in pairs]
        known = [(subject, style) for subject, style in energies if subject is not None and style is not None]
        style_energy = sum(style for _, style in known)
        gamma = sum(subject for subject, _ in known) / style_energy if style_energy > 0 else 1.0

        def decide(step: int, progress: float) -> list[Selection]:
            style_gain = self.alpha * progress + 1 - self.disc
            return [
                BOTH
                if subject is None or style is None
                else SUBJECT
                if subject >= style_gain * style * gamma
                else STYLE
                for subject, style in energies
            ]

        return Table(decide)


@dataclass(frozen=True)
class Switch(Strategy):
    name: ClassVar[str] = "switch"
    help: ClassVar[str] = "One role at a time for the whole picture, taking turns, subject first (Multi-LoRA Switch)."
    source: ClassVar[str] = "arXiv 2402.16843"

    every: int = number(5, 1, 1000, "Steps before the other role's turn.")

    def start(self, pairs: Sequence[Pair]) -> Rule:
        return Table(lambda step, progress: [(SUBJECT, STYLE)[step // self.every % 2]] * len(pairs))


@dataclass(frozen=True)
class Blocks(Strategy):
    """B-LoRA's division of labour on SDXL: one attention block paints content, the next one style, no other is touched.

    `halves` is ours, for networks without that division (SD1.x, SD2.x): the style has the second half of the decoder,
    the subject everything before it.
    """

    name: ClassVar[str] = "blocks"
    help: ClassVar[str] = "Each role in its own blocks of the network, whatever the picture (B-LoRA)."
    source: ClassVar[str] = "arXiv 2403.14572"

    preset: str = text(
        "auto", "Which blocks: auto takes sdxl for an SDXL network and halves otherwise.", ("auto", "sdxl", "halves")
    )

    def start(self, pairs: Sequence[Pair]) -> Rule:
        names = [pair.name for pair in pairs]
        sdxl = self.preset == "sdxl" or (self.preset == "auto" and any(map(_SDXL_ONLY.search, names)))
        return constant([_b_lora(name) for name in names] if sdxl else _halves(names))


# Only SDXL has ten transformer layers in the first block of its decoder; diffusers' and LDM's names for it.
_SDXL_ONLY = re.compile(r"(up_blocks\.0\.attentions\.0|output_blocks\.0\.1)\.transformer_blocks\.9\.")
_DECODER = re.compile(r"(?:up|output)_blocks\.(\d+)\.")


def _b_lora(name: str) -> Selection:
    if re.search(r"up_blocks\.0\.attentions\.0\.|output_blocks\.0\.1\.", name):
        return SUBJECT
    if re.search(r"up_blocks\.0\.attentions\.1\.|output_blocks\.1\.1\.", name):
        return STYLE
    return NEITHER


def _halves(names: Sequence[str]) -> list[Selection]:
    blocks = [int(match[1]) if (match := _DECODER.search(name)) else -1 for name in names]
    middle = (max(blocks, default=-1) + 1) / 2
    return [STYLE if block >= middle and block >= 0 else SUBJECT for block in blocks]


@dataclass(frozen=True)
class Coin(Strategy):
    """The control that every selection rule has to beat: a fair coin per layer, step and batch item."""

    name: ClassVar[str] = "random"
    help: ClassVar[str] = "Tosses a coin for every layer and step, from the picture's seed: the control."
    source: ClassVar[str] = "ours"

    couple_cfg: bool = flag(False, "One coin for the prompt's and the negative prompt's half of a picture.")

    def start(self, pairs: Sequence[Pair]) -> Rule:
        return _Coins(len(pairs), self.couple_cfg)


class _Coins(Rule):
    """Draws a pass's coins on the host and sends them to the device in one copy."""

    def __init__(self, layers: int, couple: bool) -> None:
        self._layers = layers
        self._couple = couple
        self._heads = torch.empty(0)
        self._tails = torch.empty(0)

    def begin(self, moment: Moment) -> None:
        tosses = []
        for row in moment.rows:
            half = self._couple or row.cond
            bits = random.Random(f"{row.seed}/{moment.step}/{half}").getrandbits(max(1, self._layers))
            tosses.append([bool(bits >> layer & 1) for layer in range(self._layers)])
        self._heads = torch.tensor(tosses, dtype=torch.bool).T.contiguous().to(moment.device, non_blocking=True)
        self._tails = ~self._heads

    def select(self, layer: int, moment: Moment, look: Look, tokens: int = 0) -> Selection:
        return Selection(self._heads[layer], self._tails[layer])
