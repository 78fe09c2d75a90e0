"""What a picture is judged by: cosines of embeddings, weighed, per picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from toy_encoders import ToyEncoder, pictures

from lib_dynfuse.guidance.objectives import TERMS, Each, Objective, Weights

SUBJECT, STYLE = pictures(1), pictures(2)
ALL = Weights(1.0, 0.5, 2.0, 0.25, 0.125)


def clip() -> ToyEncoder:
    return ToyEncoder(11)


def dino() -> ToyEncoder:
    return ToyEncoder(12)


def full(weights: Weights | None = None, cutouts: int = 0) -> Objective:
    return Objective(clip(), dino(), SUBJECT, STYLE, ["a fox"], weights, cutouts)


def cosine(encoder: ToyEncoder, images: Tensor, reference: Tensor) -> Tensor:
    return torch.cosine_similarity(encoder.image(images), encoder.image(reference), dim=-1)


def test_the_default_is_the_paper_s_three_terms_alike() -> None:
    images = pictures(3, 2)
    expected = cosine(clip(), images, SUBJECT) + cosine(clip(), images, STYLE) + cosine(dino(), images, STYLE)
    assert full().terms == ("clip_subject", "clip_style", "dino_style")
    torch.testing.assert_close(full()(images), -expected)


def test_each_term_counts_by_its_weight() -> None:
    images = pictures(3, 2)
    scores = full().scores(images)
    expected = sum(getattr(ALL, term) * scores[term] for term in TERMS)
    torch.testing.assert_close(full(ALL)(images), -expected)


def test_the_references_themselves_score_one() -> None:
    scores = full().scores(SUBJECT)
    torch.testing.assert_close(scores["clip_subject"], torch.ones(1))
    torch.testing.assert_close(scores["dino_subject"], torch.ones(1))
    assert scores["clip_style"] < 0.999


def test_scores_name_every_term_there_is_whatever_its_weight_and_r() -> None:
    images = pictures(4, 3)
    objective = full()
    scores = objective.scores(images)
    assert set(scores) == {*TERMS, "R"}
    torch.testing.assert_close(scores["R"], objective(images))
    assert all(score.shape == (3,) and not score.requires_grad for score in scores.values())


def test_several_references_are_averaged_as_embeddings_whatever_their_sizes() -> None:
    images, small = pictures(3), pictures(5, height=20, width=20)
    mean = functional.normalize((clip().image(SUBJECT) + clip().image(small)) / 2, dim=-1)
    found = Objective(clip(), subject=[SUBJECT, small])(images)
    torch.testing.assert_close(found, -(clip().image(images) * mean).sum(-1))


def test_a_term_without_encoder_or_reference_is_left_out() -> None:
    assert Objective(clip(), None, SUBJECT, STYLE, weights=ALL).terms == ("clip_subject", "clip_style")
    assert Objective(None, dino(), None, STYLE, weights=ALL).terms == ("dino_style",)
    assert set(Objective(clip(), None, SUBJECT).scores(pictures(3))) == {"clip_subject", "R"}


def test_nothing_to_compare_with_is_an_error() -> None:
    for arguments in ({}, {"clip": clip()}, {"subject": SUBJECT}, {"dino": dino(), "text": ["a fox"]}):
        with pytest.raises(ValueError, match="every encoder or every reference is missing"):
            Objective(**arguments)


def test_scores_need_no_weight_but_r_does() -> None:
    objective = Objective(clip(), text=["a fox"])
    assert set(objective.scores(pictures(3))) == {"clip_text"}
    with pytest.raises(ValueError, match="no term counts; a weight is wanted for one of: clip_text"):
        objective(pictures(3))


def test_each_picture_has_its_own_prompt() -> None:
    images = pictures(3, 2)
    both = Objective(clip(), text=["a fox", "a jug"]).scores(images)["clip_text"]
    for index, prompt in enumerate(["a fox", "a jug"]):
        alone = Objective(clip(), text=clip().text([prompt])).scores(images[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone["clip_text"])


@pytest.mark.parametrize("cutouts", [0, 2])
def test_the_gradient_is_exact(cutouts: int) -> None:
    images = pictures(6, 2, height=5, width=6).double().requires_grad_()
    objective = full(ALL, cutouts)
    assert torch.autograd.gradcheck(lambda x: objective(x, seeds=[3, 4], step=1), images)


@pytest.mark.parametrize("cutouts", [0, 3])
def test_a_picture_is_judged_alike_whatever_else_is_in_the_batch(cutouts: int) -> None:
    images, seeds, objective = pictures(7, 3), [5, 6, 7], full(ALL, cutouts)
    together = objective(images, seeds, step=4)
    for index, seed in enumerate(seeds):
        torch.testing.assert_close(together[index : index + 1], objective(images[index : index + 1], [seed], step=4))


def test_cutouts_are_for_clip_alone_and_lie_where_the_seed_and_the_step_say() -> None:
    objective, images = full(replace(ALL, clip_subject=0.0), cutouts=4), pictures(8)
    first = objective(images, [1], 0)
    torch.testing.assert_close(objective(images, [1], 0), first, atol=0.0, rtol=0.0)
    assert not torch.equal(objective(images, [2], 0), first)
    assert not torch.equal(objective(images, [1], 1), first)
    without_clip = Weights(0.0, 0.0, 1.0, 1.0, 0.0)
    torch.testing.assert_close(full(without_clip, cutouts=4)(images), full(without_clip)(images))


def test_cutouts_are_squares_from_half_of_the_shorter_side_to_all_of_it() -> None:
    encoder = clip()
    objective = Objective(encoder, subject=SUBJECT, cutouts=4)
    encoder.seen.clear()
    objective(pictures(8, 2), [1, 2])
    assert encoder.seen == [(2, 3, side, side) for side in (14, 16, 20, 22)]


def test_cutouts_without_each_picture_s_seed_are_an_error() -> None:
    for seeds in (None, [1]):
        with pytest.raises(ValueError, match="cutouts need the seed of each of 2 pictures"):
            full(cutouts=1)(pictures(3, 2), seeds)
    with pytest.raises(ValueError, match="cutouts must be 0 or more"):
        full(cutouts=-1)


def test_references_that_were_read_in_inference_mode_can_be_steered_by() -> None:
    with torch.inference_mode():
        objective = Objective(clip(), dino(), SUBJECT.clone(), STYLE.clone(), clip().text(["a fox"]), ALL)
    images = pictures(3).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(images).sum(), images)
    assert gradient.abs().sum() > 0


def test_a_part_is_the_same_for_those_pictures_and_can_be_taken_inside_inference_mode() -> None:
    subjects = Each([pictures(seed) for seed in range(4)])
    whole = Objective(ToyEncoder(1), ToyEncoder(2), subjects, pictures(9), text=[f"picture {n}" for n in range(4)])
    images = pictures(20, count=4)
    with torch.inference_mode():
        part = whole.part([3, 1])
    torch.testing.assert_close(part(images[[3, 1]]), whole(images)[[3, 1]])
    leaf = images[[3, 1]].requires_grad_()
    (g,) = torch.autograd.grad(part(leaf).sum(), leaf)
    assert g.abs().sum() > 0
