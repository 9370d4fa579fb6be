"""A search that is killed goes on where it was and ends as if undisturbed. Oracle: the same command, undisturbed."""

import json
import os
import random
import shutil
import sqlite3
import time
from collections import Counter
from contextlib import closing, nullcontext

import psutil
import pytest

import tiny_models as tiny
from eckart.laser import search
from eckart.ledger import Ledger
from eckart.recipe import SearchSettings
from eckart.tasks import Example, make_task
from faults import give_tickets
from nursery import Nursery

FILES = ["plan.json", "recipe.yaml", "report.html", "results.json", "trials.sqlite"]
SMALL = ("--types", "mlp", "--rho", "0.1,0.5", "--split", "0.4", "--batch-tokens", "128", "--compose", "2")


@pytest.fixture(scope="module")
def nursery():
    running = Nursery()
    yield running
    running.close()


class Folder:
    """A run's folder, the command that fills it, and a log of all its lives."""

    def __init__(self, nursery, command, path):
        self.nursery, self.command = nursery, command
        self.out, self.log = path / "out", path / "log"
        path.mkdir()

    def live(self, fault=None, *options, start="forkserver"):
        """Give the command once; say its status, and what it printed on stderr."""
        command = (*self.command, "--out", self.out, *options)
        return self.nursery.live(*command, log=self.log, fault=fault, start=start)

    def finish(self, *options):
        """Give the command until the end, which must come."""
        status, errors = self.live(None, *options)
        assert status == 0, errors

    def logged(self, word):
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [tuple(line.split("\t")[1:]) for line in lines if line.startswith(f"{word}\t") or line == word]

    def rows(self):
        with closing(sqlite3.connect(self.out / "trials.sqlite")) as connection:
            return sorted(connection.execute("SELECT part, edit, block, scores FROM trials"))

    def results(self):
        """Without what differs between two runs: seconds, and what the last of its lives did itself."""
        results = json.loads((self.out / "results.json").read_text(encoding="utf-8"))
        del results["seconds"], results["trials"]["examples"], results["trials"]["prefix_cache_bytes"]
        return results


@pytest.fixture
def fresh(nursery, tiny_llama_folder, choice_task_file, tmp_path):
    """Make an empty folder for the command."""
    command = ("search", tiny_llama_folder, "--task", choice_task_file, *SMALL)
    count = iter(range(100))
    return lambda: Folder(nursery, command, tmp_path / str(next(count)))


@pytest.fixture(scope="module")
def undisturbed(nursery, tiny_llama_folder, choice_task_file, tmp_path_factory):
    command = ("search", tiny_llama_folder, "--task", choice_task_file, *SMALL)
    folder = Folder(nursery, command, tmp_path_factory.mktemp("undisturbed") / "run")
    status, errors = folder.live(("call", 0))
    assert status == 0, errors
    results = folder.results()
    assert results["best"]["edits"]
    assert results["compositions"]
    assert results["trials"]["stopped"]
    assert len(folder.rows()) == len(folder.logged("added")) == len(folder.logged("scored")) > 30
    return folder


def assert_same(folder, undisturbed):
    """What is in a folder is what an undisturbed run leaves, and nothing was recorded twice on the way."""
    assert sorted(path.name for path in folder.out.iterdir()) == FILES
    assert folder.results() == undisturbed.results()
    assert folder.rows() == undisturbed.rows()
    for name in ("plan.json", "recipe.yaml"):
        assert (folder.out / name).read_bytes() == (undisturbed.out / name).read_bytes()
    assert max(Counter(folder.logged("added")).values(), default=0) <= 1


def test_killed_ten_times_a_search_ends_as_if_undisturbed(fresh, undisturbed):
    ((calls,),) = undisturbed.logged("calls")
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 10:
        folder, lives = fresh(), 0
        while kills < 10:
            before = folder.rows() if (folder.out / "trials.sqlite").exists() and lives else []
            status, errors = folder.live(("call", chance.randint(1, int(calls))))
            assert status in (0, -9), errors
            lives += 1
            if status == 0:
                break
            kills += 1
            if before:
                assert set(before) <= set(folder.rows())
        else:
            folder.finish()
            lives += 1
        assert_same(folder, undisturbed)
        # A life that is killed loses the block at hand, at most.
        assert len(folder.logged("scored")) <= len(undisturbed.logged("scored")) + lives - 1
        runs += 1
    assert runs <= kills


