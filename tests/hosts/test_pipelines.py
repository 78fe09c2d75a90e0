"""Opening models in the forms that people have them in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lib_dynfuse.demo.export import ldm_tensors
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.hosts.pipelines import open_pipeline
from lib_dynfuse.hosts.samplers import SAMPLERS, make_sampler, sampler_name, sigmas

PICTURE = {"prompt": "a fox", "steps": 2, "cfg": 3.0, "seeds": (7,), "tensors": True}


@pytest.fixture
def checkpoint(sd_folder: Path, tmp_path: Path) -> Path:
    """The tiny pipeline in one file, under the names that checkpoints use."""
    file = tmp_path / "tiny.safetensors"
    save_file(ldm_tensors(DiffusionPipeline.from_pretrained(sd_folder)), file)
    return file


def test_a_single_file_makes_the_folders_pictures(checkpoint: Path, sd_folder: Path):
    single = Embedded.load(checkpoint, config=sd_folder, device="cpu")
    assert single.name == "tiny"
    assert torch.equal(single.generate(**PICTURE), Embedded.load(sd_folder, device="cpu").generate(**PICTURE))


def test_a_folder_with_half_precision_files_only_is_opened(sd_folder: Path, tmp_path: Path):
    DiffusionPipeline.from_pretrained(sd_folder, dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    pipe = open_pipeline(tmp_path / "half", torch.float32)
    assert pipe.unet.dtype == torch.float32


def test_a_folder_that_lacks_its_weights_is_refused(sd_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DynFuseError, match="model cannot be loaded"):
        open_pipeline(folder, torch.float32)


@pytest.mark.parametrize(("channels", "kind"), [(9, "an inpainting model"), (8, "a model that edits"), (6, "of an")])
def test_a_unet_that_takes_more_than_the_latent_is_refused_by_name(
    sd_folder: Path, checkpoint: Path, tmp_path: Path, channels: int, kind: str
):
    said = f"{kind}.*: its UNet takes {channels} channels, a text-to-image model's 4; SD 1.x"
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    settings = folder / "unet" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "in_channels": channels}))
    with pytest.raises(DynFuseError, match=f"model is {said}"):
        open_pipeline(folder, torch.float32)
    tensors = load_file(checkpoint)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, channels, 3, 3)
    save_file(tensors, checkpoint)
    with pytest.raises(DynFuseError, match=rf"tiny\.safetensors is {said}"):
        open_pipeline(checkpoint, torch.float32, sd_folder)


def test_sdxls_refiner_is_refused_by_name(sdxl_folder: Path, tmp_path: Path):
    said = "has the second of SDXL's text encoders only, as its refiner has"
    folder = tmp_path / "refiner"
    folder.mkdir()
    index = json.loads((sdxl_folder / "model_index.json").read_text())
    parts = {**index, "text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(parts))
    with pytest.raises(DynFuseError, match=f"refiner {said}"):
        open_pipeline(folder, torch.float32)
    (folder / "model_index.json").write_text(json.dumps({**parts, "_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    with pytest.raises(DynFuseError, match="refiner is a StableDiffusionXLImg2ImgPipeline; SD 1"):
        open_pipeline(folder, torch.float32)
    file = tmp_path / "refiner.safetensors"
    keys = ("model.diffusion_model.out.2.bias", "conditioner.embedders.0.model.ln_final.weight")
    save_file({key: torch.zeros(2) for key in keys}, file)
    with pytest.raises(DynFuseError, match=rf"refiner\.safetensors {said}"):
        open_pipeline(file, torch.float32)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"_class_name": ["x"]}', '{"_class_name": null}'])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(DynFuseError, match=r"model_index\.json is damaged|is a .*; SD 1"):
        open_pipeline(tmp_path, torch.float32)


def test_a_config_that_is_no_folder_is_refused(checkpoint: Path):
    with pytest.raises(DynFuseError, match="--config nowhere is not a folder"):
        open_pipeline(checkpoint, torch.float32, Path("nowhere"))


def test_a_checkpoint_s_settings_are_not_fetched_unasked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """diffusers would, even where it is told to look at the disk alone."""
    asked: list[str] = []

    def refuse(host: str, *rest: object, **more: object) -> None:
        asked.append(host)
        raise OSError("there is no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DynFuseError, match=r"give --config .* or have them fetched .* with --download"):
        open_pipeline(checkpoint, torch.float32)
    assert asked == []
    with pytest.raises(DynFuseError, match="give --config"):
        open_pipeline(checkpoint, torch.float32, download=True)
    assert asked


def test_pickled_weights_of_a_model_are_not_read(sd_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        file = folder / f"{name}.safetensors"
        pickled = "pytorch_model" if "text" in name else "diffusion_pytorch_model"
        torch.save(load_file(file), file.with_name(f"{pickled}.bin"))
        file.rename(tmp_path / "aside")
        with pytest.raises(DynFuseError, match="cannot be loaded"):
            open_pipeline(folder, torch.float32)
        (tmp_path / "aside").rename(file)
    open_pipeline(folder, torch.float32)


@pytest.fixture(scope="module")
def own_sampler(sd_folder: Path) -> object:
    return open_pipeline(sd_folder, torch.float32).scheduler


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_made_and_is_called_by_its_name(own_sampler: object, name: str):
    sampler = make_sampler(own_sampler, name.upper())
    assert sampler_name(sampler) == name
    assert sampler.config.beta_end == 0.012
    noise = sigmas(sampler, 4)
    assert len(noise) == len(sampler.timesteps)
    assert noise == sorted(noise, reverse=True)
    assert 0 < noise[-1] < noise[0] < 20


def test_sigmas_are_those_of_the_sampler_that_has_its_own(own_sampler: object):
    sampler = make_sampler(own_sampler, "Euler")
    assert sigmas(sampler, 5) == pytest.approx(sampler.sigmas[:-1].tolist(), rel=0.02)


def test_a_sampler_the_webui_does_not_know_goes_by_its_class():
    assert sampler_name(SimpleNamespace(config={})) == "SimpleNamespace"
