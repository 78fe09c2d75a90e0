"""A small reForge, a small Forge Classic and a small Forge Neo of mid 2026, cut to the shape of the real ones.

Patches hang on a patcher by parameter, without the files' names; `load_models_gpu` merges them when sampling begins.
reForge: patches are adapters, all clones share one backup, and a number says whether to merge anew. Classic: patches
are tuples; every patcher keeps its own backup, or (`--persistent-patches`) all share one and a note of changes. Neo:
as reForge, but with a sixth value a patch, and under `backend`.
"""

from __future__ import annotations

import copy
import itertools
import sys
import uuid
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_forge import Objects as UnetOnly
from fake_forge import Unet
from torch import Tensor, nn

_TIME = itertools.count(1)


class Adapter:
    """A patch of reForge; OFT has no structure that is known elsewhere."""

    def __init__(self, name: str, weights: Sequence[Any]) -> None:
        self.name, self.weights = name, tuple(weights)

    def calculate_weight(self, weight: Tensor, key: str, strength: float, *rest: Any) -> Tensor:
        if self.name == "lora":
            up, down, alpha = self.weights[:3]
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        else:
            weight += strength * (self.weights[0] @ weight - weight)
        return weight


def calculate_weight(patches: Sequence[Any], weight: Tensor, key: str) -> Tensor:
    """reForge's and Classic's merge, into `weight`."""
    for strength, value, *_ in patches:
        if isinstance(value, Adapter):
            weight = value.calculate_weight(weight, key, strength)
        elif value[0] == "lora":
            weight = Adapter(*value).calculate_weight(weight, key, strength)
        elif value[0] == "glora":
            a1, a2, b1, b2, alpha = value[1]
            weight += strength * (alpha / a1.shape[0]) * (b2 @ b1 + weight @ a2 @ a1)
        else:
            weight += strength * value[1][0]
    return weight


class Patcher:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        twin = copy.copy(self)
        twin.patches = {key: listed[:] for key, listed in self.patches.items()}
        twin.model_options = copy.deepcopy(self.model_options)
        return twin

    def set_transformer_option(self, key: str, value: Any) -> None:
        self.model_options["transformer_options"][key] = value

    def add_patches(self, patches: dict[str, Any], strength: float) -> None:
        known = self.model.state_dict()
        for key, value in patches.items():
            if key in known:
                self.patches.setdefault(key, []).append((strength, value, 1.0, *self.end_of_patch))

    end_of_patch: tuple[Any, ...] = ()

    def merge(self) -> None:
        for key, listed in self.patches.items():
            parameter = self.model.get_parameter(key)
            self.backup.setdefault(key, self.keep(parameter.data))
            parameter.data = calculate_weight(listed, parameter.data.clone(), key)

    def keep(self, weight: Tensor) -> Any:
        return weight

    def restore(self) -> None:
        for key, kept in self.backup.items():
            self.model.get_parameter(key).data = getattr(kept, "weight", kept)
        self.backup.clear()


class ReForgePatcher(Patcher):
    end_of_patch = (None, None)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.patches_uuid = uuid.uuid4()

    def add_patches(self, patches: dict[str, Any], strength: float) -> None:
        super().add_patches(patches, strength)
        self.patches_uuid = uuid.uuid4()

    def keep(self, weight: Tensor) -> Any:
        return SimpleNamespace(weight=weight, inplace_update=False)

    def load(self, loaded: list[Any]) -> None:
        if self.model.merged != self.patches_uuid:
            self.restore()
            self.merge()
            self.model.merged = self.patches_uuid
            self.model.merges += 1
        loaded[:] = [SimpleNamespace(model=None), SimpleNamespace(model=self)]  # the first one's patcher is gone


class ClassicPatcher(Patcher):
    def clone(self) -> Patcher:
        twin = super().clone()
        twin.backup = {}
        return twin

    def calculate_weight(self, patches: Sequence[Any], weight: Tensor, key: str) -> Tensor:
        return calculate_weight(patches, weight, key)

    def load(self, loaded: list[Any]) -> None:
        if any(one.model is self for one in loaded):
            return
        for one in loaded:
            if one.model.model is self.model:
                one.model.restore()
        self.merge()
        self.model.merges += 1
        loaded[:] = [SimpleNamespace(model=self)]


class PersistentPatcher(Patcher):
    calculate_weight = ClassicPatcher.calculate_weight

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.patch_status = PatchStatus()

    def add_patches(self, patches: dict[str, Any], strength: float) -> None:
        super().add_patches(patches, strength)
        self.patch_status.on_add_patches()

    def load(self, loaded: list[Any]) -> None:
        if any(one.model is self for one in loaded):
            return
        status = self.patch_status
        if status.l_cache != self.model.cached_lora_hash:
            self.restore()
            status.l_cache = self.model.cached_lora_hash
        if self.patches and status.t_apply < status.t_added:
            self.merge()
            self.model.merges += 1
            status.t_apply = next(_TIME)
            status.l_cache = self.model.cached_lora_hash
        loaded[:] = [SimpleNamespace(model=self)]


class PatchStatus:
    """As since May 2025: the times of the last merge and of the last change, and the LoRAs of the prompt then."""

    def __init__(self) -> None:
        self.t_apply = self.t_added = 0
        self.l_cache: Any = None

    def on_add_patches(self) -> None:
        self.t_added = next(_TIME)


class NeoPatcher(ReForgePatcher):
    """Forge Neo without a `LoraLoader`: the sixth value says whether the patch is merged at all."""

    end_of_patch = (None, None, False)


