"""Gradient checkpointing of UNets, which saves memory in training: switched off where a gradient goes through one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# As the repositories of Stable Diffusion and SDXL call it (blocks, then residual blocks), and as diffusers does.
_SWITCHES = ("checkpoint", "use_checkpoint", "gradient_checkpointing")


@contextmanager
def without_checkpointing(unet: nn.Module) -> Iterator[None]:
    """While open, nothing of the UNet is computed again in a backward pass by its own switches.

    The repositories' own way of it asks for gradients of parameters too, which are frozen here.
    """
    on = [(module, name) for module in unet.modules() for name in _SWITCHES if vars(module).get(name) is True]
    for module, name in on:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in on:
            setattr(module, name, True)
