"""Workers in processes of this machine."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from eckart.crew import Lost, Orders, placed
from eckart.encoding import Encoded
from eckart.errors import EckartError
from eckart.race import Rules
from eckart.sweep import Event, Job, Known


class Process:
    """A worker in a local process; a pipe is the line to it."""

    def __init__(self) -> None:
        # Spawn: a forked copy of a process whose threads have run hangs in its first parallel region.
        context = multiprocessing.get_context("spawn")
        self.line, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far,), daemon=True)
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
            self.line.send(message)
        except OSError:
            raise Lost(self._fate()) from None

    def take(self) -> Event:
        """As `Hand.take`."""
        try:
            event = self.line.recv()
        except (EOFError, OSError):
            raise Lost(self._fate()) from None
        if isinstance(event, BaseException):
            raise event
        return event

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
        self.line.close()


def _serve(line: Connection) -> None:
    """What a local worker's process does, until its driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    try:
        orders, parts, rules = line.recv()
        with orders.worker() as worker:
            worker.begin(placed(parts, orders.device), rules)
            while True:
                job, known = line.recv()
                for event in worker.work(job, known):
                    line.send(event)
    except (EOFError, OSError):
        return
    except EckartError as error:
        line.send(error)
    except Exception as error:
        line.send(RuntimeError("".join(traceback.format_exception(error))))


def ready(hands: Sequence[Process]) -> list[Process]:
    """Wait until some workers have an event, or have died.

    Args:
        hands: Workers with a job.

    Returns:
        Those.
    """
    lines = {id(hand.line): hand for hand in hands}
    return [lines[id(line)] for line in wait([hand.line for hand in hands])]
