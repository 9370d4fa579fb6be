"""Run only what an edit can change: the prefix cache, and prompts read once.

An edit in block l leaves the blocks before l as they were, and within block l whatever runs before the edited
matrix. The forward methods of those modules are replaced, for the length of one call, by functions that return
what the module returned for the unedited model; the model's own forward does the rest. That needs no code for
any architecture, and it is checked: where the shortened pass does not give the logits of the full one, the
caller uses the full one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eckart.layout import Block, Pass


class _Reached(Exception):
    """Raised to leave a forward pass once what was wanted of it is there."""


class _PassCache(DynamicCache):
    """Keys and values of all passes over one batch.

    Each pass keeps its own, and a layer joins them when it runs, so that what rows share is stored once. A pass
    before the last ends with the last layer's keys and values, since nothing after them is used.
    """

    def __init__(self, last_layer: int):
        super().__init__()
        self.last_layer = last_layer
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        # For each pass its tokens in a row, and the rows of it that the current pass continues; None for all in order.
        self._widths: list[int] = []
        self._rows: list[Tensor | None] = []
        self._more = False

    def begin(self, one: Pass, *, more: bool) -> None:
        """Start a pass; `more` tells whether another one follows it."""
        if one.continues is not None:
            self._rows = [one.continues if rows is None else rows[one.continues] for rows in self._rows]
        self._rows.append(None)
        self._widths.append(one.inputs["input_ids"].shape[1])
        self._more = more

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store a layer's keys and values, and give those that its queries may look at."""
        parts = self._parts.setdefault(layer_idx, [])
        parts.append((key_states, value_states))
        if self._more and layer_idx == self.last_layer:
            raise _Reached
        if len(parts) == 1:
            return parts[0]
        keys, values = zip(*parts)
        return self._joined(keys), self._joined(values)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([p if rows is None else p[rows] for p, rows in zip(parts, self._rows, strict=True)], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tell how many tokens stand before this pass, also in layers that were skipped."""
        return sum(self._widths[:-1])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Tell how many keys there are, and where they begin."""
        return self.get_seq_length() + query_length, 0


Phase = Callable[[], Any]


def run_block(model: nn.Module, block: Block) -> Any:
    """Run a model on a block of examples.

    Args:
        model: In evaluation mode, under `torch.inference_mode`.
        block: From `eckart.encoding`, on the model's device.

    Returns:
        The model's own output, for `block.inputs`.
    """
    output = None
    for phase in _phases(model, block):
        output = phase()
    return output


def _phases(model: Any, block: Block) -> list[Phase]:
    """The forward passes of a block, which share one key-value cache where there are several."""
    if len(block.passes) == 1:
        return [lambda: model(**block.inputs)]
    cache = _PassCache(model.config.get_text_config().num_hidden_layers - 1)

    def read(one: Pass, *, more: bool) -> Any:
        cache.begin(one, more=more)
        try:
            return model(**one.inputs, past_key_values=cache, use_cache=True)
        except _Reached as reached:
            if reached.args:  # not the cache's: a block that was wanted
                raise

    return [partial(read, one, more=one is not block.passes[-1]) for one in block.passes]


class PrefixCache:
    """What enters the current module, for every batch and pass; moves forward one module at a time.

    Holds one output of a block per list of blocks, and of at most the modules of one block: tokens x width
    numbers each, whatever the depth. What does not fit `cache_bytes` is computed again in every pass.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, str]],
        batches: Sequence[Block],
        *,
        cache_bytes: int | None = None,
    ):
        """Start before the first block.

        Args:
            model: In evaluation mode; must hold its unedited weights whenever `advance` or `enter` is called.
            blocks: (path, path of its list) in the order of execution.
            batches: What the model reads.
            cache_bytes: Most bytes to keep, `>= 0`; None for no bound. Batches beyond it are run from their first
                layer on, to the same numbers.
        """
        self.model = model
        self.batches = batches
        self.blocks = [(model.get_submodule(path), stack) for path, stack in blocks]
        self.depth = 0
        """Number of blocks that are skipped."""
        self.cache_bytes = cache_bytes
        self.bytes = 0
        """Bytes kept now."""
        self.peak_bytes = 0
        """Most bytes kept so far; never above `cache_bytes`."""
        self._inside: list[nn.Module] = []
        # For each batch: list of blocks, or module inside the current one -> its output in each pass.
        self._kept: list[dict[Any, list[Any]]] = [{} for _ in batches]
        # Lists of blocks that did not fit are not tried again.
        self._refused: set[tuple[int, Any]] = set()

    def advance(self) -> None:
        """Skip one block more: run it once on every batch and keep what it returns."""
        module, stack = self.blocks[self.depth]
        for index in range(len(self.batches)):
            found = None if (index, stack) in self._refused else self.outputs(module, index)
            for inner in (*self._inside, stack):
                self._drop(index, inner)
            if found is not None and not self._keep(index, stack, found):
                self._refused.add((index, stack))
        self._inside = []
        self.depth += 1

    def enter(self, path: str) -> bool:
        """Skip a module inside the current block too, until `advance`.

        Args:
            path: A direct child of the current block that runs before what will be edited.

        Returns:
            Whether it was not skipped before.
        """
        module = self.model.get_submodule(path)
        if module in self._inside:
            return False
        _, stack = self.blocks[self.depth]
        for index in range(len(self.batches)):
            if (index, stack) not in self._refused:
                self._keep(index, module, self.outputs(module, index))
        self._inside.append(module)
        return True

    def forward(self, index: int) -> Any:
        """Run the model on one batch from the current module on.

        Args:
            index: Which batch.

        Returns:
            The model's own output.
        """
        output = None
        for number, phase in enumerate(_phases(self.model, self.batches[index])):
            with self._skipping(index, number):
                output = phase()
        return output

    def outputs(self, module: nn.Module, index: int) -> list[Any]:
        """Run the model up to a module, skipping what is kept.

        Args:
            module: Where to stop: the current block, or what is in it.
            index: Which batch.

        Returns:
            What the module returns in each pass over the batch; None where a pass ends inside it and nothing needs it.
        """

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _Reached(output)

        outputs = []
        for number, phase in enumerate(_phases(self.model, self.batches[index])):
            handle = module.register_forward_hook(stop, prepend=True)
            found = None
            try:
                with self._skipping(index, number):
                    phase()
            except _Reached as reached:
                (found,) = reached.args
            finally:
                handle.remove()
            outputs.append(found)
        return outputs

    def _keep(self, index: int, key: Any, outputs: list[Any]) -> bool:
        """Keep what fits, and tell whether it did."""
        size = _storage_bytes(outputs)
        if self.cache_bytes is not None and self.bytes + size > self.cache_bytes:
            return False
        self._kept[index][key] = outputs
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return True

    def _drop(self, index: int, key: Any) -> None:
        self.bytes -= _storage_bytes(self._kept[index].pop(key, []))

    @contextmanager
    def _skipping(self, index: int, number: int) -> Iterator[None]:
        """Replace the skipped modules' forward methods for one pass over a batch."""
        kept = self._kept[index]
        modules = [*self.blocks[: self.depth], *((module, module) for module in self._inside)]
        skipped = [(module, kept[key][number]) for module, key in modules if key in kept]
        before = [module.__dict__.get("forward") for module, _ in skipped]
        for module, output in skipped:
            module.forward = _returning(output)
        try:
            yield
        finally:
            for (module, _), forward in zip(skipped, before):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        if output is None:
            raise _Reached
        # A model may write into its hidden states, so each pass gets a copy.
        return copied(output)

    return forward


def _storage_bytes(value: Any) -> int:
    """Bytes of memory behind the tensors of nested lists and tuples; shared memory counts once."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (tuple, list)):
            for inner in item:
                visit(inner)

    visit(value)
    return sum(storages.values())


def copied(value: Any) -> Any:
    """Copy the tensors in nested lists and tuples.

    Args:
        value: Anything. Not modified.

    Returns:
        The same, each tensor a clone, through which gradients flow.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item) for item in value)
    return value


def agree(found: Tensor, expected: Tensor) -> bool:
    """Compare two ways to compute the same logits.

    Args:
        found: Any shape.
        expected: The same shape, from the plain way.

    Returns:
        Whether none differs by more than 1e-5 of the largest (1e-2 in half precision).
    """
    tolerance = 1e-5 if torch.finfo(found.dtype).bits >= 32 else 1e-2
    difference = (found - expected).abs().max()
    return bool(difference <= tolerance * expected.abs().max().clamp(min=1))
