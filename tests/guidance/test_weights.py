"""Pickled weights: what is read, where, by which torch; and that the code in one never runs."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from lib_dynfuse.guidance import weights
from lib_dynfuse.guidance.encoders import load_clip, load_dino
from lib_dynfuse.guidance.libraries import EncoderError
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.guidance.weights import pickle_holes

HOLED = ["1.13.1", "2.1.2", "2.3.1+cu121", "2.5.1", "2.6.0", "2.9.1", "2.10.0a0+git12", "2.10.0rc1", "nightly", ""]
MENDED = ["2.10.0", "2.10.0+cu130", "2.13.0+cpu", "3.0.1"]
STATE = {"weight": torch.ones(2)}


class Evil:
    """Writes a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def _zipped(evil: Evil) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": {**STATE, "evil": evil}}, content)
    return content.getvalue()


def _old(evil: Evil) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": {**STATE, "evil": evil}}, content, _use_new_zipfile_serialization=False)
    return content.getvalue()


def _two_in_one(evil: Evil) -> bytes:
    """A pickle for who reads from the front, behind which a harmless zip is for who looks from the end."""
    content = io.BytesIO()
    torch.save(STATE, content)
    return pickle.dumps(evil) + content.getvalue()


def _hidden(evil: Evil) -> bytes:
    """A zip whose second data.pkl is the bad one."""
    content = io.BytesIO()
    torch.save(STATE, content)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil))
    return content.getvalue()


FORMS: dict[str, Callable[[Evil], bytes]] = {
    "bare": pickle.dumps,
    "zip": _zipped,
    "old": _old,
    "two in one": _two_in_one,
    "hidden": _hidden,
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def test_the_marker_is_written_where_a_pickle_is_trusted(marker: Path) -> None:
    """So that its absence below says something."""
    torch.load(io.BytesIO(_zipped(Evil(marker))), weights_only=False)
    assert marker.exists()
    marker.unlink()
    pickle.loads(_two_in_one(Evil(marker)))
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", [*HOLED, *MENDED])
def test_the_code_in_a_pickle_never_runs(
    form: str, version: str, marker: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    own = torch.serialization.load

    def load(*args: Any, **options: Any) -> Any:
        opened.append(args)
        assert options["weights_only"] is True
        return own(*args, **options)

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.serialization, "load", load)
    content = FORMS[form](Evil(marker))
    (models / "ViT-B-32-mine.pt").write_bytes(content)
    (models / "dino").mkdir()
    (models / "dino" / "pytorch_model.bin").write_bytes(content)
    (models / "dino" / "config.json").write_text('{"model_type": "vit"}')
    for where in (load_clip, "ViT-B-32:mine"), (load_clip, "ViT-B-32-mine.pt"), (load_dino, "dino"):
        with pytest.raises(EncoderError) as error:
            where[0](where[1], Source(models, pickles=True))
        assert str(models) not in str(error.value)
    assert not marker.exists()
    if version in HOLED:
        assert opened == []
        assert "cannot read one safely (CVE-" in str(error.value)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_is_read_nowhere_but_below_the_owner_s_folder(
    form: str, marker: Path, models: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "ViT-B-32-mine.pt"
    outside.write_bytes(FORMS[form](Evil(marker)))
    linked = []
    if sys.platform != "win32":  # where links are for administrators
        (models / "ViT-B-32-linked.pt").symlink_to(outside)
        linked = [("ViT-B-32-linked", Source(models, pickles=True))]
    for name, source in (
        *linked,
        (str(outside), Source.of_owner(models)),
        ("ViT-B-32-mine", Source(tmp_path)),
    ):
        with pytest.raises(EncoderError, match="is a pickle, which may run code"):
            load_clip(name, source)
    assert not marker.exists()


@pytest.mark.parametrize("version", HOLED)
def test_a_torch_with_an_advisory_is_named(version: str) -> None:
    assert "CVE-2026-24747" in pickle_holes(version)
    assert ("CVE-2025-32434" in pickle_holes(version)) is not version.startswith(("2.6", "2.9", "2.10"))


@pytest.mark.parametrize("version", MENDED)
def test_a_torch_without_one_has_none(version: str) -> None:
    assert pickle_holes(version) == []


def test_plain_weights_are_read_from_a_pickle_where_that_is_safe(models: Path) -> None:
    for name, content in (("a", STATE), ("b", {"state_dict": STATE, "epoch": 3}), ("c", {"model_state_dict": STATE})):
        torch.save(content, models / f"{name}.pt")
        found = weights.state_dict(models / f"{name}.pt", Source(models, pickles=True))
        assert torch.equal(found["weight"], torch.ones(2))


def test_the_host_s_own_check_has_its_say_first(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, models / "a.pt")
    order: list[str] = []
    own = torch.serialization.load
    monkeypatch.setattr(torch.serialization, "load", lambda *a, **o: order.append("read") or own(*a, **o))
    weights.state_dict(models / "a.pt", Source(models, pickles=True, check_pickle=lambda file: order.append("check")))
    assert order == ["check", "read"]

    def refuse(file: Any) -> None:
        raise RuntimeError(f"bad file inside {file.name}")

    with pytest.raises(EncoderError, match=r"^models/dynfuse/a\.pt is refused by the WebUI's own check"):
        weights.state_dict(models / "a.pt", Source(models, pickles=True, check_pickle=refuse))
    assert order == ["check", "read"]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
def test_the_file_that_is_checked_is_the_file_that_is_read(models: Path, marker: Path) -> None:
    file = models / "a.pt"
    torch.save(STATE, file)
    other = models / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)

    def swap(handle: Any) -> None:
        assert zipfile.is_zipfile(handle)
        other.replace(file)

    found = weights.state_dict(file, Source(models, pickles=True, check_pickle=swap))
    assert torch.equal(found["weight"], torch.ones(2))


def test_a_safetensors_file_is_opened_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(models / "dino")
    opened: list[str] = []
    own = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, **o: opened.append(Path(path).name) or own(path, **o))
    monkeypatch.setattr(safetensors.torch, "load_file", None)
    load_dino("dino", Source(models))
    assert opened == ["model.safetensors"]


def test_a_damaged_file_is_named_without_its_folders(models: Path) -> None:
    (models / "sub").mkdir()
    (models / "sub" / "x.safetensors").write_bytes(b"no")
    with pytest.raises(EncoderError, match=r"^models/dynfuse/sub/x\.safetensors is not a whole safetensors file$"):
        weights.state_dict(models / "sub" / "x.safetensors", Source(models))


def test_what_is_no_regular_file_of_weights_is_not_found(models: Path, tmp_path: Path) -> None:
    (models / "notes.txt").write_text("x")
    save_file(STATE, tmp_path / "near.safetensors")
    assert weights.find(["notes.txt", "", "near"], Source(models)) is None
    assert weights.find(["near"], Source.of_owner(tmp_path)) == tmp_path / "near.safetensors"
