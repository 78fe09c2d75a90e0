"""Where a WebUI keeps the words of CLIP's tokenizer, for those that have no open_clip."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# By package of the host: where in it, as a pattern. Those of Stable Diffusion are CLIP's own.
_PLACES = (
    ("backend", "huggingface/*/stable-diffusion*/tokenizer"),
    ("ldm_patched.modules", "sd1_tokenizer"),
)


def tokenizer_folders() -> list[Path]:
    """Folders with a vocab.json and a merges.txt of CLIP's."""
    found: list[Path] = []
    for package, pattern in _PLACES:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of what it would be in
            continue
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            found += [path.parent for path in sorted(Path(place).glob(f"{pattern}/vocab.json"))]
    return found
