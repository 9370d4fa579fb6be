"""Workers in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from eckart.crew import Lost, Orders, placed
from eckart.encoding import Encoded
from eckart.errors import EckartError
from eckart.race import Rules
from eckart.sweep import Event, Job, Known

START_METHOD = "spawn"
"""Not `fork`: a forked copy of a process whose threads have run hangs in its first parallel region."""


class Process:
    """A worker in a local process; a pipe is the line to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self.line, far = context.Pipe()
        self._process: Any = context.Process(target=_serve, args=(far,), daemon=True)
        with _without_interrupts():
            self._process.start()
        far.close()

    def begin(self, orders: Orders, parts: Mapping[str, Encoded], rules: Rules) -> None:
        """As `Hand.begin`."""
        self._send((orders, parts, rules))

    def give(self, job: Job, known: Known) -> None:
        """As `Hand.give`."""
        self._send((job, known))

    def _send(self, message: Any) -> None:
        try:
            _say(self.line, message)
        except OSError:
            while self._said_more():  # what it said before it died may be why
                self.take()
            raise Lost(self._fate()) from None

    def take(self) -> Event:
        """As `Hand.take`."""
        try:
            event = _hear(self.line)
        except (EOFError, OSError):
            raise Lost(self._fate()) from None
        if isinstance(event, BaseException):
            raise event
        return event

    def _said_more(self) -> bool:
        try:
            return self.line.poll()
        except OSError:
            return False

    def _fate(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"

    def close(self) -> None:
        """As `Hand.close`."""
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.line.close()


# Pickled here: a pipe of its own accord would share tensors, one open file for each.
def _say(line: Connection, message: Any) -> None:
    line.send_bytes(pickle.dumps(message))


def _hear(line: Connection) -> Any:
    return pickle.loads(line.recv_bytes())  # noqa: S301 from the process that started this one, or that it started


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that begin meanwhile never see Ctrl-C, which is the driver's to handle."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its own start would let interrupts in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None, "a worker has a driver"
    wait([driver.sentinel])
    os._exit(1)  # whatever it is doing, nobody waits for it any more


def _serve(line: Connection) -> None:
    """What a local worker's process does, until its driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        orders, parts, rules = _hear(line)
        with orders.worker() as worker:
            worker.begin(placed(parts, orders.device), rules)
            while True:
                job, known = _hear(line)
                for event in worker.work(job, known):
                    _say(line, event)
    except (EOFError, OSError):
        return
    except EckartError as error:
        _say(line, error)
    except Exception as error:
        _say(line, RuntimeError("".join(traceback.format_exception(error))))


def ready(hands: Sequence[Process]) -> list[Process]:
    """Wait until some workers have an event, or have died.

    Args:
        hands: Workers with a job.

    Returns:
        Those.
    """
    lines = {id(hand.line): hand for hand in hands}
    return [lines[id(line)] for line in wait([hand.line for hand in hands])]
