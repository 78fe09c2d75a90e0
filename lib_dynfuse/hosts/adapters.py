"""LoRAs in a diffusers pipeline: those without a role as peft adapters, those with one as deltas beside the UNet.

Reading is diffusers' and peft's: a role LoRA is loaded like any other, its factors are taken over layer by layer, and
its UNet part is then deleted from peft again; its text encoder part stays, as the host applies it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_weights_and_activate_adapters,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lib_dynfuse.core.delta import Decomposed, Delta, Geometry, LowRank, Scaled, Sum, row_norm
from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.lora_files import LoraFile, family_name, open_lora

_RAW_PEFT = "base_model.model"
# Role LoRAs that left no adapter in the pipeline and may be wanted again, as when the rules are compared on one prompt.
_MOST_IDLE = 16
Layers = dict[str, tuple[nn.Module, dict[Role, Delta]]]


@dataclass(frozen=True)
class Network:
    """A LoRA as a prompt asks for it: its file, its strengths and its role."""

    path: Path
    unet: float = 1.0
    te: float = 1.0
    role: Role | None = None


class _Key(NamedTuple):
    """What a loaded adapter is known by: another file under the same name, or another use, is another adapter."""

    path: Path
    modified: int
    fused: bool
    copy: int


@dataclass
class _Part:
    """One layer of a role LoRA as peft read it.

    down [r, in, ...], up [out, r, ...], scaling = alpha / rank; magnitude [out] where it is a DoRA.
    """

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None


@dataclass
class _Loaded:
    name: str
    parts: dict[str, _Part]


class Adapters:
    """The LoRAs of one pipeline; files are read again only when they change."""

    def __init__(self, pipe: Any, model: str, say: Callable[[str], None]) -> None:
        self._pipe = pipe
        self._model = model
        self._say = say
        self._loaded: dict[_Key, _Loaded] = {}
        self._count = 0

    @property
    def _components(self) -> dict[str, Any]:
        names = ("unet", "text_encoder", "text_encoder_2")
        return {name: part for name in names if (part := getattr(self._pipe, name, None)) is not None}

    def use(self, networks: Sequence[Network]) -> Layers:
        """Make exactly these networks the pipeline's; returns the UNet's layers that roles cover.

        Raises DynFuseError for a file that cannot be used or does not fit; the pipeline then has no network at all.
        Parameters ask for gradients as they did.
        """
        with _asking_as_before(self._components.values()):
            return self._use(networks)

    def _use(self, networks: Sequence[Network]) -> Layers:
        keys = _keys(networks)
        idle = [key for key in self._loaded if key not in keys and not self._in_pipeline(key)]
        for key in [key for key in self._loaded if key not in keys and key not in idle[-_MOST_IDLE:]]:
            self._unload(key)
        try:
            for key in keys:
                if key not in self._loaded:
                    self._loaded[key] = self._load(key)
        except BaseException:
            self.clear()
            raise
        self._set_strengths([(self._loaded[key].name, network) for key, network in zip(keys, networks, strict=True)])
        return self._layers([(self._loaded[key], network) for key, network in zip(keys, networks, strict=True)])

    def clear(self) -> None:
        """Take every network out; the pipeline's modules are its own again."""
        for component in self._components.values():
            for name in list(getattr(component, "peft_config", None) or {}):
                _delete(component, name)
            # A load that broke half-way leaves wrappers that no adapter's name leads to.
            recurse_remove_peft_layers(component)
        self._loaded.clear()

    def _in_pipeline(self, key: _Key) -> bool:
        name = self._loaded[key].name
        return any(name in (getattr(component, "peft_config", None) or {}) for component in self._components.values())

    def _unload(self, key: _Key) -> None:
        name = self._loaded.pop(key).name
        for component in self._components.values():
            _delete(component, name)

    def _load(self, key: _Key) -> _Loaded:
        lora = open_lora(key.path)
        try:
            return self._load_checked(lora, key.fused)
        except DynFuseError:
            raise
        # Whatever diffusers and peft may make of a file that is not quite what they expect.
        except Exception as error:
            raise self._misfit(lora, f"diffusers cannot load it ({_first_line(error)})") from error

    def _load_checked(self, lora: LoraFile, fused: bool) -> _Loaded:
        state, alphas, metadata = self._read(lora)
        self._check_fit(lora, state)
        name = f"network{self._count}"
        self._count += 1
        common = {"adapter_name": name, "_pipeline": self._pipe, "low_cpu_mem_usage": True, "metadata": metadata}
        with _peft_at_ease():
            for component, model in self._components.items():
                if not any(entry.startswith(f"{component}.") for entry in state):
                    continue
                if component == "unet":
                    self._pipe.load_lora_into_unet(state, alphas, model, **common)
                else:
                    self._pipe.load_lora_into_text_encoder(state, alphas, model, prefix=component, **common)
        parts: dict[str, _Part] = {}
        if fused:
            parts = _take_parts(self._pipe.unet, name)
            _delete(self._pipe.unet, name)
        return _Loaded(name, parts)

    def _read(self, lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]:
        """diffusers' own reading of the file, its UNet keys in peft's names and its alphas under the same names."""
        state, alphas, metadata = self._pipe.lora_state_dict(
            str(lora.path), unet_config=self._pipe.unet.config, use_safetensors=True, return_lora_metadata=True
        )
        if all(key.startswith(f"{_RAW_PEFT}.") for key in state):
            state = {f"unet{key.removeprefix(_RAW_PEFT)}": value for key, value in state.items()}
            metadata = _peft_config(lora.path)
        unet = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
        rest = {key: value for key, value in state.items() if not key.startswith("unet.")}
        if unet and not any(".lora_A." in key for key in unet):
            unet = convert_unet_state_dict_to_peft(unet)
        state = {**{f"unet.{key}": value for key, value in unet.items()}, **rest}
        return state, _peft_alphas(alphas), metadata

    def _check_fit(self, lora: LoraFile, state: dict[str, Tensor]) -> None:
        """Drop the layers that the model does not have, and say so; refuse a file that fits nowhere."""
        asked = _shapes(state)
        missing: list[str] = []
        for component, layer in asked:
            base = self._base_layer(component, layer)
            if base is None:
                missing.append(f"{component}.{layer}")
                continue
            weight: Any = base.weight
            if asked[component, layer] != tuple(weight.shape):
                sizes = f"{list(asked[component, layer])}, the model's has {list(weight.shape)}"
                raise self._misfit(lora, f"its layer {layer} has the shape {sizes}")
        if len(missing) == len(asked):
            raise self._misfit(lora, "it fits no layer of the model")
        if missing:
            self._say(f"{lora.path.name}: {len(missing)} of {len(asked)} layers are not in the model and were left out")
            for key in [key for key in state if any(key.startswith(f"{path}.") for path in missing)]:
                del state[key]

    def _base_layer(self, component: str, layer: str) -> nn.Module | None:
        model = self._components.get(component)
        if model is None:
            return None
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            return None
        return module.get_base_layer() if isinstance(module, LoraLayer) else module

    def _misfit(self, lora: LoraFile, reason: str) -> DynFuseError:
        width = self._pipe.unet.config.cross_attention_dim
        own = "SDXL" if hasattr(self._pipe, "text_encoder_2") else family_name(width)
        made_for = lora.made_for
        if made_for and made_for != own and not (made_for.startswith("SDXL") and own == "SDXL"):
            return DynFuseError(f"{lora.path.name} is made for {made_for}, but {self._model} is {own}; {reason}")
        return DynFuseError(f"{lora.path.name} does not fit {self._model}, {own}: {reason}")

    def _set_strengths(self, networks: Sequence[tuple[str, Network]]) -> None:
        for component, model in self._components.items():
            present = getattr(model, "peft_config", None) or {}
            active = [(name, n.unet if component == "unet" else n.te) for name, n in networks if name in present]
            if active:
                set_weights_and_activate_adapters(model, [name for name, _ in active], [weight for _, weight in active])

    def _layers(self, networks: Sequence[tuple[_Loaded, Network]]) -> Layers:
        unet = self._pipe.unet
        deltas: dict[str, dict[Role, list[Delta]]] = {}
        for loaded, network in networks:
            if network.role is None or network.unet == 0.0:
                continue
            if not loaded.parts:
                self._say(f"{network.path.name} has no layer in the UNet: its role changes nothing")
            for layer, part in loaded.parts.items():
                base = self._base_layer("unet", layer)
                if base is None:
                    raise RuntimeError(f"{layer} has left the UNet")
                deltas.setdefault(layer, {}).setdefault(network.role, []).append(_delta(part, base, network.unet))
        return {
            layer: (
                unet.get_submodule(layer),
                {role: found[0] if len(found) == 1 else Sum(*found) for role, found in roles.items()},
            )
            for layer, roles in deltas.items()
        }


