"""Cuts in a metric: optimal by theorem, and finite whatever the statistics."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.errors import ModelError
from eckart.weighting import as_spectrum, decompose_weighted, diagonal_root, shrunk, square_root


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, samples, seed=0):
    x = normal(samples, size, seed=seed) * torch.linspace(0.2, 3, size, dtype=torch.float64)
    return x.T @ x / samples


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_on_the_inputs_is_the_norm_of_the_discarded_components(shape, rank):
    weight, inputs = normal(*shape), normal(100, shape[1], seed=1) * 3
    found = decompose_weighted(weight, None, square_root(inputs.T @ inputs))
    up, down = found.factors(rank)
    error = torch.linalg.matrix_norm((weight - up @ down) @ inputs.T)
    torch.testing.assert_close(error, found.S[rank:].norm())


@given(st.integers(0, 50))
def test_no_other_matrix_of_the_rank_is_closer_in_both_metrics(seed):
    weight, A, G = normal(6, 5, seed=seed), moment(5, 40, seed + 1), moment(6, 40, seed + 2)
    up, down = decompose_weighted(weight, square_root(G), square_root(A)).factors(2)

    def error(cut):
        change = weight - cut
        return float(torch.trace(G @ change @ A @ change.T))

    best = error(up @ down)
    other = normal(6, 2, seed=seed + 3) @ normal(2, 5, seed=seed + 4)
    nearby = (up + 0.01 * normal(6, 2, seed=seed)) @ down
    svd = torch.linalg.svd(weight, full_matrices=False)
    plain = (svd.U[:, :2] * svd.S[:2]) @ svd.Vh[:2]
    assert all(best <= error(cut) + 1e-9 for cut in (other, nearby, plain))


def test_the_discarded_components_predict_the_error_in_both_metrics():
    weight, A, G = normal(6, 5), moment(5, 40), moment(6, 40)
    found = decompose_weighted(weight, square_root(G), square_root(A))
    up, down = found.factors(3)
    change = weight - up @ down
    torch.testing.assert_close(torch.trace(G @ change @ A @ change.T), (found.S[3:] ** 2).sum())


def test_without_metrics_it_is_the_ordinary_decomposition():
    weight = normal(7, 4)
    torch.testing.assert_close(decompose_weighted(weight).S, torch.linalg.svdvals(weight))


def test_any_square_root_of_a_metric_gives_the_same_cut():
    weight, A = normal(6, 5), moment(5, 40)
    values, vectors = torch.linalg.eigh(A)
    by_eigenvalues = torch.linalg.svd(weight @ (vectors * values.sqrt()), full_matrices=False)
    cut = (by_eigenvalues.U[:, :2] * by_eigenvalues.S[:2]) @ by_eigenvalues.Vh[:2] / values.sqrt() @ vectors.T
    up, down = decompose_weighted(weight, None, square_root(A)).factors(2)
    torch.testing.assert_close(up @ down, cut)


BAD = {
    "zero": torch.zeros(5, 5),
    "one sample": moment(5, 1),
    "a dead input": moment(5, 40) * torch.tensor([1, 1, 0, 1, 1]) * torch.tensor([[1], [1], [0], [1], [1]]),
    "huge": moment(5, 40) * 1e30,
    "tiny": moment(5, 40) * 1e-30,
    "rounded": moment(5, 3).half(),
    "not quite positive": moment(5, 3) - 1e-9 * torch.eye(5),
    "one direction": torch.ones(5, 5),
}


@pytest.mark.parametrize(("one", "other"), itertools.product(BAD, BAD))
def test_whatever_the_metrics_a_cut_is_finite_and_of_full_rank_it_is_the_weight(one, other):
    weight = normal(5, 5)
    found = decompose_weighted(weight, square_root(BAD[one]), square_root(BAD[other]))
    for rank in (1, 3):
        up, down = found.factors(rank)
        assert bool(torch.isfinite(up @ down).all())
    up, down = found.factors(5)
    torch.testing.assert_close(up @ down, weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BAD)
def test_a_root_tells_how_it_was_found_and_its_inverse_is_one(name):
    root = square_root(BAD[name])
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(root.undone_after(root.after(eye)), eye, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(root.solve_after(root.after(eye) @ root.before(eye)), eye, atol=1e-4, rtol=1e-4)
    assert (root.how == "identity") == (name == "zero")
    assert (root.how == "cholesky") == (name in ("huge", "tiny"))


def test_shrinking_keeps_the_trace():
    A = moment(5, 40)
    assert float(shrunk(A, 0.3).trace()) == pytest.approx(float(A.trace()))


def test_what_is_not_finite_is_refused():
    with pytest.raises(ModelError, match="NaN or infinity"):
        square_root(torch.full((2, 2), torch.nan))
    with pytest.raises(ModelError, match="NaN or infinity"):
        diagonal_root(torch.tensor([1.0, torch.inf]))


def test_a_product_is_written_as_its_decomposition():
    up, down = normal(6, 3), normal(3, 5)
    found = as_spectrum(up, down)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, up @ down)
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.S, torch.linalg.svdvals(up @ down)[:3])
