"""Run by the WebUI before it starts. It installs nothing: the host already has what the extension needs.

A feature that wants more than the host has is named, with what it lacks, and stays off; everything else works.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

FEATURES: Mapping[str, Sequence[str]] = {
    "comparing pictures with references by CLIP": ("open_clip",),
    "comparing pictures with references by DINO": ("transformers",),
}


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: already imported, but without a spec
        return False


def lacking(features: Mapping[str, Sequence[str]] = FEATURES) -> list[str]:
    """One line for each feature that lacks something."""
    lines = []
    for feature, modules in features.items():
        absent = [module for module in modules if not is_installed(module)]
        if absent:
            lines.append(f"DynFuse: {feature} stays off, it lacks {' and '.join(absent)}; everything else works.")
    return lines


if __name__ == "__main__":
    print(*lacking(), sep="\n", end="\n" if lacking() else "")
