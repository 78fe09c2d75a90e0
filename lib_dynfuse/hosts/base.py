"""What a session needs of a WebUI, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.types import Role, Row

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

    `step` of `total`, from 0; `sigma` where it can be had without waiting for the device; `rows` of the batch that the
    UNet is about to see, in order, even where the host feeds it in several calls; empty where they are not known.
    """

    step: int
    total: int
    sigma: float | None
    rows: tuple[Row, ...]


class Host(Protocol):
    """A WebUI. One generation uses it as `read_tags`, `take`, `layers`, `watch`, `place` ..., `give_back`."""

    name: str

    def read_tags(self, networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
        """The LoRAs of the prompt. Raises DynFuseError for a role that cannot be read."""

    def take(self, tags: Sequence[Tag]) -> list[str]:
        """Have the host stop merging the networks that have a role into the UNet, until `give_back`.

        Returns lines to tell the person. Their text encoder parts stay as the host applies them.
        """

    def layers(self) -> Layers:
        """The UNet's layers that the taken networks change, and what each role adds to them."""

    def watch(self, before: Callable[[int], None]) -> Callable[[], None]:
        """Call `before` with the number of rows ahead of every call of the UNet; returns what ends that."""

    def place(self, params: Any) -> Place:
        """Where the denoiser call of the host's `cfg_denoiser` callback stands."""

    def give_back(self) -> None:
        """The host has its networks again, as if they had never been taken; safe to call again."""
