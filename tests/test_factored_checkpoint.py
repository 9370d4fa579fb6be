"""Factored folders load wherever transformers loads, to the bit, and nowhere as random numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.utils.quantization_config import QuantizationConfigMixin
from typer.testing import CliRunner

import eckart
import tiny_models as tiny
from eckart.checkpoint import load, model_card, save
from eckart.cli import app
from eckart.dataflow import low_rank_layers
from eckart.errors import MatrixError, ModelError
from eckart.factoring import factor_
from eckart.linear import FactoredLinear
from eckart.matrices import find_blocks, find_matrices, partition
from eckart.plan import MadeBy, Plan, PlannedModel, write_plan
from eckart.quantizer import LowRankConfig, LowRankQuantizer, StoredLayer, register
from eckart.run import run_apply
from eckart.surgery import make_edit, weights_sha256

# One of each way to store: factored, pivoted, row-blocked with and without an order, from Conv1D, experts.
NAMES = ["llama", "gpt2", "phi3", "falcon_grouped", "mixtral", "gpt_oss", "bert", "t5", "vit"]


def factored(name, rho=0.15, dtype=torch.float32, chosen=lambda matrix: True):
    model = tiny.build(name).to(dtype)
    edits = [make_edit(m, rho) for m in partition(find_matrices(model)) if chosen(m)]
    assert factor_(model, edits).layers
    return model


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


def logits(name, model):
    return tiny.output(name, model, **tiny.inputs(name))


def loaded(folder, kind, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("shards", ["5GB", "8KB"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_and_saved_again_is_equal_to_the_bit(name, shards, tmp_path):
    model = factored(name)
    folder = save(model, tmp_path / "a", max_shard_size=shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards == "8KB")
    again = loaded(folder, type(model))
    same_state(again, model)
    torch.testing.assert_close(logits(name, again), logits(name, model), atol=1e-6, rtol=1e-5)
    again.save_pretrained(tmp_path / "b", max_shard_size=shards)
    third = loaded(tmp_path / "b", type(model))
    same_state(third, model)
    configs = [json.loads((tmp_path / x / "config.json").read_text())["quantization_config"] for x in "ab"]
    assert configs[0] == configs[1]
    assert configs[0]["quant_method"] == "eckart"


@pytest.mark.parametrize("rho", [0.1, 0.6])
@pytest.mark.parametrize(
    ("name", "clustering"), [("llama", "contiguous"), ("phi3", "subspaces"), ("falcon_rw", "heads"), ("gpt2", "heads")]
)
def test_blocks_of_rows_and_pivots_are_loaded_to_the_bit(name, clustering, rho, tmp_path):
    model = tiny.build(name)
    found = [m for m in partition(find_matrices(model)) if m.type == "q_proj" and m.layer == 1]
    factor_(model, [make_edit(m, rho, blocks=2, clustering=clustering) for m in found], at_most=1.0)
    assert len(low_rank_layers(model)) == 1
    same_state(loaded(save(model, tmp_path / "a"), type(model)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_dtype_is_stored_and_cast(name, dtype, tmp_path):
    model = factored(name, dtype=dtype)
    folder = save(model, tmp_path / "a")
    same_state(loaded(folder, type(model)), model)
    for wanted in (torch.float32, torch.bfloat16):
        cast = loaded(folder, type(model), dtype=wanted)
        assert {p.dtype for p in cast.parameters()} == {wanted}
        expected = {
            key: value.to(wanted) if value.is_floating_point() else value for key, value in model.state_dict().items()
        }
        assert all(torch.equal(expected[key], value) for key, value in cast.state_dict().items())
        assert torch.isfinite(logits(name, cast)).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "t5"])
@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_any_device_map_computes_the_same(name, device_map, tmp_path):
    model = factored(name, chosen=lambda m: m.layer != 0)
    folder = save(model, tmp_path / "a", max_shard_size="20KB")
    options = {"device_map": device_map}
    if device_map == "disk":
        # Embeddings stay; the blocks are read from the disk when they run.
        blocks = {path for path, _, _ in find_blocks(model)}
        rest = {path.rpartition(".")[0] for path, _ in model.named_parameters(remove_duplicate=False)}
        places = dict.fromkeys(blocks, "disk")
        places |= {path: "cpu" for path in rest if not any(f"{path}.".startswith(f"{block}.") for block in blocks)}
        options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    again = loaded(folder, type(model), **options)
    torch.testing.assert_close(logits(name, again), logits(name, model), atol=1e-5, rtol=1e-4)
    if device_map == "disk":
        assert any(p.device.type == "meta" for p in again.parameters())
        with pytest.warns(UserWarning, match="offloaded"):
            again.save_pretrained(tmp_path / "b")
        same_state(loaded(tmp_path / "b", type(model)), model)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("llama", transformers.AutoModelForCausalLM),
        ("gpt2", transformers.AutoModelForCausalLM),
        ("bert", transformers.AutoModelForMaskedLM),
        ("t5", transformers.AutoModelForSeq2SeqLM),
        ("vit", transformers.AutoModelForImageClassification),
        ("llama", transformers.AutoModel),
        ("mixtral", transformers.AutoModel),
        ("bert", transformers.AutoModel),
    ],
)
def test_every_auto_class_loads_it(name, auto, tmp_path):
    model = factored(name)
    folder = save(model, tmp_path / "a")
    again = auto.from_pretrained(folder)
    state, expected = again.state_dict(), model.state_dict()
    if auto is transformers.AutoModel:
        prefix = f"{model.base_model_prefix}."
        expected = {key.removeprefix(prefix): value for key, value in expected.items()}
        assert low_rank_layers(again)
    else:
        assert state.keys() == expected.keys()
    fresh = {key for key in state if key.startswith("pooler.")}  # BertModel has a pooler, and BertForMaskedLM none
    assert all(torch.equal(value, expected[key]) for key, value in state.items() if key not in fresh)
    again.save_pretrained(tmp_path / "b")
    same_state(auto.from_pretrained(tmp_path / "b"), again)


def test_a_base_model_is_loaded_into_a_model_with_a_head(tmp_path):
    bare = tiny.build("llama").model
    matrices = [m for m in find_matrices(bare) if m.type == "fc_in"]
    factor_(bare, [make_edit(m, 0.2) for m in matrices])
    folder = save(bare, tmp_path / "a")
    full = transformers.LlamaForCausalLM.from_pretrained(folder)
    same_state(full.model, bare)


def test_tied_embeddings_stay_tied(tmp_path):
    model = factored("llama")
    folder = save(model, tmp_path / "a")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    again = loaded(folder, transformers.AutoModelForCausalLM)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_it_generates_what_the_dense_model_does(name, cache, tmp_path):
    model = loaded(save(factored(name), tmp_path / "a"), tiny.MODELS[name][0])
    ids = tiny.inputs(name)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    words = model.generate(ids, **options)
    assert words.shape == (2, 18)
    dense = model.dequantize()
    for end in range(12, 18):
        scores = dense(words[:, :end]).logits[:, -1].double()
        chosen = scores.gather(1, words[:, end : end + 1])[:, 0]
        # Rounding may settle a tie another way, so the score is compared and not the word.
        live = ~(words[:, 12:end] == model.config.eos_token_id).any(1)
        torch.testing.assert_close(chosen[live], scores.max(1).values[live], atol=1e-4, rtol=1e-4)


def test_a_pipeline_runs_it(tiny_llama_folder, tmp_path):
    model, tokenizer = load(str(tiny_llama_folder))
    factor_(model, [make_edit(m, 0.2) for m in find_matrices(model) if m.type == "fc_in"])
    folder = save(model, tmp_path / "a", tokenizer)
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    assert low_rank_layers(pipe.model)
    text = pipe("the cat lives in", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("the cat lives in")
    assert len(text) > len("the cat lives in")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_dequantized_and_saved_it_is_an_ordinary_folder(name, tmp_path):
    model = loaded(save(factored(name), tmp_path / "a"), tiny.MODELS[name][0])
    expected = logits(name, model)
    model.dequantize().save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    plain = tiny.build(name)
    plain.save_pretrained(tmp_path / "c")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == (
        load_file(tmp_path / "c" / "model.safetensors").keys()
    )
    again = loaded(tmp_path / "b", type(model))
    torch.testing.assert_close(logits(name, again), expected, atol=5e-5, rtol=1e-4)


def test_a_loaded_model_trains_its_factors(tmp_path):
    model = loaded(save(factored("llama"), tmp_path / "a"), transformers.LlamaForCausalLM).train()
    ids = tiny.inputs("llama")["input_ids"]
    model(ids, labels=ids).loss.backward()
    layers = list(low_rank_layers(model).values())
    assert all(p.grad is not None for layer in layers for p in layer.parameters() if p.numel() and p.requires_grad)
    assert model.hf_quantizer.is_qat_trainable


PLAIN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "eckart":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import transformers
for folder in sys.argv[2:]:
    try:
        getattr(transformers, sys.argv[1]).from_pretrained(folder)
    except RuntimeError as error:
        print("raised", "ismatch" in str(error))
    else:
        print("loaded")
"""
WITH = """
import sys
{order}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[1].mlp.gate_proj).__name__)
"""


