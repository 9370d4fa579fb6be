"""Singular values are those of torch.linalg, at the error that is stated, and the measures are what they are called."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eckart import spectrum
from eckart.errors import SpectrumError
from eckart.spectrum import (
    fast_singular_values,
    fit_power_law,
    gaps,
    hill,
    leading_singular_values,
    measure,
    measure_heads,
    reduce_to_band,
    singular_values,
)

SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7), (7, 1), (1, 1), (40, 90)]
FLOAT32 = torch.finfo(torch.float32).eps


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values, shape, seed=0):
    """A float64 matrix whose singular values are known."""
    left = torch.linalg.qr(gaussian((shape[0], len(values)), seed)).Q
    right = torch.linalg.qr(gaussian((shape[1], len(values)), seed + 1)).Q
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_singular_values_of_every_dtype_are_those_of_its_numbers_in_float64(shape, dtype):
    weight = gaussian(shape).to(dtype)
    before = weight.clone()
    found = singular_values(weight)
    expected = torch.linalg.svdvals(weight.double())
    assert found.dtype == torch.float64
    assert torch.equal(weight, before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected[0]))


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9, 0.0])
def test_singular_values_of_an_ill_conditioned_float32_matrix_are_exact_too(smallest):
    weight = with_values([1.0, 0.5, 0.1, smallest], (30, 4)).float()
    found, expected = singular_values(weight), torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100, 289, 300])
def test_a_band_has_the_eigenvalues_of_the_whole(size):
    whole = gaussian((size, size))
    whole = whole + whole.mT
    band = reduce_to_band(whole.clone())
    assert band.shape == (spectrum.BAND + 1, size)
    dense = torch.zeros(size, size, dtype=torch.float64)
    for offset in range(min(size, spectrum.BAND + 1)):
        dense += torch.diag(band[offset, : size - offset], -offset)
        assert not band[offset, size - offset :].any()
    torch.testing.assert_close(torch.linalg.eigvalsh(dense), torch.linalg.eigvalsh(whole), atol=1e-11, rtol=1e-11)


def test_a_band_of_a_diagonal_or_of_zeros_needs_no_reflection():
    for whole in (torch.zeros(80, 80), torch.diag(torch.arange(80.0))):
        band = reduce_to_band(whole.clone())
        torch.testing.assert_close(band[0].abs().sort().values, whole.diagonal().sort().values)
        assert not band[1:].any()


@pytest.mark.parametrize("shape", [(300, 300), (300, 700), (700, 300), (520, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outlier", [0.0, 3.0, 100.0])
def test_fast_singular_values_keep_the_error_that_is_stated(shape, dtype, outlier, monkeypatch):
    monkeypatch.setattr(spectrum, "SMALL", 32)
    lifted = gaussian((shape[0], 1), 1) @ gaussian((1, shape[1]), 2)
    weight = (gaussian(shape) + outlier * lifted).to(dtype)
    found, expected = fast_singular_values(weight), torch.linalg.svdvals(weight.double())
    unit = FLOAT32 if outlier < 10 else torch.finfo(torch.float64).eps
    error = 4 * math.sqrt(min(shape)) * unit
    bound = torch.minimum(error * expected[0] ** 2 / expected, math.sqrt(error) * expected[0].expand_as(expected))
    assert found.dtype == torch.float64
    assert ((found - expected).abs() <= bound).all()
    mean = expected.square().mean().sqrt()
    typical = (expected - mean).abs().argmin()
    assert (found[typical] - expected[typical]).abs() <= spectrum.FAST_ERROR * expected[typical]


def test_fast_singular_values_of_zeros_are_zeros(monkeypatch):
    monkeypatch.setattr(spectrum, "SMALL", 32)
    assert torch.equal(fast_singular_values(torch.zeros(70, 90)), torch.zeros(70, dtype=torch.float64))


def test_leading_values_are_within_their_bounds_and_near_the_truth():
    weight = with_values([2.0 ** -(k / 4) for k in range(120)], (200, 150)).float()
    expected = torch.linalg.svdvals(weight.double())
    for view in (weight, weight.mT):
        found, bounds = leading_singular_values(view, 10)
        assert ((found - expected[:10]).abs() <= bounds + 1e-12).all()
        torch.testing.assert_close(found, expected[:10], rtol=1e-8, atol=0)


def test_leading_values_of_noise_are_never_above_the_truth_and_their_bounds_hold():
    weight = gaussian((300, 250))
    expected = torch.linalg.svdvals(weight)
    found, bounds = leading_singular_values(weight, 12, iterations=2)
    assert (found <= expected[:12] + 1e-9).all()
    assert (bounds > 0).all()
    for value, bound in zip(found, bounds):
        assert (expected - value).abs().min() <= bound + 1e-9


def test_all_leading_values_are_all_values():
    weight = gaussian((9, 6))
    found, _ = leading_singular_values(weight, 6)
    torch.testing.assert_close(found, torch.linalg.svdvals(weight))
    with pytest.raises(SpectrumError, match="Ask for 1 to 6"):
        leading_singular_values(weight, 7)


def test_measures_of_equal_values_are_the_whole_rank():
    found = measure(torch.full((16,), 3.0))
    assert found.energy == pytest.approx(144)
    assert (found.norm, found.condition, found.gap) == (3.0, 1.0, 1.0)
    assert found.stable_rank == pytest.approx(16)
    assert found.effective_rank == pytest.approx(16)
    assert found.spectral_entropy == pytest.approx(math.log(16))


def test_measures_of_rank_one_are_one():
    found = measure(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    assert found.stable_rank == found.effective_rank == 1
    assert found.spectral_entropy == 0
    assert found.condition == math.inf
    assert (found.gap, found.gap_rank) == (math.inf, 1)


def test_measures_agree_with_norms_and_condition_of_torch():
    weight = gaussian((30, 20))
    found = measure(singular_values(weight))
    assert found.energy == pytest.approx(float(torch.linalg.matrix_norm(weight)) ** 2)
    assert found.norm == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)))
    assert found.condition == pytest.approx(float(torch.linalg.cond(weight)))
    S = torch.linalg.svdvals(weight).numpy()
    assert found.effective_rank == pytest.approx(math.exp(stats.entropy(S)))
    assert found.spectral_entropy == pytest.approx(stats.entropy(S**2))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_ranks_and_exponents_do_not_depend_on_the_scale_and_are_within_their_ranges(values, scale):
    one, other = measure(torch.tensor(values)), measure(torch.tensor(values, dtype=torch.float64) * scale)
    for name in ("stable_rank", "effective_rank", "spectral_entropy", "condition", "gap"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5, abs=1e-6)
    assert 1 - 1e-9 <= one.stable_rank <= len(values) + 1e-9
    assert 1 - 1e-9 <= one.effective_rank <= len(values) + 1e-9
    assert 0 <= one.spectral_entropy <= math.log(len(values)) + 1e-9


def test_the_measures_of_zeros_are_not_numbers_and_raise_nothing():
    found = measure(torch.zeros(4))
    assert found.energy == 0
    assert math.isnan(found.stable_rank)


def test_the_largest_gap_is_where_the_signal_ends():
    values = torch.tensor([9.0, 8.0, 7.0, 1.0, 0.9, 0.8, 0.7, 0.01])
    found = measure(values)
    assert found.gap == pytest.approx(7.0)
    assert found.gap_rank == 3  # the last value is nearly zero, but not in the upper half
    np.testing.assert_allclose(gaps(values), (values[:-1] / values[1:]).numpy(), rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_exponents_of_drawn_power_laws_are_found_within_their_standard_error(alpha):
    draws = stats.pareto(alpha - 1).rvs(4000, random_state=np.random.default_rng(1))
    values = torch.from_numpy(np.sqrt(draws))
    found = fit_power_law(values)
    assert abs(found.alpha - alpha) < 4 * (alpha - 1) / math.sqrt(found.count)
    assert found.distance < 1.63 / math.sqrt(found.count)  # the 1 % point of Kolmogorov's test
    assert abs(hill(values) - alpha) < 4 * (alpha - 1) / math.sqrt(400)


def test_the_power_law_is_that_of_a_plain_search_with_scipy():
    S = singular_values(gaussian((40, 60)))
    x = np.sort(S.numpy() ** 2)
    best = None
    for start in range(len(x) - spectrum.LEAST_TAIL + 1):
        tail = x[start:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        distance = stats.kstest(tail, stats.pareto(alpha - 1, scale=tail[0]).cdf).statistic
        if best is None or distance < best[0]:
            best = (distance, alpha, tail[0], len(tail))
    found = fit_power_law(S)
    assert (found.distance, found.alpha, found.start, found.count) == pytest.approx(best)


def test_noise_is_a_bad_power_law_and_a_heavy_tail_a_good_one():
    noise = fit_power_law(singular_values(gaussian((200, 400))))
    tail = fit_power_law(torch.from_numpy(stats.pareto(1.5).rvs(200, random_state=np.random.default_rng(0)) ** 0.5))
    assert noise.alpha > 5 > tail.alpha


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_measures_of_heads_are_those_of_their_slices(axis):
    weight = gaussian((12, 18)).float()
    found = measure_heads(weight, 3, axis=axis)
    parts = weight.split(4, 0) if axis == "rows" else weight.split(6, 1)
    for one, part in zip(found, parts):
        assert one.norm == pytest.approx(float(torch.linalg.matrix_norm(part, 2)), rel=1e-5)
    assert len(found) == 3
    with pytest.raises(SpectrumError, match="5 heads do not divide"):
        measure_heads(weight, 5, axis=axis)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(0, 4), torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), math.nan)]
)
def test_what_has_no_singular_values_is_refused(weight):
    for compute in (singular_values, fast_singular_values):
        with pytest.raises(SpectrumError):
            compute(weight)


@pytest.mark.parametrize("values", [torch.tensor([1.0, math.inf]), torch.tensor([-1.0]), torch.zeros(0)])
def test_what_are_not_singular_values_is_refused(values):
    with pytest.raises(SpectrumError, match="not the singular values"):
        measure(values)
