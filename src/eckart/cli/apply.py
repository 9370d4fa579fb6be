"""`eckart apply`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import errors, output, reported, safe
from eckart.cli.program import Debug, Device, Dtype, Force, Model, Out, app


@app.command()
def apply(
    model: Model,
    out: Out,
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="plan.json, or the folder of a run.", show_default=False)
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Instead of PLAN: one ratio of an elastic folder.", show_default=False)
    ] = None,
    bytes: Annotated[
        int | None, typer.Option(help="Instead of PLAN: what fits, of an elastic folder.", show_default=False)
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Write dense weights, not factors.")] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="Add a modeling file, for trust_remote_code=True without eckart.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "stored",
    force: Force = False,
    json: Annotated[bool, typer.Option("--json", help="Print on stdout what was written, and its size.")] = False,
    debug: Debug = False,
) -> None:
    """Write the model that a plan describes, or one size of an elastic one, to OUT/model."""
    if sum(given is not None for given in (plan, ratio, bytes)) != 1:
        raise typer.BadParameter("give a PLAN, or of an elastic folder one of --ratio and --bytes", param_hint="PLAN")
    if dense and portable:
        raise typer.BadParameter("dense weights load anywhere as they are", param_hint="--portable")
    with reported(debug):
        from eckart.results import to_json
        from eckart.run import run_apply

        folder, factoring = run_apply(
            model,
            plan,
            out,
            ratio=ratio,
            bytes=bytes,
            device=device,
            dtype=dtype,
            force=force,
            dense=dense,
            portable=portable,
        )
        if json:
            facts = {} if factoring is None else asdict(factoring) | {"layers": [*factoring.layers]}
            sys.stdout.write(to_json({"model": folder, **facts}))
        elif factoring is None or not factoring.layers:
            output.print(f"Wrote {safe(str(folder))}, which plain transformers loads.", soft_wrap=True)
        else:
            before, after = factoring.before, factoring.after
            output.print(
                f"Wrote {safe(str(folder))}, which transformers loads after `import eckart`.\n"
                f"{len(factoring.layers)} weights are stored as factors: the model takes {after.bytes:,} bytes "
                f"instead of {before.bytes:,} ({100 * after.bytes / before.bytes:.1f} %).",
                soft_wrap=True,
            )
        for name, reason in factoring.dense.items() if factoring is not None else ():
            errors.print(f"[yellow]note:[/] {safe(name)} stays dense: {safe(reason)}", soft_wrap=True)
