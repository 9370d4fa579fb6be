"""Low-rank repair: weights rounded to few bits, and beside each a correction of low rank that makes up for most of it.

Nothing is trained. Notation: W is a weight of shape (out, in), Q what it is rounded to, A the second moments of its
inputs, G those of the gradients at its outputs. Of all B A' of rank r, the one taken makes Q + B A' closest to W in the
metric of both, as `eckart.weighting` has it; `up` is B and `down` A'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.calibration import Moments, collect, each_expert, encode_windows, readings
from eckart.dataflow import evaluating, low_rank_layers
from eckart.encoding import context_length, model_kind
from eckart.errors import ModelError, TaskError
from eckart.matrices import Matrix, output_embeddings, read, write
from eckart.onnx_graph import FINE, block_of, packed_bytes, rounded
from eckart.recipe import RecoverSettings
from eckart.results import Gain, Measurement, paired_gain
from eckart.scoring import LOSS_UNIT
from eckart.spill import Spill
from eckart.surgery import weights_sha256
from eckart.tasks import Task
from eckart.training import MOMENT_WINDOWS, Progress, Windows, make_windows, measured, spread, window_losses
from eckart.weighting import Root, decompose_weighted, square_root

OUTPUT_SHRINKAGE = 0.1
"""Share of the identity in the metric of the outputs, whose gradients are drawn."""


@dataclass(frozen=True)
class RepairedWeight:
    """A weight as integers with scales, and its correction."""

    rounded: Tensor
    """Q, shape (out, in), float32."""
    up: Tensor
    """Shape (out, r), float32; its columns have one norm, so that those which later share a scale are alike."""
    down: Tensor
    """Shape (r, in), float32."""
    before: float
    """Squared error in the metric of rounding W alone, as a share of the square of W."""
    after: float
    """The same of Q and the correction."""


@dataclass(frozen=True)
class Correction:
    """What lies beside one weight, and what it does."""

    up: Tensor
    down: Tensor
    before: float
    """As of `RepairedWeight`."""
    after: float


@dataclass(frozen=True)
class Repair:
    """What came of a repair."""

    corrections: dict[str, Correction]
    """Module's path -> what is added to its weight."""
    test: dict[str, dict[str, Measurement]]
    """`before`, `rounded` and `after` on windows that took no part: `loss` and `perplexity`."""
    gain: Gain
    """Loss of the repaired model minus that of the rounded one, paired by windows; negative is better."""
    dense_gain: Gain
    """Loss of the repaired model minus that of the model as it was."""
    bytes: dict[str, int]
    """What the weights take: `dense`, as they were stored; `rounded`; `corrections` beside them, at 8 bits."""
    windows: dict[str, int]
    """Of the text: `calibration` and `test`."""


def repair_weight(
    weight: Tensor, rank: int, bits: int, left: Root | None = None, right: Root | None = None, *, rounds: int = 1
) -> RepairedWeight:
    """Round a weight, and find the best correction of low rank.

    The first round takes the rounding of W, and the optimum beside it. Every further one rounds W without the last
    correction, so that the integers have less to say; the best round is kept.

    Args:
        weight: W, shape (out, in). Not modified. What is rounded is given in its dtype first, so that scales that are
            stored in it are those of the integers.
        rank: r, at most min(out, in).
        bits: 8, 4 or 2.
        left: Root of G; None for the identity.
        right: Root of A; None for the identity.
        rounds: At least 1.

    Returns:
        On the CPU.

    Source:
        With `right` alone and one round QERA-exact (arXiv 2410.06040, eq. 7), which is EoRA's optimum (arXiv
        2410.21271); with a diagonal one QERA-approx and LQER (2402.02446). The metric of the outputs is added here.
        The alternation is LoftQ's (2310.08659), which measures errors in the weights, where it need not help.

    >>> found = repair_weight(torch.tensor([[7.0, 0.4], [1.0, 7.0]]), 1, 4)
    >>> found.after < found.before
    True
    """
    exact = weight.detach().double()
    energy = max(float(_in_metric(exact, left, right).square().sum()), 1e-300)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    correction, before = torch.zeros_like(exact), 0.0
    for number in range(rounds):
        target = (exact - correction).to(weight.dtype)
        Q = round_weight(target, bits)
        spectrum = decompose_weighted(exact - Q, left, right)
        squares = spectrum.S.square()
        error = float(squares[rank:].sum()) / energy
        if not number:
            before = float(squares.sum()) / energy
        up, down = spectrum.factors(rank)
        correction = up @ down
        if best is None or error < best[0]:
            best = error, Q, up, down
    assert best is not None
    error, Q, up, down = best
    norms = up.norm(dim=0)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    up, down = (up / norms).float(), (norms[:, None] * down).float()
    return RepairedWeight(Q.cpu(), up.cpu().contiguous(), down.cpu().contiguous(), before, error)


