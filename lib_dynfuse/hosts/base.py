"""What a session needs of a WebUI, whichever it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.hosts.guiding import Guiding

_log = logging.getLogger("lib_dynfuse")

Layers = dict[str, tuple[nn.Module, dict[Role, Delta]]]


class Unsupported(Exception):
    """This WebUI lacks something that fusion needs; the message names it."""


@dataclass(frozen=True)
class Tag:
    """A LoRA as the host has read it from the prompt: its name there, its strength on the UNet, and its role."""

    name: str
    unet: float
    role: Role | None

    def __str__(self) -> str:
        return f"{self.name} {self.unet:g}"


@dataclass(frozen=True)
class Place:
    """Where a denoiser call stands.

    `step` of `total`, from 0; `sigma` where it can be had without waiting for the device.
    """

    step: int
    total: int
    sigma: float | None


# Called ahead of every call of the UNet with who is who in its batch, in order; empty where that is not known, so that
# both roles are added. None: the call is not one of the sampling that is fused, and is to be left alone.
Before = Callable[["Sequence[Row] | None"], None]


def watched(
    unet: nn.Module, who: Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Row] | None], before: Before
) -> Callable[[], None]:
    """Has `before` called with what `who` reads of the arguments of every call of the UNet; returns what ends that.

    What goes wrong in reading is logged once, and the batch is one that cannot be told apart: no picture ends here.
    """
    failed: list[Exception] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows: Sequence[Row] | None
        try:
            rows = who(args, kwargs)
        except Exception as error:
            rows = ()
            if not failed:
                failed.append(error)
                _log.exception("a batch of the UNet could not be read")
        before(rows)

    return unet.register_forward_pre_hook(look, with_kwargs=True).remove


def refuse_compiled(unet: nn.Module) -> None:
    """Raises Unsupported for a UNet that is compiled as a whole or in part: its layers are then not called one by one.

    Compiled code does not look for hooks that are added to it later.
    """
    for name, module in unet.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            where = f" ({name})" if name else ""
            raise Unsupported(f"the UNet is compiled{where}, so that its layers cannot be followed")


class Host(Protocol):
    """A WebUI. One generation uses it as `read_tags`, `take`, `layers`, `watch`, `place` ..., `give_back`."""

    name: str
    needs: Sequence[str]
    """What it uses of the WebUI's own code, as `module:attribute.attribute`."""
    guiding: Guiding
    no_xt: str
    """Why gradients cannot go through its UNet; empty where they can."""

    def read_tags(self, networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
        """The LoRAs of the prompt. Raises DynFuseError for a role that cannot be read."""

    def take(self, tags: Sequence[Tag]) -> list[str]:
        """Have the host stop merging the networks that have a role into the UNet, until `give_back`.

        Returns lines to tell the person. Their text encoder parts stay as the host applies them.
        """

    def layers(self) -> Layers:
        """The UNet's layers that the taken networks change, and what each role adds to them. Raises Unsupported for a
        UNet whose layers cannot be followed.

        Asked ahead of every sampling, and again where a host announces one twice or changes its model under way.
        """

    def watch(self, before: Before) -> Callable[[], None]:
        """Have `before` called; returns what ends that. What `layers` gave must be in place by then."""

    def place(self, params: Any) -> Place:
        """Where the denoiser call of the host's `cfg_denoiser` callback stands; always asked before the UNet runs."""

    def give_back(self) -> None:
        """The host has its networks again, as if they had never been taken; safe to call again."""
