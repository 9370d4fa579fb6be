"""Workers as Ray actors: one for each GPU or group of cores of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from eckart.crew import Hand, Lost, Orders, placed
from eckart.encoding import Encoded
from eckart.errors import EckartError
from eckart.race import Rules
from eckart.sweep import Event, Job, Known


def connect(
    address: str, *, workers: int, threads: int, gpus: int
) -> tuple[Callable[[], Hand], Callable[[Sequence[Any]], Sequence[Any]]]:
    """Join a Ray cluster.

    Args:
        address: Of its head, `host:port` or `ray://host:port`; or `auto` for the one at hand, which is started on
            this machine if there is none.
        workers: Number of workers that will be hired.
        threads: CPU cores that each worker takes.
        gpus: GPUs that each worker takes, 0 or 1.

    Returns:
        How to hire a worker, and how to wait for workers.

    Raises:
        EckartError: Ray is not installed, there is no cluster at the address, or it is too small.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise EckartError(
            "--ray needs Ray, which is not installed. It is an extra: pip install 'eckart[cluster]'. "
            "Install it, or use --workers N on this machine."
        ) from None
    options = {"log_to_driver": False, "logging_level": "error"}
    try:
        if not ray.is_initialized():
            try:
                ray.init(address, **options)
            except ConnectionError:
                if address != "auto":
                    raise
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own calls nobody
                ray.init(include_dashboard=False, **options)
    except Exception as error:
        raise EckartError(
            f"No Ray cluster answers at '{address}': {error}. 'ray start --head' starts one; 'auto' uses it or starts "
            "one here. Check the address."
        ) from error
    _check_size(ray.cluster_resources(), address, workers, threads, gpus)

    @ray.remote(num_cpus=threads, num_gpus=gpus)
    class Actor:
        def begin(self, orders: Orders, parts: Mapping[str, Encoded], rules: Rules) -> None:
            self._context = orders.worker()
            self._worker = self._context.__enter__()
            self._worker.begin(placed(parts, orders.device), rules)

        def work(self, job: Job, known: Known) -> Iterator[Event]:
            import torch

            # Ray may run each call in another thread, and inference mode is one thread's own.
            with torch.inference_mode():
                yield from self._worker.work(job, known)

    class RayHand:
        """A worker in a Ray actor; a generator of events is the line to it."""

        def __init__(self) -> None:
            self._actor: Any = Actor.remote()
            self.events: Any = None

        def begin(self, orders: Orders, parts: Mapping[str, Encoded], rules: Rules) -> None:
            """As `Hand.begin`."""
            self._begun = self._actor.begin.remote(orders, dict(parts), rules)

        def give(self, job: Job, known: Known) -> None:
            """As `Hand.give`."""
            self.events = self._actor.work.options(num_returns="streaming").remote(job, dict(known))

        def take(self) -> Event:
            """As `Hand.take`."""
            try:
                ray.get(self._begun)
                return ray.get(next(self.events))
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, EckartError) else error from None
            except ray.exceptions.RayError as error:  # its process, its machine or its memory is gone
                raise Lost(str(error).splitlines()[0]) from None

        def close(self) -> None:
            """As `Hand.close`."""
            ray.kill(self._actor)

    def ready(hands: Sequence[RayHand]) -> list[RayHand]:
        by_events = {id(hand.events): hand for hand in hands}
        done, _ = ray.wait([hand.events for hand in hands], num_returns=1, fetch_local=False)
        return [by_events[id(events)] for events in done]

    return RayHand, ready


def _check_size(there: Mapping[str, float], address: str, workers: int, threads: int, gpus: int) -> None:
    """A worker that finds no place would wait for ever, and its job with it."""
    for what, each in (("CPU", threads), ("GPU", gpus)):
        if workers * each > there.get(what, 0):
            raise EckartError(
                f"{workers} workers with {each} {what} each do not fit the Ray cluster at '{address}', which has "
                f"{there.get(what, 0):g}. All of them work at the same time. Take fewer --workers, or add machines."
            )
