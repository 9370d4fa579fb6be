"""Low-rank layers in Hugging Face folders: what config.json says of them, and how transformers builds them.

transformers calls what replaces layers before weights are loaded a quantizer, so this is one. It knows how a layer is
stored and where it goes, but nothing of plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.dataflow import low_rank_layers
from eckart.errors import EckartError, ModelError
from eckart.experts import FactoredExperts
from eckart.linear import STORAGES, FactoredLinear, LowRankLayer, PivotedLinear, RowBlockedLinear, SelectedLinear
from eckart.monarch import MonarchLinear
from eckart.sparse import SparseLinear

METHOD = "eckart"
SCHEMA_VERSION = 1
MODELING = "modeling_eckart"
"""The modeling file of a portable folder, without `.py`."""

STORED = ("dense", "factored", "pivoted", "row_blocked", "selected", "experts", "monarch", "sparse")
"""How a weight may be stored."""


@dataclass(frozen=True)
class StoredLayer:
    """How one weight is stored: an entry of `quantization_config.layers` in config.json."""

    storage: Literal["dense", "factored", "pivoted", "row_blocked", "selected", "experts", "monarch", "sparse"]
    shape: tuple[int, int]
    """(out, in), whatever the order in which it was stored densely."""
    rank: int | None = None
    """Of a factored or pivoted weight, of each expert, and of each block of a monarch weight."""
    transposed: bool = False
    """It was stored densely as (in, out)."""
    blocks: tuple[StoredLayer, ...] = ()
    """The groups of rows of a row-blocked weight; how the columns of a selected one are stored; the product in a sparse
    one."""
    ordered: bool = False
    """The blocks' rows are not neighbours in order."""
    grid: int | None = None
    """Blocks along each side of a monarch weight."""
    nonzeros: int | None = None
    """Entries of a sparse weight beside its product."""

    @classmethod
    def from_json(cls, entry: Any) -> StoredLayer:
        """Read an entry.

        Args:
            entry: Anything that JSON can hold, or what this returned.

        Returns:
            The same as a `StoredLayer`; whether its numbers fit the model is not known here.

        Raises:
            ValueError: A field is unknown, missing or of another kind.
        """
        if isinstance(entry, cls):
            return entry
        names = [field.name for field in fields(cls)]
        if not isinstance(entry, Mapping) or not {"storage", "shape"} <= entry.keys() <= set(names):
            raise ValueError(f"it has the fields {str(entry)[:80]}, and may have {', '.join(names)}")
        shape, blocks = entry["shape"], entry.get("blocks", [])
        sizes = [size for size in map(entry.get, ("rank", "grid", "nonzeros")) if size is not None]
        if not isinstance(shape, (list, tuple)) or not isinstance(blocks, (list, tuple)):
            raise ValueError("a shape is a list, and so are blocks")
        if not all(type(size) is int and size >= 0 for size in (*shape, *sizes)):
            raise ValueError("sizes are integers that are not negative")
        layer = cls(**{**entry, "shape": tuple(shape), "blocks": tuple(map(cls.from_json, blocks))})
        if len(layer.shape) != 2 or layer.storage not in STORED:
            raise ValueError(f"its storage is {str(layer.storage)[:80]}, of shape {layer.shape}")
        if type(layer.transposed) is not bool or type(layer.ordered) is not bool:
            raise ValueError("transposed and ordered are true or false")
        return layer

    def to_json(self) -> dict[str, Any]:
        """Write the entry; fields at their defaults are left out."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        given["shape"] = list(self.shape)
        given["blocks"] = [block.to_json() for block in self.blocks]
        return given if self.blocks else {name: value for name, value in given.items() if name != "blocks"}


@dataclass(frozen=True)
class Size:
    """How much a model's parameters take."""

    parameters: int
    bytes: int
    """With the order of the rows, where a layer has one."""


