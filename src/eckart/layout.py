"""Sequences to batches: which tokens are read together, and which are read once for several answers.

Four layouts of the same examples, all with the same likelihoods where the model allows it:

- `plain`: a row for every answer; the only one for models that are not causal.
- `tree`: a row for every example, in which answers that begin alike share their first tokens.
- `prompts`: the prompts, but for their last token, in one pass; the trees of the answers in a second one.
- `prefixes`: what several prompts have in common in one pass, the rest of each in a second one, trees in a third.

A pass continues the rows of the one before through their keys and values. Passes before the last need no logits, so
they can end at the keys and values of the last layer. Knows nothing of models, tokenizers or tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
ModelKind = Literal["causal", "masked", "encoder_decoder"]
Layout = Literal["plain", "tree", "prompts", "prefixes"]
PASSES: dict[Layout, int] = {"plain": 1, "tree": 1, "prompts": 2, "prefixes": 3}
# What a forward pass costs beyond its tokens, in tokens; of 32 to 256, no value was clearly better on two small models.
PASS_TOKENS = 64
# Attention gives every row its own copy of the prefix, one layer at a time: at most so many times `batch_tokens`.
COPIES = 16
# Prompts that may share one prefix are looked for among so many neighbours.
NEIGHBOURS = 64


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
class Pass:
    """One forward pass over a batch."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model, padded on the right."""
    continues: Tensor | None = None
    """Shape (batch,): the row of the pass before that each row follows; None where it is the row of equal number."""


