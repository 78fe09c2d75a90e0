"""What a diffusers pipeline's latents look like, with a gradient: its VAE, a TAESD beside it, or a linear guess."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.guidance.decoders import Decoder, TaesdDecoder, VaeDecoder, linear
from lib_dynfuse.guidance.libraries import in_a_line
from lib_dynfuse.guidance.sources import HUB, Source
from lib_dynfuse.hosts.guiding import frozen

# A picture of 512 pixels is decoded as it is; larger ones would take the memory of a second UNet.
VAE_SIDE = 64
# Parameters of a decoder that costs no more than a TAESD (1.2 million); Stable Diffusion's own has 50 million.
_SMALL = 5_000_000
_OWNER = "madebyollin"


def latent_decoder(pipe: Any, name: str, source: Source, say: Callable[[str], None]) -> Decoder:
    """The decoder called taesd, vae or linear for this pipeline; where it cannot be had, another, and it is said why.

    `source`: in whose folder taesd (SD 1.x and 2.x) or taesdxl is looked for, and whether it may be fetched. A model
    whose own VAE is as small as a TAESD is looked at through that. Loads, so never to be called while sampling.
    """
    kind = "sdxl" if "XL" in type(pipe).__name__ else "sd1"
    if name == "linear":
        return linear(kind)
    if name == "vae" or sum(parameter.numel() for parameter in pipe.vae.decoder.parameters()) < _SMALL:
        return _vae_decoder(pipe.vae)
    title = "taesdxl" if kind == "sdxl" else "taesd"
    try:
        return TaesdDecoder(_tiny(title, source, pipe).decoder, signed=True)
    # Whatever the hub, the network or a file that is something else may raise.
    except Exception as error:
        why = in_a_line(error) if source.download else "it is not on this machine"
        advice = f"put {HUB}/{_OWNER}/{title} (10 MB), as a diffusers folder, at {source.title}/{title}"
        consent = f", or {source.consent}" if source.consent else ""
        say(f"no {title} ({why}): nudged by the linear approximation; {advice}{consent}")
        return linear(kind)


def _tiny(title: str, source: Source, pipe: Any) -> Any:
    from diffusers import AutoencoderTiny

    own = None if source.folder is None else source.folder / title
    local = own is not None and own.is_dir()
    tiny = AutoencoderTiny.from_pretrained(
        str(own) if local else f"{_OWNER}/{title}",
        dtype=pipe.unet.dtype,
        local_files_only=local or not source.download,
        use_safetensors=True,
    )
    return tiny.to(pipe.unet.device).requires_grad_(False)


def _vae_decoder(vae: Any) -> Decoder:
    config = vae.config
    if config.get("force_upcast") and vae.dtype == torch.float16:
        # Its activations are too large for half precision.
        vae = copy.deepcopy(vae).float()
    mean, std = (_per_channel(config.get(name), vae) for name in ("latents_mean", "latents_std"))

    def decode(latent: Tensor) -> Tensor:
        if mean is not None and std is not None:
            latent = latent * std + mean
        with frozen(vae):  # it may be the pipeline's own, whose parameters are not ours to change
            picture: Tensor = vae.decode(latent, return_dict=False)[0]
        return picture

    return VaeDecoder(decode, config.scaling_factor, config.get("shift_factor") or 0.0, vae.dtype, VAE_SIDE)


def _per_channel(values: Any, vae: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1)
