"""Encoders of text: sentences in, one vector each out, and how well two encoders agree.

An encoder has no loss on a text, so what a compression keeps of it is its embeddings: the hidden states pooled as the
model's folder says, at unit length. Of two embeddings e and e0 of one sentence, 1 - cosine is |e - e0|^2 / 2, and to
the second order the mean of (v' J d)^2 / 2 over random v, where J is the derivative of e by what changed by d. So the
gradient of v' e for a random v is to an encoder what that of a drawn token's loss is to a language model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.checkpoint import beside, sentence_modules
from eckart.dataflow import evaluating, example_inputs
from eckart.encoding import Encoded, context_length
from eckart.errors import ModelError, TaskError
from eckart.layout import Block, Row, Sequence_, lay_out
from eckart.matrices import output_embeddings
from eckart.prefix import run_block
from eckart.results import Measurement, mean, read_json
from eckart.tasks import Task

UNIT = "1 - cosine"
"""What the divergence of two embeddings is measured in."""
SHORTEST = 4
"""Words of the shortest sentence that is read: less is a heading or a fragment."""
JACKKNIFE = 50
"""Groups of sentences that are left out in turn for a standard error."""

Mode = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
# As sentence-transformers names them: in flags up to its version 5, later as one word.
_FLAGS: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|$)", re.DOTALL)


@dataclass(frozen=True)
class Pooling:
    """How one vector is made of the hidden states of a sentence."""

    modes: tuple[Mode, ...] = ("mean",)
    """One after the other, joined."""

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool the hidden states of a batch.

        Args:
            hidden: Shape (batch, tokens, width).
            mask: Shape (batch, tokens), 1 for tokens and 0 for padding on the right.

        Returns:
            Shape (batch, width times modes), of unit length, in float32 or better.

        >>> Pooling()(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[0.7071, 0.7071]])
        """
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weights = mask.to(hidden)
        found = []
        for mode in self.modes:
            if mode == "cls":
                found.append(hidden[:, 0])
            elif mode == "lasttoken":
                found.append(hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1])
            elif mode == "max":
                found.append(hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1))
            else:
                places = torch.arange(1, hidden.shape[1] + 1).to(hidden)
                each = weights * places if mode == "weightedmean" else weights
                counts = each.sum(1, keepdim=True)
                counts = counts.sqrt() if mode == "mean_sqrt_len_tokens" else counts
                found.append((hidden * each[..., None]).sum(1) / counts)
        return nn.functional.normalize(torch.cat(found, -1), dim=-1)


def read_pooling(source: str) -> Pooling:
    """Read how a model's folder pools, as sentence-transformers would.

    Modules behind the pooling are not run: of a dense layer there, embeddings are compared before it.

    Args:
        source: A folder or a hub id, as for `eckart.load`.

    Returns:
        What the folder of its pooling module says; the mean over all tokens where it has none.

    Raises:
        ModelError: A file is damaged, or the pooling is of a kind that is not known.
    """
    for path, kind in sentence_modules(source):
        if not kind.endswith(".Pooling"):
            continue
        file = beside(source, f"{path}/config.json")
        given: Any = {} if file is None else read_json(file)
        stated = given.get("pooling_mode") if isinstance(given, dict) else None
        modes: Any = [stated] if isinstance(stated, str) else stated
        if stated is None:
            modes = [mode for flag, mode in _FLAGS.items() if isinstance(given, dict) and given.get(flag) is True]
        if not isinstance(modes, list) or not modes or any(mode not in _FLAGS.values() for mode in modes):
            raise ModelError(
                f"{source} has a pooling that is not known: {str(stated or given)[:100]}. Poolings are "
                f"{', '.join(_FLAGS.values())}. Correct config.json in its folder {path}."
            )
        return Pooling(tuple(modes))
    return Pooling()


