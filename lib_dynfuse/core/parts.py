"""A fused layer (the q, k and v of a qkv) taken apart, so that every part is decided by itself."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lib_dynfuse.core.delta import Decomposed, Delta, Dense, Kronecker, LowRank, Rows, Scaled, Shift, Sum
from lib_dynfuse.core.types import Role


class Piece(NamedTuple):
    """A delta of the output rows `start` to `stop`; `stop` None means the last row, whatever its number."""

    start: int
    stop: int | None
    delta: Delta


class Stretch(NamedTuple):
    """Output rows that are decided as one, and what each role adds to them."""

    start: int
    stop: int | None
    deltas: dict[Role, Delta]

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop is None


def without_zeros(delta: Delta) -> Delta | None:
    """The delta without the networks whose strength is 0 for good; None where none is left."""
    if isinstance(delta, Scaled):
        inner = None if not delta.varies and delta.scale == 0.0 else without_zeros(delta.inner)
        return delta if inner is delta.inner else inner and _scaled(delta, inner)
    if isinstance(delta, Rows):
        inner = without_zeros(delta.inner)
        return delta if inner is delta.inner else inner and Rows(inner, delta.start, delta.stop, delta.total)
    if isinstance(delta, Sum):
        kept = [found for found in map(without_zeros, delta.parts) if found is not None]
        if all(map(operator.is_, kept, delta.parts)) and len(kept) == len(delta.parts):
            return delta
        return Sum(*kept) if len(kept) > 1 else next(iter(kept), None)
    return delta


def _scaled(like: Scaled, inner: Delta) -> Scaled:
    """Another delta with the same strength, read at every call where that one's is."""
    return Scaled((lambda: like.scale) if like.varies else like.scale, inner)


def stretches(deltas: Mapping[Role, Delta]) -> list[Stretch]:
    """The layer divided wherever some delta's rows begin or end; rows that no delta covers are left out.

    Raises `ValueError` without a delta, or for a delta of the whole layer that cannot be cut where another one divides
    it: one of grouped convolutions, or one that acts on the output (other than Decomposed) or on a normalisation layer.
    """
    if not deltas:
        raise ValueError("no delta for any role")
    pieces = {role: _pieces(delta) for role, delta in deltas.items()}
    known = [piece for listed in pieces.values() for piece in listed]
    bounds = sorted({bound for piece in known for bound in piece[:2] if bound})
    # Where a delta of the whole layer says how many rows there are, nothing is left after the last of them.
    totals = {piece.delta.outputs for piece in known if piece.stop is None}
    result = []
    for start, stop in zip([0, *bounds], [*bounds, None], strict=True):
        if start in totals:
            continue
        here: dict[Role, Delta] = {}
        for role, listed in pieces.items():
            found = [_cut(piece, start, stop) for piece in listed if _covers(piece, start, stop)]
            if found:
                here[role] = found[0] if len(found) == 1 else Sum(*found)
        if here:
            result.append(Stretch(start, stop, here))
    return result


def divided(delta: Delta, bounds: Sequence[int]) -> Delta:
    """The same delta as one of `Rows` that begin and end at `bounds` too: `stretches` divides the layer there.

    bounds: numbers of output rows, in order. Raises `ValueError` for a delta that cannot be cut there, or one of the
    whole layer that does not know how many rows it has.
    """
    found: list[Delta] = []
    for start, stop, inner in _pieces(delta):
        end = inner.outputs if stop is None else stop
        if end is None:
            raise ValueError(f"a {type(inner).__name__} for any number of rows cannot be divided")
        edges = [start, *(bound for bound in bounds if start < bound < end), end]
        found += [Rows(_cut(Piece(start, end, inner), a, b), a, b, delta.outputs) for a, b in pairwise(edges)]
    return Sum(*found)


def _pieces(delta: Delta) -> list[Piece]:
    if isinstance(delta, Rows):
        return [Piece(delta.start, delta.stop, delta.inner)]
    if isinstance(delta, Scaled):
        return [piece._replace(delta=_scaled(delta, piece.delta)) for piece in _pieces(delta.inner)]
    if isinstance(delta, Sum):
        found = [piece for part in delta.parts for piece in _pieces(part)]
        return found if any(piece.stop is not None for piece in found) else [Piece(0, None, delta)]
    return [Piece(0, None, delta)]


def _covers(piece: Piece, start: int, stop: int | None) -> bool:
    return piece.start <= start and (piece.stop is None or (stop is not None and stop <= piece.stop))


def _cut(piece: Piece, start: int, stop: int | None) -> Delta:
    """The delta of rows `start` to `stop` of the layer, which lie within the piece."""
    if (piece.start, piece.stop) == (start, stop):
        return piece.delta
    return _cut_delta(piece.delta, slice(start - piece.start, None if stop is None else stop - piece.start))


def _cut_delta(delta: Delta, rows: slice) -> Delta:
    if isinstance(delta, Scaled):
        return _scaled(delta, _cut_delta(delta.inner, rows))
    if isinstance(delta, Sum):
        return Sum(*(_cut_delta(part, rows) for part in delta.parts))
    if isinstance(delta, LowRank) and (delta.geometry is None or delta.geometry.groups == 1):
        return LowRank(delta.down, delta.up[rows], delta.mid, delta.geometry)
    if isinstance(delta, Dense) and (delta.geometry is None or delta.geometry.groups == 1):
        bias = None if delta.bias is None else delta.bias[rows]
        return Dense(delta.weight[rows], bias, delta.geometry)
    if isinstance(delta, Kronecker) and (delta.geometry is None or delta.geometry.groups == 1):
        return _cut_kronecker(delta, *rows.indices(delta.outputs)[:2])
    if isinstance(delta, Decomposed):
        gain = delta.gain.flatten()[rows]
        return Decomposed(_cut_delta(delta.inner, rows), gain, torch.ones_like(gain))
    if isinstance(delta, Shift):
        return Shift(delta.bias[rows], delta.channel_dim)
    raise ValueError(f"one network covers the whole layer by a {type(delta).__name__}, another only parts of it")


def _cut_kronecker(delta: Kronecker, start: int, stop: int) -> Delta:
    """Row i of w1 makes a block of rows, as many as w2 has: whole blocks, and a part of one before and after them."""
    block = delta.outputs // delta.w1.shape[0]
    found: list[Rows] = []
    at = start
    while at < stop:
        row, within = divmod(at, block)
        if within == 0 and stop - at >= block:
            end = stop - stop % block
            w1, w2 = delta.w1[row : end // block], delta.w2
        else:
            end = min(stop, (row + 1) * block)
            w1, w2 = delta.w1[row : row + 1], _cut_second(delta.w2, slice(within, within + end - at))
        part = Kronecker(w1, w2, delta.geometry)
        found.append(Rows(part, at - start, end - start, stop - start))
        at = end
    return found[0].inner if len(found) == 1 else Sum(*found)


def _cut_second(w2: Tensor | LowRank, rows: slice) -> Tensor | LowRank:
    return LowRank(w2.down, w2.up[rows], w2.mid, w2.geometry) if isinstance(w2, LowRank) else w2[rows]
