"""The inputs that matrices get from the cut blocks before them, beside those that they got from the original ones.

Two streams of the calibration text run through one model, a block at a time: what enters the current block is kept for
both, and the current block runs with its original or its cut weights. Notation: x is an input in the original
stream, y the input of the same weight at the same token in the cut one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration import Place, Watch
from eckart.layout import Block
from eckart.matrices import Matrix, part_of
from eckart.prefix import PrefixCache


@dataclass(frozen=True)
class Inputs:
    """Second moments of what one weight reads."""

    tokens: int
    """In the cut stream."""
    after: Tensor
    """Mean y y', shape (in, in), float64."""
    cross: Tensor
    """Mean x y'; equal to `after` where tokens cannot be paired, as for experts, which see other tokens then."""
    drift: Tensor | None = None
    """Mean d y', shape (out, in), where d is what the block's output lacks, original minus cut, while this weight is
    still the original; None unless the weight's output is added to the block's."""


def blended(one: dict[str, Inputs], other: dict[str, Inputs], share: float) -> dict[str, Inputs]:
    """Mix what weights read in two texts.

    Args:
        one: By the matrix's name.
        other: Of the same matrices, in another text. Where no token of it reached a weight, `one` stays.
        share: Of the other, from 0 to 1.

    Returns:
        The mixtures.
    """
    found = {}
    for name, mine in one.items():
        its = other[name]
        if not mine.tokens or not its.tokens:
            found[name] = mine if mine.tokens else its
            continue
        drift = None if mine.drift is None or its.drift is None else torch.lerp(mine.drift, its.drift, share)
        after, cross = torch.lerp(mine.after, its.after, share), torch.lerp(mine.cross, its.cross, share)
        found[name] = Inputs(mine.tokens + its.tokens, after, cross, drift)
    return found


