"""A factored model computes what the dense edit computes. Oracles: torch.linalg, counting by hand, the dense model."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny_models as tiny
from eckart.dataflow import low_rank_layers
from eckart.errors import PlanError
from eckart.experts import FactoredExperts
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, LowRankLayer, PivotedLinear, RowBlockedLinear
from eckart.matrices import by_name, coverage, find_matrices, partition, read, write
from eckart.quantizer import replace_, sizes
from eckart.surgery import applied, apply_, make_edit, make_edit_by_rule


def truncated(weight, rank, kept="top"):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    part = slice(0, rank) if kept == "top" else slice(len(s) - rank, len(s))
    return (u[:, part] * s[part]) @ vh[part]


def matrix_of(model, kind, layer=1):
    return next(m for m in find_matrices(model) if m.type == kind and m.layer == layer)


def build(name):
    """In float64, so that nothing but a wrong number can make a difference."""
    model = tiny.build(name).double()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def outputs(name, *models):
    given = {key: value.double() if value.is_floating_point() else value for key, value in tiny.inputs(name).items()}
    return [tiny.output(name, model, **given) for model in models]


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_factored_model_computes_what_the_truncated_one_does(name):
    model = build(name)
    dense = copy.deepcopy(model)
    matrices = partition(find_matrices(model))
    edits = [make_edit(m, 0.15) for i, m in enumerate(matrices) if m.expert is not None or i % 3 != 1]
    for edit in edits:
        matrix = by_name(matrices, edit.matrix)
        write(dense, matrix, truncated(read(dense, matrix), edit.rank))
    found = factor_(model, edits)
    close(*outputs(name, model, dense))
    layers = low_rank_layers(model)
    assert layers
    assert layers.keys() == found.layers.keys()
    edited = {by_name(matrices, edit.matrix).parameter for edit in edits}
    assert edited == {path if path in edited else f"{path}.weight" for path in (*found.layers, *found.dense)}
    assert found.after.parameters == sum(p.numel() for p in model.parameters())
    assert found.before.parameters == sum(p.numel() for p in dense.parameters())
    assert found.after.bytes < found.before.bytes
    assert sizes(model) == (found.after, found.before)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_what_is_left_of_a_factored_model_has_the_types_it_had(name):
    model = build(name)
    matrices = partition(find_matrices(model))
    before = {matrix.name: matrix for matrix in matrices}
    factor_(model, [make_edit(m, 0.15) for m in matrices if m.layer == 1])
    left = find_matrices(model)
    assert {m.layer for m in partition(left)} >= {0, 2}
    assert all(before[m.name] == m for m in partition(left))
    gone = {name for path in low_rank_layers(model) for name in (path, f"{path}.weight")}
    assert {m.name for m in partition(left)} == {name for name, m in before.items() if m.parameter not in gone}
    assert coverage(model, left) == 1


@pytest.mark.parametrize("kind", ["fc_in", "q_proj", "out_proj"])
@pytest.mark.parametrize("options", [{"basis": "bottom"}, {"basis": "random"}, {"kind": "zero"}, {"svd": "lowrank"}])
def test_every_kind_of_low_rank_edit_is_factored(kind, options):
    model = build("llama")
    matrix = matrix_of(model, kind)
    edit = make_edit(matrix, 0.2, **options)
    original = read(model, matrix)
    with applied(model, [edit]):
        expected = read(model, matrix)
        before = outputs("llama", model)[0]
    assert not torch.equal(expected, original)
    factor_(model, [edit])
    layer = model.get_submodule(matrix.name)
    assert isinstance(layer, FactoredLinear)
    assert layer.rank == edit.rank
    close(layer.dense(), expected)
    close(outputs("llama", model)[0], before)
    if options == {"basis": "bottom"}:
        close(layer.dense(), truncated(original, edit.rank, "bottom"))


def test_a_shrunk_matrix_is_factored():
    model = build("llama")
    matrix = matrix_of(model, "fc_in")
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(side, 2, generator=generator) for side in matrix.shape]
    write(model, matrix, read(model, matrix) + 0.2 * sides[0] @ sides[1].mT)
    edit = make_edit_by_rule(matrix, torch.linalg.svdvals(read(model, matrix).double()), "tw", kind="shrink")
    with applied(model, [edit]):
        expected = read(model, matrix)
    assert expected.any()
    factor_(model, [edit])
    close(model.get_submodule(matrix.name).dense(), expected)


def test_a_high_rank_is_pivoted_where_that_saves_and_dense_where_nothing_does():
    model = build("llama")
    matrix = matrix_of(model, "fc_in")
    weight, (out, into) = read(model, matrix), matrix.shape
    pivoted = make_edit(matrix, 0.6)
    copied = copy.deepcopy(model)
    factor_(model, [pivoted])
    layer = model.get_submodule(matrix.name)
    assert isinstance(layer, PivotedLinear)
    close(layer.dense(), truncated(weight, pivoted.rank))
    full = make_edit(matrix, 0.97)
    found = factor_(copied, [full])
    assert not found.layers
    assert type(copied.get_submodule(matrix.name)) is nn.Linear
    assert found.before == found.after
    assert not hasattr(copied.config, "quantization_config")
    assert f"{8 * out * into:,} dense" in found.dense[matrix.name]
    close(read(copied, matrix), truncated(weight, full.rank))


def test_magnitude_pruning_stays_dense_and_is_said_to():
    model = build("llama")
    matrix = matrix_of(model, "fc_in")
    edit = make_edit(matrix, 0.25, kind="magnitude")
    found = factor_(model, [edit])
    assert list(found.dense) == [matrix.name]
    assert not found.layers
    weight = read(model, matrix)
    assert int((weight != 0).sum()) == weight.numel() // 4


@pytest.mark.parametrize("name", ["phi3", "falcon_grouped", "gpt_neox", "gpt2"])
def test_parts_of_a_fused_weight_get_ranks_of_their_own_and_the_rest_stays(name):
    model = build(name)
    matrices = find_matrices(model)
    q, k, v = (next(m for m in matrices if m.type == kind and m.layer == 1) for kind in ("q_proj", "k_proj", "v_proj"))
    weights = [read(model, m) for m in (q, k, v)]
    edits = [make_edit(q, 0.1), make_edit(v, 0.2)]
    dense = copy.deepcopy(model)
    for matrix, edit in zip((q, v), edits):
        write(dense, matrix, truncated(read(dense, matrix), edit.rank))
    found = factor_(model, edits, matrices)
    (path,) = found.layers
    layer = model.get_submodule(path)
    assert isinstance(layer, RowBlockedLinear)
    assert found.layers[path].transposed == (name == "gpt2")
    stored = layer.dense()
    rows = [m.rows for m in (q, k, v)]
    index = [torch.cat([torch.arange(r.start, r.stop, r.step) for r in part]) for part in rows]
    assert torch.equal(stored[index[1]], weights[1])
    for i, edit in ((0, edits[0]), (2, edits[1])):
        assert int(torch.linalg.matrix_rank(stored[index[i]], rtol=1e-4)) == edit.rank
    close(*outputs(name, model, dense))


@pytest.mark.parametrize("clustering", ["contiguous", "subspaces", "heads"])
def test_clustered_rows_become_blocks(clustering):
    model = build("falcon_rw")
    matrices = find_matrices(model)
    matrix = next(m for m in matrices if m.type == "q_proj" and m.layer == 1)
    whole = next(m for m in matrices if m.whole and m.layer == 1)
    edit = make_edit(matrix, 0.2, blocks=4, clustering=clustering)
    with applied(model, [edit]):
        expected, result = read(model, whole), outputs("falcon_rw", model)[0]
    found = factor_(model, [edit])
    layer = model.get_submodule(whole.name)
    assert isinstance(layer, RowBlockedLinear)
    # falcon_rw keeps the rows of a head together, so that only subspaces need an order.
    assert found.layers[whole.name].ordered == (clustering == "subspaces")
    close(layer.dense(), expected)
    close(outputs("falcon_rw", model)[0], result)


@settings(max_examples=20)
@given(data=st.data())
def test_any_edits_of_one_fused_weight_are_the_dense_edits(data):
    model = build("phi3")
    matrices = find_matrices(model)
    edits = []
    for matrix in matrices:
        if matrix.layer == 0 and not matrix.whole and data.draw(st.booleans()):
            rho = data.draw(st.sampled_from([0.05, 0.2, 0.5, 1.0]))
            kind = data.draw(st.sampled_from(["low_rank", "low_rank", "zero", "magnitude"]))
            blocks = data.draw(st.integers(1, 3)) if kind == "low_rank" else 1
            edits.append(make_edit(matrix, rho, kind=kind, blocks=blocks))
    with applied(model, edits):
        expected = outputs("phi3", model)[0]
    found = factor_(model, edits)
    close(outputs("phi3", model)[0], expected)
    assert found.after.bytes <= found.before.bytes
    assert all(reason for reason in found.dense.values())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_factored_together_or_stay_dense(name):
    model = build(name)
    matrices = [m for m in find_matrices(model) if m.expert is not None and m.layer == 1]
    down = [m for m in matrices if m.type == "fc_out"]
    others = [m for m in matrices if m.type != "fc_out"]
    dense = copy.deepcopy(model)
    edits = [*(make_edit(m, 0.1 + 0.05 * i) for i, m in enumerate(down)), make_edit(others[0], 0.1)]
    for edit in edits:
        matrix = by_name(matrices, edit.matrix)
        write(dense, matrix, truncated(read(dense, matrix), edit.rank))
    found = factor_(model, edits)
    assert list(found.layers) == [down[0].parameter]
    assert isinstance(low_rank_layers(model)[down[0].parameter], FactoredExperts)
    assert "largest of their ranks" in found.dense[others[0].parameter]
    close(*outputs(name, model, dense))


def test_a_plan_that_does_not_fit_changes_nothing():
    model = build("llama")
    edit = make_edit(matrix_of(model, "fc_in"), 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match="shape"):
        factor_(model, [edit, make_edit(matrix_of(model, "fc_out"), 0.2).model_copy(update={"shape": (3, 3)})])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_weight_held_by_two_modules_is_edited_and_stays_dense():
    model = build("llama")
    first, second = (model.model.layers[i].mlp.down_proj for i in (0, 1))
    second.weight = first.weight
    matrix = next(m for m in find_matrices(model) if m.name == "model.layers.0.mlp.down_proj")
    found = factor_(model, [make_edit(matrix, 0.1)])
    assert "shared" in found.dense[matrix.name]
    assert first.weight is second.weight


def lies_in(folder, tensor):
    """Whether a tensor's numbers are a file of the folder that is mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return True
    return False


