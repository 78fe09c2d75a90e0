"""What is in the box: small enough, loadable, and measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import normalize

from lib_dynfuse.demo import data, encoders, judge, loras, model, recognise, split
from lib_dynfuse.guidance.encoders import Encoder, load_clip, load_dino
from lib_dynfuse.guidance.sources import Source

BOX = Path(model.__file__).parent
BOXED = Source(BOX)
EXPECTED_LORAS = {
    *(f"subject-{loras.file_name(name)}" for name in split.HELD_SUBJECTS),
    *(f"style-{loras.file_name(split.STYLE_WORDS[style])}" for style in split.HELD_STYLES),
}


def weight(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def record() -> dict:
    return json.loads((BOX / "record.json").read_text())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(model.BOX, local_files_only=True, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def picture(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipeline(prompt, num_inference_steps=8, guidance_scale=3.0, generator=generator, output_type="pt").images


def test_the_model_is_at_most_25_megabytes() -> None:
    assert weight(model.BOX) <= 25_000_000


def test_the_judge_is_at_most_2_7_megabytes() -> None:
    assert weight(judge.BOX) <= 2_700_000


def test_the_model_is_fp16_and_finite() -> None:
    for file in model.BOX.glob("*/*.safetensors"):
        for name, value in load_file(file).items():
            assert value.dtype == torch.float16, name
            assert value.isfinite().all(), name


def test_hosts_find_32_groups_and_a_final_bias(pipeline: StableDiffusionPipeline) -> None:
    norms = [m for part in (pipeline.unet, pipeline.vae) for m in part.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32}
    biases = [v for k, v in pipeline.text_encoder.state_dict().items() if k.endswith("final_layer_norm.bias")]
    assert biases[0].abs().max() > 0


def test_words_of_no_caption_are_zero_and_words_of_captions_are_not(pipeline: StableDiffusionPipeline) -> None:
    table = pipeline.text_encoder.get_input_embeddings().weight
    for name in (*split.BASE_SUBJECTS, *split.HELD_SUBJECTS):
        assert table[pipeline.tokenizer(name)["input_ids"]].abs().sum(1).min() > 0
    assert table[pipeline.tokenizer("zeppelin")["input_ids"][1:-1]].abs().sum() == 0


def test_a_base_caption_makes_that_picture(pipeline: StableDiffusionPipeline) -> None:
    loaded = judge.Judge.load()
    prompts = [split.caption(name, "3d") for name in ("sunflower", "pizza", "bicycle")]
    subject, style = loaded(torch.cat([picture(pipeline, prompt) for prompt in prompts]))
    assert [loaded.subjects[k] for k in subject] == ["sunflower", "pizza", "bicycle"]
    assert [loaded.styles[k] for k in style] == ["fluent"] * 3


def test_every_held_out_subject_and_style_has_its_lora() -> None:
    assert {file.stem for file in loras.BOX.glob("*.safetensors")} == EXPECTED_LORAS


@pytest.mark.parametrize("name", sorted(EXPECTED_LORAS))
def test_a_lora_is_finite_says_its_words_and_has_every_layer(name: str) -> None:
    file = loras.BOX / f"{name}.safetensors"
    tensors = load_file(file)
    assert all(value.isfinite().all() for value in tensors.values())
    assert any(value.abs().max() > 0 for key, value in tensors.items() if key.endswith("lora_up.weight"))
    ends = {".".join(key.split(".")[1:]) for key in tensors}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}
    with safe_open(file, "pt") as opened:
        words = opened.metadata()["modelspec.trigger_phrase"]
    assert words.replace(" ", "-").startswith(name.split("-", 1)[1])


def test_diffusers_loads_a_boxed_lora_whole(pipeline: StableDiffusionPipeline) -> None:
    plain = picture(pipeline, "fox emoji, flat style")
    pipeline.load_lora_weights(loras.BOX, weight_name="subject-fox.safetensors")
    layers = {name for name, _ in pipeline.unet.named_modules() if name.endswith("lora_A.default_0")}
    keys = load_file(loras.BOX / "subject-fox.safetensors")
    assert len(layers) == len(keys) // 3
    taught = picture(pipeline, "fox emoji, flat style")
    pipeline.unload_lora_weights()
    loaded = judge.Judge.load()
    assert loaded.subjects[loaded(taught)[0]] == "fox"
    assert loaded.subjects[loaded(plain)[0]] != "fox"


def test_the_true_pictures_are_in_the_box_and_the_judge_knows_them() -> None:
    pictures = data.load(BOX / "pictures.npz", 64)
    assert len(pictures) == 24 * 6
    truths = np.flatnonzero(pictures.truth)
    assert len(truths) == 48
    found = judge.accuracy(judge.Judge.load(), pictures, truths)
    assert min(found.values()) >= 0.9


def test_the_other_subjects_true_pictures_are_in_the_box_and_a_judge_knows_them() -> None:
    pictures = data.load(BOX / "fresh.npz", 64)
    assert {pictures.names[k] for k in pictures.subject} == set(split.MORE_SUBJECTS)
    assert {pictures.styles[k] for k in pictures.style} == set(split.HELD_STYLES)
    everyone = judge.Judge.load(fresh=True)
    assert min(judge.accuracy(everyone, pictures, np.arange(96)).values()) >= 0.9
    assert judge.accuracy(everyone, data.load(BOX / "pictures.npz", 64), np.arange(24 * 6))["subject"] >= 0.9
    assert everyone.subjects[: -len(split.MORE_SUBJECTS)] == judge.Judge.load().subjects


def features(encoder: Encoder) -> tuple[torch.Tensor, data.Pictures]:
    """What guidance sees of the boxed pictures."""
    pictures = data.load(BOX / "pictures.npz", 64)
    return recognise.looked_at(encoder, pictures), pictures


def share_told_by_other_drawings(seen: torch.Tensor, pictures: data.Pictures) -> float:
    """Of the truth pictures, those nearest to the mean of their own subject's pictures in other styles, of 24."""
    truths = np.flatnonzero(pictures.truth)
    own = [seen[pictures.where((name,), split.SUBJECT_STYLES)].mean(0) for name in pictures.names]
    found = (seen[truths] @ normalize(torch.stack(own), dim=1).T).argmax(1).numpy()
    return float((found == pictures.subject[truths]).mean())


