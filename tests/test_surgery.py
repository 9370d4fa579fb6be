"""Edits do what a plan says and go away again to the bit. Oracle: torch.linalg and copies of the weights."""

import pytest
import torch

import tiny_models as tiny
from eckart import noise, truncation
from eckart.errors import MatrixError, ModelError, PlanError, RankError
from eckart.matrices import Matrix, by_name, find_matrices, partition, read
from eckart.plan import MadeBy, Plan, PlannedModel
from eckart.surgery import (
    applied,
    apply_,
    check_finite,
    check_plan,
    clusters_of,
    cost,
    decomposition,
    decomposition_key,
    make_edit,
    make_edit_by_rule,
    replacement,
    weights_sha256,
)


def plan_for(model, edits, sha=None):
    planned = PlannedModel(source="x", architecture="y", weights_sha256=sha or weights_sha256(model))
    return Plan(model=planned, edits=tuple(edits), made_by=MadeBy(eckart="0"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "mixtral", "gpt_oss", "t5"])
def test_an_edit_puts_the_truncated_matrix_in_and_leaves_the_rest(name):
    model = tiny.build(name)
    matrices = find_matrices(model)
    matrix = [m for m in partition(matrices) if m.layer == 1][-1]
    others = [(m, read(model, m)) for m in partition(matrices) if m != matrix]
    u, s, vh = torch.linalg.svd(read(model, matrix).double(), full_matrices=False)
    apply_(model, [make_edit(matrix, 0.25)], matrices)
    rank = max(1, matrix.rank // 4)
    expected = ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()
    torch.testing.assert_close(read(model, matrix), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(read(model, m), w) for m, w in others)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "zero"},
        {"kind": "magnitude"},
        {"svd": "lowrank"},
        {"basis": "random"},
        {"blocks": 3},
        {"blocks": 3, "clustering": "subspaces"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_for_a_while_is_gone_to_the_bit(options, dtype):
    model = tiny.build("llama").to(dtype)
    matrices = find_matrices(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with applied(model, plan_for(model, [make_edit(m, 0.3, **options) for m in matrices[:5]]), matrices):
        changed = [n for n, p in model.named_parameters() if not torch.equal(before[n], p)]
        assert changed == [m.parameter for m in matrices[:5]]
        assert all(p.dtype == dtype for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_edit_for_a_while_is_gone_after_an_error_too():
    model = tiny.build("llama")
    matrices = find_matrices(model)
    before = weights_sha256(model)
    with pytest.raises(ZeroDivisionError), applied(model, [make_edit(matrices[0], 0.1)], matrices):
        raise ZeroDivisionError
    assert weights_sha256(model) == before


def test_full_rank_is_the_matrix_itself():
    model = tiny.build("gpt2")
    matrix = find_matrices(model)[0]
    weight = read(model, matrix)
    assert torch.equal(replacement(weight, make_edit(matrix, 1.0)), weight)


def test_a_plan_for_other_weights_is_refused_with_both_hashes_and_leaves_the_model_alone():
    model, other = tiny.build("llama"), tiny.build("llama", seed=5)
    matrices = find_matrices(model)
    plan = plan_for(other, [make_edit(matrices[0], 0.5)])
    before = weights_sha256(model)
    with pytest.raises(PlanError) as caught:
        apply_(model, plan)
    assert before in str(caught.value)
    assert weights_sha256(other) in str(caught.value)
    assert weights_sha256(model) == before
    apply_(model, plan, force=True)
    assert weights_sha256(model) != before


def test_a_plan_is_checked_before_anything_is_written():
    model = tiny.build("llama")
    matrices = find_matrices(model)
    before = weights_sha256(model)
    good = make_edit(matrices[0], 0.5)
    with pytest.raises(MatrixError, match="nowhere"):
        apply_(model, [good, good.model_copy(update={"matrix": "nowhere"})])
    with pytest.raises(PlanError, match="shape"):
        apply_(model, [good, make_edit(matrices[4], 0.5).model_copy(update={"shape": (7, 7)})])
    assert weights_sha256(model) == before


def test_a_fused_weight_and_its_part_are_not_edited_together():
    model = tiny.build("gpt2")
    matrices = find_matrices(model)
    whole = next(m for m in matrices if m.whole)
    part = by_name(matrices, f"{whole.name}:q_proj")
    with pytest.raises(PlanError, match="fused weight"):
        check_plan(model, [make_edit(whole, 0.5), make_edit(part, 0.5)], matrices)
    key = by_name(matrices, f"{whole.name}:k_proj")
    check_plan(model, [make_edit(key, 0.5), make_edit(part, 0.5)], matrices)


def test_the_hash_is_of_values_and_names_and_not_of_the_dtype_they_are_held_in():
    model = tiny.build("llama").to(torch.bfloat16)
    half = weights_sha256(model)
    assert weights_sha256(model.to(torch.float32)) == half
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert weights_sha256(model) != half
    assert weights_sha256(tiny.build("mistral")) != weights_sha256(tiny.build("llama"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = tiny.build("llama")
    check_finite(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight hold NaN or infinity"):
        check_finite(model)


def best_of(weight, rank):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_oss"])
@pytest.mark.parametrize("clustering", ["contiguous", "subspaces"])
def test_blocks_of_rows_are_cut_each_by_itself(name, clustering):
    model = tiny.build(name)
    for matrix in [m for m in find_matrices(model) if m.layer == 1 and m.type != "other"]:
        weight = read(model, matrix)
        edit = make_edit(matrix, 0.25, blocks=3, clustering=clustering)
        assert edit.rank == max(1, int(0.25 * min(-(-matrix.shape[0] // 3), matrix.shape[1])))
        clusters = clusters_of(weight, edit)
        assert sorted(torch.cat(clusters).tolist()) == list(range(matrix.shape[0]))
        found = replacement(weight, edit)
        for rows in clusters:
            torch.testing.assert_close(found[rows], best_of(weight[rows], edit.rank), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bloom"])
def test_heads_are_cut_each_by_itself(name):
    model = tiny.build(name)
    for matrix in [m for m in find_matrices(model) if m.layer == 1 and m.heads]:
        weight = read(model, matrix)
        edit = make_edit(matrix, 0.5, clustering="heads")
        expected = [best_of(head, 4) for head in weight.chunk(matrix.heads)]
        assert (edit.blocks, edit.rank) == (matrix.heads, 4)
        torch.testing.assert_close(replacement(weight, edit), torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_heads_of_a_matrix_without_are_refused():
    matrices = find_matrices(tiny.build("gpt2"))
    for kind in ("out_proj", "fc_in", "qkv_proj"):
        matrix = next(m for m in matrices if m.type == kind)
        with pytest.raises(MatrixError, match=f"{kind}.*lie in its columns.*--types"):
            make_edit(matrix, 0.5, clustering="heads")


def test_more_blocks_than_rows_are_refused():
    matrix = find_matrices(tiny.build("llama"))[0]
    make_edit(matrix, 0.5, blocks=32)
    with pytest.raises(RankError, match="33 blocks do not fit a matrix of 32 rows"):
        make_edit(matrix, 0.5, blocks=33)


@pytest.mark.parametrize("options", [{}, {"blocks": 3}, {"blocks": 3, "clustering": "subspaces"}])
def test_keeping_everything_is_the_matrix_itself_however_it_is_divided(options):
    model = tiny.build("llama")
    for matrix in find_matrices(model)[:7]:
        weight = read(model, matrix)
        assert torch.equal(replacement(weight, make_edit(matrix, 1.0, **options)), weight)


@pytest.mark.parametrize(
    "options", [{}, {"blocks": 3}, {"clustering": "heads"}, {"blocks": 3, "clustering": "subspaces"}]
)
def test_edits_with_one_key_share_a_decomposition(options):
    model = tiny.build("llama")
    matrix = find_matrices(model)[0]
    weight = read(model, matrix)
    edits = [make_edit(matrix, rho, **options) for rho in (0.1, 0.3, 0.5)]
    held = {}
    for edit in edits:
        held.setdefault(decomposition_key(edit), decomposition(weight, edit))
    assert len(held) == (3 if options.get("clustering") == "subspaces" else 1)
    assert decomposition_key(make_edit(matrix, 0.3, blocks=2)) not in held
    for edit in edits:
        expected = replacement(weight, edit)
        assert torch.equal(replacement(weight, edit, held[decomposition_key(edit)]), expected)
        if edit.blocks == 1:
            torch.testing.assert_close(best_of(weight, edit.rank), expected, atol=1e-5, rtol=1e-5)


def test_subspaces_have_a_seed_of_their_own_for_every_matrix():
    first, second, *_ = find_matrices(tiny.build("llama"))
    seeds = [make_edit(m, 0.1, blocks=2, clustering="subspaces", seed=s).seed for m in (first, second) for s in (0, 1)]
    assert len(set(seeds)) == 4
    assert make_edit(first, 0.1, blocks=2, seed=1).seed == 0
    assert make_edit(first, 0.1, clustering="subspaces") == make_edit(first, 0.1)


def test_the_cost_is_that_of_the_factors_that_would_be_kept():
    matrix = next(m for m in find_matrices(tiny.build("llama")) if m.type == "fc_in")
    out, into = matrix.shape
    assert (out, into) == (48, 32)
    for options, numbers in (({"kind": "zero"}, 0), ({"kind": "magnitude"}, 48 * 32), ({}, 3 * (48 + 32))):
        found = cost(make_edit(matrix, 0.1, **options))
        assert (found.numbers, found.integers, found.flops) == (numbers, 0, 2 * numbers)
    five = cost(make_edit(matrix, 0.2, blocks=5))
    # Blocks of 10, 10, 10, 9 and 9 rows at rank 2.
    assert five.numbers == 3 * 2 * (10 + 32) + 2 * 2 * (9 + 32)
    assert five.flops == 2 * five.numbers
    # Full rank in small blocks: dense is fewer.
    assert cost(make_edit(matrix, 1.0, blocks=4)).numbers == 48 * 32


def test_the_cost_of_subspaces_needs_the_sizes_and_counts_the_order_of_the_rows():
    model = tiny.build("llama")
    matrix = next(m for m in find_matrices(model) if m.type == "fc_in")
    edit = make_edit(matrix, 0.2, blocks=4, clustering="subspaces")
    sizes = [len(rows) for rows in clusters_of(read(model, matrix), edit)]
    found = cost(edit, sizes)
    assert found.numbers == sum(min(min(edit.rank, size) * (size + 32), size * 32) for size in sizes)
    assert found.integers == 48
    for wrong in (None, [48], [1, 1, 1, 1]):
        with pytest.raises(PlanError, match="clusters_of"):
            cost(edit, wrong)


def test_shrinking_for_a_while_is_gone_to_the_bit():
    model = tiny.build("llama")
    matrix = find_matrices(model)[0]
    before = read(model, matrix)
    edit = make_edit_by_rule(matrix, torch.linalg.svdvals(before.double()), "mp", kind="shrink")
    with applied(model, [edit]):
        assert not torch.equal(read(model, matrix), before)
    assert torch.equal(read(model, matrix), before)


def planted(rank=3, shape=(40, 60)):
    """A matrix, and a weight of its shape with so many components above the noise."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for side in shape]
    weight = 0.02 * torch.randn(shape, generator=generator) + (sides[0] * torch.arange(1.0, rank + 1)) @ sides[1].mT
    return Matrix("a.b", "a.b.weight", shape, "a", 0, "fc_in"), weight


@pytest.mark.parametrize("rule", noise.RANK_RULES)
def test_an_edit_by_a_rule_is_the_cut_at_the_rank_of_the_rule(rule):
    matrix, weight = planted()
    values = torch.linalg.svdvals(weight.double())
    edit = make_edit_by_rule(matrix, values, rule)
    assert edit.rank == max(1, noise.rank_by(rule, values, matrix.shape))
    assert (edit.kind, edit.rank_rule, edit.noise) == ("low_rank", rule, None)
    assert truncation.rank_of(edit.rho, matrix.shape) == edit.rank
    plain = make_edit(matrix, edit.rho)
    assert torch.equal(replacement(weight, edit), replacement(weight, plain))
    assert cost(edit) == cost(plain)


@pytest.mark.parametrize("rule", noise.FITS)
def test_a_shrunk_matrix_has_the_shrunk_singular_values_and_the_vectors_of_the_cut(rule):
    matrix, weight = planted()
    values = torch.linalg.svdvals(weight.double())
    edit = make_edit_by_rule(matrix, values, rule, kind="shrink")
    assert edit.rank == 3
    found = replacement(weight, edit).double()
    assert torch.equal(found, replacement(weight, edit, decomposition(weight, edit)).double())
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    shrunk = noise.shrink(s, matrix.shape, sigma=noise.FITS[rule](s, matrix.shape).sigma)[:3]
    torch.testing.assert_close(found, (u[:, :3] * shrunk) @ vh[:3], atol=1e-6, rtol=1e-5)
    assert cost(edit) == cost(make_edit(matrix, edit.rho))


def test_where_a_rule_sees_noise_alone_one_component_stays_and_shrinks_to_nothing():
    matrix, _ = planted()
    weight = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(weight.double())
    assert make_edit_by_rule(matrix, values, "gavish-donoho").rank == 1
    edit = make_edit_by_rule(matrix, values, "gavish-donoho", kind="shrink")
    assert edit.rank == 1
    assert not replacement(weight, edit).any()


def test_a_rule_needs_a_kind_with_a_rank_and_shrinking_a_rule_with_noise():
    matrix, weight = planted()
    values = torch.linalg.svdvals(weight)
    with pytest.raises(RankError, match="has no rank for rule 'mp'"):
        make_edit_by_rule(matrix, values, "mp", kind="zero")
    with pytest.raises(RankError, match="'energy' fits no noise"):
        make_edit_by_rule(matrix, values, "energy", kind="shrink")
