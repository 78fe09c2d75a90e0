"""Nudges inside a diffusers pipeline: between classifier-free guidance and what the scheduler makes of it.

Every scheduler is fed what the UNet said, as noise, velocity, flow or the picture itself, and has a scale of its own
for the latent. Both are linear in the denoised prediction D, so a nudge of D becomes one of what the UNet said, and the
scheduler, its history included, goes on as if the UNet had said so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.nudge import is_out_of_memory
from lib_dynfuse.hosts.checkpointing import without_checkpointing
from lib_dynfuse.hosts.guiding import frozen

# Schedulers whose latent is x0 + σ · noise; the others' is what the UNet sees.
_UNSCALED = frozenset(
    {
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
    }
)
_BY_SIGMA = frozenset(
    {
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    }
)
_BY_TIME = frozenset({"DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"})
# Those of second order that look again within a step; they name the time of that look twice, for the next step too.
_LOOKING_AGAIN = frozenset({"HeunDiscreteScheduler", "PNDMScheduler"})
# Below, nothing of the picture is in the latent and noise predicted says nothing about it.
_LEAST_ALPHA = 1e-4


class Level(NamedTuple):
    """One forward pass: the UNet sees `scale` · latent = `alpha` · x0 + `sigma` · noise.

    `of_x`, `of_said`: D = of_x · (what the UNet sees) + of_said · (what it says). `place`: the number of its sampling
    step, from 0; `again`: a further look within a step that was begun before.
    """

    alpha: float
    sigma: float
    scale: float
    of_x: float
    of_said: float
    place: int
    again: bool

    @property
    def noise(self) -> float:
        """σ in k-diffusion's units, infinite where nothing but noise is left."""
        return self.sigma / self.alpha if self.alpha else float("inf")


def levels(scheduler: Any) -> list[Level]:
    """Every forward pass of a scheduler that has been set to its steps, none where its kind is not known."""
    kind = type(scheduler).__name__
    times = [float(time) for time in scheduler.timesteps]
    if kind in _UNSCALED | _BY_SIGMA:
        pairs = [_alpha_sigma(scheduler, float(sigma)) for sigma in scheduler.sigmas[: len(times)]]
    elif kind in _BY_TIME:
        alphas = [float(scheduler.alphas_cumprod[int(time)]) for time in times]
        pairs = [(alpha**0.5, (1.0 - alpha) ** 0.5) for alpha in alphas]
    else:
        return []
    again = [kind in _LOOKING_AGAIN and time == later for time, later in zip(times, [*times[1:], None], strict=True)]
    found, place = [], -1
    for (alpha, sigma), further in zip(pairs, again, strict=True):
        place += not further
        scale = alpha if kind in _UNSCALED else 1.0
        of_x, of_said = _denoised(scheduler.config.prediction_type, alpha, sigma)
        found.append(Level(alpha, sigma, scale, of_x, of_said, place, further))
    return found


def _alpha_sigma(scheduler: Any, sigma: float) -> tuple[float, float]:
    if scheduler.config.get("use_flow_sigmas"):
        return 1.0 - sigma, sigma
    alpha = (1.0 + sigma**2) ** -0.5
    return alpha, sigma * alpha


