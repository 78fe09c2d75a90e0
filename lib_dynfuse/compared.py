"""What the command `generate` compares its pictures with: given pictures, previews, or each LoRA's own pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.guidance.pictures import PictureError, PictureFile, open_picture
from lib_dynfuse.guidance.references import Cache, Wanted, collect, find_preview
from lib_dynfuse.guides import Guidance, prepare
from lib_dynfuse.hosts.lora_files import find_lora
from lib_dynfuse.options import Options
from lib_dynfuse.roles import LoraTag, Role, parse_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from lib_dynfuse.guidance.objectives import Each, Pictures
    from lib_dynfuse.guidance.sources import Source
    from lib_dynfuse.hosts.diffusers import Embedded

_GIVEN = {Role.SUBJECT: "subject_references", Role.STYLE: "style_references"}


def open_given(options: Options) -> dict[str, list[PictureFile]]:
    """The given pictures by their option's name, checked and not decoded yet; none where nothing is compared with them.

    Raises DynFuseError for one that cannot be read.
    """
    given: dict[str, list[PictureFile]] = {name: [] for name in _GIVEN.values()}
    if options.compares:
        try:
            for name, pictures in given.items():
                pictures += [open_picture(source) for source in getattr(options, name)]
                for one in pictures:
                    one.check()
        except PictureError as error:
            raise DynFuseError(str(error)) from error
    return given


def guidance(
    host: Embedded,
    model: Path,
    options: Options,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    source: Source,
    say: Callable[[str], None],
    progress: bool = True,
    given: Mapping[str, Sequence[PictureFile]] | None = None,
) -> Guidance | None:
    """What nudges and scores the pictures of these seeds; None where the options want neither, or nothing is left.

    `model`: where the host's model came from; `settings`: what `Embedded.generate` is given; `source`: where encoders
    may come from; `given`: what `open_given` opened, where that was done already. May make pictures, with a bar where
    `progress` is wished. What is missing is said. Raises DynFuseError for a given picture that cannot be read.
    """
    if not options.compares:
        return None
    text = parse_prompt(settings["prompt"])
    opened = open_given(options) if given is None else given

    def references(role: Role) -> Pictures | Each | None:
        tags = [tag for tag in text.tags if tag.role is role]
        alone = _Alone(host, model, role, text.tags, seeds, settings, progress) if tags else None
        try:
            found, source = collect(options.references, opened[_GIVEN[role]], _preview(host.lora_dir, tags), alone)
        except PictureError as error:
            raise DynFuseError(str(error)) from error
        if source:
            say(f"pictures of the {role.value} to compare with: {source}")
        return found

    unet = host.pipe.unet
    dtype = torch.float32 if unet.device.type == "cpu" else unet.dtype
    return prepare(options, references, [text.text], source, unet.device, dtype, say)


def _preview(folder: Path | None, tags: Sequence[LoraTag]) -> Path | None:
    found = (find_preview(find_lora(folder, tag.name)) for tag in tags)
    return next((path for path in found if path is not None), None)


class _Alone:
    """Makes, or finds again, each seed's picture without the other role's LoRAs (docs/method.md, section 1)."""

    def __init__(
        self,
        host: Embedded,
        model: Path,
        role: Role,
        tags: Sequence[LoraTag],
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        progress: bool,
    ) -> None:
        self._host = host
        self._progress = progress
        self._seeds = list(seeds)
        self._settings = dict(settings)
        for tag in tags:
            if tag.role not in (role, None):
                self._settings["prompt"] = self._settings["prompt"].replace(tag.raw, "")
        self._checkpoint = _identity(model)
        left = [tag for tag in tags if tag.role in (role, None)]
        self._loras = tuple((_hash(find_lora(host.lora_dir, tag.name)), tag.unet) for tag in left)

    def __call__(self) -> list[Tensor]:
        cache = Cache(_cache_folder())
        keys = [self._wanted(seed).key for seed in self._seeds]
        found = {key: picture for key in dict.fromkeys(keys) if (picture := cache.get(key)) is not None}
        missing = {key: seed for key, seed in zip(keys, self._seeds, strict=True) if key not in found}
        if missing:
            said, self._host.say = self._host.say, lambda line: None
            try:
                made = self._host.generate(
                    **self._settings,
                    options=Options(enabled=False),
                    seeds=list(missing.values()),
                    progress=self._progress,
                    tensors=True,
                )
            finally:
                self._host.say = said
            for key, picture in zip(missing, made, strict=True):
                # As it is kept, so that the next run compares with the same.
                found[key] = (picture[None].float().cpu().clamp(0, 1) * 255).round() / 255
                cache.put(key, found[key])
        return [found[key] for key in keys]

    def _wanted(self, seed: int) -> Wanted:
        same = {name: self._settings[name] for name in ("steps", "cfg")}
        sampler = self._host.sampler_name(self._settings["sampler"])
        device = f"{self._host.pipe.unet.device.type} {self._host.pipe.unet.dtype}"
        size = self._settings["size"] or self._host.default_size
        return Wanted(
            self._checkpoint,
            self._loras,
            self._settings["prompt"],
            self._settings["negative"],
            seed,
            tuple(size),
            {**same, "sampler": sampler, "device": device},
        )


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynfuse" / "references"


def _identity(model: Path) -> str:
    """A checkpoint as told by its files, which may be too large to be read for it."""
    files = sorted(model.rglob("*")) if model.is_dir() else [model]
    told = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _hash(lora: Path) -> str:
    return hashlib.sha256(lora.read_bytes()).hexdigest()
