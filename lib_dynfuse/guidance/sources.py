"""Where CLIP and DINO may come from: which names a stranger may write, and what may be fetched from the model hub.

A name in a request, in an X/Y/Z plot or in a prompt's infotext is written by anybody. It opens nothing but a file below
one folder, and fetches nothing but what the machine's owner has allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lib_dynfuse.guidance.libraries import EncoderError, library

MODELS = "models/dynfuse"
HUB = "https://huggingface.co"
# Longer than any file name, and short enough to be shown.
_LONGEST = 200
# Windows takes these for devices, whatever follows the first dot.
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|com\d|lpt\d)(\.|$)", re.IGNORECASE)
# What Windows forbids, and what means a drive, a stream, another folder or a home there or elsewhere.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\ud800-\udfff\\:*?"<>|~]')
# An architecture is longer than a drive letter.
_ARCHITECTURE = re.compile(r"[\w.-]{2,}")
# What a tokenizer or a text tower of the hub is made of: no pickle and no code is among it.
_TEXT_FILES = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class Published:
    """An encoder's weights on the model hub, one safetensors file, and where a person would put that file.

    `megabytes`: of 10^6 bytes, None where it is not known before the hub is asked.
    """

    kind: str
    repository: str
    file: str
    local: str
    megabytes: int | None = None

    @property
    def url(self) -> str:
        return f"{HUB}/{self.repository}/resolve/main/{self.file}"

    @property
    def size(self) -> str:
        return "of unknown size" if self.megabytes is None else f"{self.megabytes} MB"


# The encoders that everybody may ask for, by the names that options give them. Sizes: the parameters in float32.
CLIPS = {
    "ViT-B-32:laion2b_s34b_b79k": Published(
        "CLIP",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "open_clip_model.safetensors",
        "ViT-B-32-laion2b_s34b_b79k.safetensors",
        605,
    ),
}
DINOS = {
    # Facebook's own repository has pickles alone; timm has the same weights.
    "facebook/dino-vits16": Published(
        "DINO", "timm/vit_small_patch16_224.dino", "model.safetensors", "dino-vits16.safetensors", 87
    ),
    "facebook/dinov2-small": Published(
        "DINO", "facebook/dinov2-small", "model.safetensors", "dinov2-small.safetensors", 88
    ),
}


class NotAllowedError(EncoderError):
    """A name may not be used; there is one message for all of them."""


class MissingError(EncoderError):
    """An encoder's weights are not on this machine and may not be fetched; `wanted` says which they are."""

    def __init__(self, wanted: Published, source: Source) -> None:
        super().__init__(missing([wanted], source))
        self.wanted = wanted


def missing(wanted: Sequence[Published], source: Source) -> str:
    """In one line: what is missing, which files to put where, where they are to be had, and what would fetch them."""
    kinds = " and ".join(one.kind for one in wanted)
    files = " and ".join(f"{one.url} ({one.size}) as {source.title}/{one.local}" for one in wanted)
    verb = "are" if len(wanted) > 1 else "is"
    return f"{kinds} {verb} not on this machine: put {files}" + (f", or {source.consent}" if source.consent else "")


