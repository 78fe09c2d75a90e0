"""LoRA tags as a person writes them in a prompt, and the role that a tag gives its network.

The syntax is the WebUI's: `<lora:name:0.8>`, `<lora:name:te:unet>`, named parts `te=`, `unet=`, `dyn=` in any place,
and our own `role=subject`, `role=style` or `role=none`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError

__all__ = ["LoraTag", "Prompt", "Role", "RoleError", "lora_tags", "parse_prompt", "parse_role"]

NO_ROLE = "none"
_CHOICES = (*(role.value for role in Role), NO_ROLE)
_KNOWN_PARTS = ("te", "unet", "dyn", "role")
_TAG = re.compile(r"<(?:lora|lyco):([^>]*)>", re.IGNORECASE)


class RoleError(DynFuseError):
    """A LoRA tag that cannot be read; the message quotes the tag, the wrong part and what is allowed."""


@dataclass(frozen=True)
class LoraTag:
    """One LoRA tag of a prompt.

    `unet` and `te` are the strengths on the image model and on the text encoders, `role` is None for a network that is
    added as always, `raw` is the tag as written.
    """

    name: str
    unet: float
    te: float
    role: Role | None
    raw: str


@dataclass(frozen=True)
class Prompt:
    """A prompt without its LoRA tags, the tags in order, and lines to tell the person who wrote it."""

    text: str
    tags: tuple[LoraTag, ...]
    notices: tuple[str, ...]


def parse_role(text: str, where: str) -> Role | None:
    """The role that `text` names, in any case; None for "none".

    `where` is quoted in the error. Raises RoleError for anything else, with the nearest allowed word.
    """
    word = text.strip().lower()
    if word == NO_ROLE:
        return None
    if word in _CHOICES:
        return Role(word)
    close = difflib.get_close_matches(word, _CHOICES, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise RoleError(f"{where}: unknown role {text.strip()!r}{hint}; allowed: {', '.join(_CHOICES)}")


def parse_prompt(prompt: str) -> Prompt:
    """Take the LoRA tags out of a prompt; text outside the tags stays as it is, letter for letter.

    As in the WebUI the text encoder's strength comes first and is the UNet's too where nothing else is said.
    Raises RoleError for a tag that cannot be read.
    """
    tags: list[LoraTag] = []
    notices: list[str] = []
    for match in _TAG.finditer(prompt):
        tags.append(_parse_tag(match.group(0), match.group(1), notices))
    return Prompt(_TAG.sub("", prompt), tuple(tags), tuple(notices))


def strip_tags(prompt: str) -> str:
    """A prompt without its LoRA tags, readable or not."""
    return _TAG.sub("", prompt).strip()


def lora_tags(prompt: str) -> list[str]:
    """The LoRA tags of a prompt as they are written, readable or not."""
    return [match.group(0) for match in _TAG.finditer(prompt)]


def _parse_tag(raw: str, body: str, notices: list[str]) -> LoraTag:
    positional, named = _split(raw, body, notices)
    name = positional[0].strip() if positional else ""
    if not name:
        raise RoleError(f"{raw}: names no LoRA; write <lora:name:1:role=subject>")
    if len(positional) > 4:
        raise RoleError(f"{raw}: {len(positional) - 1} numbers, at most 3 (text encoder, UNet, dyn) are allowed")
    te = _number(raw, "strength", positional[1]) if len(positional) > 1 else 1.0
    te = _number(raw, "te", named["te"]) if "te" in named else te
    unet = _number(raw, "unet", positional[2]) if len(positional) > 2 else te
    unet = _number(raw, "unet", named["unet"]) if "unet" in named else unet
    if "dyn" in named or len(positional) > 3:
        notices.append(f"{raw}: dyn is not supported here and was left out")
    return LoraTag(name, unet, te, _role(raw, named), raw)


def _split(raw: str, body: str, notices: list[str]) -> tuple[list[str], dict[str, str]]:
    positional: list[str] = []
    named: dict[str, str] = {}
    for part in body.split(":"):
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals:
            positional.append(part)
        elif key not in _KNOWN_PARTS:
            close = difflib.get_close_matches(key, _KNOWN_PARTS, n=1, cutoff=0.7)
            if close:
                raise RoleError(f"{raw}: unknown part {key}= (did you mean {close[0]}=?)")
            notices.append(f"{raw}: {key}= is not known here and was left out")
        elif "=" in value:
            example = f"{key}={Role.SUBJECT.value if key == 'role' else 0.8}"
            raise RoleError(f"{raw}: {part.strip()} has more than one '='; write one value, as in {example}")
        elif key in named:
            raise RoleError(f"{raw}: {key}= is given twice")
        else:
            named[key] = value
    return positional, named


def _role(raw: str, named: Mapping[str, str]) -> Role | None:
    return parse_role(named["role"], raw) if "role" in named else None


def _number(raw: str, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RoleError(f"{raw}: {what} {text.strip()!r} is not a number; write for example 0.8")
    return value
