"""What the program prints: results on stdout, progress and messages on stderr, and text from outside disarmed."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich import markup
from rich.console import Console

from eckart.errors import EckartError

if TYPE_CHECKING:
    from eckart.results import Gain, Measurement

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)


@contextmanager
def reported(debug: bool, resume: bool = False, transformers: bool = True) -> Iterator[None]:
    """Turn errors into one message and an exit status: 1 bad input, 130 interrupted."""
    try:
        if transformers:
            silence_transformers()
        yield
    except EckartError as error:
        if debug:
            raise
        errors.print(f"[bold red]error:[/] {safe(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("\nInterrupted.", end=" ")
        if resume:
            errors.print("Nothing measured is lost. To go on, give the same command again:")
            errors.print(f"  {safe(shlex.join(['eckart', *sys.argv[1:]]))}", soft_wrap=True)
        raise typer.Exit(130) from None


def silence_transformers() -> None:
    """Keep transformers, what it imports, and the hub client from printing."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def leading(found: Mapping[str, Any]) -> str:
    """The measurement that says most."""
    return next(name for name in ("accuracy", "loss", "divergence") if name in found)


def safe(text: str) -> str:
    """Disarm text from models and data: no console markup, no control characters."""
    return markup.escape(disarmed(text))


def disarmed(text: str) -> str:
    """Take control characters out of text, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def number(found: Measurement | None) -> str:
    """Write a measurement with its standard error; shares in per cent."""
    if found is None:
        return ""
    if found.unit == "fraction":
        return f"{100 * found.value:.1f} ± {100 * found.stderr:.1f} %"
    return f"{found.value:.4g} ± {found.stderr:.2g}"


def gain_of(gain: Gain | None) -> str:
    """Write a paired gain with its interval."""
    if gain is None:
        return ""
    low, high = gain.interval
    if gain.unit == "fraction":
        return f"{100 * gain.value:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{gain.value:+.3g} ({low:+.3g} to {high:+.3g})"


def chance(p_value: float) -> str:
    """Write a p-value after `p`."""
    return f"= {p_value:.2g}" if p_value >= 1e-99 else "< 1e-99"


def words(text: str | None) -> Sequence[str] | None:
    """Read a list such as `fc_in,fc_out`."""
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def integers(text: str | None, what: str = "layers") -> Sequence[int] | None:
    """Read a list such as `3`, `0,1` or `2-5`."""
    if text is None:
        return None
    found: list[int] = []
    for word in words(text) or ():
        first, dash, last = word[1:].partition("-")
        try:
            span = range(int(word[0] + first), int(last) + 1) if dash else [int(word)]
            # Far more than any model has: a slip of the keyboard must not fill the memory.
            found.extend(span[:100_000])
        except ValueError:
            raise typer.BadParameter(f"{what} are numbers such as 3, 0,1 or 2-5, not '{word}'") from None
    return tuple(found)


def numbers(text: str | None) -> Sequence[float] | None:
    """Read a list such as `0.01,0.1`."""
    try:
        return None if text is None else tuple(float(word) for word in words(text) or ())
    except ValueError:
        raise typer.BadParameter(f"rho is a list of numbers such as 0.01,0.1, not '{text}'") from None
