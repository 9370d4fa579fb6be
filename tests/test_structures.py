"""Structures beside plain cuts: within the budget, on disk as counted, and at home wherever a factored layer is."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file

import tiny_models as tiny
from eckart.checkpoint import load, load_model, save
from eckart.compression import Compression, compress, forecast
from eckart.dataflow import low_rank_layers
from eckart.errors import PlanError
from eckart.factoring import factor_
from eckart.monarch import MonarchLinear
from eckart.plan import Edit
from eckart.quantizer import sizes
from eckart.recipe import CompressSettings, RecoverSettings
from eckart.recovery import factors_of, recover
from eckart.shards import open_checkpoint
from eckart.sparse import SparseLinear
from eckart.surgery import apply_
from eckart.tasks import Example, make_task
from eckart.units import seconds_of
from faults import killed_again_and_again

METHODS = ["monarch", "lowrank+sparse"]
LAYERS = {"monarch": MonarchLinear, "lowrank+sparse": SparseLinear}


def text(words=300):
    return make_task("text", [Example(tiny.sentence(words, 0), None)])


def settings(method, **given):
    small = {"ratio": 0.6, "windows": 6, "measured": 2, "window": 16, "allocate": "uniform", "method": method}
    return CompressSettings.model_validate(small | given)


def compressed(name, method, dtype=torch.float32, **given) -> tuple[Compression, torch.nn.Module]:
    """What compress finds, and the model with it."""
    model = tiny.build(name).to(dtype)
    found = compress(model, tiny.tokenizer(), text(), settings(method, **given))
    made = factor_(model, found.plan, factors=found.factors, storage="pivoted")
    assert not made.dense
    return found, model


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon_grouped", "mixtral", "gpt_oss", "bloom"])
def test_every_layout_gets_its_layers_within_the_budget_and_is_loaded_to_the_bit(name, method, tmp_path):
    before = tiny.build(name)
    found, model = compressed(name, method)
    kinds = {type(module) for module in model.modules()}
    assert LAYERS[method] in kinds
    assert found.facts["budget"]["spent"] <= found.facts["budget"]["allowed"]
    assert {edit.kind for edit in found.plan.edits} == {method}
    if name in ("mixtral", "gpt_oss"):
        reasons = set(found.facts["stayed_dense"].values())
        assert f"experts have no {method} layer" in reasons
    for path, layer in low_rank_layers(model).items():
        old = before.get_submodule(path).weight
        assert layer.dense().shape == (old.T if name == "gpt2" else old).shape
    folder = save(model, tmp_path / "a", max_shard_size="20KB")
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    same_state(again, model)
    inputs = tiny.inputs(name)
    torch.testing.assert_close(tiny.output(name, again, **inputs), tiny.output(name, model, **inputs))
    expected = tiny.output(name, model, **inputs)
    dense = again.dequantize()
    torch.testing.assert_close(tiny.output(name, dense, **inputs), expected, atol=5e-5, rtol=1e-4)
    assert dense.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_budget_of_bytes_counts_is_what_lies_on_the_disk(method, dtype, tmp_path):
    plain = tiny.build("llama").to(dtype)
    whole = sum(p.nbytes for p in plain.parameters())
    _, model = compressed("llama", method, dtype, ratio=None, bytes=int(0.75 * whole))
    after, dense = sizes(model)
    assert after.bytes <= 0.75 * whole
    assert dense.bytes == whole
    folder = save(model, tmp_path / "a")
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == after.bytes
    assert after.bytes >= 0.6 * whole
    again = load_model(str(folder), dtype="stored")
    assert {p.dtype for p in again.parameters()} == {dtype}
    same_state(again, model)


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_counts_every_number_that_is_stored(method):
    found, model = compressed("llama", method)
    spent = {row["matrix"]: row["cost"] for row in found.facts["matrices"]}
    dense = sum(row["dense"] for row in found.facts["matrices"])
    for path, layer in low_rank_layers(model).items():
        numbers = layer.parameters_stored - (0 if layer.bias is None else layer.bias.numel())
        assert spent[path] == numbers + sum(
            buffer.numel() for name, buffer in layer.named_buffers() if "order" not in name
        )
    assert sum(spent.values()) <= 0.6 * dense


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocate", ["auto", "tail", "measured", "groups", "energy"])
def test_every_allocation_keeps_the_budget(method, allocate):
    found, _ = compressed("llama", method, allocate=allocate)
    assert found.facts["budget"]["spent"] <= found.facts["budget"]["allowed"]
    assert found.divergence[found.chosen].value <= found.divergence["uniform"].value


def with_every_structure():
    """A model in which every method has made layers of one type."""
    model = tiny.build("llama")
    for method, kind in zip(METHODS, ("fc_in", "q_proj"), strict=True):
        found = compress(model, tiny.tokenizer(), text(), settings(method, types=(kind,)))
        factor_(model, found.plan, factors=found.factors, storage="pivoted")
    assert {LAYERS[method] for method in METHODS} <= {type(module) for module in model.modules()}
    return model


def test_a_fresh_process_loads_and_generates_with_eckart_and_without(tmp_path):
    model = with_every_structure()
    folder = save(model, tmp_path / "a", tiny.tokenizer(), portable=True)
    ids = tiny.inputs("llama")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()
    script = (
        "import sys, json\n{first}\nimport transformers, torch\ntorch.set_num_threads(1)\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]{trust})\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    ways = {"import eckart": "", 'sys.modules["eckart"] = sys.modules["pydantic"] = None': ", trust_remote_code=True"}
    for first, trust in ways.items():
        command = [sys.executable, "-c", script.format(first=first, trust=trust), str(folder), json.dumps(ids.tolist())]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("method", METHODS)
def test_recovery_trains_what_stands_for_the_weight_and_lowers_the_loss(method):
    _, model = compressed("llama", method)
    before = copy.deepcopy(model.state_dict())
    trained = factors_of(model)
    for path, layer in low_rank_layers(model).items():
        weights = {f"{path}.{name}" for name, p in layer.named_parameters() if p.numel() and not name.endswith("bias")}
        assert weights <= trained.keys()
    small = {"window": 16, "batch": 4, "steps": 30, "lr": 5e-3, "evaluations": 3, "patience": None, "held_out": 0.15}
    # Each word follows from the one before it.
    ids = [[start % 90] for start in range(24)]
    for _ in range(39):
        ids = [[*row, (7 * row[-1] + 3) % 90] for row in ids]
    documents = make_task("text", [Example(" ".join(f"w{5 + i}" for i in row), None) for row in ids])
    found = recover(model, tiny.tokenizer(), documents, RecoverSettings(**small, loss="lm"))
    assert found.gain.value < 0
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    # Pivoted products choose their rows anew.
    assert {name for name in changed if not name.endswith("order")} == set(trained)


def test_an_exported_file_says_what_the_model_says(tmp_path):
    pytest.importorskip("onnxscript", reason="needs pip install 'eckart[export]'")
    from eckart.exporting import export_onnx

    found = export_onnx(with_every_structure(), tiny.tokenizer(), tmp_path / "out")
    assert found.agreement.value == 1.0
    assert found.difference < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_scan_of_the_files_reads_the_weight_that_is_stood_for(name, method, tmp_path):
    _, model = compressed(name, method)
    checkpoint = open_checkpoint(str(save(model, tmp_path / "a")))
    assert not checkpoint.skipped
    layers = low_rank_layers(model)
    found = {m.name: checkpoint.read(m) for m in checkpoint.matrices}
    assert layers.keys() & found.keys()
    for path in layers.keys() & found.keys():
        torch.testing.assert_close(found[path], layers[path].dense())


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_compression_goes_on_and_ends_as_an_undisturbed_one(method, tmp_path):
    model, chosen = tiny.build("llama"), settings(method, allocate="auto")
    expected = compress(model, tiny.tokenizer(), text(), chosen)
    found, kills = killed_again_and_again(
        lambda stop: compress(model, tiny.tokenizer(), text(), chosen, spill=tmp_path / "work", progress=stop), 12
    )
    assert kills >= 2
    assert found.plan == expected.plan
    assert found.divergence == expected.divergence
    for key, made in expected.factors.items():
        assert torch.equal(found.factors[key].dense(), made.dense())


@pytest.mark.parametrize("method", METHODS)
def test_a_forecast_and_a_budget_of_time_know_the_structure(method):
    model = tiny.build("llama")
    found = forecast(model, tiny.tokenizer(), text(), settings(method))
    assert len(found["matrices"]) == 21
    assert all(0 < row["rank"] < row["of"] for row in found["matrices"])
    timed = seconds_of((8, 6), settings(method, ratio=None, latency=0.9), torch.zeros(0))
    assert all(seconds > 0 for _, seconds in timed)
    assert timed[-1][0] == 6


def test_a_weight_that_no_grid_divides_stays_dense_and_says_so():
    config = transformers.LlamaConfig(**tiny._GATED | {"intermediate_size": 45})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    found = compress(model, tiny.tokenizer(), text(), settings("monarch"))
    reasons = {name: reason for name, reason in found.facts["stayed_dense"].items() if "mlp" in name}
    assert len(reasons) == 9
    assert reasons["model.layers.0.mlp.gate_proj"] == "no grid divides 45 x 32 into equal blocks"


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_of_structures_needs_its_factors_and_what_does_not_fit_is_refused(method):
    model = tiny.build("llama")
    found = compress(model, tiny.tokenizer(), text(), settings(method))
    with pytest.raises(PlanError, match="calibration text"):
        apply_(model, found.plan)
    edit = found.plan.edits[0].model_dump()
    for change in ({"basis": "bottom"}, {"blocks": 2, "rank": 1}, {"svd": "lowrank"}):
        with pytest.raises(ValidationError):
            Edit.model_validate(edit | change)
    with pytest.raises(ValidationError, match="has none of"):
        settings(method, allocate="signed")


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_whose_structure_saves_too_little_stays_dense_with_what_it_stands_for(method):
    model = tiny.build("llama")
    found = compress(model, tiny.tokenizer(), text(), settings(method, ratio=0.97))
    made = factor_(model, found.plan, factors=found.factors)
    assert made.dense
    path = next(iter(made.dense))
    torch.testing.assert_close(model.get_submodule(path).weight, found.factors[path].dense())


@pytest.mark.parametrize("method", METHODS)
def test_the_program_compresses_and_the_folder_loads(method, program, tiny_llama_folder, tmp_path):
    from conftest import WORDS

    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 30), encoding="utf-8")
    arguments = ["compress", tiny_llama_folder, "--calibration", path, "--ratio", "0.6", "--window", "16", "--windows"]
    done = program(*arguments, "8", "--method", method, "--allocate", "uniform", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    model, tokenizer = load(str(tmp_path / "out" / "model"))
    assert {type(layer) for layer in low_rank_layers(model).values()} == {LAYERS[method]}
    ids = tokenizer("the ant", return_tensors="pt").input_ids
    assert model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
