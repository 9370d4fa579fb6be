"""LASER search: try cuts of every matrix on the examples that choose, prove the best on the others."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from eckart.composition import accumulate, compose
from eckart.controls import measure_controls
from eckart.dataflow import evaluating
from eckart.driver import Driver, Progress, open_crew, threads_of_one
from eckart.encoding import Encoded, right_answers
from eckart.errors import TaskError
from eckart.ledger import Ledger, code_sha256
from eckart.matrices import Matrix, coverage, find_matrices, partition, read, select
from eckart.noise import snr
from eckart.plan import Edit, MadeBy, Plan, PlannedModel
from eckart.proof import Flip, cheap_controls, prove, warnings_of
from eckart.race import Measurements, Rival, Rules, Trial, by_size, choose, measurements, strata_of
from eckart.recipe import GUIDED_EXAMPLES, SearchSettings
from eckart.results import SCHEMA_VERSION, Gain, environment
from eckart.scoring import BlockScores, assemble, prepare, prepare_parts, rearrange, score, score_block
from eckart.sensitivity import Prediction, predict
from eckart.spectrum import singular_values
from eckart.surgery import (
    Cost,
    check_finite,
    decomposition,
    decomposition_key,
    make_edit,
    make_edit_by_rule,
    weights_sha256,
)
from eckart.sweep import Candidate, Route, key_of, route_of
from eckart.tasks import Task, split

Grid = Sequence[tuple[Matrix, Sequence[Edit]]]
Spectra = Callable[[Matrix], Tensor]
"""Gives all singular values of a matrix."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and how surely."""

    plan: Plan
    """The winner; no edits where nothing beat the unedited model."""
    trials: tuple[Trial, ...]
    """Single edits, in the order of the grid."""
    compositions: tuple[Trial, ...]
    """Sets of edits, where several were composed."""
    predictions: tuple[Prediction, ...]
    """Of the whole grid, where they were made."""
    baseline: dict[str, Measurements]
    """`validation` and `test` of the unedited model."""
    best: dict[str, Measurements]
    """The same of the winner; equal to `baseline` where there is none."""
    gain: Gain | None
    """Of test accuracy; None for perplexity tasks or without a winner."""
    loss_gain: Gain | None
    controls: dict[str, dict[str, Any]]
    flips: tuple[Flip, ...]
    flip_counts: dict[str, int]
    spectrum: dict[str, Any] | None
    """Of the winner's matrix; None where its blocks were cut, or without a winner."""
    cost: Cost | None
    """Memory and operations of the winner's matrix, kept as factors."""
    warnings: tuple[str, ...]
    facts: dict[str, Any] = field(repr=False)
    """`model`, `task`, `trials`, `seconds` and `environment` of results.json."""

    def to_results(self) -> dict[str, Any]:
        """Give the contents of results.json.

        Returns:
            A tree of dicts, lists and measurements.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "search",
            "model": self.facts["model"],
            "task": self.facts["task"],
            "baseline": self.baseline,
            "best": {
                "plan": "plan.json",
                "edits": [_plain(edit) for edit in self.plan.edits],
                "cost": self.cost,
                **self.best,
                "test_gain": self.gain,
                "test_loss_gain": self.loss_gain,
            },
            "controls": self.controls,
            "trials": self.facts["trials"],
            "grid": [
                {"edit": _plain(t.edits[0]), "validation": t.validation, "stopped": t.stopped} for t in self.trials
            ],
            "compositions": [
                {"edits": [_plain(edit) for edit in t.edits], "validation": t.validation, "stopped": t.stopped}
                for t in self.compositions
            ],
            "predictions": [
                {"edit": _plain(p.edit), "loss_change": replace(p.change, value=p.total)} for p in self.predictions
            ],
            "spectrum": self.spectrum,
            "flipped": self.flips,
            "flip_counts": self.flip_counts,
            "warnings": self.warnings,
            "seconds": self.facts["seconds"],
            "environment": self.facts["environment"],
            "recipe": self.plan.made_by.recipe,
        }


def make_grid(
    matrices: Sequence[Matrix], settings: SearchSettings, spectra: Spectra | None = None
) -> list[tuple[Matrix, list[Edit]]]:
    """List the edits a search will try.

    Args:
        matrices: From `find_matrices`.
        settings: `types`, `layers`, `rho` or `rank_rule`, `blocks`, `clustering`, `kind` and `basis` restrict it.
        spectra: Gives all singular values of a matrix; needed for `rank_rule`.

    Returns:
        Each chosen matrix with its edits, one for each distinct number of blocks and rank (of equal ones the smallest
        rho stays, and of those that keep everything the first).

    Raises:
        MatrixError: A type or layer that the model does not have, or `heads` of a matrix without them.
        RankError: More blocks than a matrix has rows.
    """
    grid = []
    rhos = (1.0,) if settings.kind == "zero" else sorted(set(settings.rho))
    for matrix in select(matrices, types=settings.types, layers=settings.layers):
        if settings.rank_rule is None:
            candidates = [
                make_edit(
                    matrix,
                    rho,
                    kind=settings.kind,
                    basis=settings.basis,
                    svd=settings.svd,
                    niter=settings.niter,
                    seed=settings.seed,
                    blocks=blocks,
                    clustering=settings.clustering,
                )
                for blocks, rho in itertools.product(sorted(set(settings.blocks)), rhos)
            ]
        else:
            assert spectra is not None, "rank rules read spectra"
            options: dict[str, Any] = {"kind": settings.kind, "basis": settings.basis, "seed": settings.seed}
            candidates = [make_edit_by_rule(matrix, spectra(matrix), rule, **options) for rule in settings.rank_rule]
        edits: dict[Any, Edit] = {}
        for edit in candidates:
            whole = edit.kind == "low_rank" and edit.rank == edit.full_rank
            # Rules may agree on a rank and not on the noise to shrink by.
            blocked = "whole" if whole else (edit.blocks, edit.rank, edit.noise)
            edits.setdefault(edit.rho if settings.kind == "magnitude" else blocked, edit)
        grid.append((matrix, list(edits.values())))
    return grid


def by_noise(grid: Grid, spectra: Spectra) -> list[Edit]:
    """Order edits as LaserRMT does: first those of matrices in which signal is least.

    Args:
        grid: Each matrix with its edits.
        spectra: Gives all singular values of a matrix.

    Returns:
        The edits by rising signal-to-noise ratio, which is the sum of the singular values that stay over the sum of
        those that go; edits that keep everything are left out.
    """
    found = []
    for matrix, edits in grid:
        values = spectra(matrix)
        for edit in edits:
            if edit.rank < matrix.rank:
                found.append((snr(values, float(values[edit.rank])), edit))
    return [edit for _, edit in sorted(found, key=lambda pair: pair[0])]


def spectra_of(model: nn.Module) -> Spectra:
    """Give what computes the singular values of a model's matrices, each once.

    Args:
        model: Any model. Not modified; its weights must not change while the result is in use.

    Returns:
        A function from one of its matrices to all singular values, exact, descending, float64.
    """
    return functools.cache(lambda matrix: singular_values(read(model, matrix)))


def search(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    source: str = "",
    ledger: Callable[[dict[str, str]], Ledger] | None = None,
    progress: Callable[[Progress], None] | None = None,
    workers: int = 1,
    ray: str | None = None,
) -> SearchResult:
    """Find the cut, or the few cuts together, that help most at a task, and prove the gain.

    Best means what `settings.select` says; of equals the smallest rank. For perplexity tasks it means the lowest loss.

    Args:
        model: A language model in evaluation mode. Edited during the search; as before, to the bit, after it.
        tokenizer: Its tokenizer.
        task: At least two examples; `settings.split` of them choose, the rest prove.
        settings: The grid and how examples are scored.
        source: Where the model came from, for the plan.
        ledger: Opens the ledger for a fingerprint; by default it is kept in memory.
        progress: Called after every block of examples.
        workers: Processes that share the work; as for `eckart.driver.open_crew`.
        ray: Address of a Ray cluster that does the work.

    Returns:
        The plan and everything measured.

    Raises:
        ModelError: A weight is not finite, or the model does not predict tokens.
        TaskError: The task does not fit the model.
        MatrixError: A type or layer that the model does not have.

    Source:
        LASER, arXiv 2312.13558. Differs: exact decompositions, validation examples only, ties decided, the
        unedited model is a candidate, and test intervals and controls are given.
    """
    settings = settings or SearchSettings()
    started = time.perf_counter()
    if settings.objective != "task" and task.kind != "text":
        raise TaskError(
            f"{task.name} has answers, and objective '{settings.objective}' is about text without labels. Give a text "
            "(--text FILE on the command line), or leave the objective at 'task'."
        )
    check_finite(model)
    matrices = find_matrices(model)
    spectra = spectra_of(model)
    grid = make_grid(matrices, settings, spectra)
    validation, test = split(
        task, settings.split, seed=settings.seed, shuffle=settings.shuffle, examples=settings.choosing
    )
    weights = weights_sha256(model)
    fingerprint = {
        "weights": weights,
        "task": task.sha256,
        "recipe": json.dumps(settings.model_dump(mode="json"), sort_keys=True),
        "dtype": str(next(model.parameters()).dtype),
        "code": code_sha256(),
        "torch": torch.__version__,
    }
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        route = route_of(model)
        crew = stack.enter_context(
            open_crew(
                model,
                tokenizer,
                route,
                matrices,
                workers=workers,
                ray=ray,
                normalize=settings.normalize,
                cache_bytes=settings.cache_bytes,
            )
        )
        encoded = prepare_parts(model, tokenizer, (validation, test), **settings.encoding)
        parts: dict[str, Encoded] = dict(zip(("validation", "test"), encoded))
        book = ledger(fingerprint) if ledger else Ledger(None, fingerprint)
        parts["validation"], rules = _lay_out(model, tokenizer, book, parts["validation"], settings)
        driver = Driver(crew, book, progress)
        driver.begin(parts, rules)
        (unedited,) = driver.score("validation", [()])
        baseline = Rival((), measurements(parts["validation"], unedited, rules), unedited)
        began = time.perf_counter()
        predictions = _predict(model, parts["validation"], grid, settings)
        predicting = time.perf_counter() - began
        compositions: list[Trial] = []
        if settings.strategy == "laserrmt":
            order = by_noise(grid, spectra)[: settings.shortlist]
            sets = accumulate(driver, route, matrices, order, baseline)
            trials, compositions = ([t for t in sets if (len(t.edits) > 1) == several] for several in (False, True))
        else:
            trials = _singles(driver, route, grid, predictions, baseline, settings)
        if settings.compose > 1:
            compositions = compose(
                driver,
                route,
                matrices,
                trials,
                baseline,
                most=settings.compose,
                pool=settings.shortlist,
                beam=settings.beam,
            )
        tried = [*trials, *compositions]
        winner = choose(tried, baseline.measurements, rules)
        proving = Progress("proving", len(tried), len(tried), 0, 0, 0, winner, baseline.measurements)
        if progress is not None:
            progress(proving)
        proof = prove(driver, route, model, matrices, winner, seed=settings.seed)
    seconds = {"total": time.perf_counter() - started, "predict": predicting, **driver.seconds}
    others, missing = {}, ()
    if settings.controls:
        others, missing = measure_controls(
            model,
            tokenizer,
            validation,
            parts["test"],
            winner.edits if winner else (),
            matrices,
            settings,
            baseline=proof.scores["baseline"],
            progress=lambda stage: progress and progress(replace(proving, stage=stage)),
        )
    planned = PlannedModel(source=source, architecture=type(model).__name__, weights_sha256=weights)
    return SearchResult(
        plan=Plan(
            model=planned,
            edits=winner.edits if winner else (),
            made_by=MadeBy(eckart=version("eckart"), recipe=settings.model_dump(mode="json")),
        ),
        trials=tuple(trials),
        compositions=tuple(compositions),
        predictions=predictions,
        baseline={"validation": baseline.measurements, "test": proof.measured["baseline"]},
        best={
            "validation": winner.validation if winner else baseline.measurements,
            "test": proof.measured.get("best", proof.measured["baseline"]),
        },
        gain=proof.gain,
        loss_gain=proof.loss_gain,
        controls=cheap_controls(validation, test, proof.measured) | others,
        flips=proof.flips,
        flip_counts=proof.flip_counts,
        spectrum=proof.spectrum,
        cost=proof.cost,
        warnings=(*warnings_of(parts, proof.scores, proof.gain, driver.exact), *missing),
        facts={
            "model": planned.model_dump()
            | {
                "parameters": sum(p.numel() for p in model.parameters()),
                "coverage": coverage(model, partition(matrices)),
            },
            "task": {
                "name": task.name,
                "kind": task.kind,
                "validation": parts["validation"].count,
                "test": parts["test"].count,
            },
            "trials": {
                "grid": sum(len(edits) for _, edits in grid),
                "evaluated": sum(trial.stopped is None for trial in tried),
                "stopped": sum(trial.stopped is not None for trial in tried),
                "examples": driver.examples,
                "prefix_cache_bytes": driver.cache_bytes,
            },
            "seconds": seconds,
            "environment": environment(),
        },
    )


def _lay_out(
    model: nn.Module, tokenizer: Any, book: Ledger, encoded: Encoded, settings: SearchSettings
) -> tuple[Encoded, Rules]:
    """Put the examples that choose in the order that stops a race soonest."""
    scores = None
    # A short list against the unedited model hardly ever stops: on two of ten pairs, and late.
    stops = settings.strategy != "guided" or settings.compose > 1
    if stops and encoded.task.kind != "text" and settings.confidence is None:
        scores = assemble(encoded, _in_order(model, tokenizer, book, encoded, settings))
    strata = strata_of(encoded.count, scores, confidence=settings.confidence, seed=settings.seed)
    if strata is None:
        return encoded, Rules(settings.best_at, settings.tolerance)
    arranged = rearrange(model, encoded, strata)
    ends = [strata[block.examples[0]] for block in arranged.blocks]
    looks = tuple(n for n in range(1, len(ends)) if ends[n] != ends[n - 1])
    return arranged, Rules(settings.best_at, settings.tolerance, settings.confidence, looks)


def _in_order(
    model: nn.Module, tokenizer: Any, book: Ledger, encoded: Encoded, settings: SearchSettings
) -> Mapping[int, BlockScores]:
    """Score the unedited model before the order is known; a resumed search must find the same order."""
    known = dict(book.known("order", ""))
    for index in range(len(encoded.blocks)):
        if index not in known:
            known[index] = score_block(model, tokenizer, encoded, index, normalize=settings.normalize)
            book.add("order", "", {index: known[index]})
    return known


def _predict(model: nn.Module, encoded: Encoded, grid: Grid, settings: SearchSettings) -> tuple[Prediction, ...]:
    """Predict every edit from the first examples; nothing where no prediction is wanted or possible."""
    if settings.strategy not in ("race", "guided") or not settings.predictable:
        return ()
    # Smaller blocks than for scoring: the standard error is over blocks.
    batch_tokens = max(1, settings.batch_tokens // 4)
    most = GUIDED_EXAMPLES if settings.strategy == "race" else encoded.count
    few = rearrange(model, right_answers(encoded, most), batch_tokens=batch_tokens)
    return predict(model, few, grid, guard=settings.guard)


def _singles(
    driver: Driver,
    route: Route,
    grid: Grid,
    predictions: Sequence[Prediction],
    baseline: Rival,
    settings: SearchSettings,
) -> list[Trial]:
    """Try single edits: all of them, or the most promising first, against the unedited model, then round after round
    the others against the best so far. What an edit is up against does not depend on who measures it and when."""
    trials: list[Trial] = []
    if settings.strategy == "exhaustive":
        trials = driver.try_all(_groups(route, grid), baseline.measurements, None)
    else:
        rounds = _rounds(grid, predictions, settings.shortlist, driver.rules)
        rounds = rounds[:1] if settings.strategy == "guided" else rounds
        best, rival = None, baseline
        for number, wanted in enumerate(rounds, start=1):
            later = sum(map(len, rounds[number:]))
            groups = _groups(route, grid, wanted)
            trials += driver.try_all(groups, baseline.measurements, rival, best=best, later=later)
            best = choose(trials, baseline.measurements, driver.rules)
            rival = driver.rival(best) if best else baseline
    found = {key_of(trial.edits): trial for trial in trials}
    keys = [key_of((edit,)) for _, edits in grid for edit in edits]
    return [found[key] for key in keys if key in found]


def _rounds(grid: Grid, predictions: Sequence[Prediction], first: int, rules: Rules) -> list[set[str]]:
    """Divide the grid into rounds, each four times as large as the one before: a walk through the model costs a pass,
    and a strong rival that is found early saves many. The lowest predicted loss comes first; without predictions,
    the first round is from all over the grid."""
    if predictions:
        keys = [key_of((p.edit,)) for p in sorted(predictions, key=lambda p: _promise(p, rules))]
    else:
        keys = [key_of((edit,)) for _, edits in grid for edit in edits]
        spread = [keys[number * len(keys) // min(first, len(keys))] for number in range(min(first, len(keys)))]
        keys = [*spread, *(key for key in keys if key not in spread)]
    rounds = []
    while keys:
        rounds.append(set(keys[:first]))
        keys, first = keys[first:], 4 * first
    return rounds


def _promise(prediction: Prediction, rules: Rules) -> tuple[float, float]:
    if rules.select != "size":
        return prediction.total, 0.0
    # A divergence has no first order, and its second is what guards the prediction of the loss.
    return by_size((prediction.edit,), prediction.guard, rules)


def _groups(route: Route, grid: Grid, wanted: set[str] | None = None) -> list[tuple[Matrix, list[Candidate]]]:
    """Single edits by matrix, in the order in which the model runs them."""
    groups = []
    for matrix, edits in sorted(grid, key=lambda item: route.place(item[0])):
        kept: list[Candidate] = [(edit,) for edit in edits if wanted is None or key_of((edit,)) in wanted]
        if kept:
            groups.append((matrix, kept))
    return groups


def _plain(edit: Edit) -> dict[str, Any]:
    return edit.model_dump(mode="json")


def forecast(
    model: nn.Module, tokenizer: Any, task: Task, settings: SearchSettings, *, workers: int = 1
) -> dict[str, Any]:
    """Say what a search would do and how long it would take.

    Runs the unedited model once on the examples that choose and decomposes the smallest chosen matrix; the
    rest is scaled from that. An upper bound: what a race will save is not known. Several workers divide what they
    share of it, each with its part of the threads.

    Args:
        model: As for `search`. Not modified.
        tokenizer: Its tokenizer.
        task: The examples.
        settings: As for `search`.
        workers: As for `search`.

    Returns:
        Counts, forecast seconds, and bytes of the weights and of the prefix cache.

    Raises:
        EckartError: As for `search`.
    """
    grid = make_grid(find_matrices(model), settings, spectra_of(model))
    validation, test = split(
        task, settings.split, seed=settings.seed, shuffle=settings.shuffle, examples=settings.choosing
    )
    with evaluating(model), torch.inference_mode(), threads_of_one(workers):
        encoded = prepare(model, tokenizer, validation, **settings.encoding)
        began = time.perf_counter()
        score(model, tokenizer, encoded, normalize=settings.normalize)
        a_pass = time.perf_counter() - began
        smallest, of_it = min(grid, key=lambda item: item[0].shape[0] * item[0].shape[1])
        weight = read(model, smallest)
        began = time.perf_counter()
        for edit in {decomposition_key(edit): edit for edit in of_it}.values():
            decomposition(weight, edit)
        svd = time.perf_counter() - began
        route = route_of(model)

    def svd_cost(matrix: Matrix) -> int:
        return matrix.shape[0] * matrix.shape[1] * matrix.rank

    edits = sum(len(edits) for _, edits in grid)
    depth = max(1, len(route.stacks))
    # Of a pass, what runs from an edit's block on.
    share = sum(len(edits) * (1 - route.place(matrix)[0] / depth) for matrix, edits in grid) / edits
    few = settings.strategy in ("guided", "laserrmt")
    passes = share * (min(settings.shortlist, edits) if few else edits)
    # Forward and backward, in one process.
    predicting = 3 * (settings.strategy in ("race", "guided") and settings.predictable)
    # Proving takes three passes over the test examples: unedited, winner, random components.
    proving = len(test.examples) / len(validation.examples)
    device = next(model.parameters()).device
    at_once = min(workers, torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads())
    svd *= sum(svd_cost(matrix) for matrix, _ in grid) / svd_cost(smallest)
    config: Any = model.config
    token = config.get_text_config().hidden_size * next(model.parameters()).element_size()
    cache = int(sum(block.size for block in encoded.blocks) * max(1.0, proving) * token)
    return {
        "matrices": len(grid),
        "edits": edits,
        "validation_examples": encoded.count,
        "test_examples": len(test.examples),
        "seconds": round(a_pass * (predicting + (passes + 3 * proving) / at_once) + svd / at_once, 1),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "prefix_cache_bytes": cache if settings.cache_bytes is None else min(cache, settings.cache_bytes),
    }
