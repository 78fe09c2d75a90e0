"""A run of the boxed model's own training on random pictures, small enough for seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib_dynfuse.demo import model, split, train

TINY = model.Preset(
    pixels=16,
    autoencoder=(32, 32, 32, 32),
    unet=(32, 64),
    heads=4,
    context=32,
    text_layers=1,
    rank=2,
    autoencoder_steps=2,
    autoencoder_batch=2,
    encoder_steps=2,
    base_steps=4,
    base_batch=2,
    text_steps=2,
    style_steps=2,
    style_batch=2,
    subject_steps=1,
    subject_batch=2,
    together_steps=2,
    judge_steps=2,
    judge_batch=8,
    style_judge_steps=2,
    style_judge_batch=8,
    clip_steps=2,
    clip_batch=6,
    dino_steps=2,
    dino_batch=2,
)


@pytest.fixture(scope="session")
def tiny() -> model.Preset:
    """Sizes for seconds."""
    return TINY


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in place of emoji, for every subject and style of the split."""
    names = [*split.BASE_SUBJECTS, *split.HELD_SUBJECTS, *split.MORE_SUBJECTS]
    subject, style = np.divmod(np.arange(len(names) * len(split.STYLES)), len(split.STYLES))
    file = tmp_path_factory.mktemp("data") / "pictures.npz"
    x = np.random.default_rng(0).integers(0, 256, (len(subject), 16, 16, 3), dtype=np.uint8)
    np.savez(file, x=x, subj=subject, sty=style, names=np.array(names), styles=np.array(split.STYLES))
    return file


@pytest.fixture(scope="session")
def more_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other hands' drawings of two subjects."""
    file = tmp_path_factory.mktemp("data") / "more.npz"
    x = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(file, x=x, subj=np.array([0, 0, 1, 1]))
    return file


@pytest.fixture(scope="session")
def trained(picture_file: Path, more_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all stages but the measuring leave behind, two LoRAs made."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "cpu", TINY)
        patch.setattr(split, "HELD_SUBJECTS", ("fox",))
        patch.setattr(split, "HELD_STYLES", ("hc",))
        stages = [stage for stage in train.STAGES if stage != "measure"]
        train.train_demo(out, picture_file, stages=stages, threads=1, bar=False, more_file=more_file)
    return out
