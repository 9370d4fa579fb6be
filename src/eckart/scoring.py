"""Score a model on a task: log-likelihoods, right answers, perplexity, each with its standard error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.encoding import Encoded, arrange, context_length, encode, model_kind, prompt_tokens, worthwhile
from eckart.layout import Block, Layout, lay_out
from eckart.matrices import output_embeddings
from eckart.prefix import run_block
from eckart.results import Measurement, mean, perplexity
from eckart.tasks import Task, majority_answer

Normalize = Literal["none", "tokens"]
LOSS_UNIT = "nats/token"
# Beyond this share of equal answers, accuracy measures the label balance and not the model.
CONSTANT = 0.95
# Predictions that are compared in float64 at once.
PREDICTIONS = 256
# Examples of a block on which a layout is compared with the plain one.
CHECKED = 8


@dataclass(frozen=True)
class Scores:
    """What a model did on examples of a task, in the task's order."""

    examples: NDArray[np.int64]
    """Shape (n,): which examples were scored; all of them unless a race was stopped."""
    loss: NDArray[np.float64]
    """Shape (n,): negative log-likelihood of the right answer, in nats per token of it."""
    correct: NDArray[np.bool_] | None = None
    """Shape (n,); None for perplexity tasks."""
    prediction: tuple[str, ...] = ()
    """The answer given, as text."""
    rank: NDArray[np.int64] | None = None
    """Tokens that were likelier than the right one; only where every answer is one token."""


@dataclass(frozen=True)
class BlockScores:
    """The same for one block, as plain lists that go through JSON unchanged."""

    loss: list[float]
    correct: list[bool] = field(default_factory=list)
    prediction: list[str] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)


Forward = Callable[[int], Any]


def evaluate(
    model: nn.Module, tokenizer: Any, task: Task, *, normalize: Normalize = "none", **encoding: Any
) -> dict[str, Measurement]:
    """Measure a model on a task.

    Args:
        model: A causal, masked or encoder-decoder language model in evaluation mode. Not modified.
        tokenizer: Its tokenizer.
        task: The examples.
        normalize: Compare choices by the sum of their log-likelihoods, or by the mean over their tokens.
        **encoding: Options of `eckart.encoding.encode`: `batch_tokens`, `overlong`, `window`, `stride`.

    Returns:
        `accuracy` (and `top5`, `top10` for single-token answers) as fractions, `loss` in nats per token,
        and for perplexity tasks `perplexity`.

    Raises:
        TaskError: The task does not fit the model or its tokenizer.
    """
    encoded = prepare(model, tokenizer, task, **encoding)
    return summarize(encoded, score(model, tokenizer, encoded, normalize=normalize))


def score(model: nn.Module, tokenizer: Any, encoded: Encoded, *, normalize: Normalize = "none") -> Scores:
    """Score every example of an encoded task.

    Args:
        model: As for `evaluate`.
        tokenizer: Its tokenizer.
        encoded: From `prepare`.
        normalize: As for `evaluate`.

    Returns:
        One row an example (a window, for perplexity tasks).
    """
    blocks = range(len(encoded.blocks))
    return assemble(
        encoded, {index: score_block(model, tokenizer, encoded, index, normalize=normalize) for index in blocks}
    )


def prepare(model: nn.Module, tokenizer: Any, task: Task, **encoding: Any) -> Encoded:
    """Encode a task for a model, on the model's device.

    Args:
        model: A language model. Not modified.
        tokenizer: Its tokenizer.
        task: The examples.
        **encoding: Options of `eckart.encoding.encode`.

    Returns:
        The task in blocks.

    Raises:
        TaskError: The task does not fit the model or its tokenizer.
    """
    return prepare_parts(model, tokenizer, (task,), **encoding)[0]


def prepare_parts(model: nn.Module, tokenizer: Any, parts: Sequence[Task], **encoding: Any) -> list[Encoded]:
    """Encode parts of one task in one layout, which is chosen for the first of them and checked once.

    Args:
        model: As for `prepare`.
        tokenizer: Its tokenizer.
        parts: At least one task, all of one kind.
        **encoding: As for `prepare`.

    Returns:
        Each part in blocks.

    Raises:
        TaskError: As for `prepare`.
    """
    kind = model_kind(model, tokenizer)
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    encoding = {"context": context_length(model, tokenizer), "decoder_start": start, **encoding}
    plain = [encode(part, tokenizer, kind, **encoding) for part in parts]
    for layout in worthwhile(plain[0]):
        shared = [arrange(part, layout=layout) for part in plain]
        if _same_likelihoods(model, shared):
            return [_on_device(model, part) for part in shared]
    return [_on_device(model, part) for part in plain]


