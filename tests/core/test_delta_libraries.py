"""`peft` and `lycoris-lora` are the oracle: the same tensors, read as a file would name them, give the same output."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_dynfuse.core.delta import (
    Affine,
    Decomposed,
    Delta,
    Dense,
    Geometry,
    Kronecker,
    LowRank,
    Norm,
    OutputScale,
    Rotation,
    Scaled,
    row_norm,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear without bias": lambda: nn.Linear(12, 8, bias=False),
    "conv 3x3": lambda: nn.Conv2d(12, 8, 3, padding=1),
    "conv strided": lambda: nn.Conv2d(12, 8, (3, 2), stride=(2, 1), padding=(1, 0)),
    "conv 1x1": lambda: nn.Conv2d(12, 8, 1),
    "conv dilated": lambda: nn.Conv2d(12, 8, 3, padding=2, dilation=2),
    "conv grouped": lambda: nn.Conv2d(12, 8, 3, padding="same", groups=2),
}
# PEFT's LoRA for a convolution forgets the dilation.
PEFT_LORA_LAYERS = [name for name in LAYERS if name != "conv dilated"]
UNGROUPED = [name for name in LAYERS if name != "conv grouped"]
KERNELS = [name for name in LAYERS if name in {"conv 3x3", "conv strided", "conv dilated", "conv grouped"}]


def an_input(layer: nn.Module) -> Tensor:
    return torch.randn(2, 5, 12).double() if isinstance(layer, nn.Linear) else torch.randn(2, 12, 7, 6).double()


def geometry_of(layer: nn.Module) -> Geometry | None:
    return Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None


def without_bias(layer: Any, output: Tensor) -> Tensor:
    if layer.bias is None:
        return output
    return output - (layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None])


def shuffle(module: nn.Module) -> None:
    """Random values for every tensor of a network; small ones, as trained networks have."""
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3


class TestLycoris:
    """A module of the library takes the layer's place; the layer's output then is base plus ours."""

    def compare(self, layer: nn.Module, module: nn.Module, delta: Delta, tolerance: float = 1e-9) -> None:
        x = an_input(layer)
        base = layer(x)
        d = delta(x, without_bias(layer, base).detach())
        module.apply_to()
        torch.testing.assert_close(base + d, layer(x), rtol=tolerance, atol=tolerance)
        assert not torch.allclose(base, layer(x), atol=1e-3)

    def make(self, kind: Any, name: str, **options: Any) -> tuple[Any, Any]:
        layer = LAYERS[name]().double()
        module = kind("network", layer, 1.0, **options)
        shuffle(module)
        return layer, module.double()

    @pytest.mark.parametrize("use_tucker", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_locon(self, name: str, use_tucker: bool) -> None:
        layer, module = self.make(LoConModule, name, lora_dim=3, alpha=2, use_tucker=use_tucker)
        mid = module.lora_mid.weight if module.tucker else None
        assert (mid is not None) == (use_tucker and name in KERNELS)
        low_rank = LowRank(module.lora_down.weight, module.lora_up.weight, mid, geometry_of(layer))
        self.compare(layer, module, Scaled(module.scale, low_rank))

    @pytest.mark.parametrize("name", LAYERS)
    def test_dora(self, name: str) -> None:
        layer, module = self.make(LoConModule, name, lora_dim=3, alpha=2, weight_decompose=True)
        module.dora_scale.data = module.dora_scale.data.double() * torch.linspace(0.5, 2, 8).view_as(module.dora_scale)
        low_rank = LowRank(module.lora_down.weight, module.lora_up.weight, None, geometry_of(layer))
        inner = Scaled(module.scale, low_rank)
        self.compare(layer, module, Decomposed(inner, module.dora_scale, row_norm(layer.weight, inner)))

    @pytest.mark.parametrize("use_tucker", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_loha(self, name: str, use_tucker: bool) -> None:
        layer, module = self.make(LohaModule, name, lora_dim=3, alpha=2, use_tucker=use_tucker)
        weight = module.get_weight(layer.weight.shape)
        self.compare(layer, module, Dense(weight, None, geometry_of(layer)))

    @pytest.mark.parametrize(
        "options",
        [
            {"lora_dim": 1, "decompose_both": True},
            {"lora_dim": 1},
            {"lora_dim": 1, "use_tucker": True},
            {"lora_dim": 1, "full_matrix": True},
            {"lora_dim": 1, "factor": 4, "decompose_both": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", LAYERS)
    def test_lokr(self, name: str, options: dict[str, Any]) -> None:
        layer, module = self.make(LokrModule, name, alpha=0.5, **options)
        tensors = {key.removeprefix("lokr_"): value for key, value in module.named_parameters()}
        kernel = tuple(layer.weight.shape[2:])
        kronecker = Kronecker.from_lokr(**tensors, kernel=kernel, geometry=geometry_of(layer))
        self.compare(layer, module, Scaled(module.scale, kronecker))

    @pytest.mark.parametrize("name", LAYERS)
    def test_ia3_on_outputs(self, name: str) -> None:
        layer, module = self.make(IA3Module, name)
        self.compare(layer, module, OutputScale(module.weight, -1 if geometry_of(layer) is None else 1))

    @pytest.mark.parametrize("name", UNGROUPED)
    def test_ia3_on_inputs_is_a_dense_weight(self, name: str) -> None:
        layer, module = self.make(IA3Module, name, train_on_input=True)
        self.compare(layer, module, Dense(layer.weight * module.weight, None, geometry_of(layer)))

    # Butterfly stages turn channels of different groups into each other: no grouped convolution has such a weight.
    @pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"constraint": 0.05}], ids=str)
    @pytest.mark.parametrize(
        ("kind", "name"),
        [(DiagOFTModule, name) for name in LAYERS] + [(ButterflyOFTModule, name) for name in UNGROUPED],
    )
    def test_oft_and_boft(self, kind: Any, name: str, options: dict[str, Any]) -> None:
        layer, module = self.make(kind, name, lora_dim=2, **options)
        # The library inverts in float32, so float64 is beyond it.
        layer, module = layer.float(), module.float()
        rescale = module.rescale if options.get("rescaled") else None
        channel_dim = -1 if geometry_of(layer) is None else 1
        rotation = Rotation.from_oft(module.oft_blocks, channel_dim, module.constraint, rescale)
        assert rotation.turn.dim() == (3 if kind is DiagOFTModule else 4)
        x = an_input(layer).float()
        base = layer(x)
        d = rotation(x, without_bias(layer, base).detach())
        module.apply_to()
        torch.testing.assert_close(base + d, layer(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base, layer(x), atol=1e-3)

    @pytest.mark.parametrize("name", UNGROUPED)
    def test_glora(self, name: str) -> None:
        layer, module = self.make(GLoRAModule, name, lora_dim=2, alpha=1)
        weight = module.get_diff_weight(shape=layer.weight.shape)[0]
        self.compare(layer, module, Dense(weight, None, geometry_of(layer)))

    @pytest.mark.parametrize("name", LAYERS)
    def test_full(self, name: str) -> None:
        layer, module = self.make(FullModule, name)
        bias = None if module.bias is None else module.bias.detach().clone()
        delta = Dense(module.weight.detach().clone(), bias, geometry_of(layer))
        x = an_input(layer)
        base = layer(x).detach()
        d = delta(x, base)
        module.apply_to()
        torch.testing.assert_close(base + d, layer(x), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("layer", [nn.LayerNorm(12, eps=1e-3), nn.GroupNorm(3, 12)], ids=lambda v: type(v).__name__)
    def test_norm(self, layer: nn.LayerNorm | nn.GroupNorm) -> None:
        layer = layer.double()
        shuffle(layer)
        module = NormModule("network", layer, 1.0)
        shuffle(module)
        module = module.double()
        x = torch.randn(2, 12, 5, 5).double() if isinstance(layer, nn.GroupNorm) else torch.randn(2, 5, 12).double()
        base = layer(x)
        d = Affine(module.w_norm, module.b_norm, Norm.of(layer))(x, base)
        module.apply_to()
        torch.testing.assert_close(base + d, layer(x), rtol=1e-9, atol=1e-9)


class TestPeft:
    """An adapter is put into a one-layer model; its output minus the base layer's is ours."""

    def adapt(self, name: str, config: peft.PeftConfig) -> Any:
        model = nn.ModuleDict({"layer": LAYERS[name]()}).double()
        config.target_modules = {"layer"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, model)
        adapter: Any = model["layer"].eval()
        for key, parameter in adapter.named_parameters():
            if "base_layer" not in key and "magnitude" not in key:
                parameter.data = torch.randn_like(parameter) * 0.3
        return adapter

    def compare(self, adapter: Any, delta: Delta) -> None:
        layer = adapter.get_base_layer()
        x = an_input(layer)
        base = layer(x)
        d = delta(x, without_bias(layer, base).detach())
        torch.testing.assert_close(base + d, adapter(x), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(base, adapter(x), atol=1e-3)

    def low_rank(self, adapter: Any) -> Delta:
        down, up = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
        geometry = geometry_of(adapter.get_base_layer())
        return Scaled(adapter.scaling["default"], LowRank(down, up, None, geometry))

    @pytest.mark.parametrize("name", PEFT_LORA_LAYERS)
    def test_lora(self, name: str) -> None:
        adapter = self.adapt(name, peft.LoraConfig(r=4, lora_alpha=3))
        self.compare(adapter, self.low_rank(adapter))

    @pytest.mark.parametrize("name", [name for name in PEFT_LORA_LAYERS if name != "conv grouped"])
    def test_dora(self, name: str) -> None:
        adapter = self.adapt(name, peft.LoraConfig(r=4, lora_alpha=3, use_dora=True))
        magnitude = adapter.lora_magnitude_vector["default"].weight
        magnitude.data = magnitude.data * torch.linspace(0.5, 2, 8).view_as(magnitude)
        inner = self.low_rank(adapter)
        norm = row_norm(adapter.get_base_layer().weight, inner)
        self.compare(adapter, Decomposed(inner, magnitude, norm))

    @pytest.mark.parametrize("use_effective_conv2d", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_loha(self, name: str, use_effective_conv2d: bool) -> None:
        adapter = self.adapt(name, peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=use_effective_conv2d))
        weight = adapter.get_delta_weight("default")
        self.compare(adapter, Dense(weight, None, geometry_of(adapter.get_base_layer())))

    @pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"use_effective_conv2d": True}], ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_lokr(self, name: str, options: dict[str, Any]) -> None:
        adapter = self.adapt(name, peft.LoKrConfig(r=1, alpha=3, **options))
        layer = adapter.get_base_layer()
        tensors = {
            key.removeprefix("lokr_").removesuffix(".default"): value
            for key, value in adapter.named_parameters()
            if key.startswith("lokr_")
        }
        kernel = tuple(layer.weight.shape[2:])
        kronecker = Kronecker.from_lokr(**tensors, kernel=kernel, geometry=geometry_of(layer))
        self.compare(adapter, Scaled(adapter.scaling["default"], kronecker))

    @pytest.mark.parametrize("name", LAYERS)
    def test_ia3_scales_the_bias_as_well(self, name: str) -> None:
        adapter = self.adapt(name, peft.IA3Config(feedforward_modules=set()))
        layer = adapter.get_base_layer()
        v = adapter.ia3_l["default"].flatten() - 1
        x = an_input(layer)
        base = layer(x)
        d = OutputScale(v, -1 if geometry_of(layer) is None else 1)(x, without_bias(layer, base).detach())
        of_bias = torch.zeros(8) if layer.bias is None else layer.bias * v
        of_bias = of_bias if geometry_of(layer) is None else of_bias[:, None, None]
        torch.testing.assert_close(base + d + of_bias, adapter(x), rtol=1e-9, atol=1e-9)

    def test_oft_turns_the_input_so_it_is_a_dense_weight(self) -> None:
        adapter = self.adapt("linear", peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False))
        # PEFT's get_delta_weight is R of x -> W·R·x for columns x, transposed for the rows that Linear works on.
        turn = adapter.get_delta_weight("default").T - torch.eye(12).double()
        self.compare(adapter, Dense(adapter.get_base_layer().weight @ turn))

    def test_oft_is_a_rotation_of_outputs_where_the_layer_lets_inputs_through(self) -> None:
        adapter = self.adapt("linear", peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False))
        layer = adapter.get_base_layer()
        layer.weight.data = 3 * torch.eye(12).double()
        layer.bias = None
        turn = adapter.get_delta_weight("default").T
        blocks = torch.stack([turn[i : i + 4, i : i + 4] for i in (0, 4, 8)])
        self.compare(adapter, Rotation(blocks))
