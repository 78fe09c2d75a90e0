"""The command `generate`: a prompt with LoRA tags in, pictures and what was chosen for them out."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.infotext import infotext
from lib_dynfuse.options import FIELDS, Options, OptionsError
from lib_dynfuse.output import Batch, check_folder
from lib_dynfuse.roles import parse_prompt

if TYPE_CHECKING:
    from lib_dynfuse.trace import Record

_MODEL, _PICTURE, _RULE = "The model", "The picture", "How LoRAs are fused"
_HELP = {option.name: f"{option.help} ({option.allowed})" for option in FIELDS}
_DEFAULT = Options()


def _model(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=_MODEL)


def _picture(help: str, min: float | None = None, max: float | None = None) -> Any:
    return typer.Option(help=help, rich_help_panel=_PICTURE, min=min, max=max)


def _rule(name: str) -> Any:
    return typer.Option(help=_HELP[name], rich_help_panel=_RULE)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """What a person can mend is said in one line on stderr, with exit code 2."""
    try:
        yield
    except DynFuseError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def say(line: str) -> None:
    typer.echo(f"note: {line}", err=True)


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
) -> None:
    """Make pictures from a prompt with LoRA tags.

    Give one LoRA role=subject and another role=style: every layer of every step then goes to one of them.
    A picture depends on its own seed alone, however many are made at once.
    """
    with one_clear_line():
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
        }
        options = Options.read(
            {"enabled": fuse, "trace": trace, "parameters": _assignments(parameters or []), **chosen}
        )
        first = random.SystemRandom().randrange(2**32 - batch) if seed < 0 else seed
        written = _generate(
            _open(model, lora_dir, prompt, out, device, config),
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
        )
    for path in written:
        typer.echo(path)


def _open(model: Path, lora_dir: Path | None, prompt: str, out: Path, device: str, config: Path | None) -> Any:
    """The host, once all that can be checked without it is known to be right: opening a model takes a while."""
    tags = parse_prompt(prompt).tags
    check_folder(out)
    quiet_libraries()
    from lib_dynfuse.hosts.diffusers import Embedded
    from lib_dynfuse.hosts.lora_files import find_lora, open_lora

    for tag in tags:
        open_lora(find_lora(lora_dir, tag.name))
    return Embedded.load(model, lora_dir, device or None, config=config, say=say)


def quiet_libraries() -> None:
    """Their notices are for developers; what a person needs to know, the host says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _generate(host: Any, options: Options, out: Path, seeds: Sequence[int], settings: dict[str, Any]) -> list[Path]:
    import torch

    from lib_dynfuse.trace import Trace

    fused = options.enabled and any(tag.role for tag in parse_prompt(settings["prompt"]).tags)
    if fused:
        for name in options.unused():
            say(f"the rule {options.strategy} has no {name}: it changes nothing")
    trace = Trace(passes=settings["steps"], tokens=options.strategy == "kl-token") if fused and options.trace else None
    try:
        images = host.generate(options=options, seeds=seeds, trace=trace, progress=True, **settings)
    except torch.cuda.OutOfMemoryError as error:
        raise DynFuseError("the device has not enough memory; a smaller --size or --batch needs less") from error
    record = trace.read() if trace is not None else None
    width, height = settings["size"] or host.default_size
    with Batch(out, list(seeds)) as files:
        for index, image in enumerate(images):
            values = {
                "Steps": settings["steps"],
                "Sampler": host.sampler_name(settings["sampler"]),
                "CFG scale": f"{settings['cfg']:g}",
                "Seed": seeds[index],
                "Size": f"{width}x{height}",
                "Model": host.name,
                **(options.infotext() if fused else {}),
            }
            files.picture(index, image, infotext(settings["prompt"], settings["negative"], values))
        if record is not None and record.layers:
            _add_trace(files, record, images)
        return files.keep()


def _add_trace(files: Batch, record: Record, images: Sequence[Any]) -> None:
    """What was chosen, as numbers and as a heat map; where, too, for a rule that decides place by place."""
    import numpy as np

    from lib_dynfuse.trace.pictures import heat_map, overlay, save

    files.file(f"{files.stem(0)}-trace.json", record.to_json)
    for index, image in enumerate(images):
        files.file(f"{files.stem(index)}-chosen.png", partial(save, heat_map(record, index)))
        if record.tokens:
            files.file(f"{files.stem(index)}-where.png", partial(save, overlay(record, index, np.asarray(image))))
    for index, share in record.shares().items():
        say(f"picture {files.stem(index)}: subject {share['subject']:.0%}, style {share['style']:.0%}")


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`--set name=value`, the value as a number or a switch where it is one."""
    return dict(assignment(text, "--set") for text in texts)


def assignment(text: str, where: str) -> tuple[str, Any]:
    """`name=value`, the value as a number or a switch where it is one. Raises OptionsError that begins with `where`."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name or not equals or not value:
        raise OptionsError(f"{where} {text}: write NAME=VALUE, as in softness=0.5")
    if value.lower() in ("true", "on", "false", "off"):
        return name, value.lower() in ("true", "on")
    try:
        number = float(value)
    except ValueError:
        return name, value
    return name, int(number) if re.fullmatch(r"[+-]?\d+", value) else number


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,5})\s*(?:[xX×]\s*(\d{1,5})\s*)?", text)
    if match is None:
        raise DynFuseError(f"--size {text}: write WIDTHxHEIGHT, as in 512x768")
    return int(match[1]), int(match[2] or match[1])
