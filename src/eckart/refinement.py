"""Before training as a whole: each block of a model learns the output of the dense block it stands for."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from eckart.dataflow import low_rank_layers
from eckart.errors import ModelError
from eckart.recipe import RecoverSettings


def stacks_of(model: nn.Module) -> list[list[str]]:
    """Find the blocks that hold low-rank layers.

    Args:
        model: A model with low-rank layers. Not modified.

    Returns:
        For each list of blocks (`nn.ModuleList`), the paths of those that hold one, in order.

    Raises:
        ModelError: No low-rank layer lies in such a list.
    """
    found: dict[str, list[str]] = {}
    for path in low_rank_layers(model):
        for match in re.finditer(r"\.(\d+)(?=\.)", path):
            stack = path[: match.start()]
            if isinstance(model.get_submodule(stack), nn.ModuleList):
                blocks = found.setdefault(stack, [])
                block = path[: match.end()]
                if block not in blocks:
                    blocks.append(block)
                break  # the outermost list; experts are lists in a block
    if not found:
        raise ModelError(
            f"No low-rank layer of {type(model).__name__} lies in a list of blocks. Refinement goes block by block. "
            "Leave --refine out."
        )
    return list(found.values())


class _Reached(Exception):
    """A block has been reached, and nothing after it is needed."""


def _arguments(model: Any, block: nn.Module, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What enters a block of a model."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def _output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def refine_block_(
    model: nn.Module, teacher: nn.Module, path: str, windows: Tensor, settings: RecoverSettings, *, seed: int = 0
) -> tuple[float, float]:
    """Train the factors of one block so that its output is the dense block's.

    The block reads what the blocks before it, refined already, make of the text; its target is what the dense block
    makes of the dense model's own hidden states.

    Args:
        model: A causal language model with low-rank layers. Modified: the factors in the block.
        teacher: The dense model, with a block at the same path. Not modified.
        path: Of the block.
        windows: Token ids, shape (n, tokens). Read `batch` at a time.
        settings: `refine` (passes over the windows), `refine_lr`, `batch`, `clip`.
        seed: Of the order.

    Returns:
        Mean squared error over all windows before and after, relative to the mean square of the target. Where it
        would have grown, the factors are as before.

    Raises:
        ModelError: The teacher has no such block.

    Source:
        Block-output refinement of AA-SVD (as LowRankArena runs it); ours trains factors only, not norms.
    """
    try:
        target_block = teacher.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"The teacher has no block at {path}. Refinement needs the model that was compressed. "
            "Give that model as --teacher, or leave --refine out."
        ) from None
    block = model.get_submodule(path)
    device = next(model.parameters()).device
    batches = windows.split(settings.batch)
    weights = [p for layer in low_rank_layers(block).values() for p in layer.parameters() if p.ndim >= 2]
    weights = [weight for weight in weights if weight.numel()]
    kept = [weight.detach().clone() for weight in weights]
    precise = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    # What enters the block is kept; what leaves the dense one is computed from the text each time it is needed.
    with torch.no_grad(), precise:
        inputs = [_arguments(model, block, batch.to(device)) for batch in batches]
        targets = []
        for batch in batches:
            args, kwargs = _arguments(teacher, target_block, batch.to(device))
            targets.append(_output(target_block(*args, **kwargs)).float())

    def error(number: int) -> Tensor:
        args, kwargs = inputs[number]
        with precise:
            found = _output(block(*args, **kwargs))
        return mse_loss(found.float(), targets[number]) / targets[number].square().mean()

    @torch.no_grad()
    def mean_error() -> float:
        return sum(float(error(number)) * len(batch) for number, batch in enumerate(batches)) / len(windows)

    before = mean_error()
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=settings.refine_lr, weight_decay=0.0)
    steps, step = settings.refine * len(batches), 0
    for epoch in range(settings.refine):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for number in torch.randperm(len(batches), generator=generator).tolist():
            optimizer.param_groups[0]["lr"] = settings.refine_lr * (1 - step / steps)
            error(number).backward()
            nn.utils.clip_grad_norm_(weights, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for weight in weights:
        weight.requires_grad_(False)
    after = mean_error()
    if not after < before:
        with torch.no_grad():
            for weight, old in zip(weights, kept):
                weight.copy_(old)
        after = before
    return before, after
