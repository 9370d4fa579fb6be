"""Singular values, exactly or fast, and what they say of a matrix. Tensors in, values out.

Notation: W has shape (out, in); M is the smaller side, S its M singular values in descending order, lambda = S**2.

The fast way is three steps of matrix products: the Gram matrix G = W W' (or W' W, whichever is smaller), its reduction
to a band by block reflections, and the eigenvalues of the band. A singular value decomposition reduces W to two
diagonals one column at a time, half of it in products with single vectors, which wait for memory.

Squaring costs accuracy at the small end: an error e lambda_1 in G is an error of about e S_1**2 / (2 S_i) in S_i. So it
is done in float64 wherever float32 would be felt, and not at all where float64 would not do either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, special
from torch import Tensor

from eckart.errors import SpectrumError

Array = NDArray[np.float64]

FAST_ERROR = 1e-3
"""Relative error of `fast_singular_values` at the root mean square of the singular values, at most."""
SMALL = 512
"""Smaller sides up to this one are not worth reducing to a band."""
BAND = 32
"""Subdiagonals of the band: columns reflected together."""
COLUMNS = 2048
"""Of a weight that are converted together, so that memory holds no second copy of it."""
ROWS = 1024
"""Of a symmetric matrix that are computed together, from the first column to a little right of the diagonal."""
PANELS = 8
"""Panels whose changes are put into the rest of the matrix together, to read it less often."""
HILL_SHARE = 0.1
"""Share of the values in the tail of the Hill estimator."""
LEAST_TAIL = 10
"""Fewest values in the tail of a power law."""


@dataclass(frozen=True)
class PowerLaw:
    """A power law fitted to the largest eigenvalues: a density proportional to lambda**-alpha from `start` on."""

    alpha: float
    """Exponent, above 1; NaN where fewer than three values are positive. Below 2 the variance has no bound."""
    start: float
    """Smallest eigenvalue in the tail."""
    count: int
    """Values in the tail."""
    distance: float
    """Kolmogorov-Smirnov distance between the tail and the law, from 0 (perfect) to 1."""


@dataclass(frozen=True)
class Measures:
    """What the singular values of one matrix say of it."""

    energy: float
    """Sum of the squared singular values: the squared Frobenius norm."""
    norm: float
    """Largest singular value, S_1."""
    condition: float
    """S_1 / S_M; infinite for a singular matrix."""
    stable_rank: float
    """energy / S_1**2, from 1 to M."""
    effective_rank: float
    """Exponential of the entropy of S / sum(S), from 1 to M (Roy & Vetterli 2007)."""
    spectral_entropy: float
    """Entropy of the shares of energy S**2 / sum(S**2), from 0 to ln M nats."""
    gap: float
    """Largest ratio S_i / S_(i+1) of neighbours in the upper half of the spectrum; 1 where there is none."""
    gap_rank: int
    """i of that gap: the rank after which the spectrum falls most; 0 where there is none."""
    hill: float
    """Exponent of the density of eigenvalues by Hill's estimator on the largest tenth; to compare with `alpha`."""
    power_law: PowerLaw
    """The best power law of the tail."""


def singular_values(weight: Tensor) -> Tensor:
    """Compute all singular values, exactly.

    float64 is decomposed as it is. Narrower dtypes take the eigenvalues of the Gram matrix in float64 where the
    condition number shows that this loses less than rounding to float32 did, and else a decomposition in float64.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.

    Returns:
        Shape (min(out, in),), descending, float64, on the device of `weight`; each within 1e-7 S_1 of the truth
        (1e-14 S_1 for float64).

    Raises:
        SpectrumError: `weight` is not a matrix of finite numbers.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    tensor([4., 3.], dtype=torch.float64)
    """
    _check(weight)
    if weight.dtype != torch.float64:
        found = torch.linalg.eigvalsh(_gram(weight.detach(), torch.float64)).flip(0).clamp_min(0).sqrt()
        if bool(found[-1] > _least_of_gram(len(found)) * found[0]):
            return found
    return torch.linalg.svdvals(weight.detach().double())


