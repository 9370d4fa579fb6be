"""Random-matrix laws have their known values, and rank rules find planted ranks. Oracles: papers, scipy, sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from eckart import noise
from eckart.errors import SpectrumError
from eckart.noise import RANK_RULES, NoiseFit, rank_by, shrink

RATIOS = [1.0, 0.75, 0.5, 0.372, 0.25, 0.01]


def values_of(shape, *, rank=0, seed=0, sigma=1.0, strengths=(1.5, 4.0)):
    """Singular values of noise with a planted signal, its strengths in units of the edge, and the signal's own."""
    generator = torch.Generator().manual_seed(seed)
    weight = sigma * torch.randn(shape, generator=generator, dtype=torch.float64)
    edge = sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    signal = edge * torch.linspace(*strengths, rank, dtype=torch.float64)
    sides = [torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64)).Q for side in shape]
    return torch.linalg.svdvals(weight + (sides[0] * signal) @ sides[1].mT), signal


@pytest.mark.parametrize("beta", RATIOS)
def test_the_marchenko_pastur_distribution_is_the_integral_of_its_density(beta):
    low, high = noise.support(beta)
    for x in np.linspace(low, high, 9)[1:]:
        # Substituted so that the root at either end is smooth.
        area, _ = integrate.quad(
            lambda u: float(noise.density(np.array(low + u * u), beta)) * 2 * u, 0, math.sqrt(x - low), limit=200
        )
        assert float(noise.cumulative(np.array(x), beta)) == pytest.approx(area, abs=1e-7)
    assert float(noise.cumulative(np.array(high), beta)) == 1.0
    assert float(noise.cumulative(np.array(low), beta)) == 0.0
    assert float(noise.density(np.array(high * 1.01), beta)) == 0.0


@pytest.mark.parametrize("beta", RATIOS)
def test_the_marchenko_pastur_law_has_mean_one_and_variance_beta(beta):
    x = noise.quantiles((np.arange(20000) + 0.5) / 20000, beta)
    assert x.mean() == pytest.approx(1, abs=1e-3)
    assert x.var() == pytest.approx(beta, rel=5e-3)


@given(st.floats(0.01, 1), st.floats(0.001, 0.999))
@settings(max_examples=60, deadline=None)
def test_quantiles_invert_the_distribution(beta, probability):
    x = noise.quantiles(np.array(probability), beta)
    assert float(noise.cumulative(x, beta)) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "omega"),
    [(1, 2.8584), (0.75, 2.5014), (0.5, 2.1712), (4096 / 11008, 2.0032), (2 / 7, 1.8866), (0.25, 1.8369)],
)
def test_the_threshold_for_unknown_noise_has_its_known_values(beta, omega):
    found = noise.gavish_donoho_coefficient(beta) / math.sqrt(noise.median(beta))
    assert found == pytest.approx(omega, abs=6e-5)
    assert found == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)


def test_the_threshold_for_known_noise_is_four_over_root_three_for_a_square():
    assert noise.gavish_donoho_coefficient(1.0) == pytest.approx(4 / math.sqrt(3))
    values = torch.linspace(1, 0.1, 5)
    assert noise.gavish_donoho_edge(values, (5, 5), sigma=0.5) == pytest.approx(4 / math.sqrt(3) * math.sqrt(5) * 0.5)


@pytest.mark.parametrize(("level", "quantile"), [(0.1, 0.4501), (0.05, 0.9793), (0.01, 2.0234)])
def test_tracy_widom_quantiles_are_the_published_ones(level, quantile):
    assert noise.tracy_widom_quantile(level) == pytest.approx(quantile, abs=6e-5)


def test_the_tracy_widom_law_has_its_published_mean_and_variance():
    grid = np.linspace(-9, 7, 161)
    below = np.array([noise._tracy_widom(s) for s in grid])
    mean = 7 - integrate.trapezoid(below, grid)
    second = 49 - integrate.trapezoid(2 * grid * below, grid)
    assert mean == pytest.approx(-1.2065335745820, abs=1e-3)
    assert second - mean**2 == pytest.approx(1.607781034581, abs=5e-3)


