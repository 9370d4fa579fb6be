"""LASER search: try every cut of every matrix on the examples that choose, prove the best on the others.

However many edits are tried, the test examples are measured for three models only: the unedited one, the winner,
and the winner's cut with random components.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from eckart.dataflow import evaluating
from eckart.encoding import Encoded
from eckart.ledger import Ledger, code_sha256
from eckart.matrices import Matrix, by_name, coverage, find_matrices, partition, read, select
from eckart.plan import Edit, MadeBy, Plan, PlannedModel
from eckart.recipe import SearchSettings
from eckart.results import SCHEMA_VERSION, Gain, environment, paired_gain
from eckart.scoring import LOSS_UNIT, Scores, constant_answer, majority_control, prepare, summarize
from eckart.sensitivity import Prediction, predict
from eckart.surgery import (
    Cost,
    check_finite,
    clusters_of,
    cost,
    decomposition,
    decomposition_key,
    make_edit,
    weights_sha256,
)
from eckart.sweep import Grid, Measurements, Meter, Progress, Trial, Walk, choose, key_of, sweep
from eckart.tasks import Task, split

FLIPPED_SHOWN = 30


@dataclass(frozen=True)
class Flip:
    """A test example whose answer the winner turned from wrong to right or back."""

    prompt: str
    answer: str
    before: str
    after: str
    correct_before: bool
    correct_after: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and how surely."""

    plan: Plan
    """The winner; no edits where nothing beat the unedited model."""
    trials: tuple[Trial, ...]
    predictions: tuple[Prediction, ...]
    """Of the whole grid, where the search was guided."""
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
        edit = self.plan.edits[0].model_dump(mode="json") if self.plan.edits else None
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "search",
            "model": self.facts["model"],
            "task": self.facts["task"],
            "baseline": self.baseline,
            "best": {
                "plan": "plan.json",
                "edit": edit,
                "cost": self.cost,
                **self.best,
                "test_gain": self.gain,
                "test_loss_gain": self.loss_gain,
            },
            "controls": self.controls,
            "trials": self.facts["trials"],
            "grid": [
                {"edit": t.edit.model_dump(mode="json"), "validation": t.validation, "stopped": t.stopped}
                for t in self.trials
            ],
            "predictions": [
                {"edit": p.edit.model_dump(mode="json"), "loss_change": replace(p.change, value=p.total)}
                for p in self.predictions
            ],
            "spectrum": self.spectrum,
            "flipped": self.flips,
            "flip_counts": self.flip_counts,
            "warnings": self.warnings,
            "seconds": self.facts["seconds"],
            "environment": self.facts["environment"],
            "recipe": self.plan.made_by.recipe,
        }


