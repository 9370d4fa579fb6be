"""Removing neurons: against least squares, against trying every neuron, and within the budget for every layout."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.allocate import Curve, Level, combined
from eckart.checkpoint import load_model, save
from eckart.compression import compress
from eckart.compression_steps import Steps
from eckart.factoring import factor_
from eckart.linear import SelectedLinear
from eckart.matrices import find_matrices
from eckart.neurons import factors, made_up, order_of_removal, prepare, stay
from eckart.recipe import CompressSettings
from eckart.spill import Spill
from eckart.tasks import Example, make_task
from eckart.units import _by_neuron, find_units, joint_cost

sizes = st.tuples(st.integers(1, 5), st.integers(2, 8), st.integers(0, 2**16))


def example(size):
    out, n, seed = size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(50, n, generator=generator, dtype=torch.float64) @ torch.randn(
        n, n, generator=generator, dtype=torch.float64
    )
    return weight, inputs, inputs.T @ inputs / len(inputs)


@given(size=sizes, keep=st.integers(1, 8))
def test_what_makes_up_for_missing_neurons_is_least_squares(size, keep):
    weight, inputs, moment = example(size)
    kept = torch.randperm(len(moment), generator=torch.Generator().manual_seed(size[2]))[:keep].sort().values
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T, driver="gelsd").solution.T
    lost = [(inputs @ weight.T - inputs[:, kept] @ w.T).square().sum() for w in (best, made_up(weight, moment, kept))]
    torch.testing.assert_close(lost[1], lost[0], rtol=1e-6, atol=1e-6)


@given(size=sizes)
def test_the_first_neuron_removed_is_the_one_whose_loss_hurts_least(size):
    """Against removing each alone, and least squares for the others."""
    weight, inputs, moment = example(size)
    alone = []
    for gone in range(len(moment)):
        kept = [n for n in range(len(moment)) if n != gone]
        best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T, driver="gelsd").solution
        alone.append(float((inputs @ weight.T - inputs[:, kept] @ best).square().sum()))
    order = order_of_removal(weight, moment)
    assert alone[int(order[0])] == pytest.approx(min(alone), rel=1e-5, abs=1e-8)


@given(size=sizes, rounds=st.integers(1, 9))
def test_every_neuron_is_removed_once_in_any_number_of_rounds(size, rounds):
    weight, _, moment = example(size)
    order = order_of_removal(weight, moment, rounds=rounds)
    assert sorted(order.tolist()) == list(range(len(moment)))


def test_neurons_that_nothing_reads_or_others_repeat_go_first():
    weight, inputs, _ = example((3, 8, 1))
    weight[:, 5] = 0
    inputs[:, 2] = 2 * inputs[:, 6] + 1e-4 * inputs[:, 0]
    order = order_of_removal(weight, inputs.T @ inputs / len(inputs)).tolist()
    assert 5 in order[:2]
    assert order[0] in (2, 6) or order[1] in (2, 6)


@pytest.mark.parametrize("metric", ["identity", "full"])
def test_losses_at_every_width_and_rank_are_those_of_the_cut_weights(metric):
    """The tails of `prepare`, against the weights of `factors` themselves."""
    from eckart.neurons import Cut, width_of

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = [draw(10, 4), draw(10, 4), draw(5, 10)]
    gradients = [None if metric == "identity" else (m := draw(40, len(w))).T @ m / 40 for w in weights]
    x, h = draw(40, 4), draw(40, 10)
    prepared = prepare(weights, gradients, x.T @ x / 40, h.T @ h / 40)
    for place, share in ((0, 1.0), (4, 0.6), (8, 0.2)):
        width = width_of(share, 10)
        stays = stay(prepared["order"], width)
        for rank in (1, 2):
            cut = Cut(width, (rank,) * 3, (0.0,) * 3)
            for number, (up, down) in enumerate(factors(prepared, weights, cut)):
                squares = prepared[f"squares.{place}.{number}"]
                root = torch.eye(len(weights[number]), dtype=torch.float64)
                if metric == "full":
                    root = torch.linalg.cholesky(gradients[number])
                if number < 2:
                    off = torch.zeros(10, 4, dtype=torch.float64)
                    off[stays] = weights[number][stays] - up @ down
                    expected = squares[rank:].sum()
                else:
                    read = torch.zeros(5, 10, dtype=torch.float64)
                    read[:, stays] = up @ down
                    off = weights[number] - read
                    expected = squares[rank:].sum() + prepared["lost"][place]
                error = (root.T @ off @ (x if number < 2 else h).T).square().sum() / 40
                torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-6)


curves = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=4)


def curve(steps, name="c"):
    costs = np.cumsum([cost for cost, _ in steps])
    errors = np.cumsum([0.0] + [error for _, error in steps[1:]])[::-1]
    return Curve(name, np.arange(len(steps)), costs, errors.copy())


@given(levels=st.lists(st.tuples(st.floats(0, 9), st.lists(curves, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_no_choice_of_any_level_is_worth_more_at_any_price_than_the_best_listed_one(levels):
    """Against all choices there are."""
    import itertools

    given_levels = [Level(error, tuple(curve(steps) for steps in each)) for error, each in levels]
    listed = combined(given_levels)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in zip(listed, listed[1:]))
    every = []
    for level in given_levels:
        for chosen in itertools.product(*(range(len(c.ranks)) for c in level.curves)):
            cost = sum(float(c.costs[i]) for c, i in zip(level.curves, chosen))
            every.append((cost, level.error + sum(float(c.errors[i]) for c, i in zip(level.curves, chosen))))
    for cost, error, level, chosen in listed:
        found = given_levels[level]
        assert cost == pytest.approx(sum(float(c.costs[i]) for c, i in zip(found.curves, chosen)))
        assert error == pytest.approx(found.error + sum(float(c.errors[i]) for c, i in zip(found.curves, chosen)))
    for price in (0.0, 0.1, 0.5, 1.0, 3.0, 20.0):
        least = min(error + price * cost for cost, error in every)
        assert min(error + price * cost for cost, error, *_ in listed) == pytest.approx(least)


def text(words=300):
    return make_task("text", [Example(tiny.sentence(words, 0), None)])


def settings(**given):
    return CompressSettings.model_validate({"ratio": 0.5, "windows": 6, "measured": 2, "window": 16, **given})


@pytest.mark.parametrize(
    ("name", "mlps"),
    [("llama", 3), ("gpt2", 3), ("phi3", 3), ("gemma2", 3), ("gpt_neox", 3), ("falcon", 3), ("mixtral", 0)],
)
def test_the_mlps_of_a_model_are_found_by_what_they_do(name, mlps):
    model = tiny.build(name)
    units, _ = find_units(model, find_matrices(model), settings())
    found = [unit for unit in units if unit.joint == "neurons"]
    assert len(found) == mlps
    assert all(unit.matrices[-1].type == "fc_out" for unit in found)
    names = [matrix.name for unit in units for matrix in unit.matrices]
    assert len(names) == len(set(names))


def test_weights_whose_neurons_are_mixed_in_between_are_no_mlp():
    class Mixing(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.silu(x).roll(1, -1)

    model = tiny.build("llama")
    model.model.layers[1].mlp.act_fn = Mixing()
    units, _ = find_units(model, find_matrices(model), settings())
    assert [unit.layer for unit in units if unit.joint == "neurons"] == [0, 2]
    matrices = {m.type: m for m in find_matrices(model) if m.layer == 1}
    assert not _by_neuron(model, [matrices["fc_in"], matrices["fc_up"]], matrices["fc_out"])


@pytest.mark.parametrize("method", ["whiten", "double", "propagated"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_a_compressed_model_has_fewer_neurons_where_that_loses_less_and_keeps_the_budget(method, storage, tmp_path):
    """Two thirds of the neurons repeat the others: what removes them must find that out."""
    model = tiny.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight[16:32], weight[32:] = weight[:16], weight[:16]
    given = settings(
        method=method, storage=storage, allocate="tail", floor=0.0, types=("mlp",), ratio=0.45, input_shrinkage=0.0
    )
    before = copy.deepcopy(model.state_dict())
    found = compress(model, tiny.tokenizer(), text(), given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {row["neurons"] for row in found.facts["matrices"]} <= set(range(16, 30))
    dense = sum(row["dense"] for row in found.facts["matrices"])
    small = copy.deepcopy(model)
    made = factor_(small, found.plan, factors=found.factors, storage=storage)
    kept = dense - (made.before.parameters - made.after.parameters)
    assert kept == pytest.approx(found.facts["budget"]["spent"]) == sum(row["cost"] for row in found.facts["matrices"])
    assert kept <= 0.45 * dense
    assert any(isinstance(module, SelectedLinear) for module in small.modules())
    with torch.inference_mode():
        logits = [m(**tiny.inputs("llama")).logits for m in (model, small)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05)
    save(small, tmp_path / "out", tiny.tokenizer())
    with torch.inference_mode():
        assert torch.equal(load_model(str(tmp_path / "out"))(**tiny.inputs("llama")).logits, logits[1])


def test_a_budget_in_bytes_counts_what_the_indices_take():
    model = tiny.build("gpt2")
    whole = sum(p.nbytes for p in model.parameters())
    found = compress(model, tiny.tokenizer(), text(), settings(ratio=None, bytes=int(0.75 * whole)))
    made = factor_(model, found.plan, factors=found.factors, storage="pivoted")
    assert made.after.bytes <= 0.75 * whole


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("unit", [{"ratio": 0.5}, {"bytes": 1}])
def test_the_cost_of_everything_is_that_of_the_dense_weights(storage, unit):
    cost = joint_cost([(12, 5), (5, 12)], CompressSettings(storage=storage, **unit), torch.float16)
    size = 2 if "bytes" in unit else 1
    assert cost(0, 12, 5) == cost(1, 12, 5) == 60 * size


def test_neurons_stay_where_they_are_not_asked_for():
    model = tiny.build("llama")
    for changed in ({"neurons": False}, {"method": "svd"}, {"allocate": "mp"}, {"latency": 0.5, "ratio": None}):
        units, _ = find_units(model, find_matrices(model), settings(**changed))
        assert not any(unit.joint == "neurons" for unit in units)


def test_a_killed_compression_goes_on_with_the_same_neurons(tmp_path):
    model = tiny.build("llama")
    plain = compress(model, tiny.tokenizer(), text(), settings())

    class Killed(Exception):
        pass

    def killing(now):
        if now.stage == "cutting" and now.done == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(model, tiny.tokenizer(), text(), settings(), spill=tmp_path, progress=killing)
    again = compress(model, tiny.tokenizer(), text(), settings(), spill=tmp_path)
    assert again.plan == plain.plan
    for name, spectrum in plain.factors.items():
        assert torch.equal(spectrum.U, again.factors[name].U)
        assert torch.equal(spectrum.Vh, again.factors[name].Vh)


def test_an_unfinished_mlp_that_stays_dense_is_not_touched():
    model = tiny.build("llama")
    given = settings(ratio=0.999, allocate="uniform")
    units, _ = find_units(model, find_matrices(model), given)
    from eckart.calibration import read_windows

    windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
    steps = Steps(model, tiny.tokenizer(), given, windows, units, Spill(None), lambda _: None)
    found = {curve.name: curve for curve in steps.curves()}
    for unit in steps.units:
        assert int(found[unit.name].ranks[-1]) == unit.full()
        assert unit.ranks(unit.full()) == (None,) * len(unit.matrices)
    assert steps.factors({unit.name: unit.full() for unit in steps.units}) == {}


def test_a_forecast_has_one_row_for_an_mlp():
    from eckart.compression import forecast

    found = forecast(tiny.build("llama"), tiny.tokenizer(), text(), settings(allocate="uniform"))
    mlps = {row["matrix"]: row for row in found["matrices"] if row["matrix"].endswith("(MLP)")}
    assert sorted(mlps) == [f"model.layers.{layer} (MLP)" for layer in range(3)]
    assert len(found["matrices"]) == 6 + 3 + 3
    assert all(1 <= row["rank"] <= row["of"] == 48 and len(row["ranks"]) == 3 for row in mlps.values())
