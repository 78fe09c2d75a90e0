"""Pictures by one role's LoRAs alone: what is made, with what, how often, and that the run itself does not notice."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.guidance.references import Cache
from lib_dynfuse.webui.alone import NotMade, pictures_alone, preview_of, reference_cache

BOTH = "a fox <lora:fox:1:role=subject> in snow <lora:ink:0.5:0.8:role=style>"


class Inner:
    """The host's processing object for txt2img."""

    cached_c = cached_uc = (1, 2)

    def __init__(self, **given: Any) -> None:
        self.given, self.closed = given, False
        self.scripts: Any = None
        self.script_args: Any = None

    def close(self) -> None:
        self.closed = True


class Scripts:
    """The host's runner of scripts, which has none yet."""

    alwayson_scripts: tuple[Any, ...] = ()


class Bar:
    cleared = False

    def clear(self) -> None:
        self.cleared = True


class Host:
    """What a WebUI has of it, cut to what is asked. A picture's colour is its seed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[Inner] = []
        self.seen: list[tuple[Any, ...]] = []  # of the host's state, while a run is under way
        self.before_return: Callable[[], None] = lambda: None
        self.grids = 0
        self.files = {name: folder / f"{name}.safetensors" for name in ("fox", "ink", "fast", "wolf")}
        for path in self.files.values():
            path.write_text(path.name)
        model = folder / "model.safetensors"
        model.touch()
        self.checkpoint = SimpleNamespace(sha256="c0ffee", hash="c0", filename=str(model))
        self.model = SimpleNamespace(sd_checkpoint_info=self.checkpoint, applied_token_merged_ratio=0.5)
        self.hijack = SimpleNamespace(comments=["outer"], extra_generation_params={"outer": 1})
        self.state = SimpleNamespace(
            **{"skipped": False, "interrupted": False, "stopping_generation": False, "job": "txt2img", "job_no": 0},
            **{"job_count": -1, "sampling_step": 0, "sampling_steps": 7, "current_latent": None, "textinfo": None},
            **{"current_image": "preview", "current_image_sampling_step": 0},
        )
        labels = {
            "CLIP_stop_at_last_layers": SimpleNamespace(default=1, infotext="Clip skip"),
            "sd_model_checkpoint": SimpleNamespace(default="model", infotext="Model hash"),
            "sd_lora": SimpleNamespace(default="None", infotext=None),
            "outdir_samples": SimpleNamespace(default="", infotext=None),
        }
        self.opts = SimpleNamespace(data={}, data_labels=labels)
        self.bar, self.commands = Bar(), SimpleNamespace(no_prompt_history=False)
        self.networks: Any = ModuleType("networks")
        self.networks.available_networks = {name: self.entry(name) for name in ("fox", "ink", "fast")}
        self.networks.available_network_aliases = {**self.networks.available_networks}
        self.networks.available_network_aliases["My Fox"] = self.networks.available_networks["fox"]
        self.networks.forbidden_network_aliases = {"none": 1}
        self.networks.list_available_networks = self.refresh
        modules: Any = ModuleType("modules")
        modules.shared = SimpleNamespace(
            **{"state": self.state, "opts": self.opts, "sd_model": self.model},
            **{"cmd_opts": self.commands, "total_tqdm": self.bar},
        )
        modules.sd_models = SimpleNamespace(apply_token_merging=self.merge_tokens)
        modules.sd_hijack = SimpleNamespace(model_hijack=self.hijack)
        modules.cache = SimpleNamespace(cache_dir=str(folder / "cache"))
        modules.processing = SimpleNamespace(StableDiffusionProcessingTxt2Img=Inner, process_images=self.process_images)
        modules.scripts = SimpleNamespace(ScriptRunner=Scripts)
        for name in ("shared", "sd_models", "sd_hijack", "cache", "processing", "scripts"):
            monkeypatch.setitem(sys.modules, f"modules.{name}", getattr(modules, name))
        monkeypatch.setitem(sys.modules, "modules", modules)
        monkeypatch.setitem(sys.modules, "networks", self.networks)
        self.shared = modules.shared

    def entry(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, filename=str(self.files[name]), hash=f"hash of {name}", read_hash=lambda: None
        )

    def refresh(self) -> None:
        self.networks.available_network_aliases["wolf"] = self.entry("wolf")

    def merge_tokens(self, model: Any, ratio: float) -> None:
        model.applied_token_merged_ratio = ratio

    def process_images(self, p: Inner) -> Any:
        state, shared = self.state, self.shared
        self.runs.append(p)
        self.seen.append((state.job, state.job_count, state.textinfo, self.commands.no_prompt_history))
        # All that the host's own leaves behind.
        self.hijack.comments, self.hijack.extra_generation_params = ["inner"], {}
        self.merge_tokens(self.model, 0)
        state.job_no += 1
        state.sampling_steps, state.current_latent, state.current_image = 20, torch.zeros(1), "inner preview"
        assert shared.total_tqdm is not self.bar
        torch.rand(3)
        self.before_return()
        pictures = [Image.new("RGB", (4, 2), (seed, 0, 0)) for seed in p.given["seed"]]
        grid = [Image.new("RGB", (8, 8), "white")] * self.grids
        return SimpleNamespace(images=[*grid, *pictures], index_of_first_image=self.grids)

    def plain_process_images(self, p: Inner) -> Any:
        self.runs.append(p)
        return SimpleNamespace(images=[Image.new("RGB", (4, 2))] * len(p.given["seed"]), index_of_first_image=0)

    def use_process_images(self) -> None:
        vars(sys.modules["modules.processing"])["process_images"] = self.process_images

    def snapshot(self) -> list[Any]:
        return [
            dict(vars(self.state)),
            dict(vars(self.hijack)),
            self.model.applied_token_merged_ratio,
            self.commands.no_prompt_history,
            self.shared.total_tqdm,
            torch.get_rng_state().tolist(),
        ]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "kept")


def run(*prompts: str, **given: Any) -> Any:
    """A run of the host that is about to begin; one batch where nothing else is said."""
    count = len(prompts)
    values: dict[str, Any] = {
        **{"all_prompts": list(prompts), "all_negative_prompts": ["ugly"] * count, "all_seeds": list(range(count))},
        **{"all_subseeds": list(range(40, 40 + count)), "subseed_strength": 0, "batch_size": count, "n_iter": 1},
        **{"width": 64, "height": 32, "steps": 20, "sampler_name": "Euler", "scheduler": "Karras", "cfg_scale": 7.5},
        **{"token_merging_ratio": 0.5, "disable_extra_networks": False, "enable_hr": True, "s_tmax": float("inf")},
        "get_token_merging_ratio": lambda: 0.5,
    }
    return SimpleNamespace(**{**values, **given})


def seeds(pictures: list[Any]) -> list[int]:
    """The seed that each picture was made with, from its colour."""
    return [round(float(picture[0, 0, 0, 0]) * 255) for picture in pictures]


def test_the_other_roles_loras_are_left_out_and_the_rest_stays(host: Host, cache: Cache) -> None:
    p = run(f"{BOTH} at night <lora:fast:0.7><hypernet:old:1>")
    (picture,) = pictures_alone(p, Role.SUBJECT, cache)
    pictures_alone(p, Role.STYLE, cache)
    assert (picture.shape, picture.dtype) == ((1, 3, 2, 4), torch.float32)
    rest = "<lora:fast:0.7><hypernet:old:1>"
    assert [one.given["prompt"] for one in host.runs] == [
        [f"a fox  in snow  at night <lora:fox:1:role=subject>{rest}"],
        [f"a fox  in snow  at night <lora:ink:0.5:0.8:role=style>{rest}"],
    ]


def test_a_picture_is_made_as_the_run_makes_its_own(host: Host, cache: Cache) -> None:
    p = run(BOTH, BOTH, subseed_strength=0.3, refiner_checkpoint="other", override_settings={"x": 1})
    pictures_alone(p, Role.SUBJECT, cache)
    (inner,) = host.runs
    for name in ("width", "height", "steps", "sampler_name", "scheduler", "cfg_scale", "subseed_strength", "s_tmax"):
        assert getattr(inner, name) == getattr(p, name)
    assert inner.given["seed"] == [0, 1]
    assert inner.given["subseed"] == [40, 41]
    assert inner.given["negative_prompt"] == ["ugly", "ugly"]
    assert (inner.given["batch_size"], inner.given["n_iter"]) == (2, 1)
    assert inner.given["do_not_save_samples"]
    assert inner.given["do_not_save_grid"]
    assert not {"enable_hr", "refiner_checkpoint", "override_settings"} & {*inner.given, *vars(inner)}
    assert "scripts" not in inner.given
    assert inner.closed


def test_every_picture_of_the_run_has_one_in_its_order(host: Host, cache: Cache) -> None:
    p = run(*[BOTH] * 5, all_seeds=[9, 3, 7, 1, 8], batch_size=2, n_iter=3)
    host.grids = 1
    assert seeds(pictures_alone(p, Role.STYLE, cache)) == [9, 3, 7, 1, 8]
    assert [inner.given["seed"] for inner in host.runs] == [[9, 3], [7, 1], [8]]
    assert [row[:2] for row in host.seen] == [("DynFuse", 3)] * 3
    assert host.seen[1][2] == "DynFuse: the style's LoRA alone, batch 2 of 3"


def test_a_second_run_takes_all_from_the_cache_and_a_longer_one_makes_the_rest(host: Host, cache: Cache) -> None:
    first = pictures_alone(run(BOTH, BOTH), Role.SUBJECT, cache)
    again = pictures_alone(run(BOTH, BOTH), Role.SUBJECT, cache)
    assert len(host.runs) == 1
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert seeds(pictures_alone(run(*[BOTH] * 4), Role.SUBJECT, cache)) == [0, 1, 2, 3]
    assert host.runs[1].given["seed"] == [2, 3]


def test_the_same_picture_is_made_once(host: Host, cache: Cache) -> None:
    assert seeds(pictures_alone(run(BOTH, BOTH, all_seeds=[6, 6]), Role.SUBJECT, cache)) == [6, 6]
    assert host.runs[0].given["seed"] == [6]


OTHERWISE: dict[str, Callable[[Host, Any], object]] = {
    "the other role's LoRA": lambda host, p: p.all_prompts.__setitem__(0, BOTH.replace("ink:0.5", "ink:0.1")),
    "the name of the same file": lambda host, p: p.all_prompts.__setitem__(0, BOTH.replace("fox:1", "My Fox:1")),
    "a random subseed of no strength": lambda host, p: setattr(p, "all_subseeds", [77]),
    "the checkpoint's title": lambda host, p: host.opts.data.update(sd_model_checkpoint="model [c0ffee]"),
    "an option that changes no picture": lambda host, p: host.opts.data.update(outdir_samples="other"),
}
ANEW: dict[str, Callable[[Host, Any], object]] = {
    "strength": lambda host, p: p.all_prompts.__setitem__(0, BOTH.replace("fox:1", "fox:0.9")),
    "strength on the text encoder": lambda host, p: p.all_prompts.__setitem__(0, BOTH.replace("fox:1", "fox:0.9:1")),
    "another LoRA": lambda host, p: p.all_prompts.__setitem__(0, f"{BOTH}<lora:fast:1>"),
    "a hypernetwork": lambda host, p: p.all_prompts.__setitem__(0, f"{BOTH}<hypernet:old:1>"),
    "prompt": lambda host, p: p.all_prompts.__setitem__(0, f"{BOTH}."),
    "negative prompt": lambda host, p: setattr(p, "all_negative_prompts", [""]),
    "seed": lambda host, p: setattr(p, "all_seeds", [1]),
    "subseed strength": lambda host, p: setattr(p, "subseed_strength", 0.1),
    "size": lambda host, p: setattr(p, "width", 128),
    "steps": lambda host, p: setattr(p, "steps", 21),
    "sampler": lambda host, p: setattr(p, "sampler_name", "DDIM"),
    "an option of the host's infotext": lambda host, p: host.opts.data.update(CLIP_stop_at_last_layers=2),
    "the LoRA that the host always adds": lambda host, p: host.opts.data.update(sd_lora="fast"),
    "VAE": lambda host, p: setattr(p, "sd_vae_hash", "f00"),
    "checkpoint": lambda host, p: setattr(host.checkpoint, "sha256", "decaf"),
    "a new file under the LoRA's old name": lambda host, p: os.utime(host.files["fox"], (1, 1)),
}


@pytest.mark.parametrize(("what", "made"), [*((what, 1) for what in OTHERWISE), *((what, 2) for what in ANEW)])
def test_a_kept_picture_is_used_while_nothing_that_changes_it_has_changed(
    host: Host, cache: Cache, what: str, made: int
) -> None:
    pictures_alone(run(BOTH), Role.SUBJECT, cache)
    p = run(BOTH)
    {**OTHERWISE, **ANEW}[what](host, p)
    assert len(pictures_alone(p, Role.SUBJECT, cache)) == 1
    assert len(host.runs) == made


def test_the_networks_of_a_batch_are_those_of_its_first_prompt(host: Host, cache: Cache) -> None:
    """As in the host; another batch may have others, and those are never made in one batch."""
    prompts = ["a <lora:fox:1:role=subject>", "b <lora:ink:1>", "c <lora:fox:0.5:role=subject>", "d"]
    p = run(*prompts, batch_size=2, n_iter=2)
    assert seeds(pictures_alone(p, Role.SUBJECT, cache)) == [0, 1, 2, 3]
    one, half = "<lora:fox:1:role=subject>", "<lora:fox:0.5:role=subject>"
    assert [inner.given["prompt"] for inner in host.runs] == [[f"a {one}", f"b {one}"], [f"c {half}", f"d{half}"]]


@pytest.mark.parametrize(
    "p",
    [
        run("a fox <lora:fox:1> <lora:ink:1:role=style>"),
        run(BOTH, "a fox <lora:ink:1:role=style>", batch_size=1, n_iter=2),
        run(BOTH, disable_extra_networks=True),
    ],
)
def test_without_a_lora_of_the_role_nothing_is_made(host: Host, cache: Cache, p: Any) -> None:
    assert pictures_alone(p, Role.SUBJECT, cache) == []
    assert host.runs == []


@pytest.mark.parametrize("failing", [False, True])
def test_the_run_under_way_does_not_notice(host: Host, cache: Cache, failing: bool) -> None:
    def fail() -> None:
        raise RuntimeError("NaN")

    if failing:
        host.before_return = fail
    p = run(BOTH, BOTH, batch_size=1, n_iter=2)
    before, own = host.snapshot(), {name: repr(value) for name, value in vars(p).items()}
    if failing:
        with pytest.raises(NotMade, match=r"by the subject's LoRA alone \(RuntimeError: NaN\)"):
            pictures_alone(p, Role.SUBJECT, cache)
    else:
        pictures_alone(p, Role.SUBJECT, cache)
    assert len(host.runs) == (1 if failing else 2)
    assert host.snapshot() == before
    assert {name: repr(value) for name, value in vars(p).items()} == own
    assert not host.bar.cleared
    # The host's text of the last run, and its encoded prompts, stay those of the run itself.
    assert all(row[3] for row in host.seen)
    assert all(inner.cached_c == [None, None] and inner.cached_c is not Inner.cached_c for inner in host.runs)
    # reForge looks into the scripts of every run unasked.
    assert all(inner.scripts.alwayson_scripts == () and inner.script_args == () for inner in host.runs)


@pytest.mark.parametrize("lacks", ["modules.sd_hijack", "no_prompt_history", "comments", "current_image"])
def test_what_a_host_does_not_have_is_not_asked_of_it(
    host: Host, cache: Cache, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks.startswith("modules."):  # as on Forge Neo
        monkeypatch.setitem(sys.modules, lacks, None)
    else:
        for owner in (host.commands, host.hijack, host.state):
            vars(owner).pop(lacks, None)
        monkeypatch.setattr(host, "process_images", host.plain_process_images)
        host.use_process_images()
    before = sorted([*vars(host.commands), *vars(host.hijack), *vars(host.state)])
    assert len(pictures_alone(run(BOTH), Role.SUBJECT, cache)) == 1
    assert sorted([*vars(host.commands), *vars(host.hijack), *vars(host.state)]) == before


@pytest.mark.parametrize("flag", ["interrupted", "skipped"])
def test_a_batch_that_was_stopped_is_not_kept_and_those_before_it_are(host: Host, cache: Cache, flag: str) -> None:
    p = run(*[BOTH] * 3, batch_size=1, n_iter=3)

    def stop_in_the_second() -> None:
        setattr(host.state, flag, len(host.runs) == 2)

    host.before_return = stop_in_the_second
    with pytest.raises(NotMade, match=rf"by the style's LoRA alone \({flag}\)"):
        pictures_alone(p, Role.STYLE, cache)
    assert len(host.runs) == 2
    assert getattr(host.state, flag)
    with pytest.raises(NotMade, match=flag):  # nor is another role's begun
        pictures_alone(p, Role.SUBJECT, cache)
    assert len(host.runs) == 2
    setattr(host.state, flag, False)
    host.before_return = lambda: None
    assert seeds(pictures_alone(p, Role.STYLE, cache)) == [0, 1, 2]
    assert [inner.given["seed"] for inner in host.runs[2:]] == [[1], [2]]


def test_a_wish_to_end_after_this_picture_keeps_it(host: Host, cache: Cache) -> None:
    host.before_return = lambda: setattr(host.state, "stopping_generation", True)
    with pytest.raises(NotMade, match="interrupted"):
        pictures_alone(run(BOTH, BOTH, batch_size=1, n_iter=2), Role.STYLE, cache)
    assert len(host.runs) == 1
    assert seeds(pictures_alone(run(BOTH), Role.STYLE, cache)) == [0]


def test_an_interrupt_before_there_is_anything_to_decode_is_an_interrupt(host: Host, cache: Cache) -> None:
    def stop() -> None:
        host.state.interrupted = True
        raise TypeError("None cannot be decoded")

    host.before_return = stop
    with pytest.raises(NotMade, match="interrupted"):
        pictures_alone(run(BOTH), Role.STYLE, cache)


def test_a_lora_that_is_not_there_is_named(host: Host, cache: Cache) -> None:
    with pytest.raises(NotMade, match="no LoRA gone was found"):
        pictures_alone(run("a <lora:gone:1:role=subject>"), Role.SUBJECT, cache)


def test_a_lora_put_there_since_the_host_looked_is_found(host: Host, cache: Cache) -> None:
    assert len(pictures_alone(run("a <lora:wolf:1:role=subject>"), Role.SUBJECT, cache)) == 1


def test_a_role_that_cannot_be_read_is_an_error(host: Host, cache: Cache) -> None:
    with pytest.raises(DynFuseError, match="did you mean subject"):
        pictures_alone(run("a <lora:fox:1:role=subjct>"), Role.SUBJECT, cache)


@pytest.mark.parametrize("name", ["fox", "My Fox"])
def test_a_preview_is_found_by_the_lora_s_name_and_its_alias(host: Host, name: str) -> None:
    assert preview_of(name) is None
    picture = host.files["fox"].with_name("fox.preview.png")
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(picture)
    assert preview_of(name) == picture
    assert preview_of("gone") is None


def test_without_the_host_s_lora_extension_there_is_no_preview(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "networks")
    assert preview_of("fox") is None


def test_pictures_are_kept_among_the_host_s_own_caches(host: Host, tmp_path: Path) -> None:
    pictures_alone(run(BOTH), Role.SUBJECT, reference_cache())
    assert len(list((tmp_path / "cache" / "dynfuse-references").glob("*.png"))) == 1