def _in_metric(weight: Tensor, left: Root | None, right: Root | None) -> Tensor:
    weight = weight if left is None else left.before(weight)
    return weight if right is None else right.after(weight)


def roots_of(moments: Moments) -> tuple[Root | None, Root]:
    """Make the roots of the metric that a weight is repaired in.

    Args:
        moments: Of the weight; without gradients the metric is that of the inputs.

    Returns:
        Those of G, if it was measured, and of A.
    """
    left = None if moments.gradients is None else square_root(moments.gradients, shrinkage=OUTPUT_SHRINKAGE)
    return left, square_root(moments.inputs)


def repair(
    model: nn.Module,
    tokenizer: Any,
    text: Task,
    settings: RecoverSettings,
    *,
    stored: torch.dtype | None = None,
    spill: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Repair:
    """Round the weights of a model as `eckart export` does, and correct each by low rank.

    Linear layers get `bits`, embeddings (and a head tied to them) 8, as in an exported file. What the weights see of
    the text is that of the model as it was.

    Args:
        model: A dense causal language model. Modified: its weights are rounded.
        tokenizer: Its tokenizer.
        text: Documents; some are read, others, which took no part, prove.
        settings: `bits`, `rank`, `rounds`, `window`, `held_out`, `batch_tokens` and `seed`.
        stored: Dtype in which the rounded weights will be stored; by default the model's own.
        spill: Folder for what is finished; where it holds an unfinished repair of the same, that goes on.
        progress: Called before each weight.

    Returns:
        The corrections, and what was measured.

    Raises:
        ModelError: The model is factored or not causal, or onnxruntime is not installed.
        TaskError: The text is too short.
        OutputError: `spill` holds other work.
    """
    linear = check_repairable(model, tokenizer, settings)
    tell = progress or (lambda _: None)
    windows = make_windows(text, tokenizer, settings, context_length(model, tokenizer))
    if not len(windows.test):
        raise TaskError(
            f"{text.name} has no whole window that proves. Some documents calibrate, others prove. "
            "Give more text, or a shorter --window."
        )
    stored = stored or next(model.parameters()).dtype
    work = Spill(spill)
    about = {"weights": weights_sha256(model), "text": text.sha256, "eckart": version("eckart")}
    work.check(about | {"settings": json.loads(settings.model_dump_json())})
    with evaluating(model):
        losses = {"before": _losses(model, windows, settings)}
        _spill_repaired(
            model, tokenizer, text, spread(windows.train, MOMENT_WINDOWS), linear, settings, stored, work, tell
        )
        tell(Progress("measuring", 0, 2))
        size = {"dense": sum(weight.numel() for weight in model.parameters()) * stored.itemsize}
        size["rounded"] = _round_(model, linear, settings.bits, stored)
        losses["rounded"] = _losses(model, windows, settings)
        tell(Progress("measuring", 1, 2))
        corrections = {}
        for matrix in linear:
            kept = _kept(work, matrix)
            corrections[matrix.name] = Correction(kept["up"], kept["down"], *kept["errors"].tolist())
            write(model, matrix, kept["rounded"].float() + kept["up"] @ kept["down"])
        losses["after"] = _losses(model, windows, settings)
        for matrix in linear:
            write(model, matrix, _kept(work, matrix)["rounded"])
    size["corrections"] = sum(
        packed_bytes((part.shape[0], part.shape[1]), FINE) for c in corrections.values() for part in (c.up, c.down)
    )
    return Repair(
        corrections,
        {name: measured(each, settings.window) for name, each in losses.items()},
        paired_gain(losses["rounded"], losses["after"], LOSS_UNIT, seed=settings.seed),
        paired_gain(losses["before"], losses["after"], LOSS_UNIT, seed=settings.seed),
        size,
        {"calibration": min(len(windows.train), MOMENT_WINDOWS), "test": len(windows.test)},
    )


def check_repairable(model: nn.Module, tokenizer: Any, settings: RecoverSettings) -> list[Matrix]:
    """Check that a model can be rounded and repaired, and list the weights of its linear layers.

    Args:
        model: As for `repair`. Not modified.
        tokenizer: Its tokenizer.
        settings: As for `repair`.

    Returns:
        The weights, but for those tied to an embedding; named after their modules.

    Raises:
        ModelError: It cannot.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise ModelError(
            "onnxruntime is not installed. Weights are rounded by its code, as exported files are. "
            "Install it: pip install 'eckart[export]'."
        ) from None
    if low_rank_layers(model):
        raise ModelError(
            f"{type(model).__name__} has low-rank layers. Method 'repair' corrects the rounding of dense weights. "
            "Give the dense model; factors are rounded by eckart export --quantize."
        )
    if model_kind(model, tokenizer) != "causal":
        raise ModelError(
            f"{type(model).__name__} does not predict the next token. Its loss on text is the metric of the repair. "
            "Repair a causal language model."
        )
    tied = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    linear = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tied and module.weight.numel():
            transposed = isinstance(module, Conv1D)
            out, into = reversed(module.weight.shape) if transposed else module.weight.shape
            linear.append(Matrix(path, f"{path}.weight", (out, into), "", None, "other", transposed))
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layers of its own. Their weights are what is rounded. "
            "Give another model."
        )
    return linear


def _losses(model: nn.Module, windows: Windows, settings: RecoverSettings) -> NDArray[np.float64]:
    """Mean loss of each window that proves."""
    return window_losses(model, windows.test.split(max(1, settings.batch_tokens // settings.window)))


def _spill_repaired(
    model: nn.Module,
    tokenizer: Any,
    text: Task,
    rows: Tensor,
    linear: Sequence[Matrix],
    settings: RecoverSettings,
    stored: torch.dtype,
    work: Spill,
    tell: Callable[[Progress], None],
) -> None:
    """Spill Q and the correction of every weight; the model stays as it is."""
    encoded = encode_windows(rows.tolist(), text, tokenizer, batch_tokens=settings.batch_tokens)
    missing = [matrix for matrix in linear if work.tensors(matrix.name) is None]
    done = len(linear) - len(missing)
    # The outputs of a head are as many as the vocabulary; squared, their gradients fit no memory.
    head = output_embeddings(model)
    ends = [matrix for matrix in missing if model.get_submodule(matrix.name) is head]
    inner = [matrix for matrix in missing if matrix not in ends]
    groups = readings(model, inner, lambda matrix: [matrix])
    for group, gradients in [*((group, True) for group in groups), *(([end], False) for end in ends)]:
        tell(Progress("reading", done, len(linear)))
        with each_expert(model):
            moments = collect(model, encoded, group, gradients=gradients, seed=settings.seed)
        for matrix in group:
            tell(Progress("repairing", done, len(linear)))
            weight = read(model, matrix).to(stored)
            roots = roots_of(moments.pop(matrix.name))
            rank = min(settings.rank, matrix.rank)
            found = repair_weight(weight, rank, settings.bits, *roots, rounds=settings.rounds)
            errors = torch.tensor([found.before, found.after], dtype=torch.float64)
            kept = {"rounded": found.rounded.to(stored), "up": found.up, "down": found.down, "errors": errors}
            work.keep(matrix.name, kept)
            done += 1


def _kept(work: Spill, matrix: Matrix) -> dict[str, Tensor]:
    found = work.tensors(matrix.name)
    assert found is not None
    return found


def _round_(model: Any, linear: Sequence[Matrix], bits: int, stored: torch.dtype) -> int:
    """Round every weight of a linear layer, and the table of tokens; give the bytes of all parameters then."""
    total = sum(weight.numel() for weight in model.parameters()) * stored.itemsize
    for matrix in linear:
        weight = read(model, matrix)
        write(model, matrix, round_weight(weight, bits).to(stored))
        total += packed_bytes(matrix.shape, bits) - weight.numel() * stored.itemsize
    table = model.get_input_embeddings().weight
    if table.ndim == 2 and block_of(table.shape[1], FINE, table=True) is not None:
        table.data.copy_(round_weight(table.detach(), FINE, table=True).to(stored))
        total += packed_bytes((table.shape[0], table.shape[1]), FINE) - table.numel() * stored.itemsize
    return total


def round_weight(weight: Tensor, bits: int, *, table: bool = False) -> Tensor:
    """Round a weight as `eckart export` does.

    Args:
        weight: Shape (out, in). Not modified.
        bits: 8, 4 or 2.
        table: It is looked up by token.

    Returns:
        The same shape, float32, on the device of `weight`.
    """
    rows = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(rounded(rows, bits, table=table))).to(weight.device)
