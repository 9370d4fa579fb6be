"""`eckart evaluate` and `eckart report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from eckart.cli.console import errors, number, output, reported, safe
from eckart.cli.program import (
    BatchTokens,
    Debug,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Normalize,
    Overlong,
    Recipe,
    Seed,
    Stride,
    Window,
    app,
)

if TYPE_CHECKING:
    from eckart.resources import Memory, Speed


@app.command()
def evaluate(
    model: Model,
    task: Annotated[
        list[str] | None, typer.Option(help="JSON Lines file, lm-eval:NAME or counterfact; may be given again.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file for perplexity; may be given again.")] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Plan to measure; may be given again.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also tokens a second, against the dense model.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also bytes on disk and in memory.")] = False,
    out: Annotated[Path | None, typer.Option(help="New or empty folder for results and report.")] = None,
    normalize: Normalize = None,
    batch_tokens: BatchTokens = None,
    overlong: Overlong = None,
    window: Window = None,
    stride: Stride = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    recipe: Recipe = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy, loss, perplexity, speed and memory, with standard errors."""
    from eckart.recipe import Settings, make_settings
    from eckart.results import to_json
    from eckart.run import run_evaluate
    from eckart.sources import open_task
    from eckart.tasks import read_text

    with reported(debug):
        if not (task or text or speed or memory):
            raise typer.BadParameter("give at least one --task or --text, or --speed or --memory")
        given = {
            "seed": seed,
            "normalize": normalize,
            "batch_tokens": batch_tokens,
            "overlong": overlong,
            "window": window,
            "stride": stride,
        }
        settings = make_settings(Settings, given, recipe)
        tasks = [open_task(name) for name in task or ()] + [read_text(path) for path in text or ()]
        results = run_evaluate(
            model,
            plan or [],
            tasks,
            out,
            settings,
            device=device,
            dtype=dtype,
            force=force,
            speed=speed,
            memory=memory,
            progress=lambda line: errors.print(f"measuring {safe(line)}"),
        )
        if json:
            sys.stdout.write(to_json(results))
            return
        if results["rows"]:
            table = Table("plan", "task", "accuracy", "loss", "perplexity", box=box.SIMPLE_HEAD, pad_edge=False)
            for row in results["rows"]:
                found = row["measurements"]
                cells = (number(found.get(name)) for name in ("accuracy", "loss", "perplexity"))
                table.add_row(safe(row["plan"]), safe(row["task"]), *cells)
            output.print(table)
        if "speed" in results:
            output.print(_speed_table(results["speed"]["rows"]))
        if "memory" in results:
            output.print(_memory_table(results["memory"]["rows"]))
        for warning in results["warnings"]:
            errors.print(f"[yellow]note:[/] {safe(warning)}")


def _speed_table(rows: list[Speed]) -> Table:
    table = Table("plan", "batch", "phase", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tokens/s", "times dense", "at best"):
        table.add_column(name, justify="right")
    for row in rows:
        for phase, pace in (("prefill", row.prefill), ("decode", row.decode)):
            if pace is not None:
                ratio = f"{pace.ratio.value:.2f} ({pace.ratio.least:.2f} to {pace.ratio.most:.2f})"
                limit = f"{pace.limit:.2f} by {pace.limited_by}"
                table.add_row(
                    safe(row.side), str(row.batch), phase, f"{pace.tokens_per_second.value:.4g}", ratio, limit
                )
    return table


def _memory_table(rows: list[Memory]) -> Table:
    table = Table("plan", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("disk, MB", "parameters, MB", "peak, MB", "of it libraries, MB"):
        table.add_column(name, justify="right")
    for row in rows:
        found = (row.disk, row.parameters, row.peak.value, row.interpreter.value)
        table.add_row(safe(row.side), *(f"{value / 1e6:,.1f}" for value in found))
    return table


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Draw report.html again from results.json (or inspect.json) alone."""
    from eckart.inspection_report import write_inspection_report
    from eckart.report import write_report

    with reported(debug):
        write = write_inspection_report if (run / "inspect.json").is_file() else write_report
        output.print(safe(str(write(run))), soft_wrap=True)
