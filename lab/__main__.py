"""`python -m lab`: training, demo, evaluation and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from lib_dynfuse.guidance.libraries import skip_missing_operators

skip_missing_operators()

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Trains, shows, judges and measures; artists need none of it."""


@app.command()
def train(
    stages: Annotated[list[str], typer.Argument(help="Which stages, in this order.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, checkpoints and figures, not in the repository.")],
    data: Annotated[Path, typer.Option(help="The emoji drawings, an npz.")],
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train the bundled model, stage by stage. Each stage goes on where it was interrupted."""
    from lab.testbed.stages import STAGES, Work

    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise typer.BadParameter(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    torch.set_num_threads(threads)
    work = Work(out, data, bar=not quiet)
    for stage in stages:
        STAGES[stage](work)


if __name__ == "__main__":
    app()
