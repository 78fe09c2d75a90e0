"""Nudges in the WebUIs: the guide gets the denoised prediction, and what it makes of it reaches the sampler."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_dynfuse.guidance.decoders import LinearDecoder, TaesdDecoder, linear
from lib_dynfuse.hosts import guiding
from lib_dynfuse.hosts.a1111_guiding import Automatic1111Guiding
from lib_dynfuse.hosts.forge_guiding import ForgeGuiding


class Recorder:
    """In a guide's place: moves every picture by `by`, or along -grad(sum of D²) by the input."""

    def __init__(self, by: float = 0.5) -> None:
        self.by = by
        self.seen: list[tuple[int, Tensor, Tensor | None]] = []
        self.remaining: list[float] = []

    def at(self, step: int, denoised: Tensor, spread: Tensor | None = None) -> Tensor:
        self.seen.append((step, denoised.clone(), spread))
        return denoised + self.by

    def at_input(self, step: int, denoised: Tensor, x: Tensor, remaining: float) -> Tensor:
        self.remaining.append(remaining)
        (g,) = torch.autograd.grad(denoised.square().sum(), x)
        return denoised.detach() - g


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The host's `modules.shared`."""
    model = SimpleNamespace(
        first_stage_model=nn.Linear(2, 2), model=SimpleNamespace(diffusion_model=nn.Linear(2, 2)), is_sdxl=False
    )
    modules: Any = ModuleType("modules")
    modules.shared = ModuleType("modules.shared")
    modules.shared.sd_model = model
    modules.shared.state = SimpleNamespace(current_latent=None)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.shared", modules.shared)
    found: SimpleNamespace = modules.shared
    return found


def latents(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Denoiser:
    """A1111's for k-diffusion samplers: cond rows picture by picture, then uncond; its UNet has one weight."""

    mask: Tensor | None = None
    nmask: Tensor | None = None

    def __init__(self, parts: list[int], cfg: float = 3.0) -> None:
        self.parts = parts
        self.p = SimpleNamespace(cfg_scale=cfg, steps=4)
        self.step = 0
        self.weight = torch.tensor([0.5, -0.25, 0.125, 1.0], dtype=torch.float64).view(4, 1, 1)
        cond = SimpleNamespace(batch=[[None] * count for count in parts])
        self.sampler = SimpleNamespace(sampler_extra_args={"cond": cond}, last_latent=None)
        self.sampler.config = None
        self.sampler.get_sigmas = lambda p, steps: torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])

    def get_pred_x0(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        return out

    def unet(self, x: Tensor) -> Tensor:
        """Rows differ by their place, so that a row taken for another shows."""
        return torch.tanh(x * self.weight) + torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1) / 10

    @torch.no_grad()
    def call(
        self, x: Tensor, sigma: float, one: Automatic1111Guiding, guide: Any, through_unet: bool = False
    ) -> Tensor:
        count = len(self.parts)
        rows = [image for image, parts in enumerate(self.parts) for _ in range(parts)]
        x_in = torch.cat([x[rows], x])
        params = SimpleNamespace(
            x=x_in, sigma=torch.full((len(x_in),), sigma, dtype=x.dtype), denoiser=self, total_sampling_steps=4
        )
        if through_unet:
            one._activations = None
        assert one.expect(params, through_unet)
        x_out = self.unet(params.x)
        one.predicted(SimpleNamespace(x=x_out))
        combined = self.combine(x_out, rows, count)
        self.sampler.last_latent = combined
        after = SimpleNamespace(x=combined)
        one.nudge(after, guide, 7)
        self.step += 1
        found: Tensor = after.x
        return found

    def combine(self, x_out: Tensor, rows: list[int], count: int) -> Tensor:
        uncond = x_out[-count:]
        combined = uncond.clone()
        for row, image in enumerate(rows):
            combined[image] = combined[image] + self.p.cfg_scale * (x_out[row] - uncond[image])
        return combined

    def denoised(self, x: Tensor) -> Tensor:
        rows = [image for image, parts in enumerate(self.parts) for _ in range(parts)]
        return self.combine(self.unet(torch.cat([x[rows], x])), rows, len(self.parts))


