"""The command line: `python -m lib_dynfuse generate`, `score`, `demo`, `bench`, `train-demo`, `export-demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lib_dynfuse import __version__
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.evaluate.command import evaluate
from lib_dynfuse.generate import generate, one_clear_line
from lib_dynfuse.guidance.libraries import skip_missing_operators
from lib_dynfuse.score import score

skip_missing_operators()

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Dynamic LoRA Fusion: every layer of every step goes to the subject LoRA or to the style LoRA.",
)
app.command()(generate)
app.command()(score)
app.command()(evaluate)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for sheets, heat maps and tables.")] = Path("out/demo"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Pictures for every method and pair.")] = 18,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 12,
) -> None:
    """Compare the fusion rules on the small trained model in the box."""
    from lib_dynfuse.demo import sheet

    with one_clear_line():
        sheet.demo(out, seeds=seeds, steps=steps)


@app.command()
def bench(
    unet: Annotated[str, typer.Option(help="sd15 or sdxl: real sizes, random weights.")] = "sd15",
    pixels: Annotated[int, typer.Option(min=64, help="The picture's side.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Batch items of a forward pass; 2 is one picture with CFG.")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="Of both networks.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    cover: Annotated[str, typer.Option(help="all, or attention: without residual blocks' convolutions.")] = "all",
    methods: Annotated[str, typer.Option(help="A comma between names; -torch or -triton behind one chooses how.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, of which the median counts.")] = 7,
    threads: Annotated[int, typer.Option(min=0, help="Of the processor; 0 takes torch's own number.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows here too.")] = None,
    on_gpu: Annotated[
        bool, typer.Option("--on-gpu", help="All rows that are asked of a GPU, SDXL and SD 1.5.")
    ] = False,
    counted: Annotated[
        bool, typer.Option("--count", help="Count operations and bytes instead; nothing is run.")
    ] = False,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Only the covered layers, one after the other: for small differences.")
    ] = False,
    start_up: Annotated[
        bool, typer.Option("--start-up", help="Instead, how long it takes to begin: two files taken over, or merged.")
    ] = False,
) -> None:
    """Measure what fusing costs: time per forward pass, as a ratio to merged weights."""
    from lib_dynfuse.bench import by_layer as layerwise
    from lib_dynfuse.bench import count, run, startup

    named = tuple(name.strip() for name in methods.split(",") if name.strip())
    with one_clear_line():
        try:
            if counted:
                typer.echo(count.table(count.count(unet, pixels, batch, rank, dtype, cover)))
            elif start_up:
                typer.echo(startup.table(startup.start_up(unet, rank, cover, threads)))
            elif on_gpu:
                typer.echo("\n\n".join(run.table(rows) for rows in run.on_gpu(json_file)))
            elif by_layer:
                chosen = named or layerwise.DEFAULT
                measured = (unet, pixels, batch, rank, device, dtype, chosen, repeats, json_file, threads, cover)
                typer.echo(layerwise.table(layerwise.by_layer(*measured)))
            else:
                chosen = named or run.DEFAULT
                rows = run.bench(unet, pixels, batch, rank, device, dtype, chosen, repeats, json_file, threads, cover)
                typer.echo(run.table(rows))
        except ValueError as error:
            raise DynFuseError(str(error)) from error


@app.command("train-demo")
def train_demo(
    out: Annotated[Path, typer.Option(help="The folder for checkpoints and for what comes out.")] = Path("out/train"),
    data: Annotated[Path | None, typer.Option(help="A ready .npz; else made from the npm packages.")] = None,
    preset: Annotated[Literal["cpu", "gpu"], typer.Option(help="The size of the model and of the training.")] = "cpu",
    latents_from: Annotated[
        Path | None, typer.Option(help="A diffusers autoencoder of 4 channels, to adopt its latents.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 2,
) -> None:
    """Train the model in the box, stage by stage; run it again to go on where it stopped."""
    from lib_dynfuse.demo import train

    with one_clear_line():
        known = (*train.STAGES, *train.APART)
        if unknown := sorted(set(stage or ()) - set(known)):
            raise DynFuseError(f"--stage {unknown[0]}: unknown; there are: {', '.join(known)}")
        train.train_demo(out, data, preset, latents_from, stage or tuple(train.STAGES), threads)


@app.command("export-demo")
def export_demo(
    out: Annotated[Path, typer.Argument(help="The WebUI's folder, or its folder models.")],
) -> None:
    """Write the model in the box as a checkpoint and LoRAs, where a WebUI looks for them.

    AUTOMATIC1111 loads it, started in its own folder. Forge and its relatives know a model by its sizes and refuse one
    that is so small; the LoRAs fit no other model.
    """
    from lib_dynfuse.demo import export, model

    with one_clear_line():
        typer.echo(export.export(model.BOX, out))


if __name__ == "__main__":
    app()
