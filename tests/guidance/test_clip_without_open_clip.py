"""CLIP by transformers: the same vectors from the same files as by open_clip."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lib_dynfuse
from lib_dynfuse.guidance import clip_without_open_clip as without
from lib_dynfuse.guidance.encoders import load_clip
from lib_dynfuse.guidance.libraries import EncoderError, library

BOXED = Path(lib_dynfuse.__file__).parent / "demo" / "clip"
PROMPTS = ["a red fox in the snow", "It's 2 CATS,   and (a dog):", "a long one " * 40, ""]


@pytest.fixture
def open_clip() -> Any:
    return library("open_clip", "open_clip_torch")


@pytest.fixture
def is_missing(monkeypatch: pytest.MonkeyPatch, open_clip: Any) -> Callable[[], None]:
    """From here on there is no open_clip, but its words are still known."""
    tokenizer = sys.modules["open_clip.tokenizer"]

    def remove() -> None:
        old: Any = ModuleType("open_clip")  # as version 1.3, which knows no configurations
        old.tokenize, old.tokenizer = open_clip.tokenize, tokenizer
        monkeypatch.setitem(sys.modules, "open_clip", old)

    return remove


def small(**more: Any) -> dict[str, Any]:
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2, "mlp_ratio": 2.5}
    text = {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **more}


@pytest.fixture(params=["boxed", "quick", "custom text"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, open_clip: Any) -> Path:
    if request.param == "boxed":
        return BOXED
    torch.manual_seed(3)
    config = small(quick_gelu=True) if request.param == "quick" else small()
    made = open_clip.CustomTextCLIP if request.param == "custom text" else open_clip.CLIP
    save_file({name: one.contiguous() for name, one in made(**config).state_dict().items()}, tmp_path / "a.safetensors")
    if request.param == "custom text":
        config["custom_text"] = True
    (tmp_path / "a.safetensors").rename(tmp_path / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_pictures_and_prompts_are_the_same_vectors(folder: Path, is_missing: Callable[[], None]) -> None:
    pictures = torch.rand(3, 3, 50, 40, generator=torch.Generator().manual_seed(1))
    before = load_clip(str(folder))
    is_missing()
    after = load_clip(str(folder))
    assert type(after._model).__module__ == without.__name__
    assert after.name == before.name
    assert after.preprocess == before.preprocess
    torch.testing.assert_close(after.image(pictures), before.image(pictures), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.text(PROMPTS), before.text(PROMPTS), rtol=0, atol=1e-5)


def test_the_gradient_to_the_picture_is_the_same(is_missing: Callable[[], None]) -> None:
    def gradient() -> torch.Tensor:
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        load_clip(str(BOXED)).image(picture)[0, 0].backward()
        assert picture.grad is not None
        return picture.grad

    before = gradient()
    is_missing()
    torch.testing.assert_close(gradient(), before, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", without.ByTransformers().list_models())
def test_the_table_is_open_clip_s(name: str, open_clip: Any) -> None:
    ours = without.ByTransformers()
    if name not in open_clip.list_models():
        pytest.skip("open_clip has a name less")
    plain = {"quick_gelu": False}
    mine, theirs = ours.get_model_config(name), {**plain, **open_clip.get_model_config(name)}
    assert mine is not None
    towers = {"vision_cfg": {"head_width": 64, "mlp_ratio": 4.0}, "text_cfg": {}}
    assert mine == {**theirs, **{tower: {**default, **theirs[tower]} for tower, default in towers.items()}}
    for tag in ours.list_pretrained_tags_by_model(name):
        settings = open_clip.get_pretrained_cfg(name, tag)
        if not settings:  # a name with quickgelu has only those that were made with it
            continue
        for key, value in ours.get_pretrained_cfg(name, tag).items():
            assert value == settings.get(key, False), (tag, key)


@pytest.mark.parametrize("length", [16, 77])
def test_words_are_open_clip_s_tokens(length: int, open_clip: Any, tmp_path: Path) -> None:
    expected = open_clip.tokenize(PROMPTS, context_length=length)
    assert torch.equal(without.tokenize(PROMPTS, length), expected)


def test_words_by_the_host_s_own_files(open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sys.modules["open_clip.tokenizer"].SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {names.get(word, word): number for word, number in own.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in own.bpe_ranks)]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    expected = open_clip.tokenize(PROMPTS, context_length=20)
    for name in ("open_clip.tokenizer", "clip", "clip.simple_tokenizer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EncoderError, match="nothing here knows CLIP's words"):
        without.tokenize(PROMPTS, 20)
    monkeypatch.setattr(without, "tokenizer_folders", lambda: [tmp_path / "gone", tmp_path])
    assert torch.equal(without.tokenize(PROMPTS, 20), expected)


def test_a_tower_of_another_library_is_refused_by_name(is_missing: Callable[[], None], tmp_path: Path) -> None:
    config = small()
    config["vision_cfg"]["timm_model_name"] = "convnext_base"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file({"x": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    is_missing()
    with pytest.raises(EncoderError, match="its image tower needs the package open_clip_torch"):
        load_clip(str(tmp_path))
