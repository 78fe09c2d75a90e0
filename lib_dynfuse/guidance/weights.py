"""Files of weights below a folder: where they are, and what is in them.

A safetensors file holds numbers. A pickle is a program: one is read only below the owner's folder, only by a torch
without a known hole in its reader, and only once the host's own check has let it through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.libraries import EncoderError
from lib_dynfuse.guidance.sources import Source

SAFE = ".safetensors"
SUFFIXES = (SAFE, ".pt", ".pth", ".bin")
_PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# Holes through which a pickle runs code although torch is told to read weights only, and the release without each.
PICKLE_HOLES: Mapping[str, tuple[int, int]] = {"CVE-2025-32434": (2, 6), "CVE-2026-24747": (2, 10)}
# What trainings call the weights that they keep beside their own state.
_INNER = ("state_dict", "model_state_dict")
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.\d+)*(?P<before>[^+]*)")
_ZIP = b"PK\x03\x04"


def find(names: Sequence[str], source: Source, files: bool = True) -> Path | None:
    """The first of these names that is a folder or, with or without its ending, a file: in the source's folder and,
    where names may be paths, as it is."""
    rooms = [room for room in (source.folder, Path() if source.paths else None) if room is not None]
    for name in filter(None, names):
        for room in rooms:
            if (room / name).is_dir():
                return room / name
            for suffix in ("", *SUFFIXES) if files else ():
                path = room / f"{name}{suffix}"
                if path.suffix in SUFFIXES and path.is_file():
                    return path
    return None


def in_folder(folder: Path, source: Source) -> Path:
    """The weights in a folder. Raises EncoderError where there are none, or several that none is preferred of."""
    for name in _PREFERRED:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        raise EncoderError(f"{source.shown(folder)} has {f'{len(files)} files of' if files else 'no'} weights")
    return files[0]


def state_dict(path: Path, source: Source) -> dict[str, Tensor]:
    """The weights by name. Raises EncoderError where the file is no checkpoint, or one that may not be read.

    The file is opened once: what is checked is what is read. WebUIs replace `torch.load` and
    `safetensors.torch.load_file`, the one by a loader that renames a file that fails, the other by one that answers
    nothing: both are passed by.
    """
    if path.suffix == SAFE:
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
        except Exception as error:  # its own kind, which has moved between versions
            raise EncoderError(f"{source.shown(path)} is not a whole safetensors file") from error
    loaded = _unpickled(path, source)
    inner = [loaded[name] for name in _INNER if name in loaded] if isinstance(loaded, dict) else []
    state = inner[0] if inner else loaded
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise EncoderError(f"{source.shown(path)} has no weights by name")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _unpickled(path: Path, source: Source) -> Any:
    shown = source.shown(path)
    if not (source.pickles and source.has_below(path)):
        raise EncoderError(f"{shown} is a pickle, which may run code; take a {SAFE} file")
    if holes := pickle_holes(torch.__version__):
        raise EncoderError(
            f"{shown} is a pickle, and torch {torch.__version__} cannot read one safely ({', '.join(holes)}); "
            f"take a {SAFE} file"
        )
    with path.open("rb") as file:
        # torch takes whatever does not begin so for its old format, which the checks were not made for.
        if file.read(len(_ZIP)) != _ZIP:
            raise EncoderError(f"{shown} is not a checkpoint of torch 1.6 or later; take a {SAFE} file")
        if source.check_pickle is not None:
            file.seek(0)
            try:
                source.check_pickle(file)
            except Exception as error:
                raise EncoderError(f"{shown} is refused by the WebUI's own check; take a {SAFE} file") from error
        try:
            file.seek(0)
            return torch.serialization.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # its own kinds, pickle's, zipfile's
            raise EncoderError(f"{shown} is not a checkpoint of plain tensors; take a {SAFE} file") from error


def pickle_holes(version: str) -> list[str]:
    """The known holes of this torch's reader of pickles; all of them for a version that cannot be read."""
    found = _RELEASE.match(version)
    if found is None:
        return list(PICKLE_HOLES)
    # 2.10.0a0, rc1 and dev builds came before 2.10.0.
    release = (int(found[1]), int(found[2]), not found["before"])
    return [name for name, mended in PICKLE_HOLES.items() if release < (*mended, True)]


def read_json(path: Path, source: Source) -> dict[str, Any]:
    """Raises EncoderError where the file holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{source.shown(path)} is not JSON") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{source.shown(path)} holds no JSON object")
    return value
