"""Which 2-D weights a model has, whatever its architecture: find, select, read, write.

A matrix always has shape (out, in) here, however the model stores it: transposed (GPT-2's `Conv1D`), as rows
of a fused weight, or as one slice of a 3-D stack of experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.dataflow import Use, example_inputs, low_rank_layers, trace
from eckart.errors import MatrixError

ATTENTION_TYPES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj")
MLP_TYPES = ("fc_in", "fc_up", "fc_out")
TYPES = (*ATTENTION_TYPES, *MLP_TYPES, "other")
GROUPS = {"attn": ATTENTION_TYPES, "mlp": MLP_TYPES, "all": (*ATTENTION_TYPES, *MLP_TYPES)}


@dataclass(frozen=True)
class Matrix:
    """One 2-D weight of a model, wherever the model keeps it."""

    name: str
    """The module's own path; `[7]` follows for expert 7, `:q_proj` for a part of a fused weight."""
    parameter: str
    """Name of the parameter that holds it, as in `named_parameters`."""
    shape: tuple[int, int]
    """(out, in), whatever the storage order."""
    stack: str
    """Path of the list of blocks it lies in, e.g. `model.layers`; empty outside the blocks."""
    layer: int | None
    """Index of its block in that list, from 0; None outside the blocks."""
    type: str
    """One of `TYPES`."""
    transposed: bool = False
    """Stored as (in, out)."""
    expert: int | None = None
    """Index into the first axis of a 3-D parameter."""
    rows: tuple[range, ...] | None = None
    """Output rows of the parameter that belong to this part; None for all of them."""
    heads: int | None = None
    """Attention heads of a query, key or value projection, whose rows are as many equal runs; None where unknown."""
    whole: bool = False
    """Other matrices in the model's list are parts of this one (a fused `qkv_proj`)."""

    @property
    def rank(self) -> int:
        """Largest possible rank, `min(out, in)`."""
        return min(self.shape)


def find_matrices(model: nn.Module, inputs: dict[str, Any] | None = None) -> tuple[Matrix, ...]:
    """List every weight matrix of a model with its layer and type.

    Types come from the data flow of one small forward pass (see `eckart.dataflow`), never from the name of
    the architecture or of a module. Embeddings, the output head, norms, biases and convolutions are not listed.
    A fused query-key-value weight is listed as `qkv_proj` and again as its three parts. Low-rank layers are not
    listed, since there is no matrix to cut; `model.dequantize()` makes them matrices again.

    Args:
        model: A loaded transformers model. Not modified.
        inputs: Keyword arguments of one small forward pass; by default made up from the config.

    Returns:
        Matrices in the order of the model's parameters; experts and parts in their own order.

    Raises:
        ModelError: `inputs` is needed and missing.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> [matrix.type for matrix in find_matrices(LlamaForCausalLM(config))]
    ['q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc_in', 'fc_up', 'fc_out']
    """
    traced = trace(model, [name for name, _, _ in find_blocks(model)], inputs or example_inputs(model))
    return matrices_used(model, traced)


def matrices_used(model: nn.Module, traced: Mapping[str, Use]) -> tuple[Matrix, ...]:
    """List the weight matrices of a model whose data flow is known; the weights themselves are not read.

    Args:
        model: Any model, on the meta device too. Not modified.
        traced: What `eckart.dataflow.trace` found in it, or in a part of it with parameters of the same names. A
            parameter that it lacks is used as one that differs in indices only, such as another layer's.

    Returns:
        As `find_matrices`.
    """
    skipped = _embedding_parameters(model) | _factor_parameters(model)
    places = {name: (stack, layer) for name, stack, layer in find_blocks(model)}
    parameters = dict(model.named_parameters())
    uses = {name: (use.transposed, use.parts, use.heads) for name, use in traced.items()}

    # A weight that the probe did not reach (an expert that no token chose) is used as its siblings are.
    by_template = {(_template(name), parameters[name].shape): use for name, use in uses.items() if name in parameters}
    found: list[Matrix] = []
    for name, parameter in parameters.items():
        use = uses.get(name) or by_template.get((_template(name), parameter.shape))
        if use is None or name in skipped:
            continue
        transposed, parts, heads = use
        stack, layer = _place(name, places)
        if layer is None:
            parts = {"other": torch.cat(list(parts.values())).sort().values}
        found.extend(_matrices_of(name, parameter, stack, layer, transposed, parts, heads))
    return tuple(found)


