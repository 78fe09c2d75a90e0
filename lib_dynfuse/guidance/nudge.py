"""One guidance step: move the denoised prediction a little towards a lower objective (docs/method.md, section 3).

`x0` is one step along the gradient (after MPGD, FreeDoM and RB-Modulation), `adam` a few steps of Adam held near the
prediction (after RB-Modulation). Neither goes back through the UNet: samplers derive everything else from the denoised
prediction, so eps, v and flow models and every sampler share this path. `xt` is the paper's own (arXiv 2602.15539): the
gradient by the UNet's input, which needs the activations of the UNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.precision import without_autocast

MODES = ("x0", "adam", "xt")
# docs/method.md, section 3: s = c · rms(D) where classifier-free guidance says nothing of the scale.
WITHOUT_CFG = 0.25
# The paper's step size m is 10, which the default strength of 0.2 is to mean.
PAPER_STEP = 50.0
# Of 1 − σ_next / σ, by which the paper's update is divided: where steps are many it comes near nothing.
_SMALLEST_STEP = 0.05
_EPSILON = 1e-8
# An objective's gradient by a pixel is about 1e-6, where half precision has few digits left. A power of two is exact.
_GRADIENT_SCALE = 2.0**12
# Adam's usual ones.
_BETAS = (0.9, 0.999)
_TINY = torch.finfo(torch.float32).tiny
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Nudged:
    """What a nudge made.

    `denoised`: as given where the nudge was skipped; `r`: the objective before it, [B] on the device, NaN where it is
    not known; `failed`: [B] on the device, whether the objective or its gradient was no number; `skipped`: why the
    whole nudge was left out, or nothing.
    """

    denoised: Tensor
    r: Tensor
    failed: Tensor
    skipped: str = ""

    def reason(self) -> str:
        """What to tell the person, or nothing. Reads from the device, so ask after sampling."""
        if self.skipped:
            return self.skipped
        pictures = [str(index + 1) for index, failed in enumerate(self.failed.tolist()) if failed]
        if not pictures:
            return ""
        return f"the objective or its gradient is not a number (picture {', '.join(pictures)} of the batch)"


@dataclass(frozen=True)
class Nudge:
    """How far and when: `strength`, the η of docs/method.md; a nudge at every `every`-th step between `start` and
    `stop`, 0 the first step and 1 the last; `clamp`: the most it may move, as a share of the prediction's own size.

    For `xt` the paper's m is 50 · `strength`. Only for `adam`: `steps` of it, each up to `strength`/`steps` of the
    scale, held by `pull` · ‖D − D0‖² / ‖D0‖².
    Raises ValueError for a value out of range.
    """

    mode: str = "x0"
    strength: float = 0.2
    start: float = 0.3
    stop: float = 1.0
    every: int = 1
    clamp: float = 0.03
    steps: int = 3
    pull: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}; there are: {', '.join(MODES)}")
        for name in ("strength", "clamp", "pull"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, not {value!r}")
        for name in ("every", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)!r}")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(f"start {self.start:g} to stop {self.stop:g}; wanted is 0 <= start <= stop <= 1")

    def wants(self, step: int, progress: float) -> bool:
        """Whether this step is one to nudge. `step` counts from 0; `progress`: 0 at the first step, 1 at the last."""
        return self.strength > 0 and self.start <= progress <= self.stop and step % self.every == 0

    def __call__(self, denoised: Tensor, objective: Objective, decode: Decoder, spread: Tensor | None = None) -> Nudged:
        """Nudge every item of `denoised` [B, C, h, w]; the result has its dtype.

        `objective`: pictures [B, 3, H, W] -> R [B]; `spread`: cfg · rms(D_cond − D_uncond) of each item [B], None where
        there is no guidance scale. Works inside inference mode and autocast, and reads nothing from the device. An item
        whose R or gradient is no number stays as it is; so do all where memory does not suffice, and nothing is raised.
        """
        if self.mode == "xt":
            raise ValueError("the mode xt needs the UNet's input: through_unet")
        return self._guarded(denoised, lambda: self._nudged(denoised, objective, decode, spread))

    def through_unet(
        self, denoised: Tensor, x: Tensor, objective: Objective, decode: Decoder, remaining: float
    ) -> Nudged:
        """The paper's update, for the mode `xt`: x_next is to be moved by −m · grad_x R.

        `x` [B, C, h, w]: what the UNet was fed, a leaf of the graph that `denoised` still has; `remaining`:
        1 − σ_next / σ, the share of the denoised prediction in what a sampler makes next, by which the move is divided.
        The result has no graph; `clamp` and the rest are as ever.
        """
        given = denoised.detach()

        def move() -> Nudged:
            d = denoised.to(torch.promote_types(denoised.dtype, torch.float32))
            r = objective(decode(d))
            g = _by(r, x).to(d.dtype)
            change = -PAPER_STEP * self.strength * g / max(remaining, _SMALLEST_STEP)
            return self._clamped(given, d.detach(), change, r.detach())

        return self._guarded(given, move)

    def _guarded(self, denoised: Tensor, nudge: Callable[[], Nudged]) -> Nudged:
        try:
            with _own_gradients(denoised.device):
                return nudge()
        except _NoGradient:
            reason = "no gradient comes through the decoder or the encoders"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "not enough memory for it"
        # Out of the handler, whose traceback would keep the activations that did not fit.
        nothing = torch.full((len(denoised),), math.nan, device=denoised.device)
        return Nudged(denoised, nothing, torch.zeros_like(nothing, dtype=torch.bool), reason)

    def _nudged(self, denoised: Tensor, objective: Objective, decode: Decoder, spread: Tensor | None) -> Nudged:
        # A copy, since autograd refuses a tensor that was made in inference mode.
        d0 = denoised.detach().to(torch.promote_types(denoised.dtype, torch.float32), copy=True)
        scale = WITHOUT_CFG * _rms(d0) if spread is None else _per_item(spread.detach().to(d0, copy=True), d0)
        move = self._along_gradient if self.mode == "x0" else self._adam
        change, r = move(d0, scale, lambda d: objective(decode(d)))
        return self._clamped(denoised, d0, change, r)

    def _clamped(self, denoised: Tensor, d0: Tensor, change: Tensor, r: Tensor) -> Nudged:
        """`denoised` moved by `change`, cut to what may be; as it was where that is no number."""
        change = change * (self.clamp * _rms(d0) / _rms(change).clamp_min(_TINY)).clamp(max=1.0)
        moved = (d0 + change).to(denoised.dtype)
        failed = ~(moved.isfinite().flatten(1).all(1) & r.isfinite())
        return Nudged(torch.where(_per_item(failed, d0), denoised, moved), r, failed)

    def _along_gradient(self, d0: Tensor, scale: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        g, r = _gradient(d0, objective)
        return -self.strength * scale * g / (_rms(g) + _EPSILON), r

    def _adam(self, d0: Tensor, scale: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """Adam on R + pull · ‖D − D0‖² / ‖D0‖², with a rate for each item."""
        rate = self.strength * scale / self.steps
        square = d0.square().flatten(1).sum(1)
        first, second, d = torch.zeros_like(d0), torch.zeros_like(d0), d0
        before = None
        for step in range(1, self.steps + 1):
            g, r = _gradient(d, objective)
            before = r if before is None else before
            g = g + 2.0 * self.pull * (d - d0) / (_per_item(square, d0) + _TINY)
            first = _BETAS[0] * first + (1 - _BETAS[0]) * g
            second = _BETAS[1] * second + (1 - _BETAS[1]) * g.square()
            root = (second / (1 - _BETAS[1] ** step)).sqrt()
            d = d - rate * (first / (1 - _BETAS[0] ** step)) / (root + _EPSILON)
        assert before is not None, "steps is 1 or more"
        return d - d0, before


class _NoGradient(Exception):
    """The objective does not depend on the latent, as autograd sees it."""


def _gradient(d: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(grad R, R) at `d`; items are independent, so the gradient of the sum is each item's own."""
    d = d.detach().requires_grad_()
    r = objective(d)
    return _by(r, d), r.detach()


def _by(r: Tensor, x: Tensor) -> Tensor:
    """The gradient of every item's `r` by its own `x`."""
    if not r.requires_grad:
        raise _NoGradient
    (g,) = torch.autograd.grad(r.sum() * _GRADIENT_SCALE, x, allow_unused=True)
    if g is None:
        raise _NoGradient
    found: Tensor = g / _GRADIENT_SCALE
    return found


@contextmanager
def _own_gradients(device: torch.device) -> Iterator[None]:
    """Gradients in full precision, whatever the sampler around switched off or on."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(device):
        yield


def _rms(x: Tensor) -> Tensor:
    """The root mean square of each item, [B, 1, ...]."""
    return _per_item(x.square().flatten(1).mean(1).sqrt(), x)


def _per_item(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to go with `like`."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator raised this, of the CPU or of any device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # The allocators of the CPU and of other devices raise a plain RuntimeError.
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)
