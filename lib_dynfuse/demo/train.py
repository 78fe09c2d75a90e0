"""All stages of the boxed model, one after another or one at a time; each goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d
from transformers import CLIPTokenizer

from lib_dynfuse.demo import (
    autoencoder,
    base,
    box,
    data,
    encoders,
    fresh,
    judge,
    latents,
    loop,
    loras,
    measure,
    model,
    recognise,
    source,
    split,
)
from lib_dynfuse.demo.record import Record


@dataclass
class Work:
    """What every stage needs.

    `out` gets the checkpoints and, at the end, the same folders as the box. `latents_from`: an autoencoder whose
    latents are adopted, so that the UNet can learn before the autoencoder is done. `minutes`: for each stage, when to
    stop. `more_file`: the judge's other drawings, None where they are still to be fetched.
    """

    out: Path
    preset: model.Preset
    pictures: data.Pictures
    device: torch.device
    latents_from: Path | None = None
    minutes: Mapping[str, float] = field(default_factory=dict)
    bar: bool = True
    more_file: Path | None = None

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return model.tokenizer()

    @cached_property
    def record(self) -> Record:
        return Record(self.out / "record.json")

    @cached_property
    def taught(self) -> np.ndarray:
        """The pictures that the base model learns."""
        return self.pictures.where(split.BASE_SUBJECTS, split.BASE_STYLES)

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / f"{name}.pt"

    def schedule(self, stage: str, steps: int, rate: float, warmup: int = 100, ema: float = 0.999) -> loop.Schedule:
        return loop.Schedule(steps, rate, warmup, ema, self.minutes.get(stage))

    @cached_property
    def other_hands(self) -> tuple[torch.Tensor, np.ndarray]:
        """The same subjects as other sets draw them: uint8 [M, 3, 64, 64] and their subjects [M]."""
        file = self.more_file
        if file is None:
            file, packages = self.out / "checkpoints" / "other-hands.npz", self.out / "checkpoints" / "packages"
            if not file.exists():
                source.fetch(packages, [*source.PACKAGES.values(), *source.OTHER_HANDS.values()])
                source.build_other_hands(packages, file, judge.PIXELS, bar=self.bar)
        with np.load(file) as drawn:
            return torch.from_numpy(drawn["x"]).permute(0, 3, 1, 2).contiguous(), drawn["subj"]

    @cached_property
    def latents(self) -> latents.Latents:
        """Normalised latents of all pictures, made once."""
        file = self.out / "checkpoints" / "latents.safetensors"
        if not file.exists():
            adopted = self.latents_from
            vae = AutoencoderKL.from_pretrained(adopted) if adopted else self.joint_autoencoder()
            latents.measure(vae.to(self.device), self.pictures, self.taught).save(file)
        return latents.Latents.load(file)

    def joint_autoencoder(self) -> AutoencoderKL:
        """The autoencoder that was trained whole, its latents as it makes them."""
        vae = model.autoencoder(self.preset)
        loop.averaged(self.checkpoint("autoencoder"), vae)
        return vae

    def autoencoder(self) -> AutoencoderKL:
        """The trained autoencoder, its latents normal after SD 1.x's scaling."""
        if self.latents_from is None:
            vae = self.joint_autoencoder()
            box.fold(vae, self.latents.mean, self.latents.std)
            return vae
        vae = model.autoencoder(self.preset)
        loop.averaged(self.checkpoint("together"), autoencoder.halves(vae))
        box.certain(vae)
        box.fold(vae, torch.zeros(4), torch.ones(4))
        return vae

    def load_halves(self, vae: AutoencoderKL) -> None:
        """The decoder and the encoder as they were taught apart."""
        loop.averaged(self.checkpoint("decoder"), autoencoder.Decoder(vae))
        loop.averaged(self.checkpoint("encoder"), autoencoder.Encoder(vae))

    def text_and_unet(self) -> base.Base:
        """The trained pair on the work's device."""
        trained = base.Base(self.preset)
        loop.averaged(self.checkpoint("text"), trained)
        loop.averaged(self.checkpoint("unet"), trained.unet)
        return trained.to(self.device)

    def context(self, trained: base.Base, index: np.ndarray) -> torch.Tensor:
        """What the UNet attends to: the empty caption, then the pictures' captions, [1 + n, 77, context]."""
        ids = model.tokens(["", *(self.pictures.caption(k) for k in index)], self.tokenizer)
        with torch.no_grad():
            return base.contexts(trained.text, ids)


