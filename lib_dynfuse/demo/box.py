"""From trained parts to the folder that `diffusers` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lib_dynfuse.demo import model, split
from lib_dynfuse.demo.data import Pictures


def fold(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Makes `vae`, in place, give latents that have mean 0 and deviation 1 once multiplied by SD 1.x's scaling factor.

    Args:
        mean, std: [4], of the latents that it gives now.
    """
    scale = std * model.SCALING
    with torch.no_grad():
        into, out = vae.quant_conv, vae.post_quant_conv
        into.weight[:4] /= scale[:, None, None, None]
        into.bias[:4] = (into.bias[:4] - mean) / scale
        into.bias[4:] -= 2 * scale.log()  # the other four are logarithms of variances
        # First undo the scale, then go on as before: W(s·z + m) + b.
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight *= scale[None, :, None, None]


def certain(vae: AutoencoderKL) -> None:
    """Makes an encoder that has learnt means alone say, in place, that it is sure of them."""
    with torch.no_grad():
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-20.0)


def forget_unused_words(text: CLIPTextModel, texts: list[str], tokenizer: CLIPTokenizer) -> None:
    """Zeroes, in place, the embeddings of tokens that no text of the data uses: they compress away."""
    used = torch.from_numpy(np.unique(model.tokens(texts, tokenizer).numpy()))
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        rows = table[used].clone()
        table.zero_()
        table[used] = rows


def every_caption() -> list[str]:
    """All that the split can ask for, and the empty caption."""
    subjects = (*split.BASE_SUBJECTS, *split.HELD_SUBJECTS)
    return ["", *(split.caption(name, style) for name in subjects for style in split.STYLES)]


def pack(
    folder: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes the pipeline as a `diffusers` folder in fp16."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=model.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # The plain files instead of what this transformers writes: they are smaller, and older hosts read no other.
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(model.TOKENIZER, folder / "tokenizer")


def save_pictures(file: Path, pictures: Pictures, subjects: tuple[str, ...], styles: tuple[str, ...]) -> None:
    """Writes the real pictures of these subjects in these styles, laid out as the data file is."""
    index = pictures.where(subjects, styles)
    names = list(subjects)
    np.savez_compressed(
        file,
        x=pictures.images[index].permute(0, 2, 3, 1).numpy(),
        subj=np.array([names.index(pictures.names[k]) for k in pictures.subject[index]]),
        sty=pictures.style[index],
        names=np.array(names),
        styles=np.array(pictures.styles),
    )
