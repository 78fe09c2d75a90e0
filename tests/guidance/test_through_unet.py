"""The paper's nudge: what a sampler makes next moves by -m times the gradient of R by the UNet's input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_encoders import ToyEncoder, latents, pictures

from lib_dynfuse.guidance.decoders import linear
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.nudge import PAPER_STEP, Nudge
from lib_dynfuse.guidance.objectives import Objective

DECODE = linear("sd1")
SIGMA, SIGMA_NEXT = 2.0, 1.5
REMAINING = 1 - SIGMA_NEXT / SIGMA


class UNetLike(nn.Module):
    """Down, a nonlinearity, up and a shortcut: every pixel of D depends on its neighbourhood in x."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(8, 4, 3, 3, generator=generator, dtype=torch.float64) / 6)
        self.up = nn.Parameter(torch.randn(4, 8, 3, 3, generator=generator, dtype=torch.float64) / 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.silu(functional.conv2d(x, self.down.to(x), stride=2, padding=1))
        return 0.5 * x + functional.conv2d(functional.interpolate(hidden, scale_factor=2.0), self.up.to(x), padding=1)


UNET = UNetLike()


@pytest.fixture(scope="module")
def objective() -> Objective:
    return Objective(ToyEncoder(11), ToyEncoder(12), pictures(1), pictures(2))


def prediction(x: Tensor) -> tuple[Tensor, Tensor]:
    """(D with its graph, its leaf)."""
    leaf = x.clone().requires_grad_()
    return UNET(leaf), leaf


def gradient(x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Of R by x, by differences: the oracle that autograd is held against, too."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    step = 1e-6
    up, down = (objective(DECODE(UNET(x + sign * step * direction))) for sign in (1, -1))
    return (up - down).detach() / (2 * step)


def next_of(x: Tensor, denoised: Tensor) -> Tensor:
    share = SIGMA_NEXT / SIGMA
    return share * x + (1 - share) * denoised


@pytest.mark.parametrize("strength", [0.02, 0.2])
def test_what_the_sampler_makes_next_moves_by_the_paper_s_step(objective: Objective, strength: float) -> None:
    x = latents(1, 3).double()
    denoised, leaf = prediction(x)
    nudge = Nudge("xt", strength, clamp=1e9)
    found = nudge.through_unet(denoised, leaf, objective, DECODE, REMAINING)

    variable = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(objective(DECODE(UNET(variable))).sum(), variable)
    moved = next_of(x, found.denoised) - next_of(x, denoised.detach())
    torch.testing.assert_close(moved, -PAPER_STEP * strength * g, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.r, objective(DECODE(UNET(x))).detach())
    assert not found.denoised.requires_grad


def test_the_gradient_is_the_slope_that_differences_find(objective: Objective) -> None:
    x = latents(1, 3).double()
    denoised, leaf = prediction(x)
    found = Nudge("xt", clamp=1e9).through_unet(denoised, leaf, objective, DECODE, REMAINING)
    g = (denoised.detach() - found.denoised) * REMAINING / (PAPER_STEP * 0.2)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    torch.testing.assert_close((g * direction).sum((1, 2, 3)), gradient(x, objective), rtol=1e-5, atol=1e-9)


def test_it_is_the_gradient_by_the_input_and_not_by_the_prediction(objective: Objective) -> None:
    x = latents(1).double()
    denoised, leaf = prediction(x)
    through = Nudge("xt", clamp=1e9).through_unet(denoised, leaf, objective, DECODE, REMAINING).denoised
    change = (through - denoised.detach()).flatten()
    at_d = (Nudge("x0", clamp=1e9)(denoised.detach(), objective, DECODE).denoised - denoised.detach()).flatten()
    assert torch.cosine_similarity(change, at_d, dim=0) < 0.99


def test_at_the_default_strength_r_of_the_next_prediction_falls(objective: Objective) -> None:
    x = latents(3, 20).double()
    denoised, leaf = prediction(x)
    found = Nudge("xt").through_unet(denoised, leaf, objective, DECODE, REMAINING)
    before, after = (objective(DECODE(UNET(next_of(x, one)))) for one in (denoised.detach(), found.denoised))
    assert int((after < before).sum()) >= 19


def test_nothing_moves_further_than_the_clamp_however_small_the_step_that_remains(objective: Objective) -> None:
    denoised, leaf = prediction(latents(2, 2).double())
    given = denoised.detach()
    found = Nudge("xt", 2.0, clamp=0.01).through_unet(denoised, leaf, objective, DECODE, 0.0)
    moved, size = ((one.square().flatten(1).mean(1).sqrt()) for one in (found.denoised - given, given))
    torch.testing.assert_close(moved, 0.01 * size)


def test_an_item_moves_as_it_would_alone(objective: Objective) -> None:
    x = latents(4, 3).double()
    together = Nudge("xt").through_unet(*prediction(x), objective, DECODE, REMAINING)
    for index in range(3):
        alone = Nudge("xt").through_unet(*prediction(x[index : index + 1]), objective, DECODE, REMAINING)
        torch.testing.assert_close(together.denoised[index : index + 1], alone.denoised)
        torch.testing.assert_close(together.r[index : index + 1], alone.r)


def test_an_item_without_a_number_stays_as_it_is() -> None:
    denoised, leaf = prediction(latents(5, 3).double())
    weights = torch.tensor([1.0, math.nan, 1.0], dtype=torch.float64)
    found = Nudge("xt").through_unet(denoised, leaf, lambda images: -images.mean((1, 2, 3)) * weights, DECODE, 0.5)
    assert torch.equal(found.denoised[1], denoised.detach()[1])
    assert found.failed.tolist() == [False, True, False]
    assert not torch.equal(found.denoised[0], denoised.detach()[0])


def test_out_of_memory_going_back_leaves_the_prediction_and_a_reason(objective: Objective) -> None:
    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB")

    leaf = latents(6).double().requires_grad_()
    denoised = UNET(Short.apply(leaf))
    found = Nudge("xt").through_unet(denoised, leaf, objective, DECODE, 0.5)
    assert torch.equal(found.denoised, denoised.detach())
    assert not found.denoised.requires_grad
    assert found.reason() == "not enough memory for it"


def test_a_prediction_without_a_graph_is_given_back_with_a_reason(objective: Objective) -> None:
    leaf = latents(6).double().requires_grad_()
    given = UNET(leaf).detach()
    found = Nudge("xt").through_unet(given, leaf, objective, DECODE, 0.5)
    assert torch.equal(found.denoised, given)
    assert found.reason() == "no gradient comes through the decoder or the encoders"


def test_a_guide_keeps_it_as_any_other_nudge(objective: Objective) -> None:
    guide = Guide(Nudge("xt"), objective, DECODE, [1, 2])
    denoised, leaf = prediction(latents(7, 2).double())
    with torch.no_grad():
        found = guide.at_input(5, denoised, leaf, 0.5)
    expected = Nudge("xt").through_unet(*prediction(latents(7, 2).double()), objective, DECODE, 0.5)
    torch.testing.assert_close(found, expected.denoised)
    assert list(guide.curve()) == [5]
    assert not guide.wants(5, 5, 11)
