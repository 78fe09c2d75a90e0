"""The embedded host against diffusers itself, on tiny pipelines with random weights."""

from __future__ import annotations

import functools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import WIDTH, Factors, in_layout, random_factors

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts import adapters
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.hosts.lora_files import open_lora
from lib_dynfuse.options import Options
from lib_dynfuse.trace import Trace

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

PROMPT = "a red fox"
ROLES = "<lora:fox:0.8:role=subject><lora:ink:0.6:role=style>"
SUM = Options(enabled=True, strategy="sum")
KL = Options(enabled=True, strategy="kl")
STEPS = 2


@pytest.fixture(scope="module")
def shared(sd_folder: Path) -> Embedded:
    return Embedded.load(sd_folder, device="cpu")


@pytest.fixture
def host(shared: Embedded, lora_dir: Path) -> Embedded:
    shared.lora_dir = lora_dir
    shared.said = []  # type: ignore[attr-defined]
    shared.say = shared.said.append  # type: ignore[attr-defined]
    return shared


def picture(host: Embedded, tags: str, options: Options = KL, **settings: Any) -> torch.Tensor:
    settings = {"steps": STEPS, "cfg": 3.0, "seeds": (7,), **settings}
    return host.generate(PROMPT + tags, "blurry", options, tensors=True, **settings)