def test_spilled_factors_are_the_same_and_lie_in_files_that_are_mapped(tmp_path):
    model, other = build("phi3"), build("phi3")
    edits = [make_edit(m, 0.2) for m in find_matrices(model) if not m.whole]
    factor_(model, edits, spill=tmp_path)
    factor_(other, edits)
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    for layer in low_rank_layers(model).values():
        assert all(lies_in(tmp_path, tensor) for tensor in layer.state_dict().values() if tensor.numel())
    close(*outputs("phi3", model, other))
    model.double()(torch.arange(5)[None]).logits.sum().backward()


@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral"])
def test_with_no_bytes_allowed_every_edited_weight_is_dense_and_spilled_ones_are_mapped(tmp_path, name):
    model, other = build(name), build(name)
    edits = [make_edit(m, 0.2) for m in find_matrices(model) if not m.whole]
    found = factor_(model, edits, at_most=0, spill=tmp_path)
    assert not found.layers
    assert found.dense
    apply_(other, edits)
    state, expected = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    edited = {m.parameter for m in find_matrices(model)}
    assert all(lies_in(tmp_path, model.get_parameter(parameter)) for parameter in edited)


def test_a_module_held_in_several_places_is_replaced_in_all():
    inner = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(inner, nn.ReLU()), "b": nn.Sequential(nn.ReLU(), inner)})
    replace_(model, {"a.0": FactoredLinear(4, 4, 1)})
    assert isinstance(model["a"][0], LowRankLayer)
    assert model["b"][1] is model["a"][0]


def test_factoring_again_adds_to_what_is_there():
    model = build("llama")
    dense = copy.deepcopy(model)
    one, two = matrix_of(model, "fc_in"), matrix_of(model, "fc_out", 2)
    factor_(model, [make_edit(one, 0.1)])
    factor_(model, [make_edit(two, 0.1)])
    assert list(model.config.quantization_config.layers) == [one.name, two.name]
    for matrix in (one, two):
        write(dense, matrix, truncated(read(dense, matrix), make_edit(matrix, 0.1).rank))
    close(*outputs("llama", model, dense))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_dequantize_gives_the_dense_model_with_the_names_it_had(name):
    model = build(name)
    names = {key: value.shape for key, value in model.state_dict().items()}
    matrices = partition(find_matrices(model))
    factor_(model, [make_edit(m, 0.15) for m in matrices])
    expected = outputs(name, model)[0]
    dense = model.dequantize()
    assert dense is model
    assert {key: value.shape for key, value in model.state_dict().items()} == names
    assert not low_rank_layers(model)
    assert not hasattr(model.config, "quantization_config")
    close(outputs(name, model)[0], expected)
