"""A running WebUI, given by `--webui URL`, and two LoRAs that it has; without it these tests are skipped."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from PIL import Image

Array = np.ndarray[Any, np.dtype[np.int16]]


@dataclass
class Answer:
    """Pictures [H, W, 3], their infotexts, or the error."""

    status: int
    images: list[Array]
    infotexts: list[str]
    body: Any


class WebUI:
    """The API of a WebUI, small pictures and few steps by default."""

    def __init__(self, address: str, subject: str, style: str) -> None:
        self.address = address.rstrip("/")
        self.subject, self.style = subject, style
        # Of the pictures of the last answer.
        self.traces: list[str] = []

    def call(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=900) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        return status, json.loads(content) if content[:1] in (b"{", b"[", b'"') else content

    @cached_property
    def fields(self) -> set[str]:
        """What this host's txt2img takes."""
        schemas = self.call("/openapi.json")[1]["components"]["schemas"]
        return {*schemas["StableDiffusionProcessingTxt2Img"]["properties"]}

    def names(self, of: str) -> list[str]:
        """Of the host's list of samplers, upscalers, latent-upscale-modes."""
        return [one["name"] for one in self.call(f"/sdapi/v1/{of}")[1]]

    def hires(self, latent: bool = True, **settings: Any) -> dict[str, Any]:
        """A hires pass, in the latent or by an upscaler; skips where this host has no such upscaler."""
        known = [name for name in self.names("upscalers") if name and name != "None"]
        if latent:
            modes = self.names("latent-upscale-modes")
            if "Latent" not in modes:
                pytest.skip(f"this WebUI has no hires pass in the latent, but {', '.join([*modes, *known])}")
            upscaler = "Latent"
        elif known:
            upscaler = "Lanczos" if "Lanczos" in known else known[0]
        else:
            pytest.skip("this WebUI has no upscaler installed, and its hires pass needs one")
        # Forge answers 500 without the first, Classic without the second.
        needed = {"hr_additional_modules": ["Use same choices"], "hr_cfg_scale": settings.get("cfg_scale", 5)}
        return {
            **{"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.6, "hr_upscaler": upscaler},
            **{name: value for name, value in needed.items() if name in self.fields},
            **settings,
        }

    def any_hires(self, **settings: Any) -> dict[str, Any]:
        """A hires pass in the latent, or by an upscaler where this host has no other."""
        return self.hires("Latent" in self.names("latent-upscale-modes"), **settings)

    def needs_sampler(self, name: str) -> None:
        if name not in self.names("samplers"):
            pytest.skip(f"this WebUI has no sampler {name}")

    def needs_option(self, name: str) -> None:
        if name not in self.call("/sdapi/v1/options")[1]:
            pytest.skip(f"this WebUI has no option {name}")

    def prompt(self, text: str = "a cat", *, roles: bool = True, strengths: tuple[float, float] = (1, 0.8)) -> str:
        parts = (":role=subject", ":role=style") if roles else ("", "")
        names = zip((self.subject, self.style), strengths, parts, strict=True)
        return " ".join([text, *(f"<lora:{name}:{strength:g}{role}>" for name, strength, role in names)])

    def generate(self, prompt: str, fuse: Any = None, kind: str = "txt2img", **settings: Any) -> Answer:
        """`fuse`: the arguments of the extension, a dict or the panel's list."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "steps": 4,
            "width": 64,
            "height": 64,
            "seed": 11,
            "sampler_name": "Euler",
            "cfg_scale": 5,
            "save_images": False,
            **settings,
        }
        if fuse is not None:
            body["alwayson_scripts"] = {"DynFuse": {"args": fuse if isinstance(fuse, list) else [fuse]}}
        status, answer = self.call(f"/sdapi/v1/{kind}", body)
        if status != 200:
            return Answer(status, [], [], answer)
        images = [np.asarray(decoded(one).convert("RGB")).astype(np.int16) for one in answer["images"]]
        info = json.loads(answer["info"])
        self.traces = info["extra_generation_params"].get("DynFuse trace", [])
        return Answer(status, images, info["infotexts"], answer)

    def trace(self, image: int = 0, query: str = "") -> tuple[int, Any]:
        """What was chosen in one of the last answer's pictures."""
        return self.call(f"/dynfuse/v1/trace?id={self.traces[image]}{query}")


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def encoded(image: Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="session")
def webui(request: pytest.FixtureRequest) -> WebUI:
    address = request.config.getoption("--webui")
    if not address:
        pytest.skip("no --webui URL is given")
    subject, style = (request.config.getoption(f"--webui-{role}") for role in ("subject", "style"))
    if not (subject and style):
        names = [lora["name"] for lora in WebUI(address, "", "").call("/sdapi/v1/loras")[1]]
        if len(names) < 2:
            pytest.skip("the WebUI has fewer than two LoRAs")
        subject, style = subject or names[0], style or names[1]
    return WebUI(address, subject, style)
