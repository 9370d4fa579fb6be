"""Compression: within the budget, resumable, for every layout and whatever the statistics."""

import copy
import json
import signal

import numpy as np
import pytest
import torch

import eckart
import tiny_models as tiny
from eckart.calibration import read_windows
from eckart.compression import compress, forecast, read_calibration
from eckart.compression_steps import PROGRAM_BYTES, Steps
from eckart.errors import MatrixError, OutputError, PlanError, RankError
from eckart.factoring import factor_
from eckart.linear import LowRankLayer
from eckart.mapping import has_memory
from eckart.matrices import find_matrices, partition, read, write
from eckart.recipe import CompressSettings
from eckart.spill import Spill
from eckart.surgery import apply_, weights_sha256
from eckart.tasks import Example, make_task
from eckart.units import find_units, restored, seconds_of
from faults import killed_again_and_again
from nursery import Nursery

METHODS = ["svd", "fwsvd", "asvd", "whiten", "double", "propagated", "monarch", "lowrank+sparse"]


def text(words=300):
    return make_task("text", [Example(tiny.sentence(words, 0), None)])


def settings(**given):
    return CompressSettings.model_validate(
        {"ratio": 0.6, "windows": 6, "measured": 2, "window": 16, "allocate": "uniform", **given}
    )


def logits(model, **inputs):
    with torch.inference_mode():
        return model(**(inputs or tiny.inputs("llama"))).logits


def stored_numbers(model, names):
    """Numbers that the weights of these parameters take now."""
    modules = dict(model.named_modules())
    total = 0
    for name in names:
        module = modules.get(name.removesuffix(".weight")) or modules.get(name)
        weights = [p for p in module.parameters() if p.ndim > 1] if module is not None else []
        total += sum(p.numel() for p in weights) if weights else model.get_parameter(name).numel()
    return total


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_every_causal_layout_is_compressed_within_its_budget_and_left_as_it_was(name):
    model = tiny.build(name)
    before = copy.deepcopy(model.state_dict())
    found = compress(model, tiny.tokenizer(), text(), settings())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    names = {m.parameter for m in partition(find_matrices(model)) if m.type != "other"}
    dense = stored_numbers(model, names)
    factor_(model, found.plan, factors=found.factors, storage="pivoted")
    assert any(isinstance(module, LowRankLayer) for module in model.modules())
    assert stored_numbers(model, names) <= 0.6 * dense
    assert bool(torch.isfinite(logits(model, **tiny.inputs(name))).all())


@pytest.mark.parametrize("method", METHODS)
def test_with_every_method_a_larger_budget_diverges_less(method):
    model = tiny.build("llama")
    found = [compress(model, tiny.tokenizer(), text(), settings(method=method, ratio=r)) for r in (0.6, 0.95)]
    values = [each.divergence["uniform"].value for each in found]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trouble", ["one token", "one direction", "dead neuron", "unused expert"])
def test_statistics_that_are_singular_are_no_reason_to_fail(method, trouble):
    model = tiny.build("mixtral" if trouble == "unused expert" else "llama")
    task, given = text(), {}
    if trouble == "one token":
        given = {"windows": 1, "window": 2, "measured": 1}
    if trouble == "one direction":
        task = make_task("text", [Example("w7 " * 200, None)])
    if trouble == "dead neuron":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3] = 0
            model.model.layers[1].input_layernorm.weight[5] = 0
    if trouble == "unused expert":
        given = {"windows": 1, "window": 3, "measured": 1}
    found = compress(model, tiny.tokenizer(), task, settings(method=method, **given))
    factor_(model, found.plan, factors=found.factors, storage="pivoted")
    assert bool(torch.isfinite(logits(model)).all())
    if trouble == "unused expert" and method not in ("svd", "asvd", "monarch", "lowrank+sparse"):
        assert found.facts["roots"]["identity"] > 0


def test_a_matrix_cut_alone_to_a_rank_is_the_best_for_its_inputs():
    """Of `whiten`, against least squares: no other matrix of the rank has outputs closer to the original ones."""
    model = tiny.build("llama")
    chosen = settings(method="whiten", types=("fc_out",), ratio=0.5, windows=8)
    found = compress(model, tiny.tokenizer(), text(), chosen)
    name = "model.layers.0.mlp.down_proj"
    inputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    for block in read_windows(text(), tiny.tokenizer(), length=16, count=8).blocks:
        with torch.inference_mode():
            model(**block.inputs)
    handle.remove()
    x = torch.cat([part.flatten(0, 1) for part in inputs]).double()
    weight = model.get_submodule(name).weight.detach().double()
    spectrum = found.factors[name]
    cut = (spectrum.U.double() * spectrum.S.double()) @ spectrum.Vh.double()
    outputs = x @ weight.T
    rank = len(spectrum.S)
    best = torch.linalg.svdvals(outputs)[rank:].norm()
    torch.testing.assert_close((outputs - x @ cut.T).norm(), best, rtol=1e-3, atol=1e-3)


