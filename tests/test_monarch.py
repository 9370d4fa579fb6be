"""Monarch layers and how weights are fitted by them. Oracles: the product written out, Eckart-Young, autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from eckart.errors import RankError
from eckart.monarch import Monarch, MonarchLinear, block_errors, fit, grids
from eckart.weighting import Metric


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def metric_of(out, into, seed=5):
    """Moments of correlated features, some much larger than others."""
    scales = torch.logspace(0, 1.5, into, dtype=torch.float64)
    x = (normal(3 * into, into, seed=seed) @ normal(into, into, seed=seed + 1)) * scales
    g = normal(3 * out, out, seed=seed + 2)
    return Metric.from_moments(g.T @ g / len(g), x.T @ x / len(x), shrinkage=(0.1, 0.05))


def blocks_of(weight, b):
    out, into = weight.shape
    return {
        (i, j): weight[i * out // b : (i + 1) * out // b, j * into // b : (j + 1) * into // b]
        for i in range(b)
        for j in range(b)
    }


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(shape=shapes, seed=st.integers(0, 99), data=st.data())
def test_a_layer_is_a_block_diagonal_a_permutation_and_a_block_diagonal(shape, seed, data):
    b, tall, wide = shape
    rank = data.draw(st.integers(1, min(tall, wide)))
    leading = data.draw(st.lists(st.integers(0, 3), max_size=2))
    out, into, k = b * tall, b * wide, b * rank
    up, down = normal(b, tall, k, seed=seed), normal(b, k, wide, seed=seed + 1)
    bias, x = normal(out, seed=seed + 2), normal(*leading, into, seed=seed + 3)
    # Row (i, j, c) of the permutation takes component c that block j of the input made for block i of the output.
    permutation = torch.zeros(b * k, b * k, dtype=torch.float64)
    for i, j, c in np.ndindex(b, b, rank):
        permutation[(i * b + j) * rank + c, (j * b + i) * rank + c] = 1
    expected = torch.block_diag(*up) @ permutation @ torch.block_diag(*down)
    torch.testing.assert_close(Monarch(up, down).dense(), expected)
    layer = Monarch(up, down).layer(bias=bias)
    torch.testing.assert_close(layer.dense(), expected)
    torch.testing.assert_close(layer(x), functional.linear(x, expected, bias))
    assert (layer.grid, layer.rank) == (b, rank)


@given(out=st.integers(2, 12), into=st.integers(2, 12), seed=st.integers(0, 99), data=st.data())
def test_without_a_metric_every_block_is_its_own_best_of_the_rank(out, into, seed, data):
    found = grids((out, into))
    assert found == tuple(b for b in range(2, 13) if out % b == into % b == 0)
    if not found:
        return
    b = data.draw(st.sampled_from(found))
    rank = data.draw(st.integers(1, min(out, into) // b))
    weight = normal(out, into, seed=seed)
    made = blocks_of(fit(weight, b, rank).dense(), b)
    for place, block in blocks_of(weight, b).items():
        u, s, vh = torch.linalg.svd(block, full_matrices=False)
        torch.testing.assert_close(made[place], (u[:, :rank] * s[:rank]) @ vh[:rank])


def test_no_search_finds_a_better_one_of_the_same_structure():
    weight = normal(12, 18)
    found = fit(weight, 3, 2)
    least = (weight - found.dense()).norm()
    torch.testing.assert_close(least.square(), block_errors_of(weight, 3, 2))
    for seed in range(200):
        size = 10 ** (-(seed % 5))
        up, down = found.up + size * normal(*found.up.shape, seed=seed), found.down
        near = Monarch(up, down + size * normal(*down.shape, seed=seed + 1000))
        assert (weight - near.dense()).norm() >= least
    # Nor does descent from another place.
    up, down = normal(3, 4, 6, seed=1).requires_grad_(), normal(3, 6, 6, seed=2).requires_grad_()
    optimizer = torch.optim.LBFGS([up, down], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (weight - Monarch(up, down).dense()).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert loss().detach() == pytest.approx(float(least**2), rel=1e-3)
    assert loss().detach() >= least**2 * (1 - 1e-12)


def block_errors_of(weight, b, rank):
    return sum(torch.linalg.svdvals(block)[rank:].square().sum() for block in blocks_of(weight, b).values())


@pytest.mark.parametrize("shape", [(12, 18), (64, 48), (7, 5)])
def test_the_grid_of_a_width_is_the_one_whose_blocks_lose_least(shape):
    weight = normal(*shape)
    errors, best = block_errors(weight)
    assert len(errors) == len(best) == min(shape) + 1
    for width in range(min(shape) + 1):
        possible = [b for b in grids(shape) if width and width % b == 0]
        if not possible:
            assert errors[width] == torch.inf
            assert best[width] == 0
            continue
        losses = {b: float(block_errors_of(weight, b, width // b)) for b in possible}
        assert float(errors[width]) == pytest.approx(min(losses.values()), abs=1e-9)
        assert losses[int(best[width])] == pytest.approx(min(losses.values()), abs=1e-9)


def test_a_metric_of_blocks_alone_is_met_by_every_block_alone():
    """Where nothing correlates across blocks, cutting again changes nothing, and the error is the sum of the tails."""
    metric = metric_of(12, 18)
    inside = Metric(
        torch.block_diag(*blocks_diagonal(metric.outputs, 3)), torch.block_diag(*blocks_diagonal(metric.inputs, 3))
    )
    weight = normal(12, 18)
    plain, again = fit(weight, 3, 2, inside, rounds=0), fit(weight, 3, 2, inside, rounds=3)
    torch.testing.assert_close(again.dense(), plain.dense())
    gauge = torch.linalg.cholesky(inside.outputs).T @ weight @ torch.linalg.cholesky(inside.inputs)
    assert inside.error(weight - plain.dense()) == pytest.approx(float(block_errors_of(gauge, 3, 2)))


def blocks_diagonal(matrix, b):
    return [block for (i, j), block in blocks_of(matrix, b).items() if i == j]


@pytest.mark.parametrize(("b", "rank"), [(2, 3), (2, 5), (3, 2)])
def test_cutting_again_never_loses_and_ends_where_no_small_change_gains(b, rank):
    weight, metric = normal(12, 18), metric_of(12, 18)
    errors = [metric.error(weight - fit(weight, b, rank, metric, rounds=rounds).dense()) for rounds in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.95 * errors[0]
    # In the metric, the plain blocks are no better.
    assert errors[0] < metric.error(weight - fit(weight, b, rank).dense())
    found = fit(weight, b, rank, metric, rounds=400)
    up, down = found.up.clone().requires_grad_(), found.down.clone().requires_grad_()
    change = weight - Monarch(up, down).dense()
    (metric.outputs @ change @ metric.inputs * change).sum().backward()
    scale = 2 * (metric.outputs @ weight @ metric.inputs).abs().max()
    assert float(up.grad.abs().max() / scale) < 1e-3
    assert float(down.grad.abs().max() / scale) < 1e-3


def test_a_full_rank_keeps_everything_and_a_zero_weight_stays_zero():
    weight, metric = normal(8, 12), metric_of(8, 12)
    for given_metric in (None, metric):
        torch.testing.assert_close(fit(weight, 4, 2, given_metric).dense(), weight)
        nothing = fit(torch.zeros(8, 12), 4, 1, given_metric)
        assert not nothing.dense().any()
        assert bool(torch.isfinite(nothing.up).all() & torch.isfinite(nothing.down).all())


def test_a_metric_that_is_singular_or_zero_is_no_reason_to_fail():
    weight = normal(8, 12)
    x = torch.zeros(5, 12, dtype=torch.float64)
    x[:, 3] = 1
    for inputs in (x.T @ x, torch.zeros(12, 12)):
        metric = Metric.from_moments(torch.zeros(8, 8), inputs)
        errors = [metric.error(weight - fit(weight, 2, 1, metric, rounds=rounds).dense()) for rounds in range(3)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_keeps_its_dtype_and_counts_what_it_holds(dtype):
    weight, bias = normal(12, 18, dtype=dtype), normal(12, seed=1, dtype=dtype)
    found = fit(weight, 3, 2)
    layer = found.layer(bias=bias, dtype=dtype)
    assert layer.dense().dtype == layer(weight).dtype == dtype
    numbers = 3 * 2 * (12 + 18)
    assert layer.parameters_stored == numbers + 12
    assert layer.bytes == (numbers + 12) * dtype.itemsize
    assert found.bytes_stored(dtype) == numbers * dtype.itemsize
    with FlopCounterMode(display=False) as counter:
        layer(normal(5, 18, dtype=dtype))
    assert counter.get_total_flops() == layer.flops(5) == 2 * 5 * numbers
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    largest = float(found.dense().abs().max())
    torch.testing.assert_close(layer.dense().double(), found.dense(), atol=tolerance * largest, rtol=0)


def test_gradients_flow_to_the_input_and_both_factors():
    layer = fit(normal(6, 4), 2, 1).layer(bias=normal(6, seed=1))
    inputs = (normal(3, 4, seed=2), *(parameter.detach().clone() for parameter in (layer.up, layer.down, layer.bias)))

    def run(x, up, down, bias):
        return torch.func.functional_call(layer, {"up": up, "down": down, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, tuple(tensor.requires_grad_() for tensor in inputs))


@pytest.mark.parametrize(("grid", "rank"), [(0, 1), (-1, 1), (5, 1), (2, 0), (2, 4), (3, 3)])
def test_a_grid_or_rank_that_does_not_fit_is_refused(grid, rank):
    with pytest.raises(RankError, match="does not fit"):
        MonarchLinear(12, 6, grid, rank)
