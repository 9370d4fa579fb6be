"""Rows of a matrix in clusters, each with a low-rank approximation of its own. Tensors in, tensors out.

Notation: weight (out, in); k clusters of its rows; rank is that of each cluster. Clusters are index tensors that
hold every row exactly once.

Source: one subspace for each cluster of rows is Maalouf et al., "Deep Learning Meets Projective Clustering",
ICLR 2021 (arXiv 2010.04290), there for embedding tables. The alternation is k-subspaces: Bradley & Mangasarian
2000, doi:10.1023/A:1008324625522; the spread of its starts is that of k-means++ (Arthur & Vassilvitskii 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart import truncation
from eckart.errors import RankError
from eckart.truncation import Spectrum

STARTS = 3
"""Of `subspaces`: contiguous blocks, then seeded ones."""
ITERATIONS = 30
"""Of one start, at most; it ends before where an iteration gains less than 0.01 % of what is left."""
LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class Cluster:
    """Some rows of a matrix, and the decomposition of the matrix that they are."""

    rows: Tensor
    """Indices into the rows of the whole matrix, ascending, shape (rows,), int64."""
    spectrum: Spectrum
    """Of `weight[rows]`."""


def even_sizes(out: int, blocks: int) -> tuple[int, ...]:
    """Divide rows into nearly equal blocks.

    Args:
        out: Rows, at least 1.
        blocks: How many, `1 <= blocks <= out`.

    Returns:
        Rows of every block; the first ones have one more where it does not come out even.

    Raises:
        RankError: More blocks than rows, or none.

    >>> even_sizes(10, 4)
    (3, 3, 2, 2)
    """
    if not 1 <= blocks <= out:
        raise RankError(
            f"{blocks} blocks do not fit a matrix of {out} rows. Blocks are from 1 to the number of rows. "
            "Use fewer blocks."
        )
    return tuple(out // blocks + (number < out % blocks) for number in range(blocks))


def contiguous(out: int, blocks: int) -> tuple[Tensor, ...]:
    """Cluster rows by their order: nearly equal runs of neighbours.

    The heads of a query, key or value projection are such runs.

    Args:
        out: Rows, at least 1.
        blocks: How many, `1 <= blocks <= out`.

    Returns:
        Row indices of every cluster, ascending, int64, on the CPU.

    Raises:
        RankError: More blocks than rows, or none.
    """
    return torch.arange(out).split(list(even_sizes(out, blocks)))


def subspaces(weight: Tensor, blocks: int, rank: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Cluster rows by the subspace that they lie near: k-subspaces.

    Every row goes to the subspace that leaves it the least residual, then every subspace is fitted to its rows,
    until nothing is gained. The best of three starts is kept; one is `contiguous`, so the error is never above that
    of contiguous blocks. It is a local minimum: the problem is NP-hard.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.
        blocks: Clusters k, `1 <= k <= out`. None is empty.
        rank: Dimension of each subspace, `1 <= rank <= in`.
        seed: Of the starts, drawn on the CPU; the global random state is left alone.

    Returns:
        Row indices of every cluster, ascending, int64, on the CPU; the cluster with the first row comes first.

    Raises:
        RankError: More blocks than rows, or a rank outside its range.

    Source:
        See the module. Costs, an iteration, k products of the weight with `rank` columns and k eigenvalue problems of
        size min(rows of the cluster, in), all in float64.
    """
    out, into = weight.shape
    if not 1 <= rank <= into:
        raise RankError(
            f"rank {rank} is not the dimension of a subspace of rows with {into} numbers. "
            f"It is from 1 to {into}. Change the rank."
        )
    start = torch.repeat_interleave(torch.tensor(even_sizes(out, blocks))).to(weight.device)
    rows = weight.double()
    if into > out:
        # Only angles and lengths count: `out` coordinates in the rows' own span hold them all.
        rows = torch.linalg.qr(rows.mT, mode="r").R.mT
    generator = torch.Generator().manual_seed(seed)
    found = [_alternate(rows, start, blocks, rank)]
    found += [_alternate(rows, _spread(rows, blocks, rank, generator), blocks, rank) for _ in range(STARTS - 1)]
    _, best = min(found, key=lambda pair: pair[0])
    clusters = [(best == number).nonzero().flatten().cpu() for number in range(blocks)]
    return tuple(sorted(clusters, key=lambda members: int(members[0])))


def decompose_clusters(weight: Tensor, clusters: Sequence[Tensor]) -> tuple[Cluster, ...]:
    """Decompose every cluster of rows by itself, exactly.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.
        clusters: Row indices, as `contiguous` and `subspaces` give them.

    Returns:
        One decomposition a cluster, from which every rank can be cut; dtype and device as from `truncation.decompose`.
    """
    return tuple(Cluster(rows, truncation.decompose(weight[rows.to(weight.device)])) for rows in clusters)


