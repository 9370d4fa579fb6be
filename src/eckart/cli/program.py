"""The program `eckart`, and the options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import output

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Low-rank surgery on transformers: find the matrix to cut, prove the gain, ship the model.",
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of the model, or a Hugging Face id.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="New or empty folder for the results.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (stored, float32 on CPU), stored, float32, bfloat16, float16.")]
Seed = Annotated[int | None, typer.Option(help="Of every random choice.  [default: 0]", show_default=False)]
Recipe = Annotated[Path | None, typer.Option(help="YAML file with the same settings.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print results.json on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Accept a plan made for other weights.")]
Normalize = Annotated[
    str | None, typer.Option(help="Compare choices by sum, 'none', or mean, 'tokens'.  [default: none]")
]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens in a batch.  [default: 2048]")]
Overlong = Annotated[str | None, typer.Option(help="Long prompts: 'error' or 'truncate'.  [default: error]")]
Window = Annotated[int | None, typer.Option(help="Tokens of a perplexity window.")]
Stride = Annotated[int | None, typer.Option(help="Tokens by which windows advance.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        output.print(f"eckart {version('eckart')}")
        raise typer.Exit


@app.callback()
def _program(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
