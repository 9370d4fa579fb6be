"""Dimensions of heads: against Eckart and Young, least squares and all subsets, in every layout, within the budget."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.calibration import read_windows
from eckart.checkpoint import load_model, save
from eckart.compression import compress, forecast
from eckart.compression_steps import Steps
from eckart.dataflow import evaluating
from eckart.factoring import factor_
from eckart.heads import columns_of, turned, turning
from eckart.linear import SelectedLinear
from eckart.matrices import find_matrices, read, write
from eckart.neurons import Cut, factors, order_of_removal, places, prepare, stay, width_of
from eckart.recipe import CompressSettings
from eckart.spill import Spill
from eckart.tasks import Example, make_task
from eckart.truncation import dense
from eckart.units import _by_head, find_units

FOUND = {"llama": 2, "phi3": 2, "gptj": 4, "falcon": 1, "falcon_grouped": 2, "gemma2": 2, "mixtral": 2, "t5": 4}
"""Layouts whose values have no bias -> key-value heads."""
layouts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**16))
"""Key-value heads, query heads for each, dimensions of a head, seed."""


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def text(words=300):
    return make_task("text", [Example(tiny.sentence(words, 0), None)])


def settings(**given):
    return CompressSettings.model_validate({"ratio": 0.5, "windows": 6, "measured": 2, "window": 16, **given})


def pairs(model, **given):
    units, _ = find_units(model, find_matrices(model), settings(**given))
    return [unit.matrices for unit in units if unit.joint == "dimensions"]


def apart(layout, out=6):
    """An output weight, and a moment in which heads have nothing to do with each other and queries of a group agree."""
    heads, served, size, seed = layout
    draw = draws(seed)
    each = [(x := draw(9, size)).T @ x / 9 for _ in range(heads)]
    return draw(out, heads * served * size), torch.block_diag(*[c for c in each for _ in range(served)])


@given(layout=layouts)
def test_values_and_outputs_in_another_basis_are_the_same_map(layout):
    """Against a loop over heads; each token attends to itself."""
    heads, served, size, seed = layout
    draw = draws(seed)
    value, output, x = draw(heads * size, 5), draw(7, heads * served * size), draw(5)
    rotations = torch.linalg.qr(draw(heads, size, size)).Q

    def run(value, output):
        v = value @ x
        queries = [v[head * size : (head + 1) * size] for head in range(heads) for _ in range(served)]
        return output @ torch.cat(queries)

    there = turned(value, rotations, 0), turned(output, rotations, 1)
    torch.testing.assert_close(run(*there), run(value, output))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        torch.testing.assert_close(there[0][part], rotations[head] @ value[part])


@given(layout=layouts)
def test_every_column_of_the_output_weight_belongs_to_one_dimension_and_reads_it(layout):
    heads, served, size, _ = layout
    columns = columns_of(torch.arange(heads * size), torch.zeros(heads, size, size), heads * served * size)
    assert sorted(columns.flatten().tolist()) == list(range(heads * served * size))
    repeated = torch.arange(heads * size).view(heads, 1, size).expand(heads, served, size).flatten()
    assert all(repeated[column] == row for row, each in enumerate(columns) for column in each)


@given(layout=layouts)
def test_the_first_dimensions_of_a_turned_head_lose_what_the_best_low_rank_does(layout):
    """Eckart and Young give the least loss of any r dimensions, and least squares what the first r lose."""
    _, served, size, seed = layout
    weight, moment = apart((1, served, size, seed))
    (rotation,) = turning(weight, moment, 1, size)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    root = torch.linalg.cholesky(moment[:size, :size] + 1e-12 * torch.eye(size, dtype=torch.float64))
    stacked = torch.cat(weight.split(size, 1))
    squares = torch.linalg.svdvals(stacked @ root).square()
    for kept in range(1, size + 1):
        read = (rotation @ root)[:kept].T
        best = torch.linalg.lstsq(read, (stacked @ root).T, driver="gelsd").solution
        lost = ((stacked @ root).T - read @ best).square().sum()
        torch.testing.assert_close(lost, squares[kept:].sum(), rtol=1e-5, atol=1e-6)


def test_a_head_that_gives_nothing_or_one_direction_is_turned_all_the_same():
    draw = draws(0)
    line = torch.ones(4, 4, dtype=torch.float64)
    moment = torch.block_diag(torch.zeros(4, 4, dtype=torch.float64), line)
    rotations = turning(draw(3, 8), moment, 2, 4)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    there = turned(moment, rotations, 0, 1)[4:, 4:]
    # The first dimension tells all the others.
    torch.testing.assert_close(there - there[:, :1] @ there[:1] / there[0, 0], torch.zeros_like(there))


def loss_of(weight, moment, kept):
    """What the best weight that reads some columns loses, by least squares."""
    values, vectors = torch.linalg.eigh(moment)
    inputs = (vectors * values.clamp(min=0).sqrt()).T
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T, driver="gelsd").solution
    return float((inputs @ weight.T - inputs[:, kept] @ best).square().sum())


@given(layout=layouts)
def test_the_dimensions_that_stay_are_the_best_subset_where_heads_do_not_depend_on_each_other(layout):
    """Against all subsets of all heads."""
    heads, served, size, seed = layout
    size = min(size, 3)
    weight, moment = apart((heads, served, size, seed))
    turn = turning(weight, moment, heads, size)
    weight, moment = turned(weight, turn, 1), turned(moment, turn, 0, 1)
    columns = columns_of(torch.arange(heads * size), turn, len(moment))
    order = order_of_removal(weight, moment, columns=columns)
    for width in range(1, heads * size):
        found = loss_of(weight, moment, columns[stay(order, width)].flatten())
        every = [columns[list(kept)].flatten() for kept in itertools.combinations(range(heads * size), width)]
        assert found == pytest.approx(min(loss_of(weight, moment, kept) for kept in every), rel=1e-4, abs=1e-6)


@given(layout=layouts)
def test_the_first_dimension_removed_is_the_one_whose_loss_hurts_least_in_any_moment(layout):
    heads, served, size, seed = layout
    draw = draws(seed)
    count = heads * served * size
    weight, x = draw(4, count), draw(40, count) @ draw(count, count)
    moment = x.T @ x / 40
    columns = columns_of(torch.arange(heads * size), torch.zeros(heads, size, size), count)
    alone = []
    for gone in range(heads * size):
        kept = torch.tensor([c for c in range(count) if c not in columns[gone].tolist()], dtype=torch.int64)
        alone.append(loss_of(weight, moment, kept) if len(kept) else float((weight @ moment * weight).sum()))
    order = order_of_removal(weight, moment, columns=columns)
    assert alone[int(order[0])] == pytest.approx(min(alone), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("metric", ["identity", "full"])
def test_losses_at_every_width_and_rank_are_those_of_the_cut_weights(metric):
    """The tails of `prepare`, against the weights of `factors` themselves, in the basis in which they are."""
    draw = draws(0)
    heads, size, count = 2, 5, 20
    weights = [draw(heads * size, 7), draw(6, count)]
    gradients = [None if metric == "identity" else (m := draw(40, len(w))).T @ m / 40 for w in weights]
    x, h = draw(40, 7), draw(40, count)
    prepared = prepare(weights, gradients, x.T @ x / 40, h.T @ h / 40, heads=heads)
    for place, share in ((0, 1.0), (4, 0.6), (8, 0.2)):
        width = width_of(share, heads * size)
        turn = prepared["turn"] if width < heads * size else None
        rows, columns = places(prepared, width)
        assert len(columns) == 2 * width
        for rank in (1, 2):
            cut = Cut(width, (rank, rank), (0.0, 0.0))
            for number, (up, down) in enumerate(factors(prepared, weights, cut)):
                weight, read = turned(weights[number], turn, number), h if number else x
                zeros = torch.zeros_like(weight)
                if number:
                    zeros[:, columns] = up @ down
                    read, off = turned(h, turn, 1), weight - zeros
                else:
                    zeros[rows] = weight[rows] - up @ down
                    off = zeros
                root = torch.eye(len(weight), dtype=torch.float64)
                if metric == "full":
                    here = gradients[number] if number else turned(gradients[0], turn, 0, 1)
                    root = torch.linalg.cholesky(here)
                expected = prepared[f"squares.{place}.{number}"][rank:].sum() + number * prepared["lost"][place]
                error = (root.T @ off @ read.T).square().sum() / 40
                torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_values_and_outputs_are_found_in_every_layout_and_turning_them_changes_nothing(name):
    model = tiny.build(name)
    found = pairs(model)
    biased = name in ("gpt2", "gpt_neox", "falcon_rw", "bert", "roberta", "vit", "decision_transformer", "bloom", "opt")
    biased |= name == "gpt_oss"
    assert len(found) == (0 if biased else 9 if name.startswith("t5") else 3)
    if name in FOUND:
        assert {value.heads for value, _ in found} == {FOUND[name]}
    inputs = tiny.inputs(name)
    before = tiny.output(name, model, **inputs)
    for value, output in found:
        size = value.shape[0] // value.heads
        rotation = torch.linalg.qr(torch.randn(value.heads, size, size)).Q
        old = read(model, value)
        write(model, value, turned(old, rotation, 0))
        write(model, output, turned(read(model, output), rotation, 1))
        assert (read(model, value) - old).abs().max() > 0.1 or size == 1
    torch.testing.assert_close(tiny.output(name, model, **inputs), before, rtol=1e-3, atol=1e-4)


class Normed(torch.nn.Linear):
    def forward(self, x):
        y = super().forward(x).unflatten(-1, (-1, 8))
        return (y / y.square().mean(-1, keepdim=True).add(1e-6).sqrt()).flatten(-2)


class Gated(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x * x.sigmoid())


class Mixed(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.roll(1, -1))


@pytest.mark.parametrize(("kind", "where"), [(Normed, "v_proj"), (Gated, "o_proj"), (Mixed, "o_proj")])
def test_values_that_are_normed_gated_or_mixed_on_their_way_stay_single(kind, where):
    model = tiny.build("llama")
    attention = model.model.layers[1].self_attn
    value, output = pairs(model)[1]
    assert _by_head(model, value, output)
    getattr(attention, where).__class__ = kind
    assert not _by_head(model, value, output)
    assert [value.layer for value, _ in pairs(model)] == [0, 2]


def test_values_that_something_else_reads_stay_single():
    """As where later layers read the values of the first."""
    model = tiny.build("llama")
    seen = []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _m, _x, y: seen.append(y))
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _x, y: y + seen.pop().sum(-1, keepdim=True))
    assert [value.layer for value, _ in pairs(model)] == [1, 2]


@pytest.mark.parametrize(
    "changed",
    [{"neurons": False}, {"method": "svd"}, {"allocate": "mp"}, {"types": ("v_proj",)}, {"elastic": True}],
    ids=str,
)
def test_dimensions_stay_where_they_are_not_asked_for(changed):
    assert pairs(tiny.build("llama"), **changed) == []


def thin(model, rank=3):
    """Let every head give values of a few dimensions, in a basis that no row shows."""
    for value, _ in pairs(model):
        weight, size = read(model, value), value.shape[0] // value.heads
        for head in range(value.heads):
            part = slice(head * size, (head + 1) * size)
            U, S, Vh = torch.linalg.svd(weight[part], full_matrices=False)
            weight[part] = U[:, :rank] * S[:rank] @ Vh[:rank]
        write(model, value, weight)
    return model


@pytest.mark.parametrize("name", ["llama", "phi3", "gptj", "falcon_grouped"])
@pytest.mark.parametrize("method", ["whiten", "double", "propagated"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_a_compressed_model_loses_the_dimensions_that_heads_do_not_use(name, method, storage, tmp_path):
    model = thin(tiny.build(name))
    types = ("v_proj", "out_proj")
    given = settings(method=method, storage=storage, allocate="tail", floor=0.0, types=types, input_shrinkage=0.0)
    before = copy.deepcopy(model.state_dict())
    found = compress(model, tiny.tokenizer(), text(), given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    rows = found.facts["matrices"]
    heads = pairs(model)[0][0].heads
    assert {row["neurons"] for row in rows} == {None}
    assert any(row["dimensions"] is not None and row["dimensions"] >= 3 * heads for row in rows)
    small = copy.deepcopy(model)
    made = factor_(small, found.plan, factors=found.factors, storage=storage)
    whole = sum(row["dense"] for row in rows)
    kept = whole - (made.before.parameters - made.after.parameters)
    assert kept == pytest.approx(found.facts["budget"]["spent"]) == sum(row["cost"] for row in rows)
    assert kept <= 0.5 * whole
    assert any(isinstance(module, SelectedLinear) for module in small.modules())
    logits = [tiny.output(name, m, **tiny.inputs(name)) for m in (model, small)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05)
    save(small, tmp_path / "out", tiny.tokenizer())
    assert torch.equal(tiny.output(name, load_model(str(tmp_path / "out")), **tiny.inputs(name)), logits[1])


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon"])
def test_a_budget_in_bytes_counts_what_the_indices_take(name):
    model = thin(tiny.build(name))
    whole = sum(p.nbytes for p in model.parameters())
    allowed = int(whole - 0.3 * sum(m.shape[0] * m.shape[1] * 4 for pair in pairs(model) for m in pair))
    given = settings(ratio=None, bytes=allowed, types=("v_proj", "out_proj"), allocate="tail")
    found = compress(model, tiny.tokenizer(), text(), given)
    assert any(row["dimensions"] for row in found.facts["matrices"])
    made = factor_(model, found.plan, factors=found.factors, storage="pivoted")
    assert made.after.bytes <= allowed


def test_a_forecast_has_one_row_for_values_and_outputs():
    found = forecast(tiny.build("llama"), tiny.tokenizer(), text(), settings(allocate="uniform"))
    rows = {row["matrix"]: row for row in found["matrices"] if row["matrix"].endswith("(heads)")}
    assert sorted(rows) == [f"model.layers.{layer}.self_attn.v_proj (heads)" for layer in range(3)]
    assert all(1 <= row["rank"] <= row["of"] == 16 and len(row["ranks"]) == 2 for row in rows.values())


@pytest.mark.parametrize("propagation", [0.0, 1.0])
def test_the_propagated_output_weight_is_least_squares_for_the_values_it_gets(propagation):
    """Five dimensions in the place of sixteen, nothing else cut: which output weight gives most of what was."""
    model = tiny.build("llama")
    given = settings(propagation=propagation, input_shrinkage=0.0, compensation=0.0)
    units, _ = find_units(model, find_matrices(model), given)
    windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
    steps = Steps(model, tiny.tokenizer(), given, windows, units, Spill(None), lambda _: None)
    with evaluating(model):
        steps.curves()
        number = next(n for n, unit in enumerate(steps.units) if unit.joint == "dimensions" and unit.layer == 1)
        unit = steps.units[number] = replace(steps.units[number], cuts=(Cut(5, (5, 10), (0.0, 0.0)),))
        made = steps.factors({each.name: 1 if each is unit else each.full() for each in steps.units})
    value, output = unit.matrices
    assert set(made) == {value.name, output.name}
    attention = model.model.layers[1].self_attn

    def run():
        seen = []
        handle = attention.o_proj.register_forward_hook(lambda _m, x, y: seen.append((x[0], y)))
        with torch.inference_mode():
            for block in windows.blocks:
                for one in block.passes:
                    model(**one.inputs)
        handle.remove()
        return [torch.cat([part.flatten(0, -2) for part in parts]).double() for parts in zip(*seen)]

    turn = steps.work.tensors(unit.name)["turn"]
    originals = read(model, value), read(model, output)
    _, wanted = run()
    write(model, value, dense(made[value.name]))
    kept, _ = run()
    found = dense(made[output.name]).double()
    read_columns = (found != 0).any(0)
    assert int(read_columns.sum()) == 10
    if propagation == 0.0:  # what the output weight makes of these values alone, which is the weight itself
        torch.testing.assert_close(
            found[:, read_columns], turned(originals[1].double(), turn, 1)[:, read_columns], rtol=1e-3, atol=1e-4
        )
    else:
        best = torch.linalg.lstsq(kept[:, read_columns], wanted, driver="gelsd").solution.T
        torch.testing.assert_close(found[:, read_columns], best, rtol=1e-3, atol=1e-4)
