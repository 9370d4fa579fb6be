"""A weight as a product of low rank and a few entries of their own: the algebra and the layer.

Notation: W ~ U V + S, where S has z entries that are not zero, kept by rows (CSR): `values`, their `columns`, and
`starts`, where each row begins. torch only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.errors import MatrixError
from eckart.linear import STORAGES, FactoredLinear, LowRankLayer, PivotedLinear, bytes_stored
from eckart.truncation import Spectrum, dense
from eckart.weighting import Metric, as_spectrum, decompose_weighted, square_root

ROUNDS = 3
"""Times that the product and the entries are fitted in turns."""
STEPS = 5
"""Steps of conjugate gradients for the values of entries; with twice as many the error was the same."""


@dataclass(frozen=True)
class LowRankSparse:
    """A weight as low rank plus sparse."""

    spectrum: Spectrum
    values: Tensor
    """Shape (z,), those of a row beside each other."""
    columns: Tensor
    """Shape (z,), int64, ascending in a row."""
    starts: Tensor
    """Shape (out + 1,), int64."""
    storage: Literal["factored", "pivoted"] = "factored"
    """Of the product."""

    def dense(self) -> Tensor:
        """Multiply the weight out, in the dtype and on the device of the factors."""
        return dense(self.spectrum) + scattered(
            self.values, self.columns, self.starts, (len(self.spectrum.U), self.spectrum.Vh.shape[1])
        )

    def bytes_stored(self, dtype: torch.dtype) -> int:
        """Count the bytes of the layer without its bias, with its values and factors in a dtype."""
        shape = len(self.spectrum.U), self.spectrum.Vh.shape[1]
        return bytes_stored(self.storage, shape, len(self.spectrum.S), dtype) + entries_bytes(
            shape, len(self.values), dtype
        )

    def layer(self, *, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> SparseLinear:
        """Make the layer that stores it.

        Args:
            bias: Shape (out,). Copied.
            dtype: Of factors and values; by default their own.

        Returns:
            The layer, on the device of the factors.
        """
        low = STORAGES[self.storage].from_spectrum(self.spectrum, bias=bias, dtype=dtype)
        layer = SparseLinear(low, len(self.values))
        with torch.no_grad():
            layer.values.copy_(self.values[:, None])
        layer.columns.copy_(self.columns)
        layer.starts.copy_(self.starts)
        return layer


class SparseLinear(LowRankLayer):
    """A low-rank layer, and entries that are added to its weight.

    Without gradients the entries are multiplied as a sparse matrix, on a CPU in float32 at least. With gradients, in a
    compiled or an exported graph they are first scattered into a dense one.

    Args:
        low: The product, with the bias; becomes a submodule.
        nonzeros: Entries; they are zero and all in the first column until they are loaded.
    """

    columns: Tensor
    starts: Tensor

    def __init__(self, low: FactoredLinear | PivotedLinear, nonzeros: int):
        place: dict[str, Any] = {"device": low.weight.device}
        super().__init__(low.in_features, low.out_features, dtype=low.weight.dtype, **place)
        self.low = low
        # A column, since whatever trains or counts layers takes what has one dimension for a bias.
        self.values = nn.Parameter(torch.zeros(nonzeros, 1, dtype=low.weight.dtype, **place))
        self.register_buffer("columns", torch.zeros(nonzeros, dtype=index_dtype(low.in_features), **place))
        self.register_buffer("starts", torch.full((low.out_features + 1,), nonzeros, dtype=torch.int32, **place))
        if not self.starts.is_meta:
            self.starts[0] = 0
        self._sound: tuple[int, int] | None = None

    @property
    def bias(self) -> Tensor | None:
        """That of the product."""
        return self.low.bias

    @property
    def rank(self) -> int:
        """Of the product."""
        return self.low.rank

    def sparse(self) -> Tensor:
        """Scatter the entries into a dense matrix of the weight's shape."""
        return scattered(self.values[:, 0], self.columns, self.starts, (self.out_features, self.in_features))

    def dense(self) -> Tensor:
        """Multiply the weight out."""
        return self.low.dense() + self.sparse()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension, as `nn.Linear` does."""
        y = self.low(x)
        learning = torch.is_grad_enabled() and (self.values.requires_grad or x.requires_grad)
        if learning or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return y + functional.linear(x, self.sparse())
        self._check()
        rows = x.reshape(-1, self.in_features)
        # PyTorch multiplies no sparse matrix in half precision on a CPU.
        precise = torch.promote_types(x.dtype, torch.float32)
        matrix = _csr(self.starts, self.columns.int(), self.values[:, 0].to(precise), self.out_features, rows.shape[1])
        added = (matrix @ rows.to(precise).T).T
        return (y + added.to(y.dtype).view(y.shape)) if x.numel() else y

    def _check(self) -> None:
        """Refuse indices that point outside the matrix: the product would read memory that is not its own."""
        places = self.columns.data_ptr(), self.starts.data_ptr()
        if self._sound == places:
            return
        inside = not len(self.columns) or bool((self.columns.min() >= 0) & (self.columns.max() < self.in_features))
        steps = self.starts.diff()
        if not inside or self.starts[0] != 0 or self.starts[-1] != len(self.columns) or bool((steps < 0).any()):
            raise MatrixError(
                f"A sparse layer of shape {(self.out_features, self.in_features)} holds indices that lie outside it. "
                "Columns are below its input features, and rows begin one after another. Write the folder again."
            )
        self._sound = places


@cache
def _told() -> None:
    """Let PyTorch say once, to nobody, that sparse matrices may change in later versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _csr(starts: Tensor, columns: Tensor, values: Tensor, out: int, into: int) -> Tensor:
    _told()
    return torch.sparse_csr_tensor(starts, columns, values, (out, into), check_invariants=False)


