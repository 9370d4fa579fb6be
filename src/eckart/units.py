"""What gets a rank of its own when a model is compressed, what it costs at each, and the edits it becomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.allocate import Curve
from eckart.calibration import Place, Watch
from eckart.dataflow import evaluating, example_inputs
from eckart.errors import MatrixError
from eckart.experts import costs_at
from eckart.factoring import Factors, obstacle
from eckart.heads import turned
from eckart.linear import STORAGES
from eckart.matrices import MLP_TYPES, Matrix, partition, rows_of, select, write
from eckart.neurons import Cut
from eckart.plan import STRUCTURES, Edit
from eckart.recipe import CompressSettings
from eckart.spill import Spill
from eckart.structures import entries_cost, layers_at, unsuited
from eckart.truncation import Spectrum


@dataclass(frozen=True)
class Unit:
    """Matrices that are cut together.

    Mostly these share one rank: one matrix, or all experts of a stack, gate and up of each joined. Or they are an MLP,
    gate and up and at last down, which can have fewer neurons, or value and output of an attention, whose heads can
    have fewer dimensions; the rank is then a number that stands for a `Cut`.
    """

    name: str
    matrices: tuple[Matrix, ...]
    layer: int | None
    stack: str
    parts: tuple[tuple[Matrix, ...], ...]
    """What the model's list has in the place of each: itself, or the parts of an expert."""
    joint: Literal["", "neurons", "dimensions"] = ""
    """What these matrices can lose together; nothing where they share one rank."""
    cuts: tuple[Cut, ...] = ()
    """What they may become then, the smallest first; known once the decompositions are."""

    def full(self) -> int:
        """The largest rank."""
        return len(self.cuts) + 1 if self.joint else self.matrices[0].rank

    @property
    def width(self) -> int:
        """How many neurons or dimensions there are."""
        return self.matrices[0].shape[0]

    def keeps(self, rank: int) -> int:
        """How many neurons or dimensions stay."""
        return self.cuts[rank - 1].width if rank < self.full() else self.width

    def ranks(self, rank: int) -> tuple[int | None, ...]:
        """Give the rank of each matrix, None where it stays dense."""
        if rank == self.full():
            return (None,) * len(self.matrices)
        if not self.joint:
            return (rank,) * len(self.matrices)
        cut = self.cuts[rank - 1]
        whole = cut.width == self.width
        return tuple(None if whole and r == m.rank else r for m, r in zip(self.matrices, cut.ranks))


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
    joint = [*_mlps(model, matrices, settings), *_heads(model, matrices, settings)] if settings.removes_neurons else []
    joints = {unit.matrices[0].name: unit for unit in joint}
    inside = {matrix.name for unit in joint for matrix in unit.matrices[1:]}
    whole: dict[Place, list[Matrix]] = {}
    for matrix in partition(matrices):
        whole.setdefault((matrix.parameter, matrix.expert), []).append(matrix)
    experts: dict[str, list[tuple[Matrix, tuple[Matrix, ...]]]] = {}
    units = []
    for matrix in select(partition(matrices), types=settings.types):
        reason = obstacle(model, matrix.parameter) or unsuited(matrix.shape, settings)
        if settings.method in STRUCTURES and matrix.expert is not None:
            reason = f"experts have no {settings.method} layer"
        siblings = tuple(whole[matrix.parameter, matrix.expert])
        if reason is not None:
            blocked[matrix.name] = reason
        elif matrix.name in inside:
            continue
        elif matrix.name in joints:
            units.append(joints[matrix.name])
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


def _mlps(model: nn.Module, matrices: Sequence[Matrix], settings: CompressSettings) -> list[Unit]:
    """Find what can lose neurons: gate and up (or the one there is) and down of a block."""
    found = []
    for block in _by_block(matrices, settings, MLP_TYPES):
        first, last = [m for m in block if m.type != "fc_out"], [m for m in block if m.type == "fc_out"]
        fits = len(last) == 1 and 1 <= len(first) <= 2 and all(m.shape[0] == last[0].shape[1] for m in first)
        if fits and all(obstacle(model, m.parameter) is None for m in block) and _by_neuron(model, first, last[0]):
            name = f"{last[0].stack}.{last[0].layer} (MLP)"
            found.append(_joint(name, (*first, *last), "neurons"))
    return found


