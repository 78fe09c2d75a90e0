"""AUTOMATIC1111: networks are taken out of its merge and given back, and say the same beside the layers as in them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_a1111 import (
    NetworkModuleFull,
    NetworkModuleGLora,
    NetworkModuleHada,
    NetworkModuleIa3,
    NetworkModuleLokr,
    NetworkModuleLora,
    NetworkModuleNorm,
    NetworkModuleOFT,
    WebUI,
    factors,
    rand,
)
from torch import Tensor

from lib_dynfuse.core import Fusion, Role, Row, strategy
from lib_dynfuse.core.delta import Delta, LowRank
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.a1111 import Automatic1111
from lib_dynfuse.hosts.base import Tag
from lib_dynfuse.roles import RoleError

SUBJECT, STYLE = Role.SUBJECT, Role.STYLE
CONV, NORM, LINEAR, QKV = (f"diffusion_model_{name}" for name in ("conv", "norm", "to_q", "qkv"))


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> WebUI:
    return WebUI(monkeypatch)


@pytest.fixture
def image() -> Tensor:
    return rand(2, 4, 4, 4, size=1.0)


KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "LoRA": (LINEAR, NetworkModuleLora, {"down_model": rand(2, 8), "up_model": rand(8, 2)}),
    "LoCon": (CONV, NetworkModuleLora, {"down_model": rand(2, 4, 3, 3), "up_model": rand(8, 2, 1, 1)}),
    "LoCon with a core": (
        CONV,
        NetworkModuleLora,
        {"down_model": rand(3, 4, 1, 1), "up_model": rand(8, 2, 1, 1), "mid_model": rand(2, 3, 3, 3)},
    ),
    "DoRA": (
        LINEAR,
        NetworkModuleLora,
        {"down_model": rand(2, 8), "up_model": rand(8, 2), "dora_scale": 1 + rand(1, 8)},
    ),
    "LoKr": (LINEAR, NetworkModuleLokr, {"w1": rand(2, 4), "w2a": rand(4, 1), "w2b": rand(1, 2)}),
    "LoKr convolution": (CONV, NetworkModuleLokr, {"w1": rand(2, 2), "w2": rand(4, 2, 3, 3)}),
    "LoHa": (LINEAR, NetworkModuleHada, {"w1a": rand(8, 2), "w1b": rand(2, 8), "w2a": rand(8, 2), "w2b": rand(2, 8)}),
    "(IA)3 on outputs": (LINEAR, NetworkModuleIa3, {"w": rand(8), "on_input": False}),
    "(IA)3 on inputs": (LINEAR, NetworkModuleIa3, {"w": rand(8), "on_input": True}),
    "OFT": (LINEAR, NetworkModuleOFT, {"oft_blocks": rand(2, 4, 4)}),
    "GLoRA": (
        LINEAR,
        NetworkModuleGLora,
        {"w1a": rand(2, 8), "w1b": rand(2, 8, seed=1), "w2a": rand(8, 2), "w2b": rand(8, 2, seed=1)},
    ),
    "full": (CONV, NetworkModuleFull, {"weight": rand(8, 4, 3, 3), "ex_bias": rand(8)}),
    "norm": (NORM, NetworkModuleNorm, {"w_norm": rand(8), "b_norm": rand(8, seed=1)}),
}


def as_kept(weights: dict[str, Any]) -> dict[str, Any]:
    """Factors in layers of their own, as the host keeps those of LoRAs."""
    return {k: SimpleNamespace(weight=v) if k.endswith("_model") else v for k, v in weights.items()}


def fused(webui: WebUI, image: Tensor, tags: Sequence[Tag], rule: str = "sum") -> Tensor:
    """The UNet's output with every network that has a role beside the layers instead of in them."""
    host = Automatic1111(webui.networks)
    webui.networks.load_networks([tag.name for tag in tags], [tag.unet for tag in tags])
    host.take(tags)
    try:
        with Fusion(host.layers(), strategy(rule)):
            result: Tensor = webui.unet(image)
    finally:
        host.give_back()
    return result


