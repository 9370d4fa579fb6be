"""`eckart inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from eckart.cli.console import errors, integers, output, reported, safe, words
from eckart.cli.program import (
    BatchTokens,
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    Normalize,
    Out,
    Overlong,
    Recipe,
    Seed,
    Stride,
    Window,
    app,
)

if TYPE_CHECKING:
    from eckart.recipe import InspectSettings

# A text of fewer documents is cut into passages, so that there are several blocks.
TEXT_EXAMPLES = 20
LISTED = 12


@app.command()
def inspect(
    model: Model,
    out: Out,
    text: Annotated[Path | None, typer.Option(help="Text on which importance is measured.")] = None,
    task: Annotated[Path | None, typer.Option(help="Or a task, JSON Lines.")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Earlier checkpoint, or a folder of them; may be given again.")
    ] = None,
    types: Annotated[str | None, typer.Option(help="Types of matrix, or attn, mlp, all: 'fc_in,fc_out'.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks: '3', '0,1', '2-5'; -1 is the last.")] = None,
    fast: Annotated[bool | None, typer.Option("--fast", help="Edges and ranks several times as fast.")] = None,
    top: Annotated[
        float | None, typer.Option(help="Share of each type in unfrozen_parameters.yaml.  [default: 0.25]")
    ] = None,
    rho: Annotated[float | None, typer.Option(help="Depth of the cut whose loss is measured.  [default: 0.1]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens read for importance.  [default: 8192]")] = None,
    normalize: Normalize = None,
    batch_tokens: BatchTokens = None,
    overlong: Overlong = None,
    window: Window = None,
    stride: Stride = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    recipe: Recipe = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how long it takes.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what in each weight is signal, which matrices matter, and what to train."""
    with reported(debug, resume=True):
        from eckart.dynamics import checkpoint_folders
        from eckart.inspection import forecast_inspect, run_inspect
        from eckart.recipe import InspectSettings, make_settings
        from eckart.results import to_json
        from eckart.run import is_unfinished
        from eckart.spectra import LEDGER, RESULTS
        from eckart.tasks import read_task, read_text

        if task and text:
            raise typer.BadParameter("give --task or --text, not both")
        given = {
            "types": words(types),
            "layers": integers(layers),
            "fast": fast,
            "top": top,
            "rho": rho,
            "tokens": tokens,
            "normalize": normalize,
            "batch_tokens": batch_tokens,
            "overlong": overlong,
            "window": window,
            "stride": stride,
            "seed": seed,
        }
        settings = make_settings(InspectSettings, given, recipe)
        folders = checkpoint_folders(checkpoints or ())
        data = read_task(task) if task else read_text(text, passages=TEXT_EXAMPLES) if text else None
        if dry_run:
            _print_forecast(forecast_inspect(model, settings, folders), settings, json)
            return
        if is_unfinished(out, ledger=LEDGER, results=RESULTS):
            errors.print(f"Resuming the unfinished inspection in {safe(str(out))}.")
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True) as bar:
            line = bar.add_task("reading the config", total=None)

            def show(now: Any) -> None:
                bar.update(line, description=safe(now.matrix), completed=now.numbers_done, total=now.numbers_total)

            def tell(what: str, done: int, steps: int) -> None:
                bar.update(line, description=safe(what), completed=done, total=steps)

            results = run_inspect(
                model,
                out,
                settings,
                data,
                checkpoints=folders,
                device=device,
                dtype=dtype,
                progress=show,
                stage=tell,
            )
        if json:
            sys.stdout.write(to_json(results))
            return
        _print_summary(results)
        output.print(f"Report: {safe(str(out / 'report.html'))}", soft_wrap=True)
        output.print(f"Train:  {safe(str(out / 'unfrozen_parameters.yaml'))}", soft_wrap=True)


def _print_forecast(found: dict[str, Any], settings: InspectSettings, json: bool) -> None:
    from eckart.results import to_json

    if json:
        sys.stdout.write(to_json(found))
        return
    output.print(
        f"{found['matrices']:,} matrices of {found['numbers']:,} numbers, about {found['seconds']:.0f} s "
        f"{'fast' if settings.fast else 'exactly'}, at most {found['bytes'] / 1e6:,.0f} MB beside the interpreter. "
        "Importance on data comes on top."
    )
    for warning in found["warnings"]:
        errors.print(f"[yellow]note:[/] {safe(warning)}", soft_wrap=True)


def _print_summary(results: dict[str, Any]) -> None:
    """Medians of each type, and what costs most where that was measured."""
    rows = results["matrices"]
    rules = ("tw", "mp", "gavish-donoho", "laserrmt")
    table = Table("type", "matrices", *rules, "signal energy", "α", box=box.SIMPLE_HEAD, pad_edge=False)
    for kind in dict.fromkeys(row["type"] for row in rows):
        ones = [row for row in rows if row["type"] == kind]
        ranks = (_median([row["ranks"][rule] / min(row["shape"]) for row in ones], 100, " %") for rule in rules)
        energy = _median([row["measures"]["signal_energy"] for row in ones], 100, " %")
        table.add_row(
            safe(kind), str(len(ones)), *ranks, energy, _median([row["measures"]["alpha"] for row in ones], 1, "")
        )
    output.print(table)
    output.print("Medians of the share of full rank that each rule calls signal.")
    importance = results["importance"]
    if importance:
        costs = {name: found["loss_cut"] for name, found in importance.items() if "loss_cut" in found}
        table = Table("matrix", "loss without it, nats/token", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in sorted(costs, key=lambda name: -(costs[name]["value"] or 0))[:LISTED]:
            low, high = costs[name]["interval"]
            table.add_row(safe(name), f"{costs[name]['value']:+.4f} ({low:+.4f} to {high:+.4f})")
        output.print(table)
    if results["timeline"]:
        for passed in results["timeline"]["transitions"][:LISTED]:
            output.print(
                f"{safe(passed['matrix'])} left the bulk between steps {passed['before']} and {passed['step']}.",
                soft_wrap=True,
            )
    for warning in results["warnings"]:
        errors.print(f"[yellow]note:[/] {safe(warning)}", soft_wrap=True)


def _median(values: list[float | None], scale: float, unit: str) -> str:
    import statistics

    known = [value for value in values if value is not None]
    return f"{scale * statistics.median(known):.3g}{unit}" if known else "–"
