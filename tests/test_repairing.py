"""Low-rank repair of rounded weights. Oracles: alternating least squares, EoRA's eigenvectors, onnxruntime, peft."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.checkpoint import load, save
from eckart.errors import EckartError, ModelError, OutputError, TaskError
from eckart.factoring import factor_
from eckart.matrices import find_matrices
from eckart.onnx_graph import block_of, pack, rounded, unpack
from eckart.onnx_runner import open_model, step
from eckart.peft_adapter import put_on_
from eckart.recipe import RecoverSettings
from eckart.repair_run import run_repair
from eckart.repairing import check_repairable, repair, repair_weight, round_weight
from eckart.report import write_report
from eckart.surgery import make_edit
from eckart.tasks import Example, make_task
from eckart.training import make_windows, window_losses
from eckart.weighting import diagonal_root, square_root
from tiny_models import chain as text

pytest.importorskip("onnxruntime", reason="needs pip install 'eckart[export]'")
peft = pytest.importorskip("peft", reason="needs pip install 'eckart[recover]'")

SMALL = {"method": "repair", "window": 16, "held_out": 0.15, "rank": 4}
# What peft says of transformers' deprecations and of GPT-2's transposed weights.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out:UserWarning"
)


def metric(size, seed, *, samples=200, dead=0):
    """Second moments of inputs whose directions matter very differently; the last ones are always zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, size, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    x[:, size - dead :] = 0
    return x.T @ x / samples


def weight_of(out, into, seed):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


def cost(change, G, A):
    """The definition: tr(G D A D')."""
    return float((G @ change @ A @ change.T).trace())


shapes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(1, 4), st.integers(0, 1000))


@given(shapes, st.sampled_from([8, 4, 2]))
def test_no_correction_of_that_rank_leaves_a_smaller_error(shape, bits):
    """Alternating least squares in the metric, started from the found pair and elsewhere, finds nothing better."""
    out, into, rank, seed = shape
    rank = min(rank, out, into)
    W, A, G = weight_of(out, into, seed), metric(into, seed), metric(out, seed + 1)
    found = repair_weight(W, rank, bits, square_root(G), square_root(A))
    E = W.double() - found.rounded.double()
    best = cost(E - found.up.double() @ found.down.double(), G, A)
    Lg, La = torch.linalg.cholesky(G), torch.linalg.cholesky(A)
    M = Lg.T @ E @ La
    for start in range(2):
        V = La.T @ found.down.double().T if not start else weight_of(into, rank, seed + 7).double()
        for _ in range(30):
            U = torch.linalg.lstsq(V, M.T).solution.T
            V = torch.linalg.lstsq(U, M).solution.T
        assert best <= float((M - U @ V.T).square().sum()) * (1 + 1e-6) + 1e-9 * cost(W.double(), G, A)


@given(shapes)
def test_errors_are_those_of_the_definition(shape):
    out, into, rank, seed = shape
    rank = min(rank, out, into)
    W, A, G = weight_of(out, into, seed), metric(into, seed), metric(out, seed + 1)
    found = repair_weight(W, rank, 4, square_root(G), square_root(A), rounds=3)
    whole = cost(W.double(), G, A)
    left = W.double() - found.rounded.double() - found.up.double() @ found.down.double()
    assert found.after == pytest.approx(cost(left, G, A) / whole, rel=1e-3, abs=1e-9)
    plain = W.double() - round_weight(W, 4).double()
    assert found.before == pytest.approx(cost(plain, G, A) / whole, rel=1e-3, abs=1e-9)


