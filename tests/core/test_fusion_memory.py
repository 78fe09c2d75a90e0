"""What a fused layer takes besides its factors: at most 64 MiB on the largest layer of SDXL at 1024 pixels."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib_dynfuse.core import Fusion, Role, kernels, strategy
from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.core.moment import Row

MIB = 2**20
RANK = 32


class Held(TorchDispatchMode):
    """Bytes of all storages that operators made and that are still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self._users: dict[int, tuple[int, int]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or (storage._cdata in given and storage._cdata not in self._users):
                continue
            users, size = self._users.get(storage._cdata, (0, storage.nbytes()))
            self.now += 0 if users else size
            self.most = max(self.most, self.now)
            self._users[storage._cdata] = users + 1, size
            weakref.finalize(tensor, self._drop, storage._cdata)
        return result

    def _drop(self, key: int) -> None:
        users, size = self._users.pop(key)
        if users > 1:
            self._users[key] = users - 1, size
        else:
            self.now -= size


def test_the_watch_counts_what_is_alive_at_once() -> None:
    with Held() as held:
        for _ in range(3):
            x = torch.empty(1000, dtype=torch.uint8)
            x[:10].add_(1)
        y = torch.empty(500, dtype=torch.uint8)
        assert held.now == 1500
        del x, y
    assert (held.now, held.most) == (0, 2000)


def taken(rule: str, device: str, tokens: int, channels: tuple[int, int], dtype: torch.dtype, **given: Any) -> float:
    """MiB in one forward pass of a Linear layer with batch 2, besides the layer's own output and the factors."""
    inside, outside = channels

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    layer = nn.Linear(inside, outside, device=device, dtype=dtype).requires_grad_(False)
    deltas = {role: LowRank(zeros(RANK, inside), zeros(outside, RANK)) for role in Role}
    x = zeros(2, tokens, inside)
    with torch.inference_mode(), Fusion({"ff": (layer, deltas)}, strategy(rule, **given)) as fusion:
        fusion.rows = [Row(0, cond=False), Row(0, cond=True)]
        with Held() as held:
            y = layer(x)
        return (held.most - y.nbytes - fusion.nbytes) / MIB


LARGEST = {"tokens": 4096, "channels": (640, 5120), "dtype": torch.float16}
RULES = [("kl", {}), ("kl", {"sample_tokens": 64}), ("kl", {"couple_cfg": True}), ("kl-token", {}), ("kl-soft", {})]
OTHERS = [("kl-cfg", {"couple_cfg": True, "ceiling": 0.3}), ("js", {}), ("cosine", {}), ("kl", {"standardise": True})]


@pytest.mark.parametrize(("rule", "given"), [*RULES, *OTHERS])
def test_a_gpu_in_plain_torch_needs_at_most_64_mib(rule: str, given: dict[str, Any]) -> None:
    assert 1 < taken(rule, "meta", **LARGEST, **given) <= 64


@pytest.mark.parametrize(("rule", "given"), RULES)
def test_a_gpu_with_kernels_needs_next_to_nothing(
    rule: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "usable", lambda tokens: True)
    monkeypatch.setattr(kernels, "_launched", lambda device, launch: True)
    assert 1 < taken(rule, "meta", **LARGEST, **given) <= 4


@pytest.mark.parametrize(("rule", "given"), RULES[:3])
def test_a_cpu_needs_at_most_64_mib(rule: str, given: dict[str, Any]) -> None:
    assert 1 < taken(rule, "cpu", 1024, (64, 2560), torch.float32, **given) <= 64
