"""What singular values say of each matrix of a model, scanned one by one into a ledger that survives a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from eckart import noise, spectrum
from eckart.errors import EckartError, OutputError
from eckart.matrices import Matrix
from eckart.results import SCHEMA_VERSION, environment, read_json, to_json
from eckart.shards import Checkpoint

LEDGER = "spectra.jsonl"
RESULTS = "inspect.json"
CODE = "1"
"""Version of what a row holds; rows of another are measured again."""
DIGITS = 7
"""Significant digits of a stored singular value."""
MEASURES = (
    "stable_rank",
    "effective_rank",
    "spectral_entropy",
    "gap",
    "condition",
    "alpha",
    "hill",
    "signal_share",
    "signal_energy",
    "snr",
    "norm",
)
"""What the singular values say, in the order of the tables. Ranks and entropy are shares of the most possible."""


class Inspected(BaseModel):
    """What a matrix's singular values say of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    matrix: str
    parameter: str = Field(description="the parameter that holds it")
    layer: int | None
    type: str
    stack: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    sigma: float = Field(description="standard deviation of the fitted noise's entries")
    edges: dict[str, float] = Field(description="rule -> singular value above which it sees signal")
    ranks: dict[str, int] = Field(description="rule -> rank")
    measures: dict[str, float | None] = Field(description="see `MEASURES`; null where there is none")
    heads: tuple[dict[str, float | None], ...] = Field(
        default=(), description="of each attention head's rows: norm, stable and effective rank, entropy"
    )
    seconds: float = Field(description="for reading it and its singular values")


@dataclass(frozen=True)
class Scan:
    """What a progress display needs."""

    done: int
    total: int
    matrix: str
    seconds: float
    """So far, of this command."""
    numbers_done: int
    numbers_total: int
    """Entries of the matrices; time grows faster than these."""


def inspect_matrix(weight: Tensor, matrix: Matrix, *, fast: bool = False) -> Inspected:
    """Measure one matrix.

    Args:
        weight: Shape `matrix.shape`, any floating dtype and device. Not modified.
        matrix: Which one.
        fast: Take singular values by `eckart.spectrum.fast_singular_values`: edges and ranks are as good, the smallest
            values, and with them the condition, may have no correct digit.

    Returns:
        Its singular values, edges and ranks by every rule, and measures.

    Raises:
        SpectrumError: The weight is not finite.
    """
    started = time.perf_counter()
    values = (spectrum.fast_singular_values if fast else spectrum.singular_values)(weight).cpu()
    seconds = time.perf_counter() - started
    found = spectrum.measure(values)
    shape, least = matrix.shape, matrix.rank
    edges = {rule: edge(values, shape) for rule, edge in noise.EDGES.items()}
    squares, signal = values.square(), values > edges["tw"]
    measures = {
        "stable_rank": found.stable_rank / least,
        "effective_rank": found.effective_rank / least,
        "spectral_entropy": found.spectral_entropy / math.log(least) if least > 1 else math.nan,
        "gap": found.gap,
        "condition": math.nan if fast else found.condition,
        "alpha": found.power_law.alpha,
        "hill": found.hill,
        "signal_share": float(signal.double().mean()),
        "signal_energy": float(squares[signal].sum() / squares.sum()) if found.energy > 0 else math.nan,
        "snr": noise.snr(values, edges["tw"]),
        "norm": found.norm,
    }
    heads: Sequence[Any] = ()
    if matrix.heads is not None and matrix.heads > 1:
        heads = spectrum.measure_heads(weight, matrix.heads)
    return Inspected(
        matrix=matrix.name,
        parameter=matrix.parameter,
        layer=matrix.layer,
        type=matrix.type,
        stack=matrix.stack,
        shape=shape,
        singular_values=tuple(_rounded(value) for value in values.tolist()),
        sigma=noise.fit(values, shape).sigma,
        edges=edges,
        ranks={rule: rank(values, shape) for rule, rank in noise.RANK_RULES.items()},
        measures={name: _finite(measures[name]) for name in MEASURES},
        heads=tuple(
            {
                "norm": _finite(head.norm),
                "stable_rank": _finite(head.stable_rank),
                "effective_rank": _finite(head.effective_rank),
                "spectral_entropy": _finite(head.spectral_entropy),
            }
            for head in heads
        ),
        seconds=seconds,
    )


