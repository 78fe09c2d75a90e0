"""What the tests of the WebUI's side share: the host's command line, and pictures as a request has them."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from reference_files import png


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that the server was started with; none at first."""
    folders: list[str] = []
    modules: Any = sys.modules.get("modules") or ModuleType("modules")
    shared: Any = sys.modules.get("modules.shared") or ModuleType("modules.shared")
    monkeypatch.setattr(shared, "cmd_opts", SimpleNamespace(dynfuse_reference_folder=folders), raising=False)
    monkeypatch.setattr(modules, "shared", shared, raising=False)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.shared", shared)
    return folders


@pytest.fixture
def picture() -> bytes:
    return png()


@pytest.fixture
def text(picture: bytes) -> str:
    """The picture in base64."""
    return base64.b64encode(picture).decode()


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """gradio's own folder of uploads."""
    folder = tmp_path / "gradio"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder
