"""The networks and training stages of the second bundled model, on a handful of steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lab.testbed import autoencoder, denoiser, split
from lab.testbed.pictures import Pictures
from lab.testbed.stages import Steady
from lib_dynfuse.demo import export, loop, model


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    x = np.random.default_rng(0).integers(0, 255, (6, 128, 128, 3), dtype=np.uint8)
    return Pictures(x, ["koala", "panda", "koala"] * 2, ["flat", "flat", "chalk"] * 2)


@pytest.fixture(scope="module")
def captions(pictures: Pictures) -> denoiser.Captions:
    return denoiser.Captions(pictures.names, pictures.styles, model.tokenizer())


def test_a_steady_rate_warms_up_stays_and_falls_to_zero() -> None:
    schedule = Steady(1000, 2e-3, warmup=100)
    assert schedule.rate_at(0, 0) == pytest.approx(2e-5)
    assert schedule.rate_at(100, 0) == schedule.rate_at(799, 0) == pytest.approx(2e-3)
    assert schedule.rate_at(900, 0) == pytest.approx(1e-3)
    assert schedule.rate_at(1000, 0) == 0


def test_the_hosts_can_load_the_networks() -> None:
    """32 groups in every norm, two layers a block, and a name of LDM's for every weight."""
    unet, vae = denoiser.network(), autoencoder.network()
    for part in (unet, vae):
        norms = [m for m in part.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert norms
        assert {norm.num_groups for norm in norms} == {32}
    names = [export.unet_key(key) for key in unet.state_dict()]
    assert len(set(names)) == len(names)
    assert "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight" in names
    assert "input_blocks.1.1.norm.weight" not in names  # the outer level does not attend
    assert export.unet_settings(unet)["attention_resolutions"] == [4, 2]
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mode().shape == (1, 4, 16, 16)


def test_each_caption_is_encoded_once_and_row_0_is_empty(captions: denoiser.Captions) -> None:
    assert captions.ids.shape == (4, 77)
    assert captions.rows.tolist() == [2, 3, 1, 2, 3, 1]
    written = model.tokens([split.caption("koala", "flat"), ""], model.tokenizer())
    assert captions.ids[2].equal(written[0])
    assert captions.ids[0].equal(written[1])


def test_one_caption_in_ten_is_dropped(captions: denoiser.Captions) -> None:
    chosen, rows = captions.drawn(4000, torch.Generator().manual_seed(0))
    dropped = rows == 0
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert rows[~dropped].equal(captions.rows[chosen[~dropped]])


def test_latents_are_normal_and_others_follow_the_same_measure(tmp_path: Path) -> None:
    raw = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 + 2
    latents = denoiser.Latents.of(raw)
    assert latents.z.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    latents.save(tmp_path / "z.safetensors")
    again = denoiser.Latents.load(tmp_path / "z.safetensors")
    other = denoiser.Latents.of(raw[:5], again.mean, again.std)
    assert torch.allclose(other.z, latents.z[:5])


def test_a_frozen_encoder_stays_while_the_decoder_learns(pictures: Pictures, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = autoencoder.network().requires_grad_(False)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    decoder = autoencoder.decoder_of(vae).requires_grad_(True)
    schedule = Steady(2, 1e-3, warmup=1)
    autoencoder.train_decoder(
        tmp_path / "d.pt", vae, decoder, pictures, schedule=schedule, crops=1, whole_pictures=1, bar=False
    )
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not value.equal(before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_text_and_unet_learn_in_turn(captions: denoiser.Captions, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(denoiser, "BATCH", 4)
    z = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    denoiser.train_text(tmp_path / "text.pt", z, captions, schedule=Steady(2, 1e-3, warmup=1), bar=False)
    trained = denoiser.after_text(tmp_path / "text.pt")
    context = denoiser.contexts(trained.text, captions)
    assert context.shape == (4, 77, denoiser.CONTEXT)
    before = {name: value.clone() for name, value in trained.unet.state_dict().items()}
    schedule = Steady(2, 1e-3, warmup=1)
    curve = denoiser.train_unet(
        tmp_path / "unet.pt", trained.unet, z, captions, context, batch=4, schedule=schedule, bar=False
    )
    assert curve.steps == 2
    assert any(not value.equal(before[name]) for name, value in trained.unet.state_dict().items())
    again = denoiser.network()
    assert loop.averaged(tmp_path / "unet.pt", again).steps == 2
    assert again.conv_in.weight.equal(trained.unet.conv_in.weight)
