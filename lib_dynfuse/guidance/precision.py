"""Full precision inside a host that has switched it off."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> Any:
    """A context in which the host's autocast is off; older versions of torch know none for other devices."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()