def rearrange(
    model: nn.Module, encoded: Encoded, strata: Sequence[int] | None = None, *, batch_tokens: int | None = None
) -> Encoded:
    """Divide examples into other blocks, in the layout that was found exact for the model.

    Args:
        model: The model that `encoded` was prepared for. Not modified.
        encoded: From `prepare`. Not modified.
        strata: A number for each example (window, for perplexity tasks): those of smaller numbers come first, and
            no block mixes two of them. By default none.
        batch_tokens: As for `encode`; by default what it was.

    Returns:
        The task in other blocks, on the model's device.

    Raises:
        ValueError: There are more or fewer strata than examples.
    """
    return _on_device(model, arrange(encoded, strata=strata, batch_tokens=batch_tokens))


def _on_device(model: nn.Module, encoded: Encoded) -> Encoded:
    return replace(encoded, blocks=tuple(_moved(model, block) for block in encoded.blocks))


def _moved(model: nn.Module, block: Block) -> Block:
    """Move a block to the model, and masks from true and false to what attention adds to its scores."""
    parameter = next(model.parameters())

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.to(parameter.device)
        if tensor.dtype != torch.bool:
            return tensor
        hidden = torch.zeros(tensor.shape, dtype=parameter.dtype, device=tensor.device)
        return hidden.masked_fill_(~tensor, torch.finfo(parameter.dtype).min)

    return block.mapped(move)


def _same_likelihoods(model: nn.Module, parts: Sequence[Encoded]) -> bool:
    """Check some neighbours and the longest example: does the parts' layout give the plain one's scores?

    Models with sliding windows shorter than the prompt, ALiBi or other masks of their own do not.
    """
    shared = parts[0]
    longest = max(
        (item for part in parts for item in part.sequences), key=lambda item: max(len(s.row.ids) for s in item)
    )
    items = [longest, *(shared.sequences[index] for index in sorted(shared.blocks[0].examples[:CHECKED]))]

    def likelihoods(layout: Layout) -> dict[int, NDArray[Any]]:
        blocks = lay_out(items, layout, kind=shared.model_kind, pad=shared.pad, batch_tokens=shared.batch_tokens)
        return _likelihoods(model, [_moved(model, block) for block in blocks])

    try:
        found = likelihoods(shared.layout)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # the model takes no cache, position ids or mask of this kind
    expected = likelihoods("plain")
    tolerance = 1e-5 if torch.finfo(next(model.parameters()).dtype).bits >= 32 else 2e-2
    return all(
        abs(found[number][answer] - expected[number][answer]) <= tolerance * (10 + len(sequence.targets))
        for number, sequences in enumerate(items)
        for answer, sequence in enumerate(sequences)
    )


def _likelihoods(model: nn.Module, blocks: Sequence[Block]) -> dict[int, NDArray[Any]]:
    """Summed log-likelihoods of every answer, by example."""
    found = {}
    for block in blocks:
        with torch.inference_mode(), only_positions(model, block.rows, block.columns) as logits_of:
            likelihood, _, _ = _read(logits_of(run_block(model, block)), block)
        found.update(zip(block.examples, np.split(likelihood, np.cumsum(block.choices)[:-1])))
    return found


def score_block(
    model: nn.Module,
    tokenizer: Any,
    encoded: Encoded,
    index: int,
    *,
    normalize: Normalize = "none",
    forward: Forward | None = None,
    reference: Tensor | None = None,
) -> BlockScores:
    """Score the examples of one block.

    Args:
        model: As for `evaluate`.
        tokenizer: Its tokenizer.
        encoded: The task in blocks.
        index: Which block.
        normalize: As for `evaluate`.
        forward: Runs the model on the block of that index; by default from the first layer on.
        reference: Of a perplexity task, another model's `log_probabilities` of the block: the loss is then the
            divergence from it.

    Returns:
        One entry an example, in the block's order.
    """
    block = encoded.blocks[index]
    with torch.inference_mode(), only_positions(model, block.rows, block.columns) as logits_of:
        output = forward(index) if forward else run_block(model, block)
        logits = logits_of(output)
    if reference is not None:
        return BlockScores(_divergence(logits, reference, block).tolist())
    likelihood, rank, best = _read(logits, block)
    return _judge(model, tokenizer, encoded, block, likelihood, rank, best, normalize)


