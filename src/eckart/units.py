"""What gets a rank of its own when a model is compressed, what it costs at each, and the edits it becomes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.calibration import Place
from eckart.errors import MatrixError
from eckart.experts import costs_at
from eckart.factoring import obstacle
from eckart.linear import STORAGES
from eckart.matrices import Matrix, partition, read, rows_of, select, write
from eckart.monarch import MonarchLinear, grids
from eckart.plan import STRUCTURES, Edit
from eckart.recipe import CompressSettings
from eckart.truncation import Spectrum


@dataclass(frozen=True)
class Unit:
    """Matrices that share one rank: one, or all experts of a stack, gate and up of each joined."""

    name: str
    matrices: tuple[Matrix, ...]
    layer: int | None
    stack: str
    parts: tuple[tuple[Matrix, ...], ...]
    """What the model's list has in the place of each: itself, or the parts of an expert."""

    def full(self) -> int:
        """The largest rank."""
        return self.matrices[0].rank


def find_units(
    model: nn.Module, matrices: Sequence[Matrix], settings: CompressSettings
) -> tuple[list[Unit], dict[str, str]]:
    """List what gets a rank of its own.

    Args:
        model: The model. Not modified.
        matrices: From `find_matrices`.
        settings: `types`.

    Returns:
        The units, and matrices that must stay dense with the reason.

    Raises:
        MatrixError: Nothing is left.
    """
    blocked: dict[str, str] = {}
    whole: dict[Place, list[Matrix]] = {}
    for matrix in partition(matrices):
        whole.setdefault((matrix.parameter, matrix.expert), []).append(matrix)
    experts: dict[str, list[tuple[Matrix, tuple[Matrix, ...]]]] = {}
    units = []
    for matrix in select(partition(matrices), types=settings.types):
        reason = obstacle(model, matrix.parameter) or _unsuited(matrix, settings)
        siblings = tuple(whole[matrix.parameter, matrix.expert])
        if reason is not None:
            blocked[matrix.name] = reason
        elif matrix.expert is None:
            units.append(Unit(matrix.name, (matrix,), matrix.layer, matrix.stack, ((matrix,),)))
        elif matrix is siblings[0]:
            # One rank serves all rows of an expert, so they are cut as one matrix.
            out = sum(part.shape[0] for part in siblings)
            name = f"{matrix.parameter}[{matrix.expert}]"
            joined = (
                matrix if len(siblings) == 1 else replace(matrix, name=name, shape=(out, matrix.shape[1]), rows=None)
            )
            experts.setdefault(matrix.parameter, []).append((joined, siblings))
    for name, each in experts.items():
        first = each[0][0]
        units.append(Unit(name, tuple(m for m, _ in each), first.layer, first.stack, tuple(parts for _, parts in each)))
    if not units:
        raise MatrixError(
            f"Every matrix of these types must stay dense: {next(iter(blocked.values()), 'there is none')}. "
            "Linear layers and stacks of experts can be factored. Change --types."
        )
    return units, blocked


def _unsuited(matrix: Matrix, settings: CompressSettings) -> str | None:
    """Say why a matrix cannot have the structure that is asked for."""
    if settings.method in STRUCTURES and matrix.expert is not None:
        return f"experts have no {settings.method} layer"
    if settings.method == "monarch" and not grids(matrix.shape):
        return f"no grid divides {matrix.shape[0]} x {matrix.shape[1]} into equal blocks"
    return None


def costs_of(unit: Unit, ranks: NDArray[np.int64], settings: CompressSettings, dtype: torch.dtype) -> NDArray[Any]:
    """Count what a unit takes at every rank: numbers under a ratio, bytes under a budget of bytes.

    Args:
        unit: One matrix, or experts.
        ranks: From 1 to the largest.
        settings: `storage`, and which budget.
        dtype: Of the weights.

    Returns:
        float64; at the largest rank the dense weight's.
    """
    stacked = unit.matrices[0].expert is not None
    return costs_at(
        ranks,
        unit.matrices[0].shape,
        storage="factored" if settings.method == "monarch" else settings.storage,
        dtype=dtype,
        experts=len(unit.matrices) if stacked else 0,
        in_bytes=settings.unit == "bytes",
    )


