"""What each weight of a model does, learned from one small forward pass instead of from its name.

Every product of an activation with a weight is cut out of the autograd graph: its result becomes a leaf
with a label. Walking back from any later tensor then ends at the products (and block inputs) it was made
from. What reaches the query of an attention is a query projection, what reads an attention's result is an
output projection, what reads only other products of its block is the second half of an MLP. Gradients tell
which rows of a fused weight feed which part, however the architecture interleaves them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eckart.errors import ModelError
from eckart.experts import FactoredExperts, Product
from eckart.linear import LowRankLayer

BLOCK = "block input"
ATTENTION = "attention output"

# The operand of each function that may be a weight; True where it is multiplied as (in, out).
_PRODUCTS = {
    "linear": (1, False),
    "matmul": (1, True),
    "__matmul__": (1, True),
    "mm": (1, True),
    "bmm": (1, True),
    "addmm": (2, True),
    "grouped_mm": (1, True),
    "_grouped_mm": (1, True),
}
_SCORES = ("matmul", "__matmul__", "bmm", "baddbmm")


@dataclass(frozen=True)
class Use:
    """How the model uses one parameter that it multiplies activations with."""

    transposed: bool  #: stored as (in, out) rather than (out, in)
    parts: dict[str, Tensor]  #: type -> sorted output rows; one entry when the weight is not fused
    heads: dict[str, int] = field(default_factory=dict)  #: type -> equal runs of a part's rows, one for each head


@dataclass
class _Product:
    parameter: str
    transposed: bool
    operand: Tensor
    result: Tensor


@dataclass
class _Attention:
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass
class _Recorder(TorchFunctionMode):
    """Labels the result of every product and attention while a model runs."""

    storages: dict[int, tuple[str, nn.Parameter]]
    labels: dict[int, tuple[str, str]] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)
    attentions: list[_Attention] = field(default_factory=list)
    scores: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    softmaxes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        result = function(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            operands = dict(zip(("query", "key", "value"), args)) | kwargs
            self.attentions.append(_Attention(operands["query"], operands["key"], operands["value"]))
            return self.leaf(result, ATTENTION, "")
        if name in _PRODUCTS and (weight := self._weight(name, args, kwargs)) is not None:
            operand = args[1] if name == "addmm" else args[0] if args else kwargs["input"]
            parameter, transposed = weight
            copy = self.leaf(result, "product", parameter)
            self.products.append(_Product(parameter, transposed, operand, self.leaves[-1]))
            return copy
        if name in _SCORES and isinstance(result, Tensor) and result.requires_grad:
            first, second = _factors(name, args, kwargs)
            for kind, key in self.sources(first):
                if kind == "softmax" and key in self.softmaxes:
                    query, keys = self.scores[next(k for s, k in self.sources(self.softmaxes[key]) if s == "scores")]
                    self.attentions.append(_Attention(query, keys, second))
                    return self.leaf(result, ATTENTION, "")
            index = str(len(self.scores))
            self.scores[index] = (first, second)
            return self.leaf(result, "scores", index)
        if name == "softmax" and any(kind == "scores" for kind, _ in self.sources(args[0])):
            index = str(len(self.softmaxes))
            self.softmaxes[index] = args[0]
            return self.leaf(result, "softmax", index)
        return result

    def _weight(self, name: str, args: Any, kwargs: Any) -> tuple[str, bool] | None:
        position, as_in_out = _PRODUCTS[name]
        operand = args[position] if len(args) > position else kwargs.get("weight")
        if isinstance(operand, Product) and (found := self.storages.get(operand.left.untyped_storage().data_ptr())):
            return found[0], as_in_out
        if not isinstance(operand, Tensor) or operand.ndim < 2:
            return None
        found = self.storages.get(operand.untyped_storage().data_ptr())
        if found is None:
            return None
        parameter_name, parameter = found
        same_order = operand.stride()[-2:] == parameter.stride()[-2:]
        return parameter_name, same_order == as_in_out

    def leaf(self, tensor: Tensor, kind: str, key: str) -> Tensor:
        """Cut `tensor` out of the graph, label it, and give a copy that the model may change in place."""
        leaf = tensor.detach().requires_grad_()
        self.labels[id(leaf)] = (kind, key)
        self.leaves.append(leaf)
        return leaf.clone()

    def sources(self, tensor: Any) -> set[tuple[str, str]]:
        """Give the labels of the leaves that `tensor` was made from."""
        return {self.labels[id(leaf)] for leaf in self.source_leaves(tensor)}

    def source_leaves(self, tensor: Any) -> list[Tensor]:
        if not isinstance(tensor, Tensor):
            return []
        if id(tensor) in self.labels:
            return [tensor]
        found, seen, stack = [], set(), [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.labels:
                found.append(variable)
            stack.extend(following for following, _ in node.next_functions)
        return found


def _factors(name: str, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    if name != "baddbmm":
        return args[0], args[1]
    given = dict(zip(("input", "batch1", "batch2"), args)) | kwargs
    return given["batch1"], given["batch2"]


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Make the smallest forward() arguments that run a model, from its config.

    Knows token models, encoder-decoders, image models and trajectory models; `main_input_name` decides.

    Args:
        model: A transformers model. Not modified.

    Returns:
        Keyword arguments for `model.forward`, one example, on the model's device.

    Raises:
        ModelError: The model's main input is of another kind; the caller must give the inputs.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if main == "input_ids":
        ids = torch.arange(4, 9, device=device)[None] % config.get_text_config().vocab_size
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if main == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": normal(1, config.num_channels, height, width)}
    if main == "states":
        return {
            "states": normal(1, 3, config.state_dim),
            "actions": normal(1, 3, config.act_dim),
            "rewards": normal(1, 3, 1),
            "returns_to_go": normal(1, 3, 1),
            "timesteps": torch.arange(3, device=device)[None],
            "attention_mask": torch.ones(1, 3, device=device),
        }
    raise ModelError(
        f"{type(model).__name__} takes '{main}', which eckart cannot make up. "
        "It can for input_ids, pixel_values and states. "
        "Pass inputs={...}, the keyword arguments of one small forward pass."
    )


def trace(model: nn.Module, blocks: Iterable[str], inputs: dict[str, Any]) -> dict[str, Use]:
    """Run the model once and learn what each of its weights does.

    Costs one forward pass over `inputs`; with a handful of tokens that is less than loading the weights.

    Args:
        model: Any model whose attention is `scaled_dot_product_attention` or matmul, softmax, matmul. Its
            weights, training mode and `requires_grad` flags are as before when this returns.
        blocks: Names of the transformer blocks, as in `named_modules`.
        inputs: Keyword arguments of `model.forward`.

    Returns:
        Parameter name -> use, for every parameter that took part in a product; a low-rank layer (by its path) counts
        as one product, whatever its factors do.

    >>> import torch
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> sorted(trace(mlp, [], {"input": torch.ones(1, 4)}))
    ['0.weight', '2.weight']
    """
    low_rank = low_rank_layers(model)
    factors = {id(parameter) for layer in low_rank.values() for parameter in layer.parameters()}
    parameters = {
        parameter.untyped_storage().data_ptr(): (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and parameter.is_floating_point() and id(parameter) not in factors
    }
    for path, layer in low_rank.items():
        if isinstance(layer, FactoredExperts):
            parameters |= {part.untyped_storage().data_ptr(): (path, part) for part in (layer.up, layer.down)}
    recorder = _Recorder(parameters)
    with evaluating(model), only_gradients_of(model, ()), torch.inference_mode(False), torch.enable_grad():
        with _blocks_cut(model, blocks, recorder), _whole(low_rank, recorder), recorder:
            model(**inputs)
        return _classify(recorder)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """List the low-rank layers of a model.

    Args:
        model: Any model. Not modified.

    Returns:
        Path -> layer, in the model's order; the blocks inside a row-blocked layer are not listed by themselves.
    """
    found: dict[str, LowRankLayer] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, LowRankLayer) and module not in inside:
            found[path] = module
            inside.update(module.modules())
    return found


def execution_order(model: nn.Module, names: Iterable[str], inputs: dict[str, Any]) -> tuple[str, ...]:
    """Run the model once and note the order in which modules run.

    Args:
        model: Any model; as before when this returns.
        names: Modules, as in `named_modules`.
        inputs: Keyword arguments of `model.forward`.

    Returns:
        Those of the names that ran, in the order of their first run.
    """
    order: dict[str, None] = {}

    def entering(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    handles = [model.get_submodule(name).register_forward_pre_hook(entering(name)) for name in names]
    try:
        with evaluating(model), torch.inference_mode():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(order)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without key-value cache, and every module back afterwards.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    training = [module for module in model.modules() if module.training]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if use_cache is not None:
            config.use_cache = use_cache


@contextmanager
def only_gradients_of(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Ask for gradients of the named parameters and of no other, and flags and gradients back afterwards.

    Args:
        model: Any model.
        names: As in `named_parameters`.

    Yields:
        Nothing; inside, no parameter has a gradient yet.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


@contextmanager
def _blocks_cut(model: nn.Module, blocks: Iterable[str], recorder: _Recorder) -> Iterator[None]:
    """Make every tensor that enters a block a labelled leaf."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return recorder.leaf(value, BLOCK, "")
        return value

    def entering(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(cut(a) for a in args), {key: cut(value) for key, value in kwargs.items()}

    handles = [model.get_submodule(name).register_forward_pre_hook(entering, with_kwargs=True) for name in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _whole(layers: dict[str, LowRankLayer], recorder: _Recorder) -> Iterator[None]:
    """Label the output of every low-rank layer as one product."""

    def leaving(path: str) -> Any:
        def label(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            copy = recorder.leaf(output, "product", path)
            recorder.products.append(_Product(path, False, args[0], recorder.leaves[-1]))
            return copy

        return label

    linear = {path: layer for path, layer in layers.items() if not isinstance(layer, FactoredExperts)}
    handles = [layer.register_forward_hook(leaving(path)) for path, layer in linear.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _classify(recorder: _Recorder) -> dict[str, Use]:
    parts: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, dict[str, int]] = {}
    transposed: dict[str, bool] = {}
    for product in recorder.products:
        transposed[product.parameter] = product.transposed
        parts.setdefault(product.parameter, {})
    by_leaf = {id(product.result): product for product in recorder.products}

    for attention in recorder.attentions:
        for kind, operand in (
            ("q_proj", attention.query),
            ("k_proj", attention.key),
            ("v_proj", attention.value),
        ):
            for leaf in recorder.source_leaves(operand):
                product = by_leaf.get(id(leaf))
                if product is None or kind in parts[product.parameter]:
                    continue
                rows = parts[product.parameter][kind] = _rows_reaching(operand, leaf)
                if operand.ndim > 2 and (count := _heads(rows, _rows_reaching(operand.select(-3, 0), leaf))):
                    heads.setdefault(product.parameter, {})[kind] = count

    for product in recorder.products:
        leaves = recorder.source_leaves(product.operand)
        kinds = {recorder.labels[id(leaf)][0] for leaf in leaves}
        feeding = [by_leaf[id(leaf)] for leaf in leaves if id(leaf) in by_leaf]
        if parts[product.parameter] or BLOCK in kinds:
            continue
        if ATTENTION in kinds:
            parts[product.parameter]["out_proj"] = _all_rows(product)
        elif feeding and not any("out_proj" in parts[p.parameter] for p in feeding):
            parts[product.parameter]["fc_out"] = _all_rows(product)
            _classify_first_half(product, feeding, parts)

    for product in recorder.products:
        if not parts[product.parameter]:
            parts[product.parameter]["other"] = _all_rows(product)
    return {name: Use(transposed[name], _disjoint(found), heads.get(name, {})) for name, found in parts.items()}


def _classify_first_half(second: _Product, feeding: list[_Product], parts: dict[str, dict[str, Tensor]]) -> None:
    """Tell gate from up: the product is linear in `up`, and curved in what goes through the activation."""
    width = second.operand.shape[-1]
    for product in feeding:
        if parts[product.parameter]:
            continue
        gate = _gate_channels(second.operand, product.result)
        if product.result.shape[-1] == width:
            alone = len({p.parameter for p in feeding}) == 1
            kind = "fc_in" if alone or bool(gate.any()) else "fc_up"
            parts[product.parameter][kind] = _all_rows(product)
        elif bool(gate.any()) and not bool(gate.all()):
            parts[product.parameter]["fc_in"] = gate.nonzero().flatten()
            parts[product.parameter]["fc_up"] = (~gate).nonzero().flatten()
        else:
            parts[product.parameter]["other"] = _all_rows(product)


def _gate_channels(hidden: Tensor, result: Tensor) -> Tensor:
    """Mark the channels of `result` that reach `hidden` through an activation (shape (out,), bool)."""
    gate = torch.zeros(result.shape[-1], dtype=torch.bool)
    (slope,) = torch.autograd.grad(_weighted_sum(hidden), result, create_graph=True)
    if not slope.requires_grad:
        return gate
    # Mixed derivatives, of gate with up, are not curvature: each half is differentiated by itself.
    for half in _halves(hidden, result):
        (bend,) = torch.autograd.grad(slope[..., half].sum(), result, retain_graph=True, allow_unused=True)
        curved = bend is not None and bool(bend[..., half].any())
        gate[half] = curved or _silences(result.detach()[..., half], hidden.detach())
    return gate


def _halves(hidden: Tensor, result: Tensor) -> list[slice]:
    """Which channels of a product belong together: all, every other one, or the first and the second half."""
    channels = result.shape[-1]
    if channels == hidden.shape[-1]:
        return [slice(None)]
    for channel in range(hidden.shape[-1]):
        (probe,) = torch.autograd.grad(hidden[..., channel].sum(), result, retain_graph=True)
        touched = probe.reshape(-1, channels).any(0).nonzero().flatten().tolist()
        if len(touched) == 2:  # fewer where a ReLU shuts the channel
            if touched[1] - touched[0] == 1 and channels > 2:
                return [slice(0, None, 2), slice(1, None, 2)]
            break
    return [slice(0, channels // 2), slice(channels // 2, None)]


def _silences(part: Tensor, hidden: Tensor) -> bool:
    """Tell whether `part` is the input of a ReLU gate, which has no curvature: where it is negative, all is zero."""
    negative = part < 0
    return part.shape == hidden.shape and bool(negative.any()) and not bool(hidden[negative].any())


def _weighted_sum(tensor: Tensor) -> Tensor:
    """Sum under fixed random weights, so that derivatives of different entries do not cancel."""
    generator = torch.Generator().manual_seed(0)
    return (tensor * (torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5)).sum()


def _rows_reaching(tensor: Tensor, leaf: Tensor) -> Tensor:
    """Indices of the channels of `leaf` that `tensor` depends on."""
    (slope,) = torch.autograd.grad(_weighted_sum(tensor), leaf, retain_graph=True)
    return slope.reshape(-1, leaf.shape[-1]).float().abs().sum(0).nonzero().flatten().cpu()


def _heads(rows: Tensor, first: Tensor) -> int | None:
    """How many equal runs of rows feed one head each, judged by those that feed the first; None for other layouts."""
    size = len(first)
    if size == 0 or len(rows) % size or not torch.equal(first, rows[:size]):
        return None
    return len(rows) // size


def _all_rows(product: _Product) -> Tensor:
    return torch.arange(product.result.shape[-1])


def _disjoint(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop parts that share rows with an earlier one (a weight that serves as key and value is a key)."""
    kept: dict[str, Tensor] = {}
    for kind, rows in parts.items():
        if not any(bool(torch.isin(rows, other).any()) for other in kept.values()):
            kept[kind] = rows
    return kept
