"""Tiny pipelines on disk, made once for the whole run, and a folder of LoRAs for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tiny import WIDTH, Factors, autoencoder, byte_tokenizer, in_layout, random_factors, scheduler, text_config, unet
from transformers import CLIPTextModel, CLIPTextModelWithProjection


def save_sd(folder: Path, seed: int, schedule: DDIMScheduler, **unet_settings: object) -> Path:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=unet(WIDTH, **unet_settings),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.x folder, its prompt vectors 32 wide."""
    return save_sd(tmp_path_factory.mktemp("models") / "tiny-sd", 1, scheduler())


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2.x folder: linear projections, v-prediction."""
    schedule = DDIMScheduler.from_config(scheduler().config, prediction_type="v_prediction")
    return save_sd(tmp_path_factory.mktemp("models") / "tiny-sd2", 6, schedule, use_linear_projection=True)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder with two text encoders of 32."""
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    pipeline = StableDiffusionXLPipeline(
        unet=unet(
            2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            use_linear_projection=True,
        ),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler(),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fox(sd_folder: Path) -> Factors:
    return random_factors(UNet2DConditionModel.from_pretrained(sd_folder / "unet"), seed=3)


@pytest.fixture(scope="session")
def ink(sd_folder: Path) -> Factors:
    return random_factors(UNet2DConditionModel.from_pretrained(sd_folder / "unet"), seed=4, rank=3)


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory: pytest.TempPathFactory, fox: Factors, ink: Factors) -> Path:
    """fox (rank 2), ink (rank 3, alpha 1.5) and detail (every other layer of fox); tests add files of other names."""
    folder = tmp_path_factory.mktemp("loras")
    save_file(in_layout("kohya", fox), folder / "fox.safetensors")
    save_file(in_layout("kohya", ink, alpha=1.5), folder / "ink.safetensors")
    halved = {name: (down / 2, up) for name, (down, up) in list(fox.items())[::2]}
    save_file(in_layout("kohya", halved), folder / "detail.safetensors")
    return folder
