"""Truncation is what Eckart and Young say it is. Oracles: theorems and torch.linalg."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.errors import RankError
from eckart.truncation import (
    cut,
    decompose,
    decompose_approximately,
    dense,
    magnitude,
    rank_of,
    seed_for,
)

SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7)]


def matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_a_cut_is_the_norm_of_the_discarded_singular_values(shape):
    weight = matrix(shape)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(shape) + 1):
        error = torch.linalg.matrix_norm(weight - dense(cut(decompose(weight), rank)))
        torch.testing.assert_close(error, values[rank:].norm(), atol=1e-12, rtol=1e-9)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.data())
@settings(max_examples=50, deadline=None)
def test_no_other_matrix_of_the_same_rank_is_closer(out, into, seed, data):
    weight = matrix((out, into), seed)
    rank = data.draw(st.integers(1, min(out, into)))
    error = torch.linalg.matrix_norm(weight - dense(cut(decompose(weight), rank)))
    left, right = matrix((out, rank), seed + 1), matrix((rank, into), seed + 2)
    # The best right factor for a given left one, by least squares: still not better.
    rival = left @ torch.linalg.lstsq(left, weight).solution
    assert error <= torch.linalg.matrix_norm(weight - rival) + 1e-9
    assert error <= torch.linalg.matrix_norm(weight - left @ right) + 1e-9
    assert torch.linalg.matrix_rank(dense(cut(decompose(weight), rank))) <= rank


@pytest.mark.parametrize("shape", SHAPES)
def test_top_and_bottom_are_complementary(shape):
    weight = matrix(shape)
    spectrum = decompose(weight)
    for rank in range(1, min(shape)):
        rest = min(shape) - rank
        total = dense(cut(spectrum, rank)) + dense(cut(spectrum, rest, basis="bottom"))
        torch.testing.assert_close(total, weight)


def test_the_random_basis_is_seeded_and_keeps_components_of_the_matrix():
    spectrum = decompose(matrix((12, 10)))
    first, again = (cut(spectrum, 4, basis="random", seed=3) for _ in range(2))
    assert torch.equal(first.S, again.S)
    assert not torch.equal(first.S, cut(spectrum, 4, basis="random", seed=4).S)
    assert all(value in spectrum.S for value in first.S)
    assert torch.equal(first.S, first.S.sort(descending=True).values)


def test_random_bases_of_many_seeds_use_every_component_equally():
    spectrum = decompose(matrix((10, 10)))
    counts = torch.zeros(10)
    for seed in range(1000):
        counts += torch.isin(spectrum.S, cut(spectrum, 3, basis="random", seed=seed).S)
    # Each count is binomial(1000, 0.3): standard deviation 14.5.
    assert (counts - 300).abs().max() < 75


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype):
    weight = matrix((6, 9), dtype=dtype)
    spectrum = decompose(weight)
    assert spectrum.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(dense(spectrum), weight.to(spectrum.S.dtype), atol=1e-5, rtol=1e-5)


def test_the_rank_of_a_fraction_is_not_lowered_by_floats():
    assert rank_of(0.01, (1600, 6400)) == 16
    assert rank_of(0.01, (3200, 3200)) == 32
    # What the LASER reference computes: one too few.
    assert int(1600 * ((10 - 9.9) * 0.1)) == 15


@given(st.integers(1, 20_000), st.integers(0, 100))
def test_the_rank_of_a_percentage_is_the_exact_floor_and_at_least_one(size, percent):
    if percent:
        assert rank_of(percent / 100, (size, size + 3)) == max(1, size * percent // 100)


@pytest.mark.parametrize("rho", [0, -0.1, 1.0001, math.nan, math.inf])
def test_a_fraction_outside_its_range_is_refused(rho):
    with pytest.raises(RankError, match="above 0"):
        rank_of(rho, (4, 4))
    with pytest.raises(RankError, match="above 0"):
        magnitude(torch.ones(2, 2), rho)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_outside_its_range_is_refused(rank):
    with pytest.raises(RankError, match="from 1 to 5"):
        cut(decompose(matrix((8, 5))), rank)
    with pytest.raises(RankError, match="from 1 to 5"):
        decompose_approximately(matrix((8, 5)), rank)


def test_the_approximate_decomposition_is_seeded_and_leaves_the_global_generator_alone():
    weight = matrix((40, 30))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = (decompose_approximately(weight, 4, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.U, again.U)
    assert not torch.equal(first.U, decompose_approximately(weight, 4, seed=2).U)


def test_the_approximate_decomposition_nears_the_exact_one_and_never_beats_it():
    weight = matrix((60, 40))
    best = torch.linalg.svdvals(weight)[5:].norm()
    errors = [
        torch.linalg.matrix_norm(weight - dense(decompose_approximately(weight, 5, niter=niter)))
        for niter in (0, 2, 20)
    ]
    assert all(error >= best - 1e-9 for error in errors)
    assert errors[2] <= 1.01 * best
    assert errors[0] > 1.01 * best


@pytest.mark.parametrize("rho", [0.1, 0.25, 0.5, 0.99, 1.0])
def test_magnitude_pruning_zeroes_the_smallest_entries(rho):
    weight = matrix((10, 10))
    pruned = magnitude(weight, rho)
    removed = sorted(weight.abs().flatten().tolist())[: math.floor((1 - rho) * 100 + 1e-9)]
    assert (pruned == 0).sum() == len(removed)
    kept = pruned[pruned != 0].abs()
    assert not removed or kept.min() > max(removed)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_seeds_of_matrices_differ_and_stay():
    assert seed_for(0, "a") != seed_for(0, "b")
    assert seed_for(0, "a") != seed_for(1, "a")
    assert seed_for(7, "model.layers.3.mlp.gate_proj") == seed_for(7, "model.layers.3.mlp.gate_proj")
    assert 0 <= seed_for(0, "") < 2**31
