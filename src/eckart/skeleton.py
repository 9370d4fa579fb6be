"""A model's matrices from its config alone: layers and types without a weight being loaded.

Types come from the data flow of a forward pass (`eckart.dataflow`), which needs numbers, though any will do. So the
model is built without memory for its weights, one block of each kind is kept, and each weight becomes a window that
slides over a few random numbers: all its entries and rows differ in what they see, and an out x in matrix takes
2·out + in numbers. What is learned of a block holds for all blocks with parameters of the same names and shapes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from eckart.checkpoint import class_of
from eckart.dataflow import Use, example_inputs, trace
from eckart.errors import ModelError
from eckart.matrices import Matrix, find_blocks, matrices_used, output_embeddings


def skeleton(config: Any) -> Any:
    """Build a model without memory for its weights.

    Args:
        config: Of a transformers model. Not modified; what it says of quantisation is left out.

    Returns:
        The model of the class that the config names, its parameters on the meta device and its buffers on the CPU.

    Raises:
        ModelError: transformers cannot build it.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._experts_implementation = "eager"  # the others multiply all experts of a stack at once
    try:
        with init_empty_weights(include_buffers=False):
            kind = class_of(config)
            build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config  # of an AutoModel
            return build(config, dtype=torch.float32).eval()
    except Exception as error:  # whatever a model's constructor raises
        raise ModelError(
            f"A model of type '{getattr(config, 'model_type', None)}' cannot be built from its config: {error}. "
            "config.json has what the class's constructor needs. Update transformers, or check the file."
        ) from error


def matrices_of(model: nn.Module) -> tuple[Matrix, ...]:
    """List the weight matrices of a model that has no weights.

    Costs a forward pass over five tokens through one block of each kind, and the memory of one weight.

    Args:
        model: From `skeleton`. Not modified.

    Returns:
        What `eckart.find_matrices` finds in the model with its weights.

    Raises:
        ModelError: The pass does not run, or its inputs cannot be made up.
    """
    problem: BaseException | None = None
    for whole in (False, True):
        try:
            return matrices_used(model, _traced(model, whole=whole))
        except ModelError:
            raise
        except Exception as error:  # a model may need all of its blocks, or numbers that make sense
            problem = error
    raise ModelError(
        f"{type(model).__name__} does not run with made-up weights: {problem}. "
        "Its matrices' layers and types come from one small forward pass. Load it and pass it to find_matrices."
    ) from problem


def _traced(model: Any, *, whole: bool) -> dict[str, Use]:
    """Trace a copy of the model, of one block of each kind unless `whole`; the names are the model's."""
    with init_empty_weights(include_buffers=False):
        probe = type(model)._from_config(model.config, dtype=torch.float32).eval()
    names = {} if whole else _keep_one_of_each_kind_(probe)
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for module in probe.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(_window(parameter.shape, generator)))
                module._parameters[name] = new
    head = output_embeddings(probe)
    if head is not None:
        head.forward = lambda hidden: hidden  # no matrix of ours, and often the largest of all
    blocks = [path for path, _, _ in find_blocks(probe)]
    traced = trace(probe, blocks, example_inputs(probe))
    return {_renamed(name, names): use for name, use in traced.items()}


def _window(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Make a parameter of few numbers: near one for a vector, as norms have it, else small about zero."""
    if len(shape) < 2:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    strides = range(len(shape), 0, -1)
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    numbers = torch.randn(max(length, 1), generator=generator) / shape[-1] ** 0.5
    return numbers.as_strided(shape, tuple(strides))


def _keep_one_of_each_kind_(model: nn.Module) -> dict[str, str]:
    """Drop blocks that are like an earlier one of their list; give the paths that the others had before."""
    stacks: dict[str, list[tuple[str, int]]] = {}
    for path, stack, index in find_blocks(model):
        stacks.setdefault(stack, []).append((path, index))
    names = {}
    for stack, blocks in stacks.items():
        kinds: dict[Any, tuple[str, int]] = {}
        for path, index in blocks:
            block = model.get_submodule(path)
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
            kinds.setdefault((type(block), shapes), (path, index))
        holder: Any = model.get_submodule(stack)
        kept = [holder[index] for _, index in kinds.values()]
        parent, _, attribute = stack.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.ModuleList(kept))
        names |= {f"{stack}.{place}": path for place, (path, _) in enumerate(kinds.values())}
    return names


def _renamed(name: str, paths: dict[str, str]) -> str:
    for now, before in paths.items():
        if name.startswith(f"{now}."):
            return before + name[len(now) :]
    return name
