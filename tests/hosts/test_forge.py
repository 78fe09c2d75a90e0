"""Forge: the role networks are out of the merge for a pass and beside the layers instead, and nothing outlives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_forge import Forge as WebUI
from fake_forge import lora, new_model
from fusing import fused
from torch import Tensor

from lib_dynfuse.core import Role, Row
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.base import Tag
from lib_dynfuse.hosts.forge import Forge, rows_of

FOX, INK, PLAIN = Tag("fox", 1.0, Role.SUBJECT), Tag("ink", 0.7, Role.STYLE), Tag("detail", 0.5, None)
ALL = [("fox", 1.0), ("ink", 0.7), ("detail", 0.5)]


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> WebUI:
    one = WebUI(monkeypatch)
    for seed, name in enumerate(("fox", "ink", "detail")):
        one.add_file(name, {f"{path}.weight": lora(one.unet.get_submodule(path), seed) for path in ("conv", "to_q")})
    return one


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_the_sum_is_what_the_host_merges(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    webui.begin_pass()
    merged = webui.sample(x)
    host = Forge(webui.networks)
    assert host.take([FOX, INK, PLAIN]) == []
    webui.begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
    assert list(webui.model.forge_objects.unet.lora_patches) == [("/loras/detail.safetensors", 0.5, 1.0, False)]


@torch.no_grad()
def test_block_weights_of_another_extension_are_those_of_the_deltas(webui: WebUI, x: Tensor) -> None:
    """sd-webui-lora-block-weight multiplies a file's patches and puts a text where its strength was."""
    webui.activate(*ALL)
    patches = webui.model.forge_objects_after_applying_lora.unet.lora_patches
    for file, weights in (("fox", (1.0, 0.25)), ("ink", (0.5, 0.0))):
        key = next(key for key in patches if file in key[0])
        entry = patches.pop(key)
        for ratio, listed in zip(weights, entry.values(), strict=True):
            listed[:] = [[key[1] * ratio, *patch[1:]] for patch in listed]
        patches[(key[0], f"{key[1]},{weights}", *key[2:])] = entry
    webui.begin_pass()
    merged = webui.sample(x)
    host = Forge(webui.networks)
    assert host.take([FOX, INK, PLAIN]) == []
    webui.begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
    assert list(webui.model.forge_objects.unet.lora_patches) == [("/loras/detail.safetensors", 0.5, 1.0, False)]


