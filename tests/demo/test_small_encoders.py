"""The small CLIP and the small DINO: what they learn from, and how they are kept."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import ViTModel

from lib_dynfuse.demo import data, encoders, judge, loop, recognise
from lib_dynfuse.guidance.encoders import load_clip, load_dino
from lib_dynfuse.guidance.sources import Source

open_clip = encoders.import_open_clip()
FILES = ("clip/open_clip_model.safetensors", "dino/model.safetensors")


@pytest.fixture(scope="module")
def pictures(picture_file: Path) -> data.Pictures:
    return data.load(picture_file, 16)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_neither_truth_nor_what_the_judges_never_saw_is_learnt(pictures: data.Pictures) -> None:
    known = encoders.taught(pictures)
    assert not pictures.truth[known].any()
    assert not judge.held_out(pictures)[known].any()
    asked = recognise.unseen(pictures)
    assert (pictures.truth | judge.held_out(pictures))[asked].all()
    assert len(known) + len(asked) == len(pictures)


def test_a_batch_shows_each_of_its_subjects_in_several_styles(pictures: data.Pictures) -> None:
    drawn = encoders.Lessons(pictures).draw(60, 0.3, generator())
    assert len(drawn.subjects) == len(set(drawn.subjects.tolist())) > 10
    assert torch.equal(drawn.subjects[drawn.place], drawn.subject)
    for subject in drawn.subjects:
        styles = drawn.style[drawn.subject == subject].tolist()
        assert len(styles) == len(set(styles)) == encoders.CHOSEN_STYLES


def test_a_batch_holds_only_pictures_that_are_taught(pictures: data.Pictures) -> None:
    lessons = encoders.Lessons(pictures)
    known = {(int(pictures.subject[k]), int(pictures.style[k])): int(k) for k in encoders.taught(pictures)}
    for seed in range(5):
        drawn = lessons.draw(60, 0.0, torch.Generator().manual_seed(seed))
        index = [known[pair] for pair in zip(drawn.subject.tolist(), drawn.style.tolist(), strict=True)]
        assert torch.equal(drawn.images, encoders.sized(pictures.floats(np.array(index))))


def test_a_line_drawing_has_no_colour(pictures: data.Pictures) -> None:
    drawn = encoders.Lessons(pictures).draw(60, 0.5, generator())
    grey = (drawn.images - drawn.images[:, :1]).abs().amax((1, 2, 3)) < 1e-5
    assert torch.equal(grey, drawn.redrawn)
    assert 0 < grey.sum() < len(grey)


def test_paper_stays_paper_however_it_is_shifted() -> None:
    assert torch.allclose(encoders.shifted(torch.ones(3, 3, 32, 32), generator()), torch.ones(()))


def test_shifting_moves_every_picture_in_its_own_way() -> None:
    image = torch.zeros(1, 3, 32, 32).expand(4, -1, -1, -1)
    moved = encoders.shifted(image, generator())
    assert moved.shape == image.shape
    assert all((one - other).abs().max() > 0.1 for one, other in combinations(moved, 2))


def test_the_first_layer_sees_patches_as_evenly_spread_about_zero() -> None:
    torch.manual_seed(0)
    images = torch.randn(400, 3, 8, 8)
    images = torch.nn.functional.interpolate(images, (encoders.PIXELS, encoders.PIXELS)) + 3
    weight, bias = encoders.telling_patches(images, 48)
    found = torch.nn.functional.conv2d(images, weight, bias, stride=encoders.PATCH).permute(1, 0, 2, 3).flatten(1)
    assert found.mean(1).abs().max() < 1e-3
    strength = torch.linalg.eigvalsh(found @ found.T / found.shape[1])
    assert strength.max() <= 0.25 + 1e-4
    assert strength.min() > 0.2


def test_contrast_is_that_of_the_paper() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [1.0, 9.0, 0.5, 0.0], [2.0, 0.5, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    kind = torch.tensor([4, 4, 4, 7])
    told = []
    for row in range(3):
        others = [k for k in range(4) if k != row]
        told += [others_log(logits[row], others) - logits[row, k] for k in others if kind[k] == 4]
    assert torch.allclose(encoders.contrast(logits, kind), torch.stack(told).mean(), atol=1e-6)


def others_log(row: torch.Tensor, others: list[int]) -> torch.Tensor:
    return row[others].exp().sum().log()


def test_contrast_without_a_pair_is_nothing() -> None:
    assert encoders.contrast(torch.ones(3, 3), torch.arange(3)) == 0


def test_buffers_go_on_with_an_interrupted_run(tmp_path: Path) -> None:
    class Counting(torch.nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("count", torch.zeros(()))

    def run(stop_before: int | None) -> Counting:
        model = Counting()

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stop_before:
                raise KeyboardInterrupt
            model.count += 1
            return (model.weight - 1).square().sum()

        loop.train(tmp_path / "run.pt", model, loss, loop.Schedule(50, 1e-2), every_seconds=0, bar=False)
        return model

    with pytest.raises(KeyboardInterrupt):
        run(stop_before=47)
    assert run(stop_before=None).count == 50


def test_words_of_no_caption_are_zero() -> None:
    model = open_clip.CLIP(**encoders.CLIP)
    encoders.forget_unused_words(model, torch.tensor([[3, 5], [3, 9]]))
    assert model.token_embedding.weight.abs().sum(1).nonzero()[:, 0].tolist() == [3, 5, 9]


def test_the_nearest_in_another_style_and_of_another_subject_are_counted(pictures: data.Pictures) -> None:
    by_subject = torch.nn.functional.one_hot(torch.from_numpy(pictures.subject)).float()
    by_style = torch.nn.functional.one_hot(torch.from_numpy(recognise.drawn_alike(pictures))).float()
    both = normalize(torch.cat([by_subject, by_style], 1), dim=1)
    assert set(recognise.neighbours(both, pictures).values()) == {1.0}
    assert recognise.neighbours(by_subject, pictures)["subject of the nearest in another style"] == 1.0
    assert recognise.neighbours(by_style, pictures)["subject of the nearest in another style"] < 0.1


def test_the_references_of_subject_and_style_are_counted(pictures: data.Pictures) -> None:
    by_subject = torch.nn.functional.one_hot(torch.from_numpy(pictures.subject)).float()
    by_style = torch.nn.functional.one_hot(torch.from_numpy(recognise.drawn_alike(pictures))).float()
    both = normalize(torch.cat([by_subject, by_style], 1), dim=1)
    assert recognise.by_references(both, pictures) == {
        "subject of 48 truth pictures by references of 24": 1.0,
        "style of 48 truth pictures by references of 4": 1.0,
    }
    assert (
        recognise.by_references(normalize(by_style, dim=1), pictures)[
            "subject of 48 truth pictures by references of 24"
        ]
        < 0.1
    )


def check_loads(folder: Path) -> None:
    """open_clip and transformers load what the folder holds, in fp16 on disk, without a parameter new or left over."""
    tensors = [load_file(folder / file) for file in FILES]
    for state in tensors:
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    clip = open_clip.create_model(f"local-dir:{folder / 'clip'}")
    found = clip.state_dict()
    assert found.keys() == tensors[0].keys()
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in tensors[0].items())
    vit, told = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert vit.config.image_size == encoders.PIXELS


def test_what_training_leaves_loads_by_the_libraries_own_means(trained: Path) -> None:
    check_loads(trained)


def test_the_folders_say_the_preprocessing_that_training_used(trained: Path) -> None:
    image = torch.rand(1, 3, 32, 32, generator=generator())
    clip = json.loads((trained / "clip" / "open_clip_config.json").read_text())["preprocess_cfg"]
    dino = json.loads((trained / "dino" / "preprocessor_config.json").read_text())
    assert dino["size"] == {"height": 32, "width": 32}
    for mean, std, given in (
        (clip["mean"], clip["std"], (encoders.CLIP_MEAN, encoders.CLIP_STD)),
        (dino["image_mean"], dino["image_std"], (encoders.DINO_MEAN, encoders.DINO_STD)),
    ):
        expected = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.allclose(encoders.prepared(image * 2 - 1, *given), expected, atol=1e-6)


def test_both_together_are_at_most_6_megabytes(trained: Path) -> None:
    files = [file for name in ("clip", "dino") for file in (trained / name).iterdir()]
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= 6_000_000


@torch.no_grad()
def test_guidance_sees_through_them_what_training_saw(trained: Path) -> None:
    images = torch.rand(4, 3, 64, 64, generator=generator())
    small = encoders.sized(images * 2 - 1)
    clip = load_clip("clip", Source(trained))
    model: Any = open_clip.create_model(f"local-dir:{trained / 'clip'}").float().eval()
    expected = model.encode_image(encoders.prepared(small, encoders.CLIP_MEAN, encoders.CLIP_STD), True)
    assert torch.allclose(clip.image(images), expected, atol=1e-3)
    tokens = open_clip.SimpleTokenizer(context_length=16)(["fox emoji", "flat style"])
    assert torch.allclose(clip.text(["fox emoji", "flat style"]), model.encode_text(tokens, True), atol=1e-4)
    dino = load_dino("dino", Source(trained))
    vit = ViTModel.from_pretrained(trained / "dino", add_pooling_layer=False, dtype=torch.float32).eval()
    found = vit(encoders.prepared(small, encoders.DINO_MEAN, encoders.DINO_STD)).last_hidden_state[:, 0]
    assert torch.allclose(dino.image(images), normalize(found, dim=1), atol=1e-3)
