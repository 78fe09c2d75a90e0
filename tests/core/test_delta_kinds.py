"""What every kind of delta has in common: dtypes, devices, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from cases import rand, same
from torch import Tensor, nn

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
)


def every_kind() -> dict[str, tuple[Delta, Tensor, Tensor]]:
    """Name -> a float32 delta, and x and y of a layer it fits."""
    x, y, image, answer = rand(2, 5, 6), rand(2, 5, 8), rand(2, 6, 5, 5), rand(2, 8, 5, 5)
    same_size = Geometry(padding=(1, 1))
    low_rank = LowRank(rand(2, 6).float(), rand(8, 2).float())
    gain = rand(8).abs().float() + 1
    kinds: dict[str, tuple[Delta, Tensor, Tensor]] = {
        "LowRank": (low_rank, x, y),
        "LowRank conv": (LowRank(rand(2, 6, 3, 3).float(), rand(8, 2, 1, 1).float(), None, same_size), image, answer),
        "LowRank CP": (
            LowRank(rand(2, 6, 1, 1).float(), rand(8, 2, 1, 1).float(), rand(2, 2, 3, 3).float(), same_size),
            image,
            answer,
        ),
        "Kronecker": (Kronecker(rand(2, 3).float(), rand(4, 2).float()), x, y),
        "Kronecker conv": (Kronecker(rand(2, 3).float(), rand(4, 2, 3, 3).float(), same_size), image, answer),
        "Dense": (Dense(rand(8, 6).float(), rand(8).float()), x, y),
        "Dense conv": (Dense(rand(8, 6, 3, 3).float(), rand(8).float(), same_size), image, answer),
        "OutputScale": (OutputScale(rand(8).float()), x, y),
        "Rotation": (Rotation.from_oft(rand(4, 2, 2).float()), x, y),
        "Rotation conv": (Rotation.from_oft(rand(4, 2, 2).float(), 1, rescale=gain), image, answer),
        "butterfly": (Rotation.from_oft(rand(3, 4, 2, 2).float()), x, y),
        "Decomposed": (Decomposed(low_rank, gain, gain.flip(0)), x, y),
        "LayerNorm": (Affine(rand(6).float(), rand(6, seed=1).float(), Norm()), x, x),
        "GroupNorm": (Affine(rand(6).float(), None, Norm(groups=3)), image, image),
        "Shift": (Shift(rand(8).float()), x, y),
        "Shift conv": (Shift(rand(8).float(), 1), image, answer),
        "Scaled": (Scaled(0.5, low_rank), x, y),
        "Sum": (Sum(low_rank, OutputScale(rand(8).float())), x, y),
        "Rows": (Rows(Dense(rand(3, 6).float()), 2, 5), x, y),
    }
    return kinds


@pytest.mark.parametrize("name", every_kind())
class TestEveryKind:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_computes_in_the_dtype_of_its_input(self, name: str, dtype: torch.dtype) -> None:
        delta, x, y = every_kind()[name]
        exact = delta(x, y)
        d = delta(x.to(dtype), y.to(dtype))
        assert d.dtype == dtype
        assert d.shape == y.shape
        # Intermediate results are rounded too: a few units in the last place of the largest value.
        slack = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
        torch.testing.assert_close(d.double(), exact, rtol=0, atol=slack)

    def test_another_number_of_channels_is_named(self, name: str) -> None:
        delta, x, y = every_kind()[name]
        dim = delta.channel_dim
        wider = torch.cat([y, y], dim=dim)
        x = torch.cat([x, x], dim=dim)
        if name == "Rows":
            wider = y
        with pytest.raises(ValueError, match=rf"is made for .* channels, the layer has {x.shape[dim]} -> "):
            delta(x, wider)

    def test_moves_to_the_device_of_its_input_on_first_use(self, name: str) -> None:
        delta, x, y = every_kind()[name]
        size = delta.nbytes
        d = delta(x.to("meta"), y.to("meta"))
        assert d.device.type == "meta"
        assert d.shape == y.shape
        assert {t.device.type for t in tensors(delta)} == {"meta"}
        assert delta.nbytes == size

    def test_can_be_moved_beforehand(self, name: str) -> None:
        delta, _, _ = every_kind()[name]
        delta.to("meta")
        assert {t.device.type for t in tensors(delta)} == {"meta"}

    def test_lets_gradients_through_to_its_input(self, name: str) -> None:
        delta, x, y = every_kind()[name]
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        # Not every kind depends on both; gradcheck wants an answer for each.
        assert torch.autograd.gradcheck(lambda x, y: delta(x, y) + 0 * (x.sum() + y.sum()), (x, y), fast_mode=True)

    def test_says_whether_it_needs_the_base_output(self, name: str) -> None:
        delta, x, y = every_kind()[name]
        other = delta(x, y + 1)
        assert delta.needs_base != torch.equal(other, delta(x, y))

    def test_leaves_its_input_alone(self, name: str) -> None:
        delta, x, y = every_kind()[name]
        before = x.clone(), y.clone()
        first = delta(x, y)
        same(delta(x, y), first)
        same(x, before[0])
        same(y, before[1])


def tensors(delta: Delta) -> list[Tensor]:
    own = [value for value in vars(delta).values() if isinstance(value, Tensor)]
    return own + [tensor for part in delta.parts for tensor in tensors(part)]


def test_parameters_that_require_gradients_build_no_graph() -> None:
    layer = nn.Linear(3, 4)
    d = LowRank(nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2)))(torch.ones(1, 3), torch.ones(1, 4))
    assert not d.requires_grad
    assert not Dense(layer.weight, layer.bias)(torch.ones(1, 3), torch.ones(1, 4)).requires_grad