@pytest.mark.parametrize(
    ("beta", "ratio", "kept"), [(1.0, 0.648, 0.237), (0.5, 0.436, 0.649), (0.372, 0.373, 0.844), (0.25, 0.303, 1.0)]
)
def test_the_laserrmt_threshold_is_far_below_the_edge_of_pure_noise(beta, ratio, kept):
    """By the law itself, without sampling: singular values at evenly spaced quantiles."""
    N = 4000
    M = round(N * beta)
    S = torch.from_numpy(np.sqrt(N * noise.quantiles((np.arange(M) + 0.5) / M, M / N)))
    threshold = noise.laserrmt_edge(S, (M, N))
    assert threshold / (math.sqrt(N) + math.sqrt(M)) == pytest.approx(ratio, abs=0.002)
    assert float((threshold < S).double().mean()) == pytest.approx(kept, abs=0.005)


def test_the_laserrmt_threshold_is_its_code():
    S = torch.linalg.svdvals(torch.randn(20, 50, generator=torch.Generator().manual_seed(0)))
    spread = (torch.quantile(S, 0.75) - torch.quantile(S, 0.25)) / 1.349
    expected = spread * math.sqrt((1 + math.sqrt(20 / 50)) ** 2)
    assert noise.laserrmt_edge(S, (20, 50)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(300, 300), (200, 400), (600, 222), (150, 600)])
@pytest.mark.parametrize("fitted", [noise.fit, noise.fit_median, noise.fit_bema])
def test_every_fit_finds_the_scale_of_pure_noise(shape, fitted):
    S, _ = values_of(shape, sigma=0.02)
    assert fitted(S, shape).sigma == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("shape", [(300, 300), (200, 400), (600, 222), (150, 600)])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_the_iterated_fit_has_no_bias_where_signal_is_dense_and_the_others_have(shape, share):
    rank = round(share * min(shape))
    S, _ = values_of(shape, rank=rank, sigma=0.02)
    assert noise.fit(S, shape).sigma == pytest.approx(0.02, rel=0.02)
    assert noise.fit(S, shape).signal == pytest.approx(rank, abs=1)
    if share == 0.4:
        assert noise.fit_median(S, shape).sigma > 1.15 * 0.02
        assert noise.fit_bema(S, shape).sigma > 1.15 * 0.02


@pytest.mark.parametrize("shape", [(200, 200), (120, 240), (111, 300), (100, 400)])
def test_false_alarms_on_pure_noise_are_as_frequent_as_the_level_says(shape):
    trials, level = 60, 0.05
    alarms = dict.fromkeys(("tw", "bema"), 0)
    for seed in range(trials):
        S, _ = values_of(shape, seed=seed)
        for name in alarms:
            alarms[name] += rank_by(name, S, shape) > 0
    # At most this many, but for a chance of one in a thousand, if the true level is the stated one.
    assert max(alarms.values()) <= 10
    S, _ = values_of(shape, seed=1)
    assert noise.tracy_widom_edge(S, shape, level=0.01) > noise.tracy_widom_edge(S, shape, level=level)


@pytest.mark.parametrize("shape", [(300, 300), (200, 400), (222, 600), (150, 600)])
@pytest.mark.parametrize("rank", [0, 5, 40])
def test_planted_ranks_are_found(shape, rank):
    S, _ = values_of(shape, rank=rank, seed=3)
    for name in ("mp", "tw", "gavish-donoho", "bema"):
        assert rank_by(name, S, shape) == pytest.approx(rank, abs=1), name


def test_laserrmt_finds_no_planted_rank():
    """Table of the reference: 182, 181 and 175 at ranks 0, 20 and 150 of 768."""
    for rank, kept in ((0, 182), (20, 181), (150, 175)):
        S, _ = values_of((768, 768), rank=rank, seed=rank)
        assert rank_by("laserrmt", S, (768, 768)) == pytest.approx(kept, abs=8)


@pytest.mark.parametrize("rule", RANK_RULES)
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_every_rule_gives_a_rank_that_fits_and_does_not_depend_on_scale_order_or_side(rule, shape, seed, scale):
    S, _ = values_of(shape, seed=seed)
    rank = rank_by(rule, S, shape)
    assert 0 <= rank <= min(shape)
    assert rank_by(rule, S.flip(0), shape[::-1]) == rank
    assert abs(rank_by(rule, S * scale, shape) - rank) <= 1  # a value on the edge may fall to either side of it


@pytest.mark.parametrize("rule", RANK_RULES)
def test_every_rule_sees_nothing_in_zeros(rule):
    assert rank_by(rule, torch.zeros(6), (6, 9)) == 0


def test_the_energy_rule_keeps_the_least_that_holds_its_share():
    S = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert noise.rank_by_energy(S, (4, 4), energy=9 / 14) == 1
    assert noise.rank_by_energy(S, (4, 4), energy=0.65) == 2
    assert noise.rank_by_energy(S, (4, 4), energy=1.0) == 3
    with pytest.raises(SpectrumError, match="not a share"):
        noise.rank_by_energy(S, (4, 4), energy=0.0)


