"""The search is brute force, faster. Oracle: every edit applied to the whole model, without cache or sharing."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import eckart.laser as laser_module
import tiny_models as tiny
from eckart import truncation
from eckart.driver import Driver
from eckart.errors import MatrixError, ModelError
from eckart.laser import forecast, make_grid, search
from eckart.layout import Block, Pass
from eckart.ledger import Ledger
from eckart.matrices import find_blocks, find_matrices, read, select, write
from eckart.prefix import PrefixCache
from eckart.race import Rules, Trial, choose
from eckart.recipe import SearchSettings
from eckart.results import Measurement, to_json
from eckart.scoring import prepare, score, summarize
from eckart.surgery import applied, make_edit, weights_sha256
from eckart.tasks import Example, make_task, split

SMALL = SearchSettings(strategy="exhaustive", types=("fc_in", "out_proj", "v_proj"), rho=(0.05, 0.5), split=0.5)


def labelled(count=16, choices=3, seed=0):
    examples = []
    for index in range(count):
        options = tuple(tiny.sentence(1 + c % 2, seed + 1000 * c + index) for c in range(choices))
        examples.append(Example(tiny.sentence(4 + index % 6, seed + index), index % choices, options))
    return make_task("task", examples)


def brute_force(model, tokenizer, task, settings):
    """Cut with torch.linalg, write, run everything, put back: no prefix cache, no shared decomposition."""
    validation, _ = split(task, settings.split, seed=settings.seed)
    encoded = prepare(model, tokenizer, validation, **settings.encoding)
    found = {}
    for matrix in select(find_matrices(model), types=settings.types, layers=settings.layers):
        for rho in settings.rho:
            original = read(model, matrix)
            rank = max(1, math.floor(rho * min(matrix.shape) + 1e-9))
            u, s, vh = torch.linalg.svd(original, full_matrices=False)
            write(model, matrix, (u[:, :rank] * s[:rank]) @ vh[:rank])
            found[matrix.name, rank] = score(model, tokenizer, encoded)
            write(model, matrix, original)
    return encoded, found


@pytest.mark.parametrize("name", [*tiny.CAUSAL, *tiny.MASKED, *tiny.ENCODER_DECODER])
def test_every_trial_is_that_of_brute_force(name):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(mask=True), labelled()
    before = weights_sha256(model)
    result = search(model, tokenizer, task, SMALL)
    assert weights_sha256(model) == before
    encoded, expected = brute_force(model, tokenizer, task, SMALL)
    assert len(result.trials) == len(expected)
    for trial in result.trials:
        scores = expected[trial.edits[0].matrix, trial.edits[0].rank]
        want = summarize(encoded, scores)
        assert trial.validation["accuracy"].value == want["accuracy"].value
        assert trial.validation["loss"].value == pytest.approx(want["loss"].value, abs=1e-5)
    marks = {
        key: (-summarize(encoded, s)["accuracy"].value, summarize(encoded, s)["loss"].value, key[1])
        for key, s in expected.items()
    }
    best = min(marks, key=lambda key: marks[key])
    if result.plan.edits:
        assert (result.plan.edits[0].matrix, result.plan.edits[0].rank) == best
    assert not any("do not form a chain" in warning for warning in result.warnings)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_the_architectures_for_which_prompts_are_read_once_are_known(name):
    """Where sharing is not exact it must be off; that it is on is what makes a search fast."""
    task = make_task("long", [Example(tiny.sentence(24, i), 0, (tiny.sentence(2, i + 50), "w9")) for i in range(4)])
    encoded = prepare(tiny.build(name), tiny.tokenizer(), task)
    # Windows of 8 tokens are shorter than these prompts; ALiBi and the older families build masks of their own.
    plain = {"mistral", "gemma2", "gemma3", "falcon_rw", "bloom", "gpt_oss"}
    assert (encoded.layout == "plain") == (name in plain)


def whole_batch(inputs):
    nothing = torch.zeros(0, dtype=torch.long)
    return Block((), (), (Pass(inputs),), nothing, nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "t5"])
def test_a_pass_from_a_kept_block_gives_the_bits_of_the_whole_pass(name):
    model = tiny.build(name)
    model.config.use_cache = False
    batches = [whole_batch(tiny.inputs(name, batch=2, tokens=n, seed=n)) for n in (5, 9)]
    stacks = {path: stack for path, stack, _ in find_blocks(model)}
    cache = PrefixCache(model, list(stacks.items()), batches)
    with torch.inference_mode():
        whole = [model(**batch.inputs).logits for batch in batches]
        for depth in range(len(stacks)):
            assert all(torch.equal(cache.forward(i).logits, whole[i]) for i in range(2)), depth
            cache.advance()
        assert all(torch.equal(cache.forward(i).logits, whole[i]) for i in range(2))


def test_a_kept_block_is_not_run_again():
    model = tiny.build("llama")
    calls = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
        block.mlp.register_forward_hook(lambda *_, index=index: calls.append(("mlp", index)))
    stacks = {path: stack for path, stack, _ in find_blocks(model)}
    cache = PrefixCache(model, list(stacks.items()), [whole_batch(tiny.inputs("llama"))])
    with torch.inference_mode():
        cache.advance()
        cache.advance()
        calls.clear()
        cache.forward(0)
    assert [call for call in calls if isinstance(call, tuple)] == [("mlp", 2)]
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_a_model_whose_blocks_are_no_chain_is_searched_with_whole_passes():
    model = tiny.build("llama")
    kept = {}
    first, last = model.model.layers[0], model.model.layers[2]
    # The state lives outside the hidden states, where the prefix cache cannot see it.
    first.mlp.register_forward_hook(lambda _m, _i, output: kept.update(value=output))
    last.register_forward_hook(
        lambda _m, _i, output: output + (kept["value"] if kept["value"].shape == output.shape else 0)
    )
    tokenizer, task = tiny.tokenizer(), labelled()
    small_batches = SMALL.model_copy(update={"batch_tokens": 32})
    result = search(model, tokenizer, task, small_batches)
    assert any("do not form a chain" in warning for warning in result.warnings)
    encoded, expected = brute_force(model, tokenizer, task, small_batches)
    for trial in result.trials:
        want = summarize(encoded, expected[trial.edits[0].matrix, trial.edits[0].rank])
        assert trial.validation["loss"].value == pytest.approx(want["loss"].value, abs=1e-5)


def test_each_matrix_is_decomposed_once(monkeypatch):
    count = []
    decompose = truncation.decompose
    monkeypatch.setattr(truncation, "decompose", lambda w: count.append(1) or decompose(w))
    settings = SearchSettings(strategy="exhaustive", types=("mlp",), rho=(0.1, 0.3, 0.5, 0.9), split=0.5)
    search(tiny.build("llama"), tiny.tokenizer(), labelled(), settings)
    # Nine matrices; the winner's is decomposed once more, for its cut and the control's on the test examples.
    assert len(count) == 9 + 1


def test_test_examples_are_measured_three_times_however_many_edits_are_tried(monkeypatch):
    scored = []
    score_all = Driver.score
    monkeypatch.setattr(
        Driver,
        "score",
        lambda self, part, candidates, *rest: (
            scored.extend([part] * len(candidates)) or score_all(self, part, candidates, *rest)
        ),
    )
    for rho in ((0.5,), (0.05, 0.1, 0.3, 0.5, 0.7)):
        scored.clear()
        settings = SearchSettings(rho=rho, split=0.5)
        result = search(tiny.build("llama"), tiny.tokenizer(), labelled(40), settings)
        assert result.plan.edits
        assert scored.count("test") == 3


def test_examples_that_choose_take_no_part_in_proving():
    task = labelled(50)
    for seed in range(5):
        validation, test = split(task, 0.2, seed=seed)
        assert len(validation.examples) == 10
        assert not set(validation.examples) & set(test.examples)
        assert set(validation.examples) | set(test.examples) == set(task.examples)
    assert split(task, 0.2, shuffle=False)[0].examples == task.examples[:10]
    assert len(split(task, 0.2, examples=3)[1].examples) == 47


def test_a_second_search_gives_the_same_digits_and_another_seed_another_split():
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled(30)

    def digits(seed):
        results = search(model, tokenizer, task, SearchSettings(types=("mlp",), rho=(0.1,), seed=seed)).to_results()
        return to_json({key: value for key, value in results.items() if key != "seconds"})

    assert digits(0) == digits(0)
    assert digits(0) != digits(1)


def trial(accuracy, loss, rank, name="m"):
    matrix = find_matrices(tiny.build("llama"))[0]
    edit = make_edit(matrix, 0.5).model_copy(update={"rank": rank, "matrix": name})
    return Trial((edit,), measured(accuracy, loss))


def measured(accuracy, loss):
    found = {"loss": Measurement(loss, 0.1, 10, "nats/token")}
    return found | ({} if accuracy is None else {"accuracy": Measurement(accuracy, 0.1, 10, "fraction")})


def test_ties_go_to_the_lower_loss_then_to_the_smaller_rank():
    base = measured(0.5, 1.0)
    assert choose([trial(0.6, 0.9, 5), trial(0.7, 2.0, 5)], base, Rules("accuracy")).validation["accuracy"].value == 0.7
    assert choose([trial(0.7, 0.9, 5), trial(0.7, 0.8, 9)], base, Rules("accuracy")).edits[0].rank == 9
    assert choose([trial(0.7, 0.8, 9), trial(0.7, 0.8, 5)], base, Rules("accuracy")).edits[0].rank == 5
    assert (
        choose([trial(0.7, 0.8, 5, "first"), trial(0.7, 0.8, 5, "second")], base, Rules("accuracy")).edits[0].matrix
        == "first"
    )


def test_the_unedited_model_is_a_candidate():
    base = measured(0.5, 1.0)
    assert choose([], base, Rules("accuracy")) is None
    assert choose([trial(0.5, 1.0, 5), trial(0.4, 0.1, 5)], base, Rules("accuracy")) is None
    assert choose([trial(0.5, 0.99, 5)], base, Rules("accuracy")) is not None
    assert choose([trial(None, math.nan, 5)], measured(None, 1.0), Rules("accuracy")) is None


def test_without_a_better_edit_the_plan_is_empty(monkeypatch):
    monkeypatch.setattr(laser_module, "choose", lambda trials, baseline, rules: None)
    result = search(tiny.build("llama"), tiny.tokenizer(), labelled(), SMALL)
    assert result.plan.edits == ()
    assert result.gain is None
    assert result.best == result.baseline


def test_a_text_task_is_searched_by_loss():
    task = make_task("text", [Example(tiny.sentence(20 + i, i), None) for i in range(8)])
    result = search(tiny.build("llama"), tiny.tokenizer(), task, SMALL)
    best = min(result.trials, key=lambda t: t.validation["loss"].value)
    assert result.plan.edits == best.edits
    assert result.gain is None
    assert "perplexity" in result.best["test"]
    assert result.loss_gain.interval[0] <= result.loss_gain.value <= result.loss_gain.interval[1]


def test_longer_open_answers_are_searched_by_generation():
    examples = [Example(tiny.sentence(5, i), tiny.sentence(2, 50 + i)) for i in range(6)]
    settings = SearchSettings(types=("fc_in",), rho=(0.1,), split=0.5)
    result = search(tiny.build("llama"), tiny.tokenizer(), make_task("open", examples), settings)
    assert len(result.trials) == 3


def test_equal_ranks_are_tried_once():
    matrices = find_matrices(tiny.build("llama"))
    (_, edits), *_ = make_grid(matrices, SearchSettings(types=("q_proj",), rho=(0.01, 0.02, 0.03, 0.5)))
    assert [edit.rank for edit in edits] == [1, 16]
    (_, edits), *_ = make_grid(matrices, SearchSettings(types=("q_proj",), kind="zero"))
    assert [(edit.kind, edit.rank) for edit in edits] == [("zero", 0)]
    (_, edits), *_ = make_grid(matrices, SearchSettings(types=("q_proj",), kind="magnitude", rho=(0.01, 0.02)))
    assert [edit.rho for edit in edits] == [0.01, 0.02]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "bert", "t5"])
@pytest.mark.parametrize("options", [{"blocks": (1, 3)}, {"clustering": "heads"}])
def test_every_trial_with_blocks_is_that_of_brute_force(name, options):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(mask=True), labelled()
    types = ("q_proj", "v_proj") if options.get("clustering") else ("v_proj", "fc_in")
    settings = SearchSettings(strategy="exhaustive", types=types, rho=(0.1, 0.5), split=0.5, **options)
    before = weights_sha256(model)
    result = search(model, tokenizer, task, settings)
    assert weights_sha256(model) == before
    validation, _ = split(task, settings.split, seed=settings.seed)
    encoded = prepare(model, tokenizer, validation, **settings.encoding)
    expected = {}
    for matrix in select(find_matrices(model), types=types):
        for blocks in settings.blocks if types[1] == "fc_in" else (matrix.heads,):
            original = read(model, matrix)
            for rho in settings.rho:
                rank = max(1, math.floor(rho * min(math.ceil(matrix.shape[0] / blocks), matrix.shape[1]) + 1e-9))
                parts = []
                for part in original.tensor_split(blocks):
                    u, s, vh = torch.linalg.svd(part, full_matrices=False)
                    parts.append((u[:, :rank] * s[:rank]) @ vh[:rank])
                write(model, matrix, torch.cat(parts))
                expected[matrix.name, blocks, rank] = summarize(encoded, score(model, tokenizer, encoded))
                write(model, matrix, original)
    assert {(t.edits[0].matrix, t.edits[0].blocks, t.edits[0].rank) for t in result.trials} == set(expected)
    for trial in result.trials:
        want = expected[trial.edits[0].matrix, trial.edits[0].blocks, trial.edits[0].rank]
        assert trial.validation["accuracy"].value == want["accuracy"].value
        assert trial.validation["loss"].value == pytest.approx(want["loss"].value, abs=1e-5)


def test_a_search_of_subspaces_measures_what_its_plan_puts_into_the_model():
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled(40)
    settings = SearchSettings(
        strategy="exhaustive", types=("mlp",), rho=(0.05, 0.3), blocks=(2, 4), clustering="subspaces", split=0.5
    )
    before = weights_sha256(model)
    result = search(model, tokenizer, task, settings)
    assert weights_sha256(model) == before
    assert len(result.trials) == 9 * 4
    validation, _ = split(task, settings.split, seed=settings.seed)
    encoded = prepare(model, tokenizer, validation, **settings.encoding)
    for trial in result.trials[::5]:
        with applied(model, [trial.edits[0]]):
            want = summarize(encoded, score(model, tokenizer, encoded))
        assert trial.validation["loss"].value == pytest.approx(want["loss"].value, abs=1e-5)
    (edit,) = result.plan.edits
    assert (edit.clustering, result.spectrum, "random_basis" in result.controls) == ("subspaces", None, False)
    assert result.cost.integers == edit.shape[0]
    assert result.to_results()["best"]["cost"] == result.cost


def test_edits_that_are_equal_are_tried_once_whatever_their_blocks():
    matrices = find_matrices(tiny.build("llama"))

    def edits_of(kind, **options):
        (_, edits), *_ = make_grid(matrices, SearchSettings(types=(kind,), **options))
        return [(edit.blocks, edit.rank) for edit in edits]

    assert edits_of("q_proj", rho=(0.01, 0.02, 0.5), blocks=(4, 1, 4)) == [(1, 1), (1, 16), (4, 1), (4, 4)]
    # Blocks of one row keep everything, as rank 32 of the whole does.
    assert edits_of("q_proj", rho=(0.5, 1.0), blocks=(1, 2, 32)) == [(1, 16), (1, 32), (2, 8)]
    assert edits_of("v_proj", rho=(0.5,), clustering="heads") == [(2, 4)]


def test_heads_of_matrices_without_them_are_refused_before_any_work():
    with pytest.raises(MatrixError, match=r"o_proj.*lie in its columns"):
        search(tiny.build("llama"), tiny.tokenizer(), labelled(), SearchSettings(clustering="heads"))


@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(types=("qkv_proj",), rho=(0.2,), split=0.5),
        SearchSettings(types=("qkv_proj",), rho=(0.2,), blocks=(2,), clustering="subspaces", split=0.5),
        SearchSettings(types=("q_proj",), kind="zero", split=0.5),
        SearchSettings(types=("mlp",), kind="magnitude", rho=(0.5,), split=0.5),
        SearchSettings(types=("mlp",), basis="bottom", rho=(0.5,), split=0.5),
        SearchSettings(types=("mlp",), svd="lowrank", rho=(0.2,), split=0.5),
        SearchSettings(types=("mlp",), rank_rule=("mp", "energy"), split=0.5),
        SearchSettings(types=("mlp",), kind="shrink", rank_rule=("mp",), split=0.5),
        SearchSettings(types=("mlp",), strategy="laserrmt", rank_rule=("energy",), split=0.5),
    ],
)
def test_every_kind_of_edit_can_be_searched_and_leaves_the_model_as_it_was(settings):
    model = tiny.build("gpt2")
    before = weights_sha256(model)
    result = search(model, tiny.tokenizer(), labelled(), settings)
    assert result.trials
    assert weights_sha256(model) == before


def test_an_interrupted_search_goes_on_where_it_was_and_ends_the_same(tmp_path):
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled(24)

    def run(path, stop_after=None):
        books = []

        def ledger(fingerprint):
            books.append(Ledger(path, fingerprint))
            return books[0]

        def progress(now):
            if stop_after is not None and now.done >= stop_after:
                raise KeyboardInterrupt

        try:
            return search(model, tokenizer, task, SMALL, ledger=ledger, progress=progress)
        finally:
            books[0].close()

    whole = run(tmp_path / "whole.sqlite")
    before = weights_sha256(model)
    for stop in (1, 7, 12):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts.sqlite", stop)
        assert weights_sha256(model) == before
    resumed = run(tmp_path / "parts.sqlite")
    assert resumed.trials == whole.trials
    assert resumed.plan == whole.plan
    assert resumed.best == whole.best
    assert resumed.facts["trials"]["examples"] < whole.facts["trials"]["examples"]
    again = run(tmp_path / "parts.sqlite")
    assert again.facts["trials"]["examples"] == 0


def test_results_hold_no_bare_float():
    results = json.loads(to_json(search(tiny.build("llama"), tiny.tokenizer(), labelled(30), SMALL).to_results()))

    def walk(value, path):
        if isinstance(value, dict):
            if "value" in value:
                assert {"value", "stderr", "count", "unit"} <= value.keys(), path
                return
            for key, item in value.items():
                walk(item, f"{path}.{key}")
        elif isinstance(value, list):
            for item in value:
                walk(item, path)
        elif isinstance(value, float):
            allowed = (".seconds", ".spectrum", ".recipe", ".edit.rho", ".edits.rho", ".coverage")
            assert any(word in path for word in allowed), path

    walk(results, "")


def test_modules_are_in_training_or_evaluation_afterwards_as_each_was_before():
    model = tiny.build("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    search(model, tiny.tokenizer(), labelled(), SMALL)
    assert [module.training for module in model.modules()] == before


def test_a_forecast_searches_nothing():
    model = tiny.build("llama")
    found = forecast(model, tiny.tokenizer(), labelled(), SMALL)
    assert found["edits"] == 18
    assert found["matrices"] == 9
    assert found["validation_examples"] == 8
    assert found["seconds"] >= 0


def test_a_forecast_divides_by_the_workers_what_they_share_and_no_more_than_there_are_threads(monkeypatch):
    model, threads = tiny.build("llama"), torch.get_num_threads()

    def seconds(workers, **options):
        clock = iter([0.0, 10.0, 0.0, 0.0])  # a pass takes ten seconds, a decomposition none
        monkeypatch.setattr(laser_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        settings = SMALL.model_copy(update=options)
        return forecast(model, tiny.tokenizer(), labelled(), settings, workers=workers)["seconds"]

    try:
        torch.set_num_threads(2)
        assert seconds(2, strategy="exhaustive") == pytest.approx(seconds(1, strategy="exhaustive") / 2, abs=0.1)
        predicting = 30
        race = seconds(2, strategy="race")
        assert race - predicting == pytest.approx((seconds(1, strategy="race") - predicting) / 2, abs=0.1)
        assert seconds(8, strategy="race") == race
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_search_refuses_bad_weights_and_missing_types_before_any_work():
    model = tiny.build("gpt2")
    with pytest.raises(MatrixError, match="fc_up"):
        search(model, tiny.tokenizer(), labelled(), SearchSettings(types=("fc_up",)))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="c_fc"):
        search(model, tiny.tokenizer(), labelled(), SMALL)
