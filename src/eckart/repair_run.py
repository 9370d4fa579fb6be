"""A repair's folder: rounded weights, the corrections as an adapter, and what both cost and gain."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eckart.checkpoint import check_empty, load, new_folder, save, stored_dtype
from eckart.encoding import context_length
from eckart.onnx_graph import FINE, packed_bytes
from eckart.peft_adapter import check_peft, write_adapter
from eckart.recipe import RecoverSettings, write_recipe
from eckart.repairing import Repair, check_repairable, repair
from eckart.report import finish_run
from eckart.results import SCHEMA_VERSION, environment, write_text
from eckart.surgery import check_finite, weights_sha256
from eckart.tasks import read_text
from eckart.training import Progress, make_windows

WORK = "work"
"""Folder of what an unfinished repair has finished."""
TEXT_PASSAGES = 20
"""A text of fewer documents is cut into passages: some calibrate, others prove."""


def run_repair(
    source: str,
    data: Path,
    out: Path,
    settings: RecoverSettings,
    *,
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> Repair:
    """Round a model and repair it: write `model/`, `adapter/`, `results.json`, `report.html` and `recipe.yaml`.

    Args:
        source: Folder or hub id of the dense model.
        data: Text to calibrate on; documents are separated by `<|endofdoc|>`, and a single one is cut into passages.
        out: New or empty folder, or one that holds an unfinished repair with the same settings.
        settings: As for `eckart.repair`.
        device: As for `eckart.load`.
        progress: Called before each weight.

    Returns:
        What was measured.

    Raises:
        EckartError: Bad input, or the folder cannot be written.
    """
    check_peft()
    if not repair_begun(out):
        check_empty(out)
    text = read_text(data, passages=TEXT_PASSAGES)
    started = time.perf_counter()
    model, tokenizer = load(source, device=device)
    check_finite(model)
    stored = stored_dtype(source, model)
    made_from = {
        "source": source,
        "architecture": type(model).__name__,
        "weights_sha256": weights_sha256(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    found = repair(model, tokenizer, text, settings, stored=stored, spill=out / WORK, progress=progress)
    for half in [out / "model", out / "adapter", *out.glob(".model-*"), *out.glob(".adapter-*")]:
        shutil.rmtree(half, ignore_errors=True)  # of a life that was killed while it wrote
    with new_folder(out / "adapter") as folder:
        write_adapter(folder, {path: (c.up, c.down) for path, c in found.corrections.items()}, base="../model")
    save(model.to(stored), out / "model", tokenizer)
    write_text(out / "recipe.yaml", write_recipe(settings))
    finish_run(
        out,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "repair",
            "model": made_from,
            "data": {"name": text.name, "documents": len(text.examples)} | found.windows,
            "bits": settings.bits,
            "test": found.test,
            "gain": found.gain,
            "dense_gain": found.dense_gain,
            "bytes": found.bytes,
            "matrices": [
                {
                    "matrix": path,
                    "shape": [correction.up.shape[0], correction.down.shape[1]],
                    "rank": correction.down.shape[0],
                    "error_rounded": correction.before,
                    "error_repaired": correction.after,
                }
                for path, correction in found.corrections.items()
            ],
            "warnings": _warnings(found),
            "seconds": {"total": time.perf_counter() - started},
            "environment": environment(),
            "recipe": settings.model_dump(mode="json"),
        },
    )
    shutil.rmtree(out / WORK)
    return found


def repair_begun(out: Path) -> bool:
    """Tell whether a folder holds a repair that was interrupted.

    Args:
        out: The folder; it need not exist.

    Returns:
        Whether it does.
    """
    return (out / WORK).is_dir() and not (out / "results.json").exists()


def forecast_repair(source: str, data: Path, settings: RecoverSettings, *, device: str = "auto") -> dict[str, Any]:
    """Say what a repair would read and what it would take, without making one.

    Args:
        source: As for `run_repair`.
        data: As for `run_repair`.
        settings: As for `run_repair`.
        device: As for `run_repair`.

    Returns:
        `windows` of the text, `matrices` that are repaired, and the `bytes` that their weights take: `dense`,
        `rounded` and `corrections`.

    Raises:
        EckartError: Bad input.
    """
    check_peft()
    model, tokenizer = load(source, device=device)
    linear = check_repairable(model, tokenizer, settings)
    windows = make_windows(
        read_text(data, passages=TEXT_PASSAGES), tokenizer, settings, context_length(model, tokenizer)
    )
    taken = {"dense": 0, "rounded": 0, "corrections": 0}
    for matrix in linear:
        out, into = matrix.shape
        rank = min(settings.rank, matrix.rank)
        taken["dense"] += out * into * stored_dtype(source, model).itemsize
        taken["rounded"] += packed_bytes(matrix.shape, settings.bits)
        taken["corrections"] += packed_bytes((out, rank), FINE) + packed_bytes((rank, into), FINE)
    return {
        "windows": {"calibration": len(windows.train), "test": len(windows.test)},
        "matrices": len(linear),
        "bytes": taken,
    }


def _warnings(found: Repair) -> list[str]:
    warnings = []
    if found.gain.interval[1] > 0:
        warnings.append(
            "On the windows that prove, the interval of the gain includes none: rounding alone may be as good, "
            "and it is smaller."
        )
    return warnings
