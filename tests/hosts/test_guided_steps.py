"""Nudges while a tiny pipeline samples: in D whatever the scheduler calls it, once a step, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn import functional

from lib_dynfuse.guidance.decoders import linear
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.nudge import PAPER_STEP, Nudge
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.hosts.guided_steps import levels
from lib_dynfuse.hosts.samplers import SAMPLERS, make_sampler
from lib_dynfuse.options import Options

diffusers_logging.disable_progress_bar()

PROMPT = "a red fox"
ROLES = "<lora:fox:0.8:role=subject><lora:ink:0.6:role=style>"
KL = Options(enabled=True, strategy="kl")
STEPS = 3
ALL = [None, *SAMPLERS]
DECODE = linear("sd1")


class Looks(Guide):
    """Nudges by `change`, by default not at all, and remembers what it was given."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda d: d, every_step: bool = True) -> None:
        self.change = change
        self.every_step = every_step
        self.asked: list[tuple[int, int, int]] = []
        self.seen: dict[int, tuple[Tensor, Tensor | None]] = {}

    through_unet = False

    def wants(self, step: int, place: int, total: int) -> bool:
        self.asked.append((step, place, total))
        return self.every_step or place == 1

    def at(self, step: int, denoised: Tensor, spread: Tensor | None = None) -> Tensor:
        assert step not in self.seen
        self.seen[step] = (denoised, spread)
        return self.change(denoised)


class Brightness:
    """An objective: R is how dark each picture is, in one corner more than in the other."""

    def part(self, indices: Sequence[int]) -> Brightness:
        return self

    def __call__(self, images: Tensor, seeds: Sequence[int] | None = None, step: int = 0) -> Tensor:
        weight = torch.linspace(0, 1, images.shape[-1], dtype=images.dtype, device=images.device)
        return -(images.square() * weight).mean((1, 2, 3))


def brightened(mode: str, seeds: Sequence[int], **settings: Any) -> Guide:
    nudge = Nudge(mode, **{"start": 0.0, "stop": 1.0, **settings})
    return Guide(nudge, Brightness(), DECODE, seeds)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(sd_folder: Path, lora_dir: Path) -> Embedded:
    # In double precision, so that what two samplers agree on is not hidden by rounding.
    return Embedded.load(sd_folder, lora_dir, device="cpu", dtype=torch.float64)


@pytest.fixture
def host(shared: Embedded) -> Embedded:
    shared.said = []  # type: ignore[attr-defined]
    shared.say = shared.said.append  # type: ignore[attr-defined]
    return shared


def picture(host: Embedded, tags: str = "", guide: Guide | None = None, **settings: Any) -> Tensor:
    settings = {"steps": STEPS, "cfg": 3.0, "seeds": (7,), "options": Options(enabled=False), **settings}
    return host.generate(PROMPT + tags, "blurry", guide=guide, tensors=True, **settings)


def test_a_sampler_that_hands_out_its_prediction_of_the_picture_means_the_same_by_it() -> None:
    """The oracle is what each scheduler says it made of a model's output."""
    own = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    checked = set()
    for prediction in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        for name in SAMPLERS:
            scheduler = make_sampler(own, name)
            scheduler.register_to_config(prediction_type=prediction)
            if prediction == "flow_prediction":
                if not hasattr(scheduler, "convert_model_output"):
                    continue
                scheduler.register_to_config(use_flow_sigmas=True, use_karras_sigmas=False)
            scheduler.set_timesteps(6)
            for index, (level, time) in enumerate(zip(levels(scheduler), scheduler.timesteps, strict=True)):
                x, said = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
                fed = scheduler.scale_model_input(x, time)
                torch.testing.assert_close(fed, level.scale * x, rtol=1e-5, atol=1e-5)
                expected = predicted(scheduler, said, time, x, index)
                if expected is None:
                    break
                found = level.of_x * level.scale * x + level.of_said * said
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                checked.add((prediction, name))
    ancestral = {("sample", "Euler"), ("sample", "Euler a"), ("sample", "PLMS")}
    flows = {("flow_prediction", name) for name in SAMPLERS if name == "UniPC" or name.startswith("DPM++")}
    plain = {(kind, name) for kind in ("epsilon", "v_prediction", "sample") for name in SAMPLERS} - ancestral
    assert checked >= plain | flows


