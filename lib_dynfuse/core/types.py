"""The two small types that every room shares: what a network is for, and who is who in a batch."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What a network contributes to the picture."""

    SUBJECT = "subject"
    STYLE = "style"


class Row(NamedTuple):
    """One item of the batch that a forward pass sees.

    `image` says which picture of the generation the item belongs to, `cond` whether it is the prompt's half (False: the
    negative prompt's), `seed` is the picture's seed, which the rule `random` draws from. Where a host feeds a picture
    in tiles, `tile` tells apart those of one batch.
    """

    image: int
    cond: bool = True
    seed: int = 0
    tile: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """What a cond row and its uncond row have in common."""
        return self.image, self.tile
