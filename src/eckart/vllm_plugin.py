"""vLLM reads factored folders by this plugin, which it finds by the entry point `vllm.general_plugins`.

Nothing else imports this module, since it needs vLLM. vLLM fuses layers that read the same input (q, k and v; gate and
up). Here each part keeps a storage of its own, dense or factored, of any rank; all `down` are one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
)

from eckart.errors import ModelError
from eckart.quantizer import METHOD, LowRankConfig, StoredLayer


def register() -> None:
    """Tell vLLM how factored layers are stored; it calls this in each of its processes."""
    register_quantization_config(METHOD)(VllmConfig)


class VllmConfig(QuantizationConfig):
    """The `quantization_config` of a factored folder, as vLLM asks for it.

    Args:
        layers: Module's path -> how it is stored.
    """

    def __init__(self, layers: dict[str, StoredLayer]):
        super().__init__()
        self.layers = layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """Read what config.json says.

        Args:
            config: The whole `quantization_config`.

        Returns:
            The config.

        Raises:
            ModelError: It is not understood, or a layer is stored in a way that vLLM is not taught here.
        """
        layers = LowRankConfig(**config).layers
        for name, stored in layers.items():
            if stored.storage not in ("factored", "pivoted") or stored.transposed:
                kind = f"{stored.storage}, from a transposed weight" if stored.transposed else stored.storage
                raise ModelError(
                    f"{name} is {kind}. In vLLM eckart's plugin reads factored and pivoted linear layers only. "
                    "Write the model with `eckart apply --dense`, or compress it with --no-neurons."
                )
        return cls(layers)

    @staticmethod
    def get_name() -> str:
        """Give the `quant_method` of config.json."""
        return METHOD

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        """List the dtypes of activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ask for no generation of GPUs; there are only matrix products."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Name no further file; config.json has all."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM's model does."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Choose how a layer is computed.

        Args:
            layer: vLLM's.
            prefix: Its path.

        Returns:
            A method for linear layers; None for others.

        Raises:
            ModelError: The layer is factored in the folder, and not linear here.
        """
        parent, dot, name = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(name, [name])]
        stored = [self.layers.get(part) for part in parts]
        if isinstance(layer, LinearBase):
            return LowRankMethod(stored, parts) if any(stored) else UnquantizedLinearMethod()
        if any(stored):
            raise ModelError(
                f"{prefix} is factored, and in vLLM it is {type(layer).__name__}. Linear layers can be factored there. "
                "Write the model with `eckart apply --dense`."
            )
        return None


@dataclass(frozen=True)
class _Part:
    """One of the layers that vLLM fused, or the only one; slices of what is stored for all of them."""

    rows: slice
    """Of the output."""
    dense: slice
    """Rows of `weight`; empty if it is low-rank."""
    down: slice
    """Rows of `down`; empty if it is dense."""
    up: slice
    """Of the flat `up`."""
    order: slice
    """Of `order`; empty unless it is pivoted."""

    @property
    def rank(self) -> int:
        """Features between `down` and `up`."""
        return self.down.stop - self.down.start

    def apply(self, layer: Any, x: Tensor, basis: Tensor) -> Tensor:
        """Compute its rows of the output from the input and the outputs of all `down`."""
        if self.dense.stop > self.dense.start:
            return functional.linear(x, layer.weight[self.dense])
        own = basis[..., self.down]
        y = functional.linear(own, self.up_of(layer.up.weight))
        if self.order.stop == self.order.start:
            return y
        order = layer.order[self.order]
        return torch.cat((own, y), -1).gather(-1, order.expand(*x.shape[:-1], len(order)))

    def up_of(self, flat: Tensor) -> Tensor:
        """Give its `up`, shape (rows, rank)."""
        return flat[self.up].view(-1, self.rank) if self.rank else flat.new_zeros(self.rows.stop - self.rows.start, 0)


class LowRankMethod(LinearMethodBase):
    """Computes a linear layer of vLLM from factors.

    Under tensor parallelism, layers that divide their output divide `up` (a pivoted layer's `order`), and layers that
    divide their input divide `down`; the sum over devices is that of vLLM.

    Args:
        stored: How each part is stored; None for a dense one.
        names: Of each part, for messages.
    """

    def __init__(self, stored: list[StoredLayer | None], names: list[str]):
        self.stored, self.names = stored, names
        self.parts: list[_Part] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Add the parameters under the names that the folder has.

        Args:
            layer: Modified: gets `weight` (of dense parts), `order`, `down.weight`, `up.weight` and `up.bias`.
            input_size_per_partition: Features that this device reads.
            output_partition_sizes: Features of each part on this device.
            input_size: Features of the input, over all devices.
            output_size: Features of the output, over all devices.
            params_dtype: Of the numbers.

        Raises:
            ModelError: vLLM fused other layers than it said.
        """
        if len(output_partition_sizes) != len(self.stored):
            raise ModelError(
                f"vLLM fuses {len(output_partition_sizes)} layers where the folder has {', '.join(self.names)}. "
                "eckart's plugin reads layers that lie in the folder one by one. Use `eckart apply --dense`."
            )
        ends = [0] * 5
        for out, stored in zip(output_partition_sizes, self.stored):
            sizes = [out, out, 0, 0, 0]
            if stored is not None:
                rank, pivoted = stored.rank or 0, stored.storage == "pivoted"
                # Any of a pivoted layer's rows may be on any device, so each has all of them.
                sizes = [out, 0, rank, rank * (stored.shape[0] - rank if pivoted else out), out if pivoted else 0]
            self.parts.append(_Part(*(slice(end, end + size) for end, size in zip(ends, sizes))))
            ends = [end + size for end, size in zip(ends, sizes)]
        _, dense, low, numbers, ordered = ends
        layer.down, layer.up = nn.Module(), nn.Module()
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (dense, input_size_per_partition),
            "order": (ordered,),
            "down.weight": (low, input_size_per_partition),
            "up.weight": (numbers,),
            "up.bias": (0,),  # written into vLLM's own
        }
        for name, shape in shapes.items():
            path, _, attribute = name.rpartition(".")
            numbers_of = torch.zeros(shape, dtype=torch.int64 if name == "order" else params_dtype)
            parameter: Any = nn.Parameter(numbers_of, requires_grad=False)
            parameter.weight_loader = _Loader(self, layer, name)
            layer.get_submodule(path).register_parameter(attribute, parameter)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer to the last dimension.

        Args:
            layer: As `create_weights` made it.
            x: Shape (..., in).
            bias: Shape (out,), or None.

        Returns:
            Shape (..., out), in the dtype and on the device of `x`.
        """
        basis = functional.linear(x, layer.down.weight)
        pieces = [part.apply(layer, x, basis) for part in self.parts]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return y if bias is None else y + bias


class _Loader:
    """Copies a tensor of the folder to its place, or this device's share of it."""

    def __init__(self, method: LowRankMethod, layer: Any, name: str):
        self.method, self.layer, self.name = method, layer, name

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        if shard is None and len(self.method.parts) > 1:
            raise ModelError(
                f"The folder holds {', '.join(self.method.names)} in one. eckart's plugin for vLLM reads them one by "
                "one. Use `eckart apply --dense`."
            )
        number: Any = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)  # pyright: ignore[reportArgumentType]
        part = self.method.parts[number]
        if self.name == "weight" and self.method.stored[number] is not None:
            return  # the empty tensor that stops loaders which do not know the layer
        target = {
            "weight": lambda: parameter.data[part.dense],
            "order": lambda: parameter.data[part.order],
            "down.weight": lambda: parameter.data[part.down],
            "up.weight": lambda: part.up_of(parameter.data),
            "up.bias": lambda: self.layer.bias.data[part.rows],
        }[self.name]()
        # Heads of keys and values may be fewer than devices, several of which then hold the same.
        share = self.layer.tp_rank // (getattr(self.layer, "num_kv_head_replicas", 1) if shard in ("k", "v") else 1)
        for dimension, size in enumerate(target.shape):
            if size < loaded.shape[dimension]:
                loaded = loaded.narrow(dimension, share * size, size)
        if loaded.shape != target.shape:
            raise ModelError(
                f"A tensor {self.name} of {self.method.names[number]} has shape {tuple(loaded.shape)}, and "
                f"{tuple(target.shape)} is expected. config.json says how layers are stored. Write the folder again."
            )
        target.copy_(loaded)
