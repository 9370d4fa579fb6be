"""Things that go wrong, in a worker as part of its model, and to a computation. Light, since workers import it."""

import os
import signal
import time
from pathlib import Path

from eckart.errors import TaskError

# What a fork server imports before it makes workers, so that each begins in a tenth of a second.
PRELOADED = [
    "eckart.processes",
    "transformers.masking_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
]


class Fault:
    """A forward hook: the n-th run of the model in another process than this one fails, once for each ticket."""

    def __init__(self, kind: str, at: int, tickets: Path):
        self.kind, self.at, self.tickets = kind, at, str(tickets)
        self.driver, self.runs = os.getpid(), 0

    def __call__(self, _module, _inputs):
        if os.getpid() == self.driver:
            return
        self.runs += 1
        if self.runs == self.at and self._take():
            {"die": _die, "raise": _raise, "refuse": _refuse, "sleep": _sleep}[self.kind]()

    def _take(self) -> bool:
        for ticket in Path(self.tickets).iterdir():
            try:
                ticket.unlink()
                return True
            except FileNotFoundError:  # another worker took it
                continue
        return False


def give_tickets(folder: Path, count: int) -> Path:
    """Make a folder of tickets."""
    folder.mkdir()
    for number in range(count):
        (folder / str(number)).touch()
    return folder


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ArithmeticError("no such luck")


def _refuse() -> None:
    raise TaskError("This task is refused. Another is not. Take another.")


def _sleep() -> None:
    time.sleep(600)


class Killed(BaseException):
    pass


def killed_again_and_again(work, steps):
    """Give what `work(progress)` gives in the end, and how often it was killed: after so many steps, then twice, …"""
    kills = 0
    while True:
        left = steps * (kills + 1)

        def stop(_):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            return work(stop), kills
        except Killed:
            kills += 1
