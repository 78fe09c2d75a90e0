"""What every test shares: one thread, repeatable hypothesis, a torchvision that can be imported beside a CPU torch."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("webui", "tests/host and tests/web")
    group.addoption("--webui", default="", help="address of a running WebUI that has the extension")
    group.addoption("--webui-subject", default="", help="a LoRA of its; else its first")
    group.addoption("--webui-style", default="", help="a LoRA of its; else its second")


def import_torchvision() -> None:
    """Import torchvision once, even where its compiled operators do not match the installed torch.

    It registers shapes for operators of its own at import, which fails when those operators could not be loaded;
    nothing here uses them.
    """
    register = torch.library.register_fake

    def skip_torchvision(op: Any, *args: Any, **kwargs: Any) -> Any:
        if str(op).startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


if importlib.util.find_spec("torchvision"):
    import_torchvision()
