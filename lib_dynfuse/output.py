"""Pictures on disk: numbered, with the WebUI's `parameters` chunk, all files of a generation or none of them.

The files are made in a folder `.making-*` of their own, whose lock says that its maker is alive. When all are there, a
plan of where they go is written beside them, and each is linked to its name, which has to be free: records first,
pictures last. A kill before the plan leaves nothing but that folder. After the plan, `finish_killed` does the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_dynfuse.errors import DynFuseError, shown
from lib_dynfuse.locks import Lock

_NUMBER = re.compile(r"(\d{5,9})-")
_MAKING, _LOCK, _PLAN = ".making-", "lock", "plan.json"
_PICTURE = re.compile(r"-\d+\.png")
# A folder without a lock is of an older version, or was made this moment.
_FORSAKEN_SECONDS = 3600


@dataclass(frozen=True)
class _Planned:
    """A file: its name in the folder where it was made, and in the end its picture's number followed by `tail`."""

    made: str
    index: int
    tail: str

    def final(self, first: int) -> str:
        return f"{first + self.index:05d}{self.tail}"


class Batch:
    """The files of one generation. They are made in a folder of their own and appear in `folder` together.

        with Batch(folder, seeds) as batch:
            batch.picture(0, image, text)
            batch.file(0, "-trace.json", lambda path: path.write_text("{}"))
            paths = batch.keep()

    No file that is there is ever overwritten, whoever else writes to `folder`. Raises DynFuseError where `folder`
    cannot be written to; leaves nothing behind unless `keep` was reached.
    """

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        check_folder(folder)
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._making, self._lock = _new_folder(folder)
        except OSError as error:
            raise DynFuseError(f"{folder} cannot be written to: {error.strerror}") from error
        self._seeds = seeds
        self._files: list[_Planned] = []
        self._first = 0

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *reason: object) -> None:
        _remove(self._making, self._lock)

    def stem(self, index: int) -> str:
        """What the names of a picture's files begin with, number and seed; known once they are kept."""
        return f"{self._first + index:05d}-{self._seeds[index]}"

    def picture(self, index: int, image: Image.Image, text: str) -> None:
        """One picture, `text` in the chunk that the WebUI's PNG Info reads."""
        info = PngInfo()
        info.add_text("parameters", text)
        self.file(index, ".png", lambda path: image.save(path, format="PNG", pnginfo=info))

    def file(self, index: int, ending: str, write: Callable[[Path], object]) -> None:
        """Another file of picture number `index`; `write` gets the path to write to."""
        tail = f"-{self._seeds[index]}{ending}"
        made = f"{index}{tail}"
        write(self._making / made)
        self._files.append(_Planned(made, index, tail))

    def keep(self) -> list[Path]:
        """Move every file to its place; returns where they are. Raises DynFuseError where that cannot be done."""
        try:
            self._first, paths = _settle(self._folder, self._making, next_number(self._folder), self._files)
        except OSError as error:
            raise DynFuseError(f"{self._folder} cannot be written to: {error.strerror}") from error
        return paths


def finish_killed(folder: Path) -> list[str]:
    """Finishes or removes what killed generations left in `folder`; lines that say so. Those at work are left alone."""
    said = []
    for making in sorted(folder.glob(f"{_MAKING}*")) if folder.is_dir() else ():
        if making.is_symlink() or not making.is_dir():
            continue
        try:
            said += _finish(folder, making)
        except OSError as error:
            said.append(f"{making.name}: a killed run left this, and it cannot be finished: {error.strerror}")
    return said


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there as a whole or as it was before, whenever a kill or a full disk comes."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


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


def _new_folder(folder: Path) -> tuple[Path, Lock | None]:
    """A folder to make files in, and its lock; no lock where the file system knows none."""
    while True:
        making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=folder))
        try:
            lock = Lock.take(making / _LOCK)
        except OSError:
            return making, None
        if lock is not None:
            return making, lock
        # Another process took it for forsaken before it was locked, and removes it.


def _remove(making: Path, lock: Lock | None) -> None:
    # The plan first, as it stands for files that are there; the lock last, as it says that nobody is at work any more.
    with suppress(OSError):
        for path in sorted(making.iterdir(), key=lambda path: path.name != _PLAN):
            if path.name != _LOCK:
                path.unlink()
    if lock is not None:
        lock.release()  # elsewhere than on POSIX no open file can be removed
    shutil.rmtree(making, ignore_errors=True)


def _finish(folder: Path, making: Path) -> list[str]:
    if not (making / _LOCK).exists():
        if time.time() - making.stat().st_mtime < _FORSAKEN_SECONDS:
            return []
        _remove(making, None)
        return ["a run that was killed had not finished its files: they were removed"]
    try:
        lock = Lock.take(making / _LOCK)
    except OSError:  # no locks on this file system: its maker may be alive
        return []
    if lock is None:
        return []
    try:
        plan = _read_plan(making)
        paths = _settle(folder, making, *plan)[1] if plan else []
    except OSError:
        lock.release()
        raise
    _remove(making, lock)
    if plan is None:
        return ["a run that was killed had not finished its files: they were removed"]
    listed = shown(", ".join(path.name for path in paths))
    return [f"a run that was killed had not moved all its files to their place; now they are there: {listed}"]


def _settle(folder: Path, making: Path, first: int, files: Sequence[_Planned]) -> tuple[int, list[Path]]:
    """Move files to the names that they have with `first`, or with the next number for which all are free.

    Returns that number and the paths. After an error no file has been moved.
    """
    ordered = sorted(files, key=lambda one: _PICTURE.fullmatch(one.tail) is not None)
    while True:
        _write_plan(making, first, ordered)
        moved: list[tuple[Path, Path]] = []
        try:
            for one in ordered:
                pair = (making / one.made, folder / one.final(first))
                _claim(*pair)
                moved.append(pair)
            return first, sorted(path for _, path in moved)
        except FileExistsError:
            _move_back(moved)
            first = max(first + 1, next_number(folder))
        except BaseException:
            _move_back(moved)
            raise


def _claim(made: Path, final: Path) -> None:
    """Give a file its name. Raises FileExistsError where the name is another file's."""
    if not made.exists() and final.exists():
        return  # before a kill
    try:
        os.link(made, final)
    except FileExistsError:
        if not os.path.samefile(made, final):
            raise
    except OSError:  # no links on this file system
        with open(final, "xb"):
            pass
        os.replace(made, final)


def _move_back(moved: Sequence[tuple[Path, Path]]) -> None:
    for made, final in moved:
        if made.exists():
            final.unlink()
        else:
            os.replace(final, made)


def _write_plan(making: Path, first: int, files: Sequence[_Planned]) -> None:
    write_whole(making / _PLAN, json.dumps({"first": first, "files": [asdict(one) for one in files]}))


def _read_plan(making: Path) -> tuple[int, list[_Planned]] | None:
    """None where none was written, as the files are not all there then; and where it is not one of ours."""
    try:
        plan = json.loads((making / _PLAN).read_text(encoding="utf-8"))
        first, files = int(plan["first"]), [_Planned(**one) for one in plan["files"]]
        names = [name for one in files for name in (one.made, one.final(first))]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return (first, files) if all(name == os.path.basename(name) for name in names) else None
