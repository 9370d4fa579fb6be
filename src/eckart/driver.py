"""The one process that gives out jobs, writes the ledger and knows how far a search is."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eckart import cluster, processes
from eckart.crew import Alone, Crew, Orders, Team
from eckart.encoding import Encoded
from eckart.errors import RecipeError
from eckart.ledger import Ledger
from eckart.matrices import Matrix
from eckart.race import Measurements, Rival, Rules, Trial, choose, trial_of
from eckart.scoring import BlockScores, Normalize, Scores, assemble
from eckart.sweep import Candidate, Done, Ended, Job, Route, Scored, Worker, key_of


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    stage: str
    """`searching`, `composing` or `proving`."""
    done: int
    """Candidates scored to the end or stopped, of `total`."""
    total: int
    """Candidates of this stage; composing finds more as it goes."""
    alive: int
    """Candidates of `total` that a race has not stopped."""
    examples: int
    """Examples scored in this stage, of at most `examples_total`."""
    examples_total: int
    best: Trial | None
    baseline: Measurements | None


@contextmanager
def open_crew(
    model: nn.Module,
    tokenizer: Any,
    route: Route,
    matrices: Sequence[Matrix],
    *,
    workers: int = 1,
    ray: str | None = None,
    normalize: Normalize = "none",
    cache_bytes: int | None = None,
) -> Iterator[Crew]:
    """Gather the workers of a search.

    Args:
        model: A language model, under `evaluating` and `torch.inference_mode`. One worker edits it while it works and
            leaves it as before, to the bit; several take copies.
        tokenizer: Its tokenizer.
        route: From `route_of(model)`.
        matrices: From `find_matrices(model)`.
        workers: Number of workers. They share the threads of this process, or the CUDA devices.
        ray: Address of a Ray cluster, or `auto` for the one at hand (started here if there is none); None for local
            processes.
        normalize: How choices are compared.
        cache_bytes: Most that each worker's prefix cache may hold; None for no bound.

    Yields:
        The crew; it is gone on leaving.

    Raises:
        EckartError: No workers are wanted, Ray is not installed, or no cluster that is large enough is at its address.
    """
    if workers < 1:
        raise RecipeError(f"{workers} workers cannot search. One or more do. Give workers=1 for this process alone.")
    if workers == 1 and ray is None:
        yield Alone(Worker(model, tokenizer, route, matrices, normalize=normalize, cache_bytes=cache_bytes))
        return
    device = next(model.parameters()).device
    # The driver scores too, before the others begin: with as many threads as they, so that rounding is the same.
    with threads_of_one(workers) as each:

        def orders(number: int) -> Orders:
            local = device.type == "cuda" and ray is None
            where = f"cuda:{number % torch.cuda.device_count()}" if local else str(device)
            # From this process to workers of its own; no file and nobody else's bytes are ever opened so.
            return Orders(pickle.dumps((model, tokenizer, route, matrices)), where, each, normalize, cache_bytes)

        if ray is None:
            team = Team(processes.Process, processes.ready, orders, workers)
        else:
            machines = cluster.connect(ray, workers=workers, threads=each, gpus=int(device.type == "cuda"))
            team = Team(*machines, orders, workers)
        try:
            yield team
        finally:
            team.close()


@contextmanager
def threads_of_one(workers: int) -> Iterator[int]:
    """Compute with the threads that one of several workers has, for the length of a `with` block.

    Args:
        workers: They share the threads of this process.

    Yields:
        The number of threads, at least one.
    """
    threads = torch.get_num_threads()
    each = max(1, threads // workers)
    torch.set_num_threads(each)
    try:
        yield each
    finally:
        torch.set_num_threads(threads)


_WHOLE = "the whole model was run"
"""In the ledger, before the first score that the prefix cache could not help with."""


@dataclass
class _Tally:
    """What a stage has come to."""

    stage: str
    done: int = 0
    stopped: int = 0
    examples: int = 0


class Driver:
    """Gives a crew its jobs, with a ledger in front of it, so that nothing is scored twice."""

    def __init__(self, crew: Crew, ledger: Ledger, progress: Callable[[Progress], None] | None = None):
        """Begin.

        Args:
            crew: Who does the jobs.
            ledger: What has been scored; only the driver writes to it.
            progress: Called after every block of examples.
        """
        self.crew, self.ledger, self.progress = crew, ledger, progress
        self._tally = _Tally("")
        self.parts: Mapping[str, Encoded] = {}
        self.rules = Rules("accuracy")
        self.seconds = {"svd": 0.0, "forward": 0.0}
        """Of all workers together."""
        self.examples = 0
        """Examples scored, those known from the ledger not counted."""
        self.cache_bytes = 0
        """Most that the prefix cache of a worker held."""
        self.exact = not ledger.noted(_WHOLE)
        """The prefix cache gave the logits of the whole model, everywhere."""

    def begin(self, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """Say what the next jobs are about.

        Args:
            parts: Name in the ledger -> examples.
            rules: How races are judged.
        """
        self.parts, self.rules = parts, rules
        self.crew.begin(parts, rules)

    def score(self, part: str, candidates: Sequence[Candidate], start: Matrix | None = None) -> list[Scores]:
        """Score candidates on all examples; the workers divide the examples.

        Args:
            part: Name of the examples.
            candidates: Edits, or none for the unedited model.
            start: As for `Job`.

        Returns:
            One row an example, for each candidate.
        """
        blocks = range(len(self.parts[part].blocks))
        shares = [tuple(blocks[number :: self.crew.size]) for number in range(min(self.crew.size, len(blocks)))]
        jobs = [Job(part, tuple(candidates), start, share) for share in shares]
        found = self._do(jobs, lambda _key, _found, _block: None)
        return [assemble(self.parts[part], found[key_of(candidate)]) for candidate in candidates]

    def try_all(
        self,
        groups: Iterable[tuple[Matrix, Sequence[Candidate]]],
        baseline: Measurements,
        rival: Rival | None,
        *,
        stage: str = "searching",
        best: Trial | None = None,
        later: int = 0,
    ) -> list[Trial]:
        """Score candidates on the examples that choose, up to the end or to where they cannot win any more.

        Args:
            groups: Candidates by the first matrix that they change, in the order in which the model runs them.
            baseline: The unedited model.
            rival: What stops a candidate; None stops none.
            stage: For the progress.
            best: The best trial before these, for the progress.
            later: Candidates of this stage that another call tries, for the progress.

        Returns:
            One trial a candidate, in their order.
        """
        groups = [(start, tuple(candidates)) for start, candidates in groups]
        encoded = self.parts["validation"]
        if stage != self._tally.stage:
            self._tally = _Tally(stage)
        tally = self._tally
        total = tally.done + sum(len(candidates) for _, candidates in groups) + later
        by_key = {key_of(candidate): candidate for _, candidates in groups for candidate in candidates}
        trials: dict[str, Trial] = {}

        def tell(key: str, found: Mapping[int, BlockScores], block: int | None) -> None:
            nonlocal best
            if block is not None:
                tally.examples += len(encoded.blocks[block].examples)
            elif key not in trials:  # a worker that takes a dead one's job ends its candidates again
                trial = trials[key] = trial_of(by_key[key], encoded, found, rival, self.rules)
                tally.done += 1
                tally.stopped += trial.stopped is not None
                best = choose([t for t in (best, trial) if t], baseline, self.rules) or best
            if self.progress is not None:
                alive, most = total - tally.stopped, total * encoded.count
                self.progress(Progress(stage, tally.done, total, alive, tally.examples, most, best, baseline))

        self._do([Job("validation", candidates, start, None, rival) for start, candidates in groups], tell)
        return [trials[key] for key in by_key]

    def rival(self, trial: Trial) -> Rival:
        """Make a trial what others have to beat.

        Args:
            trial: Scored to the end.

        Returns:
            Its measurements and scores.
        """
        found = self.ledger.known("validation", key_of(trial.edits))
        return Rival(trial.edits, trial.validation, assemble(self.parts["validation"], found))

    def _do(
        self, jobs: Sequence[Job], tell: Callable[[str, Mapping[int, BlockScores], int | None], None]
    ) -> dict[str, dict[int, BlockScores]]:
        found: dict[str, dict[int, BlockScores]] = {}
        for job in jobs:
            for candidate in job.candidates:
                key = key_of(candidate)
                found[key] = self.ledger.known(job.part, key)
        parts = {job.part for job in jobs}
        assert len(parts) <= 1, "jobs of one call share their examples"
        # Closed whatever happens, so that a worker of this process puts its model's weights back.
        with closing(self.crew.work(jobs, dict.fromkeys(parts, found))) as events:
            for event in events:
                if isinstance(event, Scored):
                    (part,) = parts
                    if self.exact and not event.exact:
                        self.ledger.note(_WHOLE)
                        self.exact = False
                    self.ledger.add(part, event.key, {event.block: event.scores})
                    found.setdefault(event.key, {})[event.block] = event.scores
                    self.examples += len(self.parts[part].blocks[event.block].examples)
                    tell(event.key, found[event.key], event.block)
                elif isinstance(event, Ended):
                    tell(event.key, found[event.key], None)
                elif isinstance(event, Done):
                    for name, value in event.seconds.items():
                        self.seconds[name] += value
                    self.cache_bytes = max(self.cache_bytes, event.cache_bytes)
        return found
