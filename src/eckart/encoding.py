"""Examples to tensors: which tokens a model reads, and which of its predictions are scored.

The rule for causal models, the same as lm-eval's: prompt and answer are joined (by one space unless either
side brings white space, and white space at the end of the prompt moves to the answer) and tokenised
together, with the special tokens that the tokenizer adds by itself; an end-of-sequence token that it appends
is dropped. The answer begins at the first token that differs from the tokens of the prompt alone, so a token
that straddles the border belongs to the answer. Where there is no token before the answer, the tokenizer's
BOS (else EOS) token stands there.

Masked models: the choice's tokens replace the mask token in the prompt, one mask each; a prompt without one
gets it at its end. Encoder-decoders: the encoder reads the prompt, the decoder is scored on the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from eckart.errors import ModelError, TaskError
from eckart.layout import Block, Layout, ModelKind, Row, Sequence_, lay_out, padded_tokens, shared_tokens
from eckart.matrices import output_embeddings
from eckart.tasks import Task

Overlong = Literal["error", "truncate"]
BATCH_TOKENS = 2048
# A pass over the prompts pays from so many tokens on, in the mean.
PROMPT_TOKENS = 4
# More passes, or masks instead of causal attention, have to save so much.
WORTHWHILE = 0.85


@dataclass(frozen=True)
class Encoded:
    """A task as a model sees it."""

    task: Task
    model_kind: ModelKind
    blocks: tuple[Block, ...]
    count: int
    """Scored examples; for perplexity tasks, windows."""
    tokens: tuple[int, ...]
    """Scored tokens of each: of the right answer, or of the window."""
    single_token: bool
    """Every answer of an open task is one token, so its accuracy is that of the argmax."""
    truncated: int
    """Examples that were cut to the model's context."""
    sequences: tuple[tuple[Sequence_, ...], ...]
    """What is scored of each example, whatever the layout."""
    layout: Layout
    """How the blocks are laid out, and in the next two fields what it takes to lay them out again."""
    batch_tokens: int
    pad: int


def model_kind(model: nn.Module, tokenizer: Any) -> ModelKind:
    """Find out how a model reads text, by trying: does a later token change an earlier prediction?

    Args:
        model: A language model. Not modified.
        tokenizer: Its tokenizer; a model that looks ahead needs a mask token.

    Returns:
        The kind.

    Raises:
        ModelError: The model gives no logits over a vocabulary, or looks ahead and has no mask token.
    """
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or output_embeddings(model) is None:
        raise ModelError(
            f"{type(model).__name__} does not predict tokens. Tasks need a language model: causal, masked or "
            "encoder-decoder. Load the checkpoint with its language-model head."
        )
    if config.is_encoder_decoder:
        return "encoder_decoder"
    device = next(model.parameters()).device
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=device) % config.get_text_config().vocab_size
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    if torch.allclose(logits[0, :3], logits[1, :3], rtol=1e-3, atol=1e-3):
        return "causal"
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"{type(model).__name__} looks ahead and its tokenizer has no mask token. A model that looks ahead "
            "is scored by filling masks. Give it a tokenizer with a mask token."
        )
    return "masked"


