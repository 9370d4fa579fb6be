"""Stock PEFT on the inner linears of low-rank layers: it trains, saves, loads and merges with no code of ours."""

import copy

import pytest
import torch
import transformers

import tiny_models as tiny
from eckart.checkpoint import save
from eckart.dataflow import low_rank_layers
from eckart.experts import FactoredExperts
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, PivotedLinear, RowBlockedLinear
from eckart.matrices import find_matrices, partition
from eckart.surgery import make_edit

peft = pytest.importorskip("peft", reason="needs peft, of the extra 'recover'")

# What peft says of transformers' deprecations, of GPT-2's transposed weights and of experts that have no adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:fan_in_fan_out:UserWarning",
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
    "ignore:target_parameters=:RuntimeWarning",
)

# name: the model, which matrices to cut and how, and the layer that this gives.
CASES = {
    "factored": ("llama", lambda m: m.type in ("fc_in", "fc_out"), {"rho": 0.2}, FactoredLinear),
    "pivoted": ("llama", lambda m: m.type in ("fc_in", "fc_out"), {"rho": 0.55}, PivotedLinear),
    "conv1d": ("gpt2", lambda m: m.type == "fc_in", {"rho": 0.2}, FactoredLinear),
    "row-blocked": ("phi3", lambda m: m.type == "q_proj", {"rho": 0.2}, RowBlockedLinear),
    "clustered": ("llama", lambda m: m.type == "q_proj", {"rho": 0.3, "blocks": 2, "clustering": "heads"}, None),
}


def factored(case):
    name, chosen, options, kind = CASES[case]
    model = tiny.build(name)
    options = {"rho": 0.2, **options}
    edits = [make_edit(m, **options) for m in partition(find_matrices(model)) if chosen(m)]
    factor_(model, edits, at_most=1.0)
    layers = low_rank_layers(model)
    assert layers
    assert kind is None or all(isinstance(layer, kind) for layer in layers.values())
    return name, model


def train(model, name, steps=3):
    """Take a few steps of AdamW on random words; return the losses."""
    ids = tiny.inputs(name)["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**tiny.inputs(name)).logits


@pytest.mark.parametrize("target", [["up", "down"], "all-linear"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_trains_saves_loads_and_merges_at_the_rank_it_had(case, target, tmp_path):
    name, model = factored(case)
    folder = save(model, tmp_path / "model")
    kind = type(model)
    model = kind.from_pretrained(folder)
    before = logits(model, name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=target, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    inner = [path for path, module in adapted.named_modules() if hasattr(module, "lora_A")]
    # Every factor has an adapter: `up` alone and `down` alone do not reach all matrices of the layer's rank.
    layers = low_rank_layers(adapted)
    factors = [path for path, module in adapted.named_modules() if path.endswith((".up", ".down"))]
    assert layers
    assert set(factors) <= set(inner)
    assert (set(inner) == set(factors)) == (target != "all-linear")
    losses = train(adapted, name)
    assert losses[-1] < losses[0]
    trained = logits(adapted, name)
    assert (trained - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")

    # A fresh base and the adapter from the disk.
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, name), trained, atol=1e-5, rtol=1e-4)

    merged = again.merge_and_unload()
    assert {key: value.shape for key, value in merged.state_dict().items()} == shapes
    torch.testing.assert_close(logits(merged, name), trained, atol=1e-4, rtol=1e-4)
    loaded, info = kind.from_pretrained(save(merged, tmp_path / "merged"), output_loading_info=True)
    assert not any(info.values()), info
    assert len(low_rank_layers(loaded)) == len(layers)
    torch.testing.assert_close(logits(loaded, name), logits(merged, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("target", [["up", "down"], "all-linear"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_get_no_adapter_and_the_rest_of_the_model_does(name, target, tmp_path):
    model = tiny.build(name)
    chosen = [m for m in partition(find_matrices(model)) if m.expert is not None or m.type == "q_proj"]
    factor_(model, [make_edit(m, 0.2) for m in chosen], at_most=1.0)
    experts = [module for module in model.modules() if isinstance(module, FactoredExperts)]
    assert experts
    state = copy.deepcopy(model.state_dict())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"))
    inside = [path for path, module in adapted.named_modules() if hasattr(module, "lora_A") and "experts" in path]
    assert not inside
    losses = train(adapted, name)
    assert losses[-1] < losses[0]
    trained = logits(adapted, name)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, name), trained, atol=1e-4, rtol=1e-4)
    after = merged.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state if "experts" in key)
    save(merged, tmp_path / "merged")
    assert low_rank_layers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


def test_the_layer_itself_is_refused_by_its_name():
    _, model = factored("factored")
    with pytest.raises(ValueError, match="FactoredLinear"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["gate_proj"]))
