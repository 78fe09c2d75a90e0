"""Styles as filters over a placed picture. Each has a ground, a line and a palette of its own.

A filter takes `picture`, uint8 [128, 128, 3] on white, and `inside`, bool [128, 128], the figure's pixels, and returns
uint8 [128, 128, 3]. Nothing in it lives in single pixels, so that it survives an autoencoder that shrinks eightfold.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 128
Array = np.ndarray
Filter = Callable[[Array, Array], Array]

WHITE = np.full(3, 255.0)
INK = np.array([16.0, 16.0, 18.0])


def figure(picture: Array) -> Array:
    """bool [H, W]: all but the white that is connected with the border of uint8 [H, W, 3]."""
    regions, _ = ndimage.label(picture.min(2) >= 246)
    outside = {*regions[0], *regions[-1], *regions[:, 0], *regions[:, -1]} - {0}
    return ~np.isin(regions, list(outside))


def luminance(picture: Array) -> Array:
    """float [H, W] in 0..1, Rec. 601."""
    return picture.astype(float) @ [0.299, 0.587, 0.114] / 255


def soft(mask: Array, sigma: float = 0.8) -> Array:
    """A bool mask as float opacity with a soft edge."""
    return ndimage.gaussian_filter(mask.astype(float), sigma).clip(0, 1)


def edges(picture: Array, threshold: float) -> Array:
    """bool [H, W]: where colours meet inside the figure, as a share of the strongest edge."""
    smooth = ndimage.gaussian_filter(picture.astype(float), (1, 1, 0))
    strength = np.sqrt(sum(ndimage.sobel(smooth, axis) ** 2 for axis in (0, 1))).max(2)
    return strength > threshold * max(strength.max(), 1.0)


def lines(picture: Array, inside: Array, threshold: float = 0.2, width: int = 1) -> Array:
    """float [H, W]: the lines of a drawing, colour edges and outline, `width` pixels grown."""
    outline = inside ^ ndimage.binary_erosion(inside, iterations=2)
    drawn = (edges(picture, threshold) & inside) | outline
    if width > 1:
        drawn = ndimage.binary_dilation(drawn, iterations=width - 1)
    return soft(drawn)


def over(ground: Array, colour: Array, opacity: Array) -> Array:
    """`colour` laid over `ground`, as uint8."""
    mixed = ground * (1 - opacity[..., None]) + colour * opacity[..., None]
    return mixed.round().clip(0, 255).astype(np.uint8)


def plain(*colour: float) -> Array:
    """A ground of one colour, float [SIZE, SIZE, 3]."""
    return np.full((SIZE, SIZE, 3), colour, float)


def gradient(*colours: tuple[float, float, float]) -> Array:
    """A ground that runs through the colours from top to bottom, float [SIZE, SIZE, 3]."""
    stops, rows = np.linspace(0, 1, len(colours)), np.linspace(0, 1, SIZE)
    column = np.stack([np.interp(rows, stops, channel) for channel in zip(*colours, strict=True)], 1)
    return column[:, None].repeat(SIZE, 1)


def gradient_map(picture: Array, *colours: tuple[float, float, float]) -> Array:
    """Dark to light of the picture through the colours, float [H, W, 3]."""
    stops, light = np.linspace(0, 1, len(colours)), luminance(picture)
    return np.stack([np.interp(light, stops, channel) for channel in zip(*colours, strict=True)], 2)


def few_colours(picture: Array, count: int) -> Array:
    """The picture in at most `count` colours, float [H, W, 3]."""
    return np.asarray(Image.fromarray(picture).quantize(count).convert("RGB"), float)


def ink(picture: Array, inside: Array) -> Array:
    dark = ndimage.gaussian_filter(luminance(picture), 1) < 0.42
    drawn = np.maximum(soft(dark & inside), lines(picture, inside, 0.22, 2))
    return over(plain(*WHITE), INK, drawn)


def neon(picture: Array, inside: Array) -> Array:
    drawn = lines(picture, inside, 0.2)
    tube = gradient((255, 60, 220), (60, 230, 120), (60, 130, 255))
    glow = (ndimage.gaussian_filter(drawn, 3.5) * 2.0).clip(0, 0.75)[..., None]
    lit = plain(8, 6, 22) + tube * glow + tube * drawn[..., None] + (255 - tube) * 0.8 * drawn[..., None] ** 2
    return lit.clip(0, 255).astype(np.uint8)


def blueprint(picture: Array, inside: Array) -> Array:
    ground = plain(24, 62, 138)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    ground[(rows % 16 < 2) | (columns % 16 < 2)] += (12, 16, 22)
    return over(ground, np.array([225.0, 238.0, 255.0]), lines(picture, inside))


def woodcut(picture: Array, inside: Array) -> Array:
    light = ndimage.gaussian_filter(luminance(picture), 1)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    hatch = (np.sin((rows + 0.4 * columns) * 2 * np.pi / 8) + 1) / 2
    carved = ((light < 0.28) | ((light < 0.7) & (hatch > light + 0.05))) & inside
    return over(plain(240, 226, 190), np.array([110.0, 36.0, 24.0]), np.maximum(soft(carved), lines(picture, inside)))


def sunset(picture: Array, inside: Array) -> Array:
    mapped = gradient_map(picture, (38, 12, 66), (150, 30, 110), (240, 90, 70), (255, 190, 90), (255, 245, 200))
    return over(gradient((255, 205, 155), (150, 60, 120)), mapped, soft(inside))


def pixels(picture: Array, inside: Array, cells: int = 16) -> Array:
    side = SIZE // cells
    cover = inside.reshape(cells, side, cells, side).mean((1, 3))
    weights = np.where(inside, 1.0, 1e-3)[..., None]
    shape = (cells, side, cells, side, -1)
    colour = (picture * weights).reshape(shape).sum((1, 3)) / weights.reshape(shape).sum((1, 3))
    small = few_colours(colour.astype(np.uint8), 7)
    small[cover <= 0.45] = (196, 222, 160)
    return small.astype(np.uint8).repeat(side, 0).repeat(side, 1)


def glass(picture: Array, inside: Array) -> Array:
    """Panes round points of a jittered grid, each in the mean colour of what it covers."""
    count = 9
    random = np.random.default_rng(1)
    grid = (np.argwhere(np.ones((count, count))) + 0.5) * SIZE / count
    points = grid + random.uniform(-0.32, 0.32, grid.shape) * SIZE / count
    rows, columns = np.mgrid[:SIZE, :SIZE]
    cell = ((rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2).argmin(2)
    pane = cell + len(points) * inside
    sums = np.stack([np.bincount(pane.ravel(), picture[..., c].ravel(), 2 * len(points)) for c in range(3)], 1)
    colour = sums / np.bincount(pane.ravel(), minlength=2 * len(points)).clip(1)[:, None]
    colour[: len(points)] = random.normal((105, 155, 205), 16, (len(points), 3))
    leading = ndimage.maximum_filter(pane, 3) != ndimage.minimum_filter(pane, 3)
    return over((colour[pane] * 1.1).clip(0, 255), INK, soft(leading))


def papercut(picture: Array, inside: Array) -> Array:
    ground = plain(236, 150, 110)
    fallen = ndimage.shift(ndimage.binary_dilation(inside, iterations=3), (5, 5), order=0)
    shade = over(ground, ground * 0.5, soft(fallen, 2) * 0.8)
    rim = over(shade, np.array([255.0, 250.0, 240.0]), soft(ndimage.binary_dilation(inside, iterations=4)))
    return over(rim, few_colours(ndimage.median_filter(picture, (5, 5, 1)), 6), soft(inside))


def chalk(picture: Array, inside: Array) -> Array:
    grain = np.random.default_rng(0).normal(0, 1, (2, SIZE, SIZE))
    board = plain(38, 62, 50) + ndimage.gaussian_filter(grain[0], 5)[..., None] * 30
    rough = (0.95 + 1.6 * ndimage.gaussian_filter(grain[1], 2.5)).clip(0.6, 1)
    return over(board, np.array([240.0, 238.0, 225.0]), lines(picture, inside, 0.2, 2) * rough)


def mint(picture: Array, inside: Array) -> Array:
    mapped = gradient_map(picture, (8, 40, 58), (20, 110, 110), (110, 190, 160), (235, 250, 225))
    return over(plain(214, 240, 222), mapped, soft(inside))


FILTERS: dict[str, Filter] = {
    style.__name__: style for style in (ink, neon, blueprint, woodcut, sunset, pixels, glass, papercut, chalk, mint)
}
