"""The embedded host: `diffusers` and `peft`, driven by the WebUI's prompt syntax, no WebUI needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.core.fusion import Fusion
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.guidance.decoders import Decoder
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.hosts.adapters import Adapters, Layers, Network
from lib_dynfuse.hosts.guided_steps import guided_steps
from lib_dynfuse.hosts.latent_pictures import latent_decoder
from lib_dynfuse.hosts.layer_reports import LayerReports
from lib_dynfuse.hosts.lora_files import find_lora
from lib_dynfuse.hosts.pipelines import open_pipeline
from lib_dynfuse.hosts.samplers import make_sampler, sampler_name, sigmas
from lib_dynfuse.options import Options
from lib_dynfuse.roles import LoraTag, parse_prompt

_log = logging.getLogger("lib_dynfuse")
_MOST_PROMPTS = 64


class Embedded:
    """A model, a folder of LoRAs, and `generate`.

    What a person should know of a generation goes to `say`, one line at a time.
    """

    def __init__(self, pipe: Any, name: str, lora_dir: Path | None, say: Callable[[str], None] = _log.warning) -> None:
        self.pipe = pipe
        self.name = name
        self.lora_dir = lora_dir
        self.say = say
        self._own_sampler = pipe.scheduler
        self._adapters = Adapters(pipe, name, lambda line: self.say(line))
        self._prompts: dict[Any, dict[str, Tensor]] = {}

    @classmethod
    def load(
        cls,
        model: Path | str,
        lora_dir: Path | str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        config: Path | str | None = None,
        say: Callable[[str], None] = _log.warning,
        download: bool = False,
    ) -> Embedded:
        """Open a model. Without a device the first of CUDA, MPS and CPU; without a dtype half precision but on the CPU.

        Raises DynFuseError for a model that cannot be opened (see `open_pipeline` for `config` and `download`).
        """
        device = device or default_device()
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
        pipe = open_pipeline(Path(model), dtype, None if config is None else Path(config), download)
        return cls(pipe.to(device), Path(model).stem, None if lora_dir is None else Path(lora_dir), say)

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was made for."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return side, side

    def sampler_name(self, sampler: str | None = None) -> str:
        """The WebUI's name of a sampler; of the model's own without one."""
        return sampler_name(make_sampler(self._own_sampler, sampler))

    def decoder(self, name: str, source: Source | None = None) -> Decoder:
        """What a guide looks at latents through: taesd, vae or linear. See `latent_decoder`; loads."""
        return latent_decoder(self.pipe, name, source or Source(), self.say)

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        negative: str = "",
        options: Options | None = None,
        *,
        steps: int = 20,
        cfg: float = 7.0,
        seeds: Sequence[int] = (0,),
        size: tuple[int, int] | None = None,
        sampler: str | None = None,
        trace: Any = None,
        guide: Guide | None = None,
        progress: bool = False,
        tensors: bool = False,
    ) -> Any:
        """One picture a seed, as PIL images, or with `tensors` as [B, 3, H, W] from 0 to 1.

        `prompt` may have LoRA tags. A picture depends on its own seed only, not on what else is in `seeds`: its noise
        is drawn on the CPU. Without roles, or with `options.enabled` off, LoRAs are added as the host does.
        size: width and height, multiples of 8. cfg of 1 or less: no negative prompt, half the work.
        `guide`: made for these seeds, nudges the denoised predictions, whether or not any LoRA has a role; its steps
        are numbered as the trace's passes are.
        Raises DynFuseError for what cannot be used; the model is then as it was.
        """
        options = options or Options(enabled=True)
        size = size or self.default_size
        _check(steps, seeds, size)
        rule = options.make_strategy()
        text = parse_prompt(prompt)
        for notice in text.notices:
            self.say(notice)
        networks = [self._network(tag, options.enabled) for tag in text.tags]
        _refuse_both_roles(text.tags, networks)
        layers = self._adapters.use(networks)
        self._report(text.tags, options, layers)

        self.pipe.scheduler = make_sampler(self._own_sampler, sampler)
        guided = cfg > 1 and self.pipe.unet.config.time_cond_proj_dim is None
        noise = sigmas(self.pipe.scheduler, steps)
        rows = [
            Row(image, cond, seed)
            for cond in ((False, True) if guided else (True,))
            for image, seed in enumerate(seeds)
        ]
        self.pipe.set_progress_bar_config(disable=not progress, desc="Sampling", leave=False)
        with ExitStack() as stack:
            fusion, reports = None, LayerReports(self.say, always_both=options.strategy == "sum")
            if layers:
                window = (options.start, options.stop)
                fusion = Fusion(layers, rule, trace, window=window, failed=reports.failed)
                stack.enter_context(fusion)
                fusion.rows = rows
            stack.enter_context(guided_steps(self.pipe, guide, cfg if guided else None, steps, self.say))
            pass_by_pass = _Steps(fusion, trace, noise, reports)
            pass_by_pass.move_to(0)
            return self.pipe(
                **self._embeddings(text.text, negative, guided, networks, len(seeds)),
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=cfg,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pt" if tensors else "pil",
                callback_on_step_end=pass_by_pass.after_step,
                callback_on_step_end_tensor_inputs=[],
            ).images

    def _network(self, tag: LoraTag, enabled: bool) -> Network:
        return Network(find_lora(self.lora_dir, tag.name), tag.unet, tag.te, tag.role if enabled else None)

    def _report(self, tags: Sequence[LoraTag], options: Options, layers: Layers) -> None:
        if not tags or not options.enabled:
            return
        by_role = {role: [tag.name for tag in tags if tag.role is role] for role in Role}
        if not any(by_role.values()):
            self.say("no LoRA has a role, so all are added as always; give one role=subject and one role=style")
        for role, other in ((Role.SUBJECT, Role.STYLE), (Role.STYLE, Role.SUBJECT)):
            if by_role[role] and not by_role[other]:
                names = ", ".join(by_role[role])
                self.say(f"no LoRA has role={other.value}: nothing to choose from, {names} is applied as it is")
        if all(by_role.values()) and not any(len(roles) == 2 for _, roles in layers.values()):
            self.say("the subject's and the style's LoRA have no layer in common: each is applied as it is")

    def _embeddings(
        self, prompt: str, negative: str, guided: bool, networks: Sequence[Network], batch: int
    ) -> dict[str, Tensor]:
        """The pipeline's prompt arguments, encoded one by one so that a batch changes nothing, and kept."""
        heard = tuple((network.path, network.path.stat().st_mtime_ns, network.te) for network in networks)
        key = (prompt, negative, guided, heard)
        if key not in self._prompts:
            self._warn_of_length(prompt)
            encoded = self.pipe.encode_prompt(
                prompt=prompt,
                device=self.pipe.unet.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=negative or None,
            )
            names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            if len(self._prompts) >= _MOST_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = {name: value for name, value in zip(names, encoded, strict=False) if value is not None}
        return {name: value.repeat(batch, *(1,) * (value.dim() - 1)) for name, value in self._prompts[key].items()}

    def _warn_of_length(self, prompt: str) -> None:
        most = self.pipe.tokenizer.model_max_length
        count = len(self.pipe.tokenizer(prompt).input_ids)
        if count > most:
            self.say(f"the prompt is {count - 2} tokens long; the model reads the first {most - 2}")


