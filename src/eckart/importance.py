"""How much each matrix matters to a loss: gradients, cuts, attention patterns, ablated heads, activation outliers.

Everything is measured on the same few batches, so that a matrix has one row in one table. Signs are
those of a change: positive is a loss that rises when something is taken away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eckart.dataflow import evaluating
from eckart.encoding import Encoded
from eckart.layout import Block
from eckart.matrices import ATTENTION_TYPES, Matrix, find_blocks, read, write
from eckart.plan import Edit
from eckart.prefix import run_block
from eckart.results import Gain, Measurement, mean, paired_gain
from eckart.scoring import LOSS_UNIT, Normalize, assemble, score_block
from eckart.sensitivity import predict
from eckart.surgery import make_edit, replacement
from eckart.sweep import Walk, route_of

MEASURES = ("loss_cut", "gradient", "fisher", "outliers", "attention_entropy", "sink_share", "head_loss")
"""What `measure_importance` finds of a matrix, in the order of the tables."""


@dataclass(frozen=True)
class HeadImportance:
    """One attention head: what it looks at, and what the model loses without it."""

    stack: str
    layer: int
    head: int
    entropy: Measurement
    """Of the attention over what a token may see, as a share of the most possible; 0 is one token, 1 all alike."""
    sink_share: Measurement
    """Share of the attention that falls on the first token that can be seen."""
    loss_gain: Gain | None
    """Change of the loss when the head's columns of the output projection are zero; None where they are not known."""


@dataclass(frozen=True)
class Importance:
    """What data says of a model's matrices and heads."""

    matrices: Mapping[str, Mapping[str, Measurement]]
    """Name of a matrix -> measure -> value; one that has no meaning for a matrix is missing."""
    heads: tuple[HeadImportance, ...]
    loss: Measurement
    """Of the model as it is, on the same examples."""


@dataclass(frozen=True)
class Correlation:
    """How alike two measures order the matrices."""

    one: str
    other: str
    value: float
    """Spearman's rank correlation, over matrices that have both."""
    within: float
    """The same of ranks within each type, which differences between types do not feed."""
    count: int
    p_value: float
    """Of `value`, two-sided, against independence."""


def sample(encoded: Encoded, tokens: int) -> Encoded:
    """Keep some blocks of an encoded task, evenly spread.

    Args:
        encoded: From `eckart.scoring.prepare`. Not modified.
        tokens: Read at most so many, padding included; two blocks are kept in any case, for a standard error.

    Returns:
        The same examples in fewer blocks.
    """
    blocks = encoded.blocks
    wanted = max(2, math.floor(tokens / max(1.0, float(np.mean([block.size for block in blocks])))))
    if wanted >= len(blocks):
        return encoded
    chosen = np.linspace(0, len(blocks) - 1, wanted).round().astype(int)
    return replace(encoded, blocks=tuple(blocks[index] for index in dict.fromkeys(chosen.tolist())))


