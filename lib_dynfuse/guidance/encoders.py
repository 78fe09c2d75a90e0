"""CLIP (open_clip) and DINO (transformers): pictures and prompts as unit vectors, with a gradient to the picture.

Weights come from a folder or a file of the user's, from the WebUI's models/dynfuse, or from the model hub. Loading
takes seconds and may download: never do it inside a sampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib_dynfuse.guidance import weights
from lib_dynfuse.guidance.clip_without_open_clip import open_clip_or_this
from lib_dynfuse.guidance.libraries import EncoderError, library, missing_operators_skipped
from lib_dynfuse.guidance.precision import without_autocast
from lib_dynfuse.guidance.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, from_open_clip, from_transformers

__all__ = ["ClipEncoder", "DinoEncoder", "Encoder", "EncoderError", "load_clip", "load_dino"]

_CLIP_CONFIG, _DINO_CONFIG, _DINO_PICTURES = "open_clip_config.json", "config.json", "preprocessor_config.json"
# Of an architecture's published weights, those that are taken where a person names none: the first that begins so.
_PUBLISHED = ("laion2b", "datacomp", "openai", "")
# The class of transformers that reads each kind of DINO.
_DINO_CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
# Weights that a model has and no embedding needs.
_NOT_NEEDED = ("logit_scale", "logit_bias", "attn_mask", "position_ids", "pooler.", "mask_token")


class Encoder(Protocol):
    """Pictures as unit vectors. `name` says whose vectors: those of different encoders don't compare."""

    name: str

    def image(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in 0..1 -> [B, D] float32 of length 1, differentiable."""
        ...

    def to(self, device: torch.device | str) -> None:
        """Move the weights, as from the GPU while nothing is generated."""
        ...


class _Frozen:
    """A model that is only looked through: no gradient of its parameters, float32 out whatever is inside."""

    def __init__(self, name: str, model: Any, preprocess: Preprocess, device: torch.device | str, dtype: torch.dtype):
        self.name = name
        self.preprocess = preprocess
        self._dtype = dtype
        self._model = model.eval().requires_grad_(False)
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._model.to(device=self._device, dtype=self._dtype)

    def _prepared(self, images: Tensor) -> Tensor:
        return self.preprocess(images.to(self._device)).to(self._dtype)


class ClipEncoder(_Frozen):
    """A CLIP of open_clip's. Its text tower, a prompt's worth of work a picture, stays in main memory."""

    def __init__(
        self,
        name: str,
        model: Any,
        preprocess: Preprocess,
        tokenizer: Any,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(name, model, preprocess, device, dtype)
        self._tokenizer = tokenizer

    def to(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._model.visual.to(device=self._device, dtype=self._dtype)

    def image(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in 0..1 -> [B, D] float32 of length 1, differentiable."""
        with without_autocast(self._device):
            return normalize(self._model.encode_image(self._prepared(images)).float(), dim=-1)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, D] float32 of length 1. What is longer than the model's context is cut."""
        tokens = self._tokenizer(list(prompts), context_length=int(getattr(self._model, "context_length", 77)))
        with without_autocast(torch.device("cpu")):
            return normalize(self._model.encode_text(tokens).float(), dim=-1).to(self._device)


