"""Which WebUI it is, and what is said where it has changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from lib_dynfuse.hosts import detect as detection
from lib_dynfuse.hosts.base import Unsupported
from lib_dynfuse.hosts.detect import detect
from lib_dynfuse.hosts.forge_neo import ForgeNeo, ForgeNeoByParameter

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts modules in place, each with attributes as `name.name`; packages come with what is in them."""

    def put(**attributes: str) -> None:
        for dotted, names in attributes.items():
            name = dotted.replace("__", ".")
            module: Any = ModuleType(name)
            for attribute in names.split():
                first, _, second = attribute.partition(".")
                if second:
                    vars(module).setdefault(first, type(first, (), {}))
                    setattr(vars(module)[first], second, None)
                else:
                    setattr(module, first, None)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(
            detection.importlib.util, "find_spec", lambda name: sys.modules.get(name) if name in sys.modules else None
        )

    return put


A1111 = {
    "modules": "",
    "modules__script_callbacks": "on_cfg_denoiser",
    "modules__scripts": "Script.after_extra_networks_activate Script.process_before_every_sampling",
    "networks": "loaded_networks network_apply_weights network_restore_weights_from_backup",
}
FORGE = {
    **A1111,
    "modules_forge": "",
    "backend": "",
    "backend__patcher": "",
    "backend__patcher__lora": "LoraLoader.refresh merge_lora_to_weight",
    "backend__patcher__unet": "UnetPatcher.set_transformer_option",
    "backend__utils": "get_attr_with_parent",
}
NEO = {**FORGE, "modules_forge__packages__comfy": ""}
NEO_BY_PARAMETER = {
    **NEO,
    "networks": "loaded_networks load_lora_for_models load_lora_state_dict",
    "backend__patcher__base": "get_key_weight",
    "backend__patcher__lora": "merge_lora_to_weight",
    "backend__patcher__unet": "UnetPatcher.add_patches UnetPatcher.clone UnetPatcher.set_transformer_option",
}
CLASSIC = {
    **A1111,
    "networks": "loaded_networks load_lora_for_models load_lora_state_dict",
    "modules_forge": "",
    "modules_forge__unet_patcher": "UnetPatcher.clone UnetPatcher.set_transformer_option UnetPatcher.calculate_weight",
    "ldm_patched__modules__model_management": "current_loaded_models",
}
REFORGE = {**CLASSIC, "ldm_patched__modules__lora": "calculate_weight", "ldm_patched__modules__weight_adapter": ""}


def test_no_webui_at_all(install: Install) -> None:
    install()
    with pytest.raises(Unsupported, match="this is no WebUI that is known here"):
        detect()


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (A1111, "AUTOMATIC1111"),
        (FORGE, "Forge"),
        (REFORGE, "reForge"),
        (CLASSIC, "Forge Classic"),
        (NEO, "Forge Neo"),
        (NEO_BY_PARAMETER, "Forge Neo"),
    ],
)
def test_a_webui_that_has_everything(install: Install, modules: dict[str, str], name: str) -> None:
    install(**modules)
    assert detect().name == name


def test_the_two_forge_neos_are_told_apart_by_what_is_there(install: Install) -> None:
    install(**NEO)
    assert type(detect()) is ForgeNeo
    install(**NEO_BY_PARAMETER)
    assert type(detect()) is ForgeNeoByParameter


def test_without_its_lora_extension(install: Install) -> None:
    install(**{name: names for name, names in FORGE.items() if name != "networks"})
    with pytest.raises(Unsupported, match="the WebUI's own Lora extension is not there; is it switched off"):
        detect()


def test_what_has_moved_is_named(install: Install) -> None:
    install(**{**FORGE, "backend__patcher__lora": "merge_lora_to_weight"})
    with pytest.raises(Unsupported, match=r"this Forge has no backend\.patcher\.lora:LoraLoader\.refresh: it is older"):
        detect()


def test_everything_that_has_moved_is_named(install: Install) -> None:
    install(**{**A1111, "networks": "network_apply_weights", "modules__scripts": "Script.setup"})
    with pytest.raises(Unsupported) as error:
        detect()
    for need in ("networks:loaded_networks", "network_restore_weights_from_backup", "process_before_every_sampling"):
        assert need in str(error.value)
