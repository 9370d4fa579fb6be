"""Low rank in a metric: what the inputs of a matrix look like, and what its outputs matter. Tensors in, tensors out.

Notation: W has shape (out, in); A = mean x x' of its inputs, G = mean g g' of the loss's gradients at its outputs,
A = La La', G = Lg Lg'. The loss that a change D of W costs is about tr(G D A D') = ||Lg' D La||^2, so the best W of
rank r is Lg^-T SVD_r(Lg' W La) La^-1. Every published metric is a choice of the two roots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import ModelError
from eckart.truncation import Spectrum, decompose

RIDGES = (0.0, 1e-10, 1e-8, 1e-6)
"""Shares of the mean diagonal that are added until Cholesky succeeds; then eigenvalues are used."""
SMALLEST = 1e-6
"""Diagonal entries below this share of the mean are raised to it: a dead input or output must not be divided by."""


@dataclass(frozen=True)
class Root:
    """A square root R of a metric M = R R', with its inverse; for a diagonal one only the diagonals."""

    factor: Tensor
    """Shape (n, n), or (n,) if diagonal; float64."""
    inverse: Tensor
    how: str
    """How it was found: `diagonal`, `cholesky`, `cholesky, ridge 1e-08`, `eigenvalues`, or `identity` where M is 0."""

    def after(self, weight: Tensor) -> Tensor:
        """Give `weight @ R`."""
        return weight * self.factor if self.factor.ndim == 1 else weight @ self.factor

    def before(self, weight: Tensor) -> Tensor:
        """Give `R' @ weight`."""
        return self.factor[:, None] * weight if self.factor.ndim == 1 else self.factor.T @ weight

    def undone_after(self, weight: Tensor) -> Tensor:
        """Give `weight @ R^-1`."""
        return weight * self.inverse if self.inverse.ndim == 1 else weight @ self.inverse

    def undone_before(self, weight: Tensor) -> Tensor:
        """Give `R'^-1 @ weight`."""
        return self.inverse[:, None] * weight if self.inverse.ndim == 1 else self.inverse.T @ weight

    def solve_after(self, weight: Tensor) -> Tensor:
        """Give `weight @ M^-1`."""
        return weight * self.inverse**2 if self.inverse.ndim == 1 else weight @ self.inverse.T @ self.inverse


@dataclass(frozen=True)
class WeightedSpectrum:
    """W = left @ diag(S) @ right, where cutting to the first r components is optimal in the metric."""

    left: Tensor
    """Shape (out, k), float64; columns orthonormal in the metric of the outputs."""
    S: Tensor
    """Shape (k,), descending; the squares of those left out add up to the squared error in the metric."""
    right: Tensor
    """Shape (k, in), float64."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Give `up`, shape (out, rank), and `down`, shape (rank, in), whose product is the best of that rank."""
        return self.left[:, :rank] * self.S[:rank], self.right[:rank]

    def cut(self, rank: int) -> Spectrum:
        """Give the best matrix of that rank as an ordinary decomposition, float32."""
        found = as_spectrum(*self.factors(rank))
        return Spectrum(found.U.float(), found.S.float(), found.Vh.float())