def train_autoencoder(work: Work) -> None:
    """Whole, from scratch; or, where latents are adopted, each half against those, then both together."""
    preset, seen = work.preset, ~work.pictures.truth
    torch.manual_seed(3)
    vae = model.autoencoder(preset).to(work.device, memory_format=torch.channels_last)
    images = work.pictures.images[seen].to(work.device)
    if work.latents_from is None:
        curve = autoencoder.train(
            work.checkpoint("autoencoder"),
            vae,
            images,
            batch=preset.autoencoder_batch,
            schedule=work.schedule("autoencoder", preset.autoencoder_steps, 2e-3),
            autocast=preset.autocast,
            bar=work.bar,
        )
        work.record.curve("autoencoder", curve, preset.autoencoder_batch)
        return
    known = work.latents.of(seen).to(work.device)
    halves = {"decoder": preset.autoencoder_steps, "encoder": preset.encoder_steps}
    for name, steps in halves.items():
        learn = autoencoder.train_decoder if name == "decoder" else autoencoder.train_encoder
        schedule = work.schedule(name, steps, 2e-3)
        curve = learn(
            work.checkpoint(name), vae, images, known, batch=preset.autoencoder_batch, schedule=schedule, bar=work.bar
        )
        work.record.curve(name, curve, preset.autoencoder_batch)
    work.load_halves(vae)
    schedule = work.schedule("together", preset.together_steps, 7e-4, warmup=50, ema=0.998)
    curve = autoencoder.train_together(
        work.checkpoint("together"),
        vae,
        images,
        known,
        batch=preset.autoencoder_batch,
        schedule=schedule,
        bar=work.bar,
    )
    work.record.curve("together", curve, preset.autoencoder_batch)


def train_text(work: Work) -> None:
    preset, taught = work.preset, work.taught
    _, curve = base.train_text(
        work.checkpoint("text"),
        preset,
        work.latents.z[taught],
        [work.pictures.caption(k) for k in taught],
        tokenizer=work.tokenizer,
        device=work.device,
        schedule=work.schedule("text", preset.text_steps, 1e-3, ema=0.99),
        bar=work.bar,
    )
    work.record.curve("text", curve, preset.base_batch)


def train_unet(work: Work) -> None:
    preset, taught = work.preset, work.taught
    trained = base.Base(preset)
    loop.averaged(work.checkpoint("text"), trained)
    trained.to(work.device)
    trained.unet.to(memory_format=torch.channels_last)
    curve = base.train_unet(
        work.checkpoint("unet"),
        trained.unet,
        work.latents.z[taught],
        work.context(trained, taught),
        batch=preset.base_batch,
        schedule=work.schedule("unet", preset.base_steps, 1e-3),
        autocast=preset.autocast,
        bar=work.bar,
    )
    work.record.curve("unet", curve, preset.base_batch)


