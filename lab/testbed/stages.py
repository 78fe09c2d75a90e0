"""The stages of training, one after another or one at a time. Each goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lab.testbed import autoencoder, denoiser, split
from lab.testbed.pictures import Drawings, Pictures, for_autoencoder, truths
from lib_dynfuse.demo import loop, model

VARIANTS = 20  # places, sizes and turns of each base subject in each base style


@dataclass(frozen=True)
class Steady(loop.Schedule):
    """A constant learning rate that falls linearly to zero over the last fifth.

    The running average of the weights is good at any time, so a stage may be judged, and used, before it has ended.
    """

    def rate_at(self, step: int, seconds: float) -> float:
        falling = min(1.0, (1 - self.progress(step, seconds)) / 0.2)
        return self.rate * min(1.0, (step + 1) / max(1, self.warmup)) * falling


@dataclass
class Work:
    """What every stage needs: `out` gets pictures, checkpoints and figures; `data` is the drawings' npz."""

    out: Path
    data: Path
    bar: bool = True

    @cached_property
    def drawings(self) -> Drawings:
        return Drawings(self.data)

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / f"{name}.pt"

    @cached_property
    def autoencoder_pictures(self) -> Pictures:
        wanted = for_autoencoder(self.drawings, 10_000, seed=1)
        return Pictures.made(self.out / "pictures" / "autoencoder", self.drawings, wanted, seed=1, bar=self.bar)

    @cached_property
    def unseen_pictures(self) -> Pictures:
        """Kept subjects in kept styles, 12 subjects of each half of the split."""
        subjects = (*split.TUNING_SUBJECTS[:12], *split.REPORT_SUBJECTS[:12])
        wanted = truths(self.drawings, subjects)
        return Pictures.made(self.out / "pictures" / "unseen", self.drawings, wanted, seed=2, bar=self.bar)

    @cached_property
    def base_pictures(self) -> Pictures:
        """Base subjects in base styles, each placed in many ways: what the base model learns."""
        wanted = [(name, style) for name in split.BASE_SUBJECTS for style in split.BASE_STYLES] * VARIANTS
        return Pictures.made(self.out / "pictures" / "base", self.drawings, wanted, seed=3, bar=self.bar)

    @cached_property
    def frozen_autoencoder(self) -> AutoencoderKL:
        """The autoencoder whose latents the UNet learns; its encoder does not change any more."""
        vae = autoencoder.network()
        loop.averaged(self.checkpoint("frozen"), vae)
        return vae.requires_grad_(False)

    @cached_property
    def base_latents(self) -> denoiser.Latents:
        file = self.out / "checkpoints" / "base-latents.safetensors"
        if not file.exists():
            denoiser.Latents.of(autoencoder.encoded(self.frozen_autoencoder, self.base_pictures.x)).save(file)
        return denoiser.Latents.load(file)

    @cached_property
    def base_captions(self) -> denoiser.Captions:
        return denoiser.Captions(self.base_pictures.names, self.base_pictures.styles, model.tokenizer())

    def note(self, name: str, values: object) -> None:
        """Keeps a figure in figures.json."""
        file = self.out / "figures.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, name: values}, indent=1) + "\n")


def train_autoencoder(work: Work) -> None:
    torch.manual_seed(3)
    model = autoencoder.network()
    schedule = Steady(60_000, 1.5e-3, warmup=200)
    autoencoder.train(work.checkpoint("autoencoder"), model, work.autoencoder_pictures, schedule=schedule, bar=work.bar)


def measure_autoencoder(work: Work) -> None:
    """Decibel on pictures that nothing was trained on, by style, and a sheet of them beside the true ones."""
    model = autoencoder.network()
    curve = loop.averaged(work.checkpoint("autoencoder"), model)
    true = work.unseen_pictures
    made = autoencoder.redrawn(model, true.x)
    decibel, styles = autoencoder.psnr(made, true.x), np.array(true.styles)
    by_style = {style: round(float(decibel[styles == style].mean()), 2) for style in split.KEPT_STYLES}
    result = {
        "steps": curve.steps,
        "seconds": round(curve.seconds),
        "mean": round(float(decibel.mean()), 2),
        **by_style,
    }
    work.note("autoencoder", result)
    print(json.dumps(result))
    rows = [
        np.concatenate([np.concatenate([true.x[k], made[k]], 0) for k in range(start, start + 7)], 1)
        for start in range(0, 7 * 6, 7)
    ]
    Image.fromarray(np.concatenate(rows, 0)).save(work.out / "autoencoder.png")


def freeze_encoder(work: Work) -> None:
    """From here on the encoder stays as it is, so that UNet and decoder can be trained side by side."""
    shutil.copyfile(work.checkpoint("autoencoder"), work.checkpoint("frozen"))


def train_decoder(work: Work) -> None:
    """Goes on with the decoder alone, from the frozen autoencoder."""
    vae = work.frozen_autoencoder
    decoder = autoencoder.decoder_of(vae).requires_grad_(True)
    schedule = Steady(60_000, 1e-3, warmup=200)
    autoencoder.train_decoder(
        work.checkpoint("decoder"), vae, decoder, work.autoencoder_pictures, schedule=schedule, bar=work.bar
    )


def train_text(work: Work) -> None:
    schedule = Steady(1_500, 1e-3, ema=0.99)
    denoiser.train_text(
        work.checkpoint("text"), work.base_latents.z, work.base_captions, schedule=schedule, bar=work.bar
    )


def train_unet(work: Work) -> None:
    trained = denoiser.after_text(work.checkpoint("text"))
    context = denoiser.contexts(trained.text, work.base_captions)
    denoiser.train_unet(
        work.checkpoint("unet"),
        trained.unet,
        work.base_latents.z,
        work.base_captions,
        context,
        batch=denoiser.BATCH,
        schedule=Steady(20_000, 1e-3),
        bar=work.bar,
    )


STAGES: dict[str, Callable[[Work], None]] = {
    "autoencoder": train_autoencoder,
    "measure-autoencoder": measure_autoencoder,
    "freeze-encoder": freeze_encoder,
    "decoder": train_decoder,
    "text": train_text,
    "unet": train_unet,
}
