"""What weights see, by watching products, equals what hooks on modules see; experts are told apart."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import tiny_models as tiny
from eckart import calibration
from eckart.calibration import collect, each_expert, read_windows
from eckart.dataflow import example_inputs, execution_order
from eckart.errors import TaskError
from eckart.matrices import find_blocks, find_matrices, partition, read, write
from eckart.propagation import Streams
from eckart.tasks import Example, make_task


def text(words=200, seed=0):
    return make_task("text", [Example(tiny.sentence(words, seed), None), Example(tiny.sentence(words, seed + 1), None)])


def windows(count=4, length=12, **options):
    return read_windows(text(), tiny.tokenizer(), length=length, count=count, **options)


def test_windows_are_the_joined_documents_cut_to_one_length():
    tokenizer = tiny.tokenizer()
    ids = [token for example in text().examples for token in tokenizer(example.prompt).input_ids]
    found = read_windows(text(), tokenizer, length=9, count=3, first=2)
    rows = sorted((*sequences[0].row.ids, sequences[0].targets[-1]) for sequences in found.sequences)
    assert rows == sorted(tuple(ids[start : start + 9]) for start in (18, 27, 36))


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(TaskError, match="longer text"):
        windows(first=100)


@pytest.mark.parametrize("name", ["llama", "gptj", "opt", "gpt_neox", "falcon"])
def test_moments_are_those_that_hooks_on_the_modules_see(name):
    model = tiny.build(name)
    matrices = [m for m in partition(find_matrices(model)) if m.rows is None]
    inputs, gradients, handles = {}, {}, []
    for matrix in matrices:
        module = model.get_submodule(matrix.parameter.removesuffix(".weight"))
        assert isinstance(module, nn.Linear)

        def entering(_module, args, output, key=matrix.name):
            inputs.setdefault(key, [args[0].detach().flatten(0, -2).double()])  # a block runs again for its gradients
            if output.requires_grad:
                output.register_hook(lambda g: gradients.setdefault(key, []).append(g.flatten(0, -2).double()))

        handles.append(module.register_forward_hook(entering))
    found = collect(model, windows(), matrices)
    for handle in handles:
        handle.remove()
    for matrix in matrices:
        x, moments = torch.cat(inputs[matrix.name]), found[matrix.name]
        assert moments.tokens == len(x) == 4 * 11
        torch.testing.assert_close(moments.inputs, x.T @ x / len(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.magnitude, x.abs().mean(0), atol=1e-5, rtol=1e-4)
        g = torch.cat(gradients[matrix.name])
        torch.testing.assert_close(moments.gradients, g.T @ g / len(x), atol=1e-6, rtol=1e-3)
        fisher = (g**2 * (x**2).sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close(moments.fisher, fisher, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_every_matrix_of_every_causal_layout_is_seen(name):
    model = tiny.build(name)
    matrices = partition(find_matrices(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = collect(model, windows(6, 20), matrices)
    for matrix in matrices:
        moments = found[matrix.name]
        out, into = matrix.shape
        assert moments.inputs.shape == (into, into)
        assert moments.gradients.shape == (out, out)
        assert moments.tokens == 6 * 19 or matrix.expert is not None
        assert float(moments.inputs.trace()) > 0
        assert float(moments.gradients.trace()) > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_every_token_goes_to_as_many_experts_as_the_router_chooses():
    model = tiny.build("mixtral")
    matrices = [m for m in partition(find_matrices(model)) if m.expert is not None]
    found = collect(model, windows(), matrices, gradients=False)
    for layer in range(3):
        for kind in ("fc_in", "fc_out"):
            tokens = [found[m.name].tokens for m in matrices if m.layer == layer and m.type == kind]
            assert sum(tokens) == 2 * 4 * 11


def test_the_divergence_of_a_small_change_is_half_the_mean_square_that_gradients_tell():
    """The gradients are those of drawn tokens, so the second order holds in expectation: many draws, wide tolerance."""
    model = tiny.build("llama")
    (matrix,) = [m for m in partition(find_matrices(model)) if m.name == "model.layers.2.mlp.down_proj"]
    encoded = windows(16, 12)
    change = 0.02 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids = torch.tensor([sequences[0].row.ids for sequences in encoded.sequences])
    outputs = []
    for sign in (0, 1):
        weight = model.get_parameter(matrix.parameter)
        with torch.no_grad():
            weight.add_((sign * change).float())
            outputs.append(model(input_ids=ids).logits.double().log_softmax(-1))
            weight.sub_((sign * change).float())
    divergence = float((outputs[0].exp() * (outputs[0] - outputs[1])).sum(-1).mean())
    predicted = []
    for seed in range(8):
        moments = collect(model, encoded, [matrix], seed=seed)[matrix.name]
        predicted.append(0.5 * float(torch.trace(moments.gradients @ change @ moments.inputs @ change.T)))
    # Inputs and gradients are not independent, which the Kronecker form takes them to be.
    assert sum(predicted) / 8 == pytest.approx(divergence, rel=0.35)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_uncut_streams_are_equal_and_see_what_a_plain_pass_sees(name):
    model = tiny.build(name)
    matrices = partition(find_matrices(model))
    encoded = windows()
    plain = collect(model, encoded, matrices, gradients=False)
    stacks = {path: stack for path, stack, _ in find_blocks(model)}
    order = [(path, stacks[path]) for path in execution_order(model, stacks, example_inputs(model))]
    streams = Streams(model, order, encoded.blocks)
    with each_expert(model):
        for path, _ in order:
            mine = [m for m in matrices if m.parameter.startswith(f"{path}.")]
            streams.enter(mine, {m.parameter: model.get_parameter(m.parameter).detach().clone() for m in mine})
            groups = streams.groups()
            assert sorted(m.name for group in groups for m in group) == sorted(m.name for m in mine)
            for group in groups:
                for matrix_name, found in streams.inputs(group).items():
                    torch.testing.assert_close(found.after, plain[matrix_name].inputs, atol=1e-5, rtol=1e-4)
                    torch.testing.assert_close(found.cross, found.after, atol=1e-6, rtol=1e-5)
            streams.advance()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "mixtral", "gemma2"])
def test_blocks_that_run_again_for_their_gradients_give_the_same_moments_to_the_bit(name, monkeypatch):
    model, encoded = tiny.build(name), windows()
    matrices = partition(find_matrices(model))
    found = collect(model, encoded, matrices)
    monkeypatch.setattr(calibration, "_run_again", lambda *_: nullcontext())
    for key, plain in collect(model, encoded, matrices).items():
        assert plain.gradients is not None
        for part in ("inputs", "magnitude", "gradients", "fisher"):
            assert torch.equal(getattr(found[key], part), getattr(plain, part))
    assert "forward" not in model.get_submodule(find_blocks(model)[0][0]).__dict__


def test_the_graph_of_all_blocks_holds_nothing_from_inside_them():
    model, held = tiny.build("llama"), []
    matrices = find_matrices(model)

    def pack(tensor):
        held.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        collect(model, windows(), matrices)
    assert held  # the last norm and the head
    assert not any(shape[-1] == model.config.intermediate_size for shape in held if shape)


def test_what_a_block_lacks_is_seen_by_the_weight_that_adds_to_its_output():
    model, original = tiny.build("llama"), tiny.build("llama")
    encoded = windows(12)
    mine = [m for m in partition(find_matrices(model)) if m.layer == 0]
    streams = Streams(model, [(f"model.layers.{i}", "model.layers") for i in range(3)], encoded.blocks)
    streams.enter(mine, {m.parameter: model.get_parameter(m.parameter).detach().clone() for m in mine})
    gate, out, down = (next(m for m in mine if m.type == kind) for kind in ("fc_in", "out_proj", "fc_out"))
    write(model, gate, 0.5 * read(model, gate))
    found = streams.inputs([down])[down.name]
    assert streams.inputs([out])[out.name].drift is None
    seen, outputs = [], {}
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0].flatten(0, 1)))
    for name, each in (("cut", model), ("original", original)):
        outputs[name] = []
        each.model.layers[0].register_forward_hook(
            lambda _m, _a, output, to=outputs[name]: to.append(output.flatten(0, 1))
        )
        for block in encoded.blocks:
            with torch.inference_mode():
                each(**block.inputs)
    lacking = torch.cat(outputs["original"]) - torch.cat(outputs["cut"])
    y = torch.cat(seen)
    torch.testing.assert_close(found.drift, (lacking.T @ y / len(y)).double(), atol=1e-5, rtol=1e-3)
    # With the right share of it, the weight that makes up for it is that of least squares.
    best = torch.linalg.lstsq(y.double(), (lacking + y @ read(model, down).T).double()).solution.T
    target = found.drift + read(model, down).double() @ found.after
    torch.testing.assert_close(torch.linalg.solve(found.after, target.T).T, best, atol=1e-2, rtol=1e-2)


def test_moments_that_do_not_fit_together_are_read_one_after_the_other(monkeypatch):
    model = tiny.build("llama")
    matrices = find_matrices(model)
    assert list(calibration.readings(model, matrices, lambda matrix: [matrix])) == [list(matrices)]
    monkeypatch.setattr(calibration, "STATISTICS_BYTES", 0)
    limit = sum(parameter.nbytes for parameter in model.parameters())
    parts = list(calibration.readings(model, matrices, lambda matrix: [matrix]))
    assert [matrix for part in parts for matrix in part] == list(matrices)
    assert len(parts) > 1
    for part, following in zip(parts, [*parts[1:], []]):
        assert calibration.moments_bytes(part) <= limit or len(part) == 1
        assert not following or calibration.moments_bytes([*part, following[0]]) > limit
