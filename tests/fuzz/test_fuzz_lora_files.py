"""LoRA files of every kind: used or refused by name, and the model is as it was afterwards."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from fuzzing import assert_said, fuzz, json_values, texts
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.adapters import Adapters, Network
from lib_dynfuse.hosts.lora_files import find_lora, open_lora

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)}
KOHYA = {
    f"lora_unet_{LAYER.replace('.', '_')}.{part}": value
    for part, value in (
        ("lora_down.weight", torch.ones(2, 8)),
        ("lora_up.weight", torch.ones(8, 2)),
        ("alpha", torch.tensor(1.0)),
    )
}
WHOLE = [save(PEFT), save(KOHYA, metadata={"ss_base_model_version": "sd_v1"})]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64]

shapes = st.lists(st.integers(0, 4) | st.sampled_from([8, 2**31, 2**63, -1]), max_size=6) | st.just([1] * 65)
headers = st.dictionaries(
    st.sampled_from([*PEFT, *KOHYA, "__metadata__"]) | texts,
    json_values
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "F8_E4M3", "F4", "F6_E2M3", "C64", "BOOL", "U64", "x"]),
            "shape": shapes,
            "data_offsets": st.lists(st.sampled_from([0, 4, 8, 64, 2**40]), min_size=2, max_size=2),
        }
    ),
    max_size=3,
)


def with_header(header: Any, size: int) -> bytes:
    try:
        text = json.dumps(header, ensure_ascii=True).encode()
    except (ValueError, RecursionError):
        text = b"{"
    return len(text).to_bytes(8, "little") + text + bytes(size)


def damaged(whole: bytes, changes: list[tuple[int, int]], length: int) -> bytes:
    content = bytearray(whole[:length] if length else whole)
    for place, value in changes:
        if content:
            content[place % len(content)] = value
    return bytes(content)


contents = st.one_of(
    st.binary(max_size=60),
    st.builds(with_header, headers, st.sampled_from([0, 4, 64])),
    st.builds(
        damaged,
        st.sampled_from(WHOLE),
        st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
        st.integers(0, 700),
    ),
)


@fuzz(contents)
def test_a_files_content_is_read_or_refused_with_its_name(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fox.safetensors")
        path.write_bytes(content)
        try:
            lora = open_lora(path)
        except DynFuseError as error:
            assert_said(str(error), 1200, begins="fox.safetensors", without=folder)
            return
        assert lora.shapes
        assert all(len(shape) <= 5 for shape in lora.shapes.values())
        assert lora.made_for is None or isinstance(lora.made_for, str)


@fuzz(texts | st.sampled_from(["fox", "sub/fox", "../fox", "/etc/passwd", "fox.safetensors", "*", "[", "fo"]))
def test_a_name_finds_a_file_of_the_folder_or_none(name: str):
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside, "loras")
        (folder / "sub").mkdir(parents=True)
        for path in (folder / "fox.safetensors", folder / "sub" / "fox.safetensors", Path(outside, "fox.safetensors")):
            path.write_bytes(b"fox")
        try:
            found = find_lora(folder, name)
        except DynFuseError as error:
            assert_said(str(error), 1200)
            return
        assert found.is_relative_to(folder)
        assert ".." not in found.parts


class Pipeline:
    """As much of a pipeline as loads LoRAs: a UNet of one attention block."""

    def __new__(cls) -> Any:
        from diffusers import StableDiffusionPipeline

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=8,
        )
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
        return StableDiffusionPipeline(unet=unet, **parts, requires_safety_checker=False)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    return Pipeline()


layers = st.sampled_from(
    [
        LAYER,
        LAYER.replace("to_q", "to_out.0"),
        LAYER.replace("attn1", "attn2"),
        "conv_in",
        "mid_block.x",
        "time_embedding",
    ]
)
endings = st.sampled_from(
    [
        "lora_A.weight",
        "lora_B.weight",
        "lora_A.default.weight",
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
        "weight",
        "lora_magnitude_vector",
        "lora_B.bias",
        "processor.to_q_lora.down.weight",
        "lora.up.weight",
        "dora_scale",
    ]
)
prefixes = st.sampled_from(
    ["unet.", "lora_unet_", "base_model.model.", "text_encoder.", "lora_te1_", "transformer.", ""]
)
keys = st.builds(
    lambda prefix, layer, ending: f"{prefix}{layer.replace('.', '_') if prefix.endswith('_') else layer}.{ending}",
    prefixes,
    layers,
    endings,
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Parts of right files beside others, in any kind of number."""
    state = dict(draw(st.sampled_from([{}, PEFT, KOHYA])))
    for key in draw(st.lists(keys | st.sampled_from([*PEFT, *KOHYA]), max_size=5)):
        shape = draw(st.sampled_from([(2, 8), (8, 2), (2, 4, 3, 3), (4, 2, 1, 1), (8,), (), (1,), (2, 7), (3, 8)]))
        state[key] = torch.full(shape, draw(st.sampled_from([0.0, 1.0, -3.0, 100.0]))).to(draw(st.sampled_from(DTYPES)))
    return state


@fuzz(state=tensors(), role=st.sampled_from([None, Role.SUBJECT]), share=0.25)
def test_a_file_is_used_or_refused_and_the_model_is_as_it_was(pipe: Any, state: dict[str, Tensor], role: Role | None):
    before = {
        name: (id(parameter), parameter.clone(), parameter.requires_grad)
        for name, parameter in pipe.unet.named_parameters()
    }
    said: list[str] = []
    adapters = Adapters(pipe, "tiny", said.append)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fox.safetensors")
        path.write_bytes(save({key: value.contiguous() for key, value in state.items()}))
        try:
            adapters.use([Network(path, 1.0, 1.0, role)])
        except DynFuseError as error:
            assert_said(str(error), 1200, begins="fox", without=folder)
        finally:
            adapters.clear()
    for line in said:
        assert_said(line, 1200)
    after = dict(pipe.unet.named_parameters())
    assert list(after) == list(before)
    for name, (identity, value, asks) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)
        assert after[name].requires_grad is asks
