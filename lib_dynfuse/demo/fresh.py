"""LoRAs of more subjects, on the model in the box: for a comparison whose rules were tuned on other ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from lib_dynfuse.demo import base, latents, loop, loras, model, split
from lib_dynfuse.demo.data import Pictures
from lib_dynfuse.demo.record import Record

# About as many as the subjects in the box were given.
STEPS = 150


def train(
    out: Path,
    checkpoints: Path,
    pictures: Pictures,
    preset: model.Preset,
    record: Record,
    *,
    device: torch.device,
    bar: bool = True,
) -> None:
    """Writes a LoRA for each of `MORE_SUBJECTS` into `out`, and the boxed styles' beside them; files there are kept.

    Text encoder, UNet and autoencoder are those of the box, whatever `preset` says of their sizes.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in loras.BOX.glob("style-*.safetensors"):
        shutil.copyfile(file, out / file.name)
    pipe = StableDiffusionPipeline.from_pretrained(model.BOX, torch_dtype=torch.float32).to(device)
    tokenizer = model.tokenizer()
    for seed, subject in enumerate(split.MORE_SUBJECTS, start=100):
        name = f"subject-{loras.file_name(subject)}"
        file = out / f"{name}.safetensors"
        if file.exists():
            continue
        index = pictures.where((subject,), split.SUBJECT_STYLES)
        z = latents.encode(pipe.vae, pictures.floats(index)) * pipe.vae.config.scaling_factor
        tensors, curve = loras.train(
            checkpoints / f"fresh-{name}.pt",
            pipe.unet,
            z,
            _contexts(pipe.text_encoder, tokenizer, pictures, index),
            rank=preset.rank,
            batch=preset.subject_batch,
            schedule=loop.Schedule(STEPS, 2e-3, warmup=20, ema=0.98),
            seed=seed,
            autocast=preset.autocast,
            bar=bar,
        )
        loras.save(tensors, file, f"{subject} emoji", preset.rank)
        record.curve(f"fresh-{name}", curve, preset.subject_batch)


@torch.no_grad()
def _contexts(text: CLIPTextModel, tokenizer: CLIPTokenizer, pictures: Pictures, index: np.ndarray) -> torch.Tensor:
    """The empty caption's, then each picture's: [1 + n, 77, context]."""
    captions = ["", *(pictures.caption(k) for k in index)]
    return base.contexts(text, model.tokens(captions, tokenizer))
