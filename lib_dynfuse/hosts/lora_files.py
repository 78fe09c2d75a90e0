"""LoRA files on disk: found by the name in a tag, opened without trust, and told apart by what they are made for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib_dynfuse.errors import DynFuseError, shown

_SUFFIX = ".safetensors"
_OLD_SUFFIXES = (".pt", ".ckpt", ".bin", ".pth")
_LONGEST_NAME = 255
# A convolution over space and time has 5.
_MOST_DIMENSIONS = 5
# Other kinds of network, by how the last part of their keys begins.
_OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
    "boft_": "a BOFT",
    "on_input": "an (IA)³",
    "lora_mid": "a LoCon with a middle factor",
    "dora_scale": "a DoRA in kohya layout",
    "diff": "a full difference",
}
_OTHER_PART = re.compile(rf"\.({'|'.join(_OTHER_KINDS)})")
_OTHER_FAMILIES = (
    (("double_blocks", "single_blocks", "single_transformer_blocks"), "Flux"),
    (("joint_blocks", "add_k_proj"), "SD3"),
)
_FAMILY_OF_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_READS_PROMPT = re.compile(r"attn2[._](?:processor\.)?to_k(?:_lora)?\.(?:lora_A|lora_down|lora\.down|down)")


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
        if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in self.shapes):
            return "SDXL"
        width = self.context_width
        if width is not None:
            return family_name(width)
        return self.metadata.get("modelspec.architecture") or self.metadata.get("ss_base_model_version")

    @property
    def kind(self) -> str | None:
        """The kind of network where it is one that diffusers does not read as a LoRA, else None."""
        return next((_OTHER_KINDS[match[1]] for key in self.shapes if (match := _OTHER_PART.search(key))), None)


def family_name(width: int) -> str:
    """A model's kind by the width of its prompt vectors: SD 1.x 768, SD 2.x 1024, SDXL 2048."""
    family = _FAMILY_OF_WIDTH.get(width, "a model of its own kind")
    return f"{family} (prompt vectors {width} wide)"


def find_lora(folder: Path | None, name: str) -> Path:
    """The file that a tag means: `name` is a file's name without its ending, or its path inside the folder.

    Raises DynFuseError that lists what there is, the closest names first.
    """
    tag = f"<lora:{shown(name)}>"
    if folder is None:
        raise DynFuseError(f"{tag}: no LoRA folder is given; name it with --lora-dir")
    if not folder.is_dir():
        raise DynFuseError(f"LoRA folder {folder} does not exist")
    every = [path.relative_to(folder) for path in _walk(folder)]
    files = {path.with_suffix("").as_posix(): folder / path for path in every if path.suffix == _SUFFIX}
    wanted = name.strip().removesuffix(_SUFFIX)
    found = [path for key, path in files.items() if wanted in (key, path.stem)]
    if len(found) > 1 and wanted in files:
        found = [files[wanted]]
    if len(found) > 1:
        raise DynFuseError(f"{tag}: several files have this name: {_listing(map(str, found))}; write its folder too")
    if found:
        if not found[0].is_file():
            raise DynFuseError(f"{tag}: {found[0].name} is no file, or a link to one that is not there")
        return found[0]
    old = next((path for path in every if path.suffix in _OLD_SUFFIXES and path.stem == wanted), None)
    if old is not None:
        raise DynFuseError(f"{tag}: {old.name} is not a {_SUFFIX} file; convert it first")
    if not files:
        raise DynFuseError(f"{tag}: no {_SUFFIX} file in {folder}")
    close = difflib.get_close_matches(wanted, files, n=3, cutoff=0.5) if len(wanted) <= _LONGEST_NAME else []
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise DynFuseError(f"{tag}: not in {folder}{hint}; there is {_listing([*close, *(set(files) - set(close))])}")


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


def _listing(names: object, most: int = 12) -> str:
    every = list(names)  # type: ignore[call-overload]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def open_lora(path: Path) -> LoraFile:
    """Read every tensor of the file once and let through only what can be used.

    Raises DynFuseError for an empty, truncated or foreign file, a rank of 0, a NaN or infinite weight, and for kinds of
    network that diffusers does not read.
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
    lora = LoraFile(path.stem, path, shapes, metadata)
    if lora.kind is not None:
        raise DynFuseError(
            f"{path.name}: {lora.kind} network, which diffusers cannot read; use a LoRA, or a DoRA in peft's layout"
        )
    if not any("lora" in key for key in shapes):
        held = f"its first key is {shown(next(iter(shapes)))}" if shapes else "it holds no tensors"
        raise DynFuseError(f"{path.name}: not a LoRA: {held}")
    return lora


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
