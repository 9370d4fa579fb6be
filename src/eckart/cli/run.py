"""`eckart run`: the one verb that needs neither torch nor transformers."""

from __future__ import annotations

import json as json_
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import disarmed, errors, reported
from eckart.cli.program import Debug, app


@app.command()
def run(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="What `eckart export --to onnx` wrote.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above: draw.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="By default one a core.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print text, counts and speed as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with an exported model, without torch."""
    with reported(debug, transformers=False):
        from eckart.onnx_runner import encode, generate, open_model, text_of

        opened = open_model(model, threads=threads)
        ids = encode(opened, prompt)
        times = [time.perf_counter()]

        def timed(new: Iterator[int]) -> Iterator[int]:
            for token in new:
                times.append(time.perf_counter())
                yield token

        new = timed(generate(opened, ids, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed))
        pieces = []
        for piece in text_of(opened, ids, new):
            pieces.append(piece)
            if not json:
                sys.stdout.write(disarmed(piece))
                sys.stdout.flush()
        count = len(times) - 1
        # The first token has the time of reading the prompt in it.
        speed = (count - 1) / (times[-1] - times[1]) if count > 1 else None
        if json:
            found = {
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "new_tokens": count,
                "first_token_seconds": times[1] - times[0] if count else None,
                "tokens_per_second": speed,
            }
            sys.stdout.write(json_.dumps(found, indent=1, ensure_ascii=False) + "\n")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        rate = "" if speed is None else f", {speed:.1f} a second"
        errors.print(f"{len(ids)} tokens read, {count} generated{rate}.")
