"""LoRA files on disk: found by the name in a tag, opened without trust, and told apart by what they are made for."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib_dynfuse.errors import DynFuseError, shown
from lib_dynfuse.hosts.lora_names import EXPECTED, belongs_to_a_network

_SUFFIX = ".safetensors"
_OLD_SUFFIXES = (".pt", ".ckpt", ".bin", ".pth")
_LONGEST_NAME = 255
# A convolution over space and time has 5.
_MOST_DIMENSIONS = 5
_OTHER_FAMILIES = (
    (("double_blocks", "single_blocks", "single_transformer_blocks"), "Flux"),
    (("joint_blocks", "add_k_proj"), "SD3"),
)
_FAMILY_OF_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_READS_PROMPT = re.compile(
    r"attn2[._](?:processor\.)?to_k(?:_lora)?\.(?:lora_A|lora_down|lora\.down|down|hada_w1_b|diff$)"
)
_SECOND_TEXT_ENCODER = ("lora_te2_", "text_encoder_2.", "clip_g.", "text_encoders.clip_g.")
# What the WebUIs call by file name only, as they have words of their own for it.
_NO_ALIAS = ("none", "addams")


@dataclass(frozen=True)
class LoraFile:
    """What a checked LoRA file says of itself: tensor shapes by key, and its metadata."""

    name: str
    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def context_width(self) -> int | None:
        """How wide the prompt vectors are that its cross-attention reads; None where it has no such layer."""
        return next((shape[1] for key, shape in self.shapes.items() if _READS_PROMPT.search(key)), None)

    @property
    def made_for(self) -> str | None:
        """The kind of model it was made for, in the field's words; None where nothing in it says so."""
        for words, family in _OTHER_FAMILIES:
            if any(word in key for key in self.shapes for word in words):
                return family
        if any(key.startswith(_SECOND_TEXT_ENCODER) for key in self.shapes):
            return "SDXL"
        width = self.context_width
        if width is not None:
            return family_name(width)
        return self.metadata.get("modelspec.architecture") or self.metadata.get("ss_base_model_version")


def family_name(width: int) -> str:
    """A model's kind by the width of its prompt vectors: SD 1.x 768, SD 2.x 1024, SDXL 2048."""
    family = _FAMILY_OF_WIDTH.get(width, "a model of its own kind")
    return f"{family} (prompt vectors {width} wide)"


def find_lora(folder: Path | None, name: str) -> Path:
    """The file that a tag means: `name` is a file's name without its ending, or its path inside the folder.

    Where no file has the name, it may be the one that its trainer gave the LoRA, as in the WebUIs. Unicode may be
    composed or decomposed. Raises DynFuseError that lists what there is, the closest names first.
    """
    tag = f"<lora:{shown(name)}>"
    if folder is None:
        raise DynFuseError(f"{tag}: no LoRA folder is given; name it with --lora-dir")
    if not folder.is_dir():
        raise DynFuseError(f"LoRA folder {folder} does not exist")
    every = list(_walk(folder))
    files = {
        _composed(path.relative_to(folder).with_suffix("").as_posix()): path for path in every if path.suffix == _SUFFIX
    }
    wanted = _composed(name).strip().removesuffix(_SUFFIX)
    found = [key for key in files if wanted in (key, key.rpartition("/")[2])]
    if len(found) > 1 and wanted in files:
        found = [wanted]
    if len(found) > 1:
        raise DynFuseError(f"{tag}: several files have this name: {_listing(found)}; write its folder too")
    if found:
        path = files[found[0]]
        if not path.is_file():
            raise DynFuseError(f"{tag}: {path.name} is no file, or a link to one that is not there")
        return path
    named = [key for key, path in files.items() if wanted.lower() not in _NO_ALIAS and _alias(path) == wanted]
    if len(named) > 1:
        raise DynFuseError(f"{tag}: several files were trained under this name: {_listing(named)}; write one")
    if named:
        return files[named[0]]
    old = next((path for path in every if path.suffix in _OLD_SUFFIXES and _composed(path.stem) == wanted), None)
    if old is not None:
        raise DynFuseError(f"{tag}: {old.name} is not a {_SUFFIX} file; convert it first")
    if not files:
        raise DynFuseError(f"{tag}: no {_SUFFIX} file in {folder}")
    close = difflib.get_close_matches(wanted, files, n=3, cutoff=0.5) if len(wanted) <= _LONGEST_NAME else []
    hint = f" (did you mean {close[0]}?)" if close else ""
    others = [key for key in files if key not in close]
    raise DynFuseError(f"{tag}: not in {folder}{hint}; there is {_listing([*close, *others])}")


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in the order of their names; as in the WebUIs, linked folders too, each once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(root, name) for name in sorted(files))


def _composed(name: str) -> str:
    """Unicode in one form: file systems and prompts differ in how they write an accent."""
    return unicodedata.normalize("NFC", name)


def _alias(path: Path) -> str | None:
    """The name that a LoRA was trained under; None where its file has none, or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("ss_output_name")
    except (SafetensorError, OSError):
        return None
    return None if name is None else _composed(name).strip()


def _listing(names: object, most: int = 12) -> str:
    every = list(names)  # type: ignore[call-overload]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def open_lora(path: Path) -> LoraFile:
    """Read every tensor of the file once and let through only what can be used.

    Raises DynFuseError for an empty, truncated or foreign file, a rank of 0, and a NaN or infinite weight.
    """
    if path.stat().st_size == 0:
        raise DynFuseError(f"{path.name}: the file is empty")
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                shapes[key] = tuple(file.get_slice(key).get_shape())
                _check_tensor(f"{path.name}: {shown(key)}", shapes[key], partial(file.get_tensor, key))
    except (SafetensorError, OSError) as error:
        raise DynFuseError(f"{path.name}: damaged, or not a {_SUFFIX} file ({shown(str(error))})") from error
    if not shapes:
        raise DynFuseError(f"{path.name}: not a LoRA: it holds no tensors")
    if not any(belongs_to_a_network(key) for key in shapes):
        first = shown(next(iter(shapes)))
        raise DynFuseError(f"{path.name}: not a LoRA: its first key is {first}; expected {EXPECTED}")
    return LoraFile(path.stem, path, shapes, metadata)


def _check_tensor(where: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
    """Raises DynFuseError that begins with `where`, for a tensor that no network has."""
    if 0 in shape:
        raise DynFuseError(f"{where} is of rank 0, shape {list(shape)[:_MOST_DIMENSIONS]}: it holds nothing")
    if len(shape) > _MOST_DIMENSIONS:
        raise DynFuseError(f"{where} has {len(shape)} dimensions, at most {_MOST_DIMENSIONS} are known")
    try:
        finite = _is_finite(read())
    except (SafetensorError, OSError):
        raise
    except Exception as error:  # safetensors knows more kinds of numbers than torch, and torch more than it computes
        raise DynFuseError(f"{where} cannot be read ({shown(str(error))})") from error
    if not finite:
        raise DynFuseError(f"{where} has NaN or infinite weights")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # 8 bits: torch computes little with them
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
