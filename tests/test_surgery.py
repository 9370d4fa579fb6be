"""Edits do what a plan says and go away again to the bit. Oracle: torch.linalg and copies of the weights."""

import pytest
import torch

import tiny_models as tiny
from eckart.errors import MatrixError, ModelError, PlanError
from eckart.matrices import by_name, find_matrices, partition, read
from eckart.plan import MadeBy, Plan, PlannedModel
from eckart.surgery import applied, apply_, check_finite, check_plan, make_edit, replacement, weights_sha256


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
    "options", [{}, {"kind": "zero"}, {"kind": "magnitude"}, {"svd": "lowrank"}, {"basis": "random"}]
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
