"""LoRA files as people have them: every layout, every kind, and what is in them besides."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from tiny import WIDTH, Factors, covered, in_layout
from torch import Tensor, nn

from lib_dynfuse.core import Fusion, Role, strategy
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.adapters import Adapters, Network
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.hosts.ldm_names import ldm_names

STRENGTH = 0.7
ROLES = [None, Role.STYLE]


class Bench:
    """A tiny pipeline in double precision, with and without networks."""

    def __init__(self, folder: Path) -> None:
        self.pipe = Embedded.load(folder, device="cpu", dtype=torch.float64).pipe
        generator = torch.Generator().manual_seed(5)
        config = self.pipe.unet.config
        self._x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
        self._context = torch.randn(2, 5, config.cross_attention_dim, generator=generator, dtype=torch.float64)
        self._added: dict[str, Tensor] | None = None
        if config.addition_embed_type is not None:
            pooled = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
            self._added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, dtype=torch.float64)}
        self.said: list[str] = []
        # The zero-initialised layers of a fresh model would hide what is added before them.
        self.before = {key: value.clone() for key, value in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name in ("unet", "text_encoder", "text_encoder_2")
            if (model := getattr(self.pipe, name, None)) is not None
            for key, value in model.state_dict().items()
        }

    @torch.no_grad()
    def unet(self, model: nn.Module | None = None) -> Tensor:
        model = self.pipe.unet if model is None else model
        return model(self._x, 300, self._context, added_cond_kwargs=self._added).sample

    @torch.no_grad()
    def words(self, name: str = "text_encoder", model: nn.Module | None = None) -> Tensor:
        model = getattr(self.pipe, name) if model is None else model
        return model(torch.arange(1, 12).view(1, -1), output_hidden_states=True).hidden_states[-1]

    def with_file(self, path: Path, role: Role | None = None, strength: float = STRENGTH) -> Tensor:
        """The UNet's output with a LoRA file, added by the rule `sum` where it has a role."""
        self.said = []
        adapters = Adapters(self.pipe, "tiny", self.said.append)
        with adapters.applied([Network(path, strength, strength, role)]) as layers:
            if role is None:
                assert not layers
                return self.unet()
            with Fusion(layers, strategy("sum")):
                return self.unet()

    def words_with_file(self, path: Path, name: str = "text_encoder") -> Tensor:
        self.said = []
        adapters = Adapters(self.pipe, "tiny", self.said.append)
        with adapters.applied([Network(path, STRENGTH, STRENGTH)]):
            return self.words(name)

    def merged(self, changes: dict[str, Tensor], name: str = "unet") -> Any:
        """A copy of one of the models with something added to its parameters."""
        model = copy.deepcopy(getattr(self.pipe, name))
        for path, change in changes.items():
            parameter = model.get_parameter(path)
            parameter.data += change.reshape(parameter.shape)
        return model

    def assert_untouched(self) -> None:
        after = self._state()
        assert after.keys() == self.before.keys()
        assert all(torch.equal(after[key], value) for key, value in self.before.items())


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> Bench:
    return Bench(sd_folder)


@pytest.fixture(scope="module")
def sdxl(sdxl_folder: Path) -> Bench:
    return Bench(sdxl_folder)


@pytest.fixture(autouse=True)
def untouched(request: pytest.FixtureRequest) -> Any:
    """Whatever a file holds, no parameter of the model changes."""
    yield
    for name in ("sd", "sdxl"):
        if name in request.fixturenames:
            request.getfixturevalue(name).assert_untouched()


def saved(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, path, metadata)
    return path


def products(factors: Factors, scale: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{path}.weight": scale * up.double().flatten(1) @ down.double().flatten(1)
        for path, (down, up) in factors.items()
    }


# Names.


def renamed(factors: Factors, name: Callable[[str], str], down: str, up: str) -> dict[str, Tensor]:
    state = {}
    for path, (a, b) in factors.items():
        state[f"{name(path)}.{down}"], state[f"{name(path)}.{up}"] = a, b
    return state


