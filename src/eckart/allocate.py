"""Which matrix keeps how many components under one budget. Numbers in, ranks out.

Notation: a curve says what a matrix (or several that share a rank) costs and errs at each rank it may have; a choice
is an index into every curve. Costs are whatever the budget is in: numbers stored, or bytes. Within a matrix the
components are dropped from the last to the first, so a smaller budget's choice is nested in a larger one's wherever
every rank is (`water_fill`: always).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eckart.errors import RankError

Floats = NDArray[np.float64]
Choice = dict[str, int]
"""Name of a curve -> index into it."""


@dataclass(frozen=True)
class Curve:
    """What one matrix costs and errs at the ranks it may have, ascending; the last one keeps everything."""

    name: str
    ranks: NDArray[np.int64]
    costs: Floats
    """Ascending."""
    errors: Floats
    """Squared errors in the metric, descending; the last is 0."""
    group: str = ""
    """Curves of one group may trade with each other in `within_groups`."""

    def most(self, cost: float) -> int:
        """Give the largest choice that costs at most so much; 0 if none does."""
        return max(0, int(np.searchsorted(self.costs, cost * (1 + 1e-12), side="right")) - 1)

    def at(self, rank: int) -> int:
        """Give the largest choice whose rank is at most so much; 0 if none's is."""
        return max(0, int(np.searchsorted(self.ranks, rank, side="right")) - 1)


def tails_of(values: Sequence[Floats], full: int) -> Floats:
    """Add up what a cut to each rank leaves out.

    Args:
        values: For each matrix that shares the rank its singular values, descending, `full` of them.
        full: The largest rank.

    Returns:
        Squared errors at ranks 0 to `full`.
    """
    tails = np.zeros(full + 1)
    for each in values:
        tails[:-1] += (each**2)[::-1].cumsum()[::-1]
    return tails


def make_curve(name: str, ranks: NDArray[np.int64], costs: Floats, tails: Floats, group: str = "") -> Curve:
    """Make the curve of a matrix, without ranks that are no choice.

    Args:
        name: Of the curve.
        ranks: Ascending; the last one keeps everything.
        costs: At these ranks.
        tails: Squared errors at ranks from 0, as from `tails_of`.
        group: As in `Curve`.

    Returns:
        The curve.
    """
    # A rank at which factors take as much as the dense weight is no choice: the weight stays dense. Nor is one at which
    # no less is lost than at a lower one, which structures have.
    least = np.minimum.accumulate(np.append(np.inf, tails[ranks]))[:-1]
    allowed = (costs < costs[-1]) & (tails[ranks] < least) | (ranks == ranks[-1])
    ranks, costs = ranks[allowed], costs[allowed]
    # Of equal costs the largest rank: stacked experts are rounded up, and times have plateaus.
    last = np.append(np.diff(costs) > 0, True)
    return Curve(name, ranks[last], costs[last], tails[ranks[last]], group)


def allowed_ranks(full: int, multiple: int) -> NDArray[np.int64]:
    """List the ranks that a matrix may have.

    Args:
        full: The largest.
        multiple: The others are multiples of it.

    Returns:
        Ascending.
    """
    return np.array([r for r in range(1, full + 1) if r % multiple == 0 or r == full], dtype=np.int64)


def cost_of(curves: Sequence[Curve], choice: Choice) -> float:
    """Add up what a choice costs.

    Args:
        curves: All of them.
        choice: For each.

    Returns:
        In the unit of the curves.
    """
    return float(sum(curve.costs[choice[curve.name]] for curve in curves))


def check_budget(curves: Sequence[Curve], budget: float) -> None:
    """Refuse a budget that no choice meets.

    Args:
        curves: All of them.
        budget: In the unit of their costs.

    Raises:
        RankError: Rank 1 (or the smallest allowed) everywhere costs more.
    """
    least = sum(float(curve.costs[0]) for curve in curves)
    if budget < least:
        raise RankError(
            f"A budget of {budget:,.0f} is too small. The smallest allowed ranks take {least:,.0f}, everything takes "
            f"{sum(float(curve.costs[-1]) for curve in curves):,.0f}. Raise the budget, or lower the floor."
        )


def uniform(curves: Sequence[Curve], budget: float) -> Choice:
    """Give every matrix the same share of its dense cost.

    Args:
        curves: All of them.
        budget: In the unit of their costs.

    Returns:
        The largest ranks that fit the share; what rounding leaves over is not spent.
    """
    share = budget / sum(float(curve.costs[-1]) for curve in curves)
    return {curve.name: curve.most(share * float(curve.costs[-1])) for curve in curves}


