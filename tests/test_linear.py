"""Low-rank layers are the truncated weight. Oracles: torch.linalg, F.linear, theorems, brute force, transformers."""

import copy
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from eckart.errors import MatrixError, RankError
from eckart.linear import (
    LARGEST_COEFFICIENT,
    STORAGES,
    FactoredLinear,
    PivotedLinear,
    RowBlockedLinear,
    arrange_,
    bytes_stored,
    cheapest_storage,
    choose_rows,
)
from eckart.truncation import Spectrum

BOTH = pytest.mark.parametrize("kind", [FactoredLinear, PivotedLinear])
# How far a layer may be from the truncated weight, relative to its norm. Pivoted bfloat16 is bounded by theorem below.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
INTERLEAVED = (range(0, 12, 3), range(1, 12, 3), range(2, 12, 3))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truncated(weight, rank):
    """The oracle: numpy's order of operations, in float64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def every_layer(dtype=torch.float64):
    """One of each, all from (12, 10) to 12 features."""
    weight, bias = normal(12, 10, dtype=dtype), normal(12, seed=1, dtype=dtype)
    return [
        FactoredLinear.from_weight(weight, 4, bias=bias),
        PivotedLinear.from_weight(weight, 4, bias=bias),
        PivotedLinear.from_weight(weight, 10),
        RowBlockedLinear.from_weight(weight, [2, None, 3], INTERLEAVED, bias=bias),
        RowBlockedLinear.from_weight(weight, [2, None], [range(5), range(5, 12)], storage="pivoted"),
    ]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "rank"), [((8, 5), 1), ((8, 5), 5), ((5, 8), 3), ((6, 6), 6), ((40, 64), 13)])
def test_a_layer_is_the_truncated_weight(kind, dtype, shape, rank):
    weight, bias, x = normal(*shape, dtype=dtype), normal(shape[0], seed=1, dtype=dtype), normal(7, shape[1], seed=2)
    before = weight.clone()
    layer = kind.from_weight(weight, rank, bias=bias)
    expected = truncated(weight, rank)
    assert layer.dense().dtype == layer(x.to(dtype)).dtype == dtype
    assert distance(layer.dense(), expected) < TOLERANCE[dtype]
    assert distance(layer(x.to(dtype)), functional.linear(x, expected, bias.double())) < TOLERANCE[dtype]
    assert torch.equal(weight, before)


@BOTH
@given(out=st.integers(1, 12), into=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_a_layer_of_any_shape_and_rank_is_the_truncated_weight(kind, out, into, seed, data):
    rank = data.draw(st.integers(1, min(out, into)))
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    weight, x = normal(out, into, seed=seed), normal(*leading, into, seed=seed + 1)
    layer = kind.from_weight(weight, rank)
    expected = functional.linear(x, truncated(weight, rank))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)
    assert layer.rank == rank


@BOTH
def test_bfloat16_costs_no_more_than_its_rounding(kind):
    weight, x = normal(96, 64, dtype=torch.bfloat16), normal(50, 64, dtype=torch.bfloat16)
    layer = kind.from_weight(weight, 16)
    expected = truncated(weight, 16)
    # Rounding the truncated weight itself costs 1.7e-3. Measured: factored 2.4e-3, pivoted 3.5e-3.
    assert distance(layer.dense(), expected) < 6e-3
    assert distance(layer(x), functional.linear(x.double(), expected)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0, 3])
def test_rounding_a_pivoted_layer_keeps_to_its_bound(dtype, decay):
    u, _, vh = torch.linalg.svd(normal(128, 96), full_matrices=False)
    spectrum = Spectrum(u[:, :32], torch.logspace(0, -decay, 32, dtype=torch.float64), vh[:32])
    exact = u[:, :32] @ torch.diag(spectrum.S) @ vh[:32]
    layer = PivotedLinear.from_spectrum(spectrum, dtype=dtype)
    stored = torch.cat((layer.down.weight.double(), layer.up.weight.double() @ layer.down.weight.double()))
    unit = torch.finfo(dtype).eps / 2
    kept = layer.order.argsort()[:32]
    bound = (2 * unit + unit**2) * LARGEST_COEFFICIENT * exact[kept].abs().sum(0)
    assert ((stored[layer.order] - exact).abs() <= bound * (1 + 1e-6)).all()
    assert distance(layer.dense(), exact) < 10 * unit


@given(out=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_no_exchange_of_two_rows_raises_the_determinant_by_more_than_the_bound(out, seed, data):
    rank = data.draw(st.integers(1, out))
    U = normal(out, rank, seed=seed)
    chosen, others, coefficients = choose_rows(U)
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(out))
    torch.testing.assert_close(coefficients @ U[chosen], U[others], atol=1e-9, rtol=1e-9)
    volume = torch.linalg.det(U[chosen]).abs()
    for column in range(rank):
        for other in others.tolist():
            exchanged = chosen.clone()
            exchanged[column] = other
            assert torch.linalg.det(U[exchanged]).abs() <= volume * (LARGEST_COEFFICIENT + 1e-6)


@pytest.mark.parametrize("size", [8, 30])
def test_coefficients_stay_bounded_where_lu_alone_lets_them_grow(size):
    # Wilkinson's matrix: partial pivoting exchanges nothing, and its inverse triangle doubles in every row.
    triangle = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64).tril(-1)
    U = torch.cat((triangle, -torch.ones(1, size, dtype=torch.float64)))
    plain = torch.linalg.solve(U[:size], U[size:], left=False)
    assert plain.abs().max() == 2 ** (size - 1)
    chosen, others, coefficients = choose_rows(U)
    assert coefficients.abs().max() <= LARGEST_COEFFICIENT + 1e-6
    torch.testing.assert_close(coefficients @ U[chosen], U[others], atol=1e-9, rtol=0)


def test_a_matrix_of_zeros_and_one_of_lower_rank_than_asked_are_stored():
    lower = normal(9, 2) @ normal(2, 7)
    for weight in (torch.zeros(9, 7, dtype=torch.float64), lower):
        for kind in STORAGES.values():
            torch.testing.assert_close(kind.from_weight(weight, 4).dense(), weight, atol=1e-10, rtol=0)


def test_rank_zero_is_the_zero_matrix():
    layer = FactoredLinear(5, 3, 0)
    x = normal(2, 5, dtype=torch.float32)
    torch.testing.assert_close(layer(x), layer.bias.expand(2, 3))
    assert torch.equal(layer.dense(), torch.zeros(3, 5))
    assert layer.flops(9) == 0


@pytest.mark.parametrize("rows", [INTERLEAVED, (torch.tensor([11, 0, 5]), range(1, 5), [6, 10, 9, 8, 7])])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_row_blocks_are_truncated_each_by_itself(rows, storage):
    weight, bias, x = normal(12, 10), normal(12, seed=1), normal(3, 4, 10, seed=2)
    expected = weight.clone()
    for part, rank in zip(rows, (2, None, 3)):
        index = torch.as_tensor(list(part))
        expected[index] = truncated(weight[index], rank or 99)
    layer = RowBlockedLinear.from_weight(weight, [2, None, 3], rows, bias=bias, storage=storage)
    torch.testing.assert_close(layer.dense(), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer(x), functional.linear(x, expected, bias), atol=1e-10, rtol=0)
    assert torch.equal(layer.blocks[1].weight, weight[torch.as_tensor(list(rows[1]))])


def test_row_blocks_in_their_own_order_need_no_index():
    layer = RowBlockedLinear.from_weight(normal(12, 10), [2, 3], [range(5), range(5, 12)])
    assert layer.order is None
    assert "order" not in layer.state_dict()


@pytest.mark.parametrize(
    "layer", every_layer(), ids=["factored", "pivoted", "full rank", "interleaved blocks", "blocks"]
)
class TestEveryLayer:
    def test_gradients_are_those_of_finite_differences(self, layer):
        names = [name for name, parameter in layer.named_parameters() if parameter.numel()]
        values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

        def run(x, *values):
            return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

        assert torch.autograd.gradcheck(run, (normal(2, 3, 10, seed=3).requires_grad_(), *values))

    def test_it_counts_the_numbers_it_stores_and_multiplies(self, layer):
        state = layer.state_dict()
        floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
        assert layer.parameters_stored == sum(tensor.numel() for tensor in floats)
        assert layer.bytes == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        with FlopCounterMode(display=False) as counter:
            layer(normal(2, 3, 10))
        assert layer.flops(6) == counter.get_total_flops()

    def test_it_is_saved_and_loaded_into_a_layer_without_numbers(self, layer):
        x = normal(2, 10)
        stored = load(save(layer.state_dict()))
        empty = copy.deepcopy(layer).to("meta")
        empty.load_state_dict(stored, assign=True)
        assert torch.equal(empty(x), layer(x))

    def test_a_copy_is_independent(self, layer):
        x = normal(2, 10)
        before = layer(x)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert torch.equal(layer(x), before)
        assert not torch.equal(twin(x), before)

    def test_a_change_of_dtype_leaves_the_order_of_rows_alone(self, layer):
        x = normal(2, 10)
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert half.weight.dtype == half.dense().dtype == half(x.bfloat16()).dtype == torch.bfloat16
        assert distance(half(x.bfloat16()), layer(x)) < 2e-2

    def test_autocast_treats_it_as_a_linear_layer(self, layer):
        layer, x = copy.deepcopy(layer).float(), normal(6, 10, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == nn.Linear(10, 12)(x).dtype == torch.bfloat16
        assert distance(y, layer(x)) < 2e-2

    def test_an_empty_batch_and_a_single_vector_are_inputs(self, layer):
        assert layer(normal(0, 4, 10)).shape == (0, 4, 12)
        torch.testing.assert_close(layer(normal(10)), layer(normal(10)[None])[0])

    def test_a_dense_layer_refuses_its_numbers(self, layer):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            nn.Linear(10, 12, dtype=torch.float64).load_state_dict(layer.state_dict(), strict=False)


@BOTH
def test_a_transposed_weight_gives_the_layer_of_its_transpose(kind):
    source = Conv1D(12, 10).double()
    nn.init.normal_(source.bias)
    layer = kind.from_weight(source.weight.T, 10, bias=source.bias)
    x = normal(3, 10)
    torch.testing.assert_close(layer(x), source(x), atol=1e-10, rtol=0)
    assert all(parameter.is_contiguous() and parameter.is_leaf for parameter in layer.parameters())


@BOTH
def test_building_leaves_the_global_generator_alone_and_shares_no_memory(kind):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    bias = normal(6)
    layer = kind.from_weight(normal(6, 5), 2, bias=bias)
    assert torch.equal(torch.rand(2), expected)
    with torch.no_grad():
        bias.zero_()
    assert layer.bias.abs().min() > 0


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_layers_agree(backend):
    weight = normal(12, 10, dtype=torch.float32)
    model = nn.Sequential(
        FactoredLinear.from_weight(weight, 4),
        PivotedLinear.from_weight(weight.T, 3, bias=weight[0]),
        RowBlockedLinear.from_weight(weight, [2, None, 3], INTERLEAVED),
    )
    x = normal(3, 10, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@BOTH
def test_arranging_a_layer_changes_strides_and_nothing_else(kind):
    layer, x = kind.from_weight(normal(40, 30, dtype=torch.float32), 8), normal(3, 30, dtype=torch.float32)
    arranged = arrange_(copy.deepcopy(layer))
    assert arranged.up.weight.stride(0) == 1
    assert copy.deepcopy(arranged).up.weight.stride(0) == 1
    assert all(torch.equal(value, arranged.state_dict()[name]) for name, value in layer.state_dict().items())
    assert distance(arranged(x), layer(x)) < TOLERANCE[torch.float32]
    half = layer.to(torch.bfloat16)
    assert arrange_(half).up.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (64, 24), (7, 300), (512, 384)])
def test_the_cheapest_storage_is_the_one_of_fewest_bytes(shape, dtype):
    out, into = shape
    for rank in range(1, min(shape) + 1, 5):
        built = {"dense": nn.Linear(into, out, False, device="meta", dtype=dtype).weight.nbytes}
        for storage, kind in STORAGES.items():
            built[storage] = kind(into, out, rank, False, device="meta", dtype=dtype).bytes
            assert bytes_stored(storage, shape, rank, dtype) == built[storage]
        choice = cheapest_storage(shape, rank, dtype, at_most=1)
        assert built[choice] == min(built.values())
        wary = cheapest_storage(shape, rank, dtype, at_most=0.8)
        assert (wary == "dense") == (built[choice] >= 0.8 * built["dense"])
        assert wary != "factored" or built["pivoted"] >= 0.8 * built["factored"]
        assert wary != "pivoted" or built["pivoted"] < 0.8 * built["dense"]
    assert cheapest_storage(shape, min(shape), dtype) == "dense"
    assert cheapest_storage(shape, 0, dtype) == "factored"


@BOTH
@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_outside_its_range_is_refused(kind, rank):
    with pytest.raises(RankError, match="to 5"):
        kind(5, 9, rank)
    with pytest.raises(RankError, match="from 1 to 5"):
        kind.from_weight(normal(9, 5), rank)


def test_blocks_that_do_not_fit_together_are_refused():
    with pytest.raises(MatrixError, match=r"\[3, 4\] features"):
        RowBlockedLinear([nn.Linear(3, 2), nn.Linear(4, 2)])
    for rows in ([range(3), range(3, 4)], [range(2), range(1, 3)], [range(2)]):
        with pytest.raises(MatrixError, match="from 0 to 3"):
            RowBlockedLinear([nn.Linear(3, 2), nn.Linear(3, 2)], rows)
