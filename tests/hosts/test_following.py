"""UNets whose layers cannot be followed, or whose batches cannot be read; gradients and checkpointing."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_dynfuse.hosts.a1111 import Automatic1111
from lib_dynfuse.hosts.a1111_guiding import Automatic1111Guiding
from lib_dynfuse.hosts.base import Unsupported, refuse_compiled, watched
from lib_dynfuse.hosts.checkpointing import without_checkpointing


def unet() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


def test_a_unet_that_is_compiled_is_refused_before_sampling() -> None:
    plain, whole, inside = unet(), unet(), unet()
    refuse_compiled(plain)
    whole.compile(backend="eager")
    inside[1].compile(backend="eager")  # type: ignore[index]
    with pytest.raises(Unsupported, match="the UNet is compiled, so that its layers cannot be followed"):
        refuse_compiled(whole)
    with pytest.raises(Unsupported, match=r"the UNet is compiled \(1\), so"):
        refuse_compiled(inside)
    with pytest.raises(Unsupported, match="the UNet is compiled"):
        refuse_compiled(torch.compile(plain, backend="eager"))


def test_so_is_one_in_whose_place_another_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = SimpleNamespace(
        shared=SimpleNamespace(sd_model=SimpleNamespace(model=SimpleNamespace(diffusion_model=unet()))),
        sd_unet=SimpleNamespace(current_unet=None),
    )
    monkeypatch.setitem(sys.modules, "modules", modules)
    host = Automatic1111(SimpleNamespace(loaded_networks=[]))
    assert host.layers() == {}
    modules.sd_unet.current_unet = SimpleNamespace(option=SimpleNamespace(label="[TRT] sd15"))
    with pytest.raises(Unsupported, match=r"the SD Unet \[TRT\] sd15 computes in the place of the model's own"):
        host.layers()


def test_a_batch_that_cannot_be_read_ends_no_picture(caplog: pytest.LogCaptureFixture) -> None:
    model, seen = unet(), []

    def who(args: Any, kwargs: Any) -> Any:
        raise AttributeError("'list' object has no attribute 'shape'")

    stop = watched(model, who, seen.append)
    with caplog.at_level(logging.ERROR, "lib_dynfuse"):
        for _ in range(3):
            model(torch.zeros(1, 4))
    stop()
    model(torch.zeros(1, 4))
    assert seen == [(), (), ()]
    assert len(caplog.records) == 1


class Block(nn.Module):
    """As in the repositories of Stable Diffusion 2 and SDXL: computed again in the backward pass."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0
        self.name = name
        setattr(self, name, True)

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, self.name):
            found: Tensor = _Again.apply(self._forward, x, *self.parameters())
            return found
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.layer(x))


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.params = run, x, params
        with torch.no_grad():
            found: Tensor = run(x)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(out, [x, *ctx.params], grads, allow_unused=True)


@pytest.mark.parametrize("name", ["checkpoint", "use_checkpoint", "gradient_checkpointing"])
def test_a_gradient_through_a_checkpointed_unet_is_autograds_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(name), Block(name)).double()
    shared = SimpleNamespace(
        sd_model=SimpleNamespace(first_stage_model=nn.Linear(1, 1), model=SimpleNamespace(diffusion_model=model))
    )
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(shared=shared))
    x = torch.randn(2, 4, dtype=torch.float64).requires_grad_()
    h = x
    for block in model:
        h = torch.tanh(h @ block.layer.weight.T + block.layer.bias)  # type: ignore[union-attr,operator]
    (expected,) = torch.autograd.grad(h.square().sum(), x)
    stop = Automatic1111Guiding().begin(through_unet=True)
    try:
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    finally:
        stop()
    torch.testing.assert_close(found, expected)
    assert [block.calls for block in model] == [1, 1]
    assert all(getattr(block, name) is True for block in model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_switches_that_were_off_stay_off() -> None:
    model = nn.Sequential(Block("checkpoint"), Block("use_checkpoint"))
    model[0].checkpoint = False  # type: ignore[assignment]
    with without_checkpointing(model):
        assert model[1].use_checkpoint is False
    assert (model[0].checkpoint, model[1].use_checkpoint) == (False, True)


def test_the_hosts_own_checkpointing_for_training_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SimpleNamespace(
        sd_model=SimpleNamespace(first_stage_model=nn.Linear(1, 1), model=SimpleNamespace(diffusion_model=unet()))
    )
    stored = SimpleNamespace(stored=[None])
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(shared=shared, sd_hijack_checkpoint=stored))
    with pytest.raises(RuntimeError, match="gradient checkpointing for training is on"):
        Automatic1111Guiding().begin(through_unet=True)
    Automatic1111Guiding().begin(through_unet=False)()
