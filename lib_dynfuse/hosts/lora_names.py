"""What the keys of a LoRA file mean: which layer of the model, and which tensor of a network on it.

Trainers write a layer's name in diffusers' way or in that of the original code (LDM), with dots or with underscores
(kohya), behind a prefix of their own. The tensors are the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lib_dynfuse.errors import shown
from lib_dynfuse.hosts.ldm_names import ldm_names

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
COVERABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
EXPECTED = (
    "a layer's name with lora_down and lora_up, lora_A and lora_B, hada_*, lokr_*, oft_*, a1 to b2 (GLoRA), diff, or "
    "weight with on_input ((IA)³), as kohya, LyCORIS, peft, diffusers, ComfyUI or OneTrainer write them"
)

# Longer prefixes first. `lora_te_` and `clip_h.` belong to models with one text encoder.
_PREFIXES = (
    ("lora_unet_", UNET),
    ("oft_unet_", UNET),
    ("lycoris_", UNET),
    ("lora_te1_", TEXT),
    ("lora_te2_", TEXT_2),
    ("lora_te_", TEXT),
    ("model.diffusion_model.", UNET),
    ("diffusion_model.", UNET),
    ("unet.", UNET),
    ("text_encoders.clip_l.transformer.", TEXT),
    ("text_encoders.clip_h.transformer.", TEXT),
    ("text_encoders.clip_g.transformer.", TEXT_2),
    ("text_encoder_2.", TEXT_2),
    ("text_encoder.", TEXT),
    ("clip_l.", TEXT),
    ("clip_g.", TEXT_2),
    ("", UNET),
)
_PEFT = "base_model.model."

_AS_THEY_ARE = (
    *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "weight", "on_input"),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("oft_blocks", "oft_diag", "rescale"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
)
# What a file calls a network's tensor, to what it is called here.
_TENSORS = {
    **{name: name.removesuffix(".weight") if "." in name else name for name in _AS_THEY_ARE},
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"), "up"),
    "lora_mid.weight": "mid",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_NETWORK = re.compile(rf"\.({'|'.join(re.escape(name) for name in _TENSORS if name != 'weight')})$")
# What fine-tuned or merely copied parameters of the model itself are called.
_WHOLE = re.compile(r"(base_layer\.|modules_to_save\.(default\.)?)?(weight|bias)$")

# diffusers' first attention layers: `attn1.processor.to_k_lora.down.weight`.
_FIRST_LAYOUT = re.compile(r"_lora\.(down|up)\.weight$")
# What peft keeps in memory has its adapter's name in each key: `lora_A.default.weight`.
_ADAPTER = re.compile(
    r"\.(?:(lora_[AB])\.(?!weight$|bias$)[^.]+(?=\.(?:weight|bias)$)"
    r"|(lora_magnitude_vector|hada_\w+|lokr_\w+)\.(?!weight$)[^.]+(?=$|\.weight$))"
)


@dataclass
class NamedLayer:
    """A layer of the model and the file's tensors for it, by what they are called here, each with its key.

    `raw` where the keys are peft's own, whose scale stands in another file.
    """

    component: str
    path: str
    keys: dict[str, str] = field(default_factory=dict)
    raw: bool = False


@dataclass
class Reading:
    """All keys of a file: layers, names of layers that the model does not have, and keys that belong to no network.

    `again` has the keys that mean the same as another one, for programs that write a layer under two names.
    """

    layers: list[NamedLayer]
    missing: list[str]
    others: list[str]
    again: dict[str, str]


def belongs_to_a_network(key: str) -> bool:
    """Whether a key ends as a network's tensors do, whatever its layer."""
    return _NETWORK.search(_plain(key)[0]) is not None


class LayerNames:
    """Finds the layers of one model by all names that files have for them."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._paths = {name: _paths(name, model) for name, model in components.items()}
        alone = TEXT_2 not in components
        # peft writes a text encoder's layers as it writes a UNet's: without a word of which model they are.
        self._prefixes = (*_PREFIXES, ("", TEXT)) if alone else _PREFIXES

    def read(self, keys: Iterable[str]) -> Reading:
        """Sorts every key of a file. ValueError for a key that makes the meaning of others uncertain."""
        layers: dict[tuple[str, str], NamedLayer] = {}
        unknown: dict[tuple[str, str], list[str]] = {}
        missing: dict[str, None] = {}
        others: list[str] = []
        again: dict[str, str] = {}
        for key in keys:
            plain, raw = _plain(key)
            found = self._split(plain)
            if found is None:
                match = _NETWORK.search(plain)
                if match:
                    missing[plain[: match.start()]] = None
                else:
                    others.append(key)
                continue
            component, path, rest = found
            tensor = _TENSORS.get(rest)
            if tensor is None:
                unknown.setdefault((component, path), []).append(key)
                continue
            layer = layers.setdefault((component, path), NamedLayer(component, path))
            if tensor in layer.keys:
                again[key] = layer.keys[tensor]
                continue
            layer.keys[tensor] = key
            layer.raw = layer.raw or raw
        for layer in layers.values():
            if "weight" in layer.keys and "on_input" not in layer.keys:
                others.append(layer.keys.pop("weight"))
        named = {place: layer for place, layer in layers.items() if layer.keys}
        for place, more in unknown.items():
            strange = next((key for key in more if not _WHOLE.search(key)), None)
            if strange is not None and place in named:
                raise ValueError(f"{shown(strange)} is not understood; expected {EXPECTED}")
            others += more
        return Reading(list(named.values()), list(missing), others, again)

    def _split(self, key: str) -> tuple[str, str, str] | None:
        """(component, path, what is left of the key): the longest beginning that names a layer."""
        stem, dot, _ = key.rpartition(".")
        while dot:
            for prefix, component in self._prefixes:
                path = self._paths.get(component, {}).get(stem[len(prefix) :]) if stem.startswith(prefix) else None
                if path is not None:
                    return component, path, key[len(stem) + 1 :]
            stem, dot, _ = stem.rpartition(".")
        return None


def _plain(key: str) -> tuple[str, bool]:
    """A key without what only some programs write into it, and whether it is one of peft's own."""
    plain = _FIRST_LAYOUT.sub(r".lora.\1.weight", key).replace(".processor.", ".")
    named = _ADAPTER.sub(lambda match: f".{match[1] or match[2]}", plain)
    bare = named.replace(_PEFT, "", 1)
    return bare, bare != plain


def _paths(component: str, model: nn.Module) -> dict[str, str]:
    """Every name that a layer of the model may have, with dots and with underscores, to its path."""
    ldm = ldm_names(model) if component == UNET else {}
    paths: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, COVERABLE):
            continue
        for name in (path, *_other_names(component, path, ldm.get(path))):
            paths[name] = path
            paths[name.replace(".", "_")] = path
    return paths


def _other_names(component: str, path: str, ldm: str | None) -> list[str]:
    names = [] if ldm is None else [ldm]
    if component == UNET:
        return names + ([path.removesuffix(".0")] if path.endswith(".to_out.0") else [])
    # transformers 5 has no `text_model` level any more, files have it.
    inner = path.removeprefix("text_model.")
    names += [inner, f"text_model.{inner}"]
    first = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", inner)
    return names + ([first, f"text_model.{first}"] if first != inner else [])
