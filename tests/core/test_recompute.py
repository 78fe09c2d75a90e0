"""Gradients through a fused model whose layers are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import BOTH, Layers, Log, random_lora

from lib_dynfuse.core import Fusion, Row, strategies, strategy

UNCOND, COND = [Row(0, False, 5)], [Row(0, True, 5)]


class _Again(torch.autograd.Function):
    """As in the repositories of Stable Diffusion 2 and SDXL."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(out, [x], grads)


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "plain": lambda run, x: run(x),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "not reentrant": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "latent diffusion": lambda run, x: _Again.apply(run, x),
}


class Blocks(nn.Module):
    """Three blocks of two layers, each computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.double().requires_grad_(False)

    def forward(self, x: Tensor, way: str) -> Tensor:
        for block in self.blocks:
            x = x + WAYS[way](block, x)
        return x


def covered(model: Blocks) -> Layers:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            module,
            {role: random_lora(module, 2, size, generator) for role, size in zip(BOTH, (0.2, 0.3), strict=True)},
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def run(name: str, way: str, apart: bool, log: Log) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients at the input in three steps, and the outputs."""
    known = {parameter.name for parameter in strategies()[name].parameters}
    given = {k: v for k, v in {"auto_balance": True, "couple_cfg": True}.items() if k in known}
    model = Blocks()
    generator = torch.Generator().manual_seed(2)
    gradients, outputs = [], []
    with Fusion(covered(model), strategy(name, **given), log) as fusion:
        for step in range(3):
            fusion.at(step, 3)
            x = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
            found = []
            for rows in [UNCOND, COND] if apart else [[*UNCOND, *COND]]:
                fusion.rows = rows
                found.append(model(torch.cat([x * (1.1 if row.cond else 1.0) for row in rows]), way))
            out = torch.cat(found)
            uncond, cond = out.chunk(2)
            (uncond + 7 * (cond - uncond)).square().sum().backward()
            assert x.grad is not None
            gradients.append(x.grad)
            outputs.append(out.detach())
    return gradients, outputs


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("name", sorted(strategies()))
def test_the_gradient_is_that_of_the_picture(name: str, way: str, apart: bool) -> None:
    log, plain = Log(), Log()
    gradients, outputs = run(name, way, apart, log)
    expected, pictures = run(name, "plain", apart, plain)
    for one, other in zip([*gradients, *outputs], [*expected, *pictures], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert log.passes == plain.passes
    assert len(log.calls) == len(plain.calls)


def test_a_pass_whose_choices_are_not_known_is_refused_by_name() -> None:
    model = Blocks()
    x = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_()
    with Fusion(covered(model), strategy("kl")) as fusion:
        out = model(x, "reentrant")
        fusion.close()
    with (
        Fusion(covered(model), strategy("kl")),
        pytest.raises(RuntimeError, match=r"layer blocks\.2\.0 .*checkpointing"),
    ):
        out.sum().backward()


def test_nothing_is_kept_while_autograd_is_off() -> None:
    model = Blocks()
    with torch.no_grad(), Fusion(covered(model), strategy("kl")) as fusion:
        for step in range(3):
            fusion.at(step, 3)
            model(torch.randn(2, 5, 8, dtype=torch.float64), "plain")
        assert fusion._run is not None
        assert not fusion._run.decisions._records