def priced(
    curves: Sequence[Curve],
    budget: float,
    weights: Mapping[str, float] | None = None,
    *,
    floor: float = 0.0,
) -> Choice:
    """Let every matrix take what is worth one price, the lowest at which the budget is kept.

    At price p every matrix takes the choice with the lowest weight * error + p * cost. No choice that costs at most as
    much as this one has a smaller sum of errors, whatever the shape of the curves (costs are not convex under pivoted
    storage). A smaller budget has a higher price, at which no matrix takes more.

    Args:
        curves: All of them.
        budget: In the unit of their costs.
        weights: What a unit of each error matters; 1 by default.
        floor: Every matrix gets at least what this share of the budget would give it if all had the same share.

    Returns:
        The choice; it costs at most `budget` wherever the floor does.

    Source:
        Lagrangian allocation as of Shoham & Gersho 1988, doi:10.1109/29.90373; for ranks, LEMS solves it as a knapsack.
    """
    losses = {curve.name: (weights or {}).get(curve.name, 1.0) * curve.errors for curve in curves}
    lowest = uniform(curves, floor * budget) if floor else {curve.name: 0 for curve in curves}

    def at(price: float) -> Choice:
        found = {}
        for curve in curves:
            start = lowest[curve.name]
            found[curve.name] = start + int(np.argmin(losses[curve.name][start:] + price * curve.costs[start:]))
        return found

    low, high = 0.0, 1.0
    while cost_of(curves, at(high)) > budget and high < 1e30:
        high *= 4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(curves, at(middle)) > budget else (low, middle)
    return at(high)


def water_fill(
    curves: Sequence[Curve],
    budget: float,
    weights: Mapping[str, float] | None = None,
    *,
    floor: float = 0.0,
) -> Choice:
    """Minimise the sum of weighted errors under the budget: one price for all, then the steps that gain most.

    Args:
        curves: As for `priced`.
        budget: As for `priced`.
        weights: As for `priced`.
        floor: As for `priced`.

    Returns:
        The choice of `priced`, and what the rest of the budget buys.
    """
    losses = {curve.name: (weights or {}).get(curve.name, 1.0) * curve.errors for curve in curves}
    return _spend(curves, losses, priced(curves, budget, weights, floor=floor), budget)


def _spend(curves: Sequence[Curve], losses: Mapping[str, Floats], choice: Choice, budget: float) -> Choice:
    """Spend what is left on the steps that gain most for their cost."""
    left = budget - cost_of(curves, choice)
    while True:
        best, gain = None, 0.0
        for curve in curves:
            now = choice[curve.name]
            reach = curve.most(float(curve.costs[now]) + left)
            if reach <= now:
                continue
            price = curve.costs[now + 1 : reach + 1] - curve.costs[now]
            gains = (losses[curve.name][now] - losses[curve.name][now + 1 : reach + 1]) / np.maximum(price, 1e-12)
            step = int(np.argmax(gains))
            if gains[step] > gain:
                best, gain = (curve, now + 1 + step), float(gains[step])
        if best is None:
            return choice
        curve, to = best
        left -= float(curve.costs[to] - curve.costs[choice[curve.name]])
        choice = choice | {curve.name: to}


@dataclass(frozen=True)
class Level:
    """Curves that are chosen from together, and an error that comes with them."""

    error: float
    curves: tuple[Curve, ...]


def combined(levels: Sequence[Level]) -> list[tuple[float, float, int, tuple[int, ...]]]:
    """List the choices from one of several levels that no other one of the list beats in both cost and error.

    Within a level those are listed that are best at some price of a unit of cost: each lies on the lower convex hull.

    Args:
        levels: At least one, each with curves.

    Returns:
        (cost, error, number of the level, index into each of its curves), by ascending cost and descending error.
    """
    found = []
    for number, level in enumerate(levels):
        hulls = [_hull(curve) for curve in level.curves]
        steps = []
        for which, (curve, hull) in enumerate(zip(level.curves, hulls)):
            costs, errors = np.diff(curve.costs[hull]), -np.diff(curve.errors[hull])
            steps += [(-gain, which, int(to)) for gain, to in zip(errors / costs, hull[1:])]
        chosen = [int(hull[0]) for hull in hulls]
        for _, which, to in [(0.0, 0, chosen[0]), *sorted(steps)]:
            chosen[which] = to
            cost = sum(float(curve.costs[index]) for curve, index in zip(level.curves, chosen))
            error = level.error + sum(float(curve.errors[index]) for curve, index in zip(level.curves, chosen))
            found.append((cost, error, number, tuple(chosen)))
    best = []
    for choice in sorted(found, key=lambda each: each[:2]):
        if not best or choice[1] < best[-1][1]:
            best.append(choice)
    return best