@torch.no_grad()
def test_off_is_bit_for_bit_what_it_was_before(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    webui.begin_pass()
    merged = webui.sample(x)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    webui.begin_pass()
    with fused(host, "kl"):
        webui.sample(x)
    host.give_back()
    assert torch.equal(webui.sample(x), merged)
    webui.begin_pass()
    assert torch.equal(webui.sample(x), merged)


@torch.no_grad()
def test_the_patches_that_the_host_keeps_are_never_touched(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    kept = webui.model.forge_objects_after_applying_lora.unet
    entries = list(kept.lora_patches)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    webui.begin_pass()
    host.layers()
    assert webui.model.forge_objects.unet is not kept
    assert list(kept.lora_patches) == entries
    assert kept.model_options == {"transformer_options": {}}


@torch.no_grad()
def test_a_pass_that_is_announced_twice_is_taken_once(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    webui.begin_pass()
    merged = webui.sample(x)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    host.layers()
    webui.begin_pass()
    host.layers()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_another_model_under_way_is_taken_as_well(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    host.layers()
    webui.shared.sd_model = new_model(seed=3)
    webui.activate(*ALL)
    merged = webui.sample(x)
    host.take([FOX, INK, PLAIN])
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_call_with_another_patcher_is_left_alone(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    webui.begin_pass()
    with fused(host) as seen:
        webui.begin_pass()  # somebody else puts the host's own patcher back
        merged = webui.sample(x)
    assert seen == [None]
    assert torch.equal(webui.sample(x), merged)


@torch.no_grad()
def test_what_cannot_be_hooked_stays_merged_and_is_told(webui: WebUI, x: Tensor) -> None:
    table = torch.nn.Embedding(3, 8)
    webui.unet.add_module("table", table.requires_grad_(False))
    webui.add_file("odd", {"to_q.weight": lora(webui.unet.to_q, 5), "table.weight": ("diff", (torch.ones(3, 8),))})
    webui.activate(("odd", 1.0), ("ink", 0.7))
    webui.begin_pass()
    merged = webui.sample(x)
    table_merged = table.weight.clone()
    host = Forge(webui.networks)
    [told] = host.take([Tag("odd", 1.0, Role.SUBJECT), INK])
    assert told == "odd: one layer stays merged, it cannot be chosen: diffusion_model.table.weight"
    webui.begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
    assert torch.equal(table.weight, table_merged)


@torch.no_grad()
def test_the_next_batch_of_a_prompt_uses_what_the_first_has_made(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    host = Forge(webui.networks)
    found = []
    for _ in range(2):
        webui.activate(*ALL)
        host.take([FOX, INK, PLAIN])
        webui.begin_pass()
        found.append(host.layers()["to_q"][1][Role.SUBJECT])
        host.give_back()
    assert found[0] is found[1]


def test_the_layers_stand_in_the_network_s_order(webui: WebUI) -> None:
    webui.activate(*ALL)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    webui.begin_pass()
    layers = host.layers()
    assert list(layers) == ["conv", "to_q"]
    assert all(set(deltas) == {Role.SUBJECT, Role.STYLE} for _, deltas in layers.values())


def test_a_lora_that_is_not_there_is_named(webui: WebUI) -> None:
    webui.networks.loaded_networks = []
    with pytest.raises(DynFuseError, match="no LoRA gone was found; Forge then leaves out the others too"):
        Forge(webui.networks).take([FOX, Tag("gone", 1.0, Role.STYLE)])


def test_a_lora_that_the_host_could_not_fit_is_told(webui: WebUI) -> None:
    webui.activate(("fox", 1.0), ("ink", 0.7))
    del webui.model.forge_objects_after_applying_lora.unet.lora_patches["/loras/ink.safetensors", 0.7, 1.0, False]
    [told] = Forge(webui.networks).take([FOX, INK])
    assert told.startswith("Forge found nothing of ink for this model's UNet (it may be for another model")


@pytest.mark.parametrize(
    ("parts", "count", "expected"),
    [
        ([1, 0], 4, [(0, False, 0), (1, False, 0), (0, True, 0), (1, True, 0)]),
        ([0], 2, [(0, True, 0), (1, True, 0)]),
        ([1, 0, 0], 6, [(0, False, 0), (1, False, 0), (0, True, 0), (1, True, 0), (0, True, 0), (1, True, 0)]),
        ([0], 6, [(image, True, tile) for tile in range(3) for image in range(2)]),
        ([1, 0], 3, []),
        ([], 2, []),
    ],
)
def test_rows_are_told_by_the_host_s_own_list(parts: list[int], count: int, expected: list[Any]) -> None:
    rows = rows_of(parts, count, [7, 8])
    assert [(row.image, row.cond, row.tile) for row in rows] == expected
    assert all(row.seed == 7 + row.image for row in rows)


@torch.no_grad()
def test_seeds_and_steps_come_from_the_denoiser(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)
    host = Forge(webui.networks)
    host.take([FOX, INK, PLAIN])
    webui.begin_pass()
    denoiser = SimpleNamespace(sampler=SimpleNamespace(config=None), p=SimpleNamespace(seeds=[41]), step=2)
    call = SimpleNamespace(denoiser=denoiser, sigma=torch.tensor([3.5]), total_sampling_steps=9)
    with fused(host) as seen:
        place = host.place(call)
        webui.sample(x)
    assert (place.step, place.total, place.sigma) == (2, 9, 3.5)
    assert seen == [(Row(0, False, 41), Row(0, True, 41))]