def measure_importance(
    model: nn.Module,
    tokenizer: Any,
    encoded: Encoded,
    matrices: Sequence[Matrix],
    *,
    rho: float = 0.1,
    normalize: Normalize = "none",
    progress: Callable[[str, int, int], None] | None = None,
) -> Importance:
    """Measure how much matrices, and the attention heads of their layers, matter on a task or text.

    Costs one backward pass for all matrices, and for each matrix and each head a pass through what comes after it.

    Args:
        model: A language model in evaluation mode. Its weights are the same, to the bit, afterwards.
        tokenizer: Its tokenizer.
        encoded: The examples, in two blocks or more; see `sample`.
        matrices: Of the model, in any order; fused wholes are left out.
        rho: How deep the cut is whose loss is measured and predicted.
        normalize: As for `eckart.evaluate`.
        progress: Called with what is measured, how many of these are done and how many there are.

    Returns:
        The measures. `loss_cut` is the paired change of the loss when this matrix alone is cut to `rho`; `gradient` its
        first-order prediction and `fisher` the second order; `outliers` the largest activation that the matrix reads,
        in units of their root mean square; the others are those of its layer's heads, on average.
    """
    matrices = [matrix for matrix in matrices if not matrix.whole]
    edits = {matrix.name: make_edit(matrix, rho) for matrix in matrices}
    rows: dict[str, dict[str, Measurement]] = {matrix.name: {} for matrix in matrices}
    with evaluating(model):
        patterns, outliers = _watch(model, encoded, matrices)
        for matrix in matrices:
            if matrix.parameter in outliers:
                rows[matrix.name]["outliers"] = mean(np.array(outliers[matrix.parameter]), "times the rms")
        for prediction in predict(model, encoded, [(matrix, [edits[matrix.name]]) for matrix in matrices]):
            row = rows[prediction.edit.matrix]
            row["gradient"] = prediction.change
            row["fisher"] = Measurement(prediction.guard, math.nan, prediction.change.count, LOSS_UNIT)
        with torch.inference_mode():
            ablation = _Ablation(model, tokenizer, encoded, normalize)
            ordered = sorted(matrices, key=ablation.route.place)
            outputs = [m for m in ordered if m.type == "out_proj" and m.layer is not None]
            found: dict[tuple[str, int], list[Gain]] = {}
            steps, done = len(ordered) + sum(_heads(matrix, patterns) for matrix in outputs), 0
            for matrix in ordered:
                original = read(model, matrix)
                rows[matrix.name]["loss_cut"] = ablation.gain(matrix, original, _cut(original, edits[matrix.name]))
                done = _tell(progress, done, steps)
                if matrix in outputs:
                    count = _heads(matrix, patterns)
                    gains = found.setdefault((matrix.stack, matrix.layer or 0), [])
                    for head in range(count):
                        gains.append(ablation.gain(matrix, original, _without_head(original, head, count)))
                        done = _tell(progress, done, steps)
    heads = tuple(
        _head(place, head, seen, found.get(place, []))
        for place, one in patterns.items()
        for head, seen in enumerate(one)
    )
    for matrix in matrices:
        of_layer = [head for head in heads if (head.stack, head.layer) == (matrix.stack, matrix.layer)]
        if matrix.type in ATTENTION_TYPES and of_layer:
            rows[matrix.name] |= _mean_head(of_layer)
    return Importance(rows, heads, ablation.loss)


def correlate(table: Mapping[str, Sequence[float]], types: Sequence[str]) -> tuple[Correlation, ...]:
    """Compare how measures order matrices.

    Args:
        table: Measure -> its value for each matrix, NaN where it has none; all of one length.
        types: Type of each matrix.

    Returns:
        One entry a pair of measures that five matrices or more have both, in the order of the table.

    Source:
        Spearman 1904; scipy's `spearmanr`, with average ranks for ties.
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in table.items()}
    kinds = np.asarray(types)
    found = []
    names = list(columns)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            x, y = columns[one], columns[other]
            both = np.isfinite(x) & np.isfinite(y)
            if both.sum() < 5 or len(np.unique(x[both])) < 2 or len(np.unique(y[both])) < 2:
                continue
            x, y, kind = x[both], y[both], kinds[both]
            result: Any = stats.spearmanr(x, y)
            within = _correlation(_ranks_within(x, kind), _ranks_within(y, kind))
            found.append(
                Correlation(one, other, float(result.statistic), within, int(both.sum()), float(result.pvalue))
            )
    return tuple(found)


def _ranks_within(values: NDArray[np.float64], kinds: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks among matrices of one type, centred, as a share of their number."""
    ranks = np.zeros(len(values))
    for kind in np.unique(kinds):
        here = kinds == kind
        ranks[here] = (stats.rankdata(values[here]) - (here.sum() + 1) / 2) / here.sum()
    return ranks


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    scale = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / scale if scale > 0 else math.nan


