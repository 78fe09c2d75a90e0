"""The LoRAs of a diffusers pipeline, as deltas beside its layers: nothing of a file ever reaches a parameter.

Those with a role are handed to the fusion. All others, and the text encoders' parts of all, are added by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lib_dynfuse.core.algebra import wide
from lib_dynfuse.core.delta import Delta, Sum
from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError, shown
from lib_dynfuse.hosts.lora_deltas import AtStrength, Unreadable, delta_at
from lib_dynfuse.hosts.lora_files import LoraFile, family_name, open_lora
from lib_dynfuse.hosts.lora_names import TEXT, TEXT_2, UNET, LayerNames, NamedLayer, Reading
from lib_dynfuse.hosts.lora_scales import PeftConfig, config_beside, configs_inside

# What is kept of files that may be wanted again, as when the rules are compared on one prompt.
_MOST_IDLE = 16
_MOST_IDLE_BYTES = 2 << 30
Layers = dict[str, tuple[nn.Module, dict[Role, Delta]]]


@dataclass(frozen=True)
class Network:
    """A LoRA as a prompt asks for it: its file, its strengths and its role."""

    path: Path
    unet: float = 1.0
    te: float = 1.0
    role: Role | None = None


@dataclass
class _Loaded:
    """A file as it was when it was read: by (component, path) what it adds to that layer, and what is to be said."""

    deltas: dict[tuple[str, str], AtStrength]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def nbytes(self) -> int:
        return sum(at(1.0).nbytes for at in self.deltas.values())


class Adapters:
    """The LoRAs of one pipeline; files are read again only when they change."""

    def __init__(self, pipe: Any, model: str, say: Callable[[str], None]) -> None:
        self._pipe = pipe
        self._model = model
        self._say = say
        self._loaded: dict[tuple[Path, int], _Loaded] = {}
        self._known: LayerNames | None = None

    @property
    def _components(self) -> dict[str, nn.Module]:
        names = (UNET, TEXT, TEXT_2)
        return {name: part for name in names if (part := getattr(self._pipe, name, None)) is not None}

    @property
    def _names(self) -> LayerNames:
        if self._known is None:
            self._known = LayerNames(self._components)
        return self._known

    @contextmanager
    def applied(self, networks: Sequence[Network]) -> Iterator[Layers]:
        """Within, the pipeline has exactly these networks; gives the UNet's layers that roles cover.

        Raises DynFuseError for a file that cannot be used or does not fit. Afterwards, and then too, the pipeline's
        modules are as they were.
        """
        pairs = [(self._open(network.path), network) for network in networks]
        self._forget([loaded for loaded, _ in pairs])
        added: dict[tuple[str, str], list[Delta]] = {}
        chosen: dict[str, dict[Role, list[Delta]]] = {}
        for loaded, network in pairs:
            for note in loaded.notes:
                self._say(note)
            if network.role is not None and not any(component == UNET for component, _ in loaded.deltas):
                self._say(f"{network.path.name} has no layer in the UNet: its role changes nothing")
            for (component, path), at in loaded.deltas.items():
                if component == UNET and network.role is not None:
                    if network.unet == 0.0:
                        continue  # it plays nothing, so its layers are not chosen for
                    chosen.setdefault(path, {}).setdefault(network.role, []).append(at(network.unet))
                elif strength := network.unet if component == UNET else network.te:
                    added.setdefault((component, path), []).append(at(strength))
        with ExitStack() as stack:
            for (component, path), deltas in added.items():
                module = self._components[component].get_submodule(path)
                stack.callback(module.register_forward_hook(_adding(deltas), with_kwargs=True).remove)
            yield {
                path: (
                    self._components[UNET].get_submodule(path),
                    {role: found[0] if len(found) == 1 else Sum(*found) for role, found in roles.items()},
                )
                for path, roles in chosen.items()
            }

    def _open(self, path: Path) -> _Loaded:
        key = (path.resolve(), path.stat().st_mtime_ns)
        loaded = self._loaded.pop(key, None) or self._read(open_lora(path))
        self._loaded[key] = loaded  # the last one used comes last
        return loaded

    def _forget(self, wanted: Sequence[_Loaded]) -> None:
        idle = [key for key, loaded in self._loaded.items() if not any(loaded is other for other in wanted)]
        while idle and (len(idle) > _MOST_IDLE or sum(self._loaded[key].nbytes for key in idle) > _MOST_IDLE_BYTES):
            del self._loaded[idle.pop(0)]

    def _read(self, lora: LoraFile) -> _Loaded:
        """What a file adds to which layer, every key of it accounted for."""
        name = lora.path.name
        reading = self._names_of(lora)
        if not reading.layers:
            raise self._misfit(
                lora, f"it fits no layer of the model; its first key is {shown(next(iter(lora.shapes)))}"
            )
        scales = _Scales(lora)
        deltas: dict[tuple[str, str], AtStrength] = {}
        with safe_open(lora.path, framework="pt") as file, torch.no_grad():
            for key, other in reading.again.items():
                if not torch.equal(wide(file.get_tensor(key)), wide(file.get_tensor(other))):
                    both = f"{shown(key)} and {shown(other)}"
                    raise self._misfit(lora, f"{both} mean the same tensor and differ; expected one of them")
            for layer in reading.layers:
                tensors = {tensor: file.get_tensor(key) for tensor, key in layer.keys.items()}
                module = self._components[layer.component].get_submodule(layer.path)
                try:
                    deltas[layer.component, layer.path] = delta_at(tensors, module, scales.of(layer, tensors))
                except Unreadable as error:
                    raise self._misfit(lora, f"{shown(layer.keys[error.tensor])} {error}") from error
        notes = []
        if reading.missing:
            count = f"{len(reading.missing)} of {len(reading.missing) + len(reading.layers)} layers are"
            notes.append(f"{name}: {count} not in the model and were left out, first {shown(reading.missing[0])}")
        if reading.others:
            count = f"{len(reading.others)} tensors are" if len(reading.others) > 1 else "one tensor is"
            notes.append(f"{name}: {count} no part of a LoRA and left out, first {shown(reading.others[0])}")
        if scales.unknown:
            notes.append(
                f"{name}: its scale is unknown and taken as 1; peft has it in an adapter_config.json beside the file: "
                f"{scales.unknown}"
            )
        return _Loaded(deltas, notes)

    def _names_of(self, lora: LoraFile) -> Reading:
        try:
            return self._names.read(lora.shapes)
        except ValueError as error:
            raise DynFuseError(f"{lora.path.name}: {error}") from error

    def _misfit(self, lora: LoraFile, reason: str) -> DynFuseError:
        width = self._pipe.unet.config.cross_attention_dim
        own = "SDXL" if hasattr(self._pipe, TEXT_2) else family_name(width)
        made_for = lora.made_for
        if made_for and made_for != own and not (made_for.startswith("SDXL") and own == "SDXL"):
            return DynFuseError(f"{lora.path.name} is made for {shown(made_for)}, but {self._model} is {own}; {reason}")
        return DynFuseError(f"{lora.path.name} does not fit {self._model}, {own}: {reason}")


class _Scales:
    """The scale of each layer of a file: alpha / rank, as the file or what stands beside it says, else 1."""

    def __init__(self, lora: LoraFile) -> None:
        self._inside = configs_inside(lora.path.name, lora.metadata)
        self._path = lora.path
        self._beside: PeftConfig | None = None
        self._asked = False
        self.unknown = ""
        """Why the scale of peft's own layers is not known; empty where it is."""

    def of(self, layer: NamedLayer, tensors: dict[str, Tensor]) -> Callable[[int | None], float]:
        """From a network's rank to its scale, for one layer."""

        def scale(rank: int | None) -> float:
            if "alpha" in tensors:
                return float(tensors["alpha"]) / rank if rank else 1.0
            inside = self._inside.get(layer.component)
            found = inside.scale(layer.path, rank) if inside is not None else None
            if found is None and layer.raw:
                beside = self._config_beside()
                found = beside.scale(layer.path, rank) if beside is not None else None
                if found is None:
                    self.unknown = "there is none" if beside is None else "the one there has another rank"
            return 1.0 if found is None else found

        return scale

    def _config_beside(self) -> PeftConfig | None:
        if not self._asked:
            self._beside, self._asked = config_beside(self._path), True
        return self._beside


def _adding(deltas: Sequence[Delta]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    """A hook that adds deltas to a layer's output, one after the other, as peft does."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        for delta in deltas:
            y = y + delta(x, _without_bias(module, y, delta.channel_dim) if delta.needs_base else y)
        return y

    return add


def _without_bias(module: nn.Module, y: Tensor, channel_dim: int) -> Tensor:
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return y
    return y - (bias if channel_dim == -1 else bias.view(-1, *(1 for _ in y.shape[2:])))
