"""Scratch memory of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Float32 scratch memory that layers share, so that a forward pass allocates none of its own.

    A buffer handed out by `take` is valid until the same slot is taken again.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, str], Tensor] = {}

    def take(self, slot: str, like: Tensor) -> Tensor:
        """A float32 tensor of `like`'s shape and memory order, contents undefined."""
        key = (like.device, slot)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            # Hosts that sample in inference mode may still run a model outside it, where what was made inside is fixed.
            with torch.inference_mode(False):
                buffer = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
            self._buffers[key] = buffer
        return buffer[: like.numel()].view(like.shape)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())
