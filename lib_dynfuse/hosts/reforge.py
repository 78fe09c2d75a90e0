"""reForge and Forge Classic, which come from Forge.

They keep the patches of all LoRAs in one list per parameter, without the files' names. Loading a file alone, with the
host's own code, tells which of them are its. Those that stay are the host's own and in its order, so what is merged is
what the host would have made without the LoRAs that have a role.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.hosts.base import Tag, Unsupported
from lib_dynfuse.hosts.forge import MARK, Forge, Patches, Taken
from lib_dynfuse.hosts.forge_guiding import ldm_patched_vae
from lib_dynfuse.hosts.forge_networks import Patch

_NO_FILE = ("", 0.0)  # of the patches that no file with a role has
# How many values Forge gives to a patch of a kind; who knows no DoRA gives fewer, who can pad weights gives more.
_LENGTHS = {"lora": 5, "loha": 8, "lokr": 9}


class _Value(tuple[Any, ...]):
    """A patch's value as Forge has it, `(kind, values)`, that knows the host's own."""

    own: Any


class Related(Forge):
    """A host whose patches have another form than Forge's: they are shown to our code in Forge's, to it in its own."""

    def _divide(self, key: tuple[Any, ...], role: Role, patches: Patches, plain: Sequence[Patches]) -> Taken:
        shown = {name: [_as_forge(patch) for patch in listed] for name, listed in patches.items()}
        taken = super()._divide(key, role, shown, plain)
        return replace(taken, patches=patches, left={name: patches[name] for name in taken.left})

    def _merge(self, patches: Sequence[Patch], weight: Tensor) -> Tensor:
        own = [(one[0], getattr(one[1], "own", one[1]), *one[2:]) for one in patches]
        return self._calculate(own, weight.to(torch.float32, copy=True))

    def _calculate(self, patches: list[tuple[Any, ...]], weight: Tensor) -> Tensor:
        """The host's own merge, into `weight`."""
        return super()._merge(patches, weight)


