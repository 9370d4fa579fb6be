"""Fewer neurons: which an MLP can lose, and what its weights become without them. Tensors in, tensors out.

A neuron is a row of the first weights of an MLP (gate and up) and the column of the last one (down) that reads it.
Those that stay are as they were, so nothing is lost before the last weight, and that makes up for the others by what
it can tell of them from those that stay. The smaller weights can then have a low rank, too.

Dimensions of heads are neurons of an attention: rows of the value weight and columns of the output weight, a column for
each query head that reads the row, once both are turned into a basis in which few matter (`eckart.heads`).

Notation: W, shape (out, n), reads n neurons whose second moment is C; S are the columns that stay; G is the metric of
W's outputs. The best weight that reads S alone is W C[:, S] C[S, S]^-1, and what it loses is
tr(G W (C - C[:, S] C[S, S]^-1 C[S, :]) W').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eckart import allocate
from eckart.allocate import Curve, Level
from eckart.heads import columns_of, turned, turning
from eckart.weighting import decompose_weighted, square_root

WIDTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the neurons at which a low rank of what is left is looked at."""
ROUNDS = 256
"""Most rounds in which neurons are removed: as many at once as this asks for."""


@dataclass(frozen=True)
class Cut:
    """What stays of an MLP, or of values and outputs."""

    width: int
    """Neurons, or dimensions of all heads."""
    ranks: tuple[int, ...]
    """Of each weight, the last one last."""
    costs: tuple[float, ...]
    """Of each weight."""


