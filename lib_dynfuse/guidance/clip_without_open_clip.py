"""CLIP by transformers, for a WebUI that has no open_clip or one that is too old.

It has the functions of open_clip that are used here, under their names, and reads open_clip's settings and weights.
What it lacks: towers of other libraries, and architectures without an entry in its table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_dynfuse.guidance.libraries import EncoderError, library, missing_operators_skipped
from lib_dynfuse.guidance.preprocess import CLIP_MEAN, CLIP_STD

# What is used of open_clip; versions before 2.0 lack some of it.
_USED = ("get_model_config", "get_pretrained_cfg", "list_models", "list_pretrained_tags_by_model", "tokenize")
_QUICK = "-quickgelu"
_HALF = (0.5, 0.5, 0.5)
_STANDARD_TEXT = {512: (8, 12), 768: (12, 12), 1024: (16, 24), 1280: (20, 32)}
# By open_clip's name: embedding, patch, width, layers, width of a head, picture, ratio of the MLP. The text tower is as
# wide as the embedding.
_VISION = {
    "ViT-B-32": (512, 32, 768, 12, 64, 224, 4.0),
    "ViT-B-16": (512, 16, 768, 12, 64, 224, 4.0),
    "ViT-L-14": (768, 14, 1024, 24, 64, 224, 4.0),
    "ViT-L-14-336": (768, 14, 1024, 24, 64, 336, 4.0),
    "ViT-H-14": (1024, 14, 1280, 32, 80, 224, 4.0),
    "ViT-g-14": (1024, 14, 1408, 40, 88, 224, 4.3637),
    "ViT-bigG-14": (1280, 14, 1664, 48, 104, 224, 4.9231),
}
# Of each the published weights, and where on the hub they are.
_PUBLISHED = {
    "ViT-B-32": {
        "openai": "timm/vit_base_patch32_clip_224.openai/",
        "laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K/",
    },
    "ViT-B-16": {
        "openai": "timm/vit_base_patch16_clip_224.openai/",
        "laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K/",
    },
    "ViT-L-14": {
        "openai": "timm/vit_large_patch14_clip_224.openai/",
        "laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K/",
    },
    "ViT-L-14-336": {"openai": "timm/vit_large_patch14_clip_336.openai/"},
    "ViT-H-14": {"laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/"},
    "ViT-g-14": {"laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K/"},
    "ViT-bigG-14": {"laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k/"},
}
_INCEPTION = ("laion2b_s32b_b82k",)  # made with other means than CLIP's
_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VISION_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
_TEXT_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}

# Folders that may have CLIP's vocab.json and merges.txt: a WebUI's own, which only its adapter knows.
tokenizer_folders: Callable[[], Sequence[Path]] = tuple


def open_clip_or_this() -> Any:
    """open_clip where it has all that is used of it, else what stands in for it here. Raises EncoderError without
    transformers."""
    try:
        with missing_operators_skipped():
            found = importlib.import_module("open_clip")
    except ImportError:
        found = None
    if found is not None and all(hasattr(found, name) for name in _USED):
        return found
    library("transformers", "open_clip_torch or transformers")
    return ByTransformers()


class ByTransformers:
    """What stands in for the module open_clip."""

    def list_models(self) -> list[str]:
        return [*_VISION, *(f"{name}{_QUICK}" for name in _VISION)]

    def list_pretrained_tags_by_model(self, name: str) -> list[str]:
        return list(_PUBLISHED.get(name.removesuffix(_QUICK), ()))

    def get_model_config(self, name: str) -> dict[str, Any] | None:
        known = _VISION.get(name.removesuffix(_QUICK))
        if known is None:
            return None
        embed, patch, width, layers, head, image, ratio = known
        heads, deep = _STANDARD_TEXT[embed]
        return {
            "embed_dim": embed,
            "quick_gelu": name.endswith(_QUICK),
            "vision_cfg": {
                **{"image_size": image, "layers": layers, "width": width, "patch_size": patch},
                **{"head_width": head, "mlp_ratio": ratio},
            },
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": embed, "heads": heads, "layers": deep},
        }

    def get_pretrained_cfg(self, name: str, tag: str) -> dict[str, Any]:
        place = _PUBLISHED.get(name.removesuffix(_QUICK), {}).get(tag)
        if place is None:
            return {}
        other = tag in _INCEPTION
        return {
            "hf_hub": place,
            "quick_gelu": tag == "openai",
            "mean": _HALF if other else CLIP_MEAN,
            "std": _HALF if other else CLIP_STD,
        }

    def CLIP(self, **config: Any) -> nn.Module:
        return _Clip(**config)

    def CustomTextCLIP(self, **config: Any) -> nn.Module:
        if "hf_model_name" in config["text_cfg"]:
            raise EncoderError("its text tower needs the package open_clip_torch, which is missing here or too old")
        return _Clip(**config)

    def tokenize(self, texts: Sequence[str], context_length: int = 77) -> Tensor:
        return tokenize(texts, context_length)


class _Clip(nn.Module):
    """Both towers as transformers has them, with open_clip's calls and weights.

    ValueError, TypeError or EncoderError for settings that these towers do not have.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: Mapping[str, Any],
        text_cfg: Mapping[str, Any],
        quick_gelu: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        transformers = library("transformers", "transformers")
        if not isinstance(vision_cfg.get("layers", 12), int) or {"timm_model_name", "attentional_pool"} & {*vision_cfg}:
            raise EncoderError("its image tower needs the package open_clip_torch, which is missing here or too old")
        shared = {"projection_dim": embed_dim, "hidden_act": "quick_gelu" if quick_gelu else "gelu"}
        width = int(vision_cfg.get("width", 768))
        vision = transformers.CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=int(width * vision_cfg.get("mlp_ratio", 4.0)),
            num_hidden_layers=vision_cfg.get("layers", 12),
            num_attention_heads=width // vision_cfg.get("head_width", 64),
            image_size=vision_cfg.get("image_size", 224),
            patch_size=vision_cfg.get("patch_size", 16),
            **shared,
        )
        wide = int(text_cfg.get("width", 512))
        text = transformers.CLIPTextConfig(
            vocab_size=text_cfg.get("vocab_size", 49408),
            hidden_size=wide,
            intermediate_size=int(wide * text_cfg.get("mlp_ratio", 4.0)),
            num_hidden_layers=text_cfg.get("layers", 12),
            num_attention_heads=text_cfg.get("heads", 8),
            max_position_embeddings=text_cfg.get("context_length", 77),
            eos_token_id=2,  # to transformers: the highest token is the end, as it is to open_clip
            **shared,
        )
        self.context_length = int(text.max_position_embeddings)
        self.visual: Any = transformers.CLIPVisionModelWithProjection(vision)
        self.visual.image_size = vision.image_size
        self.words: Any = transformers.CLIPTextModelWithProjection(text)

    def encode_image(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.visual(pixel_values=pixels).image_embeds
        return found

    def encode_text(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.words(input_ids=tokens).text_embeds
        return found

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """`state` in open_clip's names, of CLIP or of CustomTextCLIP."""
        return super().load_state_dict(renamed(state), strict=strict)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names; names that are not known stay."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        visual = key.startswith("visual.")
        tower, names = ("visual", _VISION_NAMES) if visual else ("words", _TEXT_NAMES)
        model = "vision_model" if visual else "text_model"
        inner = key.removeprefix("visual." if visual else "text.")
        if inner in names:
            found[f"{tower}.{names[inner]}"] = value
        elif inner in ("proj", "text_projection"):
            found[f"{tower}.{'visual' if visual else 'text'}_projection.weight"] = value.T.contiguous()
        elif inner.startswith("transformer.resblocks."):
            number, _, name = inner.removeprefix("transformer.resblocks.").partition(".")
            layer = f"{tower}.{model}.encoder.layers.{number}"
            part, _, last = name.rpartition(".")
            if part == "attn" and last.startswith("in_proj_"):
                for letter, piece in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{letter}_proj.{last.removeprefix('in_proj_')}"] = piece
            else:
                found[f"{layer}.{_NAMES.get(part, part)}.{last}"] = value
        else:
            found[key] = value
    return found


def tokenize(texts: Sequence[str], context_length: int = 77) -> Tensor:
    """[B, context_length], as open_clip makes them: start, words, end, zeros; what is longer is cut before its end.

    Raises EncoderError where nothing on this machine knows CLIP's words.
    """
    for name in ("open_clip", "clip"):  # an old open_clip, and OpenAI's own
        try:
            with missing_operators_skipped():
                words = importlib.import_module(f"{name}.simple_tokenizer" if name == "clip" else f"{name}.tokenizer")
            own = words.SimpleTokenizer()
            # The last two of the vocabulary, whatever their names.
            begin, end = len(own.encoder) - 2, len(own.encoder) - 1
        except (ImportError, AttributeError, KeyError, OSError):
            continue
        return _padded([[begin, *own.encode(text), end] for text in texts], context_length)
    for folder in tokenizer_folders():
        vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
        if vocabulary.is_file() and merges.is_file():
            made = library("transformers", "transformers").CLIPTokenizer(str(vocabulary), str(merges))
            return _padded([list(made(text)["input_ids"]) for text in texts], context_length)
    raise EncoderError("nothing here knows CLIP's words; install the package open_clip_torch")


def _padded(tokens: Sequence[list[int]], length: int) -> Tensor:
    result = torch.zeros(len(tokens), length, dtype=torch.long)
    for row, found in zip(result, tokens, strict=True):
        cut = found if len(found) <= length else [*found[: length - 1], found[-1]]
        row[: len(cut)] = torch.tensor(cut)
    return result
