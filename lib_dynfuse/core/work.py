"""A layer's deltas at work in one forward pass: what every kind of them has in common."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lib_dynfuse.core import devices
from lib_dynfuse.core.loudness import Scaling
from lib_dynfuse.core.packed import as_tokens
from lib_dynfuse.core.rules import Features, Selection
from lib_dynfuse.core.sampling import lattice_index, lattice_step, sample_index

# How many output elements are looked at together: 2 MiB of float32 on a CPU, elsewhere 10. There the scratch memory of
# the divergence (five times that) and two pairs of half-precision deltas stay below 64 MiB.
_STRETCH = {"cpu": 1 << 19}
_STRETCH_ELSEWHERE = 5 << 19
# How many numbers are squared together on a CPU.
_SQUARES = 1 << 19


class Work:
    """One part in one forward pass. `tokens` is the output as [B, T, C]; `add` changes it in place.

    The batch has `rows` rows, each of one batch item or of several tiles that follow one another. Everything is
    computed in the memory order of the layer's output: channels last for a Linear, first for most convolutions.
    `loudness` holds both deltas within the strategy's limits.
    """

    def __init__(self, x: Tensor, y: Tensor, channel_dim: int, rows: int, loudness: Scaling | None) -> None:
        self.loudness = loudness
        self.x = x if x.dtype == y.dtype else x.to(y.dtype)
        self.tokens = as_tokens(y, channel_dim)
        self.rows = rows
        self.size = (y.shape[2], y.shape[3]) if channel_dim == 1 and y.dim() == 4 else None
        self.dim = -1 if self.tokens.stride(-1) == 1 else 0
        self._grad = torch.is_grad_enabled()

    @property
    def per_row(self) -> int:
        """How many tokens a row has, those of all its tiles together."""
        return self.tokens.shape[0] // self.rows * self.tokens.shape[1]

    def look(self, sampled: int, rows: tuple[int, ...] | None = None, both: bool = False) -> Iterator[Features]:
        """The features of `sampled` tokens of every batch item, or of all of them (0), stretch by stretch; of some rows
        only where `rows` says which. `both`: whatever is seen, both roles' products will be added."""
        raise NotImplementedError

    @property
    def has_both(self) -> bool:
        """Whether both deltas, or what they are made of, are computed and kept for `add`."""
        raise NotImplementedError

    def compute_both(self) -> None:
        """Computes them; gradients flow where they did when this was made, as rules look without."""
        raise NotImplementedError

    def add(self, selection: Selection) -> None:
        """Adds what the selection gives each role; its tensors are [rows] or [rows, T]."""
        raise NotImplementedError

    def _places(self, sampled: int) -> Tensor | None:
        """Which of the T tokens are looked at, None for all of them."""
        if self.size is not None:
            return lattice_index(*self.size, lattice_step(*self.size, sampled), self.tokens.device)
        return sample_index(self.tokens.shape[1], sampled, self.tokens.device)

    def _native(self, tokens: Tensor) -> Tensor:
        """[B, T, C] in the output's own memory order: itself, or [B, C, T]."""
        return tokens if self.dim == -1 else tokens.transpose(1, 2)

    def _items(self, rows: tuple[int, ...] | None) -> slice | list[int]:
        """The batch items of some rows; a slice where they follow one another, so that nothing is copied."""
        if rows is None:
            return slice(None)
        tiles = self.tokens.shape[0] // self.rows
        if rows == tuple(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0] * tiles, (rows[0] + len(rows)) * tiles)
        return [row * tiles + tile for row in rows for tile in range(tiles)]

    def _column(self, weight: Tensor) -> Tensor:
        """[rows] or [rows, T] as [B, 1 or T, 1], one weight per token, for the tiles of a row too."""
        batch = self.tokens.shape[0]
        if weight.dim() == 1:
            weight = weight if batch == self.rows else weight.repeat_interleave(batch // self.rows)
            return weight.view(batch, 1, 1)
        return weight.reshape(batch, -1, 1)

    def _stretches(self, y: Tensor) -> Iterator[tuple[slice, slice]]:
        """(items, tokens) of y [B, T, C], one after another: several items where they lie in one run of memory, or one
        or a part of one. So what is found of an item does not hang on which others are in the batch."""
        batch, tokens, channels = y.shape
        step = max(1, _STRETCH.get(y.device.type, _STRETCH_ELSEWHERE) // channels)
        together = max(1, step // tokens) if y.is_contiguous() else 1
        for item in range(0, batch, together):
            for start in range(0, tokens, step):
                yield slice(item, min(item + together, batch)), slice(start, min(start + step, tokens))

    def _stretch(self, values: Tensor, items: slice, tokens: slice) -> Tensor:
        """[n, C] of values [B, T, C], or [C, n] of one item where channels come first."""
        found = values[items, tokens]
        return found.flatten(0, 1) if self.dim == -1 else found[0].T


def squares(tokens: Tensor, dim: int) -> Tensor:
    """The squared length of every token of [B, T, C], [B, T] float32."""
    if dim == -1 or not devices.readable(tokens.device):
        wide = tokens.float() if tokens.dtype == torch.float64 else tokens
        return torch.linalg.vector_norm(wide, dim=-1, dtype=torch.float32).square_()
    # A channel's neighbours lie far apart in memory; a CPU is faster at adding up whole channels, some at a time.
    native = tokens.transpose(1, 2)
    found = torch.zeros(native.shape[0], native.shape[2], dtype=torch.float32, device=tokens.device)
    for part in native.split(max(1, _SQUARES // max(1, native[:, 0].numel())), 1):
        found.add_(part.float().square().sum(1))
    return found


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """values * weights; a boolean weight keeps out what is not chosen, even where it is infinite."""
    return torch.where(weights, values, 0.0) if weights.dtype == torch.bool else values * weights.to(values.dtype)