def order_of_removal(
    weighted: Tensor, moment: Tensor, *, columns: Tensor | None = None, rounds: int = ROUNDS
) -> Tensor:
    """Order neurons so that the first can be missed best, each given that those before it are gone.

    Args:
        weighted: R' W with G = R R', shape (out, n), float64. Not modified.
        moment: C, shape (n, n), float64; where it is singular, a little of the identity is added. Not modified.
        columns: Those that go with each neuron, shape (neurons, k), every column once; by default each is one.
        rounds: The neurons are removed in at most so many rounds; of one round, the effects on each other are left out.

    Returns:
        Shape (neurons,), int64: from the first that is removed to the last.

    Source:
        Optimal Brain Surgeon for columns (Hassibi & Stork 1993): removing columns J from the best weight so far, w,
        costs tr(R' w_J ((C^-1)_JJ)^-1 w_J' R). MoDeGPT (arXiv 2408.09632) keeps those of the highest ridge leverage
        in C.

    >>> order_of_removal(torch.tensor([[2.0, 1.0, 3.0]]).double(), torch.eye(3).double()).tolist()
    [1, 0, 2]
    """
    left, inverse = weighted.clone(), square_root(moment).solve_after(torch.eye(len(moment)).to(moment))
    if columns is None:
        columns = torch.arange(len(moment), device=moment.device)[:, None]
    alive = torch.ones(len(columns), dtype=torch.bool, device=moment.device)
    order: list[Tensor] = []
    at_once = -(-len(columns) // rounds)
    while alive.any():
        costs = _costs(left, inverse, columns)
        count = min(at_once, int(alive.sum()))
        gone = costs.masked_fill(~alive, torch.inf).topk(count, largest=False, sorted=True).indices
        order.append(gone)
        alive[gone] = False
        out = columns[gone].flatten()
        step = torch.linalg.solve(inverse[out][:, out], inverse[out])
        left = left - left[:, out] @ step
        inverse = inverse - inverse[:, out] @ step
        dead = columns[~alive].flatten()
        left[:, dead] = 0
        inverse[dead] = 0
        inverse[:, dead] = 0
    return torch.cat(order)


def _costs(left: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """What removing the columns of each neuron costs; of one without columns, anything."""
    tiny = torch.finfo(inverse.dtype).tiny
    if columns.shape[1] == 1:
        return (left.square().sum(0) / inverse.diagonal().clamp(min=tiny))[columns[:, 0]]
    # Eigenvalues, since a block that rounding made singular has no inverse.
    values, vectors = torch.linalg.eigh(inverse[columns[:, :, None], columns[:, None, :]])
    along = left[:, columns].movedim(0, 1) @ vectors
    return (along.square().sum(1) / values.clamp(min=tiny)).sum(1)


def made_up(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Give the best weight that reads some neurons in the place of all.

    Args:
        weight: W, shape (out, n), float64. Not modified.
        moment: C, shape (n, n), float64. Not modified.
        kept: S, shape (k,), int64.

    Returns:
        W C[:, S] C[S, S]^-1, shape (out, k), float64.
    """
    return square_root(moment[kept][:, kept]).solve_after(weight @ moment[:, kept])


def prepare(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Tensor, moment: Tensor, *, heads: int = 0
) -> dict[str, Tensor]:
    """Compute what every cut of an MLP, or of values and outputs, needs.

    Args:
        weights: Gate and up (or the one that there is) and down, or value and output; each (out, in), any floating
            dtype. Not modified.
        gradients: The metric of the outputs of each, shape (out, out); None for the identity.
        inputs: The metric of what the first weights read, shape (in, in).
        moment: C.
        heads: Key-value heads of values and outputs; 0 for an MLP.

    Returns:
        `order` of removal, of heads with the `turn` before it; `gradients.N`, `inputs` and `moment` as they were given,
        in float32; for each of `WIDTHS` what the missing neurons cost (`lost`) and the squared singular values of each
        smaller weight in its metric (`squares.WIDTH.N`), descending, float64.
    """
    kept = {"inputs": inputs.float(), "moment": moment.float()}
    kept |= {f"gradients.{n}": each.float() for n, each in enumerate(gradients) if each is not None}
    moment, last = moment.double(), len(weights) - 1
    full = [weight.double() for weight in weights]
    metrics = [None if each is None else each.double() for each in gradients]
    right, left = square_root(inputs.double()), metrics[last]
    weighted = full[last] if left is None else square_root(left).before(full[last])
    if heads:
        kept["turn"] = turning(weighted, moment, heads, len(full[0]) // heads)
    turn = kept.get("turn")
    weighted, moment = turned(weighted, turn, 1), turned(moment, turn, 0, 1)
    full[0] = turned(full[0], turn, 0)
    metrics[0] = None if metrics[0] is None else turned(metrics[0], turn, 0, 1)
    columns = columns_of(torch.arange(len(full[0]), device=moment.device), turn, len(moment))
    order = order_of_removal(weighted, moment, columns=columns)
    whole = (weighted @ moment * weighted).sum()
    lost = []
    for place, share in enumerate(WIDTHS):
        stays = stay(order, width_of(share, len(order)))
        for number, (weight, metric) in enumerate(zip(full[:last], metrics)):
            metric = None if metric is None else metric[stays][:, stays]
            kept[f"squares.{place}.{number}"] = _squares(right.after(weight[stays]), metric)
        reads = columns[stays].flatten()
        root = square_root(moment[reads][:, reads])
        read = root.after(root.solve_after(weighted @ moment[:, reads]))
        kept[f"squares.{place}.{last}"] = _squares(read, None)
        lost.append(float((whole - read.square().sum()).clamp(min=0)))
    return kept | {"order": order, "lost": torch.tensor(lost, dtype=torch.float64)}


def cuts(
    prepared: dict[str, Tensor],
    shapes: Sequence[tuple[int, int]],
    cost: Callable[[int, int, int], float],
    multiple: int = 1,
) -> tuple[list[Cut], Curve]:
    """List what an MLP, or values and outputs, may become: with fewer neurons (dimensions), lower ranks or both.

    Args:
        prepared: From `prepare`.
        shapes: (out, in) of each weight.
        cost: Of a weight (by number) at a width and a rank.
        multiple: Ranks below the largest are multiples of it.

    Returns:
        The cuts by cost, each worth its cost, and their curve, which has everything as its last entry.
    """
    last, n = len(shapes) - 1, len(prepared["order"])
    levels, widths = [], []
    for place, share in enumerate(WIDTHS):
        width = width_of(share, n)
        curves = []
        for number in range(len(shapes)):
            squares = prepared[f"squares.{place}.{number}"].cpu().numpy()
            tails = np.append(squares[::-1].cumsum()[::-1], 0.0)
            full = len(squares)
            ranks = np.array([r for r in range(1, full + 1) if r % multiple == 0 or r == full], dtype=np.int64)
            costs = np.array([cost(number, width, int(rank)) for rank in ranks], dtype=np.float64)
            allowed = (costs < costs[-1]) | (ranks == full)
            curves.append(Curve(str(number), ranks[allowed], costs[allowed], tails[ranks[allowed]]))
        levels.append(Level(float(prepared["lost"][place]), tuple(curves)))
        widths.append(width)
    dense = sum(cost(number, n, min(shapes[number])) for number in range(last + 1))
    found = []
    errors, prices = [], []
    for price, error, level, chosen in allocate.combined(levels):
        if price >= dense or (
            widths[level] == n and all(i == len(c.ranks) - 1 for i, c in zip(chosen, levels[level].curves))
        ):
            continue
        curves = levels[level].curves
        ranks = tuple(int(curve.ranks[index]) for curve, index in zip(curves, chosen))
        found.append(Cut(widths[level], ranks, tuple(float(c.costs[i]) for c, i in zip(curves, chosen))))
        errors.append(error)
        prices.append(price)
    ranks = np.arange(1, len(found) + 2)
    return found, Curve("", ranks, np.array([*prices, dense]), np.array([*errors, 0.0]))


def factors(prepared: dict[str, Tensor], weights: Sequence[Tensor], cut: Cut) -> list[tuple[Tensor, Tensor]]:
    """Cut an MLP, or values and outputs, with the inputs that they had.

    Args:
        prepared: From `prepare`.
        weights: As there.
        cut: What stays.

    Returns:
        For each weight `up` and `down` of the smaller one, float64, on the device of `prepared`: the first have the
        neurons that stay as rows, the last one has them as columns, in the order of `places`; of heads, in their
        `turn`, unless all dimensions stay.
    """
    turn = turn_of(prepared, cut.width)
    moment = turned(prepared["moment"].double(), turn, 0, 1)
    rows, columns = places(prepared, cut.width)
    right = square_root(prepared["inputs"].double())
    read = square_root(moment[columns][:, columns])
    found = []
    for number, (weight, rank) in enumerate(zip(weights, cut.ranks)):
        weight = weight.to(moment)
        metric = prepared.get(f"gradients.{number}")
        first = number < len(weights) - 1
        if metric is not None:
            metric = turned(metric.double(), turn, 0, 1)[rows][:, rows] if first else metric.double()
        left = None if metric is None else square_root(metric)
        small = turned(weight, turn, 0)[rows] if first else made_up(turned(weight, turn, 1), moment, columns)
        found.append(decompose_weighted(small, left, right if first else read).factors(rank))
    return found


def turn_of(prepared: dict[str, Tensor], width: int) -> Tensor | None:
    """Give the basis in which a cut is made.

    Args:
        prepared: From `prepare`.
        width: Of the cut.

    Returns:
        For `eckart.heads.turned`; None for an MLP, and where all dimensions stay, since then one of two weights may
        stay as it is.
    """
    return prepared.get("turn") if width < len(prepared["order"]) else None


def places(prepared: dict[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Give what stays.

    Args:
        prepared: From `prepare`.
        width: How many neurons or dimensions.

    Returns:
        Rows of the first weights and columns of the last one, ascending, int64.
    """
    rows = stay(prepared["order"], width)
    return rows, columns_of(rows, prepared.get("turn"), len(prepared["moment"])).flatten().sort().values


def stay(order: Tensor, width: int) -> Tensor:
    """Give the neurons that stay, ascending.

    Args:
        order: From `order_of_removal`.
        width: How many.

    Returns:
        Shape (width,), int64.
    """
    return order[len(order) - width :].sort().values


def width_of(share: float, neurons: int) -> int:
    """Turn a share into a number of neurons, at least 1."""
    return max(1, round(share * neurons))


def _squares(weight: Tensor, metric: Tensor | None) -> Tensor:
    """The squared singular values of a weight in the metric of its outputs, by the smaller of its Gram matrices."""
    out, into = weight.shape
    if metric is not None and out > into:
        gram = weight.T @ (metric @ weight)
    else:
        weighted = weight if metric is None else square_root(metric).before(weight)
        gram = weighted.T @ weighted if out > into else weighted @ weighted.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
