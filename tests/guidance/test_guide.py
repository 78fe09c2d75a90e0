"""The nudges of one batch: each step at most once, what they did read back at the end, and every reason said once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy_encoders import ToyEncoder, latents, pictures

from lib_dynfuse.guidance.decoders import linear
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.nudge import Nudge
from lib_dynfuse.guidance.objectives import Each, Objective

DECODE = linear("sd1")
SEEDS = [3, 4, 5]


def objective(cutouts: int = 0) -> Objective:
    subjects = Each([pictures(seed) for seed in SEEDS])
    return Objective(ToyEncoder(11), ToyEncoder(12), subjects, pictures(2), cutouts=cutouts)


def guide(mode: str = "x0", cutouts: int = 0, **settings: float) -> Guide:
    return Guide(Nudge(mode, **settings), objective(cutouts), DECODE, SEEDS)  # type: ignore[arg-type]


def test_the_window_is_of_a_sampling_s_steps_and_a_single_step_is_its_first() -> None:
    one = guide(start=0.25, stop=0.75)
    assert [place for place in range(11) if one.wants(100 + place, place, 11)] == [3, 4, 5, 6, 7]
    assert guide(start=0.0, stop=0.0).wants(0, 0, 1)
    assert not one.wants(0, 0, 1)


def test_a_step_that_was_nudged_is_not_wanted_again_but_the_same_place_of_a_later_sampling_is() -> None:
    one = guide()
    assert one.wants(5, 5, 11)
    one.at(5, latents(1, 3))
    assert not one.wants(5, 5, 11)
    assert one.wants(16, 5, 11)


@pytest.mark.parametrize("mode", ["x0", "adam"])
def test_it_is_the_nudge_with_every_picture_s_own_references_and_cutouts(mode: str) -> None:
    latent, spread = latents(1, 3), torch.tensor([0.1, 0.2, 0.3])
    found = guide(mode, cutouts=2).at(7, latent, spread)
    for index, seed in enumerate(SEEDS):
        own = Objective(ToyEncoder(11), ToyEncoder(12), pictures(seed), pictures(2), cutouts=2)
        alone = Guide(Nudge(mode), own, DECODE, [seed]).at(7, latent[index : index + 1], spread[index : index + 1])
        torch.testing.assert_close(found[index : index + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, guide(mode, cutouts=2).at(8, latent, spread), atol=1e-5)


def test_the_curve_is_r_before_each_nudge_by_step() -> None:
    one, first, second = guide(), latents(1, 3), latents(2, 3)
    one.at(4, first)
    one.at(9, second)
    found = one.curve()
    assert list(found) == [4, 9]
    assert found[4] == pytest.approx(objective()(DECODE(first)).tolist(), rel=1e-5, abs=1e-6)
    assert found[9] == pytest.approx(objective()(DECODE(second)).tolist(), rel=1e-5, abs=1e-6)


def test_before_anything_was_nudged_there_is_neither_curve_nor_reason() -> None:
    assert guide().curve() == {}
    assert guide().reasons() == []


def test_out_of_memory_leaves_the_prediction_and_is_said_once() -> None:
    def short(latent: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    one = Guide(Nudge(), objective(), short, SEEDS)
    latent = latents(1, 3)
    assert torch.equal(one.at(4, latent), latent)
    assert torch.equal(one.at(5, latent), latent)
    assert one.reasons() == ["at least one nudge was left out: not enough memory for it"]
    assert all(math.isnan(value) for row in one.curve().values() for value in row)


def test_a_picture_without_a_number_stays_and_is_named() -> None:
    latent = latents(1, 3)
    latent[1] = math.nan
    found = (one := guide()).at(4, latent)
    assert found[1].isnan().all()
    assert not torch.equal(found[0], latent[0])
    (reason,) = one.reasons()
    assert "picture 2 of the batch" in reason
    assert [math.isnan(value) for value in one.curve()[4]] == [False, True, False]


def test_scores_are_the_objective_s() -> None:
    images = pictures(9, 3)
    found, expected = guide().scores(images), objective().scores(images)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_only_the_mode_xt_asks_for_the_unet_s_input() -> None:
    assert [guide(mode).through_unet for mode in ("x0", "adam", "xt")] == [False, False, True]
    with pytest.raises(ValueError, match="through_unet"):
        guide("xt").at(4, latents(1, 3))
