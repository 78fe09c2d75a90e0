"""Fusion rules that look at the features: the paper's selection by KL divergence, and its relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lib_dynfuse.core import devices
from lib_dynfuse.core.divergence import Divergence, cosine_distance, js_divergence
from lib_dynfuse.core.kl_pair import kl_pair
from lib_dynfuse.core.loudness import Limits
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.rules import (
    Features,
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
)
from lib_dynfuse.core.running import RunningMeans
from lib_dynfuse.core.types import Row
from lib_dynfuse.core.workspace import Workspace

# Divergences below this are rounding; it keeps their logarithms finite.
_FLOOR = 1e-20


# Elements of a stretch that are looked at together where that takes scratch memory of ten times as many.
_PART = 1 << 20


@dataclass(frozen=True)
class DivergenceStrategy(Strategy):
    """Whichever role moves a layer's features further wins the layer (arXiv 2602.15539; docs/method.md, section 1).

    The rule compares a margin with zero, per batch item or per token:

        margin = log D_s - log D_t - [auto_balance] running mean of that difference + log((1 - b) / (1 + b))
        b = clamp(balance - schedule * (1 - 2 * progress), -1, 1)

    Ties go to the subject.
    """

    per_token: ClassVar[bool] = False

    balance: float = number(
        0.0,
        -1.0,
        1.0,
        "-1 lets the subject win every layer, +1 the style, 0 favours neither; the rule says what the loser keeps.",
    )
    auto_balance: bool = flag(
        False, "Evens out strengths: a louder network does not win everywhere, only where it is louder than usual."
    )
    schedule: float = number(
        0.0, -1.0, 1.0, "Above 0 leans to the subject in early steps and to the style in late ones; below 0 reversed."
    )
    couple_cfg: bool = flag(False, "The prompt's half decides for the negative prompt's half too.")
    temperature: float = number(
        1.0, 0.01, 100.0, "Of the softmax over channels; higher looks at more channels, lower at the strongest."
    )
    standardise: bool = flag(False, "Measures features in their own standard deviations before the softmax.")
    decide_every: int = number(1, 1, 100, "Steps before a layer decides again; between them it keeps its choice.")

    @property
    def sampled(self) -> int:
        """How many tokens of a layer are looked at, 0 for all of them."""
        return 0

    @property
    def adds_both(self) -> bool:
        """Whether a layer may get some of both roles, so that both products are needed whatever wins."""
        return self.per_token

    @property
    def outcome(self) -> Outcome:
        return Outcome.WEIGHED if self.adds_both and not self.per_token else Outcome.CHOSEN

    @property
    def style_in_negative(self) -> float:
        """What the style's weight is multiplied by in the negative prompt's half."""
        return 1.0

    def divergences(self, features: Features, work: Workspace) -> Tensor:
        """(D_s, D_t) per token, [2, ...] float32."""
        if not self.standardise:
            return self.criterion(features, work)
        return torch.cat([self.criterion(_standardised(part), work) for part in features.parts(_PART)], 1)

    def criterion(self, features: Features, work: Workspace) -> Tensor:
        return kl_pair(features, self.temperature, work)

    def choose(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """(subject's weight, style's weight) from the margin, of its shape."""
        subject = margin >= 0
        return subject, ~subject

    def start(self, pairs: Sequence[Pair]) -> Rule:
        return _DivergenceRule(self, pairs)


@dataclass(frozen=True)
class _PerItem(DivergenceStrategy):
    sample_tokens: int = number(
        0, 0, 4096, "Look at this many tokens of a layer, evenly spread, to decide; 0 looks at all of them."
    )

    @property
    def sampled(self) -> int:
        return self.sample_tokens


@dataclass(frozen=True)
class KLItem(_PerItem):
    name: ClassVar[str] = "kl"
    help: ClassVar[str] = "Each layer goes to the role that moves its features further, judged anew at every step."
    source: ClassVar[str] = "arXiv 2602.15539"


@dataclass(frozen=True)
class KLSoft(_PerItem):
    """y0 + w d_s + (1 - w) d_t, w = softmax(log D / softness): softness -> 0 is `kl`."""

    name: ClassVar[str] = "kl-soft"
    help: ClassVar[str] = "Like kl, but mixes the two by how far each moves the features instead of switching."
    source: ClassVar[str] = "ours"

    softness: float = number(1.0, 0.01, 10.0, "How gradual the mixing is; small values switch like kl.")

    @property
    def adds_both(self) -> bool:
        return True

    def choose(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        subject = torch.sigmoid(margin / self.softness)
        return subject, 1 - subject


@dataclass(frozen=True)
class KLToken(DivergenceStrategy):
    name: ClassVar[str] = "kl-token"
    help: ClassVar[str] = "Like kl, but every place of the picture decides for itself."
    source: ClassVar[str] = "ours, after arXiv 2508.11624"
    per_token: ClassVar[bool] = True


@dataclass(frozen=True)
class KLCfg(_PerItem):
    """y0 + a w_s g_s d_s + b w_t p g_t d_t, w = 1 for the winner of `kl` and `loser` for the other one.

    g = min(lift, level / m), m the geometric mean of |d| / |y0| over the layers of the first step: a network that is
    louder than its level is turned down to it; with `lift` above 1 one that is quieter is turned up.
    p = 1 / sqrt(1 + (|g_t d_t| / (ceiling |y0|))^2) for every token: a style that is louder than the layer itself
    covers the subject. In the negative prompt's half b is smaller, as in `sum-cfg`: guidance goes from that half's
    prediction towards the prompt's and brings out what only the latter has.
    """

    name: ClassVar[str] = "kl-cfg"
    help: ClassVar[str] = (
        "Adds both, less of the one that kl would drop; turns each down to a loudness of its own where it is louder, "
        "presses a loud style down, and gives the negative prompt's half less of it."
    )
    source: ClassVar[str] = "ours"

    loser: float = number(0.5, 0.0, 1.0, "What the role keeps that moves a layer's features less: 0 switches like kl.")
    subject: float = of_halves("subject", 1.1)
    style: float = of_halves("style", 1.4)
    negative: float = of_halves("negative", 0.4)
    ceiling: float = of_halves("ceiling", 0.35)
    subject_level: float = of_halves("subject_level", 0.1)
    style_level: float = of_halves("style_level", 0.28)
    lift: float = lift(1.0)

    def choose(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        wins = margin >= 0
        subject = torch.where(wins, self.subject, self.subject * self.loser)
        return subject, torch.where(wins, self.style * self.loser, self.style)

    @property
    def adds_both(self) -> bool:
        return self.loser > 0

    @property
    def style_in_negative(self) -> float:
        return self.negative

    @property
    def limits(self) -> Limits:
        return Limits(self.subject_level, self.style_level, self.lift, self.ceiling)


@dataclass(frozen=True)
class JensenShannon(_PerItem):
    name: ClassVar[str] = "js"
    help: ClassVar[str] = "Like kl, with the symmetric Jensen-Shannon divergence."
    source: ClassVar[str] = "arXiv 2602.15539, ablation"

    def criterion(self, features: Features, work: Workspace) -> Tensor:
        return _role_by_role(partial(js_divergence, temperature=self.temperature), features)


@dataclass(frozen=True)
class Cosine(_PerItem):
    name: ClassVar[str] = "cosine"
    help: ClassVar[str] = "Like kl, by the angle between the features with and without the network."
    source: ClassVar[str] = "arXiv 2602.15539, ablation"

    def criterion(self, features: Features, work: Workspace) -> Tensor:
        return _role_by_role(cosine_distance, features)


def _standardised(features: Features) -> Features:
    base, subject, style, dim, items, *_ = features
    spread = base.float().std(dim, keepdim=True, unbiased=False).clamp_min(1e-12)
    return Features(base / spread, subject / spread, style / spread, dim, items)


def _role_by_role(divergence: Divergence, features: Features) -> Tensor:
    """[2, ...]: a divergence that compares one delta with the base, of both."""
    found = [
        torch.stack([divergence(part.base, delta, dim=part.dim) for delta in (part.subject, part.style)])
        for part in features.parts(_PART)
    ]
    return torch.cat(found, 1)


class _DivergenceRule(Rule):
    def __init__(self, strategy: DivergenceStrategy, pairs: Sequence[Pair]) -> None:
        self._strategy = strategy
        self._work = Workspace()
        # The mean log ratio starts from what the networks' weights alone would predict, counted as one forward pass's
        # decisions, so that the first layers are not judged against themselves.
        prior = _log_energy_ratio(pairs) if strategy.auto_balance else 0.0
        self._usual = RunningMeans([prior], len(pairs))
        # For `decide_every`: a layer's last selection for a batch, the step it was made in, and of how many tokens.
        self._kept: dict[tuple[int, tuple[Row, ...]], tuple[int, int, Selection]] = {}
        # For `couple_cfg` where a host runs the halves apart: a layer's last margin for a picture's cond half.
        self._conds: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self._bias = 0.0
        # The style's share by the half that a row belongs to, where it is not the same in both.
        self._shares: Tensor | None = None
        self._shares_of: tuple[tuple[Row, ...], torch.device] | None = None

    def begin(self, moment: Moment) -> None:
        if self._strategy.style_in_negative != 1.0 and (moment.rows, moment.device) != self._shares_of:
            shares = torch.tensor([1.0 if row.cond else self._strategy.style_in_negative for row in moment.rows])
            self._shares, self._shares_of = shares.to(moment.device, non_blocking=True), (moment.rows, moment.device)
        lean = self._strategy.balance - self._strategy.schedule * (1 - 2 * moment.progress)
        self._bias = _log_odds(max(-1.0, min(1.0, lean)))
        judged = tuple(moment.rows[row] for row in moment.deciders) if self._strategy.couple_cfg else moment.rows
        if self._strategy.auto_balance:
            self._usual.lay_out(judged, moment.device)

    def select(self, layer: int, moment: Moment, look: Look, tokens: int = 0) -> Selection:
        strategy = self._strategy
        every = strategy.decide_every
        kept = self._kept.get((layer, moment.rows)) if every > 1 else None
        # A prompt that changes in length under way changes the tokens of the layers that read it.
        as_many = kept is not None and (kept[1] == tokens or not strategy.per_token)
        if kept is not None and as_many and kept[0] // every == moment.step // every:
            return kept[2]
        # Where cond decides for uncond, the uncond rows are not even looked at.
        deciders = moment.deciders if strategy.couple_cfg else None
        rows = len(moment.rows if deciders is None else deciders)
        # No name holds on to a stretch's features while the next one's are computed.
        found = list(
            map(partial(strategy.divergences, work=self._work), look(strategy.sampled, deciders, strategy.adds_both))
        )
        # [2, B, T]. Tiles of one picture follow one another in the batch, so that they fold into its row.
        per_token = (torch.cat(found, 1) if len(found) > 1 else found[0]).view(2, rows, -1)
        per_item = _means(per_token)
        ratio = _log_ratio(per_item)
        margin = _log_ratio(per_token) if strategy.per_token else ratio
        if strategy.auto_balance:
            # A layer on which one role is silent says nothing of how loud the two are and is left out.
            heard = per_item.amin(0) > _FLOOR
            offset = self._usual.update(ratio.unsqueeze(1), heard.unsqueeze(1)).squeeze(1)
            margin = margin - (offset.unsqueeze(1) if strategy.per_token else offset)
        if self._bias:
            margin = margin + self._bias
        if strategy.couple_cfg:
            margin = self._from_other_batches(layer, margin, moment)
        if rows < len(moment.rows):
            everyone = moment.indices(moment.decided_by)
            margin, per_item = margin.index_select(0, everyone), per_item.index_select(1, everyone)
        subject, style = strategy.choose(margin)
        if self._shares is not None:
            style = style * self._shares.view(-1, *(1 for _ in style.shape[1:]))
        selection = Selection(subject, style, per_item[0], per_item[1])
        if every > 1:
            self._kept[layer, moment.rows] = (moment.step, tokens, selection)
        return selection

    def _from_other_batches(self, layer: int, margin: Tensor, moment: Moment) -> Tensor:
        """Gives uncond rows that stand alone their picture's cond margin of the last batch that had it.

        Where a host runs the halves in separate calls, uncond first, that is the step before; the very first uncond
        call decides for itself.
        """
        if moment.split:
            for place, row in moment.cond_rows.items():
                self._conds[layer, place] = margin[moment.decided_by[row]]
        if not self._conds:
            return margin
        rows = list(margin.unbind())
        for index, row in enumerate(moment.deciders):
            cond = None if moment.rows[row].cond else self._conds.get((layer, moment.rows[row].place))
            # Another length of prompt is another number of tokens: nothing to take over.
            if cond is not None and cond.shape == rows[index].shape:
                rows[index] = cond
        return torch.stack(rows)


def _means(per_token: Tensor) -> Tensor:
    """[2, B] of [2, B, T]; on a CPU one by one, whose threads share two long sums in another way than one."""
    if devices.readable(per_token.device):
        return torch.stack([role.mean(1) for role in per_token])
    return per_token.mean(2)


def _log_ratio(both: Tensor) -> Tensor:
    """log D_s - log D_t of [2, ...] with a floor; a divergence that is not a number counts as none."""
    subject, style = both.nan_to_num(0.0).clamp_min_(_FLOOR).log_().unbind()
    return subject - style


def _log_odds(lean: float) -> float:
    if abs(lean) == 1.0:
        return -math.inf * lean
    return math.log((1 - lean) / (1 + lean))


def _log_energy_ratio(pairs: Sequence[Pair]) -> float:
    """log of |dW_s|_F^2 / |dW_t|_F^2 over all pairs: for small deltas a divergence grows with the delta's square."""
    energies = map(energies_of, pairs)
    known = [(a, b) for a, b in energies if a is not None and b is not None]
    subject, style = sum(a for a, _ in known), sum(b for _, b in known)
    return math.log(subject / style) if subject > 0 and style > 0 else 0.0
