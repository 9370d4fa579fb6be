"""Predict what every edit of a grid will do to the loss, from one backward pass.

Removing singular component i of W changes the loss by about -sigma_i * u_i' (dL/dW) v_i, and removals add up, so
one gradient of a matrix predicts all its ranks. Where blocks of rows are cut, the same holds of the components of
every block, and blocks add up too: all of it is <dL/dW, W' - W>. The second order is a Fisher term: half the mean
square of the predicted change of single examples.

Source: the idea, one gradient of each matrix's singular values on about 100 examples, is that of "Compress to
Impress" (arXiv 2510.20800), whose text and code we could not read: the sums over components, the standard error
over blocks of examples and the Fisher term are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.clustering import Cluster
from eckart.dataflow import only_gradients_of
from eckart.encoding import Block, Encoded
from eckart.layout import runs_within
from eckart.matrices import Matrix, part_of, read
from eckart.plan import Edit
from eckart.prefix import run_block
from eckart.results import Measurement
from eckart.scoring import LOSS_UNIT, only_positions
from eckart.surgery import components, decomposition, decomposition_key
from eckart.truncation import Spectrum

SPECTRA_BYTES = 2**30


@dataclass(frozen=True)
class Prediction:
    """What an edit is expected to do to the mean loss of the examples."""

    edit: Edit
    change: Measurement
    """First order, with its standard error over blocks of examples."""
    guard: float
    """Second order, never negative, in the same unit; 0 where it was not asked for."""

    @property
    def total(self) -> float:
        """The predicted change of the loss, both orders."""
        return self.change.value + self.guard


@dataclass(frozen=True)
class _Piece:
    """One matrix with those of its edits that share a decomposition."""

    matrix: Matrix
    edits: tuple[Edit, ...]

    def bytes_of_spectra(self, itemsize: int) -> int:
        """At most so many are held for its decomposition, however its rows are clustered."""
        (out, into), blocks = self.matrix.shape, self.edits[0].blocks
        return itemsize * (out * (into + 1) + min(out * out, blocks * into * into))


def predict(
    model: nn.Module,
    encoded: Encoded,
    grid: Sequence[tuple[Matrix, Sequence[Edit]]],
    *,
    guard: Literal["fisher", "none"] = "fisher",
    spectra_bytes: int = SPECTRA_BYTES,
) -> tuple[Prediction, ...]:
    """Predict the change of the loss for every edit of a grid.

    Costs one decomposition of every matrix for each way of dividing its rows, and one forward and one backward pass
    over the examples for each group of matrices whose decompositions fit `spectra_bytes`; gradients are held one
    matrix at a time.

    Args:
        model: In evaluation mode. Not modified; its `requires_grad` flags are as before afterwards.
        encoded: The examples, in several blocks; a standard error needs two.
        grid: Each matrix with its edits: low rank or shrink, basis top, or zero.
        guard: Second order: `fisher`, or `none` to trust the first alone.
        spectra_bytes: Most bytes of decompositions held at once; one matrix by itself may take more.

    Returns:
        One prediction an edit, in the order of the grid.
    """
    found: dict[Edit, Prediction] = {}
    sizes = np.array([len(block.examples) for block in encoded.blocks], dtype=np.float64)
    tokens = float(np.mean(encoded.tokens))
    for pieces in _groups(model, grid, spectra_bytes):
        with torch.inference_mode(False), torch.no_grad():
            clusters = [decomposition(read(model, piece.matrix), piece.edits[0]) for piece in pieces]
        by_block: list[list[NDArray[np.float64]]] = [[] for _ in pieces]
        for block in encoded.blocks:
            for number, share in enumerate(_shares(model, encoded, _own(block), pieces, clusters)):
                by_block[number].append(share)
        for piece, parts, shares in zip(pieces, clusters, by_block):
            # Row b: what every component of every cluster adds to block b's losses, to the first order.
            table = np.array(shares)
            for edit in piece.edits:
                lost = np.concatenate([_lost(cluster.spectrum, edit) for cluster in parts])
                change, square = _mean_and_square(-(table @ lost), sizes)
                found[edit] = Prediction(edit, change, 0.5 * tokens * square if guard == "fisher" else 0.0)
    return tuple(found[edit] for _, edits in grid for edit in edits)


def _lost(spectrum: Spectrum, edit: Edit) -> NDArray[np.float64]:
    """For every component, the share of its singular value that an edit takes away."""
    lost = np.ones(len(spectrum.S))
    if edit.kind != "zero":
        before, after = spectrum.S.double().cpu().numpy(), components(spectrum, edit).S.double().cpu().numpy()
        before = before[: len(after)]
        lost[: len(after)] = np.where(before > 0, 1 - after / np.where(before > 0, before, 1.0), 0.0)
    return lost


def _groups(
    model: nn.Module, grid: Sequence[tuple[Matrix, Sequence[Edit]]], spectra_bytes: int
) -> Iterator[list[_Piece]]:
    """Divide a grid into runs whose decompositions fit into memory together."""
    pieces: list[_Piece] = []
    for matrix, edits in grid:
        shared: dict[tuple[int, ...], list[Edit]] = {}
        for edit in edits:
            shared.setdefault(decomposition_key(edit), []).append(edit)
        pieces += [_Piece(matrix, tuple(alike)) for alike in shared.values()]

    def size_of(piece: _Piece) -> int:
        dtype = torch.promote_types(model.get_parameter(piece.matrix.parameter).dtype, torch.float32)
        return piece.bytes_of_spectra(dtype.itemsize)

    return runs_within(pieces, size_of, spectra_bytes)


def _mean_and_square(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[Measurement, float]:
    """From sums over blocks: the mean over examples with its standard error, and the mean square of an example."""
    count, blocks = int(sizes.sum()), len(sizes)
    average = float(sums.sum() / count)
    residuals = sums - sizes * average
    if blocks < 2:
        return Measurement(average, math.nan, count, LOSS_UNIT), average**2
    stderr = math.sqrt(float((residuals**2).sum()) * blocks / (blocks - 1)) / count
    # A block's sum varies as many times as much as one example as the block has examples.
    variance = float((residuals**2 / sizes).sum()) / (blocks - 1)
    return Measurement(average, stderr, count, LOSS_UNIT), average**2 + variance


def _shares(
    model: nn.Module,
    encoded: Encoded,
    block: Block,
    pieces: Sequence[_Piece],
    clusters: Sequence[Sequence[Cluster]],
) -> list[NDArray[np.float64]]:
    """For every piece, sigma_i * u_i' (dL/dW) v_i of all components of its clusters, L the block's summed loss."""
    found = [np.zeros(sum(len(cluster.spectrum.S) for cluster in parts)) for parts in clusters]
    by_parameter: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        by_parameter.setdefault(piece.matrix.parameter, []).append(number)

    def take(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for number in by_parameter[name]:
                part = part_of(gradient, pieces[number].matrix)
                found[number] = np.concatenate([_share(part, cluster) for cluster in clusters[number]])
            parameter.grad = None

        return hook

    with torch.inference_mode(False), torch.enable_grad(), only_gradients_of(model, by_parameter):
        handles = [model.get_parameter(name).register_post_accumulate_grad_hook(take(name)) for name in by_parameter]
        try:
            _summed_loss(model, encoded, block).backward()
        finally:
            for handle in handles:
                handle.remove()
    return found


def _share(gradient: Tensor, cluster: Cluster) -> NDArray[np.float64]:
    spectrum = cluster.spectrum
    rows = gradient[cluster.rows.to(gradient.device)].to(spectrum.U.dtype)
    slopes = ((spectrum.U.mT @ rows) * spectrum.Vh).sum(1)
    return (slopes.double() * spectrum.S.double()).cpu().numpy()


def _summed_loss(model: nn.Module, encoded: Encoded, block: Block) -> Tensor:
    """Sum over the block's examples of the loss of the right answer, per token of it."""
    with only_positions(model, block.rows, block.columns) as logits_of:
        logits = logits_of(run_block(model, block)).float()
    tokens = logits[block.position, block.target] - logits.logsumexp(-1)[block.position]
    weights = torch.zeros(sum(block.choices), device=logits.device)
    start = 0
    for index, choices in zip(block.examples, block.choices):
        # Where only the right answer is there, it is the first.
        answer = encoded.task.examples[index].answer if choices > 1 else 0
        assert isinstance(answer, int)
        weights[start + answer] = 1 / encoded.tokens[index]
        start += choices
    return -(tokens * weights[block.sequence]).sum()


def _own(block: Block) -> Block:
    """Copy a block's tensors, since those made in inference mode cannot take part in a backward pass."""
    with torch.inference_mode(False):
        return block.mapped(torch.clone)
