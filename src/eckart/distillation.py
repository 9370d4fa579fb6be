"""What a teacher predicts, computed again or kept on disk, how far a student is from it, and text that it writes."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Predictions:
    """A teacher's predictions at every position of some windows."""

    log_probabilities: Tensor
    """Shape (windows, tokens, k), float32: of the whole vocabulary, or of the k likeliest tokens."""
    tokens: Tensor | None = None
    """Shape (windows, tokens, k), int64: which tokens; None for the whole vocabulary."""


@torch.no_grad()
def predict(teacher: nn.Module, ids: Tensor, top: int | None = None) -> Predictions:
    """Compute a teacher's predictions.

    Args:
        teacher: A causal language model in evaluation mode. Not modified.
        ids: Token ids, shape (windows, tokens), on the teacher's device.
        top: Keep only so many of the likeliest tokens; None keeps all.

    Returns:
        The predictions, on the teacher's device.
    """
    model: Any = teacher
    found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    if top is None or top >= found.shape[-1]:
        return Predictions(found)
    return Predictions(*found.topk(top, dim=-1))


@torch.no_grad()
def sample(teacher: nn.Module, beginnings: Tensor, tokens: int, *, seed: int = 0) -> Tensor:
    """Let a teacher write on, each token drawn from all of its predictions as they are (temperature 1).

    So text comes as often as the teacher holds it likely, which is what its mean divergence from a student asks for.
    A token that ends a document is followed by another one, as in windows of joined documents.

    Args:
        teacher: A causal language model in evaluation mode for which `keeps_cache` holds. Not modified.
        beginnings: Token ids, shape (windows, one or more), on the teacher's device. Not modified.
        tokens: Length to which they are continued.
        seed: Of all draws.

    Returns:
        Token ids, shape (windows, tokens), int64, on the teacher's device.

    Source:
        LLM-QAT, arXiv 2305.17888, section 2.1, which takes the likeliest of the first tokens where ours are text.
    """
    model: Any = teacher
    generator = torch.Generator(beginnings.device).manual_seed(seed)
    written, cache, new = beginnings, None, beginnings
    while written.shape[1] < tokens:
        found = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        new = torch.multinomial(found.logits[:, -1].float().softmax(-1), 1, generator=generator)
        written = torch.cat((written, new), 1)
    return written


def keeps_cache(model: nn.Module) -> bool:
    """Tell whether a model can keep what it read as keys and values, so that each token it writes costs one reading.

    Args:
        model: A model of transformers. Not modified.

    Returns:
        Whether its forward pass takes them.
    """
    return "past_key_values" in inspect.signature(model.forward).parameters


def divergence(logits: Tensor, predictions: Predictions) -> Tensor:
    """Give the mean Kullback-Leibler divergence of a student from its teacher.

    Where only the likeliest tokens are known, all others count as one, which can only make the divergence smaller.

    Args:
        logits: The student's, shape (windows, tokens, vocabulary). Not modified.
        predictions: The teacher's, for the same positions.

    Returns:
        A scalar in nats per token, differentiable in `logits`.
    """
    student, teacher = logits.float().log_softmax(-1), predictions.log_probabilities
    if predictions.tokens is None:
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    student = student.gather(-1, predictions.tokens)
    within = (teacher.exp() * (teacher - student)).sum(-1)
    rest, other = (_rest(known) for known in (teacher, student))
    return (within + rest * (rest.log() - other.log())).mean()


def _rest(log_probabilities: Tensor) -> Tensor:
    """The probability of all tokens that are not known, kept away from 0, where its logarithm ends."""
    return (1 - log_probabilities.exp().sum(-1)).clamp(min=1e-6)


class Shelf:
    """A teacher's predictions for every window, in two files that are mapped into memory.

    Args:
        folder: Where the files are or will be.
        shape: (windows, tokens, k).
        whole: k is the whole vocabulary, so that no tokens are kept.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, whole: bool):
        self.shape = shape
        self._files = {"teacher.float16": np.float16} | ({} if whole else {"teacher.int32": np.int32})
        self._folder = folder
        self._maps: list[Any] = []

    @staticmethod
    def bytes(shape: tuple[int, int, int], *, whole: bool) -> int:
        """Say what it takes on disk: two bytes a probability, and four for its token."""
        windows, tokens, k = shape
        return windows * tokens * k * (2 if whole else 6)

    @property
    def filled(self) -> bool:
        """Whether it has been filled to the end, by whichever process."""
        return all((self._folder / name).is_file() for name in self._files)

    def fill(self, predictions: Any) -> None:
        """Write the predictions; the files appear when they are whole.

        Args:
            predictions: An iterable of `Predictions`, in the order of the windows.
        """
        parts = {self._folder / f".{name}.part": kind for name, kind in self._files.items()}
        maps = [np.memmap(path, kind, "w+", shape=self.shape) for path, kind in parts.items()]
        start = 0
        for found in predictions:
            end = start + len(found.log_probabilities)
            maps[0][start:end] = found.log_probabilities.cpu().numpy()
            if found.tokens is not None:
                maps[1][start:end] = found.tokens.cpu().numpy()
            start = end
        for path, kept in zip(parts, maps):
            kept.flush()
            os.replace(path, path.with_name(path.name[1 : -len(".part")]))

    def read(self, windows: Tensor, device: torch.device) -> Predictions:
        """Give the predictions of some windows.

        Args:
            windows: Their indices.
            device: Of the result.

        Returns:
            The predictions, rounded to float16 once.
        """
        if not self._maps:
            self._maps = [
                np.memmap(self._folder / name, kind, "r", shape=self.shape) for name, kind in self._files.items()
            ]
        found = [torch.from_numpy(np.array(kept[windows.numpy()])).to(device) for kept in self._maps]
        return Predictions(found[0].float(), found[1].long() if len(found) > 1 else None)
