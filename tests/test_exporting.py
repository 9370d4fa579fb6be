"""Exported models say what the model says. Oracles: PyTorch's generate and cross-entropy, stock PEFT, plain loading."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tiny_models

pytest.importorskip("onnxscript", reason="needs pip install 'eckart[export]'")
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from eckart.checkpoint import load, save
from eckart.errors import ModelError, OutputError, PlanError
from eckart.exporting import export_onnx, run_export
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, PivotedLinear, RowBlockedLinear, SelectedLinear
from eckart.matrices import find_matrices, read
from eckart.onnx_graph import quantize_, share_heads_
from eckart.onnx_runner import generate, losses, open_model, step
from eckart.peft_adapter import export_adapter
from eckart.plan import MadeBy, Plan, PlannedModel, write_plan
from eckart.surgery import applied, make_edit, weights_sha256
from eckart.truncation import cut, decompose

WORDS = "the ant and a bee lives in the house of dog yes red colour is no cat field".split()  # noqa: SIM905


def plan_for(model, rhos, source="tiny"):
    """A plan that cuts the matrices of a model to the given rho in turn."""
    matrices = [m for m in find_matrices(model) if not m.whole and m.layer is not None] or find_matrices(model)
    edits = tuple(make_edit(matrix, rhos[i % len(rhos)]) for i, matrix in enumerate(matrices))
    about = PlannedModel(source=source, architecture=type(model).__name__, weights_sha256=weights_sha256(model))
    return Plan(model=about, edits=edits, made_by=MadeBy(eckart="0"))


@pytest.fixture(scope="module")
def factored_folder(tiny_llama_folder, tmp_path_factory):
    """The tiny Llama with weights stored as factors, as pivoted rows and as blocks of rows."""
    model, tokenizer = load(str(tiny_llama_folder))
    matrices = [matrix for matrix in find_matrices(model) if matrix.layer is not None]
    edits = [
        make_edit(m, 0.4 if m.type in ("fc_in", "q_proj") else 0.7, blocks=2 if m.type == "fc_up" else 1)
        for m in matrices
    ]
    factor_(model, edits, at_most=1.0)
    kinds = {type(module) for module in model.modules()}
    assert {FactoredLinear, PivotedLinear, RowBlockedLinear} <= kinds
    return save(model, tmp_path_factory.mktemp("factored") / "model", tokenizer)


@pytest.fixture(scope="module")
def exported_llama(factored_folder, tmp_path_factory, program):
    """That model exported by the program, and the model."""
    out = tmp_path_factory.mktemp("exported") / "llama"
    result = program("export", factored_folder, "--to", "onnx", "--out", out, "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["agreement"]["value"] == 1.0
    assert facts["checked_with"] == ["onnxruntime", "onnxruntime-genai"]
    return out, load(str(factored_folder))[0]


@pytest.fixture(scope="module")
def exported_gpt2(tmp_path_factory):
    """A GPT-2 with learned positions and transposed weights, some factored, and half of the neurons of one MLP."""
    model = tiny_models.build("gpt2")
    chosen = [m for m in find_matrices(model) if m.type == "fc_in" or (m.type, m.layer) == ("fc_out", 0)]
    edits = [make_edit(matrix, 0.3) for matrix in chosen]
    factors = {}
    for matrix, edit in zip(chosen, edits):
        if matrix.layer == 0:
            spectrum = factors[matrix.name] = cut(decompose(read(model, matrix)), edit.rank)
            (spectrum.U if matrix.type == "fc_in" else spectrum.Vh.T)[1::2] = 0
    factor_(model, edits, factors=factors)
    kinds = {type(module) for module in model.modules()}
    assert {FactoredLinear, RowBlockedLinear, SelectedLinear} <= kinds
    out = tmp_path_factory.mktemp("exported") / "gpt2"
    found = export_onnx(model, tiny_models.tokenizer(), out)
    assert found.agreement.value == 1.0
    return out, model


@pytest.fixture(params=["llama", "gpt2"])
def exported(request):
    return request.getfixturevalue(f"exported_{request.param}")


def greedy(model, ids, tokens):
    """PyTorch's own greedy continuation."""
    given = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0, "attention_mask": given * 0 + 1}
    found = model.generate(given, **options)[0, len(ids) :].tolist()
    return found[:-1] if found and found[-1] == model.config.eos_token_id else found