class LowRankConfig(QuantizationConfigMixin):
    """The `quantization_config` of a factored checkpoint.

    Args:
        layers: Module's path (parameter's path for experts) -> `StoredLayer` or what it is in JSON.
        dense: Module's path -> why an edited weight was left dense.
        schema_version: Of this format.
        quant_method: `eckart`.

    Raises:
        ModelError: The format is of another version, or an entry is not understood.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        dense: Mapping[str, str] | None = None,
        schema_version: int = SCHEMA_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        if schema_version != SCHEMA_VERSION or unknown:
            raise ModelError(
                f"config.json describes low-rank layers in version {schema_version} with {sorted(unknown)}. "
                f"This eckart reads version {SCHEMA_VERSION}. Install the eckart that wrote it, or a newer one."
            )
        self.quant_method: Any = quant_method
        self.schema_version = schema_version
        self.dense = dict(dense or {})
        try:
            self.layers = {name: StoredLayer.from_json(layer) for name, layer in (layers or {}).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"config.json describes a low-rank layer that is not understood: {error}. "
                "An entry of quantization_config.layers has a storage, a shape and a rank. Write the folder again."
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON of it."""
        layers = {name: layer.to_json() for name, layer in self.layers.items()}
        return {
            "quant_method": self.quant_method,
            "schema_version": self.schema_version,
            "layers": layers,
            "dense": self.dense,
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class LowRankQuantizer(HfQuantizer):
    """Puts low-rank layers on the meta device into a model before transformers loads its weights."""

    requires_calibration = True
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        found: dict[str, StoredLayer] = {}
        for name, stored in self.quantization_config.layers.items():
            path = path_in(model, name)
            if path is not None:
                found[path] = stored
        replace_(model, {path: _empty_layer(model, path, stored) for path, stored in found.items()})
        if self.quantization_config.layers and not found:
            raise ModelError(
                f"{type(model).__name__} has none of the {len(self.quantization_config.layers)} low-rank layers that "
                f"config.json describes, {next(iter(self.quantization_config.layers))} first. A class that has some of "
                "them can be loaded. Load it with the class that saved it."
            )
        # A base model loaded from a model with a head has other paths, and saves these.
        self.quantization_config.layers = found
        if not model.is_remote_code():
            _forget_modeling(model)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """Load names as they are saved: the model's own, but for experts.

        Those have an empty tensor in the place of the parameter they replace, so that what does not know them
        finds a wrong shape and stops.
        """
        from transformers.core_model_loading import WeightRenaming

        layers, prefix = self.quantization_config.layers, f"{model.base_model_prefix}."
        experts = [name.removeprefix(prefix) for name, stored in layers.items() if stored.storage == "experts"]
        return [WeightRenaming(name.replace(".", r"\.") + r"(?![\w.])", f"{name}.weight") for name in experts]

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Multiply every low-rank layer out, in place.

        Args:
            model: Modified.
            dtype: Of the whole model afterwards; by default each weight keeps that of its factors.

        Returns:
            `model`, an ordinary dense one.
        """
        for name, stored in self.quantization_config.layers.items():
            layer: Any = model.get_submodule(name)
            dense = nn.Parameter(layer.dense().detach()) if stored.storage == "experts" else _dense(layer, stored)
            # One at a time, so that factors are let go as they are multiplied out.
            replace_(model, {name: dense})
        self.remove_quantization_config(model)
        vars(model).pop("_weight_conversions", None)
        _forget_modeling(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> Any:
        """Say that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Say that adapters can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Say that the factors themselves can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Say that `generate` may compile the model."""
        return True


def register() -> None:
    """Tell transformers of the quantizer; a second call does nothing.

    The copy of this in a portable folder leaves in place what is there; eckart itself replaces that copy.
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING or __name__ == "eckart.quantizer":
        AUTO_QUANTIZER_MAPPING[METHOD] = LowRankQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowRankConfig


def attach_(model: Any, layers: Mapping[str, StoredLayer], dense: Mapping[str, str]) -> None:
    """Tell a model in memory that it has low-rank layers, so that `save_pretrained` and `dequantize` work.

    Args:
        model: A transformers model; modified: its config, and attributes that `from_pretrained` sets too.
        layers: Path -> how its weight is stored; added to what the model has already.
        dense: Path -> why an edited weight was left dense.
    """
    before = getattr(model.config, "quantization_config", None)
    if isinstance(before, LowRankConfig):
        layers, dense = before.layers | dict(layers), before.dense | dict(dense)
    config = LowRankConfig(layers, dense)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config)
    model._weight_conversions = model.hf_quantizer.update_weight_conversions([], model)