def fast_singular_values(weight: Tensor) -> Tensor:
    """Compute all singular values several times as fast as a decomposition, for edges and ranks.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.

    Returns:
        Shape (min(out, in),), descending, float64, on the device of `weight`. The error of S_i is at most
        e S_1**2 / S_i, and for the smallest sqrt(e) S_1, where e is below 4 sqrt(M) times the unit of rounding;
        that unit is float32's where this is below `FAST_ERROR` at the root mean square of S, and float64's elsewhere.
        Small values of an ill-conditioned matrix have no correct digit, then: use `singular_values` for its condition.

    Raises:
        SpectrumError: `weight` is not a matrix of finite numbers.

    Source:
        Reduction to a band by blocks: Bischof, Lang & Sun 2000, doi:10.1145/365723.365735; the band's eigenvalues are
        LAPACK's `sbevd`.
    """
    _check(weight)
    least = min(weight.shape)
    if least <= SMALL:
        return singular_values(weight)
    gram = _gram(weight.detach(), torch.float32)
    if not _is_flat(gram):
        gram = _gram(weight.detach(), torch.float64)
    band = reduce_to_band(gram).cpu().numpy()
    values = linalg.eig_banded(band, lower=True, eigvals_only=True, overwrite_a_band=True, check_finite=False)
    return torch.from_numpy(values).double().flip(0).clamp_min(0).sqrt().to(weight.device)