def test_propagated_cuts_see_the_cut_model_and_aim_at_the_original_one():
    model = tiny.build("llama")
    small = {"windows": 12, "ratio": 0.5, "input_shrinkage": 0.0, "output_shrinkage": 0.0}
    divergences = {}
    for propagation in (0.0, 1.0):
        found = compress(model, tiny.tokenizer(), text(), settings(propagation=propagation, **small))
        cut = copy.deepcopy(model)
        factor_(cut, found.plan, factors=found.factors, storage="pivoted")
        gap = 0.0
        for block in read_windows(text(), tiny.tokenizer(), length=16, count=12).blocks:
            states = [m(**block.inputs, output_hidden_states=True).hidden_states[-2] for m in (model, cut)]
            gap += float((states[0] - states[1]).detach().square().sum())
        divergences[propagation] = gap
    assert divergences[1.0] < divergences[0.0]


def test_compensation_brings_the_outputs_of_cut_blocks_nearer_to_the_original_ones():
    model = tiny.build("llama")
    small = {"windows": 12, "ratio": 0.5, "input_shrinkage": 0.0, "output_shrinkage": 0.99}
    gaps = []
    for share in (0.0, 0.5, 1.0):
        found = compress(model, tiny.tokenizer(), text(), settings(compensation=share, **small))
        cut = copy.deepcopy(model)
        factor_(cut, found.plan, factors=found.factors, storage="pivoted")
        gap = 0.0
        for block in read_windows(text(), tiny.tokenizer(), length=16, count=12).blocks:
            states = [m(**block.inputs, output_hidden_states=True).hidden_states[1] for m in (model, cut)]
            gap += float((states[0] - states[1]).detach().square().sum())
        gaps.append(gap)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[2] < 0.98 * gaps[0]


def test_every_allocation_is_compared_and_the_one_that_diverges_least_is_kept():
    model = tiny.build("llama")
    found = compress(model, tiny.tokenizer(), text(), settings(allocate="auto"))
    assert set(found.divergence) == {"uniform", "tail", "measured"}
    assert found.divergence[found.chosen].value == min(value.value for value in found.divergence.values())


def test_auto_moves_budget_while_that_brings_the_cut_model_nearer():
    model = tiny.build("llama")
    chosen = settings(allocate="auto", ratio=0.4, measured=6)
    found = compress(model, tiny.tokenizer(), text(), chosen)
    values = [value.value for value in found.facts["rounds"]]
    assert len(values) > 1
    assert values == sorted(values, reverse=True)
    assert found.facts["budget"]["spent"] <= found.facts["budget"]["allowed"]
    small = copy.deepcopy(model)
    factor_(small, found.plan, factors=found.factors, storage="pivoted")
    total = []
    for block in read_windows(text(), tiny.tokenizer(), length=16, count=6).blocks:
        one, two = (m(**block.inputs).logits.detach().log_softmax(-1) for m in (model, small))
        total += (one.exp() * (one - two)).sum(-1).mean(-1).tolist()
    assert values[-1] == pytest.approx(np.mean(total), rel=1e-3)
    assert compress(model, tiny.tokenizer(), text(), settings()).facts["rounds"] == []


def test_a_budget_in_bytes_is_that_of_the_whole_model():
    model = tiny.build("llama")
    whole = sum(p.nbytes for p in model.parameters())
    found = compress(model, tiny.tokenizer(), text(), settings(ratio=None, bytes=int(0.8 * whole)))
    after = factor_(model, found.plan, factors=found.factors, storage="pivoted").after
    assert after.bytes <= 0.8 * whole
    with pytest.raises(RankError, match="too small"):
        compress(tiny.build("llama"), tiny.tokenizer(), text(), settings(ratio=None, bytes=1000))


ALLOCATIONS = ["tail", "measured", "sensitivity", "groups", "signed", "mp", "bema", "energy", "effective-rank"]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_keeps_the_budget_and_uniform_is_tried_beside_it(allocation):
    model = tiny.build("llama")
    found = compress(model, tiny.tokenizer(), text(), settings(allocate=allocation, method="double"))
    assert set(found.divergence) == {"uniform", allocation}
    assert found.facts["budget"]["spent"] <= found.facts["budget"]["allowed"]


