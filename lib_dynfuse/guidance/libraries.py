"""open_clip and transformers: imported when an encoder is wanted, never before; a clear line where one is missing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_FOR_GOOD = ExitStack()
# A path's folders, as a library's message has them: in quotes, where blanks may be among them, or after a blank.
_BEGINS = r"""(?:[a-zA-Z]:[\\/]|\\\\|~?/(?!/))"""
_QUOTED = re.compile(rf"""(?<=["'`]){_BEGINS}(?:[^"'`]*[\\/])?""")
_PLAIN = re.compile(rf"""(?<![^\s(\[<=:]){_BEGINS}(?:[^\s"'`<>|]*[\\/])?""")


class EncoderError(Exception):
    """An encoder cannot be had. The message is a line for a person: what is missing, and what to put where."""


def in_a_line(error: BaseException, longest: int = 160) -> str:
    """What an error says, whatever library it is of: its first line, whole words, without this machine's folders."""
    lines = str(error).strip().splitlines()
    said = _PLAIN.sub("", _QUOTED.sub("", lines[0])).rstrip(".") if lines else ""
    if len(said) > longest:
        said = said[:longest].rpartition(" ")[0] + " ..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def library(name: str, package: str) -> Any:
    """The module `name`. Raises EncoderError that says which package to install."""
    with missing_operators_skipped():
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise EncoderError(
                f"{name} cannot be imported ({in_a_line(error)}); install the package {package}"
            ) from error


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is asked of the model hub, whatever a library decides: for a process of our own.

    diffusers fetches a checkpoint's settings even where it is told to look at the disk alone.
    """
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def missing_operators_skipped() -> Iterator[None]:
    """Let torchvision be imported beside a torch that its compiled operators do not match.

    It describes these operators to torch as it is imported, which fails when they could not be loaded. open_clip and
    transformers need only its transforms, and nobody here needs the operators.
    """
    register = getattr(torch.library, "register_fake", None)
    if register is None:
        yield
        return

    def skip_missing(op: Any, *args: Any, **kwargs: Any) -> Any:
        space, _, name = str(op).partition("::")
        if space == "torchvision" and not hasattr(torch.ops.torchvision, name):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = skip_missing
    try:
        yield
    finally:
        torch.library.register_fake = register


def skip_missing_operators() -> None:
    """The same for the rest of a process of our own: diffusers imports torchvision whenever it likes."""
    _FOR_GOOD.close()
    _FOR_GOOD.enter_context(missing_operators_skipped())
