"""Fused kernels for low-rank deltas, and when they may be used; plain torch is the reference for all that they compute.

From the base output, both roles' hidden products and the packed ups, one kernel computes the two divergences of every
token without writing either delta, another adds the winner's product in place. They run where Triton does: on NVIDIA
and AMD GPUs under Linux, or anywhere through Triton's interpreter. Elsewhere, and wherever a layer does not suit them,
the callers go on in plain torch.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("lib_dynfuse")

PATHS = ("auto", "torch", "triton")
_path = "torch" if os.environ.get("DYNFUSE_TRITON") == "0" else "auto"
_switched_off = False
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Offsets within an item are 32 bits wide.
_ELEMENTS = 1 << 31


@contextmanager
def path(name: str) -> Iterator[None]:
    """Which way is taken while this is entered: `torch` never the kernels, `triton` also on a CPU, where Triton
    interprets them (TRITON_INTERPRET=1 in the environment), `auto` where they pay. ValueError for another name."""
    global _path
    if name not in PATHS:
        raise ValueError(f"unknown path {name!r}; there are: {', '.join(PATHS)}")
    before, _path = _path, name
    try:
        yield
    finally:
        _path = before


def usable(tokens: Tensor) -> bool:
    """Whether the kernels may be used on an output [B, T, C] like this. The first one of a device and dtype that was
    not tried before (`try_out`) is tried now."""
    return _wanted(tokens.device) and tokens.numel() < _ELEMENTS and try_out(tokens.device, tokens.dtype)


def try_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels do right there: once, on a small example, they are compared with plain torch. That is the
    only time that the host waits for the device, so it is best done before a picture is begun."""
    return _wanted(device) and dtype in _DTYPES and _proven(device, dtype)


def _wanted(device: torch.device) -> bool:
    if _switched_off or _path == "torch":
        return False
    return device.type == "cuda" or (_path == "triton" and _interpreting(device))


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot be used there, an empty text where they can."""
    if device.type != "cuda" and not _interpreting(device):
        return f"there is no Triton for {device.type}, and TRITON_INTERPRET=1 is not set"
    if dtype not in _DTYPES:
        return f"they are not made for {dtype}"
    if _proven(device, dtype):
        return ""
    return "Triton is missing, the GPU is older than Ampere, or they failed (see the log)"


def _interpreting(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from lib_dynfuse.core import triton_kernels
    # What a broken installation raises is not only ImportError.
    except Exception as error:
        _log.debug("no Triton: %s", error)
        return None
    return triton_kernels


@functools.cache
def _proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Tries the kernels once; without a compiler, on a GPU that is too old or with a wrong result they stay off."""
    # Before Ampere Triton has no tensor cores to offer.
    if _kernels() is None or (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8):
        return False
    # Numbers without a generator: a picture's seed must not be drawn from.
    wave = torch.arange(2 * 37 * 80, dtype=torch.float32, device=device).sin_()
    base = wave.view(2, 37, 80).to(dtype)
    hidden, up = wave[: 2 * 37 * 24].view(2, 37, 24).to(dtype), (wave[: 24 * 80].view(24, 80) * 0.2).to(dtype)
    subject, style = (hidden[..., part] for part in (slice(0, 4), slice(4, 24)))
    wins = torch.tensor([[True], [False]], device=device)
    with torch.inference_mode(False), torch.no_grad():
        found = kl_pair(base, (subject, up[:4]), (style, up[4:]))
        added = base.clone()
        if found is None or not add(added, hidden, up, 4, wins, ~wins):
            return False
        deltas = torch.stack([subject.float() @ up[:4].float(), style.float() @ up[4:].float()])
        p0, p = base.float().log_softmax(-1), (base.float() + deltas).log_softmax(-1)
        expected = (p.exp() * (p - p0)).sum(-1)
        sums = base.float() + torch.stack([deltas[0, 0], deltas[1, 1]])
        rounding = 4 * torch.finfo(dtype).eps
        right = torch.allclose(torch.stack(found), expected, rtol=1e-3, atol=1e-5) and torch.allclose(
            added.float(), sums, rtol=rounding, atol=rounding
        )
    if not right:
        _log.warning("DynFuse's kernels are off on %s: they compute something else than torch does", device)
    return right


