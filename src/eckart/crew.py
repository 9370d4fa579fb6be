"""Who does the jobs of a search: this process, or a team of workers elsewhere. All find the same.

A worker that dies (killed, out of memory, a lost machine) is replaced, and its job is given out again with what it had
scored before; nothing but the block at hand is scored twice.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import transformers

from eckart.dataflow import evaluating
from eckart.encoding import Encoded
from eckart.errors import EckartError
from eckart.race import Rules
from eckart.scoring import BlockScores, Normalize
from eckart.sweep import Done, Event, Job, Known, Scored, Worker, key_of

TRIES = 3
"""How many workers may die of one job."""


class Crew(Protocol):
    """Does jobs."""

    size: int
    """Number of workers."""

    def begin(self, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """Say what the next jobs are about; as for `Worker.begin`."""
        ...

    def work(self, jobs: Sequence[Job], known: Mapping[str, Known]) -> Generator[Event]:
        """Do jobs in any order.

        Args:
            jobs: What to score.
            known: Part -> candidate's key -> what need not be scored again.

        Yields:
            The events of all workers, as they come.
        """
        ...


class Alone:
    """One worker, in this process."""

    size = 1

    def __init__(self, worker: Worker):
        """Take the worker."""
        self.worker = worker

    def begin(self, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """As `Crew.begin`."""
        self.worker.begin(parts, rules)

    def work(self, jobs: Sequence[Job], known: Mapping[str, Known]) -> Generator[Event]:
        """As `Crew.work`."""
        for job in jobs:
            yield from self.worker.work(job, known[job.part])


@dataclass(frozen=True)
class Orders:
    """What a worker elsewhere is made from."""

    model: bytes
    """The model, its tokenizer, route and matrices, pickled; they go from one process of a user to another, never to
    a file."""
    device: str
    threads: int
    normalize: Normalize
    cache_bytes: int | None

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Make the worker."""
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(self.threads)
        model, tokenizer, route, matrices = pickle.loads(self.model)  # noqa: S301 from the process that started this one
        model = model.to(self.device)
        with evaluating(model), torch.inference_mode():
            yield Worker(model, tokenizer, route, matrices, normalize=self.normalize, cache_bytes=self.cache_bytes)


class Lost(Exception):
    """A worker died."""


class Hand(Protocol):
    """One worker elsewhere, and the line to it."""

    def begin(self, orders: Orders, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """Make the worker, and say what its jobs are about."""
        ...

    def give(self, job: Job, known: Known) -> None:
        """Give it a job."""
        ...

    def take(self) -> Event:
        """Give the next event of its job, which is there already.

        Raises:
            Lost: The worker died.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


class Team:
    """Several workers elsewhere, each with its own model."""

    def __init__(
        self,
        hire: Callable[[], Hand],
        ready: Callable[[Sequence[Any]], Sequence[Any]],
        orders: Callable[[int], Orders],
        size: int,
    ):
        """Hire the workers, who come to life while the caller goes on.

        Args:
            hire: Starts a worker.
            ready: Waits until some of these workers have an event, and gives those.
            orders: What worker number n is made from.
            size: Number of workers.
        """
        self.size = size
        self._hire, self._ready, self._orders = hire, ready, orders
        self._hands = [hire() for _ in range(size)]
        self._told = [False] * size
        self._about: tuple[Mapping[str, Encoded], Rules] = {}, Rules("accuracy")

    def begin(self, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """As `Crew.begin`."""
        self._about = placed(parts, "cpu"), rules
        for number in range(self.size):
            self._talk(number, lambda _hand: None, "the beginning")

    def work(self, jobs: Sequence[Job], known: Mapping[str, Known]) -> Generator[Event]:
        """As `Crew.work`."""
        waiting = deque(range(len(jobs)))
        found = [_known_of(job, known) for job in jobs]
        deaths = [0] * len(jobs)
        at_work: dict[int, int] = {}  # worker -> job
        for number in range(min(self.size, len(jobs))):
            at_work[number] = waiting.popleft()
            self._give(number, jobs[at_work[number]], found[at_work[number]])
        while at_work:
            numbers = {id(self._hands[number]): number for number in at_work}
            for hand in self._ready([self._hands[number] for number in at_work]):
                number = numbers[id(hand)]
                job = at_work[number]
                try:
                    event = hand.take()
                except Lost as lost:
                    deaths[job] += 1
                    if deaths[job] == TRIES:
                        raise _unlucky(_place(jobs[job]), lost) from None
                    self._replace(number)
                    self._give(number, jobs[job], found[job])
                    continue
                if isinstance(event, Scored):
                    found[job].setdefault(event.key, {})[event.block] = event.scores
                yield event
                if isinstance(event, Done):
                    del at_work[number]
                    if waiting:
                        at_work[number] = waiting.popleft()
                        self._give(number, jobs[at_work[number]], found[at_work[number]])

    def close(self) -> None:
        """End all workers."""
        for hand in self._hands:
            hand.close()

    def _give(self, number: int, job: Job, known: Known) -> None:
        self._talk(number, lambda hand: hand.give(job, known), _place(job))

    def _talk(self, number: int, act: Callable[[Hand], None], place: str) -> None:
        """Talk to a worker that knows what its jobs are about; one that died meanwhile is replaced."""
        for left in reversed(range(TRIES)):
            try:
                if not self._told[number]:
                    self._hands[number].begin(self._orders(number), *self._about)
                    self._told[number] = True
                act(self._hands[number])
                return
            except Lost as lost:
                if not left:
                    raise _unlucky(place, lost) from None
                self._replace(number)

    def _replace(self, number: int) -> None:
        self._hands[number].close()
        self._hands[number] = self._hire()
        self._told[number] = False


def _known_of(job: Job, known: Mapping[str, Known]) -> dict[str, dict[int, BlockScores]]:
    keys = [key_of(candidate) for candidate in job.candidates]
    return {key: dict(known[job.part][key]) for key in keys if key in known[job.part]}


def _place(job: Job) -> str:
    return job.start.name if job.start else f"the {job.part} examples"


def _unlucky(place: str, lost: Lost) -> EckartError:
    return EckartError(
        f"{TRIES} workers died at {place} ({lost}). Each worker holds a model of its own, so memory is the usual "
        "reason. Take fewer --workers; the same command resumes."
    )


def placed(parts: Mapping[str, Encoded], device: str) -> dict[str, Encoded]:
    """Move examples to a worker's device, or to the CPU to travel.

    Args:
        parts: Name -> examples.
        device: Where to.

    Returns:
        The same, there.
    """
    with torch.inference_mode(False):
        return {
            name: replace(part, blocks=tuple(block.mapped(lambda tensor: tensor.to(device)) for block in part.blocks))
            for name, part in parts.items()
        }
