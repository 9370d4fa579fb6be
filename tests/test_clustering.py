"""Clusters of rows and their truncations. Oracles: torch.linalg, all assignments of tiny cases, planted subspaces."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart import clustering
from eckart.clustering import (
    contiguous,
    decompose_clusters,
    even_sizes,
    factored_numbers,
    subspaces,
    truncate_clusters,
)
from eckart.errors import RankError


def matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def planted(clusters, rank, into, size, seed):
    """Rows of as many random subspaces, shuffled, and which rows belong together."""
    parts = [
        matrix((size, rank), 1000 * seed + c) @ matrix((rank, into), 1000 * seed + 500 + c) for c in range(clusters)
    ]
    order = torch.randperm(clusters * size, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(clusters).repeat_interleave(size)[order]
    return torch.cat(parts)[order], {frozenset((labels == c).nonzero().flatten().tolist()) for c in range(clusters)}


def as_sets(clusters):
    return {frozenset(rows.tolist()) for rows in clusters}


def error_of(weight, clusters, rank):
    """Squared error of the best rank in every cluster, by Eckart and Young."""
    return sum(float(torch.linalg.svdvals(weight[torch.as_tensor(rows)])[rank:].square().sum()) for rows in clusters)


def assert_partition(clusters, out):
    assert sorted(torch.cat(tuple(clusters)).tolist()) == list(range(out))
    assert all(len(rows) > 0 for rows in clusters)
    assert all(torch.equal(rows, rows.sort().values) for rows in clusters)


@given(st.integers(1, 300), st.data())
def test_contiguous_blocks_hold_every_row_once_in_order_and_differ_by_one(out, data):
    blocks = data.draw(st.integers(1, out))
    clusters = contiguous(out, blocks)
    assert torch.cat(clusters).tolist() == list(range(out))
    sizes = [len(rows) for rows in clusters]
    assert len(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert tuple(sizes) == even_sizes(out, blocks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "blocks"), [((8, 5), 3), ((5, 8), 2), ((6, 6), 6), ((7, 4), 1)])
def test_every_cluster_is_the_truncation_of_its_rows(shape, blocks, dtype):
    weight = matrix(shape, dtype=dtype)
    clusters = contiguous(shape[0], blocks)
    for rank in range(1, min(shape) + 1):
        found = truncate_clusters(decompose_clusters(weight, clusters), rank)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for rows in clusters:
            u, s, vh = torch.linalg.svd(weight[rows].to(found.dtype), full_matrices=False)
            torch.testing.assert_close(found[rows], (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5, rtol=1e-5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.data())
@settings(max_examples=50, deadline=None)
def test_the_error_is_the_norm_of_what_every_cluster_discards(out, into, seed, data):
    weight = matrix((out, into), seed)
    labels = data.draw(st.lists(st.integers(0, 2), min_size=out, max_size=out))
    clusters = [torch.tensor([row for row in range(out) if labels[row] == c]) for c in sorted(set(labels))]
    rank = data.draw(st.integers(1, into))
    found = truncate_clusters(decompose_clusters(weight, clusters), rank)
    squared = float((weight - found).square().sum())
    assert squared == pytest.approx(error_of(weight, clusters, rank), abs=1e-9)
    # Blocks of rank r are never worse than the whole at rank r, since its truncation has rank r in every block.
    assert squared <= float(torch.linalg.svdvals(weight)[rank:].square().sum()) + 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("clusters", "rank", "into", "size"), [(2, 1, 8, 10), (3, 2, 12, 20), (4, 2, 60, 8), (4, 8, 40, 40), (6, 3, 32, 20)]
)
def test_planted_subspaces_are_recovered_exactly(clusters, rank, into, size, seed):
    weight, expected = planted(clusters, rank, into, size, seed)
    found = subspaces(weight, clusters, rank, seed=seed)
    assert as_sets(found) == expected
    kept = truncate_clusters(decompose_clusters(weight, found), rank)
    torch.testing.assert_close(kept, weight, atol=1e-9, rtol=1e-9)
    # Blocks of neighbours of the same rank lose much: the rows are shuffled.
    assert error_of(weight, contiguous(len(weight), clusters), rank) > 0.05 * float(weight.square().sum())


@given(st.integers(1, 14), st.integers(1, 8), st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_subspaces_hold_every_row_once_and_are_never_worse_than_contiguous_blocks(out, into, seed, data):
    weight = matrix((out, into), seed)
    blocks, rank = data.draw(st.integers(1, out)), data.draw(st.integers(1, into))
    found = subspaces(weight, blocks, rank, seed=seed)
    assert len(found) == blocks
    assert_partition(found, out)
    assert error_of(weight, found, rank) <= error_of(weight, contiguous(out, blocks), rank) * (1 + 1e-9) + 1e-9


def least_error(weight, blocks, rank):
    """Of all assignments without an empty cluster."""
    rows = range(len(weight))
    return min(
        error_of(weight, [[row for row in rows if labels[row] == c] for c in range(blocks)], rank)
        for labels in itertools.product(range(blocks), repeat=len(weight))
        if len(set(labels)) == blocks
    )


def test_subspaces_are_near_the_best_of_all_assignments():
    found, best, plain = [], [], []
    for seed in range(12):
        weight = matrix((8, 4), seed)
        found.append(error_of(weight, subspaces(weight, 2, 1, seed=seed), 1))
        best.append(least_error(weight, 2, 1))
        plain.append(error_of(weight, contiguous(8, 2), 1))
    assert all(f >= b - 1e-9 for f, b in zip(found, best))
    # A local minimum is what is promised; of these cases most are the global one.
    assert sum(f <= b + 1e-9 for f, b in zip(found, best)) >= 7
    assert sum(found) - sum(best) < 0.1 * (sum(plain) - sum(best))


def plain_alternation(weight, blocks, rank):
    """The textbook loop, with whole decompositions: the slow twin of one start."""
    labels = torch.cat([torch.full((len(rows),), c) for c, rows in enumerate(contiguous(len(weight), blocks))])
    best, kept = float("inf"), labels
    for _ in range(clustering.ITERATIONS):
        distances = torch.empty(len(weight), blocks, dtype=torch.float64)
        for c in range(blocks):
            vh = torch.linalg.svd(weight[labels == c], full_matrices=False).Vh[:rank]
            distances[:, c] = (weight - weight @ vh.T @ vh).square().sum(1)
        error = float(distances[torch.arange(len(weight)), labels].sum())
        if error >= best * (1 - clustering.LEAST_GAIN):
            break
        best, kept, labels = error, labels, distances.argmin(1)
        assert len(labels.unique()) == blocks, "choose another seed"
    return kept


@pytest.mark.parametrize("shape", [(40, 12), (40, 60), (30, 30)])
@pytest.mark.parametrize("rank", [1, 4])
def test_one_start_is_the_plain_alternation(monkeypatch, shape, rank):
    monkeypatch.setattr(clustering, "STARTS", 1)
    weight = matrix(shape, 3)
    labels = plain_alternation(weight, 3, rank)
    expected = [(labels == c).nonzero().flatten() for c in range(3)]
    found = subspaces(weight, 3, rank)
    assert error_of(weight, found, rank) == pytest.approx(error_of(weight, expected, rank), rel=1e-9)
    assert as_sets(found) == as_sets(expected)


def test_every_iteration_and_every_start_lowers_the_error_or_leaves_it(monkeypatch):
    weight = matrix((60, 20), 1)

    def errors_for(name, values):
        found = []
        for value in values:
            monkeypatch.setattr(clustering, name, value)
            found.append(error_of(weight, subspaces(weight, 4, 3), 3))
        monkeypatch.undo()
        return found

    by_iterations, by_starts = errors_for("ITERATIONS", range(1, 12)), errors_for("STARTS", range(1, 8))
    for errors in (by_iterations, by_starts):
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0]


@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(6, 4), torch.eye(6)[:, :1]])
@pytest.mark.parametrize("blocks", [1, 2, 5, 6])
def test_rows_without_structure_leave_no_cluster_empty(weight, blocks):
    assert_partition(subspaces(weight, blocks, 1), 6)


def test_subspaces_are_seeded_and_leave_the_global_generator_alone():
    weight = matrix((50, 20))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = (subspaces(weight, 4, 2, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert len({frozenset(as_sets(subspaces(weight, 4, 2, seed=seed))) for seed in range(5)}) > 1


def test_subspaces_do_not_change_the_weight_and_take_half_precision():
    weight, expected = planted(3, 2, 12, 20, 0)
    half = weight.to(torch.bfloat16)
    before = half.clone()
    assert as_sets(subspaces(half, 3, 2)) == expected
    assert torch.equal(half, before)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_count_of_numbers_is_that_of_the_tensors_that_would_be_kept(sizes, into, rank):
    kept = 0
    for size in sizes:
        weight = matrix((size, into))
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        up, down = u[:, :rank] * s[:rank], vh[:rank]
        kept += min(up.numel() + down.numel(), weight.numel())
    assert factored_numbers(sizes, into, rank) == kept


@pytest.mark.parametrize("blocks", [0, -1, 9])
def test_a_number_of_blocks_outside_its_range_is_refused(blocks):
    for call in (lambda: contiguous(8, blocks), lambda: subspaces(matrix((8, 5)), blocks, 1)):
        with pytest.raises(RankError, match="from 1 to the number of rows"):
            call()


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_outside_its_range_is_refused(rank):
    with pytest.raises(RankError, match="from 1 to 5"):
        subspaces(matrix((8, 5)), 2, rank)
    if rank < 1:
        with pytest.raises(RankError, match="from 1 to"):
            truncate_clusters(decompose_clusters(matrix((8, 5)), contiguous(8, 2)), rank)