def embeds(model: nn.Module) -> bool:
    """Find out what a model gives for a text: predictions of tokens, or hidden states to make an embedding of.

    Args:
        model: Of transformers, in evaluation mode. Not modified.

    Returns:
        Whether it is hidden states.

    Raises:
        ModelError: It is neither, or the model has two parts.
    """
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} does not read a text alone. A model is compressed on a text that it predicts "
            "or embeds: a causal or masked language model, or an encoder. Use `eckart search` for others."
        )
    if output_embeddings(model) is not None:
        return False
    with evaluating(model), torch.inference_mode():
        states = getattr(model(**example_inputs(model)), "last_hidden_state", None)
    if not isinstance(states, Tensor):
        raise ModelError(
            f"{type(model).__name__} gives neither predictions of tokens nor hidden states. A model is compressed on "
            "a text that it predicts or embeds. Load the checkpoint without its head, or with one for language."
        )
    return True


def split_sentences(text: str) -> Iterator[str]:
    """Divide a text at the ends of sentences and paragraphs.

    Args:
        text: Any; lines that no empty line separates belong together.

    Yields:
        What has at least four words, spaces made single.

    >>> list(split_sentences('He said: "Go home now!" And they went\\n home. Yes.'))
    ['He said: "Go home now!"', 'And they went home.']
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for found in _SENTENCE.finditer(paragraph):
            words = found[0].split()
            if len(words) >= SHORTEST:
                yield " ".join(words)


def read_sentences(
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    first: int = 0,
    most: int | None = None,
    batch_tokens: int = 2048,
) -> Encoded:
    """Read sentences of a text, none twice, until they have so many tokens.

    Batches hold sentences of one length, so that no padding takes part in what weights see.

    Args:
        task: Of kind `text`.
        model: The encoder, for its context. Not modified.
        tokenizer: Its tokenizer.
        tokens: How many, with the special tokens.
        length: Tokens at which a sentence is cut off.
        first: Tokens that are skipped first, in whole sentences.
        most: Sentences at most; None for no limit.
        batch_tokens: Most tokens of a batch; one sentence may exceed it.

    Returns:
        The sentences, each as one example, on the CPU.

    Raises:
        TaskError: There is no sentence, or it is no text.
    """
    if task.kind != "text":
        raise TaskError(
            f"{task.name} has answers, and {type(model).__name__} predicts none: it gives embeddings. An encoder is "
            'measured on texts. Give a text, or lines of {"text": "…"}.'
        )
    length = min(length, context_length(model, tokenizer) or length)
    ids: list[tuple[int, ...]] = []
    seen, total, truncated = set(), 0, 0
    for sentence in (each for example in task.examples for each in split_sentences(example.prompt)):
        if total >= first + tokens or (most is not None and len(ids) == most):
            break
        if sentence in seen:
            continue
        seen.add(sentence)
        mine = tuple(tokenizer(sentence, truncation=True, max_length=length).input_ids)
        if total >= first:
            ids.append(mine)
            truncated += len(mine) == length
        total += len(mine)
    if len(ids) < 2:
        raise TaskError(
            f"{task.name} has {len(ids)} sentences of {SHORTEST} words or more behind its first {first} tokens. "
            "An encoder needs two at least. Give a longer text."
        )
    items = [[Sequence_(Row(row), (0,), (row[0],))] for row in ids]
    pad = tokenizer.pad_token_id or 0
    lengths = [len(row) for row in ids]
    blocks = lay_out(items, "plain", kind="masked", pad=pad, batch_tokens=batch_tokens, strata=lengths)
    sequences = tuple(map(tuple, items))
    return Encoded(
        task, "masked", blocks, len(ids), tuple(lengths), False, truncated, sequences, "plain", batch_tokens, pad
    )


def embed_block(output: Any, block: Block, pooling: Pooling) -> Tensor:
    """Make embeddings of what an encoder gave for a block.

    Args:
        output: The model's own.
        block: Of `read_sentences`, on its device.
        pooling: How.

    Returns:
        Shape (sentences, width), of unit length, in the block's order.
    """
    pooled = pooling(output.last_hidden_state, block.inputs["attention_mask"])
    return pooled[block.rows[block.position]]


def embed(
    model: nn.Module, sentences: Encoded, index: int, pooling: Pooling, forward: Callable[[int], Any] | None = None
) -> Tensor:
    """Embed the sentences of one block.

    Args:
        model: An encoder in evaluation mode.
        sentences: On its device.
        index: Which block.
        pooling: How hidden states become one vector.
        forward: Runs the model on the block of that index; by default from the first layer on.

    Returns:
        Shape (sentences, width), of unit length, in the block's order.
    """
    block = sentences.blocks[index]
    with torch.inference_mode():
        return embed_block(forward(index) if forward else run_block(model, block), block, pooling)


def embed_all(model: nn.Module, sentences: Encoded, pooling: Pooling) -> Tensor:
    """Embed all sentences, in their order.

    Args:
        model: An encoder in evaluation mode.
        sentences: From `read_sentences`, on any device.
        pooling: How hidden states become one vector.

    Returns:
        Shape (sentences, width), float64 on the CPU, of unit length.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * sentences.count
    with evaluating(model), torch.inference_mode():
        for block in sentences.blocks:
            block = block.mapped(lambda tensor: tensor.to(device))
            for number, vector in zip(block.examples, embed_block(run_block(model, block), block, pooling)):
                found[number] = vector
    return nn.functional.normalize(torch.stack(found).double().cpu(), dim=-1)


