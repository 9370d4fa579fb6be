"""From a calibration text to what every weight sees: moments of its inputs and of the gradients at its outputs.

Every product of an activation with a weight is watched, as `eckart.dataflow` does, so that linear layers, transposed
ones and single experts need no code of their own. Notation: x is the input of a weight at one token, g the gradient
of the summed loss at its output there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from eckart.dataflow import evaluating, only_gradients_of
from eckart.embedding import Pooling, embed_block, probe
from eckart.encoding import Encoded, prompt_tokens
from eckart.errors import TaskError
from eckart.layout import Block, Row, Sequence_, lay_out, runs_within
from eckart.matrices import Matrix, find_blocks, rows_of
from eckart.prefix import copied, run_block
from eckart.scoring import PREDICTIONS, only_positions
from eckart.tasks import Task

T = TypeVar("T")
STATISTICS_BYTES = 2**31
"""Moments that are always held at once, however small the model."""
Place = tuple[str, int | None]
"""A parameter's name, and the expert in it."""
Seen = Callable[[Place, Tensor, Tensor], Tensor | None]
"""Called with a place, inputs (tokens, in) and outputs; may give other outputs."""

MASKED_EVERY = 7
# The operand that may be a weight and the one that is multiplied by it.
_PRODUCTS = {"linear": (1, 0), "matmul": (1, 0), "__matmul__": (1, 0), "mm": (1, 0), "addmm": (2, 1)}


@dataclass(frozen=True)
class Moments:
    """Means over the tokens that a matrix saw."""

    tokens: int
    inputs: Tensor
    """Mean x x', shape (in, in), float64."""
    magnitude: Tensor
    """Mean |x|, shape (in,), float64."""
    gradients: Tensor | None = None
    """Mean g g', shape (out, out), float64; None where no gradients were taken."""
    fisher: Tensor | None = None
    """Mean g_i^2 |x|^2, shape (out,), float64: what an output row's weights matter, summed over the row."""


def read_windows(
    task: Task,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    first: int = 0,
    batch_tokens: int = 2048,
    masked: bool = False,
) -> Encoded:
    """Cut a text into windows of equal length, its documents tokenised one by one and joined.

    Args:
        task: Of kind `text`.
        tokenizer: A transformers tokenizer.
        length: Tokens of a window, at least 2.
        count: Most windows, at least 1.
        first: Windows that are skipped.
        batch_tokens: Most tokens of a batch; one window may exceed it.
        masked: For a model that fills masks: every seventh token of a window is masked and scored.

    Returns:
        The windows as a perplexity task, on the CPU; for a causal model every token but a window's first is scored.

    Raises:
        TaskError: The text has not one whole window there.
    """
    ids: list[int] = []
    for example in task.examples:
        ids += prompt_tokens([example.prompt], tokenizer)[0]
        if len(ids) >= (first + count) * length:
            break
    starts = range(first * length, min(len(ids), (first + count) * length) - length + 1, length)
    if not len(starts):
        raise TaskError(
            f"{task.name} has {len(ids)} tokens. Window {first} of {length} tokens ends after them. "
            "Give a longer text, or shorter or fewer windows."
        )
    windows = [ids[start : start + length] for start in starts]
    return encode_windows(windows, task, tokenizer, batch_tokens=batch_tokens, masked=masked)


def encode_windows(
    windows: Sequence[Sequence[int]], task: Task, tokenizer: Any, *, batch_tokens: int, masked: bool = False
) -> Encoded:
    """Make a perplexity task of windows of equal length.

    Args:
        windows: Tokens of each, at least 2.
        task: The text that they are from.
        tokenizer: A transformers tokenizer.
        batch_tokens: As for `read_windows`.
        masked: As for `read_windows`.

    Returns:
        As of `read_windows`.
    """
    length = len(windows[0])
    if masked:
        front = prompt_tokens([""], tokenizer)[0]
        back = tokenizer("").input_ids[len(front) :]
        items = [[_masked(window, front, back, tokenizer.mask_token_id)] for window in windows]
    else:
        items = [
            [Sequence_(Row(tuple(window[:-1])), tuple(range(length - 1)), tuple(window[1:]))] for window in windows
        ]
    kind = "masked" if masked else "causal"
    pad = tokenizer.pad_token_id or 0
    blocks = lay_out(items, "plain", kind=kind, pad=pad, batch_tokens=batch_tokens)
    tokens = tuple(len(item[0].targets) for item in items)
    return Encoded(
        task, kind, blocks, len(items), tokens, False, 0, tuple(map(tuple, items)), "plain", batch_tokens, pad
    )


