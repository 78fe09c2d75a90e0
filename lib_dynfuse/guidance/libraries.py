"""open_clip and transformers: imported when an encoder is wanted, never before; a clear line where one is missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_FOR_GOOD = ExitStack()


class EncoderError(Exception):
    """An encoder cannot be had. The message is a line for a person: what is missing, and what to put where."""


def library(name: str, package: str) -> Any:
    """The module `name`. Raises EncoderError that says which package to install."""
    with missing_operators_skipped():
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise EncoderError(f"{name} cannot be imported ({error}); install the package {package}") from error


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