def leading_singular_values(weight: Tensor, count: int, *, seed: int = 0, iterations: int = 8) -> tuple[Tensor, Tensor]:
    """Estimate the largest singular values by seeded block Krylov iteration, each with a bound of its error.

    Costs `iterations` products of the weight and its transpose with `count` + 8 columns; far less than all values.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.
        count: How many, `1 <= count <= min(out, in)`.
        seed: Of the start, drawn on the CPU; the global random state is left alone.
        iterations: Of the Krylov space, at least 1.

    Returns:
        Estimates, descending, and bounds, both of shape (count,), in float64: some singular value lies within its bound
        of each estimate, and the i-th estimate is never above the i-th singular value (but for rounding).

    Raises:
        SpectrumError: `weight` is not a matrix of finite numbers, or `count` does not fit it.

    Source:
        Block Krylov iteration: Musco & Musco 2015, arXiv 1504.05477. The bound is the residual of the singular pair,
        Parlett 1998, theorem 4.5.1, for the matrix [[0, W], [W', 0]].
    """
    _check(weight)
    least = min(weight.shape)
    if not 1 <= count <= least:
        raise SpectrumError(
            f"{count} leading values of a matrix of shape {tuple(weight.shape)} were asked for. "
            f"It has {least}. Ask for 1 to {least}."
        )
    tall = weight.detach().double()
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.mT
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(tall.shape[1], min(count + 8, least), generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(block.to(tall.device)).Q
    basis = block
    for _ in range(iterations):
        block = tall.mT @ (tall @ block)
        # Twice is enough for orthogonality to the last digit (Kahan, in Parlett 1998, section 6.9).
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis = torch.cat([basis, block], 1)[:, :least]
        if basis.shape[1] == least:
            break
    left, S, right = torch.linalg.svd(tall @ basis, full_matrices=False)
    left, S, right = left[:, :count], S[:count], basis @ right[:count].mT
    residual = torch.linalg.vector_norm(tall.mT @ left - right * S, dim=0)
    return S, residual


def reduce_to_band(symmetric: Tensor) -> Tensor:
    """Turn a symmetric matrix into a banded one with the same eigenvalues.

    Args:
        symmetric: Shape (n, n), float32 or float64, equal to its transpose. Modified: its memory is used up.

    Returns:
        Shape (BAND + 1, n): row i holds the i-th subdiagonal, ended by zeros, as LAPACK keeps lower bands.

    Source:
        See `fast_singular_values`; reflections of `BAND` columns in the form I - V T V' (Schreiber & Van Loan 1989).
    """
    A, n = symmetric, len(symmetric)
    band = A.new_zeros(BAND + 1, n)
    start = 0
    while start < n:
        # Changes that are not in A yet: A - left @ right'.
        left, right = A.new_zeros(n, 0), A.new_zeros(n, 0)
        for _ in range(PANELS):
            width = min(BAND, n - start)
            below = start + width
            columns = A[start:, start:below] - left[start:] @ right[start:below].mT
            if below < n:
                V, T, columns[width:] = _reflect(columns[width:])
                VT = V @ T
                image = A[below:, below:] @ VT - left[below:] @ (right[below:].mT @ VT)
                image -= 0.5 * V @ (T.mT @ (V.mT @ image))
                change = A.new_zeros(n, 2 * V.shape[1])
                change[below:] = torch.cat([image, V], 1)
                left = torch.cat([left, change], 1)
                right = torch.cat([right, change.roll(V.shape[1], 1)], 1)
            for offset in range(min(BAND + 1, n - start)):
                diagonal = columns.diagonal(-offset)
                band[offset, start : start + len(diagonal)] = diagonal
            start = below
            if start >= n:
                return band
        _add_lower(A[start:, start:], left[start:], right[start:], alpha=-1)
        _mirrored(A[start:, start:])
    return band


def measure(values: Tensor) -> Measures:
    """Sum up the singular values of a matrix.

    Args:
        values: All singular values, any order, shape (M,), M >= 1. Not modified.

    Returns:
        The measures; those of a matrix of zeros are NaN where they have no meaning.

    Raises:
        SpectrumError: The values are not finite or are negative.
    """
    S = _descending(values)
    energy, total, top = float(S @ S), float(S.sum()), float(S[0])
    if top == 0:
        nothing = PowerLaw(math.nan, 0.0, 0, math.nan)
        return Measures(0.0, 0.0, math.nan, math.nan, math.nan, math.nan, 1.0, 0, math.nan, nothing)
    ratios = gaps(values)[: max(1, len(S) // 2)] if len(S) > 1 else np.ones(0)
    largest = int(ratios.argmax()) if len(ratios) else -1
    return Measures(
        energy=energy,
        norm=top,
        condition=top / float(S[-1]) if S[-1] > 0 else math.inf,
        stable_rank=energy / top**2,
        effective_rank=math.exp(float(special.entr(S / total).sum())),
        spectral_entropy=float(special.entr(S**2 / energy).sum()),
        gap=float(ratios[largest]) if len(ratios) else 1.0,
        gap_rank=largest + 1,
        hill=hill(values),
        power_law=fit_power_law(values),
    )


def measure_heads(weight: Tensor, heads: int, *, axis: Literal["rows", "columns"] = "rows") -> tuple[Measures, ...]:
    """Sum up the singular values of every attention head's part of a projection.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.
        heads: How many equal runs of rows or columns it has.
        axis: `rows` for query, key and value projections, `columns` for the output projection.

    Returns:
        The measures of every head, in order.

    Raises:
        SpectrumError: The heads do not divide the side, or a weight is not finite.
    """
    side = weight.shape[0] if axis == "rows" else weight.shape[1]
    if heads < 1 or side % heads:
        raise SpectrumError(
            f"{heads} heads do not divide the {side} {axis} of a weight of shape {tuple(weight.shape)}. "
            "Heads are equal runs of neighbours. Give the number that the model's config has."
        )
    parts = weight.chunk(heads, 0 if axis == "rows" else 1)
    return tuple(measure(singular_values(part)) for part in parts)


def gaps(values: Tensor) -> Array:
    """Give the ratios of neighbouring singular values, S_i / S_(i+1).

    Args:
        values: Any order, shape (M,). Not modified.

    Returns:
        Shape (M - 1,), float64, at least 1; infinite after the last positive value and 1 between zeros.

    Raises:
        SpectrumError: The values are not finite or are negative.
    """
    S = _descending(values)
    before, after = S[:-1], S[1:]
    positive = after > 0
    return np.where(positive, before / np.where(positive, after, 1.0), np.where(before > 0, np.inf, 1.0))


def hill(values: Tensor, *, share: float = HILL_SHARE) -> float:
    """Estimate the exponent of a heavy tail of the eigenvalues S**2 by Hill's estimator.

    Args:
        values: Singular values, any order. Not modified.
        share: Of the values in the tail, `0 < share < 1`; at least two are.

    Returns:
        alpha of a density proportional to lambda**-alpha: one more than Hill's index. NaN where it has no answer.

    Raises:
        SpectrumError: The values are not finite or are negative.

    Source:
        Hill 1975, doi:10.1214/aos/1176343247.
    """
    x = _descending(values) ** 2
    count = max(2, math.ceil(share * len(x)))
    if len(x) <= count or x[count] <= 0:
        return math.nan
    logs = np.log(x[:count] / x[count]).sum()
    return 1 + count / float(logs) if logs > 0 else math.inf


def fit_power_law(values: Tensor) -> PowerLaw:
    """Fit a power law to the tail of the eigenvalues S**2, from where it fits best.

    Every eigenvalue with at least `LEAST_TAIL` above it is tried as the start; alpha is the most likely one, and the
    start with the least Kolmogorov-Smirnov distance wins.

    Args:
        values: Singular values, any order. Not modified.

    Returns:
        The law with its goodness.

    Raises:
        SpectrumError: The values are not finite or are negative.

    Source:
        Clauset, Shalizi & Newman 2009, arXiv 0706.1062, sections 3.1 and 3.3.
    """
    x = _descending(values) ** 2
    x = x[x > 0]
    if len(x) < 3:
        return PowerLaw(math.nan, float(x[-1]) if len(x) else 0.0, len(x), math.nan)
    logs = np.log(x)
    best = PowerLaw(math.nan, float(x[-1]), len(x), math.inf)
    for count in range(min(LEAST_TAIL, len(x)), len(x) + 1):
        above = logs[:count][::-1] - logs[count - 1]
        total = float(above.sum())
        if total <= 0:
            continue
        expected = -np.expm1(-count / total * above)
        steps = np.arange(count + 1) / count
        distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
        if distance < best.distance:
            best = PowerLaw(1 + count / total, float(x[count - 1]), count, distance)
    return best if math.isfinite(best.distance) else PowerLaw(math.inf, float(x[-1]), len(x), math.nan)


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise SpectrumError(
            f"A tensor of shape {tuple(weight.shape)} and dtype {weight.dtype} has no singular values. "
            "A weight here is a matrix of floating-point numbers. Give one expert or one part at a time."
        )
    # A sum in float64 is finite only if each number is.
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float64))):
        raise SpectrumError(
            "The weight holds NaN or infinity. Singular values need finite numbers. Download the checkpoint again."
        )