def get_key_weight(model: Any, key: str) -> tuple[Tensor, None, None]:
    return model.get_parameter(key), None, None


def merge_lora_to_weight(patches: Sequence[Any], weight: Tensor, key: str) -> Tensor:
    return calculate_weight(patches, weight, key)


class Objects(UnetOnly):
    def __init__(self, unet: Any, clip: Patcher) -> None:
        super().__init__(unet)
        self.clip = clip

    def shallow_copy(self) -> Objects:
        return Objects(self.unet, self.clip)


class WebUI:
    """What a person does is load LoRAs by tags and sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        self.kind = kind
        self.stacks = issubclass(kind, (ClassicPatcher, PersistentPatcher))
        self.files: dict[str, dict[str, Any]] = {}
        self.networks = SimpleNamespace(
            loaded_networks=[],
            available_networks=self.files,
            available_network_aliases={},
            load_lora_state_dict=self.read,
            load_lora_for_models=self.load_lora_for_models,
        )
        shared: Any = ModuleType("modules.shared")
        self.shared = shared
        shared.sd_model = self.new_model()
        management: Any = ModuleType("ldm_patched.modules.model_management")
        self.loaded = management.current_loaded_models = []
        lora: Any = ModuleType("ldm_patched.modules.lora")
        lora.calculate_weight = calculate_weight
        modules: Any = ModuleType("modules")
        modules.shared = self.shared
        packages = [ModuleType(name) for name in ("ldm_patched", "ldm_patched.modules", "backend", "backend.patcher")]
        base: Any = ModuleType("backend.patcher.base")
        base.get_key_weight = get_key_weight
        merging: Any = ModuleType("backend.patcher.lora")
        merging.merge_lora_to_weight = merge_lora_to_weight
        self.arguments: dict[str, Any] = {"nunchaku": False}
        arguments: Any = ModuleType("backend.args")
        arguments.dynamic_args = self.arguments
        for module in (modules, self.shared, *packages, management, lora, base, merging, arguments):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def new_model(self, seed: int = 0) -> Any:
        """What `shared.sd_model` is."""
        model: Any = nn.Module()
        model.diffusion_model = Unet(seed)
        model.requires_grad_(False)
        model.merged, model.merges, model.cached_lora_hash = None, 0, []
        encoder: Any = nn.Module()
        encoder.layer = nn.Linear(4, 4)
        objects = Objects(self.kind(model), Patcher(encoder.requires_grad_(False)))
        return SimpleNamespace(
            forge_objects=objects,
            forge_objects_original=objects.shallow_copy(),
            forge_objects_after_applying_lora=objects.shallow_copy(),
            current_lora_hash="[]",
        )

    @property
    def model(self) -> Any:
        return self.shared.sd_model

    @property
    def unet(self) -> Unet:
        unet: Unet = self.model.forge_objects.unet.model.diffusion_model
        return unet

    def add_file(self, name: str, patches: dict[str, Any]) -> None:
        """A LoRA on disk: patches by the path of the layer's parameter in the UNet, for the text encoder as well."""
        self.files[f"/loras/{name}.safetensors"] = {f"diffusion_model.{key}": value for key, value in patches.items()}

    def read(self, filename: str) -> dict[str, Any]:
        """Anew every time, as where more files are in use than are kept."""
        return copy.deepcopy(self.files[filename])

    def load_lora_for_models(
        self, model: Any, clip: Any, lora: dict[str, Any], strength_model: float, strength_clip: float, filename: str
    ) -> tuple[Any, Any]:
        unet, encoder = model.clone(), clip.clone()
        unet.add_patches(lora, strength_model)
        encoder.add_patches({"layer.weight": ("diff", (torch.ones(4, 4),))}, strength_clip)
        return unet, encoder

    def activate(self, *tags: tuple[str, float], hires: bool = False) -> None:
        """`extra_networks.activate`: the same tags again load nothing. Classic adds those of a hires prompt to what is
        there."""
        model = self.model
        files = [f"/loras/{name}.safetensors" for name, _ in tags]
        self.networks.loaded_networks = [
            SimpleNamespace(mentioned_name=name, network_on_disk=SimpleNamespace(filename=file))
            for (name, _), file in zip(tags, files, strict=True)
        ]
        if model.current_lora_hash == str(tags):
            return
        model.current_lora_hash = str(tags)
        objects = model.forge_objects
        objects.unet.model.cached_lora_hash = list(tags)
        if not (hires and self.stacks):
            objects.unet, objects.clip = model.forge_objects_original.unet, model.forge_objects_original.clip
        for file, (_, strength) in zip(files, tags, strict=True):
            objects.unet, objects.clip = self.networks.load_lora_for_models(
                objects.unet, objects.clip, self.read(file), strength, strength, filename=file
            )
        model.forge_objects_after_applying_lora = objects.shallow_copy()

    def begin_pass(self) -> None:
        """What comes ahead of every `process_before_every_sampling`."""
        self.model.forge_objects = self.model.forge_objects_after_applying_lora.shallow_copy()

    def sample(self, x: Tensor, cond_or_uncond: Sequence[int] = (1, 0)) -> Tensor:
        """A sampling of one denoiser call with the patcher that is in place."""
        patcher = self.model.forge_objects.unet
        patcher.load(self.loaded)
        options = {**patcher.model_options["transformer_options"], "cond_or_uncond": list(cond_or_uncond)}
        result: Tensor = self.unet(x, None, transformer_options=options)
        return result
