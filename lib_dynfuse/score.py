"""The command `score`: how near pictures are to a subject, to a style and to a prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.generate import one_clear_line
from lib_dynfuse.guidance.sources import Source

if TYPE_CHECKING:
    from lib_dynfuse.guidance.encoders import ClipEncoder, DinoEncoder

_NONE = "none"
_HARMONIC = "harmonic mean"


def score(
    images: Annotated[list[Path], typer.Argument(help="The pictures to be scored.", show_default=False)],
    subject: Annotated[list[Path] | None, typer.Option(help="A picture of the subject; may be repeated.")] = None,
    style: Annotated[list[Path] | None, typer.Option(help="A picture in the style; may be repeated.")] = None,
    prompt: Annotated[str, typer.Option(help="What the pictures should show.")] = "",
    clip: Annotated[
        str, typer.Option(help="open_clip's name, as ARCHITECTURE:WEIGHTS, or a folder or file; none leaves CLIP out.")
    ] = "ViT-B-32:laion2b_s34b_b79k",
    dino: Annotated[
        str, typer.Option(help="A name on the model hub or a folder; none leaves DINO out.")
    ] = "facebook/dino-vits16",
    models: Annotated[Path, typer.Option(help="Where encoders are looked for.")] = Path("models/dynfuse"),
    download: Annotated[bool, typer.Option("--download", help="Fetch missing encoders from huggingface.co.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; else the best there is.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores here too.")] = None,
) -> None:
    """Score pictures: cosines of CLIP's and DINO's embeddings, higher is nearer.

    Scores compare only where CLIP and DINO are the same.
    """
    with one_clear_line():
        source = Source.of_owner(models, download)
        report = _score(images, subject or [], style or [], prompt.strip(), clip, dino, source, device, json_file)
        if json_file is not None:
            _write(json_file, json.dumps(report, indent=2) + "\n")
    typer.echo(table(report))


def _score(
    images: Sequence[Path],
    subject: Sequence[Path],
    style: Sequence[Path],
    prompt: str,
    clip: str,
    dino: str,
    source: Source,
    device: str,
    json_file: Path | None,
) -> dict[str, Any]:
    """Every picture's scores, and whose they are. What can be checked before encoders are loaded is."""
    if not (subject or style or prompt):
        raise DynFuseError("nothing to compare with; give --subject, --style or --prompt")
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise DynFuseError(f"--json {json_file}: there is no such folder to write a file to")

    from lib_dynfuse.guidance.objectives import Objective
    from lib_dynfuse.guidance.pictures import PictureError, open_picture, read_picture
    from lib_dynfuse.guidance.scores import harmonic_mean, harmonic_terms

    try:
        for path in images:
            open_picture(path).check()
        subjects, styles = ([read_picture(path) for path in paths] for paths in (subject, style))
    except PictureError as error:
        raise DynFuseError(str(error)) from error

    clip_encoder, dino_encoder = _encoders(clip, dino if subject or style else _NONE, source, device)
    try:
        objective = Objective(clip_encoder, dino_encoder, subjects, styles, [prompt] if prompt else None)
    except ValueError as error:
        raise DynFuseError(str(error)) from error
    rows: list[dict[str, Any]] = []
    try:
        for path in images:
            # At its full size, as a picture is scored when it is made.
            values = {name: float(value[0]) for name, value in objective.scores(read_picture(path, None)).items()}
            rows.append({"picture": str(path), **values, "harmonic_mean": harmonic_mean(values)})
    except PictureError as error:
        raise DynFuseError(str(error)) from error
    return {
        "clip": clip_encoder.name if clip_encoder else None,
        "dino": dino_encoder.name if dino_encoder else None,
        "harmonic_mean_of": harmonic_terms(rows[0]),
        "pictures": rows,
    }


def _encoders(clip: str, dino: str, source: Source, device: str) -> tuple[ClipEncoder | None, DinoEncoder | None]:
    import torch

    from lib_dynfuse.guidance.encoders import EncoderError, load_clip, load_dino
    from lib_dynfuse.hosts.devices import check_device

    check_device(device)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _quiet_libraries(dino):
            return (
                None if clip == _NONE else load_clip(clip, source, where),
                None if dino == _NONE else load_dino(dino, source, where),
            )
    except EncoderError as error:
        raise DynFuseError(str(error)) from error


@contextmanager
def _quiet_libraries(dino: str) -> Iterator[None]:
    """Without a network they log every retry, and transformers draws a bar for even a small model's weights."""
    if dino != _NONE:
        from lib_dynfuse.guidance.libraries import library

        library("transformers.utils.logging", "transformers").disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DynFuseError(f"--json {path}: cannot be written: {error.strerror}") from error


def table(report: dict[str, Any]) -> str:
    """A row for each picture, a column for each score that is there, and whose scores they are."""
    from lib_dynfuse.guidance.scores import LABELS

    rows = report["pictures"]
    shown = [name for name in LABELS if name in rows[0]]
    titles = ["picture", *(LABELS[name] for name in shown)]
    lines = [[row["picture"], *(f"{row[name]:.4f}" for name in shown)] for row in rows]
    if report["harmonic_mean_of"]:
        titles.append(_HARMONIC)
        lines = [[*line, f"{row['harmonic_mean']:.4f}"] for line, row in zip(lines, rows, strict=True)]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *lines, strict=True)]
    cells = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in (titles, *lines)
    ]
    notes = [f"{kind}: {report[key]}" for kind, key in (("CLIP", "clip"), ("DINO", "dino")) if report[key]]
    if report["harmonic_mean_of"]:
        notes.append(f"{_HARMONIC}: of {' and '.join(LABELS[name] for name in report['harmonic_mean_of'])}")
    if "R" in shown:
        notes.append("R: what a nudge makes smaller")
    return "\n".join([*cells, "", *notes])
