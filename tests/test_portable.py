"""A portable folder loads in a process that has no eckart, if remote code is trusted, and never else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import eckart
import tiny_models as tiny
from eckart.checkpoint import load, model_card, save
from eckart.cli import app
from eckart.dataflow import low_rank_layers
from eckart.factoring import factor_
from eckart.matrices import find_matrices, partition
from eckart.plan import MadeBy, Plan, PlannedModel, write_plan
from eckart.portable import auto_classes, modeling_source
from eckart.surgery import make_edit, weights_sha256

# Factored, from Conv1D, row-blocked, experts of both orders, masked, encoder-decoder, images, and no head.
NAMES = ["llama", "gpt2", "phi3", "bloom", "mixtral", "gpt_oss", "bert", "t5", "vit", "decision_transformer"]

WITHOUT = """
import json, sys
# Nor may the file need what transformers does not bring.
sys.modules["eckart"] = sys.modules["pydantic"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
"""
RUN = (
    WITHOUT
    + """
jobs = json.load(sys.stdin)
for auto, folder, twice in jobs:
    try:
        getattr(transformers, auto).from_pretrained(folder)
        raise SystemExit(f"{folder} was loaded without trust")
    except RuntimeError as error:
        assert "ismatch" in str(error), error
for auto, folder, twice in jobs:
    kind = getattr(transformers, auto)
    model, info = kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    inputs = load_file(f"{folder}/inputs.st")
    with torch.inference_mode():
        found = model(**inputs)
    found = found.action_preds if auto == "AutoModel" else found.logits
    save_file({"output": found.contiguous()}, f"{folder}/output.st")
    model.save_pretrained(twice)
    again = kind.from_pretrained(twice, trust_remote_code=True).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    if hasattr(model, "generate") and auto == "AutoModelForCausalLM":
        assert model.generate(inputs["input_ids"], max_new_tokens=2, min_new_tokens=2).shape[1] == 14
    model.dequantize().save_pretrained(f"{twice}-dense")
print("done", len(transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING))
"""
)


def python(script, tmp_path, *arguments, stdin=""):
    """Run a script in a fresh process, whose cache of remote code is new."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split("\n")[:-1]


def factored(name, chosen=lambda matrix: matrix.layer != 0):
    model = tiny.build(name)
    assert factor_(model, [make_edit(m, 0.15) for m in partition(find_matrices(model)) if chosen(m)]).layers
    return model


def auto_of(model):
    """The Auto class that makes this very class."""
    return next(auto for auto, made in auto_classes(model).items() if made == type(model).__name__)


def test_it_loads_without_eckart_and_computes_the_same_and_is_saved_again(tmp_path):
    expected, jobs = {}, []
    for name in NAMES:
        model = factored(name)
        folder = save(model, tmp_path / name, portable=True, max_shard_size="30KB")
        inputs = tiny.inputs(name)
        save_file({key: value.contiguous() for key, value in inputs.items()}, folder / "inputs.st")
        expected[name] = tiny.output(name, model, **inputs)
        jobs.append((auto_of(model), str(folder), str(tmp_path / f"{name}-again")))
    assert python(RUN, tmp_path, stdin=json.dumps(jobs))[-1].startswith("done")
    for name in NAMES:
        found = load_file(tmp_path / name / "output.st")["output"]
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4)
        # What was saved there is read by eckart here, under the class it had.
        again = eckart.checkpoint.load_model(str(tmp_path / f"{name}-again"))
        assert type(again) is tiny.MODELS[name][0]
        assert low_rank_layers(again)
        dense = json.loads((tmp_path / f"{name}-again-dense" / "config.json").read_text())
        assert "quantization_config" not in dense


EVERY = (
    WITHOUT
    + """
import warnings
warnings.simplefilter("ignore")
for auto in sys.argv[2:]:
    model = getattr(transformers, auto).from_pretrained(sys.argv[1], trust_remote_code=True)
    print(type(model).__name__, sum(type(m).__name__ == "FactoredLinear" for m in model.modules()))
"""
)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_auto_class_of_the_config_is_mapped(name, tmp_path):
    model = factored(name, lambda m: m.type == "fc_in")
    folder = save(model, tmp_path / "a", portable=True)
    mapped = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(mapped) == set(auto_classes(model)) > {"AutoModel", "AutoModelForSequenceClassification"}
    # That class names its weights in another way, so nothing of this folder would be found.
    assert (transformers.LlamaForQuestionAnswering.base_model_prefix == "model") == (
        "AutoModelForQuestionAnswering" in auto_classes(tiny.build("llama"))
    )
    said = python(EVERY, tmp_path, folder, *mapped)
    count = str(len(low_rank_layers(model)))
    assert said == [f"{made.removeprefix('modeling_eckart.')} {count}" for made in mapped.values()]


