"""What a network adds to a layer's output, as an algebra: the public names.

kind                              d                                           networks
LowRank(down, up, mid)            up(mid(down(x)))                            LoRA, LoCon, CP convolutions
Kronecker(w1, w2)                 (w1 ⊗ w2)·x                                 LoKr
Dense(weight, bias)               f_ΔW(x)                                     full, LoHa, GLoRA, anything with a ΔW
OutputScale(v)                    v ⊙ y                                       (IA)³
Rotation(blocks)                  (R − I)·y                                   OFT, BOFT
Decomposed(inner, magnitude, norm)  (g − 1) ⊙ y + g ⊙ inner(x), g = magnitude / norm    DoRA
Affine(weight, bias, norm)        x̂ ⊙ Δw + Δb                                 norm layers
Shift(bias)                       Δb                                          a changed bias
Scaled, Sum, Rows                 multipliers, several networks per role, one part of a fused layer
"""

from __future__ import annotations

from lib_dynfuse.core.algebra import Delta, Factors, Geometry, Rows, Scaled, Shift, Sum
from lib_dynfuse.core.outputs import Affine, Decomposed, Norm, OutputScale, Rotation, row_norm
from lib_dynfuse.core.weights import Dense, Kronecker, LowRank

__all__ = [
    "Affine",
    "Decomposed",
    "Delta",
    "Dense",
    "Factors",
    "Geometry",
    "Kronecker",
    "LowRank",
    "Norm",
    "OutputScale",
    "Rotation",
    "Rows",
    "Scaled",
    "Shift",
    "Sum",
    "low_rank_factors",
    "row_norm",
]


def low_rank_factors(delta: Delta) -> Factors | None:
    """ΔW of LowRank, Scaled and Sum as one product with the scales folded in, so that one matmul serves several deltas.

    None where there is no such product: other kinds, a CP core, grouped convolutions, parts of different geometry. A
    callable scale is read now; the caller reads again when it has changed.
    """
    return delta.factors()
