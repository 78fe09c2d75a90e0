"""A small Forge, cut to the shape of the real one: patchers that are cloned, LoRAs merged when sampling begins."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Unet(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.to_q = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, timesteps: Tensor | None = None, **kwargs: Any) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        result: Tensor = self.out(torch.tanh(self.to_q(h)))
        return result


def merge(
    patches: Sequence[Any], weight: Tensor, key: str = "", computation_dtype: torch.dtype | None = None
) -> Tensor:
    """What the host does with patches that are low rank or a plain difference."""
    weight = weight.clone()
    for strength, (kind, values), _, _, _ in patches:
        if kind == "lora":
            up, down, alpha = values[:3]
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        else:
            weight += strength * values[0]
    return weight


class LoraLoader:
    """Merges anew when the keys of the patches are others than before, and only then."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.backup, self.loaded_hash, self.merges = model, {}, "[]", 0

    def refresh(self, lora_patches: dict[Any, Any]) -> None:
        if str(list(lora_patches)) == self.loaded_hash:
            return
        self.merges += 1
        for key, weight in self.backup.items():
            self.model.get_parameter(key).data = weight
        self.backup = {}
        together: dict[str, list[Any]] = {}
        for patches in lora_patches.values():
            for key, found in patches.items():
                together[key] = together.get(key, []) + list(found)
        for key, found in together.items():
            parameter = self.model.get_parameter(key)
            self.backup[key] = parameter.data
            parameter.data = merge(found, parameter.data)
        self.loaded_hash = str(list(lora_patches))


class Patcher:
    def __init__(self, model: Any) -> None:
        self.model, self.lora_patches = model, {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        twin = Patcher(self.model)
        twin.lora_patches = self.lora_patches.copy()
        twin.model_options = copy.deepcopy(self.model_options)
        return twin

    def set_transformer_option(self, key: str, value: Any) -> None:
        self.model_options["transformer_options"][key] = value


class Objects:
    def __init__(self, unet: Patcher) -> None:
        self.unet = unet

    def shallow_copy(self) -> Objects:
        return Objects(self.unet)


def new_model(seed: int = 0) -> Any:
    """What `shared.sd_model` is."""
    model: Any = nn.Module()
    model.diffusion_model = Unet(seed)
    model.requires_grad_(False)
    model.lora_loader = LoraLoader(model)
    original = Objects(Patcher(model))
    return SimpleNamespace(
        forge_objects=original.shallow_copy(),
        forge_objects_original=original,
        forge_objects_after_applying_lora=original.shallow_copy(),
        current_lora_hash="[]",
    )


class Forge:
    """The WebUI: what a person does is load LoRAs by tags and sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[str, dict[str, list[Any]]] = {}
        self.networks = SimpleNamespace(loaded_networks=[], available_networks=self.files, available_network_aliases={})
        self.shared: Any = ModuleType("modules.shared")
        self.shared.sd_model = new_model()
        utils: Any = ModuleType("backend.utils")
        utils.get_attr_with_parent = get_attr_with_parent
        lora: Any = ModuleType("backend.patcher.lora")
        lora.merge_lora_to_weight = merge
        modules: Any = ModuleType("modules")
        modules.shared = self.shared
        backend: Any = ModuleType("backend")
        backend.utils = utils
        for module in (modules, backend, ModuleType("backend.patcher")):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for module in (self.shared, utils, lora):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    @property
    def model(self) -> Any:
        return self.shared.sd_model

    @property
    def unet(self) -> Unet:
        unet: Unet = self.model.forge_objects.unet.model.diffusion_model
        return unet

    def add_file(self, name: str, patches: dict[str, Any]) -> None:
        """A LoRA on disk: patches by the path of the layer's parameter in the UNet."""
        self.files[name] = {f"diffusion_model.{key}": patch for key, patch in patches.items()}

    def activate(self, *tags: tuple[str, float]) -> None:
        """`extra_networks.activate`: the same tags again load nothing."""
        model = self.model
        self.networks.loaded_networks = [
            SimpleNamespace(mentioned_name=name, network_on_disk=SimpleNamespace(filename=f"/loras/{name}.safetensors"))
            for name, _ in tags
        ]
        if model.current_lora_hash == str(tags):
            return
        model.current_lora_hash = str(tags)
        patcher = model.forge_objects_original.unet
        for name, strength in tags:
            patcher = patcher.clone()
            entry = (f"/loras/{name}.safetensors", strength, 1.0, False)
            patcher.lora_patches[entry] = {
                key: [[strength, patch, 1.0, None, None]] for key, patch in self.files[name].items()
            }
        model.forge_objects.unet = patcher
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()

    def begin_pass(self) -> None:
        """What comes ahead of every `process_before_every_sampling`."""
        self.model.forge_objects = self.model.forge_objects_after_applying_lora.shallow_copy()

    def sample(self, x: Tensor, cond_or_uncond: Sequence[int] = (1, 0)) -> Tensor:
        """One denoiser call of the patcher that is in place."""
        patcher = self.model.forge_objects.unet
        patcher.model.lora_loader.refresh(patcher.lora_patches)
        options = {**patcher.model_options["transformer_options"], "cond_or_uncond": list(cond_or_uncond)}
        result: Tensor = self.unet(x, None, transformer_options=options)
        return result


def get_attr_with_parent(model: nn.Module, key: str) -> tuple[nn.Module, str, Tensor]:
    path, _, name = key.rpartition(".")
    parent = model.get_submodule(path)
    return parent, name, getattr(parent, name)


def lora(layer: nn.Module, seed: int, rank: int = 2) -> tuple[str, Any]:
    """A low-rank patch that fits a layer."""
    generator = torch.Generator().manual_seed(seed)
    weight: Any = layer.weight
    up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator) * 0.3
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
    return "lora", (up, down, 1.0, None, None)
