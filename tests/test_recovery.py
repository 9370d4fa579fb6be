"""Recovery at unchanged size. Oracles: the same training written out, an undisturbed run, peft, the dense model."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

import eckart
import eckart.recovery as recovery_module
import eckart.training as training_module
import tiny_models as tiny
from eckart.dataflow import low_rank_layers
from eckart.errors import ModelError, OutputError, TaskError
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, PivotedLinear
from eckart.matrices import find_matrices
from eckart.quantizer import sizes
from eckart.recipe import RecoverSettings
from eckart.recovery import check, factors_of, forecast_recovery, recover
from eckart.refinement import refine_block_, stacks_of
from eckart.surgery import make_edit
from eckart.tasks import Example, make_task
from eckart.training import make_windows, planned_steps, rate_at, window_losses
from nursery import Nursery
from tiny_models import chain as text

SMALL = {"window": 16, "batch": 4, "steps": 6, "lr": 5e-3, "evaluations": 3, "patience": None, "held_out": 0.15}


def compressed(name="llama", rho=0.5, types=("fc_in", "fc_up", "fc_out", "q_proj"), storage=None):
    """A dense model, and the same with factors."""
    teacher, model = tiny.build(name), tiny.build(name)
    edits = [make_edit(m, rho) for m in find_matrices(model) if m.layer is not None and m.type in types]
    factor_(model, edits, at_most=1.0, storage=storage)
    return teacher, model


def losses(model, task, settings):
    windows = make_windows(task, tiny.tokenizer(), settings, None)
    return window_losses(model, windows.test.split(4)).mean()


@pytest.mark.parametrize("loss", ["lm", "kl", "both"])
def test_training_lowers_what_it_minimises_on_text_that_took_no_part(loss):
    teacher, model = compressed()
    settings = RecoverSettings(**SMALL | {"steps": 40}, loss=loss)
    windows = make_windows(text(), tiny.tokenizer(), settings, None)

    def away(student):
        with torch.no_grad():
            ours, theirs = (m(input_ids=windows.test).logits.log_softmax(-1) for m in (student, teacher))
        return float(kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())

    before = away(model)
    found = recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
    if loss == "kl":
        assert away(model) < 0.9 * before
    else:
        assert found.gain.interval[1] < 0
        assert found.test["after"]["loss"].value < found.test["before"]["loss"].value
    assert found.gain.count == len(windows.test)
    assert found.test["after"]["loss"].value == pytest.approx(losses(model, text(), settings), rel=1e-6)


def writes(teacher, windows, count, tokens):
    """What a teacher writes on from the first token of windows in random order, each read anew for every token."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    written, generator = windows[order[:count], :1], torch.Generator().manual_seed(0)
    with torch.no_grad():
        while written.shape[1] < tokens:
            probabilities = teacher(input_ids=written).logits[:, -1].softmax(-1)
            written = torch.cat((written, probabilities.multinomial(1, generator=generator)), 1)
    return written