def _keys(networks: Sequence[Network]) -> list[_Key]:
    """One key a network; a file asked for twice is two adapters."""
    keys: list[_Key] = []
    for network in networks:
        path = network.path.resolve()
        stem = (path, path.stat().st_mtime_ns, network.role is not None)
        keys.append(_Key(*stem, copy=sum(key[:3] == stem for key in keys)))
    return keys


@contextmanager
def _peft_at_ease() -> Iterator[None]:
    """Without peft's wonder at a second adapter, or at the active one going: here both are on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        yield


@contextmanager
def _asking_as_before(models: Iterable[nn.Module]) -> Iterator[None]:
    """peft lets no parameter of the model ask for a gradient where it adds its own; the model may be in training."""
    asking = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, asks in asking:
            parameter.requires_grad_(asks)


def _delete(component: Any, name: str) -> None:
    if name not in (getattr(component, "peft_config", None) or {}):
        return
    with _peft_at_ease():
        delete_adapter_layers(component, name)
    if not getattr(component, "peft_config", None):
        recurse_remove_peft_layers(component)


def _take_parts(unet: nn.Module, name: str) -> dict[str, _Part]:
    """Copy an adapter's factors out of the UNet, in the UNet's own precision."""
    parts: dict[str, _Part] = {}
    dtype = next(unet.parameters()).dtype
    for layer, module in unet.named_modules():
        if not isinstance(module, LoraLayer) or name not in module.lora_A:
            continue
        up: Any = module.lora_B[name]
        if up.bias is not None:
            raise DynFuseError(f"{layer}: a LoRA with a bias cannot take a role")
        magnitude = None
        if name in module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector[name].weight.detach().flatten().to(dtype)
        down: Any = module.lora_A[name]
        parts[layer] = _Part(
            down.weight.detach().to(dtype), up.weight.detach().to(dtype), module.scaling[name], magnitude
        )
    return parts


def _delta(part: _Part, base: nn.Module, strength: float) -> Delta:
    geometry = Geometry.of(base) if isinstance(base, nn.Conv2d) else None
    scale = part.scaling * strength
    inner = Scaled(scale, LowRank(part.down, part.up, geometry=geometry))
    if part.magnitude is None:
        return inner
    # DoRA's norm is of the adapted weight, strength included, as peft takes it (arXiv 2402.09353, equation 5).
    weight: Any = base.weight
    return Decomposed(inner, part.magnitude, row_norm(weight, inner))


def _shapes(state: dict[str, Tensor]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(component, layer) to the shape of the weight that the layer must have, for every low-rank pair of a file."""
    asked: dict[tuple[str, str], tuple[int, ...]] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        part = {key.removeprefix(f"{component}."): v for key, v in state.items() if key.startswith(f"{component}.")}
        if component != "unet":
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part)) if part else {}
            # transformers 5 has no `text_model` level any more; diffusers takes it off in the same way.
            part = {key.removeprefix("text_model."): value for key, value in part.items()}
        for key, down in part.items():
            layer, marker, _ = key.partition(".lora_A.")
            up = part.get(f"{layer}.lora_B.weight")
            if marker and up is not None:
                asked[component, layer] = (up.shape[0], *down.shape[1:])
    return asked


def _peft_alphas(alphas: dict[str, float] | None) -> dict[str, float] | None:
    """Alphas under peft's layer names: left in the old attention names, diffusers would overlook them."""
    if not alphas:
        return alphas
    unet = {key.removeprefix("unet.").removesuffix(".alpha"): a for key, a in alphas.items() if key.startswith("unet.")}
    renamed = {f"unet.{key}.alpha": alpha for key, alpha in convert_unet_state_dict_to_peft(unet).items()}
    return {**renamed, **{key: alpha for key, alpha in alphas.items() if not key.startswith("unet.")}}


def _peft_config(path: Path) -> dict[str, Any] | None:
    """The `adapter_config.json` that peft saves beside its weights, in the form that diffusers takes."""
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    wanted = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )
    return {f"unet.{key}": config[key] for key in wanted if key in config}


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 160 else f"{line[:157]}..."
