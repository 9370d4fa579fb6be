"""Inspect a model: spectra, noise edges, importance and a timeline, in a folder with a report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eckart.checkpoint import load
from eckart.dynamics import step_of, timeline_of
from eckart.errors import ModelError
from eckart.importance import MEASURES as IMPORTANCE
from eckart.importance import Importance, correlate, measure_importance, sample
from eckart.inspection_report import render_inspection
from eckart.matrices import Matrix, find_matrices, select
from eckart.recipe import InspectSettings, write_recipe
from eckart.results import Measurement, to_json, write_text
from eckart.run import open_run
from eckart.scoring import prepare
from eckart.shards import open_checkpoint
from eckart.spectra import LEDGER, MEASURES, RESULTS, Inspected, Scan, inspect_matrix, results_of, scan
from eckart.tasks import Task
from eckart.unfreezing import SignalRatio, choose, module_type, unfrozen_parameters, write_ratios


def run_inspect(
    source: str,
    out: Path,
    settings: InspectSettings,
    task: Task | None = None,
    *,
    checkpoints: Sequence[Path] = (),
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[Scan], None] | None = None,
    stage: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Inspect a model, and write `inspect.json`, `report.html` and what to train as Spectrum's files.

    Args:
        source: Folder or hub id of the model. Its weights are read one matrix at a time, unless there is a task.
        out: The run's folder: new, empty, or holding an unfinished inspection.
        settings: What to measure.
        task: Examples or text on which importance is measured; the model is loaded for that.
        checkpoints: Folders of earlier checkpoints of the same model, for a timeline that ends with `source`.
        device: As for `eckart.load`, where there is a task.
        dtype: As for `eckart.load`.
        progress: Called before every matrix.
        stage: Called with what is measured besides, how many of these are done and how many there are.

    Returns:
        The contents of inspect.json.

    Raises:
        EckartError: Bad input; a folder made for the run is removed again if nothing was measured.
    """
    started = time.perf_counter()
    made = not out.exists()
    open_run(out, ledger=LEDGER, results=RESULTS)
    try:
        checkpoint = open_checkpoint(source)
        matrices = select(checkpoint.matrices, types=settings.types, layers=settings.layers)
        moments = [(step_of(folder), open_checkpoint(str(folder))) for folder in checkpoints]
        timeline = []
        for step, one in sorted(moments, key=lambda moment: moment[0]):
            chosen = [matrix for matrix in one.matrices if matrix in matrices]
            if len(chosen) < len(matrices):
                raise ModelError(
                    f"{one.source} has {len(chosen)} of the {len(matrices)} matrices of {source}. "
                    "Checkpoints of one training have the same matrices. Leave it out of --checkpoints."
                )
            timeline.append((step, scan(one, chosen, out / LEDGER, fast=settings.fast, progress=progress)))
        rows = scan(checkpoint, matrices, out / LEDGER, fast=settings.fast, progress=progress)
        importance = None
        if task is not None:
            importance = _importance(source, task, matrices, settings, device, dtype, stage)
    except BaseException:
        if not (out / LEDGER).exists() and made:
            out.rmdir()
        raise
    table = importance_table(rows, importance)
    results = results_of(
        rows,
        source=source,
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        coverage=checkpoint.coverage,
        recipe=settings.model_dump(mode="json"),
        seconds={"total": time.perf_counter() - started, "spectra": sum(row.seconds for row in rows)},
        warnings=checkpoint.warnings,
        skipped=checkpoint.skipped,
        data={"name": task.name, "loss": importance.loss} if task and importance else None,
        importance=importance.matrices if importance else None,
        heads=importance.heads if importance else None,
        correlations=correlate(table, [row.type for row in rows]),
        timeline=timeline_of(timeline) if timeline else None,
    )
    ratios = parameter_ratios(rows)
    bare = [row.parameter for row in rows if not row.parameter.endswith(".weight")]
    chosen = choose(ratios, settings.top)
    write_text(out / "unfrozen_parameters.yaml", unfrozen_parameters(chosen, always=checkpoint.embeddings, bare=bare))
    write_text(out / "snr_results.json", write_ratios(ratios))
    write_text(out / "recipe.yaml", write_recipe(settings))
    write_text(out / "report.html", render_inspection(results))
    write_text(out / RESULTS, to_json(results))
    return results


