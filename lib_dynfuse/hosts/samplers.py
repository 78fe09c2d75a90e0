"""The WebUI's sampler names, and the diffusers scheduler that each of them is."""

from __future__ import annotations

import difflib
from typing import Any

import diffusers
import numpy as np

from lib_dynfuse.errors import DynFuseError

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
# The least noise that still counts as some: a schedule of zero terminal SNR has an infinite first sigma.
_LEAST_ALPHA = 2.0**-24


def make_sampler(own: Any, name: str | None) -> Any:
    """A fresh scheduler: `name` with the model's noise schedule, or the model's own kind where `name` is None.

    own: the scheduler that came with the model. Raises DynFuseError that lists the names for an unknown one.
    """
    if name is None:
        return type(own).from_config(own.config)
    known = {sampler.lower(): sampler for sampler in SAMPLERS}
    wanted = name.strip().lower()
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f" (did you mean {known[close[0]]}?)" if close else ""
        raise DynFuseError(f"unknown sampler {name!r}{hint}; there are: {', '.join(SAMPLERS)}")
    kind, settings = SAMPLERS[known[wanted]]
    return getattr(diffusers, kind).from_config(own.config, **settings)


def sampler_name(sampler: Any) -> str:
    """What the WebUI would call this scheduler; its class name where the WebUI has no name for it."""
    kind = type(sampler).__name__
    fits = [
        (len(settings), name)
        for name, (scheduler, settings) in SAMPLERS.items()
        if scheduler == kind and all(sampler.config.get(key) == value for key, value in settings.items())
    ]
    return max(fits)[1] if fits else kind


def sigmas(sampler: Any, steps: int) -> list[float]:
    """How noisy the input of every forward pass is, in k-diffusion's units, for `steps` steps: sqrt((1 - a) / a).

    One entry a pass, which is more than `steps` for samplers that look twice. Leaves the sampler set to these steps.
    """
    sampler.set_timesteps(steps)
    alphas = np.asarray(sampler.alphas_cumprod, dtype=np.float64)
    times = np.asarray(sampler.timesteps, dtype=np.float64)
    alpha = np.interp(times, np.arange(len(alphas)), alphas).clip(_LEAST_ALPHA, 1.0)
    return [float(sigma) for sigma in np.sqrt((1 - alpha) / alpha)]
