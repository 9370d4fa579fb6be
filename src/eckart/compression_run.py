"""A compression's folder: resumed, and filled so that results.json is there only when all the rest is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.checkpoint import (
    check_empty,
    load,
    load_model,
    save,
    sentence_files,
    shards_of,
    stored_dtype,
    temporary_folder,
)
from eckart.compression import compress, forecast, pooling_for, read_calibration
from eckart.embedding import Pooling, agreement, embed_all, read_pooling
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
SENTENCES_MEASURED = 500
"""Sentences of it, for an encoder."""


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
        progress: Called with an `eckart.compression_steps.Progress` before every part of the work.

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
    with temporary_folder(out) as lending:
        model, tokenizer = load(source, device=device, dtype=dtype, spill=lending)
    stored = stored_dtype(source, model)
    pooling = pooling_for(model, settings, read_pooling(source))
    files = sentence_files(source)
    for other in measured if pooling is not None else ():
        read_calibration(model, tokenizer, other, settings, pooling)  # what cannot be measured is refused now
    found = compress(
        model,
        tokenizer,
        text,
        settings,
        task=chosen,
        pooling=pooling,
        source=source,
        stored=stored,
        spill=out / WORK,
        progress=progress,
    )
    compressed = time.perf_counter()
    before = _said(model, tokenizer, text, measured, settings, pooling)
    folder = out / "model"
    if not folder.exists():
        small = load_model(source, device=device, dtype="stored")
        with temporary_folder(folder) as spill:
            mapped = spill if small.device.type == "cpu" else None
            if found.elastic is not None:
                found.elastic(small, spill=mapped)
            else:
                factor_(small, found.plan, factors=found.factors, storage=settings.storage, spill=mapped)
            save(small, folder, tokenizer, found.plan, files=files)
    # An elastic folder is measured at several sizes, the largest first.
    served = []
    for ratio in found.facts["ratios"] if settings.elastic else [None]:
        with temporary_folder(out) as lending:
            small = load_model(str(folder), device=device, dtype=dtype, ratio=ratio, spill=lending)
        after = _said(small, tokenizer, text, measured, settings, pooling)
        size, dense = sizes(load_model(str(folder), device="cpu", dtype="stored", ratio=ratio))
        quality = [{"name": name, **_compared(said, after[name])} for name, said in before.items()]
        served.append({"ratio": ratio, "size": {"before": dense, "after": size}, "quality": quality})
    results = found.to_results() | {
        "size": served[0]["size"],
        "quality": served[0]["quality"],
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
    out: Path,
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
        out: Where it would be written. Space on its disk is borrowed, and nothing is left there.
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
    with temporary_folder(out) as spill:
        model, tokenizer = load(source, device=device, dtype=dtype, spill=spill)
        stored = stored_dtype(source, model)
        pooling = read_pooling(source)
        return forecast(
            model, tokenizer, text, settings, pooling=pooling, stored=stored, spill=spill, progress=progress
        )


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


def _said(
    model: Any,
    tokenizer: Any,
    text: Task,
    measured: Sequence[Task],
    settings: CompressSettings,
    pooling: Pooling | None,
) -> dict[str, dict[str, Measurement] | Tensor]:
    """Perplexity of unread windows of the calibration text and whatever else was given; embeddings of an encoder."""
    found: dict[str, dict[str, Measurement] | Tensor] = {}
    for number, task in enumerate((text, *measured)):
        first, most = 0 if number else settings.windows, WINDOWS_MEASURED if pooling is None else SENTENCES_MEASURED
        try:
            if task.kind != "text" and pooling is None:
                encoded = prepare(model, tokenizer, task, batch_tokens=settings.batch_tokens)
            else:
                encoded = read_calibration(model, tokenizer, task, settings, pooling, first=first, most=most)
        except TaskError:
            if number:
                raise
            continue  # the text ends with what was read
        kept = "windows" if pooling is None else "sentences"
        name = task.name if number else f"{task.name}, {kept} that were not read"
        if pooling is not None:
            found[name] = embed_all(model, encoded, pooling)
        else:
            encoded = rearrange(model, encoded) if task.kind == "text" else encoded
            found[name] = summarize(encoded, score(model, tokenizer, encoded, normalize=settings.normalize))
    return found


def _compared(before: Any, after: Any) -> dict[str, dict[str, Measurement]]:
    """Measurements before and after; an encoder's are of its agreement with the original, which agrees with itself."""
    if isinstance(before, Tensor):
        return {"before": agreement(before, before), "after": agreement(before, after)}
    return {"before": before, "after": after}
