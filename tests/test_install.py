"""install.py: says what a feature lacks, installs nothing, never fails."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def install() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("dynfuse_install", ROOT / "install.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_feature_that_lacks_a_module_is_named_with_it(install: types.ModuleType) -> None:
    (line,) = install.lacking({"nudging": ("no_such_module", "json", "nor_this_one"), "fusing": ("json",)})
    assert "nudging" in line
    assert "no_such_module and nor_this_one" in line
    assert "json" not in line


def test_nothing_is_said_where_nothing_lacks(install: types.ModuleType) -> None:
    assert install.lacking({"fusing": ("json", "ast")}) == []


def test_a_half_imported_module_does_not_stop_the_host(
    install: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("broken")
    broken.__spec__ = None
    monkeypatch.setitem(sys.modules, "broken", broken)
    assert not install.is_installed("broken")


def test_running_it_succeeds_in_a_bare_python_and_says_a_line_at_most_per_feature(install: types.ModuleType) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "install.py")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "DynFuse: comparing pictures with references by CLIP stays off, it lacks open_clip; everything else works.",
        "DynFuse: comparing pictures with references by DINO stays off, it lacks transformers; everything else works.",
    ]


def test_it_imports_only_the_standard_library_and_starts_no_process() -> None:
    tree = ast.parse((ROOT / "install.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {"__future__", "importlib", "collections"}