def _by_block(matrices: Sequence[Matrix], settings: CompressSettings, types: Sequence[str]) -> list[list[Matrix]]:
    """Group matrices of some types, experts left out, by the block they lie in."""
    blocks: dict[tuple[str, int | None], list[Matrix]] = {}
    for matrix in select(partition(matrices), types=settings.types):
        if matrix.expert is None and matrix.type in types:
            blocks.setdefault((matrix.stack, matrix.layer), []).append(matrix)
    return [*blocks.values()]


def _joint(name: str, matrices: tuple[Matrix, ...], lost: Literal["neurons", "dimensions"]) -> Unit:
    return Unit(name, matrices, matrices[0].layer, matrices[0].stack, tuple((m,) for m in matrices), lost)


def _by_neuron(model: nn.Module, first: Sequence[Matrix], last: Matrix) -> bool:
    """Tell, by trying, whether every input of one weight depends on the same row of the others alone."""
    odd = torch.arange(1, last.shape[1], 2)
    rows: dict[str, list[Tensor]] = {}
    for matrix in first:
        rows.setdefault(matrix.parameter, []).append(rows_of(matrix)[odd])
    inputs = example_inputs(model)

    def read_with(noise: float) -> Tensor | None:
        found: list[Tensor] = []

        def seen(place: Place, operand: Tensor, result: Tensor) -> Tensor | None:
            if place[0] == last.parameter:
                found.append(operand.clone())
                return None
            moved = result.clone()
            for some in rows[place[0]]:
                moved[..., some.to(moved.device)] += noise
            return moved

        with evaluating(model), torch.inference_mode(), Watch(model, {*rows, last.parameter}, seen):
            model(**inputs)
        return found[0] if len(found) == 1 else None

    plain, moved = read_with(0.0), read_with(1.0)
    if plain is None or moved is None or plain.shape != moved.shape:
        return False
    differs = (plain != moved).flatten(0, -2).any(0)
    return bool(differs[1::2].any()) and not bool(differs[::2].any())


def _heads(model: nn.Module, matrices: Sequence[Matrix], settings: CompressSettings) -> list[Unit]:
    """Find what can lose dimensions of heads: value and output of each attention, where the value has no bias."""
    found = []
    for block in _by_block(matrices, settings, ("v_proj", "out_proj")):
        values, outputs = ([m for m in block if m.type == kind] for kind in ("v_proj", "out_proj"))
        for value, output in zip(values, outputs) if len(values) == len(outputs) else ():
            fits = bool(value.heads) and output.shape[1] % value.shape[0] == 0
            fits = fits and all(obstacle(model, m.parameter) is None for m in (value, output))
            # A bias would have to be turned as well, and a plan says nothing of biases.
            module: Any = model.get_submodule(value.parameter.rpartition(".")[0])
            if fits and module.bias is None and _by_head(model, value, output):
                found.append(_joint(f"{value.name} (heads)", (value, output), "dimensions"))
    return found


def _by_head(model: nn.Module, value: Matrix, output: Matrix) -> bool:
    """Tell, by trying, whether a change of basis inside each head reaches one weight's inputs as it is, and no more."""
    assert value.heads
    size = value.shape[0] // value.heads
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(value.heads, size, size, generator=generator)
    inputs, rows = example_inputs(model), rows_of(value)
    results: list[Tensor] = []

    def read_with(turn: Tensor | None) -> tuple[list[Tensor], Any]:
        found: list[Tensor] = []

        def seen(place: Place, operand: Tensor, result: Tensor) -> Tensor | None:
            if place[0] == output.parameter:
                found.append(operand.float().clone())
                results.append(result)
                return results[0]
            moved, here = result.clone(), rows.to(result.device)
            moved[..., here] = turned(result[..., here].float(), turn, -1).to(result)
            return moved

        with evaluating(model), torch.inference_mode(), Watch(model, {value.parameter, output.parameter}, seen):
            return found, model(**inputs)[0]

    (plain, before), (moved, after) = read_with(None), read_with(turn)
    if len(plain) != 1 or len(moved) != 1 or plain[0].shape != moved[0].shape:
        return False
    expected = turned(plain[0], turn, -1)
    return all(
        bool((one - other).abs().max() <= 0.03 * other.abs().max())
        for one, other in ((moved[0], expected), (after, before))
    )


