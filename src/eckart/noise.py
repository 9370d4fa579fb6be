"""Which singular values are noise, by random-matrix theory, and what to put in the place of the others.

Notation: a weight is signal plus noise, W = X + E, with independent entries of standard deviation sigma in E. Its shape
is (out, in); N is the larger side, M the smaller, beta = M / N from 0 to 1, so that the order of the two sides never
matters. S are the singular values, and S**2 / (N sigma**2) of noise alone follow the Marchenko-Pastur law of ratio beta
on [(1 - sqrt(beta))**2, (1 + sqrt(beta))**2]. A signal of low rank leaves that bulk only where it is stronger than the
noise (Baik, Ben Arous & Peche 2005); what stays inside cannot be told from noise by its singular value.

This module knows singular values and shapes, and neither matrices nor models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, special
from torch import Tensor

from eckart.errors import SpectrumError

Array = NDArray[np.float64]
Shape = tuple[int, int]
Loss = Literal["frobenius", "operator", "nuclear"]

LEVEL = 0.05
"""Chance that the largest value of pure noise is taken for signal, where a rule has a level."""
ENERGY = 0.9
"""Share of the squared singular values that rule `energy` keeps."""
BEMA_TRIM = 0.2
"""Share of the values that BEMA leaves out at each end."""
FIT_FROM, FIT_TO = 0.1, 0.5
"""Quantiles of the bulk that the iterated fit matches: the lower half, since undetected signal lifts the upper."""


@dataclass(frozen=True)
class NoiseFit:
    """The noise that the smaller singular values of a matrix are consistent with."""

    sigma: float
    """Standard deviation of a noise entry, in the unit of the weight."""
    signal: int
    """Largest values that the fit left out as signal; 0 where it is of all values."""
    shape: Shape
    """Of the whole matrix."""

    @property
    def edge(self) -> float:
        """Where the bulk of noise of this shape ends: sigma (sqrt(N) + sqrt(M))."""
        return self.sigma * (math.sqrt(self.shape[0]) + math.sqrt(self.shape[1]))


def support(beta: float) -> tuple[float, float]:
    """Give the interval that holds the Marchenko-Pastur law of unit variance.

    Args:
        beta: Ratio of the sides, `0 < beta <= 1`.

    Returns:
        Its lower and upper end, `(1 -+ sqrt(beta))**2`.

    >>> support(0.25)
    (0.25, 2.25)
    """
    _check_beta(beta)
    return (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2


def density(x: Array, beta: float) -> Array:
    """Evaluate the density of the Marchenko-Pastur law of unit variance.

    Args:
        x: Eigenvalues of E E' / N, any shape. Not modified.
        beta: Ratio of the sides, `0 < beta <= 1`.

    Returns:
        Same shape, float64; 0 outside the support.

    Source:
        Marchenko & Pastur 1967, doi:10.1070/SM1967v001n04ABEH001994.
    """
    low, high = support(beta)
    x = np.asarray(x, dtype=np.float64)
    inside = (x > low) & (x < high)
    safe = np.where(inside, x, 1.0)
    root = np.sqrt(np.clip((high - safe) * (safe - low), 0, None))
    return np.where(inside, root / (2 * np.pi * beta * safe), 0.0)


def cumulative(x: Array, beta: float) -> Array:
    """Evaluate the distribution function of the Marchenko-Pastur law of unit variance, in closed form.

    Args:
        x: Eigenvalues of E E' / N, any shape. Not modified.
        beta: Ratio of the sides, `0 < beta <= 1`.

    Returns:
        Same shape, float64, from 0 to 1.
    """
    low, high = support(beta)
    x = np.asarray(x, dtype=np.float64)
    inside = np.clip(x, low, high)
    above, below = np.maximum(inside - low, 0.0), np.maximum(high - inside, 0.0)
    # arctan2 keeps both ends of the support finite, where the usual form divides by zero.
    turned = np.arctan2(below - above, 2 * np.sqrt(above * below))
    tilted = np.arctan2(low * below - high * above, 2 * (1 - beta) * np.sqrt(above * below)) if beta < 1 else 0.0
    found = (np.pi * beta + np.sqrt(above * below) - (1 + beta) * turned + (1 - beta) * tilted) / (2 * np.pi * beta)
    return np.where(x <= low, 0.0, np.where(x >= high, 1.0, np.clip(found, 0.0, 1.0)))


def quantiles(probability: Array, beta: float) -> Array:
    """Invert the distribution function of the Marchenko-Pastur law of unit variance.

    Args:
        probability: From 0 to 1, any shape. Not modified.
        beta: Ratio of the sides, `0 < beta <= 1`.

    Returns:
        Same shape, float64, each within 1e-12 of the support's width.
    """
    probability = np.asarray(probability, dtype=np.float64)
    low, high = support(beta)
    left, right = np.full(probability.shape, low), np.full(probability.shape, high)
    for _ in range(48):
        middle = (left + right) / 2
        under = cumulative(middle, beta) < probability
        left, right = np.where(under, middle, left), np.where(under, right, middle)
    return (left + right) / 2


@functools.lru_cache(maxsize=1024)
def median(beta: float) -> float:
    """Give the median of the Marchenko-Pastur law of unit variance.

    Args:
        beta: Ratio of the sides, `0 < beta <= 1`.

    Returns:
        An eigenvalue.
    """
    return float(quantiles(np.array(0.5), beta))


@functools.lru_cache(maxsize=256)
def tracy_widom_quantile(level: float = LEVEL) -> float:
    """Give what the largest eigenvalue of a real random matrix exceeds with a small chance, in standard units.

    Args:
        level: That chance, `1e-9 <= level < 1`.

    Returns:
        The 1 - level quantile of the Tracy-Widom law for real matrices (TW1).

    Raises:
        SpectrumError: `level` is outside its range.

    Source:
        Ferrari & Spohn 2005 (doi:10.1088/0305-4470/38/33/L02): F1(s) = det(1 - Ai(x + y + s)) on the half line, by
        Gauss-Legendre quadrature as in Bornemann 2010 (arXiv 0804.2543).

    >>> round(tracy_widom_quantile(0.05), 4)
    0.9793
    """
    if not 1e-9 <= level < 1:
        raise SpectrumError(
            f"level {level} is not the chance of a false alarm. It is from 1e-9 to below 1. The usual one is {LEVEL}."
        )
    root: Any = optimize.brentq(lambda s: _tracy_widom(s) - (1 - level), -10.0, 13.0, xtol=1e-10)
    return float(root)


def fit_median(values: Tensor, shape: Shape) -> NoiseFit:
    """Fit the noise to the median singular value.

    Exact for noise with few strong signals; every signal moves the median up, so a rank of a fifth of the matrix makes
    sigma about 13 % too large. `fit` corrects that.

    Args:
        values: All singular values, shape (min(out, in),), any order. Not modified.
        shape: (out, in).

    Returns:
        The fit.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        Gavish & Donoho 2014, equation 13 and section D.
    """
    S, N, M = _checked(values, shape)
    return NoiseFit(float(np.median(S)) / math.sqrt(N * median(M / N)), 0, shape)


def fit_bema(values: Tensor, shape: Shape, *, trim: float = BEMA_TRIM) -> NoiseFit:
    """Fit the noise to the middle of the spectrum: bulk eigenvalue matching analysis (BEMA).

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        trim: Share of the values that is left out at each end, `0 <= trim < 0.5`.

    Returns:
        The fit; its sigma**2 is the slope of the middle eigenvalues of W W' / N over their Marchenko-Pastur quantiles.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        Ke, Ma & Lin 2020, arXiv 2006.00436, algorithm 1.
    """
    S, N, M = _checked(values, shape)
    return NoiseFit(_matched(S, N, M, trim, 1 - trim), 0, shape)


def fit(values: Tensor, shape: Shape, *, level: float = LEVEL) -> NoiseFit:
    """Fit the noise to what is left once the signal is taken out: iterated truncated quantiles.

    Values above the edge are signal; k of them leave noise of shape (N - k, M - k), whose quantiles the rest has to
    match, and which moves the edge. This is repeated until k stays. So a spectrum in which signal is dense, as in
    trained weights, does not count as wide noise.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        level: Of the Tracy-Widom edge that tells signal, `1e-9 <= level < 1`.

    Returns:
        The fit.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        Ours, tested against planted ranks (docs/noise.md). It matches quantiles as BEMA does (arXiv 2006.00436), on the
        lower half of the rest.
    """
    S, N, M = _checked(values, shape)
    signal, seen = 0, set[int]()
    while True:
        sigma = _matched(S[signal:], N - signal, M - signal, FIT_FROM, FIT_TO)
        found = int((_edge(sigma, N - signal, M - signal, level) < S).sum())
        # A tenth of the values has to be left, or there is nothing to fit.
        found = min(found, M - max(1, math.ceil(M / 10)))
        # Counts may alternate between two for ever.
        if found == signal or found in seen:
            return NoiseFit(sigma, signal, shape)
        seen.add(found)
        signal = found


def marchenko_pastur_edge(values: Tensor, shape: Shape) -> float:
    """Give the end of the bulk of the fitted noise.

    The largest value of pure noise lies around it, above it in about one matrix of six.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).

    Returns:
        A singular value: sigma (sqrt(N) + sqrt(M)), of the noise that `fit` leaves.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.
    """
    return _rest(fit(values, shape)).edge


def tracy_widom_edge(values: Tensor, shape: Shape, *, level: float = LEVEL) -> float:
    """Give what the largest singular value of the fitted noise exceeds with a small chance.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        level: That chance, `1e-9 <= level < 1`.

    Returns:
        A singular value.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape, or `level` is outside its range.

    Source:
        Johnstone 2001, doi:10.1214/aos/1009210544, with the half corrections of Ma 2012 (arXiv 0811.3203).
    """
    rest = _rest(fit(values, shape, level=level))
    return _edge(rest.sigma, max(rest.shape), min(rest.shape), level)


def bema_edge(values: Tensor, shape: Shape, *, level: float = LEVEL) -> float:
    """Give BEMA's threshold: its noise, at a Tracy-Widom level.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        level: Chance that pure noise exceeds it, `1e-9 <= level < 1`.

    Returns:
        A singular value.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape, or `level` is outside its range.

    Source:
        Ke, Ma & Lin 2020, arXiv 2006.00436, algorithm 1; without the half corrections of `tracy_widom_edge`.
    """
    _, N, M = _checked(values, shape)
    root = math.sqrt(M / N)
    fluctuation = tracy_widom_quantile(level) * N ** (-2 / 3) * root ** (-1 / 3) * (1 + root) ** (4 / 3)
    return fit_bema(values, shape).sigma * math.sqrt(N * ((1 + root) ** 2 + fluctuation))


def gavish_donoho_coefficient(beta: float) -> float:
    """Give the optimal hard threshold in units of sigma sqrt(N), the noise being known.

    Args:
        beta: Ratio of the sides, `0 < beta <= 1`.

    Returns:
        lambda(beta).

    Source:
        Gavish & Donoho 2014, arXiv 1305.5870, equation 11.

    >>> round(gavish_donoho_coefficient(1.0) ** 2 * 3, 6)
    16.0
    """
    _check_beta(beta)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


def gavish_donoho_edge(values: Tensor, shape: Shape, *, sigma: float | None = None) -> float:
    """Give the hard threshold that is best in mean square, for low rank in white noise.

    It is above the edge of the bulk on purpose: a signal just beyond the edge costs more noise than it brings.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        sigma: The noise, where it is known; by default it is taken from the median, as in the paper.

    Returns:
        A singular value: lambda(beta) sigma sqrt(N), which is omega(beta) times the median where sigma is unknown.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        Gavish & Donoho 2014, arXiv 1305.5870, equations 10 to 13; omega is exact here, not their polynomial.
    """
    _, N, M = _checked(values, shape)
    noise = fit_median(values, shape).sigma if sigma is None else sigma
    return gavish_donoho_coefficient(M / N) * math.sqrt(N) * noise


def laserrmt_edge(values: Tensor, shape: Shape) -> float:
    """Give the threshold of LaserRMT and Spectrum, to the letter. It is not the Marchenko-Pastur edge it is called.

    Its noise scale is the spread of the singular values, IQR(S) / 1.349, where the law needs the spread of the entries
    times sqrt(N). How far the two are apart depends on the shape: on pure noise it keeps 24 % of the values of a square
    matrix, 66 % at ratio 0.5 and all of them at 0.25, where the right edge keeps none. On most MLP matrices it cuts
    next to nothing. Kept so that published cuts can be made again and compared.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).

    Returns:
        A singular value.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        rmt_laser.py and laser_scanner.py of cognitivecomputations/laserRMT.
    """
    S, N, M = _checked(values, shape)
    quarter, three_quarters = np.quantile(S, [0.25, 0.75])
    return float(three_quarters - quarter) / 1.349 * (1 + math.sqrt(M / N))


FITS: dict[str, Callable[[Tensor, Shape], NoiseFit]] = {
    "mp": fit,
    "tw": fit,
    "gavish-donoho": fit_median,
    "bema": fit_bema,
}
"""Rule -> the noise that it takes as given."""

EDGES: dict[str, Callable[[Tensor, Shape], float]] = {
    "mp": marchenko_pastur_edge,
    "tw": tracy_widom_edge,
    "gavish-donoho": gavish_donoho_edge,
    "bema": bema_edge,
    "laserrmt": laserrmt_edge,
}
"""Rule -> the singular value above which it sees signal, from all singular values and the shape."""


def rank_by_energy(values: Tensor, shape: Shape, *, energy: float = ENERGY) -> int:
    """Give the smallest rank that keeps a share of the energy, the sum of squared singular values.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        energy: The share, `0 < energy <= 1`.

    Returns:
        A rank from 0 (a matrix of zeros) to `min(shape)`.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape, or `energy` is outside its range.
    """
    if not 0 < energy <= 1:
        raise SpectrumError(f"energy {energy} is not a share. It is above 0 and at most 1. The usual one is {ENERGY}.")
    S, _, _ = _checked(values, shape)
    kept = np.cumsum(S**2)
    return int(np.searchsorted(kept, kept[-1] * energy * (1 - 1e-12))) + 1 if kept[-1] > 0 else 0


def rank_by_entropy(values: Tensor, shape: Shape) -> int:
    """Give the effective rank, rounded: the exponential of the entropy of the singular values.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).

    Returns:
        A rank from 0 (a matrix of zeros) to `min(shape)`.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        Roy & Vetterli 2007, doi:10.5281/zenodo.40328: of the values themselves, not of their squares.
    """
    S, _, _ = _checked(values, shape)
    return round(math.exp(float(special.entr(S / S.sum()).sum()))) if S[0] > 0 else 0


def _rank_above(edge: Callable[[Tensor, Shape], float]) -> Callable[[Tensor, Shape], int]:
    """Make a rank rule of an edge: how many values are above it."""

    @functools.wraps(edge)
    def rank(values: Tensor, shape: Shape) -> int:
        return int((values > edge(values, shape)).sum())

    return rank


RANK_RULES: dict[str, Callable[[Tensor, Shape], int]] = {
    **{name: _rank_above(edge) for name, edge in EDGES.items()},
    "energy": rank_by_energy,
    "effective-rank": rank_by_entropy,
}
"""Rule -> rank, from all singular values and the shape. A rank may be 0, where a rule sees noise alone."""


def rank_by(rule: str, values: Tensor, shape: Shape) -> int:
    """Apply a rank rule by its name.

    Args:
        rule: One of `RANK_RULES`.
        values: All singular values, any order. Not modified.
        shape: (out, in).

    Returns:
        A rank from 0, where the rule sees noise alone, to `min(shape)`.

    Raises:
        SpectrumError: There is no such rule, or the values are not those of a matrix of this shape.

    >>> rank_by("energy", torch.tensor([3.0, 1.0]), (2, 2))
    1
    """
    if rule not in RANK_RULES:
        raise SpectrumError(f"There is no rank rule {rule!r}. Rules are {', '.join(RANK_RULES)}. Choose one of them.")
    return RANK_RULES[rule](values, shape)


def shrink(values: Tensor, shape: Shape, *, sigma: float | None = None, loss: Loss = "frobenius") -> Tensor:
    """Replace singular values by the optimal estimate of those of the signal.

    Noise lengthens every singular value and turns its vectors; the best estimate is shorter than what is seen, by more
    the nearer it is to the bulk, and 0 inside. Thresholds keep the length.

    Args:
        values: All singular values, any order. Not modified.
        shape: (out, in).
        sigma: The noise, where it is known; by default that of `fit`.
        loss: Norm of the error that the estimate is best in: `frobenius`, `operator` or `nuclear`.

    Returns:
        Same shape, dtype and device, same order; none above the value it replaces.

    Raises:
        SpectrumError: The values are not those of a matrix of this shape.

    Source:
        Gavish & Donoho 2017, arXiv 1405.7511, equations 4, 7 to 10. Their shrinker for the operator norm is best for
        square matrices; for others it lacks a factor, which is Leeb's (arXiv 2005.11807).
    """
    _, N, M = _checked(values, shape)
    noise = (fit(values, shape).sigma if sigma is None else sigma) * math.sqrt(N)
    if noise <= 0:
        return values.clone()
    beta = M / N
    y = values.detach().to("cpu", torch.float64) / noise
    outside = y > 1 + math.sqrt(beta)
    y = torch.where(outside, y, torch.full_like(y, 2 + math.sqrt(beta)))
    centred = y**2 - beta - 1
    length = ((centred + (centred**2 - 4 * beta).clamp_min(0).sqrt()) / 2).sqrt()
    if loss == "operator":
        found = length * ((length**2 + beta) / (length**2 + 1)).sqrt()
    elif loss == "frobenius":
        found = (centred**2 - 4 * beta).clamp_min(0).sqrt() / y
    else:
        found = ((length**4 - beta - math.sqrt(beta) * length * y) / (length**2 * y)).clamp_min(0)
    return (torch.where(outside, found, torch.zeros_like(found)) * noise).to(values.device, values.dtype)


def snr(values: Tensor, edge: float) -> float:
    """Give LaserRMT's signal-to-noise ratio: the sum of the values above an edge over the sum of those below.

    Args:
        values: All singular values, any order. Not modified.
        edge: From one of `EDGES`.

    Returns:
        Not negative; infinite where all values are above the edge.
    """
    precise = values.double()
    noise = float(precise[precise <= edge].sum())
    return float(precise[precise > edge].sum()) / noise if noise > 0 else math.inf


def _checked(values: Tensor, shape: Shape) -> tuple[Array, int, int]:
    """Give the values in descending float64, and the sides, the larger one first."""
    N, M = max(shape), min(shape)
    if M < 1 or values.shape != (M,):
        raise SpectrumError(
            f"{tuple(values.shape)} singular values do not belong to a matrix of shape {tuple(shape)}. "
            f"All {M} are needed, those near zero, too. Compute them with eckart.spectrum.singular_values."
        )
    S = values.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(S).all() or S.min() < 0:
        raise SpectrumError(
            "The singular values hold NaN, infinity or a negative number. They are finite and not negative. "
            "Check the weight that they come from."
        )
    return np.sort(S)[::-1], N, M


def _matched(S: Array, N: int, M: int, start: float, end: float) -> float:
    """Fit sigma: the slope of eigenvalues over their Marchenko-Pastur quantiles, from one quantile to another."""
    first = min(math.floor(start * M), M - 1)
    last = max(first + 1, math.ceil(end * M))
    ascending = S[::-1][first:last] ** 2 / N
    expected = _quantiles_of(N, M)[first:last]
    return math.sqrt(float(expected @ ascending) / float(expected @ expected))


@functools.lru_cache(maxsize=64)
def _quantiles_of(N: int, M: int) -> Array:
    return quantiles((np.arange(M) + 0.5) / M, M / N)


def _edge(sigma: float, N: int, M: int, level: float) -> float:
    """Johnstone's: centre and scale of the largest squared singular value of noise."""
    wide, high = math.sqrt(N - 0.5), math.sqrt(M - 0.5)
    scale = (wide + high) * (1 / wide + 1 / high) ** (1 / 3)
    return sigma * math.sqrt(max(0.0, (wide + high) ** 2 + tracy_widom_quantile(level) * scale))


def _rest(found: NoiseFit) -> NoiseFit:
    """The noise that is left beside the signal."""
    out, into = found.shape
    return NoiseFit(found.sigma, 0, (out - found.signal, into - found.signal))


@functools.lru_cache(maxsize=1)
def _half_line() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    return 8 * (nodes + 1), np.sqrt(8 * weights)


def _tracy_widom(s: float) -> float:
    """The distribution function of TW1."""
    x, root = _half_line()
    kernel = special.airy(x[:, None] + x + s)[0] * root[:, None] * root
    return float(np.linalg.det(np.eye(len(x)) - kernel))


def _check_beta(beta: float) -> None:
    if not 0 < beta <= 1:
        raise SpectrumError(
            f"beta {beta} is not a ratio of sides. It is the smaller side over the larger one, above 0 and at most 1. "
            "Turn it over."
        )
