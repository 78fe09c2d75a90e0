"""CLIP (open_clip) and DINO (transformers): pictures and prompts as unit vectors, with a gradient to the picture.

Weights come from a folder or a file below models/dynfuse or, as one safetensors file, from the model hub; which names
may be used and what may be fetched is the Source's to say. Loading takes seconds: never do it inside a sampler.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib_dynfuse.guidance import weights
from lib_dynfuse.guidance.clip_without_open_clip import open_clip_or_this
from lib_dynfuse.guidance.dino_files import SINGLE_FILES, in_transformers_names
from lib_dynfuse.guidance.libraries import EncoderError, in_a_line, library, missing_operators_skipped
from lib_dynfuse.guidance.precision import without_autocast
from lib_dynfuse.guidance.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, from_open_clip, from_transformers
from lib_dynfuse.guidance.sources import (
    CLIPS,
    DINOS,
    MissingError,
    NotAllowedError,
    Published,
    Source,
    fetched,
    text_files,
)

__all__ = ["ClipEncoder", "DinoEncoder", "Encoder", "EncoderError", "load_clip", "load_dino"]

_CLIP_CONFIG = "open_clip_config.json"
_DINO_MODEL, _DINO_CONFIG, _DINO_PICTURES = "model.safetensors", "config.json", "preprocessor_config.json"
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
    where: str,
    source: Source | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipEncoder:
    """A CLIP.

    `where`: a folder with open_clip_config.json and weights; a checkpoint file whose architecture is told before it, as
    in "ViT-B-32:my.safetensors", by a config beside it, or by its name; or an architecture of open_clip's, alone or
    with published weights, as in "ViT-B-32:laion2b_s34b_b79k". `source`: which of them may be used, and from where.

    Raises EncoderError that says what is wrong, MissingError where the weights would have to be fetched first.
    """
    source = source or Source()
    source.check("CLIP", where)
    arch, _, tag = where.partition(":")
    names = [tag, f"{arch}-{tag}"] if tag else [where]
    open_clip = open_clip_or_this()
    with _loading("CLIP", where, source):
        found = weights.find([*([where] if source.paths else []), *names], source)
        if found is not None:
            return _local_clip(open_clip, found, arch if tag else "", source, device, dtype)
        return _hub_clip(open_clip, where, source, device, dtype)


def _local_clip(
    open_clip: Any, found: Path, arch: str, source: Source, device: torch.device | str, dtype: torch.dtype
) -> ClipEncoder:
    path = weights.in_folder(found, source) if found.is_dir() else found
    beside = path.parent / _CLIP_CONFIG
    if not arch and beside.is_file():
        told = weights.read_json(beside, source)
        if not isinstance(told.get("model_cfg"), dict):
            raise EncoderError(f"{source.shown(beside)} has no model_cfg")
        config, settings = told["model_cfg"], told.get("preprocess_cfg") or {}
        folder = path.parent
    else:
        named_by_file = not arch
        arch = arch or _architecture(open_clip, found, source)
        config, settings = _config(open_clip, arch), open_clip.get_pretrained_cfg(arch, _published(open_clip, arch))
        if _has_foreign_tower(config) and not (source.paths or named_by_file):
            raise EncoderError(f"{arch} has a tower of another library: put {_CLIP_CONFIG} beside the file")
        folder = None
    state = weights.state_dict(path, source)
    if not _has_foreign_tower(config):
        # Sizes are compared before there is memory for them: who names the architecture may be a stranger.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _fill(_open_clip_model(open_clip, config, folder, source)[0], dict(state), source.shown(path))
    model, tokenizer = _open_clip_model(open_clip, config, folder, source)
    _fill(model, state, source.shown(path))
    preprocess = from_open_clip(model.visual.image_size, settings)
    return ClipEncoder(f"{found.stem} (open_clip)", model, preprocess, tokenizer, device, dtype)


def _has_foreign_tower(config: dict[str, Any]) -> bool:
    """Whether a part of it is built, and perhaps fetched, by timm or transformers."""
    return "timm_model_name" in config["vision_cfg"] or "hf_model_name" in config["text_cfg"]


def _hub_clip(
    open_clip: Any, where: str, source: Source, device: torch.device | str, dtype: torch.dtype
) -> ClipEncoder:
    arch, _, tag = where.partition(":")
    if not tag:
        known = [name for name in (*CLIPS, *source.allowed) if name.startswith(f"{arch}:")]
        any_will_do = source.paths or arch in source.allowed
        tag = known[0].partition(":")[2] if known else _published(open_clip, arch) if any_will_do else ""
    name = f"{arch}:{tag}"
    if not (source.may_fetch(name, CLIPS) or source.may_fetch(where, CLIPS)):
        raise source.refusal("CLIP")
    config = {**_config(open_clip, arch)}
    settings = open_clip.get_pretrained_cfg(arch, tag)
    if not settings:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        raise EncoderError(f"no file, and no published weights of {arch}; there are: {', '.join(tags) or 'none'}")
    wanted = CLIPS.get(name)
    if wanted is None:
        repository, _, file = settings.get("hf_hub", "").rpartition("/")
        if not repository:
            raise EncoderError(f"the weights {tag} of {arch} are not on the model hub")
        file = file if file.endswith(weights.SAFE) else "open_clip_model.safetensors"
        wanted = Published("CLIP", repository, file, f"{arch}-{tag}{weights.SAFE}")
    if settings.get("quick_gelu"):
        config["quick_gelu"] = True
    state = weights.state_dict(fetched(wanted, source), source)
    model, tokenizer = _open_clip_model(open_clip, config, None, source)
    _fill(model, state, wanted.file)
    preprocess = from_open_clip(model.visual.image_size, settings)
    return ClipEncoder(f"{arch} {tag} (open_clip)", model, preprocess, tokenizer, device, dtype)


def _config(open_clip: Any, arch: str) -> dict[str, Any]:
    config: dict[str, Any] | None = open_clip.get_model_config(arch)
    if config is None:
        raise EncoderError(f"there is no such file, and no such architecture of open_clip's, as {_some(open_clip)}")
    return config


def _open_clip_model(open_clip: Any, config: dict[str, Any], beside: Path | None, source: Source) -> tuple[Any, Any]:
    """An empty model and its tokenizer, whose files lie in the folder `beside` or come from the hub.

    Made here, not by open_clip's factory: that fetches whatever a config names.
    """
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    text, vision = config["text_cfg"], config["vision_cfg"]
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "timm_model_name" in vision:
        if ":" in vision["timm_model_name"]:
            raise EncoderError("its image tower would be taken from elsewhere, as its config says")
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_name"] = str(text_files("CLIP's text tower", text["hf_model_name"], "config.json", source))
        text["hf_model_pretrained"] = False
    tokenizer = open_clip.tokenize
    if tokens := text.get("hf_tokenizer_name"):
        folder = beside or text_files("CLIP's tokenizer", tokens, "tokenizer.json", source)
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), **text.get("tokenizer_kwargs", {}))
    if "multimodal_cfg" in config:
        return open_clip.coca_model.CoCa(**config), tokenizer
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config), tokenizer


def _fill(model: Any, state: dict[str, Tensor], shown: str) -> None:
    own = model.state_dict()
    if "text.positional_embedding" in own and "positional_embedding" in state:
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        state.pop(name, None)
    sizes = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    if not sizes:
        result = model.load_state_dict(state, strict=False)
        sizes = [*_needed(result.missing_keys), *_needed(result.unexpected_keys)]
    if sizes:
        raise EncoderError(f"{shown} is of another architecture: {len(sizes)} weights differ, as {sizes[0][:100]}")


def _needed(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(part in name for part in _NOT_NEEDED)]


def _architecture(open_clip: Any, found: Path, source: Source) -> str:
    """The longest name of an architecture that the file's or folder's name begins with."""
    names = [name for name in open_clip.list_models() if f"{found.stem}-".startswith((f"{name}-", f"{name}_"))]
    if not names:
        raise EncoderError(
            f"{source.shown(found)} does not say its architecture: put {_CLIP_CONFIG} beside it or begin its name with "
            f"one, as {_some(open_clip)}"
        )
    return max(names, key=len)


def _published(open_clip: Any, arch: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(arch)
    return next((tag for start in _PUBLISHED for tag in tags if tag.startswith(start)), "")


def _some(open_clip: Any) -> str:
    return f"ViT-B-32 or ViT-L-14 ({len(open_clip.list_models())} in all)"


def load_dino(
    where: str,
    source: Source | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DinoEncoder:
    """A DINO (v1, or v2 where the installed transformers has it).

    `where`: a folder with config.json, weights and preprocessor_config.json; one of the published models as a single
    file, as in dino-vits16.safetensors; or a name on the hub, as in "facebook/dino-vits16", of which the last part is
    enough where it lies in the folder. `source`: which of them may be used, and from where.

    Raises EncoderError that says what is wrong, MissingError where the weights would have to be fetched first.
    """
    source = source or Source()
    source.check("DINO", where)
    title = where.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    transformers = library("transformers", "transformers")
    with _loading("DINO", where, source), missing_operators_skipped():
        found = weights.find([where, title], source)
        config, pictures, path = (
            _local_dino(found, source) if found is not None else _hub_dino(transformers, where, title, source)
        )
        shown = source.shown(path)
        model = _dino_model(transformers, config, weights.state_dict(path, source), shown)
        title = title.removesuffix(path.suffix) if found is not None and found.is_file() else title
        return DinoEncoder(f"{title} (transformers)", model, _dino_preprocess(config, pictures), device, dtype)


_Settings = dict[str, Any]


def _local_dino(found: Path, source: Source) -> tuple[_Settings, _Settings | None, Path]:
    """The model's settings, its pictures' where they are there, and the file of its weights."""
    if found.is_file():
        if found.stem not in SINGLE_FILES:
            raise EncoderError(
                f"{source.shown(found)} does not say what it is: only {' and '.join(SINGLE_FILES)} are known by their "
                f"names; make a folder with it, {_DINO_CONFIG} and {_DINO_PICTURES}"
            )
        return SINGLE_FILES[found.stem], None, found
    if not (found / _DINO_CONFIG).is_file():
        raise EncoderError(f"{source.shown(found)} has no {_DINO_CONFIG}")
    pictures = found / _DINO_PICTURES
    told = weights.read_json(pictures, source) if pictures.is_file() else None
    return weights.read_json(found / _DINO_CONFIG, source), told, weights.in_folder(found, source)


def _hub_dino(transformers: Any, where: str, title: str, source: Source) -> tuple[_Settings, _Settings | None, Path]:
    known = next((name for name in DINOS if title == name.rpartition("/")[2]), where)
    if not source.may_fetch(known, DINOS):
        raise source.refusal("DINO")
    if known in DINOS:
        _dino_class(transformers, SINGLE_FILES[title])  # else it would be fetched in vain
        return SINGLE_FILES[title], None, fetched(DINOS[known], source)
    if source.paths and where.count("/") != 1:
        raise EncoderError(f"{title}: there is no such folder, and no such name on the model hub")
    files = [Published("DINO", where, name, f"{title}/{name}") for name in (_DINO_MODEL, _DINO_CONFIG, _DINO_PICTURES)]
    path, config, pictures = (fetched(one, source) for one in files)
    return weights.read_json(config, source), weights.read_json(pictures, source), path


def _dino_model(transformers: Any, config: dict[str, Any], state: dict[str, Tensor], shown: str) -> Any:
    made = _dino_class(transformers, config)
    # What else stands in a config, as a way of quantising, has no say in how these weights are read.
    names = made.config_class().to_dict()
    settings = made.config_class(**{name: value for name, value in config.items() if name in names})
    # DINO's checkpoints have no pooler: transformers would draw one at random.
    extra = {"add_pooling_layer": False} if config["model_type"] == "vit" else {}
    model, told = made.from_pretrained(
        None,
        config=settings,
        state_dict=in_transformers_names(state),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **extra,
    )
    if missing := _needed(sorted(told["missing_keys"])):
        raise EncoderError(f"{shown} lacks {len(missing)} weights, as {missing[0]}")
    if differing := [str(one[0] if isinstance(one, tuple) else one) for one in told["mismatched_keys"]]:
        raise EncoderError(f"{shown} is of another size: {len(differing)} weights differ, as {differing[0]}")
    return model


def _dino_class(transformers: Any, config: dict[str, Any]) -> Any:
    kind = config.get("model_type")
    if kind not in _DINO_CLASSES:
        raise EncoderError(
            f"its {_DINO_CONFIG} says {str(kind)[:100]}, which is no DINO; known are {', '.join(_DINO_CLASSES)}"
        )
    made = getattr(transformers, _DINO_CLASSES[kind], None)
    if made is None:
        raise EncoderError(
            f"the installed transformers {transformers.__version__} has no {_DINO_CLASSES[kind]}; "
            "a DINO v1 works there, as facebook/dino-vits16"
        )
    return made


def _dino_preprocess(config: dict[str, Any], pictures: dict[str, Any] | None) -> Preprocess:
    if pictures is not None:
        return from_transformers(pictures)
    # As DINO's authors have it.
    if config["model_type"] != "vit":
        return Preprocess((256, 256), crop=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD, floor=True)
    side = int(config.get("image_size", 224))
    return Preprocess((side, side), resize="squash", mean=IMAGENET_MEAN, std=IMAGENET_STD)


@contextmanager
def _loading(kind: str, where: str, source: Source) -> Iterator[None]:
    """Outside inference mode, whose tensors autograd refuses; whatever fails is said in a line, with the name where it
    is its owner's who reads it."""
    if source.paths:
        kind = f"{kind} {where}"
    with torch.inference_mode(False):
        try:
            yield
        except (MissingError, NotAllowedError):
            raise
        except EncoderError as error:
            raise EncoderError(f"{kind}: {error}") from error
        # Every library and version has errors of its own for what is not whole.
        except Exception as error:
            raise EncoderError(f"{kind} cannot be loaded: {in_a_line(error)}") from error