def test_signed_slopes_are_the_change_of_the_loss_by_removing_a_component():
    model = tiny.build("llama")
    chosen = settings(method="whiten", types=("fc_out",))
    units, _ = find_units(model, find_matrices(model), chosen)
    windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
    steps = Steps(model, tiny.tokenizer(), chosen, windows, units, Spill(None), lambda _: None)
    steps.curves()
    slopes = steps.slopes()[units[0].name]
    (matrix,), (spectrum,) = units[0].matrices, steps.spectra(units[0])

    def loss(step):
        total, weight = 0.0, read(model, matrix)
        with restored(model, [matrix]):
            change = spectrum.S[2] * torch.outer(spectrum.left[:, 2], spectrum.right[2])
            write(model, matrix, weight - step * change)
            for block in windows.blocks:
                logits = model(**block.inputs).logits.detach().double()
                wanted = block.target.view(logits.shape[:2])
                total += float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="sum"))
        return total / sum(windows.tokens)

    assert slopes[2] == pytest.approx((loss(1e-2) - loss(-1e-2)) / 2e-2, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon", "mixtral"])
def test_cut_weights_and_what_is_cut_lie_on_the_disk_and_the_own_ones_are_not_written(name, tmp_path, monkeypatch):
    model = tiny.build(name)
    monkeypatch.setattr("eckart.spill.MAPPED_FROM", 0)
    expected = compress(model, tiny.tokenizer(), text(), settings(allocate="auto"))
    held = {key: (parameter.data_ptr(), parameter.clone()) for key, parameter in model.named_parameters()}
    inside = []

    def looked_at(self, *_):
        cut = [parameter for key, parameter in model.named_parameters() if parameter.data_ptr() != held[key][0]]
        inside.append(len(cut))
        assert not any(has_memory(parameter) for parameter in cut)
        return measured(self, *_)

    measured = Steps._divergence
    monkeypatch.setattr(Steps, "_divergence", looked_at)
    found = compress(model, tiny.tokenizer(), text(), settings(allocate="uniform"), spill=tmp_path / "work")
    assert max(inside) > 1
    for key, parameter in model.named_parameters():
        assert parameter.data_ptr() == held[key][0]
        assert torch.equal(parameter, held[key][1])
    assert not any(has_memory(spectrum.Vh) for spectrum in found.factors.values())
    monkeypatch.setattr(Steps, "_divergence", measured)
    again = compress(model, tiny.tokenizer(), text(), settings(allocate="auto"), spill=tmp_path / "auto")
    for key, spectrum in expected.factors.items():
        assert all(torch.equal(getattr(spectrum, part), getattr(again.factors[key], part)) for part in ("U", "S", "Vh"))


def test_windows_whose_predictions_are_large_are_read_one_by_one_and_say_nearly_the_same(monkeypatch):
    model = tiny.build("llama")
    together = compress(model, tiny.tokenizer(), text(), settings(neurons=False))
    monkeypatch.setattr("eckart.compression.PREDICTED_BYTES", 1)
    windows = read_calibration(model, tiny.tokenizer(), text(), settings(), None)
    assert [len(block.examples) for block in windows.blocks] == [1] * 6
    alone = compress(model, tiny.tokenizer(), text(), settings(neurons=False))
    for name, spectrum in together.factors.items():
        torch.testing.assert_close(spectrum.S, alone.factors[name].S, rtol=1e-3, atol=1e-4)


def test_the_units_that_are_given_stay_as_they_were():
    model, chosen = tiny.build("llama"), settings()
    units, _ = find_units(model, find_matrices(model), chosen)
    windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
    steps = Steps(model, tiny.tokenizer(), chosen, windows, units, Spill(None), lambda _: None)
    given = [*units]
    steps.curves()
    assert units == given
    assert [unit.name for unit in steps.units] == [unit.name for unit in given]
    assert any(unit.cuts for unit in steps.units)


def test_a_task_takes_a_share_in_the_metrics():
    model = tiny.build("llama")
    task = make_task("task", [Example(tiny.sentence(6, seed), f"w{seed + 9}") for seed in range(12)])
    plain = compress(model, tiny.tokenizer(), text(), settings(neurons=False))
    found = {
        weight: compress(model, tiny.tokenizer(), text(), settings(task_weight=weight, neurons=False), task=task)
        for weight in (0.0, 1.0)
    }
    key = "model.layers.2.mlp.down_proj"
    torch.testing.assert_close(found[0.0].factors[key].S, plain.factors[key].S)
    assert not torch.allclose(found[1.0].factors[key].S, plain.factors[key].S, rtol=1e-2)


@pytest.mark.parametrize("method", ["double", "propagated"])
def test_with_all_the_weight_on_a_task_the_text_makes_no_difference(method):
    model = tiny.build("llama")
    task = make_task("task", [Example(tiny.sentence(6 + seed % 3, seed), f"w{seed + 9}") for seed in range(12)])
    chosen = settings(method=method, task_weight=1.0, types=("attn",))
    texts = [make_task("text", [Example(tiny.sentence(300, seed), None)]) for seed in (0, 1)]
    one, other = (compress(model, tiny.tokenizer(), each, chosen, task=task).factors for each in texts)
    for name, spectrum in one.items():
        cuts = [(each.U * each.S) @ each.Vh for each in (spectrum, other[name])]
        torch.testing.assert_close(*cuts, rtol=1e-3, atol=1e-3)


def test_of_a_task_with_choices_only_the_right_answers_are_read():
    model = tiny.build("llama")
    pairs = [(f"w{seed + 9}", f"w{seed + 30} w8") for seed in range(12)]
    choices = [Example(tiny.sentence(6, seed), seed % 2, pair) for seed, pair in enumerate(pairs)]
    right = [Example(tiny.sentence(6, seed), pair[seed % 2]) for seed, pair in enumerate(pairs)]
    found = [
        compress(model, tiny.tokenizer(), text(), settings(types=("fc_out",)), task=make_task("task", examples))
        for examples in (choices, right)
    ]
    for name, spectrum in found[0].factors.items():
        torch.testing.assert_close(spectrum.S, found[1].factors[name].S)


def test_a_forecast_names_the_worst_matrices_and_changes_nothing():
    model = tiny.build("llama")
    before = weights_sha256(model)
    found = forecast(model, tiny.tokenizer(), text(), settings(neurons=False))
    values = [row["divergence"].value for row in found["matrices"]]
    assert len(values) == 21
    assert values == sorted(values, reverse=True)
    assert found["bytes"] > PROGRAM_BYTES + sum(p.nbytes for p in model.parameters())
    assert found["seconds"] > 0
    assert weights_sha256(model) == before
    # Each alone, by hand.
    worst = found["matrices"][0]
    kind = next(m.type for m in find_matrices(model) if m.name == worst["matrix"])
    chosen = settings(types=(kind,), neurons=False)
    alone = forecast(model, tiny.tokenizer(), text(), chosen)
    same = next(row for row in alone["matrices"] if row["matrix"] == worst["matrix"])
    assert same["divergence"].value == pytest.approx(worst["divergence"].value, rel=1e-4)


def test_a_budget_of_time_counts_measured_seconds():
    model = tiny.build("llama")
    chosen = settings(ratio=None, latency=0.9)
    units, _ = find_units(model, find_matrices(model), chosen)
    windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
    steps = Steps(model, tiny.tokenizer(), chosen, windows, units, Spill(None), lambda _: None)
    for unit in units:
        shape, full = unit.matrices[0].shape, unit.full()
        steps.work.note(f"seconds of {shape}", [[r, 1.0 + r / full] for r in range(1, full)] + [[full, 3.0]])
    curves = steps.curves()
    budget = steps.budget(curves)
    assert budget == pytest.approx(0.9 * 3.0 * len(units))
    _, choice, _ = steps.choose(curves, budget)
    assert sum(curve.costs[choice[curve.name]] for curve in curves) <= budget
    assert all(seconds > 0 for _, seconds in seconds_of((8, 6), settings(), torch.zeros(0)))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_killed_compression_goes_on_and_ends_as_an_undisturbed_one(name, tmp_path):
    model = tiny.build(name)
    chosen = settings(allocate="auto")
    expected = compress(model, tiny.tokenizer(), text(), chosen)
    steps = []
    compress(model, tiny.tokenizer(), text(), chosen, spill=tmp_path / "whole", progress=steps.append)
    stages = {step.stage for step in steps}
    assert stages >= {"reading", "decomposing", "measuring", "comparing allocations", "cutting"}
    found, kills = killed_again_and_again(
        lambda stop: compress(model, tiny.tokenizer(), text(), chosen, spill=tmp_path / "killed", progress=stop), 8
    )
    assert kills < len(steps)
    assert kills >= 2
    assert found.plan == expected.plan
    assert found.divergence == expected.divergence
    for key, spectrum in expected.factors.items():
        assert torch.equal(found.factors[key].U, spectrum.U)


def test_work_of_another_compression_is_refused(tmp_path):
    model = tiny.build("llama")
    compress(model, tiny.tokenizer(), text(), settings(), spill=tmp_path / "work")
    with pytest.raises(OutputError, match="settings"):
        compress(model, tiny.tokenizer(), text(), settings(ratio=0.7), spill=tmp_path / "work")


def test_a_plan_with_a_weighting_is_not_applied_without_its_factors():
    model = tiny.build("llama")
    found = compress(model, tiny.tokenizer(), text(), settings())
    before = weights_sha256(model)
    with pytest.raises(PlanError, match="calibration text"):
        apply_(model, found.plan)
    with pytest.raises(PlanError, match="calibration text"):
        factor_(model, found.plan)
    assert weights_sha256(model) == before


def test_what_cannot_be_factored_is_named_and_nothing_left_is_an_error():
    model = tiny.build("llama")
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    units, blocked = find_units(model, find_matrices(model), settings())
    assert blocked == {"model.layers.0.mlp.gate_proj": "the weight is shared by several modules"}
    assert all(unit.name not in blocked for unit in units)
    with pytest.raises(MatrixError, match="must stay dense"):
        find_units(model, [m for m in find_matrices(model) if m.name in blocked], settings())


def test_the_program_writes_a_folder_that_transformers_loads_and_generates_from(program, tiny_llama_folder, tmp_path):
    from conftest import WORDS

    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 30), encoding="utf-8")
    out = tmp_path / "out"
    arguments = [
        "compress", tiny_llama_folder, "--calibration", path, "--ratio", "0.6", "--window", "16", "--windows", "8",
        "--measure", path, "--out", out,
    ]  # fmt: skip
    done = program(*arguments)
    assert done.status == 0, done.err
    assert "bytes instead of" in done.out
    results = json.loads((out / "results.json").read_text())
    assert results["kind"] == "compress"
    assert results["size"]["after"]["bytes"] < results["size"]["before"]["bytes"]
    assert not (out / "work").exists()
    assert (out / "report.html").is_file()
    plan = eckart.read_plan(out)
    assert {edit.weighting for edit in plan.edits} == {"propagated"}
    model, tokenizer = eckart.load(str(out / "model"))
    ids = tokenizer("the ant", return_tensors="pt").input_ids
    assert model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    assert program(*arguments).status == 1


