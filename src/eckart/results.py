"""Measurements with their standard errors, paired comparisons, and JSON files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eckart.errors import EckartError, OutputError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """A number that was measured, with what is needed to judge it."""

    value: float
    stderr: float
    """Standard error of `value`; NaN where one example was measured."""
    count: int
    """Examples (or tokens, where the unit says so) behind `value`."""
    unit: str

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.2g} {self.unit} (n = {self.count})"


@dataclass(frozen=True)
class Gain(Measurement):
    """A paired difference, after minus before, on the same examples."""

    interval: tuple[float, float]
    """95 % interval by paired bootstrap."""
    p_value: float | None = None
    """Two-sided, exact McNemar; None where the difference is not of right and wrong answers."""


@dataclass(frozen=True)
class Spread(Measurement):
    """The median of something measured repeatedly; `count` is how often."""

    least: float
    most: float


def spread(values: Sequence[float], unit: str) -> Spread:
    """Give the median of repeated measurements.

    Args:
        values: At least one. Not modified.
        unit: Of one value.

    Returns:
        The median with the smallest and the largest, and the standard error that it has where values are normal:
        sqrt(pi / 2) times that of the mean.

    >>> spread([3.0, 1.0, 2.0], "s").value
    2.0
    """
    found = mean(np.array(values), unit)
    stderr = math.sqrt(math.pi / 2) * found.stderr
    return Spread(float(np.median(values)), stderr, found.count, unit, float(min(values)), float(max(values)))


# An edit may break a model so far that a loss is infinite. That is a result, not a reason to warn.
@np.errstate(over="ignore", invalid="ignore")
def mean(values: NDArray[Any], unit: str) -> Measurement:
    """Average independent examples.

    Args:
        values: Shape (n,), n >= 1; booleans count as 0 and 1. Not modified.
        unit: Of one value.

    Returns:
        The mean and its standard error, the sample standard deviation over sqrt(n).

    >>> mean(np.array([1.0, 3.0]), "s")
    Measurement(value=2.0, stderr=1.0, count=2, unit='s')
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    stderr = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Measurement(float(values.mean()), stderr, count, unit)


@np.errstate(over="ignore", invalid="ignore")
def perplexity(loss: NDArray[Any], tokens: NDArray[Any]) -> Measurement:
    """Give the exponential of the mean loss per token over windows of unequal length.

    Args:
        loss: Mean loss of each window in nats per token, shape (n,).
        tokens: Scored tokens of each window, shape (n,).

    Returns:
        Perplexity; its standard error by the delta method on the ratio estimator, windows taken as independent.
    """
    weights = np.asarray(tokens, dtype=np.float64)
    average = float((loss * weights).sum() / weights.sum())
    count = len(weights)
    residuals = weights * (np.asarray(loss) - average)
    spread = math.sqrt(float((residuals**2).sum()) * count / (count - 1)) if count > 1 else math.nan
    value = float(np.exp(average))
    return Measurement(value, value * spread / float(weights.sum()), int(weights.sum()), "per token")


@np.errstate(over="ignore", invalid="ignore")
def paired_gain(
    before: NDArray[Any], after: NDArray[Any], unit: str, *, seed: int = 0, resamples: int = 10_000
) -> Gain:
    """Compare two measurements of the same examples.

    Args:
        before: One value an example, shape (n,); booleans for right and wrong.
        after: The same examples in the same order, shape (n,).
        unit: Of one value.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        Mean difference with a 95 % percentile interval and, for booleans, the exact McNemar p-value.

    Source:
        Efron & Tibshirani 1993, chapter 13 (bootstrap); McNemar 1947, its exact binomial form.
    """
    before, after = np.asarray(before), np.asarray(after)
    differences = after.astype(np.float64) - before.astype(np.float64)
    summary = mean(differences, unit)
    generator = np.random.default_rng(seed)
    # Resampling n differences is a multinomial draw over the distinct ones: one row of counts per resample.
    distinct, multiplicity = np.unique(differences, return_counts=True)
    count = len(differences)
    means = np.concatenate(
        [
            generator.multinomial(count, multiplicity / count, size=min(500, resamples - start)) @ distinct / count
            for start in range(0, resamples, 500)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    p_value = mcnemar(before, after) if before.dtype == bool and after.dtype == bool else None
    return Gain(summary.value, summary.stderr, summary.count, unit, (float(low), float(high)), p_value)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Test whether two classifiers differ on the same examples (exact, two-sided).

    Args:
        before: Right or wrong, shape (n,).
        after: The same examples, shape (n,).

    Returns:
        The p-value: of the examples on which they differ, could the split be that of a fair coin?

    >>> mcnemar(np.array([False] * 10), np.array([True] * 10)) == 2 / 2**10
    True
    """
    won = int((after & ~before).sum())
    lost = int((before & ~after).sum())
    trials = won + lost
    if trials == 0:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in range(min(won, lost) + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(log - trials * math.log(2)) for log in logs))


def environment() -> dict[str, str]:
    """Name the versions and the machine that numbers depend on.

    Returns:
        Package versions, Python, platform, processor count.
    """
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }
    for package in ("eckart", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def to_json(value: Any) -> str:
    """Write dataclasses, NaN and numpy numbers as strict JSON (NaN and infinity become null).

    Args:
        value: Dataclasses, dicts, lists and scalars.

    Returns:
        Indented JSON with a final newline.
    """
    return json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_text(path: Path, text: str) -> None:
    """Replace a file by new contents, whole or not at all.

    Args:
        path: The file; its folder must exist.
        text: New contents, written as UTF-8.

    Raises:
        OutputError: The disk is full or the folder cannot be written; an old file is left as it was.
    """
    # Always the same name: what a killed process leaves is replaced by the next one.
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}. Nothing of it was kept. "
            "Free space there or choose another --out."
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its contents.

    Raises:
        EckartError: It is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EckartError(f"{path} does not exist. A finished run has one. Check the folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EckartError(f"{path} is not JSON: {error}. Make it again with the command that wrote it.") from None
