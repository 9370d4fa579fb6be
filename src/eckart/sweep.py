"""Score a model under many edits, running only what an edit can change.

A worker holds one model. It takes its edits in the order in which the model runs its matrices, so the prefix cache
moves from matrix to matrix and holds one layer at a time, and each matrix is decomposed once for all its ranks.
What it scores depends on the job alone, never on the worker, so any number of workers find the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from eckart.clustering import Cluster
from eckart.dataflow import example_inputs, execution_order
from eckart.encoding import Encoded
from eckart.layout import Block
from eckart.matrices import Matrix, by_name, find_blocks, read, write
from eckart.plan import Edit
from eckart.prefix import PrefixCache, agree, run_block
from eckart.race import Rival, Rules, stop
from eckart.scoring import BlockScores, Normalize, log_probabilities, only_positions, score_block
from eckart.surgery import decomposition, decomposition_key, replacement

Candidate = tuple[Edit, ...]
"""Edits that are made together; none for the unedited model."""
Known = Mapping[str, Mapping[int, BlockScores]]
"""Candidate's key -> block index -> scores."""


@dataclass(frozen=True)
class Job:
    """Candidates to score on the same examples, for one worker."""

    part: str
    """`validation` or `test`."""
    candidates: tuple[Candidate, ...]
    start: Matrix | None = None
    """No candidate changes what the model runs before this matrix; None: before its end."""
    blocks: tuple[int, ...] | None = None
    """Blocks of examples; None for all."""
    rival: Rival | None = None
    """What stops a candidate; None scores them all to the end."""


@dataclass(frozen=True)
class Scored:
    """A block of examples was scored."""

    key: str
    block: int
    scores: BlockScores
    exact: bool
    """The prefix cache gave the logits of the whole model, so far."""


@dataclass(frozen=True)
class Ended:
    """A candidate is done: scored to the end, or stopped."""

    key: str


@dataclass(frozen=True)
class Done:
    """A job is done."""

    seconds: dict[str, float]
    cache_bytes: int
    """Most that the prefix cache held."""


Event = Scored | Ended | Done


def key_of(candidate: Sequence[Edit]) -> str:
    """Name a candidate in the ledger.

    Args:
        candidate: Edits, in the order in which the model runs them.

    Returns:
        Their JSON; empty for the unedited model.
    """
    return json.dumps([edit.model_dump(mode="json") for edit in candidate], sort_keys=True) if candidate else ""


@dataclass(frozen=True)
class Route:
    """In which order a model runs its blocks, and the modules inside them."""

    stacks: dict[str, str]
    """Path of a block -> path of its list, in order of execution."""
    children: dict[str, list[str]] = field(repr=False)
    """Path of a block -> paths of its direct children, in order of execution."""

    def place(self, matrix: Matrix) -> tuple[int, int]:
        """Tell where a matrix runs.

        Args:
            matrix: From `find_matrices`.

        Returns:
            How many blocks run before its own, and how many modules of its own block run before the one it is in.
        """
        block = f"{matrix.stack}.{matrix.layer}"
        inside = matrix.parameter.removeprefix(f"{block}.").split(".")[0]
        child = f"{block}.{inside}"
        children = self.children.get(block, [])
        depth = list(self.stacks).index(block) if block in self.stacks else 0
        return depth, children.index(child) if child in children else 0


def route_of(model: nn.Module) -> Route:
    """Find the order of a model's modules by running it once on a small input.

    Args:
        model: Under `evaluating` and `torch.inference_mode`. Not modified.

    Returns:
        Its route.
    """
    stacks = {path: stack for path, stack, _ in find_blocks(model)}
    children = [f"{path}.{name}" for path in stacks for name, _ in model.get_submodule(path).named_children()]
    order = execution_order(model, [*stacks, *children], example_inputs(model))
    running = {path: stacks[path] for path in order if path in stacks}
    return Route(running, {path: [c for c in order if c.rpartition(".")[0] == path] for path in running})


