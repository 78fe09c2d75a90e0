"""What came out, to look at: a plot of subject against style, and a sheet of what the methods painted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lib_dynfuse.evaluate.intervals import draws, estimates
from lib_dynfuse.evaluate.report import SHARES, Report, name_of

# Which measure tells of the subject and which of the style: the first pair that was measured.
AXES = (
    ("subject", "style"),
    ("dino_subject", "csd"),
    ("dino_subject", "clip_style"),
    ("clip_subject", "csd"),
    ("clip_subject", "clip_style"),
    ("dino_subject", "dino_style"),
)
_MARKS = "osD^vPX*<>ph"
_CELL, _GAP, _HEAD, _LEFT = 72, 4, 96, 190
_INK, _FAINT = "#222222", "#666666"

Bytes = npt.NDArray[np.uint8]


def scatter(report: Report) -> Figure | None:
    """A point a method, its intervals as a cross; None where subject or style was not measured."""
    axes = next((axes for axes in AXES if all(axis in report.values for axis in axes)), None)
    if axes is None:
        return None
    drawn = draws(len(report.pairs), report.seeds)
    across, up = (estimates(report.values[axis], drawn) for axis in axes)
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    plot = figure.add_subplot()
    for index, method in enumerate(report.methods):
        x, y = across[index], up[index]
        plot.errorbar(
            x.mean,
            y.mean,
            xerr=[[x.mean - x.low], [x.high - x.mean]],
            yerr=[[y.mean - y.low], [y.high - y.mean]],
            fmt=_MARKS[index % len(_MARKS)],
            color=f"C{index % 10}",
            elinewidth=0.6,
            markersize=7,
            label=method,
        )
    for axis, name, limit in ((plot.xaxis, axes[0], plot.set_xlim), (plot.yaxis, axes[1], plot.set_ylim)):
        axis.set_label_text(f"{name_of(name)}{' right, share of pictures' if name in SHARES else ''}")
        if name in SHARES:
            limit(-0.03, 1.03)
    plot.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def sheet(
    pairs: Sequence[str],
    methods: Sequence[str],
    picture: Callable[[str, str], Path],
    truth: Callable[[str], Bytes | None],
) -> Image.Image:
    """A row a pair, a column a method, the true picture last where there is one; an empty cell for a missing file.

    picture: (pair, method) -> the file of one picture. truth: pair -> uint8 [H, W, 3], or None.
    """
    true = [truth(pair) for pair in pairs]
    heads = [*methods, *(["true picture"] if any(one is not None for one in true) else [])]
    step = _CELL + _GAP
    page = Image.new("RGB", (_LEFT + len(heads) * step, _HEAD + len(pairs) * step), "white")
    draw = ImageDraw.Draw(page)
    font, small = (ImageFont.load_default(size=points) for points in (13, 12))
    for column, head in enumerate(heads):
        page.paste(_slanted(head, font), (_LEFT + column * step, 0))
    for row, pair in enumerate(pairs):
        y = _HEAD + row * step
        draw.multiline_text((_GAP, y + _CELL / 2), pair.replace(" + ", "\n"), fill=_FAINT, font=small, anchor="lm")
        for column, method in enumerate(methods):
            file = picture(pair, method)
            if file.is_file():
                with Image.open(file) as image:
                    page.paste(_cell(image), (_LEFT + column * step, y))
        drawn = true[row]
        if drawn is not None:
            page.paste(_cell(Image.fromarray(drawn)), (_LEFT + len(methods) * step, y))
    return page


def _cell(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((_CELL, _CELL), Image.Resampling.LANCZOS)


def _slanted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """A head on its side, read from below: methods' names are longer than a picture is wide."""
    strip = Image.new("RGB", (_HEAD, _CELL), "white")
    words, lines = text.split(), [""]
    for word in words:
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= _HEAD - 2 * _GAP or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    ImageDraw.Draw(strip).multiline_text((_GAP, _CELL / 2), "\n".join(lines), fill=_INK, font=font, anchor="lm")
    return strip.transpose(Image.Transpose.ROTATE_90)
