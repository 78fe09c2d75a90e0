"""Latent to picture: published factors, libraries' autoencoders, and a gradient through each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_encoders import TinyDecoder, latents

from lib_dynfuse.guidance.decoders import (
    FACTORS,
    PREVIEW_SIDE,
    LinearDecoder,
    TaesdDecoder,
    VaeDecoder,
    differentiable,
    linear,
)

CHANNELS = {"sd1": 4, "sd2": 4, "sdxl": 4, "sd3": 16, "flux": 16}

# Fits of other people to the same decoders: AUTOMATIC1111's sd_vae_approx.py for SD 1, SDXL and SD 3, Forge's
# huggingface_guess for Flux (an earlier fit, without a bias). Rows are latent channels, columns R, G, B.
ANOTHER_FIT: dict[str, list[list[float]]] = {
    "sd1": [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]],
    "sdxl": [
        [0.3448, 0.4168, 0.4395],
        [-0.1953, -0.0290, 0.0250],
        [0.1074, 0.0886, -0.0163],
        [-0.3730, -0.2499, -0.2088],
    ],
    "sd3": [
        [-0.0645, 0.0177, 0.1052],
        [0.0028, 0.0312, 0.0650],
        [0.1848, 0.0762, 0.0360],
        [0.0944, 0.0360, 0.0889],
        [0.0897, 0.0506, -0.0364],
        [-0.0020, 0.1203, 0.0284],
        [0.0855, 0.0118, 0.0283],
        [-0.0539, 0.0658, 0.1047],
        [-0.0057, 0.0116, 0.0700],
        [-0.0412, 0.0281, -0.0039],
        [0.1106, 0.1171, 0.1220],
        [-0.0248, 0.0682, -0.0481],
        [0.0815, 0.0846, 0.1207],
        [-0.0120, -0.0055, -0.0867],
        [-0.0749, -0.0634, -0.0456],
        [-0.1418, -0.1457, -0.1259],
    ],
    "flux": [
        [-0.0404, 0.0159, 0.0609],
        [0.0043, 0.0298, 0.0850],
        [0.0328, -0.0749, -0.0503],
        [-0.0245, 0.0085, 0.0549],
        [0.0966, 0.0894, 0.0530],
        [0.0035, 0.0399, 0.0123],
        [0.0583, 0.1184, 0.1262],
        [-0.0191, -0.0206, -0.0306],
        [-0.0324, 0.0055, 0.1001],
        [0.0955, 0.0659, -0.0545],
        [-0.0504, 0.0231, -0.0013],
        [0.0500, -0.0008, -0.0088],
        [0.0982, 0.0941, 0.0976],
        [-0.1233, -0.0280, -0.0897],
        [-0.0005, -0.0530, -0.0020],
        [-0.1273, -0.0932, -0.0680],
    ],
}
# The callback in diffusers' guide, for SDXL, in 0..255: weights by colour, then what is added.
DIFFUSERS_SDXL = ([[60, -60, 25, -70], [60, -5, 15, -50], [60, 10, -5, -35]], [150, 140, 130])


def alike(found: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(found.flatten(), other.flatten(), dim=0))


@pytest.mark.parametrize("kind", sorted(ANOTHER_FIT))
def test_factors_agree_with_a_fit_of_other_people(kind: str) -> None:
    assert alike(torch.tensor(FACTORS[kind][0]), torch.tensor(ANOTHER_FIT[kind])) > 0.9


def test_sdxl_agrees_with_the_guide_of_diffusers_in_factors_and_brightness() -> None:
    weights, biases = (torch.tensor(one) / 127.5 for one in DIFFUSERS_SDXL)
    assert alike(torch.tensor(FACTORS["sdxl"][0]), weights.T) > 0.95
    torch.testing.assert_close(torch.tensor(FACTORS["sdxl"][1]), biases - 1.0, atol=0.12, rtol=0.0)


@pytest.mark.parametrize("kind", sorted(FACTORS))
def test_a_latent_of_zero_is_the_grey_that_the_bias_says(kind: str) -> None:
    picture = linear(kind)(torch.zeros(2, CHANNELS[kind], 3, 5))
    grey = (torch.tensor(FACTORS[kind][1]) + 1) / 2
    torch.testing.assert_close(picture, grey.view(1, 3, 1, 1).expand(2, 3, 3, 5))


def test_linear_is_a_sum_over_channels_pixel_by_pixel() -> None:
    latent = latents(1, 2)
    factors, bias = ([list(row) for row in FACTORS["sd1"][0]], [0.1, 0.0, -0.1])
    found = LinearDecoder(factors, bias)(latent)
    pixel = latent[1, :, 4, 7] @ torch.tensor(factors) + torch.tensor(bias)
    torch.testing.assert_close(found[1, :, 4, 7], ((pixel + 1) / 2).clamp(0, 1))


def test_linear_enlarges_only_when_asked() -> None:
    assert linear("sd1")(latents(1)).shape == (1, 3, 16, 16)
    assert linear("sd1", upscale=8)(latents(1)).shape == (1, 3, 128, 128)


def test_an_unknown_kind_and_a_wrong_number_of_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"'sd9'; there are: sd1, sd2, sdxl, sd3, flux"):
        linear("sd9")
    with pytest.raises(ValueError, match="16 channels; these factors are for 4"):
        linear("sd1")(torch.zeros(1, 16, 2, 2))


@pytest.mark.parametrize("upscale", [1, 2])
def test_the_gradient_of_linear_is_exact(upscale: int) -> None:
    latent = (latents(2, 2, side=3).double() * 0.3).requires_grad_()
    assert torch.autograd.gradcheck(linear("sdxl", upscale), latent)


def test_vae_is_the_library_s_picture_and_has_its_gradient() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vae = vae.double().eval()
    decode = VaeDecoder(lambda z: vae.decode(z).sample, scaling=0.36, shift=0.12)
    latent = latents(3, side=2).double().requires_grad_()
    expected = diffusers.image_processor.VaeImageProcessor.denormalize(vae.decode(latent / 0.36 + 0.12).sample)
    torch.testing.assert_close(decode(latent), expected)
    assert torch.autograd.gradcheck(decode, latent)


def test_taesd_takes_the_sampler_s_latent_and_either_range() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    latent = latents(4)
    expected = ((tiny.decode(latent).sample + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(TaesdDecoder(tiny.decoder, signed=True)(latent), expected)
    torch.testing.assert_close(TaesdDecoder(TinyDecoder())(latent), TinyDecoder()(latent).clamp(0, 1))


def test_a_decoder_in_half_precision_gives_a_float32_picture_and_gradient() -> None:
    latent = latents(5).requires_grad_()
    picture = TaesdDecoder(TinyDecoder().bfloat16())(latent)
    (gradient,) = torch.autograd.grad(picture.square().mean(), latent)
    assert picture.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(picture, TaesdDecoder(TinyDecoder())(latent), atol=0.02, rtol=0.0)


def test_a_large_latent_is_decoded_small() -> None:
    decode = TaesdDecoder(TinyDecoder(), side=16)
    assert decode(latents(6, side=64)[..., :48]).shape == (1, 3, 32, 24)
    assert TaesdDecoder(TinyDecoder(), side=0)(latents(6, side=32)).shape == (1, 3, 64, 64)


def test_weights_that_were_loaded_while_sampling_have_a_gradient_all_the_same() -> None:
    with torch.inference_mode():
        module = TinyDecoder()
        with torch.inference_mode(False), torch.enable_grad():
            latent = latents(7).requires_grad_()
            (gradient,) = torch.autograd.grad(TaesdDecoder(module)(latent).sum(), latent)
    assert gradient.abs().sum() > 0
    plain = TinyDecoder()
    assert differentiable(plain) is plain


def test_a_preview_at_1024_pixels_keeps_less_than_a_quarter_of_a_gib() -> None:
    """A decoder as wide as TAESD: what autograd keeps of it, counted at an eighth of the side."""
    diffusers = pytest.importorskip("diffusers")
    decode = TaesdDecoder(
        diffusers.AutoencoderTiny().decoder.requires_grad_(False), signed=True, side=PREVIEW_SIDE // 8
    )
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        picture = decode(latents(8, side=16).requires_grad_())
    weights = {one.untyped_storage().data_ptr() for one in decode.module.parameters()}
    activations = sum(size for where, size in kept.items() if where not in weights)
    assert picture.shape == (1, 3, 40, 40)
    assert activations * 64 < 256 * 2**20
