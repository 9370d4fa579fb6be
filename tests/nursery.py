"""`eckart` in processes forked from one that has imported everything, each with something that goes wrong.

As a program it reads requests and writes answers, one JSON a line. A fork is sound here: the process that is forked has
run nothing but imports. Workers come from a fork server for the same speed, or are spawned as for users.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import faults


class Nursery:
    """The process that is forked, as a test sees it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def live(self, *arguments, log, fault=None, start="forkserver"):
        """Run `eckart` with these arguments; give its status, below 0 for a signal, and what it printed on stderr.

        `fault` is a function of this module and its arguments; `log` a file that lines are added to for every worker,
        block that was scored and entry in the ledger.
        """
        request = {"arguments": [*map(str, arguments)], "log": str(log), "fault": fault, "start": start}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        status, _, errors = json.loads(self.process.stdout.readline())
        return status, errors

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _serve() -> None:
    multiprocessing.set_forkserver_preload(faults.PRELOADED)
    forkserver.ensure_running()
    from eckart import cli, run  # noqa: F401 what takes seconds

    with tempfile.NamedTemporaryFile("w+") as modules, os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            print(json.dumps(_copy(json.loads(line), Path(modules.name))), file=answers, flush=True)
            for name in modules.read().split():  # what the first life had to import, the next ones have
                with contextlib.suppress(Exception):
                    importlib.import_module(name)


def _copy(request, modules):
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "other threads would not be in the copy"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _live(request, (out, err), modules)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return status, out.read().decode(), err.read().decode()


def _live(request, files, modules) -> None:
    from eckart import cli, processes

    status = 1
    try:
        os.setsid()  # so that a signal to the group reaches its workers and nobody else
        # A suite that a shell runs in the background has been told to ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, file in zip((1, 2), files):
            os.dup2(file.fileno(), descriptor)
        forkserver._forkserver.ensure_running = lambda: None  # it is the parent's child, and runs
        processes.START_METHOD = request["start"]
        _log_to(request["log"])
        if request["fault"]:
            name, *arguments = request["fault"]
            globals()[name](*arguments)
        sys.argv = ["eckart", *request["arguments"]]
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0 and not modules.stat().st_size:
            modules.write_text(" ".join(sys.modules))
        os._exit(status)


def _log_to(path) -> None:
    from eckart import laser, processes, sweep
    from eckart.ledger import Ledger

    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*words):
        os.write(log, ("\t".join(map(str, words)) + "\n").encode())

    for module in (laser, sweep):
        module.score_block = _followed(module.score_block, lambda *_: say("scored"), before=True)
    Ledger.add = _followed(Ledger.add, lambda _, part, edit, scores: [say("added", part, edit, b) for b in scores])
    processes.Process.__init__ = _followed(processes.Process.__init__, lambda self: say("worker", self._process.pid))
    global ended
    ended = say


def trainer(number, where, kind) -> None:
    """A signal at the n-th step of a training, or before or after the n-th file of its state; every step writes one."""
    from eckart import recovery, training

    stop = _nth(number, lambda: os.kill(os.getpid(), getattr(signal, kind)))
    training.CHECKPOINT_SECONDS = recovery.CHECKPOINT_SECONDS = 0.0
    if where == "step":
        training.Training.descend = _followed(training.Training.descend, stop, before=True)
    else:
        training.write_state = _followed(training.write_state, stop, before=where == "before")
        recovery.write_state = training.write_state


def compressor(stage, number) -> None:
    """Be killed when a compression tells of one of its stages for the n-th time."""
    from eckart import compression_steps

    die, told = _nth(number, _die), compression_steps.Progress

    def progress(now, *counts):
        if now == stage:
            die()
        return told(now, *counts)

    compression_steps.Progress = progress


def _followed(function, act, *, before=False):
    def both(*arguments, **options):
        if before:
            act(*arguments)
        result = function(*arguments, **options)
        if not before:
            act(*arguments)
        return result

    return both


def _nth(number, act):
    """Call `act` the n-th time; 0 is never."""
    left = number

    def count(*_arguments, **_options):
        nonlocal left
        left -= 1
        if left == 0:
            act()

    return count


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _press() -> None:
    os.killpg(0, signal.SIGINT)
    time.sleep(60)  # another thread may be the one that is told; it ends here


def call(number) -> None:
    """Be killed at the n-th call of a function after the ledger was opened; with 0, log how many there were."""
    from eckart import cli
    from eckart.ledger import Ledger

    calls = 0

    def profile(_frame, event, _argument):
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls == number:
                _die()

    Ledger.__init__ = _followed(Ledger.__init__, lambda *_: sys.setprofile(profile), before=True)
    cli.search._print_files = _followed(cli.search._print_files, lambda *_: ended("calls", calls))


def entry(number) -> None:
    """Be killed before the n-th entry in the ledger."""
    from eckart.ledger import Ledger

    Ledger.add = _followed(Ledger.add, _nth(number, _die), before=True)


def interrupt(number) -> None:
    """Press Ctrl-C before the n-th entry in the ledger."""
    from eckart.ledger import Ledger

    Ledger.add = _followed(Ledger.add, _nth(number, _press), before=True)


def interrupt_beginning() -> None:
    """Press Ctrl-C while workers come to life."""
    from eckart.crew import Team

    Team.begin = _followed(Team.begin, lambda *_: _press(), before=True)


def statement(method, number) -> None:
    """Be killed after the n-th call of a method of the ledger's connection."""
    died = _followed(getattr(sqlite3.Connection, method), _nth(number, _die))
    factory = type("Connection", (sqlite3.Connection,), {method: died})
    sqlite3.connect = functools.partial(sqlite3.connect, factory=factory)


def fold(size) -> None:
    """Be killed while the write-ahead log is folded into the file, which has grown to so many bytes then."""

    def limit(_connection, sql, *_):
        if "wal_checkpoint" in sql:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    execute = _followed(sqlite3.Connection.execute, limit, before=True)
    factory = type("Connection", (sqlite3.Connection,), {"execute": execute})
    sqlite3.connect = functools.partial(sqlite3.connect, factory=factory)


def file(number, before) -> None:
    """Be killed before or after the n-th file is put in its place."""
    os.replace = _followed(os.replace, _nth(number, _die), before=before)


def unlucky() -> None:
    """Kill each worker that is given a job."""
    from eckart.processes import Process

    Process.give = _followed(Process.give, lambda self, *_: os.kill(self._process.pid, signal.SIGKILL))


def lethargic(tickets) -> None:
    """Be killed when all workers have a job that takes ten minutes."""
    from eckart import processes, run

    def slow(model, tokenizer):
        model.register_forward_pre_hook(faults.Fault("sleep", 1, Path(tickets)))
        return model, tokenizer

    load = run.load
    run.load = lambda *arguments, **options: slow(*load(*arguments, **options))
    processes.ready = _followed(processes.ready, lambda *_: _die(), before=True)


if __name__ == "__main__":
    _serve()