@dataclass(frozen=True)
class Source:
    """What the machine's owner allows. Without arguments: nothing but what the hub's cache on this disk has.

    folder: where names are looked for first. title: what messages call it, as they name no other path.
    paths: names may be paths, and any of the hub's: for the command line, where the owner is who writes them.
    allowed: names of the hub that may be used besides the published ones.
    download: what is missing is fetched. consent: what to do to have it fetched, for the message that says so.
    pickles: pickled weights may be read below `folder`; anywhere else none ever are.
    check_pickle: the host's own check of such a file, given it open; it raises.
    """

    folder: Path | None = None
    title: str = MODELS
    paths: bool = False
    allowed: tuple[str, ...] = ()
    download: bool = False
    consent: str = ""
    pickles: bool = False
    check_pickle: Callable[[BinaryIO], None] | None = field(default=None, compare=False)

    @staticmethod
    def of_owner(folder: Path | None, download: bool = False) -> Source:
        """For the command line: names may be paths, pickles are read below `folder`."""
        consent = "" if download else "have it downloaded with --download"
        return Source(folder, str(folder or MODELS), True, (), download, consent, True)

    def shown(self, path: Path) -> str:
        """A file's name as messages may carry it."""
        try:
            return f"{self.title}/{path.relative_to(self.folder).as_posix()}" if self.folder else path.name
        except ValueError:
            return path.name

    def has_below(self, path: Path) -> bool:
        """Whether a file really lies below the folder, links followed."""
        return self.folder is not None and path.resolve().is_relative_to(self.folder.resolve())

    def check(self, kind: str, name: str) -> None:
        """Raises NotAllowedError for a name that could be anything but one below the folder or one of the hub's.

        Looks at nothing but the name, and answers alike whatever is on the disk.
        """
        if not (self.paths or is_plain(name)):
            raise self.refusal(kind)

    def may_fetch(self, name: str, published: dict[str, Published]) -> bool:
        """Whether this name of the hub's may be used at all."""
        return self.paths or name in published or name in self.allowed

    def refusal(self, kind: str) -> EncoderError:
        """The one answer to every name that may not be used."""
        return NotAllowedError(not_allowed(kind, self.title))


def not_allowed(kind: str, title: str = MODELS) -> str:
    """The one answer to every name of an encoder that may not be used, and what may be."""
    names = ", ".join(CLIPS if kind == "CLIP" else DINOS)
    return (
        f"this {kind} may not be used; allowed are files and folders in {title} by their names, {names}, "
        "and what the server was started with (--dynfuse-encoder)"
    )


def is_plain(name: str) -> bool:
    """Whether a name is relative and stays below where it is looked for, on every system: `dino-vits16`,
    `facebook/dino-vits16`, `ViT-B-32:my-weights.safetensors`."""
    if not name or len(name) > _LONGEST:
        return False
    architecture, colon, rest = name.partition(":")
    if colon and not _ARCHITECTURE.fullmatch(architecture):
        return False
    return all(_is_plain_part(part) for part in (rest if colon else name).split("/"))


def _is_plain_part(part: str) -> bool:
    # Windows cuts dots and spaces off the end: ".. " is the folder above there.
    cut = part.rstrip(". ")
    return bool(cut) and cut == part and not _FORBIDDEN.search(part) and not _DEVICES.match(part)


def fetched(wanted: Published, source: Source) -> Path:
    """The file, from the hub's cache on this disk, or from the hub where that is allowed.

    Raises MissingError where it is not, EncoderError where the hub has it not or cannot be reached.
    """
    return _cached_or(wanted, source, lambda hub: hub.hf_hub_download(wanted.repository, wanted.file))


def text_files(kind: str, repository: str, needed: str, source: Source) -> Path:
    """A folder with a repository's settings and tokenizer, `needed` among them. Raises EncoderError as `fetched`."""

    def ask(hub: Any) -> str:
        return f"{hub.snapshot_download(repository, allow_patterns=list(_TEXT_FILES))}/{needed}"

    try:
        return _cached_or(Published(kind, repository, needed, needed), source, ask).parent
    except MissingError:
        advice = f"; {source.consent}" if source.consent else ""
        raise EncoderError(f"{kind}, {HUB}/{repository}, is not on this machine{advice}") from None


def _cached_or(wanted: Published, source: Source, ask: Callable[[Any], str]) -> Path:
    hub = library("huggingface_hub", "huggingface_hub")
    try:
        # Its downloads go to the network even where they are told to look at the disk alone.
        cached = hub.try_to_load_from_cache(wanted.repository, wanted.file)
    except Exception as error:  # for what is no repository's name
        raise EncoderError(f"{wanted.kind}: {wanted.repository[:_LONGEST]} is no name on the model hub") from error
    if isinstance(cached, str):
        return Path(cached)
    if not source.download:
        raise MissingError(wanted, source)
    try:
        return Path(ask(hub))
    except Exception as error:  # its kinds have moved from version to version
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"answered {status}" if status else f"could not be reached ({type(error).__name__})"
        raise EncoderError(f"{wanted.kind}: {wanted.url} {why}") from error
