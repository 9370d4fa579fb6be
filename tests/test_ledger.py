"""The ledger gives back exactly what it was given, to whoever measures the same thing, and to nobody else."""

import gc
import sqlite3
from contextlib import closing, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eckart.errors import EckartError, OutputError
from eckart.ledger import Ledger, code_sha256
from eckart.scoring import BlockScores

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
PRINT = {"weights": "a", "task": "b"}
scores = st.builds(
    BlockScores,
    loss=st.lists(st.floats(), max_size=5),
    correct=st.lists(st.booleans(), max_size=5),
    prediction=st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=5),
    rank=st.lists(st.integers(0, 2**31), max_size=5),
)
blocks = st.dictionaries(st.integers(0, 100), scores, max_size=4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trials.sqlite"


def bits(found):
    """Floats as their exact digits, since NaN differs from itself."""
    return {i: ([v.hex() for v in s.loss], s.correct, s.prediction, s.rank) for i, s in found.items()}


@files
@given(given_blocks=blocks)
def test_scores_come_back_exactly_also_after_reopening(given_blocks, path):
    path.unlink(missing_ok=True)
    first = Ledger(path, PRINT)
    first.add("validation", "e", given_blocks)
    assert bits(first.known("validation", "e")) == bits(given_blocks)
    first.close()
    second = Ledger(path, PRINT)
    assert bits(second.known("validation", "e")) == bits(given_blocks)
    second.close()


def test_only_what_was_added_is_known():
    ledger = Ledger(None, PRINT)
    assert ledger.empty
    ledger.add("validation", "e", {3: BlockScores([0.5])})
    assert not ledger.empty
    assert ledger.known("test", "e") == ledger.known("validation", "f") == {}
    assert ledger.known("validation", "e") == {3: BlockScores([0.5])}
    ledger.close()


def test_a_note_is_kept_and_only_that_one(path):
    ledger = Ledger(path, PRINT)
    assert not ledger.noted("a")
    for _ in range(2):
        ledger.note("a")
    ledger.close()
    again = Ledger(path, PRINT)
    assert again.noted("a")
    assert not again.noted("b")
    assert again.empty
    again.close()


def test_adding_twice_is_adding_once(path):
    ledger = Ledger(path, PRINT)
    two = {0: BlockScores([0.1], [True], ["a"]), 1: BlockScores([0.2], [False], ["b"])}
    for _ in range(2):
        ledger.add("test", "", two)
    assert ledger.known("test", "") == two
    ledger.close()
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT count(*) FROM trials").fetchone() == (2,)
    raw.close()


def test_blocks_are_added_all_or_none(path):
    ledger = Ledger(path, PRINT)
    with pytest.raises(OverflowError):  # SQLite's integers have 64 bits
        ledger.add("test", "e", {0: BlockScores([1.0]), 2**64: BlockScores([2.0])})
    ledger.close()
    again = Ledger(path, PRINT)
    assert again.known("test", "e") == {}
    again.close()


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"weights": "c", "task": "b"}, "weights"),
        ({"weights": "a", "task": "c"}, "task"),
        ({"weights": "a"}, "task"),
        ({"weights": "a", "task": "b", "torch": "2"}, "torch"),
    ],
)
def test_another_fingerprint_is_refused_and_named_and_changes_nothing(other, key, path):
    ledger = Ledger(path, PRINT)
    ledger.add("test", "", {0: BlockScores([0.1])})
    ledger.close()
    before = path.read_bytes()
    with pytest.raises(OutputError, match=f"another {key} "):
        Ledger(path, other)
    gc.collect()  # a connection left open would warn
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


@files
@given(start=st.binary(max_size=200))
def test_a_file_that_is_no_database_is_refused_and_kept(start, path):
    content = start + b"x" * 1024  # SQLite takes a file of a few bytes for an empty database
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"trials\.sqlite cannot be used as a ledger"):
        Ledger(path, PRINT)
    assert path.read_bytes() == content


def test_another_database_is_refused(path):
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE about (something)")
    raw.close()
    with pytest.raises(OutputError, match="cannot be used as a ledger"):
        Ledger(path, PRINT)


def test_a_ledger_whose_schema_is_not_utf8_is_refused(path):
    Ledger(path, PRINT).close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE trials", b"CREATE TABLE \x80rials"))
    with pytest.raises(OutputError, match="cannot be used as a ledger"):
        Ledger(path, PRINT)


def test_a_folder_or_a_missing_one_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "trials.sqlite"):
        with pytest.raises(OutputError, match="cannot be used as a ledger"):
            Ledger(path, PRINT)


@files
@given(data=st.data())
def test_a_damaged_ledger_gives_scores_or_an_error(data, path, may_refuse, tmp_path):
    whole = tmp_path / "whole.sqlite"
    if not whole.exists():
        ledger = Ledger(whole, PRINT)
        ledger.add("test", "", {i: BlockScores([0.1 * i], [True], ["a"]) for i in range(20)})
        ledger.close()
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        ledger = Ledger(path, PRINT)
    except EckartError:
        return
    with suppress(sqlite3.Error), closing(ledger), may_refuse(EckartError, "trials.sqlite"):
        ledger.known("test", "")
        ledger.add("test", "", {0: BlockScores([0.5])})


def test_the_code_hash_is_stable():
    assert code_sha256() == code_sha256()
    assert len(code_sha256()) == 64