def scan(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    ledger: Path | None = None,
    *,
    fast: bool = False,
    progress: Callable[[Scan], None] | None = None,
) -> tuple[Inspected, ...]:
    """Measure matrices one after the other, never holding two.

    Args:
        checkpoint: Where they are.
        matrices: Of it.
        ledger: File to which every matrix is added as soon as it is measured, and from which those that it holds are
            taken; None keeps none. A matrix whose file changed is measured again.
        fast: As for `inspect_matrix`.
        progress: Called before every matrix that is measured, and at the end.

    Returns:
        One entry a matrix, in order.

    Raises:
        ModelError: A file is damaged or gone.
        OutputError: The ledger cannot be written; what it holds stays.
    """
    known = read_ledger(ledger) if ledger is not None else {}
    keys = [f"{CODE} {'fast' if fast else 'exact'} {checkpoint.key(matrix)}" for matrix in matrices]
    started, found = time.perf_counter(), []
    numbers = [math.prod(matrix.shape) for matrix in matrices]

    def tell(done: int, name: str) -> None:
        if progress is not None:
            seconds = time.perf_counter() - started
            progress(Scan(done, len(matrices), name, seconds, sum(numbers[:done]), sum(numbers)))

    for index, (matrix, key) in enumerate(zip(matrices, keys)):
        if key not in known:
            tell(index, matrix.name)
            row = inspect_matrix(checkpoint.read(matrix), matrix, fast=fast)
            if ledger is not None:
                _append(ledger, key, row)
            known[key] = row
        found.append(known[key])
    tell(len(matrices), "")
    return tuple(found)


def read_ledger(path: Path) -> dict[str, Inspected]:
    """Read what a scan has measured, dropping a last line that a kill left unfinished.

    Args:
        path: The ledger; it need not exist. A line that is not whole is cut off the file.

    Returns:
        Key -> row.

    Raises:
        OutputError: It cannot be read or mended.
    """
    found: dict[str, Inspected] = {}
    try:
        if not path.exists():
            return found
        content = path.read_bytes()
        sound = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                row = Inspected.model_validate(entry["row"])
                key = entry["key"]
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            if not line.endswith(b"\n") or not isinstance(key, str):
                break
            found[key] = row
            sound += len(line)
        if sound < len(content):
            os.truncate(path, sound)
    except OSError as error:
        raise _unwritable(path, error) from error
    return found


def _append(path: Path, key: str, row: Inspected) -> None:
    line = json.dumps({"key": key, "row": row.model_dump(mode="json")}, allow_nan=False) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} could not be written: {error.strerror or error}. What was measured before is kept. "
        "Free space there and give the same command again, or choose another --out."
    )


def read_inspection(path: Path) -> tuple[Inspected, ...]:
    """Read the matrices of an inspection again.

    Args:
        path: `inspect.json`, or the folder that holds it.

    Returns:
        One entry a matrix, in the order of the model.

    Raises:
        EckartError: It is missing, not JSON or of another form.
    """
    path = path / RESULTS if path.is_dir() else path
    content = read_json(path)
    if (
        not isinstance(content, dict)
        or content.get("kind") != "inspect"
        or content.get("schema_version") != SCHEMA_VERSION
    ):
        raise EckartError(
            f"{path} is no inspection that this version reads. It has kind 'inspect' and schema_version 1. "
            "Give what `eckart inspect` wrote."
        )
    try:
        return tuple(Inspected.model_validate(row) for row in content["matrices"])
    except (KeyError, TypeError, ValidationError) as error:
        raise EckartError(
            f"{path} lacks a field or holds one of the wrong type: {str(error).splitlines()[0]}. "
            "`eckart inspect` writes every field. Make it again with another --out."
        ) from None


def results_of(
    rows: Sequence[Inspected],
    *,
    source: str,
    architecture: str,
    parameters: int,
    coverage: float | None = None,
    recipe: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    warnings: Sequence[str] = (),
    skipped: Mapping[str, str] | None = None,
    **found: Any,
) -> dict[str, Any]:
    """Write an inspection as `inspect.json` holds it.

    Args:
        rows: One a matrix.
        source: Where the model came from.
        architecture: Its class.
        parameters: Numbers in it.
        coverage: Share of the weights of matrices that `rows` could be about; None where it is not known.
        recipe: The settings.
        seconds: What took how long.
        warnings: Sentences.
        skipped: Matrix -> why it was left out.
        **found: `data`, `importance`, `heads`, `correlations`, `timeline`, where there are such.

    Returns:
        Plain JSON values; see docs/files.md.
    """
    nothing: dict[str, Any] = {"data": None, "importance": None, "heads": None, "correlations": [], "timeline": None}
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "inspect",
        "model": {"source": source, "architecture": architecture, "parameters": parameters, "coverage": coverage},
        "matrices": [row.model_dump(mode="json") for row in rows],
        **(nothing | found),
        "skipped": dict(skipped or {}),
        "warnings": list(warnings),
        "seconds": dict(seconds or {}),
        "environment": environment(),
        "recipe": dict(recipe or {}),
    }
    return json.loads(to_json(content))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