def _importance(
    source: str,
    task: Task,
    matrices: Sequence[Matrix],
    settings: InspectSettings,
    device: str,
    dtype: str,
    stage: Callable[[str, int, int], None] | None,
) -> Importance:
    model, tokenizer = load(source, device=device, dtype=dtype)
    found = find_matrices(model)
    wanted = {matrix.name for matrix in matrices}
    encoded = sample(prepare(model, tokenizer, task, **settings.encoding), settings.tokens)
    return measure_importance(
        model,
        tokenizer,
        encoded,
        [matrix for matrix in found if matrix.name in wanted],
        rho=settings.rho,
        normalize=settings.normalize,
        progress=stage,
    )


def importance_table(rows: Sequence[Inspected], importance: Importance | None) -> dict[str, list[float]]:
    """Put all measures of all matrices side by side.

    Args:
        rows: From `scan`.
        importance: What data says, where there was some.

    Returns:
        Measure -> its value for each row, NaN where it has none; what data says comes first.
    """
    data = importance.matrices if importance else {}
    columns = (
        {name: [_value(data.get(row.matrix, {}).get(name)) for row in rows] for name in IMPORTANCE} if data else {}
    )
    weights = {name: [math.nan if (v := row.measures[name]) is None else v for row in rows] for name in MEASURES}
    return {name: column for name, column in (columns | weights).items() if any(map(math.isfinite, column))}


def parameter_ratios(rows: Sequence[Inspected]) -> dict[str, SignalRatio]:
    """Give each parameter's ratio of signal to noise, over all its parts and experts.

    Args:
        rows: From `scan`.

    Returns:
        Module (or parameter, where it is not a module's weight) -> ratio at the Tracy-Widom edge.
    """
    sums: dict[str, list[float]] = {}
    for row in rows:
        above = sum(value for value in row.singular_values if value > row.edges["tw"])
        total = sums.setdefault(row.parameter.removesuffix(".weight"), [0.0, 0.0])
        total[0] += above
        total[1] += sum(row.singular_values) - above
    return {
        name: SignalRatio(signal / rest if rest > 0 else None, module_type(name))
        for name, (signal, rest) in sums.items()
    }


def forecast_inspect(source: str, settings: InspectSettings, checkpoints: Sequence[Path] = ()) -> dict[str, Any]:
    """Say what an inspection would do, after measuring one matrix of every shape.

    Args:
        source: As for `run_inspect`.
        settings: As for `run_inspect`.
        checkpoints: As for `run_inspect`.

    Returns:
        `matrices`, `numbers`, `seconds` and `bytes`: the most memory that one of them should need.

    Raises:
        EckartError: Bad input.
    """
    checkpoint = open_checkpoint(source)
    matrices = select(checkpoint.matrices, types=settings.types, layers=settings.layers)
    times: dict[tuple[int, int], float] = {}
    for matrix in matrices:
        if matrix.shape not in times:
            started = time.perf_counter()
            inspect_matrix(checkpoint.read(matrix), matrix, fast=settings.fast)
            times[matrix.shape] = time.perf_counter() - started
    return {
        "matrices": len(matrices),
        "numbers": sum(math.prod(matrix.shape) for matrix in matrices),
        "seconds": (1 + len(checkpoints)) * sum(times[matrix.shape] for matrix in matrices),
        "bytes": 3 * 4 * max(math.prod(matrix.shape) for matrix in matrices),
        "warnings": list(checkpoint.warnings),
    }


def _value(measured: Measurement | None) -> float:
    return math.nan if measured is None else measured.value