@functools.lru_cache
def by_diffusers(folder: Path, *files: tuple[Path, float], cfg: float = 3.0) -> torch.Tensor:
    """The same picture, made by diffusers alone."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    for number, (file, _) in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"a{number}")
    if files:
        # A strength for the UNet and one for the text encoder, as in <lora:name:te:unet>.
        pipe.set_adapters([f"a{number}" for number in range(len(files))], [weight for _, weight in files])
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPT,
        negative_prompt="blurry",
        num_inference_steps=STEPS,
        guidance_scale=cfg,
        generator=[torch.Generator().manual_seed(7)],
        output_type="pt",
    ).images


def assert_untouched(host: Embedded) -> None:
    for module in host.pipe.unet.modules():
        assert not isinstance(module, BaseTunerLayer)
        assert not module._forward_hooks


def test_without_loras_the_picture_is_diffusers_own(host: Embedded, sd_folder: Path):
    assert torch.equal(picture(host, ""), by_diffusers(sd_folder))


def test_a_lora_without_a_role_is_added_as_always(host: Embedded, sd_folder: Path, lora_dir: Path):
    ours = picture(host, "<lora:fox:0.8><lora:ink:0.6>")
    own = by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.8), (lora_dir / "ink.safetensors", 0.6))
    assert torch.equal(ours, own)
    assert any("no LoRA has a role" in line for line in host.said)


def test_switched_off_roles_mean_nothing(host: Embedded, sd_folder: Path, lora_dir: Path):
    ours = picture(host, ROLES, Options(enabled=False))
    own = by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.8), (lora_dir / "ink.safetensors", 0.6))
    assert torch.equal(ours, own)


def test_the_rule_sum_gives_diffusers_own_result(host: Embedded, sd_folder: Path, lora_dir: Path):
    ours = picture(host, ROLES, SUM)
    own = by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.8), (lora_dir / "ink.safetensors", 0.6))
    plain = by_diffusers(sd_folder)
    assert (own - plain).abs().max() > 0.01
    assert (ours - own).abs().max() < 1e-4


def test_the_rule_sum_holds_beside_a_lora_without_a_role(host: Embedded, sd_folder: Path, lora_dir: Path):
    ours = picture(host, f"{ROLES}<lora:detail:0.5>", SUM)
    files = [
        (lora_dir / f"{name}.safetensors", weight) for name, weight in (("fox", 0.8), ("ink", 0.6), ("detail", 0.5))
    ]
    assert (ours - by_diffusers(sd_folder, *files)).abs().max() < 1e-4


def test_choosing_is_neither_the_sum_nor_one_lora_alone(host: Embedded):
    chosen = picture(host, ROLES)
    for other in (picture(host, ROLES, SUM), picture(host, "<lora:fox:0.8>"), picture(host, "<lora:ink:0.6>")):
        assert (chosen - other).abs().max() > 1e-3


def test_one_role_alone_is_applied_as_it_is_and_said(host: Embedded, sd_folder: Path, lora_dir: Path):
    ours = picture(host, "<lora:fox:0.8:role=subject>")
    assert (ours - by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.8))).abs().max() < 1e-4
    assert host.said == ["no LoRA has role=style: nothing to choose from, fox is applied as it is"]


def test_after_a_fused_picture_a_plain_one_is_the_same_as_before(host: Embedded, sd_folder: Path):
    picture(host, ROLES)
    plain = picture(host, "")
    assert torch.equal(plain, by_diffusers(sd_folder))
    assert_untouched(host)


def test_an_exception_while_sampling_leaves_nothing_behind(host: Embedded, sd_folder: Path):
    class Breaks(Trace):
        def begin(self, step: int, *rest: Any) -> None:
            if step == 1:
                raise KeyboardInterrupt
            super().begin(step, *rest)

    with pytest.raises(KeyboardInterrupt):
        picture(host, ROLES, trace=Breaks(passes=STEPS))
    assert_untouched(host)
    assert torch.equal(picture(host, ""), by_diffusers(sd_folder))


@pytest.mark.parametrize(("strategy", "sampler"), [("kl", None), ("random", "DPM++ 2M"), ("kl-token", "Euler a")])
def test_a_picture_does_not_depend_on_its_batch(sd_folder: Path, lora_dir: Path, strategy: str, sampler: str | None):
    # In double precision, so that no choice is a tie that rounding decides.
    host = Embedded.load(sd_folder, lora_dir, device="cpu", dtype=torch.float64)
    options = Options(enabled=True, strategy=strategy, auto_balance=strategy == "kl")
    batch = picture(host, ROLES, options, seeds=(5, 6, 7), sampler=sampler)
    alone = [picture(host, ROLES, options, seeds=(seed,), sampler=sampler) for seed in (5, 6, 7)]
    assert (batch - torch.cat(alone)).abs().max() < 1e-6
    assert (batch[0] - batch[1]).abs().max() > 0.01


def test_the_same_seed_gives_the_same_picture_again(host: Embedded):
    assert torch.equal(picture(host, ROLES), picture(host, ROLES))


def test_without_guidance_only_the_prompt_is_computed(host: Embedded, sd_folder: Path, lora_dir: Path):
    ours = picture(host, ROLES, SUM, cfg=1.0)
    files = (lora_dir / "fox.safetensors", 0.8), (lora_dir / "ink.safetensors", 0.6)
    assert (ours - by_diffusers(sd_folder, *files, cfg=1.0)).abs().max() < 1e-4


def test_outside_the_step_window_both_are_added(host: Embedded):
    never = Options(enabled=True, strategy="kl", start=1.0, stop=1.0)
    assert torch.equal(picture(host, ROLES, never, steps=1), picture(host, ROLES, SUM, steps=1))
    assert not torch.equal(picture(host, ROLES, never, steps=2), picture(host, ROLES, SUM, steps=2))


@pytest.mark.parametrize(
    ("layout", "role"), [("peft", "subject"), ("diffusers", "subject"), ("raw peft", "subject"), ("raw peft", "none")]
)
def test_every_layout_gives_the_same_picture(host: Embedded, lora_dir: Path, fox: Factors, layout: str, role: str):
    folder = lora_dir / f"{layout} {role}"
    folder.mkdir()
    if layout == "raw peft":
        fox = {name: (down / 2, up) for name, (down, up) in fox.items()}
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "target_modules": list(fox)}))
    save_file(in_layout(layout, fox), folder / "same.safetensors")
    expected = picture(host, f"<lora:fox:0.8:role={role}><lora:ink:0.6>", SUM)
    assert torch.equal(picture(host, f"<lora:{layout} {role}/same:0.8:role={role}><lora:ink:0.6>", SUM), expected)


def test_alphas_that_differ_from_layer_to_layer_are_kept(host: Embedded, sd_folder: Path, fox: Factors):
    state: dict[str, torch.Tensor] = {}
    merged = DiffusionPipeline.from_pretrained(sd_folder)
    for number, (name, factors) in enumerate(fox.items()):
        alpha = (1.0, 2.0, 3.0)[number % 3]
        state.update(in_layout("kohya", {name: factors}, alpha=alpha))
        weight = merged.unet.get_submodule(name).weight
        down, up = factors
        weight.data += alpha / 2 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(state, host.lora_dir / "mixed.safetensors")
    expected = Embedded(merged, "merged", None)
    for role in ("subject", "none"):
        assert (picture(host, f"<lora:mixed:1:role={role}>") - picture(expected, "")).abs().max() < 1e-4


def test_half_precision_files_are_used_in_the_models_precision(host: Embedded, sd_folder: Path, lora_dir: Path):
    for name in ("fox", "ink"):
        state = {key: value.half() for key, value in load_file(lora_dir / f"{name}.safetensors").items()}
        save_file(state, lora_dir / f"{name}16.safetensors")
    own = by_diffusers(sd_folder, (lora_dir / "fox16.safetensors", 0.8), (lora_dir / "ink16.safetensors", 0.6))
    ours = picture(host, "<lora:fox16:0.8:role=subject><lora:ink16:0.6:role=style>", SUM)
    assert (ours - own).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("role", ["", ":role=style"])
def test_factors_in_8_bits_are_their_numbers(
    host: Embedded, lora_dir: Path, fox: Factors, dtype: torch.dtype, layout: str, role: str
):
    state = {key: value.to(dtype) for key, value in in_layout(layout, fox).items()}
    save_file(state, lora_dir / "eight.safetensors")
    save_file({key: value.float() for key, value in state.items()}, lora_dir / "wide.safetensors")
    found, expected = (picture(host, f"<lora:{name}:0.8{role}>") for name in ("eight", "wide"))
    assert torch.equal(found, expected)
    assert (expected - picture(host, "")).abs().max() > 0.01


@pytest.mark.parametrize("tags", ["<lora:fox:0.8>", ROLES, f"{ROLES}<lora:detail:0.5>", "<lora:broken:1>"])
def test_parameters_ask_for_gradients_as_before(sd_folder: Path, lora_dir: Path, tags: str):
    host = Embedded.load(sd_folder, lora_dir, device="cpu", say=lambda line: None)
    models = (host.pipe.unet, host.pipe.text_encoder, host.pipe.vae)
    asked = {}
    for model in models:
        for number, parameter in enumerate(model.parameters()):
            asked[parameter] = parameter.requires_grad_(number % 3 > 0).requires_grad
    if "broken" in tags:
        (lora_dir / "broken.safetensors").write_bytes(b"")
    host.decoder("vae")(torch.zeros(1, 4, 8, 8))
    with suppress(DynFuseError):
        picture(host, tags)
    assert {parameter: parameter.requires_grad for parameter in asked} == asked


def text_factors(seed: int) -> Factors:
    """LoRA factors for the attention of a text encoder of two layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"text_model.encoder.layers.{layer}.self_attn.{projection}": (
            torch.randn(2, WIDTH, generator=generator) / 4,
            torch.randn(WIDTH, 2, generator=generator) / 4,
        )
        for layer in range(2)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
    }


