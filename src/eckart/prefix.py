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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eckart.encoding import Block


class _Reached(Exception):
    """Raised to leave a forward pass once what was wanted of it is there."""


class _PromptCache(DynamicCache):
    """Keys and values of prompts; filling it ends with the last layer's, since nothing after them is used."""

    def __init__(self, last_layer: int):
        super().__init__()
        self.last_layer: int | None = last_layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store a layer's keys and values."""
        everything = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last_layer:
            raise _Reached
        return everything


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
    """The forward passes of a block: prompts, then answers, which share one key-value cache; or just one pass."""
    if block.prompt is None:
        return [lambda: model(**block.inputs)]
    cache = _PromptCache(model.config.get_text_config().num_hidden_layers - 1)

    def read_prompts() -> None:
        try:
            model(input_ids=block.prompt, past_key_values=cache, use_cache=True)
        except _Reached as reached:
            if reached.args:  # not the cache's: a block that was wanted
                raise
        finally:
            cache.last_layer = None

    return [read_prompts, lambda: model(**block.inputs, past_key_values=cache, use_cache=True)]


class PrefixCache:
    """What enters the current module, for every batch and pass; moves forward one module at a time.

    Holds one output of a block per list of blocks, and of at most the modules of one block: tokens x width
    numbers each, whatever the depth.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, str]], batches: Sequence[Block]):
        """Start before the first block.

        Args:
            model: In evaluation mode; must hold its unedited weights whenever `advance` or `enter` is called.
            blocks: (path, path of its list) in the order of execution.
            batches: What the model reads.
        """
        self.model = model
        self.batches = batches
        self.blocks = [(model.get_submodule(path), stack) for path, stack in blocks]
        self.depth = 0
        """Number of blocks that are skipped."""
        self._inside: list[nn.Module] = []
        # One dict for each pass of each batch: list of blocks, or module inside the current one -> its output.
        self._kept: list[list[dict[Any, Any]]] = [[{} for _ in _phases(model, batch)] for batch in batches]

    def advance(self) -> None:
        """Skip one block more: run it once on every batch and keep what it returns."""
        module, stack = self.blocks[self.depth]
        self._keep(module, stack)
        for kept in self._every_pass():
            for inner in self._inside:
                kept.pop(inner, None)
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
        self._keep(module, module)
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
        for kept, phase in zip(self._kept[index], _phases(self.model, self.batches[index])):
            with self._skipping(kept):
                output = phase()
        return output

    def _keep(self, module: nn.Module, key: Any) -> None:
        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _Reached(output)

        for index, batch in enumerate(self.batches):
            for kept, phase in zip(self._kept[index], _phases(self.model, batch)):
                handle = module.register_forward_hook(stop, prepend=True)
                found = None
                try:
                    with self._skipping(kept):
                        phase()
                except _Reached as reached:
                    (found,) = reached.args
                finally:
                    handle.remove()
                # The pass over prompts ends inside the last block, whose output nothing needs.
                kept[key] = found

    def _every_pass(self) -> Iterator[dict[Any, Any]]:
        return (kept for passes in self._kept for kept in passes)

    @contextmanager
    def _skipping(self, kept: dict[Any, Any]) -> Iterator[None]:
        """Replace the skipped modules' forward methods for one pass."""
        skipped: list[tuple[nn.Module, Any]] = [*self.blocks[: self.depth], *((m, m) for m in self._inside)]
        before = [module.__dict__.get("forward") for module, _ in skipped]
        for module, key in skipped:
            module.forward = _returning(kept, key)
        try:
            yield
        finally:
            for (module, _), forward in zip(skipped, before):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _returning(kept: dict[Any, Any], key: Any) -> Callable[..., Any]:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        if kept[key] is None:
            raise _Reached
        # A model may write into its hidden states, so each pass gets a copy.
        return _copy(kept[key])

    return forward


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item) for item in value)
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
