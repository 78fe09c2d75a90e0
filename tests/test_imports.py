"""Who may know whom (the rooms of the house), read from the source of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = "lib_dynfuse"

# Rooms of the house that a room may import, besides itself. A room that is not named here may import any.
BELOW: dict[str, set[str]] = {
    "core": set(),
    "guidance": set(),
    "trace": set(),
    "roles": {"core", "errors"},
    "errors": set(),
    "options": {"core", "errors", "roles"},
    "infotext": {"core", "errors", "options", "roles"},
    "hosts": {"core", "errors", "guidance", "options", "roles", "infotext"},
    "guides": {"core", "errors", "guidance", "options", "roles"},
    "session": {"core", "errors", "guidance", "hosts", "options", "roles", "trace"},
}
# Third-party packages that a room may import, besides the standard library.
PACKAGES: dict[str, set[str]] = {
    "core": {"torch", "triton"},
    "guidance": {"torch", "numpy", "open_clip", "transformers", "PIL", "safetensors"},
    "trace": {"torch", "numpy", "matplotlib", "PIL"},
    "roles": set(),
    "errors": set(),
    "options": {"pydantic"},
    "infotext": set(),
}
# Packages that only these rooms may import, wherever they stand.
KEPT: dict[str, set[str]] = {
    "gradio": {"webui", "scripts"},
    "modules": {"hosts", "webui", "scripts"},
    "backend": {"hosts"},
}


def imported(source: str, package: str) -> Iterator[str]:
    """Dotted names that a module of `package` imports, at its top or inside functions, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names) if name == HOUSE else (name,)


def room_of(name: str) -> str:
    """`lib_dynfuse.core.delta` -> `core`; the house itself -> an empty string."""
    return name.split(".")[1] if "." in name else ""


def complaints(source: str, package: str, room: str) -> list[str]:
    """What a module of a room imports and may not."""
    found = []
    for name in imported(source, package):
        top = name.partition(".")[0]
        if top == HOUSE:
            other = room_of(name)
            if room in BELOW and other not in {room, "__version__", *BELOW[room]}:
                found.append(f"{room} imports {name}")
            continue
        kept = room not in KEPT.get(top, {room})
        unlisted = room in PACKAGES and top not in PACKAGES[room] | sys.stdlib_module_names
        if kept or unlisted:
            found.append(f"{room} imports {name}")
    return found


def modules() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / HOUSE).rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_module_imports_only_what_its_room_may_know(path: Path) -> None:
    parts = path.with_suffix("").parts
    package = ".".join(parts[:-1])
    room = parts[1] if len(parts) > 1 else ""
    assert complaints((ROOT / path).read_text(encoding="utf-8"), package, room) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "import gradio"),
        ("core", "def f():\n    from modules import shared"),
        ("core", "from lib_dynfuse.trace import record"),
        ("core", "from lib_dynfuse import trace"),
        ("core", "from ..options import Options"),
        ("core", "from .. import options"),
        ("core", "import numpy as np"),
        ("trace", "from ..core.types import Row"),
        ("guidance", "from ..trace.record import Trace"),
        ("hosts", "from ..session import Session"),
        ("hosts", "from lib_dynfuse.webui import panel"),
        ("hosts", "import gradio as gr"),
        ("demo", "import modules.shared"),
    ],
)
def test_a_wrong_import_is_found(room: str, source: str) -> None:
    assert len(complaints(source, f"{HOUSE}.{room}", room)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "import torch.nn as nn\nfrom .delta import Delta\nfrom lib_dynfuse.core import types"),
        ("hosts", "from modules import shared\nfrom ..core import Fusion\nfrom .. import roles"),
        ("webui", "import gradio\nfrom ..session import Session"),
        ("trace", "import json\nimport numpy\nfrom matplotlib.figure import Figure"),
    ],
)
def test_a_right_import_is_let_through(room: str, source: str) -> None:
    assert complaints(source, f"{HOUSE}.{room}", room) == []
