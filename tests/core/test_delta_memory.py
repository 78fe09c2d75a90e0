"""What a delta holds and what it makes while it works: never a dense ΔW, never a second copy of its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib_dynfuse.core.delta import (
    Affine,
    Decomposed,
    Delta,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    Norm,
    OutputScale,
    Rotation,
    Rows,
    Scaled,
    Shift,
    Sum,
    low_rank_factors,
)

IN, OUT, RANK = 384, 512, 4
SAME_SIZE = Geometry(padding=(1, 1))


class Made(TorchDispatchMode):
    """Notes the storage bytes, dtype and shape of every tensor that an operation made, views of older ones left out."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[int, torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.tensors.append((tensor.untyped_storage().nbytes(), tensor.dtype, tuple(tensor.shape)))
        return result

    @property
    def largest(self) -> int:
        """Elements of the largest tensor made."""
        return max((torch.Size(shape).numel() for _, _, shape in self.tensors), default=0)


def low_rank_kinds(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Delta, Tensor, Tensor]]:
    """Name -> delta, x, y on layers whose ΔW is far larger than anything else in sight."""
    x, y = torch.randn(2, IN, dtype=dtype), torch.randn(2, OUT, dtype=dtype)
    image, answer = torch.randn(1, IN, 4, 4, dtype=dtype), torch.randn(1, OUT, 4, 4, dtype=dtype)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    lora = LowRank(rand(RANK, IN), rand(OUT, RANK))
    conv = LowRank(rand(RANK, IN, 3, 3), rand(OUT, RANK, 1, 1), None, SAME_SIZE)
    core = LowRank(rand(RANK, IN, 1, 1), rand(OUT, RANK, 1, 1), rand(RANK, RANK, 3, 3), SAME_SIZE)
    gain = torch.rand(OUT) + 1
    return {
        "LowRank": (lora, x, y),
        "LowRank conv": (conv, image, answer),
        "LowRank CP": (core, image, answer),
        "Kronecker": (Kronecker(rand(8, 8), rand(OUT // 8, IN // 8)), x, y),
        "Kronecker conv": (Kronecker(rand(8, 8), rand(OUT // 8, IN // 8, 3, 3), SAME_SIZE), image, answer),
        "Kronecker pair": (
            Kronecker(rand(8, 8), LowRank(rand(RANK, IN // 8), rand(OUT // 8, RANK))),
            x,
            y,
        ),
        "Decomposed": (Decomposed(lora, gain, gain.flip(0)), x, y),
        "Scaled": (Scaled(0.5, lora), x, y),
        "Sum": (Sum(lora, Scaled(0.5, lora)), x, y),
        "Rows": (Rows(LowRank(rand(RANK, IN), rand(128, RANK)), 0, 128), x, y),
        "OutputScale": (OutputScale(rand(OUT)), x, y),
        "Rotation": (Rotation.from_oft(torch.randn(OUT // 8, 8, 8)), x, y),
        "butterfly": (Rotation.from_oft(torch.randn(4, OUT // 8, 8, 8), 1), image, answer),
    }


@pytest.mark.parametrize("name", low_rank_kinds())
def test_no_tensor_of_the_weights_size_is_ever_made(name: str) -> None:
    delta, x, y = low_rank_kinds()[name]
    with Made() as made:
        delta(x, y)
    assert 0 < made.largest < IN * OUT // 4


def test_the_watch_sees_a_dense_weight() -> None:
    delta, x, _ = low_rank_kinds()["LowRank"]
    with Made() as made:
        weight = delta.dense()
        assert weight is not None
        torch.nn.functional.linear(x, weight)
    assert made.largest == IN * OUT


@pytest.mark.parametrize("name", ["LowRank", "LowRank conv", "LowRank CP", "Kronecker", "Kronecker pair", "Sum"])
def test_norm_row_space_projection_and_factors_do_not_build_it_either(name: str) -> None:
    delta, _, _ = low_rank_kinds()[name]
    n_in = IN * 9 if name in {"LowRank conv", "LowRank CP"} else IN
    q = torch.linalg.qr(torch.randn(n_in, RANK))[0]
    with Made() as made:
        delta.frobenius_sq()
        low_rank_factors(delta)
        delta.project_out(q, 0.5)
        if not isinstance(delta, Kronecker):  # full rank: its basis is the whole space
            delta.rows_basis()
    assert 0 < made.largest < IN * OUT // 4


@pytest.mark.parametrize("name", low_rank_kinds())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_float32_tensor_is_made_of_half_precision_activations(name: str, dtype: torch.dtype) -> None:
    delta, x, y = low_rank_kinds(dtype)[name]
    with Made() as made:
        delta(x, y)
    small = OUT * 2  # (g − 1), held in float32, is one row
    assert all(tensor_dtype == dtype or torch.Size(shape).numel() < small for _, tensor_dtype, shape in made.tensors)


@pytest.mark.parametrize(
    ("delta", "size"),
    [
        (LowRank(torch.zeros(2, 6, dtype=torch.float16), torch.zeros(8, 2, dtype=torch.bfloat16)), 2 * 2 * (6 + 8)),
        (Kronecker(torch.zeros(2, 3), torch.zeros(4, 2)), 4 * (6 + 8)),
        (Kronecker(torch.zeros(2, 3), LowRank(torch.zeros(1, 2), torch.zeros(4, 1))), 4 * (6 + 2 + 4)),
        (Dense(torch.zeros(8, 6), torch.zeros(8)), 4 * 56),
        (OutputScale(torch.zeros(8).half()), 16),
        (Rotation(torch.zeros(2, 4, 4), rescale=torch.zeros(8)), 4 * (32 + 8)),
        (Decomposed(LowRank(torch.zeros(2, 6), torch.zeros(8, 2)), torch.ones(8), torch.ones(8)), 4 * (28 + 8)),
        (Affine(torch.zeros(6), torch.zeros(6), Norm()), 48),
        (Shift(torch.zeros(8)), 32),
        (Scaled(0.5, Dense(torch.zeros(8, 6))), 192),
        (Sum(Dense(torch.zeros(8, 6)), OutputScale(torch.zeros(8))), 4 * 56),
        (Rows(Dense(torch.zeros(8, 6)), 0, 8), 192),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Delta) else str(value),
)
def test_bytes_are_those_of_the_files_tensors(delta: Delta, size: int) -> None:
    assert delta.nbytes == size


@pytest.mark.parametrize("name", low_rank_kinds())
def test_working_in_another_dtype_keeps_the_files_tensors(name: str) -> None:
    delta, x, y = low_rank_kinds(torch.float16)[name]
    size = delta.nbytes
    delta(x.float(), y.float())
    assert delta.nbytes == size


def test_a_files_tensors_are_not_copied() -> None:
    down, up = torch.zeros(2, 6), torch.zeros(8, 2)
    delta = LowRank(down, up)
    assert delta.down.data_ptr() == down.data_ptr()
    assert delta.up.data_ptr() == up.data_ptr()