class ReForge(Related):
    """reForge; it knows by a number whether it has to merge anew."""

    name = "reForge"
    _vae = staticmethod(ldm_patched_vae)
    _shared_needs = (
        "networks:loaded_networks",
        "networks:load_lora_for_models",
        "networks:load_lora_state_dict",
        "ldm_patched.modules.model_management:current_loaded_models",
        "modules_forge.unet_patcher:UnetPatcher.clone",
        "modules_forge.unet_patcher:UnetPatcher.set_transformer_option",
    )
    needs: tuple[str, ...] = (*_shared_needs, "ldm_patched.modules.lora:calculate_weight")

    def __init__(self, networks: Any) -> None:
        super().__init__(networks)
        self._tags: list[Tag] = []
        self._ours: Any = None  # the patcher that was installed last
        # The host's patcher with all LoRAs, the files that were asked for, and the patches by file.
        self._sorted: tuple[Any, list[tuple[str, float]], dict[tuple[Any, ...], Patches]] | None = None

    def take(self, tags: Sequence[Tag]) -> list[str]:
        self._check()
        self._tags = [tag for tag in tags if tag.role is not None]
        return super().take(tags)

    def _check(self) -> None:
        """What can be seen only of the loaded model. Raises Unsupported that names what is missing."""
        patcher = self._model.forge_objects.unet
        for need in ("patches", "backup", "model_options"):
            if not hasattr(patcher, need):
                raise Unsupported(f"the UNet's patcher of this {self.name} has no {need}")
        if not hasattr(self._model, "forge_objects_after_applying_lora"):
            raise Unsupported(f"the model of this {self.name} has no forge_objects_after_applying_lora")
        if getattr(patcher, "compiled", False):
            raise Unsupported("the UNet is compiled, so that its layers cannot be followed")
        try:
            inspect.signature(self._networks.load_lora_for_models).bind(None, None, {}, 1.0, 1.0, filename="")
        except TypeError as error:
            raise Unsupported(f"load_lora_for_models of this {self.name}: {error}") from error

    def _loaded(self) -> Mapping[tuple[Any, ...], Patches]:
        after = self._model.forge_objects_after_applying_lora
        if after is None:  # Classic's way to say that no LoRA is loaded
            return {}
        files = self._files()
        wanted = [(files[tag.name], tag.unet) for tag in self._tags]
        if self._sorted is None or self._sorted[0] is not after.unet or self._sorted[1] != wanted:
            self._sorted = (after.unet, wanted, self._sort(after.unet.patches, wanted))
        return self._sorted[2]

    def _sort(self, patches: Patches, wanted: Sequence[tuple[str, float]]) -> dict[tuple[Any, ...], Patches]:
        """The patches of each wanted file and strength, and under `_NO_FILE` the rest."""
        rest = {key: list(listed) for key, listed in patches.items()}
        found: dict[tuple[Any, ...], dict[str, list[Patch]]] = {}
        for file, strength in wanted:
            for key, listed in self._alone(file).items():
                for patch in listed:
                    same = [one for one in rest.get(key, ()) if _is_same(one, patch)]
                    if not same:
                        continue
                    # The same file may be there with several strengths, or twice with one.
                    its = [one for one in same if one[0] == strength] or same[:1]
                    rest[key] = [one for one in rest[key] if not any(one is mine for mine in its)]
                    found.setdefault((file, strength), {}).setdefault(key, []).extend(its)
        return {**found, _NO_FILE: rest}

    def _alone(self, file: str) -> Patches:
        """The patches of a file as the host makes them."""
        objects = self._model.forge_objects
        bare = objects.unet.clone()
        bare.patches = {}
        # Classic counts keys of the text encoder as unknown where it is given none.
        unet, _ = self._networks.load_lora_for_models(bare, objects.clip, self._read(file), 1.0, 1.0, filename=file)
        patches: Patches = unet.patches
        return patches

    def _read(self, file: str) -> Any:
        return self._networks.load_lora_state_dict(file)

    def _install(self) -> None:
        objects = self._model.forge_objects
        before = objects.unet
        patcher = before.clone()
        chosen = {
            id(patch)
            for taken in self._taken
            for key, listed in taken.patches.items()
            if key not in taken.left
            for patch in listed
        }
        stay = {key: [one for one in listed if id(one) not in chosen] for key, listed in before.patches.items()}
        patcher.patches = {key: listed for key, listed in stay.items() if listed}
        if hasattr(before, "patches_uuid"):
            # The same for the same patches, so that the next picture needs no merge.
            keys = sorted(str(taken.key) for taken in self._taken)
            patcher.patches_uuid = uuid.uuid5(before.patches_uuid, f"without {len(chosen)} patches of {keys}")
        patcher.set_transformer_option(MARK, self._mark)
        _announce(patcher)
        self._ours = patcher
        self._installed = (objects, before, patcher)
        objects.unet = patcher

    def give_back(self) -> None:
        if self._installed is not None:
            _announce(self._installed[1])
        super().give_back()

    def _weight(self, key: str, plain: Sequence[Patches]) -> Tensor:
        patcher = self._model.forge_objects.unet
        path, _, name = key.rpartition(".")
        layer = patcher.model.get_submodule(path)
        weight = self._stored().get(key, getattr(layer, name)).detach().to(torch.float32, copy=True)
        convert = getattr(layer, f"convert_{name}", None)
        whole: Tensor = weight if convert is None else convert(weight, inplace=True)
        patches = [patch for patches in plain for patch in patches.get(key, ())]
        return self._merge(patches, whole) if patches else whole

    def _stored(self) -> Mapping[str, Tensor]:
        """What is merged at present is kept, without, by the patcher that did it."""
        from ldm_patched.modules.model_management import current_loaded_models

        patcher = self._model.forge_objects.unet
        stored: dict[str, Tensor] = {}
        for one in (patcher, *(loaded.model for loaded in current_loaded_models)):
            if getattr(one, "model", None) is patcher.model:
                stored = {**{key: getattr(kept, "weight", kept) for key, kept in one.backup.items()}, **stored}
        return stored

    def _calculate(self, patches: list[tuple[Any, ...]], weight: Tensor) -> Tensor:
        from ldm_patched.modules.lora import calculate_weight

        merged: Tensor = calculate_weight(patches, weight, "")
        return merged


