"""What every fusion rule is made of: the description a person chooses, and the rule that runs."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.loudness import Limits
from lib_dynfuse.core.moment import Moment
from lib_dynfuse.core.packed import Product

Weight = float | Tensor
# For the subject's delta and the style's: a number for each batch item.
Largest = tuple[list[float], list[float]]


class Features(NamedTuple):
    """What the divergence rules look at: `base` is y0, the other two are the deltas d_s and d_t, of `n` tokens.

    Token-major [n, C] with `dim` -1, or in a convolution's memory order [C, n] with `dim` 0. They are of `items` whole
    batch items, or of a part of one. Where kernels compute with deltas that are never written, base is [B, T, C].
    `both` is the two deltas in one tensor, [2, n, C] or [2, C, n], where they lie in one. `largest` has, for either
    delta and each item, a number that none of its values is above, where that is known without looking.
    """

    base: Tensor
    subject: Tensor | Product
    style: Tensor | Product
    dim: int
    items: int = 1
    both: Tensor | None = None
    largest: Largest | None = None

    def each(self) -> Iterator[Features]:
        """Every item by itself; token-major features only."""
        parts = (one.chunk(self.items) for one in (self.base, self.subject, self.style) if isinstance(one, Tensor))
        for item, (base, subject, style) in enumerate(zip(*parts, strict=True)):
            largest = None if self.largest is None else ([self.largest[0][item]], [self.largest[1][item]])
            yield Features(base, subject, style, self.dim, largest=largest)

    def parts(self, elements: int) -> Iterator[Features]:
        """Some tokens after others, of at most so many numbers of the base each; all at once where they are few, and
        where the deltas are never written."""
        if isinstance(self.subject, Product) or isinstance(self.style, Product) or self.base.numel() <= elements:
            yield self
            return
        size, along = max(1, elements // self.base.shape[self.dim]), 0 if self.dim == -1 else 1
        parts = (one.split(size, along) for one in (self.base, self.subject, self.style))
        for base, subject, style in zip(*parts, strict=True):
            yield Features(base, subject, style, self.dim)


# Called with how many tokens of each row to look at, 0 for all, the rows, None for all, and whether the selection will
# add some of both roles whatever is seen. Gives them in stretches: row by row, token by token.
Look = Callable[[int, "tuple[int, ...] | None", bool], Iterable[Features]]


class Selection(NamedTuple):
    """How much of each role's delta a layer gets: a number, [B] per batch item, or [B, T] per token.

    Boolean tensors mean one or the other. The divergences [B] are there for the trace.
    """

    subject: Weight
    style: Weight
    d_subject: Tensor | None = None
    d_style: Tensor | None = None


class Pair(NamedTuple):
    """A covered layer (or one part of a fused layer) on which both roles have something to say."""

    name: str
    subject: Delta
    style: Delta


def energies_of(pair: Pair) -> tuple[float, float] | tuple[None, None]:
    """|dW|_F^2 of both roles; None where a delta has no weight of its own, or one that is no number."""
    subject, style = pair.subject.frobenius_sq(), pair.style.frobenius_sq()
    if subject is None or style is None or not (math.isfinite(subject) and math.isfinite(style)):
        return None, None
    return subject, style


class Rule(Protocol):
    """A strategy at work, for the life of one `Fusion`."""

    def begin(self, moment: Moment) -> None:
        """Called once at the start of every forward pass, before any layer."""

    def select(self, layer: int, moment: Moment, look: Look, tokens: int = 0) -> Selection:
        """The weights for pair number `layer`, where every row has so many tokens; rules that do not depend on the
        input never call `look`."""


class Outcome(Enum):
    """What a rule's weights mean, for whoever tells a person of them."""

    NOTHING = "nothing"
    """Both deltas are added whole: there is nothing to tell."""
    CHOSEN = "chosen"
    """A layer is one role's or the other's."""
    WEIGHED = "weighed"
    """A layer gets some of both."""


@dataclass(frozen=True)
class Strategy(ABC):
    """A fusion rule and its parameters (docs/method.md, section 2)."""

    name: ClassVar[str]
    help: ClassVar[str]
    source: ClassVar[str]

    @property
    def outcome(self) -> Outcome:
        """What its weights mean."""
        return Outcome.CHOSEN

    @property
    def limits(self) -> Limits:
        """How loud both networks may be, before anything is decided."""
        return Limits()

    def prepare(self, pair: Pair) -> Pair:
        """A chance to change the deltas once, before the first forward pass."""
        return pair

    @abstractmethod
    def start(self, pairs: Sequence[Pair]) -> Rule:
        """The rule that will decide for `pairs`, in the order in which the model was covered."""


def number(default: float, minimum: float, maximum: float, help: str) -> Any:
    """A numeric parameter of a strategy; whole where `default` is an int."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "maximum": maximum, "help": help})


def flag(default: bool, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def text(default: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


# What the rules have in common that treat the two halves of classifier-free guidance unlike: (most, help).
_OF_HALVES = {
    "subject": (4.0, "How much of the subject is added."),
    "style": (4.0, "How much of the style is added in the prompt's half."),
    "negative": (2.0, "The share of that in the negative prompt's half; 1 makes no difference."),
    "ceiling": (10.0, "Presses the style down where it is louder than this share of a layer's output; 0: nowhere."),
    "subject_level": (10.0, "The share of a layer's output that the subject is brought to on average; 0: as it is."),
    "style_level": (10.0, "The share of a layer's output that the style is brought to on average; 0: as it is."),
}


def of_halves(name: str, default: float) -> Any:
    """One of their parameters."""
    most, help = _OF_HALVES[name]
    return number(default, 0.0, most, help)


def lift(default: float) -> Any:
    """How far they turn a network up towards its level."""
    return number(default, 1.0, 4.0, "How many times louder a network is made at most to reach its level.")
