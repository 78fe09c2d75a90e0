"""Which WebUI this is, and whether it still has what fusion needs of it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from lib_dynfuse.hosts.a1111 import Automatic1111
from lib_dynfuse.hosts.base import Host, Unsupported
from lib_dynfuse.hosts.forge import Forge
from lib_dynfuse.hosts.forge_neo import ForgeNeo, ForgeNeoByParameter
from lib_dynfuse.hosts.reforge import ForgeClassic, ReForge

# What a WebUI's source folder has, as modules or as `module:attribute`, and those after it have not.
_KINDS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("modules_forge.packages.comfy", "backend.patcher.lora:LoraLoader"), ForgeNeo),
    (("modules_forge.packages.comfy",), ForgeNeoByParameter),
    (("modules_forge.unet_patcher", "ldm_patched.modules.weight_adapter"), ReForge),
    (("modules_forge.unet_patcher",), ForgeClassic),
    (("modules_forge",), Forge),
    (("modules",), Automatic1111),
)
# What the extension's script listens to, whichever the host.
_NEEDED_EVERYWHERE = (
    "modules.script_callbacks:on_cfg_denoiser",
    "modules.scripts:Script.after_extra_networks_activate",
    "modules.scripts:Script.process_before_every_sampling",
)


def detect() -> Host:
    """The host that this process runs in. Raises Unsupported that names what is missing."""
    kind = next((kind for folders, kind in _KINDS if all(map(_is_there, folders))), None)
    if kind is None:
        raise Unsupported("this is no WebUI that is known here")
    networks = sys.modules.get("networks")
    if networks is None:
        raise Unsupported("the WebUI's own Lora extension is not there; is it switched off?")
    missing = lacking((*kind.needs, *_NEEDED_EVERYWHERE))
    if missing:
        raise Unsupported(f"this {kind.name} has no {', no '.join(missing)}: it is older or newer than the ones known")
    host: Host = kind(networks)
    return host


def _is_there(what: str) -> bool:
    if ":" in what:
        return not lacking([what])
    try:
        return importlib.util.find_spec(what) is not None
    except ModuleNotFoundError:  # of what it would be in
        return False


def lacking(needs: Sequence[str]) -> list[str]:
    """Of `module:attribute.attribute`, those that cannot be had here."""
    return [need for need in needs if not _has(*need.split(":"))]


def _has(module: str, attributes: str) -> bool:
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
    except ImportError:
        return False
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True
