"""Forge's layers that store their weights in fewer bits: what depends on a weight is made from what the layer computes
with, and on Flux's fused layers every part is weighed by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_forge_patches
import pytest
import torch
from fake_forge import Forge as WebUI
from fake_forge import lora
from torch import Tensor, nn

from lib_dynfuse.core import Fusion, Role, strategy
from lib_dynfuse.core.delta import Delta
from lib_dynfuse.hosts.base import Tag
from lib_dynfuse.hosts.forge import Forge

FOX, INK, PLAIN = Tag("fox", 1.0, Role.SUBJECT), Tag("ink", 0.7, Role.STYLE), Tag("detail", 0.5, None)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Linear(nn.Module):
    """The host's own, of a packed weight [8, 8]; `true` is what it computes with."""

    def __init__(self, packed: Any, true: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = self.packed = packed
        self.true, self.scale_weight = true, scale
        self.bias = nn.Parameter(rand(8, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.true, self.bias)


def told(data: Tensor, **attributes: Any) -> Any:
    packed = nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(packed, name, value)
    return packed


def scaled() -> Linear:
    packed = told(rand(8, 8).to(torch.float8_e4m3fn))
    scale = torch.tensor(0.25)
    return Linear(packed, packed.float() * scale, scale)


def blocks() -> Linear:
    """GGUF; the bits are not yet as the host will have them in use, so that they cannot be read."""

    def bake(weight: Any) -> None:
        weight.baked = True

    def copied(data: Tensor) -> Any:
        return told(data.clone(), **{name: getattr(packed, name) for name in NAMES})

    packed = told(torch.zeros(8, 18, dtype=torch.uint8), real_shape=torch.Size([8, 8]), copy_with_data=copied)
    packed.baked, packed.gguf_cls = False, SimpleNamespace(bake=bake)
    packed.unpacked = rand(8, 8)
    return Linear(packed, packed.unpacked)


def four_bits() -> Linear:
    state = SimpleNamespace(shape=torch.Size([8, 8]))
    packed = told(torch.zeros(32, 1, dtype=torch.uint8), quant_state=state, bnb_quantized=True, unpacked=rand(8, 8))
    return Linear(packed, packed.unpacked)


NAMES = ("real_shape", "copy_with_data", "baked", "gguf_cls", "unpacked")
FORMS: dict[str, Callable[[], Linear]] = {"fp8 with a scale": scaled, "GGUF": blocks, "nf4": four_bits}


def dequantize_tensor(weight: Any) -> Tensor:
    assert weight.baked
    unpacked: Tensor = weight.unpacked
    return unpacked


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> WebUI:
    one = WebUI(monkeypatch)
    for name, function in (("gguf", dequantize_tensor), ("bnb", lambda weight: weight.unpacked)):
        module: Any = ModuleType(f"backend.operations_{name}")
        module.dequantize_tensor = module.functional_dequantize_4bit = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["backend.patcher.lora"], "merge_lora_to_weight", fake_forge_patches.merge)
    return one


def deltas(webui: WebUI, *tags: Tag) -> dict[Role, Delta]:
    """What the roles add to `to_q`."""
    host = Forge(webui.networks)
    assert host.take(tags) == []
    webui.begin_pass()
    return host.layers()["to_q"][1]


def put(webui: WebUI, layer: Linear) -> Linear:
    setattr(webui.unet, "to_q", layer)  # noqa: B010  its type is another
    return layer


def add(webui: WebUI, name: str, **patches: tuple[str, Any]) -> None:
    webui.add_file(name, {f"to_q.{key}": patch for key, patch in patches.items()})


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_replaces_the_packed_one_replaces_all_of_it(webui: WebUI, form: str) -> None:
    layer = put(webui, FORMS[form]())
    add(webui, "fox", weight=("set", (rand(8, 8, seed=5),)), bias=("set", (rand(8, seed=6),)))
    webui.activate(("fox", 1.0))
    x = rand(2, 5, 8)
    with torch.no_grad():
        y = layer(x)
        found = y + deltas(webui, FOX)[Role.SUBJECT](x, y - layer.bias)
        torch.testing.assert_close(found, nn.functional.linear(x, rand(8, 8, seed=5), rand(8, seed=6)))


def test_looking_at_a_weight_changes_nothing_of_the_host_s(webui: WebUI) -> None:
    layer = put(webui, blocks())
    add(webui, "fox", weight=("set", (rand(8, 8, seed=5),)))
    webui.activate(("fox", 1.0))
    deltas(webui, FOX)
    assert not layer.packed.baked


@torch.no_grad()
def test_a_network_added_on_the_fly_is_not_rounded_to_the_stored_bits(webui: WebUI) -> None:
    packed = told(rand(8, 8).to(torch.float8_e4m3fn))
    put(webui, Linear(packed, packed.float()))
    add(webui, "fox", weight=("set", (rand(8, 8, seed=5),)))
    add(webui, "detail", weight=("lora", (rand(8, 2), rand(2, 8), 1.0, None, None)))
    webui.activate(("fox", 1.0), ("detail", 0.5))
    loaded = webui.model.forge_objects_after_applying_lora.unet.lora_patches
    for key in list(loaded):
        loaded[(*key[:3], True)] = loaded.pop(key)
    detail = 0.5 * 0.5 * rand(8, 2) @ rand(2, 8)
    update = deltas(webui, FOX, PLAIN)[Role.SUBJECT].dense()
    assert update is not None
    torch.testing.assert_close(packed.float() + detail + update, rand(8, 8, seed=5))


def test_on_a_fused_layer_every_part_is_weighed_by_itself(webui: WebUI) -> None:
    webui.unet.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24)}).requires_grad_(False)
    for seed, name in enumerate(("fox", "ink")):
        webui.add_file(name, {"attn.qkv.weight": lora(webui.unet.attn["qkv"], seed)})
    webui.activate(("fox", 1.0), ("ink", 0.7))
    host = Forge(webui.networks)
    host.take([FOX, INK])
    webui.begin_pass()
    with Fusion(host.layers(), strategy("kl")) as fusion:
        assert fusion.names == ["attn.qkv[0:8]", "attn.qkv[8:16]", "attn.qkv[16:24]"]