def _descending(values: Tensor) -> Array:
    S = values.detach().to("cpu", torch.float64).numpy()
    if S.ndim != 1 or not len(S) or not np.isfinite(S).all() or S.min() < 0:
        raise SpectrumError(
            f"{tuple(values.shape)} numbers are not the singular values of a matrix. "
            "They form a list, are finite and not negative. Compute them with eckart.spectrum.singular_values."
        )
    return np.sort(S)[::-1]


def _gram(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The smaller of W W' and W' W, both halves filled; converted in parts, so that no second copy is made."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    found = torch.zeros(len(wide), len(wide), dtype=dtype, device=weight.device)
    for part in wide.split(COLUMNS, 1):
        part = part.to(dtype)
        _add_lower(found, part, part)
    return _mirrored(found)


def _add_lower(symmetric: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0) -> None:
    """Add alpha left @ right', where the sum is symmetric: to the lower half and little more."""
    for start in range(0, len(symmetric), ROWS):
        end = start + ROWS
        symmetric[start:end, :end].addmm_(left[start:end], right[:end].mT, alpha=alpha)


def _mirrored(symmetric: Tensor) -> Tensor:
    """Fill the upper half from the lower one, in place."""
    for start in range(0, len(symmetric), ROWS):
        end = start + ROWS
        symmetric[:start, start:end] = symmetric[start:end, :start].mT
    return symmetric


def _least_of_gram(side: int) -> float:
    """S_i / S_1 from which an eigenvalue in float64 says more of S_i than float32 could store."""
    return max(side, 1024) * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def _is_flat(gram: Tensor) -> bool:
    """Whether squaring in float32 leaves the root mean square of the singular values `FAST_ERROR`, at most."""
    mean, top = float(gram.trace()) / len(gram), _norm(gram)
    # Where squares leave the range of float32, it does not do either.
    if not (math.isfinite(top) and mean > torch.finfo(gram.dtype).tiny / torch.finfo(gram.dtype).eps):
        return False
    return 4 * math.sqrt(len(gram)) * torch.finfo(gram.dtype).eps * top / (2 * mean) < FAST_ERROR


def _norm(symmetric: Tensor, *, steps: int = 10) -> float:
    """The largest eigenvalue by power iteration from below, about; enough to choose a dtype."""
    vector = torch.randn(len(symmetric), 1, generator=torch.Generator().manual_seed(0)).to(symmetric)
    for _ in range(steps):
        vector = symmetric @ (vector / torch.linalg.vector_norm(vector))
    return float(torch.linalg.vector_norm(vector))


def _reflect(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a panel into (I - V T V') R: V, T, and R below which there are zeros."""
    packed, tau = torch.geqrf(panel)
    V = packed[:, : len(tau)].tril(-1)
    V.diagonal().fill_(1)
    # The inverse of T is known; a column that needs no reflection has tau 0 and a V that must not count.
    still = tau == 0
    V = torch.where(still, torch.zeros_like(V), V)
    inverse = (V.mT @ V).triu(1)
    inverse.diagonal().copy_(
        torch.where(still, torch.ones_like(tau), 1 / torch.where(still, torch.ones_like(tau), tau))
    )
    T = torch.linalg.solve_triangular(inverse, torch.eye(len(tau), dtype=panel.dtype, device=panel.device), upper=True)
    return V, T, packed.triu()
