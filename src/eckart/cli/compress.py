"""`eckart compress`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from eckart.cli.console import errors, number, output, reported, safe, words
from eckart.cli.program import BatchTokens, Debug, Device, Dtype, Json, Model, Out, Recipe, Seed, Window, app


@app.command()
def compress(
    model: Model,
    out: Out,
    calibration: Annotated[
        Path, typer.Option(help="Text file that the model should stay good at.", show_default=False)
    ],
    ratio: Annotated[float | None, typer.Option(help="Kept fraction of the numbers of the matrices: 0.8.")] = None,
    bytes: Annotated[int | None, typer.Option(help="Bytes of the whole model, instead of --ratio.")] = None,
    method: Annotated[
        str | None, typer.Option(help="svd, fwsvd, asvd, whiten, double or propagated.  [default: propagated]")
    ] = None,
    allocate: Annotated[
        str | None, typer.Option(help="auto, uniform, tail or measured.  [default: auto, the best of all]")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="pivoted or factored.  [default: pivoted]")] = None,
    types: Annotated[str | None, typer.Option(help="Types of matrix, or attn, mlp, all: 'fc_in,fc_out'.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the text that are read.  [default: 64]")] = None,
    floor: Annotated[float | None, typer.Option(help="Share of its uniform budget each matrix gets.")] = None,
    multiple: Annotated[int | None, typer.Option(help="Ranks are multiples of it.  [default: 1]")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file to measure on; may be given again.")] = None,
    task: Annotated[list[Path] | None, typer.Option(help="Task to measure on; may be given again.")] = None,
    window: Window = None,
    batch_tokens: BatchTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    recipe: Recipe = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the best model under a budget, and write it to OUT/model."""
    from eckart.compression_run import compression_begun, run_compress
    from eckart.recipe import CompressSettings, make_settings
    from eckart.results import to_json

    with reported(debug, resume=True):
        given = {
            "ratio": ratio,
            "bytes": bytes,
            "method": method,
            "allocate": allocate,
            "storage": storage,
            "types": words(types),
            "windows": windows,
            "floor": floor,
            "multiple": multiple,
            "window": window,
            "batch_tokens": batch_tokens,
            "seed": seed,
        }
        settings = make_settings(CompressSettings, given, recipe)
        if compression_begun(out):
            errors.print(f"Resuming the unfinished compression in {safe(str(out))}.")
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        with Progress(*columns, console=errors, transient=True) as bar:
            line = bar.add_task("loading", total=None)
            results = run_compress(
                model,
                calibration,
                out,
                settings,
                texts=text or (),
                tasks=task or (),
                device=device,
                dtype=dtype,
                progress=lambda now: bar.update(
                    line, description=f"{now.stage} {now.done}/{now.total}", completed=now.done, total=now.total
                ),
            )
        if json:
            sys.stdout.write(to_json(results))
            return
        _print(results, out)


def _print(results: dict[str, Any], out: Path) -> None:
    before, after = results["size"]["before"], results["size"]["after"]
    output.print(
        f"The model takes {after.bytes:,} bytes instead of {before.bytes:,} ({100 * after.bytes / before.bytes:.1f} %)."
    )
    table = Table("measured on", "", "original", "compressed", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in results["quality"]:
        for name, value in row["after"].items():
            table.add_row(safe(row["name"]), name, number(row["before"][name]), number(value))
    output.print(table)
    for warning in results["warnings"]:
        errors.print(f"[yellow]note:[/] {safe(warning)}")
    output.print(
        f"Model:  {safe(str(out / 'model'))} (loads after `import eckart`)\n"
        f"Report: {safe(str(out / 'report.html'))}\nPlan:   {safe(str(out / 'plan.json'))}",
        soft_wrap=True,
    )
