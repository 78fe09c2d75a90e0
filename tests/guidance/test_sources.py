"""Which names of encoders may be used, what is fetched, and what is said where something is missing."""

from __future__ import annotations

import builtins
import json
import ntpath
import posixpath
import socket
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib_dynfuse.guidance import sources
from lib_dynfuse.guidance.dino_files import SINGLE_FILES
from lib_dynfuse.guidance.encoders import load_clip, load_dino
from lib_dynfuse.guidance.libraries import EncoderError, in_a_line
from lib_dynfuse.guidance.sources import CLIPS, DINOS, MissingError, Published, Source, is_plain, missing

PUBLISHED = {**CLIPS, **DINOS}
PLAIN = ["dino-vits16", "facebook/dino-vits16", "my clip/weights.safetensors", "ViT-B-32:laion2b_s34b_b79k", "狐.pt"]
FOREIGN = [
    "/etc/passwd",
    "//server/share/x",
    "\\\\server\\share\\x.pt",
    "\\\\?\\C:\\x.pt",
    "C:\\x.pt",
    "C:x.pt",
    "c:/x.pt",
    "../x.pt",
    "a/../../x.pt",
    "a/..",
    "a/.. /x",
    "..",
    ".",
    "./x",
    "a//b",
    "a\\..\\b",
    "~/x.pt",
    "~root/x.pt",
    "file:///etc/passwd",
    "https://example.org/x.safetensors",
    "ViT-B-32:/etc/passwd",
    "ViT-B-32:../x.pt",
    "ViT-B-32:C:\\x.pt",
    "ViT-B-32:",
    ":x",
    "x.pt:stream:$DATA",
    "NUL",
    "con.pt",
    "a/com1",
    "x.pt\0.safetensors",
    "x\n",
    "\ud800",
    "",
    "x" * 201,
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every host that is looked for, while none is found."""
    asked: list[Any] = []

    def refuse(host: Any, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


class Hub:
    """In the place of the model hub: `asked` has what was to be downloaded, `files` what it has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.looked: list[str] = []
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cached)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.file)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def cached(self, repository: str, name: str) -> None:
        self.looked.append(f"{repository}/{name}")

    def file(self, repository: str, name: str) -> str:
        self.asked.append(f"{repository}/{name}")
        if not (self.folder / repository / name).is_file():
            raise FileNotFoundError(f"{self.folder}/secret/{name}")
        return str(self.folder / repository / name)

    def snapshot(self, repository: str, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith(ending) for pattern in allow_patterns for ending in (".py", ".bin", "*"))
        return str(Path(self.file(repository, "config.json")).parent)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "hub")