@pytest.mark.parametrize(("storage", "sampled"), [("factored", 0), ("pivoted", 0), ("pivoted", 12)])
def test_training_is_adamw_on_both_factors_as_written_out(storage, sampled):
    """Oracle: torch's own loop, over the same batches, from the definition of the loss, on factors from torch's SVD."""
    teacher, model = compressed(storage=storage)
    settings = RecoverSettings(**SMALL, loss="both", lm_weight=0.3, sampled=sampled)
    twin = deepcopy(model)
    found = recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
    windows = make_windows(text(), tiny.tokenizer(), settings, None).train
    assert (found.facts["windows"]["train"], found.facts["windows"]["sampled"]) == (len(windows), sampled)
    if sampled:
        windows = torch.cat((windows, writes(teacher, windows, sampled, 16)))
    for path, layer in low_rank_layers(twin).items():
        U, S, Vh = (part[..., :r] for part, r in zip(torch.linalg.svd(layer.dense()), (layer.rank, layer.rank, None)))
        down, up = nn.Linear(*Vh.shape, bias=False), nn.Linear(*U.shape[::-1], bias=False)
        down.weight.data, up.weight.data = (S.sqrt()[:, None] * Vh[: layer.rank]), (U * S.sqrt())
        twin.set_submodule(path, nn.Sequential(down, up))
    places = [module for module in twin.modules() if isinstance(module, nn.Sequential)]
    weights = [part.weight for place in places for part in place]
    optimizer = torch.optim.AdamW(weights, lr=0, weight_decay=0)
    each = len(windows) // 4
    for step in range(6):
        generator = torch.Generator().manual_seed(step // each)
        order = torch.randperm(len(windows), generator=generator)
        rows = order[step % each * 4 :][:4]
        ids = windows[rows]
        optimizer.param_groups[0]["lr"] = 5e-3 * rate_at(step, 6, settings)
        logits = twin(input_ids=ids).logits
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits.softmax(-1)
        divergence = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1).mean()
        # The next token counts where the text is a person's.
        theirs = rows < len(windows) - sampled
        scores = cross_entropy(logits[theirs, :-1].reshape(-1, logits.shape[-1]), ids[theirs, 1:].reshape(-1))
        language = scores * theirs.float().mean() if theirs.any() else 0.0
        optimizer.zero_grad()
        (divergence + 0.3 * language).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    held_out = make_windows(text(), tiny.tokenizer(), settings, None).held_out
    assert window_losses(twin, [held_out]).mean() == pytest.approx(window_losses(model, [held_out]).mean(), abs=1e-4)
    layers = low_rank_layers(model)
    assert len(layers) == len(places)
    for layer, place in zip(layers.values(), places):
        assert type(layer) is (PivotedLinear if storage == "pivoted" else FactoredLinear)
        torch.testing.assert_close(layer.dense(), place[1].weight @ place[0].weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3", "bloom"])
@pytest.mark.parametrize("method", ["factors", "lora"])
def test_size_storage_dtype_and_all_other_weights_stay(name, method):
    types = ("fc_in", "fc_up", "fc_out", "q_proj")
    teacher, model = compressed(name, 0.4, types)
    model.to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    size, flags = sizes(model), [p.requires_grad for p in model.parameters()]
    settings = RecoverSettings(**SMALL | {"steps": 3}, method=method, rank=2)
    found = recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
    after = model.state_dict()
    assert sizes(model) == size
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [(key, t.dtype, t.shape) for key, t in after.items()] == [(k, t.dtype, t.shape) for k, t in before.items()]
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    orders = {key for key in after if key.endswith(".order")}  # which rows are stored
    assert changed <= set(factors_of(model)) | (orders if method == "factors" else set())
    if found.best_step:
        assert changed


def test_the_best_state_is_kept_even_if_it_is_the_first():
    teacher, model = compressed()
    recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL | {"steps": 40}, loss="lm"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = recover(
        model, tiny.tokenizer(), text(), RecoverSettings(**SMALL | {"lr": 30.0, "clip": 1e6}), teacher=teacher
    )
    assert found.best_step == 0
    assert found.gain.value == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_recovery_that_fails_leaves_the_model_as_it_was():
    teacher, model = compressed()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def stop(progress):
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL), teacher=teacher, progress=stop)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_training_stops_when_held_out_loss_has_not_fallen_for_so_many_looks():
    teacher, model = compressed()
    settings = RecoverSettings(**SMALL | {"lr": 3.0, "steps": 40, "evaluations": 20, "patience": 3})
    found = recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
    values = [point.held_out.value for point in found.curve]
    assert found.stopped
    assert found.curve[-1].step < 40
    assert len(values) - 1 - int(np.nanargmin(values)) == 3
    assert found.curve[int(np.nanargmin(values))].step == found.best_step