class EpsDenoiser(Denoiser):
    """The one for DDIM, PLMS and UniPC: eps in and out, `sigma` is the timestep."""

    def __init__(self, parts: list[int], cfg: float = 3.0) -> None:
        super().__init__(parts, cfg)
        self.alphas = torch.linspace(0.99, 0.05, 10, dtype=torch.float64)
        self.sampler.get_timesteps = lambda p, steps: torch.tensor([1, 3, 5, 7])

    def get_pred_x0(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        a = self.alphas[sigma.long()][:, None, None, None]
        return (x - (1 - a).sqrt() * out) / a.sqrt()


def rms(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1).sqrt()


@pytest.mark.parametrize("parts", [[1], [1, 1], [2, 1]])
def test_a1111_nudges_what_k_diffusion_takes_for_the_picture(shared: Any, parts: list[int]) -> None:
    denoiser, x, guide = Denoiser(parts), latents(len(parts)), Recorder()
    one = Automatic1111Guiding()
    end = one.begin(False)
    found = denoiser.call(x, 4.0, one, guide)
    expected = denoiser.denoised(x)
    torch.testing.assert_close(found, expected + 0.5)
    (step, given, spread), = guide.seen  # fmt: skip
    assert step == 7
    torch.testing.assert_close(given, expected)
    assert spread is not None
    uncond = denoiser.unet(torch.cat([x[[i for i, n in enumerate(parts) for _ in range(n)]], x]))[-len(parts) :]
    torch.testing.assert_close(spread, rms(expected - uncond).float())
    end()
    assert one._input is None


def test_a1111_without_cfg_has_no_scale_of_guidance(shared: Any) -> None:
    guide = Recorder()
    Denoiser([1], cfg=1.0).call(latents(1), 4.0, Automatic1111Guiding(), guide)
    assert guide.seen[0][2] is None


@pytest.mark.parametrize("time", [1, 5, 7])
def test_a1111_turns_eps_to_the_picture_and_back(shared: Any, time: int) -> None:
    denoiser, x, guide = EpsDenoiser([1, 1]), latents(2), Recorder()
    found = denoiser.call(x, float(time), Automatic1111Guiding(), guide)
    sigma = torch.full((2,), float(time))
    before = denoiser.get_pred_x0(x, denoiser.denoised(x), sigma)
    torch.testing.assert_close(guide.seen[0][1], before)
    torch.testing.assert_close(denoiser.get_pred_x0(x, found, sigma), before + 0.5)


def test_of_an_inpainting_only_what_is_painted_is_nudged(shared: Any) -> None:
    denoiser, x = Denoiser([1]), latents(1)
    denoiser.nmask = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    denoiser.nmask[..., 0] = 1
    denoiser.mask = 1 - denoiser.nmask
    moved = denoiser.call(x, 4.0, Automatic1111Guiding(), Recorder()) - denoiser.denoised(x)
    torch.testing.assert_close(moved, 0.5 * denoiser.nmask.expand_as(moved))


@pytest.mark.parametrize("kind", [Denoiser, EpsDenoiser])
def test_a1111_s_gradient_through_the_unet_is_autograd_s_by_each_picture_s_latent(
    shared: Any, kind: Callable[[list[int]], Denoiser]
) -> None:
    denoiser, x, guide = kind([2, 1]), latents(2), Recorder()
    one = Automatic1111Guiding()
    end = one.begin(True)
    weights = [*shared.sd_model.first_stage_model.parameters(), *shared.sd_model.model.diffusion_model.parameters()]
    assert not any(weight.requires_grad for weight in weights)
    with torch.no_grad():
        found = denoiser.call(x, 5.0, one, guide, through_unet=True)
        assert not torch.is_grad_enabled()
    sigma = torch.full((2,), 5.0)
    leaf = x.clone().requires_grad_()
    before = denoiser.get_pred_x0(leaf, denoiser.denoised(leaf), sigma)
    (g,) = torch.autograd.grad(before.square().sum(), leaf)
    torch.testing.assert_close(denoiser.get_pred_x0(x, found, sigma), before.detach() - g)
    assert not found.requires_grad
    assert not denoiser.sampler.last_latent.requires_grad
    end()
    assert all(weight.requires_grad for weight in weights)


def test_a1111_knows_how_much_of_a_step_the_prediction_is(shared: Any) -> None:
    denoiser, x, guide = Denoiser([1]), latents(1), Recorder()
    one = Automatic1111Guiding()
    one.begin(True)
    for sigma in (8.0, 4.0, 2.0, 1.0):
        denoiser.call(x, sigma, one, guide, through_unet=True)
    assert guide.remaining == [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("p", "steps"),
    [
        ({"is_hr_pass": True, "hr_second_pass_steps": 3, "denoising_strength": 0.5}, 6),
        ({"is_hr_pass": True, "hr_second_pass_steps": 0, "denoising_strength": 0.5}, 8),
        ({"init_images": ["a picture"], "denoising_strength": 0.5}, 4),
        ({}, 4),
    ],
)
def test_a1111_knows_the_noise_of_a_pass_that_begins_half_way(
    shared: Any, monkeypatch: pytest.MonkeyPatch, p: dict[str, Any], steps: int
) -> None:
    def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
        """As the host has it, unless it is told to do exactly the steps that are asked for."""
        if steps is None:
            return p.steps, int(p.denoising_strength * p.steps)
        return int(steps / p.denoising_strength), steps - 1

    common: Any = ModuleType("modules.sd_samplers_common")
    common.setup_img2img_steps = setup_img2img_steps
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_common", common)
    denoiser, guide, asked = Denoiser([1]), Recorder(), []
    vars(denoiser.p).update(p)
    known = denoiser.sampler.get_sigmas
    denoiser.sampler.get_sigmas = lambda p, steps: (asked.append(steps), known(p, steps))[1]
    one = Automatic1111Guiding()
    one.begin(True)
    denoiser.call(latents(1), 8.0, one, guide, through_unet=True)
    assert asked == [steps]


class Patcher:
    """Forge's, as far as a function behind CFG goes; a clone has its functions in a list of its own."""

    def __init__(self, functions: tuple[Callable[[Any], Any], ...] = ()) -> None:
        self.functions = functions

    def clone(self) -> Patcher:
        return Patcher(self.functions)

    def set_model_sampler_post_cfg_function(self, function: Callable[[Any], Any]) -> None:
        self.functions = (*self.functions, function)


@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_forge_nudges_what_comes_behind_cfg_and_knows_uncond_from_its_patcher(shared: Any, cfg: float) -> None:
    before_us = Patcher()
    shared.sd_model.forge_objects = SimpleNamespace(unet=before_us)
    one, guide = ForgeGuiding(), Recorder()
    end = one.begin(False)
    assert before_us.functions == ()
    with torch.inference_mode():
        denoised, uncond = latents(2, 1), latents(2, 2)
        p = SimpleNamespace(cfg_scale=cfg)
        one.expect(SimpleNamespace(denoiser=SimpleNamespace(p=p, mask=None)), False)
        for function in shared.sd_model.forge_objects.unet.functions:
            assert function({"denoised": denoised, "uncond_denoised": uncond}) is denoised
        params = SimpleNamespace(x=denoised)
        one.nudge(params, guide, 3)
        torch.testing.assert_close(params.x, denoised + 0.5)
        (_, _, spread), = guide.seen  # fmt: skip
        if cfg > 1:
            torch.testing.assert_close(spread, rms(denoised - uncond).float())
        else:
            assert spread is None
    end()
    assert one._uncond is None


def test_forge_s_hires_pass_has_a_cfg_of_its_own(shared: Any) -> None:
    shared.sd_model.forge_objects = SimpleNamespace(unet=Patcher())
    one, guide = ForgeGuiding(), Recorder()
    one.begin(False)
    p = SimpleNamespace(cfg_scale=5.0, hr_cfg=1.0, is_hr_pass=True)
    one.expect(SimpleNamespace(denoiser=SimpleNamespace(p=p, mask=None)), False)
    shared.sd_model.forge_objects.unet.functions[0]({"denoised": latents(1), "uncond_denoised": latents(1, 2)})
    one.nudge(SimpleNamespace(x=latents(1)), guide, 3)
    assert guide.seen[0][2] is None


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"is_sdxl": True}, "sdxl"),
        ({"is_sd3": True, "is_sdxl": False}, "sd3"),
        ({"is_sd2": True}, "sd2"),
        ({"is_sd1": True, "is_webui_legacy_model": lambda: True}, "sd1"),
        ({"is_webui_legacy_model": lambda: False}, "flux"),
    ],
)
def test_the_kind_of_latents_is_the_model_s(model: dict[str, Any], kind: str) -> None:
    assert guiding.latent_kind(SimpleNamespace(**model)) == kind


