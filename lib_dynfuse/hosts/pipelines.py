"""Opening a Stable Diffusion 1.x, 2.x or XL model: a diffusers folder or a single `.safetensors` file."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from lib_dynfuse.errors import DynFuseError, shown
from lib_dynfuse.guidance.libraries import offline

_KINDS: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
_READABLE = "SD 1.x, SD 2.x and SDXL models can be used"
_NO_BASE = "has the second of SDXL's text encoders only, as its refiner has: give the base model"
_NO_ENCODER = f"has no text encoder of a known kind; {_READABLE}"
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
_LATENT_CHANNELS = 4
# Channels that a UNet takes beside the latent: a mask, a picture, its depth.
_OTHER_UNETS = {9: "an inpainting model", 8: "a model that edits a given picture", 5: "a depth model"}


def open_pipeline(model: Path, dtype: torch.dtype, config: Path | None = None, download: bool = False) -> Any:
    """The text-to-image pipeline of a model, without a safety checker. Weights are read from safetensors files alone.

    config: a diffusers folder of the same architecture, where a single file's tokenizer and component settings are
    taken from; without one they come from the hub's cache on this disk and, where `download` allows it, from the hub.
    A `.yaml` beside the file is its original configuration. Raises DynFuseError for what is missing, damaged or of
    another kind.
    """
    if config is not None and not config.is_dir():
        raise DynFuseError(f"--config {config} is not a folder")
    if model.is_dir():
        return _open_folder(model, dtype)
    if not model.exists():
        raise DynFuseError(f"model {model} does not exist")
    return _open_file(model, dtype, config, download)


def _open_folder(model: Path, dtype: torch.dtype) -> Any:
    index = model / "model_index.json"
    if not index.is_file():
        raise DynFuseError(f"{model} is no diffusers folder: it has no model_index.json")
    parts = _read_json(index)
    name = parts.get("_class_name")
    if not isinstance(name, str) or name not in _KINDS:
        raise DynFuseError(f"{model} is a {shown(str(name))}; {_READABLE}")
    if parts.get("text_encoder") in (None, [None, None]):
        raise DynFuseError(f"{model} {_NO_BASE if 'XL' in name else _NO_ENCODER}")
    settings = model / "unet" / "config.json"
    _check_channels(model, _read_json(settings).get("in_channels") if settings.is_file() else None)
    half_only = any(model.glob("unet/*.fp16.safetensors")) and not any(model.glob("unet/*model.safetensors"))
    try:
        return _KINDS[name].from_pretrained(
            model,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            variant="fp16" if half_only else None,
            **_extras(name),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DynFuseError(f"{model} cannot be loaded: {_line(error)}") from error


def _open_file(model: Path, dtype: torch.dtype, config: Path | None, download: bool) -> Any:
    name = _kind_of_file(model)
    original = model.with_suffix(".yaml")
    fetch = download and config is None
    try:
        with nullcontext() if fetch else offline():
            return _KINDS[name].from_single_file(
                str(model),
                dtype=dtype,
                config=None if config is None else str(config),
                original_config=str(original) if original.is_file() else None,
                local_files_only=not fetch,
                **_extras(name),
            )
    # Whatever the hub, the network or a state dict that does not fit may raise.
    except Exception as error:
        need = (
            ""
            if config
            else (
                "; a checkpoint lacks tokenizer and settings: give --config a diffusers folder of the same architecture"
            )
        )
        need += "" if config or download else ", or have them fetched from huggingface.co with --download (2 MB)"
        raise DynFuseError(f"{model} cannot be loaded: {_line(error)}{need}") from error


def _kind_of_file(model: Path) -> str:
    if model.suffix != ".safetensors":
        raise DynFuseError(f"{model} is not a .safetensors file")
    try:
        with safe_open(model, framework="pt") as file:
            keys = list(file.keys())
            first = file.get_slice(_FIRST_LAYER).get_shape() if _FIRST_LAYER in keys else []
    except (SafetensorError, OSError) as error:
        raise DynFuseError(f"{model} is damaged, or not a .safetensors file ({error})") from error
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise DynFuseError(f"{model} is not a Stable Diffusion checkpoint; {_READABLE}")
    _check_channels(model, first[1] if len(first) > 1 else None)
    if any(key.startswith("conditioner.embedders.") for key in keys):
        if not any(key.startswith("conditioner.embedders.1.") for key in keys):
            raise DynFuseError(f"{model} {_NO_BASE}")
        return "StableDiffusionXLPipeline"
    if any(key.startswith("cond_stage_model.") for key in keys):
        return "StableDiffusionPipeline"
    raise DynFuseError(f"{model} {_NO_ENCODER}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DynFuseError(f"{file} is damaged: {_line(error)}") from error
    if not isinstance(content, dict):
        raise DynFuseError(f"{file} is damaged: it holds no settings")
    return content


def _check_channels(model: Path, channels: Any) -> None:
    """Raises DynFuseError for a UNet that takes more than the latent; None is not known."""
    if channels is None or channels == _LATENT_CHANNELS:
        return
    kind = _OTHER_UNETS.get(channels, "of another kind") if isinstance(channels, int) else "of another kind"
    raise DynFuseError(
        f"{model} is {kind}: its UNet takes {shown(str(channels))} channels, a text-to-image model's "
        f"{_LATENT_CHANNELS}; {_READABLE}"
    )


def _extras(name: str) -> dict[str, Any]:
    if name == "StableDiffusionXLPipeline":
        return {"add_watermarker": False}
    return {"safety_checker": None, "requires_safety_checker": False}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
