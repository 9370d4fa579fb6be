"""Corrections and merged starts. Oracles: Eckart-Young by torch.linalg, and the activations themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.dataflow import low_rank_layers
from eckart.factoring import factor_
from eckart.initialisation import balance_, correction, dense_weights, initialise_, input_moments, merged, pivot_
from eckart.linear import FactoredLinear, PivotedLinear, SelectedLinear
from eckart.matrices import find_matrices
from eckart.surgery import make_edit
from eckart.truncation import cut, decompose

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))


def product(spectrum):
    return spectrum.U * spectrum.S @ spectrum.Vh


def example(shape):
    out, into, seed = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=generator, dtype=torch.float64)
    base = weight + 0.3 * torch.randn(out, into, generator=generator, dtype=torch.float64)
    inputs = torch.randn(60, into, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, into)
    return weight, base, inputs


@given(shape=shapes, rank=st.integers(0, 9))
def test_the_plain_correction_is_the_best_of_its_rank(shape, rank):
    weight, base, _ = example(shape)
    rank = min(rank, *weight.shape)
    error = weight - base - product(correction(weight, base, rank))
    tail = torch.linalg.svdvals(weight - base)[rank:].square().sum()
    torch.testing.assert_close(error.square().sum(), tail)


@given(shape=shapes, rank=st.integers(1, 9))
def test_the_output_correction_reaches_the_bound_on_the_outputs_and_beats_the_plain_one(shape, rank):
    weight, base, inputs = example(shape)
    rank = min(rank, *weight.shape)
    moments = inputs.T @ inputs / len(inputs)

    def missed(found):
        return ((weight - base - product(found)) @ inputs.T).square().sum() / len(inputs)

    # Any square root gives the bound: here a Cholesky factor, where the code takes the symmetric one.
    bound = torch.linalg.svdvals((weight - base) @ torch.linalg.cholesky(moments))[rank:].square().sum()
    best = missed(correction(weight, base, rank, moments))
    torch.testing.assert_close(best, bound, rtol=1e-6, atol=1e-9)
    assert best <= missed(correction(weight, base, rank)) + 1e-9


@given(shape=shapes, rank=st.integers(1, 9), replaced=st.integers(1, 9), metric=st.booleans())
def test_where_the_layer_is_best_already_in_the_same_metric_the_start_changes_nothing(shape, rank, replaced, metric):
    """The alternation of LoftQ without a quantiser is at its fixed point after one step."""
    weight, _, inputs = example(shape)
    rank = min(rank, *weight.shape)
    moments = inputs.T @ inputs / len(inputs) if metric else None
    best = product(correction(weight, torch.zeros_like(weight), rank, moments))
    torch.testing.assert_close(product(merged(weight, best, rank, replaced, moments)), best, rtol=1e-5, atol=1e-7)


@given(shape=shapes, rank=st.integers(1, 9))
def test_replacing_every_component_gives_the_best_of_that_rank_whatever_was_there(shape, rank):
    weight, base, _ = example(shape)
    rank = min(rank, *weight.shape)
    found = product(merged(weight, base, rank, 99))
    U, S, Vh = torch.linalg.svd(weight)
    torch.testing.assert_close(found, U[:, :rank] * S[:rank] @ Vh[:rank])


@given(shape=shapes, rank=st.integers(2, 9), replaced=st.integers(1, 8))
def test_the_correction_of_what_is_kept_is_never_worse_than_what_it_replaces(shape, rank, replaced):
    weight, base, _ = example(shape)
    rank = min(rank, *weight.shape)
    U, S, Vh = torch.linalg.svd(base)
    base = U[:, :rank] * S[:rank] @ Vh[:rank]
    found = merged(weight, base, rank, replaced)
    assert len(found.S) == rank
    assert (weight - product(found)).norm() <= (weight - base).norm() + 1e-9


def test_inputs_that_never_vary_do_not_make_the_correction_infinite():
    weight, base, inputs = example((5, 4, 0))
    inputs[:, 2] = 0
    found = product(correction(weight, base, 2, inputs.T @ inputs / len(inputs)))
    assert torch.isfinite(found).all()
    nothing = product(correction(weight, base, 2, torch.zeros(4, 4)))
    assert torch.isfinite(nothing).all()


def test_moments_are_those_of_what_enters_the_layer():
    model = tiny.build("llama")
    path = "model.layers.1.mlp.down_proj"
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = [torch.arange(5, 21).reshape(2, 8), torch.arange(30, 46).reshape(2, 8)]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    handle.remove()
    x = torch.cat([part.reshape(-1, 48) for part in seen]).double()
    found = input_moments(model, [path, "model.layers.0"], batches)[path]
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "falcon"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("metric", [False, True])
def test_every_storage_takes_the_start_at_unchanged_rank(name, storage, metric):
    teacher, model = tiny.build(name), tiny.build(name)
    rho = 0.3 if storage == "factored" else 0.6
    matrices = [m for m in find_matrices(model) if m.layer is not None and not m.whole and m.type != "other"]
    with torch.no_grad():  # cut from other weights, so that there is something to gain
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    factor_(model, [make_edit(m, rho) for m in matrices], at_most=1.0)
    before = {key: (t.shape, t.dtype) for key, t in model.state_dict().items()}
    wanted = dense_weights(model, teacher)
    errors = {path: (layer.dense() - wanted[path]).norm() for path, layer in low_rank_layers(model).items()}
    assert errors
    batches = [torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(2))]
    moments = input_moments(teacher, list(wanted), batches) if metric else None
    initialise_(model, wanted, 10**6, moments)
    assert {key: (t.shape, t.dtype) for key, t in model.state_dict().items()} == before
    for path, layer in low_rank_layers(model).items():
        if not metric:
            assert (layer.dense() - wanted[path]).norm() < errors[path]
        assert torch.isfinite(layer.dense()).all()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=batches[0]).logits).all()


@pytest.mark.parametrize("name", ["llama", "bloom"])  # in bloom pivoted blocks lie in row-blocked layers
def test_balanced_layers_are_the_same_matrices_with_factors_of_equal_norm_and_pivot_back(name):
    model = tiny.build(name)
    edits = [make_edit(m, 0.4) for m in find_matrices(model) if m.layer is not None and "qkv" not in m.type]
    factor_(model, edits)
    before = {path: layer.dense() for path, layer in low_rank_layers(model).items()}
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}
    given = balance_(model)
    assert given
    assert not any(isinstance(module, PivotedLinear) for module in model.modules())
    for path in given:
        layer = model.get_submodule(path)
        up, down = layer.up.weight, layer.down.weight
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up.T @ up, torch.diag((up.T @ up).diagonal()), rtol=1e-4, atol=1e-5)
    for path, layer in low_rank_layers(model).items():
        torch.testing.assert_close(layer.dense(), before[path], rtol=1e-4, atol=1e-6)
    pivot_(model, given)
    for path, layer in low_rank_layers(model).items():
        torch.testing.assert_close(layer.dense(), before[path], rtol=1e-4, atol=1e-6)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()} == shapes


def test_a_layer_that_reads_some_inputs_is_initialised_on_these():
    torch.manual_seed(0)
    columns = [0, 2, 3, 5, 6]
    inner = FactoredLinear.from_spectrum(cut(decompose(torch.randn(8, 5)), 3))
    model = torch.nn.Sequential(SelectedLinear(inner, columns, 7))
    weight, moments = torch.randn(8, 7), torch.eye(7)
    initialise_(model, {"0": weight}, 3, {"0": moments})
    best = cut(decompose(weight[:, columns]), 3)
    torch.testing.assert_close(model[0].dense()[:, columns], product(best), rtol=1e-4, atol=1e-5)
    assert model[0].dense()[:, [1, 4]].abs().max() == 0