def _denoised(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(of_x, of_said) of a Level; of_said is 0 where nothing can be told of D."""
    if prediction == "v_prediction":
        return alpha, -sigma
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow_prediction":
        return 1.0, -sigma
    return (1.0 / alpha, -sigma / alpha) if alpha > _LEAST_ALPHA else (0.0, 0.0)


@contextmanager
def guided_steps(
    pipe: Any, guide: Guide | None, cfg: float | None, steps: int, say: Callable[[str], None]
) -> Iterator[None]:
    """While open, `pipe` samples with nudges; afterwards pipeline and scheduler are as before.

    `cfg`: the guidance scale, None where there is no negative half. The scheduler is set to `steps` already. What
    cannot be nudged is said, and the pictures are made without.
    """
    if guide is None:
        yield
        return
    known = levels(pipe.scheduler)
    if not known:
        say(f"not nudged: how {type(pipe.scheduler).__name__} is to be nudged is not known; any named sampler can be")
        yield
        return
    with ExitStack() as stack:
        nudged = _Nudged(guide, cfg, steps, known, say)
        stack.enter_context(_replaced(pipe.scheduler, "step", nudged.step))
        stack.enter_context(_replaced(pipe.unet, "forward", nudged.forward))
        if guide.through_unet:
            stack.enter_context(frozen(pipe.unet))
            stack.enter_context(without_checkpointing(pipe.unet))
        yield


class _Nudged:
    """What stands in for the UNet's forward pass and for the scheduler's step."""

    def __init__(
        self, guide: Guide, cfg: float | None, steps: int, passes: Sequence[Level], say: Callable[[str], None]
    ) -> None:
        self._guide = guide
        self._cfg = cfg
        self._steps = steps
        self._passes = passes
        self._say = say
        self._number = 0
        self._too_large = False
        self._x: Tensor | None = None
        self._said: Tensor | None = None

    def forward(self, own: Callable[..., Any], sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Remembers what the UNet says in a pass that is to be nudged, with its graph where that is wanted."""
        if not self._wanted():
            return own(sample, *args, **kwargs)
        if self._guide.through_unet:
            found = self._with_graph(own, sample, args, kwargs)
            if found is not None:
                return found
            return own(sample, *args, **kwargs)
        found = own(sample, *args, **kwargs)
        self._said = found[0]
        return found

    def step(
        self, own: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The scheduler's step, on what the UNet would have said had it predicted the nudged picture."""
        if self._said is not None:
            model_output = self._moved(model_output, sample)
            self._said = self._x = None
        self._number += 1
        return own(model_output, timestep, sample, *args, **kwargs)

    def _wanted(self) -> bool:
        level = self._passes[self._number]
        if level.again or not level.of_said or self._too_large:
            return False
        return self._guide.wants(self._number, level.place, self._steps)

    def _with_graph(
        self, own: Callable[..., Any], sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any | None:
        """The UNet's answer, its graph kept aside; None where the activations do not fit into memory."""
        alpha = self._passes[self._number].alpha
        halves = 1 if self._cfg is None else 2
        with torch.enable_grad():
            # In k-diffusion's units, which the paper's update does not name but every sampler can be brought to.
            x = (_wide(sample[: len(sample) // halves].detach()) / alpha).requires_grad_()
            try:
                said, *rest = own(torch.cat([(x * alpha).to(sample.dtype)] * halves), *args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._too_large = True
        if self._too_large:
            self._say(
                "no nudges through the UNet (mode xt): its activations do not fit into memory; "
                "the modes x0 and adam need far less, and so does a smaller picture or batch"
            )
            return None
        self._x, self._said = x, said
        return (said.detach(), *rest)

    def _moved(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """What the UNet said, all in all, moved by what the nudge moved D."""
        assert self._said is not None, "step asks only then"
        level, said = self._passes[self._number], _wide(self._said)
        if self._x is None:
            denoised = level.of_x * level.scale * _wide(sample) + level.of_said * _wide(model_output)
            nudged = self._guide.at(self._number, denoised, self._spread(said, level))
        else:
            with torch.enable_grad():
                graph = level.of_x * level.alpha * self._x + level.of_said * self._combined(said)
                nudged = self._guide.at_input(self._number, graph, self._x, self._remaining())
            denoised = graph.detach()
        # A prediction that was no number was not nudged: it shall stay what it was.
        change = ((nudged - denoised) / level.of_said).nan_to_num(0.0, 0.0, 0.0)
        return model_output + change.to(model_output.dtype)

    def _spread(self, said: Tensor, level: Level) -> Tensor | None:
        """cfg · rms(D_cond − D_uncond) of each picture, [B]."""
        if self._cfg is None:
            return None
        uncond, cond = said.chunk(2)
        return self._cfg * abs(level.of_said) * (cond - uncond).square().flatten(1).mean(1).sqrt()

    def _combined(self, said: Tensor) -> Tensor:
        if self._cfg is None:
            return said
        uncond, cond = said.chunk(2)
        return uncond + self._cfg * (cond - uncond)

    def _remaining(self) -> float:
        """1 − σ_next / σ, σ_next of the next sampling step."""
        here = self._passes[self._number]
        later = [one for one in self._passes[self._number + 1 :] if one.place > here.place]
        return 1.0 - (later[0].noise / here.noise if later else 0.0)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """A method of one object that calls `by` with its own self first; it keeps its signature, which pipelines read."""
    before = vars(owner).get(name)
    own = getattr(owner, name)

    @wraps(own)
    def stands_in(*args: Any, **kwargs: Any) -> Any:
        return by(own, *args, **kwargs)

    vars(owner)[name] = stands_in
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
