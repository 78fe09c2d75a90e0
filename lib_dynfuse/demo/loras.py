"""LoRAs for what the base model does not know: two styles, and each held-out subject."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from lib_dynfuse.demo import base, loop

BOX = Path(__file__).with_name("loras")
ADAPTER = "demo"
LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("proj_in", "proj_out", "conv1", "conv2", "time_emb_proj"),
]


def file_name(what: str) -> str:
    """`hot beverage` gives `hot-beverage`."""
    return what.replace(" ", "-")


def train(
    file: Path,
    unet: UNet2DConditionModel,
    z: torch.Tensor,
    context: torch.Tensor,
    *,
    rank: int,
    batch: int,
    schedule: loop.Schedule,
    seed: int,
    autocast: bool = False,
    bar: bool = True,
) -> tuple[dict[str, torch.Tensor], loop.Curve]:
    """Teaches a fresh LoRA and takes it off `unet` again.

    Args:
        z, context: as in `base.train_unet`.

    Returns:
        The LoRA in kohya's layout, and the curve.
    """
    torch.manual_seed(seed)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), ADAPTER)
    try:
        curve = base.train_unet(
            file, unet, z, context, batch=batch, schedule=schedule, seed=seed, autocast=autocast, bar=bar
        )
        return kohya(unet), curve
    finally:
        unet.unload_lora()


def kohya(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The adapter on `unet` as fp16 tensors under the names that every host reads."""
    tensors = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = layer.lora_A[ADAPTER].weight
            tensors[f"{key}.lora_up.weight"] = layer.lora_B[ADAPTER].weight
            tensors[f"{key}.alpha"] = torch.tensor(float(layer.lora_alpha[ADAPTER]))
    return {name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}


def save(tensors: dict[str, torch.Tensor], file: Path, words: str, rank: int) -> None:
    """Writes a LoRA with the metadata that hosts show: what it is for, and the words that call it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.trigger_phrase": words,
    }
    save_file(tensors, file, metadata=metadata)