def make_grid(matrices: Sequence[Matrix], settings: SearchSettings) -> list[tuple[Matrix, list[Edit]]]:
    """List the edits a search will try.

    Args:
        matrices: From `find_matrices`.
        settings: `types`, `layers`, `rho`, `blocks`, `clustering`, `kind` and `basis` restrict it.

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
        edits: dict[Any, Edit] = {}
        for blocks, rho in itertools.product(sorted(set(settings.blocks)), rhos):
            edit = make_edit(
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
            whole = edit.kind == "low_rank" and edit.rank == edit.full_rank
            blocked = "whole" if whole else (edit.blocks, edit.rank)
            edits.setdefault(edit.rho if settings.kind == "magnitude" else blocked, edit)
        grid.append((matrix, list(edits.values())))
    return grid


def search(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    source: str = "",
    ledger: Callable[[dict[str, str]], Ledger] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Find the one matrix whose cut helps most at a task, and prove the gain.

    Best means the highest validation accuracy; of equals the lowest loss, then the smallest rank. For
    perplexity tasks it means the lowest loss.

    Args:
        model: A language model in evaluation mode. Edited during the search; as before, to the bit, after it.
        tokenizer: Its tokenizer.
        task: At least two examples; `settings.split` of them choose, the rest prove.
        settings: The grid and how examples are scored.
        source: Where the model came from, for the plan.
        ledger: Opens the ledger for a fingerprint; by default it is kept in memory.
        progress: Called after every edit.

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
    check_finite(model)
    matrices = find_matrices(model)
    grid = make_grid(matrices, settings)
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
    with evaluating(model), torch.inference_mode():
        parts = {
            "validation": prepare(model, tokenizer, validation, **settings.encoding),
            "test": prepare(model, tokenizer, test, **settings.encoding),
        }
        book = ledger(fingerprint) if ledger else Ledger(None, fingerprint)
        meter = Meter(model, tokenizer, book, settings.normalize)
        before = summarize(parts["validation"], meter.measure(parts["validation"], "validation", None, matrices))
        predictions: tuple[Prediction, ...] = ()
        tried: Grid = grid
        if settings.strategy == "guided":
            with meter.timing("predict"):
                predictions = _predict(model, tokenizer, validation, grid, settings)
            tried = _shortlist(grid, predictions, settings.shortlist)
        race = settings.strategy != "exhaustive"
        trials, exact = sweep(meter, tried, parts["validation"], before, progress, race=race)
        winner = choose(trials, before)
        if progress is not None:
            progress(Progress(len(trials), len(trials), "proving", winner, before))
        scores = {
            name: meter.measure(parts["test"], "test", edit, matrices)
            for name, edit in _edits_to_prove(winner, matrices, settings).items()
        }
    meter.seconds["total"] = time.perf_counter() - started
    proof = _prove(model, matrices, parts, scores, winner, settings)
    made_by = MadeBy(eckart=version("eckart"), recipe=settings.model_dump(mode="json"))
    planned = PlannedModel(source=source, architecture=type(model).__name__, weights_sha256=weights)
    measured = {name: summarize(parts["test"], found) for name, found in scores.items()}
    return SearchResult(
        plan=Plan(model=planned, edits=(winner.edit,) if winner else (), made_by=made_by),
        trials=trials,
        predictions=predictions,
        baseline={"validation": before, "test": measured["baseline"]},
        best={
            "validation": winner.validation if winner else before,
            "test": measured.get("best", measured["baseline"]),
        },
        controls=_controls(parts, measured),
        warnings=tuple(_warnings(parts, scores, proof["gain"], exact)),
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
                "evaluated": sum(trial.stopped is None for trial in trials),
                "examples": meter.examples,
            },
            "seconds": meter.seconds,
            "environment": environment(),
        },
        **proof,
    )


def _predict(
    model: nn.Module, tokenizer: Any, validation: Task, grid: Grid, settings: SearchSettings
) -> tuple[Prediction, ...]:
    # Smaller blocks than for scoring: the standard error is over blocks.
    options = settings.encoding | {"batch_tokens": max(1, settings.batch_tokens // 4)}
    return predict(model, prepare(model, tokenizer, validation, **options), grid, guard=settings.guard)


def _shortlist(grid: Grid, predictions: Sequence[Prediction], count: int) -> Grid:
    """Keep the edits with the lowest predicted loss."""
    best = {key_of(p.edit) for p in sorted(predictions, key=lambda p: p.total)[:count]}
    kept = [(matrix, [edit for edit in edits if key_of(edit) in best]) for matrix, edits in grid]
    return [(matrix, edits) for matrix, edits in kept if edits]


def _edits_to_prove(
    winner: Trial | None, matrices: Sequence[Matrix], settings: SearchSettings
) -> dict[str, Edit | None]:
    """What the test examples are measured for: as many edits, however many were tried."""
    found: dict[str, Edit | None] = {"baseline": None}
    if winner is not None:
        found["best"] = winner.edit
        # Random components of the whole matrix say nothing about components of blocks.
        if winner.edit.kind == "low_rank" and winner.edit.basis == "top" and winner.edit.blocks == 1:
            matrix = by_name(matrices, winner.edit.matrix)
            found["random_basis"] = make_edit(matrix, winner.edit.rho, basis="random", seed=settings.seed)
    return found


def _prove(
    model: nn.Module,
    matrices: Sequence[Matrix],
    parts: dict[str, Encoded],
    scores: dict[str, Scores],
    winner: Trial | None,
    settings: SearchSettings,
) -> dict[str, Any]:
    """Compare winner and unedited model on the same test examples."""
    counts = {"gained": 0, "lost": 0}
    if winner is None:
        return {"gain": None, "loss_gain": None, "flips": (), "flip_counts": counts, "spectrum": None, "cost": None}
    old, new = scores["baseline"], scores["best"]
    gain, flips = None, ()
    if old.correct is not None and new.correct is not None:
        gain = paired_gain(old.correct, new.correct, "fraction", seed=settings.seed)
        counts = {"gained": int((new.correct & ~old.correct).sum()), "lost": int((old.correct & ~new.correct).sum())}
        flips = _flips(parts["test"].task, old, new)
    weight = read(model, by_name(matrices, winner.edit.matrix))
    values = torch.linalg.svdvals(weight.float())
    return {
        "cost": cost(winner.edit, [len(rows) for rows in clusters_of(weight, winner.edit)]),
        "gain": gain,
        "loss_gain": paired_gain(old.loss, new.loss, LOSS_UNIT, seed=settings.seed),
        "flips": flips,
        "flip_counts": counts,
        # The values of the whole matrix do not show where its blocks were cut.
        "spectrum": {
            "matrix": winner.edit.matrix,
            "rank": winner.edit.rank,
            "singular_values": values.tolist(),
        }
        if winner.edit.blocks == 1
        else None,
    }


def _controls(parts: dict[str, Encoded], measured: dict[str, Measurements]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    majority = majority_control(parts["validation"].task, parts["test"].task)
    if majority is not None:
        found["majority"] = {"accuracy": majority[1], "answer": majority[0]}
    if "random_basis" in measured:
        found["random_basis"] = dict(measured["random_basis"])
    return found


def forecast(model: nn.Module, tokenizer: Any, task: Task, settings: SearchSettings) -> dict[str, Any]:
    """Say what a search would do and how long it would take.

    Runs the unedited model once on the examples that choose and decomposes the smallest chosen matrix; the
    rest is scaled from that.

    Args:
        model: As for `search`. Not modified.
        tokenizer: Its tokenizer.
        task: The examples.
        settings: As for `search`.

    Returns:
        Counts, forecast seconds, and bytes of the weights and of the prefix cache.

    Raises:
        EckartError: As for `search`.
    """
    grid = make_grid(find_matrices(model), settings)
    validation, test = split(
        task, settings.split, seed=settings.seed, shuffle=settings.shuffle, examples=settings.choosing
    )
    with evaluating(model), torch.inference_mode():
        encoded = prepare(model, tokenizer, validation, **settings.encoding)
        meter = Meter(model, tokenizer, Ledger(None, {}), settings.normalize)
        meter.measure(encoded, "validation", None, ())
        smallest, edits = min(grid, key=lambda item: item[0].shape[0] * item[0].shape[1])
        weight = read(model, smallest)
        with meter.timing("svd"):
            for edit in {decomposition_key(edit): edit for edit in edits}.values():
                decomposition(weight, edit)
        walk = Walk(model, encoded)

    def svd_cost(matrix: Matrix) -> int:
        return matrix.shape[0] * matrix.shape[1] * matrix.rank

    shares = [len(edits) * (1 - walk.place(matrix)[0] / max(1, len(walk.depths))) for matrix, edits in grid]
    svd = meter.seconds["svd"] * sum(svd_cost(matrix) for matrix, _ in grid) / svd_cost(smallest)
    item = next(model.parameters()).element_size()
    tokens = sum(block.size for block in encoded.blocks)
    config: Any = model.config
    # Proving takes three passes over the test examples: unedited, winner, random components.
    proving = 3 * len(test.examples) / len(validation.examples)
    return {
        "matrices": len(grid),
        "edits": sum(len(edits) for _, edits in grid),
        "validation_examples": encoded.count,
        "test_examples": len(test.examples),
        "seconds": round(meter.seconds["forward"] * (sum(shares) + proving) + svd, 1),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "prefix_cache_bytes": tokens * config.get_text_config().hidden_size * item,
    }


def _flips(task: Task, old: Scores, new: Scores) -> tuple[Flip, ...]:
    assert old.correct is not None
    assert new.correct is not None
    found = [
        Flip(e.prompt, e.gold, old.prediction[i], new.prediction[i], bool(old.correct[i]), bool(new.correct[i]))
        for i, e in enumerate(task.examples)
        if old.correct[i] != new.correct[i]
    ]
    gained = [flip for flip in found if flip.correct_after]
    lost = [flip for flip in found if flip.correct_before]
    # Losses are shown first where both must be shortened: they are what a user has to know.
    lost = lost[: FLIPPED_SHOWN // 2]
    return (*gained[: FLIPPED_SHOWN - len(lost)], *lost)


def _warnings(parts: dict[str, Encoded], scores: dict[str, Scores], gain: Gain | None, exact: bool) -> Iterator[str]:
    if not exact:
        yield (
            "This model's blocks do not form a chain, so nothing before an edited block could be reused: "
            "the search ran the whole model for every edit."
        )
    for part, encoded in parts.items():
        if encoded.truncated:
            yield (
                f"{encoded.truncated} {part} examples were longer than the model's context; "
                "their first tokens were dropped."
            )
    for name, who in (("baseline", "unedited model"), ("best", "edited model")):
        constant = constant_answer(scores[name]) if name in scores else None
        if constant is not None:
            answer, share = constant
            yield (
                f"The {who} answers {answer!r} on {100 * share:.0f} % of the test examples: "
                "its accuracy measures how often that label is right, and says nothing of the model. Compare losses."
            )
    if gain is not None and gain.value == 0 and gain.stderr == 0:
        yield "The winner changes no right or wrong answer of the test examples; it was chosen by its loss."
    elif gain is not None and gain.interval[0] <= 0:
        low, high = gain.interval
        verdict = "the test examples contradict it" if high < 0 else "the test examples do not confirm it"
        yield (
            "The winner was better on the examples that chose it, but "
            f"{verdict}: 95 % interval of the gain in accuracy {low:+.3f} to {high:+.3f}."
        )