def test_a_decoder_that_cannot_be_loaded_is_told_and_the_linear_one_taken(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise OSError("no network")

    module: Any = ModuleType("modules.sd_vae_taesd")
    module.decoder_model = fail
    monkeypatch.setitem(sys.modules, "modules.sd_vae_taesd", module)
    sys.modules["modules"].sd_vae_taesd = module  # type: ignore[attr-defined]
    found, said = guiding.decoder("taesd", True, fail)
    assert isinstance(found, LinearDecoder)
    assert said == "the decoder taesd could not be loaded (OSError: no network); nudged by the linear approximation"
    assert guiding.decoder("linear", True, fail)[1] == ""
    assert "the decoder vae could not be loaded" in guiding.decoder("vae", True, fail)[1]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("download", [True, False])
def test_the_host_fetches_its_preview_decoder_only_where_that_is_allowed(
    shared: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, download: bool
) -> None:
    file = tmp_path / "secret" / "taesd_decoder.pth"
    file.parent.mkdir()
    fetched: list[str] = []

    def download_model(path: str, url: str) -> None:
        if not Path(path).exists():
            fetched.append(url)
            Path(path).touch()

    def decoder_model() -> Any:  # as the hosts' own
        module.download_model(str(file), "https://github.com/madebyollin/taesd/raw/main/taesd_decoder.pth")
        return nn.Conv2d(4, 3, 1)

    module: Any = ModuleType("modules.sd_vae_taesd")
    module.decoder_model, module.download_model = decoder_model, download_model
    monkeypatch.setitem(sys.modules, "modules.sd_vae_taesd", module)
    sys.modules["modules"].sd_vae_taesd = module  # type: ignore[attr-defined]
    if there:
        file.touch()
    found, said = guiding.decoder("taesd", download, lambda: linear("sd1"))
    assert isinstance(found, TaesdDecoder) is (there or download)
    assert bool(fetched) is (download and not there)
    assert module.download_model is download_model
    if not (there or download):
        assert said == (
            "nudged by the linear approximation: the preview decoder (TAESD) is not on this machine: put "
            "https://github.com/madebyollin/taesd/raw/main/taesd_decoder.pth as models/VAE-taesd/taesd_decoder.pth, "
            "or tick Download missing encoders in Settings, Dynamic LoRA Fusion"
        )


def test_a_preview_of_the_host_s_own_may_fetch_meanwhile(tmp_path: Path) -> None:
    asked: list[str] = []
    module = SimpleNamespace(download_model=lambda path, url: asked.append(url))
    with guiding._nothing_fetched(module):
        thread = threading.Thread(target=module.download_model, args=(str(tmp_path / "x"), "theirs"))
        thread.start()
        thread.join()
        with pytest.raises(guiding.NotFetchedError):
            module.download_model(str(tmp_path / "x"), "ours")
    assert asked == ["theirs"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def test_what_a_gradient_would_keep_is_counted_from_calls_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = Small()
    counted = guiding.Activations(unet)
    assert counted.most == 0
    unet(torch.zeros(3, 4))
    unet(torch.zeros(1, 4))
    assert counted.most == 3 * (8 + 2) * 4
    counted.check(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(MemoryError, match=r"needs about 0\.0 GiB, 0\.0 are free"):
        counted.check(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    counted.check(torch.device("cuda"))
    counted.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_a1111_s_first_call_is_never_under_a_gradient(shared: Any) -> None:
    shared.sd_model.model.diffusion_model = Small()
    one = Automatic1111Guiding()
    end = one.begin(True)
    denoiser, x = Denoiser([1]), latents(1)
    params = SimpleNamespace(
        x=torch.cat([x, x]), sigma=torch.full((2,), 4.0), denoiser=denoiser, total_sampling_steps=4
    )
    with torch.no_grad():
        assert not one.expect(params, True)
        assert not torch.is_grad_enabled()
        shared.sd_model.model.diffusion_model(torch.zeros(1, 4))
        assert one.expect(params, True)
        torch.set_grad_enabled(False)
    end()