def python(script, *arguments):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


def test_without_eckart_loading_raises_whatever_was_factored(tmp_path):
    one = lambda kind: lambda m: m.type == kind and m.layer == 1  # noqa: E731
    expert = lambda m: m.expert is not None and m.layer == 1  # noqa: E731
    models = [
        factored("llama", chosen=one("fc_in")),
        factored("gpt2", chosen=one("fc_out")),
        factored("phi3", chosen=one("q_proj"), rho=0.05),
        factored("mixtral", chosen=expert),
        factored("gpt_oss", chosen=expert),
    ]
    folders = [save(model, tmp_path / str(number)) for number, model in enumerate(models)]
    assert python(PLAIN, "AutoModelForCausalLM", *folders) == ["raised True"] * len(folders)
    # The base class too, whose weights have other names.
    assert python(PLAIN, "AutoModel", *folders) == ["raised True"] * len(folders)


@pytest.mark.parametrize(
    "order",
    [
        "import eckart; assert 'transformers' not in sys.modules and 'torch' not in sys.modules; import transformers",
        "from transformers import AutoModelForCausalLM; import transformers; import eckart",
        "import eckart.quantizer, transformers",
        "import eckart, importlib, transformers.quantizers.auto; importlib.reload(eckart); import transformers",
    ],
)
def test_importing_eckart_is_enough_in_any_order(order, tmp_path):
    folder = save(factored("llama", chosen=lambda m: m.type == "fc_in"), tmp_path / "a")
    assert python(WITH.format(order=order), folder) == ["FactoredLinear"]


