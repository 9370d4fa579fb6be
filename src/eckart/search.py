"""LASER search: try every cut of every matrix on the examples that choose, prove the best on the others.

The sweep goes from the first block to the last, so that the prefix cache holds one layer at a time; each matrix
is decomposed once for all its ranks. However many edits are tried, the test examples are measured for three
models only: the unedited one, the winner, and the winner's cut with random components.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from eckart import truncation
from eckart.dataflow import example_inputs, execution_order
from eckart.encoding import Encoded
from eckart.evaluate import (
    LOSS_UNIT,
    BlockScores,
    Scores,
    assemble,
    constant_answer,
    majority_control,
    only_positions,
    prepare,
    score_block,
    summarize,
)
from eckart.ledger import Ledger, code_sha256
from eckart.matrices import Matrix, coverage, find_blocks, find_matrices, partition, read, select, write
from eckart.plan import Edit, MadeBy, Plan, PlannedModel
from eckart.prefix import PrefixCache, agree, run_block
from eckart.recipe import SearchSettings
from eckart.results import SCHEMA_VERSION, Gain, Measurement, environment, paired_gain
from eckart.surgery import applied, check_finite, make_edit, replacement, weights_sha256
from eckart.tasks import Task, split

Measurements = dict[str, Measurement]
FLIPPED_SHOWN = 30


@dataclass(frozen=True)
class Trial:
    """One edit and what it did on the examples that choose."""

    edit: Edit
    validation: Measurements


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
class Progress:
    """How far a search is."""

    done: int
    """Edits measured, of `total`."""
    total: int
    stage: str
    best: Trial | None
    baseline: Measurements | None


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and how surely."""

    plan: Plan
    """The winner; no edits where nothing beat the unedited model."""
    trials: tuple[Trial, ...]
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
                **self.best,
                "test_gain": self.gain,
                "test_loss_gain": self.loss_gain,
            },
            "controls": self.controls,
            "trials": self.facts["trials"],
            "grid": [{"edit": t.edit.model_dump(mode="json"), "validation": t.validation} for t in self.trials],
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
        settings: `types`, `layers`, `rho`, `kind` and `basis` restrict it.

    Returns:
        Each chosen matrix with its edits, one for each distinct rank (of equal ranks the smallest rho stays).

    Raises:
        MatrixError: A type or layer that the model does not have.
    """
    grid = []
    rhos = (1.0,) if settings.kind == "zero" else sorted(set(settings.rho))
    for matrix in select(matrices, types=settings.types, layers=settings.layers):
        edits: dict[Any, Edit] = {}
        for rho in rhos:
            edit = make_edit(
                matrix,
                rho,
                kind=settings.kind,
                basis=settings.basis,
                svd=settings.svd,
                niter=settings.niter,
                seed=settings.seed,
            )
            edits.setdefault(edit.rho if settings.kind == "magnitude" else edit.rank, edit)
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
        task, settings.split, seed=settings.seed, shuffle=settings.shuffle, examples=settings.examples
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
    book = ledger(fingerprint) if ledger else Ledger(None, fingerprint)
    with _inference(model):
        engine = _Engine(model, tokenizer, settings, book)
        parts = {
            name: prepare(model, tokenizer, part, **settings.encoding)
            for name, part in (("validation", validation), ("test", test))
        }
        trials, before = engine.sweep(matrices, grid, parts["validation"], progress)
        winner = choose(trials, before)
        total = sum(len(edits) for _, edits in grid)
        if progress is not None:
            progress(Progress(total, total, "proving", winner, before))
        scores = {"baseline": engine.measure(parts["test"], "test", None, matrices)}
        if winner is not None:
            scores["best"] = engine.measure(parts["test"], "test", winner.edit, matrices)
            if winner.edit.kind == "low_rank" and winner.edit.basis == "top":
                control = make_edit(
                    next(m for m in matrices if m.name == winner.edit.matrix),
                    winner.edit.rho,
                    basis="random",
                    seed=settings.seed,
                )
                scores["random_basis"] = engine.measure(parts["test"], "test", control, matrices)
    return _result(
        model,
        source,
        task,
        settings,
        matrices,
        parts,
        trials,
        winner,
        before,
        scores,
        weights,
        engine,
        started,
    )


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
        task, settings.split, seed=settings.seed, shuffle=settings.shuffle, examples=settings.examples
    )
    with _inference(model):
        encoded = prepare(model, tokenizer, validation, **settings.encoding)
        engine = _Engine(model, tokenizer, settings, Ledger(None, {}))
        engine.measure(encoded, "validation", None, ())
        smallest = min((matrix for matrix, _ in grid), key=lambda m: m.shape[0] * m.shape[1])
        engine._timed("svd", lambda: truncation.decompose(read(model, smallest)))
        walk = _Walk(model, encoded)

    def svd_cost(matrix: Matrix) -> int:
        return matrix.shape[0] * matrix.shape[1] * matrix.rank

    shares = [len(edits) * (1 - walk.place(matrix)[0] / max(1, len(walk.depths))) for matrix, edits in grid]
    svd = engine.seconds["svd"] * sum(svd_cost(matrix) for matrix, _ in grid) / svd_cost(smallest)
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
        "seconds": round(engine.seconds["forward"] * (sum(shares) + proving) + svd, 1),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "prefix_cache_bytes": tokens * config.get_text_config().hidden_size * item,
    }


def choose(trials: Sequence[Trial], baseline: Measurements) -> Trial | None:
    """Pick the best trial: highest accuracy, of equals the lowest loss, then the smallest rank.

    Args:
        trials: In the order of the grid, which decides what is left.
        baseline: The unedited model on the same examples.

    Returns:
        The winner, or None where none is better than the unedited model.
    """

    def key(found: Measurements) -> tuple[float, float]:
        accuracy = -found["accuracy"].value if "accuracy" in found else 0.0
        loss = found["loss"].value
        return accuracy, loss if loss == loss else float("inf")

    best = min(trials, key=lambda trial: (*key(trial.validation), trial.edit.rank), default=None)
    return best if best is not None and key(best.validation) < key(baseline) else None


class _Engine:
    """Measures edits, with a ledger in front of the model."""

    def __init__(self, model: nn.Module, tokenizer: Any, settings: SearchSettings, ledger: Ledger):
        self.model, self.tokenizer, self.settings, self.ledger = model, tokenizer, settings, ledger
        self.seconds = {"total": 0.0, "svd": 0.0, "forward": 0.0}
        self.examples = 0
        self.warnings: list[str] = []

    def measure(self, encoded: Encoded, part: str, edit: Edit | None, matrices: Sequence[Matrix]) -> Scores:
        """Score the unedited model, or the whole model with one edit."""
        key = _key(edit)
        known = self.ledger.known(part, key)
        if len(known) < len(encoded.blocks):
            with applied(self.model, [edit] if edit else [], matrices):
                known |= self._score(encoded, part, key, known, None)
        return assemble(encoded, [known[index] for index in range(len(encoded.blocks))])

    def sweep(
        self,
        matrices: Sequence[Matrix],
        grid: Sequence[tuple[Matrix, list[Edit]]],
        encoded: Encoded,
        progress: Callable[[Progress], None] | None,
    ) -> tuple[tuple[Trial, ...], Measurements]:
        """Measure every edit of the grid, in the order in which the model runs its matrices."""
        baseline = summarize(encoded, self.measure(encoded, "validation", None, matrices))
        walk = _Walk(self.model, encoded)
        total = sum(len(edits) for _, edits in grid)
        trials: dict[str, Trial] = {}
        best: Trial | None = None
        for matrix, edits in sorted(grid, key=lambda item: walk.place(item[0])):
            missing = [e for e in edits if len(self.ledger.known("validation", _key(e))) < len(encoded.blocks)]
            if missing:
                self._timed("forward", lambda matrix=matrix: walk.to(matrix))
            with self._edits(matrix, missing) as edited:
                for edit in edited:
                    key = _key(edit)
                    known = self.ledger.known("validation", key)
                    self._score(encoded, "validation", key, known, walk.forward)
            for edit in edits:
                known = self.ledger.known("validation", _key(edit))
                scores = assemble(encoded, [known[index] for index in range(len(encoded.blocks))])
                trial = Trial(edit, summarize(encoded, scores))
                trials[_key(edit)] = trial
                best = choose([t for t in (best, trial) if t], baseline) or best
                if progress is not None:
                    progress(Progress(len(trials), total, "searching", best, baseline))
        if not walk.exact:
            self.warnings.append(
                "This model's blocks do not form a chain, so nothing before an edited block could be reused: "
                "the search ran the whole model for every edit."
            )
        return tuple(trials[_key(edit)] for _, edits in grid for edit in edits), baseline

    @contextmanager
    def _edits(self, matrix: Matrix, edits: Sequence[Edit]) -> Iterator[Iterator[Edit]]:
        """Put one edit after the other into the model; the original is back afterwards."""
        if not edits:
            yield iter(())
            return
        original = read(self.model, matrix)
        spectrum = None
        if any(edit.kind == "low_rank" and edit.svd == "exact" for edit in edits):
            spectrum = self._timed("svd", lambda: truncation.decompose(original))

        def one_by_one() -> Iterator[Edit]:
            for edit in edits:
                new = self._timed("svd", lambda edit=edit: replacement(original, edit, spectrum))
                write(self.model, matrix, new)
                yield edit

        try:
            yield one_by_one()
        finally:
            write(self.model, matrix, original)

    def _score(
        self, encoded: Encoded, part: str, key: str, known: dict[int, BlockScores], forward: Any
    ) -> dict[int, BlockScores]:
        """Score the blocks that the ledger does not know, and record them."""
        fresh = {}
        for index, block in enumerate(encoded.blocks):
            if index in known:
                continue
            fresh[index] = self._timed(
                "forward",
                lambda index=index: score_block(
                    self.model,
                    self.tokenizer,
                    encoded,
                    index,
                    normalize=self.settings.normalize,
                    forward=forward,
                ),
            )
            self.examples += len(block.examples)
        self.ledger.add(part, key, fresh)
        return fresh

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[what] += time.perf_counter() - started


class _Walk:
    """Takes the prefix cache from matrix to matrix, and stops using it where it is not exact."""

    def __init__(self, model: nn.Module, encoded: Encoded):
        blocks = find_blocks(model)
        stacks = {path: stack for path, stack, _ in blocks}
        children = [f"{path}.{name}" for path in stacks for name, _ in model.get_submodule(path).named_children()]
        order = execution_order(model, [*stacks, *children], example_inputs(model))
        running = [path for path in order if path in stacks]
        self.depths = {path: depth for depth, path in enumerate(running)}
        self.children = {path: [c for c in order if c.rpartition(".")[0] == path] for path in running}
        self.cache = PrefixCache(model, [(path, stacks[path]) for path in running], encoded.blocks)
        self.model, self.encoded = model, encoded
        self.exact = True
        self._expected: torch.Tensor | None = None

    def place(self, matrix: Matrix) -> tuple[int, int]:
        """Where a matrix runs: blocks before it, and modules of its own block before it."""
        block = f"{matrix.stack}.{matrix.layer}"
        inside = matrix.parameter.removeprefix(f"{block}.").split(".")[0]
        children = self.children.get(block, [])
        child = f"{block}.{inside}"
        return self.depths.get(block, 0), children.index(child) if child in children else 0

    def to(self, matrix: Matrix) -> None:
        """Skip everything that runs before a matrix. The model must hold its unedited weights."""
        depth, inside = self.place(matrix)
        moved = False
        while self.exact and self.cache.depth < depth:
            self.cache.advance()
            moved = True
        for child in self.children.get(f"{matrix.stack}.{matrix.layer}", [])[:inside]:
            if self.exact and any(True for _ in self.model.get_submodule(child).parameters()):
                moved |= self.cache.enter(child)
        if moved:
            self.exact = agree(self._logits(self.cache.forward), self._whole())

    def forward(self, index: int) -> Any:
        """Run one batch through what an edit of the current matrix can change."""
        return self.cache.forward(index) if self.exact else run_block(self.model, self.encoded.blocks[index])

    def _whole(self) -> torch.Tensor:
        if self._expected is None:
            self._expected = self._logits(lambda index: run_block(self.model, self.encoded.blocks[index]))
        return self._expected

    def _logits(self, forward: Callable[[int], Any]) -> torch.Tensor:
        # The first block: the cache ran the last one last, and a model with a memory would still know it.
        block = self.encoded.blocks[0]
        with only_positions(self.model, block.rows, block.columns) as logits_of:
            return logits_of(forward(0))


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value cache; everything back afterwards."""
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        model.config.use_cache = False
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache


def _key(edit: Edit | None) -> str:
    return "" if edit is None else json.dumps(edit.model_dump(mode="json"), sort_keys=True)


def _result(
    model: nn.Module,
    source: str,
    task: Task,
    settings: SearchSettings,
    matrices: Sequence[Matrix],
    parts: dict[str, Encoded],
    trials: tuple[Trial, ...],
    winner: Trial | None,
    before: Measurements,
    scores: dict[str, Scores],
    weights: str,
    engine: _Engine,
    started: float,
) -> SearchResult:
    measured = {name: summarize(parts["test"], found) for name, found in scores.items()}
    gain = loss_gain = spectrum = None
    flips: tuple[Flip, ...] = ()
    counts = {"gained": 0, "lost": 0}
    if winner is not None:
        old, new = scores["baseline"], scores["best"]
        loss_gain = paired_gain(old.loss, new.loss, LOSS_UNIT, seed=settings.seed)
        if old.correct is not None and new.correct is not None:
            gain = paired_gain(old.correct, new.correct, "fraction", seed=settings.seed)
            counts = {
                "gained": int((new.correct & ~old.correct).sum()),
                "lost": int((old.correct & ~new.correct).sum()),
            }
            flips = _flips(parts["test"].task, old, new)
        matrix = next(m for m in matrices if m.name == winner.edit.matrix)
        values = torch.linalg.svdvals(read(model, matrix).float())
        spectrum = {"matrix": matrix.name, "rank": winner.edit.rank, "singular_values": values.tolist()}
    controls: dict[str, dict[str, Any]] = {}
    majority = majority_control(parts["validation"].task, parts["test"].task)
    if majority is not None:
        controls["majority"] = {"accuracy": majority[1], "answer": majority[0]}
    if "random_basis" in measured:
        controls["random_basis"] = dict(measured["random_basis"])
    architecture = type(model).__name__
    planned = PlannedModel(source=source, architecture=architecture, weights_sha256=weights)
    made_by = MadeBy(eckart=version("eckart"), recipe=settings.model_dump(mode="json"))
    engine.seconds["total"] = time.perf_counter() - started
    return SearchResult(
        plan=Plan(model=planned, edits=(winner.edit,) if winner else (), made_by=made_by),
        trials=trials,
        baseline={"validation": before, "test": measured["baseline"]},
        best={
            "validation": winner.validation if winner else before,
            "test": measured.get("best", measured["baseline"]),
        },
        gain=gain,
        loss_gain=loss_gain,
        controls=controls,
        flips=flips,
        flip_counts=counts,
        spectrum=spectrum,
        warnings=(*engine.warnings, *_warnings(parts, scores, gain)),
        facts={
            "model": {
                "source": source,
                "architecture": architecture,
                "weights_sha256": weights,
                "parameters": sum(p.numel() for p in model.parameters()),
                "coverage": coverage(model, partition(matrices)),
            },
            "task": {
                "name": task.name,
                "kind": task.kind,
                "validation": parts["validation"].count,
                "test": parts["test"].count,
            },
            "trials": {"grid": len(trials), "evaluated": len(trials), "examples": engine.examples},
            "seconds": engine.seconds,
            "environment": environment(),
        },
    )


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


def _warnings(parts: dict[str, Encoded], scores: dict[str, Scores], gain: Gain | None) -> Iterator[str]:
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