def predicted(scheduler: Any, said: Tensor, time: Any, x: Tensor, index: int) -> Tensor | None:
    """What a scheduler takes for the finished picture; None where it refuses the prediction type."""
    if hasattr(scheduler, "convert_model_output"):
        scheduler._step_index = index
        found: Tensor = scheduler.convert_model_output(said, sample=x)
        return found
    if isinstance(scheduler, diffusers.PNDMScheduler):
        # It never makes it; DDIM, of the same form, does.
        if scheduler.config.prediction_type == "sample":
            return None
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        scheduler.set_timesteps(6)
    try:
        step = scheduler.step(said, time, x, generator=torch.Generator(), return_dict=True)
    except TypeError:
        step = scheduler.step(said, time, x, return_dict=True)
    except (NotImplementedError, ValueError):
        return None
    made: Tensor = step.pred_original_sample if hasattr(step, "pred_original_sample") else step.denoised
    return made


@pytest.mark.parametrize("sampler", ALL)
def test_a_guide_that_moves_nothing_changes_no_bit_and_is_asked_once_a_step(host: Embedded, sampler: str | None):
    guide = Looks()
    assert torch.equal(picture(host, sampler=sampler, guide=guide), picture(host, sampler=sampler))
    assert len(guide.seen) == STEPS
    assert [place for _, place, _ in guide.asked] == list(range(STEPS))
    assert {total for *_, total in guide.asked} == {STEPS}
    assert [step for step, *_ in guide.asked] == sorted(guide.seen)


@pytest.mark.parametrize("sampler", [name for name in ALL if name not in ("Heun", "PLMS")])
def test_a_guide_that_always_answers_one_picture_ends_there(host: Embedded, sampler: str | None):
    """So every sampler takes what the guide answers for the model's own prediction, and remembers it as such."""
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = picture(host, sampler=sampler, guide=Looks(lambda d: target.expand_as(d)))
    expected = host.pipe.vae.decode(target / host.pipe.vae.config.scaling_factor, return_dict=False)[0]
    # DDIM and its kin end a little above no noise.
    assert ((expected / 2 + 0.5).clamp(0, 1) - made).abs().max() < 0.05


@pytest.mark.parametrize("sampler", ["Heun", "PLMS"])
def test_a_sampler_that_looks_twice_keeps_what_was_nudged(host: Embedded, sampler: str):
    moved = picture(host, sampler=sampler, guide=Looks(lambda d: 0.9 * d, every_step=False))
    assert (moved - picture(host, sampler=sampler)).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["Euler", "UniPC", "PLMS"])
@pytest.mark.parametrize("kind", ["sd_folder", "sd2_folder"])
def test_the_first_prediction_and_its_spread_are_those_of_the_two_halves(
    kind: str, sampler: str, request: pytest.FixtureRequest
):
    """Read from the same noise by hand, in k-diffusion's units, for an eps and for a v model."""
    host = Embedded.load(request.getfixturevalue(kind), device="cpu", dtype=torch.float64)
    guide, heard = Looks(), []
    handle = host.pipe.unet.register_forward_hook(lambda _, args, said: heard.append((args[0], said[0])))
    picture(host, sampler=sampler, guide=guide)
    handle.remove()
    x, said = heard[0]
    sampling = make_sampler(host._own_sampler, sampler)
    sampling.set_timesteps(STEPS)
    alpha = sampling.alphas_cumprod[int(sampling.timesteps[0])].double()
    sigma = ((1 - alpha) / alpha).sqrt()
    x = x * (1 + sigma**2).sqrt()
    if kind == "sd_folder":
        uncond, cond = (x - sigma * said).chunk(2)
    else:
        uncond, cond = (x / (sigma**2 + 1) - said * sigma / (sigma**2 + 1).sqrt()).chunk(2)
    denoised, spread = guide.seen[0]
    torch.testing.assert_close(denoised.double(), uncond + 3.0 * (cond - uncond), rtol=2e-3, atol=1e-3)
    expected = 3.0 * (cond - uncond).square().mean((1, 2, 3)).sqrt()
    assert spread is not None
    torch.testing.assert_close(spread.double(), expected, rtol=2e-3, atol=1e-4)


def test_without_guidance_there_is_no_spread(host: Embedded):
    guide = Looks()
    assert torch.equal(picture(host, guide=guide, cfg=1.0), picture(host, cfg=1.0))
    assert [spread for _, spread in guide.seen.values()] == [None] * STEPS


@pytest.mark.parametrize(("mode", "sampler"), [("x0", "Euler"), ("adam", "DPM++ 2M"), ("xt", "Heun")])
def test_the_picture_comes_nearer_and_its_nudges_are_told(host: Embedded, mode: str, sampler: str):
    guide = brightened(mode, (7,), strength=0.05 if mode != "xt" else 0.5)
    nudged, plain = (
        picture(host, ROLES, guide, options=KL, sampler=sampler),
        picture(host, ROLES, None, options=KL, sampler=sampler),
    )
    assert (nudged - plain).abs().max() > 1e-3
    assert guide.reasons() == []
    assert len(guide.curve()) == STEPS
    assert host.said == []