class Worker:
    """A model, and the jobs it does one after the other."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        route: Route,
        matrices: Sequence[Matrix],
        *,
        normalize: Normalize,
        cache_bytes: int | None = None,
    ):
        """Begin.

        Args:
            model: Under `evaluating` and `torch.inference_mode`. Edited during a job; as before, to the bit, after it.
            tokenizer: Its tokenizer.
            route: From `route_of(model)`.
            matrices: From `find_matrices(model)`.
            normalize: How choices are compared.
            cache_bytes: Most that the prefix cache may hold; None for no bound.
        """
        self.model, self.tokenizer = model, tokenizer
        self.normalize: Normalize = normalize
        self.cache_bytes = cache_bytes
        self.route, self.matrices = route, matrices
        self.parts: Mapping[str, Encoded] = {}
        self.rules = Rules("accuracy")
        self._walk: Walk | None = None
        self._walked: tuple[str, tuple[int, ...]] | None = None
        self._references: dict[tuple[str, int], Tensor] = {}
        self._seconds: dict[str, float] = {}

    def begin(self, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """Say what the next jobs are about.

        Args:
            parts: Name -> examples, on the model's device.
            rules: How races are judged.
        """
        self.parts, self.rules = parts, rules
        self._walk = None
        self._references = {}

    def work(self, job: Job, known: Known) -> Iterator[Event]:
        """Do a job, block after block.

        Args:
            job: What to score.
            known: What need not be scored again.

        Yields:
            Every block that was scored, the end of every candidate, and the end of the job.
        """
        self._seconds = {"svd": 0.0, "forward": 0.0}
        encoded = self.parts[job.part]
        blocks = tuple(range(len(encoded.blocks))) if job.blocks is None else job.blocks
        walk: Walk | None = None
        weights = _Weights(self)
        for candidate in job.candidates:
            key = key_of(candidate)
            have = known.get(key, {})
            found: dict[int, BlockScores] = {}
            try:
                for index in blocks:
                    if index in have:
                        found[index] = have[index]
                    else:
                        if walk is None:
                            walk = self._at(job, encoded, blocks)
                            self._refer(job.part, blocks)
                        weights.hold(candidate)
                        found[index] = self._score(job.part, index, walk)
                        yield Scored(key, index, found[index], walk.exact)
                    if job.rival is not None and stop(candidate, encoded, found, job.rival, self.rules):
                        break
            finally:
                weights.restore()
            yield Ended(key)
        yield Done(self._seconds, 0 if walk is None else walk.peak_bytes)

    def _at(self, job: Job, encoded: Encoded, blocks: tuple[int, ...]) -> Walk:
        """Bring the prefix cache to where a job starts; it moves forward only, so going back begins anew."""
        place = self.route.place(job.start) if job.start else (0, 0)
        with self.timing("forward"):
            if self._walk is None or self._walked != (job.part, blocks) or place < self._walk.at:
                self._walk = None  # frees what it holds before the next one fills
                self._walk = Walk(self.model, self.route, encoded, blocks, cache_bytes=self.cache_bytes)
                self._walked = (job.part, blocks)
            if job.start is not None:
                self._walk.to(job.start)
        return self._walk

    def _refer(self, part: str, blocks: Sequence[int]) -> None:
        """Keep what the unedited model predicts, where candidates are judged by how far they diverge from it."""
        if self.rules.select != "size":
            return
        self._references = {place: found for place, found in self._references.items() if place[0] == part}
        with self.timing("forward"):
            for index in blocks:
                if (part, index) not in self._references:
                    self._references[part, index] = log_probabilities(self.model, self.parts[part], index)

    def _score(self, part: str, index: int, walk: Walk) -> BlockScores:
        with self.timing("forward"):
            return score_block(
                self.model,
                self.tokenizer,
                self.parts[part],
                index,
                normalize=self.normalize,
                forward=walk.forward,
                reference=self._references.get((part, index)),
            )

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time that the `with` block takes to the job's seconds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - started


class _Weights:
    """Puts candidates into a model, one after the other, and the originals back; decomposes each matrix once."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._held: Candidate | None = None
        self._originals: dict[str, tuple[Matrix, Tensor]] = {}
        self._decomposed: dict[tuple[Any, ...], Sequence[Cluster]] = {}

    def hold(self, candidate: Candidate) -> None:
        """Edit the model, unless it holds the candidate already."""
        if self._held == candidate:
            return
        self._held = candidate  # before the first write, so that whatever stops this is undone
        for edit in candidate:
            if edit.matrix not in self._originals:
                matrix = by_name(self._worker.matrices, edit.matrix)
                self._originals[edit.matrix] = matrix, read(self._worker.model, matrix)
            matrix, original = self._originals[edit.matrix]
            with self._worker.timing("svd"):
                write(self._worker.model, matrix, replacement(original, edit, self._clusters(original, edit)))

    def restore(self) -> None:
        """Put the originals of what is held back."""
        for edit in self._held or ():
            if edit.matrix in self._originals:
                write(self._worker.model, *self._originals[edit.matrix])
        self._held = None

    def _clusters(self, original: Tensor, edit: Edit) -> Sequence[Cluster] | None:
        whole = edit.kind == "low_rank" and edit.rank == edit.full_rank
        if edit.kind not in ("low_rank", "shrink") or edit.svd != "exact" or whole:
            return None
        if edit.clustering == "subspaces":
            return decomposition(original, edit)  # serves this rank alone
        key = (edit.matrix, *decomposition_key(edit))
        if key not in self._decomposed:
            self._decomposed[key] = decomposition(original, edit)
        return self._decomposed[key]


