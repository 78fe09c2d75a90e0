"""The pictures that guidance compares with: given by a person, a LoRA's preview on disk, or made by that LoRA alone.

docs/method.md, section 3. Pictures made are kept on disk, so that they are made once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.objectives import Each, Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCES = ("auto", "given", "preview", "generated")
# In the WebUIs' order of the two spellings; they leave the order of the endings to chance.
_PREVIEWS = tuple(
    f"{middle}.{ending}" for ending in ("png", "jpg", "jpeg", "webp", "gif") for middle in ("", ".preview")
)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_KEPT = re.compile(r"[0-9a-f]{64}\.png")
_PNG_END = b"IEND\xaeB`\x82"
# A file is forsaken when it was never finished, its process being gone.
_UNFINISHED, _FORSAKEN_SECONDS = ".making-", 3600
# Letters of a source in a message: base64 may be megabytes.
_SHOWN, _SHOWN_OF_PATH = 80, 500
_log = logging.getLogger("lib_dynfuse")


class PictureError(ValueError):
    """A picture that cannot be read; the message is one line that names it."""


def read_picture(source: str | Path) -> Tensor:
    """[1, 3, H, W] float32 RGB in 0..1, turned as its EXIF says, on white where it is transparent, of several frames
    the first.

    `source`: a path; as text also a picture in base64, or a data URL of one. Raises PictureError.
    """
    if isinstance(source, Path):
        return _read_file(source)
    text = source.strip().strip("\"'")
    url = _DATA_URL.match(text)
    if url is None and text.lower().startswith("data:"):
        raise PictureError(f"{_shown(text)}: a data URL has to be of the kind data:image/png;base64,...")
    if url is None and (os.path.exists(text) or "." in text):  # base64 has no full stop
        return _read_file(Path(text))
    data = _from_base64(text[url.end() :] if url else text)
    if data is None:
        raise PictureError(f"{_shown(text)}: there is no such file, and it is not a picture in base64")
    return _read(io.BytesIO(data), _shown(text))


def _shown(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _from_base64(text: str) -> bytes | None:
    """Of either alphabet, in lines or in one, with or without its padding."""
    letters = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _read_file(path: Path) -> Tensor:
    if not os.path.isfile(path):  # unlike Path's own, it takes whatever was written
        why = "is a folder, not a picture" if os.path.isdir(path) else "there is no such file"
        raise PictureError(f"{_shown(str(path), _SHOWN_OF_PATH)}: {why}")
    return _read(path, str(path))


def _read(file: Path | io.BytesIO, name: str) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            pixels = np.array(_on_white(ImageOps.exif_transpose(image)), dtype=np.float32)
    # A broken file raises whatever its format's reader stumbles over.
    except Exception as error:
        raise PictureError(f"{name}: is not a picture, or not a whole one") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def _on_white(image: Image) -> Image:
    import numpy as np
    from PIL import Image as images

    if image.mode.startswith("I"):
        # 16 bits a pixel: PIL would cut them off where they have to be scaled.
        shades = np.asarray(image, dtype=np.float32) / 257
        image = images.fromarray(shades.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def find_preview(lora: Path) -> Path | None:
    """The picture that the WebUIs show for a LoRA: beside my_fox.safetensors my_fox.png, my_fox.preview.png,
    my_fox.jpg and so on. None where there is none."""
    candidates = (lora.with_name(f"{lora.stem}{ending}") for ending in _PREVIEWS)
    return next((path for path in candidates if path.is_file()), None)


@dataclass(frozen=True)
class Wanted:
    """A picture to be made by one role's LoRAs alone: all that it depends on.

    `loras`: hash and multiplier of each; `size`: width and height in pixels; `settings`: steps, sampler, cfg and
    whatever else changes the picture, as JSON knows it.
    """

    checkpoint: str
    loras: tuple[tuple[str, float], ...]
    prompt: str
    negative: str
    seed: int
    size: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """64 letters that no other picture has. Raises TypeError for a setting that JSON does not know."""
        everything = [
            self.checkpoint,
            [[name, float(multiplier)] for name, multiplier in self.loras],
            self.prompt,
            self.negative,
            self.seed,
            list(self.size),
            dict(self.settings),
        ]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


class Cache:
    """Pictures on disk by `Wanted.key`, at most `most_bytes` of them: those not asked for the longest are thrown away.

    Nothing else in `folder` is touched. A folder that cannot be written to keeps nothing, which is logged.
    """

    def __init__(self, folder: Path, most_bytes: int = 512 * 2**20) -> None:
        self._folder = folder
        self._most_bytes = most_bytes

    def get(self, key: str) -> Tensor | None:
        """[1, 3, H, W] in 0..1 as it was put, in steps of 1/255; None where it is not there or not whole."""
        path = self._folder / f"{key}.png"
        try:
            data = path.read_bytes()
            if not data.endswith(_PNG_END):  # some programs tell PIL to fill up what is cut off
                return None
            picture = _read(io.BytesIO(data), path.name)
        except (OSError, PictureError):
            return None
        with suppress(OSError):
            os.utime(path)
        return picture

    def put(self, key: str, image: Tensor) -> None:
        """Keep a picture [1, 3, H, W] in 0..1, whole or not at all."""
        from PIL import Image

        pixels = (image[0].detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    Image.fromarray(pixels.numpy()).save(file, format="PNG")
                os.replace(unfinished, self._folder / f"{key}.png")
            finally:
                Path(unfinished).unlink(missing_ok=True)
            self._throw_away(newest=key)
        except OSError as error:
            _log.warning("%s: pictures to compare with cannot be kept there: %s", self._folder, error.strerror or error)

    def _throw_away(self, newest: str) -> None:
        left = self._most_bytes
        for when, size, path in sorted(self._files(), reverse=True):
            if path.name.startswith(_UNFINISHED):
                if time.time() - when > _FORSAKEN_SECONDS:
                    path.unlink(missing_ok=True)
                continue
            left -= size
            if left < 0 and path.stem != newest:
                path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[float, int, Path]]:
        """When it was asked for last, its bytes, its path."""
        found = []
        for entry in os.scandir(self._folder):
            if _KEPT.fullmatch(entry.name) or entry.name.startswith(_UNFINISHED):
                try:
                    told = entry.stat()
                except FileNotFoundError:  # another process threw it away
                    continue
                found.append((told.st_mtime, told.st_size, Path(entry.path)))
        return found


def collect(
    source: str,
    given: Sequence[str],
    preview: Path | None,
    generate: Callable[[], Sequence[Tensor]] | None,
) -> tuple[Pictures | Each | None, str]:
    """The references of one role and where they come from: "given 2", "preview", "generated"; None and "" where there
    are none.

    `source`: the one of SOURCES that may be used; with "auto" the first that has pictures. `generate`: makes one
    picture for each that will be compared; what it raises is passed on. Raises PictureError for a given picture that
    cannot be read; a preview that cannot be read is passed by.
    """
    if source in ("auto", "given") and given:
        return [read_picture(one) for one in given], f"given {len(given)}"
    if source in ("auto", "preview") and preview is not None:
        try:
            return read_picture(preview), "preview"
        except PictureError as error:
            _log.warning("%s", error)
    if source in ("auto", "generated") and generate is not None:
        made = list(generate())
        if made:
            return Each(made), "generated"
    return None, ""
