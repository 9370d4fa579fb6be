"""Weights with zero rows and columns: neither is stored, and nothing else changes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eckart
import tiny_models as tiny
from eckart.checkpoint import load_model
from eckart.errors import MatrixError
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, PivotedLinear, RowBlockedLinear, SelectedLinear
from eckart.matrices import find_matrices, partition, write
from eckart.quantizer import StoredLayer, empty_layer, stored_as
from eckart.surgery import make_edit
from eckart.truncation import Spectrum, cut, decompose, dense


@given(st.integers(1, 6), st.sets(st.integers(0, 8), min_size=1), st.booleans(), st.integers(0, 2**16))
def test_a_layer_that_reads_some_columns_is_the_dense_layer_with_zeros_in_the_others(out, chosen, bias, seed):
    columns = sorted(chosen)
    torch.manual_seed(seed)
    inner = torch.nn.Linear(len(columns), out, bias)
    layer = SelectedLinear(inner, columns, 9)
    weight = torch.zeros(out, 9)
    weight[:, columns] = inner.weight.detach()
    assert torch.equal(layer.dense(), weight)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, inner.bias))
    assert layer.parameters_stored == out * len(columns) + out * bias
    assert layer.bytes == 4 * layer.parameters_stored + 8 * len(columns)


@pytest.mark.parametrize("columns", [[0], [0, 3, 2], [0, 1, 9], [-1, 0, 1], [1, 1, 2]])
def test_columns_that_do_not_fit_are_refused(columns):
    with pytest.raises(MatrixError, match="Correct the columns"):
        SelectedLinear(torch.nn.Linear(3, 2), columns, 9)


@pytest.mark.parametrize("inner", [torch.nn.Linear(4, 5), FactoredLinear(4, 5, 2), PivotedLinear(4, 5, 3)])
def test_a_selected_layer_is_built_again_from_its_description(inner):
    layer = SelectedLinear(inner, [0, 2, 3, 6], 7)
    if isinstance(inner, FactoredLinear | PivotedLinear):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
    stored = StoredLayer.from_json(stored_as(layer).to_json())
    assert stored == stored_as(layer)
    again = empty_layer(stored, bias=True)
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.dense(), layer.dense())


def narrowed(shape, rank, rows=None, columns=None):
    """Factors of a matrix with zeros outside some rows and columns."""
    out, into = shape
    rows, columns = rows or list(range(out)), columns or list(range(into))
    small = cut(decompose(torch.randn(len(rows), len(columns))), rank)
    U, Vh = torch.zeros(out, rank), torch.zeros(rank, into)
    U[rows], Vh[:, columns] = small.U, small.Vh
    return Spectrum(U, small.S, Vh)


@pytest.mark.parametrize("storage", ["factored", "pivoted", None])
@pytest.mark.parametrize("rank", [3, 7])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_removed_neurons_are_not_stored_and_the_model_is_the_one_with_zeros(name, rank, storage, tmp_path):
    torch.manual_seed(0)
    model = tiny.build(name)
    chosen = [m for m in partition(find_matrices(model)) if m.layer == 0 and m.type in ("fc_in", "fc_up", "fc_out")]
    kept = [1, 4, 5, 9, 10, 17, 20]
    factors = {}
    for matrix in chosen:
        which = {"columns": kept} if matrix.type == "fc_out" else {"rows": kept}
        factors[matrix.name] = narrowed(matrix.shape, rank, **which)
    edits = [make_edit(m, rank / m.rank).model_copy(update={"weighting": "whiten", "rank": rank}) for m in chosen]
    zeros = copy.deepcopy(model)
    for matrix in chosen:
        write(zeros, matrix, dense(factors[matrix.name]))
    made = factor_(model, edits, factors=factors, storage=storage)
    inputs = tiny.inputs(name)
    with torch.inference_mode():
        expected = zeros(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    weights = {m.parameter: m for m in chosen}
    assert {type(model.get_submodule(p.removesuffix(".weight"))) for p in weights} == {RowBlockedLinear, SelectedLinear}
    width = chosen[0].shape[1]
    each = len(kept) * width if rank == len(kept) else rank * (len(kept) + width - (storage != "factored") * rank)
    numbers = sum(m.shape[0] * m.shape[1] for m in chosen)
    if storage is not None or rank == len(kept):
        assert made.before.parameters - made.after.parameters == numbers - each * len(chosen)
    eckart.save(model, tmp_path / "out", tiny.tokenizer())
    again = load_model(str(tmp_path / "out"))
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        torch.testing.assert_close(again.dequantize()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
