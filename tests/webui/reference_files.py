"""Pictures as files have them."""

from __future__ import annotations

import io

from PIL import Image


def png(colour: str = "red", size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, format="PNG")
    return file.getvalue()