def test_a_search_by_two_workers_is_killed_and_resumed_by_any_number(fresh, undisturbed):
    folder = fresh()
    for number, workers in ((3, 2), (9, 1), (2, 2)):
        status, errors = folder.live(("entry", number), "--workers", workers)
        assert status == -9, errors
    assert len(folder.rows()) == 2 + 8 + 1
    folder.finish("--workers", 2)
    assert_same(folder, undisturbed)
    assert_gone(folder)


def assert_gone(folder):
    """No worker is left; they have time to notice, however busy the machine is."""
    workers = [int(pid) for (pid,) in folder.logged("worker")]
    assert workers
    for _ in range(600):
        if not any(map(_runs, workers)):
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {[pid for pid in workers if _runs(pid)]} outlive their driver")


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_with_their_driver_even_in_the_midst_of_long_work(fresh, tmp_path):
    folder = fresh()
    tickets = give_tickets(tmp_path / "tickets", 2)
    assert folder.live(("lethargic", str(tickets)), "--workers", 2)[0] == -9
    assert_gone(folder)


def test_a_job_that_kills_its_workers_ends_the_search_with_one_message_and_1(fresh, undisturbed):
    folder = fresh()
    status, errors = folder.live(("unlucky",), "--workers", 2)
    assert status == 1
    assert "error: 3 workers died at" in errors
    assert "Take fewer --workers; the same command resumes." in " ".join(errors.split())
    assert "Traceback" not in errors
    assert_gone(folder)
    folder.finish()
    assert_same(folder, undisturbed)


@pytest.mark.parametrize(
    "fault",
    [
        ("statement", "executescript", 1),  # tables, but not yet whose
        ("statement", "executemany", 1),  # the fingerprint, not committed
        ("statement", "executemany", 7),  # between BEGIN and COMMIT
        ("statement", "__exit__", 7),  # between COMMIT and the return
        ("fold", 8192),
        ("fold", 20480),
        *(("file", number, True) for number in (1, 2, 3, 4)),
        ("file", 4, False),
    ],
    ids=str,
)
def test_killed_at_the_worst_moment_a_search_ends_as_if_undisturbed(fault, fresh, undisturbed):
    folder = fresh()
    status, errors = folder.live(fault)
    assert status == (-25 if fault[0] == "fold" else -9), errors
    written = folder.out / "results.json"
    assert written.exists() == (fault == ("file", 4, False))
    if not written.exists():
        folder.finish()
    assert_same(folder, undisturbed)
    if fault[0] in ("fold", "file"):
        assert len(folder.logged("scored")) == len(undisturbed.logged("scored"))


@pytest.fixture(scope="module")
def killed(nursery, tiny_llama_folder, choice_task_file, tmp_path_factory):
    """A search that was killed when its ledger had 20 entries, all of them in the write-ahead log."""
    command = ("search", tiny_llama_folder, "--task", choice_task_file, *SMALL)
    folder = Folder(nursery, command, tmp_path_factory.mktemp("killed") / "run")
    assert folder.live(("entry", 21))[0] == -9
    assert len(folder.logged("added")) == 20
    return folder


def torn(killed, to, *, cut=None, flip=None):
    """Copy the folder with a write-ahead log that is cut, or has a wrong byte, at a place."""
    to.mkdir()
    content = bytearray((killed.out / "trials.sqlite-wal").read_bytes())
    if flip is not None:
        content[flip] ^= 0xFF
    shutil.copy(killed.out / "trials.sqlite", to)
    (to / "trials.sqlite-wal").write_bytes(content[:cut])
    return to / "trials.sqlite"


def test_a_torn_log_gives_the_entries_before_the_tear(killed, tmp_path):
    size = (killed.out / "trials.sqlite-wal").stat().st_size
    added = [(part, edit, int(block)) for part, edit, block in killed.logged("added")]
    chance, lengths = random.Random(0), set()
    for number in range(40):
        place = {("cut", "flip")[number % 2]: chance.randrange(size)}
        path = torn(killed, tmp_path / str(number), **place)
        # Whose ledger it is may be what was torn off; then it is a new one.
        Ledger(path, _fingerprint(killed)).close()
        with closing(sqlite3.connect(path)) as connection:
            found = connection.execute("SELECT part, edit, block FROM trials ORDER BY rowid").fetchall()
        assert found == added[: len(found)], place
        lengths.add(len(found))
    assert len(lengths) > 10, "tears should be all over the log"