class ForgeClassic(ReForge):
    """Forge Classic, and reForge before its patches were objects: the patcher itself merges."""

    name = "Forge Classic"
    needs = (*ReForge._shared_needs, "modules_forge.unet_patcher:UnetPatcher.calculate_weight")

    def __init__(self, networks: Any) -> None:
        super().__init__(networks)
        # Of the last `take`: the host's patcher with all LoRAs, and where each name's file is.
        self._last: Any = None
        self._known: dict[str, str] = {}

    def take(self, tags: Sequence[Tag]) -> list[str]:
        """Also takes what an earlier prompt of this generation has left: the host adds a hires prompt's LoRAs to those
        of the prompt itself."""
        self._check()
        self._restack()
        self._known |= self._files()
        stacked = self._stacked(tags)
        said = super().take([*tags, *stacked])
        after = self._model.forge_objects_after_applying_lora
        self._last = None if after is None else after.unet
        return [*said, *self._differing(tags, stacked)]

    def _check(self) -> None:
        super()._check()
        status = getattr(self._model.forge_objects.unet, "patch_status", None)
        if status is not None:
            _noting(status)

    def _files(self) -> dict[str, str]:
        return {**self._known, **super()._files()}

    def _restack(self) -> None:
        """The host has added LoRAs to our patcher, which was in place: they are to be added to its own."""
        after = self._model.forge_objects_after_applying_lora
        if after is None or self._last is None or after.unet is self._last:
            return
        options = after.unet.model_options.get("transformer_options", {})
        if options.get(MARK) != self._mark or self._ours is None:
            return
        before = {id(patch) for listed in self._ours.patches.values() for patch in listed}
        whole = self._last.clone()
        for key, listed in after.unet.patches.items():
            added = [patch for patch in listed if id(patch) not in before]
            if added:
                whole.patches[key] = [*whole.patches.get(key, ()), *added]
        after.unet = whole
        _announce(whole)

    def _stacked(self, tags: Sequence[Tag]) -> list[Tag]:
        """Of the last `take` those that are still there and that no tag names now."""
        after = self._model.forge_objects_after_applying_lora
        if after is None:
            return []
        there = {id(patch) for listed in after.unet.patches.values() for patch in listed}
        files = self._files()
        named = {(files.get(tag.name), tag.unet) for tag in tags}
        names = {file: name for name, file in files.items()}
        return [
            Tag(names[taken.key[0]], taken.key[1], taken.role)
            for taken in self._taken
            if taken.key[:2] not in named
            and any(id(patch) in there for listed in taken.patches.values() for patch in listed)
        ]

    def _differing(self, tags: Sequence[Tag], stacked: Sequence[Tag]) -> list[str]:
        roles = {tag.name: tag.role for tag in tags if tag.role is not None}
        return [
            f"{self.name} keeps the prompt's LoRAs in the hires pass, besides the hires prompt's own: {tag} stays "
            f"{tag.role.value}, although {tag.name} has another role there"
            for tag in stacked
            if tag.role is not None and roles.get(tag.name, tag.role) is not tag.role
        ]

    def _calculate(self, patches: list[tuple[Any, ...]], weight: Tensor) -> Tensor:
        merged: Tensor = self._model.forge_objects.unet.calculate_weight(patches, weight, "")
        return merged


def _announce(patcher: Any) -> None:
    """Classic notes changes, over all clones of a patcher, to know whether it has to merge anew."""
    status = getattr(patcher, "patch_status", None)
    if status is None:
        return
    _noting(status)()
    if hasattr(status, "l_cache"):
        # With `--persistent-patches` it takes off what is merged only where the prompt's LoRAs are others.
        status.l_cache = None


def _noting(status: Any) -> Callable[[], Any]:
    """Of a `PatchStatus` what notes a change; since May 2025 it has another name. Raises Unsupported."""
    for name in ("on_add_patches", "update"):
        found: Callable[[], Any] | None = getattr(status, name, None)
        if found is not None:
            return found
    raise Unsupported(f"{type(status).__name__} of the UNet's patcher has neither on_add_patches nor update")


def _as_forge(patch: Patch) -> Patch:
    """A patch as Forge would have it: `[strength, (kind, values), strength_model, offset, function]`."""
    strength, own, strength_model, *rest = patch
    offset, function = rest[:2] or (None, None)  # Forge Neo has a sixth value, which says whether it is merged at all
    if hasattr(own, "calculate_weight"):
        kind, values = own.name, tuple(own.weights)
    elif isinstance(own, tuple) and len(own) == 2 and isinstance(own[0], str):
        kind, values = own
    else:
        return [strength, own, strength_model, offset, function]
    length = _LENGTHS.get(kind, len(values))
    values = (*values, *(None for _ in range(length - len(values))))
    if all(one is None for one in values[length:]):
        values = values[:length]
    shown = _Value((kind, values))
    shown.own = own
    return [strength, shown, strength_model, offset, function]


def _is_same(one: Patch, other: Patch) -> bool:
    """Whether two patches come from the same tensors of a file, for the same part of the parameter."""
    return one[3:4] == other[3:4] and _equal(_contents(one[1]), _contents(other[1]))


def _contents(value: Any) -> Any:
    return (value.name, *value.weights) if hasattr(value, "calculate_weight") else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        if one is other:
            return True
        alike = isinstance(other, Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
        return alike and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        alike = isinstance(other, type(one)) and len(one) == len(other)
        return alike and all(map(_equal, one, other))
    return not isinstance(other, Tensor) and bool(one == other)
