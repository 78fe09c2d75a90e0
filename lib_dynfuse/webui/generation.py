"""One generation of the WebUI: its processing object `p` in, pictures, infotext and comments out."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.base import Unsupported
from lib_dynfuse.hosts.detect import detect
from lib_dynfuse.options import INFOTEXT_KEY
from lib_dynfuse.roles import lora_tags
from lib_dynfuse.session import Session, close_all
from lib_dynfuse.trace import Record
from lib_dynfuse.webui import settings, xyz
from lib_dynfuse.webui.arguments import read_arguments

TITLE = "DynFuse"
NOTE_KEY = f"{INFOTEXT_KEY} note"
CHOSEN_KEY = f"{INFOTEXT_KEY} chosen"
_log = logging.getLogger("lib_dynfuse")


@dataclass
class _Generation:
    """What hangs on a processing object. `owner` tells it from a copy of that object, which a grid's cells are."""

    owner: int
    session: Session
    shares: dict[int, dict[str, float]] = field(default_factory=dict)
    records: list[tuple[Record, int]] = field(default_factory=list)  # and the number of the batch's first picture


def _of(p: Any) -> _Generation | None:
    found = getattr(p, "_dynfuse", None)
    return found if isinstance(found, _Generation) and found.owner == id(p) else None


def forget(p: Any) -> None:
    """Whatever an earlier generation left: hooks, networks taken, and the infotext that a grid's cells share."""
    close_all()
    p._dynfuse = None
    for key in [key for key in p.extra_generation_params if key.split(" ")[0] == INFOTEXT_KEY]:
        del p.extra_generation_params[key]


def begin(p: Any, args: Sequence[Any]) -> None:
    """Reads the options; from here on the generation is ours to fuse, if they say so."""
    forget(p)
    settings.apply_log_level()
    try:
        options = read_arguments(args, xyz.overrides(p))
        if not options.enabled:
            return
        session = Session(detect(), options, functools.partial(_tell, p))
    except (DynFuseError, Unsupported) as error:
        _tell(p, f"not fused: {error}")
        return
    for name in options.unused():
        session.tell(f"the rule {options.strategy} has no {name}: it changes nothing")
    p._dynfuse = _Generation(id(p), session)
    p.extra_generation_params.update(options.infotext())
    p.extra_generation_params[CHOSEN_KEY] = _chosen


def _tell(p: Any, line: str) -> None:
    """Where the person looks: under the picture, in its infotext, and in the log."""
    p.comment(f"{TITLE}: {line}")
    notes = p.extra_generation_params.get(NOTE_KEY)
    p.extra_generation_params[NOTE_KEY] = f"{notes}; {line}" if notes else line
    _log.info(line)


def _chosen(*, p: Any, index: int = 0, **_: Any) -> str | None:
    """The infotext's share of what each role won in one picture; the host calls it when it writes the text."""
    generation = _of(p)
    share = generation.shares.get(index) if generation is not None else None
    return None if share is None else f"subject {share['subject']:.0%} style {share['style']:.0%}"


def activate(p: Any, networks: Any) -> None:
    generation = _of(p)
    if generation is None:
        return
    generation.shares = {}
    _compare_prompts(p, generation.session)
    generation.session.activate(networks)


def _compare_prompts(p: Any, session: Session) -> None:
    """The host takes a batch's LoRAs from its first prompt."""
    hires = bool(getattr(p, "is_hr_pass", False))
    prompts = getattr(p, "all_hr_prompts" if hires else "all_prompts", None) or []
    first = p.iteration * p.batch_size
    tags = [lora_tags(prompt) for prompt in prompts[first : first + p.batch_size]]
    if any(one != tags[0] for one in tags):
        session.tell("the prompts of this batch have different LoRAs; the WebUI takes those of the first for all")


def attach(p: Any) -> None:
    generation = _of(p)
    if generation is not None:
        generation.session.attach(p.steps)


def step(params: Any) -> None:
    """The host's `cfg_denoiser` callback."""
    generation = _of(getattr(params.denoiser, "p", None))
    if generation is not None:
        generation.session.step(params)


def finish_batch(p: Any) -> None:
    """The pictures are sampled; what other extensions do with them from here on is none of ours."""
    generation = _of(p)
    if generation is None:
        return
    record = generation.session.finish_batch()
    if record is not None:
        generation.shares = record.shares()
        generation.records.append((record, p.iteration * p.batch_size))


def finish(p: Any, processed: Any) -> None:
    """The generation is over: the pictures of what was chosen, where they were asked for."""
    generation = _of(p)
    close_all()
    if generation is None or not generation.session.options.trace:
        return
    for record, first in generation.records:
        for image in sorted(record.shares()):
            place = processed.index_of_first_image + first + image
            if place < len(processed.images):
                _append(p, processed, record, image, place)


def _append(p: Any, processed: Any, record: Record, image: int, place: int) -> None:
    from lib_dynfuse.trace.pictures import heat_map, overlay

    figures = [heat_map(record, image)]
    if record.tokens:
        figures.append(overlay(record, image, np.asarray(processed.images[place].convert("RGB"))))
    text = processed.infotexts[place] if place < len(processed.infotexts) else ""
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        picture = Image.open(buffer).convert("RGB")
        picture.info["parameters"] = text
        processed.images.append(picture)
        processed.infotexts.append(text)
        _save_beside_grids(p, picture, text)


def _save_beside_grids(p: Any, picture: Image.Image, text: str) -> None:
    from modules import images
    from modules.shared import opts

    if opts.grid_save and not p.do_not_save_grid:
        images.save_image(
            picture,
            p.outpath_grids,
            "dynfuse",
            p.all_seeds[0],
            p.all_prompts[0],
            opts.grid_format,
            info=text,
            short_filename=not opts.grid_extended_filename,
            p=p,
            grid=True,
        )