TOGETHER = """
import sys
{order}
A = transformers.AutoModelForCausalLM
trusted = A.from_pretrained(sys.argv[1], trust_remote_code=True)
import eckart
from eckart.dataflow import low_rank_layers
from eckart.quantizer import LowRankConfig
plain = A.from_pretrained(sys.argv[1])
after = A.from_pretrained(sys.argv[1], trust_remote_code=True)
for model in (plain, after):
    assert low_rank_layers(model) and isinstance(model.config.quantization_config, LowRankConfig)
assert type(plain) is transformers.LlamaForCausalLM
states = [model.state_dict() for model in (trusted, plain, after)]
import torch
assert all(torch.equal(states[0][k], s[k]) for s in states for k in s)
eckart.save(after, sys.argv[2], portable=True)
eckart.save(plain, sys.argv[3])
print(hasattr(A.from_pretrained(sys.argv[2]).config, "auto_map"))
"""


@pytest.mark.parametrize("order", ["import eckart, transformers", "import transformers"])
def test_it_works_together_with_an_installed_eckart_in_any_order(order, tmp_path):
    folder = save(factored("llama"), tmp_path / "a", portable=True)
    assert python(TOGETHER.format(order=order), tmp_path, folder, tmp_path / "b", tmp_path / "c") == ["False"]
    assert (tmp_path / "b" / "modeling_eckart.py").read_bytes() == (folder / "modeling_eckart.py").read_bytes()
    # A folder without the file says nothing of it.
    assert "auto_map" not in json.loads((tmp_path / "c" / "config.json").read_text())
    assert not (tmp_path / "c" / "modeling_eckart.py").exists()


def test_the_file_is_made_of_our_sources_and_every_name_in_it_is_defined(tmp_path):
    text = modeling_source(["LlamaModel"])
    for module in ("linear", "experts", "quantizer"):
        source = eckart.quantizer.__file__.replace("quantizer", module)
        with open(source, encoding="utf-8") as file:
            own = file.read()
        (longest,) = sorted((part for part in own.split("\n\n\n") if part in text), key=len)[-1:]
        assert len(longest) > 1000
    assert "import eckart" not in text
    assert "from eckart." not in text
    path = tmp_path / "modeling_eckart.py"
    path.write_text(text)
    ruff = shutil.which("ruff", path=os.path.dirname(sys.executable)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff to look for names that are not defined")
    found = subprocess.run([ruff, "check", "--isolated", "--select", "F", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_eckart_itself_never_runs_the_file(tmp_path):
    folder = save(factored("llama"), tmp_path / "a", tiny.tokenizer(), portable=True)
    (folder / "modeling_eckart.py").write_text("raise SystemExit('remote code was run')")
    assert low_rank_layers(load(str(folder))[0])


def test_a_dense_model_gets_no_file(tmp_path):
    folder = save(tiny.build("llama"), tmp_path / "a", portable=True)
    assert not (folder / "modeling_eckart.py").exists()


def test_the_program_makes_it_and_the_card_and_the_manifest_know(tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.cli.console.silence_transformers", lambda: None)
    model, _ = load(str(tiny_llama_folder))
    planned = PlannedModel(source="tiny", architecture="L", weights_sha256=weights_sha256(model))
    edits = tuple(make_edit(m, 0.2) for m in find_matrices(model) if m.type == "fc_in")
    plan = Plan(model=planned, edits=edits, made_by=MadeBy(eckart="0"))
    write_plan(tmp_path / "plan.json", plan)
    words = ["apply", str(tiny_llama_folder), str(tmp_path / "plan.json"), "--portable", "--out", str(tmp_path / "a")]
    assert CliRunner().invoke(app, words).exit_code == 0
    folder = tmp_path / "a" / "model"
    assert "modeling_eckart.py" in (folder / "SHA256SUMS").read_text()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    factor_(model, plan)
    assert "trust_remote_code" not in model_card(plan, model)
    assert CliRunner().invoke(app, [*words[:-1], str(tmp_path / "b"), "--dense"]).exit_code == 2
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.architectures == ["LlamaForCausalLM"]
