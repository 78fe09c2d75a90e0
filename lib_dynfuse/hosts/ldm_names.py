"""The names that a UNet's layers have in the original (LDM) code, where diffusers has others."""

from __future__ import annotations

from typing import Any

from torch import nn

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_names(unet: nn.Module) -> dict[str, str]:
    """diffusers' path of every layer that LDM has under another name, to that name.

    As in the original code each block counts its resnets, each with the attention behind it, in one row of numbers.
    """
    model: Any = unet
    blocks = dict(_OUTSIDE)
    number = 1
    for i, block in enumerate(model.down_blocks):
        number = _number(blocks, f"down_blocks.{i}", block, "input_blocks", number)
        if getattr(block, "downsamplers", None):
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    if model.mid_block is not None:
        for kind, first in (("resnets", 0), ("attentions", 1)):
            for j in range(len(getattr(model.mid_block, kind, ()))):
                blocks[f"mid_block.{kind}.{j}"] = f"middle_block.{first + 2 * j}"
    number = 0
    for i, block in enumerate(model.up_blocks):
        number = _number(blocks, f"up_blocks.{i}", block, "output_blocks", number)
        if getattr(block, "upsamplers", None):
            behind = 2 if getattr(block, "attentions", None) else 1
            blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{behind}.conv"
    return {path: name for path, _ in unet.named_modules() if (name := _name(path, blocks))}


def _number(blocks: dict[str, str], path: str, block: Any, ldm: str, number: int) -> int:
    for j in range(len(block.resnets)):
        blocks[f"{path}.resnets.{j}"] = f"{ldm}.{number}.0"
        if getattr(block, "attentions", None):
            blocks[f"{path}.attentions.{j}"] = f"{ldm}.{number}.1"
        number += 1
    return number


def _name(path: str, blocks: dict[str, str]) -> str | None:
    block, rest = path, ""
    while block and block not in blocks:
        block, _, last = block.rpartition(".")
        rest = f".{last}{rest}"
    if not block:
        return None
    inside = _IN_RESNET.get(rest[1:]) if ".resnets." in block else None
    return blocks[block] + (f".{inside}" if inside else rest)