def test_a_role_lora_stays_in_the_text_encoder_at_its_own_strength(
    host: Embedded, sd_folder: Path, lora_dir: Path, fox: Factors
):
    words = in_layout("kohya", text_factors(5), part="text_encoder")
    save_file({**in_layout("kohya", fox), **words}, lora_dir / "words.safetensors")
    save_file(words, lora_dir / "only-words.safetensors")

    whole = picture(host, "<lora:words:0.8:role=subject>", SUM)
    assert (whole - by_diffusers(sd_folder, (lora_dir / "words.safetensors", 0.8))).abs().max() < 1e-4
    deaf = picture(host, "<lora:words:0.8:te=0:unet=0.8:role=subject>", SUM)
    assert (deaf - by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.8))).abs().max() < 1e-4
    assert (whole - deaf).abs().max() > 1e-3

    picture(host, "<lora:only-words:1:role=style>", SUM)
    assert "only-words.safetensors has no layer in the UNet: its role changes nothing" in host.said
    assert torch.equal(picture(host, ""), by_diffusers(sd_folder))


def test_a_dora_keeps_its_magnitudes(host: Embedded, sd_folder: Path, lora_dir: Path, fox: Factors):
    state = in_layout("peft", fox)
    unet = host.pipe.unet
    for name in fox:
        weight = unet.get_submodule(name).weight
        state[f"unet.{name}.lora_magnitude_vector"] = 1.3 * weight.detach().flatten(1).norm(dim=1)
        if weight.dim() == 4:
            state[f"unet.{name}.lora_magnitude_vector"] = state[f"unet.{name}.lora_magnitude_vector"].view(1, -1, 1, 1)
    save_file(state, lora_dir / "dora.safetensors")
    own = by_diffusers(sd_folder, (lora_dir / "dora.safetensors", 0.7))
    assert (picture(host, "<lora:dora:0.7:role=style>", SUM) - own).abs().max() < 1e-4
    assert (own - by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.7))).abs().max() > 0.01


@pytest.mark.parametrize("role", ["subject", "none"])
def test_a_load_that_breaks_half_way_leaves_nothing_behind(
    host: Embedded, sd_folder: Path, lora_dir: Path, ink: Factors, role: str, monkeypatch: pytest.MonkeyPatch
):
    def give_up(*_: Any, **__: Any) -> None:
        raise ValueError("no more")

    save_file(in_layout("kohya", ink), lora_dir / f"breaks-{role}.safetensors")
    picture(host, "<lora:detail:1>")
    tags = f"<lora:detail:1><lora:breaks-{role}:1:role={role}>"
    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", give_up)
        with pytest.raises(DynFuseError, match=rf"breaks-{role}\.safetensors does not fit tiny-sd, .*no more"):
            picture(host, tags)
    assert_untouched(host)
    assert torch.equal(picture(host, ""), by_diffusers(sd_folder))
    picture(host, tags)


