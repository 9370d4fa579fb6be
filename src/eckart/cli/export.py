"""`eckart export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.console import errors, number, output, reported, safe
from eckart.cli.program import Debug, Force, Json, Model, Out, Seed, app


@app.command()
def export(
    model: Model,
    out: Out,
    to: Annotated[str, typer.Option(help="onnx, dense, peft, gguf or pte.", show_default=False)],
    quantize: Annotated[str, typer.Option(help="Weights of an onnx file: none, int8, int4 or int2.")] = "none",
    plan: Annotated[Path | None, typer.Option(help="For peft: the plan, or the folder of a run.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter of PEFT, to export, too.")] = None,
    seed: Seed = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for a device, or as a standard checkpoint, to OUT."""
    with reported(debug):
        from eckart.exporting import run_export
        from eckart.results import to_json

        errors.print("Exporting; for onnx and pte this takes from half a minute to a few.")
        options: dict[str, Any] = {"quantize": quantize, "plan_path": plan, "adapter": adapter}
        found = run_export(model, to, out, **options, seed=seed or 0, force=force)
        if json:
            sys.stdout.write(to_json(found.facts))
        else:
            output.print(f"Wrote {safe(str(out))}.", soft_wrap=True)
            if found.checked is not None:
                one = found.checked
                output.print(
                    f"The model takes {one.bytes:,} bytes; dense in float32 it would take {one.dense_bytes:,} "
                    f"({100 * one.bytes / one.dense_bytes:.1f} %).\n"
                    f"Greedy tokens as in PyTorch: {number(one.agreement)} of {one.agreement.count}; logits differ by "
                    f"{one.difference:.2g} of the largest ({', '.join(one.checked_with)}).",
                    soft_wrap=True,
                )
            if to == "onnx":
                output.print(f"Try it: eckart run {safe(str(out))} --prompt '…'", soft_wrap=True)
        for note in found.notes:
            errors.print(f"[yellow]note:[/] {safe(note)}", soft_wrap=True)
