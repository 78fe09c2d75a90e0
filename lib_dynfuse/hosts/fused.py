"""Layers that compute several things at once, told apart by the names that the models' own code has for them."""

from __future__ import annotations

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.parts import divided


def apart(path: str, delta: Delta) -> Delta:
    """The delta of a layer, taken apart where the layer is a fused one, so that every part is decided by itself.

    Files in kohya's names cover such a layer as a whole, those in diffusers' names its parts: with either, q is weighed
    against q and not against k and v.
    """
    bounds = bounds_of(path, delta)
    try:
        return divided(delta, bounds) if bounds else delta
    except ValueError:  # a kind that cannot be cut
        return delta


def bounds_of(path: str, delta: Delta) -> list[int]:
    """Where, in the output rows of a layer, one part ends and the next begins; empty for a layer that is one thing.

    `...qkv` (Flux, Chroma, SD3) is q, k and v; `linear1` of a single block (Flux, Chroma) is these and the MLP.
    """
    width, rows = delta.inputs, delta.outputs
    if width is None or rows is None or delta.channel_dim != -1:
        return []
    block, _, name = path.rpartition(".")
    if name == "qkv" and rows == 3 * width:
        return [width, 2 * width]
    if name == "linear1" and "single_blocks." in block and rows > 3 * width:
        return [width, 2 * width, 3 * width]
    return []
