"""A run's folder: made, resumed, and filled so that results.json is there only when all the rest is."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from eckart.checkpoint import check_empty, load, load_model, load_tokenizer, save, sentence_files, temporary_folder
from eckart.dataflow import low_rank_layers
from eckart.driver import Progress
from eckart.errors import EckartError, OutputError
from eckart.factoring import AT_MOST, Factoring, factor_
from eckart.laser import SearchResult, forecast, search
from eckart.ledger import Ledger
from eckart.matrices import find_matrices
from eckart.plan import Plan, read_plan, write_plan
from eckart.quantizer import sizes
from eckart.recipe import SearchSettings, Settings, write_recipe
from eckart.report import finish_run
from eckart.resources import NEW_TOKENS, check_measurable, measure_memory, measure_speed, prompt_of
from eckart.results import SCHEMA_VERSION, environment, read_json, write_text
from eckart.scoring import constant_answer, prepare, score, summarize
from eckart.surgery import applied, check_finite, check_plan, weights_sha256
from eckart.tasks import Task

LEDGER = "trials.sqlite"
RESULTS = "results.json"
DENSE = "multiplied out"
"""What a factored model is compared with where speed and memory are measured."""


def is_unfinished(out: Path, ledger: str = LEDGER, results: str = RESULTS) -> bool:
    """Tell whether a folder holds a search (or other long work) that was interrupted.

    Args:
        out: The folder; it need not exist.
        ledger: Name of the file that grows while the work is done.
        results: Name of the file that is written last.

    Returns:
        Whether it does.
    """
    return (out / ledger).is_file() and not (out / results).exists()


def open_run(out: Path, ledger: str = LEDGER, results: str = RESULTS) -> bool:
    """Make a run's folder, or find that it holds an unfinished one.

    Args:
        out: The folder.
        ledger: As for `is_unfinished`.
        results: As for `is_unfinished`.

    Returns:
        Whether an unfinished search lies there.

    Raises:
        OutputError: It holds something else, or cannot be made.
    """
    if is_unfinished(out, ledger, results):
        return True
    check_empty(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} could not be made: {error.strerror}. Choose another --out.") from error
    return False


def run_search(
    source: str,
    task: Task,
    out: Path,
    settings: SearchSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 1,
    ray: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search, and write `plan.json`, `results.json`, `trials.sqlite`, `recipe.yaml` and `report.html`.

    Args:
        source: Folder or hub id of the model.
        task: The examples.
        out: The run's folder: new, empty, or holding an unfinished search with the same settings.
        settings: The search's settings.
        device: As for `eckart.load`.
        dtype: As for `eckart.load`.
        workers: As for `eckart.search`.
        ray: As for `eckart.search`.
        progress: As for `eckart.search`.

    Returns:
        What was found.

    Raises:
        EckartError: Bad input; a folder made for the run is removed again if nothing was measured.
    """
    made = not out.exists()
    keep = open_run(out)
    books: list[Ledger] = []

    def ledger(fingerprint: dict[str, str]) -> Ledger:
        books.append(Ledger(out / LEDGER, fingerprint))
        return books[0]

    try:
        model, tokenizer = load(source, device=device, dtype=dtype)
        found = search(
            model,
            tokenizer,
            task,
            settings,
            source=source,
            ledger=ledger,
            progress=progress,
            workers=workers,
            ray=ray,
        )
        keep = True
    finally:
        keep = keep or any(not book.empty for book in books)
        for book in books:
            _close(book)
        if not keep:
            for path in out.glob(f"{LEDGER}*"):
                path.unlink()
            if made:
                out.rmdir()
    write_plan(out / "plan.json", found.plan)
    write_text(out / "recipe.yaml", write_recipe(settings))
    finish_run(out, found.to_results())
    return found


