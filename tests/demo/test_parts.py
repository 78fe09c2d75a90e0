"""The autoencoder's fold, the losses, the noise, the LoRAs' layout and the judge, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from lib_dynfuse.demo import autoencoder, base, box, data, judge, latents, loop, loras, measure, model, split


@pytest.fixture
def vae(tiny: model.Preset) -> nn.Module:
    torch.manual_seed(0)
    return model.autoencoder(tiny).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_folding_makes_latents_normal_and_leaves_the_pictures(vae: nn.Module, images: torch.Tensor) -> None:
    z = vae.encode(images).latent_dist.mode()
    drawn, spread = vae.decode(z).sample, vae.encode(images).latent_dist.std
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    box.fold(vae, mean, std)
    folded = vae.encode(images).latent_dist
    normal = folded.mode() * vae.config.scaling_factor
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(normal.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    scale = (std * model.SCALING)[:, None, None]
    assert torch.allclose(folded.std, spread / scale, rtol=1e-3)
    assert torch.allclose(vae.decode(folded.mode()).sample, drawn, atol=1e-4)


@torch.no_grad()
def test_a_certain_encoder_draws_its_mean(vae: nn.Module, images: torch.Tensor) -> None:
    box.certain(vae)
    seen = vae.encode(images).latent_dist
    assert torch.allclose(seen.sample(), seen.mode(), atol=1e-3)


def test_psnr_of_a_known_error() -> None:
    true = torch.zeros(2, 3, 4, 4)
    assert autoencoder.psnr(true + 0.2, true) == pytest.approx(20.0, abs=1e-3)


def test_the_picture_loss_sees_hue_and_edges() -> None:
    true = torch.zeros(1, 3, 16, 16)
    flat, checked = true + 0.1, true.clone()
    checked[..., ::2] += 0.1
    checked[..., 1::2] -= 0.1
    assert autoencoder.picture_loss(true, true) == 0
    # The same error in every pixel; one shifts the patch's hue, the other draws edges that are not there.
    assert autoencoder.picture_loss(flat, true) == pytest.approx(0.1 + 0.02 + 0.1, abs=1e-4)
    assert autoencoder.picture_loss(checked, true) == pytest.approx(0.1 + 0.02 + 0.1, abs=1e-4)


def test_v_leads_from_noise_to_the_clean_latent() -> None:
    z = torch.randn(8, 4, 2, 2)
    noise = base.Noise(torch.device("cpu"))
    noisy, times, v = noise(z, torch.Generator().manual_seed(0))
    alpha = noise.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    assert torch.allclose(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v, z, atol=1e-5)
    assert (times.diff() > 0).all()  # spread over the whole schedule
    assert times.min() >= 0
    assert times.max() < 1000


def test_one_caption_in_ten_is_dropped() -> None:
    index, row = base.draw(50, 10_000, torch.Generator().manual_seed(0))
    assert (row == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    kept = row > 0
    assert torch.equal(row[kept], index[kept] + 1)


def test_unused_words_are_forgotten_and_used_ones_kept(tiny: model.Preset) -> None:
    text, tokenizer = model.text_encoder(tiny), model.tokenizer()
    before = text.get_input_embeddings().weight.detach().clone()
    box.forget_unused_words(text, ["fox emoji", ""], tokenizer)
    after = text.get_input_embeddings().weight
    kept = after.abs().sum(1).nonzero()[:, 0].tolist()
    assert kept == sorted(tokenizer("fox emoji")["input_ids"])
    assert torch.equal(after[kept], before[kept])


def test_latents_are_normal_on_the_pictures_that_the_base_learns(vae: nn.Module, picture_file: Path) -> None:
    pictures = data.load(picture_file, 16)
    taught = pictures.where(split.BASE_SUBJECTS[:8], ("flat",))
    made = latents.measure(vae, pictures, taught)
    assert torch.allclose(made.z[taught].mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    mirrored = latents.encode(vae, pictures.floats(taught).flip(3))
    assert torch.allclose(
        made.flipped[taught] * made.std[:, None, None] + made.mean[:, None, None], mirrored, atol=1e-4
    )


def test_a_lora_leaves_the_unet_as_it_was_and_covers_every_kind_of_layer(tiny: model.Preset, tmp_path: Path) -> None:
    unet = model.unet(tiny).eval()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    schedule = loop.Schedule(steps=1, rate=1e-2, warmup=0)
    z, context = torch.randn(3, 4, 2, 2), torch.randn(4, 77, 32)
    tensors, _ = loras.train(
        tmp_path / "lora.pt", unet, z, context, rank=2, batch=2, schedule=schedule, seed=0, bar=False
    )
    after = unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (2, 32, 3, 3)
    assert tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight"].shape == (64, 2)
    kinds = {"conv1", "time_emb_proj", "proj_in", "to_out_0", "ff_net_0_proj"}
    assert all(any(name.split(".")[0].endswith(kind) for name in tensors) for kind in kinds)
    assert not any("sampler" in name or "conv_in" in name or "conv_out" in name for name in tensors)


def test_a_lora_file_says_what_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    loras.save({"a": torch.ones(1)}, file, "fox emoji", rank=4)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.trigger_phrase"] == "fox emoji"


def test_a_judge_comes_back_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = judge.Judge(["fox", "owl", "key"], ["flat", "hc"], (16, 16, 16)).half().float().eval()
    made.save(tmp_path)
    loaded = judge.Judge.load(tmp_path)
    images = torch.rand(9, 3, 64, 64)
    features = judge.features_of(made.subject, images)
    assert loaded.subjects == ["fox", "owl", "key"]
    assert torch.equal(loaded.subject(images), made.subject(images))
    assert torch.equal(loaded.style(features), made.style(features))


def test_a_judge_takes_pictures_of_any_size() -> None:
    made = judge.Judge(["fox", "owl"], ["flat", "hc"], (16, 16, 16)).eval()
    subject, style = made(torch.rand(2, 3, 100, 80))
    assert subject.shape == style.shape == (2,)


def test_one_picture_of_each_subject_is_kept_from_the_judge(picture_file: Path) -> None:
    pictures = data.load(picture_file, 16)
    held = np.flatnonzero(judge.held_out(pictures))
    assert sorted(pictures.names[k] for k in pictures.subject[held]) == sorted(judge.SUBJECTS)
    assert set(pictures.style[held]) == set(range(len(split.STYLES)))


def test_line_art_draws_the_edge_of_a_shape_or_fills_it() -> None:
    picture = torch.ones(40, 3, 16, 16)
    picture[:, 0, 4:12, 4:12] = -1  # a cyan square
    drawn = judge.line_art(picture, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] == drawn[:, 2]).all()  # without colour
    assert (drawn[:, :, :2] == 1).all()  # on white paper
    inside, edge = drawn[:, 0, 8, 8], drawn[:, 0, 4, 8]
    outlined = inside == 1
    assert 10 < outlined.sum() < 30
    assert (edge[outlined] == -1).all()
    assert (inside[~outlined] == -1).all()


@pytest.mark.parametrize("change", [judge.moved, judge.blurred, judge.recoloured])
def test_variations_keep_white_paper_white(change: Callable[..., torch.Tensor]) -> None:
    varied = change(torch.ones(64, 3, 16, 16), torch.Generator().manual_seed(0))
    assert varied.shape == (64, 3, 16, 16)
    assert varied.mean() > 0.95
    assert varied.max() <= 1


def test_style_features_know_colours_and_edges_but_not_shapes() -> None:
    picture = torch.ones(1, 3, 64, 64)
    picture[:, 1:, 20:30, 10:40] = -1
    red, moved = judge.style_features(picture), judge.style_features(picture.roll((9, 7), (2, 3)))
    blue = judge.style_features(picture.flip(1))
    assert torch.equal(red, moved)
    assert (red - blue).abs().max() == 1  # all of the ink is in another cell
    assert red.square().sum() == pytest.approx(len(judge.CELLS) + 1)


def test_a_white_picture_has_no_colours() -> None:
    features = judge.style_features(torch.ones(1, 3, 64, 64))
    assert features.isfinite().all()
    assert features.square().sum() == 1  # one flat area


def test_other_hands_drawings_are_drawn_by_their_place_after_the_pictures(picture_file: Path) -> None:
    pictures = data.load(picture_file, 16)
    more = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    lessons = judge.Lessons(pictures, pictures.images, more, np.array([0, 1]))
    drawn = lessons.draw(torch.tensor([len(pictures), 3, len(pictures) + 1]), torch.Generator())
    assert torch.equal(drawn[1], pictures.images[3].float() / 127.5 - 1)
    assert (drawn[[0, 2]] == -1).all()


def test_right_counts_subject_style_and_both() -> None:
    class Fixed:
        subjects, styles = ["fox", "guitar"], list(split.JUDGED_STYLES)

        def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 3])

    wanted = [
        measure.Wanted(*pair, 0) for pair in (("fox", "3d"), ("guitar", "flat"), ("fox", "noto"), ("fox", "blob"))
    ]
    found = measure.right(Fixed(), torch.zeros(4, 3, 8, 8), wanted)
    assert found == {"pictures": 4, "subject": 0.75, "style": 0.75, "both": 0.5}
