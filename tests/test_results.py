"""Statistics against scipy, brute force and simulation; JSON files that appear whole or not at all."""

import itertools
import json
import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eckart.errors import EckartError, OutputError
from eckart.results import Measurement, mcnemar, mean, paired_gain, perplexity, read_json, to_json, write_text

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = st.floats(-1e6, 1e6)


@given(values=st.lists(numbers, min_size=2, max_size=50))
def test_the_mean_has_the_standard_error_of_scipy(values):
    stats = pytest.importorskip("scipy.stats")
    found = mean(np.array(values), "s")
    # Of nearly equal numbers the spread is rounding alone.
    noise = 1e-9 * max(1, *map(abs, values))
    assert found.value == pytest.approx(np.mean(values), rel=1e-12, abs=noise)
    assert found.stderr == pytest.approx(stats.sem(values), rel=1e-9, abs=noise)
    assert (found.count, found.unit) == (len(values), "s")


@given(right=st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_error_of_a_share_is_the_binomial_one(right):
    found = mean(np.array(right), "fraction")
    share, count = sum(right) / len(right), len(right)
    assert found.value == pytest.approx(share)
    assert found.stderr == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


def test_one_example_has_no_standard_error():
    assert math.isnan(mean(np.array([1.0]), "s").stderr)
    assert math.isnan(perplexity(np.array([1.0]), np.array([7])).stderr)


@given(
    windows=st.lists(st.lists(st.floats(0, 20), min_size=1, max_size=9), min_size=1, max_size=12),
)
def test_perplexity_is_the_exponential_of_the_mean_loss_of_all_tokens(windows):
    found = perplexity(np.array([np.mean(w) for w in windows]), np.array([len(w) for w in windows]))
    tokens = [loss for window in windows for loss in window]
    assert found.value == pytest.approx(math.exp(sum(tokens) / len(tokens)), rel=1e-9)
    assert found.count == len(tokens)


def test_the_error_of_perplexity_is_its_spread_over_repetitions():
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 60, size=80)
    estimates, errors = [], []
    for _ in range(400):
        # Each window has a level of its own: tokens in it are not independent.
        losses = np.array([generator.normal(1, 0.5) + generator.normal(0, 1, n).mean() for n in lengths])
        found = perplexity(losses, lengths)
        estimates.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


@pytest.mark.parametrize("loss", [710.0, 1e300, math.inf])
def test_perplexity_of_a_broken_model_is_infinite_and_not_an_error(loss):
    assert perplexity(np.array([loss, loss]), np.array([3, 4])).value == math.inf
    assert mean(np.array([loss, 0.0]), "s").value == pytest.approx(loss / 2)
    assert paired_gain(np.array([loss, loss]), np.array([1.0, 2.0]), "s").value < 0
    assert math.isnan(perplexity(np.array([math.nan, 1.0]), np.array([3, 4])).value)


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_binomial_test_of_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    before, after = np.array(pairs).T
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(before, after) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("won", "lost"), [(won, n - won) for n in range(11) for won in range(n + 1)])
def test_mcnemar_is_the_share_of_coin_flips_at_least_as_uneven(won, lost):
    flips = list(itertools.product((0, 1), repeat=won + lost))
    uneven = sum(abs(2 * sum(flip) - won - lost) >= abs(won - lost) for flip in flips)
    before = np.array([False] * won + [True] * lost + [True, False], dtype=bool)
    after = np.array([True] * won + [False] * lost + [True, False], dtype=bool)
    assert mcnemar(before, after) == pytest.approx(uneven / len(flips))


def test_mcnemar_survives_many_examples():
    stats = pytest.importorskip("scipy.stats")
    before = np.zeros(100_000, dtype=bool)
    after = np.arange(100_000) < 50_500
    before[50_500:] = True
    assert mcnemar(before, after) == pytest.approx(stats.binomtest(50_500, 100_000).pvalue, rel=1e-6)
    assert mcnemar(np.zeros(5000, dtype=bool), np.ones(5000, dtype=bool)) == 0


