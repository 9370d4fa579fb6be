"""Any number of workers find the same, to the bit, whatever becomes of them. Oracle: one worker, undisturbed."""

import multiprocessing
import os
import random
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import faults
import tiny_models as tiny
from eckart import processes
from eckart.crew import Lost, Orders, Team
from eckart.driver import open_crew
from eckart.errors import EckartError, RecipeError, TaskError
from eckart.laser import search
from eckart.ledger import Ledger
from eckart.matrices import find_matrices
from eckart.race import Rules
from eckart.recipe import SearchSettings
from eckart.scoring import BlockScores
from eckart.surgery import weights_sha256
from eckart.sweep import Done, Ended, Job, Scored, route_of
from eckart.tasks import Example, make_task

SMALL = SearchSettings(types=("mlp",), rho=(0.1, 0.5), split=0.5, batch_tokens=64)
KINDS = {
    "race": {},
    "exhaustive on loss": {"strategy": "exhaustive", "select": "loss", "types": ("attn",)},
    "guided": {"strategy": "guided", "shortlist": 4},
    "compose": {"compose": 3, "beam": 2, "shortlist": 6},
    "confidence": {"confidence": 0.6, "select": "loss", "split": 0.8},
}


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch):
    """Workers come from a fork server; that they may be spawned too is tested in test_resume.py."""
    monkeypatch.setattr(processes, "START_METHOD", "forkserver")
    multiprocessing.set_forkserver_preload(faults.PRELOADED)


def labelled(count=100):
    examples = [
        Example(tiny.sentence(4 + i % 6, i), i % 3, tuple(tiny.sentence(1 + c % 2, 1000 * c + i) for c in range(3)))
        for i in range(count)
    ]
    return make_task("task", examples)


class Book(Ledger):
    """A ledger in memory that counts what it is given."""

    def __init__(self, fingerprint):
        super().__init__(None, fingerprint)
        self.added = Counter()

    def add(self, part, edit, scores):
        self.added.update((part, edit, block) for block in scores)
        super().add(part, edit, scores)


def run(settings, *, fault=None, **options):
    """Search and give the result, the ledger and the progress."""
    books, seen = [], []
    model = tiny.build("llama")
    if fault is not None:
        model.register_forward_pre_hook(fault)
    before = weights_sha256(model)
    found = search(
        model,
        tiny.tokenizer(),
        labelled(),
        settings,
        ledger=lambda fingerprint: books.append(Book(fingerprint)) or books[0],
        progress=seen.append,
        **options,
    )
    assert weights_sha256(model) == before
    return found, books[0].added, seen


def facts(found):
    """All that does not depend on who worked and for how long."""
    results = found.to_results()
    del results["seconds"], results["trials"]["prefix_cache_bytes"]
    return results


def check_progress(seen, found):
    """Numbers only grow, except that of the edits that are alive; in the end they are those of the results."""
    stages = [now.stage for now in seen]
    assert sorted(stages, key=["searching", "composing", "proving"].index) == stages
    for stage, tried in (("searching", found.trials), ("composing", found.compositions)):
        of_stage = [now for now in seen if now.stage == stage]
        assert bool(of_stage) == bool(tried)
        for before, now in zip(of_stage, of_stage[1:]):
            assert before.done <= now.done <= now.total >= before.total
            assert before.total - before.alive <= now.total - now.alive
            assert before.examples <= now.examples <= now.examples_total
            assert stage == "composing" or now.total == before.total
        if tried:
            last = of_stage[-1]
            assert last.done == last.total == len(tried)
            assert last.total - last.alive == sum(trial.stopped is not None for trial in tried)
            assert last.examples == sum(trial.validation["loss"].count for trial in tried)
    assert (seen[-1].stage, seen[-1].done) == ("proving", seen[-1].total)


