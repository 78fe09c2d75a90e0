"""Pictures on disk: numbered, with the WebUI's `parameters` chunk, all files of a generation or none of them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_dynfuse.errors import DynFuseError

_NUMBER = re.compile(r"(\d{5})-")


class Batch:
    """The files of one generation. They are made in a folder of their own and appear in `folder` together.

        batch = Batch(folder, seeds)
        batch.picture(0, image, text)
        batch.file(f"{batch.stem(0)}.json", lambda path: path.write_text("{}"))
        paths = batch.keep()

    Raises DynFuseError where `folder` cannot be written to; leaves nothing behind unless `keep` was reached.
    """

    def __init__(self, folder: Path, seeds: list[int]) -> None:
        check_folder(folder)
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._making = tempfile.TemporaryDirectory(prefix=".making-", dir=folder)
        except OSError as error:
            raise DynFuseError(f"{folder} cannot be written to: {error.strerror}") from error
        self._first = next_number(folder)
        self._seeds = seeds
        self._names: list[str] = []

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *reason: object) -> None:
        self._making.cleanup()

    def stem(self, index: int) -> str:
        """The name of a picture's files without their endings: number and seed."""
        return f"{self._first + index:05d}-{self._seeds[index]}"

    def picture(self, index: int, image: Image.Image, text: str) -> None:
        """One picture, `text` in the chunk that the WebUI's PNG Info reads."""
        info = PngInfo()
        info.add_text("parameters", text)
        self.file(f"{self.stem(index)}.png", lambda path: image.save(path, format="PNG", pnginfo=info))

    def file(self, name: str, write: Callable[[Path], object]) -> None:
        """Any other file; `write` gets the path to write to."""
        write(Path(self._making.name) / name)
        self._names.append(name)

    def keep(self) -> list[Path]:
        """Move every file to its place; returns where they are."""
        for name in self._names:
            os.replace(Path(self._making.name) / name, self._folder / name)
        return [self._folder / name for name in self._names]


def check_folder(folder: Path) -> None:
    """Raises DynFuseError where something else than a folder stands in the way."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise DynFuseError(f"{folder} cannot be a folder of pictures: {place} is a file")


def next_number(folder: Path) -> int:
    """One more than the highest number that a file in `folder` starts with; 0 in an empty one."""
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NUMBER.match(path.name))]
    return max(numbers, default=-1) + 1
