"""CSD: how alike two pictures are in style (Somepalli et al., arXiv 2404.01292).

CLIP ViT-L/14's image tower without its projection, 1024 wide, times the style head; cosines of what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib_dynfuse.guidance import weights
from lib_dynfuse.guidance.libraries import EncoderError, library
from lib_dynfuse.guidance.preprocess import Preprocess, from_open_clip
from lib_dynfuse.guidance.sources import Source

_TOWER, _HEAD = "backbone.", "last_layer_style"
_HEAD_WIDTH = 64  # of every published CLIP tower


class CsdEncoder:
    """The tower and the style head; looked through only."""

    def __init__(self, name: str, tower: Any, head: Tensor, preprocess: Preprocess, device: torch.device | str) -> None:
        self.name = name
        self._device = torch.device(device)
        self._tower = tower.eval().requires_grad_(False).to(self._device)
        self._head = head.float().to(self._device)
        self._preprocess = preprocess

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in 0..1 -> [B, D] float32 of length 1."""
        return normalize(self._tower(self._preprocess(images.to(self._device))).float() @ self._head, dim=-1)

    def nearness(self, images: Tensor, style: Sequence[Tensor]) -> Tensor:
        """[B] cosines to the mean direction of the style's pictures."""
        mean = normalize(torch.cat([self.image(one) for one in style]).mean(0), dim=-1)
        return (self.image(images) @ mean).cpu()


def load_csd(where: str, source: Source, device: torch.device | str = "cpu") -> CsdEncoder:
    """`where`: the authors' checkpoint, a file or a folder with one; looked for in the source's folder first.

    The tower's sizes are read from its weights. Raises EncoderError that says what to put where.
    """
    found = weights.find([where], source)
    if found is None:
        raise EncoderError(f"CSD {where}: there is no such file; put the checkpoint at {source.title}/{where}.pth")
    path = weights.in_folder(found, source) if found.is_dir() else found
    state = {name.removeprefix("module."): value for name, value in weights.state_dict(path, source).items()}
    shown = source.shown(path)
    tower = {name.removeprefix(_TOWER): value for name, value in state.items() if name.startswith(_TOWER)}
    if _HEAD not in state or "conv1.weight" not in tower or "positional_embedding" not in tower:
        raise EncoderError(f"{shown} is no CSD checkpoint: it lacks {_HEAD} or the tower {_TOWER}conv1.weight")
    visual, size = _tower(tower)
    tower.pop("proj", None)
    try:
        visual.load_state_dict({name: value.float() for name, value in tower.items()})
    except RuntimeError as error:
        said = str(error).splitlines()[-1].strip()
        raise EncoderError(f"{shown} has another tower than CLIP's: {said}") from error
    return CsdEncoder(
        f"CSD {path.stem}, ViT/{visual.patch_size[0]} {size}", visual, state[_HEAD], from_open_clip(size, {}), device
    )


def _tower(state: dict[str, Tensor]) -> tuple[Any, int]:
    """An image tower of the right sizes, without projection, and the side of the pictures that it takes."""
    library("open_clip", "open_clip_torch")
    from open_clip.transformer import QuickGELU, VisionTransformer

    width, _, patch, _ = state["conv1.weight"].shape
    side = round((len(state["positional_embedding"]) - 1) ** 0.5) * patch
    layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
    visual = VisionTransformer(side, patch, width, layers, max(1, width // _HEAD_WIDTH), 4.0, act_layer=QuickGELU)
    visual.proj = None
    return visual, side