def run_evaluate(
    source: str,
    plans: list[Path],
    tasks: list[Task],
    out: Path | None,
    settings: Settings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    speed: bool = False,
    memory: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, unedited and under each plan, on each task.

    Speed and memory are those of the folders that `eckart apply` would write, next to the model itself and, where that
    is factored, to the same model multiplied out.

    Args:
        source: Folder or hub id of the model.
        plans: Plan files; the unedited model is always measured too.
        tasks: At least one, unless speed or memory is measured.
        out: Folder for `results.json` and `report.html`, new or empty; None writes nothing.
        settings: How examples are scored.
        device: As for `eckart.load`.
        dtype: As for `eckart.load`.
        force: Accept plans made for other weights.
        speed: Also measure tokens a second.
        memory: Also measure bytes on disk and in memory.
        progress: Called with a line before each measurement.

    Returns:
        The contents of results.json.

    Raises:
        EckartError: Bad input.
    """
    if out is not None:
        check_empty(out)
    read = {str(path): read_plan(path) for path in plans}
    model = load_model(source, device=device, dtype=dtype)
    tokenizer = load_tokenizer(source) if tasks else None
    check_finite(model)
    if speed or memory:
        check_measurable(model, memory=memory)
    matrices = find_matrices(model)
    for plan in read.values():
        check_plan(model, plan, matrices, force=force)
    encoded = [prepare(model, tokenizer, task, **settings.encoding) for task in tasks]
    rows, warnings = [], []
    for name, edits in [("none", []), *((name, plan.edits) for name, plan in read.items())]:
        with applied(model, edits, matrices):
            for task, part in zip(tasks, encoded):
                if progress is not None:
                    progress(f"{task.name}, plan {name}")
                scores = score(model, tokenizer, part, normalize=settings.normalize)
                rows.append({"plan": name, "task": task.name, "measurements": summarize(part, scores)})
                constant = constant_answer(scores)
                if constant:
                    warnings.append(
                        f"{task.name}, plan {name}: the answer is {constant[0]!r} on {100 * constant[1]:.0f} % of the "
                        "examples, so accuracy measures how often that label is right. Compare losses."
                    )
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluate",
        "model": {
            "source": source,
            "architecture": type(model).__name__,
            "weights_sha256": weights_sha256(model),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "rows": rows,
        "warnings": warnings,
        "environment": environment(),
        "recipe": settings.model_dump(mode="json"),
    }
    if speed or memory:
        low_rank = bool(low_rank_layers(model))
        del model  # the sides are loaded from folders
        place = tempfile.TemporaryDirectory(prefix="eckart-") if out is None else temporary_folder(out)
        with place as folder:
            where = {"device": device, "dtype": dtype}
            sides = _side_folders(source, read, Path(folder), low_rank=low_rank, device=device, force=force)
            if speed:
                results["speed"] = _speed(sides, where, settings.seed, progress)
            if memory:
                results["memory"] = _memory(sides, where, progress)
    if out is not None:
        open_run(out)
        finish_run(out, results)
    return results


def _side_folders(
    source: str, plans: Mapping[str, Plan], place: Path, *, low_rank: bool, device: str, force: bool
) -> dict[str, str]:
    """Write the models to be compared, but for the one that is there; the dense one is first."""
    folders = {DENSE: str(place / "dense")} if low_rank else {}
    if low_rank:
        save(load_model(source, device=device, dtype="stored").dequantize(), folders[DENSE])
    folders["none"] = source
    for number, (name, plan) in enumerate(plans.items()):
        model = load_model(source, device=device, dtype="stored")
        folders[name] = str(_write_applied(model, plan, place / f"plan-{number}", None, force=force, dense=False)[0])
    return folders


def _speed(
    sides: Mapping[str, str], where: dict[str, Any], seed: int, progress: Callable[[str], None] | None
) -> dict[str, Any]:
    models = {name: load_model(folder, **where) for name, folder in sides.items()}
    first = next(iter(models))
    rows = measure_speed(models, first, seed=seed, progress=progress)
    prompt = prompt_of(models[first])
    return {"prompt": prompt, "new_tokens": NEW_TOKENS, "threads": torch.get_num_threads(), "rows": rows}


def _memory(sides: Mapping[str, str], where: dict[str, Any], progress: Callable[[str], None] | None) -> dict[str, Any]:
    rows = []
    for name, folder in sides.items():
        if progress is not None:
            progress(f"memory, plan {name}")
        rows.append(measure_memory(name, folder, **where))
    return {"rows": rows}


def run_apply(
    source: str,
    plan_path: Path | None,
    out: Path,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    device: str = "auto",
    dtype: str = "stored",
    force: bool = False,
    dense: bool = False,
    portable: bool = False,
) -> tuple[Path, Factoring | None]:
    """Write the model that a plan describes, or one size of an elastic folder, to `out/model`.

    On a CPU, and in the dtype of the files, weights and factors are mapped from files, so that a model may be larger
    than memory. (Where transformers joins several weights of the files into one, as for most experts, that one is not.)

    Args:
        source: Folder or hub id of the model that the plan was made for.
        plan_path: The plan's file, or the folder of a run; None with `ratio` or `bytes`.
        out: Folder to hold `model/`, which must not be there yet or be empty.
        ratio: As for `eckart.load`.
        bytes: As for `eckart.load`.
        device: As for `eckart.load`.
        dtype: As for `eckart.load`.
        force: Accept a plan made for other weights.
        dense: Write dense weights, which plain transformers loads; layers that were low-rank before are multiplied out.
        portable: As for `eckart.save`; without meaning where all is dense.

    Returns:
        The model's folder, and what became of the edited weights unless all are dense.

    Raises:
        EckartError: Bad input, or the folder cannot be written; nothing is left of it then.
    """
    folder = out / "model"
    check_empty(folder)
    plan = None if plan_path is None else read_plan(plan_path)
    files = sentence_files(source)
    model = load_model(source, device=device, dtype=dtype, ratio=ratio, bytes=bytes)
    check_finite(model)
    tokenizer = load_tokenizer(source) if model.main_input_name == "input_ids" else None
    if plan is None or plan_path is None:
        after, before = sizes(model)
        made = None if dense else Factoring(model.config.quantization_config.layers, {}, before, after)
        return save(model.dequantize() if dense else model, folder, tokenizer, portable=portable, files=files), made
    return _write_applied(
        model,
        plan,
        folder,
        tokenizer,
        results=_results_of(plan_path, plan),
        force=force,
        dense=dense,
        portable=portable,
        files=files,
    )


def _results_of(plan_path: Path, plan: Plan) -> Any:
    """The results of the search that made a plan, if they lie beside it and are of this plan."""
    try:
        results = read_json((plan_path if plan_path.is_dir() else plan_path.parent) / "results.json")
        mine = results["kind"] == "search" and results["best"]["edits"] == plan.model_dump(mode="json")["edits"]
    except (EckartError, KeyError, TypeError):
        return None
    return results if mine else None


def _write_applied(
    model: Any,
    plan: Plan,
    folder: Path,
    tokenizer: Any,
    *,
    results: Any = None,
    force: bool,
    dense: bool,
    portable: bool = False,
    files: Mapping[str, Path] | None = None,
) -> tuple[Path, Factoring | None]:
    with temporary_folder(folder) as place:
        spill = place if model.device.type == "cpu" else None
        factoring = factor_(model, plan, force=force, at_most=0 if dense else AT_MOST, spill=spill)
        if dense and low_rank_layers(model):
            model.dequantize()
        portable = portable and not dense
        written = save(model, folder, tokenizer, plan, results=results, portable=portable, files=files)
        return written, None if dense else factoring


def forecast_search(
    source: str, task: Task, settings: SearchSettings, *, device: str = "auto", dtype: str = "auto", workers: int = 1
) -> dict[str, Any]:
    """Say what a search would do and how long it would take, from one pass and one decomposition.

    Args:
        source: Folder or hub id of the model.
        task: The examples.
        settings: The search's settings.
        device: As for `eckart.load`.
        dtype: As for `eckart.load`.
        workers: As for `eckart.search`.

    Returns:
        Edits, matrices, examples, forecast seconds, and bytes of weights and of the prefix cache.

    Raises:
        EckartError: Bad input.
    """
    model, tokenizer = load(source, device=device, dtype=dtype)
    check_finite(model)
    return forecast(model, tokenizer, task, settings, workers=workers)


def _close(book: Ledger) -> None:
    try:
        book.close()
    except sqlite3.Error:
        # The write-ahead log stays beside the file and is read when the run resumes.
        return