@dataclass(frozen=True)
class Block:
    """A fixed batch: all rows of some examples, and where the scored predictions lie.

    Legend: p positions of the last pass whose logits are needed, t scored tokens, s sequences.
    """

    examples: tuple[int, ...]
    """Indices into the encoded examples."""
    choices: tuple[int, ...]
    """Number of sequences of each of them."""
    passes: tuple[Pass, ...]
    """Read one after the other; each sees the keys and values of those before."""
    rows: Tensor
    columns: Tensor
    """Shape (p,): the needed positions of the last pass."""
    position: Tensor
    """Shape (t,): index into the p positions."""
    target: Tensor
    """Shape (t,): token ids."""
    sequence: Tensor
    """Shape (t,): index into the s sequences, which lie example by example."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the pass that is scored."""
        return self.passes[-1].inputs

    @property
    def size(self) -> int:
        """Tokens that the model reads, padding included."""
        return sum(one.inputs["input_ids"].numel() for one in self.passes)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Block:
        """Give the same block with every tensor changed.

        Args:
            change: Tensor in, tensor out; such as a move to a device.

        Returns:
            A new block.
        """
        passes = tuple(
            Pass(
                {name: change(tensor) for name, tensor in one.inputs.items()},
                None if one.continues is None else change(one.continues),
            )
            for one in self.passes
        )
        names = ("rows", "columns", "position", "target", "sequence")
        return replace(self, passes=passes, **{name: change(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class _Pack:
    """One example as the rows of its passes."""

    prefix: tuple[int, ...]
    """Read once for all examples of the batch that have the same; empty where nothing is shared."""
    rest: tuple[int, ...]
    """The prompt behind it; empty where the last pass reads it."""
    tree: tuple[int, ...]
    """Everything else: tokens of all answers, each once wherever answers begin alike. Empty in a plain layout."""
    parents: tuple[int, ...]
    """For each token of the tree the place of the one before it; -1 for the first."""
    ways: tuple[tuple[int, ...], ...]
    """For each answer the places of its tokens in the tree."""
    rows: int
    width: int
    """Rows in the last pass, and their length."""


def lay_out(
    items: Sequence[Sequence[Sequence_]],
    layout: Layout,
    *,
    kind: ModelKind,
    pad: int,
    batch_tokens: int,
    strata: Sequence[int] | None = None,
) -> tuple[Block, ...]:
    """Put examples into batches, similar lengths together.

    Args:
        items: The sequences of each example.
        layout: How; all but `plain` need a causal model.
        kind: How the model reads.
        pad: Token that fills rows of models that look at all of a row.
        batch_tokens: Most tokens of a batch, padding included; one example may exceed it.
        strata: A number for each example. No batch mixes two of them, and smaller ones come first.

    Returns:
        Batches on the CPU that hold every example once. Equal arguments give equal batches.
    """
    blocks: list[Block] = []
    for members in _strata(len(items), strata):
        packs = _packs(items, members, layout)
        _, groups = _cut(packs, PASSES[layout], batch_tokens)
        make = _plain_block if layout == "plain" else _block
        blocks += [make(items, packs, group, kind, pad) for group in groups]
    return tuple(blocks)


def runs_within(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Divide items into runs that fit into a size together.

    Args:
        items: In order.
        size_of: Size of one.
        most: Of a run, in the same unit.

    Yields:
        Items that follow each other, as many as fit; one alone may be larger.

    >>> list(runs_within([3, 4, 9, 2, 5], lambda size: size, 7))
    [[3, 4], [9], [2, 5]]
    """
    run: list[T] = []
    held = 0
    for item in items:
        size = size_of(item)
        if run and held + size > most:
            yield run
            run, held = [], 0
        run.append(item)
        held += size
    if run:
        yield run


def padded_tokens(
    items: Sequence[Sequence[Sequence_]], layout: Layout, *, batch_tokens: int, strata: Sequence[int] | None = None
) -> int:
    """Tell what a layout costs, without building it.

    Args:
        items: As for `lay_out`.
        layout: As for `lay_out`.
        batch_tokens: As for `lay_out`.
        strata: As for `lay_out`.

    Returns:
        Tokens read, padding included, and `PASS_TOKENS` for every pass.
    """
    found = 0
    for members in _strata(len(items), strata):
        cost, _ = _cut(_packs(items, members, layout), PASSES[layout], batch_tokens)
        found += cost
    return found


def shared_tokens(sequences: Sequence[Sequence_]) -> int:
    """Count the tokens of an example's prompt that can be read without any of its answers.

    Args:
        sequences: Of one example and a causal model.

    Returns:
        The number of first tokens that all rows have in common and at which nothing is predicted.
    """
    rows = [sequence.row.ids for sequence in sequences]
    return min(_in_common(rows), *(sequence.positions[0] for sequence in sequences))


def _in_common(rows: Sequence[tuple[int, ...]]) -> int:
    """Count the first tokens that all rows have; the lowest and the highest row tell."""
    low, high = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def _strata(count: int, strata: Sequence[int] | None) -> list[list[int]]:
    if strata is None:
        return [list(range(count))]
    members: dict[int, list[int]] = {}
    for index, stratum in zip(range(count), strata, strict=True):
        members.setdefault(stratum, []).append(index)
    return [members[stratum] for stratum in sorted(members)]


def _packs(items: Sequence[Sequence[Sequence_]], members: list[int], layout: Layout) -> dict[int, _Pack]:
    if layout == "plain":
        rows = {index: rows_of(items[index]) for index in members}
        return {
            index: _Pack((), (), (), (), (), len(mine), max(len(row.ids) + len(row.decoder_ids) for row in mine))
            for index, mine in rows.items()
        }
    shared = {index: 0 if layout == "tree" else shared_tokens(items[index]) for index in members}
    prompts = {index: items[index][0].row.ids[: shared[index]] for index in members}
    cuts = _prefix_lengths(prompts) if layout == "prefixes" else dict.fromkeys(members, 0)
    found = {}
    for index in members:
        tree, parents, ways = _tree([sequence.row.ids[shared[index] :] for sequence in items[index]])
        prefix, rest = prompts[index][: cuts[index]], prompts[index][cuts[index] :]
        found[index] = _Pack(prefix, rest, tree, parents, ways, 1, len(tree))
    return found


def rows_of(sequences: Iterable[Sequence_]) -> dict[Row, int]:
    """Number the rows of sequences; equal rows have one number.

    Args:
        sequences: In any number.

    Returns:
        Row -> number, in order of first appearance.
    """
    rows: dict[Row, int] = {}
    for sequence in sequences:
        rows.setdefault(sequence.row, len(rows))
    return rows


def _tree(tails: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    places: dict[tuple[int, int], int] = {}
    ways = []
    for tail in tails:
        way: list[int] = []
        for token in tail:
            way.append(places.setdefault((way[-1] if way else -1, token), len(places)))
        ways.append(tuple(way))
    return tuple(token for _, token in places), tuple(parent for parent, _ in places), tuple(ways)


def _prefix_lengths(prompts: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Choose the shared prefix of every prompt so that most tokens are saved: (k - 1)·length for k prompts.

    Groups are runs of the sorted prompts, found by dynamic programming; equal prefixes of two groups are one again in
    a batch.
    """
    order = sorted(prompts, key=lambda index: (prompts[index], index))
    common = [_in_common([prompts[a], prompts[b]]) for a, b in zip(order, order[1:])]
    saved = np.zeros(len(order) + 1, dtype=np.int64)
    begin = [0] * (len(order) + 1)
    # One entry for each place where the group that ends here could begin: what its members have in common.
    lengths = np.zeros(0, dtype=np.int64)
    for end in range(1, len(order) + 1):
        if end > 1:
            lengths = np.minimum(lengths, common[end - 2])
        lengths = np.append(lengths, len(prompts[order[end - 1]]))[-NEIGHBOURS:]
        members = np.arange(len(lengths), 0, -1)
        total = saved[end - members] + (members - 1) * lengths
        best = int(total.argmax())
        saved[end], begin[end] = total[best], end - members[best]
    found, end = {}, len(order)
    while end:
        group = order[begin[end] : end]
        length = _in_common([prompts[index] for index in group]) if len(group) > 1 else 0
        found.update(dict.fromkeys(group, length))
        end = begin[end]
    return found


def _cut(packs: dict[int, _Pack], passes: int, batch_tokens: int) -> tuple[int, list[list[int]]]:
    """Cut examples into batches of the least cost, padding and passes counted; the cheapest of two orders."""
    # Examples with one prefix stay together, so the widest of them decides where they stand.
    widest: dict[tuple[int, ...], tuple[int, int]] = {}
    for pack in packs.values():
        rest, answer = widest.get(pack.prefix, (0, 0))
        widest[pack.prefix] = max(rest, len(pack.rest)), max(answer, pack.width)

    def by_prompt(index: int) -> tuple[object, ...]:
        pack = packs[index]
        rest, answer = widest[pack.prefix]
        return -rest, -len(pack.prefix), -answer, pack.prefix, -len(pack.rest), -pack.width, index

    def by_answer(index: int) -> tuple[object, ...]:
        pack = packs[index]
        rest, answer = widest[pack.prefix]
        return -answer, -rest, -len(pack.prefix), pack.prefix, -pack.width, -len(pack.rest), index

    orders = [sorted(packs, key=key) for key in (by_prompt, by_answer)]
    return min((_cut_in_order(packs, order, passes, batch_tokens) for order in orders), key=lambda found: found[0])


def _cut_in_order(
    packs: dict[int, _Pack], order: list[int], passes: int, batch_tokens: int
) -> tuple[int, list[list[int]]]:
    """Dynamic programming over the places where a batch may end."""
    cost = np.zeros(len(order) + 1, dtype=np.int64)
    begin = [0] * (len(order) + 1)
    # One column for each place where the batch that ends here could begin: rows and width of each of its passes.
    batch: NDArray[np.int64] = np.zeros((5, 0), dtype=np.int64)
    before: tuple[int, ...] | None = None
    for end, index in enumerate(order, start=1):
        pack = packs[index]
        batch = np.concatenate([batch, np.zeros((5, 1), dtype=np.int64)], axis=1)
        prefixes, rows, prefix, rest, own = batch
        prefixes += int(pack.prefix != before)
        prefixes[-1] = 1
        rows += pack.rows
        for width, mine in ((prefix, len(pack.prefix)), (rest, len(pack.rest)), (own, pack.width)):
            np.maximum(width, mine, out=width)
        tokens = prefixes * prefix + rows * (rest + own)
        fits = (tokens <= batch_tokens) & (rows * (prefix + rest + own) <= COPIES * batch_tokens)
        fits[-1] = True
        # An earlier beginning makes a larger batch, so what does not fit now never will.
        first = int(fits.argmax())
        batch, tokens = batch[:, first:], tokens[first:]
        total = cost[end - len(tokens) : end] + tokens
        best = int(total.argmin())
        cost[end], begin[end] = total[best] + PASS_TOKENS * passes, end - len(tokens) + best
        before = pack.prefix
    groups, end = [], len(order)
    while end:
        groups.append(order[begin[end] : end])
        end = begin[end]
    return int(cost[-1]), groups[::-1]


def _plain_block(
    items: Sequence[Sequence[Sequence_]], _packs: dict[int, _Pack], group: list[int], kind: ModelKind, pad: int
) -> Block:
    rows = rows_of(sequence for index in group for sequence in items[index])
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
    choices = tuple(len(items[index]) for index in group)
    return Block(tuple(group), choices, (Pass(inputs),), *scored.tensors())


def _block(
    items: Sequence[Sequence[Sequence_]], packs: dict[int, _Pack], group: list[int], _kind: ModelKind, _pad: int
) -> Block:
    prefixes: dict[tuple[int, ...], int] = {}
    for index in group:
        prefixes.setdefault(packs[index].prefix, len(prefixes))
    scored = _Scored()
    for row, index in enumerate(group):
        pack = packs[index]
        shared = len(pack.prefix) + len(pack.rest)
        for sequence, way in zip(items[index], pack.ways):
            scored.add(row, [way[position - shared] for position in sequence.positions], sequence.targets)
    before = max(map(len, prefixes))
    rest = max(len(packs[index].rest) for index in group)
    passes: list[Pass] = []
    follows = None
    if before:
        passes.append(Pass({"input_ids": _padded([*prefixes], None)}))
        follows = torch.tensor([prefixes[packs[index].prefix] for index in group])
    if rest:
        chains = [range(-1, len(packs[index].rest) - 1) for index in group]
        read = [([(len(packs[index].prefix), before)], packs[index].rest, chain) for index, chain in zip(group, chains)]
        # Where nothing stands before the prompts, the model's own causal mask does.
        passes.append(Pass(_masked(read) if before else {"input_ids": _padded([own for _, own, _ in read], None)}))
        passes[-1] = replace(passes[-1], continues=follows)
        follows = None
    read = [
        ([(len(pack.prefix), before), (len(pack.rest), rest)], pack.tree, pack.parents)
        for pack in (packs[index] for index in group)
    ]
    passes.append(Pass(_masked(read), follows))
    return Block(tuple(group), tuple(len(items[index]) for index in group), tuple(passes), *scored.tensors())


def _masked(rows: Sequence[tuple[list[tuple[int, int]], tuple[int, ...], Sequence[int]]]) -> dict[str, Tensor]:
    """Inputs of a pass in which every row is a tree.

    Args:
        rows: For each, (tokens, padded width) of the passes before it, its own tokens, and the place of the token
            before each of them; -1 for the first.
    """
    own = max(len(ids) for _, ids, _ in rows)
    before = sum(width for _, width in rows[0][0])
    visible = np.zeros((len(rows), 1, own, before + own), dtype=bool)
    visible[:, 0, :, before:] = np.eye(own, dtype=bool)  # padding sees itself, so no row is empty
    position_ids = np.zeros((len(rows), own), dtype=np.int64)
    for row, (earlier, ids, parents) in enumerate(rows):
        start, seen = 0, visible[row, 0]
        for count, width in earlier:
            seen[: len(ids), start : start + count] = True
            start += width
        shared = sum(count for count, _ in earlier)
        for place, parent in enumerate(parents):
            position_ids[row, place] = shared
            if parent >= 0:
                seen[place] |= seen[parent]
                position_ids[row, place] = position_ids[row, parent] + 1
    return {
        "input_ids": _padded([ids for _, ids, _ in rows], None),
        "position_ids": torch.from_numpy(position_ids),
        "attention_mask": torch.from_numpy(visible),
    }


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


def _padded(rows: Sequence[tuple[int, ...]], pad: int | None) -> Tensor:
    """Fill rows with `pad`, or with their last token (an empty row with 0) where None."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[(row or (0,))[-1] if pad is None else pad] * (width - len(row))] for row in rows])
