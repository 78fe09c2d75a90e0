"""The heat map and the overlay, checked by what stands in them and by their pixels."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lib_dynfuse.trace import Item, Pass, Record, pictures
from lib_dynfuse.trace.pictures import heat_map, overlay, save, style_by_block, style_by_place

ROWS = (Item(0, False), Item(0, True))
WHITE = np.full((48, 32, 3), 255, np.uint8)


def record(layers: list[str], style: np.ndarray, steps: list[int] | None = None) -> Record:
    """style: [passes, layers], the same for both rows."""
    values = np.full((*style.shape, 2, 4), np.nan, np.float32)
    values[..., 1] = style[..., None]
    values[..., 0] = 1 - style[..., None]
    passes = [Pass(step, 0.0, None, ROWS) for step in steps or range(len(style))]
    return Record(layers, passes, values)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]]


def test_cells_are_the_mean_over_a_blocks_layers_and_a_steps_passes() -> None:
    layers = ["up_blocks.0.a", "down_blocks.0.a", "down_blocks.0.b"]
    style = np.array([[0.9, 0.0, 0.2], [0.7, 0.2, 0.4], [0.5, 1.0, 1.0]], np.float32)
    blocks, steps, cells = style_by_block(record(layers, style, steps=[0, 0, 1]), 0)
    assert (blocks, steps) == (["down.0", "up.0"], [0, 1])
    np.testing.assert_allclose(cells, [[0.2, 1.0], [0.8, 0.5]], rtol=1e-6)


def test_a_cell_without_a_selection_is_empty_and_does_not_count() -> None:
    style = np.array([[np.nan, 1.0], [0.5, np.nan]], np.float32)
    _, _, cells = style_by_block(record(["down_blocks.0.a", "down_blocks.1.a"], style), 0)
    np.testing.assert_array_equal(cells, [[np.nan, 0.5], [1.0, np.nan]])


def test_the_heat_map_names_blocks_steps_roles_and_shares() -> None:
    style = np.tile(np.array([[0.0, 0.5]], np.float32), (20, 1))
    figure = heat_map(record(["input_blocks.1.1.a", "middle_block.1.a"], style))
    map_axes = figure.axes[0]
    assert [label.get_text() for label in map_axes.get_yticklabels()] == ["IN01", "MID"]
    ticks = [label.get_text() for label in map_axes.get_xticklabels()]
    assert ticks[0] == "1"
    assert len(ticks) <= 8
    assert {"75% subject, 25% style", "0%", "50%", "subject", "style"} <= set(texts(figure))


def test_shares_of_weights_are_called_that() -> None:
    of_weights = record(["input_blocks.1.1.a"], np.full((4, 1), 0.25, np.float32))
    of_weights.weighed = True
    assert "75% subject, 25% style of the weights" in texts(heat_map(of_weights))


def pixels(figure: Figure, path: Path) -> np.ndarray:
    save(figure, path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_subject_is_orange_style_purple_even_is_neutral_and_unknown_grey(tmp_path: Path) -> None:
    style = np.array([[0.0], [0.5], [1.0], [np.nan]], np.float32)
    figure = heat_map(record(["down_blocks.0.a"], style))
    picture = pixels(figure, tmp_path / "map.png")
    box = figure.axes[0].get_window_extent()
    row = picture.shape[0] - int((box.y0 + box.y1) / 2)
    columns = [int(box.x0 + box.width * (place + 0.5) / 4) for place in range(4)]
    subject, even, by_style, unknown = (picture[row, column] for column in columns)
    assert subject[0] > subject[2] + 100  # red over blue
    assert by_style[2] > by_style[1] + 60  # blue over green
    assert np.ptp(even) < 8
    assert even.min() > 230
    assert np.ptp(unknown) == 0
    assert unknown[0] < 220


def test_every_text_is_legible_and_inside_the_picture() -> None:
    """At least 12 pixels high letters at the saved size, nothing cut off, no two labels on one another."""
    layers = [f"input_blocks.{n}.1.a" for n in range(12)] + [f"output_blocks.{n}.1.a" for n in range(12)]
    figure = heat_map(record(layers, np.full((50, 24), 0.5, np.float32)))
    figure.canvas.draw()
    everything = figure.get_window_extent()
    found = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    found += [label for axes in figure.axes for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]]
    boxes = [text.get_window_extent() for text in found if text.get_text()]
    assert all(text.get_fontsize() * figure.dpi / 72 >= 12 for text in found)
    assert all(everything.x0 <= box.x0 and box.x1 <= everything.x1 for box in boxes)
    assert all(everything.y0 <= box.y0 and box.y1 <= everything.y1 for box in boxes)
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    assert overlapping == []


@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (40, 3), (3, 150)])
def test_a_heat_map_of_any_size_fits_a_screen(layers: int, steps: int, tmp_path: Path) -> None:
    names = [f"input_blocks.{n}.1.a" for n in range(layers)]
    picture = pixels(heat_map(record(names, np.full((steps, layers), 0.5, np.float32))), tmp_path / "map.png")
    assert 300 <= picture.shape[1] <= 1100
    assert 200 <= picture.shape[0] <= 1300


def test_a_record_in_which_nothing_was_chosen_says_so() -> None:
    figure = heat_map(record(["down_blocks.0.a"], np.full((2, 1), np.nan, np.float32)))
    assert "nothing was chosen" in texts(figure)


def test_a_picture_that_is_not_in_the_record_is_refused() -> None:
    with pytest.raises(ValueError, match="picture 3"):
        heat_map(record(["down_blocks.0.a"], np.zeros((1, 1), np.float32)), image=3)


def with_tokens(**tokens: np.ndarray) -> Record:
    plain = record(["layer"], np.zeros((1, 1), np.float32))
    plain.tokens = {name.replace("__", "."): values.astype(np.float32) for name, values in tokens.items()}
    return plain


def test_places_are_the_mean_over_layers_of_any_resolution_at_the_finest() -> None:
    coarse = np.array([[1, 1, 0, 0, 1, 1]])  # 3 x 2
    fine = np.repeat(np.repeat(np.array([[1, 0], [0, 0], [1, 1]]), 2, axis=0), 2, axis=1).reshape(1, -1)  # 6 x 4
    style = style_by_place(with_tokens(a=coarse, b=fine), 0, height=48, width=32)
    assert style.shape == (6, 4)
    np.testing.assert_allclose(style[::2, ::2], [[0, 0.5], [1, 1], [0, 0]])


def test_layers_on_words_or_on_another_grid_do_not_count() -> None:
    grid = np.ones((1, 6))
    words = np.zeros((1, 6))
    several = with_tokens(a__attn1__to_q=grid, a__attn2__to_k=words, b=np.zeros((1, 7)))
    several.tokens["a.attn2.to_k[0:64]"] = words.astype(np.float32)
    several.tokens["double_blocks.0.txt_attn.qkv[0:64]"] = words.astype(np.float32)
    found = style_by_place(several, 0, 48, 32)
    np.testing.assert_array_equal(found, np.zeros((3, 2)))


def test_odd_sizes_round_up_as_strided_convolutions_do() -> None:
    assert style_by_place(with_tokens(a=np.ones((1, 13 * 19))), 0, height=832, width=1216).shape == (13, 19)
    assert style_by_place(with_tokens(a=np.ones((1, 7 * 10))), 0, height=832, width=1216 + 8).shape == (7, 10)


@pytest.mark.parametrize("image", [0, 5])
def test_without_choices_per_token_there_is_no_overlay(image: int) -> None:
    plain = with_tokens(a=np.ones((1, 7)))
    with pytest.raises(ValueError, match=f"picture {image} at 32 x 48"):
        overlay(plain, image, WHITE)


@pytest.mark.parametrize("picture", [WHITE[..., 0], WHITE.astype(np.float32), np.zeros((4, 4, 4), np.uint8)])
def test_an_overlay_needs_a_colour_picture_in_bytes(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        overlay(with_tokens(a=np.ones((1, 6))), 0, picture)


def test_the_overlay_colours_each_place_by_what_was_chosen_there(tmp_path: Path) -> None:
    subject_above = np.repeat([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 4)[None]  # 6 x 4
    figure = overlay(with_tokens(a=subject_above), 0, WHITE)
    picture = pixels(figure, tmp_path / "overlay.png")
    box = figure.axes[0].get_window_extent()
    column = int((box.x0 + box.x1) / 2)
    top, bottom = (picture[picture.shape[0] - int(box.y0 + box.height * up), column] for up in (0.9, 0.1))
    assert top[0] > top[2] + 50
    assert bottom[2] > bottom[1] + 30
    assert {"50% subject, 50% style", "subject", "style"} <= set(texts(figure))


def test_saving_leaves_nothing_half_written(tmp_path: Path) -> None:
    save(heat_map(record(["a"], np.zeros((1, 1), np.float32))), tmp_path / "map.png")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_pictures_need_no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    again = importlib.reload(pictures)
    assert again.heat_map(record(["a"], np.zeros((1, 1), np.float32)))


def test_a_curve_shows_how_r_fell_on_the_heat_map_s_own_steps() -> None:
    guided = record(["down_blocks.0.a"], np.full((6, 1), 0.5, np.float32))
    guided.nudges = {2: [-1.0], 3: [-1.25], 4: [-1.5]}
    figure = heat_map(guided)
    line = next(line for axes in figure.axes for line in axes.lines)
    np.testing.assert_allclose(line.get_xydata(), [[2, -1.0], [3, -1.25], [4, -1.5]])
    assert {"-1.000", "-1.500", "50% subject, 50% style; nudged"} <= set(texts(figure))
    assert not [axes for axes in heat_map(record(["down_blocks.0.a"], np.ones((6, 1)))).axes if axes.lines]


def test_a_picture_that_was_only_nudged_has_the_curve_alone() -> None:
    only = Record([], [], np.zeros((0, 0, 0, 4), np.float32), {}, {5: [-1.0], 6: [-1.125]})
    figure = heat_map(only)
    assert len(figure.axes) == 1
    assert "nothing was chosen; nudged" in texts(figure)