@pytest.mark.parametrize("name", PLAIN)
def test_a_name_below_the_folder_or_on_the_hub_is_plain(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize("name", FOREIGN, ids=ascii)
def test_what_could_lead_elsewhere_is_not(name: str) -> None:
    assert not is_plain(name)


@given(st.one_of(st.text(max_size=30), st.text("./\\:~ abcCNUL1-_", max_size=12)))
def test_a_plain_name_stays_below_its_folder_on_every_system(name: str) -> None:
    if not is_plain(name):
        return
    for part in (name.partition(":")[2], name.replace(":", "-")):
        assert posixpath.normpath(f"/models/{part}").startswith("/models")
        assert ntpath.normpath(ntpath.join("M:\\models", part)).startswith("M:\\models")
        assert not PurePosixPath(part).is_absolute()
        assert not PureWindowsPath(part).drive
        assert not PureWindowsPath(part).root
        assert ".." not in part.replace("\\", "/").split("/")


@pytest.mark.parametrize("load", [load_clip, load_dino])
def test_a_foreign_name_is_refused_with_one_answer_before_anything_is_touched(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"")
    touched: list[Any] = []

    def touch(*args: Any, **more: Any) -> Any:
        touched.append(args)
        raise AssertionError(args)

    for owner, name in ((Path, "is_dir"), (Path, "is_file"), (Path, "stat"), (Path, "open"), (builtins, "open")):
        monkeypatch.setattr(owner, name, touch)
    monkeypatch.setattr("lib_dynfuse.guidance.encoders.library", touch)
    answers = set()
    for name in (*FOREIGN, str(tmp_path / "there.safetensors"), str(tmp_path / "not-there.safetensors")):
        with pytest.raises(EncoderError) as error:
            load(name, Source(tmp_path / "models"))
        answers.add(str(error.value))
    monkeypatch.undo()
    assert touched == []
    (answer,) = answers
    assert answer.startswith("this ")
    assert "models/dynfuse" in answer


@pytest.mark.parametrize(
    ("load", "name"), [(load_dino, "stranger/model"), (load_dino, "hf-hub:a/b"), (load_clip, "ViT-L-14:openai")]
)
def test_only_what_is_published_or_allowed_is_asked_of_the_hub(load: Any, name: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"^this (CLIP|DINO) may not be used"):
        load(name, Source(tmp_path, download=True))
    assert hub.looked == []
    with pytest.raises(EncoderError, match="could not be reached"):
        load("stranger/model" if load is load_dino else "ViT-L-14:openai", Source(
            tmp_path, download=True, allowed=("stranger/model", "ViT-L-14:openai")
        ))  # fmt: skip
    assert hub.asked


@pytest.mark.parametrize("name", [*CLIPS, "ViT-B-32"])
def test_without_consent_nothing_is_fetched_and_what_to_put_where_is_said(
    name: str, hub: Hub, tmp_path: Path, no_network: list[Any]
) -> None:
    with pytest.raises(MissingError) as error:
        load_clip(name, Source(tmp_path, consent="tick a box"))
    assert str(error.value) == (
        "CLIP is not on this machine: put https://huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/resolve/main/"
        "open_clip_model.safetensors (605 MB) as models/dynfuse/ViT-B-32-laion2b_s34b_b79k.safetensors, or tick a box"
    )
    assert hub.asked == []
    assert no_network == []


def test_the_real_hub_s_client_asks_nothing_without_consent(
    no_network: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    for load, name in ((load_clip, "ViT-B-32"), (load_dino, "facebook/dino-vits16"), (load_dino, "dinov2-small")):
        with pytest.raises(MissingError):
            load(name, Source(tmp_path))
    assert no_network == []
    with pytest.raises(EncoderError, match="could not be reached"):
        load_dino("facebook/dino-vits16", Source(tmp_path, download=True))
    assert no_network


def test_what_the_hub_does_not_have_is_said_without_a_path(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(EncoderError) as error:
        load_dino("facebook/dino-vits16", Source(tmp_path, download=True))
    assert "vit_small_patch16_224.dino" in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_nothing_but_safetensors_and_settings_is_asked_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    allowed = ("stranger/model", "ViT-L-14:openai", "xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k")
    for load, name in ((load_clip, "ViT-B-32"), (load_dino, "facebook/dino-vits16"), (load_dino, "dinov2-small"),
                       (load_dino, "stranger/model"), *((load_clip, one) for one in allowed[1:])):  # fmt: skip
        with pytest.raises(EncoderError):
            load(name, Source(tmp_path, download=True, allowed=allowed))
    assert len(hub.asked) >= 5
    assert all(name.endswith((".safetensors", ".json")) for name in hub.looked)


def test_both_missing_ones_are_one_line() -> None:
    line = missing([*CLIPS.values(), DINOS["facebook/dino-vits16"]], Source(consent="say yes"))
    assert "\n" not in line
    assert line.startswith("CLIP and DINO are not on this machine: put https://huggingface.co/laion/")
    assert line.count("https://") == 2
    assert "(87 MB) as models/dynfuse/dino-vits16.safetensors" in line
    assert line.endswith(", or say yes")


def test_the_sizes_that_are_told_are_those_of_the_weights() -> None:
    import open_clip

    def megabytes(model: torch.nn.Module) -> int:
        return round(sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6)

    made = {"vit": transformers.ViTModel, "dinov2": transformers.Dinov2Model}
    with torch.device("meta"):
        for name, published in CLIPS.items():
            config = open_clip.get_model_config(name.partition(":")[0])
            assert megabytes(open_clip.CLIP(**config)) == published.megabytes
        for name, published in DINOS.items():
            config = SINGLE_FILES[name.rpartition("/")[2]]
            kind = made[config["model_type"]]
            extra = {"add_pooling_layer": False} if config["model_type"] == "vit" else {}
            assert megabytes(kind(kind.config_class(**config), **extra)) == published.megabytes


def test_every_published_dino_is_known_as_a_single_file() -> None:
    for name, published in DINOS.items():
        assert published.local == f"{name.rpartition('/')[2]}.safetensors"
        assert name.rpartition("/")[2] in SINGLE_FILES
    assert all(published.file.endswith(".safetensors") for published in PUBLISHED.values())


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_dino_in_timm_s_file_sees_as_timm_does(
    where: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two of its twelve layers, for speed."""
    shallow = {**SINGLE_FILES["dino-vits16"], "num_hidden_layers": 2}
    monkeypatch.setitem(SINGLE_FILES, "dino-vits16", shallow)  # type: ignore[arg-type]
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, depth=2).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    published = DINOS["facebook/dino-vits16"]
    file = tmp_path / published.local if where == "folder" else hub.folder / published.repository / published.file
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(theirs.state_dict(), file)
    encoder = load_dino("facebook/dino-vits16", Source(tmp_path, download=where == "hub"))
    assert encoder.name == "dino-vits16 (transformers)"
    image = torch.rand(1, 3, 224, 224)
    token = theirs.forward_features((image - torch.tensor(encoder.preprocess.mean).view(1, 3, 1, 1)) / torch.tensor(
        encoder.preprocess.std).view(1, 3, 1, 1))[:, 0]  # fmt: skip
    torch.testing.assert_close(encoder.image(image), torch.nn.functional.normalize(token, dim=-1), atol=2e-5, rtol=1e-3)
    assert bool(hub.asked) is (where == "hub")


def test_a_single_file_that_says_nothing_of_its_kind_is_told(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    with pytest.raises(EncoderError, match=r"models/dynfuse/mine.safetensors does not say what it is"):
        load_dino("mine", Source(tmp_path))


def test_a_config_may_not_send_for_code_or_models(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    plain = {"layers": 1, "width": 8, "patch_size": 8, "image_size": 32}
    for vision, more, said in (
        ({"timm_model_name": "hf-hub:stranger/model", "image_size": 32}, {}, "taken from elsewhere"),
        (plain, {"hf_model_name": "stranger/text"}, "text tower"),
        (plain, {"hf_model_name": "../../x"}, "text tower"),
    ):
        config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {**text, **more}}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(EncoderError, match=said):
            load_clip("clip", Source(tmp_path))
    assert hub.asked == []


def test_the_owner_s_source_says_how_to_fetch() -> None:
    assert Source.of_owner(Path("models/dynfuse")).consent == "have it downloaded with --download"
    assert Source.of_owner(Path("models/dynfuse"), download=True).consent == ""


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("[Errno 2] No such file: '/home/ann lee/models/x.bin'", "[Errno 2] No such file: 'x.bin'"),
        ("cannot open C:\\Users\\Ann\\x.pt.", "cannot open x.pt"),
        ('"\\\\server\\share\\a b\\x.pt" is gone', '"x.pt" is gone'),
        ("at ~/models/x", "at x"),
        ("see https://huggingface.co/a/b and and/or", "see https://huggingface.co/a/b and and/or"),
        ("path=/srv/x/y, (/srv/z)", "path=y, (z)"),
        ("first\nsecond", "first"),
    ],
)
def test_what_a_library_says_is_a_line_without_folders(said: str, shown: str) -> None:
    assert in_a_line(OSError(said)) == f"OSError: {shown}"


def test_a_long_line_ends_after_a_word() -> None:
    assert in_a_line(ValueError("word " * 100), 22) == "ValueError: word word word word ..."
    assert in_a_line(KeyError()) == "KeyError"


def test_a_repository_s_status_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        error = RuntimeError("long story")
        error.response = SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(EncoderError, match=r"x\.safetensors answered 401$"):
        sources.fetched(Published("CLIP", "a/b", "x.safetensors", "x"), Source(download=True))
