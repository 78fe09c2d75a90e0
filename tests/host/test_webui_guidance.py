"""Nudges and scores on a real WebUI, by the bundled CLIP and DINO, which `export-demo` puts into its models/dynfuse."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
from conftest import Answer, WebUI, encoded

KL: dict[str, Any] = {"enabled": True, "strategy": "kl"}
ENCODERS = {"clip": "demo-clip", "dino": "demo-dino", "nudge_decoder": "linear"}
NUDGED = {**KL, **ENCODERS, "nudge": True, "nudge_start": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _bundled_encoders(webui: WebUI) -> None:
    """What opens files is the WebUI's owner's to set, so these tests cannot."""
    answer = webui.generate(webui.prompt(), {**KL, **ENCODERS, "score": True}, steps=1)
    assert answer.status == 200, answer.body
    if "may not be used" in answer.infotexts[0] or "not on this machine" in answer.infotexts[0]:
        pytest.skip("export-demo has not put its encoders into the WebUI's models/dynfuse")


def apart(one: Answer, other: Answer) -> int:
    assert (one.status, other.status) == (200, 200), (one.body, other.body)
    return max(int(np.abs(a - b).max()) for a, b in zip(one.images, other.images, strict=True))


def scores(answer: Answer, index: int = 0) -> dict[str, float]:
    """The scores in a picture's infotext."""
    text = re.search(r'DynFuse scores: "([^"]*)"', answer.infotexts[index])
    assert text is not None, answer.infotexts[index]
    return {name: float(value) for name, _, value in (part.rpartition(" ") for part in text[1].split(", "))}


def nudged_steps(webui: WebUI) -> list[int]:
    status, record = webui.trace()
    assert status == 200
    return [one["step"] for one in record["nudges"]]


def test_nudges_lower_r_and_leave_nothing_behind(webui: WebUI) -> None:
    plain, fused = webui.generate("a cat"), webui.generate(webui.prompt(), KL)
    scored = webui.generate(webui.prompt(), {**KL, **ENCODERS, "score": True})
    assert apart(scored, fused) == 0
    nudged = webui.generate(webui.prompt(), NUDGED)
    assert apart(nudged, fused) > 0
    assert scores(nudged)["R"] < scores(scored)["R"]
    assert nudged_steps(webui) == [0, 1, 2, 3]
    assert apart(webui.generate(webui.prompt(), NUDGED), nudged) == 0
    assert apart(webui.generate("a cat"), plain) == 0
    assert apart(webui.generate(webui.prompt(), KL), fused) == 0


@pytest.mark.parametrize("sampler", ["Euler a", "Heun", "DPM++ 2M", "DPM++ SDE", "UniPC", "DDIM", "PLMS", "LCM"])
def test_every_sampler_is_nudged_once_a_step(webui: WebUI, sampler: str) -> None:
    webui.needs_sampler(sampler)
    fused = webui.generate(webui.prompt(), KL, sampler_name=sampler)
    nudged = webui.generate(webui.prompt(), NUDGED, sampler_name=sampler)
    assert apart(nudged, fused) > 0
    # DDIM makes one step less than it is asked for.
    taken = sorted({one["step"] for one in webui.trace()[1]["passes"]})
    assert nudged_steps(webui) == taken
    assert len(taken) >= 3


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_scale": 1},
        {"negative_prompt": "a bad picture of a dog " * 25},
        {"batch_size": 2, "n_iter": 2},
        {"enable_hr": True},
    ],
    ids=["no guidance", "long negative prompt", "two batches of 2", "hires"],
)
def test_whatever_is_generated_can_be_nudged(webui: WebUI, settings: dict[str, Any]) -> None:
    settings = webui.any_hires() if "enable_hr" in settings else settings
    fused = webui.generate(webui.prompt(), KL, **settings)
    nudged = webui.generate(webui.prompt(), NUDGED, **settings)
    assert apart(nudged, fused) > 0
    assert "not nudged" not in nudged.infotexts[0]
    assert nudged_steps(webui) == (list(range(8)) if "enable_hr" in settings else list(range(4)))


def test_img2img_and_inpainting_are_nudged_and_what_is_masked_stays(webui: WebUI) -> None:
    picture, area = webui.generate("a dog").images[0], np.zeros((64, 64, 3), np.int16)
    area[16:48, 16:48] = 255
    settings = {"init_images": [encoded(picture)], "mask": encoded(area), "inpainting_fill": 1, "mask_blur": 0}
    fused = webui.generate(webui.prompt(), KL, kind="img2img", **settings)
    nudged = webui.generate(webui.prompt(), NUDGED, kind="img2img", **settings)
    moved = np.abs(nudged.images[0] - fused.images[0]).max(2)
    assert moved[16:48, 16:48].max() > 0
    assert moved[:12].max() == 0
    assert moved[52:].max() == 0


