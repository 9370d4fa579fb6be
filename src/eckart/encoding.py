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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.errors import ModelError, TaskError
from eckart.matrices import output_embeddings
from eckart.tasks import Task

ModelKind = Literal["causal", "masked", "encoder_decoder"]
Overlong = Literal["error", "truncate"]
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Row:
    """What the model reads once."""

    ids: tuple[int, ...]
    decoder_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sequence_:
    """One answer (or window of text) to score: a row, and the predictions in it that count."""

    row: Row
    positions: tuple[int, ...]
    """Where in the row (the decoder's, if it has one) the predictions are read."""
    targets: tuple[int, ...]
    """The tokens that should be predicted there."""


@dataclass(frozen=True)
class Block:
    """A fixed batch: all rows of some examples, and where the scored predictions lie.

    Legend: p positions of the batch whose logits are needed, t scored tokens, s sequences.
    """

    examples: tuple[int, ...]
    """Indices into the encoded examples."""
    choices: tuple[int, ...]
    """Number of sequences of each of them."""
    prompt: Tensor | None
    """Token ids of what all answers of an example share, shape (batch, tokens), read first and once into a
    key-value cache that `inputs` continue; None where `inputs` hold everything."""
    inputs: dict[str, Tensor]
    """Keyword arguments of the model, padded on the right."""
    rows: Tensor
    columns: Tensor
    """Shape (p,): the needed positions."""
    position: Tensor
    """Shape (t,): index into the p positions."""
    target: Tensor
    """Shape (t,): token ids."""
    sequence: Tensor
    """Shape (t,): index into the s sequences, which lie example by example."""

    def to(self, device: torch.device) -> Block:
        """Move every tensor to a device."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        prompt = None if self.prompt is None else self.prompt.to(device)
        fields = [getattr(self, name).to(device) for name in ("rows", "columns", "position", "target", "sequence")]
        return Block(self.examples, self.choices, prompt, moved, *fields)

    @property
    def size(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.inputs["input_ids"].numel() + (0 if self.prompt is None else self.prompt.numel())


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
        items = [[item] for item in _windows(task, tokenizer, context, window, stride)]
        gold = [0] * len(items)
    else:
        items = _sequences(task, tokenizer, kind, decoder_start)
        gold = [e.answer if isinstance(e.answer, int) else 0 for e in task.examples]
    items, truncated = _fit(task, items, context, overlong)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    blocks = tuple(_layout(items, group, kind, pad) for group in _group(items, batch_tokens))
    tokens = tuple(len(sequences[answer].targets) for sequences, answer in zip(items, gold))
    single = task.kind == "open" and all(count == 1 for count in tokens)
    return Encoded(task, kind, blocks, len(items), tokens, single, truncated, tuple(map(tuple, items)))


def share_prompts(encoded: Encoded, batch_tokens: int) -> Encoded | None:
    """Lay a causal task out so that every prompt is read once, whatever its number of answers.

    A block is read in two passes: the prompts, but for their last token, into a key-value cache; then what the
    answers have each for themselves, packed into one row an example, under a mask that keeps them apart. The
    first pass needs no logits, so it can end at the keys and values of the last layer.

    Args:
        encoded: A task of a causal model.
        batch_tokens: As for `encode`.

    Returns:
        The same task in other blocks; None where prompts are too short for it to pay.
    """
    packs = [_pack(sequences) for sequences in encoded.sequences]
    if sum(pack.shared for pack in packs) < 4 * len(packs):
        return None
    order = sorted(range(len(packs)), key=lambda i: (-packs[i].shared, -len(packs[i].ids), i))
    groups: list[list[int]] = []
    shared = own = 0
    for index in order:
        shared, own = max(shared, packs[index].shared), max(own, len(packs[index].ids))
        if groups and (len(groups[-1]) + 1) * (shared + own) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            shared, own = packs[index].shared, len(packs[index].ids)
    blocks = tuple(_layout_shared(encoded.sequences, packs, group) for group in groups)
    return replace(encoded, blocks=blocks)


@dataclass(frozen=True)
class _Pack:
    """The answers of one example in one row, behind the `shared` first tokens of all of them."""

    shared: int
    ids: tuple[int, ...]
    starts: dict[tuple[int, ...], int]
    """Tokens that an answer reads behind the shared ones -> where they begin in `ids`."""


def _pack(sequences: Sequence[Sequence_]) -> _Pack:
    rows = [sequence.row.ids for sequence in sequences]
    shared = min(sequence.positions[0] for sequence in sequences)
    while len({row[:shared] for row in rows}) > 1:
        shared -= 1
    ids: list[int] = []
    starts: dict[tuple[int, ...], int] = {}
    for row in rows:
        if row[shared:] not in starts:
            starts[row[shared:]] = len(ids)
            ids.extend(row[shared:])
    return _Pack(shared, tuple(ids), starts)


def _layout_shared(items: Sequence[Sequence[Sequence_]], packs: Sequence[_Pack], group: list[int]) -> Block:
    width = max(packs[index].shared for index in group)
    own = max(len(packs[index].ids) for index in group)
    prompts = [items[index][0].row.ids[: packs[index].shared] or (0,) for index in group]
    visible = torch.zeros(len(group), 1, own, width + own, dtype=torch.bool)
    visible[:, 0, :, width:] = torch.eye(own, dtype=torch.bool)  # padding sees itself, so no row is empty
    position_ids = torch.zeros(len(group), own, dtype=torch.long)
    scored = _Scored()
    for row, index in enumerate(group):
        pack = packs[index]
        for tail, start in pack.starts.items():
            end = start + len(tail)
            visible[row, 0, start:end, : pack.shared] = True
            visible[row, 0, start:end, width + start : width + end] = torch.ones(len(tail), len(tail)).tril().bool()
            position_ids[row, start:end] = torch.arange(pack.shared, pack.shared + len(tail))
        for sequence in items[index]:
            start = pack.starts[sequence.row.ids[pack.shared :]]
            scored.add(row, [start + position - pack.shared for position in sequence.positions], sequence.targets)
    inputs = {
        "input_ids": _padded([packs[index].ids for index in group], None),
        "position_ids": position_ids,
        "attention_mask": visible,
    }
    prompt = _padded(prompts, None)
    choices = tuple(len(items[index]) for index in group)
    return Block(tuple(group), choices, prompt, inputs, *scored.tensors())


class _Scored:
    """Collects where scored predictions lie; equal positions are kept once."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}
        self.position: list[int] = []
        self.target: list[int] = []
        self.owner: list[int] = []
        self.count = 0

    def add(self, row: int, columns: Iterable[int], targets: Iterable[int]) -> None:
        """Add one sequence."""
        for column, token in zip(columns, targets):
            self.position.append(self.places.setdefault((row, column), len(self.places)))
            self.target.append(token)
            self.owner.append(self.count)
        self.count += 1

    def tensors(self) -> tuple[Tensor, ...]:
        """Give rows, columns, position, target and sequence of a block."""
        rows, columns = zip(*self.places)
        return tuple(map(torch.tensor, (rows, columns, self.position, self.target, self.owner)))


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
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    suffix = len(full) - len(bare) - starts[0] if starts else 0
    batch = tokenizer([prompt.rstrip() for prompt in prompts]).input_ids
    return [list(ids[: len(ids) - suffix]) for ids in batch]


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
    task: Task, tokenizer: Any, context: int | None, window: int | None, stride: int | None
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
            positions = range(scored - start - 1, end - start - 1)
            found.append(Sequence_(Row(tuple(ids[start : end - 1])), tuple(positions), tuple(ids[scored:end])))
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


