"""From options and references to what nudges pictures and scores them: the encoders loaded, the objective made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.libraries import EncoderError
from lib_dynfuse.guidance.nudge import Nudge
from lib_dynfuse.guidance.objectives import TERMS, Each, Objective, Pictures, Weights
from lib_dynfuse.guidance.scores import harmonic_mean
from lib_dynfuse.options import Options

if TYPE_CHECKING:
    from lib_dynfuse.guidance.encoders import ClipEncoder, DinoEncoder

NONE = "none"  # written for an encoder that is to be left out
# The encoders that were used last, by what they were loaded from: they serve the next generation too.
_kept: dict[tuple[Any, ...], Any] = {}
# What could not be loaded, when that was and why: without a network a hub makes everybody wait for most of a minute.
_refused: dict[tuple[Any, ...], tuple[float, EncoderError]] = {}
_SECONDS_REFUSED = 300


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
    folder: Path | None,
    device: torch.device | str,
    dtype: torch.dtype,
    tell: Callable[[str], None],
) -> Guidance | None:
    """Load what the options need, or find it again. What is missing is told and its terms are left out.

    `references`: finds a role's, or makes them, and is asked only once there are encoders to see them; what it raises
    is passed on. `prompts`: one for all pictures or one for each, without LoRA tags; `folder`: where encoders are
    looked for first, as models/dynfuse. Returns None where nothing is left to compare with, or no memory to do it.
    """
    weights = weights_of(options)
    if options.nudge and not any(getattr(weights, term) for term in TERMS):
        tell("not nudged: the weights of all terms are 0")
        return None
    clip, dino = _encoders(options, weights, folder, device, dtype, tell)
    if clip is None and dino is None:
        _say_nothing_left(options, tell)
        return None
    found = {role: references(role) for role in Role}
    try:
        texts = list(prompts) if clip is not None else None
        subject, style = found[Role.SUBJECT], found[Role.STYLE]
        objective = Objective(clip, dino, subject, style, texts, weights, options.nudge_cutouts)
    except ValueError:
        _say_nothing_left(options, tell)
        return None
    except (MemoryError, RuntimeError) as error:  # of the allocators
        said = " ".join(str(error).split())[:160]
        tell(f"{_without(options)}: CLIP and DINO could not look at the references ({said})")
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
    options: Options,
    weights: Weights,
    folder: Path | None,
    device: torch.device | str,
    dtype: torch.dtype,
    tell: Callable[[str], None],
) -> tuple[ClipEncoder | None, DinoEncoder | None]:
    """CLIP and DINO, each where a term needs it and it can be loaded."""
    from lib_dynfuse.guidance.encoders import load_clip, load_dino

    found: dict[str, Any] = {}
    for name, load in (("clip", load_clip), ("dino", load_dino)):
        where = getattr(options, name).strip()
        counts = any(getattr(weights, term) for term in TERMS if term.startswith(name))
        found[name] = None
        if where.lower() == NONE or not (counts or _scores(options)):
            continue
        try:
            found[name] = _kept_or((name, where, folder, dtype), device, partial(load, where, folder, device, dtype))
        except EncoderError as error:
            tell(f"{error}; its terms are left out")
        except (MemoryError, RuntimeError) as error:  # of the allocators
            tell(f"{name.upper()} could not be loaded ({' '.join(str(error).split())[:160]}); its terms are left out")
    return found["clip"], found["dino"]


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
    """Raises EncoderError; for a while the same one again, unless the folder has changed."""
    folder = key[2]
    attempt = (*key, tuple(sorted(path.name for path in folder.iterdir())) if folder and folder.is_dir() else ())
    when, error = _refused.get(attempt, (0.0, None))
    if error is not None and time.monotonic() - when < _SECONDS_REFUSED:
        raise error
    try:
        return load()
    except EncoderError as error:
        _refused[attempt] = time.monotonic(), error
        raise


def rest() -> None:
    """Nothing is generated for now: the encoders leave the GPU's memory to others."""
    with torch.inference_mode(False):
        for encoder in _kept.values():
            encoder.to("cpu")
