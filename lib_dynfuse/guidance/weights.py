"""A user's files of weights: where they are, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.libraries import EncoderError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


def find(names: Sequence[str], folder: Path | None, files: bool = True) -> Path | None:
    """The first of these names that is a folder or, with or without its ending, a file: in `folder`, then as it is."""
    for name in names:
        for room in [folder, Path()] if folder is not None else [Path()]:
            if (room / name).is_dir():
                return room / name
            for suffix in ("", *SUFFIXES) if files else ():
                path = room / f"{name}{suffix}"
                if path.is_file():
                    return path
    return None


def is_path(text: str) -> bool:
    """Whether a person who wrote this meant a file."""
    return "/" in text or "\\" in text or text.endswith(SUFFIXES)


def in_folder(folder: Path) -> Path:
    """The weights in a folder. Raises EncoderError where there are none, or several that none is preferred of."""
    for name in _PREFERRED:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        raise EncoderError(f"{folder} has {f'{len(files)} files of' if files else 'no'} weights")
    return files[0]


def check(path: Path) -> None:
    """Raises EncoderError where the file is cut short or something else altogether."""
    if path.suffix == ".safetensors":
        _safetensors(path)
    else:
        state_dict(path)


def state_dict(path: Path) -> dict[str, Tensor]:
    """The weights by name. Raises EncoderError where the file is not a checkpoint.

    WebUIs replace `torch.load` and `safetensors.torch.load_file`, the one by a loader that renames a file that fails,
    the other by one that answers nothing: both are passed by.
    """
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
    try:
        loaded = torch.serialization.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its own kinds, pickle's, zipfile's
        raise EncoderError(f"{path} is not a checkpoint of plain tensors; a .safetensors file is best") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise EncoderError(f"{path} has no weights by name")
    return {name.removeprefix("module."): value for name, value in state.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Raises EncoderError where the file holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{path} holds no JSON object")
    return value


def _safetensors(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # its own kind, which has moved between versions
        raise EncoderError(f"{path} is not a whole safetensors file") from error
