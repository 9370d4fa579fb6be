"""`eckart recover`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from eckart.cli.console import errors, gain_of, number, output, reported, safe
from eckart.cli.program import BatchTokens, Debug, Device, Json, Out, Recipe, Seed, Window, app

if TYPE_CHECKING:
    from eckart.recovery import Recovery
    from eckart.repairing import Repair


@app.command()
def recover(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Folder of a factored model, or a run's folder; for repair, of a dense model.",
            show_default=False,
        ),
    ],
    data: Annotated[Path, typer.Option(help="Text to learn from.", show_default=False)],
    out: Out,
    teacher: Annotated[str | None, typer.Option(help="The model before compression: a folder or an id.")] = None,
    method: Annotated[str | None, typer.Option(help="factors, lora or repair.  [default: factors]")] = None,
    loss: Annotated[str | None, typer.Option(help="lm, kl (from the teacher) or both.  [default: both]")] = None,
    lm_weight: Annotated[float | None, typer.Option(help="Weight of lm in both.  [default: 0.2]")] = None,
    init: Annotated[str | None, typer.Option(help="zero, residual or output-residual.  [default: zero]")] = None,
    sampled: Annotated[
        int | None, typer.Option(help="Windows that the teacher writes, beside the text's.  [default: 0]")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of --init, lora and repair (best multiples of 16).  [default: 8]")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Of the weights that repair rounds: 8, 4, 2.  [default: 4]")] = None,
    adapter: Annotated[bool | None, typer.Option(help="Leave LoRA as a PEFT adapter beside the model.")] = None,
    refine: Annotated[int | None, typer.Option(help="Passes over the text block by block first.  [default: 0]")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer.  [default: 600]")] = None,
    minutes: Annotated[float | None, typer.Option(help="As many steps as fit, instead of --steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.  [default: 0.001]")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or linear.  [default: cosine]")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows of a step.  [default: 8]")] = None,
    window: Window = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the text that chooses, and that proves.  [default: 0.1]")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(help="Looks at held-out text.  [default: 10]")] = None,
    patience: Annotated[int | None, typer.Option(help="Looks without a gain before it stops.  [default: 5]")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.  [default: float32]")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Compute activations twice, to save memory.")
    ] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(help="Disk for the teacher's predictions.  [default: 1 GiB]")
    ] = None,
    batch_tokens: BatchTokens = None,
    device: Device = "auto",
    seed: Seed = None,
    recipe: Recipe = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print a forecast; train nothing.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Win quality back: by a short training, at unchanged size; or round a dense model and correct it by low rank."""
    from eckart.errors import RecipeError
    from eckart.recipe import RecoverSettings, make_settings
    from eckart.recovery_run import forecast_recover
    from eckart.repair_run import forecast_repair
    from eckart.results import to_json

    with reported(debug, resume=True):
        given: dict[str, Any] = {
            "method": method,
            "loss": loss,
            "lm_weight": lm_weight,
            "init": init,
            "sampled": sampled,
            "rank": rank,
            "bits": bits,
            "adapter": adapter,
            "refine": refine,
            "steps": steps,
            "minutes": minutes,
            "lr": lr,
            "schedule": schedule,
            "batch": batch,
            "window": window,
            "held_out": held_out,
            "evaluations": evaluations,
            "patience": patience,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
            "cache_bytes": cache_bytes,
            "batch_tokens": batch_tokens,
            "seed": seed,
        }
        settings = make_settings(RecoverSettings, given, recipe)
        source = str(Path(model) / "model") if (Path(model) / "model" / "config.json").is_file() else model
        if settings.method == "repair" and teacher is not None:
            raise RecipeError(
                "--teacher was given with --method repair. It is the model itself that its rounded weights are "
                "compared with. Leave --teacher out."
            )
        if dry_run:
            if settings.method == "repair":
                found = forecast_repair(source, data, settings, device=device)
            else:
                found = forecast_recover(source, data, settings, teacher=teacher, device=device)
            if json:
                sys.stdout.write(to_json(found))
            else:
                for name, value in found.items():
                    output.print(f"{name:>20}  {safe(str(value))}")
            return
        repaired, recovery = None, None
        if settings.method == "repair":
            repaired = _repair(source, data, out, settings, device)
        else:
            recovery = _recover(source, data, out, settings, teacher, device)
        if json:
            sys.stdout.write((out / "results.json").read_text(encoding="utf-8"))
        elif repaired is not None:
            _print_repair(repaired, settings.bits, out)
        elif recovery is not None:
            _print_recovery(recovery, out)


def _recover(source: str, data: Path, out: Path, settings: Any, teacher: str | None, device: str) -> Recovery:
    from eckart.recovery_run import recovery_begun, run_recover

    if recovery_begun(out):
        errors.print(f"Resuming the unfinished recovery in {safe(str(out))}.")
    with _shown() as show:
        return run_recover(source, data, out, settings, teacher=teacher, device=device, progress=show)


def _repair(source: str, data: Path, out: Path, settings: Any, device: str) -> Repair:
    from eckart.repair_run import repair_begun, run_repair

    if repair_begun(out):
        errors.print(f"Resuming the unfinished repair in {safe(str(out))}.")
    with _shown() as show:
        return run_repair(source, data, out, settings, device=device, progress=show)


@contextmanager
def _shown() -> Iterator[Callable[[Any], None]]:
    """A bar of progress."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        line = bar.add_task("loading", total=None, facts="")

        def show(now: Any) -> None:
            facts = f"held-out loss {number(now.held_out)}" if now.held_out else ""
            bar.update(line, description=now.stage, completed=now.done, total=now.total, facts=facts)

        yield show


def _print_repair(found: Repair, bits: int, out: Path) -> None:
    table = Table("test windows", "perplexity", "loss", "change, 95 % interval", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, label in (("before", "as it was"), ("rounded", f"in {bits} bits"), ("after", "repaired")):
        measured = found.test[name]
        change = gain_of(found.gain) if name == "after" else ""
        table.add_row(label, number(measured["perplexity"]), number(measured["loss"]), change)
    output.print(table)
    rounded, more = found.bytes["rounded"], found.bytes["corrections"]
    output.print(
        f"The weights take {found.bytes['dense']:,} bytes as they were, {rounded:,} rounded, and {rounded + more:,} "
        f"with the corrections ({100 * more / rounded:.0f} % more).\n"
        f"Model:   {safe(str(out / 'model'))}\nAdapter: {safe(str(out / 'adapter'))}\n"
        f"Report:  {safe(str(out / 'report.html'))}\n"
        f"One file: eckart export {safe(str(out / 'model'))} --adapter {safe(str(out / 'adapter'))} --to onnx "
        f"--quantize int{bits} --out …",
        soft_wrap=True,
    )


def _print_recovery(found: Recovery, out: Path) -> None:
    table = Table("test windows", "perplexity", "loss", "change, 95 % interval", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, label in (("before", "before"), ("after", "recovered"), ("teacher", "teacher")):
        if name in found.test:
            measured = found.test[name]
            change = gain_of(found.gain) if name == "after" else ""
            table.add_row(label, number(measured["perplexity"]), number(measured["loss"]), change)
    output.print(table)
    last = found.curve[-1].step
    early = ", and training stopped early" if found.stopped else ""
    output.print(f"Step {found.best_step} of {last} was best on held-out text and was kept{early}.")
    output.print(f"Model:  {safe(str(out / 'model'))}\nReport: {safe(str(out / 'report.html'))}", soft_wrap=True)