def divergence(found: Tensor, expected: Tensor) -> list[float]:
    """Say by how much embeddings differ.

    Args:
        found: Shape (n, width), of unit length.
        expected: The same of the original model.

    Returns:
        1 - cosine of each.
    """
    return ((found.double() - expected.double()).square().sum(1) / 2).tolist()


def probe(embeddings: Tensor, generator: torch.Generator) -> Tensor:
    """Give the sum of the embeddings' components along random directions, one for each sentence.

    Its gradient g at an output makes the mean of (g' d)^2 / 2 the 1 - cosine that a change d of it causes, to the
    second order.

    Args:
        embeddings: Shape (n, width).
        generator: On the CPU.

    Returns:
        A number, to be differentiated.
    """
    directions = torch.randn(embeddings.shape, generator=generator, dtype=torch.float64)
    return (embeddings * directions.to(embeddings)).sum()


def agreement(before: Tensor, after: Tensor) -> dict[str, Measurement]:
    """Compare two encoders by their embeddings of the same sentences.

    Args:
        before: Shape (n, width), n >= 3, of unit length.
        after: The same sentences by the other model.

    Returns:
        `cosine`, the mean over sentences; `spearman`, the rank correlation of the similarities of all pairs of
        sentences by one model with those by the other. Its standard error is that over sentences, by a jackknife.

    Source:
        Spearman correlation of similarities is how the STS benchmarks judge encoders (Cer et al. 2017, there against
        human scores); the delete-a-group jackknife is Kott 2001.
    """
    cosine = mean((before * after).sum(1).numpy(), "cosine")
    similarities = [(each @ each.T).numpy() for each in (before, after)]
    count = len(before)
    groups = min(JACKKNIFE, count)
    whole = _correlation(similarities, np.arange(count))
    each = np.array(
        [_correlation(similarities, np.flatnonzero(np.arange(count) % groups != group)) for group in range(groups)]
    )
    stderr = float(np.sqrt((groups - 1) / groups * ((each - each.mean()) ** 2).sum()))
    return {"cosine": cosine, "spearman": Measurement(whole, stderr, count, "rank correlation")}


def _correlation(similarities: Sequence[NDArray[np.float64]], kept: NDArray[np.int64]) -> float:
    above = np.triu_indices(len(kept), 1)
    one, other = (_ranks(each[np.ix_(kept, kept)][above]) for each in similarities)
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[places]
