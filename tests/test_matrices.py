"""Every layout is found, typed and read the same way. Oracle: what the config says, and what the model computes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny_models as tiny
from eckart.errors import MatrixError, ModelError
from eckart.matrices import (
    TYPES,
    by_name,
    coverage,
    expand_types,
    find_blocks,
    find_matrices,
    partition,
    read,
    select,
    write,
)

GATED = {
    "llama",
    "llama_relu",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "t5_gated",
    "gpt_oss",
}
FUSED_QKV = {"phi3", "gpt2", "gpt_neox", "falcon", "falcon_rw", "falcon_grouped", "bloom", "decision_transformer"}


@pytest.fixture(scope="module")
def found():
    return {name: (model := tiny.build(name), find_matrices(model)) for name in tiny.MODELS}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_non_embedding_weight_matrix_is_held_exactly_once(found, name):
    model, matrices = found[name]
    assert coverage(model, matrices) == 1.0
    # The same by another road: count the numbers in linear layers and expert stacks.
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
    expected = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in embeddings
    } | {id(p): p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3}
    routers = {n for n, p in model.named_parameters() if p.ndim == 2 and ".gate.weight" in n or "router.weight" in n}
    expected |= {id(model.get_parameter(n)): model.get_parameter(n).numel() for n in routers}
    held = sum(matrix.shape[0] * matrix.shape[1] for matrix in partition(matrices))
    assert held == sum(expected.values())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_types_are_lasers_words_and_complete_in_every_block(found, name):
    model, matrices = found[name]
    assert {matrix.type for matrix in matrices} <= set(TYPES)
    expected = {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    expected |= {"fc_up"} if name in GATED else set()
    expected |= {"qkv_proj"} if name in FUSED_QKV else set()
    for _, stack, layer in find_blocks(model):
        here = {m.type for m in matrices if (m.stack, m.layer) == (stack, layer)}
        assert here - {"other"} == expected
    assert all(m.type == "other" for m in matrices if m.layer is None)


# Left out: images have several positions, cross-attention attends to them, and attention sinks dilute the value.
ONE_POSITION = sorted(set(tiny.MODELS) - {"vit", "t5", "t5_gated", "decision_transformer", "gpt_oss"})


@pytest.mark.parametrize("name", ONE_POSITION)
def test_with_one_position_queries_and_keys_do_not_matter_and_values_do(found, name):
    """Attention to a single position has weight 1, which tells the three apart without any name."""
    model, matrices = found[name]
    arguments = tiny.inputs(name, tokens=1)
    before = tiny.output(name, model, **arguments)
    for kind, changes in (("q_proj", False), ("k_proj", False), ("v_proj", True), ("out_proj", True)):
        matrix = next(m for m in matrices if m.type == kind and m.layer == 1)
        original = read(model, matrix)
        # Not a constant: a layer norm would take it out again.
        write(model, matrix, original + torch.linspace(0, 1, original.numel()).view_as(original))
        after = tiny.output(name, model, **arguments)
        write(model, matrix, original)
        assert (not torch.allclose(before, after, atol=1e-5)) is changes, kind


@pytest.mark.parametrize(("kind", "silent"), [("fc_up", True), ("fc_in", False)])
@pytest.mark.parametrize("name", sorted(GATED - {"gpt_oss", "llama_relu"}))
def test_up_is_the_half_of_a_gated_mlp_in_which_it_is_linear(found, name, kind, silent):
    """Doubling `up` and halving `down` cancels; doubling the gate goes through the activation and does not."""
    model, matrices = found[name]
    arguments = tiny.inputs(name)
    before = tiny.output(name, model, **arguments)
    changed = [m for m in matrices if m.type in (kind, "fc_out") and m.layer == 1]
    originals = [(m, read(model, m)) for m in changed]
    for matrix, weight in originals:
        write(model, matrix, weight * (2.0 if matrix.type == kind else 0.5))
    after = tiny.output(name, model, **arguments)
    for matrix, weight in originals:
        write(model, matrix, weight)
    assert torch.allclose(before, after, atol=1e-4, rtol=1e-4) is silent


def test_the_gate_of_a_relu_is_found_although_it_has_no_curvature(found):
    model, matrices = found["llama_relu"]
    for matrix in matrices:
        word = matrix.name.rpartition(".")[2]
        assert (word, matrix.type) in {
            *(("gate_proj", "fc_in"), ("up_proj", "fc_up"), ("down_proj", "fc_out")),
            *((f"{letter}_proj", "out_proj" if letter == "o" else f"{letter}_proj") for letter in "qkvo"),
        }


def test_interleaved_and_clamped_gates_of_gpt_oss_are_told_apart(found):
    model, matrices = found["gpt_oss"]
    gate = next(m for m in matrices if m.type == "fc_in" and m.layer == 0)
    up = next(m for m in matrices if m.type == "fc_up" and m.layer == 0)
    # transformers documents gate = gate_up[..., ::2], up = gate_up[..., 1::2].
    stored = model.get_parameter(gate.parameter)
    torch.testing.assert_close(read(model, gate), stored[0, :, ::2].T)
    torch.testing.assert_close(read(model, up), stored[0, :, 1::2].T)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_reading_and_writing_back_changes_nothing_to_the_bit(found, name):
    model, matrices = found[name]
    before = {n: p.clone() for n, p in model.named_parameters()}
    for matrix in matrices:
        write(model, matrix, read(model, matrix))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_what_was_read_is_a_copy(found, name):
    model, matrices = found[name]
    before = {n: p.clone() for n, p in model.named_parameters()}
    for matrix in matrices:
        read(model, matrix).zero_()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_writing_a_matrix_changes_its_own_numbers_only(found, name):
    model, matrices = found[name]
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for matrix in matrices:
        others = [m for m in partition(matrices) if m.name != matrix.name and not matrix.whole]
        same_parameter = [m for m in others if m.parameter == matrix.parameter]
        before_others = [read(model, m) for m in same_parameter]
        before = {n: p.clone() for n, p in model.named_parameters()}
        original = read(model, matrix)
        write(model, matrix, original + 1)
        changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert changed == {matrix.parameter}
        assert all(torch.equal(read(model, m), w) for m, w in zip(same_parameter, before_others))
        difference = (model.get_parameter(matrix.parameter) - before[matrix.parameter]).count_nonzero()
        assert difference == original.numel()
        assert id(model.get_parameter(matrix.parameter)) not in embeddings
        write(model, matrix, original)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_full_rank_truncation_leaves_the_output_alone(found, name):
    model, matrices = found[name]
    arguments = tiny.inputs(name)
    before = tiny.output(name, model, **arguments)
    originals = [(m, read(model, m)) for m in matrices]
    for matrix, weight in originals:
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        write(model, matrix, (u * s) @ vh)
    after = tiny.output(name, model, **arguments)
    for matrix, weight in originals:
        write(model, matrix, weight)
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(FUSED_QKV & {"gpt_neox", "falcon_grouped", "falcon_rw", "bloom", "falcon"}))
def test_parts_of_a_fused_weight_are_the_rows_that_its_head_layout_says(found, name):
    model, matrices = found[name]
    heads, head_dim = 4, 8
    rows = torch.arange(96 if name not in ("falcon", "falcon_grouped") else {"falcon": 48, "falcon_grouped": 64}[name])
    if name in ("gpt_neox", "falcon_rw", "bloom"):  # (head, 3, head_dim)
        layout = rows.view(heads, 3, head_dim)
        expected = {"q_proj": layout[:, 0], "k_proj": layout[:, 1], "v_proj": layout[:, 2]}
    elif name == "falcon":  # multi-query: all queries, one key, one value
        expected = {"q_proj": rows[:32], "k_proj": rows[32:40], "v_proj": rows[40:]}
    else:  # (group, queries of the group + key + value, head_dim)
        layout = rows.view(2, 4, head_dim)
        expected = {"q_proj": layout[:, :2], "k_proj": layout[:, 2], "v_proj": layout[:, 3]}
    for kind, indices in expected.items():
        matrix = next(m for m in matrices if m.type == kind and m.layer == 1)
        stored = model.get_parameter(matrix.parameter)
        assert torch.equal(read(model, matrix), stored[indices.flatten()])


def test_one_expert_of_one_layer_is_edited_by_itself(found):
    model, matrices = found["qwen3_moe"]
    matrix = by_name(matrices, "model.layers.1.mlp.experts.down_proj[7]")
    before = model.get_parameter(matrix.parameter).clone()
    write(model, matrix, torch.zeros(matrix.shape))
    after = model.get_parameter(matrix.parameter)
    assert not after[7].any()
    assert torch.equal(after[:7], before[:7])
    write(model, matrix, before[7])


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_tied_weights_stay_tied_and_are_not_listed(found, name):
    model, matrices = found[name]
    for matrix in matrices:
        write(model, matrix, read(model, matrix) * 1.0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not any("embed" in m.name or "lm_head" in m.name or "wte" in m.name for m in matrices)


def test_finding_matrices_leaves_the_model_as_it_was():
    model = tiny.build("llama").train()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    use_cache = model.config.use_cache
    find_matrices(model)
    assert all(m.training for m in model.modules())
    assert model.config.use_cache == use_cache
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_finding_matrices_works_inside_inference_mode_and_in_half_precision():
    model = tiny.build("phi3").to(torch.bfloat16)
    with torch.inference_mode():
        inside = find_matrices(model)
    assert inside == find_matrices(tiny.build("phi3"))


def test_a_model_with_unknown_inputs_asks_for_them():
    model = tiny.build("llama")
    model.main_input_name = "waveforms"
    with pytest.raises(ModelError, match="waveforms"):
        find_matrices(model)
    assert len(find_matrices(model, {"input_ids": torch.tensor([[5, 6, 7]])})) == 21


def test_select_counts_negative_layers_from_the_last(found):
    _, matrices = found["llama"]
    assert [m.layer for m in select(matrices, types=["fc_in"], layers=[-1])] == [2]
    assert select(matrices, types=["mlp"], layers=[0, 2]) == tuple(
        m for m in matrices if m.type in ("fc_in", "fc_up", "fc_out") and m.layer in (0, 2)
    )


def test_the_fused_whole_is_chosen_only_by_its_own_name(found):
    _, matrices = found["gpt2"]
    assert {m.type for m in select(matrices)} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    assert {m.type for m in select(matrices, types=["qkv_proj"])} == {"qkv_proj"}
    assert "qkv_proj" not in expand_types(["attn"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": ["fc_inn"]}, "Did you mean 'fc_in'"),
        ({"types": ["fc_up"]}, "no matrix of type 'fc_up'"),
        ({"layers": [3]}, "blocks are 0 to 2"),
        ({"layers": [-4]}, "blocks are 0 to 2"),
    ],
)
def test_an_unknown_type_or_layer_is_refused_with_what_is_allowed(found, options, message):
    with pytest.raises(MatrixError, match=message):
        select(found["gpt2"][1], **options)


def test_a_weight_of_another_shape_is_refused(found):
    model, matrices = found["llama"]
    with pytest.raises(MatrixError, match=r"shape \(1, 2\)"):
        write(model, matrices[0], torch.zeros(1, 2))
    with pytest.raises(MatrixError, match="near ones are"):
        by_name(matrices, "model.layers.0.mlp.gate")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_heads_are_those_of_the_config(found, name):
    model, matrices = found[name]
    config = model.config
    queries = config.num_attention_heads
    # Falcon's older layouts have one key head or as many as query heads, whatever the config's number says.
    keys = {"falcon": 1, "falcon_rw": queries, "falcon_grouped": 2}.get(name)
    keys = keys or getattr(config, "num_key_value_heads", None) or queries
    for matrix in matrices:
        heads = {"q_proj": queries, "k_proj": keys, "v_proj": keys}.get(matrix.type)
        assert matrix.heads == heads, matrix.name


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "falcon_grouped", "bloom", "gpt_oss"])
def test_the_rows_of_a_head_of_the_values_reach_no_other_head(found, name):
    """A change to one run of rows reaches columns of the output projection that no other run reaches."""
    model, matrices = found[name]
    value = next(m for m in matrices if m.type == "v_proj" and m.layer == 0)
    projection = next(m for m in matrices if m.type == "out_proj" and m.layer == 0)
    read_by_projection = []
    handle = model.get_submodule(projection.parameter.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, args: read_by_projection.append(args[0].flatten(0, -2))
    )
    original = read(model, value)
    size = value.shape[0] // value.heads
    arguments = tiny.inputs(name)
    tiny.output(name, model, **arguments)
    touched = []
    for head in range(value.heads):
        changed = original.clone()
        changed[head * size : (head + 1) * size] += 1
        write(model, value, changed)
        tiny.output(name, model, **arguments)
        touched.append((read_by_projection[-1] != read_by_projection[0]).any(0))
    write(model, value, original)
    handle.remove()
    # Every column is touched by exactly one head.
    assert torch.equal(torch.stack(touched).sum(0), torch.ones(projection.shape[1], dtype=torch.long))
