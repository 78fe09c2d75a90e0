"""Forge: a LoRA is a set of patches that hangs on the model's patcher, and is merged when sampling begins.

A network with a role is left out of a clone of the patcher, which Forge itself throws away after every pass; its
patches become deltas beside the layers. Nothing of the host is changed that outlives a pass.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lib_dynfuse.core.algebra import wide
from lib_dynfuse.core.delta import Delta, Sum
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.errors import DynFuseError, shown
from lib_dynfuse.hosts.base import Before, Layers, Place, Tag, refuse_compiled, watched
from lib_dynfuse.hosts.forge_guiding import NO_XT, ForgeGuiding, backend_vae
from lib_dynfuse.hosts.forge_networks import Patch, deltas_of
from lib_dynfuse.hosts.fused import apart
from lib_dynfuse.hosts.reading import place_of, read_tags, staying

Patches = Mapping[str, Sequence[Patch]]
MARK = "dynfuse"
_COND = 0  # in the host's `cond_or_uncond`


@dataclass(frozen=True)
class Taken:
    """A network out of the patcher: its key and patches there, what it adds to the layers, and what stays merged.

    `plain` are the patches of the networks without a role, which some deltas depend on.
    """

    key: tuple[Any, ...]
    role: Role
    patches: Patches
    plain: Sequence[Patches]
    deltas: Mapping[str, Delta]
    left: Patches

    def still_is(self, other: tuple[Any, ...], patches: Patches, plain: Sequence[Patches]) -> bool:
        """Whether the host has not loaded anything anew since; it keeps its patches over the batches of a prompt."""
        return (
            self.key == other
            and self.patches is patches
            and len(self.plain) == len(plain)
            and all(mine is theirs for mine, theirs in zip(self.plain, plain, strict=True))
        )

    @property
    def key_of_left(self) -> tuple[Any, ...]:
        """Another key than the network's own: by its keys the host knows whether it has to merge anew."""
        return (f"{self.key[0]} without the layers that are chosen", *self.key[1:])