def _tell(progress: Callable[[str, int, int], None] | None, done: int, steps: int) -> int:
    if progress is not None:
        progress("losses without a matrix or a head", done + 1, steps)
    return done + 1


def _cut(weight: Tensor, edit: Edit) -> Tensor:
    return replacement(weight, edit)


def _without_head(weight: Tensor, head: int, heads: int) -> Tensor:
    """An output projection that does not read one head."""
    changed = weight.clone()
    width = weight.shape[1] // heads
    changed[:, head * width : (head + 1) * width] = 0
    return changed


def _heads(matrix: Matrix, patterns: Mapping[tuple[str, int], Sequence[Any]]) -> int:
    """How many heads an output projection reads; 0 where they do not divide its columns."""
    heads = len(patterns.get((matrix.stack, matrix.layer or 0), ()))
    return heads if heads and matrix.shape[1] % heads == 0 else 0


class _Ablation:
    """Losses of a model with one matrix replaced, against those of the model as it is."""

    def __init__(self, model: nn.Module, tokenizer: Any, encoded: Encoded, normalize: Normalize):
        self.model, self.tokenizer, self.encoded = model, tokenizer, encoded
        self.normalize: Normalize = normalize
        self.route = route_of(model)
        self.walk = Walk(model, self.route, encoded, range(len(encoded.blocks)))
        self.before = self._losses(lambda index: run_block(model, encoded.blocks[index]))
        self.loss = mean(self.before, LOSS_UNIT)

    def gain(self, matrix: Matrix, original: Tensor, weight: Tensor) -> Gain:
        """Change of the loss with `weight` in the place of a matrix that is not before the last one asked for."""
        self.walk.to(matrix)
        try:
            write(self.model, matrix, weight)
            return paired_gain(self.before, self._losses(self.walk.forward), LOSS_UNIT)
        finally:
            write(self.model, matrix, original)

    def _losses(self, forward: Callable[[int], Any]) -> NDArray[np.float64]:
        parts = {
            index: score_block(
                self.model, self.tokenizer, self.encoded, index, normalize=self.normalize, forward=forward
            )
            for index in range(len(self.encoded.blocks))
        }
        return assemble(self.encoded, parts).loss


# Attention patterns and activations, from one pass.


@dataclass
class _HeadSeen:
    """Per block of examples: mean over the scored positions."""

    entropy: list[float]
    sink: list[float]


def _head(place: tuple[str, int], head: int, seen: _HeadSeen, gains: Sequence[Gain]) -> HeadImportance:
    return HeadImportance(
        *place,
        head,
        mean(np.array(seen.entropy), "of the most possible"),
        mean(np.array(seen.sink), "fraction"),
        gains[head] if gains else None,
    )


def _mean_head(heads: Sequence[HeadImportance]) -> dict[str, Measurement]:
    """A layer's heads on average; their errors are not independent, so the largest is the error."""

    def average(ones: Sequence[Measurement]) -> Measurement:
        values, errors = [one.value for one in ones], [one.stderr for one in ones]
        return Measurement(float(np.mean(values)), max(errors), ones[0].count, ones[0].unit)

    found = {
        "attention_entropy": average([head.entropy for head in heads]),
        "sink_share": average([head.sink_share for head in heads]),
    }
    gains = [head.loss_gain for head in heads if head.loss_gain is not None]
    return found | ({"head_loss": average(gains)} if gains else {})


