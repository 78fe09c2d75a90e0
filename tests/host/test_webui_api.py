"""What must hold on a real WebUI, seen from outside: through its API alone."""

from __future__ import annotations

import base64
import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from conftest import Answer, WebUI, decoded, encoded
from PIL import Image

SUM = {"enabled": True, "strategy": "sum"}
KL = {"enabled": True, "strategy": "kl"}
ROUNDING = 1  # of 255: the host's merge and ours round in another order


def apart(one: Answer, other: Answer) -> int:
    """The largest difference of any pixel of any picture."""
    assert (one.status, other.status) == (200, 200), (one.body, other.body)
    assert len(one.images) == len(other.images) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(one.images, other.images, strict=True))


@pytest.fixture(scope="module")
def picture(webui: WebUI) -> str:
    return encoded(webui.generate("a dog").images[0])


def mask() -> str:
    area = np.zeros((64, 64, 3), np.int16)
    area[16:48, 16:48] = 255
    return encoded(area)


CASES: dict[str, dict[str, Any]] = {
    "one picture": {},
    "batch of 2": {"batch_size": 2},
    "two batches of 2": {"batch_size": 2, "n_iter": 2},
    "no guidance": {"cfg_scale": 1},
    "long negative prompt": {"negative_prompt": "a bad picture of a dog " * 25},
    "Euler a": {"sampler_name": "Euler a"},
    "DPM++ 2M Karras": {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
    "Heun": {"sampler_name": "Heun"},
    "UniPC": {"sampler_name": "UniPC"},
    "DDIM": {"sampler_name": "DDIM"},
    "tiling": {"tiling": True},
}


@pytest.mark.parametrize("case", [*CASES, "hires, latent", "hires, upscaler"])
def test_the_sum_is_what_the_host_merges(webui: WebUI, case: str) -> None:
    settings = CASES[case] if case in CASES else webui.hires(case.endswith("latent"))
    if "sampler_name" in settings:
        webui.needs_sampler(settings["sampler_name"])
    merged = webui.generate(webui.prompt(roles=False), **settings)
    assert apart(webui.generate(webui.prompt(), SUM, **settings), merged) <= ROUNDING
    assert apart(webui.generate("a cat", **settings), merged) > 8  # the LoRAs do something


@pytest.mark.parametrize("inpaint", [False, True])
def test_the_sum_is_what_the_host_merges_in_img2img(webui: WebUI, picture: str, inpaint: bool) -> None:
    settings: dict[str, Any] = {"kind": "img2img", "init_images": [picture], "denoising_strength": 0.7, "steps": 6}
    if inpaint:
        settings |= {"mask": mask(), "inpainting_fill": 1}
    merged = webui.generate(webui.prompt(roles=False), **settings)
    assert apart(webui.generate(webui.prompt(), SUM, **settings), merged) <= ROUNDING


def test_prompts_joined_by_and(webui: WebUI) -> None:
    merged = webui.generate(webui.prompt(roles=False) + " AND a dog :0.5")
    assert apart(webui.generate(webui.prompt() + " AND a dog :0.5", SUM), merged) <= ROUNDING


def test_a_hires_prompt_has_roles_of_its_own(webui: WebUI) -> None:
    settings = webui.any_hires()
    strengths = (0.5, 1.2)
    swapped = webui.prompt("a dog", strengths=strengths)
    swapped = swapped.replace("subject>", "?").replace("style>", "subject>").replace("?", "style>")
    merged = webui.generate(
        webui.prompt(roles=False), hr_prompt=webui.prompt("a dog", roles=False, strengths=strengths), **settings
    )
    assert apart(webui.generate(webui.prompt(), SUM, hr_prompt=swapped, **settings), merged) <= ROUNDING
    assert webui.generate(webui.prompt(), KL, hr_prompt=swapped, **settings).status == 200


def test_off_is_the_host_alone_before_and_after(webui: WebUI) -> None:
    plain, merged = webui.generate("a cat"), webui.generate(webui.prompt(roles=False))
    assert apart(webui.generate(webui.prompt()), merged) == 0
    assert apart(webui.generate(webui.prompt(), KL), merged) > 8
    assert apart(webui.generate("a cat"), plain) == 0
    assert apart(webui.generate(webui.prompt(roles=False)), merged) == 0


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_an_interrupted_run_leaves_nothing(webui: WebUI, how: str) -> None:
    plain, merged = webui.generate("a cat"), webui.generate(webui.prompt(roles=False))
    running = threading.Thread(target=webui.generate, args=(webui.prompt(), KL), kwargs={"steps": 100})
    running.start()
    time.sleep(2)
    webui.call(f"/sdapi/v1/{how}", {})
    running.join()
    assert apart(webui.generate(webui.prompt(roles=False)), merged) == 0
    assert apart(webui.generate("a cat"), plain) == 0


@pytest.fixture(scope="module")
def steady(webui: WebUI) -> None:
    """A WebUI whose own pictures do not depend on their neighbours: with others it cannot be said of ours."""
    first, next_ = (webui.generate(webui.prompt(roles=False), batch_size=3, seed=seed).images for seed in (11, 12))
    own = max(int(np.abs(a - b).max()) for a, b in zip(first[1:], next_[:2], strict=True))
    if own > ROUNDING:
        pytest.skip(f"this WebUI's own pictures differ by up to {own} of 255 among other neighbours")


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("rule", ["kl", "kl-token", "random"])
def test_a_picture_is_the_same_whatever_its_neighbours(webui: WebUI, rule: str) -> None:
    fuse = {"enabled": True, "strategy": rule}
    first, next_ = (webui.generate(webui.prompt(), fuse, batch_size=3, seed=seed).images for seed in (11, 12))
    assert max(int(np.abs(a - b).max()) for a, b in zip(first[1:], next_[:2], strict=True)) <= ROUNDING


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("rule", ["kl", "random"])
def test_a_picture_is_the_same_alone_and_in_a_batch(webui: WebUI, rule: str) -> None:
    fuse = {"enabled": True, "strategy": rule}
    together = webui.generate(webui.prompt(), fuse, batch_size=3)
    for index, image in enumerate(together.images):
        alone = webui.generate(webui.prompt(), fuse, seed=11 + index)
        assert int(np.abs(image - alone.images[0]).max()) <= ROUNDING


@pytest.mark.usefixtures("steady")
def test_alone_and_in_a_batch_a_token_turns_only_where_the_hosts_rounding_turns_it(webui: WebUI) -> None:
    """Batches of another size round otherwise, and a token that both roles move alike falls to either of them."""
    fuse = {"enabled": True, "strategy": "kl-token"}

    def subject_shares(image: int) -> Any:
        """[2, layers], cond after uncond: the subject's share of a picture's tokens in the first forward pass."""
        one = webui.trace()[1]["passes"][0]
        rows = [index for index, row in enumerate(one["rows"]) if row["image"] == image]
        rows.sort(key=lambda index: bool(one["rows"][index]["cond"]))
        return np.array(one["subject"], float)[:, rows].T

    webui.generate(webui.prompt(), fuse, batch_size=3, steps=1)
    together = [subject_shares(image) for image in range(3)]
    for index in range(3):
        webui.generate(webui.prompt(), fuse, seed=11 + index, steps=1)
        apart_by = [float(np.nanmean(np.abs(shares - subject_shares(0)))) for shares in together]
        assert apart_by[index] < 0.01
        assert min(apart_by[:index] + apart_by[index + 1 :]) > 0.02  # another picture is told from it


def test_cond_and_uncond_apart_make_the_same_picture(webui: WebUI) -> None:
    webui.needs_option("batch_cond_uncond")
    together = webui.generate(webui.prompt(), KL)
    one_by_one = webui.generate(webui.prompt(), KL, override_settings={"batch_cond_uncond": False})
    assert apart(together, one_by_one) <= ROUNDING


def test_a_picture_s_infotext_makes_the_picture_again(webui: WebUI) -> None:
    fuse = {**KL, "balance": 0.25, "auto_balance": True, "sample_tokens": 16, "stop": 0.8}
    first = webui.generate(webui.prompt(), fuse)
    # Forge answers 500 to any infotext, its own too, unless the request brings styles.
    request = {"infotext": first.infotexts[0], "styles": [], "save_images": False}
    status, body = webui.call("/sdapi/v1/txt2img", request)
    assert status == 200, body
    again = np.asarray(decoded(body["images"][0]).convert("RGB")).astype(np.int16)
    assert int(np.abs(again - first.images[0]).max()) == 0
    assert "DynFuse balance: 0.25" in first.infotexts[0]
    assert "DynFuse chosen: " in first.infotexts[0]


def test_every_picture_says_what_was_chosen_for_it(webui: WebUI) -> None:
    texts = webui.generate(webui.prompt(), {"enabled": True, "strategy": "random"}, batch_size=3).infotexts
    chosen = [text.split("DynFuse chosen: ")[1].split(",")[0] for text in texts]
    assert all(one.startswith("subject ") and " style " in one for one in chosen)
    assert len(set(chosen)) > 1


def test_the_picture_of_what_was_chosen_comes_last(webui: WebUI) -> None:
    with_trace = webui.generate(webui.prompt(), {**KL, "trace": True}, batch_size=2)
    without = webui.generate(webui.prompt(), KL, batch_size=2)
    assert len(with_trace.body["images"]) == len(without.body["images"]) + 2
    assert all(int(np.abs(a - b).max()) == 0 for a, b in zip(without.images, with_trace.images, strict=False))


def test_the_panel_s_list_is_understood_like_the_dict(webui: WebUI) -> None:
    order = webui.call("/dynfuse/v1/schema")[1]["order"]
    values: list[Any] = [None] * len(order)
    for name, value in {**KL, "balance": 0.5}.items():
        values[order.index(name)] = value
    listed = webui.generate(webui.prompt(), values)
    assert apart(webui.generate(webui.prompt(), {**KL, "balance": 0.5}), listed) == 0


@pytest.mark.parametrize(
    ("fuse", "named"),
    [
        ({"enabled": True, "strategi": "kl"}, "strategi"),
        ({"enabled": True, "strategy": "kll"}, "kll"),
        ({"enabled": True, "balance": 7}, "balance"),
        ({"enabled": "perhaps"}, "enabled"),
        ({"enabled": True, "sample_tokens": 1.5}, "sample_tokens"),
        ({"enabled": True, "parameters": {"nonsense": 1}}, "nonsense"),
    ],
)
@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_wrong_arguments_are_refused_by_name(
    webui: WebUI, picture: str, kind: str, fuse: dict[str, Any], named: str
) -> None:
    settings = {"init_images": [picture]} if kind == "img2img" else {}
    answer = webui.generate(webui.prompt(), fuse, kind=kind, **settings)
    assert answer.status == 422
    assert named in str(answer.body)


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ("<lora:{0}:1:role=subjekt>", "unknown role 'subjekt' (did you mean subject?)"),
        ("<lora:{0}:1> <lora:{1}:1>", "no LoRA has a role"),
        ("", "the prompt has no LoRA"),
    ],
)
def test_wrong_roles_are_told_and_the_picture_is_made_without_us(webui: WebUI, tags: str, note: str) -> None:
    prompt = "a cat " + tags.format(webui.subject, webui.style)
    fused = webui.generate(prompt, KL)
    assert apart(fused, webui.generate(prompt)) == 0
    assert note in fused.infotexts[0]


