"""How a compression makes what is no plain cut: the tensors that are kept, the errors at every rank, and the factors.

Notation: the rank of such a matrix is what sets its cost. For `monarch` it is the width of the factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eckart.calibration import Moments
from eckart.monarch import Monarch, block_errors, fit
from eckart.recipe import CompressSettings
from eckart.weighting import Metric


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
    errors, grids = block_errors(weight, _metric(kept, settings))
    return kept | {"errors": errors, "grids": grids}


def errors_of(kept: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Give the squared error in the metric at every rank from 0.

    Args:
        kept: From `prepare`.

    Returns:
        Infinite where a rank is not possible. For `monarch` of every block by itself: what cutting them again for each
        other gains is left out.
    """
    return kept["errors"].cpu().numpy()


def make(weight: Tensor, kept: Mapping[str, Tensor], rank: int, settings: CompressSettings) -> Monarch:
    """Make the factors of one rank.

    Args:
        weight: Shape (out, in). Not modified.
        kept: From `prepare`.
        rank: One that is possible.
        settings: As for `prepare`.

    Returns:
        The factors, float32, on the device of `weight`.
    """
    grid = int(kept["grids"][rank])
    found = fit(weight, grid, rank // grid, _metric(kept, settings))
    return Monarch(found.up.float(), found.down.float())


def _metric(kept: Mapping[str, Tensor], settings: CompressSettings) -> Metric:
    shrinkage = (settings.output_shrinkage, settings.input_shrinkage)
    return Metric.from_moments(kept["gradients"], kept["inputs"], shrinkage=shrinkage)
