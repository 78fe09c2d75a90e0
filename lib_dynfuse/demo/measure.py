"""How good the trained parts are, on real and on generated pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from lib_dynfuse.demo import loras, split
from lib_dynfuse.demo.autoencoder import psnr
from lib_dynfuse.demo.data import Pictures
from lib_dynfuse.demo.judge import Judge

STEPS = 20
CFG = 3.0
BATCH = 32


@dataclass(frozen=True)
class Wanted:
    """A picture to generate and what has to be on it."""

    subject: str
    style: str
    seed: int


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, pictures: Pictures, index: np.ndarray) -> float:
    """PSNR in decibel of real pictures through encoder and decoder."""
    device = next(vae.parameters()).device
    made = []
    for part in pictures.floats(index).split(BATCH):
        made.append(vae.decode(vae.encode(part.to(device)).latent_dist.mode()).sample.float().cpu())
    return psnr(torch.cat(made), pictures.floats(index))


def generate(pipeline: StableDiffusionPipeline, wanted: Sequence[Wanted]) -> torch.Tensor:
    """Pictures [N, 3, H, W] in 0..1, each from its own caption and seed."""
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        made.append(
            pipeline(
                prompt=[split.caption(one.subject, one.style) for one in part],
                num_inference_steps=STEPS,
                guidance_scale=CFG,
                generator=[torch.Generator().manual_seed(one.seed) for one in part],
                output_type="pt",
            )
            .images.float()
            .cpu()
        )
    return torch.cat(made)


def right(judge: Judge, images: torch.Tensor, wanted: Sequence[Wanted]) -> dict[str, float]:
    """Share of pictures judged to show the wanted subject, style, and both."""
    subject, style = judge(images)
    subjects = subject == torch.tensor([judge.subjects.index(one.subject) for one in wanted])
    styles = style == torch.tensor([judge.styles.index(split.JUDGED_AS[one.style]) for one in wanted])
    shares = {"subject": subjects, "style": styles, "both": subjects & styles}
    return {"pictures": len(wanted), **{what: round(float(hit.float().mean()), 4) for what, hit in shares.items()}}


def base_wanted(seeds: int = 1) -> list[Wanted]:
    """Every base subject in every base style."""
    return [
        Wanted(subject, style, 1000 * seed + number)
        for seed in range(seeds)
        for number, subject in enumerate(split.BASE_SUBJECTS)
        for style in split.BASE_STYLES
    ]


def subject_wanted(subject: str, seeds: int = 3) -> list[Wanted]:
    """A held-out subject in the base styles."""
    return [Wanted(subject, style, seed) for seed in range(seeds) for style in split.BASE_STYLES]


def style_wanted(style: str) -> list[Wanted]:
    """Every base subject in a held-out style."""
    return [Wanted(subject, style, number) for number, subject in enumerate(split.BASE_SUBJECTS)]


def sheet(images: torch.Tensor, columns: int) -> Image.Image:
    """Pictures [N, 3, H, W] in 0..1 side by side, row by row."""
    side = images.shape[-1]
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * side, rows * side), "white")
    for number, image in enumerate((images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        page.paste(Image.fromarray(image), (number % columns * side, number // columns * side))
    return page


def everything(
    folder: Path, lora_folder: Path, judge: Judge, sheets: Path, device: torch.device
) -> dict[str, dict[str, float]]:
    """Judges the base model, and each LoRA alone; leaves contact sheets in `sheets`."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipeline.to(device)
    sheets.mkdir(parents=True, exist_ok=True)

    def judged(name: str, wanted: list[Wanted], columns: int) -> tuple[torch.Tensor, dict[str, float]]:
        images = generate(pipeline, wanted)
        if columns:
            sheet(images, columns).save(sheets / f"{name}.png")
        return images, right(judge, images, wanted)

    figures = {"base": judged("base", base_wanted(), 18)[1]}
    for style in split.HELD_STYLES:
        name = f"style-{loras.file_name(split.STYLE_WORDS[style])}"
        pipeline.load_lora_weights(lora_folder, weight_name=f"{name}.safetensors")
        figures[name] = judged(name, style_wanted(style), 12)[1]
        pipeline.unload_lora_weights()
    all_images, all_wanted = [], []
    for subject in split.HELD_SUBJECTS:
        name = f"subject-{loras.file_name(subject)}"
        pipeline.load_lora_weights(lora_folder, weight_name=f"{name}.safetensors")
        wanted = subject_wanted(subject)
        images, figures[name] = judged(name, wanted, 0)
        pipeline.unload_lora_weights()
        all_images.append(images)
        all_wanted += wanted
    figures["subjects"] = right(judge, torch.cat(all_images), all_wanted)
    sheet(torch.cat(all_images), 18).save(sheets / "subjects.png")
    return figures
