"""A generation in which something is not as it should be: the picture is made, and the person is told."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand import BOTH, Hand, generate, hooks, latents, rows, session
from torch import Tensor, nn

from lib_dynfuse.core import strategies
from lib_dynfuse.core.delta import Dense, LowRank
from lib_dynfuse.core.rules_divergence import DivergenceStrategy
from lib_dynfuse.core.types import Role
from lib_dynfuse.hosts.base import Place


def summed(hand: Hand, x: Tensor) -> Tensor:
    """The host's own merge of both."""
    module, deltas = hand.layers()["0"]
    weight = module.weight.double() + sum(found.double() for d in deltas.values() if (found := d.dense()) is not None)
    first = nn.functional.linear(x.double(), weight, module.bias.double()).float()
    return hand.unet[2](hand.unet[1](first))


@torch.no_grad()
@pytest.mark.parametrize("rule", sorted(strategies()))
def test_a_batch_that_cannot_be_told_apart_is_the_sum_and_is_said(hand: Hand, said: list[str], rule: str) -> None:
    one = session(hand, said, strategy=rule)
    one.activate({"lora": BOTH})
    one.attach(2)
    expected = summed(hand, latents(2))
    for step in range(2):
        one.step((Place(step, 2, None), ()))
        torch.testing.assert_close(hand.unet(latents(2)), expected, rtol=1e-5, atol=1e-6)
    assert one.finish_batch() is None, "nothing was chosen"
    assert len(said) == (rule != "sum")
    assert all(line.startswith("it is not known which items of the UNet's batch are of the prompt") for line in said)


@torch.no_grad()
def test_after_it_choices_go_on(hand: Hand, said: list[str]) -> None:
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(3)
    generate(one, hand, 1)
    one.step((Place(1, 3, None), ()))
    hand.unet(latents(2))
    one.step((Place(2, 3, None), rows(1)))
    hand.unet(latents(2))
    record = one.finish_batch()
    assert record is not None
    assert [each.step for each in record.passes] == [0, 2]


@torch.no_grad()
def test_a_layer_with_a_batch_of_its_own_adds_both_and_is_said_once(hand: Hand, said: list[str]) -> None:
    class Regions(nn.Module):
        """Calls its layer once for either half, as extensions for regional prompts do."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.inner(half) for half in x.chunk(2)])

    inner = hand.unet[0]
    expected = summed(hand, latents(2))
    hand.unet[0] = Regions(inner)
    layers = {"0": (inner, hand.layers()["0"][1])}
    hand.layers = lambda: layers  # type: ignore[method-assign]
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(2)
    for found in generate(one, hand, 2):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert one.finish_batch() is None
    assert said == [
        "some layers see another batch than the UNet, as with prompts by region: both LoRAs are added there "
        "(first layer 0: a batch of 1 where the forward pass has 2 rows)"
    ]


@torch.no_grad()
def test_cross_attention_that_sees_regions_is_not_read_as_tiles(hand: Hand, said: list[str]) -> None:
    layer = hand.unet[0]
    deltas = hand.layers()["0"][1]
    one = session(hand, said)
    for name, told in (("blocks.0.attn1.to_q", 0), ("blocks.0.attn2.to_q", 1)):
        hand.layers = lambda name=name: {name: (layer, deltas)}  # type: ignore[method-assign,misc]
        one.activate({"lora": BOTH})
        one.attach(2)
        one.step((Place(0, 2, None), rows(1)))
        hand.unet(latents(2))
        layer(latents(4))
        one.step((Place(1, 2, None), rows(1)))
        one.close()
        assert len(said) == told


@torch.no_grad()
def test_a_rule_that_fails_is_said_once_without_its_text_and_logged(
    hand: Hand, said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("cannot open /home/someone/.triton/cache")

    monkeypatch.setattr(DivergenceStrategy, "criterion", broken)
    expected = summed(hand, latents(2))
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(3)
    with caplog.at_level(logging.ERROR, "lib_dynfuse"):
        for found in generate(one, hand, 3):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    one.close()
    assert said == ["layer 0 could not be decided (RuntimeError, see the log): both LoRAs are added there"]
    [record] = caplog.records
    assert record.exc_info is not None
    assert "/home/someone" in str(record.exc_info[1])


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
def test_layers_that_are_never_called_are_said_and_nothing_of_a_choice_is_kept(
    hand: Hand, said: list[str], steps: int
) -> None:
    class Compiled(nn.Sequential):
        """Goes past the modules' own calls, as compiled code does."""

        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer.forward(x)
            return x

    hand.unet = Compiled(*hand.unet)
    plain = hand.unet(latents(2))
    one = session(hand, said)
    for _ in range(2):
        one.activate({"lora": BOTH})
        one.attach(steps)
        for found in generate(one, hand, steps):
            assert torch.equal(found, plain)
        assert one.finish_batch() is None
        assert not hand.taken
    reason = (
        "none of the 1 layers to fuse took part in the first step (the UNet may be compiled, or replaced by another "
        "extension)"
    )
    assert said == [f"not fused, and without the LoRAs that have a role: {reason}", f"not fused: {reason}"]
    assert hooks(hand) == 0


