"""One generation of the WebUI: its processing object `p` in, pictures, infotext and comments out."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from lib_dynfuse import guides
from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError, shown, without_folders
from lib_dynfuse.guidance.libraries import in_a_line
from lib_dynfuse.guidance.pictures import PictureError
from lib_dynfuse.guidance.scores import as_text, best
from lib_dynfuse.hosts.base import Unsupported
from lib_dynfuse.hosts.detect import detect
from lib_dynfuse.options import FIELDS, INFOTEXT_KEY, OF_FUSION
from lib_dynfuse.roles import lora_tags, role_tags
from lib_dynfuse.session import Session, close_all
from lib_dynfuse.trace import Record
from lib_dynfuse.webui import guided, references, settings, traces, xyz
from lib_dynfuse.webui.arguments import read_arguments

TITLE = "DynFuse"
NOTE_KEY = f"{INFOTEXT_KEY} note"
CHOSEN_KEY = f"{INFOTEXT_KEY} chosen"
SCORES_KEY = f"{INFOTEXT_KEY} scores"
# Of the API's answer alone: whoever knows it may have the record.
TRACE_KEY = f"{INFOTEXT_KEY} trace"
_KEYS_OF_FUSION = frozenset(option.key for option in FIELDS if option.name in OF_FUSION)
# A prompt may hold thousands of tags, each with something to be said of it, and names of any length.
_MOST_NOTES, _LONGEST_NOTE = 30, 1000
_log = logging.getLogger("lib_dynfuse")


@dataclass
class _Generation:
    """What hangs on a processing object. `owner` tells it from a copy of that object, which a grid's cells are."""

    owner: int
    session: Session
    # What an infotext says of the options, and whether a batch was fused.
    described: dict[str, str]
    fused: bool = False
    guidance: guided.Guided | None = None
    # Of the batch that was sampled last: what was chosen by picture, every picture's scores, and which are kept.
    shares: dict[int, str] = field(default_factory=dict)
    scores: list[dict[str, float]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    # Of every batch: what was chosen, and of the pictures that are kept their places in it.
    records: list[tuple[Record | None, list[int]]] = field(default_factory=list)
    all_scores: list[dict[str, float]] = field(default_factory=list)


# The generation whose denoiser is at work, where its prediction is to be nudged: the host's later callbacks don't say.
_nudging: _Generation | None = None


def _of(p: Any) -> _Generation | None:
    found = getattr(p, "_dynfuse", None)
    return found if isinstance(found, _Generation) and found.owner == id(p) else None


def forget(p: Any) -> None:
    """Whatever an earlier generation left: hooks, networks taken, and the infotext that a grid's cells share."""
    close_all()
    _rest()
    p._dynfuse, p._dynfuse_notes = None, 0
    for key in [key for key in p.extra_generation_params if key.split(" ")[0] == INFOTEXT_KEY]:
        del p.extra_generation_params[key]


def begin(p: Any, args: Sequence[Any]) -> None:
    """Reads the options; from here on the generation is ours to fuse, if they say so."""
    forget(p)
    settings.apply_log_level()
    uploads = references.uploads_in(args)
    try:
        options = read_arguments(args, xyz.overrides(p))
        _tell_what_does_nothing(p, options.enabled)
        if not options.enabled:
            return
        session = Session(detect(), options, functools.partial(_tell, p))
    except (DynFuseError, Unsupported) as error:
        _tell(p, f"not fused: {error}")
        return
    for name in options.unused():
        session.tell(f"the rule {options.strategy} has no {name}: it changes nothing")
    given: references.Given | None = None
    try:
        given = references.given(options, uploads)
    except PictureError as error:
        session.tell(f"not nudged: {error}" if options.nudge else f"not scored: {error}")
    generation = _Generation(id(p), session, options.infotext(references.described(given or {})))
    p._dynfuse = generation
    p.extra_generation_params[CHOSEN_KEY] = _chosen
    if options.compares and given is not None:
        _begin_guiding(p, generation, given)
    if generation.guidance is None and options.keep_best:
        session.tell("all pictures are kept: without references none is better than another")


def _tell_what_does_nothing(p: Any, enabled: bool) -> None:
    """Tags that a person wrote and that change nothing where they stand."""
    if not enabled and any(map(role_tags, _all(p, "prompts"))):
        _tell(p, "LoRAs have roles, but Dynamic LoRA Fusion is not ticked (enabled): they are added as without roles")
    tags = lora_tags if enabled else role_tags
    useless = dict.fromkeys(tag for prompt in _all(p, "negative_prompts") for tag in tags(prompt))
    if useless:
        _tell(p, f"{shown(', '.join(useless))}: a LoRA in the negative prompt does nothing; write it into the prompt")


def _all(p: Any, kind: str) -> Iterable[str]:
    """Every "prompts" or "negative_prompts" of the run once, a hires pass's own too."""
    lists = [f"all_{kind}", *([f"all_hr_{kind}"] if getattr(p, "enable_hr", False) else [])]
    return dict.fromkeys(prompt for name in lists for prompt in getattr(p, name, None) or ())


def _describe(p: Any, generation: _Generation) -> None:
    """The infotext says what the batch under way is made with: of rules nothing where none decides."""
    generation.fused = generation.fused or generation.session.fused
    for key in generation.described:
        p.extra_generation_params.pop(key, None)
    if generation.session.fused or generation.guidance is not None:
        unsaid = frozenset() if generation.session.fused else _KEYS_OF_FUSION
        told = {key: value for key, value in generation.described.items() if key not in unsaid}
        p.extra_generation_params.update(told)


def _begin_guiding(p: Any, generation: _Generation, given: references.Given) -> None:
    session = generation.session
    try:
        generation.guidance = guided.begin(p, session.options, session.host, given, session.tell)
    except Exception as error:
        _log.exception("guidance could not begin")
        session.tell(f"not nudged: {in_a_line(error)}")
    if generation.guidance is not None:
        p.extra_generation_params[SCORES_KEY] = _scores


def _tell(p: Any, line: str) -> None:
    """Where the person looks: under the picture, in its infotext, and in the log. A library's message may have paths of
    the machine in it, which are nobody's business there."""
    count = p._dynfuse_notes = getattr(p, "_dynfuse_notes", 0) + 1
    if count > _MOST_NOTES:
        return
    line = (
        "there is more to say of this prompt" if count == _MOST_NOTES else shown(without_folders(line), _LONGEST_NOTE)
    )
    p.comment(f"{TITLE}: {line}")
    notes = p.extra_generation_params.get(NOTE_KEY)
    p.extra_generation_params[NOTE_KEY] = f"{notes}; {line}" if notes else line
    _log.warning(line)


def _chosen(*, p: Any, index: int = 0, **_: Any) -> str | None:
    """The infotext's share of what each role won in one picture; the host calls it when it writes the text."""
    generation = _of(p)
    return None if generation is None else generation.shares.get(_place(generation, index))


def _scores(*, p: Any, index: int = 0, **_: Any) -> str | None:
    """The infotext's scores of one picture."""
    generation = _of(p)
    if generation is None or not generation.scores:
        return None
    return as_text(generation.scores[_place(generation, index)])


def _place(generation: _Generation, index: int) -> int:
    """Where a picture that is kept stood in its batch."""
    return generation.kept[index] if index < len(generation.kept) else index


def activate(p: Any, networks: Any) -> None:
    generation = _of(p)
    if generation is None:
        return
    generation.shares, generation.scores, generation.kept = {}, [], []
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
    if generation is None:
        return
    found = generation.guidance
    generation.session.attach(p.steps, (lambda: None) if found is None else (lambda: found.guide(p)))
    _describe(p, generation)


def step(params: Any) -> None:
    """The host's `cfg_denoiser` callback."""
    global _nudging
    _nudging = None
    generation = _of(getattr(params.denoiser, "p", None))
    if generation is not None:
        generation.session.step(params)
        _nudging = generation if generation.session.nudges else None


def predicted(params: Any) -> None:
    """The host's `cfg_denoised` callback."""
    if _nudging is not None:
        _nudging.session.predicted(params)


def after_cfg(params: Any) -> None:
    """The host's `cfg_after_cfg` callback."""
    global _nudging
    generation, _nudging = _nudging, None
    if generation is not None:
        generation.session.after_cfg(params)


def finish_batch(p: Any, images: Any) -> None:
    """The pictures are sampled, [B, 3, H, W] in 0..1; what other extensions do with them from here on is none of
    ours."""
    generation = _of(p)
    if generation is None:
        return
    _describe(p, generation)
    record = generation.session.finish_batch()
    shares = {} if record is None else record.shares()
    generation.shares = {} if record is None else {image: record.in_words(share) for image, share in shares.items()}
    generation.kept = list(range(len(images)))
    generation.records.append((record, generation.kept))
    if generation.guidance is not None:
        _score(p, generation, images)


def _score(p: Any, generation: _Generation, images: Any) -> None:
    assert generation.guidance is not None
    try:
        generation.scores = generation.guidance.scores(p, images)
    except Exception as error:
        _log.exception("pictures could not be scored")
        generation.session.tell(f"not scored: {in_a_line(error)}")
        return
    generation.kept[:] = best(generation.scores, generation.session.options.keep_best)
    generation.all_scores += [generation.scores[place] for place in generation.kept]


def keep_best(p: Any, batch: Any) -> None:
    """The host's list of a batch's pictures, which it writes out next: those that are not kept leave it."""
    generation = _of(p)
    if generation is None or not generation.kept or len(generation.kept) == len(batch.images):
        return
    lists = [(batch, "images"), *((p, name) for name in ("prompts", "negative_prompts", "seeds", "subseeds"))]
    for holder, name in lists:
        values = getattr(holder, name)
        setattr(holder, name, [values[place] for place in generation.kept])


def finish(p: Any, processed: Any) -> None:
    """The generation is over: the pictures of what was chosen, where they were asked for, and the scores as numbers."""
    generation = _of(p)
    close_all()
    _rest()
    if generation is None:
        return
    _log.info(_summary(generation))
    _settle(p)
    _answer(p, processed, generation)
    if not generation.session.options.trace:
        return
    place = processed.index_of_first_image
    for record, kept in generation.records:
        for image in kept:
            if record is not None and image in record.images and place < len(processed.images):
                _append(p, processed, record, image, place)
            place += 1


def _settle(p: Any) -> None:
    """The functions that the host called for texts are the first picture's texts from here on: a grid's infotext is
    still to be written, and an answer that is made of `p` anew, which Forge Classic cannot do with a function in it."""
    for key in (CHOSEN_KEY, SCORES_KEY):
        value = p.extra_generation_params.get(key)
        if callable(value):
            text = value(p=p)
            if text is None:
                del p.extra_generation_params[key]
            else:
                p.extra_generation_params[key] = text


def _answer(p: Any, processed: Any, generation: _Generation) -> None:
    """What the API's answer says beside the pictures. It is no part of `p`: a grid's infotext is still to be written
    from that. Other extensions' functions are left out of it."""
    values = {key: value for key, value in p.extra_generation_params.items() if not callable(value)}
    if generation.all_scores:
        values[SCORES_KEY] = generation.all_scores
    names: list[str | None] = []
    for record, kept in generation.records:
        known = [] if record is None else [image for image in kept if image in record.images]
        named = dict(zip(known, traces.kept.keep(record, known), strict=True)) if record is not None else {}
        names += [named.get(image) for image in kept]
    if any(names):
        values[TRACE_KEY] = names
    processed.extra_generation_params = values


def _summary(generation: _Generation) -> str:
    """The one line of a generation that is said whatever happened."""
    count = sum(len(kept) for _, kept in generation.records)
    session = generation.session
    done = [f"{count} picture{'' if count == 1 else 's'}"]
    if generation.fused:
        named = [f"{role.value} {', '.join(session.roles[role])}" for role in Role if session.roles.get(role)]
        done.append(shown(f"fused by {session.options.strategy} ({'; '.join(named)})"))
    else:
        done.append("not fused")
    if generation.guidance is not None:
        done.append("nudged" if generation.guidance.decoder is not None else "scored")
    return ", ".join(done)


def _rest() -> None:
    """Nothing is generated for now."""
    if settings.is_on(settings.ENCODERS_REST):
        guides.rest()


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
