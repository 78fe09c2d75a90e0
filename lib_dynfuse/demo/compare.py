"""The fusion rules side by side on the boxed model: the same prompts and seeds for each, judged by the boxed judges."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.demo.loras import file_name
from lib_dynfuse.demo.split import JUDGED_AS, STYLE_WORDS, caption
from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.objectives import Each
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.guides import prepare
from lib_dynfuse.hosts.diffusers import default_device
from lib_dynfuse.options import Options
from lib_dynfuse.trace import Record, Trace

Z95 = 1.959964


class Method(NamedTuple):
    """One column of the sheet: which LoRAs are in the prompt, and how they are fused."""

    label: str
    subject: bool = True
    style: bool = True
    options: Options = Options(enabled=False)

    @property
    def guided(self) -> bool:
        """Whether it is nudged towards pictures of each LoRA alone."""
        return self.options.nudge

    @property
    def chooses(self) -> bool:
        """Whether the rule picks one of the roles, so that it can be said how often which."""
        return self.options.enabled and self.options.strategy not in {"sum", "np"}


def _rule(label: str, strategy: str, *, balanced: bool = False, **more: Any) -> Method:
    # Spelled out, so that the columns mean the same whatever the defaults are.
    plain: dict[str, Any] = {"balance": 0.0, "sample_tokens": 0, "auto_balance": balanced, "couple_cfg": balanced}
    return Method(label, options=Options(enabled=True, strategy=strategy, **plain, **more))


# Small moves, and to the last step: larger ones overshoot on 8 x 8 latents, and of earlier ones little is left in the
# picture. The encoders are the boxed ones.
_NUDGES: dict[str, Any] = {
    "nudge": True,
    "nudge_mode": "x0",
    "nudge_strength": 0.2,
    "nudge_start": 0.3,
    "nudge_stop": 1.0,
    "nudge_every": 1,
    "nudge_clamp": 0.03,
    "nudge_decoder": "vae",
    "nudge_cutouts": 0,
    # The boxed DINO knows subjects whatever their style, and nothing of styles.
    "weight_clip_subject": 1.0,
    "weight_clip_style": 1.0,
    "weight_dino_subject": 1.0,
    "weight_dino_style": 0.0,
    "clip": "clip",
    "dino": "dino",
}


METHODS: tuple[Method, ...] = (
    Method("base", subject=False, style=False),
    Method("subject alone", style=False),
    Method("style alone", subject=False),
    _rule("sum", "sum"),
    _rule("random", "random"),
    _rule("klora", "klora"),
    _rule("np", "np"),
    _rule("kl", "kl"),
    _rule("kl balanced", "kl", balanced=True),
    _rule("kl-soft", "kl-soft"),
    # Whatever it is: what a person gets who only ticks the panel.
    Method("default", options=Options(enabled=True)),
)
# Nudged towards the pictures of "subject alone" and "style alone" of the same seeds. Alone: both LoRAs are added, as
# without this extension.
GUIDED: tuple[Method, ...] = (
    Method("nudges alone", options=Options(enabled=False, **_NUDGES)),
    _rule("kl + nudges", "kl", **_NUDGES),
    _rule("bal. + nudges", "kl", balanced=True, **_NUDGES),
)


class Alone(NamedTuple):
    """One pair's pictures by each LoRA alone, [N, 3, H, W] from 0 to 1, a seed each."""

    subject: Tensor
    style: Tensor


class Pair(NamedTuple):
    """A subject and a style that the base model knows neither of; `style` is the data's name, for example `hc`."""

    subject: str
    style: str

    @property
    def name(self) -> str:
        return f"{file_name(self.subject)}-{file_name(STYLE_WORDS[self.style])}"

    @property
    def title(self) -> str:
        return f"{self.subject} in {STYLE_WORDS[self.style]}"

    def prompt(self, method: Method) -> str:
        """What a person would type for a method, roles included where it fuses."""
        roles = (":role=subject", ":role=style") if method.options.enabled else ("", "")
        tags = ""
        if method.subject:
            tags += f" <lora:subject-{file_name(self.subject)}:1{roles[0]}>"
        if method.style:
            tags += f" <lora:style-{file_name(STYLE_WORDS[self.style])}:1{roles[1]}>"
        return caption(self.subject, self.style) + tags


