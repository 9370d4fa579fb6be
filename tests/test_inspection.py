"""Inspections: what is written is true, survives a kill, and can be read again."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import eckart
import tiny_models
from eckart import noise, spectra
from eckart.dynamics import SpectrumCallback, checkpoint_folders, step_of, timeline_of, transitions
from eckart.errors import EckartError, ModelError
from eckart.importance import correlate, measure_importance, sample
from eckart.inspection import run_inspect
from eckart.inspection_report import render_inspection
from eckart.matrices import find_matrices, read, write
from eckart.recipe import InspectSettings
from eckart.results import paired_gain
from eckart.scoring import prepare, score
from eckart.shards import open_checkpoint
from eckart.spectra import inspect_matrix, read_inspection, read_ledger, scan
from eckart.surgery import applied, make_edit
from eckart.tasks import read_text


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_folder):
    return open_checkpoint(str(tiny_llama_folder))


def timeless(rows):
    return [row.model_copy(update={"seconds": 0.0}) for row in rows]


@pytest.mark.parametrize("fast", [False, True])
def test_a_row_says_what_the_singular_values_of_the_matrix_say(checkpoint, fast):
    for matrix in checkpoint.matrices[:4]:
        weight = checkpoint.read(matrix)
        row = inspect_matrix(weight, matrix, fast=fast)
        values = torch.linalg.svdvals(weight.double())
        assert np.allclose(row.singular_values, values.numpy(), rtol=1e-5)
        for rule, edge in noise.EDGES.items():
            assert row.edges[rule] == pytest.approx(edge(values, matrix.shape), rel=1e-5)
            assert row.ranks[rule] == int((values > edge(values, matrix.shape)).sum())
        energy = float((values**2).sum())
        assert row.measures["stable_rank"] == pytest.approx(energy / float(values[0]) ** 2 / matrix.rank, rel=1e-5)
        assert len(row.heads) == (matrix.heads if (matrix.heads or 1) > 1 else 0)


def test_a_killed_scan_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch):
    matrices, ledger = checkpoint.matrices, tmp_path / "spectra.jsonl"
    undisturbed = scan(checkpoint, matrices)
    measured = []

    def counting(weight, matrix, **options):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(matrix.name)
        return inspect_matrix(weight, matrix, **options)

    monkeypatch.setattr(spectra, "inspect_matrix", counting)
    with pytest.raises(KeyboardInterrupt):
        scan(checkpoint, matrices, ledger)
    with ledger.open("ab") as file:
        file.write(b'{"key": "half a li')
    monkeypatch.setattr(
        spectra, "inspect_matrix", lambda w, m, **o: measured.append(m.name) or inspect_matrix(w, m, **o)
    )
    found = scan(checkpoint, matrices, ledger)
    assert measured == [matrix.name for matrix in matrices]
    assert timeless(found) == timeless(undisturbed)
    assert len(read_ledger(ledger)) == len(matrices)


@given(tail=st.binary(max_size=60))
def test_a_damaged_end_of_a_ledger_is_cut_off(tail, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "spectra.jsonl"
    scan(checkpoint, checkpoint.matrices[:1], path)
    sound = path.read_bytes()
    path.write_bytes(sound + tail)
    assert len(read_ledger(path)) == 1
    assert path.read_bytes() == sound


@pytest.fixture(scope="module")
def inspected(tiny_llama_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "inspected"
    settings = InspectSettings(window=16, batch_tokens=64, tokens=512)
    return out, run_inspect(str(tiny_llama_folder), out, settings, read_text(text_file))


def test_an_inspection_writes_its_files_and_can_be_read_again(inspected, tiny_llama_folder):
    out, results = inspected
    model, _ = eckart.load(str(tiny_llama_folder))
    assert [row.matrix for row in read_inspection(out)] == [m.name for m in find_matrices(model)]
    assert json.loads((out / "inspect.json").read_text()) == results
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert set(results["importance"]) == {row.matrix for row in read_inspection(out)}
    with pytest.raises(EckartError, match="not empty"):
        run_inspect(str(tiny_llama_folder), out, InspectSettings())


def test_every_change_of_the_loss_is_that_of_the_model_with_this_edit_alone(tiny_llama_folder, text_file):
    model, tokenizer = eckart.load(str(tiny_llama_folder))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    encoded = sample(prepare(model, tokenizer, read_text(text_file), window=16, batch_tokens=64), 512)
    matrices = find_matrices(model)
    found = measure_importance(model, tokenizer, encoded, matrices, rho=0.25)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    base = score(model, tokenizer, encoded).loss
    for matrix in matrices:
        with applied(model, [make_edit(matrix, 0.25)]):
            expected = paired_gain(base, score(model, tokenizer, encoded).loss, "nats/token")
        assert found.matrices[matrix.name]["loss_cut"].value == pytest.approx(expected.value, abs=1e-6)
    # Heads: two of width 8, read by the output projection's columns.
    for head in found.heads:
        (output,) = (m for m in matrices if m.type == "out_proj" and m.layer == head.layer)
        weight = read(model, output)
        without = weight.clone()
        without[:, 8 * head.head : 8 * head.head + 8] = 0
        write(model, output, without)
        expected = paired_gain(base, score(model, tokenizer, encoded).loss, "nats/token")
        write(model, output, weight)
        assert head.loss_gain.value == pytest.approx(expected.value, abs=1e-6)
    assert len(found.heads) == 4


def test_entropy_and_sink_are_those_of_the_attention_that_transformers_gives(tiny_llama_folder, text_file):
    model, tokenizer = eckart.load(str(tiny_llama_folder))
    encoded = prepare(model, tokenizer, read_text(text_file), window=16, batch_tokens=16)
    heads = measure_importance(model, tokenizer, encoded, find_matrices(model)[:1]).heads
    eager = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attn_implementation="eager").eval()
    entropies, sinks = {}, {}
    for block in encoded.blocks:
        with torch.no_grad():
            attentions = eager(**block.inputs, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            for head in range(2):
                ones = []
                for row, column in zip(block.rows.tolist(), block.columns.tolist()):
                    if column > 0:
                        p = weights[row, head, column, : column + 1].double()
                        ones.append((float(-(p * p.log()).sum()) / math.log(column + 1), float(p[0])))
                entropies.setdefault((layer, head), []).append(np.mean([one for one, _ in ones]))
                sinks.setdefault((layer, head), []).append(np.mean([other for _, other in ones]))
    for head in heads:
        assert head.entropy.value == pytest.approx(np.mean(entropies[head.layer, head.head]), abs=1e-5)
        assert head.sink_share.value == pytest.approx(np.mean(sinks[head.layer, head.head]), abs=1e-5)


def test_outliers_are_the_largest_input_over_its_rms(tiny_llama_folder, text_file):
    model, tokenizer = eckart.load(str(tiny_llama_folder))
    encoded = prepare(model, tokenizer, read_text(text_file), window=16, batch_tokens=64)
    matrices = find_matrices(model)
    seen = {}
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _m, args, _o: seen.setdefault(name, []).append(args[0].double()))
    with torch.inference_mode():
        for block in encoded.blocks:
            model(**block.inputs)
    handle.remove()
    expected = [float(x.abs().max() / x.square().mean().sqrt()) for x in seen[name]]
    found = measure_importance(model, tokenizer, encoded, matrices).matrices[name]["outliers"]
    assert found.value == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.count == len(expected)


@given(seed=st.integers(0, 200), count=st.integers(5, 30))
def test_correlations_are_spearmans_and_within_types_shifts_of_a_type_do_not_count(seed, count):
    generator = np.random.default_rng(seed)
    types = [("a", "b", "c")[i] for i in generator.integers(0, 3, count)]
    x, y = generator.normal(size=count), generator.integers(0, 4, count).astype(float)
    y[0] = math.nan
    found = correlate({"x": x, "y": y, "constant": np.ones(count)}, types)
    if count < 6 or len(set(y[1:])) < 2:
        return
    (pair,) = found
    assert (pair.one, pair.other, pair.count) == ("x", "y", count - 1)
    assert pair.value == pytest.approx(stats.spearmanr(x[1:], y[1:]).statistic)
    shift = np.array([{"a": 0.0, "b": 1000.0, "c": -500.0}[kind] for kind in types])
    (shifted,) = correlate({"x": x + shift, "y": y - 2 * shift}, types)
    assert shifted.within == pytest.approx(pair.within, nan_ok=True)


def ranked(rank, name="m"):
    row = inspect_matrix(
        torch.eye(4), find_matrices(tiny_models.build("llama"))[0].__class__(name, name, (4, 4), "s", 0, "other")
    )
    return row.model_copy(update={"ranks": row.ranks | {"tw": rank}})


@given(ranks=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_a_transition_is_the_first_rise_from_zero(ranks):
    base = ranked(0)
    moments = [(10 * i, [base.model_copy(update={"ranks": base.ranks | {"tw": r}})]) for i, r in enumerate(ranks)]
    rises = [i for i in range(1, len(ranks)) if ranks[i] > 0 and ranks[i - 1] == 0]
    found = transitions(moments)
    assert [(one.before, one.step) for one in found] == [(10 * (i - 1), 10 * i) for i in rises[:1]]


def test_the_callback_follows_a_training(tmp_path, tiny_llama_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    data = [{"input_ids": torch.arange(4, 12), "labels": torch.arange(4, 12)}] * 16
    callback = SpectrumCallback(tmp_path / "out", every=2, types=("mlp",), layers=(1,))
    states = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            states.append((state.global_step, model.model.layers[1].mlp.up_proj.weight.detach().clone()))

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=5, per_device_train_batch_size=2, learning_rate=0.05,
        report_to=[], save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback, Keep()]).train()
    assert [step for step, _ in callback.moments] == [0, 2, 4, 5]
    weights = dict(states)
    for step, rows in callback.moments[1:]:
        (row,) = (row for row in rows if row.type == "fc_up")
        assert np.allclose(row.singular_values, torch.linalg.svdvals(weights[step].double()).numpy(), rtol=1e-5)
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["timeline"]["steps"] == [0, 2, 4, 5]
    # The folders that the trainer saved give the same timeline at their steps.
    folders = checkpoint_folders([tmp_path / "trainer"])
    assert [step_of(folder) for folder in folders] == [2, 4, 5]
    for folder in folders:
        one = open_checkpoint(str(folder))
        chosen = [m for m in one.matrices if m.layer == 1 and m.type in ("fc_in", "fc_up", "fc_out")]
        (expected,) = (rows for step, rows in callback.moments if step == step_of(folder))
        assert timeless(scan(one, chosen)) == timeless(expected)


def test_a_timeline_of_different_models_is_refused():
    with pytest.raises(EckartError, match="different matrices"):
        timeline_of([(0, [ranked(0, "one")]), (1, [ranked(0, "other")])])


def test_a_folder_without_checkpoints_or_a_step_is_refused(tmp_path, tiny_llama_folder):
    with pytest.raises(ModelError, match="holds no checkpoint"):
        checkpoint_folders([tmp_path])
    nameless = shutil.copytree(tiny_llama_folder, tmp_path / "last")
    with pytest.raises(ModelError, match="not known"):
        checkpoint_folders([nameless])


@given(content=st.binary(max_size=30) | st.just(b'{"kind": "inspect", "schema_version": 1, "matrices": [{}]}'))
def test_rubbish_is_no_inspection(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("rubbish") / "inspect.json"
    path.write_bytes(content)
    with pytest.raises(EckartError, match="inspect.json"):
        read_inspection(path)


def test_hostile_names_stay_text_in_the_report(inspected):
    _, results = inspected
    hostile = "</script><script>window.injected=1</script><img src=x onerror=alert(1)>"
    changed = json.loads(json.dumps(results).replace("model.layers.1.mlp", hostile.replace('"', "")))
    page, calm = render_inspection(changed), render_inspection(results)
    assert page.count("<script") - calm.count("<script") == 0
    assert "<img" not in page.replace(calm[-1], "", 0).split("window.injected")[-1][:200] or page.count(
        "<img"
    ) == calm.count("<img")
    assert page.count("<img") == calm.count("<img")


@pytest.mark.parametrize("field", ["matrices", "model", "correlations", "timeline", "heads"])
def test_a_report_of_damaged_results_is_one_clear_error(inspected, field):
    _, results = inspected
    with pytest.raises(EckartError, match="kind 'inspect'"):
        render_inspection({key: value for key, value in results.items() if key != field})


def test_the_program_inspects_redraws_and_forecasts(program, tiny_llama_folder, tmp_path):
    out = tmp_path / "run"
    done = program("inspect", tiny_llama_folder, "--out", out, "--types", "mlp", "--layers", "-1", "--json")
    assert done.status == 0, done.err
    assert [row["type"] for row in json.loads(done.out)["matrices"]] == ["fc_in", "fc_up", "fc_out"]
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert program("report", out).status == 0
    assert (out / "report.html").read_text() == page
    dry = program("inspect", tiny_llama_folder, "--out", tmp_path / "none", "--dry-run")
    assert dry.status == 0
    assert "14 matrices" in dry.out
    assert not (tmp_path / "none").exists()
    wrong = program("inspect", tiny_llama_folder, "--out", tmp_path / "none", "--types", "fc_inn")
    assert wrong.status == 1
    assert "Did you mean" in wrong.err
    assert not (tmp_path / "none").exists()
