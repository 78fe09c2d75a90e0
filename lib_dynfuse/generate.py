"""The command `generate`: a prompt with LoRA tags in, pictures and what was chosen for them out."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import typer

from lib_dynfuse.core import Outcome, Role
from lib_dynfuse.errors import DynFuseError, shown, writable
from lib_dynfuse.guidance.pictures import PictureFile, fingerprints
from lib_dynfuse.guidance.scores import as_text, best
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.infotext import infotext
from lib_dynfuse.options import FIELDS, INFOTEXT_KEY, Options, OptionsError
from lib_dynfuse.output import Batch, check_folder, finish_killed
from lib_dynfuse.roles import LoraTag, parse_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from lib_dynfuse.guidance.guide import Guide
    from lib_dynfuse.guides import Guidance
    from lib_dynfuse.trace import Record

SCORES_KEY = f"{INFOTEXT_KEY} scores"
# Reference pictures by their option's name.
Given = Mapping[str, Sequence[PictureFile]]

_MODEL, _PICTURE, _RULE = "The model", "The picture", "How LoRAs are fused"
_NUDGE = "Nudges towards reference pictures, and scores"
_HELP = {option.name: f"{option.help} ({option.allowed})" for option in FIELDS}
_DEFAULT = Options()
TERMS = tuple(option.name.removeprefix("weight_") for option in FIELDS if option.name.startswith("weight_"))
_WEIGHT_HELP = f"Of one of the terms that pictures are compared by: {', '.join(TERMS)}; may be repeated."


def _model(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=_MODEL)


def _picture(help: str, min: float | None = None, max: float | None = None) -> Any:
    return typer.Option(help=help, rich_help_panel=_PICTURE, min=min, max=max)


def _rule(name: str) -> Any:
    return typer.Option(help=_HELP[name], rich_help_panel=_RULE)


def _nudge(name: str, *flags: str, help: str = "") -> Any:
    return typer.Option(*flags, help=help or _HELP[name], rich_help_panel=_NUDGE)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """What a person can mend is said in one line on stderr, with exit code 2."""
    try:
        yield
    except DynFuseError as error:
        _give_up(str(error), error)
    except OSError as error:  # a full disk, no permission, a name that is too long
        _give_up(_said_by_the_system(error), error)


def _give_up(reason: str, error: Exception) -> NoReturn:
    typer.echo(f"error: {writable(' '.join(reason.split()))}", err=True)
    raise typer.Exit(2) from error


def _said_by_the_system(error: OSError) -> str:
    if not error.strerror:
        return f"{type(error).__name__}: {error}"
    named = isinstance(error.filename, str | os.PathLike)
    return f"{shown(Path(error.filename).name)}: {error.strerror}" if named else error.strerror


def say(line: str) -> None:
    typer.echo(f"note: {writable(line)}", err=True)


def generate(
    model: Annotated[Path, _model("A diffusers folder or a .safetensors checkpoint: SD 1.x, SD 2.x or SDXL.")],
    prompt: Annotated[
        str, _picture("With LoRA tags: 'a fox <lora:my_fox:1:role=subject> <lora:ink_wash:0.9:role=style>'.")
    ],
    lora_dir: Annotated[Path | None, _model("The folder where the tags' LoRA files are.")] = None,
    negative: Annotated[str, _picture("What the picture should not show.")] = "",
    steps: Annotated[int, _picture("Denoising steps.", min=1, max=1000)] = 20,
    cfg: Annotated[float, _picture("How strictly the prompt is followed.", min=0, max=100)] = 7.0,
    seed: Annotated[int, _picture("Of the first picture; -1 draws one.", min=-1, max=2**32 - 1)] = -1,
    batch: Annotated[int, _picture("How many pictures.", min=1, max=256)] = 1,
    size: Annotated[str, _picture("WIDTHxHEIGHT in pixels, as in 512x768; else the model's own.")] = "",
    sampler: Annotated[str, _picture("The WebUI's name, as in 'DPM++ 2M Karras'; else the model's own.")] = "",
    out: Annotated[Path, _picture("The folder for the pictures.")] = Path("out"),
    fuse: Annotated[
        bool, typer.Option(help="Choose between the roles, or simply add all LoRAs.", rich_help_panel=_RULE)
    ] = True,
    strategy: Annotated[str, _rule("strategy")] = _DEFAULT.strategy,
    balance: Annotated[float, _rule("balance")] = _DEFAULT.balance,
    auto_balance: Annotated[bool, _rule("auto_balance")] = _DEFAULT.auto_balance,
    schedule: Annotated[float, _rule("schedule")] = _DEFAULT.schedule,
    couple_cfg: Annotated[bool, _rule("couple_cfg")] = _DEFAULT.couple_cfg,
    temperature: Annotated[float, _rule("temperature")] = _DEFAULT.temperature,
    sample_tokens: Annotated[int, _rule("sample_tokens")] = _DEFAULT.sample_tokens,
    decide_every: Annotated[int, _rule("decide_every")] = _DEFAULT.decide_every,
    start: Annotated[float, _rule("start")] = _DEFAULT.start,
    stop: Annotated[float, _rule("stop")] = _DEFAULT.stop,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A parameter that only the chosen rule has.", rich_help_panel=_RULE
        ),
    ] = None,
    trace: Annotated[
        bool, typer.Option(help="Write what was chosen, as JSON and as a heat map.", rich_help_panel=_RULE)
    ] = True,
    config: Annotated[
        Path | None, _model("For a checkpoint, offline: a diffusers folder of its kind, for tokenizer and settings.")
    ] = None,
    device: Annotated[str, _model("cuda, mps or cpu; else the best there is.")] = "",
    nudge: Annotated[bool, _nudge("nudge")] = _DEFAULT.nudge,
    nudge_mode: Annotated[str, _nudge("nudge_mode")] = _DEFAULT.nudge_mode,
    nudge_strength: Annotated[float, _nudge("nudge_strength")] = _DEFAULT.nudge_strength,
    nudge_start: Annotated[float, _nudge("nudge_start")] = _DEFAULT.nudge_start,
    nudge_stop: Annotated[float, _nudge("nudge_stop")] = _DEFAULT.nudge_stop,
    nudge_every: Annotated[int, _nudge("nudge_every")] = _DEFAULT.nudge_every,
    nudge_clamp: Annotated[float, _nudge("nudge_clamp")] = _DEFAULT.nudge_clamp,
    nudge_decoder: Annotated[str, _nudge("nudge_decoder")] = _DEFAULT.nudge_decoder,
    nudge_cutouts: Annotated[int, _nudge("nudge_cutouts")] = _DEFAULT.nudge_cutouts,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help=_WEIGHT_HELP, rich_help_panel=_NUDGE)
    ] = None,
    clip: Annotated[str, _nudge("clip")] = _DEFAULT.clip,
    dino: Annotated[str, _nudge("dino")] = _DEFAULT.dino,
    models: Annotated[Path, _nudge("", help="The folder where CLIP, DINO and the decoder are looked for.")] = Path(
        "models/dynfuse"
    ),
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch what is missing from huggingface.co: encoders, and a checkpoint's tokenizer and settings.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    references: Annotated[str, _nudge("references")] = _DEFAULT.references,
    subject_reference: Annotated[
        list[str] | None, _nudge("", help="A picture of the subject; may be repeated.")
    ] = None,
    style_reference: Annotated[list[str] | None, _nudge("", help="A picture in the style; may be repeated.")] = None,
    score: Annotated[bool, _nudge("score")] = _DEFAULT.score,
    keep_best: Annotated[int, _nudge("keep_best")] = _DEFAULT.keep_best,
) -> None:
    """Make pictures from a prompt with LoRA tags.

    Give one LoRA role=subject and another role=style: every layer of every step then goes to one of them.
    A picture depends on its own seed alone, however many are made at once.
    """
    with one_clear_line():
        _check_letters({"--prompt": prompt, "--negative": negative})
        chosen = {
            "strategy": strategy,
            "balance": balance,
            "auto_balance": auto_balance,
            "schedule": schedule,
            "couple_cfg": couple_cfg,
            "temperature": temperature,
            "sample_tokens": sample_tokens,
            "decide_every": decide_every,
            "start": start,
            "stop": stop,
            "nudge": nudge,
            "nudge_mode": nudge_mode,
            "nudge_strength": nudge_strength,
            "nudge_start": nudge_start,
            "nudge_stop": nudge_stop,
            "nudge_every": nudge_every,
            "nudge_clamp": nudge_clamp,
            "nudge_decoder": nudge_decoder,
            "nudge_cutouts": nudge_cutouts,
            "clip": clip,
            "dino": dino,
            "references": references,
            "subject_references": subject_reference or [],
            "style_references": style_reference or [],
            "score": score,
            "keep_best": keep_best,
            **_weights(weight or []),
        }
        options = Options.read(
            {"enabled": fuse, "trace": trace, "parameters": _assignments(parameters or []), **chosen}
        )
        first = random.SystemRandom().randrange(2**32 - batch) if seed < 0 else seed
        given: Given = {}
        if options.compares:
            from lib_dynfuse.compared import open_given

            given = open_given(options)
        written = _generate(
            _open(model, lora_dir, prompt, out, device, config, download),
            model,
            Source.of_owner(models, download),
            options,
            out,
            [first + number for number in range(batch)],
            {
                "prompt": prompt,
                "negative": negative,
                "steps": steps,
                "cfg": cfg,
                "size": _size(size),
                "sampler": sampler or None,
            },
            given,
        )
    for path in written:
        typer.echo(writable(str(path)))


def _open(
    model: Path, lora_dir: Path | None, prompt: str, out: Path, device: str, config: Path | None, download: bool
) -> Any:
    """The host, once all that can be checked without it is known to be right: opening a model takes a while."""
    tags = parse_prompt(prompt).tags
    check_folder(out)
    for line in finish_killed(out):
        say(line)
    quiet_libraries()
    from lib_dynfuse.hosts.devices import check_device
    from lib_dynfuse.hosts.diffusers import Embedded
    from lib_dynfuse.hosts.lora_files import find_lora, open_lora

    check_device(device)
    for tag in tags:
        open_lora(find_lora(lora_dir, tag.name))
    return Embedded.load(model, lora_dir, device or None, config=config, say=say, download=download)


def quiet_libraries() -> None:
    """Their notices are for developers; what a person needs to know, the host says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _generate(
    host: Any,
    model: Path,
    source: Source,
    options: Options,
    out: Path,
    seeds: Sequence[int],
    settings: dict[str, Any],
    given: Given,
) -> list[Path]:
    import torch

    from lib_dynfuse.trace import Trace

    fused = options.enabled and any(tag.role for tag in parse_prompt(settings["prompt"]).tags)
    if fused:
        for name in options.unused():
            say(f"the rule {options.strategy} has no {name}: it changes nothing")
    chooses = fused and options.make_strategy().outcome is not Outcome.NOTHING
    trace = (
        Trace(passes=settings["steps"], tokens=options.strategy == "kl-token") if chooses and options.trace else None
    )
    try:
        guidance, guide = _guide(host, model, source, options, seeds, settings, given)
        images = host.generate(options=options, seeds=seeds, trace=trace, guide=guide, progress=True, **settings)
        scores = guidance.scores(_tensors(images), range(len(images))) if guidance is not None else []
    except torch.cuda.OutOfMemoryError as error:
        raise DynFuseError("the device has not enough memory; a smaller --size or --batch needs less") from error
    record = _record(trace, guide, options, parse_prompt(settings["prompt"]).tags)
    width, height = settings["size"] or host.default_size
    kept = best(scores, options.keep_best) if scores else list(range(len(images)))
    with Batch(out, [seeds[index] for index in kept]) as files:
        for place, index in enumerate(kept):
            values = {
                "Steps": settings["steps"],
                "Sampler": host.sampler_name(settings["sampler"]),
                "CFG scale": f"{settings['cfg']:g}",
                "Seed": seeds[index],
                "Size": f"{width}x{height}",
                "Model": writable(host.name),
                **_described(options, fused, guidance is not None, given),
                SCORES_KEY: as_text(scores[index]) if scores else None,
            }
            files.picture(place, images[index], infotext(settings["prompt"], settings["negative"], values))
        if record is not None and (record.layers or record.nudges):
            _add_trace(files, record, images, kept)
        written = files.keep()
        shares = record.shares() if record is not None else {}
        for place, index in enumerate(kept):
            if record is not None and index in shares:
                say(f"picture {files.stem(place)}: {record.in_words(shares[index])}")
        return written