def seconds_of(shape: tuple[int, int], settings: CompressSettings, like: Tensor) -> list[tuple[int, float]]:
    """Time a linear layer for one token, at ranks from which others can be read off.

    Args:
        shape: (out, in).
        settings: `storage`.
        like: A tensor of the dtype and on the device that count.

    Returns:
        (rank, seconds), ascending; the last is the dense layer. Each is a median of 15 times many calls.
    """
    out, into = shape
    full = min(shape)
    ranks = sorted({max(1, full * step // 8) for step in range(1, 8)})
    place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    layers: list[nn.Module]
    if settings.method == "monarch":
        grid = grids(shape)[0]
        ranks = [rank for rank in ranks if rank % grid == 0] or [grid]
        layers = [MonarchLinear(into, out, grid, rank // grid, False, **place) for rank in ranks]
    else:
        layers = [STORAGES[settings.storage](into, out, rank, False, **place) for rank in ranks]
    layers.append(nn.Linear(into, out, False, **place))
    token = torch.zeros(1, into, **place)
    times: list[list[float]] = [[] for _ in layers]
    with torch.inference_mode():
        for _ in range(15):
            for layer, taken in zip(layers, times):
                started = time.perf_counter()
                for _ in range(10):
                    layer(token)
                if like.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append((time.perf_counter() - started) / 10)
    return [(rank, float(np.median(taken))) for rank, taken in zip([*ranks, full], times)]


def edits_of(units: Sequence[Unit], ranks: Mapping[str, int], settings: CompressSettings) -> tuple[Edit, ...]:
    """Describe the cuts of a compression.

    Args:
        units: All of them.
        ranks: For each; the largest means that it stays dense.
        settings: The method is the weighting.

    Returns:
        An edit for every matrix that is cut.
    """
    return tuple(
        Edit(
            matrix=part.name,
            layer=part.layer,
            type=part.type,
            shape=part.shape,
            rho=min(ranks[unit.name], part.rank) / part.rank,
            rank=min(ranks[unit.name], part.rank),
            kind=settings.method if settings.method in STRUCTURES else "low_rank",
            weighting={"svd": "none", **dict.fromkeys(STRUCTURES, "double")}.get(settings.method, settings.method),
            stack=part.stack,
        )
        for unit in units
        for parts in unit.parts
        for part in parts
        if ranks[unit.name] < unit.full()
    )


def of_parts(units: Sequence[Unit], factors: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
    """Divide the factors of joined experts among their parts, which go on sharing `Vh`.

    Args:
        units: All of them.
        factors: By the name of a unit's matrix.

    Returns:
        By the name of each matrix in the model's list.
    """
    found = {}
    for unit in units:
        for matrix, parts in zip(unit.matrices, unit.parts):
            if matrix.name in factors and parts == (matrix,):
                found[matrix.name] = factors[matrix.name]
            elif matrix.name in factors:
                spectrum = factors[matrix.name]
                for part in parts:
                    found[part.name] = replace(spectrum, U=spectrum.U[rows_of(part).to(spectrum.U.device)])
    return found


@contextmanager
def restored(model: nn.Module, matrices: Sequence[Matrix]) -> Iterator[None]:
    """Give a model its weights back on leaving, to the bit.

    Args:
        model: Its matrices may be written inside the `with` block.
        matrices: Those that may be.

    Yields:
        Nothing.
    """
    originals = [(matrix, read(model, matrix)) for matrix in matrices]
    try:
        yield
    finally:
        for matrix, weight in originals:
            write(model, matrix, weight)
