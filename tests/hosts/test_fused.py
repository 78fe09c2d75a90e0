"""Fused layers: what is one layer to the model and several things to look at."""

from __future__ import annotations

import pytest
import torch

from lib_dynfuse.core import Role
from lib_dynfuse.core.delta import Delta, Dense, Geometry, LowRank, Rotation
from lib_dynfuse.core.parts import stretches
from lib_dynfuse.hosts.fused import apart


def low_rank(outputs: int, inputs: int) -> Delta:
    return LowRank(torch.ones(2, inputs), torch.ones(outputs, 2))


def parts(path: str, delta: Delta) -> list[tuple[int, int | None]]:
    return [(one.start, one.stop) for one in stretches({Role.STYLE: apart(path, delta)})]


@pytest.mark.parametrize(
    ("path", "outputs", "expected"),
    [
        ("double_blocks.3.img_attn.qkv", 24, [(0, 8), (8, 16), (16, 24)]),
        ("joint_blocks.0.context_block.attn.qkv", 24, [(0, 8), (8, 16), (16, 24)]),
        ("single_blocks.12.linear1", 56, [(0, 8), (8, 16), (16, 24), (24, 56)]),
        ("layers.0.attention.qkv", 16, [(0, None)]),  # fewer heads for k and v than for q
        ("single_blocks.12.linear2", 8, [(0, None)]),
        ("encoder.linear1", 56, [(0, None)]),
        ("double_blocks.3.img_mod.lin", 48, [(0, None)]),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", 24, [(0, None)]),
    ],
)
def test_q_k_v_and_the_mlp_are_told_apart_by_the_layer_s_name(
    path: str, outputs: int, expected: list[tuple[int, int | None]]
) -> None:
    assert parts(path, low_rank(outputs, 8)) == expected


def test_a_convolution_of_that_name_is_left_whole() -> None:
    assert parts("mid.attn_1.qkv", Dense(torch.ones(24, 8, 1, 1), None, Geometry())) == [(0, None)]


def test_a_kind_that_cannot_be_cut_stays_whole() -> None:
    rotation = Rotation(torch.eye(4).expand(6, 4, 4))
    assert apart("double_blocks.0.img_attn.qkv", rotation) is rotation