@pytest.mark.parametrize("mode", ["x0", "xt"])
def test_a_nudged_picture_does_not_depend_on_its_batch(host: Embedded, mode: str):
    together = picture(host, ROLES, brightened(mode, (5, 6)), options=KL, seeds=(5, 6))
    for index, seed in enumerate((5, 6)):
        alone = picture(host, ROLES, brightened(mode, (seed,)), options=KL, seeds=(seed,))
        assert (together[index] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("sampler", "tags"), [("Euler", ""), ("DDIM", ROLES)])
def test_through_the_unet_the_next_latent_moves_by_the_paper_s_step(host: Embedded, sampler: str, tags: str):
    """Both samplers are of the paper's form in k-diffusion's units; R is differentiated by hand, fusion included."""
    fed: list[Tensor] = []
    handle = host.pipe.unet.register_forward_hook(lambda _, args, __: fed.append(args[0][:1].detach()))
    options = KL if tags else Options(enabled=False)
    slopes = []
    try:
        plain = brightened("xt", (7,), strength=0.0)
        picture(host, tags, plain, options=options, sampler=sampler)
        before, fed[:] = fed[1], []
        guide = brightened("xt", (7,), strength=0.2, clamp=1e9, stop=0.0)
        picture(host, tags, guide, options=options, sampler=sampler)
        after, x = fed[1], fed[0]
    finally:
        handle.remove()
    sampling = make_sampler(host._own_sampler, sampler)
    sampling.set_timesteps(STEPS)
    here, following = levels(sampling)[:2]
    # Along its own direction R must fall at the rate that the length of the move says: |g| = |Δ| / m.
    moved = (after - before) / following.alpha
    for size in (1e-3, -1e-3):
        step = size * here.alpha * moved / moved.norm()
        denoised = prediction(host, tags, options, sampler, x + step) + here.of_x * step
        slopes.append(float(Brightness()(DECODE(denoised)).sum()))
    slope = (slopes[0] - slopes[1]) / 2e-3
    assert slope == pytest.approx(-float(moved.norm()) / (PAPER_STEP * 0.2), rel=1e-3)


def prediction(host: Embedded, tags: str, options: Options, sampler: str, fed: Tensor) -> Tensor:
    """D of the first step where the UNet is fed `fed`, and the scheduler holds its latent still."""
    guide = Looks()
    handle = host.pipe.unet.register_forward_pre_hook(
        lambda _, args: None if guide.seen else (torch.cat([fed, fed]), *args[1:])
    )
    try:
        picture(host, tags, guide, options=options, sampler=sampler)
    finally:
        handle.remove()
    return guide.seen[0][0]


@pytest.mark.parametrize("mode", ["x0", "xt"])
def test_an_exception_in_a_nudge_leaves_nothing_behind(host: Embedded, mode: str):
    class Breaks(Brightness):
        def __call__(self, images: Tensor, seeds: Sequence[int] | None = None, step: int = 0) -> Tensor:
            raise KeyboardInterrupt

    plain = picture(host)
    learning = [parameter.requires_grad for parameter in host.pipe.unet.parameters()]
    with pytest.raises(KeyboardInterrupt):
        picture(host, guide=Guide(Nudge(mode, start=0.0), Breaks(), DECODE, (7,)))  # type: ignore[arg-type]
    assert "forward" not in vars(host.pipe.unet)
    assert "step" not in vars(host.pipe.scheduler)
    assert [parameter.requires_grad for parameter in host.pipe.unet.parameters()] == learning
    assert torch.equal(picture(host), plain)


def test_activations_that_do_not_fit_are_said_once_and_the_picture_is_made(
    host: Embedded, monkeypatch: pytest.MonkeyPatch
):
    plain, own = picture(host), functional.silu

    def short(x: Tensor, *more: Any, **rest: Any) -> Tensor:
        if x.requires_grad:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return own(x, *more, **rest)

    monkeypatch.setattr(functional, "silu", short)
    guide = brightened("xt", (7,))
    assert torch.equal(picture(host, guide=guide), plain)
    (said,) = host.said
    assert "activations do not fit into memory" in said
    assert "x0 and adam" in said
    assert guide.curve() == {}


def test_a_sampler_nobody_knows_is_said_and_the_picture_is_made(host: Embedded, monkeypatch: pytest.MonkeyPatch):
    class Unheard(diffusers.EulerDiscreteScheduler):
        pass

    monkeypatch.setattr(host, "_own_sampler", Unheard.from_config(host._own_sampler.config))
    assert torch.equal(picture(host, guide=Looks(lambda d: 0 * d)), picture(host))
    assert ["Unheard" in line for line in host.said] == [True]
