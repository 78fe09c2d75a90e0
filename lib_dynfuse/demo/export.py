"""The boxed model as AUTOMATIC1111 wants it: one file under LDM's names, and a yaml beside it that says its sizes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from lib_dynfuse.demo import loras

NAME = "dynfuse-demo"
MODELS = "models"
# Where a WebUI looks, below its own folder.
CHECKPOINTS, LORAS, ENCODERS = (f"{MODELS}/{name}" for name in ("Stable-diffusion", "Lora", "dynfuse"))

# Longest first, for each is tried in turn on what the ones before have left.
RESNET = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def in_resnet(rest: str) -> str:
    for ours, theirs in RESNET:
        if rest.startswith(ours):
            return theirs + rest.removeprefix(ours)
    raise ValueError(f"{rest} is no part of a residual block")


def unet_key(key: str, layers: int = 2) -> str:
    """A UNet2DConditionModel's parameter under its LDM name.

    Raises:
        ValueError: LDM has no such parameter.
    """
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        kind, index, rest = found.groups()
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(index)}.{in_resnet(rest)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if not found:
        raise ValueError(f"{key} has no place in an LDM UNet")
    side, (block, index), (kind, rest) = found[1], map(int, found.group(2, 4)), found.group(3, 5)
    if side == "down":
        place = f"input_blocks.{1 + block * (layers + 1) + index}"
    else:
        place = f"output_blocks.{block * (layers + 1) + index}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.2.{rest}"
    return f"{place}.1.{rest}" if kind == "attentions" else f"{place}.0.{in_resnet(rest)}"


def vae_key(key: str, levels: int) -> str:
    """An AutoencoderKL's parameter under its LDM name."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if found := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)


def ldm_tensors(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights of an SD 1.x pipeline under LDM's names."""
    tensors = {f"model.diffusion_model.{unet_key(k)}": v for k, v in pipeline.unet.state_dict().items()}
    levels = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = vae_key(key, levels)
        # LDM's autoencoder attends through 1 x 1 convolutions.
        is_matrix = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_matrix else value
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def unet_settings(unet: UNet2DConditionModel) -> dict[str, Any]:
    widths = unet.config.block_out_channels
    attending = [2**level for level, kind in enumerate(unet.config.down_block_types) if kind.startswith("CrossAttn")]
    return {
        "image_size": unet.config.sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "attention_resolutions": attending[::-1],
        "num_res_blocks": unet.config.layers_per_block,
        "channel_mult": [width // widths[0] for width in widths],
        "num_heads": unet.config.attention_head_dim,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet.config.cross_attention_dim,
        "use_checkpoint": False,
        "legacy": False,
    }


def vae_settings(vae: AutoencoderKL) -> dict[str, Any]:
    widths = vae.config.block_out_channels
    return {
        "double_z": True,
        "z_channels": 4,
        "resolution": vae.config.sample_size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": vae.config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def settings(pipeline: StableDiffusionPipeline, text_folder: str) -> dict[str, Any]:
    """What v1-inference.yaml says, for this model.

    Args:
        text_folder: where a host finds the text encoder's config and tokenizer, from the folder that it is started in.
    """

    def part(target: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"target": target, **({"params": parameters} if parameters else {})}

    schedule = pipeline.scheduler.config
    return {
        "model": part(
            "ldm.models.diffusion.ddpm.LatentDiffusion",
            {
                "parameterization": "v" if schedule.prediction_type == "v_prediction" else "eps",
                "linear_start": schedule.beta_start,
                "linear_end": schedule.beta_end,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": schedule.num_train_timesteps,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": pipeline.unet.config.sample_size,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": pipeline.vae.config.scaling_factor,
                "use_ema": False,
                "unet_config": part("ldm.modules.diffusionmodules.openaimodel.UNetModel", unet_settings(pipeline.unet)),
                "first_stage_config": part(
                    "ldm.models.autoencoder.AutoencoderKL",
                    {
                        "embed_dim": 4,
                        "monitor": "val/rec_loss",
                        "ddconfig": vae_settings(pipeline.vae),
                        "lossconfig": part("torch.nn.Identity"),
                    },
                ),
                "cond_stage_config": part("ldm.modules.encoders.modules.FrozenCLIPEmbedder", {"version": text_folder}),
            },
        )
    }


def export(folder: Path, out: Path, lora_folder: Path = loras.BOX) -> Path:
    """Writes the pipeline in `folder`, and the LoRAs, for a WebUI.

    `out` is the WebUI's folder, or its folder `models`: there `models/Stable-diffusion` gets dynfuse-demo.safetensors,
    its yaml and the folder dynfuse-demo-clip, `models/Lora` the LoRAs, and `models/dynfuse` the encoders demo-clip and
    demo-dino. The yaml names that folder as it is seen from the WebUI's, in which a WebUI is started; so what was
    written elsewhere can be copied there.

    Returns:
        The checkpoint.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True)
    whole = Path(os.path.abspath(out))  # a link to where models are kept is not followed
    webui = whole.parent if whole.name == MODELS else out
    clip = f"{CHECKPOINTS}/{NAME}-clip"
    for needed in (clip, LORAS):
        (webui / needed).mkdir(parents=True, exist_ok=True)
    for file in (folder / "tokenizer").iterdir():
        shutil.copyfile(file, webui / clip / file.name)
    pipeline.text_encoder.config.save_pretrained(webui / clip)
    checkpoint = webui / CHECKPOINTS / f"{NAME}.safetensors"
    save_file(ldm_tensors(pipeline), checkpoint, metadata={"format": "pt"})
    checkpoint.chmod(0o644)  # a WebUI may run as somebody else
    checkpoint.with_suffix(".yaml").write_text(yaml.safe_dump(settings(pipeline, clip), sort_keys=False))
    for lora in sorted(lora_folder.glob("*.safetensors")):
        shutil.copyfile(lora, webui / LORAS / lora.name)
    for kind in ("clip", "dino"):
        shutil.copytree(Path(__file__).with_name(kind), webui / ENCODERS / f"demo-{kind}", dirs_exist_ok=True)
    return checkpoint