def log_probabilities(model: nn.Module, encoded: Encoded, index: int) -> Tensor:
    """Give a model's predictions where a block is scored.

    Args:
        model: As for `evaluate`.
        encoded: The task in blocks.
        index: Which block.

    Returns:
        Shape (positions, vocabulary), float32, on the model's device.
    """
    block = encoded.blocks[index]
    with torch.inference_mode(), only_positions(model, block.rows, block.columns) as logits_of:
        return logits_of(run_block(model, block)).float().log_softmax(-1)


def _divergence(logits: Tensor, reference: Tensor, block: Block) -> NDArray[np.float64]:
    """Per sequence: the mean over its tokens of the Kullback-Leibler divergence from the reference."""
    # A sum of many small terms of both signs: float64, so that a model does not diverge from itself.
    at = torch.cat(
        [
            (expected.exp().double() * (expected - some.float().log_softmax(-1)).double()).sum(-1).clamp_(min=0)
            for some, expected in zip(logits.split(PREDICTIONS), reference.split(PREDICTIONS))
        ]
    )
    sums = torch.zeros(sum(block.choices), dtype=torch.float64, device=at.device)
    sums.index_add_(0, block.sequence, at[block.position])
    return (sums / torch.bincount(block.sequence, minlength=len(sums))).cpu().numpy()