class Forge:
    """The host as one generation sees it; `networks` is the module of its Lora extension."""

    name = "Forge"
    no_xt = NO_XT
    _vae = staticmethod(backend_vae)
    needs: tuple[str, ...] = (
        "networks:loaded_networks",
        "backend.patcher.lora:LoraLoader.refresh",
        "backend.patcher.lora:merge_lora_to_weight",
        "backend.patcher.unet:UnetPatcher.set_transformer_option",
        "backend.utils:get_attr_with_parent",
    )

    def __init__(self, networks: Any) -> None:
        self.guiding = ForgeGuiding(self._vae)
        self._networks = networks
        self._taken: list[Taken] = []
        self._mark = uuid.uuid4().hex
        self._seeds: Sequence[int] = ()
        # The host's objects whose patcher is ours for a pass, the patcher that was there, and ours.
        self._installed: tuple[Any, Any, Any] | None = None

    def read_tags(self, networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
        return read_tags(networks)

    def take(self, tags: Sequence[Tag]) -> list[str]:
        self.give_back()
        files = self._files()
        if missing := [tag.name for tag in tags if tag.name not in files]:
            # After one that does not exist the host has loaded none at all.
            known = {*self._networks.available_networks, *self._networks.available_network_aliases}
            gone = [name for name in missing if name not in known] or missing
            raise DynFuseError(
                f"no LoRA {shown(', '.join(gone))} was found; {self.name} then leaves out the others too"
            )
        roles: dict[tuple[str, float], Role] = {}
        for tag in tags:
            if tag.role is not None and roles.setdefault((files[tag.name], tag.unet), tag.role) is not tag.role:
                raise DynFuseError(f"{tag.name} is subject and style at once; a LoRA can have one role only")
        loaded = self._loaded()
        plain = [patches for key, patches in loaded.items() if key[:2] not in roles]
        names = {file: name for name, file in files.items()}
        before, self._taken = self._taken, []
        said = []
        for (file, strength), role in roles.items():
            name = names[file]
            key = next((key for key in loaded if key[:2] == (file, strength)), None)
            if key is None:
                said.append(
                    f"{self.name} found nothing of {name} for this model's UNet (it may be for another model, or of a "
                    f"kind that {self.name} does not read): its role changes nothing"
                )
                continue
            found = next((one for one in before if one.still_is(key, loaded[key], plain)), None)
            taken = self._divide(key, role, loaded[key], plain) if found is None else replace(found, role=role)
            if taken.left:
                said.append(staying(name, list(taken.left)))
            if taken.deltas:
                self._taken.append(taken)
        return said

    def _divide(self, key: tuple[Any, ...], role: Role, patches: Patches, plain: Sequence[Patches]) -> Taken:
        deltas, left = deltas_of(
            patches,
            self._unet,
            lambda name: self._weight(name, plain),
            self._merge,
            stored=self._stored(),
            loaded=self._loaded().values(),
        )
        return Taken(key, role, patches, plain, deltas, {name: patches[name] for name in left})

    def layers(self) -> Layers:
        refuse_compiled(self._unet)
        self._install()
        deltas: dict[str, dict[Role, list[Delta]]] = {}
        for taken in self._taken:
            for name, delta in taken.deltas.items():
                deltas.setdefault(name, {}).setdefault(taken.role, []).append(delta)
        return {
            name: (module, _together(name, deltas[name]))
            for name, module in self._unet.named_modules()  # in the order of the network
            if name in deltas
        }

    def _install(self) -> None:
        """A patcher without the taken networks, for as long as the host keeps its objects: one pass."""
        objects = self._model.forge_objects
        patcher = objects.unet.clone()
        for taken in self._taken:
            if patcher.lora_patches.pop(taken.key, None) is not None and taken.left:
                patcher.lora_patches[taken.key_of_left] = taken.left
        patcher.set_transformer_option(MARK, self._mark)
        self._installed = (objects, objects.unet, patcher)
        objects.unet = patcher

    def give_back(self) -> None:
        if self._installed is not None:
            objects, before, ours = self._installed
            if objects.unet is ours:
                objects.unet = before
        self._installed = None

    def _files(self) -> dict[str, str]:
        """By the name in a tag the file of each LoRA that the host has loaded."""
        return {one.mentioned_name: one.network_on_disk.filename for one in self._networks.loaded_networks}

    @property
    def _model(self) -> Any:
        from modules import shared

        return shared.sd_model

    @property
    def _unet(self) -> nn.Module:
        unet: nn.Module = self._model.forge_objects.unet.model.diffusion_model
        return unet

    def _loaded(self) -> Mapping[tuple[Any, ...], Patches]:
        """By (file, strength, ...) the patches of every LoRA that the host has loaded for the prompt."""
        loaded: Mapping[tuple[Any, ...], Patches] = self._model.forge_objects_after_applying_lora.unet.lora_patches
        return loaded

    def _stored(self) -> Mapping[str, Tensor]:
        """By key the parameters that have patches merged into them at present, as they are without."""
        stored: Mapping[str, Tensor] = self._model.forge_objects.unet.model.lora_loader.backup
        return stored

    def _weight(self, key: str, plain: Sequence[Patches]) -> Tensor:
        """A weight, taken out of whatever stores it in fewer bits, with the plain networks in it.

        As the host's next merge will make it: what is merged at present may be another prompt's.
        """
        from backend import utils

        model = self._model.forge_objects.unet.model
        layer, name, weight = utils.get_attr_with_parent(model, key)
        weight = self._stored().get(key, weight)
        scale = getattr(layer, "scale_weight", None) if name == "weight" else None
        whole = dequantised(weight, scale).detach()
        patches = [patch for patches in plain for patch in patches.get(key, ())]
        if not patches:
            return whole
        # On the fly, the host adds to what it computes with; otherwise to what it stores, and rounds again.
        on_the_fly = any(network[3:4] == (True,) for network in self._loaded())
        return self._merge(patches, wide(whole) if on_the_fly else whole)

    def _merge(self, patches: Sequence[Patch], weight: Tensor) -> Tensor:
        from backend.patcher.lora import merge_lora_to_weight

        merged: Tensor = merge_lora_to_weight(patches, weight)
        return merged

    def watch(self, before: Before) -> Callable[[], None]:
        def who(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Row] | None:
            options = kwargs.get("transformer_options") or {}
            if options.get(MARK) != self._mark:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            return rows_of(options.get("cond_or_uncond", ()), x.shape[0], self._seeds)

        return watched(self._unet, who, before)

    def place(self, params: Any) -> Place:
        self._seeds = tuple(getattr(params.denoiser.p, "seeds", None) or ())
        return place_of(params)


def rows_of(cond_or_uncond: Sequence[int], count: int, seeds: Sequence[int]) -> tuple[Row, ...]:
    """Who is who in a batch of `count`: for every part that the host names cond or uncond, picture by picture.

    Where the pictures are fed in tiles, all of this once per tile. Empty where the numbers do not add up.
    """
    once = len(cond_or_uncond) * len(seeds)
    if once == 0 or count % once:
        return ()
    return tuple(
        Row(image, part == _COND, seed, tile)
        for tile in range(count // once)
        for part in cond_or_uncond
        for image, seed in enumerate(seeds)
    )


def _together(name: str, deltas: Mapping[Role, Sequence[Delta]]) -> dict[Role, Delta]:
    """One delta per role; where the roles meet on a fused layer, by its parts."""
    found = {role: listed[0] if len(listed) == 1 else Sum(*listed) for role, listed in deltas.items()}
    return found if len(found) < 2 else {role: apart(name, delta) for role, delta in found.items()}


def dequantised(weight: Tensor, scale: Tensor | None) -> Tensor:
    if hasattr(weight, "bnb_quantized"):
        from backend.operations_bnb import functional_dequantize_4bit

        found: Tensor = functional_dequantize_4bit(weight)
        return found
    if getattr(weight, "gguf_cls", None) is not None:
        return _unpacked(weight)
    return weight if scale is None else weight.float() * scale.to(weight.device).float()


def _unpacked(weight: Any) -> Tensor:
    from backend.operations_gguf import dequantize_tensor

    if not weight.baked:
        # The host lays the bits out for its arithmetic when it first loads the model to sample: done here to a copy.
        weight = weight.copy_with_data(weight.data)
        weight.gguf_cls.bake(weight)
    found: Tensor = dequantize_tensor(weight)
    return found
