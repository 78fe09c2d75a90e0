"""Whether a device that a person names is there."""

from __future__ import annotations

import torch

from lib_dynfuse.errors import DynFuseError, shown


def check_device(name: str) -> None:
    """Raises DynFuseError where nothing can be computed on the device `name`; an empty name is any."""
    if not name:
        return
    try:
        torch.zeros(1, device=name).item()
    # A device may be unknown to torch, missing from this build of it, or not plugged in: each has its own exception.
    except Exception as error:
        raise DynFuseError(f"--device {shown(name)}: there is no such device here") from error