@pytest.mark.parametrize("kind", KINDS)
def test_two_local_processes_find_what_one_worker_finds_to_the_bit(kind):
    settings = SMALL.model_copy(update=KINDS[kind])
    alone, counts, seen = run(settings)
    together, their_counts, theirs = run(settings, workers=2)
    assert facts(together) == facts(alone)
    assert their_counts == counts
    assert set(counts.values()) == {1}
    check_progress(seen, alone)
    check_progress(theirs, together)
    # What is compared must be there: a winner, and where edits may be stopped some that were.
    assert alone.plan.edits
    assert bool(alone.compositions) == (kind == "compose")
    tests = [t.stopped for t in (*alone.trials, *alone.compositions) if t.stopped and t.stopped.p_value is not None]
    assert bool(tests) == (kind == "confidence")


LONG = {"strategy": "exhaustive", "rho": (0.1, 0.3, 0.5)}


# The first dies before an edit is done; the other two between the edits of a job, which one after them takes up.
@pytest.mark.parametrize(("kind", "deaths", "at"), [(KINDS["compose"], 1, 20), (LONG, 2, 90)])
def test_a_killed_worker_is_replaced_and_nothing_is_scored_again(kind, deaths, at, tmp_path):
    settings = SMALL.model_copy(update=kind)
    alone, counts, _ = run(settings)
    tickets = faults.give_tickets(tmp_path / "tickets", deaths)
    together, their_counts, seen = run(settings, workers=2, fault=faults.Fault("die", at, tickets))
    assert not list(tickets.iterdir()), "nobody died"
    assert facts(together) == facts(alone)
    assert their_counts == counts
    check_progress(seen, together)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("at", [1, 6])  # while it learns what its jobs are about; in the middle of a job
def test_what_kills_three_workers_is_an_error_that_says_where(at, tmp_path):
    tickets = faults.give_tickets(tmp_path / "tickets", 100)
    with pytest.raises(EckartError, match=r"3 workers died at .* \(signal 9\).*Take fewer --workers"):
        run(SMALL, workers=2, fault=faults.Fault("die", at, tickets))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("at", [1, 6])
def test_an_exception_in_a_worker_reaches_the_driver_with_its_traceback(at, tmp_path):
    tickets = faults.give_tickets(tmp_path / "tickets", 1)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback .*faults\.py.*ArithmeticError: no such luck"):
        run(SMALL, workers=2, fault=faults.Fault("raise", at, tickets))
    assert not multiprocessing.active_children()


def test_what_a_worker_said_before_it_ended_is_heard_even_if_nobody_listened_then():
    hand = processes.Process()
    hand.begin(Orders(b"no model", "cpu", 1, "none", None), {}, Rules("accuracy"))
    hand._process.join()
    with pytest.raises(RuntimeError, match=r"(?s)Traceback .*UnpicklingError"):
        hand.give(Job("validation", ()), {})
    hand.close()


def test_an_error_of_our_own_stays_one_message(tmp_path):
    tickets = faults.give_tickets(tmp_path / "tickets", 1)
    with pytest.raises(TaskError, match=r"^This task is refused\. Another is not\. Take another\.$"):
        run(SMALL, workers=2, fault=faults.Fault("refuse", 6, tickets))


def test_an_edit_that_is_interrupted_halfway_is_undone(monkeypatch):
    """A set of edits is written one by one; what stops it in between must not leave the first in the model."""
    import eckart.sweep as sweep

    replacement, model = sweep.replacement, tiny.build("llama")
    before, held = weights_sha256(model), []

    def interrupted(weight, edit, clusters):
        held.append(edit.matrix)
        # The unedited weights of this matrix, while another one is edited: the second of a set.
        if len(held) > 1 and held[-1] != held[-2] and weights_sha256(model) != before:
            raise KeyboardInterrupt
        return replacement(weight, edit, clusters)

    monkeypatch.setattr(sweep, "replacement", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, tiny.tokenizer(), labelled(), SMALL.model_copy(update=KINDS["compose"]))
    assert weights_sha256(model) == before


def test_no_workers_are_refused():
    model = tiny.build("llama")
    facts = route_of(model), find_matrices(model)
    with pytest.raises(RecipeError, match="0 workers"), open_crew(model, tiny.tokenizer(), *facts, workers=0):
        pass