def find_blocks(model: nn.Module) -> list[tuple[str, str, int]]:
    """List the transformer blocks: members of the outermost `nn.ModuleList`s that hold weight matrices.

    Args:
        model: Any model. Not modified.

    Returns:
        (block's path, path of its list, index in the list), in the order of `named_modules`.
    """
    blocks: list[tuple[str, str, int]] = []
    outside = list(low_rank_layers(model))
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in outside)
        if isinstance(module, nn.ModuleList) and not inside:
            found = [
                (f"{path}.{index}", path, index)
                for index, child in enumerate(module)
                if any(parameter.ndim >= 2 for parameter in child.parameters())
            ]
            blocks += found
            outside += [block for block, _, _ in found]
    return blocks


def output_embeddings(model: Any) -> nn.Module | None:
    """Give the module that projects onto the vocabulary.

    Args:
        model: Any model.

    Returns:
        The module, or None where the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _embedding_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that are an embedding table, the output head, or tied to one."""
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    head = output_embeddings(model)
    if head is not None:
        tables |= {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def _factor_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that belong to a low-rank layer."""
    return {f"{path}.{name}" for path, layer in low_rank_layers(model).items() for name, _ in layer.named_parameters()}


def _place(name: str, places: dict[str, tuple[str, int]]) -> tuple[str, int | None]:
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        if path in places:
            return places[path]
    return "", None


def _template(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _matrices_of(
    parameter_name: str,
    parameter: nn.Parameter,
    stack: str,
    layer: int | None,
    transposed: bool,
    parts: dict[str, Tensor],
    heads: dict[str, int],
) -> list[Matrix]:
    base = parameter_name.removesuffix(".weight")
    rows_columns = tuple(parameter.shape[-2:])
    out, into = reversed(rows_columns) if transposed else rows_columns
    experts = range(parameter.shape[0]) if parameter.ndim == 3 else [None]
    found = []
    for expert in experts:
        name = base if expert is None else f"{base}[{expert}]"
        place: dict[str, Any] = {"stack": stack, "layer": layer, "transposed": transposed, "expert": expert}
        if len(parts) == 1 and len(next(iter(parts.values()))) == out:
            (kind,) = parts
            found.append(Matrix(name, parameter_name, (out, into), type=kind, heads=heads.get(kind), **place))
            continue
        if set(parts) == {"q_proj", "k_proj", "v_proj"}:
            found.append(Matrix(name, parameter_name, (out, into), type="qkv_proj", whole=True, **place))
        rest = torch.ones(out, dtype=torch.bool)
        for rows in parts.values():
            rest[rows] = False
        everything = parts | ({"other": rest.nonzero().flatten()} if rest.any() else {})
        for kind, rows in everything.items():
            ranges = _as_ranges(rows.tolist())
            place |= {"rows": ranges, "heads": heads.get(kind)}
            found.append(Matrix(f"{name}:{kind}", parameter_name, (len(rows), into), type=kind, **place))
    return found


def _as_ranges(indices: list[int]) -> tuple[range, ...]:
    """Write sorted indices as few ranges: one strided range, or runs of neighbours."""
    if len(indices) > 1:
        step = indices[1] - indices[0]
        if indices == list(range(indices[0], indices[-1] + 1, step)):
            return (range(indices[0], indices[-1] + 1, step),)
    runs: list[range] = []
    for index in indices:
        if runs and index == runs[-1].stop:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return tuple(runs)


def partition(matrices: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """Drop fused wholes whose parts are listed too, so that every number is held once.

    Args:
        matrices: As `find_matrices` lists them.

    Returns:
        The same matrices without the wholes, in order.
    """
    return tuple(matrix for matrix in matrices if not matrix.whole)


def overlap(one: Matrix, other: Matrix) -> bool:
    """Tell whether two matrices hold a number in common.

    Args:
        one: From `find_matrices`.
        other: Of the same model.

    Returns:
        Whether they are the same, or one is a fused whole and the other a part of it.
    """
    same = one.parameter == other.parameter and one.expert == other.expert
    return same and (one.whole or other.whole or one.name == other.name)


def expand_types(types: Iterable[str]) -> set[str]:
    """Replace the groups `attn`, `mlp` and `all` by their types.

    Args:
        types: Words of `TYPES` or `GROUPS`.

    Returns:
        Types only. `all` and `attn` do not include the fused `qkv_proj`, whose parts they include.

    Raises:
        MatrixError: An unknown word; the message names the nearest.

    >>> sorted(expand_types(["mlp"]))
    ['fc_in', 'fc_out', 'fc_up']
    """
    found: set[str] = set()
    for word in types:
        if word not in TYPES and word not in GROUPS:
            near = difflib.get_close_matches(word, [*TYPES, *GROUPS], 1, 0.0)
            raise MatrixError(
                f"'{word}' is not a type of matrix. Types are {', '.join(TYPES)}; groups are "
                f"{', '.join(GROUPS)}. Did you mean '{near[0]}'?"
            )
        found |= set(GROUPS[word]) - {"qkv_proj"} if word in GROUPS else {word}
    return found


def select(
    matrices: Iterable[Matrix],
    *,
    types: Collection[str] = ("all",),
    layers: Collection[int] | None = None,
) -> tuple[Matrix, ...]:
    """Choose matrices by type and layer.

    Args:
        matrices: As `find_matrices` lists them.
        types: Words of `TYPES` or `GROUPS`.
        layers: Indices of blocks from 0; negative ones count from the last; None for all.

    Returns:
        The chosen matrices, in order.

    Raises:
        MatrixError: A type or layer that the model does not have.
    """
    matrices = tuple(matrices)
    wanted = expand_types(types)
    present = {matrix.type for matrix in matrices}
    for word in types:
        if not expand_types([word]) & present:
            raise MatrixError(
                f"This model has no matrix of type '{word}'. It has {', '.join(sorted(present))}. Change --types."
            )
    chosen = tuple(matrix for matrix in matrices if matrix.type in wanted)
    if layers is None:
        return chosen
    counts: dict[str, int] = {}
    for matrix in matrices:
        if matrix.layer is not None:
            counts[matrix.stack] = max(counts.get(matrix.stack, 0), matrix.layer + 1)
    deepest = max(counts.values(), default=0)
    for layer in layers:
        if not -deepest <= layer < deepest:
            raise MatrixError(
                f"Layer {layer} does not exist. This model's blocks are 0 to {deepest - 1}; "
                "negative numbers count from the last. Change --layers."
            )
    chosen = tuple(
        matrix
        for matrix in chosen
        if matrix.layer is not None and (matrix.layer in layers or matrix.layer - counts[matrix.stack] in layers)
    )
    if not chosen:
        raise MatrixError(
            f"No matrix has both a type of {sorted(wanted)} and a layer of {sorted(layers)}. "
            "Each exists by itself, but not together. Change --types or --layers."
        )
    return chosen


def by_name(matrices: Iterable[Matrix], name: str) -> Matrix:
    """Find one matrix by its name.

    Args:
        matrices: As `find_matrices` lists them.
        name: The name as in a plan.

    Returns:
        The matrix.

    Raises:
        MatrixError: No matrix has this name; the message lists the nearest.
    """
    names = {matrix.name: matrix for matrix in matrices}
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.3)
        raise MatrixError(
            f"The model has no matrix '{name}'. It has {len(names)}; near ones are {', '.join(near) or 'none'}. "
            "Check that the plan was made for this model."
        )
    return names[name]


def coverage(model: nn.Module, matrices: Iterable[Matrix]) -> float:
    """Give the share of the model's non-embedding weight-matrix parameters that `matrices` hold.

    Counted against every 2-D weight of a linear layer and every 3-D stack of experts, found independently of
    the data flow, so that a layer which the probe missed lowers the figure. Low-rank layers do not count.

    Args:
        model: The model. Not modified.
        matrices: As `find_matrices` lists them.

    Returns:
        A fraction from 0 to 1.
    """
    skipped = _embedding_parameters(model) | _factor_parameters(model)
    parameters = dict(model.named_parameters())
    held = {matrix.parameter for matrix in matrices}
    expected = set(held)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            linear = parameter.ndim == 2 and name.endswith("weight") and not isinstance(module, nn.Embedding)
            stacked = parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
            if name in parameters and name not in skipped and (linear or stacked):
                expected.add(name)
    total = sum(parameters[name].numel() for name in expected)
    return sum(parameters[name].numel() for name in held) / total if total else 0.0


def read(model: nn.Module, matrix: Matrix) -> Tensor:
    """Copy a matrix out of the model.

    Args:
        model: The model that `matrix` was found in. Not modified.
        matrix: Which one.

    Returns:
        Shape (out, in), contiguous, in the model's dtype and on its device; writing to it leaves the model alone.
    """
    part = part_of(model.get_parameter(matrix.parameter).detach(), matrix)
    return part.clone(memory_format=torch.contiguous_format)


def part_of(tensor: Tensor, matrix: Matrix) -> Tensor:
    """Pick a matrix out of its parameter, or out of a tensor of the same layout such as its gradient.

    Args:
        tensor: Shape of the parameter that holds the matrix. Not modified.
        matrix: Which one.

    Returns:
        Shape (out, in); a view where the layout allows it.
    """
    view = _view(tensor, matrix)
    return view if matrix.rows is None else view[_index(matrix)]


def write(model: nn.Module, matrix: Matrix, weight: Tensor) -> None:
    """Put a matrix back into the model, in place, at the dtype of the model.

    Args:
        model: Modified: only the numbers of this matrix.
        matrix: Which one.
        weight: Shape (out, in), any floating dtype and device.

    Raises:
        MatrixError: `weight` has another shape.
    """
    if tuple(weight.shape) != matrix.shape:
        raise MatrixError(
            f"{matrix.name} was given a weight of shape {tuple(weight.shape)}. "
            f"Its shape is {matrix.shape}, (out, in). Transpose or reshape before writing."
        )
    with torch.no_grad():
        view = _view(model.get_parameter(matrix.parameter).detach(), matrix)
        if matrix.rows is None:
            view.copy_(weight)
        else:
            view[_index(matrix)] = weight.to(view)


def _view(tensor: Tensor, matrix: Matrix) -> Tensor:
    if matrix.expert is not None:
        tensor = tensor[matrix.expert]
    return tensor.T if matrix.transposed else tensor


def rows_of(matrix: Matrix) -> Tensor:
    """Give the output rows of the parameter that a matrix holds.

    Args:
        matrix: Any matrix.

    Returns:
        Indices, int64, on the CPU; in the order in which `read` gives the rows.
    """
    if matrix.rows is None:
        return torch.arange(matrix.shape[0])
    return torch.cat([torch.arange(rows.start, rows.stop, rows.step) for rows in matrix.rows])


def _index(matrix: Matrix) -> Any:
    assert matrix.rows is not None
    if len(matrix.rows) == 1:
        rows = matrix.rows[0]
        return slice(rows.start, rows.stop, rows.step)
    return rows_of(matrix)
