"""The forward passes that are measured: the engine's methods, peft's unmerged adapters, and K-LoRA as published."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib_dynfuse.bench.unets import Layers
from lib_dynfuse.core import Role
from lib_dynfuse.core.delta import LowRank

# The engine's own methods: (rule, its parameters).
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("sum", {}),
    "kl": ("kl", {}),
    "kl-sampled": ("kl", {"sample_tokens": 64}),
    "kl-sampled-32": ("kl", {"sample_tokens": 32}),
    "kl-token": ("kl-token", {}),
    "kl-soft": ("kl-soft", {}),
    "kl-balanced": ("kl", {"auto_balance": True, "couple_cfg": True}),
    # The panel's default, the same without sampling, and the rule without a choice that comes nearest to it.
    "kl-cfg": ("kl-cfg", {"auto_balance": True, "couple_cfg": True, "sample_tokens": 64}),
    "kl-cfg-exact": ("kl-cfg", {"auto_balance": True, "couple_cfg": True}),
    "sum-cfg": ("sum-cfg", {}),
    "klora": ("klora", {}),
    "np": ("np", {}),
}


def with_peft(unet: nn.Module, layers: Layers, rank: int) -> nn.Module:
    """A copy of `unet` that shares its weights and has both networks as active, unmerged peft adapters."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    model = copy.deepcopy(unet, memo)
    for role in Role:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        inject_adapter_in_model(config, model, adapter_name=role.value)
    modules = dict(model.named_modules())
    for name, (_, deltas) in layers.items():
        layer = modules[name]
        assert isinstance(layer, LoraLayer)
        for role, delta in deltas.items():
            assert isinstance(delta, LowRank)
            layer.lora_A[role.value].weight = nn.Parameter(delta.down, requires_grad=False)
            layer.lora_B[role.value].weight = nn.Parameter(delta.up, requires_grad=False)
        layer.set_adapter([role.value for role in Role])
    return model.eval().requires_grad_(False)


@contextmanager
def klora_published(layers: Layers, progress: float = 0.5) -> Iterator[None]:
    """K-LoRA (arXiv 2502.18461) as its paper describes a forward pass: both dense deltas and their top entries anew at
    every layer, then the winner's dense delta applied. alpha 1.5, beta 0.5, gamma 1."""
    handles = []
    for module, deltas in layers.values():
        subject, style = deltas[Role.SUBJECT], deltas[Role.STYLE]
        assert isinstance(subject, LowRank)
        assert isinstance(style, LowRank)

        def fuse(
            module: nn.Module, args: tuple[Tensor, ...], y: Tensor, subject: LowRank = subject, style: LowRank = style
        ) -> Tensor:
            weights = [(one.up.flatten(1) @ one.down.flatten(1)) for one in (subject, style)]
            k = min(subject.rank * style.rank, weights[0].numel())
            scores = [weight.abs().flatten().topk(k).values.sum() for weight in weights]
            wins = scores[0] / (scores[1] * (1.5 * progress + 0.5)) > 1
            weight = torch.where(wins, weights[0], weights[1])
            if subject.geometry is None:
                return y + nn.functional.linear(args[0], weight)
            return y + subject.geometry.conv(args[0], weight.view(-1, *subject.down.shape[1:]))

        handles.append(module.register_forward_hook(fuse))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
