"""Nudges within a generation in a WebUI: when they come, what they do to the host, and what is told of them."""

from __future__ import annotations

import torch
from hand import BOTH, Hand, guide, hooks, latents, rows, session
from torch import Tensor

from lib_dynfuse import session as sessions
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.hosts.base import Place, Tag
from lib_dynfuse.session import Session


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