def merged(webui: WebUI, image: Tensor, tags: Sequence[Tag]) -> Tensor:
    webui.networks.load_networks([tag.name for tag in tags], [tag.unet for tag in tags])
    result: Tensor = webui.unet(image)
    return result


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_sum_of_both_roles_is_what_the_host_merges(webui: WebUI, image: Tensor, kind: str) -> None:
    key, made, weights = KINDS[kind]
    webui.add("fox", (key, made, as_kept(weights)))
    webui.add("ink", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q, seed=5)))
    plain = merged(webui, image, [])
    tags = [Tag("fox", 0.7, SUBJECT), Tag("ink", 1.2, STYLE)]
    expected = merged(webui, image, tags)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(fused(webui, image, tags), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_network_without_a_role_stays_merged(webui: WebUI, image: Tensor) -> None:
    for seed, name in enumerate(("fox", "ink", "detail")):
        weights = factors(webui.unet.conv, seed=seed)
        webui.add(name, (CONV, NetworkModuleLora, weights), (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    tags = [Tag("detail", 0.5, None), Tag("fox", 1.0, SUBJECT), Tag("ink", 1.0, STYLE)]
    torch.testing.assert_close(fused(webui, image, tags), merged(webui, image, tags), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kinds_that_depend_on_the_weight_see_the_plain_networks_in_it(webui: WebUI, image: Tensor) -> None:
    key, made, weights = KINDS["GLoRA"]
    webui.add("fox", (key, made, as_kept(weights)))
    webui.add("detail", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    tags = [Tag("detail", 0.5, None), Tag("fox", 1.0, SUBJECT)]
    torch.testing.assert_close(fused(webui, image, tags), merged(webui, image, tags), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_thirds_of_a_fused_layer_are_told_apart(webui: WebUI, image: Tensor) -> None:
    for name, seed in (("fox", 0), ("ink", 9)):
        thirds = (
            as_kept({"down_model": rand(2, 8, seed=seed + n), "up_model": rand(8, 2, seed=seed)}) for n in range(3)
        )
        keys = (f"{QKV}_{part}_proj" for part in "qkv")
        webui.add(name, *((key, NetworkModuleLora, weights) for key, weights in zip(keys, thirds, strict=True)))
    tags = [Tag("fox", 1.0, SUBJECT), Tag("ink", 1.0, STYLE)]
    torch.testing.assert_close(fused(webui, image, tags), merged(webui, image, tags), rtol=1e-4, atol=1e-5)
    host = Automatic1111(webui.networks)
    host.take(tags)
    layers = host.layers()
    host.give_back()
    with Fusion(layers, strategy("kl")) as fusion:
        assert fusion.names == ["qkv[0:8]", "qkv[8:16]", "qkv[16:24]"]


@torch.no_grad()
def test_the_multiplier_is_read_at_every_forward_pass(webui: WebUI, image: Tensor) -> None:
    network = webui.add("fox", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    host = Automatic1111(webui.networks)
    webui.networks.load_networks(["fox"], [1.0])
    host.take([Tag("fox", 1.0, SUBJECT)])
    found = {}
    with Fusion(host.layers(), strategy("sum")):
        for strength in (1.0, 0.25):
            network.unet_multiplier = strength
            found[strength] = webui.unet(image)
    host.give_back()
    for strength, output in found.items():
        torch.testing.assert_close(output, merged(webui, image, [Tag("fox", strength, None)]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_text_encoder_keeps_its_part(webui: WebUI) -> None:
    both = factors(webui.encoder), factors(webui.unet.to_q)
    webui.add("fox", ("transformer_text_model", NetworkModuleLora, both[0]), (LINEAR, NetworkModuleLora, both[1]))
    words = rand(1, 8)
    webui.networks.load_networks(["fox"], [0.8])
    expected = webui.encoder(words)
    host = Automatic1111(webui.networks)
    host.take([Tag("fox", 0.8, SUBJECT)])
    assert torch.equal(webui.encoder(words), expected)
    assert list(host.layers()) == ["to_q"]
    host.give_back()


@torch.no_grad()
def test_what_is_given_back_is_bit_for_bit_what_was_taken(webui: WebUI, image: Tensor) -> None:
    webui.add("fox", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    tags = [Tag("fox", 1.0, SUBJECT)]
    before, plain = merged(webui, image, tags), merged(webui, image, [])
    fused(webui, image, tags)
    assert torch.equal(merged(webui, image, tags), before)
    assert torch.equal(merged(webui, image, []), plain)
    assert webui.networks.loaded_networks == []


@torch.no_grad()
def test_a_network_is_found_again_when_the_host_loads_the_prompt_s_loras_while_it_is_taken(
    webui: WebUI, image: Tensor
) -> None:
    """A hires pass does: the host finds our copies among what it has loaded, and sets new strengths on them."""
    network = webui.add("fox", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    host = Automatic1111(webui.networks)
    webui.networks.load_networks(["fox"], [1.0])
    host.take([Tag("fox", 1.0, SUBJECT)])
    webui.networks.load_networks(["fox"], [0.5])
    host.take([Tag("fox", 0.5, STYLE)])
    layers = host.layers()
    assert list(layers["to_q"][1]) == [STYLE]
    with Fusion(layers, strategy("sum")):
        output = webui.unet(image)
    host.give_back()
    assert webui.networks.loaded_networks == [network]
    assert (network.unet_multiplier, network.dyn_dim) == (0.5, None)
    torch.testing.assert_close(output, merged(webui, image, [Tag("fox", 0.5, None)]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_low_rank_stays_low_rank(webui: WebUI) -> None:
    webui.add("fox", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    webui.networks.load_networks(["fox"], [1.0])
    host = Automatic1111(webui.networks)
    host.take([Tag("fox", 1.0, SUBJECT)])
    delta = host.layers()["to_q"][1][SUBJECT]
    host.give_back()
    assert any(isinstance(part, LowRank) for part in nested(delta))
    assert delta.rank == 2


def nested(delta: Delta) -> list[Delta]:
    return [delta, *(inner for part in delta.parts for inner in nested(part))]


def test_what_cannot_be_hooked_stays_merged_and_is_named(webui: WebUI) -> None:
    webui.model.network_layer_mapping["diffusion_model"] = webui.unet
    network = webui.add("fox", (LINEAR, NetworkModuleLora, factors(webui.unet.to_q)))
    network.modules["diffusion_model"] = network.modules[LINEAR]
    webui.networks.load_networks(["fox"], [1.0])
    host = Automatic1111(webui.networks)
    said = host.take([Tag("fox", 1.0, SUBJECT)])
    assert said == ["fox: one layer stays merged, it cannot be chosen: diffusion_model"]
    assert list(webui.networks.loaded_networks[0].modules) == ["diffusion_model"]
    host.give_back()


def test_networks_that_are_missing_or_leave_the_unet_alone_are_named(webui: WebUI) -> None:
    webui.add("words", ("transformer_text_model", NetworkModuleLora, factors(webui.encoder)))
    webui.networks.load_networks(["words"], [1.0])
    host = Automatic1111(webui.networks)
    assert host.take([Tag("words", 1.0, SUBJECT), Tag("gone", 1.0, STYLE)]) == [
        "words has no layer in the UNet: its role changes nothing",
        "no LoRA gone was found: its role changes nothing",
    ]


def params(*items: str) -> dict[str, list[Any]]:
    return {"lora": [SimpleNamespace(items=one.split(":")) for one in items]}


@pytest.mark.parametrize("strength", ["abc", "1,0", "", "te=", "unet=x"])
def test_a_strength_at_which_the_host_gives_all_loras_up_is_named_with_its_tag(webui: WebUI, strength: str) -> None:
    key, equals, value = strength.partition("=")
    read = SimpleNamespace(
        items=["fox", strength],
        positional=["fox", *([] if equals else [strength])],
        named={key: value} if equals else {},
    )
    plain = SimpleNamespace(items=["ink"], positional=["ink"], named={})
    with pytest.raises(RoleError) as error:
        Automatic1111(webui.networks).read_tags({"lora": [plain, read]})
    assert f"<lora:fox:{strength}>: " in str(error.value)
    assert "is not a number" in str(error.value)


def test_a_strength_that_another_extension_has_read_is_none_of_ours(webui: WebUI) -> None:
    scheduled = SimpleNamespace(items=["fox", "0@0,1@1"], positional=["fox", 1], named={})
    assert [tag.name for tag in Automatic1111(webui.networks).read_tags({"lora": [scheduled]})] == ["fox"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("fox", Tag("fox", 1.0, None)),
        ("fox:0.8:role=subject", Tag("fox", 0.8, SUBJECT)),
        ("fox:0.8:0.5:role=STYLE", Tag("fox", 0.5, STYLE)),
        ("fox:0.8:unet=0.3:role=none", Tag("fox", 0.3, None)),
        ("fox:te=0.4:role=style", Tag("fox", 0.4, STYLE)),
        ("fox:0@0,1@1:role=style", Tag("fox", 1.0, STYLE)),
    ],
)
def test_a_tag_is_read_as_the_host_splits_it(webui: WebUI, written: str, read: Tag) -> None:
    assert Automatic1111(webui.networks).read_tags(params(written)) == [read]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["fox:1:role=subjekt"], r"<lora:fox:1:role=subjekt>: unknown role 'subjekt' \(did you mean subject\?\)"),
        (["fox:1:role=a=b"], "unknown role 'a=b'.*allowed: subject, style, none"),
        (["fox:1:role=subject", "fox:1:role=style"], "fox is subject and style at once"),
    ],
)
def test_a_wrong_role_is_refused_by_name(webui: WebUI, written: list[str], message: str) -> None:
    with pytest.raises(DynFuseError, match=message):
        Automatic1111(webui.networks).read_tags(params(*written))


def denoiser_call(
    parts: list[int], rows: int, seeds: Sequence[int] = (7, 8), call: int = 2, second_order: bool = False
) -> Any:
    conds = SimpleNamespace(batch=[[None] * count for count in parts])
    config = SimpleNamespace(options={"second_order": True} if second_order else {})
    sampler = SimpleNamespace(sampler_extra_args={"cond": conds}, config=config)
    denoiser = SimpleNamespace(sampler=sampler, p=SimpleNamespace(seeds=list(seeds)), step=call)
    return SimpleNamespace(
        denoiser=denoiser,
        x=torch.zeros(rows, 4, 2, 2),
        sigma=torch.full((rows,), 3.5),
        sampling_step=max(0, call - 1),
        total_sampling_steps=9,
    )


@pytest.mark.parametrize(("call", "second_order", "step"), [(0, False, 0), (5, False, 5), (5, True, 2), (9, False, 8)])
def test_calls_of_the_denoiser_are_counted_in_steps(webui: WebUI, call: int, second_order: bool, step: int) -> None:
    """UniPC calls once more than it has steps; Heun twice a step but for the last."""
    params = denoiser_call([1], 2, call=call, second_order=second_order)
    assert Automatic1111(webui.networks).place(params).step == step


def test_where_a_call_stands(webui: WebUI) -> None:
    place = Automatic1111(webui.networks).place(denoiser_call([1], 2))
    assert (place.step, place.total, place.sigma) == (2, 9, 3.5)


def seen(webui: WebUI, params: Any, *counts: int) -> list[list[Row]]:
    """The rows that are told of calls of the UNet with `counts` pictures, after a denoiser call."""
    found: list[list[Row]] = []
    host = Automatic1111(webui.networks)
    stop = host.watch(lambda rows: found.append(list(rows or ())))
    host.place(params)
    for count in counts:
        webui.unet(x=torch.zeros(count, 4, 6, 6))
    stop()
    webui.unet(torch.zeros(1, 4, 6, 6))
    return found


def test_rows_are_cond_picture_by_picture_then_uncond(webui: WebUI) -> None:
    rows = [Row(0, True, 7), Row(0, True, 7), Row(1, True, 8), Row(0, False, 7), Row(1, False, 8)]
    assert seen(webui, denoiser_call([2, 1], 5), 5) == [rows]


def test_rows_fed_in_several_calls_or_cut_off_are_told_apart(webui: WebUI) -> None:
    rows = [Row(0, True, 7), Row(1, True, 8), Row(0, False, 7), Row(1, False, 8)]
    assert seen(webui, denoiser_call([1, 1], 4), 3, 1) == [rows[:3], rows[3:]]
    assert seen(webui, denoiser_call([1, 1], 4), 2) == [rows[:2]]


def test_a_model_that_edits_pictures_has_two_uncond_rows_a_picture(webui: WebUI) -> None:
    [rows] = seen(webui, denoiser_call([1, 1], 6), 6)
    assert [(row.image, row.cond) for row in rows] == [
        (0, True), (1, True), (0, False), (1, False), (0, False), (1, False),
    ]  # fmt: skip


def test_rows_that_do_not_add_up_are_not_guessed(webui: WebUI) -> None:
    assert seen(webui, denoiser_call([1, 1], 5), 5) == [[]]
    assert seen(webui, denoiser_call([1, 1], 4), 5) == [[]]