class Imagined:
    """A hand that does jobs of numbers, and dies when fate says so."""

    def __init__(self, fate):
        self.fate, self.events, self.dead, self.begun = fate, [], False, False

    def _live(self):
        self.dead = self.dead or next(self.fate, False)
        if self.dead:
            raise Lost("fate")

    def begin(self, _orders, _parts, _rules):
        assert not self.begun, "a worker is told once what its jobs are about"
        self._live()
        self.begun = True

    def give(self, job, known):
        assert self.begun
        self._live()
        blocks = [block for block in job.blocks if block not in known[""]]
        self.events = [*(Scored("", block, BlockScores([0.0]), True) for block in blocks), Ended(""), Done({}, 0)]

    def take(self):
        self._live()
        return self.events.pop(0)

    def close(self):
        self.dead = True


@given(
    fate=st.lists(st.booleans(), max_size=40),
    size=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    known=st.sets(st.integers(0, 20)),
    seed=st.integers(0, 99),
)
def test_whoever_dies_when_every_block_is_scored_once_or_the_crew_gives_up(fate, size, lengths, known, seed):
    chance, dies, hands = random.Random(seed), iter(fate), []

    def hire():
        hands.append(Imagined(dies))
        return hands[-1]

    def ready(waiting):
        return chance.sample(waiting, chance.randint(1, len(waiting)))

    ends = torch.tensor(lengths).cumsum(0).tolist()
    jobs = [Job("part", ((),), None, tuple(range(end - length, end))) for end, length in zip(ends, lengths)]
    team = Team(hire, ready, lambda number: number, size)
    scored = Counter()
    known = {"part": {"": {block: BlockScores([0.0]) for block in known}}}
    try:
        team.begin({}, Rules("accuracy"))
        events = list(team.work(jobs, known))
    except EckartError:
        assert sum(fate) >= 3
        return
    finally:
        team.close()
    scored.update(event.block for event in events if isinstance(event, Scored))
    assert scored == Counter(set(range(sum(lengths))) - known["part"][""].keys())
    assert sum(isinstance(event, Done) for event in events) == len(jobs)
    assert all(hand.dead for hand in hands)


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'eckart[cluster]'")


@pytest.fixture
def ray(monkeypatch):
    """Ray, whose workers import what this process imports; its cluster is gone afterwards."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    import ray

    yield ray
    ray.shutdown()


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_ray_actors_of_which_one_dies_find_what_one_worker_finds_to_the_bit(ray, tmp_path):
    settings = SMALL.model_copy(update=KINDS["compose"])
    alone, counts, _ = run(settings)
    tickets = faults.give_tickets(tmp_path / "tickets", 1)
    cpus = os.cpu_count() or 1
    workers = min(2, cpus)
    together, their_counts, seen = run(settings, workers=workers, ray="auto", fault=faults.Fault("die", 20, tickets))
    assert not list(tickets.iterdir()), "nobody died"
    assert facts(together) == facts(alone)
    assert their_counts == counts
    check_progress(seen, together)
    with pytest.raises(EckartError, match="do not fit the Ray cluster at 'auto'"):
        run(SMALL, workers=cpus + 1, ray="auto")


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_raised_in_a_ray_actor_reaches_the_driver(ray, tmp_path):
    tickets = faults.give_tickets(tmp_path / "tickets", 1)
    with pytest.raises(TaskError, match=r"^This task is refused\. Another is not\. Take another\.$"):
        run(SMALL, ray="auto", fault=faults.Fault("refuse", 6, tickets))
    tickets = faults.give_tickets(tmp_path / "more", 1)
    with pytest.raises(ArithmeticError, match=r"(?s)faults\.py.*no such luck"):
        run(SMALL, ray="auto", fault=faults.Fault("raise", 6, tickets))
    tickets = faults.give_tickets(tmp_path / "most", 100)
    with pytest.raises(EckartError, match="3 workers died at"):
        run(SMALL, ray="auto", fault=faults.Fault("die", 6, tickets))


def test_without_ray_its_option_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EckartError, match=r"pip install 'eckart\[cluster\]'"):
        run(SMALL, ray="auto")