LAYOUTS: dict[str, Callable[[Factors, dict[str, str]], dict[str, Tensor]]] = {
    "kohya": lambda f, _: in_layout("kohya", f),
    "kohya, LDM names": lambda f, ldm: renamed(
        f, lambda p: f"lora_unet_{ldm.get(p, p).replace('.', '_')}", "lora_down.weight", "lora_up.weight"
    ),
    "lycoris_": lambda f, _: renamed(
        f, lambda p: f"lycoris_{p.replace('.', '_')}", "lora_down.weight", "lora_up.weight"
    ),
    "diffusers' first": lambda f, _: in_layout("diffusers", f),
    "diffusers' first, without unet.": lambda f, _: {
        key.removeprefix("unet."): value for key, value in in_layout("diffusers", f).items()
    },
    "diffusers": lambda f, _: in_layout("peft", f),
    "ComfyUI": lambda f, ldm: renamed(
        f, lambda p: f"diffusion_model.{ldm.get(p, p)}", "lora_A.weight", "lora_B.weight"
    ),
    "ComfyUI, lora_up": lambda f, ldm: renamed(
        f, lambda p: f"diffusion_model.{ldm.get(p, p)}", "lora_down.weight", "lora_up.weight"
    ),
    "OneTrainer": lambda f, ldm: renamed(f, lambda p: f"unet.{ldm.get(p, p)}", "lora_down.weight", "lora_up.weight"),
    "peft's memory": lambda f, _: renamed(f, lambda p: f"unet.{p}", "lora_A.default.weight", "lora_B.default.weight"),
    "peft": lambda f, _: in_layout("raw peft", f),
    "peft, another adapter's name": lambda f, _: renamed(
        f, lambda p: f"base_model.model.{p}", "lora_A.my_style.weight", "lora_B.my_style.weight"
    ),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(sd: Bench, tmp_path: Path, fox: Factors, layout: str, role: Role | None) -> None:
    file = saved(LAYOUTS[layout](fox, ldm_names(sd.pipe.unet)), tmp_path / "lora.safetensors")
    expected = sd.unet(sd.merged(products(fox, STRENGTH)))
    assert (expected - sd.unet()).abs().max() > 0.01
    assert (sd.with_file(file, role) - expected).abs().max() < 1e-12
    assert not [line for line in sd.said if "scale is unknown" not in line]


@pytest.mark.parametrize("layout", ["kohya", "kohya, LDM names", "diffusers", "ComfyUI", "OneTrainer"])
def test_sdxl_s_layers_outside_the_blocks_are_read(sdxl: Bench, tmp_path: Path, layout: str) -> None:
    outside = {
        name: (torch.randn(2, *module.weight.shape[1:]), torch.randn(module.weight.shape[0], 2))
        for name in ("add_embedding.linear_1", "add_embedding.linear_2", "time_embedding.linear_1", "conv_in")
        for module in [sdxl.pipe.unet.get_submodule(name)]
    }
    outside = {name: (down, up.view(*up.shape, *(1,) * (down.dim() - 2))) for name, (down, up) in outside.items()}
    file = saved(LAYOUTS[layout](outside, ldm_names(sdxl.pipe.unet)), tmp_path / "lora.safetensors")
    expected = sdxl.unet(sdxl.merged(products(outside, STRENGTH)))
    assert (expected - sdxl.unet()).abs().max() > 0.01
    assert (sdxl.with_file(file, Role.SUBJECT) - expected).abs().max() < 1e-12
    assert sdxl.said == []


REAL = {
    "sd15": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
}


@pytest.mark.parametrize("model", REAL)
def test_ldm_names_are_those_that_diffusers_converts(model: str) -> None:
    with torch.device("meta"):
        real = UNet2DConditionModel(cross_attention_dim=768, **REAL[model])
    paths = [path for path, module in real.named_modules() if getattr(module, "weight", None) is not None]
    ldm = ldm_names(real)
    names = {path: ldm.get(path, path) for path in paths}
    assert len(set(names.values())) == len(paths)
    checkpoint: dict[str, Any] = {}
    for path, name in names.items():
        checkpoint[f"model.diffusion_model.{name}.weight"] = torch.tensor([hash(path)])
        checkpoint[f"model.diffusion_model.{name}.bias"] = torch.tensor([0])
    converted = convert_ldm_unet_checkpoint(checkpoint, config=dict(real.config))
    assert {path: int(converted[f"{path}.weight"]) for path in paths} == {path: hash(path) for path in paths}


def text_factors(model: nn.Module) -> Factors:
    generator = torch.Generator().manual_seed(21)
    return {
        f"text_model.{path.removeprefix('text_model.')}": (
            torch.randn(2, module.in_features, generator=generator) / 4,
            torch.randn(module.out_features, 2, generator=generator) / 4,
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in path
    }


def at_home(model: nn.Module, factors: Factors) -> Factors:
    """Paths as this version of transformers has them."""
    own = dict(model.named_modules())
    return {path if path in own else path.removeprefix("text_model."): pair for path, pair in factors.items()}


FIRST_WORDS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def in_diffusers_first_words(factors: Factors) -> dict[str, Tensor]:
    state = {}
    for path, (down, up) in factors.items():
        layer, _, last = path.rpartition(".")
        key = f"text_encoder.{layer}.{FIRST_WORDS[last]}_lora" if last in FIRST_WORDS else None
        key = key or f"text_encoder.{path}.lora_linear_layer"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = down, up
    return state


WORDS: dict[str, Callable[[Factors], dict[str, Tensor]]] = {
    "kohya": lambda f: in_layout("kohya", f, part="text_encoder"),
    "kohya, te1": lambda f: {
        key.replace("lora_te_", "lora_te1_"): value for key, value in in_layout("kohya", f, part="text_encoder").items()
    },
    "diffusers": lambda f: in_layout("peft", f, part="text_encoder"),
    "diffusers' own": lambda f: renamed(f, lambda p: f"text_encoder.{p}.lora_linear_layer", "down.weight", "up.weight"),
    "diffusers' first": in_diffusers_first_words,
    "peft": lambda f: in_layout("raw peft", f),
    "ComfyUI": lambda f: renamed(
        f, lambda p: f"text_encoders.clip_l.transformer.{p}", "lora_A.weight", "lora_B.weight"
    ),
    "OneTrainer": lambda f: renamed(f, lambda p: f"clip_l.{p}", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("layout", WORDS)
def test_the_text_encoder_is_read_in_every_layout(sd: Bench, tmp_path: Path, layout: str) -> None:
    factors = text_factors(sd.pipe.text_encoder)
    file = saved(WORDS[layout](factors), tmp_path / "words.safetensors")
    changes = products(at_home(sd.pipe.text_encoder, factors), STRENGTH)
    expected = sd.words(model=sd.merged(changes, "text_encoder"))
    assert (expected - sd.words()).abs().max() > 0.01
    assert (sd.words_with_file(file) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("prefix", ["lora_te2_", "text_encoder_2.", "clip_g."])
def test_sdxl_s_second_text_encoder_alone_is_read_and_nothing_untrue_said(
    sdxl: Bench, tmp_path: Path, prefix: str
) -> None:
    factors = text_factors(sdxl.pipe.text_encoder_2)
    factors["text_projection"] = (torch.randn(2, WIDTH), torch.randn(WIDTH, 2))
    state = renamed(
        factors,
        lambda path: prefix + (path.replace(".", "_") if prefix.startswith("lora") else path),
        "lora_down.weight",
        "lora_up.weight",
    )
    file = saved(state, tmp_path / "words.safetensors")
    changes = products(at_home(sdxl.pipe.text_encoder_2, factors), STRENGTH)
    expected = sdxl.words("text_encoder_2", sdxl.merged(changes, "text_encoder_2"))
    assert (sdxl.words_with_file(file, "text_encoder_2") - expected).abs().max() < 1e-12
    assert (expected - sdxl.words("text_encoder_2")).abs().max() > 0.01
    assert sdxl.said == []


def test_two_layouts_in_one_file_are_both_read(sd: Bench, tmp_path: Path, fox: Factors) -> None:
    words = text_factors(sd.pipe.text_encoder)
    half = dict(list(fox.items())[::2])
    rest = {path: factors for path, factors in fox.items() if path not in half}
    ldm = ldm_names(sd.pipe.unet)
    state = {
        **LAYOUTS["kohya"](half, ldm),
        **LAYOUTS["kohya, LDM names"](dict(list(rest.items())[::2]), ldm),
        **LAYOUTS["diffusers"](dict(list(rest.items())[1::2]), ldm),
        **WORDS["diffusers"](words),
    }
    file = saved(state, tmp_path / "two.safetensors")
    assert (sd.with_file(file, Role.STYLE) - sd.unet(sd.merged(products(fox, STRENGTH)))).abs().max() < 1e-12
    expected = sd.words(model=sd.merged(products(at_home(sd.pipe.text_encoder, words), STRENGTH), "text_encoder"))
    assert (sd.words_with_file(file) - expected).abs().max() < 1e-12
    assert sd.said == []


def test_a_layer_under_two_names_counts_once_and_two_meanings_are_refused(
    sd: Bench, tmp_path: Path, fox: Factors
) -> None:
    ldm = ldm_names(sd.pipe.unet)
    state = {**LAYOUTS["kohya"](fox, ldm), **LAYOUTS["kohya, LDM names"](fox, ldm)}
    file = saved(state, tmp_path / "twice.safetensors")
    assert (sd.with_file(file, Role.STYLE) - sd.unet(sd.merged(products(fox, STRENGTH)))).abs().max() < 1e-12
    key = next(key for key in state if "input_blocks" in key and key.endswith("up.weight"))
    state[key] = state[key] * 2
    with pytest.raises(DynFuseError, match=r"twice\.safetensors.*input_blocks.* mean the same tensor and differ"):
        sd.with_file(saved(state, file), Role.STYLE)


# Scales.


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("layout", ["kohya", "diffusers' first", "diffusers", "ComfyUI"])
def test_a_layer_without_an_alpha_counts_as_alpha_of_its_rank(
    sd: Bench, tmp_path: Path, fox: Factors, layout: str, role: Role | None
) -> None:
    state = {
        key: value for key, value in LAYOUTS[layout](fox, ldm_names(sd.pipe.unet)).items() if not key.endswith(".alpha")
    }
    changes = products(fox, STRENGTH)
    endings = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight")
    downs = [(key, ending) for key in state for ending in endings if key.endswith(ending)]
    for number, ((key, ending), path) in enumerate(zip(downs, fox, strict=True)):
        if number % 3 and ".processor." not in key:  # diffusers' first layout had no alphas
            alpha = (0.5, 6.0)[number % 3 - 1]
            state[f"{key.removesuffix(ending)}.alpha"] = torch.tensor(alpha)
            changes[f"{path}.weight"] *= alpha / 2
    assert any(key.endswith(".alpha") for key in state)
    file = saved(state, tmp_path / "some.safetensors")
    assert (sd.with_file(file, role) - sd.unet(sd.merged(changes))).abs().max() < 1e-12


def test_a_text_encoder_s_layers_without_an_alpha_count_as_alpha_of_their_rank(sd: Bench, tmp_path: Path) -> None:
    factors = text_factors(sd.pipe.text_encoder)
    state: dict[str, Tensor] = {}
    changes = products(at_home(sd.pipe.text_encoder, factors), STRENGTH)
    for number, (path, pair) in enumerate(factors.items()):
        state |= in_layout("kohya", {path: pair}, part="text_encoder", alpha=0.5)
        (home,) = at_home(sd.pipe.text_encoder, {path: pair})
        if number % 2:
            del state[f"lora_te_{path.replace('.', '_')}.alpha"]
        else:
            changes[f"{home}.weight"] *= 0.25
    file = saved(state, tmp_path / "some.safetensors")
    expected = sd.words(model=sd.merged(changes, "text_encoder"))
    assert (sd.words_with_file(file) - expected).abs().max() < 1e-12


def peft_model(bench: Bench, folder: Path, config: Any) -> Any:
    """peft's own adapter with random weights, saved as peft saves it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(bench.pipe.unet), config).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (1 if "magnitude" not in name else 0) / 4 + (
                parameter.data if "magnitude" in name else 0
            )
    model.save_pretrained(folder)
    return model


TARGETS = ["to_q", "to_v", "conv1", "proj_in"]
PEFT: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"to_v": 3}, target_modules=TARGETS
    ),
    "bias": peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "loha, Tucker": peft.LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS),
    "lokr, both": peft.LoKrConfig(r=1, alpha=6, decompose_both=True, decompose_factor=2, target_modules=TARGETS),
    "lokr, whole": peft.LoKrConfig(r=32, alpha=6, target_modules=TARGETS),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", PEFT)
def test_peft_s_own_files_are_what_peft_makes_of_them(sd: Bench, tmp_path: Path, kind: str, role: Role | None) -> None:
    model = peft_model(sd, tmp_path, PEFT[kind])
    file = tmp_path / "adapter_model.safetensors"
    expected = sd.unet(model)
    assert (expected - sd.unet()).abs().max() > 0.001
    assert (sd.with_file(file, role, 1.0) - expected).abs().max() < 1e-6
    assert sd.said == []


def test_a_peft_file_away_from_its_config_says_that_its_scale_is_unknown(sd: Bench, tmp_path: Path) -> None:
    peft_model(sd, tmp_path, PEFT["lora"])
    lonely = tmp_path / "elsewhere" / "lora.safetensors"
    lonely.parent.mkdir()
    shutil.copy(tmp_path / "adapter_model.safetensors", lonely)
    sd.with_file(lonely)
    (line,) = sd.said
    assert line.startswith("lora.safetensors: its scale is unknown and taken as 1")
    assert "adapter_config.json" in line
    # One of another file is no better than none.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (lonely.parent / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    sd.with_file(lonely)
    assert "another rank" in sd.said[0]
    (lonely.parent / "adapter_config.json").write_text("{")
    with pytest.raises(DynFuseError, match=r"lora\.safetensors: the adapter_config\.json beside it cannot be read"):
        sd.with_file(lonely)


def test_the_scale_that_diffusers_writes_into_its_metadata_is_taken(sd: Bench, tmp_path: Path, fox: Factors) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 5.0, "unet.use_rslora": False})}
    file = saved(in_layout("peft", fox), tmp_path / "new.safetensors", metadata)
    expected = sd.unet(sd.merged(products(fox, STRENGTH * 2.5)))
    assert (sd.with_file(file, Role.STYLE) - expected).abs().max() < 1e-12
    metadata = {"lora_adapter_metadata": "[1"}
    with pytest.raises(DynFuseError, match=r"new\.safetensors: its metadata lora_adapter_metadata cannot be read"):
        sd.with_file(saved(in_layout("peft", fox), file, metadata))


# Kinds, as LyCORIS makes them.

Make = Callable[[str, nn.Module], Any]
KINDS: dict[str, Make] = {
    "LoCon": lambda name, layer: LoConModule(name, layer, lora_dim=3, alpha=2),
    "LoCon with mid": lambda name, layer: LoConModule(name, layer, lora_dim=3, alpha=2, use_tucker=True),
    "DoRA": lambda name, layer: LoConModule(name, layer, lora_dim=3, alpha=2, weight_decompose=True),
    "DoRA on inputs": lambda name, layer: LoConModule(
        name, layer, lora_dim=3, alpha=2, weight_decompose=True, wd_on_out=False
    ),
    "LoHa": lambda name, layer: LohaModule(name, layer, lora_dim=3, alpha=2),
    "LoHa with Tucker": lambda name, layer: LohaModule(name, layer, lora_dim=3, alpha=2, use_tucker=True),
    "LoHa with DoRA": lambda name, layer: LohaModule(name, layer, lora_dim=3, alpha=2, weight_decompose=True),
    "LoKr": lambda name, layer: LokrModule(name, layer, lora_dim=1, alpha=0.5, factor=4),
    "LoKr of pairs": lambda name, layer: LokrModule(name, layer, lora_dim=1, alpha=0.5, factor=4, decompose_both=True),
    "LoKr with Tucker": lambda name, layer: LokrModule(name, layer, lora_dim=1, alpha=0.5, factor=4, use_tucker=True),
    "LoKr, whole": lambda name, layer: LokrModule(name, layer, lora_dim=1, alpha=0.5, factor=4, full_matrix=True),
    "LoKr with DoRA": lambda name, layer: LokrModule(
        name, layer, lora_dim=1, alpha=0.5, factor=4, weight_decompose=True
    ),
    "OFT": lambda name, layer: DiagOFTModule(name, layer, lora_dim=4),
    "OFT, held back and rescaled": lambda name, layer: DiagOFTModule(
        name, layer, lora_dim=4, constraint=0.01, rescaled=True
    ),
    "BOFT": lambda name, layer: ButterflyOFTModule(name, layer, lora_dim=4),
    "GLoRA": lambda name, layer: GLoRAModule(name, layer, lora_dim=3, alpha=2),
    "(IA)³": lambda name, layer: IA3Module(name, layer),
    "(IA)³ on inputs": lambda name, layer: IA3Module(name, layer, train_on_input=True),
    "full": lambda name, layer: FullModule(name, layer),
}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Those that every kind can be put on: OFT's blocks need channels that they divide."""
    return {name: layer for name, layer in covered(model).items() if layer.weight.shape[0] % 8 == 0}


@torch.no_grad()
def merged_by(module: Any, weight: Tensor) -> Tensor:
    """The layer's weight with a LyCORIS module in it, at strength 1."""
    if isinstance(module, (LohaModule, LokrModule)):  # their own `get_merged_weight` divides alpha by the rank twice
        whole = weight + module.get_weight(weight.shape)
        return module.apply_weight_decompose(whole) if module.wd else whole
    return module.get_merged_weight(1, shape=weight.shape)[0]


def made(kind: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LyCORIS file of a kind, and what is added to each parameter at the strength of these tests.

    The WebUIs all go by the strength from W to the weight that the library makes of it, whatever the kind.
    """
    torch.manual_seed(4)
    precision = torch.float32 if "OFT" in kind else torch.float64  # LyCORIS inverts in float32 only
    state: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for path, layer in layers_of(model).items():
        name = f"lora_unet_{path.replace('.', '_')}"
        layer = copy.deepcopy(layer).to(precision)
        module = KINDS[kind](name, layer).to(precision)
        for own, parameter in module.named_parameters():
            if not own.startswith("org_module"):
                noise = torch.randn_like(parameter) / 3
                parameter.data = parameter.data * (1 + noise) if own in ("dora_scale", "rescale") else noise
        if kind == "full":
            held = {"diff": module.weight, "diff_b": module.bias}
            held = {key: value for key, value in held.items() if value is not None}
            merged, change_of_bias = layer.weight + module.weight, module.bias
        else:
            held = module.custom_state_dict() or module.state_dict()
            held = {key: value for key, value in held.items() if not key.startswith("org_")}
            merged, change_of_bias = merged_by(module, layer.weight), None
        for key, value in held.items():
            state[f"{name}.{key}"] = torch.as_tensor(value).detach()
        changes[f"{path}.weight"] = STRENGTH * (merged.detach().double() - layer.weight.detach())
        if change_of_bias is not None:
            changes[f"{path}.bias"] = STRENGTH * change_of_bias.detach()
    return state, changes


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_the_webuis_read_is_what_lycoris_makes_of_it(
    sd: Bench, tmp_path: Path, kind: str, role: Role | None
) -> None:
    state, changes = made(kind, sd.pipe.unet)
    file = saved(state, tmp_path / "lyco.safetensors")
    expected = sd.unet(sd.merged(changes))
    assert (expected - sd.unet()).abs().max() > 1e-3
    assert (sd.with_file(file, role) - expected).abs().max() < (2e-5 if "OFT" in kind else 1e-9)
    assert sd.said == []


@pytest.mark.parametrize("role", ROLES)
def test_normalisation_layers_are_read(sd: Bench, tmp_path: Path, role: Role | None) -> None:
    torch.manual_seed(6)
    state: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for path, layer in sd.pipe.unet.named_modules():
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            name = f"lora_unet_{path.replace('.', '_')}"
            module = NormModule(name, layer).double()
            torch.nn.init.normal_(module.w_norm, std=0.2)
            torch.nn.init.normal_(module.b_norm, std=0.2)
            weight, bias = module.get_merged_weight(STRENGTH)
            state |= {f"{name}.w_norm": module.w_norm, f"{name}.b_norm": module.b_norm}
            changes |= {f"{path}.weight": weight - layer.weight, f"{path}.bias": bias - layer.bias}
    expected = sd.unet(sd.merged({key: value.detach() for key, value in changes.items()}))
    assert (expected - sd.unet()).abs().max() > 1e-3
    file = saved(state, tmp_path / "norms.safetensors")
    assert (sd.with_file(file, role) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("role", ROLES)
def test_a_low_rank_weight_with_a_changed_bias_is_read(
    sd: Bench, tmp_path: Path, fox: Factors, role: Role | None
) -> None:
    """As ComfyUI takes a LoRA out of a model."""
    state, changes = in_layout("kohya", fox), products(fox, STRENGTH)
    for path, layer in covered(sd.pipe.unet).items():
        if layer.bias is not None:
            bias = torch.randn_like(layer.bias) / 4
            state[f"lora_unet_{path.replace('.', '_')}.diff_b"] = bias
            changes[f"{path}.bias"] = STRENGTH * bias
    file = saved(state, tmp_path / "extracted.safetensors")
    assert (sd.with_file(file, role) - sd.unet(sd.merged(changes))).abs().max() < 1e-12


def test_the_first_form_of_glora_is_read(sd: Bench, tmp_path: Path) -> None:
    state, changes = made("GLoRA", sd.pipe.unet)
    turned = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    linear = {path for path, layer in layers_of(sd.pipe.unet).items() if isinstance(layer, nn.Linear)}
    names = {f"lora_unet_{path.replace('.', '_')}" for path in linear}
    first = {}
    for key, value in state.items():
        stem, _, tensor = key.partition(".")
        if stem in names:
            last = turned.get(tensor[:2])
            first[f"{stem}.{last}.weight" if last else key] = value
    changes = {key: value for key, value in changes.items() if key.removesuffix(".weight") in linear}
    file = saved(first, tmp_path / "glora.safetensors")
    assert (sd.with_file(file) - sd.unet(sd.merged(changes))).abs().max() < 1e-9


def test_half_precision_loses_no_more_than_half_precision(sd: Bench, tmp_path: Path) -> None:
    state, changes = made("LoHa", sd.pipe.unet)
    half = {key: value.half() for key, value in state.items()}
    file = saved(half, tmp_path / "half.safetensors")
    expected = sd.unet(sd.merged(changes))
    assert (sd.with_file(file) - expected).abs().max() < 0.01 * (expected - sd.unet()).abs().max()


# What is in a file besides, and what cannot be used.


def test_whole_weights_never_reach_the_model_and_are_named(sd: Bench, tmp_path: Path, fox: Factors) -> None:
    state = in_layout("peft", fox)
    for name in ("conv_in.weight", "conv_in.bias", "down_blocks.0.resnets.0.norm1.weight"):
        state[f"unet.{name}"] = torch.full_like(sd.pipe.unet.get_parameter(name), 9.0)
    state["unet.conv_out.modules_to_save.default.weight"] = torch.full_like(sd.pipe.unet.conv_out.weight, 9.0)
    file = saved(state, tmp_path / "more.safetensors")
    assert (sd.with_file(file) - sd.unet(sd.merged(products(fox, STRENGTH)))).abs().max() < 1e-12
    (line,) = sd.said
    assert line.startswith("more.safetensors: 4 tensors are no part of a LoRA and left out, first unet.")


def test_one_foreign_key_spoils_nothing_and_is_named(sd: Bench, tmp_path: Path, fox: Factors) -> None:
    state = {**in_layout("kohya", fox), "bundle_emb.my_word.string_to_param.*": torch.ones(2, WIDTH)}
    file = saved(state, tmp_path / "bundle.safetensors")
    assert (sd.with_file(file) - sd.unet(sd.merged(products(fox, STRENGTH)))).abs().max() < 1e-12
    assert sd.said == [
        "bundle.safetensors: one tensor is no part of a LoRA and left out, first bundle_emb.my_word.string_to_param.*"
    ]


KEY = "lora_unet_mid_block_resnets_0_conv1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{KEY}.scalar": torch.ones(1)}, [f"{KEY}.scalar is not understood", "expected"]),
        ({f"{KEY}.lora_up.weight": None}, [f"{KEY}.lora_down.weight stands alone", "expected up beside it"]),
        ({f"{KEY}.lora_up.weight": torch.ones(31, 2, 1, 1)}, [f"{KEY}.lora_down.weight", "[31, 32, 3, 3]"]),
        ({f"{KEY}.lora_down.weight": torch.ones(2, 32, 1, 1)}, [f"{KEY}.lora_down.weight", "[32, 32, 1, 1]"]),
        ({f"{KEY}.lora_up.weight": torch.ones(32, 3, 1, 1)}, [f"{KEY}.lora_down.weight", "with a rank of at least 1"]),
        ({f"{KEY}.hada_w1_a": torch.ones(32, 2)}, [f"{KEY}.hada_w1_a does not go with down"]),
        (
            {"lora_unet_mid_block_resnets_0_norm1.lora_down.weight": torch.ones(2, 32)},
            ["lora_unet_mid_block_resnets_0_norm1.lora_down.weight stands alone"],
        ),
        (
            {
                "lora_unet_mid_block_resnets_0_norm1.lora_down.weight": torch.ones(2, 32),
                "lora_unet_mid_block_resnets_0_norm1.lora_up.weight": torch.ones(32, 2),
            },
            ["lora_unet_mid_block_resnets_0_norm1.lora_down.weight", "a GroupNorm"],
        ),
        ({"lora_unet_conv_in.alpha": torch.ones(1)}, ["lora_unet_conv_in.alpha stands alone"]),
        (
            {f"lora_unet_conv_in.{name}": torch.ones(5, 5) for name in ("lokr_w1", "lokr_w2")},
            ["lora_unet_conv_in.lokr_w1", "[16, 4, 3, 3]"],
        ),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, ["lora_unet_conv_in.lokr_w1", "second half is missing"]),
        (
            {f"lora_unet_conv_in.hada_{name}": torch.ones(5, 5) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
            ["lora_unet_conv_in.hada_w1_a", "whose weight is [16, 4, 3, 3]: it makes one of [5, 5]"],
        ),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(5, 5, 5)}, ["lora_unet_conv_in.oft_blocks", "[25]"]),
    ],
)
def test_a_refusal_names_the_file_the_key_and_what_was_expected(
    sd: Bench, tmp_path: Path, fox: Factors, change: dict[str, Tensor | None], words: list[str]
) -> None:
    state: dict[str, Tensor | None] = {**in_layout("kohya", fox), **change}
    file = saved({key: value for key, value in state.items() if value is not None}, tmp_path / "odd.safetensors")
    with pytest.raises(DynFuseError) as refused:
        sd.with_file(file)
    for word in ("odd.safetensors", *words):
        assert word in str(refused.value)
    assert "..." not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_layers_that_the_model_does_not_have_are_named(sd: Bench, tmp_path: Path, fox: Factors) -> None:
    state = {**in_layout("kohya", fox), **in_layout("kohya", {"nowhere.to_q": fox["mid_block.resnets.0.conv1"]})}
    sd.with_file(saved(state, tmp_path / "more.safetensors"))
    assert sd.said == [
        f"more.safetensors: 1 of {len(fox) + 1} layers are not in the model and were left out, "
        "first lora_unet_nowhere_to_q"
    ]


def test_a_key_of_any_length_is_named_in_one_short_line(sd: Bench, tmp_path: Path, fox: Factors) -> None:
    long = "x" * 100_000
    sd.with_file(saved({**in_layout("kohya", fox), f"{long}\n.y": torch.ones(1)}, tmp_path / "long.safetensors"))
    (line,) = sd.said
    assert len(line) < 400
    assert "\n" not in line
    state = {**in_layout("kohya", fox), f"{KEY}.{long}": torch.ones(1)}
    with pytest.raises(DynFuseError, match=r"^long\.safetensors: .* is not understood; expected") as refused:
        sd.with_file(saved(state, tmp_path / "long.safetensors"))
    assert len(str(refused.value)) < 700


def test_nothing_is_logged_while_a_file_is_read_or_refused(
    sd: Bench, tmp_path: Path, fox: Factors, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sd.with_file(saved({**in_layout("diffusers", fox), "x.y": torch.ones(1)}, tmp_path / "a.safetensors"))
    flux = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 4)}
    with pytest.raises(DynFuseError, match="is made for Flux"):
        sd.with_file(saved(flux, tmp_path / "b.safetensors"))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
