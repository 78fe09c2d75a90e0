"""One guidance step: it lowers the objective, stays within its clamp, item by item, and never costs the picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from toy_encoders import TinyDecoder, ToyEncoder, latents, pictures

from lib_dynfuse.guidance.decoders import Decoder, TaesdDecoder, linear
from lib_dynfuse.guidance.nudge import WITHOUT_CFG, Nudge
from lib_dynfuse.guidance.objectives import Objective

DECODERS: dict[str, Decoder] = {"linear": linear("sd1"), "taesd": TaesdDecoder(TinyDecoder())}


@pytest.fixture(scope="module")
def objective() -> Objective:
    return Objective(ToyEncoder(11), ToyEncoder(12), pictures(1), pictures(2))


def rms(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1).sqrt()


def brightness(images: Tensor) -> Tensor:
    return -images.mean((1, 2, 3))


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("mode", ["x0", "adam"])
def test_at_the_default_strength_r_falls_for_nearly_every_latent(objective: Objective, mode: str, decoder: str) -> None:
    latent = torch.cat([latents(seed) for seed in range(100)])
    decode = DECODERS[decoder]
    nudged = Nudge(mode)(latent, objective, decode)
    lower = objective(decode(nudged.denoised)) < objective(decode(latent))
    assert int(lower.sum()) >= 95
    assert nudged.reason() == ""


def test_x0_is_the_equation_of_the_method(objective: Objective) -> None:
    latent, spread = latents(1, 3).double(), torch.tensor([0.02, 0.3, 0.05], dtype=torch.float64)
    decode, strength = linear("sd1"), 0.15
    variable = latent.clone().requires_grad_()
    (g,) = torch.autograd.grad(objective(decode(variable)).sum(), variable)
    scale = (strength * spread / (rms(g) + 1e-8)).view(3, 1, 1, 1)
    found = Nudge(strength=strength, clamp=1.0)(latent, objective, decode, spread)
    torch.testing.assert_close(found.denoised, latent - scale * g)
    torch.testing.assert_close(found.r, objective(decode(latent)))


def test_without_a_guidance_scale_the_prediction_s_own_size_sets_the_step(objective: Objective) -> None:
    latent = latents(1, 2) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    moved = rms(Nudge(strength=0.2, clamp=1.0)(latent, objective, linear("sd1")).denoised - latent)
    torch.testing.assert_close(moved, 0.2 * WITHOUT_CFG * rms(latent), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("steps", [1, 3])
def test_adam_is_the_library_s_adam_on_the_objective_and_the_pull(objective: Objective, steps: int) -> None:
    d0, decode, spread = latents(2).double(), linear("sd1"), torch.tensor([0.3], dtype=torch.float64)
    d = d0.clone().requires_grad_()
    adam = torch.optim.Adam([d], lr=0.2 * 0.3 / steps)
    for _ in range(steps):
        adam.zero_grad()
        (objective(decode(d)).sum() + 2.0 * (d - d0).square().sum() / d0.square().sum()).backward()
        adam.step()
    found = Nudge("adam", clamp=1.0, steps=steps, pull=2.0)(d0, objective, decode, spread)
    torch.testing.assert_close(found.denoised, d.detach())
    torch.testing.assert_close(found.r, objective(decode(d0)))


@pytest.mark.parametrize("mode", ["x0", "adam"])
@pytest.mark.parametrize("strength", [0.2, 5.0, 1e6])
def test_nothing_moves_further_than_the_clamp(objective: Objective, mode: str, strength: float) -> None:
    latent = latents(3, 2)
    spread = torch.tensor([0.001, 50.0])
    moved = rms(Nudge(mode, strength, clamp=0.07)(latent, objective, linear("sd1"), spread).denoised - latent)
    assert (moved <= 0.07 * rms(latent) * (1 + 1e-5)).all()
    assert moved[1] > 0.069 * rms(latent)[1]


@pytest.mark.parametrize("mode", ["x0", "adam"])
def test_an_item_moves_as_it_would_alone(mode: str) -> None:
    objective = Objective(ToyEncoder(11), ToyEncoder(12), pictures(1), pictures(2), cutouts=2)
    latent, seeds, spread = latents(4, 3), [7, 8, 9], torch.tensor([0.1, 0.4, 0.2])
    together = Nudge(mode)(latent, partial(objective, seeds=seeds, step=5), linear("sd1"), spread)
    for index, seed in enumerate(seeds):
        one = slice(index, index + 1)
        alone = Nudge(mode)(latent[one], partial(objective, seeds=[seed], step=5), linear("sd1"), spread[one])
        torch.testing.assert_close(together.denoised[one], alone.denoised, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.r[one], alone.r)


@pytest.mark.parametrize("mode", ["x0", "adam"])
def test_works_inside_inference_mode_and_autocast(objective: Objective, mode: str) -> None:
    decode = DECODERS["taesd"]
    expected = Nudge(mode)(latents(5, 2), objective, decode, torch.tensor([0.1, 0.2]))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        latent, spread = latents(5, 2).clone(), torch.tensor([0.1, 0.2])
        assert latent.is_inference()
        found = Nudge(mode)(latent, objective, decode, spread)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(found.denoised, expected.denoised, atol=0.0, rtol=0.0)
    assert not found.denoised.requires_grad
    assert not found.r.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_prediction_keeps_its_dtype_and_is_not_changed_in_place(objective: Objective, dtype: torch.dtype) -> None:
    latent = latents(6, 2).to(dtype)
    before = latent.clone()
    found = Nudge()(latent, objective, linear("sd1"))
    assert found.denoised.dtype == dtype
    assert torch.equal(latent, before)
    assert not torch.equal(found.denoised, before)


def test_a_gradient_too_small_for_half_precision_is_not_lost() -> None:
    decode = TaesdDecoder(TinyDecoder().half())
    latent = latents(7, side=32)
    tiny = Nudge()(latent, lambda images: 1e-3 * brightness(images), decode)
    plain = Nudge()(latent, brightness, TaesdDecoder(TinyDecoder()))
    cosine = torch.cosine_similarity((tiny.denoised - latent).flatten(), (plain.denoised - latent).flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("mode", ["x0", "adam"])
def test_an_item_without_a_number_stays_as_it_is_and_the_others_move(mode: str) -> None:
    latent = latents(8, 3)
    alone = Nudge(mode)(latent, brightness, linear("sd1"))
    found = Nudge(mode)(latent, lambda images: brightness(images) * torch.tensor([1.0, math.nan, 1.0]), linear("sd1"))
    assert torch.equal(found.denoised[1], latent[1])
    torch.testing.assert_close(found.denoised[::2], alone.denoised[::2])
    assert found.failed.tolist() == [False, True, False]
    assert found.reason() == "the objective or its gradient is not a number (picture 2 of the batch)"


def test_a_number_with_a_gradient_that_is_none_fails_too() -> None:
    latent = latents(8)
    found = Nudge()(latent, lambda images: ((images - images).sum((1, 2, 3))).sqrt(), linear("sd1"))
    assert torch.equal(found.denoised, latent)
    assert found.failed.tolist() == [True]


def test_a_broken_prediction_is_given_back_as_it_came() -> None:
    latent = latents(8, 2)
    latent[0, 0, 0, 0] = math.inf
    found = Nudge()(latent, brightness, linear("sd1"))
    assert torch.equal(found.denoised[0], latent[0])
    assert found.failed.tolist() == [True, False]


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "mps", "cpu", "python"],
)
def test_out_of_memory_gives_the_same_prediction_and_a_reason(error: Exception) -> None:
    def short(_: Tensor) -> Tensor:
        raise error

    latent = latents(9, 2)
    found = Nudge()(latent, short, linear("sd1"))
    assert found.denoised is latent
    assert found.reason() == "not enough memory for it"
    assert found.r.isnan().all()
    assert found.failed.tolist() == [False, False]


def test_another_error_is_not_swallowed() -> None:
    def wrong(_: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Nudge()(latents(9), wrong, linear("sd1"))


@pytest.mark.parametrize(
    "blind", [lambda latent: latent[:, :3].detach(), lambda latent: torch.zeros(1, 3, 4, 4, requires_grad=True)]
)
def test_a_decoder_without_a_gradient_gives_the_same_prediction_and_a_reason(
    blind: Callable[[Tensor], Tensor],
) -> None:
    latent = latents(9)
    found = Nudge()(latent, brightness, blind)
    assert found.denoised is latent
    assert found.reason() == "no gradient comes through the decoder or the encoders"


def test_the_window_and_every_k_th_step() -> None:
    nudge = Nudge(start=0.25, stop=0.75, every=2)
    assert [step for step in range(11) if nudge.wants(step, step / 10)] == [4, 6]
    assert [step for step in range(11) if Nudge().wants(step, step / 10)] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert not Nudge(strength=0.0).wants(5, 0.5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "xy"}, "mode 'xy'; there are: x0, adam, xt"),
        ({"strength": -0.1}, "strength must be 0 or more, not -0.1"),
        ({"clamp": math.nan}, "clamp must be 0 or more, not nan"),
        ({"every": 0}, "every must be 1 or more, not 0"),
        ({"start": 0.8, "stop": 0.7}, "start 0.8 to stop 0.7; wanted is 0 <= start <= stop <= 1"),
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Nudge(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["x0", "adam"])
def test_nothing_waits_for_the_device(mode: str) -> None:
    latent, decode = latents(10, 2).cuda(), linear("sd1")
    run = partial(Nudge(mode), latent, brightness, decode, latent.new_tensor([0.1, 0.2]))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.reason() == ""
