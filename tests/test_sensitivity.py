"""Predictions are derivatives of the loss. Oracles: finite differences in float64, and one example at a time."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eckart
import eckart.sensitivity as sensitivity_module
import tiny_models as tiny
from eckart.encoding import right_answers
from eckart.errors import RecipeError
from eckart.laser import make_grid, search
from eckart.matrices import find_matrices, part_of, read, select, write
from eckart.recipe import SearchSettings, make_settings
from eckart.scoring import prepare, rearrange, score
from eckart.sensitivity import predict
from eckart.surgery import make_edit, make_edit_by_rule, replacement, weights_sha256
from eckart.tasks import Example, make_task

TYPES = {
    "llama": ("v_proj", "fc_in"),
    "gpt2": ("k_proj", "fc_out"),
    "gpt_neox": ("q_proj", "fc_in"),
    "phi3": ("fc_up", "v_proj"),
    "mixtral": ("fc_in", "fc_out"),
    "gpt_oss": ("fc_up", "out_proj"),
    "gemma2": ("out_proj",),
    "bert": ("v_proj", "fc_out"),
    "t5": ("k_proj", "fc_in"),
}


def labelled(count=6):
    options = [tuple(tiny.sentence(1 + c % 2, 1000 * c + i) for c in range(3)) for i in range(count)]
    return make_task("t", [Example(tiny.sentence(4 + i % 5, i), i % 3, options[i]) for i in range(count)])


def setting(name, batch_tokens=24):
    model, tokenizer = tiny.build(name).double(), tiny.tokenizer(mask=True)
    if name in ("mixtral", "gpt_oss"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model, tokenizer, prepare(model, tokenizer, labelled(), batch_tokens=batch_tokens)


@pytest.mark.parametrize("name", TYPES)
def test_the_first_order_is_the_slope_of_the_loss_as_components_fade(name):
    model, tokenizer, encoded = setting(name)
    matrices = find_matrices(model)
    grid = [(m, [make_edit(m, 0.25), make_edit(m, 0.75)]) for m in select(matrices, types=TYPES[name], layers=[1])]
    predictions = iter(predict(model, encoded, grid))
    step = 1e-4
    for matrix, edits in grid[:6]:
        original = read(model, matrix)
        u, s, vh = torch.linalg.svd(original, full_matrices=False)
        for edit in edits:
            removed = (u[:, edit.rank :] * s[edit.rank :]) @ vh[edit.rank :]
            losses = []
            for sign in (1, -1):
                write(model, matrix, original - sign * step * removed)
                losses.append(score(model, tokenizer, encoded).loss.mean())
            write(model, matrix, original)
            slope = (losses[0] - losses[1]) / (2 * step)
            # Scores are read in float32, so a difference over a small step has few digits.
            assert next(predictions).change.value == pytest.approx(slope, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_standard_error_and_guard_are_those_of_single_examples(name):
    """With one example a block: the spread of <dL_e/dW, dW> over examples, by plain autograd."""
    model, _, encoded = setting(name, batch_tokens=1)
    assert all(len(block.examples) == 1 for block in encoded.blocks)
    matrix = select(find_matrices(model), types=["v_proj"], layers=[2])[0]
    edit = make_edit(matrix, 0.5)
    (prediction,) = predict(model, encoded, [(matrix, [edit])])
    u, s, vh = torch.linalg.svd(read(model, matrix), full_matrices=False)
    change = -(u[:, edit.rank :] * s[edit.rank :]) @ vh[edit.rank :]
    singles = []
    for index, example in enumerate(encoded.task.examples):
        sequence = encoded.sequences[index][example.answer]
        model.zero_grad()
        logits = model(input_ids=torch.tensor([sequence.row.ids])).logits[0]
        picked = torch.log_softmax(logits, -1)[list(sequence.positions), list(sequence.targets)]
        (-picked.mean()).backward()
        gradient = part_of(model.get_parameter(matrix.parameter).grad, matrix)
        singles.append(float((gradient * change).sum()))
    model.zero_grad()
    count = len(singles)
    assert prediction.change.value == pytest.approx(np.mean(singles), rel=1e-4)
    assert prediction.change.stderr == pytest.approx(np.std(singles, ddof=1) / math.sqrt(count), rel=1e-4)
    square = np.mean(singles) ** 2 + np.var(singles, ddof=1)
    assert prediction.guard == pytest.approx(0.5 * np.mean(encoded.tokens) * square, rel=1e-4)
    assert prediction.total == prediction.change.value + prediction.guard


def test_blocks_do_not_change_the_prediction():
    changes = []
    for batch_tokens in (1, 24, 5000):
        model, _, encoded = setting("llama", batch_tokens)
        grid = make_grid(find_matrices(model), SearchSettings(types=("mlp",), rho=(0.2, 0.8)))
        changes.append([p.change.value for p in predict(model, encoded, grid)])
    np.testing.assert_allclose(changes[0], changes[1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(changes[0], changes[2], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_that_are_wrong_take_no_part_in_the_prediction(name):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(mask=True), labelled(12)
    encoded = prepare(model, tokenizer, task)
    grid = make_grid(find_matrices(model), SearchSettings(types=("v_proj",), rho=(0.1, 0.5)))
    right = rearrange(model, right_answers(encoded, 8))
    assert right.count == sum(len(block.examples) for block in right.blocks) == 8
    assert {len(sequences) for sequences in right.sequences} == {1}
    few = prepare(model, tokenizer, replace(task, examples=task.examples[:8]))
    for found, expected in zip(predict(model, right, grid), predict(model, few, grid), strict=True):
        assert found.change.value == pytest.approx(expected.change.value, abs=1e-6)


def test_one_block_has_no_standard_error():
    model, _, encoded = setting("llama", 5000)
    matrix = find_matrices(model)[0]
    (prediction,) = predict(model, encoded, [(matrix, [make_edit(matrix, 0.5)])])
    assert math.isnan(prediction.change.stderr)
    assert prediction.guard >= 0


def test_keeping_everything_changes_nothing_and_zero_removes_everything():
    model, _, encoded = setting("llama")
    matrix = find_matrices(model)[5]
    whole, nothing = predict(model, encoded, [(matrix, [make_edit(matrix, 1.0), make_edit(matrix, 1.0, kind="zero")])])
    assert whole.change.value == whole.guard == 0
    assert nothing.change.value != 0


def test_the_model_is_as_before():
    model, _, encoded = setting("mixtral")
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = weights_sha256(model)
    with torch.inference_mode():
        predict(model, encoded, make_grid(find_matrices(model), SearchSettings(rho=(0.5,))))
    assert weights_sha256(model) == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_that_a_model_holds_already_are_kept_and_do_not_count():
    model, _, encoded = setting("llama")
    matrix = find_matrices(model)[0]
    grid = [(matrix, [make_edit(matrix, 0.5)])]
    clean = predict(model, encoded, grid)
    held = torch.ones_like(model.get_parameter(matrix.parameter))
    model.get_parameter(matrix.parameter).grad = held
    assert predict(model, encoded, grid) == clean
    assert model.get_parameter(matrix.parameter).grad is held


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "t5"])
def test_a_guided_search_measures_the_best_predicted_edits_and_chooses_among_them(name):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(mask=True), labelled(20)
    options = {"types": ("v_proj", "mlp"), "rho": (0.1, 0.5), "split": 0.5}
    before = weights_sha256(model)
    guided = search(model, tokenizer, task, SearchSettings(strategy="guided", shortlist=5, **options))
    whole = search(model, tokenizer, task, SearchSettings(strategy="exhaustive", **options))
    assert weights_sha256(model) == before
    assert len(guided.trials) == 5
    assert len(guided.predictions) == len(whole.trials) == guided.facts["trials"]["grid"]
    best = sorted(guided.predictions, key=lambda p: p.total)[:5]
    assert {t.edits[0].matrix for t in guided.trials} == {p.edit.matrix for p in best}
    measured = {(t.edits[0].matrix, t.edits[0].rank): t.validation for t in whole.trials}
    for trial in guided.trials:
        if trial.stopped is None:
            found, expected = (
                trial.validation["loss"].value,
                measured[trial.edits[0].matrix, trial.edits[0].rank]["loss"].value,
            )
            assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{"blocks": (1, 2)}, {"blocks": (3,), "clustering": "subspaces", "guard": "none"}])
def test_a_guided_search_of_blocks_measures_the_best_predicted_ones(options):
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), labelled(20)
    settings = SearchSettings(
        strategy="guided", shortlist=4, types=("v_proj", "mlp"), rho=(0.1, 0.5), split=0.5, **options
    )
    found = search(model, tokenizer, task, settings)
    best = sorted(found.predictions, key=lambda p: p.total)[:4]
    assert {p.edit for p in best} == {t.edits[0] for t in found.trials}
    assert {p.edit.blocks for p in found.predictions} == set(settings.blocks)
    assert all((p.guard == 0) == (settings.guard == "none") for p in found.predictions)


def test_a_guided_search_of_the_demo_finds_the_winner_of_the_exhaustive_one():
    folder = Path(eckart.__file__).parent / "demo"
    model, tokenizer = eckart.load(str(folder))
    task = eckart.read_task(folder / "countries.jsonl")
    found = search(model, tokenizer, task, SearchSettings(strategy="guided"))
    assert [(e.matrix, e.rank) for e in found.plan.edits] == [("model.layers.3.mlp.gate_proj", 1)]
    assert found.facts["trials"]["evaluated"] <= 16
    assert found.facts["task"]["validation"] == 100


def gradient_of_mean_loss(model, encoded, matrix):
    """By plain autograd, one example after the other."""
    model.zero_grad()
    for index, example in enumerate(encoded.task.examples):
        sequence = encoded.sequences[index][example.answer]
        logits = model(input_ids=torch.tensor([sequence.row.ids])).logits[0]
        picked = torch.log_softmax(logits, -1)[list(sequence.positions), list(sequence.targets)]
        (-picked.mean() / encoded.count).backward()
    gradient = part_of(model.get_parameter(matrix.parameter).grad, matrix).clone()
    model.zero_grad()
    return gradient


BLOCKED = [
    {},
    {"blocks": 2},
    {"blocks": 5},
    {"clustering": "heads"},
    {"blocks": 3, "clustering": "subspaces"},
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_the_first_order_of_blocks_is_the_product_of_gradient_and_change(name):
    model, _, encoded = setting(name)
    found = select(find_matrices(model), types=["q_proj", "v_proj", "fc_out"], layers=[1])[:4]
    grid = [
        (
            m,
            [
                make_edit(m, rho, **options)
                for options in BLOCKED
                for rho in (0.2, 0.6)
                if m.heads or "heads" not in options.values()
            ],
        )
        for m in found
    ]
    predictions = iter(predict(model, encoded, grid))
    for matrix, edits in grid:
        weight = read(model, matrix)
        gradient = gradient_of_mean_loss(model, encoded, matrix)
        for edit in edits:
            prediction = next(predictions)
            assert prediction.edit == edit
            expected = float((gradient * (replacement(weight, edit) - weight)).sum())
            assert prediction.change.value == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_the_first_order_of_shrinking_is_the_product_of_gradient_and_change():
    model, _, encoded = setting("llama")
    found = select(find_matrices(model), types=["q_proj", "fc_out"], layers=[1])
    grid = []
    for matrix in found:
        weight = read(model, matrix)
        for _ in range(2):  # so that something stands out of the noise
            weight = weight + 0.3 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
        write(model, matrix, weight)
        values = torch.linalg.svdvals(read(model, matrix).double())
        grid.append((matrix, [make_edit_by_rule(matrix, values, rule, kind="shrink") for rule in ("mp", "bema")]))
    predictions = iter(predict(model, encoded, grid))
    for matrix, edits in grid:
        weight, gradient = read(model, matrix), gradient_of_mean_loss(model, encoded, matrix)
        for edit in edits:
            expected = float((gradient * (replacement(weight, edit) - weight)).sum())
            assert next(predictions).change.value == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("options", [{"blocks": 4}, {"blocks": 4, "clustering": "subspaces"}])
def test_the_first_order_of_blocks_is_the_slope_of_the_loss(options):
    model, tokenizer, encoded = setting("llama")
    matrix = next(m for m in find_matrices(model) if m.type == "fc_in" and m.layer == 1)
    edit = make_edit(matrix, 0.4, **options)
    (prediction,) = predict(model, encoded, [(matrix, [edit])])
    original = read(model, matrix)
    step = 1e-4 * (replacement(original, edit) - original)
    losses = []
    for sign in (1, -1):
        write(model, matrix, original + sign * step)
        losses.append(score(model, tokenizer, encoded).loss.mean())
    # Scores are read in float32, so a difference over a small step has few digits.
    assert prediction.change.value == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=2e-2, abs=2e-3)


def test_the_guard_is_left_out_where_it_is_not_wanted():
    model, _, encoded = setting("llama")
    grid = make_grid(find_matrices(model), SearchSettings(types=("mlp",), rho=(0.2, 0.8)))
    with_guard, without = predict(model, encoded, grid), predict(model, encoded, grid, guard="none")
    assert [p.change for p in without] == [p.change for p in with_guard]
    assert all(p.guard > 0 for p in with_guard)
    assert all(p.guard == 0 and p.total == p.change.value for p in without)


@pytest.mark.parametrize("options", [{}, {"blocks": (1, 3)}, {"blocks": (2,), "clustering": "subspaces"}])
def test_decompositions_that_do_not_fit_together_are_held_one_group_after_the_other(monkeypatch, options):
    model, _, encoded = setting("llama")
    grid = make_grid(find_matrices(model), SearchSettings(types=("mlp", "v_proj"), rho=(0.2, 0.8), **options))
    whole = predict(model, encoded, grid)
    held: list[int] = []
    shares = sensitivity_module._shares

    def watched(model, encoded, block, pieces, clusters):
        tensors = [t for parts in clusters for c in parts for t in (c.spectrum.U, c.spectrum.S, c.spectrum.Vh)]
        held.append(sum(t.numel() * t.element_size() for t in tensors))
        return shares(model, encoded, block, pieces, clusters)

    monkeypatch.setattr(sensitivity_module, "_shares", watched)
    limit = 60_000
    parts = predict(model, encoded, grid, spectra_bytes=limit)
    assert len(held) > len(encoded.blocks)
    assert max(held) <= limit
    each_alone = predict(model, encoded, grid, spectra_bytes=0)
    for found in (parts, each_alone):
        assert [p.edit for p in found] == [p.edit for p in whole]
        np.testing.assert_allclose([p.change.value for p in found], [p.change.value for p in whole], rtol=1e-9)
        np.testing.assert_allclose([p.guard for p in found], [p.guard for p in whole], rtol=1e-9)


@pytest.mark.parametrize("options", [{"kind": "magnitude"}, {"basis": "bottom"}, {"svd": "lowrank"}])
def test_a_guided_search_of_what_it_cannot_predict_is_refused(options):
    with pytest.raises(RecipeError, match="guided"):
        make_settings(SearchSettings, {"strategy": "guided", **options})