@contextmanager
def only_positions(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[Callable[[Any], Tensor]]:
    """Let only the given positions of a batch reach the vocabulary projection.

    Works for every model with an output embedding, since it changes the projection's input and no argument.

    Args:
        model: The model; unchanged again on leaving.
        rows: Shape (p,), rows of the batch.
        columns: Shape (p,), positions in them.

    Yields:
        A function that takes the model's output to logits of shape (p, vocabulary).
    """
    head = output_embeddings(model)
    assert head is not None
    handle = head.register_forward_pre_hook(lambda _module, args: (args[0][rows, columns][None], *args[1:]))
    try:
        yield lambda output: output.logits[0]
    finally:
        handle.remove()


def _read(logits: Tensor, block: Block) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Per sequence: summed log-likelihood, rank of its first target, and the likeliest first token."""
    logits = logits.float()
    wanted = logits[block.position, block.target]
    tokens = (wanted - logits.logsumexp(-1)[block.position]).double()
    sequences = sum(block.choices)
    likelihood = torch.zeros(sequences, dtype=torch.float64, device=tokens.device)
    likelihood.index_add_(0, block.sequence, tokens)
    first = torch.ones_like(block.sequence, dtype=torch.bool)
    first[1:] = block.sequence[1:] != block.sequence[:-1]
    position = block.position[first]
    rank = (logits[position] > wanted[first][:, None]).sum(-1)
    return likelihood.cpu().numpy(), rank.cpu().numpy(), logits.argmax(-1)[position].cpu().numpy()


def _judge(
    model: nn.Module,
    tokenizer: Any,
    encoded: Encoded,
    block: Block,
    likelihood: NDArray[Any],
    rank: NDArray[Any],
    best: NDArray[Any],
    normalize: Normalize,
) -> BlockScores:
    lengths = np.bincount(block.sequence.cpu().numpy(), minlength=len(likelihood))
    starts = np.concatenate([[0], np.cumsum(block.choices)[:-1]])
    task = encoded.task
    if task.kind == "text":
        return BlockScores((-likelihood / lengths).tolist())
    examples = [task.examples[index] for index in block.examples]
    if task.kind == "choice":
        gold = starts + np.array([example.answer for example in examples])
        score = likelihood / lengths if normalize == "tokens" else likelihood
        picks = [int(np.argmax(score[start : start + count])) for start, count in zip(starts, block.choices)]
        return BlockScores(
            (-likelihood[gold] / lengths[gold]).tolist(),
            [pick == example.answer for pick, example in zip(picks, examples)],
            [example.choices[pick] for pick, example in zip(picks, examples)],
        )
    loss = (-likelihood / lengths).tolist()
    if encoded.single_token:
        said = [tokenizer.decode([token]).strip() for token in best.tolist()]
        return BlockScores(loss, (rank == 0).tolist(), said, rank.tolist())
    said = generate(model, tokenizer, [e.prompt for e in examples], max(encoded.tokens) + 5)
    return BlockScores(loss, [matches(text, e.gold) for text, e in zip(said, examples)], said)


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """Continue each prompt greedily.

    Prompts of equal length are batched, so no padding can change a result.

    Args:
        model: A causal or encoder-decoder model. Not modified.
        tokenizer: Its tokenizer.
        prompts: The texts.
        tokens: Most new tokens.

    Returns:
        The continuations alone, without the prompts.
    """
    decoder: Any = model
    whole = decoder.config.is_encoder_decoder
    encoded = [tokenizer(p).input_ids for p in prompts] if whole else prompt_tokens(prompts, tokenizer)
    groups: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        groups.setdefault(len(ids), []).append(index)
    said = [""] * len(prompts)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for indices in groups.values():
        ids = torch.tensor([encoded[index] for index in indices], device=device)
        with torch.inference_mode():
            out = decoder.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
            )
        for index, row in zip(indices, out):
            said[index] = tokenizer.decode(row if whole else row[ids.shape[1] :], skip_special_tokens=True).strip()
    return said


def matches(text: str, answer: str) -> bool:
    """Tell whether a continuation contains the answer as whole words, in any case.

    >>> matches("Paris, of course", "paris"), matches("I know", "no")
    (True, False)
    """
    pattern = r"(?<!\w)" + re.escape(answer.strip().casefold()) + r"(?!\w)"
    return re.search(pattern, text.casefold()) is not None


def assemble(encoded: Encoded, parts: Mapping[int, BlockScores]) -> Scores:
    """Put the scores of blocks back into the order of the examples.

    Args:
        encoded: The task in blocks.
        parts: Block index -> its scores; at least one block.

    Returns:
        One row a scored example.
    """
    blocks = sorted(parts)
    scored = np.array([index for block in blocks for index in encoded.blocks[block].examples])
    order = np.argsort(scored)
    examples = scored[order]
    loss = np.array([value for block in blocks for value in parts[block].loss])[order]
    if encoded.task.kind == "text":
        return Scores(examples, loss)
    correct = np.array([value for block in blocks for value in parts[block].correct], dtype=bool)[order]
    said = [text for block in blocks for text in parts[block].prediction]
    ranks = [value for block in blocks for value in parts[block].rank]
    rank = np.array(ranks)[order] if ranks else None
    return Scores(examples, loss, correct, tuple(said[i] for i in order), rank)


def summarize(encoded: Encoded, scores: Scores) -> dict[str, Measurement]:
    """Turn scores into measurements.

    Args:
        encoded: The task that was scored.
        scores: From `score` or `assemble`.

    Returns:
        As `evaluate` does.
    """
    if scores.correct is None:
        tokens = np.array(encoded.tokens)[scores.examples]
        return {"loss": _per_token(scores.loss, tokens), "perplexity": perplexity(scores.loss, tokens)}
    found = {"accuracy": mean(scores.correct, "fraction"), "loss": mean(scores.loss, LOSS_UNIT)}
    if scores.rank is not None:
        found |= {f"top{k}": mean(scores.rank < k, "fraction") for k in (5, 10)}
    return found


def _per_token(loss: NDArray[Any], tokens: NDArray[Any]) -> Measurement:
    ratio = perplexity(loss, tokens)
    return Measurement(float(np.log(ratio.value)), ratio.stderr / ratio.value, ratio.count, LOSS_UNIT)


def constant_answer(scores: Scores) -> tuple[str, float] | None:
    """Find out whether a model gives (nearly) one answer always.

    Args:
        scores: Of at least two examples.

    Returns:
        The answer and its share where that is `CONSTANT` or more; else None.
    """
    if not scores.prediction or len(scores.prediction) < 2:
        return None
    answer, count = Counter(scores.prediction).most_common(1)[0]
    share = count / len(scores.prediction)
    return (answer, share) if share >= CONSTANT else None


def majority_control(chosen_on: Task, measured_on: Task) -> tuple[str, Measurement] | None:
    """Measure what answering the commonest label would reach.

    Args:
        chosen_on: The examples that tell which answer is commonest.
        measured_on: The examples it is measured on.

    Returns:
        The answer (a label, or "choice 0") and its accuracy; None for perplexity tasks.
    """
    answer = majority_answer(chosen_on)
    if answer is None:
        return None
    right = np.array([(e.answer if isinstance(answer, int) else e.gold) == answer for e in measured_on.examples])
    return (f"choice {answer}" if isinstance(answer, int) else answer), mean(right, "fraction")
