"""CSD's encoder, on a tower of toy size in the authors' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_dynfuse.evaluate.csd import load_csd
from lib_dynfuse.guidance.encoders import EncoderError
from lib_dynfuse.guidance.libraries import skip_missing_operators
from lib_dynfuse.guidance.sources import Source

skip_missing_operators()
WIDTH, SIDE, PATCH = 64, 32, 16


def tower() -> Any:
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(SIDE, PATCH, WIDTH, 2, 1, 4.0, output_dim=24, act_layer=QuickGELU).eval()


def checkpoint(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {f"module.backbone.{name}": value for name, value in tower().state_dict().items()}
    heads = {f"module.last_layer_{name}": torch.randn(WIDTH, 24) for name in ("style", "content")}
    every: dict[str, Tensor | None] = {**state, **heads, **changes}
    return {name: value.clone() for name, value in every.items() if value is not None}


def test_the_style_is_the_tower_without_its_projection_times_the_style_head(tmp_path: Path) -> None:
    state = checkpoint()
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "csd.pth")
    encoder = load_csd("csd", Source(tmp_path, pickles=True))
    images = torch.rand(2, 3, SIDE, SIDE)
    bare = tower()
    bare.proj = None
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(bare((images - mean) / std) @ state["module.last_layer_style"], dim=-1)
    torch.testing.assert_close(encoder.image(images), wanted)
    assert encoder.name == "CSD csd, ViT/16 32"


def test_a_picture_is_nearest_to_itself(tmp_path: Path) -> None:
    save_file(checkpoint(), tmp_path / "csd.safetensors")
    encoder = load_csd("csd.safetensors", Source(tmp_path))
    images = torch.rand(2, 3, SIDE, SIDE)
    near = encoder.nearness(images, [images[:1]])
    assert near[0] == pytest.approx(1.0, abs=1e-5)
    assert near[1] < near[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"module.last_layer_style": None}, "no CSD checkpoint"),
        ({"module.backbone.conv1.weight": None}, "no CSD checkpoint"),
        ({"module.backbone.ln_pre.weight": None}, "another tower"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    torch.save({"model_state_dict": checkpoint(**changes)}, tmp_path / "csd.pth")
    with pytest.raises(EncoderError, match=said):
        load_csd("csd", Source(tmp_path, pickles=True))


def test_where_the_weights_are_not_it_says_where_to_put_them(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="put the checkpoint at"):
        load_csd("csd", Source(tmp_path, pickles=True))
    (tmp_path / "csd.pth").write_bytes(b"not one")
    with pytest.raises(EncoderError, match="not a checkpoint of torch"):
        load_csd("csd", Source(tmp_path, pickles=True))