class Walk:
    """Takes the prefix cache from matrix to matrix, and stops using it where it is not exact."""

    def __init__(
        self,
        model: nn.Module,
        route: Route,
        encoded: Encoded,
        blocks: Sequence[int],
        *,
        cache_bytes: int | None = None,
    ):
        """Begin before the first block.

        Args:
            model: Under `evaluating` and `torch.inference_mode`, with its unedited weights.
            route: Of the model.
            encoded: The examples that will be scored.
            blocks: Which of their blocks.
            cache_bytes: Most that the cache may hold; None for no bound.
        """
        self.model, self.route = model, route
        self.batches: dict[int, Block] = {index: encoded.blocks[index] for index in blocks}
        self.numbers = {index: number for number, index in enumerate(blocks)}
        stacks, batches = list(route.stacks.items()), list(self.batches.values())
        self.cache = PrefixCache(model, stacks, batches, cache_bytes=cache_bytes)
        self.at = (0, 0)
        """Place of the current matrix."""
        self.exact = True
        self._expected: Tensor | None = None

    @property
    def peak_bytes(self) -> int:
        """Most that the cache held."""
        return self.cache.peak_bytes

    def to(self, matrix: Matrix) -> None:
        """Skip everything that runs before a matrix.

        Args:
            matrix: Not before the one before. The model must hold its unedited weights.
        """
        depth, inside = self.at = self.route.place(matrix)
        moved = False
        while self.exact and self.cache.depth < depth:
            self.cache.advance()
            moved = True
        for child in self.route.children.get(f"{matrix.stack}.{matrix.layer}", [])[:inside]:
            if self.exact and any(True for _ in self.model.get_submodule(child).parameters()):
                moved |= self.cache.enter(child)
        if moved and self.exact:
            self.exact = agree(self._logits(self.forward), self._whole())

    def forward(self, index: int) -> Any:
        """Run one block of examples through what an edit of the current matrix can change.

        Args:
            index: Which block.

        Returns:
            The model's own output.
        """
        return self.cache.forward(self.numbers[index]) if self.exact else run_block(self.model, self.batches[index])

    def _whole(self) -> Tensor:
        if self._expected is None:
            self._expected = self._logits(lambda index: run_block(self.model, self.batches[index]))
        return self._expected

    def _logits(self, forward: Callable[[int], Any]) -> Tensor:
        # The first block: the cache ran the last one last, and a model with a memory would still know it.
        index, block = next(iter(self.batches.items()))
        with only_positions(self.model, block.rows, block.columns) as logits_of:
            return logits_of(forward(index))