def test_files_are_read_again_only_when_they_change(
    host: Embedded, lora_dir: Path, ink: Factors, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    monkeypatch.setattr(adapters, "open_lora", lambda path: read.append(path.stem) or open_lora(path))
    file = lora_dir / "fresh.safetensors"
    save_file(in_layout("kohya", ink), file)
    save_file(in_layout("kohya", ink), lora_dir / "plain.safetensors")
    tags = "<lora:fresh:1:role=style><lora:plain:0.5>"
    first = picture(host, tags)
    assert sorted(read) == ["fresh", "plain"]
    picture(host, tags.replace("0.5", "0.7"))
    assert torch.equal(picture(host, tags), first)
    assert sorted(read) == ["fresh", "plain"]
    save_file(in_layout("kohya", {name: (2 * down, up) for name, (down, up) in ink.items()}), file)
    os.utime(file, ns=(1, 1))
    assert not torch.equal(picture(host, tags), first)
    assert read.count("fresh") == 2


@pytest.mark.parametrize(
    "tags",
    [
        "<lora:fox:0.8:role=style><lora:ink:0.6:role=style>",
        "<lora:fox:0.5:role=subject><lora:ink:0.6:role=style><lora:fox:0.3:role=subject>",
        "<lora:fox:0.5:role=subject><lora:ink:0.6><lora:fox:0.3>",
    ],
)
def test_files_of_one_role_and_a_file_given_twice_add_up(host: Embedded, sd_folder: Path, lora_dir: Path, tags: str):
    own = by_diffusers(sd_folder, (lora_dir / "fox.safetensors", 0.8), (lora_dir / "ink.safetensors", 0.6))
    assert (picture(host, tags, SUM) - own).abs().max() < 1e-4


def test_the_trace_has_every_step_and_both_halves(host: Embedded):
    trace = Trace(passes=STEPS)
    picture(host, ROLES, trace=trace, seeds=(1, 2))
    record = trace.read()
    assert [one.step for one in record.passes] == [0, 1]
    assert [one.progress for one in record.passes] == [0.0, 1.0]
    assert [(row.image, row.cond) for row in record.passes[0].rows] == [(0, False), (1, False), (0, True), (1, True)]
    noise = [one.sigma for one in record.passes]
    assert noise == sorted(noise, reverse=True)
    assert 1 < noise[0] < 20
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in record.layers


def test_sd2_sums_like_diffusers(sd2_folder: Path, lora_dir: Path):
    host = Embedded.load(sd2_folder, lora_dir, device="cpu")
    for number, name in enumerate(("two-fox", "two-ink")):
        state = in_layout("kohya", random_factors(host.pipe.unet, seed=11 + number))
        save_file(state, lora_dir / f"{name}.safetensors")
    own = by_diffusers(sd2_folder, (lora_dir / "two-fox.safetensors", 0.8), (lora_dir / "two-ink.safetensors", 0.6))
    tags = "<lora:two-fox:0.8:role=subject><lora:two-ink:0.6:role=style>"
    assert (picture(host, tags, SUM) - own).abs().max() < 1e-4
    assert (picture(host, "") - own).abs().max() > 0.01


def test_sdxl_sums_like_diffusers_with_both_text_encoders(sdxl_folder: Path, lora_dir: Path):
    host = Embedded.load(sdxl_folder, lora_dir, device="cpu")
    for number, name in enumerate(("xl-fox", "xl-ink")):
        state = in_layout("kohya", random_factors(host.pipe.unet, seed=8 + number))
        for part in ("text_encoder", "text_encoder_2"):
            named = in_layout("kohya", text_factors(20 + number), part=part)
            state.update({key.replace("lora_te_", "lora_te1_"): value for key, value in named.items()})
        save_file(state, lora_dir / f"{name}.safetensors")
    own = by_diffusers(sdxl_folder, (lora_dir / "xl-fox.safetensors", 0.8), (lora_dir / "xl-ink.safetensors", 0.6))
    tags = "<lora:xl-fox:0.8:role=subject><lora:xl-ink:0.6:role=style>"
    assert (picture(host, tags, SUM) - own).abs().max() < 1e-4
    assert (picture(host, tags) - own).abs().max() > 1e-3
    assert (picture(host, "") - by_diffusers(sdxl_folder)).abs().max() == 0
