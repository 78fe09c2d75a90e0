"""Training goes on where it stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lib_dynfuse.demo import loop

SCHEDULE = loop.Schedule(steps=60, rate=1e-2, warmup=5, ema=0.9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def run(file: Path, stop_before: int | None = None) -> tuple[nn.Module, loop.Curve]:
    """Learns the sum of three numbers; a power cut comes before step `stop_before`."""
    module = network()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == stop_before:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=generator)
        return (module(x)[:, 0] - x.sum(1)).square().mean()

    return module, loop.train(file, module, loss, SCHEDULE, every_seconds=0, bar=False)


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, whole_curve = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.pt", stop_before=47)
    resumed, curve = run(tmp_path / "cut.pt")
    assert curve.losses == whole_curve.losses
    assert len(curve.losses) == 3
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_the_loss_falls(tmp_path: Path) -> None:
    _, curve = run(tmp_path / "run.pt")
    assert curve.losses[-1] < 0.5 * curve.losses[0]


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "run.pt")
    again, curve = run(tmp_path / "run.pt", stop_before=60)
    assert curve.steps == 60
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_averaged_weights_can_be_read_back(tmp_path: Path) -> None:
    module, _ = run(tmp_path / "run.pt")
    other = network()
    assert loop.averaged(tmp_path / "run.pt", other).steps == 60
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_only_what_learns_is_kept(tmp_path: Path) -> None:
    module = network()
    module[0].requires_grad_(False)
    loop.train(tmp_path / "run.pt", module, lambda step, g: module(torch.ones(2, 3)).mean(), SCHEDULE, bar=False)
    assert torch.load(tmp_path / "run.pt")["module"].keys() == {"2.weight", "2.bias"}


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    schedule = loop.Schedule(steps=100, rate=1.0, warmup=10)
    assert schedule.rate_at(0, 0) == pytest.approx(0.1)
    assert schedule.rate_at(50, 0) == pytest.approx(0.5)
    assert schedule.rate_at(100, 0) == 0


def test_a_time_limit_shortens_the_whole_schedule() -> None:
    schedule = loop.Schedule(steps=1000, rate=1.0, warmup=0, minutes=1)
    assert schedule.progress(10, seconds=30) == 0.5
    assert schedule.rate_at(10, seconds=30) == pytest.approx(0.5)
    assert schedule.progress(10, seconds=61) == 1
