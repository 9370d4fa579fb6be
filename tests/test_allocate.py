"""Allocations: within the budget, and optimal by brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart import allocate
from eckart.allocate import Curve
from eckart.errors import RankError


def curve(name, seed, out=6, into=5, pivoted=True):
    values = np.sort(np.random.default_rng(seed).exponential(size=min(out, into)))[::-1]
    ranks = np.arange(1, min(out, into) + 1)
    costs = ranks * (out + into) - (ranks**2 if pivoted else 0)
    costs = np.minimum(costs, out * into).astype(float)
    keep = (costs < out * into) | (ranks == len(ranks))
    tails = np.append((values**2)[::-1].cumsum()[::-1], 0)
    return Curve(name, ranks[keep], costs[keep], tails[ranks[keep]], group="a" if seed % 2 else "b")


def three(seed=0, pivoted=True):
    return [
        curve("x", seed, 6, 5, pivoted),
        curve("y", seed + 1, 4, 7, pivoted),
        curve("z", seed + 2, 5, 5, pivoted),
    ]


def loss(curves, choice, weights=None):
    return sum((weights or {}).get(c.name, 1) * c.errors[choice[c.name]] for c in curves)


ALLOCATORS = {
    "uniform": allocate.uniform,
    "water_fill": allocate.water_fill,
    "within_groups": allocate.within_groups,
    "proportional": lambda curves, budget: allocate.proportional(curves, budget, {c.name: 3.0 for c in curves}),
    "by_sensitivity": lambda curves, budget: allocate.by_sensitivity(
        curves, budget, {c.name: [(s, (1 - s) * (1 + i)) for s in (0.3, 0.6, 0.9)] for i, c in enumerate(curves)}
    ),
    "signed_pool": lambda curves, budget: allocate.signed_pool(
        curves, budget, {c.name: np.random.default_rng(i).normal(size=5) for i, c in enumerate(curves)}
    ),
}


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("pivoted", [True, False])
@given(seed=st.integers(0, 30), share=st.floats(0.4, 0.99))
def test_no_allocation_exceeds_the_budget(name, pivoted, seed, share):
    curves = three(seed, pivoted)
    budget = share * sum(c.costs[-1] for c in curves)
    choice = ALLOCATORS[name](curves, budget)
    assert allocate.cost_of(curves, choice) <= budget * (1 + 1e-9)
    assert all(0 <= choice[c.name] < len(c.ranks) for c in curves)


@given(seed=st.integers(0, 100), share=st.floats(0.4, 0.99))
def test_at_one_price_no_choice_that_costs_as_little_is_better(seed, share):
    curves = three(seed)
    budget = share * sum(c.costs[-1] for c in curves)
    choice = allocate.priced(curves, budget)
    spent = allocate.cost_of(curves, choice)
    every = [dict(zip("xyz", indices)) for indices in itertools.product(*(range(len(c.ranks)) for c in curves))]
    best = min(loss(curves, other) for other in every if allocate.cost_of(curves, other) <= spent + 1e-9)
    assert loss(curves, choice) == pytest.approx(best)
    assert loss(curves, allocate.water_fill(curves, budget)) <= best + 1e-12


@given(seed=st.integers(0, 100), small=st.floats(0.4, 0.7), more=st.floats(0.01, 0.29))
def test_a_smaller_budget_gives_no_matrix_more_at_the_price(seed, small, more):
    curves = three(seed)
    dense = sum(c.costs[-1] for c in curves)
    prices = [allocate.priced(curves, share * dense) for share in (small, small + more)]
    assert all(prices[0][c.name] <= prices[1][c.name] for c in curves)


def test_a_weight_moves_the_budget_to_what_matters():
    curves = three()
    budget = 0.6 * sum(c.costs[-1] for c in curves)
    plain = allocate.water_fill(curves, budget)
    weighted = allocate.water_fill(curves, budget, {"x": 1e6})
    assert weighted["x"] > plain["x"] or plain["x"] == len(curves[0].ranks) - 1


def test_the_floor_is_kept():
    curves = three()
    budget = 0.6 * sum(c.costs[-1] for c in curves)
    floor = allocate.uniform(curves, 0.5 * budget)
    choice = allocate.water_fill(curves, budget, {"x": 1e9, "y": 1e-9, "z": 1e-9}, floor=0.5)
    assert all(choice[c.name] >= floor[c.name] for c in curves)


def test_a_calibrated_curve_goes_through_what_was_measured_and_still_falls():
    found = allocate.calibrated(three()[0], [(1, 0.7), (3, 0.2)])
    assert found.errors[1] == pytest.approx(0.7)
    assert found.errors[3] == pytest.approx(0.2)
    assert (np.diff(found.errors) <= 1e-15).all()
    assert found.errors[-1] == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1, 10)), max_size=3))
def test_a_calibrated_curve_is_finite_whatever_was_measured(points):
    found = allocate.calibrated(three()[0], [(index % 4, value) for index, value in points])
    assert np.isfinite(found.errors).all()
    assert (np.diff(found.errors) <= 1e-12).all()


def test_a_budget_that_no_choice_meets_is_refused():
    curves = three()
    with pytest.raises(RankError, match="too small"):
        allocate.check_budget(curves, 1.0)


@given(seed=st.integers(0, 30), at=st.floats(0, 1), share=st.floats(0, 1))
def test_nearby_leaves_just_the_choices_of_about_the_same_cost(seed, at, share):
    whole = curve("x", seed, 9, 8)
    choice = int(at * (len(whole.ranks) - 1))
    part, before = allocate.nearby(whole, choice, share)
    cost = whole.costs[choice]
    close = [i for i, c in enumerate(whole.costs) if abs(c - cost) <= share * cost * (1 + 1e-9) or i == choice]
    assert [before + i for i in range(len(part.ranks))] == close
    assert np.array_equal(part.errors, whole.errors[before : before + len(part.ranks)])


def test_repriced_errors_rise_as_the_measured_losses_do():
    whole = curve("x", 3, 9, 8)
    found = allocate.repriced(whole, 4, 0.5, [(2, 0.9), (6, 0.3)])
    assert found.errors[2] - found.errors[6] == pytest.approx(0.6)
    assert np.allclose(found.errors / found.errors[0], whole.errors / whole.errors[0])
    assert not allocate.repriced(whole, 4, 0.5, [(2, 0.4)]).errors.any()
