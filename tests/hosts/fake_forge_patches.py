"""Forge's merge by its published formulas, for the tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def merge(patches: Sequence[Sequence[Any]], weight: Tensor) -> Tensor:
    """The weight with the patches in it, one after the other; a new tensor. Raises for a patch that does not fit."""
    weight = weight.clone()
    for strength, value, strength_model, offset, function in patches:
        part = weight if offset is None else weight.narrow(*offset)
        part *= strength_model
        kind, tensors = ("diff", value) if len(value) == 1 else value
        merged = one(part, kind, tensors, strength, function or (lambda rows: rows))
        if offset is None:
            weight = merged
        else:
            part.copy_(merged)
    return weight


def one(weight: Tensor, kind: str, tensors: Sequence[Any], strength: float, function: Any) -> Tensor:
    if kind == "set":
        return torch.broadcast_to(tensors[0], weight.shape).clone()
    if kind == "diff":
        return difference(weight, strength * tensors[0])
    if kind not in UPDATES:
        return weight
    update, alpha = UPDATES[kind](weight, *tensors[:-1])
    if update.numel() == weight.numel():
        update = update.reshape(weight.shape)
    elif update.shape[1] > weight.shape[1]:
        weight = pad(weight, (0, update.shape[1] - weight.shape[1]))
    else:
        update = pad(update, (0, weight.shape[1] - update.shape[1]))
    magnitude = tensors[-1]
    if magnitude is None:
        return weight + function(strength * alpha * update)
    changed = weight + function(alpha * update)
    kept = weight if magnitude.shape[0] == weight.shape[0] else changed.transpose(0, 1)
    norm = kept.flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))
    norm = norm if kept is weight else norm.transpose(0, 1)
    changed = changed * (magnitude / (norm + torch.finfo(weight.dtype).eps))
    return weight + strength * (changed - weight)


def difference(weight: Tensor, update: Tensor) -> Tensor:
    if update.shape == weight.shape:
        return weight + update
    if update.dim() != 4 or weight.dim() != 4:
        return weight  # the host prints a warning
    shape = [max(sizes) for sizes in zip(weight.shape, update.shape, strict=True)]
    widened = weight.new_zeros(shape)
    widened[tuple(slice(n) for n in weight.shape)] = weight
    widened[tuple(slice(n) for n in update.shape)] += update
    return widened


def over(alpha: float | None, rank: int | None) -> float:
    return 1.0 if alpha is None or rank is None else alpha / rank


def lora(weight: Tensor, up: Tensor, down: Tensor, alpha: float | None, mid: Tensor | None) -> tuple[Tensor, float]:
    rank = down.shape[0]
    if mid is not None:
        down = torch.einsum("abkl,bi->aikl", mid, down.flatten(1))
    return up.flatten(1) @ down.flatten(1), over(alpha, rank)


def tucker(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def lokr(weight: Tensor, w1: Any, w2: Any, alpha: Any, w1a: Any, w1b: Any, w2a: Any, w2b: Any, t2: Any) -> Any:
    rank = w2b.shape[0] if w2 is None else w1b.shape[0] if w1 is None else None
    w1 = w1a @ w1b if w1 is None else w1
    w2 = tucker(w2a, w2b, t2) if w2 is None else w2
    return torch.kron(w1[:, :, None, None] if w2.dim() == 4 else w1, w2.contiguous()), over(alpha, rank)


def loha(weight: Tensor, w1a: Tensor, w1b: Tensor, alpha: Any, w2a: Tensor, w2b: Tensor, t1: Any, t2: Any) -> Any:
    return tucker(w1a, w1b, t1) * tucker(w2a, w2b, t2), over(alpha, w1b.shape[0])


def glora(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, alpha: float | None) -> tuple[Tensor, float]:
    on_input = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
    return on_input + (b1 @ b2).reshape(weight.shape), over(alpha, a2.shape[0])


UPDATES = {"lora": lora, "lokr": lokr, "loha": loha, "glora": glora}
