"""A small AUTOMATIC1111, cut to the shape of the real one: its Lora extension, lazy merging and all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.to_q = nn.Linear(8, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(torch.tanh(self.to_q(h))).chunk(3, -1)
        result: Tensor = torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v
        return result


class Network:
    def __init__(self, name: str) -> None:
        self.name = self.mentioned_name = name
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim: Any = None
        self.modules: dict[str, Any] = {}


class NetworkModule:
    """What all kinds share; `multiplier` is the only thing that another extension changes while sampling."""

    bias = dora_scale = None

    def __init__(self, network: Network, layer: Any, fused: bool = False, **weights: Any) -> None:
        self.network, self.sd_module = network, layer
        self.shape = (layer.weight.shape[0] // 3, layer.weight.shape[1]) if fused else layer.weight.shape
        self.alpha_over_dim = 0.5
        vars(self).update(weights)

    def multiplier(self) -> float:
        return self.network.unet_multiplier

    def calc_scale(self) -> float:
        return self.alpha_over_dim

    def finalize(self, update: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        update = update.reshape(weight.shape) * self.calc_scale()
        if self.dora_scale is not None:
            merged = weight + update
            # Of the weight's second axis, as the real one has it: per input channel.
            norm = merged.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *(1 for _ in weight.shape[2:]))
            update = merged * (self.dora_scale / norm) - weight
        return update * self.multiplier(), None if bias is None else bias * self.multiplier()


class NetworkModuleLora(NetworkModule):
    mid_model: Any = None

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        up, down = self.up_model.weight, self.down_model.weight
        if self.mid_model is not None:
            core = self.mid_model.weight
            return self.finalize(torch.einsum("nmkl,in,mj->ijkl", core, up.flatten(1), down.flatten(1)), weight)
        rank = self.network.dyn_dim
        return self.finalize(up.flatten(1)[:, :rank] @ down.flatten(1)[:rank], weight)


class NetworkModuleLokr(NetworkModule):
    w1 = w1a = w1b = w2 = w2a = w2b = t2 = None

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        w1 = self.w1 if self.w1 is not None else self.w1a @ self.w1b
        w2 = self.w2 if self.w2 is not None else self.w2a @ self.w2b
        if weight.dim() == 4:
            w1 = w1[:, :, None, None]
        return self.finalize(torch.kron(w1, w2.contiguous()), weight)


class NetworkModuleHada(NetworkModule):
    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.finalize((self.w1a @ self.w1b) * (self.w2a @ self.w2b), weight)


class NetworkModuleIa3(NetworkModule):
    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.finalize(weight * (self.w if self.on_input else self.w.reshape(-1, 1)), weight)


class NetworkModuleOFT(NetworkModule):
    is_R = False
    rescale = None
    constraint = 0

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        skew = self.oft_blocks - self.oft_blocks.transpose(-1, -2)
        eye = torch.eye(skew.shape[-1])
        turn = (eye + skew) @ (eye - skew).inverse()
        parts = weight.unflatten(0, turn.shape[:2])
        return self.finalize(torch.einsum("knm,kn...->km...", turn, parts).flatten(0, 1) - weight, weight)


class NetworkModuleGLora(NetworkModule):
    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.finalize(self.w2b @ self.w1b + (weight @ self.w2a) @ self.w1a, weight)


class NetworkModuleFull(NetworkModule):
    ex_bias: Tensor | None = None

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.finalize(self.weight, weight, self.ex_bias)


class NetworkModuleNorm(NetworkModule):
    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.finalize(self.w_norm, weight, self.b_norm)


class Networks(ModuleType):
    """The module `networks` of the Lora extension."""

    def __init__(self, model: Any) -> None:
        super().__init__("networks")
        self.model = model
        self.on_disk: dict[str, Network] = {}
        self.loaded_networks: list[Network] = []

    def load_networks(self, names: Sequence[str], strengths: Sequence[float]) -> None:
        """What the host does when a prompt's LoRAs are activated: what is loaded already is used again."""
        already = {network.name: network for network in self.loaded_networks}
        self.loaded_networks.clear()
        for name, strength in zip(names, strengths, strict=True):
            network = already.get(name) or self.on_disk[name]
            network.te_multiplier = network.unet_multiplier = strength
            network.dyn_dim, network.mentioned_name = None, name
            self.loaded_networks.append(network)

    def network_restore_weights_from_backup(self, layer: Any) -> None:
        if hasattr(layer, "backup"):
            layer.weight.copy_(layer.backup[0])
            if layer.backup[1] is not None:
                layer.bias.copy_(layer.backup[1])

    @torch.no_grad()
    def network_apply_weights(self, layer: Any) -> None:
        wanted = tuple((n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in self.loaded_networks)
        if getattr(layer, "current", ()) == wanted:
            return
        if not hasattr(layer, "backup"):
            layer.backup = (layer.weight.clone(), None if layer.bias is None else layer.bias.clone())
        self.network_restore_weights_from_backup(layer)
        for network in self.loaded_networks:
            module = network.modules.get(layer.network_layer_name)
            parts = [network.modules.get(f"{layer.network_layer_name}_{part}_proj") for part in "qkv"]
            if module is not None:
                update, bias = module.calc_updown(layer.weight)
                layer.weight += update
                if bias is not None:
                    layer.bias += bias
            elif all(parts):
                thirds = zip(parts, layer.weight.chunk(3), strict=True)
                layer.weight += torch.cat([part.calc_updown(rows)[0] for part, rows in thirds])
        layer.current = wanted


class WebUI:
    """The model, the Lora extension and `modules.shared`, in place as long as the test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unet = Unet()
        encoder = nn.Linear(8, 8)
        self.model: Any = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet), network_layer_mapping={})
        named = [*((f"diffusion_model_{n.replace('.', '_')}", m) for n, m in unet.named_modules() if n)]
        for name, module in [*named, ("transformer_text_model", encoder)]:
            module.network_layer_name = name
            self.model.network_layer_mapping[name] = module
        self.unet, self.encoder = unet, encoder
        self.networks = Networks(self.model)
        for layer in (*unet.children(), encoder):
            layer.register_forward_pre_hook(lambda module, _: self.networks.network_apply_weights(module))
        self.opts = SimpleNamespace(lora_functional=False)
        modules: Any = ModuleType("modules")
        modules.shared = SimpleNamespace(sd_model=self.model, opts=self.opts)
        monkeypatch.setitem(sys.modules, "modules", modules)

    def add(self, name: str, *modules: tuple[str, type[NetworkModule], dict[str, Any]]) -> Network:
        """A LoRA on disk; `modules` are layer key, kind and weights."""
        network = self.networks.on_disk[name] = Network(name)
        for key, kind, weights in modules:
            fused = key.endswith("_proj")
            layer = self.model.network_layer_mapping[key[:-7] if fused else key]
            network.modules[key] = kind(network, layer, fused, **weights)
        return network


def rand(*shape: int, seed: int = 0, size: float = 0.3) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(layer: nn.Module, rank: int = 2, seed: int = 0) -> dict[str, Any]:
    """Up and down of a LoRA for a Linear or Conv2d layer, wrapped in layers as the host keeps them."""
    weight: Any = layer.weight
    tail = [1] * (weight.dim() - 2)
    down, up = rand(rank, *weight.shape[1:], seed=seed), rand(weight.shape[0], rank, *tail, seed=seed + 1)
    return {"down_model": SimpleNamespace(weight=down), "up_model": SimpleNamespace(weight=up)}
