"""A race ends with the winner of the exhaustive search. Oracle: that search, and every way an edit can end."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.encoding import encode
from eckart.laser import search
from eckart.ledger import Ledger
from eckart.race import cannot_win
from eckart.recipe import SearchSettings
from eckart.results import Measurement
from eckart.scoring import BlockScores, assemble, summarize
from eckart.tasks import Example, make_task

COUNT = 6


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
    to_beat = summarize(encoded, assemble(encoded, parts))
    completions = itertools.product([True, False], repeat=2)
    could_win = False
    for rest in completions:
        encoded, parts = blocks_of([(False, 9.0)] * COUNT)
        order = [i for block in encoded.blocks for i in block.examples]
        ends = dict(zip(order, [*seen, *((right, 0.0) for right in rest)]))
        encoded, parts = blocks_of([ends[i] for i in range(COUNT)])
        final = summarize(encoded, assemble(encoded, parts))
        key = (-final["accuracy"].value, final["loss"].value)
        could_win |= key < (-to_beat["accuracy"].value, to_beat["loss"].value)
    stopped = cannot_win(encoded, assemble(encoded, {0: parts[0], 1: parts[1]}), to_beat, "accuracy")
    if could_win:
        assert stopped is None
    elif stopped is None:
        # Only a tie, or a difference within the margin for rounding, may go on.
        right = sum(r for r, _ in seen) + 2
        assert right == round(to_beat["accuracy"].value * COUNT)
        assert sum(loss for _, loss in seen) / COUNT == pytest.approx(to_beat["loss"].value, rel=1e-8, abs=1e-12)


def test_a_loss_that_is_too_high_already_stops_a_perplexity_race():
    examples = [Example(tiny.sentence(4, i), None) for i in range(4)]
    encoded = encode(make_task("t", examples), tiny.tokenizer(), "causal", context=64, batch_tokens=8)
    first = {0: BlockScores([5.0] * len(encoded.blocks[0].examples))}
    share = sum(encoded.tokens[i] for i in encoded.blocks[0].examples) / sum(encoded.tokens)

    def to_beat(loss):
        return {"loss": Measurement(loss, 0.1, 4, "nats/token")}

    assert cannot_win(encoded, assemble(encoded, first), to_beat(5 * share * 0.99), "accuracy").metric == "loss"
    assert cannot_win(encoded, assemble(encoded, first), to_beat(5 * share * 1.01), "accuracy") is None


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
