"""The prefix cache: run only the blocks that an edit can change.

An edit in block l leaves the blocks before l as they were. Their forward methods are replaced, for the length
of one call, by functions that return what the last of them returned for the unedited model; the model's own
forward does the rest. That needs no code for any architecture, and it is checked: where the shortened pass
does not give the logits of the full one, the full one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Raised to leave a forward pass once the wanted block has run."""


class PrefixCache:
    """What enters the current block, for every batch; moves forward one block at a time.

    Holds one output of a block per list of blocks and batch: tokens x width numbers, whatever the depth.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, str]], inputs: Sequence[dict[str, Tensor]]):
        """Start before the first block.

        Args:
            model: In evaluation mode; must hold its unedited weights whenever `advance` is called.
            blocks: (path, path of its list) in the order of execution.
            inputs: Keyword arguments of the model, one dict a batch.
        """
        self.model = model
        self.inputs = inputs
        self.blocks = [(model.get_submodule(path), stack) for path, stack in blocks]
        self.depth = 0
        """Number of blocks that are skipped."""
        self._kept: list[dict[str, Any]] = [{} for _ in inputs]

    def advance(self) -> None:
        """Skip one block more: run it once on every batch and keep what it returns."""
        module, stack = self.blocks[self.depth]

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _Reached(output)

        for index, inputs in enumerate(self.inputs):
            handle = module.register_forward_hook(stop, prepend=True)
            try:
                with self.skipping(index):
                    self.model(**inputs)
            except _Reached as reached:
                self._kept[index][stack] = reached.args[0]
            finally:
                handle.remove()
        self.depth += 1

    def forward(self, index: int) -> Any:
        """Run the model on one batch from the current block on.

        Args:
            index: Which batch.

        Returns:
            The model's own output.
        """
        with self.skipping(index):
            return self.model(**self.inputs[index])

    @contextmanager
    def skipping(self, index: int) -> Iterator[None]:
        """Replace the skipped blocks' forward methods for one batch."""
        skipped = self.blocks[: self.depth]
        before = [module.__dict__.get("forward") for module, _ in skipped]
        for module, stack in skipped:
            module.forward = _returning(self._kept[index], stack)
        try:
            yield
        finally:
            for (module, _), forward in zip(skipped, before):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _returning(kept: dict[str, Any], stack: str) -> Callable[..., Any]:
    # A model may write into its hidden states, so each pass gets a copy.
    return lambda *_args, **_kwargs: _copy(kept[stack])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item) for item in value)
    return value


def agrees(cache: PrefixCache, index: int, expected: Tensor, logits_of: Callable[[Any], Tensor]) -> bool:
    """Check a shortened pass against the logits of the full one.

    Args:
        cache: At any depth, over the unedited model.
        index: Which batch.
        expected: The full pass's logits for that batch.
        logits_of: From the model's output to logits.

    Returns:
        Whether no logit differs by more than 1e-5 of the largest (1e-2 in half precision).
    """
    logits = logits_of(cache.forward(index))
    tolerance = 1e-5 if torch.finfo(logits.dtype).bits >= 32 else 1e-2
    difference = (logits - expected).abs().max()
    return bool(difference <= tolerance * expected.abs().max().clamp(min=1))