def test_registering_again_does_nothing():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["eckart"] is LowRankQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["eckart"] is LowRankConfig
    assert issubclass(LowRankConfig, QuantizationConfigMixin)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"surprise": 1},
        {"layers": []},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "factored", "shape": [48, 32], "rank": 99}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "factored", "shape": [48, 32]}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "factored", "shape": [32, 48], "rank": 4}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "pickle", "shape": [48, 32], "rank": 4}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "dense", "shape": [48, 32]}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "row_blocked", "shape": [48, 32]}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "selected", "shape": [48, 32]}}},
        {
            "layers": {
                "model.layers.1.mlp.gate_proj": {
                    "storage": "selected",
                    "shape": [48, 32],
                    "blocks": [{"storage": "dense", "shape": [9, 4]}],
                }
            }
        },
        {
            "layers": {
                "model.layers.1.mlp.gate_proj": {
                    "storage": "selected",
                    "shape": [48, 32],
                    "blocks": [{"storage": "dense", "shape": [48, 33]}],
                }
            }
        },
        {"layers": {"model.layers.1.mlp": {"storage": "factored", "shape": [48, 32], "rank": 4}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "factored", "shape": [48, 32], "rank": 3}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "monarch", "shape": [48, 32], "rank": 3}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "monarch", "shape": [48, 32], "rank": 3, "grid": 5}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "monarch", "shape": [48, 32], "rank": 9, "grid": 4}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "monarch", "shape": [48, 32], "grid": 4}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "monarch", "shape": [48, 32], "grid": "4"}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "factored", "shape": [48, 32], "rank": 3, "grid": -1}}},
        {"layers": {"model.layers.1.mlp.gate_proj": {"storage": "sparse", "shape": [48, 32], "nonzeros": 7}}},
        {
            "layers": {
                "model.layers.1.mlp.gate_proj": {
                    "storage": "sparse",
                    "shape": [48, 32],
                    "nonzeros": 7,
                    "blocks": [{"storage": "dense", "shape": [48, 32]}],
                }
            }
        },
        {
            "layers": {
                "model.layers.1.mlp.gate_proj": {
                    "storage": "sparse",
                    "shape": [48, 32],
                    "nonzeros": 7,
                    "blocks": [{"storage": "factored", "shape": [32, 48], "rank": 3}],
                }
            }
        },
        {
            "layers": {
                "model.layers.1.mlp.gate_proj": {
                    "storage": "sparse",
                    "shape": [48, 32],
                    "nonzeros": 2.5,
                    "blocks": [{"storage": "factored", "shape": [48, 32], "rank": 3}],
                }
            }
        },
        {"layers": {}},
        {"layers": {"__class__": {"storage": "factored", "shape": [48, 32], "rank": 3}}},
    ],
)
def test_a_config_that_was_tampered_with_is_refused(change, tiny_llama_folder, tmp_path):
    model = factored("llama", chosen=lambda m: m.type == "fc_in" and m.layer == 1)
    folder = save(model, tmp_path / "a")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError):
        eckart.load(str(folder))


