"""Predict what every edit of a grid will do to the loss, from one backward pass.

Removing singular component i of W changes the loss by about -sigma_i * u_i' (dL/dW) v_i, and removals add up, so
one gradient of a matrix predicts all its ranks. The second order is a Fisher term: half the mean square of the
predicted change of single examples.

Source: the idea, one gradient of each matrix's singular values on about 100 examples, is that of "Compress to
Impress" (arXiv 2510.20800), whose text and code we could not read: the sums over components, the standard error
over blocks of examples and the Fisher term are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart import truncation
from eckart.dataflow import only_gradients_of
from eckart.encoding import Block, Encoded
from eckart.matrices import Matrix, part_of, read
from eckart.plan import Edit
from eckart.prefix import run_block
from eckart.results import Measurement
from eckart.scoring import LOSS_UNIT, only_positions
from eckart.truncation import Spectrum


@dataclass(frozen=True)
class Prediction:
    """What an edit is expected to do to the mean loss of the examples."""

    edit: Edit
    change: Measurement
    """First order, with its standard error over blocks of examples."""
    guard: float
    """Second order, never negative, in the same unit."""

    @property
    def total(self) -> float:
        """The predicted change of the loss, both orders."""
        return self.change.value + self.guard


def predict(
    model: nn.Module, encoded: Encoded, grid: Sequence[tuple[Matrix, Sequence[Edit]]]
) -> tuple[Prediction, ...]:
    """Predict the change of the loss for every edit of a grid.

    Costs one forward and one backward pass over the examples and one decomposition of every matrix, whose factors
    are all held at once; gradients are held one matrix at a time.

    Args:
        model: In evaluation mode. Not modified; its `requires_grad` flags are as before afterwards.
        encoded: The examples, in several blocks; a standard error needs two.
        grid: Each matrix with its edits: low rank, basis top, or zero.

    Returns:
        One prediction an edit, in the order of the grid.
    """
    matrices = [matrix for matrix, _ in grid]
    with torch.inference_mode(False), torch.no_grad():
        spectra = [truncation.decompose(read(model, matrix)) for matrix in matrices]
    slopes: list[list[NDArray[np.float64]]] = [[] for _ in matrices]
    for block in encoded.blocks:
        for number, slope in enumerate(_slopes(model, encoded, _own(block), matrices, spectra)):
            slopes[number].append(slope)
    sizes = np.array([len(block.examples) for block in encoded.blocks], dtype=np.float64)
    tokens = float(np.mean(encoded.tokens))
    found = []
    for (_, edits), spectrum, by_block in zip(grid, spectra, slopes):
        # Row b: the summed change of block b's losses if the components from i on are removed, for every i.
        sums = -np.array(by_block) * spectrum.S.double().cpu().numpy()
        tails = np.concatenate([np.cumsum(sums[:, ::-1], axis=1)[:, ::-1], np.zeros((len(sums), 1))], axis=1)
        for edit in edits:
            change, square = _mean_and_square(tails[:, edit.rank], sizes)
            found.append(Prediction(edit, change, 0.5 * tokens * square))
    return tuple(found)


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


def _slopes(
    model: nn.Module, encoded: Encoded, block: Block, matrices: Sequence[Matrix], spectra: Sequence[Spectrum]
) -> list[NDArray[np.float64]]:
    """For every matrix, the derivative of the block's summed loss by each singular value."""
    found: list[NDArray[np.float64]] = [np.zeros(spectrum.S.numel()) for spectrum in spectra]
    by_parameter: dict[str, list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_parameter.setdefault(matrix.parameter, []).append(number)

    def take(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for number in by_parameter[name]:
                spectrum = spectra[number]
                part = part_of(gradient, matrices[number]).to(spectrum.U.dtype)
                found[number] = ((spectrum.U.mT @ part) * spectrum.Vh).sum(1).double().cpu().numpy()
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


def _summed_loss(model: nn.Module, encoded: Encoded, block: Block) -> Tensor:
    """Sum over the block's examples of the loss of the right answer, per token of it."""
    with only_positions(model, block.rows, block.columns) as logits_of:
        logits = logits_of(run_block(model, block)).float()
    tokens = logits[block.position, block.target] - logits.logsumexp(-1)[block.position]
    weights = torch.zeros(sum(block.choices), device=logits.device)
    start = 0
    for index, choices in zip(block.examples, block.choices):
        answer = encoded.task.examples[index].answer if encoded.task.kind == "choice" else 0
        assert isinstance(answer, int)
        weights[start + answer] = 1 / encoded.tokens[index]
        start += choices
    return -(tokens * weights[block.sequence]).sum()


def _own(block: Block) -> Block:
    """Copy a block's tensors, since those made in inference mode cannot take part in a backward pass."""
    with torch.inference_mode(False):
        return block.mapped(torch.clone)
