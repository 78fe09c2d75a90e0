"""Pictures as people give them: bytes that are checked by their header, decoded once, and small from the start.

Whatever is read here may have been made to do harm. The limits are our own: hosts switch PIL's off.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
FORMATS_SHOWN = "PNG, JPEG, WebP, BMP and GIF"
MOST_PIXELS = 64_000_000
# PIL decodes a WebP in several copies of four bytes a pixel each, and at no smaller size.
_MOST_PIXELS_OF = {"WEBP": 24_000_000}
# References are looked at by encoders of 224 or 384 pixels.
SIDE = 1024
_BEGINNINGS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|BM|GIF8[79]a", re.DOTALL)
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_ORIENTATION = 0x0112
# A JPEG's scan may go through all of its pixels at the cost of a few bytes; cameras and editors write about ten.
_SCAN, _MOST_SCANS = b"\xff\xda", 50
_PIXELS_A_STRIP = 2**20
_DIGITS = 10
_MOST_FINGERPRINTS = 4
# Letters of a source in a message: base64 may be megabytes.
_SHOWN, _SHOWN_OF_PATH = 80, 500


class PictureError(ValueError):
    """A picture that cannot be used; the message is one line that names it."""


@dataclass(frozen=True)
class PictureFile:
    """A picture as it came, not decoded. `name`: what messages call it."""

    name: str
    data: bytes = field(repr=False)

    def check(self) -> None:
        """Raises PictureError for what the header says is no picture, or too large a one; no pixel is decoded."""
        with self._opened():
            pass

    def decode(self, side: int | None = SIDE) -> Tensor:
        """[1, 3, H, W] float32 RGB in 0..1, turned as its EXIF says, on white where it is transparent, of several
        frames the first.

        `side`: the longest that a side may be, larger ones are shrunk; None keeps them. Raises PictureError.
        """
        import numpy as np
        from PIL import ImageOps

        with self._opened() as image:
            if side is not None:
                image.draft(None, (2 * side, 2 * side))  # a JPEG can be decoded at an eighth
            image.load()
            self._check_size(image)  # a frame may be larger than the header said
            picture = _on_white_and_small(image, side)
            picture.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
            pixels = np.array(ImageOps.exif_transpose(picture), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255

    @contextmanager
    def _opened(self) -> Iterator[Image]:
        from PIL import Image as images

        try:
            with images.open(io.BytesIO(self.data), formats=FORMATS) as image:
                self._check_size(image)
                self._check_scans(image)
                yield image
        except PictureError:
            raise
        except images.DecompressionBombError:
            raise PictureError(f"{self.name}: is too large") from None
        # A broken file raises whatever its format's reader stumbles over.
        except Exception:
            raise PictureError(
                f"{self.name}: is not a picture, or not a whole one; allowed are {FORMATS_SHOWN}"
            ) from None

    def _check_size(self, image: Image) -> None:
        most = _MOST_PIXELS_OF.get(image.format or "", MOST_PIXELS)
        if image.width * image.height > most:
            size = f"{image.width} x {image.height} pixels"
            raise PictureError(f"{self.name}: is too large, {size}; at most {most / 1e6:g} megapixels are allowed")

    def _check_scans(self, image: Image) -> None:
        if image.format in ("JPEG", "MPO"):
            scans = self.data.count(_SCAN)
            if scans * image.width * image.height > _MOST_SCANS * MOST_PIXELS:
                raise PictureError(f"{self.name}: is a JPEG of {scans} scans, which would take too long to decode")

    @property
    def fingerprint(self) -> str:
        """A short name for what is in it: the first digits of the sha256 of its bytes."""
        return hashlib.sha256(self.data).hexdigest()[:_DIGITS]


def fingerprints(files: Sequence[PictureFile]) -> str:
    """Those of a few pictures; one for all of them where they are more."""
    if len(files) <= _MOST_FINGERPRINTS:
        return " ".join(one.fingerprint for one in files)
    every = hashlib.sha256()
    for one in files:
        every.update(hashlib.sha256(one.data).digest())
    return f"together {every.hexdigest()[:_DIGITS]}"


def _on_white_and_small(image: Image, side: int | None) -> Image:
    """Strip by strip, so that there is never a second copy of a large picture."""
    from PIL import Image as images

    factor = 1 if side is None else max(1, max(image.size) // (2 * side))
    rows = max(1, _PIXELS_A_STRIP // image.width // factor) * factor
    small = images.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = _on_white(image.crop((0, top, image.width, min(top + rows, image.height))))
        small.paste(strip.reduce(factor), (0, top // factor))
    if side is not None:
        small.thumbnail((side, side))
    return small


def _on_white(image: Image) -> Image:
    import numpy as np
    from PIL import Image as images

    if image.mode.startswith("I"):
        # 16 bits a pixel: PIL would cut them off where they have to be scaled.
        shades = np.asarray(image, dtype=np.float32) / 257
        image = images.fromarray(shades.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def in_text(text: str) -> bytes | None:
    """The bytes of a picture in base64, as a data URL or plain; None where the text is no such thing.

    Plain base64 has to be of a picture by its first bytes: a path may be written in the same letters.
    """
    text = text.strip().strip("\"'")
    url = _DATA_URL.match(text)
    data = _from_base64(text[url.end() :] if url else text)
    return data if data and (url or begins_as_one(data)) else None


def begins_as_one(data: bytes) -> bool:
    """Whether the first bytes are those of a picture of an allowed format."""
    return _BEGINNINGS.match(data) is not None


def _from_base64(text: str) -> bytes | None:
    """Of either alphabet, in lines or in one, with or without its padding."""
    letters = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def open_picture(source: str | Path) -> PictureFile:
    """A picture that a person at this machine names: by its path; as text also in base64, or as a data URL.

    Never for what comes from a request. Raises PictureError.
    """
    if isinstance(source, Path):
        return open_file(source, _shown(str(source), _SHOWN_OF_PATH))
    text = source.strip().strip("\"'")
    if os.path.exists(text):  # unlike Path's own, it takes whatever was written
        return open_file(Path(text), _shown(text, _SHOWN_OF_PATH))
    data = in_text(text)
    if data is not None:
        return PictureFile(_shown(text), data)
    if text.lower().startswith("data:"):
        raise PictureError(f"{_shown(text)}: a data URL has to be of the kind data:image/png;base64,...")
    shown = _shown(text, _SHOWN_OF_PATH if "." in text else _SHOWN)  # base64 has no full stop
    raise PictureError(f"{shown}: there is no such file, and it is not a picture in base64")


def open_file(path: Path, name: str) -> PictureFile:
    """A picture on disk, under the name that messages are to have. Raises PictureError."""
    if not os.path.isfile(path):
        raise PictureError(
            f"{name}: {'is a folder, not a picture' if os.path.isdir(path) else 'there is no such file'}"
        )
    try:
        return PictureFile(name, path.read_bytes())
    except OSError as error:
        raise PictureError(f"{name}: cannot be read: {error.strerror}") from error


def _shown(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def read_picture(source: str | Path, side: int | None = SIDE) -> Tensor:
    """`open_picture` and `PictureFile.decode` in one."""
    return open_picture(source).decode(side)