KINDS = ["dense", "factored", "pivoted", "row_blocked", "selected", "experts", "monarch", "sparse"]
ENTRIES = st.recursive(
    st.builds(
        StoredLayer,
        storage=st.sampled_from(KINDS),
        shape=st.tuples(st.integers(0, 9), st.integers(0, 9)),
        rank=st.none() | st.integers(0, 9),
        grid=st.none() | st.integers(0, 9),
        nonzeros=st.none() | st.integers(0, 9),
        transposed=st.booleans(),
        ordered=st.booleans(),
    ),
    lambda inner: st.builds(
        StoredLayer, storage=st.just("row_blocked"), shape=st.just((4, 2)), blocks=st.lists(inner).map(tuple)
    ),
    max_leaves=5,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from([*StoredLayer.__dataclass_fields__, "x"]), inner)
        | st.fixed_dictionaries({"storage": inner | st.sampled_from(KINDS), "shape": inner | st.just([4, 2])})
    ),
)


@given(entry=ENTRIES)
def test_what_a_layer_is_stored_as_is_read_back_from_json(entry):
    assert StoredLayer.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    config = LowRankConfig({"a": entry}, {"b": "why"})
    again = LowRankConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


@given(layers=JSON)
def test_any_json_is_a_description_of_layers_or_a_model_error(layers, may_refuse):
    with may_refuse(ModelError, "config.json"):
        for layer in LowRankConfig(layers).layers.values():
            assert StoredLayer.from_json(layer.to_json()) == layer


