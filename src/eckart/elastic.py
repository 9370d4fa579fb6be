"""Elastic folders: one checkpoint, from which a model of any size up to the largest is loaded.

Each weight lies as components in the order in which they are dropped, so that the first r of them are one stretch of
the file. What size a weight gets is settled at loading, by the allocator that a compression uses, from the singular
values; then only those stretches are read. The model that comes out is an ordinary factored one.

Notation: component i of a matrix (out, in) is a row of out + in numbers, its column of `left` and its row of `right`
(see `weighting.WeightedSpectrum`); those of a stack of experts have shape (experts, out + in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart import allocate
from eckart.allocate import Curve
from eckart.clustering import runs_of
from eckart.errors import ModelError, RankError
from eckart.experts import FactoredExperts, costs_at
from eckart.linear import STORAGES, LowRankLayer, RowBlockedLinear
from eckart.quantizer import LowRankConfig, LowRankQuantizer, StoredLayer, attach_, path_in
from eckart.weighting import WeightedSpectrum

METHOD = "eckart_elastic"
SCHEMA_VERSION = 1
ALLOCATIONS = ("uniform", "tail", "measured")
"""Ways to divide a budget that need no model, so that loading can."""


@dataclass(frozen=True)
class ElasticPart:
    """Rows of a weight that have a rank of their own, or all experts of a stack."""

    rows: int
    unit: int | None = None
    """Its place among all that share the budget; None for rows that are never cut."""
    components: tuple[int, ...] = ()
    """How many are stored for each anchor: the largest rank it can be loaded with, but for all."""
    dense: bool = True
    """Its rows are stored as they are, too, since it may be loaded without a cut."""
    points: tuple[tuple[int, float], ...] = ()
    """(rank, measured loss with it alone cut), for allocation `measured`."""


@dataclass(frozen=True)
class ElasticWeight:
    """One weight of an elastic folder: an entry of `quantization_config.weights` in config.json."""

    shape: tuple[int, int]
    """(out, in), whatever the order in which it was stored densely."""
    parts: tuple[ElasticPart, ...]
    experts: int = 0
    """How many lie in the stack; 0 for a linear layer."""
    transposed: bool = False
    """It was stored densely as (in, out)."""
    bias: bool = False
    ordered: bool = False
    """The parts' rows are not neighbours in order."""

    @classmethod
    def from_json(cls, entry: Any) -> ElasticWeight:
        """Read an entry.

        Args:
            entry: Anything that JSON can hold, or what this returned.

        Returns:
            The same as an `ElasticWeight`; whether it fits the model is not known here.

        Raises:
            ValueError: A field is unknown, missing, of another kind, or does not go with the others.
        """
        if isinstance(entry, cls):
            return entry
        given = _fields(cls, entry, {"shape", "parts"})
        shape, parts = given["shape"], given["parts"]
        if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not isinstance(parts, (list, tuple)) or not parts:
            raise ValueError("a shape is a list of two sizes, and parts are a list")
        found = cls(**given | {"shape": tuple(shape), "parts": tuple(_part(part) for part in parts)})
        if not all(_is_count(size, 1) for size in found.shape) or not _is_count(found.experts):
            raise ValueError("sizes are positive integers")
        if not all(type(flag) is bool for flag in (found.transposed, found.bias, found.ordered)):
            raise ValueError("transposed, bias and ordered are true or false")
        if sum(part.rows for part in found.parts) != found.shape[0]:
            raise ValueError(f"its parts have {[part.rows for part in found.parts]} rows, and it has {found.shape[0]}")
        if any(count > found.full(part) for part in found.parts for count in part.components):
            raise ValueError("a part has more components than its largest rank")
        if found.experts and (len(found.parts) > 1 or found.bias or found.ordered):
            raise ValueError("a stack of experts has one part and no bias")
        return found

    def full(self, part: ElasticPart) -> int:
        """Give the largest rank of a part."""
        return min(part.rows, self.shape[1])

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """List what the folder holds of it: name after the weight's path -> shape."""
        found: dict[str, tuple[int, ...]] = {}
        stack = (self.experts,) if self.experts else ()
        for number, part in enumerate(self.parts):
            if part.unit is not None:
                found[f"{number}.scales"] = (*stack, self.full(part))
            for anchor, count in enumerate(part.components):
                if count:
                    found[f"{number}.components.{anchor}"] = (count, *stack, part.rows + self.shape[1])
            if part.dense:
                found[f"{number}.dense"] = (*stack, part.rows, self.shape[1])
        if self.bias:
            found["bias"] = (self.shape[0],)
        if self.ordered:
            found["rows"] = (self.shape[0],)
        return {f"elastic.{name}": shape for name, shape in found.items()}


