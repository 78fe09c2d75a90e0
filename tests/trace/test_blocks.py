"""The names of a network's blocks."""

from __future__ import annotations

import random

import pytest

from lib_dynfuse.trace.blocks import block_of


@pytest.mark.parametrize(
    ("layer", "label"),
    [
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "IN01"),
        ("model.diffusion_model.input_blocks.11.0.in_layers.2", "IN11"),
        ("diffusion_model.middle_block.1.proj_in", "MID"),
        ("output_blocks.5.1.transformer_blocks.0.ff.net.2", "OUT05"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "down.0"),
        ("unet.mid_block.attentions.0.proj_out", "mid"),
        ("up_blocks.2.resnets.0.conv1", "up.2"),
        ("down.0.attn.to_q", "down.0"),
        ("time_embedding.linear_1", "time"),
        ("time_embed.0", "time"),
        ("conv_in", "in"),
        ("out.2", "out"),
        ("transformer.transformer_blocks.3.attn.to_q", "double.03"),
        ("single_blocks.12.linear1", "single.12"),
        ("encoder.layers.3.proj_out", "encoder.layers"),
        ("linear", "linear"),
    ],
)
def test_a_module_path_gives_the_fields_name_of_its_block(layer: str, label: str) -> None:
    assert block_of(layer).label == label


@pytest.mark.parametrize(
    "along",
    [
        "time_embed.0 input_blocks.0.0 input_blocks.2.0 input_blocks.11.0 middle_block.0 output_blocks.0.0 "
        "output_blocks.9.0 output_blocks.10.0 out.2",
        "time_embedding.linear_1 conv_in down_blocks.0.x down_blocks.1.x mid_block.x up_blocks.0.x up_blocks.1.x "
        "something.else conv_out",
        "vector_in.x img_in double_blocks.2.x double_blocks.10.x single_blocks.0.x final_layer.linear",
    ],
)
def test_blocks_sort_along_the_networks_depth(along: str) -> None:
    right = along.split()
    mixed = random.Random(0).sample(right, len(right))
    assert sorted(mixed, key=block_of) == right
