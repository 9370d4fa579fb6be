"""Low rank plus sparse, fitted and as a layer. Oracles: torch's sparse matrices, least squares, what was planted."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from eckart import sparse
from eckart.errors import MatrixError
from eckart.sparse import (
    LowRankSparse,
    entries_bytes,
    index_dtype,
    nonzeros_for,
    scattered,
    separate,
    separation_errors,
)
from eckart.truncation import cut, decompose
from eckart.weighting import Metric, decompose_weighted, square_root

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")  # the oracle's
STORAGES = pytest.mark.parametrize("storage", ["factored", "pivoted"])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def metric_of(out, into, seed=5):
    scales = torch.logspace(0, 1, into, dtype=torch.float64)
    x = (normal(3 * into, into, seed=seed) @ normal(into, into, seed=seed + 1)) * scales
    g = normal(3 * out, out, seed=seed + 2)
    return Metric.from_moments(g.T @ g / len(g), x.T @ x / len(x), shrinkage=(0.1, 0.05))


def identity(out, into):
    return Metric(torch.eye(out, dtype=torch.float64), torch.eye(into, dtype=torch.float64))


def entries_of(shape, count, seed=0):
    """Some places of a matrix, by rows, and numbers for them."""
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count].sort().values
    rows, columns = order // shape[1], order % shape[1]
    starts = torch.searchsorted(rows, torch.arange(shape[0] + 1))
    return normal(count, seed=seed), columns, starts


@given(out=st.integers(1, 9), into=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_entries_are_scattered_as_torch_makes_a_sparse_matrix_dense(out, into, seed, data):
    count = data.draw(st.integers(0, out * into))
    values, columns, starts = entries_of((out, into), count, seed)
    expected = torch.sparse_csr_tensor(starts, columns, values, (out, into), check_invariants=True).to_dense()
    assert torch.equal(scattered(values, columns.to(torch.int16), starts.int(), (out, into)), expected)


@STORAGES
@given(out=st.integers(2, 9), into=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_a_layer_is_its_product_and_its_entries_with_gradients_and_without(storage, out, into, seed, data):
    rank = data.draw(st.integers(1, min(out, into)))
    count = data.draw(st.integers(0, out * into))
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    values, columns, starts = entries_of((out, into), count, seed)
    spectrum = cut(decompose(normal(out, into, seed=seed)), rank)
    both = LowRankSparse(spectrum, values, columns, starts, storage)
    product = (spectrum.U * spectrum.S) @ spectrum.Vh
    expected = product + torch.sparse_csr_tensor(starts, columns, values, (out, into), check_invariants=True).to_dense()
    bias, x = normal(out, seed=seed + 1), normal(*leading, into, seed=seed + 2)
    layer = both.layer(bias=bias)
    for found in (both.dense(), layer.dense()):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    wanted = functional.linear(x, expected, bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, atol=1e-9, rtol=1e-9)
    assert layer(x).requires_grad
    torch.testing.assert_close(layer(x), wanted, atol=1e-9, rtol=1e-9)
    assert layer.rank == rank
    same = copy.deepcopy(layer)
    assert torch.equal(same(x), layer(x))


@STORAGES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_keeps_its_dtype_and_counts_what_it_holds(storage, dtype):
    weight, bias = normal(12, 18), normal(12, seed=1, dtype=dtype)
    both = replace(separate(weight, 3, 20, metric_of(12, 18)), storage=storage)
    layer = both.layer(bias=bias, dtype=dtype)
    with torch.no_grad():
        y = layer(weight.to(dtype))
    assert layer.dense().dtype == y.dtype == dtype
    assert layer.columns.dtype == torch.int16
    product = 3 * (12 + 18 - (3 if storage == "pivoted" else 0))
    assert layer.parameters_stored == product + 20 + 12
    assert both.bytes_stored(dtype) == layer.bytes - 12 * dtype.itemsize
    assert entries_bytes((12, 18), 20, dtype) == sum(t.nbytes for t in (layer.values, layer.columns, layer.starts))
    assert layer.flops(5) == 2 * 5 * (product + 20)
    close = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    expected = functional.linear(weight, both.dense(), bias.double())
    torch.testing.assert_close(y.double(), expected, atol=close * float(expected.abs().max()), rtol=0)


def test_columns_take_two_bytes_while_they_can():
    assert [index_dtype(into) for into in (1, 2**15, 2**15 + 1)] == [torch.int16, torch.int16, torch.int32]
    assert torch.iinfo(torch.int16).max == 2**15 - 1
    wide, narrow = (entries_bytes((4, into), 10, torch.float32) for into in (2**15 + 1, 2**15))
    assert wide - narrow == 20


@given(out=st.integers(2, 99), into=st.integers(2, 99), share=st.floats(0.01, 0.9), data=st.data())
def test_entries_take_their_share_of_the_numbers(out, into, share, data):
    rank = data.draw(st.integers(1, min(out, into)))
    count = nonzeros_for((out, into), rank, share, "factored")
    assert 1 <= count <= out * into
    if 1 < count < out * into:
        product = rank * (out + into)
        assert 2 * count / (2 * count + product) <= share + 1e-9
        assert 2 * (count + 1) / (2 * (count + 1) + product) > share - 1e-9


@pytest.mark.parametrize("metric", [identity(14, 20), metric_of(14, 20)], ids=["identity", "metric"])
def test_more_rounds_never_lose_and_entries_gain_on_the_product_alone(metric):
    weight = normal(14, 20)
    errors = [metric.error(weight - separate(weight, 3, 25, metric, rounds=n).dense()) for n in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    up, down = decompose_weighted(weight, square_root(metric.outputs), square_root(metric.inputs)).factors(3)
    assert errors[0] < metric.error(weight - up @ down)
    found = separate(weight, 3, 25, metric)
    assert len(found.values) == 25
    assert len(found.spectrum.S) == 3


def test_without_correlations_the_entries_are_the_largest_that_the_product_leaves():
    """In a diagonal metric the best entries for a product are known: the largest of g_i R_ij^2 a_j, as they are."""
    weight = normal(14, 20)
    metric = Metric(torch.diag(torch.rand(14).double() + 0.1), torch.diag(torch.rand(20).double() + 0.1))
    found = separate(weight, 3, 25, metric, rounds=1)
    left, right = square_root(metric.outputs), square_root(metric.inputs)
    up, down = decompose_weighted(weight, left, right).factors(3)
    residual = weight - up @ down
    key = metric.outputs.diagonal()[:, None] * residual**2 * metric.inputs.diagonal()
    largest = key >= key.flatten().sort(descending=True).values[24]
    entries = scattered(found.values, found.columns, found.starts, (14, 20))
    torch.testing.assert_close(entries, torch.where(largest, residual, 0.0))


def test_values_are_least_squares_in_the_metric(monkeypatch):
    monkeypatch.setattr(sparse, "STEPS", 400)
    weight, metric = normal(8, 10), metric_of(8, 10)
    found = separate(weight, 2, 15, metric, rounds=1)
    entries = scattered(found.values, found.columns, found.starts, (8, 10))
    product = found.dense() - entries
    # |Lg' (R - S) La| is a least-squares problem in the values, written out by Kronecker products.
    left, right = torch.linalg.cholesky(metric.outputs), torch.linalg.cholesky(metric.inputs)
    system = torch.kron(left.T.contiguous(), right.T.contiguous())[:, (entries != 0).flatten()]
    aim = (left.T @ (weight - product) @ right).flatten()
    best = torch.linalg.lstsq(system, aim[:, None]).solution[:, 0]
    torch.testing.assert_close(found.values, best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", [identity(40, 50), metric_of(40, 50)], ids=["identity", "metric"])
def test_a_planted_product_and_outliers_are_found(metric):
    values, columns, starts = entries_of((40, 50), 30, seed=3)
    outliers = scattered(8 * values.sign() + 2 * values, columns, starts, (40, 50))
    weight = normal(40, 2) @ normal(2, 50, seed=1) + outliers
    found = separate(weight, 2, 30, metric, rounds=60)
    assert metric.error(weight - found.dense()) < 1e-4 * metric.error(weight)
    entries = scattered(found.values, found.columns, found.starts, (40, 50))
    assert torch.equal(entries != 0, outliers != 0)
    # Which a product of as many numbers does not.
    rank = (2 * 90 + 2 * 30 + 41) // 90
    up, down = decompose_weighted(weight, square_root(metric.outputs), square_root(metric.inputs)).factors(rank)
    assert metric.error(weight - up @ down) > 1e-2 * metric.error(weight)


@STORAGES
def test_the_error_that_is_told_before_is_a_bound_on_the_error_that_comes(storage):
    weight, metric = normal(12, 18), metric_of(12, 18)
    told = separation_errors(weight, metric, 0.3, storage, points=11)
    assert len(told) == 13
    assert told[0] == torch.inf
    assert told[12] == 0
    for rank in range(1, 12):
        count = nonzeros_for((12, 18), rank, 0.3, storage)
        after = metric.error(weight - separate(weight, rank, count, metric, rounds=1).dense())
        assert after <= told[rank] * (1 + 1e-9)
    few = separation_errors(weight, metric, 0.3, storage, points=3)
    ratio = few[1:12] / told[1:12]
    assert bool(((ratio > 0.5) & (ratio < 2)).all())


def test_gradients_flow_to_the_input_the_product_and_the_entries():
    layer = separate(normal(6, 5), 2, 7, metric_of(6, 5)).layer(bias=normal(6, seed=1))
    names = [name for name, parameter in layer.named_parameters() if parameter.numel()]
    assert set(names) == {"values", "low.down.weight", "low.up.weight", "low.up.bias"}
    inputs = [normal(3, 5, seed=2), *(layer.get_parameter(name).detach().clone() for name in names)]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, tuple(tensor.requires_grad_() for tensor in inputs))


def test_a_compiled_layer_and_one_under_autocast_compute_the_same():
    layer = separate(normal(6, 5), 2, 7, metric_of(6, 5)).layer(dtype=torch.float32).requires_grad_(False)
    x = normal(3, 5, dtype=torch.float32)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("change", ["column", "negative", "first", "last", "order"])
def test_indices_that_point_outside_are_refused_before_they_are_used(change):
    layer = separate(normal(6, 5), 2, 7, metric_of(6, 5)).layer().requires_grad_(False)
    layer(normal(3, 5))
    columns, starts = layer.columns.clone(), layer.starts.clone()
    if change == "column":
        columns[3] = 5
    if change == "negative":
        columns[0] = -1
    if change == "first":
        starts[0] = 1
    if change == "last":
        starts[-1] = 9
    if change == "order":
        starts[2] = 100
    layer.load_state_dict(layer.state_dict() | {"columns": columns, "starts": starts}, assign=True)
    with pytest.raises(MatrixError, match="indices"):
        layer(normal(3, 5))


def test_nothing_to_fit_and_a_singular_metric_are_no_reason_to_fail():
    nothing = separate(torch.zeros(6, 5), 2, 7, metric_of(6, 5))
    assert not nothing.dense().any()
    layer = nothing.layer().requires_grad_(False)
    assert not layer(normal(3, 5)).any()
    x = torch.zeros(4, 5, dtype=torch.float64)
    x[:, 3] = 1
    for inputs in (x.T @ x, torch.zeros(5, 5)):
        metric = Metric.from_moments(torch.zeros(6, 6), inputs)
        errors = [metric.error(normal(6, 5) - separate(normal(6, 5), 2, 7, metric, rounds=n).dense()) for n in (1, 2)]
        assert errors == sorted(errors, reverse=True)
        assert bool(torch.isfinite(separation_errors(normal(6, 5), metric, 0.2, "factored")[1:]).all())
