"""`eckart serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from eckart.cli.console import errors, reported, safe
from eckart.cli.program import Debug, Device, Dtype, Model, app


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Answer OpenAI's requests (/v1/completions, /v1/chat/completions) with a model, factored or not."""
    with reported(debug):
        from eckart.server import serve

        errors.print(f"Serving {safe(model)} at http://{safe(host)}:{port}/v1 once it is loaded; Ctrl-C ends it.")
        serve(model, host=host, port=port, device=device, dtype=dtype)
