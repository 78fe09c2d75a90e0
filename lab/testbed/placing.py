"""Where a subject stands: its size, place, turn and mirror image, and the ground under it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lab.testbed.styles import SIZE, figure

TURN = 12.0  # degrees at most, either way
SIZES = (0.68, 0.97)  # the longer side, of the picture's


@dataclass(frozen=True)
class Placed:
    """A subject where it stands: `colour` float [SIZE, SIZE, 3] and `opacity` float [SIZE, SIZE] in 0..1."""

    colour: np.ndarray
    opacity: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        return self.opacity > 0.5

    def on(self, ground: np.ndarray) -> np.ndarray:
        """uint8 [SIZE, SIZE, 3] over a ground that broadcasts against it."""
        alpha = self.opacity[..., None]
        return (self.colour * alpha + ground * (1 - alpha)).round().clip(0, 255).astype(np.uint8)


def cut_out(picture: np.ndarray) -> Image.Image:
    """The figure of uint8 [H, W, 3] on white, as RGBA cropped to it."""
    inside = figure(picture)
    image = Image.fromarray(np.dstack([picture, np.where(inside, 255, 0).astype(np.uint8)]), "RGBA")
    box = image.getchannel("A").getbbox()
    return image.crop(box) if box else image


def place(subject: Image.Image, random: np.random.Generator) -> Placed:
    """The cut-out at a random size, turn, mirror image and place, wholly inside."""
    side = SIZE * random.uniform(*SIZES)
    if random.random() < 0.5:
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = subject.rotate(random.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    factor = side / max(turned.size)
    width, height = (max(1, min(SIZE, round(length * factor))) for length in turned.size)
    turned = turned.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (int(random.integers(0, SIZE - length + 1)) for length in (width, height))
    page = Image.new("RGBA", (SIZE, SIZE))
    page.paste(turned, (left, top))
    pixels = np.asarray(page, float)
    return Placed(pixels[..., :3], pixels[..., 3] / 255)


def tint(random: np.random.Generator) -> np.ndarray:
    """A pale ground colour, float [3]: the drawn sets have no ground of their own."""
    return 255 - random.uniform(0, 60, 3) * random.uniform(0, 1)
