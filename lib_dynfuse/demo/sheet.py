"""`make demo`: the fusion rules side by side, as labelled sheets, heat maps of what was chosen, and a judged table."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from lib_dynfuse.demo import judge, split
from lib_dynfuse.demo.compare import GUIDED, METHODS, Alone, Method, Pair, Result, Score, compare, wilson
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.trace.pictures import heat_map, save

BOX = Path(__file__).parent
PAIRS = (Pair("fox", "hc"), Pair("rocket", "hc"))  # the style that the boxed judge knows best
_DRAWN = ("kl", "kl-soft")  # rules whose choices are worth a picture: they look at the input
_TRUE = "true picture"
# Beside guided methods, which cost their time, so that the whole stays a matter of three minutes: fewer seeds for
# those, and for the controls, which are nearly always all right or all wrong.
_GUIDED_SEEDS, _CONTROL_SEEDS = 3, 5
_CONTROLS = ("base", "subject alone", "style alone", "random", "klora")
_SHOWN = 6  # seeds on a sheet; more are judged
_CELL = 96  # pixels a picture
_GAP = 6
_HEAD = 74
_LEFT = 58
_INK, _FAINT = "#222222", "#666666"


def demo(
    out: Path,
    *,
    seeds: int = 18,
    pairs: Sequence[Pair] = PAIRS,
    steps: int = 12,
    cfg: float = 3.0,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Every method on the boxed model, judged; sheets, heat maps and tables go into the folder `out`.

    Says the table and the files it wrote, and returns those. Raises ValueError for a pair that the box does not have.
    """
    began = time.perf_counter()
    truths = {pair: true_picture(pair) for pair in pairs}
    guided = GUIDED if boxed_encoders() else ()
    jobs = [(pair, method) for pair in pairs for method in (*METHODS, *guided)]
    made = tqdm(_side_by_side(jobs, seeds, steps, cfg), "Comparing", len(jobs), unit="method", leave=False)
    found = {(result.pair, result.method.label): result for result in made}
    results = [found[pair, method.label] for pair, method in jobs]
    settings = {"seeds": seeds, "steps": steps, "cfg": cfg, "seconds": round(time.perf_counter() - began, 1)}
    files = write(out, results, truths, settings)
    say(markdown(results, settings))
    say("Written:\n" + "\n".join(f"  {file}" for file in files))
    return files


Job = tuple[Pair, Method]
_ALONE = {(method.subject, method.style): method.label for method in METHODS if method.subject != method.style}


def boxed_encoders() -> bool:
    """Whether CLIP and DINO are in the box, which the guided methods need."""
    return all((BOX / name).is_dir() for name in ("clip", "dino"))


def _side_by_side(jobs: Sequence[Job], seeds: int, steps: int, cfg: float) -> Iterator[Result]:
    """Each job's result, the guided ones last, as they need those of each LoRA alone. On a CPU one process a core, each
    with one thread: a model this small loses more to threads that wait for each other than it gains."""
    do = partial(_do, seeds=seeds, steps=steps, cfg=cfg)
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        _open_box()
        yield from _in_two_waves(jobs, partial(map, do))
        return
    workers = min(os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _open_box) as pool:
        yield from _in_two_waves(jobs, partial(pool.map, do))


def _in_two_waves(
    jobs: Sequence[Job], do_all: Callable[[list[tuple[Job, Alone | None]]], Iterator[Result]]
) -> Iterator[Result]:
    alone: dict[tuple[Pair, str], Tensor] = {}
    for result in do_all([(job, None) for job in jobs if not job[1].guided]):
        if result.method.label in _ALONE.values():
            alone[result.pair, result.method.label] = result.pictures
        yield result
    guided = [job for job in jobs if job[1].guided]
    subject, style = _ALONE[True, False], _ALONE[False, True]
    yield from do_all([(job, Alone(alone[job[0], subject], alone[job[0], style])) for job in guided])


_box: dict[str, Any] = {}


