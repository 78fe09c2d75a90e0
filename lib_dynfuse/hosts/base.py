"""What a session needs of a WebUI, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.hosts.guiding import Guiding

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


# Called ahead of every call of the UNet with who is who in its batch, in order; empty where that is not known. None:
# the call is not one of the sampling that is fused, and is to be left alone.
Before = Callable[["Sequence[Row] | None"], None]


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
        """The UNet's layers that the taken networks change, and what each role adds to them.

        Asked ahead of every sampling, and again where a host announces one twice or changes its model under way.
        """

    def watch(self, before: Before) -> Callable[[], None]:
        """Have `before` called; returns what ends that. What `layers` gave must be in place by then."""

    def place(self, params: Any) -> Place:
        """Where the denoiser call of the host's `cfg_denoiser` callback stands; always asked before the UNet runs."""

    def give_back(self) -> None:
        """The host has its networks again, as if they had never been taken; safe to call again."""
