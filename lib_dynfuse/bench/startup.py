"""What it costs to begin: two LoRA files taken over by the engine, against the host's own merge of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from lib_dynfuse.bench.unets import CONFIGS, COVERS, make_layers, make_unet
from lib_dynfuse.core import Fusion, Role, strategy
from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.hosts.adapters import Adapters, Network


def start_up(unet: str = "sd15", rank: int = 32, cover: str = "attention", threads: int = 0) -> dict[str, float]:
    """Seconds (of the process on one CPU thread, else by the clock) of each thing that happens before the first step.

    Files of `rank` on the layers of `cover` are made first and are not counted. ValueError for an unknown unet or
    cover.
    """
    for what, value, allowed in (("unet", unet, CONFIGS), ("cover", cover, COVERS)):
        if value not in allowed:
            raise ValueError(f"unknown {what} {value!r}; there are: {', '.join(allowed)}")
    if threads:
        torch.set_num_threads(threads)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    model = make_unet(unet, torch.device("cpu"), torch.float32)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        before = clock()
        yield
        seconds[what] = clock() - before

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = {role: Path(folder) / f"{role.value}.safetensors" for role in Role}
        layers = make_layers(model, rank, cover)
        for role, path in files.items():
            save_file(dict(_state(layers, role)), path)
        del layers
        # LoRAs of the UNet alone need nothing else of a pipeline.
        pipeline: Any = StableDiffusionPipeline(
            None, None, None, model, DDIMScheduler(clip_sample=False, steps_offset=1), None, None, None, False
        )
        adapters = Adapters(pipeline, unet, _quiet)
        networks = [Network(path, role=role) for role, path in files.items()]
        with timed("taking both files over"), adapters.applied(networks) as covered:
            pass
        with timed("packing their factors"):
            _packed(covered, "kl", {})
        with timed("another rule and balance: files and layers kept"), adapters.applied(networks) as covered:
            pass
        with timed("another rule and balance: packing again"):
            _packed(covered, "kl", {"balance": 0.5, "auto_balance": True})
        with timed("diffusers: loading both files"):
            for role, path in files.items():
                pipeline.load_lora_weights(path, adapter_name=role.value)
        pipeline.set_adapters([role.value for role in Role])
        with timed("diffusers: merging both (fuse_lora)"):
            pipeline.fuse_lora(adapter_names=[role.value for role in Role])
    return seconds


def _packed(layers: Any, rule: str, parameters: dict[str, Any]) -> None:
    """What the first forward pass does besides its own work."""
    fusion = Fusion(layers, strategy(rule, **parameters))
    for layer in fusion._layers:
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        for part in layer.parts:
            if part.packed is not None:
                part.packed.ready(weight)


def _state(layers: Any, role: Role) -> Iterator[tuple[str, Tensor]]:
    for name, (_, deltas) in layers.items():
        delta = deltas[role]
        assert isinstance(delta, LowRank)
        yield f"unet.{name}.lora_A.weight", delta.down.contiguous()
        yield f"unet.{name}.lora_B.weight", delta.up.contiguous()


def _quiet(line: str) -> None:
    raise RuntimeError(line)


def table(seconds: dict[str, float]) -> str:
    """The seconds as a Markdown table."""
    return "\n".join(
        ["| what | seconds |", "|---|---:|", *(f"| {what} | {value:.2f} |" for what, value in seconds.items())]
    )
