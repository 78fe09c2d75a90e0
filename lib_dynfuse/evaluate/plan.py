"""What is compared: methods, and pairs of a subject and a style."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib_dynfuse.demo.split import (
    FRESH_SUBJECTS,
    HELD_STYLES,
    HELD_SUBJECTS,
    MORE_SUBJECTS,
    REPORTED_SUBJECTS,
    STYLE_WORDS,
    caption,
)
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.evaluate.methods import Method

HALVES = ("tuning", "reporting")


class Pair(NamedTuple):
    """A subject LoRA and a style LoRA, and a prompt for both.

    `subject` and `style` are the LoRAs' names, as in a prompt. What is made is judged by `truth`, the subject and the
    style as the box calls them, or by its nearness to pictures: `subject_pictures`, `style_pictures`.
    """

    subject: str
    style: str
    prompt: str
    truth: tuple[str, str] | None = None
    subject_pictures: tuple[Path, ...] = ()
    style_pictures: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.subject} + {self.style}"

    @property
    def settings(self) -> list[Any]:
        """All that its pictures and their measures depend on, as JSON holds it."""
        return [self.prompt, *([str(path) for path in paths] for paths in (self.subject_pictures, self.style_pictures))]

    def prompt_of(self, method: Method) -> str:
        """What a person would type for a method: LoRAs of strength 0 are left out, roles where it fuses."""
        roles = (":role=subject", ":role=style") if method.options.enabled else ("", "")
        tags = [
            f" <lora:{name}:{strength:g}{role}>"
            for name, strength, role in zip((self.subject, self.style), method.strengths, roles, strict=True)
            if strength
        ]
        return self.prompt + "".join(tags)


def half(name: str) -> list[str]:
    """The held-out subjects of one half, in an order that was drawn by lot before anything was looked at.

    Settings are tuned on the `tuning` half; on the `reporting` half they are only reported.
    """
    drawn = sorted(HELD_SUBJECTS)
    random.Random("halves").shuffle(drawn)
    return drawn[HALVES.index(name) :: 2]


def boxed_pairs(wanted: str) -> list[Pair]:
    """Of the box: `tuning`, `reporting`, `all`, `reported`, `fresh`, or SUBJECT:STYLE with commas between them, as in
    fox:hc,rocket:blob. `all` is both halves; the LoRAs of `reported` and `fresh` are not in the box.

    Raises DynFuseError that lists what there is.
    """
    wanted = wanted.strip()
    if wanted in HALVES or wanted == "all":
        subjects = [subject for name in HALVES if wanted in (name, "all") for subject in half(name)]
        return [_boxed(subject, style) for subject in subjects for style in HELD_STYLES]
    if wanted in ("reported", "fresh"):
        subjects = list(REPORTED_SUBJECTS if wanted == "reported" else FRESH_SUBJECTS)
        return [_boxed(subject, style) for subject in subjects for style in HELD_STYLES]
    pairs = []
    for text in (part.strip() for part in wanted.split(",")):
        subject, _, style = text.partition(":")
        if subject not in (*HELD_SUBJECTS, *MORE_SUBJECTS) or style not in HELD_STYLES:
            raise DynFuseError(
                f"--pairs {text}: write {', '.join(HALVES)}, all, reported, fresh, or SUBJECT:STYLE; subjects "
                f"are {', '.join(HELD_SUBJECTS)}, and, not in the box, {', '.join(MORE_SUBJECTS)}; styles are "
                f"{', '.join(HELD_STYLES)}"
            )
        pairs.append(_boxed(subject, style))
    return _each_once(pairs)


def _boxed(subject: str, style: str) -> Pair:
    # diffusers and peft come with it, which a worker process may do without.
    from lib_dynfuse.demo.loras import file_name

    loras = f"subject-{file_name(subject)}", f"style-{file_name(STYLE_WORDS[style])}"
    return Pair(*loras, caption(subject, style), (subject, style))


_KEYS = ("subject", "style", "prompt", "subject_pictures", "style_pictures")


def read_pairs(file: Path) -> list[Pair]:
    """A person's own pairs: a JSON list of objects with subject, style, prompt, subject_pictures and style_pictures.

    Pictures are paths, from the file's folder on. Raises DynFuseError that says which entry lacks what.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DynFuseError(f"--pairs {file}: is not a file of JSON; it should list the pairs") from error
    if not isinstance(entries, list) or not entries:
        raise DynFuseError(f"--pairs {file}: should be a list of objects with {', '.join(_KEYS)}")
    return _each_once(
        [_own(entry, f"--pairs {file}, entry {number}", file.parent) for number, entry in enumerate(entries, 1)]
    )


def _own(entry: Any, where: str, folder: Path) -> Pair:
    if not isinstance(entry, dict) or (unknown := set(entry) - set(_KEYS)):
        said = f"has {sorted(unknown)[0]!r}" if isinstance(entry, dict) else "is no object"
        raise DynFuseError(f"{where}: {said}; it may have {', '.join(_KEYS)}")
    for key in _KEYS[:3]:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise DynFuseError(f"{where}: {key} is missing; subject and style are LoRAs' names, prompt a text")
    if "<lora:" in entry["prompt"]:
        raise DynFuseError(f"{where}: the prompt has a LoRA tag; every method writes its own")
    pictures = [_pictures(entry.get(key) or [], f"{where}: {key}", folder) for key in _KEYS[3:]]
    return Pair(entry["subject"], entry["style"], entry["prompt"].strip(), None, *pictures)


def _pictures(paths: Any, where: str, folder: Path) -> tuple[Path, ...]:
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DynFuseError(f"{where} should be a list of paths")
    found = tuple(folder / path for path in paths)
    for path in found:
        if not path.is_file():
            raise DynFuseError(f"{where}: there is no file {path}")
    return found


def _each_once(pairs: Sequence[Pair]) -> list[Pair]:
    names = [pair.name for pair in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DynFuseError(f"--pairs: {twice} is there twice")
    return list(pairs)
