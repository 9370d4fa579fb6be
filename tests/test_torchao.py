"""torchao rounds the factors, which are ordinary linear layers, with no code of ours. Oracle: rounding by hand."""

import warnings

import pytest
import torch
from torch import nn

import tiny_models as tiny
from eckart.dataflow import low_rank_layers
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, PivotedLinear, RowBlockedLinear
from eckart.matrices import find_matrices
from eckart.surgery import make_edit
from eckart.truncation import round_to_int8

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")


def inner(model):
    """The factors, by their paths."""
    layers = low_rank_layers(model)
    return {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith(tuple(layers))}


def quantize(model, chosen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, path: path in chosen)


@pytest.mark.parametrize("rho", [0.2, 0.55])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_int8_factors_are_half_a_step_away_and_the_model_as_near_as_rounded_by_hand(name, rho):
    model, by_hand = tiny.build(name), tiny.build(name)
    for each in (model, by_hand):
        edits = [make_edit(m, rho) for m in find_matrices(each) if m.type in ("fc_in", "fc_out")]
        factor_(each, edits, at_most=1.0)
    ids = tiny.inputs(name)["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        quantize(model, inner(model))
        found = model(ids).logits
        for path in inner(by_hand):
            exact = by_hand.get_submodule(path).weight
            weight = model.get_submodule(path).weight.dequantize()
            step = exact.abs().amax(1, keepdim=True) / 127
            assert ((weight - exact).abs() <= 0.51 * step).all()
            values, scales = round_to_int8(exact)
            exact.copy_(values * scales)
        rounded = by_hand(ids).logits
    error, of_rounding = ((each - before).norm() / before.norm() for each in (found, rounded))
    assert 0 < error < 2 * of_rounding
    assert error < 0.05


@pytest.mark.parametrize("kind", [FactoredLinear, PivotedLinear, RowBlockedLinear])
def test_bytes_of_int8_factors_are_a_quarter_of_float32(kind):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    layer = (
        kind.from_weight(weight, [8, 12], [range(0, 96, 2), range(1, 96, 2)])
        if kind is RowBlockedLinear
        else kind.from_weight(weight, 24)
    )
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    factors = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert len(factors) == (4 if kind is RowBlockedLinear else 2)
    quantize(layer, factors)
    for path in factors:
        weight = layer.get_submodule(path).weight
        stored = [getattr(weight, part) for part in ("qdata", "scale")]
        assert stored[0].dtype == torch.int8
        assert sum(part.nbytes for part in stored) < 0.3 * 4 * weight.numel() + 4 * weight.shape[0]
    found = layer(x)
    assert 0 < (found - before).norm() / before.norm() < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_bfloat16_factors_are_as_near_as_a_bfloat16_dense_model(name):
    model = tiny.build(name)
    factor_(model, [make_edit(m, 0.2) for m in find_matrices(model) if m.type in ("fc_in", "fc_out")])
    ids = tiny.inputs(name)["input_ids"]
    with torch.no_grad():
        exact = model(ids).logits
        half = model.to(torch.bfloat16)(ids).logits.float()
        dense = model.dequantize()(ids).logits.float()
    error, of_dense = ((each - exact).norm() / exact.norm() for each in (half, dense))
    assert error < 2 * of_dense
    assert error < 0.05