def test_clip_and_dino_are_at_most_6_megabytes_together() -> None:
    assert weight(encoders.CLIP_BOX) + weight(encoders.DINO_BOX) <= 6_000_000


def test_clip_and_dino_are_fp16_and_finite() -> None:
    files = [*encoders.CLIP_BOX.glob("*.safetensors"), *encoders.DINO_BOX.glob("*.safetensors")]
    assert len(files) == 2
    for file in files:
        for name, value in load_file(file).items():
            assert value.dtype == torch.float16, name
            assert value.isfinite().all(), name


def test_dino_tells_the_subject_of_a_picture_that_it_never_saw_in_that_style() -> None:
    assert share_told_by_other_drawings(*features(load_dino("dino", BOXED))) >= 0.6


def test_clip_tells_that_subject_and_style() -> None:
    clip = load_clip("clip", BOXED)
    seen, pictures = features(clip)
    assert share_told_by_other_drawings(seen, pictures) >= 0.4
    truths, styles = pictures.truth, [split.JUDGED_AS[style] for style in pictures.styles]
    words = clip.text([f"{split.STYLE_WORDS[style]} style" for style in pictures.styles])
    found = (seen @ words.T).argmax(1).tolist()
    right = np.array([styles[k] == styles[own] for k, own in zip(found, pictures.style, strict=True)])
    assert right[truths].mean() >= 0.6
    assert right[~truths].mean() >= 0.6


def test_a_step_along_the_gradient_brings_a_picture_nearer_to_its_reference() -> None:
    for encoder in (
        load_clip("clip", BOXED),
        load_dino("dino", BOXED),
    ):
        seen, pictures = features(encoder)
        fox = pictures.where(("fox",), ("flat",))
        images = (pictures.images[pictures.where(split.HELD_SUBJECTS, ("hc",))].float() / 255).requires_grad_()
        before = encoder.image(images) @ seen[fox].T
        (gradient,) = torch.autograd.grad(before.sum(), images)
        assert gradient.isfinite().all()
        step = 0.01 * gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        after = encoder.image(images.detach() + step) @ seen[fox].T
        assert (after > before).all()


def test_the_record_has_every_stage_and_its_seconds() -> None:
    stages = record()["stages"]
    assert {
        "decoder",
        "encoder",
        "together",
        "text",
        "unet",
        "judge-subject",
        "judge-style",
        "clip",
        "dino",
        *EXPECTED_LORAS,
    } == stages.keys()
    assert all(stage["seconds"] > 0 and stage["losses"] for stage in stages.values())
