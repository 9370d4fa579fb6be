"""What a compression knows of matrices that become more than a product of low rank, which have a method of their own.

Notation: the rank of such a matrix is what sets its cost. For `monarch` it is the width of the factors; for
`lowrank+sparse` that of the product, with which go as many entries as take their share of the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eckart.calibration import Moments
from eckart.linear import STORAGES, LowRankLayer
from eckart.monarch import Monarch, MonarchLinear, block_errors, fit, grids
from eckart.recipe import CompressSettings
from eckart.sparse import (
    LowRankSparse,
    SparseLinear,
    entries_bytes,
    nonzeros_for,
    separate,
    separation_errors,
)
from eckart.truncation import Spectrum
from eckart.weighting import Metric


def unsuited(shape: tuple[int, int], settings: CompressSettings) -> str | None:
    """Say why a matrix cannot have the structure of a method.

    Args:
        shape: (out, in).
        settings: The method.

    Returns:
        The reason, or None where it can.
    """
    if settings.method == "monarch" and not grids(shape):
        return f"no grid divides {shape[0]} x {shape[1]} into equal blocks"
    return None


def entries_cost(shape: tuple[int, int], rank: int, settings: CompressSettings, dtype: torch.dtype) -> float:
    """Count what the entries take that go with a rank: bytes under a budget of bytes, else numbers.

    Args:
        shape: (out, in).
        rank: Of the product.
        settings: The storage of the product and the share of the entries.
        dtype: Of the weights.

    Returns:
        Values and indices. As numbers, an entry counts twice, with its column, and a row once, for its begin.
    """
    nonzeros = nonzeros_for(shape, rank, settings.sparse, settings.storage)
    if settings.unit == "bytes":
        return entries_bytes(shape, nonzeros, dtype)
    return 2 * nonzeros + shape[0] + 1


def layers_at(
    shape: tuple[int, int], ranks: list[int], settings: CompressSettings, place: Mapping[str, Any]
) -> list[tuple[int, LowRankLayer]]:
    """Build layers to be timed.

    Args:
        shape: (out, in).
        ranks: Ascending.
        settings: The method, the storage of a product and the share of entries.
        place: Their `device` and `dtype`.

    Returns:
        (rank, layer) at those ranks that are possible, at least one. Numbers are zeros, entries evenly spread.
    """
    out, into = shape
    if settings.method == "monarch":
        grid = grids(shape)[0]
        possible = [rank for rank in ranks if rank % grid == 0] or [grid]
        return [(rank, MonarchLinear(into, out, grid, rank // grid, False, **place)) for rank in possible]
    layers: list[tuple[int, LowRankLayer]] = []
    for rank in ranks:
        nonzeros = nonzeros_for(shape, rank, settings.sparse, settings.storage)
        layer = SparseLinear(STORAGES[settings.storage](into, out, rank, False, **place), nonzeros)
        layer.columns.copy_(torch.arange(nonzeros) % into)
        layer.starts.copy_(torch.arange(out + 1) * nonzeros // out)
        layers.append((rank, layer))
    return layers


def prepare(weight: Tensor, moments: Moments, settings: CompressSettings) -> dict[str, Tensor]:
    """Measure a matrix once, for every rank.

    Args:
        weight: Shape (out, in). Not modified.
        moments: What it sees of the calibration text, gradients among them. Not modified.
        settings: The method, and how much its metric is shrunk.

    Returns:
        What `errors_of` and `make` need.
    """
    assert moments.gradients is not None
    # In float32 from the start, so that a resumed compression finds what an undisturbed one does.
    kept = {"gradients": moments.gradients.float(), "inputs": moments.inputs.float()}
    metric = _metric(kept, settings)
    if settings.method == "monarch":
        kept["errors"], kept["grids"] = block_errors(weight, metric)
    else:
        kept["errors"] = separation_errors(weight, metric, settings.sparse, settings.storage)
    return kept


def errors_of(kept: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Give the squared error in the metric at every rank from 0, before the parts of a structure are fitted together.

    Args:
        kept: From `prepare`.

    Returns:
        Infinite where a rank is not possible.
    """
    return kept["errors"].cpu().numpy()


def make(weight: Tensor, kept: Mapping[str, Tensor], rank: int, settings: CompressSettings) -> dict[str, Tensor]:
    """Make a structure of one rank.

    Args:
        weight: Shape (out, in). Not modified.
        kept: From `prepare`.
        rank: One that is possible.
        settings: As for `prepare`.

    Returns:
        Its tensors, floating ones in float32, on the device of `weight`; see `structure_of`.
    """
    metric = _metric(kept, settings)
    if settings.method == "monarch":
        grid = int(kept["grids"][rank])
        found = vars(fit(weight, grid, rank // grid, metric))
    else:
        nonzeros = nonzeros_for((weight.shape[0], weight.shape[1]), rank, settings.sparse, settings.storage)
        both = separate(weight, rank, nonzeros, metric)
        found = {**vars(both.spectrum), "values": both.values, "columns": both.columns, "starts": both.starts}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def structure_of(tensors: Mapping[str, Tensor], settings: CompressSettings) -> Monarch | LowRankSparse:
    """Put together what `make` made.

    Args:
        tensors: From there, or read from a file.
        settings: The method, and the storage of a product.

    Returns:
        The structure.
    """
    if settings.method == "monarch":
        return Monarch(**tensors)
    spectrum = Spectrum(*(tensors[name] for name in ("U", "S", "Vh")))
    rest = {name: tensors[name] for name in ("values", "columns", "starts")}
    return LowRankSparse(spectrum, **rest, storage=settings.storage)


def _metric(kept: Mapping[str, Tensor], settings: CompressSettings) -> Metric:
    shrinkage = (settings.output_shrinkage, settings.input_shrinkage)
    return Metric.from_moments(kept["gradients"], kept["inputs"], shrinkage=shrinkage)
