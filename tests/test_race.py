"""A race ends with the winner of the exhaustive search. Oracle: that search, and every way an edit can end."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import tiny_models as tiny
from eckart.encoding import encode
from eckart.errors import TaskError
from eckart.laser import search
from eckart.ledger import Ledger
from eckart.race import Rival, Rules, cannot_win, removed, strata_of, surely_loses
from eckart.recipe import SearchSettings
from eckart.results import Measurement
from eckart.scoring import BlockScores, Scores, assemble, log_probabilities, prepare, summarize
from eckart.surgery import applied
from eckart.tasks import Example, make_task, split

COUNT = 6
TOLERANCE = 0.1


def task_of(kind, count=24, choices=3):
    if kind == "text":
        return make_task("text", [Example(tiny.sentence(9 + i % 7, i), None) for i in range(count)])
    if kind == "open":
        return make_task("open", [Example(tiny.sentence(6, i), f"w{5 + i}") for i in range(count)])
    examples = []
    for index in range(count):
        options = tuple(tiny.sentence(1 + c % 2, 1000 * c + index) for c in range(choices))
        examples.append(Example(tiny.sentence(4 + index % 6, index), index % choices, options))
    return make_task("choice", examples)


def settings_for(strategy, **others):
    return SearchSettings(
        **({"strategy": strategy, "rho": (0.05, 0.3, 0.8), "split": 0.6, "batch_tokens": 24} | others)
    )


@pytest.mark.parametrize("kind", ["choice", "open", "text"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2"])
def test_a_race_has_the_winner_of_the_exhaustive_search(name, kind):
    tokenizer, task = tiny.tokenizer(), task_of(kind)
    whole, raced = (search(tiny.build(name), tokenizer, task, settings_for(s)) for s in ("exhaustive", "race"))
    assert raced.plan.edits == whole.plan.edits
    assert raced.best == whole.best
    assert raced.gain == whole.gain
    examples, all_examples = raced.facts["trials"]["examples"], whole.facts["trials"]["examples"]
    # Losses of untrained models are too alike for a proof, and their open answers are all wrong.
    assert examples < all_examples if kind == "choice" else examples <= all_examples
    assert len(raced.trials) == len(whole.trials)
    for one, other in zip(raced.trials, whole.trials):
        assert one.edits == other.edits
        if one.stopped is None:
            assert one.validation == other.validation
        else:
            assert one.validation["loss"].count < other.validation["loss"].count
            # The proof holds: what the edit really reached is no better than what it could have.
            reached = other.validation[one.stopped.metric].value
            if one.stopped.metric == "accuracy":
                assert reached <= one.stopped.at_best < one.stopped.to_beat
            else:
                assert reached >= one.stopped.at_best > one.stopped.to_beat


def blocks_of(outcomes):
    """Six examples in three blocks, with given right answers and losses."""
    examples = [Example(f"w{5 + i} w6", 0, ("w7", "w8")) for i in range(COUNT)]
    encoded = encode(make_task("t", examples), tiny.tokenizer(), "causal", context=None, batch_tokens=6)
    assert [len(block.examples) for block in encoded.blocks] == [2, 2, 2]
    parts = {}
    for index, block in enumerate(encoded.blocks):
        mine = [outcomes[i] for i in block.examples]
        parts[index] = BlockScores([loss for _, loss in mine], [right for right, _ in mine], [""] * len(mine))
    return encoded, parts


outcome = st.tuples(st.booleans(), st.floats(0, 5, allow_nan=False))


@given(st.lists(outcome, min_size=4, max_size=4), st.lists(outcome, min_size=COUNT, max_size=COUNT))
def test_no_edit_that_could_win_is_stopped_and_every_stop_is_due(seen, rival):
    """Try every way the unseen examples can come out, with no loss at all: none may beat the rival."""
    encoded, parts = blocks_of(rival)
    scores = assemble(encoded, parts)
    to_beat = Rival((), summarize(encoded, scores), scores)
    completions = itertools.product([True, False], repeat=2)
    could_win = False
    for rest in completions:
        encoded, parts = blocks_of([(False, 9.0)] * COUNT)
        order = [i for block in encoded.blocks for i in block.examples]
        ends = dict(zip(order, [*seen, *((right, 0.0) for right in rest)]))
        encoded, parts = blocks_of([ends[i] for i in range(COUNT)])
        final = summarize(encoded, assemble(encoded, parts))
        key = (-final["accuracy"].value, final["loss"].value)
        could_win |= key < (-to_beat.measurements["accuracy"].value, to_beat.measurements["loss"].value)
    stopped = cannot_win((), encoded, assemble(encoded, {0: parts[0], 1: parts[1]}), to_beat, Rules("accuracy"))
    if could_win:
        assert stopped is None
    elif stopped is None:
        # Only a tie, or a difference within the margin for rounding, may go on.
        right = sum(r for r, _ in seen) + 2
        assert right == round(to_beat.measurements["accuracy"].value * COUNT)
        assert sum(loss for _, loss in seen) / COUNT == pytest.approx(
            to_beat.measurements["loss"].value, rel=1e-8, abs=1e-12
        )


def test_a_loss_that_is_too_high_already_stops_a_perplexity_race():
    examples = [Example(tiny.sentence(4, i), None) for i in range(4)]
    encoded = encode(make_task("t", examples), tiny.tokenizer(), "causal", context=64, batch_tokens=8)
    first = {0: BlockScores([5.0] * len(encoded.blocks[0].examples))}
    share = sum(encoded.tokens[i] for i in encoded.blocks[0].examples) / sum(encoded.tokens)

    def to_beat(loss):
        return Rival((), {"loss": Measurement(loss, 0.1, 4, "nats/token")}, scores)

    scores = assemble(encoded, first)
    assert cannot_win((), encoded, scores, to_beat(5 * share * 0.99), Rules("accuracy")).metric == "loss"
    assert cannot_win((), encoded, scores, to_beat(5 * share * 1.01), Rules("accuracy")) is None


def test_a_race_that_was_interrupted_ends_the_same(tmp_path):
    tokenizer, task = tiny.tokenizer(), task_of("choice")

    def run(path, stop_after=None):
        books = []

        def ledger(fingerprint):
            books.append(Ledger(path, fingerprint))
            return books[0]

        def progress(now):
            if now.done == stop_after:
                raise KeyboardInterrupt

        try:
            return search(tiny.build("llama"), tokenizer, task, settings_for("race"), ledger=ledger, progress=progress)
        finally:
            books[0].close()

    whole = run(tmp_path / "whole")
    for stop in (3, 30):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop)
    resumed = run(tmp_path / "parts")
    assert resumed.trials == whole.trials
    assert resumed.plan == whole.plan


def scores_of(correct, loss=None):
    correct = np.array(correct, dtype=bool)
    loss = np.ones(len(correct)) if loss is None else np.array(loss, dtype=float)
    return Scores(np.arange(len(correct)), loss, correct)


def test_wrong_answers_come_first_then_the_least_sure_ones():
    correct = np.array([True, False, True, True, False] * 4)
    loss = np.arange(20.0)
    strata = strata_of(20, scores_of(correct, loss), confidence=None, seed=0)
    # Of wrong and of right answers, those with the highest loss first: a tenth of all examples.
    places = {stratum: [i for i in range(20) if strata[i] == stratum] for stratum in range(4)}
    assert places[0] == [16, 19]
    assert places[1] == [1, 4, 6, 9, 11, 14]
    assert places[2] == [17, 18]
    assert len(places[3]) == 10
    assert strata_of(20, None, confidence=None, seed=0) is None


def test_a_sequential_test_draws_stages_of_equal_size_by_its_seed():
    strata = strata_of(100, None, confidence=0.99, seed=1)
    assert sorted(np.bincount(strata)) == [33, 33, 34]
    assert strata == strata_of(100, None, confidence=0.99, seed=1)
    assert strata != strata_of(100, None, confidence=0.99, seed=2)


def encoded_pairs(count):
    examples = [Example(f"w{5 + i % 40} w6", 0, ("w7", "w8")) for i in range(count)]
    return encode(make_task("t", examples), tiny.tokenizer(), "causal", context=None)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60), st.floats(0.6, 0.9999))
def test_the_test_of_accuracy_is_scipys_binomial_test_at_its_share_of_the_level(pairs, confidence):
    encoded = encoded_pairs(len(pairs))
    ours, theirs = scores_of([a for a, _ in pairs]), scores_of([b for _, b in pairs])
    rules = Rules("accuracy", confidence=confidence, looks=(1, 2, 3))
    found = surely_loses(encoded, ours, theirs, rules)
    won = sum(a and not b for a, b in pairs)
    differ = sum(a != b for a, b in pairs)
    expected = stats.binomtest(won, differ, alternative="less").pvalue if differ else 1.0
    level = (1 - confidence) / 3
    if abs(expected - level) > 1e-12:
        assert (found is not None) == (expected < level)
    if found is not None:
        assert found.p_value == pytest.approx(expected, rel=1e-9)
        assert (found.level, found.looks) == (pytest.approx(level), 3)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=40))
def test_the_test_of_loss_is_scipys_paired_t_test(differences):
    differences = np.array(differences)
    encoded = encoded_pairs(len(differences))
    right = np.ones(len(differences), dtype=bool)
    ours = Scores(np.arange(len(right)), 2 + differences, right)
    theirs = Scores(np.arange(len(right)), np.full(len(right), 2.0), right)
    found = surely_loses(encoded, ours, theirs, Rules("loss", confidence=0.9, looks=(1,)))
    spread = (ours.loss - theirs.loss).std()
    if spread < 1e-9:
        return
    expected = stats.ttest_rel(ours.loss, theirs.loss, alternative="greater").pvalue
    if abs(expected - 0.1) > 1e-6:
        assert (found is not None) == (expected < 0.1)
    if found is not None:
        assert found.p_value == pytest.approx(expected, rel=1e-6)


def test_an_edit_that_is_as_good_is_stopped_at_most_as_often_as_the_confidence_says():
    """Monte Carlo over the order of stages: the error of all looks together stays under its bound."""
    generator = np.random.default_rng(0)
    count, stages, confidence, runs = 200, 5, 0.9, 2000
    encoded = encoded_pairs(count)
    base = generator.random(count) < 0.6
    differs = generator.permutation(count)[:60]
    other = base.copy()
    other[differs] = ~other[differs]
    # Make the two equally often right, so that the hypothesis holds exactly.
    excess = int(other.sum() - base.sum())
    flippable = [i for i in differs if other[i] == (excess > 0)]
    for i in flippable[: abs(excess) // 2 * 2 // 2]:
        other[i], base[i] = base[i], other[i]
    assert abs(int(other.sum()) - int(base.sum())) <= 1
    rules = Rules("accuracy", confidence=confidence, looks=tuple(range(1, stages)))
    errors = 0
    for _ in range(runs):
        order = generator.permutation(count)
        for look in range(1, stages):
            seen = np.sort(order[: look * count // stages])
            ours = Scores(seen, np.ones(len(seen)), other[seen])
            if surely_loses(encoded, ours, scores_of(base), rules) is not None:
                errors += 1
                break
    assert errors / runs < 1 - confidence


def test_a_test_stops_edits_early_and_says_so():
    examples = [Example(tiny.sentence(4 + i % 6, i), i % 2, (f"w{5 + i % 20}", f"w{30 + i % 7}")) for i in range(300)]
    settings = settings_for("race", confidence=0.9, split=0.8)
    found = search(tiny.build("llama"), tiny.tokenizer(), make_task("choice", examples), settings)
    tested = [trial.stopped for trial in found.trials if trial.stopped and trial.stopped.p_value is not None]
    for proof in tested:
        assert proof.p_value <= proof.level == pytest.approx(0.1 / proof.looks)
    assert tested


@pytest.mark.parametrize("select", ["accuracy", "loss"])
def test_what_is_selected_counts_first(select):
    result = search(tiny.build("llama"), tiny.tokenizer(), task_of("choice"), settings_for("exhaustive", select=select))
    name, sign = ("accuracy", -1) if select == "accuracy" else ("loss", 1)
    best = min(sign * trial.validation[name].value for trial in result.trials)
    assert sign * result.best["validation"][name].value == best


def text_task(count=12):
    return make_task("text", [Example(tiny.sentence(30 + i, i), None) for i in range(count)])


def test_agreement_finds_the_smallest_model_within_the_tolerance():
    """Oracle: divergences from whole passes, one edit at a time, and the largest saving among those allowed."""
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), text_task()
    options = {"objective": "agreement", "rho": (0.05, 0.3), "split": 0.5, "tolerance": TOLERANCE}
    results = {s: search(model, tokenizer, task, settings_for(s, **options)) for s in ("exhaustive", "race", "guided")}
    settings = settings_for("exhaustive", **options)
    validation, _ = split(task, 0.5, seed=0)
    encoded = prepare(model, tokenizer, validation, **settings.encoding)
    allowed = {}
    for trial in results["exhaustive"].trials:
        losses = []
        for index in range(len(encoded.blocks)):
            reference = log_probabilities(model, encoded, index)
            with applied(model, trial.edits):
                found = log_probabilities(model, encoded, index)
            terms = torch.nn.functional.kl_div(found, reference, log_target=True, reduction="none").sum(-1)
            losses.append(terms[encoded.blocks[index].position])
        divergence = float(torch.cat(losses).double().mean())
        assert trial.validation["divergence"].value == pytest.approx(divergence, abs=2e-7)
        if divergence <= TOLERANCE:
            allowed[trial.edits] = removed(trial.edits)
    assert allowed
    (edit,) = results["exhaustive"].plan.edits
    assert removed((edit,)) == max(allowed.values())
    assert results["race"].plan.edits == results["exhaustive"].plan.edits
    assert results["guided"].best["validation"]["divergence"].value <= TOLERANCE
    assert results["exhaustive"].baseline["test"]["divergence"].value == 0
    for trial in results["race"].trials:
        if trial.stopped is not None and trial.stopped.metric == "divergence":
            assert trial.stopped.at_best > TOLERANCE


def test_agreement_needs_text():
    with pytest.raises(TaskError, match="without labels"):
        search(tiny.build("llama"), tiny.tokenizer(), task_of("choice"), settings_for("race", objective="agreement"))
