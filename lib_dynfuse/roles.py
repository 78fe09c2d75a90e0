"""LoRA tags as a person writes them in a prompt, and the role that a tag gives its network.

The syntax is the WebUI's: `<lora:name:0.8>`, `<lora:name:te:unet>`, named parts `te=`, `unet=`, `dyn=` in any place,
and our own `role=subject`, `role=style` or `role=none`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError, quoted, shown

__all__ = [
    "LoraTag",
    "Prompt",
    "Role",
    "RoleError",
    "lora_tags",
    "parse_prompt",
    "parse_role",
    "role_tags",
    "strengths",
]

NO_ROLE = "none"
_CHOICES = (*(role.value for role in Role), NO_ROLE)
_KNOWN_PARTS = ("te", "unet", "dyn", "role")
_TAG = re.compile(r"<(?:lora|lyco):([^>]*)>", re.IGNORECASE)
_GIVES_ROLE = re.compile(rf":\s*role\s*=\s*(?!{NO_ROLE}\s*(?::|$))", re.IGNORECASE)
# Far beyond what anybody writes; they bound what one prompt can cost.
MOST_TAGS, MOST_PARTS = 200, 32
_LONGEST_PART_NAME = 20


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

    `where` begins the error's message. Raises RoleError for anything else, with the nearest allowed word.
    """
    word = text.strip().lower()
    if word == NO_ROLE:
        return None
    if word in _CHOICES:
        return Role(word)
    raise RoleError(
        f"{shown(where)}: unknown role {quoted(text.strip())}{_hint(word, _CHOICES, 0.5)}; "
        f"allowed: {', '.join(_CHOICES)}"
    )


def parse_prompt(prompt: str) -> Prompt:
    """Take the LoRA tags out of a prompt; text outside the tags stays as it is, letter for letter.

    As in the WebUI the text encoder's strength comes first and is the UNet's too where nothing else is said.
    Raises RoleError for a tag that cannot be read, and for more tags or more parts of a tag than anybody writes.
    """
    tags: list[LoraTag] = []
    notices: list[str] = []
    for match in _found(prompt):
        if len(tags) == MOST_TAGS:
            raise RoleError(f"the prompt has more than {MOST_TAGS} LoRA tags")
        tags.append(_parse_tag(match.group(0), match.group(1), notices))
    return Prompt(_without_tags(prompt), tuple(tags), tuple(notices))


def strip_tags(prompt: str) -> str:
    """A prompt without its LoRA tags, readable or not."""
    return _without_tags(prompt).strip()


def lora_tags(prompt: str) -> list[str]:
    """The LoRA tags of a prompt as they are written, readable or not."""
    return [match.group(0) for match in _found(prompt)]


def role_tags(prompt: str) -> list[str]:
    """The LoRA tags of a prompt that give a role, readable or not, as they are written."""
    return [match.group(0) for match in _found(prompt) if _GIVES_ROLE.search(match.group(1))]


def strengths(raw: str, positional: Sequence[str], named: Mapping[str, str]) -> tuple[float, float]:
    """A tag's strengths on the text encoders and on the UNet, of its parts without and with a name.

    positional[0] is the LoRA's name. Raises RoleError for a number that cannot be read, used or not: a WebUI then
    leaves out all LoRAs of the prompt.
    """
    te = _number(raw, "strength", positional[1]) if len(positional) > 1 else 1.0
    te = _number(raw, "te", named["te"]) if "te" in named else te
    unet = _number(raw, "unet", positional[2]) if len(positional) > 2 else te
    unet = _number(raw, "unet", named["unet"]) if "unet" in named else unet
    for rank in (*positional[3:4], *([named["dyn"]] if "dyn" in named else [])):
        _number(raw, "dyn", rank)
    return te, unet


def _found(prompt: str) -> Iterator[re.Match[str]]:
    return _TAG.finditer(prompt, 0, _end_of_tags(prompt))


def _without_tags(prompt: str) -> str:
    end = _end_of_tags(prompt)
    return _TAG.sub("", prompt[:end]) + prompt[end:]


def _end_of_tags(prompt: str) -> int:
    """Behind the last `>`: before it every opening makes a tag. After it each would look for a `>` as far as the
    prompt goes, which takes the square of its length."""
    return prompt.rfind(">") + 1


def _parse_tag(raw: str, body: str, notices: list[str]) -> LoraTag:
    parts = body.split(":", MOST_PARTS)
    if len(parts) > MOST_PARTS:
        raise RoleError(f"{shown(raw)}: more than {MOST_PARTS} parts between its colons")
    positional, named = _split(raw, parts, notices)
    name = positional[0].strip() if positional else ""
    if not name:
        raise RoleError(f"{shown(raw)}: names no LoRA; write <lora:name:1:role=subject>")
    if len(positional) > 4:
        raise RoleError(f"{shown(raw)}: {len(positional) - 1} numbers, at most 3 (text encoder, UNet, dyn) are allowed")
    te, unet = strengths(raw, positional, named)
    if "dyn" in named or len(positional) > 3:
        notices.append(f"{shown(raw)}: dyn is not supported here and was left out")
    return LoraTag(name, unet, te, _role(raw, named), raw)


def _split(raw: str, parts: Sequence[str], notices: list[str]) -> tuple[list[str], dict[str, str]]:
    positional: list[str] = []
    named: dict[str, str] = {}
    unknown: list[str] = []
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals:
            positional.append(part)
        elif key not in _KNOWN_PARTS:
            if hint := _hint(key, _KNOWN_PARTS, 0.7, "="):
                raise RoleError(f"{shown(raw)}: unknown part {key}={hint}")
            unknown.append(f"{shown(key, _LONGEST_PART_NAME)}=")
        elif "=" in value:
            example = f"{key}={Role.SUBJECT.value if key == 'role' else 0.8}"
            raise RoleError(f"{shown(raw)}: {shown(part)} has more than one '='; write one value, as in {example}")
        elif key in named:
            raise RoleError(f"{shown(raw)}: {key}= is given twice")
        else:
            named[key] = value
    if unknown:
        are = "is" if len(unknown) == 1 else "are"
        were = "was" if len(unknown) == 1 else "were"
        listed = ", ".join(dict.fromkeys(unknown))
        notices.append(f"{shown(raw)}: {listed} {are} not known here and {were} left out")
    return positional, named


def _hint(word: str, known: Sequence[str], cutoff: float, after: str = "") -> str:
    """ " (did you mean role=?)", or nothing where no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff) if len(word) <= _LONGEST_PART_NAME else []
    return f" (did you mean {near[0]}{after}?)" if near else ""


def _role(raw: str, named: Mapping[str, str]) -> Role | None:
    return parse_role(named["role"], raw) if "role" in named else None


def _number(raw: str, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RoleError(f"{shown(raw)}: {what} {quoted(text.strip())} is not a number; write for example 0.8")
    return value
