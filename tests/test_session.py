"""One generation in a WebUI: what is taken is given back, whatever happens, and what is wrong is told, not raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_dynfuse import session as sessions
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


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert sessions._open == []


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


@torch.no_grad()
def test_a_generation_from_taking_over_to_giving_back(hand: Hand, said: list[str]) -> None:
    plain = hand.unet(latents(2))
    one = session(hand, said)
    one.activate({"lora": BOTH})
    assert hand.taken
    one.attach(3)
    changed = generate(one, hand)
    record = one.finish_batch()
    assert not torch.equal(changed[0], plain)
    assert torch.equal(hand.unet(latents(2)), plain)
    assert (hand.taken, hooks(hand), said) == (False, 0, [])
    assert record is not None
    assert [one.step for one in record.passes] == [0, 1, 2]
    assert sessions.last_record() is record


@torch.no_grad()
def test_a_hires_pass_counts_on_in_the_trace_and_begins_anew_in_progress(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    for steps in (3, 2):
        one.activate({"lora": BOTH})
        one.attach(steps)
        generate(one, hand, steps)
    record = one.finish_batch()
    assert record is not None
    assert [each.step for each in record.passes] == [0, 1, 2, 3, 4]
    assert [each.progress for each in record.passes] == [0, 0.5, 1, 0, 1]


@torch.no_grad()
def test_attaching_twice_is_attaching_once(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(3)
    once = hooks(hand)
    one.attach(3)
    assert hooks(hand) == once
    one.close()
    assert hooks(hand) == 0


@torch.no_grad()
def test_a_refiner_that_takes_over_within_a_sampling_is_fused_too(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(4)
    one.step((Place(0, 4, None), rows(1)))
    before = hand.unet(latents(2))
    torch.manual_seed(5)
    hand.unet = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    plain = hand.unet(latents(2))
    one.activate({"lora": BOTH})
    one.step((Place(1, 4, None), rows(1)))
    after = hand.unet(latents(2))
    record = one.finish_batch()
    assert not torch.equal(after, plain)
    assert not torch.equal(after, before)
    assert hooks(hand) == 0
    assert record is not None
    assert [each.step for each in record.passes] == [0, 1]


@torch.no_grad()
def test_a_call_that_is_none_of_the_samplings_is_left_alone(hand: Hand, said: list[str]) -> None:
    plain = hand.unet(latents(2))
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(2)
    changed = generate(one, hand, 1)
    hand.foreign = True
    left = generate(one, hand, 1)
    hand.foreign = False
    again = generate(one, hand, 1)
    one.close()
    assert torch.equal(left[0], plain)
    assert torch.equal(again[0], changed[0])


@torch.no_grad()
@pytest.mark.parametrize("rule", ["kl", "kl-token", "random"])
def test_a_step_fed_in_several_calls_is_the_same_step(hand: Hand, said: list[str], rule: str) -> None:
    outputs = []
    for split in (False, True):
        one = session(hand, said, strategy=rule)
        one.activate({"lora": BOTH})
        one.attach(2)
        outputs.append(generate(one, hand, 2, images=3, split=split))
        record = one.finish_batch()
        assert record is not None
        assert [row.cond for row in record.passes[0].rows] == ([True] * 3 if split else [True] * 3 + [False] * 3)
    for whole, parts in zip(*outputs, strict=True):
        torch.testing.assert_close(whole, parts)


@torch.no_grad()
def test_rows_that_the_host_cuts_off_are_not_missed(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(1)
    one.step((Place(0, 1, None), rows(2)))
    hand.unet(latents(2))
    record = one.finish_batch()
    assert record is not None
    assert [(row.image, row.cond) for row in record.passes[0].rows] == [(0, True), (1, True)]


@pytest.mark.parametrize(
    ("tags", "told", "taken"),
    [
        ([], "the prompt has no LoRA", False),
        ([Tag("fox", 1.0, None)], "no LoRA has a role", False),
        (["wrong"], "not fused: <lora:fox:role=subjekt>: unknown role 'subjekt'", False),
        (BOTH[:1], "no LoRA has role=style: nothing to choose from, fox 1 is applied as it is", True),
        (BOTH[1:], "no LoRA has role=subject: nothing to choose from, ink 0.9 is applied as it is", True),
    ],
)
def test_what_is_missing_is_told_once(hand: Hand, said: list[str], tags: list[Any], told: str, taken: bool) -> None:
    one = session(hand, said)
    for _ in range(2):
        one.activate({"lora": tags})
    assert hand.taken is taken
    assert len(said) == 1
    assert said[0].startswith(told)
    one.close()


@torch.no_grad()
def test_networks_without_a_common_layer_are_told(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": BOTH})
    second = hand.unet[2]
    layers = hand.layers()
    module, deltas = layers["0"]
    hand.layers = lambda: {  # type: ignore[method-assign]
        "0": (module, {Role.SUBJECT: deltas[Role.SUBJECT]}),
        "2": (second, {Role.STYLE: deltas[Role.STYLE]}),
    }
    one.attach(1)
    assert said == ["the subject's and the style's LoRA have no layer in common: each is applied as it is"]
    one.close()


@torch.no_grad()
def test_fusion_that_cannot_begin_leaves_the_host_to_merge(hand: Hand, said: list[str]) -> None:
    hand.failure = RuntimeError("out of memory")
    plain = hand.unet(latents(2))
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(1)
    assert said == ["not fused: fusion could not begin (RuntimeError: out of memory)"]
    assert (hand.taken, hooks(hand)) == (False, 0)
    assert torch.equal(generate(one, hand, 1)[0], plain)
    assert one.finish_batch() is None


@torch.no_grad()
def test_a_generation_that_broke_off_is_cleared_away_by_the_next(hand: Hand, said: list[str]) -> None:
    plain = hand.unet(latents(2))
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(3)
    generate(one, hand, 1)
    sessions.close_all()
    assert (hand.taken, hooks(hand)) == (False, 0)
    assert torch.equal(hand.unet(latents(2)), plain)


@torch.no_grad()
def test_nothing_is_fused_where_the_prompt_gives_no_roles(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": [Tag("fox", 1.0, None)]})
    one.attach(1)
    one.step((Place(0, 1, None), rows(1)))
    assert hooks(hand) == 0
    assert one.finish_batch() is None


@torch.no_grad()
def test_the_step_window_is_the_options(hand: Hand, said: list[str]) -> None:
    shares = {}
    for start in (0.0, 1.0):
        one = session(hand, said, strategy="kl", start=start, stop=1.0)
        one.activate({"lora": BOTH})
        one.attach(4)
        generate(one, hand, 4)
        record = one.finish_batch()
        assert record is not None
        shares[start] = record.values[0, 0, 0, :2].tolist()
    assert sorted(shares[0.0]) == [0, 1]
    assert shares[1.0] == [1, 1]


def guided(one: Session, hand: Hand, steps: int = 5) -> list[Tensor]:
    """A sampling whose predictions the host shows before and after CFG; returns them as the sampler gets them."""
    found = []
    for step in range(steps):
        one.step((Place(step, steps, 1.0), rows(1)))
        hand.unet(latents(2))
        params = {"x": torch.full((1, 4, 4, 4), 0.25)}
        one.predicted(params)
        one.after_cfg(params)
        found.append(params["x"])
    return found


@torch.no_grad()
def test_predictions_are_nudged_inside_the_window_and_the_record_says_how_r_fell(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(5, guide)
    found = guided(one, hand)
    moved = [not torch.equal(x, torch.full_like(x, 0.25)) for x in found]
    assert moved == [False, True, True, True, False]
    assert hand.guiding.log == ["begin", *(word for step in (1, 2, 3) for word in ("expect", "predicted", step))]
    record = one.finish_batch()
    assert record is not None
    assert sorted(record.nudges) == [1, 2, 3]
    assert record.shares()
    assert hand.guiding.log[-1] == "end"
    assert said == []


@torch.no_grad()
def test_pictures_are_nudged_where_nothing_is_fused(hand: Hand, said: list[str]) -> None:
    plain = hand.unet(latents(2))
    one = session(hand, said)
    one.activate({"lora": [Tag("fox", 1.0, None)]})
    one.attach(5, guide)
    found = guided(one, hand)
    assert not torch.equal(found[2], found[0])
    assert torch.equal(hand.unet(latents(2)), plain)
    record = one.finish_batch()
    assert record is not None
    assert (record.layers, sorted(record.nudges)) == ([], [1, 2, 3])


@torch.no_grad()
def test_a_hires_pass_is_nudged_anew_by_the_same_guide(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    made = []

    def make() -> Guide:
        made.append(guide())
        return made[-1]

    one.activate({"lora": BOTH})
    for _ in range(2):
        one.attach(5, make)
        guided(one, hand)
    record = one.finish_batch()
    assert record is not None
    assert sorted(record.nudges) == [1, 2, 3, 6, 7, 8]
    assert len(made) == 1


@torch.no_grad()
def test_a_nudge_that_fails_is_told_once_and_the_picture_is_made(hand: Hand, said: list[str]) -> None:
    hand.guiding.failure = RuntimeError("no such place")
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(5, guide)
    found = guided(one, hand)
    assert all(torch.equal(x, torch.full_like(x, 0.25)) for x in found)
    assert said == ["not nudged any more: RuntimeError: no such place"]
    record = one.finish_batch()
    assert record is not None
    assert record.nudges == {}


@torch.no_grad()
def test_too_little_memory_for_a_gradient_is_told_and_the_picture_is_made(hand: Hand, said: list[str]) -> None:
    hand.guiding.failure = MemoryError("a gradient through the UNet needs about 9.0 GiB")
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(5, guide)
    assert all(torch.equal(x, torch.full_like(x, 0.25)) for x in guided(one, hand))
    assert said == ["not nudged: a gradient through the UNet needs about 9.0 GiB"]
    assert hand.guiding.log.count("expect") == 1
    one.close()


@torch.no_grad()
def test_an_interrupt_in_a_nudge_leaves_nothing_behind(hand: Hand, said: list[str]) -> None:
    plain = hand.unet(latents(2))
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(5, guide)
    one.step((Place(1, 5, 1.0), rows(1)))
    assert one.nudges
    sessions.close_all()
    assert not one.nudges
    assert hooks(hand) == 0
    assert hand.guiding.log[-1] == "end"
    params = {"x": torch.ones(1, 4, 4, 4)}
    one.after_cfg(params)
    assert torch.equal(params["x"], torch.ones(1, 4, 4, 4))
    assert torch.equal(hand.unet(latents(2)), plain)


@torch.no_grad()
def test_a_lora_of_another_model_is_left_out_and_told(hand: Hand, said: list[str]) -> None:
    plain = hand.unet(latents(2))
    fitting = hand.layers()["0"][1]
    wide = LowRank(torch.ones(2, 12), torch.ones(12, 2))
    hand.layers = lambda: {"0": (hand.unet[0], {**fitting, Role.STYLE: wide}), "2": (hand.unet[2], {Role.STYLE: wide})}  # type: ignore[method-assign]
    one = session(hand, said, strategy="sum")
    one.activate({"lora": BOTH})
    one.attach(1)
    one.step((Place(0, 1, 1.0), rows(1)))
    x = latents(2)
    first = hand.unet[0](x)
    torch.testing.assert_close(first, torch.nn.functional.linear(x, hand.unet[0].weight, hand.unet[0].bias)
                               + fitting[Role.SUBJECT](x, first))  # fmt: skip
    one.close()
    assert said[0] == (
        "2 parts of LoRAs do not fit this model and were left out, first 0 of the style's LoRA, "
        "made for 12 -> 12 channels where there are 6 -> 6"
    )
    assert torch.equal(hand.unet(latents(2)), plain)