def _hull(curve: Curve) -> list[int]:
    """The points of a curve on its lower convex hull, from the cheapest on."""
    hull: list[int] = []
    for index, (cost, error) in enumerate(zip(curve.costs, curve.errors)):
        if hull and error >= curve.errors[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            slope = (curve.errors[b] - curve.errors[a]) / (curve.costs[b] - curve.costs[a])
            if (error - curve.errors[a]) / (cost - curve.costs[a]) > slope:
                break
            hull.pop()
        hull.append(index)
    return hull


def calibrated(curve: Curve, points: Sequence[tuple[int, float]]) -> Curve:
    """Scale a curve so that it goes through measured losses.

    The factor between them goes evenly with the logarithm of the error, and is that of the nearest point beyond.

    Args:
        curve: Whose errors are right but for their scale.
        points: (choice, measured loss) of this curve alone. What is not positive tells nothing and is left out.

    Returns:
        The curve with errors in the unit of the losses, still descending. Without points its errors are 0.
    """
    known = sorted(
        (float(np.log(curve.errors[index])), float(np.log(loss / curve.errors[index])))
        for index, loss in points
        if loss > 0 and curve.errors[index] > 0
    )
    if not known:
        return replace(curve, errors=np.zeros_like(curve.errors))
    at, factors = np.array(known).T
    logs = np.log(np.maximum(curve.errors, 1e-300))
    scaled = np.where(curve.errors > 0, curve.errors * np.exp(np.interp(logs, at, factors)), 0.0)
    return replace(curve, errors=np.maximum.accumulate(scaled[::-1])[::-1])


def divided(
    how: str,
    curves: Sequence[Curve],
    budget: float,
    *,
    floor: float = 0.0,
    points: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> Choice:
    """Divide a budget in one of the ways that need no model.

    Args:
        how: `uniform`, `tail` (by the errors of the curves), or `measured` (by errors scaled to measured losses).
        curves: All of them.
        budget: In the unit of their costs.
        floor: As for `priced`.
        points: For `measured`: as for `calibrated`, of every curve.

    Returns:
        The choice.
    """
    if how == "uniform":
        return uniform(curves, budget)
    if how == "measured":
        curves = [calibrated(curve, (points or {})[curve.name]) for curve in curves]
    return water_fill(curves, budget, floor=floor)


def nearby(curve: Curve, choice: int, share: float) -> tuple[Curve, int]:
    """Leave a curve only the choices whose cost differs by at most a share from that of one.

    Args:
        curve: Any.
        choice: The one, which always stays.
        share: From 0 to 1.

    Returns:
        The part of the curve, and how many choices before it were left out.
    """
    cost = float(curve.costs[choice])
    first = min(choice, int(np.searchsorted(curve.costs, cost * (1 - share))))
    last = max(choice, curve.most(cost * (1 + share)))
    part = slice(first, last + 1)
    return replace(curve, ranks=curve.ranks[part], costs=curve.costs[part], errors=curve.errors[part]), first


def repriced(curve: Curve, choice: int, loss: float, points: Sequence[tuple[int, float]]) -> Curve:
    """Scale a curve so that it rises, about a choice, as measured losses do.

    Args:
        curve: Whose errors are right near the choice but for their scale.
        choice: What the curve has now.
        loss: Measured there.
        points: (choice, measured loss) with this curve alone elsewhere.

    Returns:
        The curve with errors in the unit of the losses, not lifted to them; 0 where losses do not fall with the cost.
    """
    known = {choice: loss, **dict(points)}
    first, last = min(known), max(known)
    saved = float(curve.errors[first] - curve.errors[last])
    price = max(known[first] - known[last], 0.0) / saved if saved > 0 else 0.0
    return replace(curve, errors=price * curve.errors)


def by_sensitivity(
    curves: Sequence[Curve], budget: float, measured: Mapping[str, Sequence[tuple[float, float]]]
) -> Choice:
    """Let every matrix lose until its own measured loss reaches one threshold, which is searched by bisection.

    Args:
        curves: All of them.
        budget: In the unit of their costs.
        measured: For each curve (share of the dense cost, loss) with the matrix alone cut to that share.

    Returns:
        The choice with the lowest threshold that fits the budget.

    Source:
        ASVD's sensitivity-based truncation rank searching (arXiv 2312.05821).
    """
    points = {name: sorted(pairs) for name, pairs in measured.items()}

    def at(threshold: float) -> Choice:
        found = {}
        for curve in curves:
            share = next((s for s, loss in points[curve.name] if loss <= threshold), 1.0)
            found[curve.name] = curve.most(share * float(curve.costs[-1]))
        return found

    thresholds = sorted({loss for pairs in points.values() for _, loss in pairs})
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost_of(curves, at(thresholds[middle])) <= budget else (middle + 1, high)
    choice = at(thresholds[low]) if thresholds else uniform(curves, budget)
    return choice if cost_of(curves, choice) <= budget else uniform(curves, budget)


def within_groups(curves: Sequence[Curve], budget: float) -> Choice:
    """Give every group its uniform share, and in it remove from a matrix in proportion to 1 / log(its error).

    Args:
        curves: All of them; the error at the uniform choice is the theoretical loss.
        budget: In the unit of their costs.

    Returns:
        The choice.

    Source:
        SVD-LLM v2 (arXiv 2503.12340), algorithm 1. Errors are scaled by the least of the group, times e, so that every
        logarithm is at least 1; theirs are sums over tokens, whose logarithms happen to be.
    """
    share = budget / sum(float(curve.costs[-1]) for curve in curves)
    start = uniform(curves, budget)
    removed: dict[str, float] = {}
    for group in {curve.group for curve in curves}:
        members = [curve for curve in curves if curve.group == group]
        losses = np.array([max(float(c.errors[start[c.name]]), 1e-300) for c in members])
        scores = 1 / np.log(np.e * losses / losses.min())
        for curve, score in zip(members, scores):
            removed[curve.name] = min(1.0, float(len(members) * (1 - share) * score / scores.sum()))
    return _scaled(curves, budget, lambda scale: {name: 1 - scale * part for name, part in removed.items()})


def proportional(curves: Sequence[Curve], budget: float, ranks: Mapping[str, float]) -> Choice:
    """Give ranks in proportion to those that a rule proposes.

    Args:
        curves: All of them.
        budget: In the unit of their costs.
        ranks: The rule's rank for each, not negative.

    Returns:
        The choice with the largest common factor that fits.
    """

    def at(scale: float) -> Choice:
        found = {}
        for curve in curves:
            wanted = ranks[curve.name] / max(scale, 1e-12)
            found[curve.name] = max(0, int(np.searchsorted(curve.ranks, wanted + 1e-9, side="right")) - 1)
        return found

    return _bisected(curves, budget, at)


def _scaled(curves: Sequence[Curve], budget: float, shares: Callable[[float], Mapping[str, float]]) -> Choice:
    def at(scale: float) -> Choice:
        kept = shares(scale)
        return {curve.name: curve.most(max(0.0, kept[curve.name]) * float(curve.costs[-1])) for curve in curves}

    return _bisected(curves, budget, at)


def _bisected(curves: Sequence[Curve], budget: float, at: Callable[[float], Choice]) -> Choice:
    """Find the smallest scale at which a choice, which shrinks with it, fits."""
    low, high = 0.0, 1.0
    while cost_of(curves, at(high)) > budget and high < 1e12:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(curves, at(middle)) > budget else (low, middle)
    return at(high)


def signed_pool(curves: Sequence[Curve], budget: float, slopes: Mapping[str, Floats]) -> Choice:
    """Drop components from one pool so that the predicted change of the loss stays near zero.

    Every matrix loses its components from the last to the first. While the sum of predicted changes so far is above
    zero the matrix whose next one lowers the loss most goes first, else the one that raises it least.

    Args:
        curves: All of them; the ranks of each must be the consecutive ones up to the largest.
        budget: In the unit of their costs.
        slopes: For each the predicted change of the loss by removing each component, in the order of the components.

    Returns:
        The choice.

    Source:
        ZS-SVD (Zero-Sum SVD): two heaps of first-order scores in whitened coordinates. Here a component's score counts
        for what it frees, and a matrix is dense again where factors would take as much.
    """
    choice = {curve.name: len(curve.ranks) - 1 for curve in curves}
    spent, total = cost_of(curves, choice), 0.0
    steps = {
        curve.name: np.array(
            [slopes[curve.name][curve.ranks[i - 1] : curve.ranks[i]].sum() for i in range(1, len(curve.ranks))]
        )
        for curve in curves
    }
    while spent > budget:
        heads = [(curve, steps[curve.name][choice[curve.name] - 1]) for curve in curves if choice[curve.name] > 0]
        if not heads:
            break
        signed = [pair for pair in heads if (pair[1] < 0) == (total > 0)] or heads
        curve, change = min(signed, key=lambda pair: abs(pair[1]))
        now = choice[curve.name]
        spent -= float(curve.costs[now] - curve.costs[now - 1])
        total += float(change)
        choice[curve.name] = now - 1
    return choice
