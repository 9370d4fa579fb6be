"""`eckart demo` and `eckart search`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from eckart.cli.console import (
    chance,
    errors,
    gain_of,
    integers,
    leading,
    number,
    numbers,
    output,
    reported,
    safe,
    words,
)
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
    from eckart.laser import SearchResult
    from eckart.recipe import SearchSettings
    from eckart.tasks import Task

# A text of fewer documents is cut into passages: some must choose, the others prove.
TEXT_EXAMPLES = 20


@app.command()
def demo(
    out: Out = Path("eckart-demo"),
    strategy: Annotated[str, typer.Option(help="exhaustive (fills the report's map), race or guided.")] = "exhaustive",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the main job, offline, on a model that ships with eckart."""
    from eckart.recipe import SearchSettings, make_settings
    from eckart.tasks import read_task

    folder = Path(str(files("eckart") / "demo"))
    with reported(debug):
        task = read_task(folder / "countries.jsonl")
        errors.print(
            "A small Llama learned facts about countries from sentences in which the answer\n"
            "was often replaced by 'unknown'. Which matrix hides the facts?"
        )
        found = _search(str(folder), task, out, make_settings(SearchSettings, {"strategy": strategy}), json=json)
        if not json:
            _print_search(found)
            _print_questions(found)
            _print_files(out)


