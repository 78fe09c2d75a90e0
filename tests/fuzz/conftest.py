"""Says how many inputs were tried, to the person and to a campaign."""

from __future__ import annotations

import json
import os

import pytest
from fuzzing import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        terminalreporter.write_line(f"inputs tried by the fuzz tests: {sum(TRIED.values())}")
    if file := os.environ.get("FUZZ_TRIED"):
        with open(file, "a", encoding="utf-8") as kept:
            kept.write(json.dumps(TRIED) + "\n")
