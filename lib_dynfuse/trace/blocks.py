"""The names that people use for a network's blocks, read from module paths, and the blocks' order along its depth."""

from __future__ import annotations

import re
from typing import NamedTuple


class Block(NamedTuple):
    """A block of a network; sorts along its depth, first the input's side."""

    depth: tuple[int, int]
    label: str


_WRAPPER = re.compile(r"^(?:(?:model\.)?diffusion_model|unet|transformer)\.")
_UNKNOWN = 5
# (how a path begins, place along the depth, label); the label takes the path's number, if it has one.
_FORMS: tuple[tuple[re.Pattern[str], int, str], ...] = tuple(
    (re.compile(rf"(?:{beginning})(?:\.|$)"), place, label)
    for beginning, place, label in (
        (r"time_embed|time_embedding|label_emb|add_embedding|time_in|vector_in|guidance_in|time_text_embed", 0, "time"),
        (r"conv_in|img_in|txt_in|x_embedder|context_embedder", 1, "in"),
        # LDM paths, as in A1111 and Forge; numbered as merge and block-weight tools do
        (r"input_blocks\.(\d+)", 2, "IN{:02d}"),
        (r"middle_block", 3, "MID"),
        (r"output_blocks\.(\d+)", 4, "OUT{:02d}"),
        # diffusers UNets
        (r"down(?:_blocks)?\.(\d+)", 2, "down.{}"),
        (r"mid(?:_block)?", 3, "mid"),
        (r"up(?:_blocks)?\.(\d+)", 4, "up.{}"),
        # transformers (Flux, SD3)
        (r"double_blocks\.(\d+)|transformer_blocks\.(\d+)|joint_blocks\.(\d+)", 2, "double.{:02d}"),
        (r"single_blocks\.(\d+)|single_transformer_blocks\.(\d+)", 4, "single.{:02d}"),
        (r"conv_out|conv_norm_out|out|final_layer|proj_out|norm_out", 6, "out"),
    )
)


def block_of(layer: str) -> Block:
    """The block that a layer belongs to, from its module path.

    LDM UNets: `IN00`..`IN11`, `MID`, `OUT00`..`OUT11`; diffusers UNets: `down.0`, `mid`, `up.1`; Flux and SD3:
    `double.03`, `single.12`; `time`, `in` and `out` around them. A path of no known form is labelled with its first two
    parts and comes after the known blocks, before `out`.
    """
    path = _WRAPPER.sub("", layer)
    for pattern, place, label in _FORMS:
        found = pattern.match(path)
        if found:
            number = next((int(group) for group in found.groups() if group), 0)
            return Block((place, number), label.format(number))
    return Block((_UNKNOWN, 0), ".".join(path.split(".")[:2]))
