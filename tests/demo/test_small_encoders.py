"""The small CLIP and the small DINO: what they learn from, and how they are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import ViTModel

from lib_dynfuse.demo import data, encoders, judge, loop, recognise
from lib_dynfuse.guidance.encoders import load_clip, load_dino

open_clip = encoders.import_open_clip()
FILES = ("clip/open_clip_model.safetensors", "dino/model.safetensors")


@pytest.fixture(scope="module")
def pictures(picture_file: Path) -> data.Pictures:
    return data.load(picture_file, 16)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def letters(texts: list[str]) -> torch.Tensor:
    """A tokenizer whose only token is the text's place in the list."""
    return torch.arange(len(texts))[:, None]


def test_neither_truth_nor_what_the_judges_never_saw_is_learnt(pictures: data.Pictures) -> None:
    known = encoders.taught(pictures)
    assert not pictures.truth[known].any()
    assert not judge.held_out(pictures)[known].any()
    asked = recognise.unseen(pictures)
    assert (pictures.truth | judge.held_out(pictures))[asked].all()
    assert len(known) + len(asked) == len(pictures)


def test_a_caption_fits_every_picture_that_it_describes(pictures: data.Pictures) -> None:
    captions = encoders.Captions(pictures, letters)
    subject, style = torch.arange(300) % 5, torch.arange(300) % 3
    rows, fits, unsaid = captions.draw(subject, style, torch.zeros(300, dtype=torch.bool), generator())
    assert not unsaid.any()
    subjects, styles = len(pictures.names), len(pictures.styles)
    kinds = set()
    for column, row in enumerate(rows[:, 0].tolist()):
        if row < subjects:
            kinds.add("subject")
            expected = subject == row
        elif row < subjects + styles:
            kinds.add("style")
            expected = style == row - subjects
        else:
            kinds.add("both")
            number, look = divmod(row - subjects - styles, styles)
            expected = (subject == number) & (style == look)
        assert torch.equal(fits[:, column], expected)
        assert fits[column, column]
    assert kinds == {"subject", "style", "both"}


def test_a_picture_redrawn_is_of_no_style(pictures: data.Pictures) -> None:
    captions = encoders.Captions(pictures, letters)
    subject, style, redrawn = torch.arange(300) % 5, torch.arange(300) % 3, torch.arange(300) % 4 == 0
    rows, fits, unsaid = captions.draw(subject, style, redrawn, generator())
    names_style = rows[:, 0] >= len(pictures.names)
    assert not names_style[redrawn].any()
    assert not fits[redrawn][:, names_style].any()
    assert unsaid[redrawn][:, names_style].any()
    assert not unsaid[~redrawn].any()
    assert not (fits & unsaid).any()
    assert fits.diagonal().all()


def test_a_view_is_as_large_as_asked_and_stays_in_range() -> None:
    images = 2 * torch.rand(4, 3, 64, 64, generator=generator()) - 1
    for pixels in (encoders.PIXELS, encoders.LOCAL):
        cut = encoders.view(images, pixels, 0.4, 0.6, generator())
        assert cut.shape == (4, 3, pixels, pixels)
        assert cut.abs().max() <= 1


def test_a_view_of_paper_is_paper() -> None:
    cut = encoders.view(torch.ones(2, 3, 64, 64), 32, 0.4, 0.6, generator())
    assert cut.mean() > 0.9  # but for the noise


@torch.no_grad()
def test_the_slow_average_follows_and_is_kept_with_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = encoders.Distilled()
    images = torch.rand(2, 3, 64, 64)
    before = model(images)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    assert torch.allclose(model.taught_by_average(images, momentum=1.0), before, atol=1e-6)
    assert torch.allclose(model.taught_by_average(images, momentum=0.0), model(images), atol=1e-6)
    assert not torch.allclose(model(images), before, atol=1e-3)


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


def test_batch_norms_are_measured_on_the_final_weights(pictures: data.Pictures) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**encoders.CLIP).eval()
    known = encoders.taught(pictures)[:32]
    seen: list[torch.Tensor] = []
    model.visual.bn1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encoders.settle(model, pictures, known, torch.device("cpu"))
    assert torch.allclose(model.visual.bn1.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert not any(part.training for part in model.modules())


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
    check_loads(trained / "encoders")


def test_the_folders_say_the_preprocessing_that_training_used(trained: Path) -> None:
    image = torch.rand(1, 3, 64, 64, generator=generator())
    clip = json.loads((trained / "encoders" / "clip" / "open_clip_config.json").read_text())["preprocess_cfg"]
    dino = json.loads((trained / "encoders" / "dino" / "preprocessor_config.json").read_text())
    assert dino["size"] == {"height": 64, "width": 64}
    for mean, std, given in (
        (clip["mean"], clip["std"], (encoders.CLIP_MEAN, encoders.CLIP_STD)),
        (dino["image_mean"], dino["image_std"], (encoders.DINO_MEAN, encoders.DINO_STD)),
    ):
        expected = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.allclose(encoders.prepared(image * 2 - 1, *given), expected, atol=1e-6)


def test_both_together_are_at_most_6_megabytes(trained: Path) -> None:
    assert sum(file.stat().st_size for file in (trained / "encoders").rglob("*") if file.is_file()) <= 6_000_000


@torch.no_grad()
def test_guidance_sees_through_them_what_the_libraries_see(trained: Path) -> None:
    cpu, folder = torch.device("cpu"), trained / "encoders"
    images = torch.rand(4, 3, 64, 64, generator=generator())
    clip = load_clip(str(folder / "clip"), None, cpu)
    model: Any = open_clip.create_model(f"local-dir:{folder / 'clip'}").float().eval()
    expected = model.encode_image(encoders.prepared(images * 2 - 1, encoders.CLIP_MEAN, encoders.CLIP_STD), True)
    assert torch.allclose(clip.image(images), expected, atol=1e-4)
    tokens = open_clip.SimpleTokenizer()(["fox emoji", "flat style"])
    assert torch.allclose(clip.text(["fox emoji", "flat style"]), model.encode_text(tokens, True), atol=1e-4)
    dino = load_dino(str(folder / "dino"), None, cpu)
    vit = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False, dtype=torch.float32).eval()
    found = vit(encoders.prepared(images * 2 - 1, encoders.DINO_MEAN, encoders.DINO_STD)).last_hidden_state[:, 0]
    assert torch.allclose(dino.image(images), normalize(found, dim=1), atol=1e-4)