def stored_as(layer: nn.Module, *, transposed: bool = False) -> StoredLayer:
    """Describe how a layer stores its weight.

    Args:
        layer: `nn.Linear` or a low-rank layer.
        transposed: Its dense weight was stored as (in, out).

    Returns:
        The description, from which the layer can be built without its numbers.
    """
    features: Any = layer
    facts: dict[str, Any] = {"shape": (features.out_features, features.in_features), "transposed": transposed}
    if isinstance(layer, RowBlockedLinear):
        blocks = tuple(stored_as(block) for block in layer.blocks)
        return StoredLayer(storage="row_blocked", blocks=blocks, ordered=layer.order is not None, **facts)
    if isinstance(layer, SelectedLinear):
        return StoredLayer(storage="selected", blocks=(stored_as(layer.inner),), **facts)
    if isinstance(layer, FactoredExperts):
        return StoredLayer(storage="experts", rank=layer.down.shape[1], **facts)
    if isinstance(layer, MonarchLinear):
        return StoredLayer(storage="monarch", rank=layer.rank, grid=layer.grid, **facts)
    if isinstance(layer, SparseLinear):
        product, nonzeros = stored_as(layer.low), len(layer.values)
        return StoredLayer(storage="sparse", blocks=(product,), nonzeros=nonzeros, **facts)
    if isinstance(layer, (FactoredLinear, PivotedLinear)):
        storage = "factored" if isinstance(layer, FactoredLinear) else "pivoted"
        return StoredLayer(storage=storage, rank=layer.rank, **facts)
    return StoredLayer(storage="dense", **facts)


def sizes(model: nn.Module) -> tuple[Size, Size]:
    """Count a model's parameters and bytes.

    Args:
        model: Any model. Not modified. Tied weights count once.

    Returns:
        As it is, and as it would be with every low-rank layer multiplied out.
    """
    parameters = list(model.parameters())
    found = Size(sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters))
    numbers, extra, order = 0, 0, 0
    for layer in low_rank_layers(model).values():
        weights = [p for p in layer.parameters() if p.ndim > 1]
        stack = weights[0].shape[0] if isinstance(layer, FactoredExperts) else 1
        saved = stack * layer.in_features * layer.out_features - sum(p.numel() for p in weights)
        numbers, extra = numbers + saved, extra + saved * layer.weight.itemsize
        order += sum(buffer.nbytes for buffer in layer.buffers())
    return Size(found.parameters, found.bytes + order), Size(found.parameters + numbers, found.bytes + extra)


def replace_(model: nn.Module, layers: Mapping[str, nn.Module | nn.Parameter]) -> None:
    """Put modules or parameters into the places of others, all in one walk through the model.

    Args:
        model: Modified. A module that it holds in several places is replaced in all of them.
        layers: Path of an old one, a module or a parameter -> the new one.
    """
    modules: dict[nn.Module, nn.Module] = {}
    for path, new in layers.items():
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        old = getattr(holder, name)
        if isinstance(old, nn.Module) and isinstance(new, nn.Module):
            modules[old] = new.train(old.training)
        else:
            delattr(holder, name)
            setattr(holder, name, new)
    for module in list(model.modules()) if modules else ():
        for key, child in module._modules.items():
            if child in modules:
                module._modules[key] = modules[child]


def empty_layer(stored: StoredLayer, *, bias: bool) -> Any:
    """Build a linear layer as it is stored, on the meta device.

    Args:
        stored: Any storage but `experts`.
        bias: Whether it has one.

    Returns:
        The layer; `load_state_dict(..., assign=True)` gives it its numbers.

    Raises:
        EckartError: The description does not fit together.
    """
    return _empty(stored, bias, {"device": "meta"})