@given(shapes)
def test_in_the_metric_of_inputs_the_correction_is_that_of_eora_and_qera(shape):
    """EoRA projects on eigenvectors scaled by roots of eigenvalues; QERA takes the symmetric root."""
    out, into, rank, seed = shape
    rank = min(rank, out, into)
    W, A = weight_of(out, into, seed), metric(into, seed)
    found = repair_weight(W, rank, 4, None, square_root(A))
    E = W.double() - round_weight(W, 4).double()
    values, vectors = torch.linalg.eigh(A)
    eora = vectors * values.sqrt()
    qera = vectors * values.sqrt() @ vectors.T
    for root in (eora, qera):
        U, S, Vh = torch.linalg.svd(E @ root, full_matrices=False)
        expected = U[:, :rank] * S[:rank] @ Vh[:rank] @ torch.linalg.inv(root)
        gap = 1 - float(S[rank] / S[rank - 1]) if rank < len(S) else 1.0
        if gap > 1e-2:  # of equal singular values either may be taken
            torch.testing.assert_close(found.up.double() @ found.down.double(), expected, atol=1e-3, rtol=1e-3)


@given(shapes, st.sampled_from([4, 2]))
def test_more_rounds_never_leave_more_and_weights_stay_on_the_grid(shape, bits):
    out, into, rank, seed = shape
    W, A = weight_of(out, into, seed), metric(into, seed)
    errors = []
    for rounds in (1, 2, 5):
        found = repair_weight(W, min(rank, out, into), bits, None, square_root(A), rounds=rounds)
        errors.append(found.after)
        np.testing.assert_array_equal(rounded(found.rounded.numpy(), bits), found.rounded.numpy())
    assert errors[0] >= errors[1] >= errors[2]


def test_a_second_round_helps_a_weight_of_usual_spectrum():
    W, A = weight_of(48, 64, 0) @ torch.diag(torch.logspace(0, -1, 64)), metric(64, 0)
    first, fourth = (repair_weight(W, 8, 4, None, square_root(A), rounds=rounds).after for rounds in (1, 4))
    assert fourth < 0.9 * first


@pytest.mark.parametrize("dead", [1, 5, 11])
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_that_never_come_do_not_disturb_the_others(dead, bits):
    W, A = weight_of(10, 12, 3), metric(12, 3, dead=dead)
    found = repair_weight(W, 2, bits, None, square_root(A))
    assert bool(torch.isfinite(found.up).all() and torch.isfinite(found.down).all())
    alive = 12 - dead
    E = (W - found.rounded).double()
    L = torch.linalg.cholesky(A[:alive, :alive])
    best = float(torch.linalg.svdvals(E[:, :alive] @ L)[2:].square().sum())
    left = E - found.up.double() @ found.down.double()
    assert cost(left, torch.eye(10, dtype=torch.float64), A) <= best * (1 + 1e-3) + 1e-12
    # What is added at dead inputs is of the size of what was lost there.
    assert left[:, alive:].norm() <= 2 * E.norm()


@pytest.mark.parametrize("moment", [torch.zeros(6, 6), torch.ones(6, 6), torch.diag(torch.tensor([1.0] + [0.0] * 5))])
def test_a_singular_metric_gives_a_finite_correction(moment):
    found = repair_weight(weight_of(8, 6, 0), 3, 4, square_root(metric(8, 1, samples=3)), square_root(moment))
    assert bool(torch.isfinite(found.up @ found.down).all())
    assert found.after <= found.before + 1e-12


def test_at_full_rank_nothing_is_left():
    W = weight_of(6, 9, 0)
    found = repair_weight(W, 6, 2, square_root(metric(6, 1)), square_root(metric(9, 2)))
    torch.testing.assert_close(found.rounded + found.up @ found.down, W, atol=1e-4, rtol=1e-4)
    assert found.after == 0


def test_a_metric_of_outputs_and_inputs_is_worth_more_than_one_of_inputs_than_a_diagonal_one_than_none():
    W, A, G = weight_of(32, 48, 0), metric(48, 5), metric(32, 6)
    roots = [
        (None, None),
        (None, diagonal_root(A.diagonal().sqrt())),
        (None, square_root(A)),
        (square_root(G), square_root(A)),
    ]
    left = []
    for pair in roots:
        found = repair_weight(W, 6, 4, *pair)
        left.append(cost(W.double() - found.rounded.double() - found.up.double() @ found.down.double(), G, A))
    assert left == sorted(left, reverse=True)
    assert left[3] < 0.9 * left[0]


