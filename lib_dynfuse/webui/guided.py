"""Guidance of one generation of the WebUI: references found, encoders and decoder loaded, pictures scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.guidance import clip_without_open_clip
from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.objectives import Each, Pictures
from lib_dynfuse.guidance.pictures import PictureError
from lib_dynfuse.guidance.references import collect
from lib_dynfuse.guides import Guidance, prepare
from lib_dynfuse.hosts.base import Host
from lib_dynfuse.hosts.clip_words import tokenizer_folders
from lib_dynfuse.hosts.reading import read_tags
from lib_dynfuse.options import Options
from lib_dynfuse.roles import strip_tags
from lib_dynfuse.webui import alone, settings
from lib_dynfuse.webui.references import Given

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Guided:
    """What nudges and scores the pictures of a generation."""

    guidance: Guidance
    decoder: Decoder | None

    def guide(self, p: Any) -> Guide | None:
        """What nudges the batch that is about to be sampled; None where pictures are only scored."""
        if self.decoder is None or self.guidance.nudge is None:
            return None
        seeds = list(p.seeds)
        return self.guidance.guide(_numbers(p, len(seeds)), seeds, self.decoder)

    def scores(self, p: Any, images: Tensor | Sequence[Tensor]) -> list[dict[str, float]]:
        """Of each picture of the batch that has been sampled, [B, 3, H, W] in 0..1."""
        pictures = images if isinstance(images, Tensor) else torch.stack(list(images))
        return self.guidance.scores(pictures, _numbers(p, len(pictures)))


def _numbers(p: Any, count: int) -> range:
    """The numbers of a batch's pictures among all of the generation."""
    first = p.iteration * p.batch_size
    return range(first, first + count)


def begin(p: Any, options: Options, host: Host, given: Given, tell: Callable[[str], None]) -> Guided | None:
    """Everything that takes time or may fail, ahead of sampling: never raises, what is missing is told.

    `given`: the pictures that came with the request, which are decoded here. May generate pictures of each LoRA alone;
    None where nothing is left to nudge or to score by.
    """
    clip_without_open_clip.tokenizer_folders = tokenizer_folders
    try:
        guidance = prepare(
            options,
            lambda role: _references(p, options, given, role),
            [strip_tags(prompt) for prompt in p.all_prompts],
            settings.encoder_source(),
            _device(),
            _dtype(),
            tell,
        )
    except (PictureError, DynFuseError) as error:
        tell(f"not nudged: {error}" if options.nudge else f"not scored: {error}")
        return None
    if guidance is None:
        return None
    if guidance.nudge is not None and guidance.nudge.mode == "xt" and host.no_xt:
        tell(f"the way of nudging xt cannot be used on {host.name}: {host.no_xt}; x0 was used")
        guidance.nudge = replace(guidance.nudge, mode="x0")
    decoder = None
    if guidance.nudge is not None:
        decoder, said = host.guiding.decoder(options.nudge_decoder, settings.is_on(settings.DOWNLOAD))
        if said:
            tell(said)
    return Guided(guidance, decoder)


def _references(p: Any, options: Options, given: Given, role: Role) -> Pictures | Each | None:
    pictures, _ = collect(
        options.references,
        given.get(f"{role.value}_references", ()),
        _preview(p, role),
        lambda: alone.pictures_alone(p, role, alone.reference_cache()),
    )
    return pictures


def _preview(p: Any, role: Role) -> Any:
    """Of the first LoRA in the first prompt that has this role, as the host takes a batch's LoRAs from there."""
    from modules import extra_networks

    _, networks = extra_networks.parse_prompts(list(p.all_prompts[:1]))
    names = [tag.name for tag in read_tags(networks) if tag.role is role]
    return next((path for path in map(alone.preview_of, names) if path is not None), None)


def _device() -> torch.device:
    from modules import devices

    named = settings.value("dynfuse_guidance_device")
    return torch.device(devices.device if named == "auto" else named)


def _dtype() -> torch.dtype:
    """The UNet's, but where that is made for storing alone, or where the processor would have to compute with it."""
    from modules import devices

    named = settings.value("dynfuse_guidance_dtype")
    if named != "auto":
        return _DTYPES[named]
    own: torch.dtype = devices.dtype_unet
    half = own in (torch.float16, torch.bfloat16) and _device().type != "cpu"
    return own if half else torch.float32