class _Steps:
    """Tells the fusion and the trace, after every step of the pipeline, where the generation stands."""

    def __init__(self, fusion: Fusion | None, trace: Any, noise: Sequence[float], reports: LayerReports) -> None:
        self._fusion = fusion
        self._reports = reports
        self._trace = trace
        self._noise = noise

    def move_to(self, step: int) -> None:
        if self._fusion is not None:
            self._fusion.at(step, len(self._noise))
        if self._trace is not None:
            self._trace.sigma = self._noise[step]

    def after_step(self, pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback."""
        if step == 0 and self._fusion is not None and (reason := self._reports.unreached(self._fusion)):
            raise DynFuseError(f"not fused: {reason}")
        if step + 1 < len(self._noise):
            self.move_to(step + 1)
        return values


def default_device() -> str:
    """The first of CUDA, MPS and CPU that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check(steps: int, seeds: Sequence[int], size: tuple[int, int]) -> None:
    if steps < 1:
        raise DynFuseError(f"steps must be at least 1, not {steps}")
    if not seeds:
        raise DynFuseError("at least one seed is needed")
    if any(side < 8 or side % 8 for side in size):
        raise DynFuseError(f"size {size[0]}x{size[1]}: width and height must be multiples of 8")


def _refuse_both_roles(tags: Sequence[LoraTag], networks: Sequence[Network]) -> None:
    roles: dict[Path, Role] = {}
    for tag, network in zip(tags, networks, strict=True):
        if network.role is None:
            continue
        if roles.setdefault(network.path.resolve(), network.role) is not network.role:
            raise DynFuseError(
                f"{tag.raw}: {network.path.name} is subject and style at once; a file can have one role only"
            )