def _forget_modeling(model: Any) -> None:
    """Drop what config.json says of a portable folder's modeling file, which no later folder has by itself."""
    classes: dict[str, str] = getattr(model.config, "auto_map", None) or {}
    if any(name.startswith(f"{MODELING}.") for name in classes.values() if isinstance(name, str)):
        del model.config.auto_map


def path_in(model: Any, name: str) -> str | None:
    """Where a layer is in this model, which may be the base of the model that was saved, or have it as its base."""
    prefix = f"{model.base_model_prefix}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        try:
            attribute = model
            for part in path.split("."):
                attribute = getattr(attribute, part)
            return path
        except AttributeError:
            continue
    return None


def _empty_layer(model: nn.Module, path: str, stored: StoredLayer) -> LowRankLayer:
    parent, _, name = path.rpartition(".")
    old = getattr(model.get_submodule(parent), name)
    weight = old if stored.storage == "experts" else getattr(old, "weight", None)
    shape = tuple(weight.shape[-2:]) if isinstance(weight, torch.Tensor) else None
    if shape is None or stored.shape != (shape[::-1] if stored.transposed else shape) or stored.storage == "dense":
        raise ModelError(
            f"config.json has {path} as {stored.storage} of shape {stored.shape}; in {type(model).__name__} it is "
            f"{shape}. A low-rank layer stands for a weight of the same shape. Load it with the class that saved it."
        )
    assert isinstance(weight, torch.Tensor)
    place: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    try:
        if stored.storage == "experts":
            out, into = stored.shape
            layer = FactoredExperts(len(weight), into, out, stored.rank or 1, transposed=stored.transposed, **place)
            # transformers would ask it to be initialised as the parameter it stands for.
            layer._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
            return layer
        return _empty(stored, old.bias is not None, place)
    except (EckartError, TypeError, ValueError) as error:
        raise ModelError(
            f"config.json describes {path} in a way that does not fit together: {error} Write the folder again."
        ) from error


def _empty(stored: StoredLayer, bias: bool, place: dict[str, Any]) -> Any:
    out, into = stored.shape
    if stored.storage == "row_blocked":
        blocks = [_empty(block, bias, place) for block in stored.blocks]
        rows = [torch.empty(block.out_features, dtype=torch.int64, device="meta") for block in blocks]
        layer = RowBlockedLinear(blocks, rows if stored.ordered else None)
        assert (layer.out_features, layer.in_features) == stored.shape
        return layer
    if stored.storage == "selected":
        (block,) = stored.blocks
        if block.shape[0] != out:
            raise ValueError(f"its columns have {block.shape[0]} rows, and it has {out}.")
        columns = torch.empty(block.shape[1], dtype=torch.int64, device="meta")
        return SelectedLinear(_empty(block, bias, place), columns, into)
    if stored.storage == "dense":
        return nn.Linear(into, out, bias, **place)
    if stored.storage == "sparse":
        (block,) = stored.blocks
        if block.shape != stored.shape or block.storage not in STORAGES:
            raise ValueError(f"its product is {block.storage} of shape {block.shape}, and it has {stored.shape}.")
        return SparseLinear(_empty(block, bias, place), stored.nonzeros or 0)
    if stored.storage == "monarch":
        return MonarchLinear(into, out, stored.grid or 0, stored.rank or 0, bias, **place)
    return STORAGES["pivoted" if stored.storage == "pivoted" else "factored"](into, out, stored.rank, bias, **place)


def _dense(layer: Any, stored: StoredLayer) -> nn.Module:
    """Make the layer that it was, with the weight multiplied out."""
    from transformers.pytorch_utils import Conv1D

    weight, bias = layer.dense().detach(), layer.bias
    dense: Any = Conv1D(1, 1) if stored.transposed else nn.Linear(1, 1, bias is not None)
    if stored.transposed:
        dense.nf, dense.nx = stored.shape
    else:
        dense.out_features, dense.in_features = stored.shape
    dense.weight = nn.Parameter(weight.T.contiguous() if stored.transposed else weight)
    dense.bias = None if bias is None else nn.Parameter(bias.detach())
    return dense


# transformers finds what it was told of; see `eckart.registration` for when this module is imported.
register()