def _open_box() -> None:
    """Opens the boxed model, its LoRAs and its judges, once for a process."""
    torch.set_num_threads(1)
    _box["host"] = Embedded.load(BOX / "model", BOX / "loras", say=lambda line: None)
    _box["judge"] = judge.Judge.load(BOX / "judge")


def _do(job: tuple[Job, Alone | None], seeds: int, steps: int, cfg: float) -> Result:
    (pair, method), alone = job
    towards = None if alone is None else {pair: alone}
    most = _GUIDED_SEEDS if method.guided else _CONTROL_SEEDS if method.label in _CONTROLS else seeds
    chosen = range(min(seeds, most) if boxed_encoders() else seeds)
    host, judged = _box["host"], _box["judge"]
    return compare(host, judged, [pair], chosen, methods=[method], steps=steps, cfg=cfg, alone=towards, encoders=BOX)[0]


def true_picture(pair: Pair) -> npt.NDArray[np.uint8]:
    """What the artists of the style drew for the subject: nothing was trained on it. Raises ValueError without one."""
    with np.load(BOX / ("fresh.npz" if pair.subject in split.MORE_SUBJECTS else "pictures.npz")) as file:
        subjects, styles = file["names"][file["subj"]], file["styles"][file["sty"]]
        found = np.flatnonzero((subjects == pair.subject) & (styles == pair.style))
        if not found.size:
            raise ValueError(f"there is no true picture of {pair.title}")
        picture: npt.NDArray[np.uint8] = file["x"][found[0]]
        return picture


