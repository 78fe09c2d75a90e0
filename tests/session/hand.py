"""A host that is written by hand, and one generation on it: for the tests of `Session`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.guidance.decoders import linear
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.nudge import Nudge
from lib_dynfuse.guidance.objectives import Objective
from lib_dynfuse.hosts.base import Before, Layers, Place, Tag
from lib_dynfuse.options import Options
from lib_dynfuse.roles import RoleError
from lib_dynfuse.session import Session

BOTH = [Tag("fox", 1.0, Role.SUBJECT), Tag("ink", 0.9, Role.STYLE)]


class Hand:
    """A host in the shape of `Host`: one layer, and a list of what it was asked to do."""

    name = "hand"
    needs = ()
    no_xt = ""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.guiding: Any = Guiding()
        self.unet = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.taken = False
        self.foreign = False
        self.rows: Sequence[Row] = ()
        self.failure: Exception | None = None
        self.roles = (Role.SUBJECT, Role.STYLE)

    def read_tags(self, networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
        found = networks.get("lora", [])
        if found == ["wrong"]:
            raise RoleError("<lora:fox:role=subjekt>: unknown role 'subjekt'")
        return list(found)

    def take(self, tags: Sequence[Tag]) -> list[str]:
        self.taken = True
        return []

    def layers(self) -> Layers:
        if self.failure is not None:
            raise self.failure
        generator = torch.Generator().manual_seed(1)

        def lora(size: float) -> LowRank:
            return LowRank(torch.randn(2, 6, generator=generator), size * torch.randn(6, 2, generator=generator))

        return {"0": (self.unet[0], {role: lora(0.5 + 0.2 * place) for place, role in enumerate(self.roles)})}

    def watch(self, before: Before) -> Callable[[], None]:
        def look(module: nn.Module, args: tuple[Tensor]) -> None:
            count = args[0].shape[0]
            rows, self.rows = self.rows[:count], self.rows[count:]
            before(None if self.foreign else rows)

        return self.unet.register_forward_pre_hook(look).remove

    def place(self, params: tuple[Place, Sequence[Row]]) -> Place:
        place, self.rows = params
        return place

    def give_back(self) -> None:
        self.taken = False


class Guiding:
    """Where the predictions of the host's sampler are nudged; `log` has the calls."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.failure: Exception | None = None

    def decoder(self, kind: str) -> tuple[Any, str]:
        return linear("sd1"), ""

    def begin(self, through_unet: bool) -> Callable[[], None]:
        self.log.append("begin")
        return lambda: self.log.append("end")

    def expect(self, params: Any, through_unet: bool) -> bool:
        self.log.append("expect")
        if isinstance(self.failure, MemoryError):
            raise self.failure
        return True

    def predicted(self, params: Any) -> None:
        self.log.append("predicted")

    def nudge(self, params: dict[str, Tensor], guide: Guide, step: int) -> None:
        self.log.append(step)
        if self.failure is not None:
            raise self.failure
        params["x"] = guide.at(step, params["x"])


class Bright:
    """An encoder whose only direction is brightness."""

    def image(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.nn.functional.normalize(torch.stack([mean, 1 - mean], 1), dim=-1)


def guide() -> Guide:
    objective = Objective(dino=Bright(), style=torch.ones(1, 3, 4, 4))
    return Guide(Nudge(start=0.25, stop=0.75), objective, linear("sd1"), [40])


def session(hand: Hand, said: list[str], **options: Any) -> Session:
    return Session(hand, Options.read({"enabled": True, **options}), said.append)


def latents(rows: int, tokens: int = 4) -> Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(2))


def rows(images: int) -> tuple[Row, ...]:
    return tuple(Row(image, cond, 40 + image) for cond in (True, False) for image in range(images))


def hooks(hand: Hand) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hand.unet.modules())


def generate(one: Session, hand: Hand, steps: int = 3, images: int = 1, split: bool = False) -> list[Tensor]:
    """What the host does between loading LoRAs and decoding; `split`: cond and uncond in calls of their own."""
    outputs = []
    for step in range(steps):
        one.step((Place(step, steps, 1.0 / (step + 1)), rows(images)))
        x = latents(2 * images)
        parts = x.chunk(2) if split else [x]
        outputs.append(torch.cat([hand.unet(part) for part in parts]))
    return outputs