@app.command()
def search(
    model: Model,
    out: Out,
    task: Annotated[str | None, typer.Option(help="JSON Lines file, lm-eval:NAME or counterfact.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file, for people without labels.")] = None,
    objective: Annotated[str | None, typer.Option(help="Of --text: perplexity or agreement.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Nats/token that agreement may cost.  [default: 0.01]")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="exhaustive, race, guided or laserrmt.  [default: race]")] = None,
    select: Annotated[str | None, typer.Option(help="The best edit has the best 'accuracy' or 'loss'.")] = None,
    shortlist: Annotated[
        int | None, typer.Option(help="Edits that guided and laserrmt measure.  [default: 16]")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Stop edits by a sequential test, too: 0.999.")] = None,
    compose: Annotated[int | None, typer.Option(help="Most edits that are made together.  [default: 1]")] = None,
    beam: Annotated[int | None, typer.Option(help="Sets that --compose pursues.  [default: 1, greedy]")] = None,
    guard: Annotated[str | None, typer.Option(help="Second order that guided adds: fisher or none.")] = None,
    types: Annotated[str | None, typer.Option(help="Types of matrix, or attn, mlp, all: 'fc_in,fc_out'.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks: '3', '0,1', '2-5'; -1 is the last.")] = None,
    rho: Annotated[str | None, typer.Option(help="Kept fractions of the largest rank: '0.01,0.1'.")] = None,
    rank_rule: Annotated[
        str | None, typer.Option(help="Choose ranks from spectra, not by --rho: mp, tw, gavish-donoho, bema, ….")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Blocks of rows, each cut by itself: '1,2,4'.  [default: 1]")
    ] = None,
    clustering: Annotated[str | None, typer.Option(help="Rows of a block: contiguous, heads or subspaces.")] = None,
    kind: Annotated[str | None, typer.Option(help="low_rank, zero, magnitude or shrink.  [default: low_rank]")] = None,
    basis: Annotated[str | None, typer.Option(help="Components that stay: top, bottom or random.")] = None,
    svd: Annotated[str | None, typer.Option(help="exact, or lowrank to mimic the LASER reference.")] = None,
    niter: Annotated[int | None, typer.Option(help="Subspace iterations of --svd lowrank.")] = None,
    split: Annotated[float | None, typer.Option(help="Share of the examples that choose.  [default: 0.2]")] = None,
    shuffle: Annotated[bool | None, typer.Option(help="Shuffle the examples first.")] = None,
    examples: Annotated[int | None, typer.Option(help="At most this many examples choose.")] = None,
    controls: Annotated[bool | None, typer.Option(help="Also measure few-shot prompts, LoRA and int8.")] = None,
    shots: Annotated[int | None, typer.Option(help="Most examples in a few-shot prompt.  [default: 5]")] = None,
    normalize: Normalize = None,
    batch_tokens: BatchTokens = None,
    overlong: Overlong = None,
    window: Window = None,
    stride: Stride = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Most that a worker's prefix cache holds.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the work.", min=1)] = 1,
    ray: Annotated[str | None, typer.Option(help="Ray cluster that does the work: auto or its address.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    recipe: Recipe = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid and a forecast; search nothing.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the matrix whose cut helps most, and prove the gain."""
    from eckart.recipe import SearchSettings, make_settings
    from eckart.run import forecast_search
    from eckart.sources import open_task
    from eckart.tasks import read_text

    with reported(debug, resume=True):
        if (task is None) == (text is None):
            raise typer.BadParameter("give --task, or --text for people without labels")
        given: dict[str, Any] = {
            "objective": objective or ("perplexity" if text else None),
            "tolerance": tolerance,
            "strategy": strategy,
            "select": select,
            "shortlist": shortlist,
            "confidence": confidence,
            "compose": compose,
            "beam": beam,
            "cache_bytes": cache_bytes,
            "guard": guard,
            "types": words(types),
            "layers": integers(layers),
            "rho": numbers(rho),
            "rank_rule": words(rank_rule),
            "blocks": integers(blocks, "blocks"),
            "clustering": clustering,
            "kind": kind,
            "basis": basis,
            "svd": svd,
            "niter": niter,
            "split": split,
            "shuffle": shuffle,
            "examples": examples,
            "controls": controls,
            "shots": shots,
            "seed": seed,
            "normalize": normalize,
            "batch_tokens": batch_tokens,
            "overlong": overlong,
            "window": window,
            "stride": stride,
        }
        settings = make_settings(SearchSettings, given, recipe)
        examples_read = open_task(task) if task else read_text(text or "", passages=TEXT_EXAMPLES)
        if dry_run:
            forecast = forecast_search(model, examples_read, settings, device=device, dtype=dtype, workers=workers)
            _print_forecast(forecast, json)
            return
        found = _search(
            model, examples_read, out, settings, json=json, device=device, dtype=dtype, workers=workers, ray=ray
        )
        if not json:
            _print_search(found)
            _print_files(out)


def _search(
    model: str,
    task: Task,
    out: Path,
    settings: SearchSettings,
    *,
    json: bool,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 1,
    ray: str | None = None,
) -> SearchResult:
    from eckart.results import to_json
    from eckart.run import is_unfinished, run_search

    if is_unfinished(out):
        errors.print(f"Resuming the unfinished search in {safe(str(out))}.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12 if errors.width < 100 else 30),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        # Only this one gives way where the line is too long.
        TextColumn("{task.fields[facts]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=errors, transient=True, expand=True) as bar:
        line = bar.add_task("loading", total=None, facts="")

        def show(now: Any) -> None:
            facts = f"{now.done}/{now.total} {'sets' if now.stage == 'composing' else 'edits'}"
            if now.alive < now.total:
                facts += f", {now.alive} alive"
            best = f"; best {_describe(now.best)}" if now.best else ""
            # A stopped edit needs no more examples, so the share of edits that are done tells the time that is left.
            left = now.examples_total * (1 - now.done / now.total) if now.total else 0
            bar.update(
                line,
                description=now.stage,
                completed=now.examples,
                total=now.examples + left if now.examples_total else None,
                facts=safe(f"{facts}{best}"),
            )

        found = run_search(
            model, task, out, settings, device=device, dtype=dtype, workers=workers, ray=ray, progress=show
        )
    if json:
        sys.stdout.write(to_json(found.to_results()))
    return found


def _describe(trial: Any) -> str:
    name = leading(trial.validation)
    return f"{name} {trial.validation[name].value:.3f} ({'; '.join(map(_short, trial.edits))})"


def _short(edit: Any) -> str:
    place = f"layer {edit.layer}" if edit.layer is not None else edit.matrix
    return f"{edit.type}, {place}, ρ {edit.rho:g}"


def _tried(found: SearchResult) -> str:
    """How much was tried, and how much of it was stopped early and why."""
    task, trials, seconds = (found.facts[name] for name in ("task", "trials", "seconds"))
    tried = f"Tried {len(found.trials)} edits"
    if found.predictions and len(found.trials) < trials["grid"]:
        tried = f"Predicted {trials['grid']} edits, tried {len(found.trials)}"
    sets = f" and {len(found.compositions)} sets of them" if found.compositions else ""
    stops = [trial.stopped for trial in (*found.trials, *found.compositions) if trial.stopped]
    lost = sum(stopped.p_value is not None for stopped in stops)
    lines = [f"{tried}{sets} on {task['validation']} examples in {seconds['total']:.1f} s."]
    if stops:
        test = f" and {lost} surely lost (sequential test)" if lost else ""
        lines.append(f"{len(stops) - lost} could not win{test}, and were stopped early.")
    return "\n".join([*lines, f"The other {task['test']} examples prove."])


def _print_edits(edits: Sequence[Any]) -> None:
    several = len(edits) > 1
    if several:
        output.print(f"Best edits, {len(edits)} together:")
    for edit in edits:
        low_rank = edit.kind in ("low_rank", "shrink")
        what = f"rank {edit.rank} of {edit.full_rank} (ρ {edit.rho:g})" if low_rank else edit.kind
        what += f" by rule {edit.rank_rule}" if edit.rank_rule else ""
        what += ", its singular values shrunk" if edit.kind == "shrink" else ""
        what += f" in each of {edit.blocks} blocks of rows ({edit.clustering})" if edit.blocks > 1 else ""
        # A name that the program broke could not be copied.
        before = "  " if several else "Best edit: "
        output.print(f"{before}[bold]{safe(edit.matrix)}[/] ({edit.type}) to {what}", soft_wrap=True)


def _print_search(found: SearchResult) -> None:
    output.print(f"\n{_tried(found)}")
    if found.plan.edits:
        _print_edits(found.plan.edits)
        output.print()
    else:
        output.print("No edit beats the unedited model on the examples that choose. The plan is empty.\n")
    table = Table("test examples", "unedited", "edited", "change, 95 % interval", box=box.SIMPLE_HEAD, pad_edge=False)
    gains = {"accuracy": found.gain, "loss": found.loss_gain}
    for name, before in found.baseline["test"].items():
        after = number(found.best["test"][name]) if found.plan.edits else "–"
        table.add_row(name, number(before), after, gain_of(gains.get(name)))
    for name, control in found.controls.items():
        change = gain_of(control.get("gain") or control.get("loss_gain")) or "control"
        table.add_row(name.replace("_", " "), "", number(control[leading(control)]), change)
    output.print(table)
    if found.gain is not None and found.gain.p_value is not None:
        counts = found.flip_counts
        output.print(
            f"{counts['gained']} answers became right and {counts['lost']} wrong "
            f"(exact McNemar p {chance(found.gain.p_value)})."
        )
    for warning in found.warnings:
        errors.print(f"[yellow]note:[/] {safe(warning)}")


def _print_files(out: Path) -> None:
    output.print(f"Report: {safe(str(out / 'report.html'))}\nPlan:   {safe(str(out / 'plan.json'))}", soft_wrap=True)


def _print_questions(found: SearchResult) -> None:
    gained = [flip for flip in found.flips if flip.correct_after]
    table = Table("five of the test questions", "unedited", "edited", box=box.SIMPLE_HEAD, pad_edge=False)
    step = max(1, len(gained) // 5)
    for flip in gained[::step][:5]:
        table.add_row(safe(flip.prompt), safe(flip.before), f"[bold]{safe(flip.after)}[/]")
    output.print(table)


def _print_forecast(forecast: dict[str, Any], json: bool) -> None:
    from eckart.results import to_json

    if json:
        sys.stdout.write(to_json(forecast))
        return
    for name, value in forecast.items():
        output.print(f"{name:>20}  {safe(str(value))}")