class Streams:
    """Both streams at the current block; moves forward one block at a time."""

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, str]], batches: Sequence[Block]):
        """Start at the first block.

        Args:
            model: In evaluation mode, with its original weights from the current block on.
            blocks: (path, path of its list) in the order of execution.
            batches: What the model reads, on its device.
        """
        self.model, self._blocks, self._batches = model, blocks, batches
        self._before = PrefixCache(model, blocks, batches)
        self._after = PrefixCache(model, blocks, batches)
        self._matrices: Sequence[Matrix] = ()
        self._originals: dict[str, Tensor] = {}

    def enter(self, matrices: Sequence[Matrix], originals: dict[str, Tensor]) -> None:
        """Name the matrices of the current block that will be cut, while it still has its original weights.

        Args:
            matrices: Which.
            originals: By the parameter's name, weights that stay as they are whatever is written to the model.
        """
        self._matrices, self._originals = matrices, originals

    def original(self, matrix: Matrix) -> Tensor:
        """Give a matrix of the current block as it was, shape (out, in)."""
        return part_of(self._originals[matrix.parameter], matrix)

    def groups(self) -> list[list[Matrix]]:
        """Divide the matrices of the current block by what they read, in the order in which it is read."""
        order: list[Place] = []
        operands: list[Tensor] = []

        def seen(place: Place, operand: Tensor, _result: Tensor) -> None:
            if place not in order:
                order.append(place)
                operands.append(operand)

        with torch.inference_mode(), Watch(self.model, self._originals, seen):
            self._run(self._after, 0)
        keys: dict[Place, object] = {
            place: place[0] if place[1] is not None else id(operand) for place, operand in zip(order, operands)
        }
        groups: dict[object, list[Matrix]] = {keys[place]: [] for place in order}
        for matrix in self._matrices:  # an expert that no token reached goes with its siblings
            groups.setdefault(keys.get((matrix.parameter, matrix.expert), matrix.parameter), []).append(matrix)
        return [group for group in groups.values() if group]

    def inputs(self, group: Sequence[Matrix]) -> dict[str, Inputs]:
        """Run both streams through the current block, and give the moments of what some matrices read.

        Args:
            group: Of `groups`; what they read depends on no matrix that is still to be cut.

        Returns:
            By the matrix's name.
        """
        places = {(matrix.parameter, matrix.expert) for matrix in group}
        parameters = {matrix.parameter for matrix in group}
        # Of weights that read the very same input, one is enough.
        shared = len(parameters) > 1
        watched = {min(parameters)} if shared else parameters
        sums: dict[Place, tuple[int, Tensor, Tensor]] = {}
        drift: Tensor | None = None
        adds = len(group) == 1 and group[0].expert is None and self._adds_to_output(group[0])
        for index in range(len(self._batches)):
            before, after = {}, {}
            with self._original_weights():
                original = self._observe(self._before, index, watched, before)
            cut = self._observe(self._after, index, watched, after)
            for place, y in after.items():
                x = before.get(place)
                square = (y.T @ y).double()
                paired = place[1] is None and x is not None and x.shape == y.shape
                cross = (x.T @ y).double() if paired and x is not None else square
                tokens, a, b = sums.get(place, (0, torch.zeros_like(square), torch.zeros_like(square)))
                sums[place] = tokens + len(y), a + square, b + cross
                if adds and paired:
                    lacking = _first(original) - _first(cut)
                    part = (lacking.reshape(len(y), -1).to(y.dtype).T @ y).double()
                    drift = part if drift is None else drift + part
        found = {}
        for matrix in group:
            place = (min(watched), None) if shared else (matrix.parameter, matrix.expert)
            assert (matrix.parameter, matrix.expert) in places
            into = matrix.shape[1]
            tokens, square, cross = sums.get(place, (0, torch.zeros(into, into), torch.zeros(into, into)))
            count = max(tokens, 1)
            found[matrix.name] = Inputs(
                tokens, square.double() / count, cross.double() / count, None if drift is None else drift / count
            )
        return found

    def advance(self) -> None:
        """Go on to the next block; the current one has its cut weights."""
        with torch.inference_mode():
            with self._original_weights():
                self._before.advance()
            self._after.advance()
        self._originals, self._matrices = {}, ()

    def _adds_to_output(self, matrix: Matrix) -> bool:
        """Tell, by trying, whether what a weight gives is added to the output of the current block as it is."""
        noise: list[Tensor] = []

        def disturb(_place: Place, _operand: Tensor, result: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(len(noise))
            noise.append(torch.randn(result.shape, generator=generator).to(result) * result.std())
            return result + noise[-1]

        with torch.inference_mode():
            plain = _first(self._run(self._after, 0))
            with Watch(self.model, {matrix.parameter}, disturb):
                moved = _first(self._run(self._after, 0)) - plain
        if len(noise) != 1 or moved.numel() != noise[0].numel():
            return False
        return bool((moved.flatten() - noise[0].flatten()).abs().max() <= 1e-3 * noise[0].abs().max() + 1e-6)

    def _run(self, cache: PrefixCache, index: int) -> Any:
        path, _ = self._blocks[cache.depth]
        return cache.outputs(self.model.get_submodule(path), index)[-1]

    def _observe(self, cache: PrefixCache, index: int, watched: set[str], found: dict[Place, Tensor]) -> Any:
        parts: dict[Place, list[Tensor]] = {}

        def seen(place: Place, operand: Tensor, _result: Tensor) -> None:
            x = operand.reshape(-1, operand.shape[-1])
            parts.setdefault(place, []).append(x.to(torch.promote_types(x.dtype, torch.float32)))

        with torch.inference_mode(), Watch(self.model, watched, seen):
            output = self._run(cache, index)
        found.update({place: torch.cat(each) for place, each in parts.items()})
        return output

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        """Let the current block have its original weights for a while."""
        now = {name: self.model.get_parameter(name).data for name in self._originals}
        for name, original in self._originals.items():
            self.model.get_parameter(name).data = original
        try:
            yield
        finally:
            for name, cut in now.items():
                self.model.get_parameter(name).data = cut


def _first(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or before other things."""
    return output[0] if isinstance(output, (tuple, list)) else output