def _masked(window: Sequence[int], front: Sequence[int], back: Sequence[int], mask: int) -> Sequence_:
    """Mask every seventh token, about as many as masked models are trained on."""
    places = range(min(MASKED_EVERY // 2, len(window) - 1), len(window), MASKED_EVERY)
    hidden = [mask if place in places else token for place, token in enumerate(window)]
    row = Row((*front, *hidden, *back))
    return Sequence_(row, tuple(len(front) + place for place in places), tuple(window[place] for place in places))


class Watch(TorchFunctionMode):
    """While it is entered, tells of every product of an activation with one of some weights."""

    def __init__(self, model: nn.Module, parameters: Collection[str], seen: Seen):
        """Watch the weights of these names."""
        super().__init__()
        self._weights = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in model.named_parameters()
            if name in parameters
        }
        self._seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _PRODUCTS and isinstance(result, Tensor):
            weight, operand = _PRODUCTS[name]
            place = self._place(args[weight] if len(args) > weight else kwargs.get("weight"))
            if place is not None:
                other = self._seen(place, args[operand] if args else kwargs["input"], result)
                return result if other is None else other
        return result

    def _place(self, weight: Any) -> Place | None:
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        found = self._weights.get(weight.untyped_storage().data_ptr())
        if found is None:
            return None
        name, parameter = found
        if parameter.ndim == 2:
            return name, None
        return name, (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)


@dataclass
class _Sums:
    """Running sums at one place."""

    tokens: int = 0
    inputs: Tensor | None = None
    magnitude: Tensor | None = None
    gradients: Tensor | None = None
    fisher: Tensor | None = None


@dataclass
class Collector:
    """Adds up what weights see. Weights that read the very same input share one sum."""

    gradients: bool = False
    _sums: dict[Place, _Sums] = field(default_factory=dict)
    _shares: dict[Place, Place] = field(default_factory=dict)
    """Which place's inputs are those of a place."""
    _last: tuple[Place, Tensor] | None = None

    def __call__(self, place: Place, operand: Tensor, result: Tensor) -> Tensor | None:
        """Take in one product. What a hook holds on to lives until the backward pass: one number a token, no input."""
        x = operand.detach().reshape(-1, operand.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if place not in self._shares:
            shared = self._last is not None and self._last[1] is operand and place[1] is None
            self._shares[place] = self._shares[self._last[0]] if shared and self._last else place
        sums = self._sums.setdefault(place, _Sums())
        sums.tokens += len(x)
        if self._shares[place] == place:
            sums.inputs = _added(sums.inputs, x.T @ x)
            sums.magnitude = _added(sums.magnitude, x.abs().sum(0))
        self._last = (place, operand)
        if not self.gradients:
            return None
        squares = x.square().sum(1)

        def take(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).to(squares.dtype)
            sums.gradients = _added(sums.gradients, g.T @ g)
            sums.fisher = _added(sums.fisher, squares @ g.square())

        if result.requires_grad:
            result.register_hook(take)
            return None
        leaf = result.detach().requires_grad_()
        leaf.register_hook(take)
        # A copy, since the model may change its tensors in place.
        return leaf.clone()

    def divide_(self) -> None:
        """Make means of the sums; nothing can be taken in after that."""
        self._last = None
        for sums in self._sums.values():
            for sum_ in (sums.inputs, sums.magnitude, sums.gradients, sums.fisher):
                if sum_ is not None:
                    sum_.div_(sums.tokens)

    def moments(self, matrix: Matrix) -> Moments:
        """Give the means of a matrix, after `divide_`.

        Args:
            matrix: Any; where no token reached it, its moments are zero.

        Returns:
            Its moments, on the device of the model; those of inputs are the same tensor for all that read the same.
        """
        place = (matrix.parameter, matrix.expert)
        sums = self._sums.get(place)
        shared = self._sums.get(self._shares.get(place, place))
        out, into = matrix.shape
        if sums is None or shared is None or shared.inputs is None or shared.magnitude is None:
            zero = torch.zeros(into, into, dtype=torch.float64)
            return Moments(0, zero, zero[0], zero.new_zeros(out, out), zero.new_zeros(out))
        gradients, fisher = sums.gradients, sums.fisher
        if gradients is not None and fisher is not None and matrix.rows is not None:
            rows = rows_of(matrix).to(gradients.device)
            gradients, fisher = gradients[rows][:, rows], fisher[rows]
        return Moments(sums.tokens, shared.inputs, shared.magnitude, gradients, fisher)


def moments_bytes(matrices: Sequence[Matrix]) -> int:
    """Tell what the moments of some matrices take.

    Args:
        matrices: Which.

    Returns:
        Bytes, as if no two of them read the same.
    """
    return sum(8 * (out**2 + into**2) for out, into in (matrix.shape for matrix in matrices))


def readings(model: nn.Module, items: Sequence[T], matrices_of: Callable[[T], Sequence[Matrix]]) -> Iterator[list[T]]:
    """Divide work into parts whose moments are held together; the text is read once for each part.

    They take at most as much as the model itself, or 2 GiB if that is more.

    Args:
        model: Not modified.
        items: In order.
        matrices_of: What one of them needs the moments of.

    Returns:
        Runs of items that follow each other; one alone may take more.
    """
    limit = max(STATISTICS_BYTES, sum(parameter.nbytes for parameter in model.parameters()))
    return runs_within(items, lambda item: moments_bytes(matrices_of(item)), limit)


def collect(
    model: nn.Module,
    windows: Encoded,
    matrices: Sequence[Matrix],
    *,
    gradients: bool = True,
    drawn: bool = True,
    pooling: Pooling | None = None,
    seed: int = 0,
) -> dict[str, Moments]:
    """Read a calibration text with a model, and give the moments of some of its matrices.

    Costs a forward and, with gradients, a backward pass over the text, for which every block runs once more: what its
    gradients need is held for one block and one batch at a time. The gradients are those of the loss of tokens that the
    model itself predicts, drawn from its predictions: then half the mean of (g' D x)^2 is the divergence that a change
    D of a weight causes, to the second order.

    Args:
        model: In evaluation mode. Not modified.
        windows: From `read_windows`, or any encoded task.
        matrices: Which ones; sums are held for all of them at once: (in^2 + out^2) 8 bytes each.
        gradients: Take those at the outputs, too.
        drawn: The loss is that of drawn tokens; else that of the right answers, of each the sum over its tokens.
        pooling: Of an encoder, which predicts no tokens: the gradients are those of its embeddings' components along
            random directions, and half the mean of (g' D x)^2 is the 1 - cosine that a change D causes.
        seed: Of the drawn tokens, or directions.

    Returns:
        By the matrix's name. A matrix that no token reached (an expert) has zeros.
    """
    collector = Collector(gradients)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    watched = {matrix.parameter for matrix in matrices}
    watch = Watch(model, watched, collector)
    with evaluating(model), each_expert(model), torch.inference_mode(False), only_gradients_of(model, ()):
        for block in windows.blocks:
            block = block.mapped(lambda tensor: tensor.to(device, copy=True))
            said = (
                only_positions(model, block.rows, block.columns)
                if pooling is None
                else nullcontext(partial(embed_block, block=block, pooling=pooling))
            )
            # Passes that share keys and values cannot be run again one block at a time.
            again = _run_again(model, watched) if gradients and len(block.passes) == 1 else nullcontext()
            with torch.set_grad_enabled(gradients), watch, said as of_output, again:
                found = of_output(run_block(model, block))
            if gradients:
                if pooling is not None:
                    probe(found, generator).backward()
                elif drawn:
                    found.backward(_gradients_of_drawn(found.detach(), generator))
                else:
                    _loss_of_answers(found, windows, block).backward()
    collector.divide_()
    return {matrix.name: collector.moments(matrix) for matrix in matrices}


@contextmanager
def _run_again(model: nn.Module, watched: Collection[str]) -> Iterator[None]:
    """Let the graph of each block hold what enters it alone; the backward pass runs the block again for the rest."""

    def leaf(_place: Place, _operand: Tensor, result: Tensor) -> Tensor | None:
        # As a collector does, so that the second run makes the same graph.
        return None if result.requires_grad else result.detach().requires_grad_().clone()

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), Watch(model, watched, leaf)

    def twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            # A block may write into its hidden states, which the second run must find as they were.
            return forward(*copied(args), **{name: copied(value) for name, value in kwargs.items()})

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    modules = [model.get_submodule(path) for path, _, _ in find_blocks(model)]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(twice, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def loss_gradients(model: nn.Module, windows: Encoded, parameters: Collection[str]) -> dict[str, Tensor]:
    """Give the gradient of a text's mean loss for some weights.

    Args:
        model: In evaluation mode. Not modified.
        windows: From `read_windows`, or any encoded task.
        parameters: Names, as in `named_parameters`.

    Returns:
        By name, in the shape and dtype of the parameter.
    """
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(False), torch.enable_grad(), only_gradients_of(model, parameters):
        for block in windows.blocks:
            block = block.mapped(lambda tensor: tensor.to(device, copy=True))
            with only_positions(model, block.rows, block.columns) as logits_of:
                logits = logits_of(run_block(model, block))
            (_loss_of_answers(logits, windows, block) / sum(windows.tokens)).backward()
        found = {}
        for name in parameters:
            weight = model.get_parameter(name)
            found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return found


def mixed(one: Moments, other: Moments, share: float) -> Moments:
    """Mix the moments of two texts.

    Args:
        one: Of a matrix.
        other: Of the same matrix, on something else. What no token of it reached leaves `one` as it is.
        share: Of the other, from 0 to 1. Gradients of the other are first scaled to the trace of the first, since
            losses of different kinds have different scales.

    Returns:
        The mixture.
    """
    if not other.tokens or not one.tokens:
        return one if one.tokens else other
    gradients, fisher = one.gradients, one.fisher
    if gradients is not None and other.gradients is not None and fisher is not None and other.fisher is not None:
        trace = other.gradients.trace()
        scale = gradients.trace() / trace if trace > 0 else torch.zeros_like(trace)
        gradients = torch.lerp(gradients, scale * other.gradients, share)
        fisher = torch.lerp(fisher, scale * other.fisher, share)
    return Moments(
        one.tokens + other.tokens,
        torch.lerp(one.inputs, other.inputs, share),
        torch.lerp(one.magnitude, other.magnitude, share),
        gradients,
        fisher,
    )


def _loss_of_answers(logits: Tensor, encoded: Encoded, block: Block) -> Tensor:
    """Sum the loss of the right answers, wrong ones left out where they are there."""
    logits = logits.float()
    tokens = logits.logsumexp(-1)[block.position] - logits[block.position, block.target]
    right = torch.zeros(sum(block.choices), device=logits.device)
    start = 0
    for index, choices in zip(block.examples, block.choices):
        answer = 0 if choices == 1 else encoded.task.examples[index].answer
        right[start + (answer if isinstance(answer, int) else 0)] = 1
        start += choices
    return (tokens * right[block.sequence]).sum()


def _gradients_of_drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Give the gradients of the summed loss of one token drawn from each prediction, a few predictions at a time."""
    thresholds = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    found = torch.empty_like(logits)
    for some, at, into in zip(*(each.split(PREDICTIONS) for each in (logits, thresholds, found))):
        some = some.float().requires_grad_()
        with torch.no_grad():
            # By the inverse of the distribution function, so that the draws are equal on every device.
            steps = some.softmax(-1).double().cumsum_(-1)
            drawn = (steps < at * steps[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
        loss = nn.functional.cross_entropy(some, drawn, reduction="sum")
        into.copy_(torch.autograd.grad(loss, some)[0])
    return found


@contextmanager
def each_expert(model: nn.Module) -> Iterator[None]:
    """Let a model multiply with the weight of each expert by itself, where it has several ways.

    Args:
        model: Any transformers model. As before on leaving.

    Yields:
        Nothing.
    """
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is not None:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        if before is not None:
            config._experts_implementation = before


def _added(sum_: Tensor | None, part: Tensor) -> Tensor:
    return part.double() if sum_ is None else sum_.add_(part)
