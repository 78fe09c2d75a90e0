"""The networks of the boxed model, small but laid out as Stable Diffusion 1.x, so that every host can load them.

The hosts' LDM code fixes 32 groups in every GroupNorm (hence widths in multiples of 32), 4 latent channels and a factor
of 8; their key map of LoRAs fixes two layers per UNet block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOX = Path(__file__).with_name("model")
TOKENIZER = BOX / "tokenizer"
SCALING = 0.18215  # of SD 1.x; some hosts assume it whatever the file says
VOCABULARY = 49408


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of one training run."""

    pixels: int = 64
    autoencoder: tuple[int, ...] = (32, 32, 64, 64)
    unet: tuple[int, ...] = (64, 128)
    heads: int = 4
    context: int = 64
    text_layers: int = 2
    rank: int = 4
    autoencoder_steps: int = 8000
    autoencoder_batch: int = 8
    encoder_steps: int = 2000
    base_steps: int = 5000
    base_batch: int = 32
    text_steps: int = 300
    style_steps: int = 1500
    style_batch: int = 8
    subject_steps: int = 250
    subject_batch: int = 4
    together_steps: int = 6000
    judge_steps: int = 14000
    judge_batch: int = 32
    style_judge_steps: int = 4000
    style_judge_batch: int = 256
    clip_steps: int = 2000
    clip_batch: int = 192
    dino_steps: int = 2000
    dino_batch: int = 192
    autocast: bool = False


PRESETS = {
    "cpu": Preset(),
    "gpu": Preset(
        pixels=128,
        autoencoder=(32, 64, 64, 96),
        autoencoder_steps=9000,
        autoencoder_batch=64,
        base_steps=12000,
        base_batch=256,
        text_steps=1500,
        style_batch=16,
        subject_steps=300,
        subject_batch=8,
        judge_steps=4000,
        judge_batch=128,
        clip_steps=8000,
        clip_batch=384,
        dino_steps=8000,
        dino_batch=384,
        autocast=True,
    ),
}


def autoencoder(preset: Preset) -> AutoencoderKL:
    """3 x pixels x pixels <-> 4 x pixels/8 x pixels/8."""
    count = len(preset.autoencoder)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=preset.autoencoder,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=preset.pixels,
        scaling_factor=SCALING,
    )


def unet(preset: Preset) -> UNet2DConditionModel:
    count = len(preset.unet)
    return UNet2DConditionModel(
        sample_size=preset.pixels // 8,
        block_out_channels=preset.unet,
        down_block_types=("CrossAttnDownBlock2D",) * count,
        up_block_types=("CrossAttnUpBlock2D",) * count,
        layers_per_block=2,
        norm_num_groups=32,
        attention_head_dim=preset.heads,  # SD 1.x's config counts heads under this name
        cross_attention_dim=preset.context,
    )


def text_encoder(preset: Preset) -> CLIPTextModel:
    """CLIP's text model with the full vocabulary, so that every host's own tokenizer fits it."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=preset.context,
        intermediate_size=4 * preset.context,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=preset.context,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        # Rows of names that the base never learns stay as they are drawn here: far enough apart to tell them by.
        model.get_input_embeddings().weight.normal_(std=0.3)
    return model


def tokenizer() -> CLIPTokenizer:
    """CLIP's own byte-pair tokenizer, from the box."""
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def tokens(texts: list[str], tokenizer: CLIPTokenizer) -> torch.Tensor:
    """[n, 77] int64, padded as SD 1.x pads."""
    batch = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return batch["input_ids"]


def scheduler() -> DDIMScheduler:
    """SD 1.x's noise schedule, predicting v."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
