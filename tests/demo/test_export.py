"""One file and a yaml hold the same model as the folder: diffusers' own reader of LDM files is the oracle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from lib_dynfuse.demo import export
from lib_dynfuse.guidance.encoders import load_clip, load_dino
from lib_dynfuse.guidance.sources import Source

PROMPT = "fox emoji, noto style"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export(trained / "model", tmp_path_factory.mktemp("webui"), trained / "loras")


def read_back(checkpoint: Path, folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_single_file(
        str(checkpoint),
        config=str(folder),
        original_config=str(checkpoint.with_suffix(".yaml")),
        local_files_only=True,
        torch_dtype=torch.float32,
    )


def picture(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16}
    return pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="pt", **size).images


def test_the_single_file_makes_the_folder_s_picture(trained: Path, exported: Path) -> None:
    folder = StableDiffusionPipeline.from_pretrained(trained / "model", torch_dtype=torch.float32)
    single = read_back(exported, trained / "model")
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(folder, part).state_dict(), getattr(single, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(picture(single), picture(folder))


def test_the_yaml_describes_the_model(trained: Path, exported: Path) -> None:
    settings = yaml.safe_load(exported.with_suffix(".yaml").read_text())["model"]["params"]
    assert settings["parameterization"] == "v"
    assert settings["scale_factor"] == 0.18215
    unet = settings["unet_config"]["params"]
    assert (unet["model_channels"], unet["channel_mult"], unet["attention_resolutions"]) == (32, [1, 2], [2, 1])
    assert settings["first_stage_config"]["params"]["ddconfig"]["ch_mult"] == [1, 1, 1, 1]


def test_everything_lies_where_a_webui_looks(exported: Path) -> None:
    models = exported.parents[1]
    assert exported.relative_to(models.parent).as_posix() == "models/Stable-diffusion/dynfuse-demo.safetensors"
    assert exported.with_suffix(".yaml").exists()
    loras = {file.name for file in (models / "Lora").iterdir()}
    assert loras == {"subject-fox.safetensors", "style-high-contrast.safetensors"}
    source = Source(models / "dynfuse")
    assert load_clip("demo-clip", source).name == "demo-clip (open_clip)"
    assert load_dino("demo-dino", source).name == "demo-dino (transformers)"


def test_the_yaml_leads_to_the_tokenizer_and_the_text_encoder_s_sizes_wherever_the_webui_is(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = tmp_path / "elsewhere"
    shutil.copytree(exported.parents[2], webui)
    monkeypatch.chdir(webui)
    settings = yaml.safe_load((webui / "models/Stable-diffusion/dynfuse-demo.yaml").read_text())["model"]["params"]
    folder = Path(settings["cond_stage_config"]["params"]["version"])
    assert not folder.is_absolute()
    assert CLIPTokenizer.from_pretrained(folder)("fox")["input_ids"] == [49406, 3240, 49407]
    assert (folder / "vocab.json").exists()
    assert (folder / "merges.txt").exists()
    assert '"hidden_size": 32' in (folder / "config.json").read_text()


def test_no_file_of_the_export_tells_where_it_was_made(exported: Path, trained: Path) -> None:
    texts = [file for file in exported.parents[2].rglob("*") if file.suffix in (".yaml", ".json")]
    assert len(texts) > 2
    for file in texts:
        assert str(exported.parents[2]) not in file.read_text()
        assert str(trained) not in file.read_text()


@pytest.mark.parametrize(("inside", "named"), [("", "models"), ("", "models/"), ("", "."), ("models", ".")])
def test_the_webuis_folder_and_its_folder_of_models_are_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, named: str
) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / inside)
    made = export.export(trained / "model", Path(named), trained / "loras")
    assert made.resolve() == (tmp_path / "models/Stable-diffusion/dynfuse-demo.safetensors").resolve()


@pytest.mark.parametrize("key", ["down_blocks.0.motion.0.weight", "class_embedding.weight"])
def test_a_parameter_that_ldm_lacks_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="no place"):
        export.unet_key(key)
