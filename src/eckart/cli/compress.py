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

LISTED = 20
"""Matrices of a forecast that are printed."""


@app.command()
def compress(
    model: Model,
    out: Out,
    calibration: Annotated[
        Path, typer.Option(help="Text file that the model should stay good at.", show_default=False)
    ],
    ratio: Annotated[float | None, typer.Option(help="Kept fraction of the numbers of the matrices: 0.8.")] = None,
    bytes: Annotated[int | None, typer.Option(help="Bytes of the whole model, instead of --ratio.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Kept fraction of the matrices' time for one token, measured here.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="propagated (the default), double, whiten, asvd, fwsvd, svd; monarch, lowrank+sparse."),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(help="auto (best of uniform, tail, measured), or one: sensitivity, groups, signed, mp, …"),
    ] = None,
    elastic: Annotated[
        bool | None,
        typer.Option("--elastic/--no-elastic", help="One folder for every ratio up to this one.", show_default=False),
    ] = None,
    storage: Annotated[str | None, typer.Option(help="pivoted or factored.  [default: pivoted]")] = None,
    types: Annotated[str | None, typer.Option(help="Types of matrix, or attn, mlp, all: 'fc_in,fc_out'.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the text that are read.  [default: 64]")] = None,
    floor: Annotated[float | None, typer.Option(help="Share of its uniform budget each matrix gets.")] = None,
    multiple: Annotated[int | None, typer.Option(help="Ranks are multiples of it.  [default: 1]")] = None,
    sparse: Annotated[
        float | None, typer.Option(help="Share of the numbers that lowrank+sparse keeps as entries.  [default: 0.1]")
    ] = None,
    neurons: Annotated[
        bool | None,
        typer.Option(
            "--neurons/--no-neurons",
            help="Also remove neurons of MLPs and dimensions of heads, where that loses less.  [default: yes]",
        ),
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="Task that the model should stay good at, too; part of it measures.")
    ] = None,
    task_weight: Annotated[float | None, typer.Option(help="Share of --task in the metrics.  [default: 0.5]")] = None,
    measure: Annotated[
        list[Path] | None, typer.Option(help="Task (.jsonl) or text to measure on; may be given again.")
    ] = None,
    window: Window = None,
    batch_tokens: BatchTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    recipe: Recipe = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what each matrix alone costs, time, memory.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the best model under a budget, and write it to OUT/model."""
    from eckart.compression_run import compression_begun, forecast_compress, run_compress
    from eckart.mapping import give_back_freed
    from eckart.recipe import CompressSettings, make_settings
    from eckart.results import to_json

    give_back_freed()
    with reported(debug, resume=True):
        given = {
            "ratio": ratio,
            "bytes": bytes,
            "latency": latency,
            "sparse": sparse,
            "task_weight": task_weight,
            "method": method,
            "allocate": allocate,
            "elastic": elastic,
            "storage": storage,
            "types": words(types),
            "windows": windows,
            "floor": floor,
            "multiple": multiple,
            "neurons": neurons,
            "window": window,
            "batch_tokens": batch_tokens,
            "seed": seed,
        }
        settings = make_settings(CompressSettings, given, recipe)
        if not dry_run and compression_begun(out):
            errors.print(f"Resuming the unfinished compression in {safe(str(out))}.")
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        with Progress(*columns, console=errors, transient=True) as bar:
            line = bar.add_task("loading", total=None)

            def show(now: Any) -> None:
                words = f"{now.stage} {now.done}/{now.total}"
                bar.update(line, description=words, completed=now.done, total=now.total)

            if dry_run:
                results = forecast_compress(
                    model, calibration, out, settings, device=device, dtype=dtype, progress=show
                )
            else:
                results = run_compress(
                    model,
                    calibration,
                    out,
                    settings,
                    task=task,
                    measure=measure or (),
                    device=device,
                    dtype=dtype,
                    progress=show,
                )
        if json:
            sys.stdout.write(to_json(results))
        elif dry_run:
            _print_forecast(results)
        elif results["elastic"]:
            _print_elastic(results, out)
        else:
            _print(results, out)


def _print_forecast(found: dict[str, Any]) -> None:
    table = Table("each alone at its uniform share", "rank", "of", "divergence", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in found["matrices"][:LISTED]:
        ranks = f", ranks {', '.join(map(str, row['ranks']))}" if "ranks" in row else ""
        table.add_row(safe(row["matrix"]), str(row["rank"]), f"{row['of']}{ranks}", number(row["divergence"]))
    output.print(table)
    if len(found["matrices"]) > LISTED:
        output.print(f"{len(found['matrices']) - LISTED} more cause less; --json lists all.")
    output.print(
        f"All together diverge by {number(found['divergence_together'])} {found['divergence_together'].unit}; "
        "the single ones add up to "
        f"{found['sum_of_single_divergences']:.4g}.\n"
        f"Forecast: {found['seconds']:.0f} s and at most about {found['bytes'] / 2**20:,.0f} MiB."
    )
    for name, reason in found["stays_dense"].items():
        errors.print(f"[yellow]note:[/] {safe(name)} stays dense: {safe(reason)}", soft_wrap=True)


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


def _print_elastic(results: dict[str, Any], out: Path) -> None:
    served = results["elastic"]["served"]
    first = results["quality"][0] if results["quality"] else {"name": "", "before": {}, "after": {}}
    table = Table("ratio", "bytes", *first["after"], box=box.SIMPLE_HEAD, pad_edge=False)
    before = (number(first["before"].get(name)) for name in first["after"])
    table.add_row("dense", f"{results['size']['before'].bytes:,}", *before)
    for row in served:
        values = row["quality"][0]["after"].values() if row["quality"] else ()
        table.add_row(f"{row['ratio']:g}", f"{row['size']['after'].bytes:,}", *map(number, values))
    output.print(f"One folder of {results['elastic']['bytes']:,} bytes for every ratio up to {served[0]['ratio']:g}:")
    output.print(table)
    for warning in results["warnings"]:
        errors.print(f"[yellow]note:[/] {safe(warning)}")
    folder = safe(str(out / "model"))
    output.print(
        f"Measured on {safe(first['name'])}.\n"
        f"Model:  {folder} (after `import eckart`, from_pretrained(…, ratio=0.5) or bytes=…)\n"
        f"Report: {safe(str(out / 'report.html'))}",
        soft_wrap=True,
    )
