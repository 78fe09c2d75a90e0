"""reForge and Forge Classic: patches without file names, told apart by what each file alone would give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_forge import lora
from fake_reforge import Adapter, ClassicPatcher, PersistentPatcher, ReForgePatcher, WebUI
from fusing import fused
from torch import Tensor

from lib_dynfuse.core import Role
from lib_dynfuse.core.delta import LowRank, Scaled
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.base import Tag, Unsupported
from lib_dynfuse.hosts.forge_neo import ForgeNeo
from lib_dynfuse.hosts.reforge import ForgeClassic, ReForge

FOX, INK, PLAIN = Tag("fox", 1.0, Role.SUBJECT), Tag("ink", 0.7, Role.STYLE), Tag("detail", 0.5, None)
ALL = [("fox", 1.0), ("detail", 0.5), ("ink", 0.7)]
WEIGHTS = ("conv.weight", "to_q.weight")


def shown_as(kind: type[Any], patch: tuple[str, Any]) -> Any:
    """A low-rank patch as the host of that patcher makes it."""
    values = patch[1][:4]
    return Adapter("lora", (*values, None, None)) if kind is ReForgePatcher else ("lora", values)


@pytest.fixture(params=[ReForgePatcher, ClassicPatcher, PersistentPatcher])
def webui(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> WebUI:
    one = WebUI(monkeypatch, request.param)
    for seed, name in enumerate(("fox", "ink", "detail")):
        layers = {key: one.unet.get_submodule(key.removesuffix(".weight")) for key in WEIGHTS}
        one.add_file(name, {key: shown_as(one.kind, lora(layer, seed)) for key, layer in layers.items()})
    return one


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(9))


def host_of(webui: WebUI) -> ReForge:
    return (ReForge if webui.kind is ReForgePatcher else ForgeClassic)(webui.networks)


def merged_by_the_host(webui: WebUI, x: Tensor, *tags: tuple[str, float]) -> Tensor:
    webui.activate(*tags)
    webui.begin_pass()
    return webui.sample(x)


@torch.no_grad()
def test_the_sum_is_what_the_host_merges(webui: WebUI, x: Tensor) -> None:
    merged = merged_by_the_host(webui, x, *ALL)
    host = host_of(webui)
    assert host.take([FOX, PLAIN, INK]) == []
    webui.begin_pass()
    with fused(host) as seen:
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
    assert seen == [()]  # a call of this sampling, whose pictures no callback has named


@torch.no_grad()
def test_low_rank_stays_low_rank(webui: WebUI) -> None:
    webui.activate(*ALL)
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    webui.begin_pass()
    for _, deltas in host.layers().values():
        for delta in deltas.values():
            while isinstance(delta, Scaled):
                delta = delta.inner
            assert isinstance(delta, LowRank)


@torch.no_grad()
def test_what_stays_merged_is_what_the_host_makes_without_the_roles(webui: WebUI, x: Tensor) -> None:
    plain = merged_by_the_host(webui, x, ("detail", 0.5))
    webui.activate(*ALL)
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    webui.begin_pass()
    host.layers()
    assert torch.equal(webui.sample(x), plain)


@torch.no_grad()
def test_off_is_bit_for_bit_what_it_was_before(webui: WebUI, x: Tensor) -> None:
    bare = merged_by_the_host(webui, x)
    merged = merged_by_the_host(webui, x, *ALL)
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    webui.begin_pass()
    with fused(host, "kl"):
        webui.sample(x)
    host.give_back()
    assert torch.equal(webui.sample(x), merged)
    webui.begin_pass()
    assert torch.equal(webui.sample(x), merged)
    assert torch.equal(merged_by_the_host(webui, x), bare)


@torch.no_grad()
def test_the_text_encoder_keeps_every_lora(webui: WebUI) -> None:
    webui.activate(*ALL)
    webui.begin_pass()
    encoder = webui.model.forge_objects.clip
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    host.layers()
    assert webui.model.forge_objects.clip is encoder
    assert [patch[0] for patch in encoder.patches["layer.weight"]] == [1.0, 0.5, 0.7]


@torch.no_grad()
def test_the_patches_that_the_host_keeps_are_never_touched(webui: WebUI) -> None:
    webui.activate(*ALL)
    kept = webui.model.forge_objects_after_applying_lora.unet
    before = {key: listed[:] for key, listed in kept.patches.items()}
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    webui.begin_pass()
    host.layers()
    assert webui.model.forge_objects.unet is not kept
    assert kept.patches == before
    assert kept.model_options == {"transformer_options": {}}


@torch.no_grad()
def test_a_pass_that_is_announced_twice_is_taken_once(webui: WebUI, x: Tensor) -> None:
    merged = merged_by_the_host(webui, x, *ALL)
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    for _ in range(2):
        webui.begin_pass()
        host.layers()
        host.layers()
        with fused(host):
            torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_refiner_is_taken_as_well_and_left_as_it_was(webui: WebUI, x: Tensor) -> None:
    base, refiner = webui.model, webui.new_model(seed=3)
    webui.shared.sd_model = refiner
    merged = merged_by_the_host(webui, x, *ALL)
    webui.shared.sd_model = base
    webui.activate(*ALL)
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    host.layers()
    webui.shared.sd_model = refiner  # its LoRAs are loaded already, so that the host loads nothing
    webui.activate(*ALL)
    host.take([FOX, PLAIN, INK])
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
    host.give_back()
    assert torch.equal(webui.sample(x), merged)


@torch.no_grad()
def test_patches_of_other_extensions_stay(webui: WebUI, x: Tensor) -> None:
    webui.activate(*ALL)

    def begin_pass() -> None:
        webui.begin_pass()
        patcher = webui.model.forge_objects.unet.clone()
        patcher.add_patches({"diffusion_model.out.weight": ("diff", (torch.ones(4, 8),))}, 0.2)
        webui.model.forge_objects.unet = patcher

    begin_pass()
    merged = webui.sample(x)
    host = host_of(webui)
    host.take([FOX, PLAIN, INK])
    begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_one_file_with_two_strengths_is_told_apart(webui: WebUI, x: Tensor) -> None:
    tags = [("fox", 0.3), ("fox", 1.0), ("ink", 0.7)]
    merged = merged_by_the_host(webui, x, *tags)
    host = host_of(webui)
    host.take([Tag("fox", 0.3, None), FOX, INK])
    webui.begin_pass()
    with fused(host):
        assert [patch[0] for patch in webui.model.forge_objects.unet.patches["diffusion_model.to_q.weight"]] == [0.3]
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_kind_that_depends_on_the_weight_sees_it_with_the_plain_networks(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    webui = WebUI(monkeypatch, ClassicPatcher)
    factors = [torch.randn(*shape) * 0.3 for shape in ((2, 8), (8, 2), (2, 8), (8, 2))]
    webui.add_file("odd", {"to_q.weight": ("glora", (*factors, 1.0))})
    webui.add_file("detail", {"to_q.weight": ("diff", (torch.randn(8, 8),))})
    merged = merged_by_the_host(webui, x, ("detail", 0.5), ("odd", 0.8))
    host = host_of(webui)
    host.take([PLAIN, Tag("odd", 0.8, Role.SUBJECT)])  # while both are merged into the weight
    webui.begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_adapter_of_another_kind_is_merged_by_itself(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    webui = WebUI(monkeypatch, ReForgePatcher)
    webui.add_file("turn", {"to_q.weight": Adapter("oft", (torch.linalg.qr(torch.randn(8, 8)).Q, None, 1.0, None))})
    merged = merged_by_the_host(webui, x, ("turn", 0.6))
    host = host_of(webui)
    host.take([Tag("turn", 0.6, Role.STYLE)])
    webui.begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_cannot_be_hooked_stays_merged_and_is_told(webui: WebUI, x: Tensor) -> None:
    table = torch.nn.Embedding(3, 8)
    webui.unet.add_module("table", table.requires_grad_(False))
    odd = {"table.weight": ("diff", (torch.ones(3, 8),)), "to_q.weight": shown_as(webui.kind, lora(webui.unet.to_q, 5))}
    webui.add_file("odd", odd)
    merged = merged_by_the_host(webui, x, ("odd", 1.0), ("ink", 0.7))
    table_merged = table.weight.clone()
    host = host_of(webui)
    [told] = host.take([Tag("odd", 1.0, Role.SUBJECT), INK])
    assert told == "odd: one layer stays merged, it cannot be chosen: diffusion_model.table.weight"
    webui.begin_pass()
    with fused(host):
        torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
    assert torch.equal(table.weight, table_merged)


@torch.no_grad()
def test_the_next_picture_of_a_prompt_needs_no_merge(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    webui = WebUI(monkeypatch, ReForgePatcher)
    for seed, name in enumerate(("fox", "ink", "detail")):
        webui.add_file(name, {"to_q.weight": shown_as(ReForgePatcher, lora(webui.unet.to_q, seed))})
    for _ in range(3):
        webui.activate(*ALL)
        host = host_of(webui)
        host.take([FOX, PLAIN, INK])
        webui.begin_pass()
        with fused(host):
            webui.sample(x)
        host.give_back()
    assert webui.model.forge_objects.unet.model.merges == 1


@torch.no_grad()
def test_the_next_batch_of_a_prompt_uses_what_the_first_has_made(webui: WebUI, x: Tensor) -> None:
    merged = merged_by_the_host(webui, x, *ALL)
    host = host_of(webui)
    found = []
    for _ in range(2):
        webui.activate(*ALL)
        host.take([FOX, PLAIN, INK])
        webui.begin_pass()
        found.append(host.layers()["to_q"][1][Role.SUBJECT])
        with fused(host):
            torch.testing.assert_close(webui.sample(x), merged, rtol=1e-5, atol=1e-6)
        host.give_back()
        webui.begin_pass()  # as an extension does that paints over parts of a finished picture
        assert torch.equal(webui.sample(x), merged)
    assert found[0] is found[1]


def test_a_lora_that_the_host_could_not_fit_is_told(webui: WebUI) -> None:
    webui.add_file("alien", {"elsewhere.weight": shown_as(webui.kind, lora(webui.unet.to_q, 5))})
    webui.activate(("fox", 1.0), ("alien", 0.7))
    [told] = host_of(webui).take([FOX, Tag("alien", 0.7, Role.STYLE)])
    assert " found nothing of alien for this model's UNet (it may be for another model" in told


def test_a_lora_that_is_not_there_is_named(webui: WebUI) -> None:
    webui.activate(("fox", 1.0))
    with pytest.raises(DynFuseError, match="no LoRA gone was found"):
        host_of(webui).take([FOX, Tag("gone", 1.0, Role.STYLE)])


@pytest.mark.parametrize("gone", ["patches", "backup", "model_options"])
def test_a_patcher_that_has_changed_is_told(webui: WebUI, gone: str) -> None:
    webui.activate(*ALL)
    delattr(webui.model.forge_objects.unet, gone)
    with pytest.raises(Unsupported, match=f"the UNet's patcher of this .* has no {gone}"):
        host_of(webui).take([FOX, PLAIN, INK])


def test_a_loader_that_wants_something_else_is_told(webui: WebUI) -> None:
    webui.activate(*ALL)
    webui.networks.load_lora_for_models = lambda model, clip, lora, strength: (model, clip)
    with pytest.raises(Unsupported, match=r"load_lora_for_models of this .*: too many positional arguments"):
        host_of(webui).take([FOX, PLAIN, INK])


def test_a_compiled_unet_is_told(webui: WebUI) -> None:
    webui.activate(*ALL)
    webui.model.forge_objects.unet.compiled = True
    with pytest.raises(Unsupported, match="the UNet is compiled"):
        host_of(webui).take([FOX, PLAIN, INK])


@torch.no_grad()
@pytest.mark.parametrize("reshape", [None, [8, 12]])
def test_forge_neo_s_adapters_are_read_as_well(reshape: list[int] | None) -> None:
    """Forge's way to keep networks and reForge's patches; one that widens its layer cannot stand beside it."""
    layer = torch.nn.Linear(8, 8)
    unet = torch.nn.ModuleDict({"to_q": layer})
    patch = (0.5, Adapter("lora", (*lora(layer, 1)[1][:4], None, reshape)), 1.0, None, None)

    class Host(ForgeNeo):
        @property
        def _model(self) -> Any:
            model = SimpleNamespace(diffusion_model=unet, lora_loader=SimpleNamespace(backup={}))
            objects = SimpleNamespace(unet=SimpleNamespace(model=model, lora_patches={}))
            return SimpleNamespace(forge_objects=objects, forge_objects_after_applying_lora=objects)

    taken = Host(None)._divide(("ink", 0.5, 1.0, False), Role.STYLE, {"diffusion_model.to_q.weight": [patch]}, [])
    assert set(taken.deltas) == (set() if reshape else {"to_q"})
    assert taken.left == ({"diffusion_model.to_q.weight": [patch]} if reshape else {})