def test_the_entropy_rule_is_the_effective_rank():
    assert noise.rank_by_entropy(torch.ones(7), (7, 9)) == 7
    assert noise.rank_by_entropy(torch.tensor([1.0, 0, 0]), (3, 3)) == 1


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("loss", ["frobenius", "operator", "nuclear"])
def test_shrinkers_bring_planted_values_back_and_are_best_in_their_own_loss(beta, loss):
    """The expected loss of one component in its plane, at the limit of large matrices, against a fine grid."""
    for x in (1.2 * beta**0.25, 2.0, 5.0):
        y = math.sqrt((x + 1 / x) * (x + beta / x))
        left = math.sqrt((x**4 - beta) / (x**4 + beta * x**2))
        right = math.sqrt((x**4 - beta) / (x**4 + x**2))
        M = round(1000 * beta)
        S = torch.zeros(M, dtype=torch.float64)
        S[0] = y * math.sqrt(1000)
        found = float(shrink(S, (M, 1000), sigma=1.0, loss=loss)[0]) / math.sqrt(1000)

        def error(eta, x=x, left=left, right=right):
            u, v = np.array([left, math.sqrt(1 - left**2)]), np.array([right, math.sqrt(1 - right**2)])
            norms = np.linalg.svd(np.diag([x, 0.0]) - eta * np.outer(u, v), compute_uv=False)
            return {"frobenius": np.hypot(*norms), "operator": norms[0], "nuclear": norms.sum()}[loss]

        grid = np.linspace(0, 1.5 * y, 3001)
        errors = np.array([error(eta) for eta in grid])
        assert error(found) <= errors.min() + 1e-3 * x
        assert 0 <= found <= y
        if loss == "operator" and beta == 1:
            assert found == pytest.approx(x, rel=1e-9)  # Gavish & Donoho's form: nothing but the lengthening undone


@pytest.mark.parametrize("shape", [(200, 200), (100, 400)])
def test_shrinkage_estimates_a_planted_signal_better_than_any_threshold(shape):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.linalg.qr(torch.randn(side, 8, generator=generator, dtype=torch.float64)).Q for side in shape]
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    signal = (sides[0] * torch.linspace(0.9, 2, 8, dtype=torch.float64) * edge) @ sides[1].mT
    noisy = signal + torch.randn(shape, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(noisy, full_matrices=False)
    ours = torch.linalg.matrix_norm((U * shrink(S, shape)) @ Vh - signal)
    thresholds = [torch.linalg.matrix_norm((U[:, :k] * S[:k]) @ Vh[:k] - signal) for k in range(min(shape))]
    assert ours < min(thresholds)


def test_shrinking_keeps_order_dtype_and_what_is_noise_at_zero():
    S, _ = values_of((60, 90), rank=3)
    found = shrink(S.float(), (60, 90))
    assert found.dtype == torch.float32
    assert (found[3:] == 0).all()
    assert (found[:3] > 0).all()
    assert (found <= S.float()).all()
    torch.testing.assert_close(shrink(S.float().flip(0), (60, 90)).flip(0), found)
    torch.testing.assert_close(shrink(torch.zeros(4), (4, 5)), torch.zeros(4))


def test_the_signal_to_noise_ratio_is_that_of_the_sums():
    assert noise.snr(torch.tensor([4.0, 2.0, 1.0, 1.0]), 1.5) == 3.0
    assert noise.snr(torch.tensor([4.0]), 1.0) == math.inf


def test_wrong_input_is_refused():
    with pytest.raises(SpectrumError, match="Rules are mp, tw"):
        rank_by("best", torch.ones(3), (3, 3))
    with pytest.raises(SpectrumError, match="All 3 are needed"):
        rank_by("mp", torch.ones(2), (3, 4))
    with pytest.raises(SpectrumError, match="finite and not negative"):
        rank_by("mp", torch.tensor([1.0, math.nan, 0.0]), (3, 4))
    with pytest.raises(SpectrumError, match="Turn it over"):
        noise.support(2.0)
    with pytest.raises(SpectrumError, match="chance of a false alarm"):
        noise.tracy_widom_quantile(0.0)


def test_the_edge_of_a_fit_is_the_end_of_its_bulk():
    assert NoiseFit(0.5, 0, (9, 16)).edge == 3.5
