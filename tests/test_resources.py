"""Work is counted as hooks and formulas count it; speed and memory are of what was run. No times are judged."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import tiny_models as tiny
from eckart import resources, run
from eckart.checkpoint import save
from eckart.cli import app
from eckart.errors import ModelError
from eckart.factoring import factor_
from eckart.matrices import find_matrices, partition, select
from eckart.plan import write_plan
from eckart.report import render
from eckart.resources import Work, count_work, measure_memory, measure_speed, prompt_of
from eckart.results import SCHEMA_VERSION
from eckart.surgery import make_edit, weights_sha256

HEADS, HEAD = 4, 8  # of the models in tiny_models.py


def tokens(batch=2, length=6):
    return torch.randint(3, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def edits_of(model, rho=0.2):
    return [make_edit(matrix, rho) for matrix in select(partition(find_matrices(model)))]


def hooked(model, ids):
    """The oracle: operations and bytes of all linear layers in a pass, by what goes in and out of each."""
    seen = {"flops": 0, "bytes": 0}

    def count(module, inputs, output):
        weight, bias = module.weight, module.bias
        if bias is not None and not isinstance(module, (nn.Linear, Conv1D)):
            return
        rows = inputs[0].numel() // inputs[0].shape[-1]
        seen["flops"] += 2 * rows * weight.numel()
        seen["bytes"] += inputs[0].nbytes + weight.nbytes + output.nbytes + (0 if bias is None else bias.nbytes)

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_work_of_a_prompt_is_that_of_its_linear_layers_and_of_its_attention(name, factored):
    model, ids = tiny.build(name), tokens()
    if factored:
        assert factor_(model, edits_of(model), at_most=10).layers
    (batch, length), layers = ids.shape, model.config.num_hidden_layers
    linear = hooked(model, ids)
    work = count_work(model, ids)[0]
    assert work.flops == linear["flops"] + layers * 4 * batch * HEADS * length * length * HEAD
    # Queries, keys, values and outputs, once each; heads that share keys may be handed over repeated or not.
    attention = work.bytes - linear["bytes"]
    one = layers * 4 * batch * length * HEADS * HEAD
    assert 3 * one <= attention <= 4 * one


def test_a_step_of_decoding_reads_every_weight_once_and_multiplies_by_it_once_for_each_sequence():
    model = tiny.build("llama")
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for batch in (1, 3):
        _, step = count_work(model, tokens(batch, 4))
        attention = model.config.num_hidden_layers * 4 * batch * HEADS * 5 * HEAD
        assert step.flops == 2 * batch * sum(weight.numel() for weight in weights) + attention
        assert sum(weight.nbytes for weight in weights) < step.bytes < 2 * sum(weight.nbytes for weight in weights)


def test_experts_that_no_token_chose_are_not_read():
    model = tiny.build("mixtral")
    config = model.config
    expert = sum(parameter[0].nbytes for parameter in model.parameters() if parameter.ndim == 3)
    layers = config.num_hidden_layers
    assert expert, "experts are 3-D parameters"
    _, one = count_work(model, tokens(1, 4))
    dense = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    # One token chooses two of the four experts in every layer.
    chosen = config.num_experts_per_tok * expert
    assert dense + chosen < one.bytes < dense + 1.5 * chosen
    assert layers * config.num_local_experts > config.num_experts_per_tok


def test_a_model_that_does_not_generate_has_no_step_of_decoding():
    model = tiny.build("bert")
    assert len(count_work(model, tokens())) == 1
    (found,) = measure_speed({"none": model}, "none", batches=(2,), prompt=4, repeats=1)
    assert found.decode is None


@pytest.mark.parametrize(("batch", "by"), [(1, "bytes"), (31, "bytes"), (32, "flops")])
def test_speed_is_tokens_over_seconds_and_the_limit_is_of_bytes_or_of_operations(monkeypatch, batch, by):
    dense, factored, order = nn.Identity(), nn.Identity(), []
    seconds = {id(dense): [2.0, 3.0, 6.0], id(factored): [1.0, 1.5, 2.0]}
    work = {id(dense): [Work(900, 90), Work(80, 60)], id(factored): [Work(300, 60), Work(20, 20)]}

    def timed(model, _ids, _new_tokens):
        order.append("dense" if model is dense else "factored")
        slower = 1 + (len(order) - 1) // 2  # a machine that gets busier
        return [at * slower for at in seconds[id(model)]]

    monkeypatch.setattr(resources, "_timed", timed)
    monkeypatch.setattr(resources, "count_work", lambda model, _ids: work[id(model)])
    monkeypatch.setattr(resources, "_tokens", lambda _model, batch, *_: torch.zeros(batch, 10))
    sides = {"dense": dense, "factored": factored}
    found = measure_speed(sides, "dense", batches=(batch,), repeats=3)
    assert order == ["dense", "factored"] * 4  # the first turn warms up
    assert [one.side for one in found] == ["dense", "factored"]
    prefill, decode = found[1].prefill, found[1].decode
    assert prefill.tokens_per_second.value == pytest.approx(batch * 10 / 3)  # turns took 2, 3 and 4 times 1 s
    assert (prefill.tokens_per_second.least, prefill.tokens_per_second.most) == (batch * 10 / 4, batch * 10 / 2)
    assert decode.tokens_per_second.value == pytest.approx(batch * 2 / 3)  # 1 s from the first to the third token
    # The ratio is formed within a turn, so the busy machine does not show.
    assert [getattr(decode.ratio, name) for name in ("value", "least", "most", "count")] == pytest.approx([4, 4, 4, 3])
    assert prefill.ratio.value == pytest.approx(2)
    prompt_by = "bytes" if batch * 10 < 32 else "flops"
    assert (prefill.limited_by, decode.limited_by) == (prompt_by, by)
    assert prefill.limit == pytest.approx(1.5 if prompt_by == "bytes" else 3)
    assert decode.limit == pytest.approx(3 if by == "bytes" else 4)
    assert decode.work == Work(20, 20)
    assert found[0].decode.ratio.value == found[0].decode.limit == 1


def test_every_side_is_measured_at_every_batch_size():
    dense, factored = tiny.build("llama"), tiny.build("llama")
    factor_(factored, edits_of(factored))
    lines = []
    found = measure_speed(
        {"a": dense, "b": factored}, "a", batches=(1, 2), prompt=5, new_tokens=3, repeats=2, progress=lines.append
    )
    assert [(one.side, one.batch) for one in found] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert lines == ["speed at batch 1", "speed at batch 2"]
    for one in found:
        for pace in (one.prefill, one.decode):
            assert pace.tokens_per_second.count == pace.ratio.count == 2
            assert 0 < pace.tokens_per_second.least <= pace.tokens_per_second.value <= pace.tokens_per_second.most
    assert all(one.decode.limit > 1 for one in found if one.side == "b")


def test_a_prompt_leaves_room_for_what_is_generated():
    model = tiny.build("llama")
    assert model.config.max_position_embeddings == 128
    assert prompt_of(model, 1000, 16) == 112
    assert prompt_of(model, 20, 16) == 20
    assert prompt_of(model, 20, 1000) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what a process takes")
def test_memory_is_that_of_a_process_which_runs_the_model(tiny_llama_folder):
    found = measure_memory("none", str(tiny_llama_folder), device="cpu", processes=1)
    assert found.disk == (tiny_llama_folder / "model.safetensors").stat().st_size
    assert 0 < found.parameters <= found.disk
    assert found.peak.value >= found.interpreter.value > 50e6  # torch alone is more
    assert found.peak.value > found.anonymous.value > 0
    assert found.peak.count == 1
    assert found.device is None


def test_a_model_that_does_not_run_by_itself_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ModelError, match=r"process of its own: .*config\.json"):
        measure_memory("none", str(tmp_path), processes=1)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "measure_memory", partial(measure_memory, processes=1))
    monkeypatch.setattr(run, "measure_speed", partial(measure_speed, batches=(1, 2), repeats=2, new_tokens=3))


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def plan_file(tiny_llama_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from eckart.plan import Plan

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    about = {"source": "m", "architecture": "LlamaForCausalLM", "weights_sha256": weights_sha256(model)}
    made_by = {"eckart": "0.1.0", "recipe": {}}
    plan = Plan.model_validate({"model": about, "edits": edits_of(model), "made_by": made_by})
    write_plan(tmp_path / "plan.json", plan)
    return tmp_path / "plan.json"


@pytest.mark.usefixtures("quick")
def test_evaluate_measures_speed_and_memory_of_a_model_and_its_plans_without_a_task(
    tiny_llama_folder, plan_file, tmp_path
):
    out = tmp_path / "out"
    result = evaluate(tiny_llama_folder, "--plan", plan_file, "--speed", "--memory", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rows"] == []
    speed, memory = found["speed"], found["memory"]["rows"]
    assert [(row["side"], row["batch"]) for row in speed["rows"]] == [
        (side, batch) for batch in (1, 2) for side in ("none", str(plan_file))
    ]
    assert [row["side"] for row in memory] == ["none", str(plan_file)]
    assert memory[1]["parameters"] < memory[0]["parameters"]
    assert speed["rows"][1]["decode"]["limit"] > 1
    assert set(speed["rows"][0]["decode"]["ratio"]) == {"value", "stderr", "count", "unit", "least", "most"}
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]  # nothing of the sides stays
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="speed"' in page
    assert 'id="memory"' in page
    assert 'id="plans"' not in page


@pytest.mark.usefixtures("quick")
def test_a_factored_folder_is_compared_with_the_same_model_multiplied_out(tiny_llama_folder, plan_file, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    factor_(model, edits_of(model))
    folder = save(model, tmp_path / "factored")
    result = evaluate(folder, "--speed", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["speed"]["rows"]
    assert [row["side"] for row in rows] == ["multiplied out", "none"] * 2
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    ids = torch.zeros(1, 29, dtype=torch.int64)
    assert rows[0]["prefill"]["work"]["flops"] == count_work(dense, ids)[0].flops
    assert rows[1]["prefill"]["work"]["flops"] < rows[0]["prefill"]["work"]["flops"]


@pytest.mark.usefixtures("quick")
def test_speed_stands_beside_the_tasks_in_the_terminal(tiny_llama_folder, choice_task_file):
    result = evaluate(tiny_llama_folder, "--task", choice_task_file, "--speed")
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("accuracy", "prefill", "decode", "tokens/s", "times dense"))


def test_a_model_that_reads_no_tokens_is_refused_before_anything_is_measured(tmp_path):
    tiny.build("vit").save_pretrained(tmp_path / "vit")
    result = evaluate(tmp_path / "vit", "--speed")
    assert result.exit_code == 1
    assert "pixel_values" in result.stderr


def test_a_report_of_tasks_alone_has_no_table_of_speed():
    model = {"source": "m", "architecture": "Llama"}
    page = render({"schema_version": SCHEMA_VERSION, "kind": "evaluate", "model": model, "rows": []})
    assert 'id="speed"' not in page
    assert 'id="memory"' not in page
