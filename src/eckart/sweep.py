"""Measure a grid of edits on the examples that choose, in the order in which the model runs its matrices.

The prefix cache moves from matrix to matrix, so it holds one layer at a time; each matrix is decomposed once for
all its ranks; a ledger stands in front of the model, so that nothing is measured twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from eckart import truncation
from eckart.dataflow import example_inputs, execution_order
from eckart.encoding import Encoded
from eckart.ledger import Ledger
from eckart.matrices import Matrix, find_blocks, read, write
from eckart.plan import Edit
from eckart.prefix import PrefixCache, agree, run_block
from eckart.results import Measurement
from eckart.scoring import (
    BlockScores,
    Forward,
    Normalize,
    Scores,
    assemble,
    only_positions,
    score_block,
    summarize,
)
from eckart.surgery import applied, replacement
from eckart.truncation import Spectrum

Measurements = dict[str, Measurement]
Grid = Sequence[tuple[Matrix, Sequence[Edit]]]


@dataclass(frozen=True)
class Stopped:
    """Why a race did not go on with an edit: the proof that it could not have won."""

    metric: str
    """`accuracy`, or `loss` where accuracy alone does not decide."""
    at_best: float
    """What the edit could still have reached on all examples, at best."""
    to_beat: float
    """What the best edit before it, or the unedited model, had on them."""


@dataclass(frozen=True)
class Trial:
    """One edit and what it did on the examples that choose."""

    edit: Edit
    validation: Measurements
    """On the examples it was measured on: all of them, or those before it was stopped."""
    stopped: Stopped | None = None


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    done: int
    """Edits measured, of `total`."""
    total: int
    stage: str
    best: Trial | None
    baseline: Measurements | None


def choose(trials: Sequence[Trial], baseline: Measurements) -> Trial | None:
    """Pick the best trial: highest accuracy, of equals the lowest loss, then the smallest rank.

    Args:
        trials: In the order of the grid, which decides what is left. Stopped ones cannot win.
        baseline: The unedited model on the same examples.

    Returns:
        The winner, or None where none is better than the unedited model.
    """

    def key(found: Measurements) -> tuple[float, float]:
        accuracy = -found["accuracy"].value if "accuracy" in found else 0.0
        loss = found["loss"].value
        return accuracy, loss if loss == loss else float("inf")

    whole = [trial for trial in trials if trial.stopped is None]
    best = min(whole, key=lambda trial: (*key(trial.validation), trial.edit.rank), default=None)
    return best if best is not None and key(best.validation) < key(baseline) else None


class Meter:
    """Scores edits, with a ledger in front of the model, and counts what it costs."""

    def __init__(self, model: nn.Module, tokenizer: Any, ledger: Ledger, normalize: Normalize):
        """Begin.

        Args:
            model: Under `evaluating` and `torch.inference_mode`.
            tokenizer: Its tokenizer.
            ledger: What has been measured.
            normalize: How choices are compared.
        """
        self.model, self.tokenizer, self.ledger = model, tokenizer, ledger
        self.normalize: Normalize = normalize
        self.seconds = {"total": 0.0, "svd": 0.0, "forward": 0.0, "predict": 0.0}
        self.examples = 0
        """Examples scored, those known from the ledger not counted."""

    def measure(self, encoded: Encoded, part: str, edit: Edit | None, matrices: Sequence[Matrix]) -> Scores:
        """Score the unedited model, or the whole model with one edit.

        Args:
            encoded: The examples.
            part: `validation` or `test`, as the ledger calls them.
            edit: The edit, or None.
            matrices: From `find_matrices(model)`.

        Returns:
            One row an example.
        """
        if len(self.ledger.known(part, key_of(edit))) == len(encoded.blocks):
            return self.score(encoded, part, edit)
        with applied(self.model, [edit] if edit else [], matrices):
            return self.score(encoded, part, edit)

    def score(self, encoded: Encoded, part: str, edit: Edit | None, forward: Forward | None = None) -> Scores:
        """Score the model as it is on all examples; blocks that the ledger knows are taken from it.

        Args:
            encoded: The examples.
            part: As for `measure`.
            edit: What the model holds, for the ledger.
            forward: Runs the model on the block of an index; by default from the first layer on.

        Returns:
            One row an example.
        """
        *_, found = self.blocks(encoded, part, edit, forward)
        return assemble(encoded, found)

    def blocks(
        self, encoded: Encoded, part: str, edit: Edit | None, forward: Forward | None = None
    ) -> Iterator[dict[int, BlockScores]]:
        """Score block after block, and give all that is known after each, so that a race can stop.

        Args:
            encoded: As for `score`.
            part: As for `score`.
            edit: As for `score`.
            forward: As for `score`.

        Yields:
            Block index -> scores, one block more each time.
        """
        key = key_of(edit)
        known = self.ledger.known(part, key)
        found: dict[int, BlockScores] = {}
        for index, block in enumerate(encoded.blocks):
            if index not in known:
                with self.timing("forward"):
                    known[index] = score_block(
                        self.model, self.tokenizer, encoded, index, normalize=self.normalize, forward=forward
                    )
                self.examples += len(block.examples)
                self.ledger.add(part, key, {index: known[index]})
            found[index] = known[index]
            yield found

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time that the `with` block takes to `seconds`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started


def sweep(
    meter: Meter,
    grid: Grid,
    encoded: Encoded,
    baseline: Measurements,
    progress: Callable[[Progress], None] | None = None,
    *,
    race: bool = False,
) -> tuple[tuple[Trial, ...], bool]:
    """Measure every edit of a grid.

    A race stops an edit as soon as it could not win even if all that is left came out right; the winner is the
    same by construction.

    Args:
        meter: Holds the model, which is edited meanwhile; as before, to the bit, afterwards.
        grid: Each matrix with its edits.
        encoded: The examples that choose.
        baseline: The unedited model on them.
        progress: Called after every edit.
        race: Stop edits that cannot win.

    Returns:
        Trials in the order of the grid, and whether the prefix cache was exact for this model.
    """
    walk = Walk(meter.model, encoded)
    total = sum(len(edits) for _, edits in grid)
    trials: dict[str, Trial] = {}
    best: Trial | None = None
    for matrix, edits in sorted(grid, key=lambda item: walk.place(item[0])):
        with _replacing(meter, walk, matrix) as replace_by:
            for edit in edits:
                trial = _try(meter, walk, replace_by, edit, best.validation if best else baseline, race=race)
                trials[key_of(edit)] = trial
                best = choose([t for t in (best, trial) if t], baseline) or best
                if progress is not None:
                    progress(Progress(len(trials), total, "searching", best, baseline))
    return tuple(trials[key_of(edit)] for _, edits in grid for edit in edits), walk.exact


def _try(
    meter: Meter,
    walk: Walk,
    replace_by: Callable[[Edit], None],
    edit: Edit,
    to_beat: Measurements,
    *,
    race: bool,
) -> Trial:
    """Measure one edit, up to the end or up to where it cannot win any more."""
    encoded = walk.encoded
    found: dict[int, BlockScores] = {}
    stopped: Stopped | None = None
    if len(meter.ledger.known("validation", key_of(edit))) < len(encoded.blocks):
        replace_by(edit)
    for found in meter.blocks(encoded, "validation", edit, walk.forward):
        if race and len(found) < len(encoded.blocks) and (stopped := cannot_win(encoded, found, to_beat)):
            break
    return Trial(edit, summarize(encoded, assemble(encoded, found)), stopped)


def cannot_win(encoded: Encoded, found: Mapping[int, BlockScores], to_beat: Measurements) -> Stopped | None:
    """Prove from some blocks that an edit cannot win on all of them.

    Every example that is left is taken to come out right and to cost no loss.

    Args:
        encoded: The examples that choose.
        found: Block index -> scores of the edit.
        to_beat: The best edit so far, or the unedited model, on all examples.

    Returns:
        The proof, or None while the edit can still win.
    """
    scores = assemble(encoded, found)
    # Means are rounded; only a clear difference is a proof.
    margin = 1 + 1e-9
    if scores.correct is None:
        tokens = np.array(encoded.tokens)
        least = float((scores.loss * tokens[scores.examples]).sum() / tokens.sum())
        return Stopped("loss", least, to_beat["loss"].value) if least > to_beat["loss"].value * margin else None
    right = int(scores.correct.sum()) + encoded.count - len(scores.correct)
    needed = round(to_beat["accuracy"].value * encoded.count)
    if right < needed:
        return Stopped("accuracy", right / encoded.count, to_beat["accuracy"].value)
    least = float(scores.loss.sum() / encoded.count)
    if right == needed and least > to_beat["loss"].value * margin:
        return Stopped("loss", least, to_beat["loss"].value)
    return None


@contextmanager
def _replacing(meter: Meter, walk: Walk, matrix: Matrix) -> Iterator[Callable[[Edit], None]]:
    """Put one edit after the other in a matrix's place; the original is back afterwards."""
    original: Tensor | None = None
    spectrum: Spectrum | None = None

    def replace_by(edit: Edit) -> None:
        nonlocal original, spectrum
        if original is None:
            with meter.timing("forward"):
                walk.to(matrix)
            original = read(meter.model, matrix)
        with meter.timing("svd"):
            if spectrum is None and edit.kind == "low_rank" and edit.svd == "exact":
                spectrum = truncation.decompose(original)
            write(meter.model, matrix, replacement(original, edit, spectrum))

    try:
        yield replace_by
    finally:
        if original is not None:
            write(meter.model, matrix, original)


