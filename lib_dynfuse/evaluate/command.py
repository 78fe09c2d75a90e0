"""The command `evaluate`: the fusion rules on many pairs, judged, as a table, a plot and a sheet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.generate import one_clear_line, quiet_libraries, say
from lib_dynfuse.output import check_folder

if TYPE_CHECKING:
    from lib_dynfuse.evaluate.methods import Method
    from lib_dynfuse.evaluate.plan import Pair
    from lib_dynfuse.evaluate.report import Report
    from lib_dynfuse.evaluate.runs import Open

_SHEET = 24  # pairs on the sheet
_MODEL, _MEASURE = "A model of your own", "What it is measured with"


def evaluate(
    pairs: Annotated[
        str,
        typer.Option(
            help="Of the box: tuning, reporting, all (both), reported, fresh, or SUBJECT:STYLE with commas between. "
            "Of your own model: a file with a JSON list of objects, each with subject and style (LoRA names), prompt, "
            "and lists of files: subject_pictures, style_pictures."
        ),
    ] = "all",
    methods: Annotated[str, typer.Option(help="A comma between names; without it all there are.")] = "",
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL: NAME=VALUE ...",
            help="One more, by its strengths subject and style, options, and the rule's own parameters: "
            "'sum .7: strategy=sum subject=0.7'. May be repeated.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100_000, help="Pictures for every method and pair.")] = 10,
    out: Annotated[Path, typer.Option(help="The folder for what comes out.")] = Path("out/evaluate"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")] = False,
    against: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "sum",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one a core, or one alone on a GPU.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 12,
    cfg: Annotated[float, typer.Option(help="CFG scale.")] = 3.0,
    model: Annotated[
        Path | None, typer.Option(help="A diffusers folder or a checkpoint; else the box.", rich_help_panel=_MODEL)
    ] = None,
    lora_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where its LoRAs are, or those that `train-demo --stage fresh` made.", rich_help_panel=_MODEL
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="For a checkpoint, offline: a diffusers folder of its kind.", rich_help_panel=_MODEL),
    ] = None,
    clip: Annotated[
        str, typer.Option(help="open_clip's name, a folder or a file; none leaves it out.", rich_help_panel=_MEASURE)
    ] = "ViT-B-32:laion2b_s34b_b79k",
    dino: Annotated[
        str, typer.Option(help="A name on the hub or a folder; none leaves it out.", rich_help_panel=_MEASURE)
    ] = "facebook/dino-vits16",
    csd: Annotated[
        str, typer.Option(help="CSD's checkpoint, where you have it; none leaves it out.", rich_help_panel=_MEASURE)
    ] = "none",
    models: Annotated[Path, typer.Option(help="Where encoders are looked for.", rich_help_panel=_MEASURE)] = Path(
        "models/dynfuse"
    ),
    download: Annotated[
        bool,
        typer.Option("--download", help="Fetch missing encoders from huggingface.co.", rich_help_panel=_MEASURE),
    ] = False,
    device: Annotated[str, typer.Option(help="cuda, mps or cpu; else the best there is.", rich_help_panel=_MODEL)] = "",
) -> None:
    """Compare the fusion rules on many pairs of a subject and a style, from the same noise."""
    with one_clear_line():
        from lib_dynfuse.evaluate import methods as known

        chosen = known.chosen(methods, method or [])
        labels = [one.label for one in chosen]
        check_folder(out)
        if model is None:
            bench = _box(pairs, lora_dir, steps, cfg)
        else:
            encoders = {
                "clip": clip,
                "dino": dino,
                "csd": csd,
                "models": models,
                "device": device,
                "download": download,
            }
            bench = _own(Path(pairs), model, lora_dir, config, encoders, steps, cfg)
        plan = _Plan(chosen, seeds, out, resume, against if against in labels else labels[0], workers)
        for path in _compare(bench, plan, {"model": str(model or "box"), "steps": steps, "cfg": cfg}):
            typer.echo(path)


class _Bench(NamedTuple):
    """Where pictures are made and how they are judged. `notes` says whose numbers they are; `main`: the measure that
    methods are ranked by, the first that there is."""

    pairs: Sequence[Pair]
    opened: Open
    notes: list[str]
    main: tuple[str, ...]


class _Plan(NamedTuple):
    methods: Sequence[Method]
    seeds: int
    out: Path
    resume: bool
    against: str
    workers: int


def _box(wanted: str, lora_dir: Path | None, steps: int, cfg: float) -> _Bench:
    from lib_dynfuse.evaluate.boxed import BOX, Boxed
    from lib_dynfuse.evaluate.plan import boxed_pairs
    from lib_dynfuse.hosts.lora_files import find_lora

    pairs, folder = boxed_pairs(wanted), lora_dir or BOX / "loras"
    for name in {name for pair in pairs for name in (pair.subject, pair.style)}:
        try:
            find_lora(folder, name)
        except DynFuseError as error:
            raise DynFuseError(
                f"{error}; `train-demo --stage fresh` makes those that are not in the box, for --lora-dir"
            ) from error

    notes = [
        "Subject, style and both right: the share of pictures that the boxed judge, which no method has seen, takes "
        "for what was asked. Distance: root mean square difference to the true picture, pixels from 0 to 1; lower is "
        "nearer.",
    ]
    return _Bench(pairs, Boxed(steps, cfg, folder), notes, ("both",))


def _own(
    file: Path,
    model: Path,
    lora_dir: Path | None,
    config: Path | None,
    encoders: Mapping[str, Any],
    steps: int,
    cfg: float,
) -> _Bench:
    quiet_libraries()
    from lib_dynfuse.evaluate.own import Encoders, Own, read_pictures
    from lib_dynfuse.evaluate.plan import read_pairs
    from lib_dynfuse.hosts.devices import check_device
    from lib_dynfuse.hosts.lora_files import find_lora, open_lora

    check_device(encoders["device"])
    pairs = read_pairs(file)
    for pair in pairs:
        read_pictures([*pair.subject_pictures, *pair.style_pictures])
    for name in {name for pair in pairs for name in (pair.subject, pair.style)}:
        open_lora(find_lora(lora_dir, name))
    used = Encoders(**encoders)
    names = used.names()
    if not names:
        raise DynFuseError("nothing to measure with; give one of --clip, --dino, --csd")
    notes = [f"{kind}: {name}" for kind, name in names.items()]
    notes.append("Cosines, higher is nearer; they compare only where the encoders are the same.")
    opened = Own(model, lora_dir, config, used, {"steps": steps, "cfg": cfg})
    return _Bench(pairs, opened, notes, ("harmonic_mean", "clip_text"))


def _compare(bench: _Bench, plan: _Plan, settings: Mapping[str, Any]) -> list[Path]:
    """Makes what is still missing, and writes the report. Returns its files."""
    from lib_dynfuse.evaluate import runs, store
    from lib_dynfuse.evaluate.report import Report

    out, labels, names = plan.out, [one.label for one in plan.methods], [pair.name for pair in bench.pairs]
    described = {
        **settings,
        "notes": bench.notes,
        "pairs": {pair.name: pair.settings for pair in bench.pairs},
        "methods": {one.label: one.settings for one in plan.methods},
    }
    store.begin(out, described, plan.resume)
    rows = store.read_rows(out, say)
    todo = runs.jobs(bench.pairs, plan.methods, plan.seeds, {row.key for row in rows})
    if todo:
        if rows:
            say(f"going on after {len(rows)} pictures")
        for more in runs.run(out, todo, bench.opened, plan.workers or _workers(len(todo)), shown=1):
            rows += more
    report = Report.of(rows, labels, names, plan.seeds, main=bench.main, against=plan.against, notes=bench.notes)
    typer.echo(report.markdown())
    return _write(report, bench.pairs, out)


def _workers(jobs: int) -> int:
    """A process a core; one where a GPU does the work."""
    import torch

    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return 1 if gpu else max(1, min(os.cpu_count() or 1, jobs))


def _write(report: Report, pairs: Sequence[Pair], out: Path) -> list[Path]:
    from lib_dynfuse.evaluate.pictures import scatter, sheet
    from lib_dynfuse.evaluate.store import picture_file
    from lib_dynfuse.trace.pictures import save

    files = [out / "table.md", out / "table.json"]
    files[0].write_text(report.markdown(), encoding="utf-8")
    content = {"pairs": report.pairs, "seeds": report.seeds, "notes": report.notes, "rows": report.rows()}
    files[1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if (plot := scatter(report)) is not None:
        files.append(out / "subject-style.png")
        save(plot, files[-1])
    true = {pair.name: pair.truth for pair in pairs}
    page = sheet(
        report.pairs[:_SHEET],
        report.methods,
        lambda pair, method: picture_file(out, pair, method, 0),
        lambda pair: _true(true[pair]),
    )
    files.append(out / "sheet.png")
    page.save(files[-1])
    return files


def _true(truth: tuple[str, str] | None) -> Any:
    if truth is None:
        return None
    from lib_dynfuse.demo import compare
    from lib_dynfuse.demo.sheet import true_picture

    return true_picture(compare.Pair(*truth))