def joint_cost(
    shapes: Sequence[tuple[int, int]],
    settings: CompressSettings,
    dtype: torch.dtype,
    ordered: Sequence[int] | None = None,
) -> Callable[[int, int, int], float]:
    """Make what counts the weights of an MLP with fewer neurons, or of values and outputs with fewer dimensions.

    Args:
        shapes: (out, in) of each weight, the last one of down or of the output.
        settings: `storage`, and which budget.
        dtype: Of the weights.
        ordered: How many rows are put in order where a weight lacks some; by default its own.

    Returns:
        From the number of a weight, how many neurons stay and its rank to numbers, or bytes under a budget of bytes.
    """
    in_bytes, pivoted = settings.unit == "bytes", settings.storage == "pivoted"
    width_of_all, columns = shapes[0][0], shapes[-1][1]

    def cost(number: int, width: int, rank: int) -> float:
        out, into = shapes[number]
        last = number == len(shapes) - 1
        reads = width * columns // width_of_all
        size = (out, reads) if last else (width, into)
        whole = rank == min(size)
        numbers = size[0] * size[1] if whole else rank * (sum(size) - (rank if pivoted else 0))
        # The order of pivoted rows; which inputs are read; where the rows of the neurons that stay belong.
        indices = 0 if whole or not pivoted else size[0]
        if width < width_of_all:
            indices += reads if last else (ordered[number] if ordered else out)
        return dtype.itemsize * numbers + 8 * indices if in_bytes else numbers

    return cost


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
    costs = costs_at(
        ranks,
        unit.matrices[0].shape,
        storage="factored" if settings.method == "monarch" else settings.storage,
        dtype=dtype,
        experts=len(unit.matrices) if stacked else 0,
        in_bytes=settings.unit == "bytes",
    )
    if settings.method == "lowrank+sparse":
        shape, cut = unit.matrices[0].shape, ranks < unit.full()
        costs[cut] += [entries_cost(shape, int(rank), settings, dtype) for rank in ranks[cut]]
    return costs


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
    if settings.method in STRUCTURES:
        built = layers_at(shape, ranks, settings, place)
    else:
        built = [(rank, STORAGES[settings.storage](into, out, rank, False, **place)) for rank in ranks]
    ranks = [rank for rank, _ in built]
    layers: list[nn.Module] = [layer for _, layer in built]
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
    weighting: Any = {"svd": "none", **dict.fromkeys(STRUCTURES, "double")}.get(settings.method, settings.method)
    return tuple(
        Edit(
            matrix=part.name,
            layer=part.layer,
            type=part.type,
            shape=part.shape,
            rho=min(rank, part.rank) / part.rank,
            rank=min(rank, part.rank),
            kind=settings.method if settings.method in STRUCTURES else "low_rank",
            weighting=weighting,
            stack=part.stack,
        )
        for unit in units
        for rank, parts in zip(unit.ranks(ranks[unit.name]), unit.parts)
        for part in parts
        if rank is not None
    )