def kl_pair(
    base: Tensor, subject: tuple[Tensor, Tensor], style: tuple[Tensor, Tensor], temperature: float = 1.0
) -> tuple[Tensor, Tensor] | None:
    """Both roles' KL divergences [B, T], float32, of low-rank deltas that are never written; None where that failed.

    base [B, T, C] in any memory order; each role (hidden [B, T, r], up [r, C]), both ups views of packed ones. Good
    to about 1e-6 of the divergence for deltas below 16 times the temperature, else to a few times 1e-6.
    """
    (h_subject, u_subject), (h_style, u_style) = subject, style
    batch, tokens, channels = base.shape
    found = torch.empty(2, batch, tokens, dtype=torch.float32, device=base.device)
    ranks = u_subject.shape[0], u_style.shape[0]
    rows, columns, chunk = _tile(tokens, max(ranks))

    def launch(kernels: ModuleType) -> None:
        kernels.statistics[(-(-tokens // rows), batch)](
            base, h_subject, h_style, u_subject, u_style, found[0], found[1], tokens, channels, *ranks,
            1.0 / temperature, *base.stride(), *h_subject.stride(), *h_style.stride(), *u_subject.stride(),
            BT=rows, BC=columns, R=chunk, num_warps=rows // 4,
        )  # fmt: skip

    return (found[0], found[1]) if _launched(base.device, launch) else None


def add(tokens: Tensor, hidden: Tensor, up: Tensor, rank_subject: int, subject: Tensor, style: Tensor) -> bool:
    """tokens [B, T, C] += subject · hidden_s · up_s + style · hidden_t · up_t, in place; False, and nothing is done,
    where that failed or autograd would have to know of it.

    hidden [B, T, r] and up [r, C] have the subject's ranks first. The weights are both [B, 1] or both [B, T]; where
    they are boolean [B, 1], one the other's opposite, only the winner's product is computed.
    """
    if torch.is_grad_enabled() and (tokens.requires_grad or hidden.requires_grad):
        return False
    batch, count, channels = tokens.shape
    rows, columns, chunk = _tile(count, max(rank_subject, up.shape[0] - rank_subject))
    grid = -(-count // rows), -(-channels // columns), batch
    sizes = count, channels, rank_subject, up.shape[0], *tokens.stride(), *hidden.stride(), *up.stride()
    tile: dict[str, Any] = {"BT": rows, "BC": columns, "R": chunk, "num_warps": rows // 4}
    boolean, per_item = subject.dtype == torch.bool, subject.shape[1] == 1
    if boolean:
        subject, style = subject.view(torch.uint8), style.view(torch.uint8)

    def launch(kernels: ModuleType) -> None:
        if boolean and per_item:
            kernels.add_winner[grid](tokens, hidden, up, subject, *sizes, subject.stride(0), **tile)
        else:
            strides = subject.stride(0), 0 if per_item else subject.stride(1)
            kernels.add_weighted[grid](tokens, hidden, up, subject, style, *sizes, *strides, **tile)

    return _launched(tokens.device, launch)


def _launched(device: torch.device, launch: Callable[[ModuleType], None]) -> bool:
    """Whether a kernel was started; one that cannot be built on this machine takes all of them out of use."""
    global _switched_off
    kernels = _kernels()
    if kernels is None:
        return False
    try:
        # Triton starts its kernels on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            launch(kernels)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        _switched_off = True
        _log.warning("DynFuse's kernels are off, plain torch takes their place: %s", error)
        return False
    return True


def _tile(tokens: int, rank: int) -> tuple[int, int, int]:
    """(tokens, channels, ranks) of a tile, the same whatever the batch: few tokens where there are few, so that all of
    a GPU has work."""
    return 16 if tokens <= 4096 else 32, 64, 16 if rank <= 16 else 32 if rank <= 32 else 64
