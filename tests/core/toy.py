"""A small model with every kind of layer that is covered, and deltas for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib_dynfuse.core import Fusion, Role, Row, strategy
from lib_dynfuse.core.delta import Delta, Dense, Geometry, LowRank

Layers = dict[str, tuple[nn.Module, dict[Role, Delta]]]


class Toy(nn.Module):
    """Image [B, 3, 8, 8] and time [B, 6] -> [B, 10, 16]: convolution, attention-like and per-item linears, a stride."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(6, 8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.to_q = nn.Linear(12, 16)
        self.out = nn.Linear(16, 16, bias=False)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        h = torch.tanh(self.conv(image) + self.time(time)[:, :, None, None])
        h = torch.tanh(self.down(h))
        h = self.to_q(h.flatten(2).transpose(1, 2))
        result: Tensor = self.out(torch.tanh(h))
        return result


COVERED = ("conv", "time", "down", "to_q", "out")


def geometry_of(module: nn.Module) -> Geometry | None:
    return Geometry.of(module) if isinstance(module, nn.Conv2d) else None


def random_lora(module: nn.Module, rank: int, size: float, generator: torch.Generator) -> LowRank:
    weight = module.weight
    assert isinstance(weight, Tensor)
    down = torch.randn(rank, *weight.shape[1:], generator=generator, dtype=torch.float64)
    up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator, dtype=torch.float64)
    return LowRank(down.to(weight.dtype), (up * size).to(weight.dtype), None, geometry_of(module))


def toy_layers(model: nn.Module, subject: float = 0.1, style: float = 0.1, ranks: tuple[int, int] = (2, 3)) -> Layers:
    """Both roles on every covered layer; `subject` and `style` are the networks' sizes."""
    generator = torch.Generator().manual_seed(1)
    modules = dict(model.named_modules())
    return {
        name: (
            modules[name],
            {
                Role.SUBJECT: random_lora(modules[name], ranks[0], subject, generator),
                Role.STYLE: random_lora(modules[name], ranks[1], style, generator),
            },
        )
        for name in COVERED
    }


def as_dense(layers: Layers) -> Layers:
    """The same deltas without their low-rank form."""
    result: Layers = {}
    for name, (module, deltas) in layers.items():
        found: dict[Role, Delta] = {}
        for role, delta in deltas.items():
            weight = delta.dense()
            assert weight is not None
            found[role] = Dense(weight, None, geometry_of(module))
        result[name] = (module, found)
    return result


def inputs(batch: int = 2, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.randn(batch, 6, generator=generator)


def merged(model: Toy, layers: Layers, roles: tuple[Role, ...]) -> Toy:
    """A copy with the roles' deltas added to the weights, in float64 and back."""
    copy = Toy().to(next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    for name, (_, deltas) in layers.items():
        weight = dict(copy.named_modules())[name].weight
        assert isinstance(weight, Tensor)
        total = weight.detach().double()
        for role in roles:
            delta = deltas[role].dense()
            assert delta is not None
            total = total + delta.double()
        with torch.no_grad():
            weight.copy_(total)
    return copy


BOTH = (Role.SUBJECT, Role.STYLE)
CFG = [Row(0, cond=False, seed=5), Row(0, cond=True, seed=5)]


def fused(model: nn.Module, layers: Layers, name: str, x: Sequence[Tensor], **parameters: Any) -> Tensor:
    with torch.no_grad(), Fusion(layers, strategy(name, **parameters)):
        result: Tensor = model(*x)
    return result


class Log:
    """A trace that keeps what it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.passes: list[tuple[int, float, tuple[Row, ...]]] = []
        self.calls: list[tuple[int, Any, Any, Tensor | None, Tensor | None]] = []

    def attach(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def begin(self, step: int, progress: float, rows: Sequence[Row]) -> None:
        self.passes.append((step, progress, tuple(rows)))

    def add(self, layer: int, subject: Any, style: Any, d_subject: Tensor | None, d_style: Tensor | None) -> None:
        self.calls.append((layer, subject, style, d_subject, d_style))
