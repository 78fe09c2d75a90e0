"""Browser tests need Node, Chromium, playwright-core and an environment for each gradio; see README.md here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START_SECONDS = 120
BROWSER_SECONDS = 300
# Nothing here leaves the machine, whatever proxy the environment names.
OPEN = build_opener(ProxyHandler({})).open

Seen = dict[str, Any]


@pytest.fixture(scope="session")
def web_folder() -> Path:
    """The folder that setup.sh made."""
    named = os.environ.get("DYNFUSE_WEB")
    if not named:
        pytest.skip("DYNFUSE_WEB names no folder made by tests/web/setup.sh")
    return Path(named)


@pytest.fixture(scope="session")
def browse(web_folder: Path) -> Callable[..., Seen]:
    """Run a browser script of this folder with arguments; gives what it saw."""
    node = shutil.which("node")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    modules = web_folder / "node_modules"
    for there, what in ((node, "node"), (chromium, "Chromium"), ((modules / "playwright-core").is_dir(), "playwright")):
        if not there:
            pytest.skip(f"no {what} here")
    environment = {**os.environ, "NODE_PATH": str(modules), "CHROMIUM": str(chromium)}

    def run(script: str, *arguments: object) -> Seen:
        command = [str(node), str(HERE / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_SECONDS, env=environment)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: a folder named by DYNFUSE_WEB_PICTURES, to look at them, or a temporary one."""
    named = os.environ.get("DYNFUSE_WEB_PICTURES")
    return Path(named) if named else tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module", params=["gradio3", "gradio4"])
def page_seen(
    request: pytest.FixtureRequest, web_folder: Path, browse: Callable[..., Seen], pictures: Path
) -> Iterator[Seen]:
    """What a person saw who used the panel on a page of this gradio."""
    python = web_folder / request.param / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}")
    folder = pictures / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "127.0.0.1,localhost"}
    command = [str(python), str(HERE / "page.py"), str(port)]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/config", server)
            yield browse("page.cjs", f"http://127.0.0.1:{port}/", ROOT, folder)
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return once the page answers; fails when its server ends first or takes too long."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, "the page's server ended while starting"
        try:
            OPEN(url, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"{url} did not answer in {START_SECONDS} s")