def context_length(model: nn.Module, tokenizer: Any) -> int | None:
    """Give the longest input in tokens that a model accepts.

    Args:
        model: A transformers model. Not modified.
        tokenizer: Its tokenizer; a stated maximum below the model's counts.

    Returns:
        A number of tokens, or None where neither states one.
    """
    config: Any = model.config
    config = config.get_text_config()
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # Tokenizers without a limit state 1e30.
    lengths = [n for n in (*stated, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < 10**9]
    return min(lengths, default=None)


def encode(
    task: Task,
    tokenizer: Any,
    kind: ModelKind,
    *,
    context: int | None,
    batch_tokens: int = BATCH_TOKENS,
    overlong: Overlong = "error",
    window: int | None = None,
    stride: int | None = None,
    positions: int | None = None,
    decoder_start: int = 0,
) -> Encoded:
    """Tokenise a task and lay it out in batches whose composition never changes.

    Examples are ordered by length; one block holds all choices of its examples. Rows that read the same
    tokens are read once: choices of one token share a row.

    Args:
        task: The examples.
        tokenizer: A transformers tokenizer.
        kind: How the model reads, from `model_kind`.
        context: Longest row in tokens; None for no limit.
        batch_tokens: Most tokens of a block, padding included; one example may exceed it.
        overlong: What to do with a row longer than `context`: refuse, or drop its first tokens.
        window: Tokens of a perplexity window; by default the context, at most 1024.
        stride: Tokens by which windows advance, `1 <= stride <= window`; by default half a window. Only
            tokens that no earlier window scored are scored.
        positions: Score at most so many tokens of a window, evenly spread; None for all.
        decoder_start: First token of an encoder-decoder's decoder.

    Returns:
        The blocks, on the CPU.

    Raises:
        TaskError: A row is too long, two choices are the same tokens, or a text is too short to score.
    """
    if task.kind == "text":
        if kind != "causal":
            raise TaskError(
                f"{task.name} is a perplexity task, and this model is not causal. Perplexity needs a model that "
                "predicts the next token. Use a task with answers."
            )
        items = [[item] for item in _windows(task, tokenizer, context, window, stride, positions)]
        gold = [0] * len(items)
    else:
        items = _sequences(task, tokenizer, kind, decoder_start)
        gold = [e.answer if isinstance(e.answer, int) else 0 for e in task.examples]
    items, truncated = _fit(task, items, context, overlong)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    blocks = lay_out(items, "plain", kind=kind, pad=pad, batch_tokens=batch_tokens)
    tokens = tuple(len(sequences[answer].targets) for sequences, answer in zip(items, gold))
    single = task.kind == "open" and all(count == 1 for count in tokens)
    sequences = tuple(map(tuple, items))
    return Encoded(task, kind, blocks, len(items), tokens, single, truncated, sequences, "plain", batch_tokens, pad)


def arrange(
    encoded: Encoded,
    *,
    layout: Layout | None = None,
    strata: Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> Encoded:
    """Lay an encoded task out again.

    Args:
        encoded: From `encode`, for any kind of model and task. Not modified.
        layout: One of `eckart.layout`, all of which but `plain` need a causal model; by default the one it has.
        strata: A number for each example (window, for perplexity tasks). No block mixes two of them, and those of
            smaller numbers come first. By default none.
        batch_tokens: As for `encode`; by default what it was.

    Returns:
        The same examples in other blocks, on the CPU.

    Raises:
        ValueError: There are more or fewer strata than examples.
    """
    layout, batch_tokens = layout or encoded.layout, batch_tokens or encoded.batch_tokens
    if strata is not None and len(strata) != encoded.count:
        raise ValueError(
            f"{len(strata)} strata do not fit {encoded.count} examples of {encoded.task.name}. Every example needs "
            "one number. Give the strata in the order of the examples."
        )
    blocks = lay_out(
        encoded.sequences, layout, kind=encoded.model_kind, pad=encoded.pad, batch_tokens=batch_tokens, strata=strata
    )
    return replace(encoded, blocks=blocks, layout=layout, batch_tokens=batch_tokens)


def right_answers(encoded: Encoded, most: int) -> Encoded:
    """Leave out the answers that a loss does not depend on.

    Args:
        encoded: A task of any kind. Not modified.
        most: Examples (windows of a text) to keep, the first ones.

    Returns:
        The same examples with their right answers alone, not yet in blocks: see `arrange`.
    """
    task = encoded.task
    sequences = encoded.sequences[:most]
    if task.kind == "choice":
        sequences = tuple((mine[e.answer],) for mine, e in zip(sequences, task.examples) if isinstance(e.answer, int))
    return replace(encoded, sequences=sequences, blocks=(), count=len(sequences), tokens=encoded.tokens[:most])


def worthwhile(encoded: Encoded) -> tuple[Layout, ...]:
    """Name the layouts that save work, if the model gives the same likelihoods in them.

    Args:
        encoded: A task of any kind of model.

    Returns:
        Those to try, the best first; none where the plain one is best or the only one there is.
    """
    if encoded.model_kind != "causal" or encoded.task.kind == "text":
        return ()

    def cost(layout: Layout) -> int:
        return padded_tokens(encoded.sequences, layout, batch_tokens=encoded.batch_tokens)

    if sum(map(shared_tokens, encoded.sequences)) < PROMPT_TOKENS * encoded.count:
        return ("tree",) if cost("tree") <= WORTHWHILE * cost("plain") else ()
    return ("prefixes", "prompts") if cost("prefixes") <= WORTHWHILE * cost("prompts") else ("prompts",)


def join(prompt: str, answer: str) -> tuple[str, str]:
    """Put the white space between prompt and answer where tokenizers expect it: before the answer.

    >>> join("The capital is", "Paris"), join("Is it? ", "Yes"), join("", "A sentence.")
    (('The capital is', ' Paris'), ('Is it?', ' Yes'), ('', 'A sentence.'))
    """
    bare = prompt.rstrip()
    space = prompt[len(bare) :]
    if bare and not space and not answer[:1].isspace():
        space = " "
    return bare, space + answer


def prompt_tokens(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise prompts as they stand before an answer.

    Args:
        prompts: White space at their ends is dropped.
        tokenizer: A transformers tokenizer.

    Returns:
        Token ids of each, with the special tokens the tokenizer adds in front but none behind.
    """
    if not prompts:
        return []
    # A prompt with several answers is tokenised once.
    bare_prompts = [prompt.rstrip() for prompt in prompts]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(bare_prompts))}
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    suffix = len(full) - len(bare) - starts[0] if starts else 0
    batch = tokenizer(list(numbers), return_attention_mask=False, return_token_type_ids=False).input_ids
    found = [list(ids[: len(ids) - suffix]) for ids in batch]
    return [found[numbers[prompt]] for prompt in bare_prompts]


def _sequences(task: Task, tokenizer: Any, kind: ModelKind, decoder_start: int) -> list[list[Sequence_]]:
    """Encode every answer of every example, and check that answers exist and differ."""
    pairs = [(e.prompt, answer) for e in task.examples for answer in e.choices or (e.gold,)]
    if kind == "causal":
        encoded = iter(_causal(pairs, tokenizer))
    elif kind == "masked":
        encoded = iter(_masked(pairs, tokenizer))
    else:
        encoded = iter(_encoder_decoder(pairs, tokenizer, decoder_start))
    items = []
    for index, example in enumerate(task.examples):
        answers = example.choices or (example.gold,)
        sequences = [next(encoded) for _ in answers]
        where = f"{task.name}, line {example.line}" if example.line else f"{task.name}, example {index}"
        seen: dict[Sequence_, str] = {}
        for sequence, answer in zip(sequences, answers):
            if not sequence.targets:
                raise TaskError(
                    f"{where}: the answer {answer!r} has no token of its own after this prompt. "
                    "An answer needs at least one token. Change the answer or drop the line."
                )
            twin = seen.setdefault(sequence, answer)
            if twin is not answer:
                raise TaskError(
                    f"{where}: the choices {twin!r} and {answer!r} are the same tokens to this tokenizer. "
                    "Choices must differ. Change one or drop the line."
                )
        items.append(sequences)
    return items


def _causal(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[Sequence_]:
    joined = [join(prompt, answer) for prompt, answer in pairs]
    wholes = prompt_tokens([bare + rest for bare, rest in joined], tokenizer)
    prompts = prompt_tokens([bare for bare, _ in joined], tokenizer)
    beginning = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found = []
    for ids, alone in zip(wholes, prompts):
        start = 0
        while start < min(len(ids), len(alone)) and ids[start] == alone[start]:
            start += 1
        if start == 0 and beginning is not None:
            ids = [beginning, *ids]
        start = max(start, 1)
        found.append(Sequence_(Row(tuple(ids[:-1])), tuple(range(start - 1, len(ids) - 1)), tuple(ids[start:])))
    return found


def _masked(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[Sequence_]:
    mask = tokenizer.mask_token
    found = []
    for prompt, answer in pairs:
        text = prompt if mask in prompt else f"{prompt.rstrip()} {mask}".lstrip()
        before = text.partition(mask)[0]
        lead = " " if before[-1:].isspace() else ""
        targets = tokenizer(lead + answer, add_special_tokens=False).input_ids
        ids = tokenizer(text.replace(mask, mask * len(targets), 1)).input_ids
        positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id][: len(targets)]
        found.append(Sequence_(Row(tuple(ids)), tuple(positions), tuple(targets)))
    return found


def _encoder_decoder(pairs: Sequence[tuple[str, str]], tokenizer: Any, start: int) -> list[Sequence_]:
    found = []
    for prompt, answer in pairs:
        targets = tokenizer(answer, add_special_tokens=False).input_ids
        row = Row(tuple(tokenizer(prompt).input_ids), (start, *targets[:-1]))
        found.append(Sequence_(row, tuple(range(len(targets))), tuple(targets)))
    return found


def _windows(
    task: Task, tokenizer: Any, context: int | None, window: int | None, stride: int | None, most: int | None
) -> list[Sequence_]:
    window = window or min(context or 1024, 1024)
    if context is not None and window > context:
        raise TaskError(
            f"A window of {window} tokens does not fit the model. Its context is {context} tokens. "
            "Use a shorter window."
        )
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window or window < 2:
        raise TaskError(
            f"stride {stride} does not fit a window of {window} tokens. It is from 1 to the window, "
            "and a window has at least 2 tokens. Change them."
        )
    found = []
    for ids in prompt_tokens([example.prompt for example in task.examples], tokenizer):
        start, scored = 0, 1  # the first token has nothing before it
        while scored < len(ids):
            end = min(start + window, len(ids))
            targets = range(scored, end)
            if most is not None and most < len(targets):
                targets = [targets[number * len(targets) // most] for number in range(most)]
            positions = tuple(target - start - 1 for target in targets)
            found.append(Sequence_(Row(tuple(ids[start : end - 1])), positions, tuple(ids[i] for i in targets)))
            start, scored = min(start + stride, end - 1), end
    if not found:
        raise TaskError(f"No text of {task.name} has two tokens. Perplexity needs at least two. Use longer texts.")
    return found


def _fit(
    task: Task, items: list[list[Sequence_]], context: int | None, overlong: Overlong
) -> tuple[list[list[Sequence_]], int]:
    """Refuse or cut what is longer than the context."""
    if context is None:
        return items, 0

    # A causal row lacks its last target, which needs a position only if it were read itself.
    def excess(sequence: Sequence_) -> int:
        return max(len(sequence.row.ids), len(sequence.row.decoder_ids)) - context

    long = [index for index, sequences in enumerate(items) if any(excess(s) > 0 for s in sequences)]
    if not long:
        return items, 0
    if overlong == "error":
        first = long[0]
        longest = max(max(excess(s) for s in items[index]) for index in long) + context
        line = task.examples[first].line if task.kind != "text" else 0
        raise TaskError(
            f"{len(long)} of {len(items)} examples of {task.name} are longer than the model's context of {context} "
            f"tokens (the longest has {longest}; the first is line {line}). eckart does not shorten prompts unasked. "
            "Drop these lines, or pass --overlong truncate to drop the first tokens of each."
        )
    cut = list(items)
    for index in long:
        cut[index] = [_truncate(task, s, excess(s)) for s in items[index]]
    return cut, len(long)


def _truncate(task: Task, sequence: Sequence_, excess: int) -> Sequence_:
    if excess <= 0:
        return sequence
    if sequence.row.decoder_ids:
        return Sequence_(Row(sequence.row.ids[excess:], sequence.row.decoder_ids), sequence.positions, sequence.targets)
    positions = tuple(position - excess for position in sequence.positions)
    if positions[0] < 0:
        raise TaskError(
            f"An answer of {task.name} is longer than the model's context. Truncation shortens prompts, not answers. "
            "Drop the example."
        )
    return Sequence_(Row(sequence.row.ids[excess:]), positions, sequence.targets)