def test_given_pictures_are_what_is_compared_with(webui: WebUI) -> None:
    target = encoded(webui.generate("a dog", seed=99).images[0])
    given = {**NUDGED, "subject_references": [target], "style_references": [f"data:image/png;base64,{target}"]}
    answer = webui.generate(webui.prompt(), given)
    found = scores(answer)
    assert found["CLIP-I subject"] == found["CLIP-I style"]
    assert answer.infotexts[0].count("1 picture ") == 2
    assert target not in answer.infotexts[0]


def test_only_the_best_of_a_batch_are_kept(webui: WebUI) -> None:
    every = webui.generate(webui.prompt(), {**KL, **ENCODERS, "score": True}, batch_size=3)
    best = webui.generate(webui.prompt(), {**KL, **ENCODERS, "keep_best": 1}, batch_size=3)
    means = [scores(every, index)["harmonic mean"] for index in range(len(every.infotexts))]
    assert len(best.images) == 1
    assert scores(best)["harmonic mean"] == max(means)
    numbers = json.loads(best.body["info"])["extra_generation_params"]["DynFuse scores"]
    assert numbers[0]["harmonic_mean"] == pytest.approx(max(means), abs=1e-4)


def test_what_is_missing_is_told_and_the_picture_is_made(webui: WebUI) -> None:
    fused = webui.generate(webui.prompt(), KL)
    answer = webui.generate(webui.prompt(), {**NUDGED, "clip": "ViT-B-32", "dino": "facebook/dino-vits16"})
    assert apart(answer, fused) == 0
    assert answer.infotexts[0].count("not nudged: CLIP and DINO are not on this machine: put https://") == 1
    assert "as models/dynfuse/dino-vits16.safetensors" in answer.infotexts[0]


@pytest.mark.parametrize("name", ["/etc", "../Stable-diffusion", "C:\\x", "\\\\server\\x", "stranger/model", "nothing"])
@pytest.mark.parametrize("more", [{}, {"override_settings": {"dynfuse_download": True}}])
def test_a_stranger_chooses_no_file_and_no_download(webui: WebUI, name: str, more: dict[str, Any]) -> None:
    answer = webui.generate(webui.prompt(), {**NUDGED, "clip": name, "dino": name}, **more)
    said = answer.infotexts[0] if answer.status == 200 else str(answer.body)
    assert "may not be used; allowed are files and folders in models/dynfuse by their names" in said
    assert webui.call("/sdapi/v1/options")[1].get("dynfuse_download") in (False, None)


def test_an_interrupt_in_mid_guidance_leaves_nothing_behind(webui: WebUI) -> None:
    target = encoded(webui.generate("a dog", seed=99).images[0])
    given = {**NUDGED, "subject_references": [target], "style_references": [target]}
    plain, fused = webui.generate("a cat"), webui.generate(webui.prompt(), KL)
    running = threading.Thread(target=webui.generate, args=(webui.prompt(), given), kwargs={"steps": 60})
    running.start()
    for _ in range(600):
        state = webui.call("/sdapi/v1/progress?skip_current_image=true")[1]["state"]
        if state["sampling_steps"] == 60 and state["sampling_step"] >= 3:
            break
        time.sleep(0.05)
    else:
        pytest.fail("sampling did not begin")
    webui.call("/sdapi/v1/interrupt", {})
    running.join()
    assert len(nudged_steps(webui)) < 60
    assert apart(webui.generate("a cat"), plain) == 0
    assert apart(webui.generate(webui.prompt(), KL), fused) == 0


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_the_way_through_the_unet_works_or_is_said_to_be_impossible(webui: WebUI, sampler: str) -> None:
    webui.needs_sampler(sampler)
    plain, fused = webui.generate("a cat"), webui.generate(webui.prompt(), KL, sampler_name=sampler)
    nudged = webui.generate(webui.prompt(), {**NUDGED, "nudge_mode": "xt"}, sampler_name=sampler)
    assert apart(nudged, fused) > 0
    if "xt cannot be used" in nudged.infotexts[0]:
        assert apart(nudged, webui.generate(webui.prompt(), NUDGED, sampler_name=sampler)) == 0
    else:
        assert 0 not in nudged_steps(webui)  # the host's first call writes into the weights
        assert "not nudged" not in nudged.infotexts[0]
    assert apart(webui.generate("a cat"), plain) == 0


def test_the_way_through_the_unet_goes_on_in_a_hires_pass(webui: WebUI) -> None:
    settings = webui.any_hires(hr_second_pass_steps=3)
    fused = webui.generate(webui.prompt(), KL, **settings)
    nudged = webui.generate(webui.prompt(), {**NUDGED, "nudge_mode": "xt"}, **settings)
    assert apart(nudged, fused) > 0
    assert "not nudged" not in nudged.infotexts[0] or "xt cannot be used" in nudged.infotexts[0]
    assert {5, 6} <= set(nudged_steps(webui))  # a pass's first call writes into the weights
