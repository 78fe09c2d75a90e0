"""The whole training on a tiny preset and random pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lib_dynfuse.demo import fresh, judge, loras, model, split, train


def test_the_box_loads_and_its_loras_change_the_picture(trained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("fox emoji", num_inference_steps=1, generator=generator, output_type="pt").images

    plain = picture()
    assert plain.shape == (1, 3, 16, 16)
    for name in ("subject-fox", "style-high-contrast"):
        pipeline.load_lora_weights(trained / "loras", weight_name=f"{name}.safetensors")
        assert not torch.equal(picture(), plain)
        pipeline.unload_lora_weights()
    assert torch.equal(picture(), plain)


def test_everything_in_the_box_is_fp16(trained: Path) -> None:
    for file in trained.glob("model/*/*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}, file


def test_the_record_tells_every_stage(tiny: model.Preset, trained: Path) -> None:
    record = json.loads((trained / "record.json").read_text())
    assert record["settings"]["pixels"] == 16
    judges, encoders = {"judge-subject", "judge-style"}, {"clip", "dino"}
    loras = {"style-high-contrast", "subject-fox"}
    assert record["stages"].keys() == {"autoencoder", "text", "unet", *judges, *encoders, *loras}
    assert record["stages"]["unet"]["steps"] == tiny.base_steps
    assert record["figures"].keys() == {
        f"{who} on real pictures that it has not seen" for who in ("judge", "CLIP", "DINO")
    }


def test_the_judge_knows_the_split(trained: Path) -> None:
    loaded = judge.Judge.load(trained / "judge")
    assert loaded.styles == list(split.JUDGED_STYLES)
    assert loaded.subjects[: len(split.BASE_SUBJECTS)] == list(split.BASE_SUBJECTS)


def test_the_judge_learns_the_other_subjects_beside_its_own(trained: Path) -> None:
    plain, everyone = (judge.Judge.load(trained / "judge", known) for known in (False, True))
    assert everyone.subjects == [*plain.subjects, *split.MORE_SUBJECTS]
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    old, new = plain.subject(images), everyone.subject(images)
    assert new.shape == (3, len(everyone.subjects))
    torch.testing.assert_close(new[:, : old.shape[1]], old)


def test_fresh_subjects_are_taught_to_the_boxed_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_file: Path
) -> None:
    monkeypatch.setattr(split, "MORE_SUBJECTS", ("taco",))
    monkeypatch.setattr(fresh, "STEPS", 2)
    train.train_demo(tmp_path, picture_file_of_64(picture_file, tmp_path), stages=["fresh"], threads=1, bar=False)
    assert {file.name for file in (tmp_path / "fresh").iterdir()} == {
        *(file.name for file in loras.BOX.glob("style-*")),
        "subject-taco.safetensors",
    }
    learnt, boxed = (
        load_file(folder / f"subject-{name}.safetensors")
        for folder, name in ((tmp_path / "fresh", "taco"), (loras.BOX, "fox"))
    )
    assert {k: v.shape for k, v in learnt.items()} == {k: v.shape for k, v in boxed.items()}
    assert any(value.any() for name, value in learnt.items() if "lora_up" in name)


def picture_file_of_64(file: Path, folder: Path) -> Path:
    """The same noise at the size that the box was made for."""
    with np.load(file) as content:
        arrays = dict(content)
    arrays["x"] = arrays["x"].repeat(4, axis=1).repeat(4, axis=2)
    np.savez(folder / "pictures.npz", **arrays)
    return folder / "pictures.npz"


def test_adopted_latents_train_decoder_and_encoder(
    tiny: model.Preset, trained: Path, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model.PRESETS, "cpu", tiny)
    adopted = trained / "model" / "vae"
    train.train_demo(tmp_path, picture_file, latents_from=adopted, stages=["autoencoder"], threads=1, bar=False)
    assert json.loads((tmp_path / "record.json").read_text())["stages"].keys() == {"decoder", "encoder", "together"}


def test_an_unknown_stage_is_refused_with_those_there_are(picture_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stage unets; there are autoencoder, text, unet"):
        train.train_demo(tmp_path, picture_file, stages=["unets"])


def test_an_unknown_preset_is_refused(picture_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no preset big; there are cpu, gpu"):
        train.train_demo(tmp_path, picture_file, preset="big")  # type: ignore[arg-type]


def test_the_gpu_preset_fits_into_the_box() -> None:
    preset = model.PRESETS["gpu"]
    with torch.device("meta"):
        parts = model.autoencoder(preset), model.unet(preset)
    text = model.VOCABULARY * preset.context
    bytes_in_all = 2 * (text + sum(p.numel() for part in parts for p in part.parameters()))
    assert bytes_in_all < 23_400_000  # and 1.5 MB of tokenizer