def test_an_exported_model_continues_as_pytorch_does(exported):
    folder, model = exported
    runner = open_model(folder, threads=1)
    for seed in range(4):
        ids = torch.randint(4, 30, (1 + 3 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        found = list(generate(runner, ids, tokens=16))
        assert found == greedy(model, ids, 16)
        assert 0 < len(found) <= 16


def test_onnxruntime_genai_continues_text_as_pytorch_does(exported_llama, factored_folder):
    genai = pytest.importorskip("onnxruntime_genai")
    folder, model = exported_llama
    ids = transformers.AutoTokenizer.from_pretrained(factored_folder)(" ".join(WORDS[:6])).input_ids
    theirs = genai.Model(str(folder))
    parameters = genai.GeneratorParams(theirs)
    parameters.set_search_options(max_length=len(ids) + 12, do_sample=False)
    generator = genai.Generator(theirs, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0)[len(ids) :].tolist()
    assert found[:12] == greedy(model, ids, 12)[: len(found)]


def test_rows_of_a_batch_padded_on_the_left_are_those_of_pytorch(exported):
    folder, model = exported
    ids = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    found, _ = step(open_model(folder, threads=1), ids.numpy(), mask=mask.numpy())
    seen = mask.numpy().astype(bool)
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-3, atol=1e-4)


def test_reading_in_pieces_gives_the_logits_of_reading_at_once(exported):
    runner = open_model(exported[0], threads=1)
    ids = np.arange(5, 17)[None]
    whole, _ = step(runner, ids)
    cache, pieces = None, []
    for part in (ids[:, :1], ids[:, 1:6], ids[:, 6:7], ids[:, 7:]):
        logits, cache = step(runner, part, cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (8, 1), (32, 16)])
def test_every_token_is_scored_once_with_the_loss_of_pytorch(exported, window, stride):
    folder, model = exported
    ids = torch.randint(4, 30, (21,), generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(20)
    for target in range(1, 21):
        # The first window that reaches a token scores it.
        start = 0
        while start + window <= target:
            start = min(start + stride, start + window - 1)
        with torch.inference_mode():
            logits = model(input_ids=ids[None, start:target]).logits[0, -1]
        expected[target - 1] = torch.nn.functional.cross_entropy(logits, ids[target])
    found = losses(open_model(folder, threads=1), ids.tolist(), window=window, stride=stride)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_factors_stay_factors_in_the_file(exported_llama):
    folder, model = exported_llama
    graph = onnx.load(folder / "model.onnx").graph
    stored = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == 1)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9 * numbers <= stored <= numbers + 50  # nothing multiplied out, no tied weight twice
    # The order of a pivoted layer's rows is a constant of one axis.
    assert not any(node.op_type == "GatherElements" for node in graph.node)


@pytest.mark.parametrize("axis", [2, 1])
def test_shared_keys_are_not_repeated_in_the_file_and_others_are_left_alone(axis):
    heads, groups, length, size = 6, 2, 5, 8
    repeats = heads // groups
    wide = [1, groups, repeats, length, size] if axis == 2 else [1, repeats, groups, length, size]
    constants = {"axes": [axis], "wide": wide, "four": [1, heads, length, size]}
    nodes = []
    for name in ("keys", "values"):
        nodes += [
            helper.make_node("Unsqueeze", [name, "axes"], [f"{name}.more"]),
            helper.make_node("Expand", [f"{name}.more", "wide"], [f"{name}.wide"]),
            helper.make_node("Reshape", [f"{name}.wide", "four"], [f"{name}.four"]),
        ]
    nodes.append(helper.make_node("Attention", ["queries", "keys.four", "values.four"], ["read"]))
    shapes = {"queries": heads, "keys": groups, "values": groups, "read": heads}
    entries = [helper.make_tensor_value_info(n, 1, [1, count, length, size]) for n, count in shapes.items()]
    held = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "attention", entries[:3], entries[3:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    draw = np.random.default_rng(0)
    given = {
        entry.name: draw.standard_normal((1, shapes[entry.name], length, size)).astype(np.float32)
        for entry in entries[:3]
    }
    # By hand, in numpy.
    keys, values = (
        given[n].repeat(repeats, 1) if axis == 2 else np.tile(given[n], (1, repeats, 1, 1)) for n in list(given)[1:]
    )
    logits = given["queries"] @ keys.swapaxes(2, 3) / np.sqrt(size)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ values
    share_heads_(model.graph)
    assert len(model.graph.node) == (1 if axis == 2 else 7)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, given)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_file_reads_the_keys_that_queries_share_as_they_are(exported_llama):
    model = exported_llama[1]
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    graph = onnx.load(exported_llama[0] / "model.onnx").graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    read = [made[name] for node in graph.node if node.op_type == "Attention" for name in node.input[1:3]]
    assert read == ["Concat"] * 2 * model.config.num_hidden_layers


def test_the_file_does_not_tell_where_it_was_made(exported_llama, factored_folder):
    for path in exported_llama[0].iterdir():
        text = path.read_bytes()
        assert b"site-packages" not in text
        assert b".py" not in text or path.name == "eckart.json"
        assert str(factored_folder).encode() not in text


