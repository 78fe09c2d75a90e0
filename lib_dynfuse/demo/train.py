"""All stages of the boxed model, one after another or one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from lib_dynfuse.demo import autoencoder, base, data, latents, loop, model, split


@dataclass(frozen=True)
class Work:
    """What every stage needs: where it keeps its checkpoints, and on what."""

    out: Path
    preset: model.Preset
    pictures: data.Pictures
    tokenizer: CLIPTokenizer
    device: torch.device
    latents_from: Path | None = None
    minutes: float | None = None
    bar: bool = True

    def schedule(self, steps: int, rate: float, **more: float) -> loop.Schedule:
        return loop.Schedule(steps, rate, minutes=self.minutes, **more)  # type: ignore[arg-type]

    @property
    def base_pictures(self):
        return self.pictures.where(split.BASE_SUBJECTS, split.BASE_STYLES)

    def latents(self) -> latents.Latents:
        file = self.out / "latents.safetensors"
        if not file.exists():
            folder = self.latents_from
            if folder is None:
                raise NotImplementedError
            encoder = AutoencoderKL.from_pretrained(folder).to(self.device)
            latents.measure(encoder, self.pictures, self.base_pictures).save(file)
        return latents.Latents.load(file)


def text_stage(work: Work) -> None:
    chosen = work.base_pictures
    base.train_text(
        work.out / "text.pt",
        work.preset,
        work.latents().z[chosen],
        [work.pictures.caption(k) for k in chosen],
        tokenizer=work.tokenizer,
        device=work.device,
        schedule=work.schedule(work.preset.text_steps, 1e-3, ema=0.99),
        bar=work.bar,
    )


def unet_stage(work: Work) -> None:
    chosen = work.base_pictures
    trained = base.Base(work.preset)
    loop.averaged(work.out / "text.pt", trained)
    trained.to(work.device)
    trained.unet.to(memory_format=torch.channels_last)
    ids = model.tokens(["", *(work.pictures.caption(k) for k in chosen)], work.tokenizer)
    with torch.no_grad():
        context = base.contexts(trained.text, ids)
    base.train_unet(
        work.out / "unet.pt",
        trained.unet,
        work.latents().z[chosen],
        context,
        batch=work.preset.base_batch,
        schedule=work.schedule(work.preset.base_steps, 1e-3),
        autocast=work.preset.autocast,
        bar=work.bar,
    )


def decoder_stage(work: Work) -> None:
    half_stage(work, "decoder", work.preset.autoencoder_steps)


def encoder_stage(work: Work) -> None:
    half_stage(work, "encoder", work.preset.encoder_steps)


def half_stage(work: Work, name: str, steps: int) -> None:
    torch.manual_seed(3)
    whole = model.autoencoder(work.preset).to(work.device, memory_format=torch.channels_last)
    known, seen = work.latents(), ~work.pictures.truth
    run = {"decoder": autoencoder.train_decoder, "encoder": autoencoder.train_encoder}[name]
    run(
        work.out / f"{name}.pt",
        whole,
        work.pictures.images[seen],
        latents.Latents(known.z[seen], known.flipped[seen], known.mean, known.std),
        batch=work.preset.autoencoder_batch,
        schedule=work.schedule(steps, 2e-3),
        bar=work.bar,
    )


STAGES = {"text": text_stage, "unet": unet_stage, "decoder": decoder_stage, "encoder": encoder_stage}


def train_demo(
    out: Path,
    data_file: Path,
    preset: str = "cpu",
    latents_from: Path | None = None,
    stages: Sequence[str] = tuple(STAGES),
    threads: int = 1,
    minutes: float | None = None,
) -> None:
    torch.set_num_threads(threads)
    chosen = model.PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = data.load(data_file, chosen.pixels)
    work = Work(out, chosen, pictures, model.tokenizer(), device, latents_from, minutes)
    for stage in stages:
        STAGES[stage](work)


if __name__ == "__main__":
    import sys

    train_demo(
        Path(sys.argv[1]),
        Path("/work/shared/testbed/emoji128.npz"),
        latents_from=Path("/work/shared/testbed/autoencoder"),
        stages=sys.argv[2].split(","),
        minutes=float(sys.argv[3]) if len(sys.argv) > 3 else None,
    )
