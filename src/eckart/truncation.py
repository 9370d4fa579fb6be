"""What may replace a matrix: low rank, zero, magnitude pruning. Tensors in, tensors out.

Notation: W = U diag(S) Vh with S descending; shape (out, in); rho is the kept fraction of the largest
possible rank. This module has no idea what a model is.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import RankError

Basis = Literal["top", "bottom", "random"]


@dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition, W = U @ diag(S) @ Vh, from which every rank can be cut."""

    U: Tensor
    """Shape (out, k), orthonormal columns."""
    S: Tensor
    """Shape (k,), descending, not negative."""
    Vh: Tensor
    """Shape (k, in), orthonormal rows."""


def rank_of(rho: float, shape: tuple[int, int]) -> int:
    """Turn a kept fraction into a rank: `max(1, floor(rho * min(shape) + 1e-9))`.

    The 1e-9 undoes the representation error of decimals: 0.01 of 1600 is 16, not 15.

    Args:
        rho: Fraction of the largest possible rank that is kept, `0 < rho <= 1`.
        shape: (out, in).

    Returns:
        A rank from 1 to `min(shape)`.

    Raises:
        RankError: `rho` is outside its range.

    Source:
        LASER (arXiv 2312.13558) keeps `int(min(shape) * rho)`, which can be one too low and can be zero.

    >>> rank_of(0.01, (4096, 1600)), rank_of(0.001, (64, 64))
    (16, 1)
    """
    if not 0 < rho <= 1:
        raise RankError(
            f"rho {rho} is not a fraction of a rank. rho is above 0 and at most 1 (1 keeps everything). "
            "Use kind 'zero' to remove a matrix altogether."
        )
    return max(1, math.floor(rho * min(shape) + 1e-9))


def decompose(weight: Tensor) -> Spectrum:
    """Compute the exact singular value decomposition.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.

    Returns:
        Factors in float32 (float64 if `weight` is float64), on the device of `weight`, k = min(out, in).

    Source:
        Truncating it is optimal in Frobenius and spectral norm: Eckart & Young 1936, doi:10.1007/BF02288367.

    >>> decompose(torch.diag(torch.tensor([1.0, 3.0]))).S
    tensor([3., 1.])
    """
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return Spectrum(*torch.linalg.svd(precise, full_matrices=False))


def decompose_approximately(weight: Tensor, rank: int, *, niter: int = 2, seed: int = 0) -> Spectrum:
    """Compute the leading components by seeded `svd_lowrank(q=rank)`, to mimic the LASER reference.

    Its error is up to 10 % above optimal, since q has no oversampling; prefer `decompose`.

    Args:
        weight: Shape (out, in). Not modified.
        rank: Components computed, `1 <= rank <= min(out, in)`.
        niter: Subspace iterations; the reference uses 2 for decoders and 20 for RoBERTa.
        seed: Of the random projection, drawn on the CPU; the global random state is left alone.

    Returns:
        Factors in float32 (float64 if `weight` is float64), k = `rank`.

    Raises:
        RankError: `rank` is outside its range.
    """
    _check_rank(rank, (weight.shape[0], weight.shape[1]))
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(precise, q=rank, niter=niter)
    return Spectrum(U, S, V.mT)


def cut(spectrum: Spectrum, rank: int, *, basis: Basis = "top", seed: int = 0) -> Spectrum:
    """Keep `rank` components of a decomposition.

    Args:
        spectrum: A decomposition with k components. Not modified.
        rank: Components kept, `1 <= rank <= k`.
        basis: `top` keeps the largest singular values (the best approximation), `bottom` the smallest,
            `random` a uniformly random subset: the control that shows whether the choice matters.
        seed: Of the random subset.

    Returns:
        The kept components, in descending order. Views of `spectrum` where the basis allows it.

    Raises:
        RankError: `rank` is outside its range.
    """
    available = spectrum.S.numel()
    _check_rank(rank, (spectrum.U.shape[0], spectrum.Vh.shape[1]), available)
    if basis == "top":
        kept = slice(0, rank)
    elif basis == "bottom":
        kept = slice(available - rank, available)
    else:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(available, generator=generator)[:rank].sort().values.to(spectrum.S.device)
    return Spectrum(spectrum.U[:, kept], spectrum.S[kept], spectrum.Vh[kept])


def dense(spectrum: Spectrum) -> Tensor:
    """Multiply a decomposition out.

    Args:
        spectrum: Any number of components. Not modified.

    Returns:
        Shape (out, in), in the dtype and on the device of the factors.
    """
    return (spectrum.U * spectrum.S) @ spectrum.Vh


def magnitude(weight: Tensor, rho: float) -> Tensor:
    """Zero the entries of smallest absolute value (the LASER reference's "dropout").

    Args:
        weight: Shape (out, in). Not modified.
        rho: Fraction of the entries kept, `0 < rho <= 1`.

    Returns:
        Same shape, dtype and device; entries as small as the threshold go too, so ties may remove more.

    Raises:
        RankError: `rho` is outside its range.

    Source:
        LASER's `do_low_rank` scripts, appendix D; theirs removes one entry more, at rank int((1-rho)*numel).
    """
    if not 0 < rho <= 1:
        raise RankError(
            f"rho {rho} is not a fraction of the entries. It is above 0 and at most 1. Use kind 'zero' for none."
        )
    removed = math.floor((1 - rho) * weight.numel() + 1e-9)
    if removed == 0:
        return weight.clone()
    sizes = weight.abs().flatten()
    threshold = sizes.kthvalue(removed).values
    return torch.where(weight.abs() <= threshold, torch.zeros_like(weight), weight)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to 8-bit integers, symmetric around zero, with one scale for each output row.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.

    Returns:
        Integers from -127 to 127, shape (out, in), int8, and scales, shape (out, 1), float32; their product is
        nowhere further from `weight` than half a scale (and float32 rounding).

    >>> round_to_int8(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))[0].tolist()
    [[127, -50], [0, 0]]
    """
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True) / 127
    # A row of zeros, or of numbers too small for a float32 scale, stays zero.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales


def seed_for(seed: int, name: str) -> int:
    """Derive a seed for one matrix, so that its random cut does not depend on which others are cut.

    Args:
        seed: The run's seed.
        name: The matrix's name.

    Returns:
        An integer from 0 to 2**31 - 1.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _check_rank(rank: int, shape: tuple[int, int], available: int | None = None) -> None:
    largest = min(shape) if available is None else available
    if not 1 <= rank <= largest:
        raise RankError(
            f"rank {rank} does not fit a matrix of shape {tuple(shape)}. A rank here is from 1 to {largest}. "
            "Change the rank, or leave the matrix dense."
        )
