"""What the engine may ask of a device without making it wait."""

from __future__ import annotations

import torch


def readable(device: torch.device) -> bool:
    """Whether the host can read a value on `device` at once: it is the host's own memory."""
    return device.type == "cpu"
