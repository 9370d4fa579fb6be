"""From a compression to an elastic folder: what lies in it of every weight, and how its budget is divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eckart.allocate import Curve
from eckart.clustering import runs_of
from eckart.elastic import ElasticConfig, ElasticPart, ElasticQuantizer, ElasticWeight, curves_of, size_at
from eckart.mapping import mapped
from eckart.matrices import rows_of
from eckart.quantizer import replace_
from eckart.recipe import CompressSettings
from eckart.units import Unit
from eckart.weighting import WeightedSpectrum

STEP = 0.2
"""Between the ratios at which allocations are compared and the result is measured."""
BUDGETS = 24
"""Ratios that are tried to see how many components of each matrix can be asked for."""


def ratios_of(largest: float, curves: Sequence[Curve]) -> list[float]:
    """List the ratios that stand for all that an elastic folder serves.

    Args:
        largest: Ratio.
        curves: What every unit costs.

    Returns:
        The largest and those multiples of `STEP` below it that rank 1 everywhere does not exceed, descending.
    """
    multiples = [round(STEP * step, 6) for step in range(int(1 / STEP), 0, -1)]
    return [largest, *(ratio for ratio in multiples if _least(curves) < ratio < largest - 1e-9)]


def _least(curves: Sequence[Curve]) -> float:
    return sum(float(curve.costs[0]) for curve in curves) / sum(float(curve.costs[-1]) for curve in curves)


def describe(model: nn.Module, units: Sequence[Unit], settings: CompressSettings) -> ElasticConfig:
    """Say which weights an elastic folder holds, as if all of each were stored.

    Args:
        model: The original. Not modified.
        units: From `find_units`, all of them.
        settings: Of the compression.

    Returns:
        The description, with allocation `uniform`.
    """
    assert settings.ratio is not None
    weights = {}
    for path, parts in _layout(model, units).items():
        unit = next(number for _, number in parts if number is not None)
        first = units[unit].matrices[0]
        stacked = first.expert is not None
        sizes = model.get_parameter(first.parameter).shape
        shape = (sizes[-1], sizes[-2]) if first.transposed else (sizes[-2], sizes[-1])
        joined = torch.cat([rows for rows, _ in parts])
        weights[path] = ElasticWeight(
            shape=shape,
            parts=tuple(
                ElasticPart(len(rows), number, () if number is None else (min(len(rows), shape[1]),))
                for rows, number in parts
            ),
            experts=sizes[0] if stacked else 0,
            transposed=first.transposed,
            bias=not stacked and _bias(model, path) is not None,
            ordered=not torch.equal(joined, torch.arange(len(joined))),
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ElasticConfig(
        weights, settings.storage, "uniform", settings.floor, settings.multiple, settings.ratio, parameters
    )


def with_allocation(
    config: ElasticConfig, how: str, points: Mapping[int, Sequence[tuple[int, float]]] | None = None
) -> ElasticConfig:
    """Give a description another way to divide a budget.

    Args:
        config: Not modified.
        how: One of `elastic.ALLOCATIONS`.
        points: For `measured`: of each unit (rank, measured loss with it alone cut).

    Returns:
        The other one.
    """
    kept = points or {}

    def changed(part: ElasticPart) -> ElasticPart:
        return part if part.unit is None else replace(part, points=tuple(kept.get(part.unit, ())))

    return _changed(config, changed, allocation=how)


def trimmed(
    config: ElasticConfig, scales: Sequence[Tensor], dtype: torch.dtype, anchors: Mapping[float, Sequence[int]]
) -> ElasticConfig:
    """Leave out what no budget up to the largest ratio asks for.

    Args:
        config: With all components and all dense weights. Not modified.
        scales: As for `elastic.curves_of`.
        dtype: Of the model.
        anchors: Ratio of each anchor, descending, and the ranks at which all units were cut there; may be empty.

    Returns:
        The smaller one, which gives the same ranks at the ratios that were tried.
    """
    curves = curves_of(config, scales, dtype=dtype)
    tried = {*np.linspace(_least(curves) + 1e-9, config.ratio, BUDGETS).tolist(), *ratios_of(config.ratio, curves)}
    fulls = [weight.full(part) for _, _, weight, part in config.units()]
    most = [[0] * max(1, len(anchors)) for _ in scales]
    # Where no factors take fewer bytes than the dense weight, a budget of bytes has no other choice.
    dense = [len(curve.ranks) == 1 for curve in curves_of(config, scales, dtype=dtype, in_bytes=True)]
    for ratio in tried:
        anchor = max(0, sum(each >= ratio - 1e-9 for each in anchors) - 1)
        for unit, rank in enumerate(size_at(config, scales, dtype=dtype, ratio=ratio).ranks):
            dense[unit] |= rank == fulls[unit]
            most[unit][anchor] = max(most[unit][anchor], rank if rank < fulls[unit] else 0)
    for anchor, cut in enumerate(anchors.values()):
        for unit, rank in enumerate(cut):
            # What was cut at an anchor has as many components as it was cut to.
            most[unit][anchor] = rank if rank < fulls[unit] else most[unit][anchor]

    def changed(part: ElasticPart) -> ElasticPart:
        if part.unit is None:
            return part
        return replace(part, components=tuple(most[part.unit]), dense=dense[part.unit])

    return _changed(config, changed, anchors=[*anchors])


def make_elastic_(
    model: nn.Module,
    config: ElasticConfig,
    units: Sequence[Unit],
    scales: Sequence[Tensor],
    spectra: Callable[[Unit, int], Sequence[WeightedSpectrum]],
    *,
    spill: Path | None = None,
) -> nn.Module:
    """Replace a model's weights by their components, in place, so that `save` writes an elastic folder.

    Components are kept in bfloat16 if the model is, else in float32. The model computes nothing any more.

    Args:
        model: As the units were found in. Modified: its weights and its config.
        config: From `trimmed`.
        units: All of them.
        scales: As for `trimmed`.
        spectra: Gives the decompositions of a unit's matrices, at an anchor by its number.
        spill: A folder for the components, which are mapped from files there that must outlive the model.

    Returns:
        `model`.
    """
    held: Any = model
    layout = _layout(model, units)
    for number, (path, weight) in enumerate(config.weights.items()):
        parameter = model.get_parameter(path if weight.experts else f"{path}.weight").detach()
        tensors = _tensors(parameter, weight, layout[path], scales, lambda *which: spectra(units[which[0]], which[1]))
        if weight.bias:
            tensors["bias"] = _bias(model, path)
        if spill is not None:
            tensors = mapped(tensors, spill / f"{number}.safetensors")
        replace_(model, {path: _holder(tensors, parameter.dtype)})
    held.config.quantization_config = config
    held.config.ratio = held.config.bytes = None
    held.hf_quantizer = ElasticQuantizer(config)
    held._weight_conversions = held.hf_quantizer.update_weight_conversions([], model)
    return model


def _layout(model: nn.Module, units: Sequence[Unit]) -> dict[str, list[tuple[Tensor, int | None]]]:
    """Path of every weight that is cut -> its parts' rows and units, in the order of their first rows."""
    found: dict[str, list[tuple[Tensor, int | None]]] = {}
    free: dict[str, Tensor] = {}
    for number, unit in enumerate(units):
        first = unit.matrices[0]
        stacked = first.expert is not None
        path = first.parameter if stacked else first.parameter.removesuffix(".weight")
        rows = torch.arange(first.shape[0]) if stacked else rows_of(first)
        sizes = model.get_parameter(first.parameter).shape
        free.setdefault(path, torch.ones(sizes[-1] if first.transposed else sizes[-2], dtype=torch.bool))[rows] = False
        found.setdefault(path, []).append((rows, number))
    return {
        path: sorted(parts + [(run, None) for run in runs_of(free[path])], key=lambda part: int(part[0][0]))
        for path, parts in found.items()
    }