def test_names_and_shapes_are_those_of_the_documents(exported_llama):
    folder, model = exported_llama
    facts = json.loads((folder / "eckart.json").read_text())
    graph = onnx.load(folder / "model.onnx").graph
    assert [entry.name for entry in graph.input] == facts["inputs"]
    assert [entry.name for entry in graph.output] == facts["outputs"]
    shapes = {
        entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in graph.input
    }
    assert shapes["input_ids"] == ["batch", "length"]
    assert shapes["past_key_values.1.value"] == ["batch", 1, "past", 8]
    assert facts["eos"] == [2]
    assert facts["context"] == 32
    assert facts["source"]["weights_sha256"] == weights_sha256(model)
    summed = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    assert summed.returncode == 0


@pytest.mark.parametrize("how", ["int8", "int4", "int2"])
def test_a_quantised_file_computes_with_its_rounded_weights(exported, how, tmp_path):
    """The twin: the same graph in float32 with each weight rounded by its own integers and scales, in numpy."""
    folder, _ = exported
    quantised, twin = (onnx.load(folder / "model.onnx") for _ in range(2))
    quantize_(quantised, how)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    nodes = [node for node in quantised.graph.node if node.domain == "com.microsoft"]
    facts = {name: {a.name: a.i for a in node.attribute} for node in nodes for name in node.input}
    tables = {node.input[0].removesuffix(".flat") for node in nodes if node.op_type == "GatherBlockQuantized"}
    rounded = [tensor for tensor in twin.graph.initializer if f"{tensor.name}.integers" in held]
    assert len(rounded) >= 12
    assert {facts[f"{tensor.name}.integers"]["bits"] for tensor in rounded} == {8, int(how[3:])}
    for tensor in rounded:
        integers, scales = held[f"{tensor.name}.integers"], held[f"{tensor.name}.scales"]
        bits = facts[f"{tensor.name}.integers"]["bits"]
        integers = np.stack([(integers >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
        blocks = (integers.reshape(*scales.shape, -1).astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
        original = numpy_helper.to_array(tensor)
        values = blocks.reshape(len(scales), -1)
        values = values[:, : original.shape[1]] if tensor.name in tables else values[:, : original.shape[0]].T
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
        # Half a step, or one at the end of the range that lacks a value.
        assert np.abs(values - original).max() <= 1.01 * np.abs(scales).max()
    for name, model in (("quantised", quantised), ("twin", twin)):
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "model.onnx")
        (tmp_path / name / "eckart.json").write_bytes((folder / "eckart.json").read_bytes())
    ids = np.arange(5, 17)[None]
    found, expected = (step(open_model(tmp_path / n, threads=1), ids)[0] for n in ("quantised", "twin"))
    # What is left is the rounding of activations to 8 bits.
    assert np.abs(found - expected).mean() <= 0.05 * np.abs(expected).mean()
    sizes = [(f / "model.onnx").stat().st_size for f in (tmp_path / "quantised", folder)]
    assert sizes[0] < sizes[1]


BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"torch", "transformers", "safetensors", "yaml", "scipy", "onnx"}:
            raise ImportError(f"{name} is not on this device")

sys.meta_path.insert(0, Blocker())
from eckart import cli
cli.main()
"""


def run_without_torch(*arguments):
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_device_without_torch_generates_what_pytorch_does(exported_llama, factored_folder):
    folder, model = exported_llama
    tokenizer = transformers.AutoTokenizer.from_pretrained(factored_folder)
    prompts = [" ".join(WORDS[start : start + 5]) for start in range(12)]
    # Random weights end some texts at once.
    prompt = max(prompts, key=lambda each: len(greedy(model, tokenizer(each).input_ids, 10)))
    ids = tokenizer(prompt).input_ids
    assert len(greedy(model, ids, 10)) > 3
    expected = tokenizer.decode([*ids, *greedy(model, ids, 10)])[len(tokenizer.decode(ids)) :]
    result = run_without_torch("run", folder, "--prompt", prompt, "--tokens", 10, "--json", "--threads", 1)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["text"] == expected
    assert found["prompt_tokens"] == len(ids)
    assert found["new_tokens"] == len(greedy(model, ids, 10))
    shown = run_without_torch("run", folder / "model.onnx", "--prompt", prompt, "--tokens", 10, "--threads", 1)
    assert shown.stdout == expected + "\n"
    assert "generated" in shown.stderr


def test_dense_is_what_plain_transformers_loads(factored_folder, exported_llama, tmp_path, program):
    result = program("export", factored_folder, "--to", "dense", "--out", tmp_path / "dense")
    assert result.status == 0, result.err
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, exported_llama[1](ids).logits, rtol=1e-4, atol=1e-4)


def test_gguf_writes_the_dense_folder_and_says_what_is_lost(factored_folder, tmp_path, program):
    result = program("export", factored_folder, "--to", "gguf", "--out", tmp_path / "for gguf")
    assert result.status == 0, result.err
    assert f"convert_hf_to_gguf.py '{tmp_path / 'for gguf'}'" in result.err
    assert "dense again" in result.err
    assert (tmp_path / "for gguf" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stock_peft_makes_the_edited_model_of_an_adapter(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = tiny_models.build(name).float(), torch.arange(5, 15)[None]
    plan = plan_for(model, [0.9, 0.95])
    found = export_adapter(model, plan, tmp_path / "adapter")
    assert not found.pointless
    assert max(found.ranks.values()) <= 12  # what the cuts removed, of parts of fused weights together
    with applied(model, plan), torch.inference_mode():
        expected = model(ids).logits
        unedited = tiny_models.build(name).float()(ids).logits
    assert not torch.allclose(expected, unedited, rtol=1e-2, atol=1e-2)
    adapted = peft.PeftModel.from_pretrained(tiny_models.build(name).float(), tmp_path / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_larger_than_the_weights_says_so(tiny_llama_folder, tmp_path, program):
    pytest.importorskip("peft")
    model, _ = load(str(tiny_llama_folder))
    write_plan(tmp_path / "plan.json", plan_for(model, [0.1]))
    arguments = ("--to", "peft", "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    result = program("export", tiny_llama_folder, *arguments)
    assert result.status == 0, result.err
    assert "high rank" in result.err
    write_plan(tmp_path / "plan.json", plan_for(model, [1.0]))
    with pytest.raises(PlanError, match="changes no weight"):
        export_adapter(model, plan_for(model, [1.0]), tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "tflite"], "tflite"),
        (["--to", "onnx", "--quantize", "int3"], "int3"),
        (["--to", "dense", "--quantize", "int8"], "Only onnx"),
        (["--to", "peft"], "takes a plan"),
        (["--to", "onnx", "--plan", "plan.json"], "takes a plan"),
    ],
)
def test_a_format_or_combination_that_is_not_there_is_refused(tiny_llama_folder, tmp_path, program, options, words):
    result = program("export", tiny_llama_folder, "--out", tmp_path / "out", *options)
    assert result.status == 1
    assert words in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_a_model_that_does_not_continue_text_is_refused(name, tmp_path):
    with pytest.raises(ModelError, match="cannot be exported to ONNX"):
        export_onnx(tiny_models.build(name), tiny_models.tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_from_the_model_is_not_kept(tmp_path, monkeypatch):
    def spoil(proto, how, fine):
        weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))

    monkeypatch.setattr("eckart.exporting.quantize_", spoil)
    with pytest.raises(ModelError, match="differs from the model"):
        export_onnx(tiny_models.build("llama"), tiny_models.tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(tiny_llama_folder, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError):
        run_export(str(tiny_llama_folder), "onnx", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_weights_too_large_for_one_file_go_into_a_second(exported_llama, factored_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.exporting.LARGEST_FILE", 1000)
    model, tokenizer = load(str(factored_folder))
    export_onnx(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 1000
    ids = [5, 6, 7]
    found, expected = (list(generate(open_model(f, threads=1), ids)) for f in (tmp_path / "out", exported_llama[0]))
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_models.CAUSAL if name not in ("llama", "gpt2")])
def test_other_causal_models_are_exported_or_refused(name, tmp_path, may_refuse):
    with may_refuse(ModelError, "ONNX"):
        found = export_onnx(tiny_models.build(name).float(), tiny_models.tokenizer(), tmp_path / "out")
        assert found.agreement.value == 1.0


def test_torchao_takes_the_factors_for_linear_layers(factored_folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, _ = load(str(factored_folder))
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        quantize_(model, Int8WeightOnlyConfig())
        found = model(ids).logits
    layers = [layer for layer in model.modules() if isinstance(layer, (FactoredLinear, PivotedLinear))]
    assert layers
    for layer in layers:
        assert {type(layer.down.weight), type(layer.up.weight)}.isdisjoint({torch.Tensor, torch.nn.Parameter})
    assert 0 < (found - expected).abs().mean() <= 0.05 * expected.abs().mean()


@pytest.mark.slow
@pytest.mark.network
def test_the_edge_demo_goes_from_compression_to_a_device_without_torch(tmp_path):
    root = Path(__file__).parents[1]
    command = [root / "scripts" / "demo_edge.sh", tmp_path / "out"]
    places = os.environ | {"BIN": str(Path(sys.executable).parent)}
    result = subprocess.run(command, cwd=root, env=places, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "The capital of France is" in result.stdout
    assert (tmp_path / "out" / "device" / "model.onnx").is_file()
