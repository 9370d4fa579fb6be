"""Factored experts stand where a 3-D parameter stood. Oracles: transformers' own forward, torch.linalg."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional

import tiny_models as tiny
from eckart.errors import MatrixError
from eckart.experts import FactoredExperts


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def truncated(weight, rank):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def factor_experts(model, dense, *, transposed):
    """Swap every stack of experts for its factors, in one model, and for their product, in the other."""
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                stack = parameter.detach().mT if transposed else parameter.detach()
                ranks = [1 + expert * 5 % min(stack.shape[1:]) for expert in range(len(stack))]
                exact = torch.stack([truncated(*pair) for pair in zip(stack, ranks)]).float()
                dense.get_parameter(f"{path}.{name}").data = exact.mT if transposed else exact
                delattr(module, name)
                setattr(module, name, FactoredExperts.from_weight(parameter, ranks, transposed=transposed))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_factored_experts_stand_where_the_parameter_stood(name, implementation):
    model = tiny.build(name)
    model.set_experts_implementation(implementation)
    dense = copy.deepcopy(model)
    factor_experts(model, dense, transposed=name == "gpt_oss")
    layers = [module for module in model.modules() if isinstance(module, FactoredExperts)]
    assert len(layers) >= 4
    ids = torch.arange(12)[None] % model.config.vocab_size
    out, expected = model(ids).logits, dense(ids).logits
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    out.square().mean().backward()
    assert all(layer.up.grad.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_a_model_with_factored_experts_compiles_to_one_graph(implementation):
    model = tiny.build("mixtral")
    model.set_experts_implementation(implementation)
    factor_experts(model, copy.deepcopy(model), transposed=False)
    ids = torch.arange(12)[None] % model.config.vocab_size
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_unequal_ranks_are_padded_and_count_the_padding(transposed):
    stack = normal(3, 20, 14)
    layer = FactoredExperts.from_weight(stack.mT if transposed else stack, [1, 9, 4], transposed=transposed)
    exact = torch.stack([truncated(*pair) for pair in zip(stack, (1, 9, 4))])
    torch.testing.assert_close(layer.dense(), exact.mT if transposed else exact, atol=1e-10, rtol=0)
    assert layer.down.shape == (3, 16, 14)
    assert layer.parameters_stored == 3 * 16 * (20 + 14)
    assert layer.flops(5) == 5 * 2 * 16 * (20 + 14)
    x = normal(4, 14)
    for expert in range(3):
        y = x @ layer[expert] if transposed else functional.linear(x, layer[expert])
        torch.testing.assert_close(y, x @ exact[expert].T, atol=1e-10, rtol=0)
    empty = FactoredExperts(3, 14, 20, 9, transposed=transposed, device="meta", dtype=torch.float64)
    empty.load_state_dict(load(save(layer.state_dict())), assign=True)
    assert torch.equal(empty.dense(), layer.dense())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_of_experts_is_independent_and_a_change_of_dtype_changes_only_that(transposed):
    stack = normal(3, 20, 14)
    layer = FactoredExperts.from_weight(stack.mT if transposed else stack, [4, 4, 4], transposed=transposed)
    before, twin = layer.dense().clone(), copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer.dense(), before)
    assert not torch.equal(twin.dense(), before)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == half.dtype == half.dense().dtype == torch.bfloat16
    assert (half.dense().double() - before).norm() / before.norm() < 2e-2


def test_autocast_runs_factored_experts_as_it_runs_the_parameter():
    model = tiny.build("mixtral")
    dense = copy.deepcopy(model)
    factor_experts(model, dense, transposed=False)
    ids = torch.arange(12)[None] % model.config.vocab_size
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = model(ids).logits, dense(ids).logits
    assert y.dtype == expected.dtype
    error, of_dense = ((each - exact).norm() / exact.norm() for each in (y.float(), expected.float()))
    assert 0 < error < 2 * of_dense + 1e-2


@pytest.mark.parametrize("use", [lambda w: torch.ones(14) + w, lambda w: functional.softmax(w, -1), lambda w: w @ w])
def test_what_is_not_a_multiplication_of_experts_is_refused(use):
    layer = FactoredExperts(3, 14, 14, 4)
    with pytest.raises((MatrixError, TypeError)):
        use(layer[0])
