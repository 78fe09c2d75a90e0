"""What an encoder does to a picture before it looks: resize, crop, normalise, as its library does, with a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

Size = tuple[int, int]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
# PIL's numbers, which transformers writes into preprocessor_config.json.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """Sizes are (height, width).

    `resize`: to "squash" a picture to `size` as it stands, or to keep its shape so that it covers `size` ("shortest")
    or lies within it ("longest"). `crop`: what is kept of the middle; what is missing there becomes `fill`, 0..1.
    `floor`: of two equal halves of an odd margin the smaller comes first, always (transformers) or by rounding to even
    (torchvision).
    """

    size: Size
    crop: Size | None = None
    resize: Literal["squash", "shortest", "longest"] = "shortest"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fill: float = 0.0
    floor: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> [B, 3, h, w] normalised, float32, differentiable."""
        images = images.float()
        height, width = self._resized(images.shape[-2], images.shape[-1])
        # Across, then down, each cut off at black and white: bicubic overshoots, and a picture of bytes cannot follow.
        for size in ((images.shape[-2], width), (height, width)):
            if size != tuple(images.shape[-2:]):
                images = interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
                images = images.clamp(0.0, 1.0)
        if self.crop is not None:
            images = self._cropped(images, self.crop)
        # Plain numbers: a tensor of them would have to be copied to the device at every step.
        channels = zip(images.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)

    def _resized(self, height: int, width: int) -> Size:
        if self.resize == "squash":
            return self.size
        ratios = height / self.size[0], width / self.size[1]
        if self.resize == "shortest" and self.size[0] == self.size[1]:
            # The longer side is cut down here and rounded below: so do the libraries.
            side = self.size[0]
            return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
        ratio = min(ratios) if self.resize == "shortest" else max(ratios)
        return round(height / ratio), round(width / ratio)

    def _cropped(self, images: Tensor, crop: Size) -> Tensor:
        lacking = [max(0, wanted - have) for wanted, have in zip(crop, images.shape[-2:], strict=True)]
        if any(lacking):
            top, left = (side // 2 for side in lacking)
            images = pad(images, (left, lacking[1] - left, top, lacking[0] - top), value=self.fill)
        top, left = (self._margin(have - wanted) for wanted, have in zip(crop, images.shape[-2:], strict=True))
        return images[..., top : top + crop[0], left : left + crop[1]]

    def _margin(self, spare: int) -> int:
        return spare // 2 if self.floor else round(spare / 2)


def from_open_clip(size: int | Sequence[int], settings: Mapping[str, Any]) -> Preprocess:
    """`size`: what the image tower takes. `settings`: open_clip's preprocess_cfg, or a part of it.

    Raises ValueError where one of the settings is not known.
    """
    sides = _pair(size)
    # open_clip takes "random" for bicubic whenever it is not training.
    given = settings.get("interpolation") or "bicubic"
    return Preprocess(
        size=sides,
        crop=sides,
        resize=_one_of(settings.get("resize_mode") or "shortest", ("shortest", "longest", "squash")),
        interpolation=_one_of("bicubic" if given == "random" else given, ("bicubic", "bilinear")),
        mean=_three(settings.get("mean") or CLIP_MEAN),
        std=_three(settings.get("std") or CLIP_STD),
        fill=float(settings.get("fill_color") or 0) / 255,
    )


def from_transformers(settings: Mapping[str, Any]) -> Preprocess:
    """`settings`: a preprocessor_config.json, of transformers' ViT or Bit image processor (the latter is DINOv2's).

    Raises ValueError where it says something that is not known.
    """
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViT")
    bit = kind.startswith("Bit")
    size = settings.get("size") or 224
    if not isinstance(size, Mapping):
        size = {"shortest_edge": size} if bit else dict(zip(("height", "width"), _pair(size), strict=True))
    covers = "shortest_edge" in size
    crop = settings.get("crop_size") or 224
    sides = _pair(size["shortest_edge"]) if covers else (int(size["height"]), int(size["width"]))
    number = settings.get("resample", 3 if bit else 2)
    if number not in _RESAMPLE:
        raise ValueError(f"resample {number} is not known; known are 2 (bilinear) and 3 (bicubic)")
    normal = settings.get("do_normalize", True)
    return Preprocess(
        size=sides,
        crop=_pair(crop) if settings.get("do_center_crop", bit) else None,
        resize="shortest" if covers else "squash",
        interpolation=_RESAMPLE[number],
        mean=_three(settings.get("image_mean") or (CLIP_MEAN if bit else _HALF)) if normal else (0.0,) * 3,
        std=_three(settings.get("image_std") or (CLIP_STD if bit else _HALF)) if normal else (1.0,) * 3,
        floor=True,
    )


def _pair(size: Any) -> Size:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    sides = list(size) if isinstance(size, Sequence) else [size, size]
    return int(sides[0]), int(sides[-1])


def _three(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values) if isinstance(values, Sequence) else (float(values),) * 3


def _one_of(value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise ValueError(f"{value} is not known; known are {', '.join(known)}")
    return value