def test_a_class_that_has_none_of_the_layers_is_refused(tmp_path):
    folder = save(factored("llama", chosen=lambda m: m.type == "fc_in"), tmp_path / "a")
    if transformers.LlamaForQuestionAnswering.base_model_prefix == "model":
        pytest.skip("this transformers gives that class the names of the others")
    with pytest.raises(ModelError, match="none of the 3 low-rank layers"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(folder)


@pytest.fixture
def plan_file(tiny_llama_folder, tmp_path):
    """A plan that cuts every fc_in of the tiny Llama to rank 3, in the folder of a run."""
    model, _ = load(str(tiny_llama_folder))
    planned = PlannedModel(source="tiny", architecture="L", weights_sha256=weights_sha256(model))
    edits = tuple(make_edit(m, 0.2) for m in find_matrices(model) if m.type == "fc_in")
    write_plan(tmp_path / "plan.json", Plan(model=planned, edits=edits, made_by=MadeBy(eckart="0")))
    return tmp_path / "plan.json"


def eckart_program(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_program_applies_a_plan_and_reads_what_it_wrote(
    tiny_llama_folder, plan_file, choice_task_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("eckart.cli.console.silence_transformers", lambda: None)
    said = eckart_program("apply", tiny_llama_folder, plan_file, "--out", tmp_path / "a").stdout
    assert "import eckart" in said
    assert "2 weights are stored as factors" in said
    folder = tmp_path / "a" / "model"
    assert sum(isinstance(m, FactoredLinear) for m in load(str(folder))[0].modules()) == 2
    task = ("--task", choice_task_file, "--json")
    planned = json.loads(eckart_program("evaluate", tiny_llama_folder, "--plan", plan_file, *task).stdout)["rows"][1]
    found = json.loads(eckart_program("evaluate", folder, *task).stdout)["rows"][0]
    for name, expected in planned["measurements"].items():
        assert found["measurements"][name]["value"] == pytest.approx(expected["value"], abs=1e-5)

    # What is left dense can be searched and cut in turn.
    search = ("search", folder, "--task", choice_task_file, "--out", tmp_path / "run", "--types", "mlp", "--rho", "0.3")
    eckart_program(*search)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["trials"]["grid"] == 4
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    left = next(m for m in find_matrices(load(str(folder))[0]) if m.type == "fc_out")
    plan["edits"] = [make_edit(left, 0.2).model_dump(mode="json")]
    (tmp_path / "second.json").write_text(json.dumps(plan))
    eckart_program("apply", folder, tmp_path / "second.json", "--out", tmp_path / "b")
    both = load(str(tmp_path / "b" / "model"))[0]
    assert len(low_rank_layers(both)) == 3
    eckart_program("apply", folder, tmp_path / "second.json", "--dense", "--out", tmp_path / "c")
    dense = loaded(tmp_path / "c" / "model", transformers.AutoModelForCausalLM)
    assert not low_rank_layers(dense)
    ids = torch.arange(4, 12)[None]
    torch.testing.assert_close(dense(ids).logits, both(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_plan_for_a_factored_weight_is_refused_by_its_name(tiny_llama_folder, plan_file, tmp_path):
    folder, _ = run_apply(str(tiny_llama_folder), plan_file, tmp_path / "a")
    with pytest.raises(MatrixError, match="gate_proj"):
        run_apply(str(folder), plan_file, tmp_path / "b", force=True)
    assert not (tmp_path / "b").exists()


KILLED = """
import os, pathlib, signal, sys
import transformers, eckart
from eckart import checkpoint
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
target = pathlib.Path(sys.argv[2])
moments = [(os, "fsync"), (pathlib.Path, "rename"), (pathlib.Path, "rmdir"), (pathlib.Path, "write_text"),
           (transformers.PreTrainedModel, "save_pretrained"), (checkpoint, "write_manifest")]
number = 0
while True:
    child = os.fork()
    if child == 0:
        left = number
        def counted(function):
            def call(*arguments, **named):
                global left
                for _ in range(2):  # before it and after it
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    if _ == 0:
                        result = function(*arguments, **named)
                return result
            return call
        for owner, name in moments:
            setattr(owner, name, counted(getattr(owner, name)))
        eckart.save(model, target / str(number))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    number += 1
print(number)
"""


def test_killed_at_any_moment_there_is_no_folder_or_a_whole_one(tmp_path):
    source = save(factored("llama", chosen=lambda m: m.type == "fc_in"), tmp_path / "source")
    (count,) = python(KILLED, source, tmp_path / "out")
    whole = {path.name for path in source.iterdir()}
    there = [number for number in range(int(count) + 1) if (tmp_path / "out" / str(number)).exists()]
    # Killed after the rename it is there, and before it is not.
    assert int(count) > 15
    assert 1 < len(there) < int(count)
    assert there == list(range(there[0], int(count) + 1))
    for number in there:
        assert {path.name for path in (tmp_path / "out" / str(number)).iterdir()} == whole
        assert sums_agree(tmp_path / "out" / str(number))


def sums_agree(folder):
    """Whether sha256sum finds every file as the manifest has it."""
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 0


def test_the_manifest_holds_the_sha256_of_every_file(tmp_path):
    folder = save(factored("llama"), tmp_path / "a", tiny.tokenizer(), max_shard_size="20KB")
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {p.name for p in folder.iterdir()} - {"SHA256SUMS"}
    assert sums_agree(folder)
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    assert not sums_agree(folder)


def test_the_card_of_a_factored_model_tells_its_size_and_how_to_load_it():
    model = tiny.build("llama")
    matrices = find_matrices(model)
    planned = PlannedModel(source="some/model", architecture="L", weights_sha256=weights_sha256(model))
    edits = (make_edit(matrices[0], 0.1), make_edit(matrices[8], 0.1, kind="magnitude"))
    dense = sum(p.numel() for p in model.parameters())
    plan = Plan(model=planned, edits=edits, made_by=MadeBy(eckart="0.1.0"))
    factor_(model, plan)
    card = model_card(plan, model)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "some/model"
    assert "import eckart" in body
    assert f"{dense:,}" in body
    assert f"{sum(p.numel() for p in model.parameters()):,}" in body
    assert f"`{matrices[8].name}` stayed dense" in body
    assert "eckart apply some/model plan.json --out DIR" in body


def test_a_real_model_is_factored_saved_and_loaded(shared, tmp_path):
    model, tokenizer = load(str(shared / "models" / "stories260K"))
    dense, _ = load(str(shared / "models" / "stories260K"))
    matrices = find_matrices(model)
    edits = [make_edit(m, 0.3) for m in matrices if m.type in ("fc_in", "fc_out")]
    eckart.apply_(dense, edits)
    found = factor_(model, edits)
    again, words = load(str(save(model, tmp_path / "a", tokenizer)))
    assert len(low_rank_layers(again)) == len(found.layers) > 0
    ids = words("Once upon a time, there was a little girl", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, dense(ids).logits, atol=1e-3, rtol=1e-3)
