"""AUTOMATIC1111 WebUI 1.10: its built-in Lora extension merges networks into the weights, lazily, layer by layer.

A network with a role is replaced in `networks.loaded_networks` by a copy that lacks its UNet modules, so that the host
goes on merging everything else; its modules become deltas beside the layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lib_dynfuse.core.delta import Delta, Rows, Sum
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.errors import shown
from lib_dynfuse.hosts.a1111_guiding import Automatic1111Guiding, parts_of
from lib_dynfuse.hosts.a1111_networks import NORMS, delta_of
from lib_dynfuse.hosts.base import Before, Layers, Place, Tag, Unsupported, refuse_compiled, watched
from lib_dynfuse.hosts.reading import place_of, read_tags, staying

_PART_OF_FUSED = re.compile(r"(.*)_([qkv])_proj$")


@dataclass(frozen=True)
class _Taken:
    """A network out of the host's list: what stands there instead, and the keys of its modules that are ours."""

    stripped: Any
    network: Any
    role: Role
    keys: list[str]


class Automatic1111:
    """The host as one generation sees it; `networks` is the module of its Lora extension."""

    name = "AUTOMATIC1111"
    no_xt = ""
    needs = (
        "networks:loaded_networks",
        "networks:network_apply_weights",
        "networks:network_restore_weights_from_backup",
    )

    def __init__(self, networks: Any) -> None:
        self.guiding = Automatic1111Guiding()
        self._networks = networks
        self._taken: list[_Taken] = []
        # Of a denoiser call, those that the UNet has not seen yet: it may be fed in several calls.
        self._rows: Sequence[Row] = ()

    def read_tags(self, networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
        return read_tags(networks)

    def take(self, tags: Sequence[Tag]) -> list[str]:
        self._restore()
        roles = {tag.name: tag.role for tag in tags if tag.role is not None}
        loaded = self._networks.loaded_networks
        said = []
        for place, network in enumerate(loaded):
            role = roles.get(network.mentioned_name or network.name)
            if role is None:
                continue
            ours, left = self._divide(network)
            if left:
                said.append(staying(network.name, left))
            if not ours:
                said.append(f"{network.name} has no layer in the UNet: its role changes nothing")
                continue
            stripped = copy.copy(network)
            stripped.modules = {key: module for key, module in network.modules.items() if key not in ours}
            # The host looks at names and numbers to see whether a layer has to be merged anew.
            stripped.dyn_dim = ("without its UNet part", network.dyn_dim)
            loaded[place] = stripped
            self._taken.append(_Taken(stripped, network, role, ours))
        found = {network.mentioned_name or network.name for network in loaded}
        if missing := [name for name in roles if name not in found]:
            said.append(f"no LoRA {shown(', '.join(missing))} was found: its role changes nothing")
        return said

    def give_back(self) -> None:
        self._restore()

    def _restore(self) -> None:
        """The networks themselves in the host's list, with what the host has set on the copies since."""
        loaded = self._networks.loaded_networks
        taken = {id(one.stripped): one.network for one in self._taken}
        for place, network in enumerate(loaded):
            itself = taken.get(id(network))
            if itself is None:
                continue
            for name in ("te_multiplier", "unet_multiplier", "mentioned_name"):
                setattr(itself, name, getattr(network, name))
            if not isinstance(network.dyn_dim, tuple):
                itself.dyn_dim = network.dyn_dim
            loaded[place] = itself
        self._taken.clear()

    def layers(self) -> Layers:
        deltas: dict[str, dict[Role, list[Delta]]] = {}
        unet = self._unet
        _refuse_replaced()
        refuse_compiled(unet)
        modules = {id(module): name for name, module in unet.named_modules()}
        for taken in self._taken:
            for key in taken.keys:
                layer, part = self._layer(key)
                delta = self._delta(taken.network.modules[key], layer, part)
                deltas.setdefault(modules[id(layer)], {}).setdefault(taken.role, []).append(delta)
        return {
            name: (
                unet.get_submodule(name),
                {role: found[0] if len(found) == 1 else Sum(*found) for role, found in deltas[name].items()},
            )
            for name in modules.values()  # in the order of the network
            if name in deltas
        }

    def _delta(self, module: Any, layer: nn.Module, part: int | None) -> Delta:
        if part is None:
            return delta_of(module, layer, lambda: self._weight(layer))
        rows = module.shape[0]
        delta = delta_of(module, layer, lambda: self._weight(layer).chunk(3)[part])
        return Rows(delta, part * rows, (part + 1) * rows, 3 * rows)

    def _weight(self, layer: Any) -> Tensor:
        """A layer's weight with the plain networks in it: the host merges only when the layer runs."""
        from modules import shared

        if shared.opts.lora_functional:
            self._networks.network_restore_weights_from_backup(layer)
        else:
            self._networks.network_apply_weights(layer)
        whole: Tensor | None = getattr(layer, "fp16_weight", None)  # where the weight itself is kept in 8 bits
        return (layer.weight if whole is None else whole).detach()

    @property
    def _model(self) -> Any:
        from modules import shared

        return shared.sd_model

    @property
    def _unet(self) -> nn.Module:
        unet: nn.Module = self._model.model.diffusion_model
        return unet

    def _layer(self, key: str) -> tuple[Any, int | None]:
        """The layer that a network's key is about, and which third of it where it is a fused q, k and v."""
        mapping = self._model.network_layer_mapping
        if key in mapping:
            return mapping[key], None
        found = _PART_OF_FUSED.match(key)
        return (mapping.get(found[1]), "qkv".index(found[2])) if found else (None, None)

    def _divide(self, network: Any) -> tuple[list[str], list[str]]:
        """The keys of a network that we can take over, and those in the UNet that we cannot."""
        unet = {id(module) for module in self._unet.modules()}
        ours: list[str] = []
        left: list[str] = []
        for key in network.modules:
            layer, part = self._layer(key)
            if id(layer) not in unet:
                continue
            kinds = (nn.Linear, nn.Conv2d, *NORMS) if part is None else (nn.Linear,)
            (ours if isinstance(layer, kinds) else left).append(key)
        return ours, left

    def watch(self, before: Before) -> Callable[[], None]:
        def who(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Row]:
            count = (args[0] if args else next(iter(kwargs.values()))).shape[0]
            rows, self._rows = self._rows[:count], self._rows[count:]
            return rows if len(rows) == count else ()

        return watched(self._unet, who, before)

    def place(self, params: Any) -> Place:
        self._rows = _rows(params)
        return place_of(params)


def _refuse_replaced() -> None:
    """Raises Unsupported where another extension computes in the UNet's place, as TensorRT does."""
    try:
        from modules import sd_unet
    except ImportError:  # WebUIs before 1.3
        return
    replacement = getattr(sd_unet, "current_unet", None)
    if replacement is not None:
        label = getattr(getattr(replacement, "option", None), "label", "") or type(replacement).__name__
        raise Unsupported(f"the SD Unet {label} computes in the place of the model's own; choose None in the settings")


def _rows(params: Any) -> tuple[Row, ...]:
    """Cond rows picture by picture (the parts of an AND side by side), then every picture's uncond row."""
    denoiser = params.denoiser
    parts = parts_of(denoiser)
    seeds = list(getattr(denoiser.p, "seeds", None) or [])
    seeds += [0] * (len(parts) - len(seeds))
    rows = [Row(image, True, seeds[image]) for image, count in enumerate(parts) for _ in range(count)]
    rest = params.x.shape[0] - len(rows)
    if not parts or rest < 0 or rest % len(parts):
        return ()
    return (*rows, *_uncond(rest, seeds, len(parts)))


def _uncond(count: int, seeds: Sequence[int], images: int) -> Iterable[Row]:
    """Once; twice where a model that edits pictures has an unconditional half for the picture too."""
    return (Row(index % images, False, seeds[index % images]) for index in range(count))
