"""Workers as Ray actors: one for each GPU or group of cores of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from eckart.crew import Hand, Lost, Orders, placed
from eckart.encoding import Encoded
from eckart.errors import EckartError
from eckart.race import Rules
from eckart.sweep import Event, Job, Known


def connect(
    address: str, *, threads: int, gpus: int
) -> tuple[Callable[[], Hand], Callable[[Sequence[Any]], Sequence[Any]]]:
    """Join a Ray cluster.

    Args:
        address: Of its head, `host:port` or `ray://host:port`; or `auto` for the one at hand, which is started on
            this machine if there is none.
        threads: CPU cores that each worker takes.
        gpus: GPUs that each worker takes, 0 or 1.

    Returns:
        How to hire a worker, and how to wait for workers.

    Raises:
        EckartError: Ray is not installed, or there is no cluster at the address.
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
                ray.init(include_dashboard=False, **options)
    except Exception as error:
        raise EckartError(
            f"No Ray cluster answers at '{address}': {error}. 'ray start --head' starts one; 'auto' uses it or starts "
            "one here. Check the address."
        ) from error

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
            except ray.exceptions.RayActorError as error:
                raise Lost(str(error).splitlines()[0]) from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, EckartError) else error from None

        def close(self) -> None:
            """As `Hand.close`."""
            ray.kill(self._actor)

    def ready(hands: Sequence[RayHand]) -> list[RayHand]:
        by_events = {id(hand.events): hand for hand in hands}
        done, _ = ray.wait([hand.events for hand in hands], num_returns=1, fetch_local=False)
        return [by_events[id(events)] for events in done]

    return RayHand, ready
