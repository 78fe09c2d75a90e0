"""CLIP and DINO encoders: what they load from, that they look as their libraries do, and what they say when they can't.

The models are small and their weights random; the libraries' own processors are the oracle.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lib_dynfuse.guidance import encoders
from lib_dynfuse.guidance.encoders import EncoderError, load_clip, load_dino
from lib_dynfuse.guidance.preprocess import from_open_clip, from_transformers
from lib_dynfuse.guidance.sources import Source

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
DINO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
PICTURES = {"size": 32, "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# None is much taller than wide: there the newest Pillow resizes down before across, and others don't.
SHAPES = [(64, 64), (75, 61), (45, 110), (20, 27), (32, 32)]
# One step of 1/255 in either of two passes, over the smallest std.
ROUNDING = 3 / 255 / 0.22


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise with hard edges, where resizing overshoots."""
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(3, -(-height // 5), -(-width // 5), generator=random)
    large = small.gt(0.5).float().repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    noisy = large * 0.9 + torch.rand(3, height, width, generator=random) * 0.1
    return Image.fromarray((noisy * 255).byte().permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255


def random_clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**CLIP).eval()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as models/dynfuse is."""
    room = tmp_path_factory.mktemp("dynfuse")
    (room / "small-clip").mkdir()
    settings = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}
    (room / "small-clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP, "preprocess_cfg": settings})
    )
    save_file(random_clip().state_dict(), room / "small-clip" / "open_clip_model.safetensors")
    torch.manual_seed(1)
    transformers.ViTModel(transformers.ViTConfig(**DINO), add_pooling_layer=False).save_pretrained(room / "small-dino")
    (room / "small-dino" / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    return room


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_picture_is_prepared_as_open_clip_does(shape: tuple[int, int], resize: str, interpolation: str) -> None:
    settings = {"resize_mode": resize, "interpolation": interpolation, "fill_color": 51}
    image = picture(*shape)
    theirs = image_transform_v2(PreprocessCfg(size=32, **settings), is_train=False)(image)
    ours = from_open_clip(32, settings)(tensor(image))[0]
    torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0)
    assert (ours - theirs).abs().mean() < ROUNDING / 8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 24}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}),
        ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}),
    ],
)
def test_a_picture_is_prepared_as_transformers_does(shape: tuple[int, int], processor: str, settings: dict) -> None:
    image = picture(*shape)
    theirs = getattr(transformers, processor)(**settings)(image, return_tensors="pt")["pixel_values"]
    ours = from_transformers({"image_processor_type": processor, **settings})(tensor(image))
    torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0)
    assert (ours - theirs).abs().mean() < ROUNDING / 8


def test_an_unknown_way_of_preparing_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="resample 1 is not known"):
        from_transformers({"resample": 1})
    with pytest.raises(ValueError, match="stretch is not known"):
        from_open_clip(32, {"resize_mode": "stretch"})


def test_clip_from_a_folder_embeds_pictures_and_prompts_as_open_clip_does(room: Path) -> None:
    encoder = load_clip("small-clip", Source(room))
    assert encoder.name == "small-clip (open_clip)"
    model = random_clip()
    pixels = torch.rand(2, 3, 32, 32)
    theirs = model.encode_image((pixels - 0.5) / 0.5, normalize=True)
    torch.testing.assert_close(encoder.image(pixels), theirs)
    prompts = ["a fox", "a rocket in ink, " * 20]
    theirs = model.encode_text(open_clip.tokenize(prompts, context_length=16), normalize=True)
    torch.testing.assert_close(encoder.text(prompts), theirs)


def test_dino_from_a_folder_gives_the_class_token_as_transformers_does(room: Path) -> None:
    encoder = load_dino("someone/small-dino", Source(room))
    assert encoder.name == "small-dino (transformers)"
    model = transformers.ViTModel.from_pretrained(room / "small-dino", add_pooling_layer=False).eval()
    image = picture(32, 32)
    processor = transformers.ViTImageProcessor.from_pretrained(room / "small-dino")
    token = model(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.image(tensor(image)), token / token.norm(dim=-1, keepdim=True))


@pytest.mark.skipif(not hasattr(transformers, "Dinov2Model"), reason="this transformers has no Dinov2Model")
def test_dino_v2_is_read_by_its_own_class(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**{**DINO, "image_size": 56, "mlp_ratio": 2})
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    encoder = load_dino(tmp_path.name, Source(tmp_path.parent))
    assert encoder.preprocess.crop == (224, 224)
    assert encoder.image(torch.rand(1, 3, 64, 64)).shape == (1, 32)


def test_a_vit_looks_at_the_size_that_its_pictures_file_says(room: Path, tmp_path: Path) -> None:
    transformers.ViTModel.from_pretrained(room / "small-dino", add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PICTURES, "size": 48}))
    assert load_dino(tmp_path.name, Source(tmp_path.parent)).image(torch.rand(1, 3, 64, 64)).shape == (1, 32)


def test_a_transformers_without_dino_v2_is_told(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.ViTModel.from_pretrained(room / "small-dino", add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2_with_registers"}))
    monkeypatch.setattr("lib_dynfuse.guidance.encoders._DINO_CLASSES", {"dinov2_with_registers": "NoSuchModel"})
    with pytest.raises(EncoderError, match="has no NoSuchModel; a DINO v1 works there"):
        load_dino(tmp_path.name, Source(tmp_path.parent))


def test_a_dino_that_transformers_cannot_read_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_dynfuse.guidance.encoders._DINO_CLASSES", {"dinov2": "NoSuchModel"})
    monkeypatch.setattr("lib_dynfuse.guidance.encoders.fetched", None)
    with pytest.raises(EncoderError, match="has no NoSuchModel; a DINO v1 works there"):
        load_dino("facebook/dinov2-small", Source(download=True))


@pytest.mark.parametrize("shape", [(64, 64), (40, 90)], ids=str)
def test_embeddings_have_length_one_and_each_picture_its_own_gradient(room: Path, shape: tuple[int, int]) -> None:
    for encoder in (load_clip("small-clip", Source(room)), load_dino("small-dino", Source(room))):
        images = torch.rand(3, 3, *shape, requires_grad=True)
        embedding = encoder.image(images)
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(3))
        assert embedding.dtype is torch.float32
        (gradient,) = torch.autograd.grad(embedding[1, 0], images)
        assert gradient[1].abs().sum() > 0
        assert gradient[[0, 2]].abs().sum() == 0
        torch.testing.assert_close(encoder.image(images[1:2]), embedding[1:2])


def test_the_gradient_is_that_of_finite_differences(room: Path) -> None:
    encoder = load_clip("small-clip", Source(room))
    # Far from 0 and 1, where a resized picture is cut off.
    images = torch.rand(1, 3, 48, 48) * 0.4 + 0.3
    direction = torch.randn_like(images)
    target = torch.nn.functional.normalize(torch.randn(12), dim=0)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((encoder.image(leaf) * target).sum(), leaf)
    step = 1e-2
    ends = [(encoder.image(images + sign * step * direction) * target).sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=1e-4)


def test_what_was_loaded_inside_inference_mode_still_has_gradients(room: Path) -> None:
    with torch.inference_mode():
        encoders = load_clip("small-clip", Source(room)), load_dino("small-dino", Source(room))
        with torch.inference_mode(False), torch.enable_grad():
            for encoder in encoders:
                images = torch.rand(1, 3, 40, 40, requires_grad=True)
                encoder.image(images).sum().backward()
                assert images.grad is not None


def test_the_model_is_frozen_and_autocast_does_not_reach_it(room: Path) -> None:
    for encoder in (load_clip("small-clip", Source(room)), load_dino("small-dino", Source(room))):
        assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
        assert not encoder._model.training
        images = torch.rand(1, 3, 32, 32)
        plain = encoder.image(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder.image(images), plain)


def test_half_weights_give_float32_near_the_full_ones(room: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    for load, name in ((load_clip, "small-clip"), (load_dino, "small-dino")):
        half = load(name, Source(room), dtype=torch.bfloat16).image(images)
        assert half.dtype is torch.float32
        assert (half * load(name, Source(room)).image(images)).sum(-1).min() > 0.99
    assert load_clip("small-clip", Source(room), dtype=torch.bfloat16).text(["a fox"]).dtype is torch.float32


@pytest.fixture
def known_architecture(tmp_path: Path) -> str:
    """The small CLIP as an architecture that open_clip knows by name."""
    path = tmp_path / "Tiny-8.json"
    path.write_text(json.dumps(CLIP))
    open_clip.add_model_config(path)
    return path.stem


@pytest.mark.parametrize("where", ["Tiny-8:fox", "Tiny-8", "Tiny-8-fox.pt", "Tiny-8:Tiny-8-fox.pt"])
def test_a_checkpoint_file_is_found_by_architecture_and_name(
    known_architecture: str, tmp_path: Path, where: str
) -> None:
    name = "Tiny-8" if where == "Tiny-8" else "Tiny-8-fox"
    state = {f"module.{key}": value for key, value in random_clip().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / f"{name}.pt")
    encoder = load_clip(where, Source(tmp_path, pickles=True))
    assert encoder.name == f"{name} (open_clip)"
    pixels = torch.rand(1, 3, 32, 32)
    normal = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normal)
    torch.testing.assert_close(encoder.image(pixels), random_clip().encode_image((pixels - mean) / std, normalize=True))


def test_published_weights_are_those_that_open_clip_loads(
    known_architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    save_file(random_clip().state_dict(), tmp_path / "open_clip_model.safetensors")

    def cached(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    published = {"openai": {}, "laion2b_one": {"mean": (0.5, 0.5, 0.5), "hf_hub": "laion/one/"}, "url": {"url": "x"}}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr(open_clip, "create_model", None)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda arch: list(published))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: published.get(tag, {}))
    owner, stranger = Source.of_owner(tmp_path / "none"), Source(tmp_path / "none", allowed=("Tiny-8",))
    pixels = torch.rand(1, 3, 32, 32)
    for source in (owner, stranger):
        encoder = load_clip("Tiny-8", source)
        assert encoder.name == "Tiny-8 laion2b_one (open_clip)"
        assert encoder.preprocess.mean == (0.5, 0.5, 0.5)
        torch.testing.assert_close(
            encoder.image(pixels), random_clip().encode_image(encoder.preprocess(pixels), normalize=True)
        )
    assert asked == [("laion/one", "open_clip_model.safetensors")] * 2
    with pytest.raises(EncoderError, match="no published weights of Tiny-8; there are: openai, laion2b_one"):
        load_clip("Tiny-8:laion3b", owner)
    with pytest.raises(EncoderError, match="the weights url of Tiny-8 are not on the model hub"):
        load_clip("Tiny-8:url", owner)
    with pytest.raises(EncoderError, match="may not be used"):
        load_clip("Tiny-8:laion2b_one", Source(tmp_path / "none"))


def test_an_unknown_architecture_is_told(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no such file, and no such architecture of open_clip's, as ViT-B-32"):
        load_clip("ViT-Nothing", Source.of_owner(tmp_path))
    with pytest.raises(EncoderError, match="this CLIP may not be used"):
        load_clip("ViT-Nothing", Source(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "extra"])
def test_a_damaged_clip_is_told_and_left_as_it_is(room: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    config, path = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    config.write_text((room / "small-clip" / config.name).read_text())
    state = random_clip().state_dict()
    whole = (room / "small-clip" / path.name).read_bytes()
    expected = {"cut": "not a whole safetensors file", "gone": "has no weights", "other": "another architecture"}
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        save_file({name: value for name, value in state.items() if "ln_final" not in name}, path)
    elif damage == "extra":
        save_file({**state, "visual.more": torch.zeros(1)}, path)
    before = sorted(folder.iterdir())
    with pytest.raises(EncoderError, match=expected.get(damage, "another architecture")):
        load_clip(folder.name, Source(folder.parent))
    assert sorted(folder.iterdir()) == before


def test_a_cut_dino_is_told_before_the_library_opens_it(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A WebUI renames a file that its library could not open."""
    folder = tmp_path / "dino"
    folder.mkdir()
    for path in (room / "small-dino").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", None)
    with pytest.raises(EncoderError, match="not a whole safetensors file"):
        load_dino(folder.name, Source(folder.parent))


def test_a_file_that_would_run_code_is_not_loaded(known_architecture: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"run": subprocess.Popen}}, tmp_path / "Tiny-8.pt")
    with pytest.raises(EncoderError, match="not a checkpoint of plain tensors"):
        load_clip("Tiny-8", Source(tmp_path, pickles=True))