def test_a_killed_program_is_resumed_by_the_same_command(program, tiny_llama_folder, tmp_path):
    from conftest import WORDS

    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 30), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["compress", tiny_llama_folder, "--calibration", path, "--ratio", "0.6", "--window", "16", "--out", out]
    (out / "work").mkdir(parents=True)
    done = program(*arguments)
    assert done.status == 0, done.err
    assert "Resuming" in done.err


@pytest.fixture(scope="module")
def nursery():
    running = Nursery()
    yield running
    running.close()


def test_killed_while_measuring_and_while_cutting_the_program_ends_with_the_bytes_of_an_undisturbed_one(
    nursery, tiny_llama_folder, tmp_path
):
    from conftest import WORDS

    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 30), encoding="utf-8")
    command = [
        "compress",
        tiny_llama_folder,
        "--calibration",
        path,
        "--ratio",
        "0.6",
        "--window",
        "16",
        "--windows",
        "8",
    ]

    def life(out, fault=None):
        return nursery.live(*command, "--out", out, log=tmp_path / "log", fault=fault)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, errors = life(whole)
    assert status == 0, errors
    # The processes die one after the other, each further on; the last of them while a file is put in its place.
    faults = [("compressor", "decomposing", 4), ("compressor", "measuring", 3), ("compressor", "cutting", 2)]
    for fault in (*faults, ("file", 1, False)):
        status, errors = life(killed, fault)
        assert status == -signal.SIGKILL, (fault, errors)
        assert not (killed / "results.json").exists()
        assert not (killed / "model").exists()
    status, errors = life(killed)
    assert status == 0, errors
    assert "Resuming the unfinished compression" in errors
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    compared = [path for path in whole.rglob("*") if path.is_file() and path.suffix != ".html"]
    assert any(path.suffix == ".safetensors" for path in compared)
    for path in compared:
        if path.name != "results.json":
            assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, killed))
    for results in (one, two):
        del results["seconds"], results["environment"]
    assert one["allocations"] == two["allocations"]
    assert one == two