def _rows_of(sequences: Iterable[Sequence_]) -> dict[Row, int]:
    rows: dict[Row, int] = {}
    for sequence in sequences:
        rows.setdefault(sequence.row, len(rows))
    return rows


def _length(row: Row) -> int:
    return len(row.ids) + len(row.decoder_ids)


def _group(items: Sequence[Sequence[Sequence_]], batch_tokens: int) -> list[list[int]]:
    """Cut the examples, longest first, into groups of at most `batch_tokens` padded tokens."""
    order = sorted(range(len(items)), key=lambda i: (-max(_length(s.row) for s in items[i]), i))
    groups: list[list[int]] = []
    rows = longest = 0
    for index in order:
        mine = _rows_of(items[index])
        widest = max(map(_length, mine))
        longest = max(longest, widest)
        if groups and (rows + len(mine)) * longest <= batch_tokens:
            groups[-1].append(index)
            rows += len(mine)
        else:
            groups.append([index])
            rows, longest = len(mine), widest
    return groups


def _layout(items: Sequence[Sequence[Sequence_]], group: list[int], kind: ModelKind, pad: int) -> Block:
    rows = _rows_of(sequence for index in group for sequence in items[index])
    scored = _Scored()
    for index in group:
        for sequence in items[index]:
            scored.add(rows[sequence.row], sequence.positions, sequence.targets)
    # A causal model never looks at what follows, so its padding needs no mask and may be any token.
    inputs = {"input_ids": _padded([row.ids for row in rows], None if kind == "causal" else pad)}
    if kind != "causal":
        lengths = torch.tensor([len(row.ids) for row in rows])
        inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
    if kind == "encoder_decoder":
        inputs["decoder_input_ids"] = _padded([row.decoder_ids for row in rows], pad)
    return Block(tuple(group), tuple(len(items[index]) for index in group), None, inputs, *scored.tensors())


def _padded(rows: list[tuple[int, ...]], pad: int | None) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1] if pad is None else pad] * (width - len(row))] for row in rows])