def described(unit: Unit, rank: int, curve: Curve) -> list[dict[str, Any]]:
    """Say what became of a unit, as results.json does.

    Args:
        unit: One of all.
        rank: What it got.
        curve: Its own.

    Returns:
        One row for a matrix or a stack of experts, three (or two) for an MLP, two for value and output.
    """
    facts = {"layer": unit.layer, "count": 1, "neurons": None, "dimensions": None}
    if not unit.joint:
        cost = float(curve.costs[int(np.searchsorted(curve.ranks, rank))])
        first = unit.matrices[0]
        facts |= {"matrix": unit.name, "type": first.type, "shape": first.shape, "count": len(unit.matrices)}
        return [facts | {"rank": rank, "cost": cost, "dense": float(curve.costs[-1])}]
    size = float(curve.costs[-1]) / sum(m.shape[0] * m.shape[1] for m in unit.matrices)
    cut = unit.cuts[rank - 1] if rank < unit.full() else None
    if unit.keeps(rank) < unit.width:
        facts[unit.joint] = unit.keeps(rank)
    rows = []
    for number, matrix in enumerate(unit.matrices):
        dense = size * matrix.shape[0] * matrix.shape[1]
        rows.append(
            facts
            | {"matrix": matrix.name, "type": matrix.type, "shape": matrix.shape}
            | {
                "rank": matrix.rank if cut is None else cut.ranks[number],
                "cost": dense if cut is None else cut.costs[number],
                "dense": dense,
            }
        )
    return rows


def told(unit: Unit, rank: int) -> dict[str, Any]:
    """Say how far a unit is cut: its `rank` and the largest; where several matrices lose neurons or dimensions
    together, how many stay, and the `ranks` of the matrices."""
    if not unit.joint:
        return {"rank": rank, "of": unit.full()}
    ranks = [matrix.rank if r is None else r for matrix, r in zip(unit.matrices, unit.ranks(rank))]
    return {"rank": unit.keeps(rank), "of": unit.width, "ranks": ranks}


def of_parts(units: Sequence[Unit], factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Divide the factors of joined experts among their parts, which go on sharing `Vh`.

    Args:
        units: All of them.
        factors: By the name of a unit's matrix.

    Returns:
        By the name of each matrix in the model's list.
    """
    found: dict[str, Factors] = {}
    for unit in units:
        for matrix, parts in zip(unit.matrices, unit.parts):
            spectrum = factors.get(matrix.name)
            if spectrum is not None and parts == (matrix,):
                found[matrix.name] = spectrum
            elif isinstance(spectrum, Spectrum):
                for part in parts:
                    found[part.name] = replace(spectrum, U=spectrum.U[rows_of(part).to(spectrum.U.device)])
    return found


@contextmanager
def restored(model: nn.Module, matrices: Sequence[Matrix]) -> Iterator[dict[str, Tensor]]:
    """Give a model its weights back on leaving, to the bit.

    Args:
        model: Inside the `with` block, the parameters of these matrices are copies, which may be written.
        matrices: Those that may be written.

    Yields:
        The weights, by the parameter's name; they are the model's own, mapped if they were. Not to be written.
    """
    originals = {matrix.parameter: model.get_parameter(matrix.parameter).data for matrix in matrices}
    try:
        for name, weight in originals.items():
            model.get_parameter(name).data = weight.clone()
        yield originals
    finally:
        for name, weight in originals.items():
            model.get_parameter(name).data = weight


@contextmanager
def replaced(model: nn.Module, weights: Iterable[Mapping[Matrix, Tensor]], work: Spill) -> Iterator[dict[str, Tensor]]:
    """Give a model other weights for a while, of which memory holds one unit's at a time.

    Args:
        model: As before on leaving, to the bit. Inside the `with` block its parameters are not to be written.
        weights: What the matrices of one unit after the other become; each is asked for when those before it are done.
        work: What large weights are lent to.

    Yields:
        The original weights of the parameters that were replaced, by name. Not to be written.
    """
    originals: dict[str, Tensor] = {}
    try:
        for some in weights:
            parameters = [(name, model.get_parameter(name)) for name in {matrix.parameter for matrix in some}]
            for name, parameter in parameters:
                originals.setdefault(name, parameter.data)
                parameter.data = parameter.data.clone()
            for matrix, weight in some.items():
                write(model, matrix, weight)
            for _, parameter in parameters:
                parameter.data = work.lend({"weight": parameter.data})["weight"]
        yield originals
    finally:
        for name, weight in originals.items():
            model.get_parameter(name).data = weight
