"""A short name for a picture by what is in it, wherever it lies."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

_DIGITS = 10


def fingerprint(source: str) -> str:
    """The first digits of the sha256 of a picture's bytes, the same for a file, its base64 and its data URL.

    What is none of these is named by its text: whoever reads the picture will say what is wrong with it.
    """
    return hashlib.sha256(_content(source.strip().strip("\"'"))).hexdigest()[:_DIGITS]


def _content(source: str) -> bytes:
    is_url = source[:5].lower() == "data:"
    if not is_url:
        try:
            return Path(source).read_bytes()
        except (OSError, ValueError):
            pass  # no file: base64 is longer than a file's name may be
    text = source.partition(",")[2] if is_url else source
    letters = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return source.encode()
