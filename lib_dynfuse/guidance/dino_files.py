"""The published DINOs as single files: their settings, and the names that timm and DINO's authors give the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# By the file's name, what transformers' config.json of each says.
SINGLE_FILES: Mapping[str, dict[str, Any]] = {
    "dino-vits16": {
        "model_type": "vit",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
    },
    "dinov2-small": {
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "layer_norm_eps": 1e-6,
        "image_size": 518,
        "patch_size": 14,
        "layerscale_value": 1.0,
    },
}
_RENAMED = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_OF_A_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def in_transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights by the names that transformers has had since its first one; others as they are."""
    if "blocks.0.attn.qkv.weight" not in state:
        return dict(state)
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            named[_renamed(name, _RENAMED)] = value
            continue
        layer, inner = f"encoder.layer.{found[1]}", found[2]
        if inner.startswith("attn.qkv."):
            # One matrix for all three there.
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[f"{layer}.attention.attention.{part}.{inner.rpartition('.')[2]}"] = third
        else:
            named[f"{layer}.{_renamed(inner, _OF_A_BLOCK)}"] = value
    return named


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, _, last = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{last}" if module in names else name