def _watch(
    model: nn.Module, encoded: Encoded, matrices: Sequence[Matrix]
) -> tuple[dict[tuple[str, int], list[_HeadSeen]], dict[str, list[float]]]:
    """Read what each head attends to and how large the largest activations are, block after block."""
    patterns: dict[tuple[str, int], list[_HeadSeen]] = {}
    outliers: dict[str, list[float]] = {}
    with torch.inference_mode():
        for block in encoded.blocks:
            watch = _AttentionWatch(block)
            with _activations(model, {m.parameter for m in matrices}) as largest, _telling(model, watch), watch:
                run_block(model, block)
            for name, value in largest.items():
                outliers.setdefault(name, []).append(value)
            for place, (entropy, sink) in watch.means().items():
                heads = patterns.setdefault(place, [_HeadSeen([], []) for _ in entropy])
                for seen, one, other in zip(heads, entropy, sink):
                    seen.entropy.append(one)
                    seen.sink.append(other)
    return patterns, outliers


@contextmanager
def _activations(model: nn.Module, parameters: set[str]) -> Iterator[dict[str, float]]:
    """Note the largest magnitude that each weight's module reads, over its root mean square."""
    found: dict[str, float] = {}

    def reading(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].numel():
                x = args[0].float()
                rms = float(x.square().mean().sqrt())
                if rms > 0:
                    found[name] = max(found.get(name, 0.0), float(x.abs().max()) / rms)

        return hook

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(reading(name))
        for name in sorted(parameters)
        if name.endswith(".weight")
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _telling(model: nn.Module, watch: _AttentionWatch) -> Iterator[None]:
    """Tell the watch which block of the model runs."""

    def entering(place: tuple[str, int] | None) -> Any:
        def hook(*_: Any) -> None:
            watch.place = place

        return hook

    handles = []
    for path, stack, index in find_blocks(model):
        block = model.get_submodule(path)
        handles += [
            block.register_forward_pre_hook(entering((stack, index))),
            block.register_forward_hook(entering(None)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _AttentionWatch(TorchFunctionMode):
    """Reads attention probabilities while a model runs, at the positions of one batch that are scored."""

    def __init__(self, block: Block):
        super().__init__()
        self.place: tuple[str, int] | None = None
        self._rows, self._columns = block.rows, block.columns
        inputs = block.inputs
        self._tokens = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
        self._found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention" and self.place is not None:
            self._take(*_scores(*args, **kwargs))
        result = function(*args, **kwargs)
        if name == "softmax" and self.place is not None and isinstance(result, Tensor) and result.ndim == 4:
            self._take(result.float(), result > 0)
        return result

    def _take(self, probabilities: Tensor, visible: Tensor) -> None:
        if (probabilities.shape[0], probabilities.shape[2]) != tuple(self._tokens):
            return  # an encoder's, or of a pass that is not scored
        chosen = probabilities[self._rows, :, self._columns]  # position, head, key
        seen = visible.expand_as(probabilities)[self._rows, :, self._columns]
        count = seen.sum(-1)
        some = count[:, 0] > 1  # of one token, all attention is on it
        if not bool(some.any()):
            return
        chosen, seen, count = chosen[some], seen[some], count[some]
        entropy = torch.special.entr(chosen).sum(-1) / count.float().log()
        first = seen.float().argmax(-1, keepdim=True)
        sink = chosen.gather(-1, first)[..., 0]
        assert self.place is not None
        self._found.setdefault(self.place, []).append((entropy.mean(0).cpu(), sink.mean(0).cpu()))

    def means(self) -> dict[tuple[str, int], tuple[list[float], list[float]]]:
        """Per layer: mean entropy and mean share of the sink of each head, over the attentions of the layer."""
        return {
            place: (
                torch.stack([entropy for entropy, _ in calls]).mean(0).tolist(),
                torch.stack([sink for _, sink in calls]).mean(0).tolist(),
            )
            for place, calls in self._found.items()
        }


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The probabilities that scaled dot-product attention weighs values with, and which keys a query may see."""
    query, key = query.float(), key.float()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        visible = visible.tril()
    visible = visible.expand_as(scores)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            scores = scores + attn_mask
            visible = visible & (attn_mask > torch.finfo(attn_mask.dtype).min / 2)
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(), visible
