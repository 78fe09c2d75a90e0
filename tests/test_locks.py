"""What is installed for development is what was locked, by its hash."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LOCKS = ("dev", "torch", "audit")
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def locked(name: str) -> dict[str, list[str]]:
    """`name==version` of every entry of a lock, and its hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z0-9])", "\n".join(line for line in text.split("\n") if "#" not in line[:6]))
    return {entry.split()[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})", entry) for entry in entries if entry.strip()}


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_of_a_lock_is_one_version_with_hashes(name: str) -> None:
    entries = locked(name)
    assert len(entries) > 10
    for entry, hashes in entries.items():
        assert re.fullmatch(r"[a-z0-9._-]+==[^*<>=]+", entry), entry
        assert hashes, entry


def test_the_versions_that_pyproject_asks_for_are_the_locked_ones() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text[text.index("[project.optional-dependencies]") : text.index("[tool.setuptools.packages.find]")]
    wanted = {name.lower().replace("_", "-") for name in re.findall(r'"([\w.-]+==[\w.]+)', extras)}
    assert len(wanted) > 20
    assert wanted <= {*locked("dev"), *locked("torch")}


def test_torch_and_its_cuda_stand_apart_for_machines_that_have_a_wheel_of_their_own() -> None:
    assert {entry.partition("-")[0].partition("==")[0] for entry in locked("torch")} == {"torch", "cuda", "nvidia"}
    assert not any(entry.startswith(("torch==", "cuda-", "nvidia-")) for entry in locked("dev"))


def test_nothing_is_installed_unlocked() -> None:
    commands = re.findall(r"pip install[^\n]*", WORKFLOW.read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands += re.findall(r"^\t\$\(PIP\)[^\n]*|[^\n]*pip install[^\n=]*-r [^\n]*", makefile, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        assert "--require-hashes" in command or "--no-index" in command, command
    assert "PIP = $(PY) -m pip install --quiet --no-deps\n" in makefile


def test_the_workflow_covers_every_python_linux_and_windows_and_pins_its_actions() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {os.partition("-")[0] for os in matrix["os"]} == {"ubuntu", "windows"}
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", one) for one in used)
    runs = " ".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    for word in ("ruff check", "ruff format --check", "mypy", "pytest", "pip_audit --strict"):
        assert word in runs


def test_one_file_has_the_licences_of_what_is_bundled() -> None:
    text = (ROOT / "THIRD_PARTY_LICENSES.md").read_text(encoding="utf-8")
    for name in ("Fluent Emoji", "Noto Emoji", "Twemoji", "Emoji One", "Firefox OS Emoji", "emojibase", "OpenAI"):
        assert name in text
    for words in ("Permission is hereby granted, free of charge", "TERMS AND CONDITIONS FOR USE, REPRODUCTION"):
        assert words in text
    assert "THIRD_PARTY_LICENSES.md" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