@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.sampled_from([8, 4, 2]),
    st.integers(0, 99),
    st.sampled_from([0.01, 1, 50]),
)
def test_what_is_rounded_stays_when_it_is_rounded_again(count, entries, bits, seed, size):
    rows = size * np.random.default_rng(seed).standard_normal((count, entries)).astype(np.float32)
    once = rounded(rows, bits)
    np.testing.assert_array_equal(rounded(once, bits), once)


@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from([8, 4, 2]), st.integers(0, 99))
def test_weights_stored_in_half_precision_have_the_integers_and_scales_of_the_original(count, entries, bits, seed):
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, entries)).astype(np.float32))
    rows = rows.bfloat16()
    stored = round_weight(rows, bits).bfloat16().float().numpy()
    block = block_of(entries, bits)
    for found, expected in zip(pack(stored, bits, block), pack(rows.float().numpy(), bits, block)):
        np.testing.assert_array_equal(found, expected)


# Whole models.


def written(name, tmp_path, *, dtype=torch.float32, **settings):
    """A model in a folder, repaired in another, with the text that it read."""
    model = tiny.build(name).to(dtype)
    save(model, tmp_path / "dense", tiny.tokenizer())
    path = tmp_path / "text.txt"
    path.write_text("\n<|endofdoc|>\n".join(example.prompt for example in text().examples))
    found = run_repair(str(tmp_path / "dense"), path, tmp_path / "out", RecoverSettings(**SMALL | settings))
    return found, tmp_path / "out"


