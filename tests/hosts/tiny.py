"""Tiny Stable Diffusion parts with random weights, and LoRAs for them in every layout."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTokenizer

WIDTH = 32


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a letter a token: no vocabulary file is needed."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def unet(context: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=context,
        **more,
    )


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def covered(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A layer of every kind: attention, feed-forward, projections, convolutions, shortcuts, time embedding."""
    blocks = ("down_blocks.0.attentions.0", "mid_block.resnets.0", "up_blocks.1.resnets.1")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and name.startswith(blocks)
    }


def random_factors(model: torch.nn.Module, seed: int, rank: int = 2, size: float = 0.3) -> Factors:
    """(down, up) for every layer, as large as `size` beside the weights of a trained LoRA."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in covered(model).items():
        weight = module.weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2), generator=generator)
        factors[name] = (size * down, size * up)
    return factors


def in_layout(layout: str, factors: Factors, part: str = "unet", alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Factors under the names of a layout: kohya, peft (as diffusers saves it now), diffusers (as it did), raw peft."""
    kohya_part = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}[part]
    state = {}
    for name, (down, up) in factors.items():
        if layout == "kohya":
            key = f"lora_{kohya_part}_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = down, up
            state[f"{key}.alpha"] = torch.tensor(float(down.shape[0] if alpha is None else alpha))
            continue
        prefix = "base_model.model" if layout == "raw peft" else part
        a, b = {"diffusers": ("lora.down", "lora.up")}.get(layout, ("lora_A", "lora_B"))
        if layout == "diffusers" and ".to_" in name:
            block, _, projection = name.replace("to_out.0", "to_out").rpartition(".")
            name, a, b = f"{block}.processor", f"{projection}_lora.down", f"{projection}_lora.up"
        state[f"{prefix}.{name}.{a}.weight"], state[f"{prefix}.{name}.{b}.weight"] = down, up
    return state