class DinoEncoder(_Frozen):
    """A DINO that transformers reads: its CLS token."""

    def image(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in 0..1 -> [B, D] float32 of length 1, differentiable."""
        pixels = self._prepared(images)
        trained = self._model.config.image_size
        sides = (trained, trained) if isinstance(trained, int) else tuple(trained)
        # DINO v2 does so by itself.
        stretch = self._model.config.model_type == "vit" and tuple(pixels.shape[-2:]) != sides
        with without_autocast(self._device):
            hidden = self._model(pixels, **({"interpolate_pos_encoding": True} if stretch else {})).last_hidden_state
            return normalize(hidden[:, 0].float(), dim=-1)


def load_clip(
    where: str, folder: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipEncoder:
    """A CLIP.

    `where`: an architecture of open_clip's, alone or with published weights, as in "ViT-B-32:laion2b_s34b_b79k"; a
    folder with open_clip_config.json and weights; a checkpoint file whose architecture is told before it, as in
    "ViT-B-32:my.safetensors", by a config beside it, or by its name. `folder`: looked in first, as models/dynfuse.

    Raises EncoderError that says what to put where.
    """
    arch, _, tag = where.partition(":")
    open_clip = open_clip_or_this()
    with _loading(f"CLIP {where}", _advice_clip(where, folder)):
        found = weights.find([where, *([tag, f"{arch}-{tag}"] if tag else [])], folder)
        if found is not None:
            return _local_clip(open_clip, found, arch if tag else "", device, dtype)
        config = open_clip.get_model_config(arch)
        if config is None:
            raise EncoderError(f"neither a folder, a file nor one of open_clip's architectures, as {_some(open_clip)}")
        tag = tag or _published(open_clip, arch)
        settings = open_clip.get_pretrained_cfg(arch, tag)
        if not settings:
            tags = open_clip.list_pretrained_tags_by_model(arch)
            raise EncoderError(f"no file, and no published weights of {arch}; there are: {', '.join(tags) or 'none'}")
        model = open_clip.create_model(arch, tag, force_quick_gelu=bool(settings.get("quick_gelu")))
        preprocess = from_open_clip(model.visual.image_size, settings)
        name = f"{arch} {tag} (open_clip)"
        return ClipEncoder(name, model, preprocess, open_clip.get_tokenizer(arch), device, dtype)


def _local_clip(open_clip: Any, found: Path, arch: str, device: torch.device | str, dtype: torch.dtype) -> ClipEncoder:
    path = weights.in_folder(found) if found.is_dir() else found
    beside = path.parent / _CLIP_CONFIG
    if not arch and beside.is_file():
        told = weights.read_json(beside)
        if "model_cfg" not in told:
            raise EncoderError(f"{beside} has no model_cfg")
        config, settings, title = told["model_cfg"], told.get("preprocess_cfg") or {}, found.stem
    else:
        arch = arch or _architecture(open_clip, found)
        config = open_clip.get_model_config(arch)
        if config is None:
            raise EncoderError(f"{arch} is not one of open_clip's architectures, as {_some(open_clip)}")
        settings, title = open_clip.get_pretrained_cfg(arch, _published(open_clip, arch)), found.stem
    tokens = config.get("text_cfg", {}).get("hf_tokenizer_name")
    model = _open_clip_model(open_clip, config)
    _fill(model, weights.state_dict(path), path)
    hub_or_beside = tokens if arch else str(path.parent)
    tokenizer = open_clip.tokenizer.HFTokenizer(hub_or_beside) if tokens else open_clip.tokenize
    name = f"{title} (open_clip)"
    return ClipEncoder(name, model, from_open_clip(model.visual.image_size, settings), tokenizer, device, dtype)


def _open_clip_model(open_clip: Any, config: dict[str, Any]) -> Any:
    """Made here, not by open_clip's factory: before version 3 that knows no folders."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if "multimodal_cfg" in config:
        return open_clip.coca_model.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def _fill(model: Any, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    if "text.positional_embedding" in own and "positional_embedding" in state:
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        state.pop(name, None)
    result = model.load_state_dict(state, strict=False)
    wrong = [*_needed(result.missing_keys), *_needed(result.unexpected_keys)]
    if wrong:
        raise EncoderError(f"{path} is of another architecture: {len(wrong)} weights differ, as {wrong[0]}")


def _needed(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(part in name for part in _NOT_NEEDED)]


def _architecture(open_clip: Any, found: Path) -> str:
    """The longest name of an architecture that the file's or folder's name begins with."""
    names = [name for name in open_clip.list_models() if f"{found.stem}-".startswith((f"{name}-", f"{name}_"))]
    if not names:
        raise EncoderError(
            f"{found} does not say its architecture: put {_CLIP_CONFIG} beside it or begin its name with one, "
            f"as {_some(open_clip)}"
        )
    return max(names, key=len)


def _published(open_clip: Any, arch: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(arch)
    return next((tag for start in _PUBLISHED for tag in tags if tag.startswith(start)), "")


def _some(open_clip: Any) -> str:
    return f"ViT-B-32 or ViT-L-14 ({len(open_clip.list_models())} in all)"


def _advice_clip(where: str, folder: Path | None) -> str:
    arch, _, tag = where.partition(":")
    title = f"{arch}-{tag}" if tag and not weights.is_path(tag) else Path(arch).name
    room = folder or Path("models/dynfuse")
    return (
        f"put the checkpoint at {room / title}.safetensors, or make a folder {room / title} with {_CLIP_CONFIG} "
        "and open_clip_model.safetensors"
    )


def load_dino(
    where: str, folder: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DinoEncoder:
    """A DINO (v1, or v2 where the installed transformers has it).

    `where`: a folder with config.json, weights and preprocessor_config.json, or a name on the hub, as in
    "facebook/dino-vits16". `folder`: looked in first, as models/dynfuse; there the name's last part is enough.

    Raises EncoderError that says what to put where.
    """
    title = where.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    transformers = library("transformers", "transformers")
    with _loading(f"DINO {where}", _advice_dino(title, folder)), missing_operators_skipped():
        found = weights.find([where, title], folder, files=False)
        source = str(found or where)
        if found is not None:
            # transformers would open it unasked, and one WebUI renames a file that fails to open.
            weights.check(weights.in_folder(found))
        from transformers.utils import cached_file

        offline = found is not None
        config = weights.read_json(Path(cached_file(source, _DINO_CONFIG, local_files_only=offline)))
        made = _dino_class(transformers, config)
        # DINO's checkpoints have no pooler: transformers would draw one at random.
        extra = {"add_pooling_layer": False} if config["model_type"] == "vit" else {}
        model, told = made.from_pretrained(source, local_files_only=offline, output_loading_info=True, **extra)
        if missing := _needed(sorted(told["missing_keys"])):
            raise EncoderError(f"{source} lacks {len(missing)} weights, as {missing[0]}")
        preprocess = _dino_preprocess(source, config, cached_file, offline)
        return DinoEncoder(f"{title} (transformers)", model, preprocess, device, dtype)


def _dino_class(transformers: Any, config: dict[str, Any]) -> Any:
    kind = config.get("model_type")
    if kind not in _DINO_CLASSES:
        raise EncoderError(f"its {_DINO_CONFIG} says {kind}, which is no DINO; known are {', '.join(_DINO_CLASSES)}")
    made = getattr(transformers, _DINO_CLASSES[kind], None)
    if made is None:
        raise EncoderError(
            f"the installed transformers {transformers.__version__} has no {_DINO_CLASSES[kind]}; "
            "a DINO v1 works there, as facebook/dino-vits16"
        )
    return made


def _dino_preprocess(source: str, config: dict[str, Any], cached_file: Any, offline: bool) -> Preprocess:
    try:
        path = cached_file(source, _DINO_PICTURES, local_files_only=offline)
    except OSError:
        path = None
    if path is not None:
        return from_transformers(weights.read_json(Path(path)))
    # As DINO's authors have it.
    if config["model_type"] != "vit":
        return Preprocess((256, 256), crop=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD, floor=True)
    side = int(config.get("image_size", 224))
    return Preprocess((side, side), resize="squash", mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _advice_dino(title: str, folder: Path | None) -> str:
    room = folder or Path("models/dynfuse")
    return f"make a folder {room / title} with {_DINO_CONFIG}, model.safetensors and {_DINO_PICTURES}"


@contextmanager
def _loading(what: str, advice: str) -> Iterator[None]:
    """Outside inference mode, whose tensors autograd refuses; whatever fails is said in a line, with what to do."""
    with torch.inference_mode(False):
        try:
            yield
        except EncoderError as error:
            raise EncoderError(f"{what}: {error}; {advice}") from error
        # Every library and version has errors of its own for what is not there or not whole.
        except Exception as error:
            raise EncoderError(f"{what} cannot be loaded ({_first_line(error)}); {advice}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