def test_no_document_is_in_two_parts_and_no_token_is_made_up():
    settings = RecoverSettings(**SMALL)
    chance = random.Random(0)
    rows = [" ".join(f"w{chance.randint(5, 96)}" for _ in range(40)) for _ in range(24)]
    documents = [tiny.tokenizer()(row).input_ids for row in rows]
    windows = make_windows(make_task("rows", [Example(row, None) for row in rows]), tiny.tokenizer(), settings, None)
    parts = []
    for part in (windows.train, windows.held_out, windows.test):
        joined = part.reshape(-1).tolist()
        owners = {
            i for i, ids in enumerate(documents) if any(joined[k : k + 10] == ids[:10] for k in range(len(joined)))
        }
        parts.append(owners)
        assert part.shape[1] == 16
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    total = sum(map(len, documents))
    assert total - 3 * 16 < sum(part.numel() for part in (windows.train, windows.held_out, windows.test)) <= total


def test_what_the_teacher_writes_begins_with_text_that_trains_and_no_other():
    """Held-out text is of words of its own, so that any of it would show."""
    teacher, model = compressed()
    settings = RecoverSettings(**SMALL | {"window": 32, "steps": 3}, sampled=40)
    rows = [" ".join(f"w{5 + 3 * number + i % 3}" for i in range(64)) for number in range(24)]
    task = make_task("rows", [Example(row, None) for row in rows])
    windows = make_windows(task, tiny.tokenizer(), settings, None)
    trained = {tuple(row[:2].tolist()) for row in windows.train}
    seen = []
    calls = teacher.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    recover(model, tiny.tokenizer(), task, settings, teacher=teacher)
    calls.remove()
    first = next(given["input_ids"] for given in seen if given["use_cache"])
    assert len(first) == 40
    assert {tuple(row.tolist()) for row in first} <= trained
    times = [sum(torch.equal(row[:2], one) for one in first) for row in windows.train]
    assert sum(times) >= 40
    assert min(times) >= 40 // len(windows.train)


def test_another_seed_gives_other_parts_and_the_same_seed_the_same():
    one, same, other = (
        make_windows(text(), tiny.tokenizer(), RecoverSettings(**SMALL, seed=seed), None).train for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_learning_rate_rises_then_falls_and_stays_in_its_range(schedule, warmup):
    settings = RecoverSettings(schedule=schedule, warmup=warmup)
    rates = [rate_at(step, 50, settings) for step in range(50)]
    top = math.ceil(warmup * 50)
    assert all(a < b for a, b in zip(rates[: max(0, top - 1)], rates[1:top]))
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :]))
    assert max(rates) == 1
    assert min(rates) > 0


def test_minutes_become_steps_that_leave_time_for_the_looks():
    settings = RecoverSettings(minutes=2, evaluations=10, batch=8)
    assert planned_steps(settings, 1.0, 24) == 120 - 10
    assert planned_steps(settings, 1e9, 24) == 1


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    results = []
    for batch_tokens in (16, 10_000):
        teacher, model = compressed()
        settings = RecoverSettings(**SMALL | {"steps": 2}, batch_tokens=batch_tokens)
        recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
        results.append({name: weight.detach().clone() for name, weight in factors_of(model).items()})
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_when_activations_are_computed(monkeypatch):
    calls = []
    from transformers import modeling_utils

    original = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    results = []
    for wanted in (False, True):
        teacher, model = compressed("gpt2")  # which has dropout
        settings = RecoverSettings(**SMALL | {"steps": 3}, gradient_checkpointing=wanted)
        found = recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
        results.append([point.held_out.value for point in found.curve])
        assert not any(module.training for module in model.modules())
        assert bool(calls) == wanted
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_bfloat16_training_keeps_factors_precise_and_still_learns():
    teacher, model = compressed()
    settings = RecoverSettings(**SMALL | {"steps": 30}, precision="bfloat16")
    found = recover(model, tiny.tokenizer(), text(), settings, teacher=teacher)
    assert found.gain.value < 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# LoRA