def _guide(
    host: Any,
    model: Path,
    source: Source,
    options: Options,
    seeds: Sequence[int],
    settings: dict[str, Any],
    given: Given,
) -> tuple[Guidance | None, Guide | None]:
    """What scores the pictures, and what nudges them; nothing is loaded where neither is wanted."""
    if not options.compares:
        return None, None
    from lib_dynfuse import compared

    guidance = compared.guidance(host, model, options, seeds, settings, source, say, given=given)
    if guidance is None or guidance.nudge is None:
        return guidance, None
    return guidance, guidance.guide(range(len(seeds)), seeds, host.decoder(options.nudge_decoder, source))


def _record(trace: Any, guide: Guide | None, options: Options, tags: Sequence[LoraTag]) -> Record | None:
    """What was chosen and how R fell; why nudges were left out is said."""
    from lib_dynfuse.trace import Record

    record: Record | None = trace.read() if trace is not None else None
    if record is not None:
        record.weighed = options.make_strategy().outcome is Outcome.WEIGHED
        record.names = {role.value: [tag.name for tag in tags if tag.role is role and tag.unet] for role in Role}
    if guide is None:
        return record
    for reason in guide.reasons():
        say(reason)
    if record is None and options.trace:
        record = Record([], [], np.empty((0, 0, 0, 4), np.float32))
    if record is not None:
        record.nudges = guide.curve()
    return record