def train_judge(work: Work) -> None:
    preset, pictures = work.preset, work.pictures
    redrawn = autoencoder.redraw(work.autoencoder().to(work.device), work.latents.z)
    factor = preset.pixels // judge.PIXELS
    if factor > 1:
        pictures = pictures.shrunk(factor)
        redrawn = avg_pool2d(redrawn.float(), factor).round().to(torch.uint8)
    lessons = judge.Lessons(pictures, redrawn, *work.other_hands)
    common: dict[str, Any] = {"device": work.device, "bar": work.bar}
    every_subject, curve = judge.train_subject(
        work.checkpoint("judge-subject"),
        lessons,
        batch=preset.judge_batch,
        schedule=work.schedule("judge-subject", preset.judge_steps, 2e-3, ema=0.995),
        **common,
    )
    work.record.curve("judge-subject", curve, preset.judge_batch)
    subject = judge.of_subjects(every_subject, pictures, judge.SUBJECTS)
    judge.save_fresh(every_subject, pictures, work.out / "judge")
    style, curve = judge.train_style(
        work.checkpoint("judge-style"),
        lessons,
        subject,
        batch=preset.style_judge_batch,
        schedule=work.schedule("judge-style", preset.style_judge_steps, 2e-3, ema=0.99),
        **common,
    )
    work.record.curve("judge-style", curve, preset.style_judge_batch)
    trained = judge.assembled(subject, style, pictures)
    trained.save(work.out / "judge")
    held = np.flatnonzero(judge.held_out(pictures))
    new = np.intersect1d(held, pictures.where(judge.SUBJECTS, split.HELD_STYLES))
    again = replace(pictures, images=redrawn)
    work.record.figure(
        "judge on real pictures that it has not seen",
        {
            f"one of each subject, {len(held)}": judge.accuracy(trained, pictures, held),
            f"those of them in {' and '.join(split.HELD_STYLES)}, {len(new)}": judge.accuracy(trained, pictures, new),
            "all of them as the autoencoder redraws them from noisy latents": judge.accuracy(trained, again, held),
        },
    )


def train_encoder(
    work: Work,
    stage: str,
    steps: int,
    batch: int,
    learn: Callable[..., tuple[Any, loop.Curve]],
    save: Callable[[Any, Path], None],
) -> Path:
    """Trains an encoder for guidance and writes its folder, which is returned."""
    schedule = work.schedule(stage, steps, 1e-3, warmup=50, ema=0.99)
    trained, curve = learn(
        work.checkpoint(stage), work.pictures, batch=batch, schedule=schedule, device=work.device, bar=work.bar
    )
    work.record.curve(stage, curve, batch)
    save(trained, work.out / stage)
    return work.out / stage


def train_clip(work: Work) -> None:
    steps, batch = work.preset.clip_steps, work.preset.clip_batch
    folder = train_encoder(work, "clip", steps, batch, encoders.train_clip, encoders.save_clip)
    work.record.figure("CLIP on real pictures that it has not seen", recognise.clip_figures(folder, work.pictures))


def train_dino(work: Work) -> None:
    steps, batch = work.preset.dino_steps, work.preset.dino_batch
    folder = train_encoder(work, "dino", steps, batch, encoders.train_dino, encoders.save_dino)
    figures = {**recognise.dino_figures(folder, work.pictures), "pixels alone": recognise.pixel_figures(work.pictures)}
    work.record.figure("DINO on real pictures that it has not seen", figures)


def train_loras(work: Work) -> None:
    """Both styles, then the subjects; files that are there already are kept."""
    preset = work.preset
    trained = work.text_and_unet()
    jobs: list[tuple[str, np.ndarray, str, int, int]] = []
    for style in split.HELD_STYLES:
        words = f"{split.STYLE_WORDS[style]} style"
        index = work.pictures.where(split.BASE_SUBJECTS, (style,))
        name = f"style-{loras.file_name(split.STYLE_WORDS[style])}"
        jobs.append((name, index, words, preset.style_steps, preset.style_batch))
    for subject in split.HELD_SUBJECTS:
        index = work.pictures.where((subject,), split.SUBJECT_STYLES)
        name = f"subject-{loras.file_name(subject)}"
        jobs.append((name, index, f"{subject} emoji", preset.subject_steps, preset.subject_batch))
    for seed, (name, index, words, steps, batch) in enumerate(jobs, start=10):
        file = work.out / "loras" / f"{name}.safetensors"
        if file.exists():
            continue
        tensors, curve = loras.train(
            work.checkpoint(name),
            trained.unet,
            work.latents.z[index],
            work.context(trained, index),
            rank=preset.rank,
            batch=batch,
            schedule=work.schedule(name.split("-")[0], steps, 2e-3, warmup=20, ema=0.98),
            seed=seed,
            autocast=preset.autocast,
            bar=work.bar,
        )
        loras.save(tensors, file, words, preset.rank)
        work.record.curve(name, curve, batch)


def train_fresh(work: Work) -> None:
    """The LoRAs of subjects that are not in the box, on the model in the box: no other stage is needed."""
    folders = work.out / "fresh", work.out / "checkpoints"
    fresh.train(*folders, work.pictures, work.preset, work.record, device=work.device, bar=work.bar)