def test_a_merged_adapter_and_one_beside_the_model_are_the_same_model(tmp_path):
    from peft import PeftModel

    settings = SMALL | {"steps": 10, "method": "lora", "rank": 2}
    teacher, one = compressed()
    merged = recover(one, tiny.tokenizer(), text(), RecoverSettings(**settings), teacher=teacher)
    _, two = compressed()
    untouched = {key: tensor.clone() for key, tensor in two.state_dict().items()}
    beside = recover(two, tiny.tokenizer(), text(), RecoverSettings(**settings, adapter=True), teacher=teacher)
    assert merged.adapter is None
    assert merged.peft is None
    assert beside.adapter.parameters == beside.facts["trained"]
    beside.peft.save_pretrained(tmp_path / "adapter")
    base = beside.peft.unload()
    assert {key: t.shape for key, t in base.state_dict().items()} == {k: t.shape for k, t in untouched.items()}
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in base.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, one(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["residual", "output-residual"])
def test_lora_from_a_residual_starts_where_the_initialised_model_is(init):
    settings = SMALL | {"init": init, "rank": 3}
    teacher, one = compressed()
    recover(one, tiny.tokenizer(), text(), RecoverSettings(**settings | {"steps": 0}), teacher=teacher)
    _, two = compressed()
    found = recover(two, tiny.tokenizer(), text(), RecoverSettings(**settings, method="lora"), teacher=teacher)
    windows = make_windows(text(), tiny.tokenizer(), RecoverSettings(**SMALL), None).held_out
    assert found.curve[0].held_out.value == pytest.approx(window_losses(one, [windows]).mean(), abs=1e-5)
    assert found.best_step > 0


# Refinement


def test_refinement_brings_every_block_nearer_to_the_dense_block():
    teacher, model = compressed()
    settings = RecoverSettings(**SMALL, refine=8, refine_lr=5e-3)
    windows = make_windows(text(), tiny.tokenizer(), settings, None).train
    (stack,) = stacks_of(model)
    assert stack == [f"model.layers.{i}" for i in range(3)]
    for number, block in enumerate(stack):
        other = deepcopy(dict(model.named_parameters()))
        before, after = refine_block_(model, teacher, block, windows, settings)
        assert after < before
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, other[n])}
        assert moved
        assert all(name.startswith(f"model.layers.{number}.") for name in moved)


def test_refinement_alone_lowers_the_loss_of_a_recovery_without_steps():
    teacher, model = compressed()
    found = recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL | {"steps": 0}, refine=8), teacher=teacher)
    assert found.best_step == found.steps == 0
    assert found.gain.value < 0


# What cannot be


def test_what_cannot_be_recovered_is_refused_before_anything_is_computed():
    teacher, model = compressed()
    with pytest.raises(ModelError, match="no low-rank layers"):
        recover(tiny.build("llama"), tiny.tokenizer(), text(), teacher=teacher)
    with pytest.raises(ModelError, match=r"no teacher.*--teacher MODEL"):
        recover(model, tiny.tokenizer(), text())
    with pytest.raises(ModelError, match="init 'residual'"):
        check(model, tiny.tokenizer(), RecoverSettings(loss="lm", init="residual"), None)
    with pytest.raises(ModelError, match=r"sampled 8 needs one.*--sampled 0"):
        check(model, tiny.tokenizer(), RecoverSettings(loss="lm", sampled=8), None)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=2)
    )
    with pytest.raises(ModelError, match=r"MambaForCausalLM, keeps no keys.*Leave --sampled out"):
        check(model, tiny.tokenizer(), RecoverSettings(sampled=8), mamba)
    with pytest.raises(TaskError, match="shorter --window"):
        recover(model, tiny.tokenizer(), text(), RecoverSettings(window=1024), teacher=teacher)
    with pytest.raises(TaskError, match="too few"):
        recover(model, tiny.tokenizer(), text(2), RecoverSettings(**SMALL), teacher=teacher)
    with pytest.raises(TaskError, match="labelled"):
        recover(model, tiny.tokenizer(), make_task("t", [Example("a", "b")]), RecoverSettings(**SMALL), teacher=teacher)
    masked = compressed("bert")[1]
    with pytest.raises(ModelError, match="predict the next token"):
        recover(masked, tiny.tokenizer(mask=True), text(), RecoverSettings(**SMALL), teacher=teacher)
    with pytest.raises(ModelError, match=r"no weight of shape .* at model\.layers"):
        recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL, init="residual"), teacher=tiny.build("gpt2"))