def test_a_dino_with_weights_missing_is_not_filled_at_random(room: Path, tmp_path: Path) -> None:
    config = transformers.ViTConfig(**{**DINO, "num_hidden_layers": 1})
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((room / "small-dino" / "config.json").read_text())
    with pytest.raises(EncoderError, match=r"lacks 1\d weights"):
        load_dino(tmp_path.name, Source(tmp_path.parent))


def test_another_kind_of_model_is_no_dino(room: Path, tmp_path: Path) -> None:
    for path in (room / "small-dino").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(EncoderError, match="says bert, which is no DINO"):
        load_dino(tmp_path.name, Source(tmp_path.parent))


def test_importing_guidance_imports_neither_library() -> None:
    code = (
        "import sys, lib_dynfuse.guidance.encoders, lib_dynfuse.guidance.objectives\n"
        "print(*sorted({'open_clip', 'transformers', 'torchvision', 'PIL', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_architecture_is_compared_with_the_file_before_there_is_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "mine.safetensors")
    devices: list[str] = []
    real = torch.nn.Linear.__init__

    def counted(self: torch.nn.Linear, *arguments: Any, **settings: Any) -> None:
        real(self, *arguments, **settings)
        devices.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", counted)
    with pytest.raises(EncoderError, match=r"mine\.safetensors is of another architecture"):
        load_clip("ViT-H-14:mine", Source(tmp_path))
    assert set(devices) == {"meta"}


@pytest.mark.parametrize("arch", ["xlm-roberta-base-ViT-B-32", "ViT-B-16-SigLIP"])
def test_a_request_cannot_ask_for_another_librarys_towers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """What they fetch would be chosen by whoever names the architecture."""
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "mine.safetensors")
    monkeypatch.setattr(encoders, "text_files", None)
    with pytest.raises(EncoderError, match=f"{arch} has a tower of another library: put open_clip_config.json beside"):
        load_clip(f"{arch}:mine", Source(tmp_path, download=True))
