"""Every whole-number parameter at its ends, on layers of every shape: a forward pass ends, and ends soon."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import BOTH, Layers, as_dense, fused, random_lora

from lib_dynfuse.core import strategies
from lib_dynfuse.core.sampling import lattice_index, lattice_step, sample_index

CPU = torch.device("cpu")
INTEGERS = [
    (name, parameter.name, end)
    for name, info in strategies().items()
    for parameter in info.parameters
    if isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
    for end in (parameter.minimum, (parameter.minimum or 0) + 1, parameter.maximum)
]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError for what does not end; only where the system can interrupt it."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def layers() -> list[tuple[nn.Module, Tensor]]:
    """Convolutions of one pixel, of one row or column, strided and square; linears of no, one and many tokens."""
    torch.manual_seed(0)
    pictures = [(1, 1), (1, 7), (7, 1), (3, 2), (16, 16)]
    return [
        *((nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, *size)) for size in pictures),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.randn(2, 4, 9, 9)),
        (nn.Linear(4, 6), torch.randn(2, 4)),
        *((nn.Linear(4, 6), torch.randn(2, tokens, 4)) for tokens in (0, 1, 2, 77)),
        (nn.Linear(4, 6), torch.randn(2, 3, 5, 4)),
    ]


@pytest.mark.parametrize(("name", "parameter", "end"), INTEGERS)
def test_every_whole_number_at_its_ends_makes_a_picture(name: str, parameter: str, end: float) -> None:
    chosen: dict[str, Any] = {parameter: int(end)}
    with at_most(20):
        for module, x in layers():
            generator = torch.Generator().manual_seed(1)
            pair: Layers = {"layer": (module, {role: random_lora(module, 2, 0.3, generator) for role in BOTH})}
            for form in (pair, as_dense(pair)):
                found = fused(module, form, name, [x], **chosen)
                assert found.shape == module(x).shape
                assert bool(found.isfinite().all())


@settings(deadline=None)
@given(tall=st.integers(1, 300), wide=st.integers(1, 300), wanted=st.integers(0, 4096))
def test_a_lattice_always_ends_and_has_what_is_wanted(tall: int, wide: int, wanted: int) -> None:
    with at_most(5):
        step = lattice_step(tall, wide, wanted)
    index = lattice_index(tall, wide, step, CPU)
    seen = tall * wide if index is None else len(index)
    assert seen >= min(wanted, tall * wide)
    if wanted == 0:
        assert index is None


@settings(deadline=None)
@given(tokens=st.integers(0, 5000), wanted=st.integers(0, 4096))
def test_sampled_tokens_are_those_of_the_layer(tokens: int, wanted: int) -> None:
    index = sample_index(tokens, wanted, CPU)
    assert (index is None) == (not 0 < wanted < tokens)
    if index is not None:
        assert len(index) == wanted
        assert 0 <= int(index.min()) <= int(index.max()) < tokens