class Walk:
    """Takes the prefix cache from matrix to matrix, and stops using it where it is not exact."""

    def __init__(self, model: nn.Module, encoded: Encoded):
        """Begin before the first block.

        Args:
            model: Under `evaluating` and `torch.inference_mode`, with its unedited weights.
            encoded: The examples that will be scored.
        """
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
        self._expected: Tensor | None = None

    def place(self, matrix: Matrix) -> tuple[int, int]:
        """Tell where a matrix runs.

        Args:
            matrix: From `find_matrices`.

        Returns:
            How many blocks run before its own, and how many modules of its own block run before the one it is in.
        """
        block = f"{matrix.stack}.{matrix.layer}"
        inside = matrix.parameter.removeprefix(f"{block}.").split(".")[0]
        children = self.children.get(block, [])
        child = f"{block}.{inside}"
        return self.depths.get(block, 0), children.index(child) if child in children else 0

    def to(self, matrix: Matrix) -> None:
        """Skip everything that runs before a matrix.

        Args:
            matrix: Not before the one before. The model must hold its unedited weights.
        """
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
        """Run one block of examples through what an edit of the current matrix can change.

        Args:
            index: Which block.

        Returns:
            The model's own output.
        """
        return self.cache.forward(index) if self.exact else run_block(self.model, self.encoded.blocks[index])

    def _whole(self) -> Tensor:
        if self._expected is None:
            self._expected = self._logits(lambda index: run_block(self.model, self.encoded.blocks[index]))
        return self._expected

    def _logits(self, forward: Callable[[int], Any]) -> Tensor:
        # The first block: the cache ran the last one last, and a model with a memory would still know it.
        block = self.encoded.blocks[0]
        with only_positions(self.model, block.rows, block.columns) as logits_of:
            return logits_of(forward(0))


def key_of(edit: Edit | None) -> str:
    """Name an edit in the ledger.

    Args:
        edit: An edit, or None for the unedited model.

    Returns:
        Its JSON; empty for None.
    """
    return "" if edit is None else json.dumps(edit.model_dump(mode="json"), sort_keys=True)
