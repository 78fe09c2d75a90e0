"""The pictures that guidance compares with: given by a person, a LoRA's preview on disk, or made by that LoRA alone.

docs/method.md, section 3. Pictures made are kept on disk, so that they are made once.
"""

from __future__ import annotations

import hashlib
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
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.objectives import Each, Pictures
from lib_dynfuse.guidance.pictures import PictureError, PictureFile, open_file

# In the WebUIs' order of the two spellings; they leave the order of the endings to chance.
_PREVIEWS = tuple(
    f"{middle}.{ending}" for ending in ("png", "jpg", "jpeg", "webp", "gif") for middle in ("", ".preview")
)
_KEPT = re.compile(r"[0-9a-f]{64}\.png")
_PNG_END = b"IEND\xaeB`\x82"
# A file is forsaken when it was never finished, its process being gone.
_UNFINISHED, _FORSAKEN_SECONDS = ".making-", 3600
_log = logging.getLogger("lib_dynfuse")


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
            picture = PictureFile(path.name, data).decode(side=None)
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
            _log.warning("pictures to compare with cannot be kept on disk: %s", error.strerror)

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
    given: Sequence[PictureFile],
    preview: Path | None,
    generate: Callable[[], Sequence[Tensor]] | None,
) -> tuple[Pictures | Each | None, str]:
    """The references of one role and where they come from: "given 2", "preview", "generated"; None and "" where there
    are none.

    `source`: which may be used, "given", "preview" or "generated"; with "auto" the first that has pictures. `generate`:
    makes one picture for each that will be compared; what it raises is passed on. Raises PictureError for a given
    picture that cannot be decoded; a preview that cannot be is passed by.
    """
    if source in ("auto", "given") and given:
        return [one.decode() for one in given], f"given {len(given)}"
    if source in ("auto", "preview") and preview is not None:
        try:
            # By its name alone: the log of a server is no place for its folders.
            return open_file(preview, preview.name).decode(), "preview"
        except PictureError as error:
            _log.warning("%s", error)
    if source in ("auto", "generated") and generate is not None:
        made = list(generate())
        if made:
            return Each(made), "generated"
    return None, ""