@pytest.mark.parametrize("kind", ["answers", "losses", "skewed"])
def test_the_interval_of_a_gain_is_that_of_the_slow_bootstrap(kind):
    generator = np.random.default_rng(1)
    if kind == "answers":
        before, after = generator.random(60) < 0.4, generator.random(60) < 0.6
    elif kind == "losses":
        before, after = generator.normal(3, 1, 60), generator.normal(2.8, 1, 60)
    else:
        before, after = np.zeros(60), generator.exponential(1, 60) ** 2
    gain = paired_gain(before, after, "s")
    differences = after.astype(float) - before.astype(float)
    slow = [np.mean(differences[generator.integers(0, 60, 60)]) for _ in range(20_000)]
    spread = np.std(slow)
    assert gain.value == pytest.approx(differences.mean())
    for found, expected in zip(gain.interval, np.quantile(slow, [0.025, 0.975])):
        # The quantiles of 10,000 resamples vary by about 0.03 of the spread.
        assert abs(found - expected) < 0.15 * spread
    assert (gain.p_value is None) == (kind != "answers")


def test_the_interval_of_a_gain_holds_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(2)
    held = 0
    for trial in range(300):
        before = generator.normal(0, 1, 80)
        after = 0.5 * before + 0.3 + generator.normal(0, 1, 80)
        low, high = paired_gain(before, after, "s", seed=trial, resamples=1000).interval
        held += low <= 0.3 <= high
    # The share of 300 has a standard error of 1.3 %.
    assert 0.89 <= held / 300 <= 0.98


@given(
    pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=30)
def test_a_gain_turns_its_sign_with_the_two_sides_and_repeats_with_its_seed(pairs, seed):
    before, after = np.array(pairs).T
    gain = paired_gain(before, after, "s", seed=seed, resamples=200)
    again = paired_gain(before, after, "s", seed=seed, resamples=200)
    assert (gain.value, gain.interval) == (again.value, again.interval)
    assert gain.value == -paired_gain(after, before, "s", seed=seed, resamples=200).value
    differences = after - before
    noise = 1e-9 * max(1, *abs(differences))
    assert differences.min() - noise <= gain.interval[0] <= gain.interval[1] <= differences.max() + noise


def test_equal_answers_gain_nothing():
    gain = paired_gain(np.array([True, False]), np.array([True, False]), "fraction")
    assert (gain.value, gain.interval, gain.p_value) == (0.0, (0.0, 0.0), 1.0)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


def strict(tree):
    """The same tree with null for what JSON has no number for."""
    if isinstance(tree, dict):
        return {key: strict(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [strict(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@files
@given(tree=trees)
def test_json_goes_to_disk_and_back_with_null_for_what_is_not_finite(tree, tmp_path):
    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    assert json.loads(to_json(tree), parse_constant=refuse) == strict(tree)
    write_text(tmp_path / "a.json", to_json(tree))
    assert read_json(tmp_path / "a.json") == strict(tree)


def test_json_knows_dataclasses_numpy_and_paths(tmp_path):
    tree = {"m": (Measurement(np.float64(0.1), math.nan, 3, "s"),), 2: np.int64(3), "p": tmp_path, "b": np.bool_(True)}
    assert json.loads(to_json(tree)) == {
        "m": [{"value": 0.1, "stderr": None, "count": 3, "unit": "s"}],
        "2": 3,
        "p": str(tmp_path),
        "b": True,
    }


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(call, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OutputError, match=r"a\.json could not be written: No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_written_file_may_be_read_by_everyone(tmp_path):
    write_text(tmp_path / "a", "ä\r\n\u2028")
    assert (tmp_path / "a").read_bytes().decode() == "ä\r\n\u2028"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@files
@given(content=st.binary(max_size=60))
def test_any_bytes_are_json_or_an_error_that_names_the_file(content, may_refuse, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with may_refuse(EckartError, "a.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("make", ["mkdir", "nothing"])
def test_a_missing_file_or_a_folder_is_an_error_that_names_it(make, tmp_path):
    if make == "mkdir":
        (tmp_path / "a.json").mkdir()
    with pytest.raises(EckartError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