@torch.no_grad()
def test_layers_of_which_some_are_not_called_are_counted_and_named(hand: Hand, said: list[str]) -> None:
    unused = nn.Linear(6, 6)
    layers = hand.layers()
    hand.layers = lambda: {**layers, "unused": (unused, layers["0"][1])}  # type: ignore[method-assign]
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(3)
    generate(one, hand, 3)
    record = one.finish_batch()
    assert said == ["1 of the 2 layers to fuse took no part in the first step: nothing was added there; first unused"]
    assert record is not None
    unreached = torch.from_numpy(record.values[:, record.layers.index("unused")])
    assert bool(unreached.isnan().all())


@torch.no_grad()
@pytest.mark.parametrize("silent", list(Role))
@pytest.mark.parametrize("rule", sorted(strategies()))
def test_a_role_of_strength_0_leaves_the_other_as_it_is(hand: Hand, said: list[str], rule: str, silent: Role) -> None:
    pictures = []
    for tags in ([replace(tag, unet=0.0) if tag.role is silent else tag for tag in BOTH],
                 [tag for tag in BOTH if tag.role is not silent]):  # fmt: skip
        playing = {tag.role for tag in tags if tag.unet}
        taken: list[Any] = []
        hand.take = lambda tags, taken=taken: taken.extend(tags) or []  # type: ignore[method-assign,misc]
        hand.roles = tuple(role for role in Role if role in playing)
        one = session(hand, said, strategy=rule)
        one.activate({"lora": tags})
        assert {tag.role for tag in taken} - {None} == playing
        one.attach(2)
        pictures.append(generate(one, hand, 2))
        assert one.finish_batch() is None
    for one_, other in zip(*pictures, strict=True):
        assert torch.equal(one_, other)
    name = next(tag.name for tag in BOTH if tag.role is silent)
    assert said[0] == f"{name} has the strength 0: it counts as if it had no role={silent.value}"


@torch.no_grad()
def test_a_layer_that_fits_nothing_is_left_alone(hand: Hand, said: list[str]) -> None:
    """A packed layer does not say how many channels it has, so that a wrong LoRA is seen only when it runs."""

    class Packed(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    hand.unet[0] = Packed(hand.unet[0])  # type: ignore[arg-type]
    plain = hand.unet(latents(2))
    wrong = {Role.SUBJECT: LowRank(torch.ones(2, 12), torch.ones(12, 2)), Role.STYLE: Dense(torch.ones(12, 12))}
    hand.layers = lambda: {"0": (hand.unet[0], dict(wrong))}  # type: ignore[method-assign,arg-type,return-value]
    one = session(hand, said)
    one.activate({"lora": BOTH})
    one.attach(2)
    for found in generate(one, hand, 2):
        assert torch.equal(found, plain)
    one.close()
    assert len(said) == 1
    assert said[0].startswith("layer 0 could not be decided (ValueError")