def write(
    out: Path, results: Sequence[Result], truths: Mapping[Pair, npt.NDArray[np.uint8]], settings: Mapping[str, Any]
) -> list[Path]:
    """A sheet and heat maps for each pair, and the table as Markdown and JSON. truths: uint8 [H, W, 3] pictures."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for pair in dict.fromkeys(result.pair for result in results):
        own = [result for result in results if result.pair == pair]
        files.append(out / f"sheet-{pair.name}.png")
        sheet(own, truths[pair]).save(files[-1])
        for result in own:
            if result.record is not None and result.method.options.strategy in _DRAWN:
                files.append(out / f"chosen-{pair.name}-{_file_name(result.method.label)}.png")
                save(heat_map(result.record), files[-1])
    files += [out / "table.md", out / "table.json"]
    files[-2].write_text(markdown(results, settings), encoding="utf-8")
    files[-1].write_text(json.dumps({**settings, "rows": rows(results)}, indent=1), encoding="utf-8")
    return files


def sheet(results: Sequence[Result], truth: npt.NDArray[np.uint8]) -> Image.Image:
    """One pair's methods across, seeds down, the true picture last; under each name how many pictures were right."""
    shown = min(_SHOWN, *(len(result.pictures) for result in results))
    step = _CELL + _GAP
    size = (_LEFT + (len(results) + 1) * step + _GAP, _HEAD + shown * step + _GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    title, font, small = (ImageFont.load_default(size=points) for points in (17, 14, 12))
    pair = results[0].pair
    draw.text((_GAP, 6), pair.title, fill=_INK, font=title)
    draw.text((_GAP, _HEAD - 22), "both", fill=_FAINT, font=small)
    for row in range(shown):
        draw.text((_GAP, _HEAD + row * step + _CELL / 2), f"seed {row}", fill=_FAINT, font=small, anchor="lm")
    for column, result in enumerate(results):
        x = _LEFT + column * step
        score = Score.of([result])
        draw.text((x, _HEAD - 40), result.method.label, fill=_INK, font=font)
        draw.text((x, _HEAD - 22), f"{score.both} of {score.pictures}", fill=_FAINT, font=small)
        for row in range(shown):
            page.paste(_cell(_bytes(result.pictures[row])), (x, _HEAD + row * step))
    x = _LEFT + len(results) * step
    draw.text((x, _HEAD - 40), _TRUE, fill=_INK, font=font)
    page.paste(_cell(truth), (x, _HEAD))
    return page


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The table's rows: for each method every pair, then all pairs together. Shares and intervals are from 0 to 1."""
    found = []
    for label in dict.fromkeys(result.method.label for result in results):
        own = [result for result in results if result.method.label == label]
        for name, group in [*((result.pair.title, [result]) for result in own), ("all", own)]:
            score = Score.of(group)
            row: dict[str, Any] = {"pair": name, "method": score.method, "pictures": score.pictures}
            for what in ("subject", "style", "both"):
                right = getattr(score, what)
                row[what] = round(right / score.pictures, 4)
                row[f"{what}_interval"] = [round(end, 4) for end in wilson(right, score.pictures)]
            row["chosen_subject"] = None if score.chosen is None else round(score.chosen, 4)
            row["seconds"] = round(sum(result.seconds for result in group), 2)
            found.append(row)
    return found


def markdown(results: Sequence[Result], settings: Mapping[str, Any]) -> str:
    """The table of all pairs together, as a person reads it, and both-right per pair."""
    table = rows(results)
    pairs = list(dict.fromkeys(row["pair"] for row in table if row["pair"] != "all"))
    heads = [
        "method",
        "subject %",
        "style %",
        "both % (95 %)",
        *(f"both %, {pair}" for pair in pairs),
        "subject chosen %",
    ]
    lines = [heads, *_body(table, pairs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    drawn = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = "|".join("-" * (width + 2) for width in widths)
    count = max(row["pictures"] for row in table if row["pair"] == "all")
    note = (
        f"{count} pictures a method ({settings['seeds']} seeds a pair, the same for every method), "
        f"{settings['steps']} steps, cfg {settings['cfg']:g}, {settings['seconds']:.0f} s in all. "
        "Subject and style as the boxed judges see them; in brackets the Wilson interval."
        f"{_fewer_note(table, count)}{_guided_note(table)}"
    )
    return "\n".join([f"| {drawn[0]} |", f"|{rule}|", *(f"| {line} |" for line in drawn[1:]), "", note, ""])


def _body(table: Sequence[Mapping[str, Any]], pairs: Sequence[str]) -> list[list[str]]:
    lines = []
    for row in table:
        if row["pair"] != "all":
            continue
        each = {other["pair"]: other["both"] for other in table if other["method"] == row["method"]}
        low, high = row["both_interval"]
        lines.append(
            [
                row["method"],
                _percent(row["subject"]),
                _percent(row["style"]),
                f"{_percent(row['both'])} ({_percent(low)} to {_percent(high)})",
                *(_percent(each[pair]) for pair in pairs),
                "" if row["chosen_subject"] is None else _percent(row["chosen_subject"]),
            ]
        )
    return lines


def _fewer_note(table: Sequence[Mapping[str, Any]], count: int) -> str:
    """Which methods made fewer pictures than the others."""
    fewer: dict[int, list[str]] = {}
    for row in table:
        if row["pair"] == "all" and row["pictures"] < count:
            fewer.setdefault(row["pictures"], []).append(row["method"])
    return "".join(f" Only {pictures} pictures each: {', '.join(names)}." for pictures, names in fewer.items())


def _guided_note(table: Sequence[Mapping[str, Any]]) -> str:
    """What the guided methods were."""
    guided = {method.label: method for method in GUIDED}
    names = [row["method"] for row in table if row["pair"] == "all" and row["method"] in guided]
    if not names:
        return ""
    options = guided[names[0]].options
    return (
        f" {', '.join(names)}: nudged ({options.nudge_mode}, by at most {options.nudge_clamp:.0%} a step, from "
        f"{options.nudge_start:.0%} of the steps on) towards the pictures of each LoRA alone with the same seed, as "
        "the boxed CLIP and DINO see them; nudges alone adds both LoRAs, bal. + nudges is kl balanced with nudges."
    )


def _file_name(label: str) -> str:
    return "-".join(re.findall(r"[\w.-]*\w", label))


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _bytes(picture: Tensor) -> npt.NDArray[np.uint8]:
    scaled = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).numpy()


def _cell(picture: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