class ElasticConfig(QuantizationConfigMixin):
    """The `quantization_config` of an elastic folder.

    Args:
        weights: Module's path (parameter's path for experts) -> `ElasticWeight` or what it is in JSON.
        storage: How a matrix that is cut is stored once it is loaded.
        allocation: How a budget is divided.
        floor: As for `allocate.priced`.
        multiple: Ranks are multiples of it.
        ratio: The largest that can be loaded.
        anchors: For a method whose cuts depend on how deep others are: ratios at which all were cut, descending, the
            largest first. Each has components of its own, multiplied by their singular values, and serves the ratios
            from the next one up to itself. Empty where one decomposition serves all.
        parameters: Of the whole dense model.
        schema_version: Of this format.
        quant_method: `eckart_elastic`.

    Raises:
        ModelError: The format is of another version, or an entry is not understood.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        storage: Literal["factored", "pivoted"],
        allocation: str,
        floor: float,
        multiple: int,
        ratio: float,
        parameters: int,
        anchors: Sequence[float] = (),
        schema_version: int = SCHEMA_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        if schema_version != SCHEMA_VERSION or unknown:
            raise ModelError(
                f"config.json describes an elastic folder in version {schema_version} with {sorted(unknown)}. "
                f"This eckart reads version {SCHEMA_VERSION}. Install the eckart that wrote it, or a newer one."
            )
        self.quant_method: Any = quant_method
        self.schema_version = schema_version
        self.storage: Any = storage
        self.allocation, self.floor, self.multiple = allocation, floor, multiple
        self.ratio, self.parameters = ratio, parameters
        try:
            self.anchors = list(anchors)
            self.weights = {name: ElasticWeight.from_json(weight) for name, weight in weights.items()}
            self._check()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _not_understood(error) from None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from JSON, as transformers does.

        Raises:
            ModelError: A field is missing, or as above.
        """
        try:
            config = cls(**config_dict)
        except TypeError as error:
            raise _not_understood(error) from None
        return (config, kwargs) if return_unused_kwargs else config

    def _check(self) -> None:
        if self.storage not in STORAGES or self.allocation not in ALLOCATIONS:
            raise ValueError(f"storage {str(self.storage)[:80]} with allocation {str(self.allocation)[:80]}")
        if not (_is_number(self.floor) and 0 <= self.floor <= 1 and _is_number(self.ratio) and 0 < self.ratio < 1):
            raise ValueError("floor and ratio are fractions")
        if not _is_count(self.multiple, 1) or not _is_count(self.parameters, 1):
            raise ValueError("multiple and parameters are positive integers")
        if self.anchors and not all(map(_is_number, self.anchors)):
            raise ValueError("anchors are fractions")
        if self.anchors and (self.anchors[0] != self.ratio or self.anchors != sorted(self.anchors, reverse=True)):
            raise ValueError("anchors descend from the largest ratio")
        counts = {len(part.components) for weight in self.weights.values() for part in weight.parts if part.components}
        if counts - {max(1, len(self.anchors))}:
            raise ValueError("every unit has components for every anchor")
        units = sorted(part.unit for weight in self.weights.values() for part in weight.parts if part.unit is not None)
        if not units or units != list(range(len(units))):
            raise ValueError("units are not numbered from 0")

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON of it."""
        return vars(self) | {"weights": {name: _to_json(weight) for name, weight in self.weights.items()}}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def units(self) -> list[tuple[str, int, ElasticWeight, ElasticPart]]:
        """List what shares the budget, in order: path, number of the part, weight, part."""
        found = [
            (path, number, weight, part)
            for path, weight in self.weights.items()
            for number, part in enumerate(weight.parts)
            if part.unit is not None
        ]
        return sorted(found, key=lambda each: each[3].unit or 0)


def curves_of(
    config: ElasticConfig, scales: Sequence[Tensor], *, dtype: torch.dtype, in_bytes: bool = False
) -> list[Curve]:
    """Say what every unit costs and errs at the ranks it may have, as a compression does.

    Args:
        config: Of an elastic folder.
        scales: For each unit the singular values, descending, float64: shape (full,), or (experts, full).
        dtype: Of the model that is to be loaded; bytes depend on it.
        in_bytes: The budget is one of bytes.

    Returns:
        In the order of the units, named by their numbers.
    """
    found = []
    for (_, _, weight, part), values in zip(config.units(), scales):
        full = weight.full(part)
        ranks = allocate.allowed_ranks(full, config.multiple)
        costs = _costs(config, weight, part, ranks, dtype, in_bytes)
        tails = allocate.tails_of(list(values.reshape(-1, full).numpy()), full)
        found.append(allocate.make_curve(str(part.unit), ranks, costs, tails))
    return found


@dataclass(frozen=True)
class ElasticSize:
    """What is loaded."""

    ranks: list[int]
    """Of every unit; the largest means that it stays dense."""
    anchor: int
    """Whose components are read."""


def size_at(
    config: ElasticConfig,
    scales: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    ratio: float | None = None,
    bytes: float | None = None,
) -> ElasticSize:
    """Divide a budget among the units.

    Args:
        config: Of an elastic folder.
        scales: As for `curves_of`.
        dtype: Of the model that is to be loaded.
        ratio: Kept fraction of the numbers of the matrices; by default the largest that is stored.
        bytes: Of the whole model in that dtype, in place of a ratio. More than the largest model takes gives that one.

    Returns:
        The rank of every unit, and the lowest anchor that is not below what they keep.

    Raises:
        RankError: The budget is too small, more than is stored, or both were given.
    """
    if ratio is not None and bytes is not None:
        raise RankError(f"ratio {ratio} and bytes {bytes} were both given. One budget is enough. Leave one out.")
    budget: Any = config.ratio if ratio is None and bytes is None else ratio if bytes is None else bytes
    if not _is_number(budget):
        raise RankError(f"{budget!r} is no budget. A ratio is a fraction, and bytes are a number. Correct it.")
    if bytes is None and not 0 < budget <= config.ratio + 1e-9:
        raise RankError(
            f"ratio {budget:g} cannot be loaded from this elastic folder. It holds what ratios above 0 and up to "
            f"{config.ratio:g} need. Ask for less, or compress again with a larger --ratio."
        )
    curves = curves_of(config, scales, dtype=dtype, in_bytes=bytes is not None)
    dense = sum(float(curve.costs[-1]) for curve in curves)
    allowed = budget * dense if bytes is None else budget - (config.parameters * dtype.itemsize - dense)
    allocate.check_budget(curves, allowed)
    units = config.units()
    if bytes is not None:
        largest = size_at(config, scales, dtype=dtype)
        if allowed >= _cost(config, largest.ranks, dtype, in_bytes=True):
            return largest
    points = {
        curve.name: [(int(at), loss) for rank, loss in part.points for at in (curve.ranks == rank).nonzero()[0]]
        for curve, (_, _, _, part) in zip(curves, units)
    }
    choice = allocate.divided(config.allocation, curves, allowed, floor=config.floor, points=points)
    wanted = [int(curve.ranks[choice[curve.name]]) for curve in curves]
    fulls = [weight.full(part) for *_, weight, part in units]
    kept = _cost(config, wanted, dtype) / _cost(config, fulls, dtype) if bytes is not None else budget
    anchor = max(0, sum(each >= kept - 1e-9 for each in config.anchors) - 1)
    found = []
    for curve, rank, full, (*_, part) in zip(curves, wanted, fulls, units):
        most = part.components[anchor]
        if rank > most and not (rank == full and part.dense):
            # A budget between those that were tried when the folder was written may want more of a matrix than any did.
            stored = curve.ranks[(curve.ranks <= most) & (curve.ranks < full)]
            rank = int(stored[-1]) if len(stored) else most or full
        found.append(rank)
    return ElasticSize(found, anchor)


class ElasticQuantizer(LowRankQuantizer):
    """Loads a factored model of the size that is asked for; from then on it is one like any other."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> Any:
        config: ElasticConfig = self.quantization_config
        self.elastic, self.slices = config, Slices(checkpoint_files or ())
        self.slices.check(config)
        scales = [self.slices.read(f"{path}.elastic.{number}.scales") for path, number, _, _ in config.units()]
        if not all(bool(torch.isfinite(each).all()) and bool((each >= 0).all()) for each in scales):
            raise _not_understood("singular values are finite and not negative")
        asked = {name: getattr(model.config, name, None) for name in ("ratio", "bytes")}
        self.size = size_at(config, scales, dtype=model.dtype, **asked)
        layers: dict[str, StoredLayer] = {}
        self.paths: dict[str, str] = {}
        for name in config.weights:
            path, stored = path_in(model, name), stored_at(config, name, self.slices, self.size.ranks)
            if path is not None:
                self.paths[name] = path
            if stored.storage != "dense":
                layers[name] = stored
        # What is loaded, and saved again, is a factored model of that size.
        self.quantization_config = LowRankConfig(layers)
        super()._process_model_before_weight_loading(model, **options)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.elastic\."}
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """Load a weight from its components, where transformers finds the empty tensor that marks it."""
        if isinstance(self.quantization_config, ElasticConfig):
            return _experts_renamed(self.quantization_config)
        from transformers.core_model_loading import WeightConverter

        found = []
        for name, path in self.paths.items():
            weight = self.elastic.weights[name]
            mark = name if weight.experts else f"{name}.weight"
            make: Any = _Make(self, name, path)
            found.append(WeightConverter(rf"^{mark}$".replace(".", r"\."), make.targets(model), [make], force_cpu=True))
        return found

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in ("ratio", "bytes"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        attach_(model, {}, {})
        return model


class Slices:
    """Tensors of a checkpoint, of which as much is read as is asked for."""

    def __init__(self, files: Sequence[str]):
        """Read the headers of safetensors files."""
        self.files: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def read(self, name: str, count: int | None = None) -> Tensor:
        """Read the first entries of a tensor along its first dimension, or all."""
        # transformers builds models with the device meta for whatever is made.
        with torch.device("cpu"), safe_open(self.files[name], framework="pt") as opened:
            return opened.get_slice(name)[:count]

    def check(self, config: ElasticConfig) -> None:
        """Compare names and shapes of the tensors with what a config says, before any is read.

        Raises:
            ModelError: One is missing, or has another shape.
        """
        for path, weight in config.weights.items():
            for name, shape in weight.tensors().items():
                key = f"{path}.{name}"
                if key not in self.files:
                    raise ModelError(
                        f"{key} is missing from the elastic folder's files. config.json lists it with shape {shape}. "
                        "Copy the folder again, with all its files."
                    )
                with safe_open(self.files[key], framework="pt") as opened:
                    found = tuple(opened.get_slice(key).get_shape())
                if found != shape:
                    raise ModelError(
                        f"{key} has shape {found} in the elastic folder's files. config.json lists it with shape "
                        f"{shape}. Copy the folder again, with all its files."
                    )


def stored_at(config: ElasticConfig, path: str, slices: Slices, ranks: Sequence[int]) -> StoredLayer:
    """Say how a weight is stored once it is loaded.

    Args:
        config: Of an elastic folder.
        path: Of one of its weights.
        slices: Its tensors.
        ranks: Of all units.

    Returns:
        As `quantizer.stored_as` has it of the layer that `load_weight` makes.
    """
    weight = config.weights[path]
    facts: dict[str, Any] = {"shape": weight.shape, "transposed": weight.transposed}
    pieces = _pieces(weight, slices, path, ranks)
    if all(rank is None for _, rank, _ in pieces):
        return StoredLayer("dense", **facts)
    if weight.experts:
        return StoredLayer("experts", rank=FactoredExperts.rounded(pieces[0][1] or 0), **facts)
    storages: list[Any] = ["dense" if rank is None else config.storage for _, rank, _ in pieces]
    if len(pieces) == 1:
        return StoredLayer(storages[0], rank=pieces[0][1], **facts)
    blocks = tuple(
        StoredLayer(storage, (len(rows), weight.shape[1]), rank) for storage, (rows, rank, _) in zip(storages, pieces)
    )
    return StoredLayer("row_blocked", blocks=blocks, ordered=not _in_order(pieces), **facts)


def load_weight(
    config: ElasticConfig, path: str, slices: Slices, size: ElasticSize, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Make a weight of the size that it is to have, reading what that takes.

    Args:
        config: Of an elastic folder.
        path: Of one of its weights.
        slices: Its tensors.
        size: Of the model.
        dtype: Of the result.

    Returns:
        Names after the path -> tensors on the CPU: the state of the layer that `factor_` makes of the same cut, to the
        bit where the components are stored in float32. `""` is the parameter itself, of experts that stay dense.
    """
    weight, ranks = config.weights[path], size.ranks
    bias = slices.read(f"{path}.elastic.bias") if weight.bias else None
    pieces = _pieces(weight, slices, path, ranks)
    if all(rank is None for _, rank, _ in pieces):
        dense = _dense(weight, slices, path, ranks)[1].to(dtype)
        dense = (dense.mT if weight.transposed else dense).contiguous()
        return {"": dense} if weight.experts else {"weight": dense} | ({} if bias is None else {"bias": bias.to(dtype)})
    if weight.experts:
        rank = pieces[0][1] or 0
        cut = [spectrum.cut(rank) for spectrum in _spectra(config, path, slices, 0, size.anchor, rank)]
        return FactoredExperts.from_spectra(cut, transposed=weight.transposed, dtype=dtype).state_dict()
    kept, dense = _dense(weight, slices, path, ranks)
    blocks: list[nn.Linear | LowRankLayer] = []
    for rows, rank, number in pieces:
        part_bias = None if bias is None else bias[rows]
        if rank is not None:
            (spectrum,) = _spectra(config, path, slices, number, size.anchor, rank)
            made = STORAGES[config.storage].from_spectrum(spectrum.cut(rank), bias=part_bias, dtype=dtype)
        else:
            made: Any = nn.Linear(weight.shape[1], len(rows), bias is not None, device="meta", dtype=dtype)
            made.weight = nn.Parameter(dense[torch.searchsorted(kept, rows)].to(dtype))
            made.bias = None if part_bias is None else nn.Parameter(part_bias.to(dtype))
        blocks.append(made)
    if len(blocks) == 1:
        return blocks[0].state_dict()
    return RowBlockedLinear(blocks, None if _in_order(pieces) else [rows for rows, _, _ in pieces]).state_dict()


def _rows(weight: ElasticWeight, slices: Slices, path: str) -> Sequence[Tensor]:
    """The rows of every part."""
    rows = torch.arange(weight.shape[0], device="cpu")
    if weight.ordered:
        stored = slices.read(f"{path}.elastic.rows")
        if stored.dtype != torch.int64 or not torch.equal(stored.sort().values, rows):
            raise _not_understood(f"the rows of {path} are not every number once")
        rows = stored
    return rows.split([part.rows for part in weight.parts])


def _pieces(
    weight: ElasticWeight, slices: Slices, path: str, ranks: Sequence[int]
) -> list[tuple[Tensor, int | None, int]]:
    """What a weight is divided into: rows, rank (None if dense), number of the part, in the order of first rows.

    Rows that stay dense are divided into runs of neighbours, whichever parts they are of.
    """
    found: list[tuple[Tensor, int | None, int]] = []
    free = torch.ones(weight.shape[0], dtype=torch.bool, device="cpu")
    for number, (part, rows) in enumerate(zip(weight.parts, _rows(weight, slices, path))):
        if part.unit is not None and ranks[part.unit] < weight.full(part):
            found.append((rows, ranks[part.unit], number))
            free[rows] = False
    found += [(run, None, -1) for run in runs_of(free)]
    return sorted(found, key=lambda piece: int(piece[0][0]))


def _in_order(pieces: Sequence[tuple[Tensor, int | None, int]]) -> bool:
    joined = torch.cat([rows for rows, _, _ in pieces])
    return torch.equal(joined, joined.sort().values)


def _dense(weight: ElasticWeight, slices: Slices, path: str, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows of a weight that stay dense, ascending, and what is in them."""
    kept, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, weight.shape[1])]
    for number, (part, rows) in enumerate(zip(weight.parts, _rows(weight, slices, path))):
        if part.unit is None or ranks[part.unit] == weight.full(part):
            kept.append(rows)
            values.append(slices.read(f"{path}.elastic.{number}.dense"))
    if len(values) == 1:
        return kept[0], values[0]
    rows = torch.cat(kept)
    return rows.sort().values, torch.cat(values[1:], -2)[..., rows.argsort(), :]


