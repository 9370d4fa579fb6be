"""A causal language model as one ExecuTorch program that holds its keys and values, and running it.

Low-rank layers stay two products. Batch is 1, and the context is fixed when the program is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from eckart.errors import ModelError

PROGRAM = "model.pte"
CONTEXT = 2048
"""Most tokens that a program holds: memory for all of them is taken when it is loaded."""
READ = 128
"""Most tokens of one call, so that the planned memory for attention stays small."""


def check_installed() -> None:
    """See whether ExecuTorch can be imported.

    Raises:
        ModelError: It cannot.
    """
    try:
        import executorch.exir  # noqa: F401  # pyright: ignore[reportMissingImports]
        import executorch.runtime  # noqa: F401  # pyright: ignore[reportMissingImports]
        from executorch.backends.xnnpack.partition import (  # pyright: ignore[reportMissingImports]
            xnnpack_partitioner,  # noqa: F401
        )
    except ImportError as error:
        raise ModelError(
            f"{error.name} is not installed. Exporting to pte needs ExecuTorch. Install it: pip install 'eckart[pte]'."
        ) from None


def write_program(model: nn.Module, state: Sequence[Any], path: Path, *, context: int) -> int:
    """Write a model as an ExecuTorch program; XNNPACK takes what it knows, portable operators the rest.

    Its method `forward` takes `input_ids` (1, n) and `cache_position` (n,), both int64, and gives the logits of the
    last token, (1, vocabulary). A call at position 0 begins anew.

    Args:
        model: Causal, on the CPU, in float32. Not modified.
        state: Heads and features of the keys and of the values of each layer.
        path: Of the file.
        context: Most tokens; n is at most `READ` and that.

    Returns:
        The file's bytes.

    Raises:
        ModelError: torch or ExecuTorch cannot express it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    length = torch.export.Dim("length", min=1, max=min(READ, context))
    try:
        with torch.no_grad():
            program = torch.export.export(
                _Keeper(model, state, context).eval(),
                (torch.full((1, 2), 5), torch.arange(2)),
                dynamic_shapes=({1: length}, {0: length}),
                strict=False,
            )
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
    except Exception as error:  # whatever torch.export, the decompositions and the partitioner raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        raise ModelError(
            f"{type(model).__name__} cannot be expressed in ExecuTorch by torch {torch.__version__}: "
            f"{reason.rstrip('.')}. Its operations all need a counterpart there. "
            "Use --to onnx or dense, or another version of executorch."
        ) from error
    path.write_bytes(content)
    return len(content)


def replay(path: Path, prompts: Any, ids: Any) -> Any:
    """Run a program after given tokens, one text after the other in the same program.

    Args:
        path: Of the file.
        prompts: Shape (n, length), int64, at most `READ` long.
        ids: What follows each of them, shape (n, steps).

    Returns:
        The logits before each of `ids`, (n, steps, vocabulary), float32 in numpy.

    Raises:
        ModelError: The runtime cannot load or run it.
    """
    from executorch.runtime import Runtime, Verification  # pyright: ignore[reportMissingImports]

    found = []
    try:
        forward = Runtime.get().load_program(path, verification=Verification.Minimal).load_method("forward")
        for prompt, following in zip(prompts, ids):
            now, position = torch.as_tensor(prompt)[None], 0
            for token in following:
                places = torch.arange(position, position + now.shape[1])
                found.append(forward.execute([now, places])[0][0].clone().numpy())
                position, now = position + now.shape[1], torch.tensor([[int(token)]])
    except RuntimeError as error:
        raise ModelError(
            f"ExecuTorch's runtime cannot run the program: {str(error).splitlines()[0]}. It should. "
            "Use --to onnx or dense, or another version of executorch."
        ) from error
    return np.stack(found).reshape(*ids.shape, -1)


class _Kept(StaticLayer):
    """Keys and values of one layer, in two buffers of full length."""

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor):
        super().__init__(keys.shape[2])
        self.held, self.places = (keys, values), places
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for whole, new in zip(self.held, (key_states, value_states)):
            whole.index_copy_(2, self.places, new)
        return self.held

    def get_seq_length(self) -> Any:
        return self.places[0]


class _Keeper(nn.Module):
    """The model as the program sees it.

    transformers' own module for this counts the tokens in one buffer that it registers twice, which torch 2.13 does
    not lower, and gives the logits of all tokens.
    """

    def __init__(self, model: nn.Module, state: Sequence[Any], context: int):
        super().__init__()
        self.model = model
        self.layers = len(state)
        names = inspect.signature(model.forward).parameters
        self.positioned, self.cropped = "position_ids" in names, "logits_to_keep" in names
        for index, pair in enumerate(state):
            for part, (heads, size) in zip(("keys", "values"), pair):
                self.register_buffer(f"{part}_{index}", torch.zeros(1, heads, context, size))

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        held = [(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i in range(self.layers)]
        cache = Cache(layers=[_Kept(keys, values, cache_position) for keys, values in held])
        options: dict[str, Any] = {"logits_to_keep": 1} if self.cropped else {}
        if self.positioned:
            options["position_ids"] = cache_position[None]
        given = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options)
        return given.logits[:, -1]