def index_dtype(into: int) -> torch.dtype:
    """Give the smallest integers that hold the columns of a weight.

    Args:
        into: Columns.

    Returns:
        int16 or int32.
    """
    return torch.int16 if into <= 2**15 else torch.int32


def scattered(values: Tensor, columns: Tensor, starts: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scatter entries that are kept by rows into a dense matrix.

    Args:
        values: Shape (z,). Not modified; gradients flow to it.
        columns: Shape (z,), of any integer dtype.
        starts: Shape (out + 1,), of any integer dtype.
        shape: (out, in).

    Returns:
        Shape (out, in), in the dtype and on the device of `values`.

    >>> scattered(torch.tensor([5.0, 7.0]), torch.tensor([2, 0]), torch.tensor([0, 1, 2]), (2, 3))
    tensor([[0., 0., 5.],
            [7., 0., 0.]])
    """
    count = values.shape[0]
    # Each row after the first counts from where it begins. In operators that every exporter knows.
    begins = torch.zeros(count + 1, dtype=torch.int64, device=values.device)
    begins = begins.index_add(0, starts[1:-1].long(), torch.ones_like(starts[1:-1], dtype=torch.int64))
    flat = begins.cumsum(0)[:count] * shape[1] + columns.long()
    return values.new_zeros(shape[0] * shape[1]).index_put((flat,), values).view(shape)


def nonzeros_for(shape: tuple[int, int], rank: int, share: float, storage: Literal["factored", "pivoted"]) -> int:
    """Say how many entries go with a rank, so that they take a share of the numbers.

    An entry counts as two numbers, its value and its column.

    Args:
        shape: (out, in).
        rank: Of the product.
        share: Of the numbers of entries and product together, from 0 to below 1.
        storage: Of the product.

    Returns:
        At least 1, at most all.

    >>> nonzeros_for((100, 100), 10, 0.2, "factored")
    250
    """
    product = bytes_stored("factored", shape, rank, torch.int8) - (rank * rank if storage == "pivoted" else 0)
    return min(max(1, int(share / (1 - share) * product / 2)), shape[0] * shape[1])


def entries_bytes(shape: tuple[int, int], nonzeros: int, dtype: torch.dtype) -> int:
    """Count the bytes of entries and of where they stand.

    Args:
        shape: (out, in).
        nonzeros: Entries.
        dtype: Of the values; columns have 2 bytes up to 32,768 of them, else 4, and the begin of a row has 4.

    Returns:
        Bytes.
    """
    return nonzeros * (dtype.itemsize + index_dtype(shape[1]).itemsize) + 4 * (shape[0] + 1)


def separate(weight: Tensor, rank: int, nonzeros: int, metric: Metric, *, rounds: int = ROUNDS) -> LowRankSparse:
    """Split a weight into a product of low rank and entries of their own, close to it in a metric.

    In turns, and neither makes the error larger: the product is the best of its rank for what the entries leave; the
    entries stand where one alone would gain most, `P_ij^2 / (G_ii A_jj)` with P = G (W - U V - S) A, those that are
    there by what they hold, and their values are fitted together by conjugate gradients.

    Args:
        weight: Shape (out, in), any floating dtype. Not modified.
        rank: Of the product, at least 1.
        nonzeros: z, from 1 to all.
        metric: Of the error.
        rounds: Turns.

    Returns:
        Both, in float64, on the device of `weight`.

    Source:
        Alternating projections as of GoDec (Zhou & Tao 2011); metric, choice and fit of the entries are ours.
    """
    weight = weight.double()
    left, right = square_root(metric.outputs), square_root(metric.inputs)
    scales = metric.outputs.diagonal()[:, None] * metric.inputs.diagonal()
    entries, product = torch.zeros_like(weight), torch.zeros_like(weight)
    up, down = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1])
    error = metric.error(weight)
    for _ in range(rounds):
        new_up, new_down = decompose_weighted(weight - entries, left, right).factors(rank)
        found = metric.error(weight - entries - new_up @ new_down)
        if found < error:
            up, down, product, error = new_up, new_down, new_up @ new_down, found
        entries, error = _entries(weight - product, entries, nonzeros, metric, scales, error)
    chosen = (entries != 0).nonzero()
    counts = torch.bincount(chosen[:, 0], minlength=len(weight))
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    values = entries[chosen[:, 0], chosen[:, 1]]
    return LowRankSparse(as_spectrum(up, down), values, chosen[:, 1], starts)


def _entries(
    aim: Tensor, now: Tensor, nonzeros: int, metric: Metric, scales: Tensor, error: float
) -> tuple[Tensor, float]:
    """Choose entries and fit their values; as they were where that gains nothing."""
    pull = metric.outputs @ (aim - now) @ metric.inputs
    wanted = now + torch.where(scales > 0, pull / scales, 0.0)
    # Those that are there go on unless others gain more.
    best = (wanted.square() * scales).flatten().topk(nonzeros).indices
    mask = torch.zeros_like(aim).flatten()
    mask[best] = 1
    mask = mask.view_as(aim)
    found = _fitted(aim, now * mask, mask, metric, scales)
    after = metric.error(aim - found)
    return (found, after) if after < error else (now, error)


def _fitted(aim: Tensor, start: Tensor, mask: Tensor, metric: Metric, scales: Tensor) -> Tensor:
    """Fit the values of chosen entries: conjugate gradients on |aim - S|^2 in the metric, scaled by its diagonal."""
    entries = start
    scaled = torch.where(scales > 0, mask / scales, 0.0)
    left = (metric.outputs @ (aim - entries) @ metric.inputs) * mask
    step = left * scaled
    norm = float((left * step).sum())
    for _ in range(STEPS):
        through = (metric.outputs @ step @ metric.inputs) * mask
        curve = float((step * through).sum())
        if not norm > 0 or not curve > 0:
            break
        entries = entries + norm / curve * step
        left = left - norm / curve * through
        again = float((left * left * scaled).sum())
        step, norm = left * scaled + again / norm * step, again
    return entries


def separation_errors(
    weight: Tensor, metric: Metric, share: float, storage: Literal["factored", "pivoted"], *, points: int = 8
) -> Tensor:
    """Bound the error of `separate` at every rank, from one decomposition.

    Args:
        weight: Shape (out, in), any floating dtype. Not modified.
        metric: Of the error.
        share: As for `nonzeros_for`.
        storage: As for `nonzeros_for`.
        points: Ranks at which it is computed, evenly spread; between them it is interpolated.

    Returns:
        For every rank from 0 to min(out, in) the squared error, float64: that of the best product alone, less what the
        first step for the entries gains. Infinite at 0, and 0 at the last.
    """
    weight = weight.double()
    full = min(weight.shape)
    shape = weight.shape[0], weight.shape[1]
    spectrum = decompose_weighted(weight, square_root(metric.outputs), square_root(metric.inputs))
    scales = metric.outputs.diagonal()[:, None] * metric.inputs.diagonal()
    ranks = sorted({max(1, round((full - 1) * point / points)) for point in range(1, points + 1)} | {1})
    errors = []
    for rank in ranks:
        up, down = spectrum.factors(rank)
        change = weight - up @ down
        pull = metric.outputs @ change @ metric.inputs
        nonzeros = nonzeros_for(shape, rank, share, storage)
        gains = torch.where(scales > 0, pull.square() / scales, 0.0).flatten()
        best = gains.topk(nonzeros).indices
        step = torch.zeros_like(gains)
        step[best] = (pull / scales.clamp(min=1e-300)).flatten()[best]
        curve = metric.error(step.view_as(weight))
        gain = float(gains[best].sum()) ** 2 / curve if curve > 0 else 0.0
        errors.append(float((change * pull).sum()) - gain)
    least = max(max(errors) * 1e-12, 1e-300)
    logs = torch.tensor([max(error, least) for error in errors], dtype=torch.float64).log()
    found = torch.full((full + 1,), torch.inf, dtype=torch.float64)
    at = torch.arange(1, full, dtype=torch.float64)
    if len(at):
        found[1:full] = _interpolated(at, torch.tensor(ranks, dtype=torch.float64), logs).exp()
    found[full] = 0
    return found


def _interpolated(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Values between known places, on straight lines."""
    if len(known) == 1:
        return values.expand(len(at))
    after = torch.searchsorted(known, at).clamp(1, len(known) - 1)
    share = (at - known[after - 1]) / (known[after] - known[after - 1])
    return torch.lerp(values[after - 1], values[after], share)
