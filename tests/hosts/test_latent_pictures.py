"""The decoders of a pipeline: its own VAE, a TAESD from a folder, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from lib_dynfuse.guidance.decoders import LinearDecoder
from lib_dynfuse.guidance.sources import Source
from lib_dynfuse.hosts import latent_pictures
from lib_dynfuse.hosts.diffusers import Embedded


@pytest.fixture
def host(sd_folder: Path) -> Embedded:
    said: list[str] = []
    host = Embedded.load(sd_folder, device="cpu", say=said.append)
    host.said = said  # type: ignore[attr-defined]
    return host


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny VAE counts as one of Stable Diffusion's size."""
    monkeypatch.setattr(latent_pictures, "_SMALL", 0)


def latent(side: int = 8) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("name", ["vae", "taesd"])
def test_the_vae_makes_the_picture_that_is_saved_and_a_small_one_needs_no_taesd(host: Embedded, name: str):
    z = latent()
    picture = host.decoder(name)(z)
    saved = host.pipe.vae.decode(z / host.pipe.vae.config.scaling_factor, return_dict=False)[0]
    torch.testing.assert_close(picture, (saved / 2 + 0.5).clamp(0, 1))
    picture.sum().backward()
    assert z.grad is not None
    assert (z.grad.abs().flatten(1).amax(1) > 0).all()
    # The pipeline's own parameters get no gradient, and ask for one as before.
    assert all(parameter.grad is None and parameter.requires_grad for parameter in host.pipe.vae.parameters())
    assert host.said == []


def test_a_large_latent_is_shrunk_before_the_vae(host: Embedded):
    assert host.decoder("vae")(latent(80)).shape[-1] == 8 * latent_pictures.VAE_SIDE


def test_a_taesd_in_the_folder_is_used(host: Embedded, large: None, tmp_path: Path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    tiny.save_pretrained(tmp_path / "taesd")
    z = latent()
    picture = host.decoder("taesd", Source(tmp_path))(z)
    torch.testing.assert_close(picture, (tiny.eval().decode(z).sample / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(picture.sum(), z)[0].abs().max() > 0
    assert host.said == []


def test_a_taesd_that_cannot_be_had_is_said_and_the_linear_one_serves(host: Embedded, large: None, tmp_path: Path):
    (tmp_path / "taesd").mkdir()
    decoder = host.decoder("taesd", Source(tmp_path))
    assert isinstance(decoder, LinearDecoder)
    (said,) = host.said
    assert said.startswith("no taesd (it is not on this machine): ")
    assert "as a diffusers folder, at models/dynfuse/taesd" in said
    assert str(tmp_path) not in said
    assert decoder(latent()).shape == (2, 3, 8, 8)