def _tensors(
    parameter: Tensor,
    weight: ElasticWeight,
    layout: Sequence[tuple[Tensor, int | None]],
    scales: Sequence[Tensor],
    spectra: Callable[[int, int], Sequence[WeightedSpectrum]],
) -> dict[str, Tensor]:
    """What is stored of a weight, but for its bias."""
    dense = parameter.mT if weight.transposed else parameter
    dtype = parameter.dtype if parameter.dtype in (torch.bfloat16, torch.float64) else torch.float32
    tensors: dict[str, Tensor] = {}
    for number, (part, (rows, unit)) in enumerate(zip(weight.parts, layout)):
        if part.dense:
            tensors[f"{number}.dense"] = dense[..., rows.to(dense.device), :]
        if unit is None:
            continue
        tensors[f"{number}.scales"] = scales[unit].double() if weight.experts else scales[unit][0].double()
        for anchor, count in enumerate(part.components):
            if not count:
                continue
            found = spectra(unit, anchor)
            each = [torch.cat((spectrum.left[:, :count].T, spectrum.right[:count]), 1) for spectrum in found]
            components = torch.stack(each, 1).to(dtype)
            tensors[f"{number}.components.{anchor}"] = components if weight.experts else components[:, 0]
    if weight.ordered:
        tensors["rows"] = torch.cat([rows for rows, _ in layout])
    return tensors


def _holder(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A module that holds tensors under `elastic.`, and the empty weight that makes others fail to load them."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    for name, tensor in tensors.items():
        *path, last = f"elastic.{name}".split(".")
        inner = holder
        for part in path:
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.register_buffer(last, tensor)
    return holder


def _changed(config: ElasticConfig, change: Callable[[ElasticPart], ElasticPart], **fields: Any) -> ElasticConfig:
    weights = {path: replace(weight, parts=tuple(map(change, weight.parts))) for path, weight in config.weights.items()}
    given: dict[str, Any] = config.to_dict() | {"weights": weights} | fields
    return ElasticConfig(**given)


def _bias(model: nn.Module, path: str) -> Any:
    module: Any = model.get_submodule(path)
    return None if module.bias is None else module.bias.detach()