def fill_box(work: Work) -> None:
    """Writes the pipeline's folder and the reference pictures."""
    trained = work.text_and_unet().cpu()
    box.forget_unused_words(trained.text, box.every_caption(), work.tokenizer)
    box.pack(work.out / "model", work.autoencoder(), trained.text, trained.unet, work.tokenizer)
    box.save_pictures(work.out / "pictures.npz", work.pictures, split.HELD_SUBJECTS, split.STYLES)
    box.save_pictures(work.out / "fresh.npz", work.pictures, split.MORE_SUBJECTS, split.HELD_STYLES)


def measure_all(work: Work) -> None:
    vae = AutoencoderKL.from_pretrained(work.out / "model" / "vae", torch_dtype=torch.float32).to(work.device)
    pictures = work.pictures
    seen = np.random.default_rng(0).choice(np.flatnonzero(~pictures.truth), 200, replace=False)
    first_six = pictures.where(split.HELD_SUBJECTS[:6], ("hc",))
    work.record.figure(
        "autoencoder PSNR in dB",
        {
            "truth pictures": measure.reconstruction(vae, pictures, np.flatnonzero(pictures.truth)),
            "high contrast of " + ", ".join(split.HELD_SUBJECTS[:6]): measure.reconstruction(vae, pictures, first_six),
            "pictures trained on": measure.reconstruction(vae, pictures, seen),
        },
    )
    folders = work.out / "model", work.out / "loras"
    figures = measure.everything(*folders, judge.Judge.load(work.out / "judge"), work.out / "sheets", work.device)
    work.record.figure(f"generated pictures judged right, cfg {measure.CFG}, {measure.STEPS} steps", figures)


STAGES: dict[str, Callable[[Work], None]] = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "unet": train_unet,
    "judge": train_judge,
    "clip": train_clip,
    "dino": train_dino,
    "loras": train_loras,
    "box": fill_box,
    "measure": measure_all,
}
# Only when asked for by name.
APART: dict[str, Callable[[Work], None]] = {"fresh": train_fresh}


def train_demo(
    out: Path,
    data_file: Path | None = None,
    preset: Literal["cpu", "gpu"] = "cpu",
    latents_from: Path | None = None,
    stages: Sequence[str] = tuple(STAGES),
    threads: int = 2,
    minutes: Mapping[str, float] | None = None,
    bar: bool = True,
    more_file: Path | None = None,
) -> None:
    """Trains the boxed model, or some of its stages, and writes what the box holds into `out`.

    These are model, loras, judge, clip, dino, pictures.npz, fresh.npz and record.json.

    Args:
        data_file: the emoji pictures; None fetches the npm packages and makes the file in `out`.
        latents_from: a `diffusers` autoencoder with 4 latent channels whose latents to adopt.
        stages: names from `STAGES` and `APART`, run in the order given.
        minutes: for each stage (`decoder`, `encoder`, `together`, `judge-subject`, `judge-style`, `style` and `subject`
            count as stages), when to stop at the latest.
        more_file: other hands' drawings for the judge; None fetches the npm packages and makes the file in `out`.

    Raises:
        ValueError: there is no such stage or preset.
        RuntimeError: the packages could not be fetched.
    """
    known = {**STAGES, **APART}
    if unknown := [stage for stage in stages if stage not in known]:
        raise ValueError(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    if preset not in model.PRESETS:
        raise ValueError(f"no preset {preset}; there are {', '.join(model.PRESETS)}")
    torch.set_num_threads(threads)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    if data_file is None:
        data_file = out / "checkpoints" / "emoji128.npz"
        if not data_file.exists():
            source.fetch(out / "checkpoints" / "packages")
            source.build(out / "checkpoints" / "packages", data_file, bar=bar)
    sizes = model.PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Work(out, sizes, data.load(data_file, sizes.pixels), device, latents_from, minutes or {}, bar, more_file)
    work.record.setting(preset=preset, **asdict(sizes), adopted_latents=latents_from is not None, device=device.type)
    for stage in stages:
        known[stage](work)