def _spectra(
    config: ElasticConfig, path: str, slices: Slices, number: int, anchor: int, rank: int
) -> list[WeightedSpectrum]:
    """The first components of a part, by themselves or of every expert."""
    weight = config.weights[path]
    part, stack = weight.parts[number], max(1, weight.experts)
    components = slices.read(f"{path}.elastic.{number}.components.{anchor}", rank).double().reshape(rank, stack, -1)
    # Those of an anchor have their singular values in them.
    values = torch.ones(stack, rank).double() if config.anchors else slices.read(f"{path}.elastic.{number}.scales")
    return [
        WeightedSpectrum(components[:, each, : part.rows].T, scales[:rank], components[:, each, part.rows :])
        for each, scales in enumerate(values.reshape(stack, -1))
    ]


class _Make:
    """What transformers calls to make the tensors of one weight."""

    supports_many_to_many = True

    def __init__(self, quantizer: ElasticQuantizer, name: str, path: str):
        self.hf_quantizer, self.name, self.path = quantizer, name, path

    def __deepcopy__(self, _: Any) -> _Make:
        return self

    def targets(self, model: Any) -> list[str]:
        """Names in the model of what is made."""
        layer = _attribute(model, self.path)
        if isinstance(layer, Tensor):
            return [self.path]
        return [f"{self.path}.{name}" for name in layer.state_dict()]

    def convert(self, _: Any, *, model: Any, **__: Any) -> dict[str, Tensor]:
        """Make them."""
        quantizer = self.hf_quantizer
        made = load_weight(quantizer.elastic, self.name, quantizer.slices, quantizer.size, model.dtype)
        return {f"{self.path}.{name}" if name else self.path: tensor for name, tensor in made.items()}