@dataclass(frozen=True)
class Metric:
    """What the error of a weight is measured in: `tr(G D A D')` for a change D."""

    outputs: Tensor
    """G, shape (out, out), float64."""
    inputs: Tensor
    """A, shape (in, in), float64."""

    @classmethod
    def from_moments(cls, outputs: Tensor, inputs: Tensor, *, shrinkage: tuple[float, float] = (0.0, 0.0)) -> Metric:
        """Make a metric of second moments, of which one that is zero counts as the identity.

        Args:
            outputs: Of the loss's gradients at the outputs, shape (out, out), any floating dtype. Not modified.
            inputs: Of the inputs, shape (in, in). Not modified.
            shrinkage: Share of the identity that is mixed into each, as for `square_root`.

        Returns:
            The metric.

        Raises:
            ModelError: An entry is not finite.
        """
        found = []
        for moment, share in zip((outputs, inputs), shrinkage):
            moment = _finite(moment).double()
            moment = shrunk((moment + moment.T) / 2, share)
            known = bool(moment.diagonal().mean() > 0)
            found.append(moment if known else torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
        return cls(*found)

    def error(self, change: Tensor) -> float:
        """Give the error that a change causes.

        Args:
            change: D, shape (out, in), float64. Not modified.

        Returns:
            `tr(G D A D')`, not negative but for rounding.
        """
        return float((self.outputs @ change @ self.inputs * change).sum())


def diagonal_root(scales: Tensor) -> Root:
    """Make the root of a diagonal metric.

    Args:
        scales: Shape (n,), not negative, any floating dtype. Not modified. What is below `SMALLEST` of the mean is
            raised to that; if all are zero the root is the identity.

    Returns:
        The root diag(scales), float64.

    Raises:
        ModelError: A scale is not finite.

    >>> diagonal_root(torch.tensor([2.0, 0.0])).factor
    tensor([2.0000e+00, 1.0000e-06], dtype=torch.float64)
    """
    scales = _finite(scales).double()
    mean = scales.mean()
    if not mean > 0:
        return _identity(scales)
    scales = scales.clamp(min=float(mean) * SMALLEST)
    return Root(scales, 1 / scales, "diagonal")


def square_root(moment: Tensor, *, shrinkage: float = 0.0) -> Root:
    """Make the root of a full metric, whether or not it is singular.

    Cholesky in float64; if that fails, with a growing ridge; if the last one fails too, eigenvalues, those that are too
    small raised.

    Args:
        moment: Shape (n, n), symmetric but for rounding, any floating dtype. Not modified.
        shrinkage: Share of the mean diagonal that is mixed in, from 0 to 1: (1 - s) M + s mean(diag M) I.

    Returns:
        The root; lower triangular, or symmetric where eigenvalues were used. The identity if `moment` is zero.

    Raises:
        ModelError: An entry is not finite.

    >>> square_root(torch.tensor([[4.0, 2.0], [2.0, 2.0]])).factor
    tensor([[2., 0.],
            [1., 1.]], dtype=torch.float64)
    """
    moment = _finite(moment).double()
    moment = (moment + moment.T) / 2
    mean = moment.diagonal().mean()
    if not mean > 0:
        return _identity(moment.diagonal())
    moment = shrunk(moment, shrinkage)
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(moment + ridge * mean * eye)
        # A pivot that is all rounding error passes Cholesky; dividing by it would not.
        if not failed and bool(factor.diagonal().min() ** 2 > 1e-13 * mean):
            inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
            return Root(factor, inverse, f"cholesky, ridge {ridge:.0e}" if ridge else "cholesky")
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=float(mean) * SMALLEST).sqrt()
    return Root(vectors * values @ vectors.T, vectors / values @ vectors.T, "eigenvalues")


def shrunk(moment: Tensor, share: float) -> Tensor:
    """Mix a metric with the multiple of the identity that has its mean diagonal.

    Args:
        moment: Shape (n, n). Not modified.
        share: Of the identity, from 0 to 1.

    Returns:
        Shape (n, n).
    """
    mixed = (1 - share) * moment
    mixed.diagonal().add_(share * moment.diagonal().mean())
    return mixed


def decompose_weighted(weight: Tensor, left: Root | None = None, right: Root | None = None) -> WeightedSpectrum:
    """Decompose a weight in a metric of its outputs and one of its inputs.

    With the roots left out it is the ordinary SVD. All compression methods follow from it: fwsvd has a diagonal left
    root, asvd a diagonal right one, whiten the full right one, double both.

    Args:
        weight: Shape (out, in), any floating dtype. Not modified.
        left: Root of the metric of the outputs; None for the identity.
        right: Root of the metric of the inputs; None for the identity.

    Returns:
        The components in float64, on the device of `weight`, min(out, in) of them.

    Source:
        Eckart & Young 1936 in the metric; for the right root SVD-LLM (arXiv 2403.07378), for both the
        Kronecker-factored metric of GFWSVD and LEMS.
    """
    weighted = weight.double()
    if left is not None:
        weighted = left.before(weighted)
    if right is not None:
        weighted = right.after(weighted)
    spectrum = decompose(weighted)
    return WeightedSpectrum(
        spectrum.U if left is None else left.undone_before(spectrum.U),
        spectrum.S,
        spectrum.Vh if right is None else right.undone_after(spectrum.Vh),
    )


def as_spectrum(up: Tensor, down: Tensor) -> Spectrum:
    """Write a product of two factors as an ordinary singular value decomposition, without multiplying it out.

    Args:
        up: Shape (out, r), float64. Not modified.
        down: Shape (r, in), float64. Not modified.

    Returns:
        The decomposition with r components, float64.
    """
    Q, R = torch.linalg.qr(up)
    P, T = torch.linalg.qr(down.T)
    U, S, Vh = torch.linalg.svd(R @ T.T)
    return Spectrum(Q @ U, S, Vh @ P.T)


def _identity(like: Tensor) -> Root:
    ones = torch.ones_like(like)
    return Root(ones, ones, "identity")


def _finite(tensor: Tensor) -> Tensor:
    if bool(torch.isfinite(tensor).all()):
        return tensor
    raise ModelError(
        "Statistics of the calibration text hold NaN or infinity. They must be finite. "
        "Load the model in a wider --dtype, or give another calibration text."
    )