def truncate_clusters(clusters: Sequence[Cluster], rank: int) -> Tensor:
    """Approximate a matrix by the best matrix of some rank in each of its clusters.

    Args:
        clusters: Of all its rows. Not modified.
        rank: Components kept in each, at least 1; a cluster that has fewer keeps all it has.

    Returns:
        Shape (out, in), in the dtype and on the device of the factors.

    Raises:
        RankError: `rank` is below 1.
    """
    factors = clusters[0].spectrum
    found = factors.U.new_empty(sum(len(cluster.rows) for cluster in clusters), factors.Vh.shape[1])
    for cluster in clusters:
        kept = truncation.cut(cluster.spectrum, min(rank, len(cluster.spectrum.S)))
        found[cluster.rows.to(found.device)] = truncation.dense(kept)
    return found


def factored_numbers(sizes: Sequence[int], into: int, rank: int) -> int:
    """Count the numbers that clusters of rows need, each as two factors or dense, whichever is fewer.

    A product with one input vector costs two floating-point operations for each of them.

    Args:
        sizes: Rows of every cluster.
        into: Columns of the matrix.
        rank: Components kept in each cluster; a cluster that has fewer keeps all it has.

    Returns:
        The sum over clusters of `min(r * (rows + into), rows * into)` with r = min(rank, rows, into).
    """
    return sum(min(min(rank, size, into) * (size + into), size * into) for size in sizes)


def runs_of(free: Tensor) -> list[Tensor]:
    """Divide rows into runs of neighbours.

    Args:
        free: Which of all rows are meant, bool.

    Returns:
        Their indices, run by run.
    """
    rows = free.nonzero().flatten()
    ends = (rows.diff() != 1).nonzero().flatten() + 1
    return list(rows.tensor_split(ends.tolist())) if len(rows) else []


def _alternate(rows: Tensor, assigned: Tensor, blocks: int, rank: int) -> tuple[float, Tensor]:
    """Improve an assignment until nothing is gained: the least error met, and where."""
    best = (float("inf"), assigned)
    for _ in range(ITERATIONS):
        residuals = _residuals(rows, [_basis(rows[assigned == number], rank) for number in range(blocks)])
        error = float(residuals.gather(1, assigned[:, None]).sum())
        if error >= best[0] * (1 - LEAST_GAIN):
            break
        best = (error, assigned)
        nearest = residuals.min(1)
        assigned = _without_empty(nearest.indices, nearest.values, blocks)
    return best


def _basis(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal columns that span the subspace nearest to the rows."""
    if len(rows) <= rank:
        return torch.linalg.qr(rows.mT).Q
    if len(rows) < rows.shape[1]:
        left = torch.linalg.eigh(rows @ rows.mT).eigenvectors[:, -rank:]
        return torch.linalg.qr(rows.mT @ left).Q
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -rank:]


def _residuals(rows: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Squared distance of every row from every subspace, shape (out, k)."""
    energy = rows.square().sum(1)
    distances = [energy - (rows @ basis).square().sum(1) for basis in bases]
    return torch.stack(distances, 1).clamp_min(0)


def _without_empty(assigned: Tensor, residual: Tensor, blocks: int) -> Tensor:
    """Give every empty cluster the worst row of a cluster that has others; alone, a row has no residual."""
    counts = torch.bincount(assigned, minlength=blocks)
    for empty in (counts == 0).nonzero().flatten().tolist():
        worst = int(residual.masked_fill(counts[assigned] < 2, -1).argmax())
        counts[assigned[worst]] -= 1
        counts[empty] += 1
        assigned[worst] = empty
    return assigned


def _spread(rows: Tensor, blocks: int, rank: int, generator: torch.Generator) -> Tensor:
    """Start from subspaces of rows and their nearest by angle; rows far from those before are likelier to be next."""
    directions = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    bases: list[Tensor] = []
    chances = rows.square().sum(1)
    for _ in range(blocks):
        # All rows may lie in the subspaces already; then any row will do.
        chances = chances if bool(chances.sum() > 0) else torch.ones_like(chances)
        row = int(torch.multinomial(chances.cpu(), 1, generator=generator))
        near = (directions @ directions[row]).abs().topk(min(rank, len(rows))).indices
        bases.append(torch.linalg.qr(rows[near].mT).Q)
        chances = torch.minimum(chances, _residuals(rows, bases[-1:])[:, 0])
    nearest = _residuals(rows, bases).min(1)
    return _without_empty(nearest.indices, nearest.values, blocks)