class Generator(Protocol):
    """What is used of the embedded host."""

    def generate(
        self,
        prompt: str,
        *,
        options: Options,
        steps: int,
        cfg: float,
        seeds: Sequence[int],
        trace: Trace | None,
        guide: Guide | None,
        tensors: bool,
    ) -> Any: ...

    def decoder(self, name: str) -> Decoder: ...


class Judge(Protocol):
    """Classifiers of subject and style: [N, 3, H, W] from 0 to 1 -> two integer [N], places in their lists of names."""

    @property
    def subjects(self) -> Sequence[str]: ...

    @property
    def styles(self) -> Sequence[str]: ...

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Result:
    """One method on one pair.

    pictures: [N, 3, H, W] from 0 to 1, a seed each. right_subject, right_style: bool [N], as judged. record: what was
    chosen, for methods that choose.
    """

    pair: Pair
    method: Method
    pictures: Tensor
    right_subject: Tensor
    right_style: Tensor
    seconds: float
    record: Record | None


@dataclass(frozen=True)
class Score:
    """How many of a method's pictures show the right thing, and the mean share of what was applied that was subject."""

    method: str
    pictures: int
    subject: int
    style: int
    both: int
    chosen: float | None

    @classmethod
    def of(cls, results: Sequence[Result]) -> Score:
        """One method's score over several pairs."""
        subject = torch.cat([result.right_subject for result in results])
        style = torch.cat([result.right_style for result in results])
        shares = [share["subject"] for r in results if r.record for share in r.record.shares().values()]
        return cls(
            results[0].method.label,
            len(subject),
            int(subject.sum()),
            int(style.sum()),
            int((subject & style).sum()),
            sum(shares) / len(shares) if shares else None,
        )


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % score interval (E. B. Wilson, 1927) of the share right / of; (0, 1) of nothing."""
    if of == 0:
        return 0.0, 1.0
    share, spread = right / of, Z95**2 / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare(
    host: Generator,
    judge: Judge,
    pairs: Sequence[Pair],
    seeds: Sequence[int],
    *,
    methods: Sequence[Method] = METHODS,
    steps: int = 12,
    cfg: float = 3.0,
    alone: Mapping[Pair, Alone] | None = None,
    encoders: Path | None = None,
) -> list[Result]:
    """Every method on every pair, from the same seeds.

    For guided methods `alone` has what they are nudged towards, a picture for each seed, and `encoders` is the folder
    of CLIP and DINO. Raises ValueError for a subject or style that the judge does not know, before anything is made;
    RuntimeError where a guided method's encoders cannot be loaded.
    """
    wanted = [(_place(judge.subjects, pair.subject), _place(judge.styles, JUDGED_AS[pair.style])) for pair in pairs]
    results = []
    for pair, (subject, style) in zip(pairs, wanted, strict=True):
        for method in methods:
            trace = Trace(passes=steps) if method.chooses else None
            began = time.perf_counter()
            guide = _guide(host, method, pair, seeds, (alone or {})[pair], encoders) if method.guided else None
            pictures = host.generate(
                pair.prompt(method),
                options=method.options,
                steps=steps,
                cfg=cfg,
                seeds=seeds,
                trace=trace,
                guide=guide,
                tensors=True,
            ).cpu()
            seconds = time.perf_counter() - began
            subjects, styles = judge(pictures)
            record = trace.read() if trace else None
            if record is not None and guide is not None:
                record.nudges = guide.curve()
            results.append(Result(pair, method, pictures, subjects == subject, styles == style, seconds, record))
    return results


def _guide(
    host: Generator, method: Method, pair: Pair, seeds: Sequence[int], alone: Alone, encoders: Path | None
) -> Guide:
    def missing(line: str) -> None:
        raise RuntimeError(f"{method.label}: {line}")

    def references(role: Role) -> Each:
        pictures = alone.subject if role is Role.SUBJECT else alone.style
        return Each([picture[None] for picture in pictures[: len(seeds)]])

    prompt = caption(pair.subject, pair.style)
    guidance = prepare(method.options, references, [prompt], Source(encoders), default_device(), torch.float32, missing)
    assert guidance is not None, "what is missing is told, and raises"
    return guidance.guide(range(len(seeds)), seeds, host.decoder(method.options.nudge_decoder))


def _place(names: Sequence[str], name: str) -> int:
    if name not in names:
        raise ValueError(f"the judge does not know {name!r}; it knows {', '.join(names)}")
    return list(names).index(name)
