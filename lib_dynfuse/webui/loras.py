"""The LoRAs that the WebUI has, by the names and aliases of its tags."""

from __future__ import annotations

import json
import sys
from typing import Any

_MOST_LETTERS = 100_000


def listed(name: str) -> Any:
    """The host's entry of a LoRA, as its list is now; None where it has none, or no list."""
    networks: Any = sys.modules.get("networks")
    if networks is None:
        return None
    forbidden = name.lower() in networks.forbidden_network_aliases
    return (networks.available_networks if forbidden else networks.available_network_aliases).get(name)


def on_disk(name: str) -> Any:
    """The same, found as the host finds it itself: where its list lacks the name, it looks for files anew."""
    found = listed(name)
    if found is None and "networks" in sys.modules:
        sys.modules["networks"].list_available_networks()
        found = listed(name)
    return found


def answer(question: str) -> str:
    """For `javascript/dynfuse.js`: of {"names": [...]} those that are not in the list, {"unlisted": [...]}.

    No file is looked for: the host may be using its list at this moment. Without a list nothing is said.
    """
    try:
        names = json.loads(question)["names"] if len(question) <= _MOST_LETTERS else []
        asked = [name for name in names if isinstance(name, str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        asked = []
    known = "networks" in sys.modules
    return json.dumps({"unlisted": [name for name in asked if known and listed(name) is None]})
