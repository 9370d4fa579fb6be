"""A weight as a product of two block-diagonal matrices with a permutation between them: the algebra and the layer.

Notation: W has shape (out, in) and is cut by a grid into b x b equal blocks. Block (i, j) has rank r: it is the part of
`up[i]` that reads what j made, times the part of `down[j]` that makes it. So

    W = blockdiag(up) P blockdiag(down)        r b (out + in) numbers

where the permutation P carries what every j made for i to i. The width k = r b is the rank of a pair of factors that
takes as many numbers. torch only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import RankError
from eckart.linear import LowRankLayer
from eckart.weighting import Metric, Root, decompose_weighted, square_root

LARGEST_GRID = 64
"""Finer grids are not tried: the finer, the worse was all that was measured, and none was best above 16."""
ROUNDS = 3
"""Times that every block is cut again for what the others leave; of the error, a fourth gains less than 1 %."""


@dataclass(frozen=True)
class Monarch:
    """A weight as two block-diagonal factors."""

    up: Tensor
    """Shape (b, out / b, k); columns ordered by the block of the input that they read, then by component."""
    down: Tensor
    """Shape (b, k, in / b); rows ordered by the block of the output that they are for, then by component."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.up) * self.up.shape[1], len(self.down) * self.down.shape[2]

    def dense(self) -> Tensor:
        """Multiply the weight out, in float32 or better, in the dtype and on the device of the factors."""
        b, size, k = self.up.shape
        precise = torch.promote_types(self.up.dtype, torch.float32)
        up = self.up.to(precise).view(b, size, b, k // b).transpose(1, 2)
        down = self.down.to(precise).view(b, b, k // b, -1).transpose(0, 1)
        return (up @ down).transpose(1, 2).reshape(self.shape).to(self.up.dtype)

    def bytes_stored(self, dtype: torch.dtype) -> int:
        """Count the bytes of the factors in a dtype."""
        return (self.up.numel() + self.down.numel()) * dtype.itemsize

    def layer(self, *, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> MonarchLinear:
        """Make the layer that stores it.

        Args:
            bias: Shape (out,). Copied.
            dtype: Of the factors; by default their own.

        Returns:
            The layer, on the device of the factors.
        """
        (out, into), (b, _, k) = self.shape, self.up.shape
        place: dict[str, Any] = {"device": self.up.device, "dtype": dtype or self.up.dtype}
        layer = MonarchLinear(into, out, b, k // b, bias is not None, **place)
        with torch.no_grad():
            layer.up.copy_(self.up)
            layer.down.copy_(self.down)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer


class MonarchLinear(LowRankLayer):
    """Two batched products with a permutation between them.

    Args:
        in_features: Of the input.
        out_features: Of the output.
        grid: b, a common divisor of both.
        rank: Of every block, from 1 to that of a full one.
        bias: Whether there is one.
        device: Of the factors; `meta` where they are loaded later.
        dtype: Of the factors.

    Raises:
        RankError: The grid or the rank does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int,
        rank: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if grid < 1 or out_features % grid or in_features % grid:
            raise RankError(
                f"a grid of {grid} does not fit a layer of shape {(out_features, in_features)}. It divides both sides. "
                "Change the grid, or leave the layer dense."
            )
        largest = min(out_features, in_features) // grid
        if not 1 <= rank <= largest:
            raise RankError(
                f"rank {rank} does not fit the blocks of a layer of shape {(out_features, in_features)} and grid "
                f"{grid}. A rank here is from 1 to {largest}. Change the rank, or leave the layer dense."
            )
        super().__init__(in_features, out_features, device, dtype)
        self.grid, self.rank = grid, rank
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.zeros(grid, grid * rank, in_features // grid, **place))
        self.up = nn.Parameter(torch.zeros(grid, out_features // grid, grid * rank, **place))
        self.bias = nn.Parameter(torch.zeros(out_features, **place)) if bias else None

    def dense(self) -> Tensor:
        """Multiply the weight out."""
        return Monarch(self.up, self.down).dense()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension, as `nn.Linear` does."""
        b, leading = self.grid, x.shape[:-1]
        parts = x.reshape(-1, b, self.in_features // b).transpose(0, 1)
        made = torch.bmm(parts, self.down.mT)
        moved = made.view(b, -1, b, self.rank).permute(2, 1, 0, 3).reshape(b, -1, b * self.rank)
        y = torch.bmm(moved, self.up.mT).transpose(0, 1).reshape(*leading, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the shape as `nn.Linear` does, and the blocks."""
        return f"{super().extra_repr()}, grid={self.grid}, rank={self.rank}"


def grids(shape: tuple[int, int]) -> tuple[int, ...]:
    """List the grids that divide a weight into equal blocks, more than one.

    Args:
        shape: (out, in).

    Returns:
        Their numbers of blocks along a side, ascending, at most `LARGEST_GRID`; empty where there is none.

    >>> grids((12, 18)), grids((5, 7))
    ((2, 3, 6), ())
    """
    common = math.gcd(*shape)
    return tuple(b for b in range(2, min(common, LARGEST_GRID) + 1) if common % b == 0)


def block_errors(weight: Tensor, metric: Metric | None = None) -> tuple[Tensor, Tensor]:
    """Find the best grid for every width, by what the blocks lose in the metric of their own outputs and inputs.

    Args:
        weight: Shape (out, in), any floating dtype. Not modified.
        metric: By default the identity, for which the sum over blocks is the error of the whole.

    Returns:
        For every width from 0 to min(out, in) the least sum of squared errors, float64, infinite where no grid divides
        the width; and its grid, int64, 0 where there is none.
    """
    full = min(weight.shape)
    errors = torch.full((full + 1,), torch.inf, dtype=torch.float64)
    best = torch.zeros(full + 1, dtype=torch.int64)
    for b in grids((weight.shape[0], weight.shape[1])):
        S = _decomposed(weight, b, metric)[1].cpu()
        tails = S.square().sum((0, 1)).flip(0).cumsum(0).flip(0)
        for rank in range(1, S.shape[-1] + 1):
            error = tails[rank] if rank < len(tails) else 0.0
            if error < errors[rank * b]:
                errors[rank * b], best[rank * b] = error, b
    return errors, best


def fit(weight: Tensor, grid: int, rank: int, metric: Metric | None = None, *, rounds: int = ROUNDS) -> Monarch:
    """Cut every block of a grid to a rank, and then each again for what the others leave.

    Without a metric, cutting every block by its own SVD is the best that this structure can do. A metric mixes blocks:
    what one loses, another can make up for. The best block for given others is an SVD in the metric again, so the error
    never rises; it ends near a local optimum.

    Args:
        weight: Shape (out, in), any floating dtype. Not modified.
        grid: b, which divides both sides.
        rank: Of every block.
        metric: By default the identity.
        rounds: Times that every block is cut again; without a metric there is nothing to gain.

    Returns:
        The factors, float64, on the device of `weight`.

    Source:
        Dao et al. 2022, "Monarch" (arXiv 2204.00595), projects block by block with rank 1 and square grids; several
        components are block low rank (BLR); cutting again in the metric is ours.
    """
    weight = weight.double()
    left, S, right = _decomposed(weight, grid, metric)
    up, down = left[..., :rank] * S[..., None, :rank], right[..., :rank, :].clone()
    if metric is not None:
        _descend_(weight, up, down, metric, rounds)
    # Both sides of a component get the same norm, so that rounding either weighs the same.
    norms = up.norm(dim=-2), down.norm(dim=-1)
    scale = torch.where(norms[0] > 0, (norms[1] / norms[0]).sqrt(), 1.0)
    up, down = up * scale[..., None, :], down / scale[..., None]
    b, size, into = grid, weight.shape[0] // grid, weight.shape[1] // grid
    return Monarch(up.transpose(1, 2).reshape(b, size, b * rank), down.transpose(0, 1).reshape(b, b * rank, into))


def _decomposed(weight: Tensor, grid: int, metric: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose every block by itself: `WeightedSpectrum`'s tensors with leading axes (b, b)."""
    (out, into), b = weight.shape, grid
    blocks = weight.double().view(b, out // b, b, into // b).transpose(1, 2)
    if metric is None:
        return torch.linalg.svd(blocks, full_matrices=False)
    before, after = _roots(metric.outputs, b), _roots(metric.inputs, b)
    L, Li, R, Ri = (
        torch.stack([_full(getattr(root, name)) for root in roots])
        for roots in (before, after)
        for name in ("factor", "inverse")
    )
    U, S, Vh = torch.linalg.svd(L.mT[:, None] @ blocks @ R, full_matrices=False)
    return Li.mT[:, None] @ U, S, Vh @ Ri


def _descend_(weight: Tensor, up: Tensor, down: Tensor, metric: Metric, rounds: int) -> None:
    """Cut each block again, given the others: the best is the cut of W_ij + G_ii^-1 C A_jj^-1.

    C is what the errors of the other blocks add to G E A at this one.
    """
    b, rank = len(up), up.shape[-1]
    outputs, inputs = metric.outputs, metric.inputs
    before, after = _roots(outputs, b), _roots(inputs, b)
    rows, columns = list(_parts(len(outputs), b)), list(_parts(len(inputs), b))
    error = weight - (up @ down).transpose(1, 2).reshape(weight.shape)
    pull = outputs @ error @ inputs
    for _ in range(rounds):
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            G, A, own = outputs[row, row], inputs[column, column], error[row, column]
            others = pull[row, column] - G @ own @ A
            wanted = weight[row, column] + after[j].solve_after(before[i].solve_after(others.T).T)
            new_up, new_down = decompose_weighted(wanted, before[i], after[j]).factors(rank)
            new = weight[row, column] - new_up @ new_down
            change = new - own
            # A root that had to be made invertible is of another metric, in which the best may be worse in this one.
            if not float((2 * pull[row, column] + G @ change @ A).mul(change).sum()) < 0:
                continue
            up[i, j], down[i, j], error[row, column] = new_up, new_down, new
            pull += outputs[:, row] @ change @ inputs[column]


def _roots(metric: Tensor, grid: int) -> list[Root]:
    """The roots of the diagonal blocks of a metric."""
    return [square_root(metric[part, part]) for part in _parts(len(metric), grid)]


def _parts(size: int, grid: int) -> Iterator[slice]:
    return (slice(start, start + size // grid) for start in range(0, size, size // grid))


def _full(diagonal: Tensor) -> Tensor:
    return torch.diag(diagonal) if diagonal.ndim == 1 else diagonal