def register() -> None:
    """Tell transformers of elastic folders; a second call does nothing."""
    AUTO_QUANTIZER_MAPPING[METHOD] = ElasticQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ElasticConfig


def _costs(
    config: ElasticConfig, weight: ElasticWeight, part: ElasticPart, ranks: Any, dtype: torch.dtype, in_bytes: bool
) -> Any:
    """What a unit takes at some ranks."""
    return costs_at(
        ranks,
        (part.rows, weight.shape[1]),
        storage=config.storage,
        dtype=dtype,
        experts=weight.experts,
        in_bytes=in_bytes,
    )


def _cost(config: ElasticConfig, ranks: Sequence[int], dtype: torch.dtype, in_bytes: bool = False) -> float:
    """What all units take together."""
    return float(
        sum(
            _costs(config, weight, part, np.array([rank]), dtype, in_bytes)[0]
            for rank, (*_, weight, part) in zip(ranks, config.units())
        )
    )


def _experts_renamed(config: ElasticConfig) -> list[Any]:
    """Save the empty tensor of a stack of experts under the name of the parameter that they were."""
    from transformers.core_model_loading import WeightRenaming

    experts = [name for name, weight in config.weights.items() if weight.experts]
    return [WeightRenaming(name.replace(".", r"\.") + r"(?![\w.])", f"{name}.weight") for name in experts]


