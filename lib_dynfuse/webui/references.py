"""Reference pictures as a request brings them: uploaded on the page, in base64, or below a folder that the owner of the
server named when it was started. Nothing else of the disk is opened, or even looked at.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from lib_dynfuse.guidance.pictures import (
    FORMATS_SHOWN,
    PictureError,
    PictureFile,
    begins_as_one,
    fingerprints,
    in_text,
)
from lib_dynfuse.options import Options
from lib_dynfuse.webui.arguments import ORDER, PICTURES

FOLDER_FLAG = "--dynfuse-reference-folder"
MOST_PICTURES = 16
MOST_BYTES = 32 * 2**20
# One answer, whatever lies there or does not.
REFUSED = (
    f"is neither a picture in base64 ({FORMATS_SHOWN}) nor one below a folder that the server's {FOLDER_FLAG} allows"
)
_LONGEST_PATH = 4096
_LONGEST_NAME = 80
_NOT_SHOWN = re.compile(r"[^\w .()+-]")

Given = Mapping[str, Sequence[PictureFile]]


def given(options: Options, uploads: Mapping[str, str]) -> Given:
    """The pictures by their option's name, with their headers checked, none decoded; none where none are needed.

    `uploads`: of this request, as `uploads_in` finds them. Raises PictureError that names the picture by its number or
    by the name it was uploaded with, never by where it lies.
    """
    if not (options.enabled and options.compares and options.references in ("auto", "given")):
        return {}
    left = MOST_BYTES
    found: dict[str, list[PictureFile]] = {}
    for option in PICTURES:
        sources = getattr(options, option)
        if len(sources) > MOST_PICTURES:
            raise PictureError(f"{option}: {len(sources)} pictures; at most {MOST_PICTURES} are allowed")
        found[option] = []
        for number, source in enumerate(sources, 1):
            name = f"{option}: {uploads.get(source) or f'picture {number}'}"
            data = b"" if _too_long(source, left) else _bytes_of(source, uploads, left)
            if data is None:
                raise PictureError(f"{name}: {REFUSED}")
            if not 0 < len(data) <= left:
                raise PictureError(f"{name}: is empty, or more than {MOST_BYTES >> 20} MB come together")
            left -= len(data)
            one = PictureFile(name, data)
            one.check()
            found[option].append(one)
    return found


def described(found: Given) -> dict[str, str]:
    """What an infotext says of the pictures beside their number, by their option's name."""
    return {option: fingerprints(pictures) for option, pictures in found.items()}


def could_be_allowed(source: str) -> bool:
    """Whether a text is a picture in base64, or a path whose letters lie below an allowed folder."""
    return in_text(source) is not None or any(_below(source, folder) for folder in allowed_folders())


def uploads_in(args: Sequence[Any]) -> dict[str, str]:
    """Of what the page gives the script, the files that were uploaded to it: where they lie, and their names.

    A request names its uploads by their paths, and gradio 3 copies whatever lies at a path: only those that lie in its
    own folder of uploads count. What the API gives is JSON, in which there are no files.
    """
    found = {}
    for option in PICTURES:
        place = ORDER.index(option)
        files = args[place] if place < len(args) else None
        for one in files if isinstance(files, (list, tuple)) else [files]:
            # gradio 3: an open file with a name; gradio 4: a kind of str that has one.
            path = getattr(one, "name", None)
            if isinstance(path, str) and is_upload(path) and is_upload(str(getattr(one, "orig_name", path))):
                found[path] = _shown(path)
    return found


def is_upload(path: str) -> bool:
    """Whether a path, as gradio writes it, lies in its own folder of uploads."""
    folder = os.environ.get("GRADIO_TEMP_DIR") or os.path.join(tempfile.gettempdir(), "gradio")
    return os.path.isabs(path) and ".." not in Path(path).parts and _really_below(path, folder) is not None


def allowed_folders() -> list[str]:
    """A setting of the command line, not of the Settings page: that one is open to whoever reaches the page, and on
    some hosts to the API."""
    from modules import shared

    return list(getattr(shared.cmd_opts, FOLDER_FLAG.strip("-").replace("-", "_"), None) or [])


def _too_long(source: str, most: int) -> bool:
    """Base64 in lines has less than two letters for a byte."""
    return len(source) > 2 * most + _LONGEST_PATH


def _bytes_of(source: str, uploads: Mapping[str, str], most: int) -> bytes | None:
    """Of a picture that is uploaded, written out, or named and allowed; None for anything else."""
    if source in uploads:
        return _read(Path(source), most)
    data = in_text(source)
    if data is not None or len(source) > _LONGEST_PATH:
        return data
    for folder in allowed_folders():
        path = _really_below(source.strip().strip("\"'"), folder)
        if path is not None:
            data = _read(path, most)
            return data if data is not None and (len(data) > most or begins_as_one(data)) else None
    return None


def _below(path: str, folder: str) -> Path | None:
    """Where `path`, taken from `folder` if it is relative, lies by its letters; None where that is not below `folder`.

    The disk is not asked: even that may reach another machine, or tell what is there.
    """
    folder = os.path.abspath(folder)
    lies = Path(os.path.normpath(os.path.join(folder, path)))
    return lies if lies != Path(folder) and lies.is_relative_to(folder) else None


def _really_below(path: str, folder: str) -> Path | None:
    """As `_below`, with links followed."""
    with suppress(OSError, ValueError):  # of a zero byte
        lies = _below(path, folder)
        if lies is not None:
            real = Path(os.path.realpath(lies))
            return real if real.is_relative_to(os.path.realpath(folder)) else None
    return None


def _read(path: Path, most: int) -> bytes | None:
    """The bytes of a regular file, one more than `most` where it has more; None for whatever is none."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb", opener=_at_once) as file:
            return file.read(most + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except (OSError, ValueError):
        return None


def _at_once(path: str, flags: int) -> int:
    """Without waiting for who writes into a pipe that took the file's place."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _shown(path: str) -> str:
    """The name that a file was uploaded with, fit for a message."""
    name = PureWindowsPath(PurePath(path).name).name
    return _NOT_SHOWN.sub("_", name)[:_LONGEST_NAME]