def _fingerprint(folder):
    copy = torn(folder, folder.out.parent / f"copy{time.monotonic_ns()}")
    with closing(sqlite3.connect(copy)) as connection:
        return dict(connection.execute("SELECT key, value FROM about"))


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_search_goes_on_from_a_torn_log(share, killed, fresh, undisturbed):
    folder = fresh()
    size = (killed.out / "trials.sqlite-wal").stat().st_size
    torn(killed, folder.out, cut=int(share * size))
    folder.finish()
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("entries", [3, 12, 1000])
def test_a_resumed_search_still_knows_that_the_prefix_cache_was_no_help(entries, tmp_path):
    """Blocks that are no chain: the last one is told something behind the back of the hidden states."""
    model, kept = tiny.build("llama"), {}
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: kept.update(value=output))
    model.model.layers[2].register_forward_hook(
        lambda _m, _i, output: output + (kept["value"] if kept["value"].shape == output.shape else 0)
    )
    examples = [Example(tiny.sentence(5, i), i % 2, ("w8", "w9")) for i in range(16)]
    settings = SearchSettings(types=("fc_in",), rho=(0.1,), split=0.5, strategy="exhaustive", batch_tokens=32)

    def life(entries):
        books = []

        def ledger(fingerprint):
            books.append(Dying(tmp_path / "trials.sqlite", fingerprint, entries))
            return books[0]

        try:
            return search(model, tiny.tokenizer(), make_task("task", examples), settings, ledger=ledger)
        finally:
            books[0].close()

    with pytest.raises(KeyboardInterrupt) if entries < 1000 else nullcontext():
        life(entries)
    assert any("do not form a chain" in warning for warning in life(1000).warnings)


class Dying(Ledger):
    """A ledger that takes so many entries only."""

    def __init__(self, path, fingerprint, entries):
        super().__init__(path, fingerprint)
        self.entries = entries

    def add(self, part, edit, scores):
        if not self.entries:
            raise KeyboardInterrupt
        self.entries -= 1
        super().add(part, edit, scores)


@pytest.mark.parametrize("key", ["weights", "task", "recipe", "dtype", "code", "torch"])
def test_a_ledger_of_another_search_is_refused_and_left_as_it_was(key, killed, fresh):
    folder = fresh()
    path = torn(killed, folder.out)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE about SET value = 'other' WHERE key = ?", (key,))
    before = folder.rows()
    assert len(before) == 20
    status, errors = folder.live()
    assert status == 1
    assert f"holds a search with another {key} (other, now" in " ".join(errors.split())
    assert folder.rows() == before


def test_ctrl_c_prints_the_command_that_resumes_and_ends_with_130(fresh, undisturbed):
    folder = fresh()
    for _ in range(2):
        status, errors = folder.live(("interrupt", 8))
        assert status == 130, errors
        assert "To go on, give the same command again" in errors
        assert f"--out {folder.out}" in errors
        assert "Traceback" not in errors
    assert len(folder.rows()) == 2 * 7
    folder.finish()
    assert_same(folder, undisturbed)


def test_ctrl_c_reaches_spawned_workers_as_an_end_not_as_a_traceback(fresh, undisturbed):
    """The workers of this test are spawned, as users' are: while they import, and while they work."""
    folder = fresh()
    first = sum(part == "order" for part, *_ in undisturbed.rows())  # by the driver, before workers are told anything
    for fault, rows in ((("interrupt_beginning",), first), (("interrupt", 8), first + 7)):
        status, errors = folder.live(fault, "--workers", 2, start="spawn")
        assert status == 130, errors
        assert "To go on, give the same command again" in errors
        assert "Traceback" not in errors
        assert "KeyboardInterrupt" not in errors
        assert len(folder.rows()) == rows
    assert_gone(folder)
    assert not os.path.exists(folder.out / "results.json")
    folder.finish("--workers", 2)
    assert_same(folder, undisturbed)
