"""Forge's patches as deltas: beside a layer they say what the host's merge says in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake_forge_patches import merge
from torch import Tensor, nn

from lib_dynfuse.core import Fusion, Role, strategy
from lib_dynfuse.core.delta import Affine, Decomposed, Delta, Dense, Kronecker, LowRank
from lib_dynfuse.hosts.forge_networks import deltas_of

Tensors = tuple[Any, ...]
Value = tuple[str, Tensors] | tuple[Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 8)
        self.square = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.point = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.layer_norm = nn.LayerNorm(6)
        self.group_norm = nn.GroupNorm(2, 6)
        self.embedding = nn.Embedding(6, 8)
        self.double()


class Box:
    """A UNet, and a record of the weights that were asked for."""

    def __init__(self) -> None:
        self.unet = Unet()
        self.asked: list[str] = []

    def weight(self, key: str) -> Tensor:
        self.asked.append(key)
        return self.unet.get_parameter(key.removeprefix("diffusion_model.")).detach()

    def deltas(
        self, patches: dict[str, list[Any]], unet: nn.Module | None = None
    ) -> tuple[dict[str, Delta], list[str]]:
        whole = {f"diffusion_model.{key}": listed for key, listed in patches.items()}
        return deltas_of(whole, unet or self.unet, self.weight, merge)

    @torch.no_grad()
    def check(self, name: str, **patches: list[Any]) -> Delta:
        """Beside the layer, the patches of its weight and bias make the same of an input as in it."""
        layer = self.unet.get_submodule(name)
        deltas, left = self.deltas({f"{name}.{key}": listed for key, listed in patches.items()})
        assert (list(deltas), left) == ([name], [])
        image = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
        x = rand(2, 6, 5, 5) if image else rand(2, 5, 6)
        plain = layer(x)
        bias = layer.bias.detach().view(-1, 1, 1) if image else layer.bias.detach()
        found = plain + deltas[name](x, plain - bias)
        changed = {key: merge(listed, getattr(layer, key).detach()) for key, listed in patches.items()}
        expected = torch.func.functional_call(layer, changed, (x,))
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        return deltas[name]


@pytest.fixture
def box() -> Box:
    return Box()


def patch(value: Value, strength: float = 0.7, offset: Any = None, function: Any = None) -> list[Any]:
    return [strength, value, 1.0, offset, function]


def lora(out: int = 8, kernel: Sequence[int] = (), magnitude: Tensor | None = None, seed: int = 0) -> Value:
    up = rand(out, 2, *(1 for _ in kernel), seed=seed)
    return "lora", (up, rand(2, 6, *kernel, seed=seed), 3.0, None, magnitude)


def core(magnitude: Tensor | None = None) -> Value:
    return "lora", (rand(8, 3, 1, 1), rand(3, 6, 1, 1), 2.0, rand(3, 3, 3, 3), magnitude)


def lokr(**given: Any) -> Value:
    names = ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2", "magnitude")
    return "lokr", tuple(given.get(name) for name in names)


def loha(out: int = 8, columns: int = 6, magnitude: Tensor | None = None) -> Value:
    pairs = rand(out, 2), rand(2, columns), 3.0, rand(out, 2, seed=1), rand(2, columns, seed=1)
    return "loha", (*pairs, None, None, magnitude)


def tucker() -> Value:
    first = rand(2, 8), rand(2, 6), 3.0
    return "loha", (*first, rand(2, 8, seed=1), rand(2, 6, seed=1), rand(2, 2, 3, 3), rand(2, 2, 3, 3, seed=1), None)


def glora(columns: int, magnitude: Tensor | None = None) -> Value:
    return "glora", (rand(6, 2), rand(2, 6), rand(8, 2), rand(2, columns), 1.5, magnitude)


ALIKE: dict[str, tuple[str, Value, type[Delta]]] = {
    "LoRA": ("linear", lora(), LowRank),
    "LoRA without alpha": ("linear", ("lora", (rand(8, 2), rand(2, 6), None, None, None)), LowRank),
    "LoRA of a convolution on a Linear": ("linear", lora(kernel=(1, 1)), LowRank),
    "LoRA of a Linear on a convolution": ("point", lora(), LowRank),
    "LoRA of a 1x1 convolution": ("point", lora(kernel=(1, 1)), LowRank),
    "LoRA of a narrower model": ("linear", ("lora", (rand(8, 2), rand(2, 4), 1.0, None, None)), LowRank),
    "LoRA of grouped convolutions": (
        "grouped",
        ("lora", (rand(8, 2, 1, 1), rand(2, 3, 3, 3), 1.0, None, None)),
        LowRank,
    ),
    "LoCon": ("conv", lora(kernel=(3, 3)), LowRank),
    "LoCon, its kernel flattened": ("conv", ("lora", (rand(8, 2), rand(2, 54), 1.0, None, None)), Dense),
    "LoCon with a core": ("conv", core(), LowRank),
    "DoRA": ("linear", lora(magnitude=1 + rand(8, 1).abs()), Decomposed),
    "DoRA of a convolution": ("conv", lora(kernel=(3, 3), magnitude=1 + rand(8, 1, 1, 1).abs()), Decomposed),
    "DoRA with a core": ("conv", core(1 + rand(8, 1, 1, 1).abs()), Decomposed),
    "DoRA by inputs": ("linear", lora(magnitude=1 + rand(1, 6).abs()), Dense),
    "DoRA by inputs of a convolution": ("conv", lora(kernel=(3, 3), magnitude=1 + rand(1, 6, 1, 1).abs()), Dense),
    "LoKr": ("linear", lokr(w1=rand(2, 3), w2=rand(4, 2), alpha=5.0), Kronecker),
    "LoKr of pairs": (
        "linear",
        lokr(alpha=5.0, w1_a=rand(2, 3), w1_b=rand(3, 3), w2_a=rand(4, 2), w2_b=rand(2, 2)),
        Kronecker,
    ),
    "LoKr, its first half a pair": (
        "linear",
        lokr(alpha=5.0, w1_a=rand(2, 3), w1_b=rand(3, 3), w2=rand(4, 2)),
        Kronecker,
    ),
    "LoKr of a convolution": ("conv", lokr(w1=rand(2, 3), w2=rand(4, 2, 3, 3)), Kronecker),
    "LoKr of a convolution, flattened": (
        "conv",
        lokr(alpha=1.0, w1=rand(2, 3), w2_a=rand(4, 2), w2_b=rand(2, 18)),
        Kronecker,
    ),
    "LoKr with a core": (
        "conv",
        lokr(alpha=1.0, w1=rand(2, 3), w2_a=rand(2, 4), w2_b=rand(2, 2), t2=rand(2, 2, 3, 3)),
        Kronecker,
    ),
    "LoKr of a 1x1 convolution": ("point", lokr(w1=rand(2, 3), w2=rand(4, 2)), Kronecker),
    "LoKr decomposed": (
        "linear",
        lokr(w1=rand(2, 3), w2=rand(4, 2), magnitude=1 + rand(8, 1).abs()),
        Decomposed,
    ),
    "LoHa": ("linear", loha(), Dense),
    "LoHa of a convolution": ("conv", loha(columns=54), Dense),
    "LoHa of a 1x1 convolution": ("point", loha(), Dense),
    "LoHa with cores": ("conv", tucker(), Dense),
    "LoHa decomposed": ("linear", loha(magnitude=1 + rand(8, 1).abs()), Decomposed),
    "GLoRA": ("linear", glora(6), Dense),
    "GLoRA of a convolution": ("conv", glora(54), Dense),
    "difference": ("linear", ("diff", (rand(8, 6),)), Dense),
    "difference without a name": ("linear", (rand(8, 6),), Dense),
    "difference of a convolution": ("conv", ("diff", (rand(8, 6, 3, 3),)), Dense),
    "difference of a narrower model": ("conv", ("diff", (rand(8, 4, 3, 3),)), Dense),
    "difference of a LayerNorm": ("layer_norm", ("diff", (rand(6),)), Affine),
    "difference of a GroupNorm": ("group_norm", ("diff", (rand(6),)), Affine),
    "weight": ("linear", ("set", (rand(8, 6),)), Dense),
    "weight of a LayerNorm": ("layer_norm", ("set", (rand(6),)), Affine),
}


def kinds(delta: Delta) -> set[type[Delta]]:
    return {type(delta)}.union(*(kinds(part) for part in delta.parts))


@pytest.mark.parametrize("kind", ALIKE)
def test_a_delta_adds_what_the_host_merges(box: Box, kind: str) -> None:
    name, value, structure = ALIKE[kind]
    for strength in (1.0, -0.6):
        assert structure in kinds(box.check(name, weight=[patch(value, strength)]))


NAMES_THAT_ASK = ("DoRA", "by inputs", "decomposed", "GLoRA", "weight", "narrower model", "kernel flattened")


@pytest.mark.parametrize("kind", ALIKE)
def test_the_weight_is_asked_for_only_where_the_delta_depends_on_it(box: Box, kind: str) -> None:
    name, value, structure = ALIKE[kind]
    box.deltas({f"{name}.weight": [patch(value)]})
    asked = structure is not LowRank and any(part in kind for part in NAMES_THAT_ASK)
    assert box.asked == ([f"diffusion_model.{name}.weight"] if asked else [])


@pytest.mark.parametrize("name", ["linear", "conv", "point", "layer_norm", "group_norm"])
@pytest.mark.parametrize("kind", ["diff", "set"])
def test_a_bias_shifts_the_output_whatever_the_weight_does(box: Box, name: str, kind: str) -> None:
    weight, bias = (getattr(box.unet.get_submodule(name), key) for key in ("weight", "bias"))
    value: Value = kind, (rand(*bias.shape, seed=4),)
    box.check(name, bias=[patch(value)])
    together = box.check(name, bias=[patch(value)], weight=[patch(("diff", (rand(*weight.shape),)))])
    if name in ("linear", "conv", "point"):
        assert together.dense() is not None


def swapped(rows: Tensor) -> Tensor:
    shift, scale = rows.chunk(2)
    return torch.cat([scale, shift])


REORDERED = [
    "LoRA",
    "LoRA of a 1x1 convolution",
    "LoCon",
    "LoCon with a core",
    "DoRA",
    "DoRA by inputs",
    "LoKr",
    "LoHa",
]


@pytest.mark.parametrize("kind", [*REORDERED, "GLoRA", "difference", "weight"])
def test_rows_are_reordered_as_the_host_reorders_them(box: Box, kind: str) -> None:
    name, value, structure = ALIKE[kind]
    delta = box.check(name, weight=[patch(value, function=swapped)])
    if structure is LowRank:
        assert LowRank in kinds(delta)


@pytest.mark.parametrize(
    "function", [lambda rows: rows * torch.linspace(0, 1, rows.shape[1]).to(rows), lambda rows: rows.flip(1)]
)
def test_a_function_that_does_more_than_to_reorder_rows_is_the_host_s_to_apply(
    box: Box, function: Callable[[Tensor], Tensor]
) -> None:
    assert Dense in kinds(box.check("linear", weight=[patch(lora(), function=function)]))


def test_no_random_number_is_drawn(box: Box) -> None:
    before = torch.get_rng_state()
    box.deltas({"linear.weight": [patch(lora(), function=swapped)]})
    assert torch.equal(torch.get_rng_state(), before)


PARTS: dict[str, Callable[[], Value]] = {
    "LoRA": lambda: lora(4),
    "DoRA": lambda: lora(4, magnitude=1 + rand(4, 1).abs()),
    "DoRA by inputs": lambda: lora(4, magnitude=1 + rand(1, 6).abs()),
    "LoKr": lambda: lokr(w1=rand(2, 3), w2=rand(2, 2)),
    "LoHa": lambda: loha(4),
    "difference": lambda: ("diff", (rand(4, 6),)),
    "weight": lambda: ("set", (rand(4, 6),)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_patch_for_a_part_of_a_fused_layer_leaves_its_other_rows_alone(box: Box, kind: str) -> None:
    box.check("linear", weight=[patch(PARTS[kind](), offset=(0, 3, 4))])
    box.check("linear", weight=[patch(PARTS[kind](), offset=(0, 2, 4), function=swapped)])


def test_a_part_of_a_bias_is_shifted_alone(box: Box) -> None:
    box.check("linear", bias=[patch(("diff", (rand(4),)), offset=(0, 3, 4))])


def test_the_parts_of_a_fused_layer_are_decided_one_by_one(box: Box) -> None:
    def network(seed: int) -> Delta:
        patches = [patch(lora(2, seed=seed + place), offset=(0, place, 2)) for place in (0, 2, 4)]
        return box.deltas({"linear.weight": patches})[0]["linear"]

    layers = {"qkv": (box.unet.linear, {Role.SUBJECT: network(0), Role.STYLE: network(9)})}
    with Fusion(layers, strategy("kl")) as fusion:
        assert fusion.names == ["qkv[0:2]", "qkv[2:4]", "qkv[4:6]"]


def test_several_patches_of_one_weight_add_up(box: Box) -> None:
    box.check("linear", weight=[patch(lora()), patch(lora(2, seed=5), offset=(0, 6, 2)), patch(loha())])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_delta_keeps_the_precision_of_the_file(box: Box, dtype: torch.dtype) -> None:
    """Entries too small for half precision are not lost."""
    kind, tensors = loha()
    assert isinstance(kind, str)
    small = tuple((one * 1e-3).to(dtype) if isinstance(one, Tensor) else one for one in tensors)
    delta = box.deltas({"linear.weight": [patch((kind, small))]})[0]["linear"]
    exact = merge([patch((kind, tuple(one.double() if isinstance(one, Tensor) else one for one in small)))], rand(8, 6))
    found = delta.dense()
    assert found is not None
    assert delta.nbytes == 8 * 6 * 2
    expected = (exact - rand(8, 6)).float()
    slack = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=slack)


MISFITS: dict[str, tuple[str, list[Any]]] = {
    "other columns": ("linear.weight", patch(lora(), offset=(1, 0, 6))),
    "rows beyond the last": ("linear.weight", patch(lora(4), offset=(0, 6, 4))),
    "rows of groups": ("grouped.weight", patch(lora(4), offset=(0, 0, 4))),
    "the model's own strength": ("linear.weight", [1.0, lora(), 0.5, None, None]),
    "an input that has to be widened": ("linear.weight", patch(("lora", (rand(8, 2), rand(2, 7), 1.0, None, None)))),
    "a kernel that has to be widened": ("point.weight", patch(("diff", (rand(8, 6, 3, 3),)))),
    "other rows": ("linear.weight", patch(lora(5))),
    "another kernel": ("conv.weight", patch(lora(kernel=(1, 1)))),
    "another shape": ("linear.weight", patch(("diff", (rand(3, 3),)))),
    "a kind that is not known": ("linear.weight", patch(("mystery", (rand(8, 6), None)))),
    "half a network": ("linear.weight", patch(lokr(w1=rand(2, 3)))),
    "no layer of that name": ("gone.weight", patch(lora())),
    "an embedding": ("embedding.weight", patch(("diff", (rand(6, 8),)))),
    "a scale": ("linear.scale", patch(("set", (rand(8),)))),
    "a LoRA for a norm": ("layer_norm.weight", patch(lora())),
}


@pytest.mark.parametrize("why", MISFITS)
def test_what_cannot_stand_beside_a_layer_is_left_and_named_and_stops_no_other(box: Box, why: str) -> None:
    key, misfit = MISFITS[why]
    deltas, left = box.deltas({key: [patch(lora()), misfit], "square.weight": [patch(lora(6))]})
    assert list(deltas) == ["square"]
    assert left == [f"diffusion_model.{key}"]


def test_a_key_of_another_model_is_left(box: Box) -> None:
    assert deltas_of({"text_model.linear.weight": [patch(lora())]}, box.unet, box.weight, merge) == (
        {},
        ["text_model.linear.weight"],
    )


class Linear(nn.Module):
    """As the host's for packed weights: what it holds has a shape of its own, and features are not told."""

    def __init__(self, packed: Tensor, **told: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, value in told.items():
            setattr(self.weight, name, value)


class DynamicSwap_Linear(Linear):
    def __getattr__(self, name: str) -> Any:
        assert name not in self.__dict__["_parameters"], "this brings the weight onto the device"
        return super().__getattr__(name)


class State:
    shape = torch.Size([8, 6])


PACKED: dict[str, Callable[[], nn.Module]] = {
    "4 bits": lambda: Linear(torch.zeros(24, 1, dtype=torch.uint8), quant_state=State()),
    "blocks": lambda: Linear(torch.zeros(8, 34, dtype=torch.uint8), real_shape=torch.Size([8, 6])),
    "untold": lambda: Linear(torch.zeros(24, 1, dtype=torch.uint8)),
    "8 bits": lambda: Linear(torch.zeros(8, 6).to(torch.float8_e4m3fn)),
    "swapped": lambda: DynamicSwap_Linear(torch.zeros(8, 6)),
}


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_weight_s_own_shape_is_not_believed(box: Box, form: str) -> None:
    unet = nn.ModuleDict({"linear": PACKED[form]()})
    patches = {"linear.weight": [patch(lora())]}
    x, y = rand(2, 5, 6), rand(2, 5, 8)
    expected = box.deltas(patches)[0]["linear"](x, y)
    deltas, left = box.deltas(patches, unet)
    assert left == []
    torch.testing.assert_close(deltas["linear"](x, y), expected)
    narrow = {"linear.weight": [patch(("lora", (rand(8, 2), rand(2, 4), 1.0, None, None)))]}
    if form != "untold":
        assert box.deltas(narrow, unet)[0]["linear"].inputs == 6
    assert box.asked == []
