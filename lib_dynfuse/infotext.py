"""The text that the WebUI keeps in a PNG's `parameters` chunk, so that its PNG Info reads our pictures too."""

from __future__ import annotations

import json
from collections.abc import Mapping


def quote(value: object) -> str:
    """One value as the WebUI writes it: in JSON quotes where a comma, a colon or a line break would cut it short."""
    text = str(value)
    if any(mark in text for mark in ",:\n"):
        return json.dumps(text, ensure_ascii=False)
    return text


def infotext(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    """The prompt, the negative prompt where there is one, and a last line of `Key: value` pairs, None left out."""
    lines = [prompt]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in values.items() if value is not None))
    return "\n".join(lines).strip()
