"""From a plan to low-rank layers: which module gets which, and what stays dense because factors would not be smaller.

Notation: a weight (out, in) is divided into parts, groups of its rows that have one rank each; the rows that no edit
touches are parts without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart import truncation
from eckart.clustering import runs_of
from eckart.experts import FactoredExperts
from eckart.linear import (
    STORAGES,
    LowRankLayer,
    RowBlockedLinear,
    SelectedLinear,
    Storage,
    bytes_stored,
    cheapest_storage,
)
from eckart.mapping import mapped
from eckart.matrices import Matrix, read, rows_of, write
from eckart.monarch import Monarch
from eckart.plan import STRUCTURES, Edit, Plan
from eckart.quantizer import Size, StoredLayer, attach_, replace_, sizes, stored_as
from eckart.sparse import LowRankSparse
from eckart.surgery import check_plan, clusters_of, components, replacement
from eckart.truncation import Spectrum

Structure = Monarch | LowRankSparse
Factors = Spectrum | Structure
"""What replaces a matrix."""
AT_MOST = 0.9
"""Share of the dense bytes that factors may take: with less saved they would cost time (see `cheapest_storage`)."""


@dataclass(frozen=True)
class Factoring:
    """What `factor_` made of a plan."""

    layers: dict[str, StoredLayer]
    """Module's path (parameter's path for experts) -> how its weight is stored now."""
    dense: dict[str, str]
    """Path -> why its edited weight stayed dense."""
    before: Size
    """Of the whole model, before."""
    after: Size
    """Of the whole model as it is now."""


@dataclass(frozen=True)
class _Part:
    """Rows of a weight that are stored in one piece."""

    rows: Tensor
    rank: int | None
    """None where no edit lowers it."""
    edit: Edit | None = None
    spectrum: Spectrum | None = None
    """What was given for these rows."""


@dataclass(frozen=True)
class _Making:
    """What `factor_` was told of how to make layers."""

    factors: Mapping[str, Factors]
    storage: Literal["factored", "pivoted"] | None
    at_most: float


def factor_(
    model: nn.Module,
    plan: Plan | Sequence[Edit],
    matrices: Sequence[Matrix] | None = None,
    *,
    force: bool = False,
    factors: Mapping[str, Factors] | None = None,
    storage: Literal["factored", "pivoted"] | None = None,
    at_most: float = AT_MOST,
    spill: Path | None = None,
) -> Factoring:
    """Put a plan's edits into a model as low-rank layers, in place.

    The model then computes what it does after `apply_`, but for rounding. A weight whose factors would not be smaller
    is edited and stays dense, and so does one that its module uses in another way than a linear layer does.

    Args:
        model: Modified: the modules that hold the plan's matrices are replaced; config and `save_pretrained` know.
        plan: A plan made for this model, or bare edits.
        matrices: From `find_matrices(model)`, where the caller has them; not valid any more afterwards.
        force: Accept other weights than the plan was made for.
        factors: By the matrix's name, what replaces it, of the edit's rank; needed where a plan has a weighting.
        storage: How every weight of lowered rank is stored; by default whichever takes fewest bytes.
        at_most: Share of the dense bytes that factors may take, unless `storage` is given; 0 leaves all dense.
        spill: A folder for what is edited, on the CPU only: it is mapped from files there, which must outlive the
            model. With a model whose weights are mapped, too, memory holds one matrix at a time.

    Returns:
        What became of every edited weight, and the model's size.

    Raises:
        PlanError: The plan does not fit; the model is untouched then.
    """
    pairs = check_plan(model, plan, matrices, force=force, factors=factors or {})
    before, _ = sizes(model)
    parameters: dict[str, list[tuple[Matrix, Edit]]] = {}
    for matrix, edit in pairs:
        parameters.setdefault(matrix.parameter, []).append((matrix, edit))
    layers: dict[str, StoredLayer] = {}
    dense: dict[str, str] = {}
    for parameter, edits in parameters.items():
        stacked = edits[0][0].expert is not None
        path = parameter if stacked else parameter.removesuffix(".weight")
        file = None if spill is None else spill / f"{len(layers) + len(dense)}.safetensors"
        making = _Making(factors or {}, storage, at_most)
        asked = None if at_most or storage else "every weight was to stay dense"
        layer = asked or obstacle(model, parameter) or (_experts if stacked else _linear)(model, edits, making)
        if isinstance(layer, str):
            dense[path] = layer
            _edit_(model, edits, factors or {}, file)
        else:
            layers[path] = stored_as(layer, transposed=edits[0][0].transposed)
            if file is not None:
                layer.load_state_dict(mapped(layer.state_dict(), file), assign=True)
            replace_(model, {path: layer})
    if layers:
        attach_(model, layers, dense)
    return Factoring(layers, dense, before, sizes(model)[0])


def _edit_(
    model: nn.Module, edits: list[tuple[Matrix, Edit]], factors: Mapping[str, Factors], file: Path | None
) -> None:
    """Edit a weight that stays dense, in place or in a file that is mapped into memory."""
    held = model.get_parameter(edits[0][0].parameter)
    if file is not None:
        # A page of a mapped file that is written to stays in memory for as long as the file is mapped.
        held.data = held.data.clone()
    for matrix, edit in edits:
        found = factors.get(matrix.name)
        if found is None:
            found = replacement(read(model, matrix), edit)
        elif isinstance(found, Spectrum):
            found = truncation.dense(found)
        else:
            found = found.dense()
        write(model, matrix, found)
    if file is not None:
        held.data = mapped({"weight": held.data}, file)["weight"]


def obstacle(model: nn.Module, parameter: str) -> str | None:
    """Say why a parameter cannot be anything but dense, if so.

    Args:
        model: Any model. Not modified.
        parameter: Name of a weight in it.

    Returns:
        The reason, or None where nothing is in the way.
    """
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    held = module.get_parameter(name)
    holders = [m for m in model.modules() if any(p is held for p in m.parameters(recurse=False))]
    if len(holders) > 1:
        return "the weight is shared by several modules"
    if held.ndim == 3:
        return None
    # PyTorch's own attention reads the weight of its output projection instead of calling it.
    called = isinstance(module, (nn.Linear, Conv1D)) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    return None if called else f"{type(module).__name__} is not a linear layer"


def _linear(model: nn.Module, edits: list[tuple[Matrix, Edit]], making: _Making) -> LowRankLayer | str:
    """Make the layer that takes the place of a linear one, or say why none does."""
    first = edits[0][0]
    module: Any = model.get_submodule(first.parameter.rpartition(".")[0])
    weight = module.weight.detach().T if first.transposed else module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    parts = [piece for part in _parts(weight, edits) for piece in _pieces(part, making.factors)]
    columns = _columns(parts)
    if columns is not None:
        parts, weight = [_narrowed(part, columns) for part in parts], weight[:, columns.to(weight.device)]
    joined = torch.cat([part.rows for part in parts])
    consecutive = torch.equal(joined, torch.arange(len(weight)))
    storages: list[Storage] = [_storage(part, weight, making) for part in parts]
    numbers = sum(_bytes(storage, part, weight, making) for storage, part in zip(storages, parts))
    numbers += (0 if consecutive else 8 * len(weight)) + (0 if columns is None else 8 * len(columns))
    problem = _too_large(numbers, module.weight, making)
    if problem is not None:
        return problem
    blocks = [_block(*pair, weight, bias, making) for pair in zip(parts, storages)]
    rows = None if consecutive else [part.rows.to(weight.device) for part in parts]
    layer = blocks[0] if len(blocks) == 1 else RowBlockedLinear(blocks, rows)
    if columns is not None:
        return SelectedLinear(layer, columns.to(weight.device), module.weight.shape[0 if first.transposed else 1])
    assert isinstance(layer, LowRankLayer)
    return layer


def _experts(model: nn.Module, edits: list[tuple[Matrix, Edit]], making: _Making) -> LowRankLayer | str:
    """Make the layer that takes the place of stacked experts, or say why none does."""
    first = edits[0][0]
    if any(edit.kind in STRUCTURES for _, edit in edits):
        return f"experts have no {edits[0][1].kind} layer"
    stack = model.get_parameter(first.parameter).detach()
    weights = list(stack.mT if first.transposed else stack)
    parts = [
        _parts(weight, [(matrix, edit) for matrix, edit in edits if matrix.expert == expert])
        for expert, weight in enumerate(weights)
    ]
    out, into = weights[0].shape
    spectra = [
        _joined([(part, _spectrum(part, weight, making)) for part in each]) for weight, each in zip(weights, parts)
    ]
    largest = max(len(spectrum.S) for spectrum in spectra)
    numbers = len(weights) * FactoredExperts.rounded(largest) * (out + into)
    problem = _too_large(numbers * stack.itemsize, stack, making)
    if problem is not None:
        return f"{problem}: all its experts get the largest of their ranks, {largest} of {min(out, into)}"
    return FactoredExperts.from_spectra(spectra, transposed=first.transposed, dtype=stack.dtype)


def _too_large(numbers: int, weight: Tensor, making: _Making) -> str | None:
    if making.storage is not None or numbers < making.at_most * weight.nbytes:
        return None
    return f"stored for this rank it would take {numbers:,} bytes, and {weight.nbytes:,} dense"


def _parts(weight: Tensor, edits: list[tuple[Matrix, Edit]]) -> list[_Part]:
    """Divide the rows of a weight by what happens to them, in the order of their first rows."""
    parts: list[_Part] = []
    free = torch.ones(len(weight), dtype=torch.bool)
    for matrix, edit in edits:
        rows = rows_of(matrix)
        free[rows] = False
        keeps_all = edit.kind == "low_rank" and edit.svd == "exact" and edit.rank == edit.full_rank
        keeps_all &= edit.weighting == "none"
        if edit.kind == "magnitude" or keeps_all:
            parts.append(_Part(rows, None, edit))
            continue
        for cluster in clusters_of(weight[rows.to(weight.device)], edit):
            parts.append(_Part(rows[cluster], min(edit.rank, len(cluster), weight.shape[1]), edit))
    # Runs of neighbours, so that the order of the rows need not change for them.
    parts += [_Part(run, None) for run in runs_of(free)]
    return sorted(parts, key=lambda part: int(part.rows[0]))


def _pieces(part: _Part, factors: Mapping[str, Factors]) -> list[_Part]:
    """Part rows for which factors were given into those with numbers and those that they leave at zero."""
    spectrum = None if part.edit is None else factors.get(part.edit.matrix)
    if not isinstance(spectrum, Spectrum):
        return [part]
    zero = (spectrum.U == 0).all(1)
    kept, none = replace(spectrum, U=spectrum.U[~zero]), Spectrum(spectrum.U[zero, :0], spectrum.S[:0], spectrum.Vh[:0])
    pieces = [(~zero.cpu(), len(spectrum.S), kept), (zero.cpu(), 0, none)]
    return [_Part(part.rows[which], rank, part.edit, given) for which, rank, given in pieces if which.any()]


def _columns(parts: list[_Part]) -> Tensor | None:
    """The columns that a weight reads, where factors were given for all of it and have zeros in others."""
    if not all(part.spectrum is not None for part in parts):
        return None
    read = torch.stack([(part.spectrum.Vh != 0).any(0).cpu() for part in parts if part.spectrum is not None]).any(0)
    return None if read.all() or not read.any() else read.nonzero().flatten()


def _narrowed(part: _Part, columns: Tensor) -> _Part:
    assert part.spectrum is not None
    return replace(part, spectrum=replace(part.spectrum, Vh=part.spectrum.Vh[:, columns.to(part.spectrum.Vh.device)]))


def _storage(part: _Part, weight: Tensor, making: _Making) -> Storage:
    if part.rank is None:
        return "dense"
    if part.spectrum is not None and part.edit is not None:
        size = len(part.rows), weight.shape[1]
        if size != part.edit.shape and 0 < min(size) <= part.rank:
            return "dense"  # fewer rows or columns, and all that they can have of rank
    if making.storage is not None:
        return making.storage if part.rank else "factored"
    return cheapest_storage((len(part.rows), weight.shape[1]), part.rank, weight.dtype, at_most=making.at_most)


def _structure(part: _Part, making: _Making) -> Structure | None:
    """What a part becomes that is no plain cut."""
    found = None if part.edit is None else making.factors.get(part.edit.matrix)
    return None if isinstance(found, Spectrum) else found


def _bytes(storage: Storage, part: _Part, weight: Tensor, making: _Making) -> int:
    structure = _structure(part, making)
    if structure is not None:
        return structure.bytes_stored(weight.dtype)
    return bytes_stored(storage, (len(part.rows), weight.shape[1]), part.rank or 0, weight.dtype)


def _spectrum(part: _Part, weight: Tensor, making: _Making) -> Spectrum:
    """Decompose what a part becomes; without a rank, into as many components as it can have."""
    rows, edit = weight[part.rows.to(weight.device)], part.edit
    if part.rank is None:
        return truncation.decompose(rows if edit is None else replacement(rows, edit))
    assert edit is not None
    if part.spectrum is not None:
        return part.spectrum
    found = making.factors.get(edit.matrix)
    if isinstance(found, Spectrum):
        return found
    if edit.kind == "zero":
        precise = torch.promote_types(weight.dtype, torch.float32)
        out, into = rows.shape
        return Spectrum(*(weight.new_zeros(shape, dtype=precise) for shape in ((out, 0), (0,), (0, into))))
    if edit.svd == "lowrank":
        return truncation.decompose_approximately(rows, part.rank, niter=edit.niter, seed=edit.seed)
    return components(truncation.decompose(rows), edit)


def _block(
    part: _Part, storage: Storage, weight: Tensor, bias: Tensor | None, making: _Making
) -> nn.Linear | LowRankLayer:
    """Make the layer of one part."""
    rows = part.rows.to(weight.device)
    part_bias = None if bias is None else bias[rows]
    structure = _structure(part, making)
    if structure is not None:
        return structure.layer(bias=part_bias, dtype=weight.dtype)
    if storage != "dense":
        return STORAGES[storage].from_spectrum(_spectrum(part, weight, making), bias=part_bias, dtype=weight.dtype)
    values = weight[rows]
    if part.rank is not None:
        values = truncation.dense(_spectrum(part, weight, making)).to(weight.dtype)
    elif part.edit is not None:
        values = replacement(values, part.edit)
    linear = nn.Linear(values.shape[1], values.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(values.contiguous())
    if part_bias is not None:
        linear.bias = nn.Parameter(part_bias.clone())
    return linear


def _joined(parts: list[tuple[_Part, Spectrum]]) -> Spectrum:
    """Write parts of one weight as one product, whose rank is the sum of theirs and at least 1.

    Parts that have one `Vh` in common share it.
    """
    first = parts[0][1]
    if all(torch.equal(spectrum.Vh, first.Vh) and torch.equal(spectrum.S, first.S) for _, spectrum in parts):
        rows = torch.cat([part.rows for part, _ in parts]).argsort()
        return Spectrum(torch.cat([spectrum.U for _, spectrum in parts])[rows.to(first.U.device)], first.S, first.Vh)
    out, into = sum(len(part.rows) for part, _ in parts), first.Vh.shape[1]
    rank = max(1, sum(len(spectrum.S) for _, spectrum in parts))
    joined = Spectrum(first.U.new_zeros(out, rank), first.S.new_zeros(rank), first.Vh.new_zeros(rank, into))
    start = 0
    for part, spectrum in parts:
        columns = slice(start, start + len(spectrum.S))
        joined.U[part.rows.to(joined.U.device), columns] = spectrum.U
        joined.S[columns], joined.Vh[columns] = spectrum.S, spectrum.Vh
        start = columns.stop
    return joined