def dequantised(path):
    """The weights that a file computes with, as onnxruntime's own operators hold them: in what shape, the values."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            about = {attribute.name: attribute.i for attribute in node.attribute}
            values = unpack(held[node.input[1]], held[node.input[2]], about["bits"])
            found.append((about["bits"], values[:, : about["K"]]))
    return found


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_an_exported_repair_has_the_integers_of_the_folder_and_says_what_pytorch_says(name, tmp_path, program):
    """`gpt2` stores weights transposed and `gptj` has a head of its own, which is rounded as a linear layer is."""
    pytest.importorskip("onnxscript", reason="needs pip install 'eckart[export]'")
    _, out = written(name, tmp_path, bits=4)
    options = ("--adapter", out / "adapter", "--quantize", "int4", "--to", "onnx", "--out", tmp_path / "device")
    result = program("export", out / "model", *options, "--json")
    assert result.status == 0, result.err
    model, tokenizer = load(str(out / "model"))
    linear = check_repairable(model, tokenizer, RecoverSettings(**SMALL))
    file = dequantised(tmp_path / "device" / "model.onnx")
    coarse = [values for bits, values in file if bits == 4]
    assert len(coarse) == len(linear)
    for matrix in linear:
        weight = model.get_parameter(matrix.parameter).detach().numpy()
        weight = weight.T if matrix.transposed else weight
        assert any(weight.shape == each.shape and np.array_equal(weight, each) for each in coarse), matrix.name
    # The corrections, and a head that is tied to the embedding, have 8 bits.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(file) == 3 * len(linear) + tied
    adapted = put_on_(model, out / "adapter")
    ids = tiny.inputs(name)["input_ids"]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits.numpy()
        plain = load(str(tmp_path / "dense"))[0](input_ids=ids).logits.numpy()
    said, _ = step(open_model(tmp_path / "device", threads=1), ids.numpy())
    # Activations, and the corrections, are rounded to 8 bits.
    assert np.abs(said - expected).mean() <= 0.05 * np.abs(expected).mean()
    assert np.abs(said - plain).mean() <= 0.3 * np.abs(plain).mean()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_adapter_loads_with_stock_peft_and_is_the_model_that_was_measured(name, tmp_path):
    found, out = written(name, tmp_path, bits=2)
    base, _ = load(str(out / "model"))
    merged = peft.PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload()
    model, tokenizer = load(str(tmp_path / "dense"))
    ids = tiny.inputs(name)["input_ids"]
    twin, _ = load(str(out / "model"))
    for path, correction in found.corrections.items():
        weight = twin.get_submodule(path).weight.detach()
        change = correction.up @ correction.down
        weight += change if weight.shape == change.shape and name != "gpt2" else change.T
    with torch.no_grad():
        logits, expected = (each(input_ids=ids).logits for each in (merged, twin))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    task = make_task("chain", [Example(example.prompt, None) for example in text().examples])
    windows = make_windows(task, tokenizer, RecoverSettings(**SMALL), None).test
    for key, each in (("before", model), ("after", twin)):
        assert found.test[key]["loss"].value == pytest.approx(window_losses(each, [windows]).mean(), rel=1e-4)
    assert found.gain.count == len(windows)
    assert found.test["after"]["loss"].value != found.test["rounded"]["loss"].value


def test_repair_brings_a_rounded_model_nearer_to_the_dense_one():
    away = {}
    dense = tiny.build("llama")
    ids = tiny.inputs("llama", batch=8, tokens=24, seed=5)["input_ids"]

    def divergence(model):
        with torch.no_grad():
            ours, theirs = (each(input_ids=ids).logits.log_softmax(-1) for each in (model, dense))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    for rank in (1, 8, 16):
        model = tiny.build("llama")
        found = repair(model, tiny.tokenizer(), text(), RecoverSettings(**SMALL | {"rank": rank, "bits": 2}))
        away[0] = divergence(model)
        for path, correction in found.corrections.items():
            model.get_submodule(path).weight.data += correction.up @ correction.down
        away[rank] = divergence(model)
        assert all(each.after < each.before for each in found.corrections.values())
    assert away[16] < away[8] < away[1]
    assert away[16] < 0.5 * away[0]


def test_the_same_command_goes_on_after_a_kill_and_ends_with_the_same_bytes(tmp_path, program):
    found, out = written("llama", tmp_path)
    del found
    command = ("recover", tmp_path / "dense", "--data", tmp_path / "text.txt", "--method", "repair", "--rank", "4")
    command += ("--window", "16", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "again")
    (tmp_path / "recipe.yaml").write_text("held_out: 0.15\n")
    script = (
        "import os, signal, sys\n"
        "from eckart import cli, spill\n"
        "keep, left = spill.Spill.keep, [5]\n"
        "def keep_or_die(*a):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    keep(*a)\n"
        "spill.Spill.keep = keep_or_die\n"
        "sys.argv = ['eckart', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["work"]
    other = program(*command, "--bits", "8")
    assert other.status == 1
    assert "settings" in other.err
    result = program(*command)
    assert result.status == 0, result.err
    assert "Resuming" in result.err
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    for name in ("recipe.yaml", "report.html", "results.json"):
        assert (tmp_path / "again" / name).is_file()
    assert not (tmp_path / "again" / "work").exists()


def test_results_say_what_was_read_what_it_takes_and_what_it_gained(tmp_path):
    found, out = written("llama", tmp_path, dtype=torch.bfloat16)
    results = json.loads((out / "results.json").read_text())
    assert results["kind"] == "repair"
    assert results["test"].keys() == {"before", "rounded", "after"}
    for measured in results["test"].values():
        assert measured["loss"]["count"] == 15 * results["data"]["test"]
        assert measured["loss"]["stderr"] > 0
    assert results["gain"]["interval"][0] <= results["gain"]["value"] <= results["gain"]["interval"][1]
    model, _ = load(str(out / "model"), dtype="stored")
    assert model.dtype == torch.bfloat16
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert results["bytes"]["dense"] == 2 * numbers
    assert results["bytes"]["rounded"] < results["bytes"]["dense"]
    assert len(results["matrices"]) == len(found.corrections)
    assert all(row["error_repaired"] < row["error_rounded"] for row in results["matrices"])
    write_report(out)
    page = (out / "report.html").read_text()
    assert "Repair" in page
    assert results["matrices"][0]["matrix"] in page


def test_rounding_beyond_what_rounding_costs_is_warned_of(tmp_path):
    _, out = written("llama", tmp_path, bits=8, rank=1)
    results = json.loads((out / "results.json").read_text())
    uncertain = results["gain"]["interval"][1] > 0
    assert bool(results["warnings"]) == uncertain


def test_a_forecast_says_the_bytes_that_the_repair_reports(tmp_path, program):
    found, out = written("gptj", tmp_path, bits=4)
    del out
    command = ("recover", tmp_path / "dense", "--data", tmp_path / "text.txt", "--method", "repair", "--rank", "4")
    result = program(*command, "--window", "16", "--out", tmp_path / "none", "--dry-run", "--json")
    assert result.status == 0, result.err
    forecast = json.loads(result.out)
    assert forecast["bytes"]["corrections"] == found.bytes["corrections"]
    assert forecast["matrices"] == len(found.corrections)
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_repaired_is_refused_before_anything_is_computed(tmp_path, program):
    settings = RecoverSettings(**SMALL)
    factored = tiny.build("llama")
    factor_(factored, [make_edit(m, 0.4) for m in find_matrices(factored) if m.type == "fc_in"])
    with pytest.raises(ModelError, match="low-rank layers"):
        repair(factored, tiny.tokenizer(), text(), settings)
    with pytest.raises(ModelError, match="next token"):
        repair(tiny.build("bert"), tiny.tokenizer(mask=True), text(), settings)
    with pytest.raises(TaskError):
        repair(tiny.build("llama"), tiny.tokenizer(), text(2, 8), settings)
    save(tiny.build("llama"), tmp_path / "dense", tiny.tokenizer())
    (tmp_path / "text.txt").write_text(text().examples[0].prompt)
    command = ("recover", tmp_path / "dense", "--data", tmp_path / "text.txt", "--out", tmp_path / "out")
    for options, words in ((("--teacher", "x"), "--teacher"), (("--bits", "3"), "bits"), (("--rank", "0"), "rank")):
        result = program(*command, "--method", "repair", *options)
        assert result.status == 1
        assert words in result.err
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("here before")
    with pytest.raises(OutputError):
        run_repair(str(tmp_path / "dense"), tmp_path / "text.txt", tmp_path / "out", settings)


@pytest.mark.parametrize("what", ["missing", "empty", "pickle", "other"])
def test_an_adapter_that_is_none_of_this_model_is_refused(what, tmp_path):
    folder = tmp_path / "adapter"
    if what != "missing":
        folder.mkdir()
    if what == "pickle":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.bin").write_bytes(b"x")
    if what == "other":
        _, out = written("gpt2", tmp_path, rank=1)
        folder = out / "adapter"
    with pytest.raises(EckartError, match="adapter"):
        put_on_(tiny.build("llama"), folder)


def test_dense_and_onnx_exports_take_an_adapter_of_any_lora(tmp_path, program):
    _, out = written("llama", tmp_path, bits=2)
    result = program("export", out / "model", "--adapter", out / "adapter", "--to", "dense", "--out", tmp_path / "one")
    assert result.status == 0, result.err
    base = load(str(out / "model"))[0]
    merged = peft.PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload()
    found, _ = load(str(tmp_path / "one"))
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter)
    refused = program(
        "export", out / "model", "--adapter", out / "adapter", "--to", "peft", "--plan", "x", "--out", "y"
    )
    assert refused.status == 1
    assert "--adapter" in refused.err
