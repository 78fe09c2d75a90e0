"""A small classifier that says which subject and which style a picture shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import (
    adaptive_avg_pool2d,
    affine_grid,
    avg_pool2d,
    cross_entropy,
    grid_sample,
    interpolate,
    max_pool2d,
)

from lib_dynfuse.demo import loop, split
from lib_dynfuse.demo.data import Pictures

BOX = Path(__file__).with_name("judge")
PIXELS = 64
WIDTHS = (32, 64, 128, 192)
HELD_OUT_SEED = 6
SUBJECTS = (*split.BASE_SUBJECTS, *split.HELD_SUBJECTS)
# Beside the judge: what it takes to tell the other subjects too.
FRESH = "fresh.safetensors"


def block(inside: int, outside: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(8, outside), nn.SiLU(inplace=True)
    )


class SubjectNet(nn.Module):
    """Pictures [N, 3, 64, 64] in -1..1 to the logits of `count` subjects: by shape first, whatever the style."""

    def __init__(self, count: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.widths = widths
        layers = [block(3, widths[0], 2)]
        for inside, width in pairwise(widths):
            layers += [block(inside, width, 2), block(width, width, 1)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * widths[-1], count)

    @torch.no_grad()
    def responses(self, images: torch.Tensor) -> torch.Tensor:
        """How every layer responds to pictures [N, 3, 64, 64], wherever it does: means and deviations [N, C]."""
        found, h = [], images
        for layer in self.features:
            h = layer(h)
            found += [h.mean((2, 3)), h.std((2, 3))]
        return torch.cat(found, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Quarter by quarter: a crown sits on top, a carrot's leaves do too.
        return self.head(adaptive_avg_pool2d(self.features(images), 2).flatten(1))


# Cells a side of the colour cube; two grids, so that a palette's colour that one cuts in two is whole in the other.
CELLS = (8, 5)
# Bounds of the histogram of differences between neighbours, in 256ths: flat areas, soft shading, edges.
DIFFERENCES = (0.5, 1.5, 2.5, 3.5, 5.5, 8.5, 12.5, 20.5, 32.5, 64.5, 128.5)


def style_features(images: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] in -1..1 to histograms [N, 649]: the ink's colours, and differences between neighbours.

    Every set of emoji is drawn from a palette of its own and shaded in its own way; what a picture shows is not seen.
    Square roots of shares, so that a small patch of a telling colour counts.
    """
    levels = ((images + 1) * 127.5).round().clamp(0, 255)
    ink = (levels < 250).any(1).flatten(1).to(levels.dtype)
    found = []
    for cells in CELLS:
        place = (levels / 256 * cells).long()
        place = ((place[:, 0] * cells + place[:, 1]) * cells + place[:, 2]).flatten(1)
        counts = levels.new_zeros(len(levels), cells**3).scatter_add_(1, place, ink)
        found.append(counts / ink.sum(1, keepdim=True).clamp(min=1))
    down, right = levels.diff(dim=2)[..., :-1].abs(), levels.diff(dim=3)[:, :, :-1].abs()
    steps = torch.maximum(down, right).amax(1).flatten(1)
    bounds = torch.tensor(DIFFERENCES, device=levels.device)
    counts = levels.new_zeros(len(levels), len(DIFFERENCES) + 1)
    counts.scatter_add_(1, torch.bucketize(steps, bounds), torch.ones_like(steps))
    return torch.cat([*found, counts / steps.shape[1]], 1).sqrt()


