"""Which tokens of a layer are looked at, where not all of them are."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def picked(tokens: Tensor, index: Tensor) -> Tensor:
    """Some tokens of [B, T, C] as [B, n, C]; whole rows of memory are copied several times faster than by indexing."""
    return tokens.index_select(1, index) if tokens.stride(-1) == 1 else tokens[:, index]


_GOLDEN = 0.6180339887498949


@functools.cache
def sample_index(tokens: int, wanted: int, device: torch.device) -> Tensor | None:
    """Positions of `wanted` tokens spread evenly over `tokens`, None when all are looked at.

    One from each of `wanted` equal stretches, at an offset that walks by the golden section: a fixed stride would look
    at the same columns of a picture again and again.
    """
    if not 0 < wanted < tokens:
        return None
    return _on(device, [int((i + i * _GOLDEN % 1.0) * tokens / wanted) for i in range(wanted)])


def lattice_step(tall: int, wide: int, wanted: int) -> int:
    """The widest spacing of a square lattice that has at least `wanted` of tall x wide pixels; 1 for all of them.

    From the longer side on, any spacing leaves the same single pixel.
    """
    step, widest = 1, max(tall, wide)
    while step < widest and 0 < wanted <= -(-tall // (step + 1)) * -(-wide // (step + 1)):
        step += 1
    return step


@functools.cache
def lattice_index(tall: int, wide: int, step: int, device: torch.device) -> Tensor | None:
    """Positions of every step-th of tall x wide pixels, down and across; None when that is every one."""
    if step == 1:
        return None
    return _on(device, [y * wide + x for y in range(0, tall, step) for x in range(0, wide, step)])


def _on(device: torch.device, places: list[int]) -> Tensor:
    # It outlives the host's inference mode, and autograd may keep no inference tensor.
    with torch.inference_mode(False):
        return torch.tensor(places).to(device, non_blocking=True)
