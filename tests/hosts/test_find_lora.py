"""The file that a LoRA tag means, by the names that people and trainers give it."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.lora_files import find_lora


def lora_named(path: Path, alias: str | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({"x": torch.ones(1)}, path, None if alias is None else {"ss_output_name": alias})
    return path


def test_a_lora_is_found_by_the_name_that_its_trainer_gave_it(tmp_path: Path) -> None:
    one = lora_named(tmp_path / "a_v3-000010.safetensors", "my fox")
    two = lora_named(tmp_path / "sub" / "b.safetensors", "a_v3-000010")
    assert find_lora(tmp_path, "my fox") == one
    assert find_lora(tmp_path, "a_v3-000010") == one  # a file's own name goes first
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert find_lora(tmp_path, "my fox") == one
    lora_named(tmp_path / "c.safetensors", "my fox")
    with pytest.raises(DynFuseError, match="several files were trained under this name: a_v3-000010, c; write one"):
        find_lora(tmp_path, "my fox")
    assert find_lora(tmp_path, "sub/b") == two


def test_none_is_no_lora_s_trained_name(tmp_path: Path) -> None:
    lora_named(tmp_path / "a.safetensors", "None")
    with pytest.raises(DynFuseError, match="<lora:None>: not in"):
        find_lora(tmp_path, "None")


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_accents_may_be_composed_or_decomposed(tmp_path: Path, on_disk: Any, written: Any) -> None:
    path = lora_named(tmp_path / unicodedata.normalize(on_disk, "über/Café Ångström.safetensors"))
    for name in ("Café Ångström", "über/Café Ångström"):
        assert find_lora(tmp_path, unicodedata.normalize(written, name)) == path
    other = lora_named(tmp_path / "x.safetensors", unicodedata.normalize(on_disk, "Zoë"))
    assert find_lora(tmp_path, unicodedata.normalize(written, "Zoë")) == other


def test_files_of_one_name_are_listed_without_the_folder_s_path(tmp_path: Path) -> None:
    lora_named(tmp_path / "a" / "fox.safetensors")
    lora_named(tmp_path / "b" / "fox.safetensors")
    with pytest.raises(DynFuseError) as refused:
        find_lora(tmp_path, "fox")
    assert "a/fox, b/fox" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