def test_a_picture_s_trace_can_be_had_by_its_own_name_alone(webui: WebUI) -> None:
    answer = webui.generate(webui.prompt(), KL, batch_size=2)
    status, record = webui.trace()
    assert status == 200
    assert len({one["step"] for one in record["passes"]}) == 4
    status, heat_map = webui.trace(1, "&format=png")
    assert (status, heat_map[:4]) == (200, b"\x89PNG")
    assert len(set(webui.traces)) == 2
    assert not any(name in text for name in webui.traces for text in answer.infotexts)
    for guess in ("", "?id=", "?id=0"):
        assert webui.call(f"/dynfuse/v1/trace{guess}")[0] == 404


def test_no_file_of_the_server_is_read_or_told_apart(webui: WebUI) -> None:
    said = set()
    for path in ("/etc/hostname", "/etc", "/nowhere", "/dev/zero", "webui.py", "html/card-no-preview.png"):
        answer = webui.generate(webui.prompt(), {**KL, "score": True, "subject_references": [path]})
        assert answer.status == 422
        said.add(answer.body["detail"])
        assert webui.generate("a cat", {"subject_references": [path]}).status == 200
    assert len(said) == 1


def test_a_large_picture_in_a_small_body_is_refused_by_its_header(webui: WebUI) -> None:
    file = io.BytesIO()
    Image.new("1", (13300, 13300)).save(file, "PNG")
    large = base64.b64encode(file.getvalue()).decode()
    for kind, given in (("subject", [large]), ("style", [large] * 40)):
        answer = webui.generate(webui.prompt(), {**KL, "score": True, f"{kind}_references": given})
        assert answer.status == 422
        assert f"{kind}_references: " in answer.body["detail"]


def test_the_host_lists_our_arguments(webui: WebUI) -> None:
    scripts = {(one["name"], one["is_img2img"]): one for one in webui.call("/sdapi/v1/script-info")[1]}
    for tab in (False, True):
        assert len(scripts["dynfuse", tab]["args"]) == len(webui.call("/dynfuse/v1/schema")[1]["order"])