class StyleNet(nn.Module):
    """Features [N, size] to the logits of `count` styles, by two small networks whose shares are averaged.

    The first `colours` features are `style_features`, the others a subject network's responses. One network sees the
    colours alone, which decide on clean pictures; the other sees all, which helps where colours are smeared.
    """

    centre: torch.Tensor
    width: torch.Tensor

    def __init__(self, count: int, size: int, colours: int, hidden: int = 128) -> None:
        super().__init__()
        self.colours = colours
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("width", torch.ones(size))
        self.palette, self.whole = small_network(colours, hidden, count), small_network(size, hidden, count)

    def logits(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the two networks, for training."""
        features = (features - self.centre) / self.width
        return self.palette(features[:, : self.colours]), self.whole(features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        palette, whole = self.logits(features)
        return palette.softmax(1) + whole.softmax(1)


def small_network(size: int, hidden: int, count: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(size, hidden), nn.GELU(), nn.Dropout(0.3), nn.Linear(hidden, count))


def features_of(subject: SubjectNet, images: torch.Tensor) -> torch.Tensor:
    """What the style is told from: pictures [N, 3, 64, 64] in -1..1 to [N, size]."""
    return torch.cat([style_features(images), subject.responses(images)], 1)


def style_net(subject: SubjectNet, count: int) -> StyleNet:
    """An untrained one, of the size that goes with a subject network."""
    blank = torch.ones(1, 3, PIXELS, PIXELS)
    return StyleNet(count, features_of(subject, blank).shape[1], style_features(blank).shape[1])


class Judge(nn.Module):
    """Pictures in, the most likely subject and style out.

    `subjects` and `styles` say what the indices mean; fluent's three shadings are one style.
    """

    def __init__(self, subjects: list[str], styles: list[str], widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.subjects, self.styles, self.widths = subjects, styles, widths
        self.subject = SubjectNet(len(subjects), widths)
        self.style = style_net(self.subject, len(styles))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N, 3, H, W] in 0..1, of any size, to subject [N] and style [N] indices.

        The subject is what a picture and its mirror image look like together.
        """
        if images.shape[-2:] != (PIXELS, PIXELS):
            images = interpolate(images, (PIXELS, PIXELS), mode="bilinear", antialias=True)
        images = images.float() * 2 - 1
        subject = self.subject(images).softmax(1) + self.subject(images.flip(3)).softmax(1)
        return subject.argmax(1), self.style(features_of(self.subject, images)).argmax(1)

    def save(self, folder: Path) -> None:
        """Writes judge.safetensors (fp16) and judge.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        config = {"subjects": self.subjects, "styles": self.styles, "widths": self.widths}
        (folder / "judge.json").write_text(json.dumps(config) + "\n")

    @classmethod
    def load(cls, folder: Path = BOX, fresh: bool = False) -> Judge:
        """The judge in a folder that `save` wrote, in float32 on the CPU; `fresh`: it also knows `MORE_SUBJECTS`."""
        judge = cls(**json.loads((folder / "judge.json").read_text()))
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
        if fresh:
            more = load_file(folder / FRESH)
            head = judge.subject.head
            head.weight, head.bias = (
                nn.Parameter(torch.cat([old, more[name].float()])) for name, old in head.named_parameters()
            )
            judge.subjects = [*judge.subjects, *split.MORE_SUBJECTS]
        return judge.float().eval()


def held_out(pictures: Pictures) -> np.ndarray:
    """[N] True for what the judge never trains on: one picture of each subject of the split, its style drawn by lot.

    A truth picture may be among what it trains on: it has to know a high-contrast fox when it sees one. The networks
    that it judges never see one.
    """
    mask = np.zeros(len(pictures), dtype=bool)
    generator = np.random.default_rng(HELD_OUT_SEED)
    for name in SUBJECTS:
        mask[generator.choice(pictures.where((name,), split.STYLES))] = True
    return mask


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1, each moved, scaled, turned and mirrored at random, on white."""
    count, device = len(images), images.device

    def draw(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(device)

    angle, wide, tall = draw(-0.25, 0.25), draw(0.85, 1.2), draw(0.92, 1.08)
    mirror = torch.where(draw() < 0.5, -1.0, 1.0)
    matrix = torch.stack(
        [
            torch.stack([wide * angle.cos() * mirror, -wide * angle.sin(), draw(-0.12, 0.12)], 1),
            torch.stack([tall * wide * angle.sin() * mirror, tall * wide * angle.cos(), draw(-0.12, 0.12)], 1),
        ],
        1,
    )
    # Around 1, which is white, so that what comes in from outside is paper.
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return 1 + grid_sample(images - 1, grid, align_corners=False)


def blurred(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1, each a little softer or sharper, and noisy."""
    count, device = len(images), images.device
    soft = interpolate(avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.lerp(images, soft, (torch.rand(count, 1, 1, 1, generator=generator) * 1.2 - 0.5).to(device))
    noise = torch.randn(images.shape, generator=generator).to(device)
    return (images + 0.1 * torch.rand(count, 1, 1, 1, generator=generator).to(device) * noise).clamp(-1, 1)


def recoloured(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1, each in another tint, a fifth in grey: shape alone has to be enough."""
    count, device = len(images), images.device
    grey = torch.rand(count, 1, 1, 1, generator=generator).to(device) < 0.2
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    return 1 + (images - 1) * (0.7 + 0.4 * torch.rand(count, 3, 1, 1, generator=generator)).to(device)


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


@dataclass(frozen=True)
class Lessons:
    """What a judge learns from.

    `pictures` of 64 pixels; `redrawn`, uint8 and shaped like them, as the autoencoder draws them from noisy latents:
    half of what a judge sees comes from here, so that it is at home with generated pictures. `more` are the same
    subjects by other hands, uint8 [M, 3, 64, 64], and `more_subjects` [M] says which they show: no style of ours, but a
    subject that is known from six hands is known from a seventh.
    """

    pictures: Pictures
    redrawn: torch.Tensor
    more: torch.Tensor
    more_subjects: np.ndarray

    def __post_init__(self) -> None:
        if self.redrawn.shape != self.pictures.images.shape:
            raise ValueError(f"redrawn is {list(self.redrawn.shape)}, the pictures {list(self.pictures.images.shape)}")

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pictures [B, 3, 64, 64] in -1..1, half of them redrawn; indices past the pictures' end are of `more`."""
        ours = index < len(self.pictures)
        place = torch.where(ours, index, 0)
        again = (torch.rand(len(index), generator=generator) < 0.5)[:, None, None, None]
        images = torch.where(again, self.redrawn[place], self.pictures.images[place])
        images[~ours] = self.more[index[~ours] - len(self.pictures)]
        return images.float() / 127.5 - 1


def train_subject(
    file: Path, lessons: Lessons, *, batch: int, schedule: loop.Schedule, device: torch.device, bar: bool = True
) -> tuple[SubjectNet, loop.Curve]:
    """Trains on all subjects of the data, half of the time on those of the split; returns a network with all logits.

    The pictures that are held out are left out; all styles are learnt, and line drawings made from them.
    """
    torch.manual_seed(5)
    pictures = lessons.pictures
    net = SubjectNet(len(pictures.names)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    subject = torch.from_numpy(np.concatenate([pictures.subject, lessons.more_subjects])).long()
    held = np.concatenate([held_out(pictures), np.zeros(len(lessons.more), dtype=bool)])
    known = torch.tensor([pictures.names.index(name) for name in SUBJECTS if name in pictures.names])
    all_of = torch.from_numpy(np.flatnonzero(~held))
    ours = all_of[torch.isin(subject[all_of], known)]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.cat([of[torch.randint(len(of), (batch // 2,), generator=generator)] for of in (ours, all_of)])
        images = lessons.draw(index, generator).to(device)
        drawn = torch.rand(len(index), generator=generator) < 0.2
        images[drawn] = line_art(images[drawn], generator)
        made = net(blurred(recoloured(moved(images, generator), generator), generator))
        return cross_entropy(made, subject[index].to(device), label_smoothing=0.1)

    curve = loop.train(file, net, loss, schedule, seed=5, bar=bar)
    return net.cpu().eval(), curve


def of_subjects(net: SubjectNet, pictures: Pictures, subjects: Sequence[str]) -> SubjectNet:
    """The network with the logits of these subjects alone, those that the data has, in this order."""
    known = torch.tensor([pictures.names.index(name) for name in subjects if name in pictures.names])
    kept = SubjectNet(len(known), net.widths)
    state = net.state_dict()
    kept.load_state_dict({**state, "head.weight": state["head.weight"][known], "head.bias": state["head.bias"][known]})
    return kept.eval()


def save_fresh(net: SubjectNet, pictures: Pictures, folder: Path) -> None:
    """Writes the part of `MORE_SUBJECTS` of the head of a network that `train_subject` returned."""
    head = of_subjects(net, pictures, split.MORE_SUBJECTS).head
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().half().contiguous() for name, value in head.named_parameters()}, folder / FRESH)


def train_style(
    file: Path,
    lessons: Lessons,
    subject: SubjectNet,
    *,
    batch: int,
    schedule: loop.Schedule,
    device: torch.device,
    bar: bool = True,
) -> tuple[StyleNet, loop.Curve]:
    """Trains on all pictures but those held out, each style as often.

    Their colours are left alone: each is seen as it is, moved, and softened, and so is the autoencoder's drawing of it.

    Args:
        subject: a trained one, on the CPU, whose responses are looked at too.
    """
    torch.manual_seed(6)
    pictures = lessons.pictures
    judged = np.array([split.JUDGED_STYLES.index(split.JUDGED_AS[style]) for style in pictures.styles])[pictures.style]
    held = held_out(pictures)
    of_style = [torch.from_numpy(np.flatnonzero(~held & (judged == number))) for number in np.unique(judged)]
    style = torch.from_numpy(judged).to(device)
    views = _style_views(lessons, subject.to(device), device)
    net = style_net(subject.cpu(), len(split.JUDGED_STYLES)).to(device)
    seen = views[:, torch.from_numpy(~held).to(device)]
    net.centre.copy_(seen.mean((0, 1)))
    net.width.copy_(seen.std((0, 1)) + 0.02)  # a colour that is hardly ever seen must not shout when it is

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # of the dropout
        each = max(1, batch // len(of_style))
        index = torch.cat([of[torch.randint(len(of), (each,), generator=generator)] for of in of_style]).to(device)
        view = torch.randint(len(views), (len(index),), generator=generator).to(device)
        both = net.logits(views[view, index])
        return sum(
            (cross_entropy(one, style[index], label_smoothing=0.02) for one in both), torch.zeros((), device=device)
        )

    curve = loop.train(file, net, loss, schedule, seed=6, bar=bar)
    return net.cpu().eval(), curve


def _style_views(lessons: Lessons, subject: SubjectNet, device: torch.device) -> torch.Tensor:
    """[6, N, features] of every picture and of its redrawing: as it is, moved, and softened."""
    generator = torch.Generator().manual_seed(7)
    views = []
    for source in (lessons.pictures.images, lessons.redrawn):
        for change in (None, moved, blurred):
            parts = (part.float() / 127.5 - 1 for part in source.split(256))
            changed = (part if change is None else change(part, generator) for part in parts)
            views.append(torch.cat([features_of(subject, part.to(device)) for part in changed]))
    return torch.stack(views)


def assembled(subject: SubjectNet, style: StyleNet, pictures: Pictures) -> Judge:
    """The judge of two trained halves."""
    judge = Judge([name for name in SUBJECTS if name in pictures.names], list(split.JUDGED_STYLES), subject.widths)
    judge.subject, judge.style = subject, style
    return judge.eval()


def accuracy(judge: Judge, pictures: Pictures, index: np.ndarray) -> dict[str, float]:
    """Share of real pictures judged right, by subject and by style."""
    subject, style = judge(pictures.images[index].float() / 255)
    subjects = [judge.subjects.index(pictures.names[k]) for k in pictures.subject[index]]
    styles = [judge.styles.index(split.JUDGED_AS[pictures.styles[k]]) for k in pictures.style[index]]
    return {
        "subject": float((subject == torch.tensor(subjects)).float().mean()),
        "style": float((style == torch.tensor(styles)).float().mean()),
    }
