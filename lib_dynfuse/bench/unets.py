"""UNets of real size with random weights, and two random low-rank networks for their layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lib_dynfuse.core import Role
from lib_dynfuse.core.delta import Delta, Geometry, LowRank

Layers = dict[str, tuple[nn.Module, dict[Role, Delta]]]

# The configurations of runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0.
_SD15: dict[str, object] = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SDXL: dict[str, object] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# A few blocks of SD1.x for a quick look and for tests; no figure from it means anything.
_TINY: dict[str, object] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
DTYPES = ("float32", "float16", "bfloat16")
CONFIGS: dict[str, dict[str, object]] = {"sd15": _SD15, "sdxl": _SDXL, "tiny": _TINY}


def make_unet(name: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet `name` of `CONFIGS`, made on `device` with random weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **CONFIGS[name])
    # Not diffusers' own `to`, which warns of precisions that random weights do not care for.
    nn.Module.to(unet, dtype)
    unet.to_empty(device=device).eval().requires_grad_(False)
    generator = _generator(device, 0)
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.reset_parameters()
    return unet


def make_inputs(unet: UNet2DConditionModel, pixels: int, batch: int) -> Callable[..., Tensor]:
    """A function that runs one forward pass at `pixels` x `pixels` with 77 text tokens, of `unet` or another model."""
    device, dtype = unet.device, unet.dtype
    generator = _generator(device, 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = noise(batch, 4, pixels // 8, pixels // 8)
    t = torch.tensor(500, device=device)
    text = noise(batch, 77, unet.config.cross_attention_dim)
    added = None
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": noise(batch, 1280), "time_ids": noise(batch, 6)}

    def forward(model: nn.Module = unet) -> Tensor:
        out: Tensor = model(x, t, text, added_cond_kwargs=added, return_dict=False)[0]
        return out

    return forward


# Attention means the transformer blocks: attention, feed-forward and the projections around them, which every LoRA
# covers; all, as many community LoRAs do, also the convolutions of the residual blocks.
COVERS = {"all": ("attn", "ff.net", "proj_in", "proj_out", "resnets"), "attention": ("attentions",)}


def covered(unet: nn.Module, cover: str = "all") -> dict[str, nn.Module]:
    """The layers that a LoRA covers, by one of the names of `COVERS`."""
    wanted = COVERS[cover]
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and any(part in name for part in wanted)
        and "time_emb_proj" not in name
    }


def make_layers(unet: UNet2DConditionModel, rank: int, cover: str = "all") -> Layers:
    """Two random LoRAs of `rank` on the covered layers, deltas a few per cent of the features."""
    generator = _generator(unet.device, 2)
    layers: Layers = {}
    for name, module in covered(unet, cover).items():
        layers[name] = (module, {role: _random_lora(module, rank, generator) for role in Role})
    return layers


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    """None where there are shapes only, and nothing to draw."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def _random_lora(module: nn.Module, rank: int, generator: torch.Generator | None) -> LowRank:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = weight.shape

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=weight.device, dtype=weight.dtype)

    down = noise(rank, *shape[1:]) * shape[1:].numel() ** -0.5
    up = noise(shape[0], rank, *(1 for _ in shape[2:])) * (0.05 * rank**-0.5)
    return LowRank(down, up, None, Geometry.of(module) if isinstance(module, nn.Conv2d) else None)
