"""What every test shares: one thread, repeatable hypothesis, Triton interpreted, a torchvision that can be imported."""

from __future__ import annotations

import importlib.util
import os

# Kernels run through Triton's interpreter, which has to be asked for before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from lib_dynfuse.guidance.libraries import missing_operators_skipped

torch.set_num_threads(1)

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("webui", "tests/host and tests/web")
    group.addoption("--webui", default="", help="address of a running WebUI that has the extension")
    group.addoption("--webui-subject", default="", help="a LoRA of its; else its first")
    group.addoption("--webui-style", default="", help="a LoRA of its; else its second")


if importlib.util.find_spec("torchvision"):
    with missing_operators_skipped():
        import torchvision  # noqa: F401
