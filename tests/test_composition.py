"""Several edits together. Oracle: every set of the pool applied to the whole model, by brute force."""

import itertools

import pytest
import torch

import tiny_models as tiny
from eckart.laser import search
from eckart.matrices import find_matrices, overlap, read
from eckart.race import Rules, merit, ranked
from eckart.recipe import SearchSettings
from eckart.scoring import prepare, score, summarize
from eckart.surgery import applied, make_edit_by_rule, weights_sha256
from eckart.sweep import key_of, route_of
from eckart.tasks import Example, make_task, split

RULES = Rules("accuracy")
SETTINGS = SearchSettings(
    strategy="exhaustive", compose=2, shortlist=5, rho=(0.05, 0.4), types=("mlp",), split=0.5, batch_tokens=64
)


def labelled(count=24):
    return make_task(
        "task",
        [
            Example(tiny.sentence(4 + i % 6, i), i % 3, tuple(tiny.sentence(1 + c % 2, 1000 * c + i) for c in range(3)))
            for i in range(count)
        ],
    )


def measure(model, tokenizer, task, settings, edits):
    validation, _ = split(task, settings.split, seed=settings.seed)
    encoded = prepare(model, tokenizer, validation, **settings.encoding)
    with applied(model, edits):
        return summarize(encoded, score(model, tokenizer, encoded))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5"])
def test_every_pair_is_that_of_brute_force_and_the_model_is_as_before(name):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(), labelled()
    before = weights_sha256(model)
    found = search(model, tokenizer, task, SETTINGS)
    assert weights_sha256(model) == before
    assert found.compositions
    for trial in found.compositions:
        assert len(trial.edits) == 2
        if trial.stopped is None:
            want = measure(model, tokenizer, task, SETTINGS, trial.edits)
            assert trial.validation["accuracy"].value == want["accuracy"].value
            assert trial.validation["loss"].value == pytest.approx(want["loss"].value, abs=1e-5)


def test_greedy_finds_the_best_pair_with_the_best_single_edit():
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled()
    found = search(model, tokenizer, task, SETTINGS)
    pool = ranked(found.trials, RULES)[:5]
    matrices = {matrix.name: matrix for matrix in find_matrices(model)}
    best = pool[0]
    pairs = {}
    for other in pool[1:]:
        if not overlap(matrices[best.edits[0].matrix], matrices[other.edits[0].matrix]):
            edits = (best.edits[0], other.edits[0])
            pairs[other.edits[0]] = merit(edits, measure(model, tokenizer, task, SETTINGS, edits), RULES)
    partner, value = min(pairs.items(), key=lambda item: item[1])
    if value < merit(best.edits, best.validation, RULES):
        assert set(found.plan.edits) == {best.edits[0], partner}
    else:
        assert found.plan.edits == best.edits


@pytest.mark.parametrize("rule", ["laserrmt", "energy"])
def test_the_noisiest_edits_are_tried_one_after_the_other_and_stay_if_the_loss_falls(rule):
    """Oracle: LaserRMT's loop written out, with torch.linalg and whole passes."""
    model, tokenizer, task = tiny.build("llama", seed=1), tiny.tokenizer(), labelled()
    settings = SearchSettings(
        strategy="laserrmt", rank_rule=(rule,), select="loss", shortlist=6, split=0.5, batch_tokens=64
    )
    pool = []
    for matrix in find_matrices(model):
        values = torch.linalg.svdvals(read(model, matrix).double())
        edit = make_edit_by_rule(matrix, values, rule)
        if edit.rank < matrix.rank:
            pool.append((float(values[: edit.rank].sum() / values[edit.rank :].sum()), edit))
    kept, tried = [], []
    best = measure(model, tokenizer, task, settings, [])["loss"].value
    for _, edit in sorted(pool, key=lambda pair: pair[0])[:6]:
        tried.append({*kept, edit})
        loss = measure(model, tokenizer, task, settings, [*kept, edit])["loss"].value
        if loss < best:
            kept, best = [*kept, edit], loss
    before = weights_sha256(model)
    found = search(model, tokenizer, task, settings)
    assert set(found.plan.edits) == set(kept)
    assert len(kept) > 1, "or the test says nothing"
    ours = [set(trial.edits) for trial in (*found.trials, *found.compositions)]
    assert sorted(map(len, ours)) == sorted(map(len, tried))
    assert all(edits in tried for edits in ours)
    assert found.best["validation"]["loss"].value == pytest.approx(best, abs=1e-6)
    assert weights_sha256(model) == before


def test_an_edit_stays_only_if_validation_improves():
    for seed in range(3):
        settings = SETTINGS.model_copy(update={"compose": 4, "seed": seed})
        found = search(tiny.build("llama", seed=seed), tiny.tokenizer(), labelled(), settings)
        if not found.plan.edits:
            continue
        trials = {frozenset(trial.edits): trial for trial in (*found.trials, *found.compositions)}
        winner = trials[frozenset(found.plan.edits)]
        while len(winner.edits) > 1:
            parents = [
                trials[frozenset(smaller)]
                for smaller in itertools.combinations(winner.edits, len(winner.edits) - 1)
                if frozenset(smaller) in trials and trials[frozenset(smaller)].stopped is None
            ]
            better = [
                parent
                for parent in parents
                if merit(winner.edits, winner.validation, RULES) < merit(parent.edits, parent.validation, RULES)
            ]
            assert better
            winner = better[0]


def test_edits_are_in_the_order_in_which_the_model_runs_them_and_no_matrix_twice():
    model = tiny.build("gpt2")
    found = search(model, tiny.tokenizer(), labelled(), SETTINGS.model_copy(update={"compose": 3, "beam": 3}))
    route = route_of(model)
    matrices = {matrix.name: matrix for matrix in find_matrices(model)}
    keys = [key_of(trial.edits) for trial in found.compositions]
    assert len(keys) == len(set(keys))
    for trial in found.compositions:
        names = [edit.matrix for edit in trial.edits]
        assert len(set(names)) == len(names)
        places = [route.place(matrices[name]) for name in names]
        assert places == sorted(places)


def test_a_beam_is_no_worse_than_greed_and_contains_its_sets():
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled()
    greedy, beam = (
        search(model, tokenizer, task, SETTINGS.model_copy(update={"compose": 3, "beam": width})) for width in (1, 4)
    )

    def sets(found, size):
        return {frozenset(trial.edits) for trial in found.compositions if len(trial.edits) == size}

    assert sets(greedy, 2) <= sets(beam, 2)

    def value(found):
        return merit(found.plan.edits, found.best["validation"], RULES)

    assert value(beam) <= value(greedy)


def test_raced_compositions_have_the_same_winner():
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled(40)
    whole = search(model, tokenizer, task, SETTINGS)
    raced = search(model, tokenizer, task, SETTINGS.model_copy(update={"strategy": "race"}))
    best = ranked(raced.trials, RULES)[0]
    assert best.edits == ranked(whole.trials, RULES)[0].edits
    assert len(raced.plan.edits) >= 1
