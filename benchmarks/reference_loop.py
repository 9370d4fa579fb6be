"""An exhaustive search as the LASER reference runs it, written after its description; only its timings matter.

For every edit a fresh randomised decomposition, then every example through the whole model at batch 1, every
choice tokenised again and read in a pass of its own, log-probabilities over the full vocabulary at all positions.

Left out, though the reference does them, so that a comparison flatters nobody: loading or copying the model for
every edit, sorting the vocabulary at every answer for its top 10, and writing predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.matrices import Matrix, read, write
from eckart.tasks import Example


@dataclass(frozen=True)
class Answered:
    """What a model thinks of the choices of one example."""

    likelihoods: tuple[float, ...]
    """Summed log-likelihood of each choice."""
    lengths: tuple[int, ...]
    """Tokens of each choice."""
    pick: int
    loss: float
    """Of the right choice, in nats per token."""


def reconstruct(weight: Tensor, rank: int) -> Tensor:
    """Approximate a weight as the reference does: unseeded, without oversampling."""
    U, S, V = torch.svd_lowrank(weight.float(), q=rank, niter=2)
    return (U * S) @ V.mT


@contextmanager
def edited(model: nn.Module, matrix: Matrix, rank: int) -> Iterator[None]:
    """Cut one matrix for a while; it is back, to the bit, afterwards."""
    original = read(model, matrix)
    write(model, matrix, reconstruct(original, rank))
    try:
        yield
    finally:
        write(model, matrix, original)


def answer_all(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Answered]:
    """Let a model answer examples with choices, one after the other."""
    with torch.inference_mode():
        return [_answer(model, tokenizer, example) for example in examples]


def _answer(model: Any, tokenizer: Any, example: Example) -> Answered:
    scored = [_score(model, tokenizer, example.prompt, choice) for choice in example.choices]
    likelihoods, lengths = zip(*scored)
    gold = example.answer
    assert isinstance(gold, int)
    pick = max(range(len(scored)), key=lambda index: likelihoods[index])
    return Answered(likelihoods, lengths, pick, -likelihoods[gold] / lengths[gold])


def _score(model: Any, tokenizer: Any, prompt: str, choice: str) -> tuple[float, int]:
    """Log-likelihood of a choice after a prompt, and its number of tokens."""
    ids = tokenizer(f"{prompt.rstrip()} {choice.lstrip()}", return_tensors="pt").input_ids.to(model.device)
    length = _answer_length(tokenizer, ids[0].tolist(), choice)
    log_probabilities = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    tokens = log_probabilities[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return tokens[-length:].sum().item(), length


def _answer_length(tokenizer: Any, ids: Sequence[int], answer: str) -> int:
    """Length of the shortest ending that reads as the answer, as the reference finds it."""
    for length in range(1, len(ids) + 1):
        if tokenizer.decode(ids[-length:]).strip() == answer.strip():
            return length
    raise ValueError(f"No ending of the tokens reads {answer!r}. The reference stops here too. Use another task.")
