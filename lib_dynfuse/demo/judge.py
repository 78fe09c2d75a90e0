"""A small classifier that says which subject and which style a picture shows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate, max_pool2d

from lib_dynfuse.demo import loop, split
from lib_dynfuse.demo.data import Pictures

BOX = Path(__file__).with_name("judge")
PIXELS = 64
WIDTHS = (32, 64, 128, 160)


def block(inside: int, outside: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(8, outside), nn.SiLU(inplace=True)
    )


class Judge(nn.Module):
    """Pictures in, the most likely subject and style out.

    `subjects` and `styles` say what the indices mean; fluent's three shadings are one style.
    """

    def __init__(self, subjects: list[str], styles: list[str], widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.subjects, self.styles, self.widths = subjects, styles, widths
        layers = [block(3, widths[0], 2)]
        for inside, width in pairwise(widths):
            layers += [block(inside, width, 2), block(width, width, 1)]
        self.early, self.late = nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])
        self.subject = nn.Linear(widths[-1], len(subjects))
        self.style = nn.Linear(widths[-1] + widths[1], len(styles))

    def logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N, 3, 64, 64] in -1..1 to the logits of subject [N, subjects] and style [N, styles]."""
        early = self.early(images)
        late = self.late(early).mean((2, 3))
        # Line weight and shading are local, so the style head also sees how the first layers respond on average.
        return self.subject(late), self.style(torch.cat([late, early.mean((2, 3))], 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N, 3, H, W] in 0..1, of any size, to subject [N] and style [N] indices."""
        if images.shape[-2:] != (PIXELS, PIXELS):
            images = interpolate(images, (PIXELS, PIXELS), mode="bilinear", antialias=True)
        subject, style = self.logits(images.float() * 2 - 1)
        return subject.argmax(1), style.argmax(1)

    def save(self, folder: Path) -> None:
        """Writes judge.safetensors (fp16) and judge.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        config = {"subjects": self.subjects, "styles": self.styles, "widths": self.widths}
        (folder / "judge.json").write_text(json.dumps(config) + "\n")

    @classmethod
    def load(cls, folder: Path = BOX) -> Judge:
        """The judge in a folder that `save` wrote, in float32 on the CPU."""
        judge = cls(**json.loads((folder / "judge.json").read_text()))
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
        return judge.float().eval()


def held_out(pictures: Pictures) -> np.ndarray:
    """[N] True for what the judge never trains on: one picture of each subject of the split, its style drawn by lot.

    A truth picture may be among what it trains on: it has to know a high-contrast fox when it sees one. The networks
    that it judges never see one.
    """
    mask = np.zeros(len(pictures), dtype=bool)
    generator = np.random.default_rng(5)
    for name in (*split.BASE_SUBJECTS, *split.HELD_SUBJECTS):
        mask[generator.choice(pictures.where((name,), split.STYLES))] = True
    return mask


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1, each moved, scaled, turned, mirrored, tinted, blurred and made noisy at random.

    A fifth lose their colour, so that shape alone has to be enough.
    """
    count, device = len(images), images.device

    def draw(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    angle, scale = draw(low=-0.2, high=0.2), draw(low=0.85, high=1.2)
    mirror = torch.where(draw() < 0.5, -1.0, 1.0)
    matrix = torch.stack(
        [
            torch.stack([scale * angle.cos() * mirror, -scale * angle.sin(), draw(low=-0.12, high=0.12)], 1),
            torch.stack([scale * angle.sin() * mirror, scale * angle.cos(), draw(low=-0.12, high=0.12)], 1),
        ],
        1,
    )
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    # Around 1, which is white, so that what comes in from outside is paper.
    images = 1 + grid_sample(images - 1, grid, align_corners=False)
    grey = images.mean(1, keepdim=True).expand_as(images)
    images = torch.where((draw(1, 1, 1) < 0.2), grey, images)
    images = 1 + (images - 1) * draw(3, 1, 1, low=0.7, high=1.1)
    soft = interpolate(avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.lerp(images, soft, draw(1, 1, 1, low=-0.5, high=0.7))
    noise = torch.randn(images.shape, generator=generator).to(device)
    return (images + 0.1 * draw(1, 1, 1) * noise).clamp(-1, 1)


def line_art(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 as black drawings on white: edges, or silhouettes with the edges left out.

    So a subject that the judge has never seen in high contrast is not new to it there.
    """
    down, right = images.diff(dim=2, prepend=images[:, :, :1]), images.diff(dim=3, prepend=images[..., :1])
    edges = (4 * (down.abs() + right.abs()).mean(1, keepdim=True)).clamp(0, 1)
    edges = max_pool2d(edges, 3, 1, 1)
    body = (4 * (1 - images).mean(1, keepdim=True)).clamp(0, 1)
    filled = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    ink = torch.where(filled, body * (1 - 0.9 * edges), edges)
    return (1 - 2 * ink).expand_as(images)


def train(
    file: Path,
    pictures: Pictures,
    redrawn: torch.Tensor,
    *,
    batch: int,
    schedule: loop.Schedule,
    device: torch.device,
    bar: bool = True,
) -> tuple[Judge, loop.Curve]:
    """Trains on the subjects of the split in all styles, but for the pictures that are held out.

    Style it learns from all the other subjects too, each style as often.

    Args:
        pictures: of 64 pixels.
        redrawn: uint8, shaped like the pictures: as the autoencoder draws them from noisy latents. Half of what
            it sees comes from here, so that the judge is at home with generated pictures.
    """
    torch.manual_seed(5)
    known, styles = (*split.BASE_SUBJECTS, *split.HELD_SUBJECTS), list(split.JUDGED_STYLES)
    judge = Judge(list(known), styles).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    held = held_out(pictures)
    ours = torch.from_numpy(np.setdiff1d(pictures.where(known, split.STYLES), np.flatnonzero(held)))
    place = torch.tensor([known.index(name) if name in known else -100 for name in pictures.names])
    subject = place[torch.from_numpy(pictures.subject)]
    judged = torch.tensor([styles.index(split.JUDGED_AS[style]) for style in pictures.styles])
    style = judged[torch.from_numpy(pictures.style)]
    of_style = [torch.from_numpy(np.flatnonzero(~held & (style.numpy() == number))) for number in range(len(styles))]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        half, of_each = batch // 2, batch // (2 * len(styles))
        parts = [(ours, half), *((one, of_each) for one in of_style)]
        index = torch.cat([of[torch.randint(len(of), (count,), generator=generator)] for of, count in parts])
        again = (torch.rand(len(index), generator=generator) < 0.5)[:, None, None, None]
        images = torch.where(again, redrawn[index], pictures.images[index]).to(device).float() / 127.5 - 1
        drawn = (torch.rand(len(index), generator=generator) < 0.3) & (torch.arange(len(index)) < half)
        images[drawn] = line_art(images[drawn], generator)
        made = judge.logits(vary(images, generator))
        styled = torch.where(drawn, -100, style[index]).to(device)  # a line drawing of ours has no artist's style
        by_subject = cross_entropy(made[0], subject[index].to(device), label_smoothing=0.1)
        return by_subject + cross_entropy(made[1], styled)

    curve = loop.train(file, judge, loss, schedule, seed=5, bar=bar)
    return judge.cpu(), curve


def accuracy(judge: Judge, pictures: Pictures, index: np.ndarray) -> dict[str, float]:
    """Share of real pictures judged right, by subject and by style."""
    subject, style = judge(pictures.images[index].float() / 255)
    subjects = [judge.subjects.index(pictures.names[k]) for k in pictures.subject[index]]
    styles = [judge.styles.index(split.JUDGED_AS[pictures.styles[k]]) for k in pictures.style[index]]
    return {
        "subject": float((subject == torch.tensor(subjects)).float().mean()),
        "style": float((style == torch.tensor(styles)).float().mean()),
    }