def test_a_network_alone_on_a_fused_layer_stays_in_one_piece(webui: WebUI) -> None:
    webui.unet.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24)}).requires_grad_(False)
    webui.add_file("fox", {"attn.qkv.weight": lora(webui.unet.attn["qkv"], 0)})
    webui.activate(("fox", 1.0))
    host = Forge(webui.networks)
    host.take([FOX])
    webui.begin_pass()
    assert host.layers()["attn.qkv"][1][Role.SUBJECT].rank == 2


def test_where_a_network_widens_a_layer_all_stay_merged_there(webui: WebUI) -> None:
    """A control network makes Flux's first layer take more than the picture; the host then widens the others too."""
    add(webui, "fox", weight=("lora", (rand(8, 2), rand(2, 8), 1.0, None, None)))
    add(webui, "detail", weight=("lora", (rand(8, 2), rand(2, 12), 1.0, None, None)))
    webui.activate(("fox", 1.0), ("detail", 0.5))
    [line] = Forge(webui.networks).take([FOX, PLAIN])
    assert "fox: one layer stays merged" in line
    # The same after the host has merged it, and the layer is another one for the time being.
    loader = webui.model.forge_objects.unet.model.lora_loader
    loader.backup["diffusion_model.to_q.weight"] = webui.unet.to_q.weight.data
    webui.unet.to_q.weight.data = torch.zeros(8, 12)
    [line] = Forge(webui.networks).take([FOX, PLAIN])
    assert "fox: one layer stays merged" in line
    add(webui, "ink", weight=("lora", (rand(8, 2), rand(2, 12), 1.0, None, None)))
    webui.activate(("ink", 0.7))
    [line] = Forge(webui.networks).take([INK])
    assert "ink: one layer stays merged" in line
