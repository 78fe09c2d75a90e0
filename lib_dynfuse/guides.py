"""From options and references to what nudges pictures and scores them: the encoders loaded, the objective made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.libraries import EncoderError, in_a_line
from lib_dynfuse.guidance.nudge import Nudge
from lib_dynfuse.guidance.objectives import TERMS, Each, Objective, Pictures, Weights
from lib_dynfuse.guidance.scores import harmonic_mean
from lib_dynfuse.guidance.sources import MissingError, Published, Source, missing
from lib_dynfuse.options import Options

if TYPE_CHECKING:
    from lib_dynfuse.guidance.encoders import ClipEncoder, DinoEncoder

NONE = "none"  # written for an encoder that is to be left out
# The encoders that were used last, one of each kind, by what they were loaded from: they serve the next generation too.
_kept: dict[tuple[Any, ...], Any] = {}
# What could not be loaded, when that was and why: without a network a hub makes everybody wait for most of a minute.
# The error itself would hold on to everything that was in memory where it was raised.
_refused: dict[tuple[Any, ...], tuple[float, str]] = {}
_SECONDS_REFUSED = 300
_MOST_REFUSED = 8


def nudge_of(options: Options) -> Nudge:
    return Nudge(
        mode=options.nudge_mode,
        strength=options.nudge_strength,
        start=options.nudge_start,
        stop=options.nudge_stop,
        every=options.nudge_every,
        clamp=options.nudge_clamp,
    )


def weights_of(options: Options) -> Weights:
    return Weights(**{term: getattr(options, f"weight_{term}") for term in TERMS})


class Guidance:
    """What the pictures of one generation are compared with; a picture is meant by its number among all of them."""

    def __init__(self, nudge: Nudge | None, objective: Objective) -> None:
        self.nudge = nudge
        """None where pictures are only scored."""
        self.objective = objective

    def guide(self, indices: Sequence[int], seeds: Sequence[int], decode: Decoder) -> Guide:
        """What nudges these pictures together. Raises ValueError where they are only scored."""
        if self.nudge is None:
            raise ValueError("these pictures are scored, not nudged")
        return Guide(self.nudge, self.objective.part(indices), decode, seeds)

    def scores(self, images: Tensor, indices: Sequence[int]) -> list[dict[str, float]]:
        """Each finished picture's scores, [B, 3, H, W] in 0..1 in, by the names of `scores.LABELS` and, where it can be
        had, "harmonic_mean". Reads from the device."""
        objective = self.objective.part(indices)
        rows: list[dict[str, float]] = [{} for _ in indices]
        # One by one, as full-size pictures take memory and nobody waits for speed here.
        for place, row in enumerate(rows):
            one = objective.part([place]).scores(images[place : place + 1].float())
            row.update({name: float(value[0]) for name, value in one.items()})
            mean = harmonic_mean(row)
            if mean is not None:
                row["harmonic_mean"] = mean
        return rows


def prepare(
    options: Options,
    references: Callable[[Role], Pictures | Each | None],
    prompts: Sequence[str],
    source: Source,
    device: torch.device | str,
    dtype: torch.dtype,
    tell: Callable[[str], None],
) -> Guidance | None:
    """Load what the options need, or find it again. What is missing is told and its terms are left out.

    `references`: finds a role's, or makes them, and is asked only once there are encoders to see them; what it raises
    is passed on. `prompts`: one for all pictures or one for each, without LoRA tags; `source`: where encoders may come
    from. Returns None where nothing is left to compare with, or no memory to do it.
    """
    weights = weights_of(options)
    if options.nudge and not any(getattr(weights, term) for term in TERMS):
        tell("not nudged: the weights of all terms are 0")
        return None
    clip, dino, lacking = _encoders(options, weights, source, device, dtype)
    if clip is None and dino is None:
        if lacking:
            tell(f"{_without(options)}: {'; '.join(lacking)}")
        else:
            _say_nothing_left(options, tell)
        return None
    for line in lacking:
        tell(f"{line}; its terms are left out")
    found = {role: references(role) for role in Role}
    try:
        texts = list(prompts) if clip is not None else None
        subject, style = found[Role.SUBJECT], found[Role.STYLE]
        objective = Objective(clip, dino, subject, style, texts, weights, options.nudge_cutouts)
    except ValueError:
        _say_nothing_left(options, tell)
        return None
    except (MemoryError, RuntimeError) as error:  # of the allocators
        tell(f"{_without(options)}: CLIP and DINO could not look at the references ({in_a_line(error)})")
        return None
    for role, pictures in found.items():
        if pictures is None and any(getattr(weights, term) for term in TERMS if term.endswith(role.value)):
            tell(f"there is no picture of the {role.value} to go by: its terms are left out")
    if options.nudge and not objective.terms:
        _say_nothing_left(options, tell)
    nudge = nudge_of(options) if options.nudge and objective.terms else None
    return Guidance(nudge, objective) if nudge is not None or _scores(options) else None


def _scores(options: Options) -> bool:
    """Whether pictures are to be scored even if they are not nudged."""
    return options.score or options.keep_best > 0


def _say_nothing_left(options: Options, tell: Callable[[str], None]) -> None:
    nothing = "there is nothing to compare a picture with, neither encoder has a reference whose weight is not 0"
    tell(f"{_without(options)}: {nothing}")


def _without(options: Options) -> str:
    return "not nudged" if options.nudge else "not scored"


def _encoders(
    options: Options, weights: Weights, source: Source, device: torch.device | str, dtype: torch.dtype
) -> tuple[ClipEncoder | None, DinoEncoder | None, list[str]]:
    """CLIP and DINO, each where a term needs it and it can be loaded; and a line for what could not be."""
    from lib_dynfuse.guidance.encoders import load_clip, load_dino

    found: dict[str, Any] = {}
    absent: list[Published] = []
    lines: list[str] = []
    for name, load in (("clip", load_clip), ("dino", load_dino)):
        where = getattr(options, name).strip()
        counts = any(getattr(weights, term) for term in TERMS if term.startswith(name))
        found[name] = None
        if where.lower() == NONE or not (counts or _scores(options)):
            continue
        key = (name, where, source.folder, dtype)
        try:
            source.check(name.upper(), where)
            found[name] = _kept_or(key, device, partial(load, where, source, device, dtype))
        except MissingError as error:
            absent.append(error.wanted)
        except EncoderError as error:
            lines.append(str(error))
        except (MemoryError, RuntimeError) as error:  # of the allocators
            lines.append(f"{name.upper()} could not be loaded ({in_a_line(error)})")
    # Both in one message: it says what to put where, or how to have it fetched.
    return found["clip"], found["dino"], [*lines, *([missing(absent, source)] if absent else [])]


def _kept_or(key: tuple[Any, ...], device: torch.device | str, load: Callable[[], Any]) -> Any:
    """The encoder of this key: the one in memory, back on its device, or a new one in its kind's place."""
    # Weights that are made, or moved, in a sampler's inference mode could not take part in a gradient.
    with torch.inference_mode(False):
        if key not in _kept:
            for old in [old for old in _kept if old[0] == key[0]]:
                del _kept[old]
            _kept[key] = _loaded(key, load)
        _kept[key].to(device)
    return _kept[key]


def _loaded(key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
    """Raises EncoderError; for a while with the same text again, unless the folder has changed."""
    folder = key[2]
    attempt = (*key, tuple(sorted(path.name for path in folder.iterdir())) if folder and folder.is_dir() else ())
    when, why = _refused.get(attempt, (0.0, ""))
    if why and time.monotonic() - when < _SECONDS_REFUSED:
        raise EncoderError(why)
    try:
        return load()
    except MissingError:
        raise  # looked for on the disk alone, so the next look is quick
    except EncoderError as error:
        _refused.pop(attempt, None)
        while len(_refused) >= _MOST_REFUSED:
            del _refused[next(iter(_refused))]
        _refused[attempt] = time.monotonic(), str(error)
        raise


def rest() -> None:
    """Nothing is generated for now: the encoders leave the GPU's memory to others."""
    with torch.inference_mode(False):
        for encoder in _kept.values():
            encoder.to("cpu")