def _described(options: Options, fused: bool, compared: bool, given: Given) -> dict[str, str]:
    """The options for a picture's infotext. Where nothing was fused but guidance was at work, the LoRAs were added."""
    if not (fused or compared):
        return {}
    written = options if fused else Options(**{**vars(options), "enabled": True, "strategy": "sum", "parameters": {}})
    return written.infotext({name: fingerprints(pictures) for name, pictures in given.items()})


def _tensors(images: Sequence[Any]) -> Tensor:
    """[B, 3, H, W] in 0..1."""
    import torch

    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def _add_trace(files: Batch, record: Record, images: Sequence[Any], kept: Sequence[int]) -> None:
    """What was chosen, as numbers and as a heat map; where, too, for a rule that decides place by place."""
    from lib_dynfuse.trace.pictures import heat_map, overlay, save

    files.file(0, "-trace.json", record.to_json)
    for place, index in enumerate(kept):
        files.file(place, "-chosen.png", partial(save, heat_map(record, index)))
        if record.tokens:
            files.file(place, "-where.png", partial(save, overlay(record, index, np.asarray(images[index]))))


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`--set name=value`, the value as a number or a switch where it is one."""
    return dict(assignment(text, "--set") for text in texts)


def _weights(texts: Sequence[str]) -> dict[str, Any]:
    """`--weight clip_style=2`."""
    found = dict(assignment(text, "--weight") for text in texts)
    if unknown := [name for name in found if name not in TERMS]:
        raise OptionsError(f"--weight {shown(unknown[0])}: unknown; there are: {', '.join(TERMS)}")
    return {f"weight_{name}": value for name, value in found.items()}


def assignment(text: str, where: str) -> tuple[str, Any]:
    """`name=value`, the value as a number or a switch where it is one. Raises OptionsError that begins with `where`."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name or not equals or not value:
        raise OptionsError(f"{where} {shown(text)}: write NAME=VALUE, as in softness=0.5")
    if value.lower() in ("true", "on", "false", "off"):
        return name, value.lower() in ("true", "on")
    try:
        number = float(value)
    except ValueError:
        return name, value
    if not math.isfinite(number):  # nothing can be computed with an integer of 400 digits either
        raise OptionsError(f"{where} {shown(text)}: the number is not finite")
    try:
        return name, int(value)
    except ValueError:
        return name, number


def _check_letters(texts: Mapping[str, str]) -> None:
    """Raises DynFuseError for half a surrogate pair, which no picture's text and no tokenizer can take."""
    for option, text in texts.items():
        wrong = next((number for number, letter in enumerate(text, 1) if "\ud800" <= letter <= "\udfff"), None)
        if wrong is not None:
            raise DynFuseError(f"{option}: letter {wrong} is half a surrogate pair, not a letter; is it UTF-8?")


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,5})\s*(?:[xX×]\s*(\d{1,5})\s*)?", text)
    if match is None:
        raise DynFuseError(f"--size {shown(text)}: write WIDTHxHEIGHT, as in 512x768")
    return int(match[1]), int(match[2] or match[1])
