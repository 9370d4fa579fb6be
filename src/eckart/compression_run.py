"""A compression's folder: resumed, and filled so that results.json is there only when all the rest is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eckart.calibration import read_windows
from eckart.checkpoint import check_empty, load, load_model, save, shards_of, stored_dtype, temporary_folder
from eckart.compression import WINDOW, compress, forecast
from eckart.errors import TaskError
from eckart.factoring import factor_
from eckart.plan import write_plan
from eckart.quantizer import sizes
from eckart.recipe import CompressSettings, write_recipe
from eckart.report import finish_run
from eckart.results import Measurement, environment, write_text
from eckart.scoring import prepare, rearrange, score, summarize
from eckart.tasks import Task, read_task, read_text, split

WORK = "work"
"""Folder of what an unfinished compression has finished."""
WINDOWS_MEASURED = 64
"""Windows of a text on which a compressed model is measured."""


def run_compress(
    source: str,
    calibration: Path,
    out: Path,
    settings: CompressSettings,
    *,
    task: Path | None = None,
    measure: Sequence[Path] = (),
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Compress a model, and write `plan.json`, `results.json`, `recipe.yaml`, `report.html` and `model/`.

    What is finished lies in `out/work` until the end; the same command goes on from there.

    Args:
        source: Folder or hub id of the model.
        calibration: A text file. Windows of it beyond those that are read measure the result.
        out: The run's folder: new, empty, or holding an unfinished compression with the same settings.
        settings: The budget, and how.
        task: A task file that the model should stay good at, too. A fifth of it takes part, the rest measures.
        measure: Other tasks (.jsonl) and texts on which the model is measured before and after: what they lose is the
            damage elsewhere.
        device: As for `eckart.load`.
        dtype: Of the computation, as for `eckart.load`; the folder is written in the dtype of the original.
        progress: Called with an `eckart.compression.Progress` before every part of the work.

    Returns:
        The contents of results.json.

    Raises:
        EckartError: Bad input, or the folder cannot be written.
    """
    begun = compression_begun(out)
    if not begun:
        check_empty(out)
    text = read_text(calibration)
    measured = [read_task(path) if path.suffix == ".jsonl" else read_text(path) for path in measure]
    chosen, proving = (None, None) if task is None else split(read_task(task), seed=settings.seed)
    if proving is not None:
        measured.insert(0, proving)
    started = time.perf_counter()
    model, tokenizer = load(source, device=device, dtype=dtype)
    stored = stored_dtype(source, model)
    found = compress(
        model,
        tokenizer,
        text,
        settings,
        task=chosen,
        source=source,
        stored=stored,
        spill=out / WORK,
        progress=progress,
    )
    compressed = time.perf_counter()
    before = _quality(model, tokenizer, text, measured, settings)
    folder = out / "model"
    if not folder.exists():
        small = load_model(source, device=device, dtype="stored")
        with temporary_folder(folder) as spill:
            mapped = spill if small.device.type == "cpu" else None
            if found.elastic is not None:
                found.elastic(small, spill=mapped)
            else:
                factor_(small, found.plan, factors=found.factors, storage=settings.storage, spill=mapped)
            save(small, folder, tokenizer, found.plan)
    # An elastic folder is measured at several sizes, the largest first.
    served = []
    for ratio in found.facts["ratios"] if settings.elastic else [None]:
        small = load_model(str(folder), device=device, dtype=dtype, ratio=ratio)
        after = _quality(small, tokenizer, text, measured, settings)
        size, dense = sizes(load_model(str(folder), device="cpu", dtype="stored", ratio=ratio))
        served.append({"ratio": ratio, "size": size, "quality": after})
    after = served[0]["quality"]
    results = found.to_results() | {
        "size": {"before": dense, "after": served[0]["size"]},
        "quality": [{"name": name, "before": rows, "after": after[name]} for name, rows in before.items()],
        "elastic": {"bytes": _bytes_of(folder), "served": served} if settings.elastic else None,
        "seconds": {"compress": compressed - started, "total": time.perf_counter() - started},
        "environment": environment(),
    }
    write_plan(out / "plan.json", found.plan)
    write_text(out / "recipe.yaml", write_recipe(settings))
    finish_run(out, results)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return results


def forecast_compress(
    source: str,
    calibration: Path,
    settings: CompressSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Say what a compression would do; as for `eckart.compression.forecast`.

    Args:
        source: As for `run_compress`.
        calibration: As for `run_compress`.
        settings: As for `run_compress`.
        device: As for `run_compress`.
        dtype: As for `run_compress`.
        progress: As for `run_compress`.

    Returns:
        As of `forecast`.

    Raises:
        EckartError: Bad input.
    """
    text = read_text(calibration)
    model, tokenizer = load(source, device=device, dtype=dtype)
    stored = stored_dtype(source, model)
    return forecast(model, tokenizer, text, settings, stored=stored, progress=progress)


def compression_begun(out: Path) -> bool:
    """Tell whether a folder holds a compression that was interrupted.

    Args:
        out: The folder; it need not exist.

    Returns:
        Whether it does.
    """
    return (out / WORK).is_dir() and not (out / "results.json").exists()


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in shards_of(str(folder)))


def _quality(
    model: Any, tokenizer: Any, text: Task, measured: Sequence[Task], settings: CompressSettings
) -> dict[str, dict[str, Measurement]]:
    """Perplexity on unread windows of the calibration text, and on whatever else was given."""
    window = settings.window or WINDOW
    found = {}
    for number, task in enumerate((text, *measured)):
        if task.kind != "text":
            encoded = prepare(model, tokenizer, task, batch_tokens=settings.batch_tokens)
        else:
            first = 0 if number else settings.windows
            try:
                encoded = read_windows(task, tokenizer, length=window, count=WINDOWS_MEASURED, first=first)
            except TaskError:
                if number:
                    raise
                continue  # the text ends with the windows that were read
            encoded = rearrange(model, encoded)
        name = task.name if number else f"{task.name}, windows that were not read"
        found[name] = summarize(encoded, score(model, tokenizer, encoded, normalize=settings.normalize))
    return found