def _attribute(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part)
    return model


def _part(entry: Any) -> ElasticPart:
    given = _fields(ElasticPart, entry, {"rows"})
    points = given.get("points", ())
    if not isinstance(points, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in points):
        raise ValueError("points are pairs of a rank and a loss")
    components = given.get("components", ())
    if not isinstance(components, (list, tuple)) or not all(map(_is_count, components)):
        raise ValueError("components are counts")
    part = ElasticPart(
        **given | {"points": tuple((rank, loss) for rank, loss in points), "components": tuple(components)}
    )
    if not all(_is_count(rank, 1) and _is_number(loss) for rank, loss in part.points):
        raise ValueError("points are pairs of a rank and a loss")
    if not _is_count(part.rows, 1) or type(part.dense) is not bool:
        raise ValueError("rows are a count, and dense is true or false")
    if part.unit is None and (part.components or not part.dense):
        raise ValueError("rows that are never cut are dense")
    if part.unit is not None and (not _is_count(part.unit) or not part.components):
        raise ValueError("a unit has a number and components")
    if 0 in part.components and not part.dense:
        raise ValueError("a unit without components is dense")
    return part


def _fields(kind: Any, entry: Any, needed: set[str]) -> dict[str, Any]:
    if isinstance(entry, kind):
        return {field.name: getattr(entry, field.name) for field in fields(kind)}
    names = {field.name for field in fields(kind)}
    if not isinstance(entry, Mapping) or not needed <= entry.keys() <= names:
        raise ValueError(f"it has the fields {str(entry)[:80]}, and may have {', '.join(sorted(names))}")
    return dict(entry)


def _to_json(weight: ElasticWeight) -> dict[str, Any]:
    parts = [{key: value for key, value in asdict(part).items() if value not in (None, ())} for part in weight.parts]
    return asdict(weight) | {"shape": list(weight.shape), "parts": parts}


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _not_understood(problem: Any) -> ModelError:
    return ModelError(
        f"The elastic folder is not understood: {problem}. quantization_config in its config.json describes weights, "
        "as docs/files.md has it. Write the folder again."
    )


# As in `eckart.quantizer`.
register()
