"""The whole way for every architecture: search, apply, `import eckart`, `from_pretrained` by its Auto class."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_models as tiny
from eckart.dataflow import low_rank_layers
from eckart.matrices import find_matrices
from eckart.plan import MadeBy, Plan, PlannedModel, read_plan, write_plan
from eckart.recipe import SearchSettings
from eckart.run import run_apply, run_search
from eckart.surgery import apply_, make_edit, weights_sha256
from eckart.tasks import Example, make_task

AUTO = dict.fromkeys(tiny.CAUSAL, "AutoModelForCausalLM")
AUTO |= dict.fromkeys(tiny.MASKED, "AutoModelForMaskedLM")
AUTO |= dict.fromkeys(tiny.ENCODER_DECODER, "AutoModelForSeq2SeqLM")
AUTO |= {"vit": "AutoModelForImageClassification", "decision_transformer": "AutoModel"}
SETTINGS = SearchSettings(strategy="exhaustive", types=("fc_in", "out_proj"), rho=(0.05, 0.2), select="loss", split=0.5)

FRESH = """
import sys, json
import eckart
import transformers
from safetensors.torch import load_file, save_file
import torch
torch.set_num_threads(1)
for folder, auto in json.load(sys.stdin):
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.inference_mode():
        found = model(**load_file(f"{folder}/inputs.st"))
    found = found.action_preds if auto == "AutoModel" else found.logits
    save_file({"output": found.contiguous()}, f"{folder}/output.st")
"""


def searched(name, folder, run):
    """A plan for the model, from a search where there is a task for it."""
    if name in ("vit", "decision_transformer"):
        model = tiny.MODELS[name][0].from_pretrained(folder)
        planned = PlannedModel(source="tiny", architecture="A", weights_sha256=weights_sha256(model))
        edits = tuple(make_edit(m, 0.1) for m in find_matrices(model) if m.type == "fc_in")
        run.mkdir()
        write_plan(run / "plan.json", Plan(model=planned, edits=edits, made_by=MadeBy(eckart="0")))
        return
    for seed in range(20):  # until an edit of this random model helps
        pairs = [(f"w{7 + (seed + 5 * index) % 40}", f"w{50 + (seed + 3 * index) % 40}") for index in range(6)]
        examples = [Example(tiny.sentence(5, index), index % 2, pair) for index, pair in enumerate(pairs)]
        where = run.with_name(f"{run.name}-{seed}")
        if run_search(str(folder), make_task("task", examples), where, SETTINGS).plan.edits:
            where.rename(run)
            return


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    """For every architecture the folder that `eckart apply` made of a plan, and what the edited model computes."""
    root = tmp_path_factory.mktemp("every")
    expected = {}
    transformers.utils.logging.disable_progress_bar()
    for name in tiny.MODELS:
        source, run = root / name, root / f"{name}-run"
        tiny.build(name).save_pretrained(source)
        if name in tiny.CAUSAL + tiny.MASKED + tiny.ENCODER_DECODER:
            tiny.tokenizer(mask=name in tiny.MASKED).save_pretrained(source)
        searched(name, source, run)
        plan = read_plan(run)  # is there, since something won
        folder, _ = run_apply(str(source), run, root / f"{name}-out")
        dense = tiny.MODELS[name][0].from_pretrained(source)
        apply_(dense, plan)
        inputs = {key: value.contiguous() for key, value in tiny.inputs(name).items()}
        save_file(inputs, folder / "inputs.st")
        expected[name] = folder, tiny.output(name, dense, **inputs)
    jobs = [(str(folder), AUTO[name]) for name, (folder, _) in expected.items()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH]
    result = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return expected


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_plan_from_search_is_applied_and_loaded_here_and_in_a_fresh_process(name, applied):
    folder, expected = applied[name]
    model, info = getattr(transformers, AUTO[name]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is tiny.MODELS[name][0]
    config = getattr(model.config, "quantization_config", None)
    # Experts' stacks may be too small to save anything, and are then edited and dense.
    assert low_rank_layers(model) or config is None
    for found in (tiny.output(name, model, **tiny.inputs(name)), load_file(folder / "output.st")["output"]):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