def test_a_forecast_takes_no_step(monkeypatch):
    ticks = itertools.count()  # a clock that moves a second each time it is read: a step takes one
    monkeypatch.setattr(training_module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    teacher, model = compressed()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    found = forecast_recovery(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL), teacher)
    assert found["steps"] == 6
    looks = (1 + SMALL["evaluations"]) * found["windows"]["held_out"] / SMALL["batch"] / 3
    assert found["seconds"] == pytest.approx(6 + looks, abs=0.05)
    # A pivoted layer is trained as two whole factors.
    layers = low_rank_layers(model).values()
    assert found["factor_parameters"] == sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_forecast_counts_what_the_teacher_writes(monkeypatch):
    """By a clock that moves a second with every reading of the teacher: one a step, and one a token that it writes."""
    teacher, model = compressed()
    now = [0.0]
    teacher.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    for module in (training_module, recovery_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    settings = SMALL | {"batch_tokens": 32}
    plain, found = (
        forecast_recovery(model, tiny.tokenizer(), text(), RecoverSettings(**settings, sampled=sampled), teacher)
        for sampled in (0, 70)
    )
    assert found["windows"] == plain["windows"] | {"sampled": 70}
    assert found["seconds"] - plain["seconds"] == pytest.approx(3 * 15)  # 32 windows at once, 15 tokens of 16
    assert found["epochs"] < plain["epochs"]


# The command, killed and resumed


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Run `eckart` in a process of its own, which may get a signal at its n-th step or file."""
    running = Nursery()
    log = tmp_path_factory.mktemp("nursery") / "log"

    def live(*arguments, at=0, where="step", kind="SIGKILL"):
        return running.live(*arguments, log=log, fault=("trainer", at, where, kind))

    yield live
    running.close()


@pytest.fixture(scope="module")
def command(tiny_llama_folder, tmp_path_factory):
    """A factored model and its text in files, and the command that recovers it but for --out."""
    folder = tmp_path_factory.mktemp("recovery")
    model, tokenizer = eckart.load(str(tiny_llama_folder))
    edits = [make_edit(m, 0.5) for m in find_matrices(model) if m.layer is not None and m.type != "other"]
    factor_(model, edits, at_most=1.0)
    eckart.save(model, folder / "small", tokenizer)
    words = ["the", "a", "of", "in", "is", "ant", "bee", "cat", "dog", "red", "blue", "house", "field"]
    rows = [" ".join(words[(i * i + d + 3 * i) % 13] for i in range(70)) for d in range(24)]
    (folder / "text.txt").write_text("<|endofdoc|>".join(rows), encoding="utf-8")
    options = ["--window", 16, "--batch", 4, "--steps", 14, "--lr", 0.005, "--evaluations", 3, "--batch-tokens", 32]
    return [
        "recover", folder / "small", "--data", folder / "text.txt", "--teacher", tiny_llama_folder,
        "--refine", 1, "--init", "output-residual", "--rank", 3, "--sampled", 70, *options,
    ]  # fmt: skip


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def test_killed_anywhere_a_recovery_ends_with_the_bytes_of_an_undisturbed_one(life, command, tmp_path):
    status, errors = life(*command, "--out", tmp_path / "whole")
    assert status == 0, errors
    out = tmp_path / "killed"
    # Files: the start, two refined blocks, three parts of what the teacher writes, the first state; then a state a
    # step, since checkpoints are always due.
    kills = ((2, "before"), (3, "after"), (1, "before"), (1, "after"), (5, "step"), (3, "before"), (2, "after"))
    for at, where in kills:
        status, errors = life(*command, "--out", out, at=at, where=where)
        assert status == -signal.SIGKILL, (at, where, errors)
        assert not (out / "results.json").exists()
    status, errors = life(*command, "--out", out)
    assert status == 0, errors
    assert "Resuming the unfinished recovery" in errors
    assert weights(out) == weights(tmp_path / "whole")
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "whole"))
    for results in (one, two):
        del results["seconds"]
        for point in results["curve"]:
            del point["seconds"]
    assert one == two
    assert one["best_step"] > 0
    assert one["data"]["sampled"] == 70
    assert sorted(path.name for path in out.iterdir()) == ["model", "recipe.yaml", "report.html", "results.json"]
    # It loads as any factored folder, and its report is drawn again from the results alone.
    assert eckart.load(str(out / "model"))[0].config.quantization_config.layers
    page = (out / "report.html").read_text()
    assert "70 that the teacher wrote" in page
    (out / "report.html").unlink()
    eckart.write_report(out)
    assert (out / "report.html").read_text() == page


def test_ctrl_c_exits_130_with_the_command_that_resumes_and_another_command_is_refused(life, command, tmp_path):
    status, errors = life(*command, "--out", tmp_path / "run", at=7, kind="SIGINT")
    assert status == 130, errors
    assert f"eckart recover {command[1]}" in errors.replace("\n", "")
    status, errors = life(*command, "--out", tmp_path / "run", "--seed", 3)
    assert status == 1
    assert "another --out" in " ".join(errors.split())
    assert load_file(tmp_path / "run" / "state" / "state.safetensors")


def test_a_damaged_state_is_an_error_that_names_it(tmp_path):
    teacher, model = compressed()
    (tmp_path / "start.safetensors").write_bytes(b"\x01" * 30)
    with pytest.raises(Exception, match=r"start\.safetensors is damaged"):
        recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL), teacher=teacher, state=tmp_path)


def test_a_state_of_other_weights_is_refused(tmp_path):
    teacher, model = compressed()
    recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL), teacher=teacher, state=tmp_path)
    with pytest.raises(OutputError, match="other settings, weights or text"):
        recover(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL), teacher=teacher, state=tmp_path)


@pytest.mark.slow
def test_two_processes_train_as_one_does(life, command, tmp_path):
    """Each reads half of every batch; sums are taken in another order, so that they agree but for rounding."""
    plain = [
        *command[:6],
        "--window",
        16,
        "--batch",
        4,
        "--steps",
        6,
        "--lr",
        0.001,
        "--evaluations",
        2,
        "--sampled",
        8,
    ]
    status, errors = life(*plain, "--out", tmp_path / "one")
    assert status == 0, errors
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    arguments = ["-m", "eckart.cli", *plain, "--out", tmp_path / "two", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    two = subprocess.run([*launch, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False)
    assert two.returncode == 0, two.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    found, wanted = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_takes_a_model_and_a_text_to_a_smaller_recovered_model(
    recipe, program, command, tiny_llama_folder, tmp_path
):
    """Only sizes are smaller than in the recipe: of the text, its windows and the training."""
    data, wanted = command[3], yaml.safe_load(recipe.read_text())["recover"]
    few = ["--sampled", 8] if "sampled" in wanted else []
    small = program(
        "compress", tiny_llama_folder, "--calibration", data, "--recipe", recipe, "--out", tmp_path / "small",
        "--window", 16, "--windows", 8, "--multiple", 1,
    )  # fmt: skip
    assert small.status == 0, small.err
    found = program(
        "recover", tmp_path / "small", "--data", data, "--teacher", tiny_llama_folder, "--recipe", recipe,
        "--out", tmp_path / "out", "--window", 16, "--batch", 4, "--steps", 4, "--json", *few,
    )  # fmt: skip
    assert found.status == 0, found.err
    results = json.loads(found.out)
    changed = {"window", "batch", "steps", "sampled"}
    assert {k: v for k, v in results["recipe"].items() if k in wanted.keys() - changed} == {
        k: v for k, v in wanted.items() if k not in changed
    }
    model, _ = eckart.load(str(tmp_path / "out" / "model"))
    assert sizes(model)[0].bytes < sizes(eckart.load(str(tiny_llama_folder))[0])[0].bytes
    assert results["curve"][-1]["step"] == 4


def test_a_dry_run_forecasts_and_writes_nothing(program, command, tmp_path):
    found = program(*command, "--out", tmp_path / "out", "--dry-run", "--json")
    assert found.status == 0, found.err
    assert json.loads(found.out)["steps"] == 14
    assert not (tmp_path / "out").exists()
