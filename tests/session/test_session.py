"""One generation in a WebUI: what is taken is given back, whatever happens, and what is wrong is told, not raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand import BOTH, Hand, generate, hooks, latents, rows, session
from torch import nn

from lib_dynfuse import session as sessions
from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.core.types import Role
from lib_dynfuse.hosts.base import Place, Tag


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
        (
            [BOTH[1], Tag("dots", 1.0, Role.STYLE)],
            "no LoRA has role=subject: nothing to choose from, ink 0.9 and dots 1 are applied as they are",
            True,
        ),
        (
            [Tag(name, 1.0, Role.SUBJECT) for name in ("fox", "cat", "hat")],
            "no LoRA has role=style: nothing to choose from, fox 1, cat 1 and hat 1 are applied as they are",
            True,
        ),
        (
            [*BOTH, Tag("fox", 0.5, None), Tag("fox", 0.3, None), Tag("hat", 1.0, None)],
            "fox is in the prompt with a role and without one: write one tag for it",
            True,
        ),
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
@pytest.mark.parametrize(("roles", "fused"), [((Role.SUBJECT, Role.STYLE), True), ((Role.STYLE,), False)])
def test_a_batch_is_fused_where_a_layer_has_both_roles(
    hand: Hand, said: list[str], roles: tuple[Role, ...], fused: bool
) -> None:
    hand.roles = roles
    one = session(hand, said)
    one.activate({"lora": BOTH})
    assert not one.fused
    one.attach(2)
    assert one.fused is fused
    one.activate({"lora": []})
    one.attach(2)
    assert one.fused is fused
    one.finish_batch()
    assert not one.fused


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
    assert not one.fused
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
