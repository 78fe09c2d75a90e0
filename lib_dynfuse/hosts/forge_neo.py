"""Forge Neo: Forge with the patches of ComfyUI, which are objects.

Until the middle of 2026 they hang on the patcher by file, as Forge's do. Since then they hang on it by parameter, as
reForge's do.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.hosts.base import Tag, Unsupported
from lib_dynfuse.hosts.forge import Patches, dequantised
from lib_dynfuse.hosts.forge_guiding import backend_vae
from lib_dynfuse.hosts.reforge import ReForge, Related


class ForgeNeo(Related):
    """With a `LoraLoader`: the patches of a file are known by its name."""

    name = "Forge Neo"

    def take(self, tags: Sequence[Tag]) -> list[str]:
        refuse_nunchaku(self.name)
        return super().take(tags)


class ForgeNeoByParameter(ReForge):
    """Without a `LoraLoader`: the patcher has six values a patch, and one backup that its clones share."""

    name = "Forge Neo"
    _vae = staticmethod(backend_vae)
    needs = (
        "networks:loaded_networks",
        "networks:load_lora_for_models",
        "networks:load_lora_state_dict",
        "backend.patcher.base:get_key_weight",
        "backend.patcher.lora:merge_lora_to_weight",
        "backend.patcher.unet:UnetPatcher.add_patches",
        "backend.patcher.unet:UnetPatcher.clone",
        "backend.patcher.unet:UnetPatcher.set_transformer_option",
    )

    def _check(self) -> None:
        refuse_nunchaku(self.name)
        super()._check()
        if not hasattr(self._model.forge_objects.unet, "patches_uuid"):
            raise Unsupported(f"the UNet's patcher of this {self.name} has no patches_uuid")

    def _read(self, file: str) -> Any:
        network = super()._read(file)
        if any(key.startswith("lora_unet__") for key in network):  # as the host's own loader does
            from backend.state_dict import state_dict_prefix_replace

            return state_dict_prefix_replace(network, {"lora_unet__": "lora_unet_"})
        return network

    def _weight(self, key: str, plain: Sequence[Patches]) -> Tensor:
        from backend.patcher.base import get_key_weight

        weight, _, convert = get_key_weight(self._model.forge_objects.unet.model, key)
        kept = self._stored().get(key, weight)
        if convert is not None:
            whole: Tensor = convert(kept.detach().to(torch.float32, copy=True), inplace=True)
        else:
            unpacked = dequantised(kept, None).detach()
            if not unpacked.is_floating_point():
                raise ValueError(f"{key} is packed in a way that is not known here")
            whole = unpacked.to(torch.float32, copy=True)
        patches = [patch for patches in plain for patch in patches.get(key, ())]
        return self._merge(patches, whole) if patches else whole

    def _stored(self) -> Mapping[str, Tensor]:
        backup = self._model.forge_objects.unet.backup
        return {key: getattr(kept, "weight", kept) for key, kept in backup.items()}

    def _calculate(self, patches: list[tuple[Any, ...]], weight: Tensor) -> Tensor:
        from backend.patcher.lora import merge_lora_to_weight

        merged: Tensor = merge_lora_to_weight(patches, weight, "")
        return merged


def refuse_nunchaku(host: str) -> None:
    """Raises Unsupported where the loaded model runs on nunchaku, which has LoRAs and layers of its own."""
    try:
        arguments = importlib.import_module("backend.args").dynamic_args
    except (ImportError, AttributeError):
        return
    if arguments.get("nunchaku", False):
        raise Unsupported(f"the model runs on nunchaku, which adds LoRAs in its own way and lets {host} add none")
