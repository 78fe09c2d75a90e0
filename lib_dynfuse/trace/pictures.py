"""Pictures of what was chosen: a heat map over steps and blocks, and an overlay of the choice on the image itself.

Drawn with matplotlib's `Figure` alone: no pyplot, no global state, no display.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from .blocks import block_of
from .record import Record

Array = npt.NDArray[np.float32]
DPI = 100
_TEXT = 9  # points; 12 pixels at DPI
_GREY = "#555555"
_CURVE = 0.9  # inches high
# Orange to purple can be told apart in every common colour blindness; its middle is neutral.
_COLOURS = "PuOr"
_NOTHING = "#c8c8c8"
# Their tokens are the prompt's words, not places in the picture. A part of a fused layer ends in [start:stop].
_WORDS = re.compile(r"(?:^|\.)(?:attn2\.to_[kv]|txt_(?:attn|mlp|mod))(?:\.|\[|$)")


def heat_map(record: Record, image: int = 0) -> Figure:
    """Steps across, blocks down, each cell the style's share of what was applied there; right, the share per block.

    Several forward passes of one step, a block's layers, and the picture's cond and uncond rows are averaged; cells
    where nothing was recorded are grey. Of a picture that was nudged a curve below shows how R fell. Raises ValueError
    if the record has no such picture.
    """
    blocks, steps, cells = style_by_block(record, image)
    nudged, _ = record.curve(image)
    width = min(max(3.4, 0.2 * len(steps)), 9.0)
    height = max(1.3, 0.27 * len(blocks)) if blocks else 0.0
    figure = _figure(width + 1.6, height + 1.65 + (_CURVE + 0.35 if nudged else 0.0))
    if blocks:
        axes = _axes(figure, left=0.9, top=0.65, width=width, height=height)
        axes.imshow(
            np.ma.masked_invalid(cells), cmap=_colours(), vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_yticks(range(len(blocks)), blocks)
        _count_steps(axes, steps)
        _quiet(axes)
        _beside(axes, -0.5, "style", bottom=True)
        for row, cell in enumerate(cells):
            known = cell[~np.isnan(cell)]
            if known.size:
                _beside(axes, row, f"{known.mean():.0%}")
        _colour_bar(figure, left=0.9, width=width)
    if nudged:
        _draw_curve(_axes(figure, left=0.9, top=0.65 + height + 0.35, width=width, height=_CURVE), record, image, steps)
    shares = record.shares().get(image)
    title = f"{shares['subject']:.0%} subject, {shares['style']:.0%} style" if shares else "nothing was chosen"
    title = f"{title} of the weights" if shares and record.weighed else title
    title = f"{title}; nudged" if nudged else title
    figure.text(0.9 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight(), title, fontsize=_TEXT + 2)
    return figure


def _count_steps(axes: Axes, steps: list[int]) -> None:
    every = max(1, -(-len(steps) // 8))
    axes.set_xticks(range(0, len(steps), every), [str(step + 1) for step in steps[::every]])
    axes.set_xlabel("step", fontsize=_TEXT)


def _draw_curve(axes: Axes, record: Record, image: int, steps: list[int]) -> None:
    """R before each nudge, on the heat map's own steps."""
    nudged, values = record.curve(image)
    axes.plot([steps.index(step) for step in nudged], values, color=_GREY, marker=".", linewidth=1.2)
    axes.set_xlim(-0.5, len(steps) - 0.5)
    _count_steps(axes, steps)
    axes.set_yticks([])
    axes.set_ylabel("R", fontsize=_TEXT, rotation=0, ha="right", va="center")
    _quiet(axes)
    axes.margins(y=0.2)
    for place, side in ((0, "right"), (-1, "left")):
        axes.annotate(
            f"{values[place]:.3f}",
            (steps.index(nudged[place]), values[place]),
            xytext=(-6 if side == "right" else 6, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=_TEXT,
            color=_GREY,
        )


def style_by_block(record: Record, image: int) -> tuple[list[str], list[int], Array]:
    """Block labels along the network's depth, steps, and the style's share [blocks, steps], NaN where unknown.

    Raises ValueError if the record has no such picture.
    """
    share = record.style_share(image)
    blocks = [block_of(layer) for layer in record.layers]
    order = sorted(set(blocks))
    of_pass = np.array([one.step for one in record.passes])
    steps = sorted({*of_pass.tolist(), *record.curve(image)[0]})
    cells = np.full((len(order), len(steps)), np.nan, np.float32)
    for row, block in enumerate(order):
        layers = [index for index, own in enumerate(blocks) if own == block]
        for column, step in enumerate(steps):
            values = share[np.ix_(of_pass == step, layers)]
            if not np.isnan(values).all():
                cells[row, column] = np.nanmean(values)
    return [block.label for block in order], steps, cells


def overlay(record: Record, image: int, picture: npt.NDArray[np.uint8]) -> Figure:
    """Where subject and where style was chosen, over the picture in grey; for a trace with `tokens`.

    picture: uint8 [H, W, 3]. Raises ValueError if it is something else, or if no layer of the record was decided token
    by token on a grid of the picture's shape.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    style = style_by_place(record, image, picture.shape[0], picture.shape[1])
    scale = max(384 / max(picture.shape), 1.0) / DPI
    height, width = picture.shape[0] * scale, picture.shape[1] * scale
    figure = _figure(width + 0.4, height + 1.1)
    axes = _axes(figure, left=0.2, top=0.4, width=width, height=height)
    edges = (0, picture.shape[1], picture.shape[0], 0)
    axes.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=edges, interpolation="nearest")
    axes.imshow(style, cmap=_colours(), vmin=0, vmax=1, alpha=0.55, extent=edges, interpolation="bilinear")
    axes.set_axis_off()
    title = f"{1 - style.mean():.0%} subject, {style.mean():.0%} style"
    figure.text(0.2 / figure.get_figwidth(), 1 - 0.27 / figure.get_figheight(), title, fontsize=_TEXT + 2)
    _colour_bar(figure, left=0.2, width=width)
    return figure


def style_by_place(record: Record, image: int, height: int, width: int) -> Array:
    """[h, w]: the style's share at each place of a picture of height x width pixels, mean over layers.

    h and w are those of the finest layer. Raises ValueError where no layer was decided token by token on such a grid.
    """
    grids = []
    for layer, tokens in record.tokens.items():
        shape = _grid(tokens.shape[1], height, width)
        if shape and image < len(tokens) and not _WORDS.search(layer):
            grids.append(1 - tokens[image].reshape(shape))
    if not grids:
        raise ValueError(f"nothing was recorded token by token for picture {image} at {width} x {height} pixels")
    rows, columns = (max(grid.shape[axis] for grid in grids) for axis in (0, 1))
    fine = [
        grid[np.arange(rows)[:, None] * grid.shape[0] // rows, np.arange(columns) * grid.shape[1] // columns]
        for grid in grids
    ]
    mean: Array = np.mean(fine, axis=0, dtype=np.float32)
    return mean


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the whole file or none of it."""
    temporary = path.with_name(path.name + ".part")
    FigureCanvasAgg(figure).print_png(temporary)
    temporary.replace(path)


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The rows and columns of a layer with so many tokens: the picture divided by a power of two, rounded up."""
    shapes = ((-(-height // 2**power), -(-width // 2**power)) for power in range(9))
    return next((shape for shape in shapes if shape[0] * shape[1] == tokens), None)


def _colours() -> Colormap:
    # Both ends of the map darken towards black, where orange and purple look alike: leave them out.
    clear = matplotlib.colormaps[_COLOURS](np.linspace(0.14, 0.86, 256))
    return ListedColormap(clear, name="subject to style").with_extremes(bad=_NOTHING)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    """Axes placed in inches from the figure's upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes(
        (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    )


def _quiet(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=_TEXT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _beside(axes: Axes, row: float, text: str, *, bottom: bool = False) -> None:
    axes.annotate(
        text,
        (1, row),
        xycoords=("axes fraction", "data"),
        xytext=(6, 3 if bottom else 0),
        textcoords="offset points",
        va="bottom" if bottom else "center",
        fontsize=_TEXT,
        color=_GREY,
    )


def _colour_bar(figure: Figure, *, left: float, width: float) -> None:
    """A narrow bar at the figure's foot, the roles' names at its ends."""
    length = min(width - 1.2, 2.4)
    top = figure.get_figheight() - 0.3
    axes = _axes(figure, left=left + (width - length) / 2, top=top, width=length, height=0.13)
    figure.colorbar(ScalarMappable(Normalize(0, 1), _colours()), cax=axes, orientation="horizontal", ticks=[])
    _quiet(axes)
    for place, name, side in ((-0.03, "subject", "right"), (1.03, "style", "left")):
        axes.text(place, 0.5, name, transform=axes.transAxes, ha=side, va="center_baseline", fontsize=_TEXT)
