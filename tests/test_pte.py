"""An ExecuTorch program says what the model says. Oracles: PyTorch's generate, and a factored model's own count."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
import transformers

import tiny_models
from eckart import pte
from eckart.checkpoint import load, load_model, load_tokenizer, save
from eckart.errors import ModelError
from eckart.exporting import export_pte
from eckart.factoring import factor_
from eckart.linear import FactoredLinear, PivotedLinear, RowBlockedLinear
from eckart.matrices import find_matrices
from eckart.surgery import make_edit, weights_sha256

needs_executorch = pytest.mark.usefixtures("_executorch")


@pytest.fixture(scope="session")
def _executorch():
    pytest.importorskip("executorch", reason="needs pip install 'eckart[pte]'")
    pytest.importorskip("executorch.exir", reason="needs pip install 'eckart[pte]'")


def factored(model):
    """The model with weights stored as factors, as pivoted rows and as blocks of rows."""
    matrices = [matrix for matrix in find_matrices(model) if matrix.layer is not None]
    edits = [
        make_edit(m, 0.4 if m.type in ("fc_in", "q_proj") else 0.7, blocks=2 if m.type == "fc_up" else 1)
        for m in matrices
    ]
    factor_(model, edits, at_most=1.0)
    return model


def greedy(model, ids, tokens):
    """PyTorch's own greedy continuation, the end of a text among the tokens."""
    given = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return model.generate(given, attention_mask=given * 0 + 1, **options)[0, len(ids) :].tolist()


def continued(path, ids, tokens, *, read):
    """A program's greedy continuation, the prompt read in pieces."""
    from executorch.runtime import Runtime, Verification

    forward = Runtime.get().load_program(path, verification=Verification.Minimal).load_method("forward")
    given, found = list(ids), []
    pieces = [given[start : start + read] for start in range(0, len(given), read)]
    position = 0
    while len(found) < tokens:
        piece = pieces.pop(0) if pieces else [found[-1]]
        logits = forward.execute([torch.tensor([piece]), torch.arange(position, position + len(piece))])[0]
        position += len(piece)
        if not pieces:
            found.append(int(logits[0].argmax()))
    return found


@pytest.fixture(scope="module")
def exported(tiny_llama_folder, tmp_path_factory, program, _executorch):
    """The tiny Llama, factored, exported by the program, and the model."""
    model, tokenizer = load(str(tiny_llama_folder))
    kinds = {type(module) for module in factored(model).modules()}
    assert {FactoredLinear, PivotedLinear, RowBlockedLinear} <= kinds
    root = tmp_path_factory.mktemp("pte")
    source = save(model, root / "model", tokenizer)
    result = program("export", source, "--to", "pte", "--out", root / "out", "--json")
    assert result.status == 0, result.err
    return root / "out", load_model(str(source), device="cpu", dtype="float32"), json.loads(result.out)


def test_a_program_continues_as_pytorch_does_however_the_prompt_is_read(exported):
    folder, model, facts = exported
    assert facts["agreement"]["value"] == 1.0
    assert facts["agreement"]["count"] == 48
    assert facts["checked_with"] == ["executorch"]
    for seed, read in ((0, 1), (1, 3), (2, 32)):
        ids = torch.randint(4, 30, (4 + 3 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        tokens = 32 - len(ids)  # to the end of the context
        assert continued(folder / "model.pte", ids, tokens, read=read) == greedy(model, ids, tokens)


def test_a_program_has_what_the_documents_say(exported):
    folder, model, _ = exported
    facts = json.loads((folder / "eckart.json").read_text())
    assert facts["inputs"] == ["input_ids", "cache_position"]
    assert facts["outputs"] == ["logits"]
    assert facts["context"] == facts["read"] == 32
    assert facts["vocabulary"] == model.config.vocab_size
    assert facts["cache"] == [{"key": {"heads": 1, "size": 8}, "value": {"heads": 1, "size": 8}}] * 2
    assert facts["source"]["weights_sha256"] == weights_sha256(model)
    assert facts["bytes"] == (folder / "model.pte").stat().st_size
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert transformers.AutoTokenizer.from_pretrained(folder)("the ant").input_ids[0] == 1


def test_a_program_that_says_something_else_is_not_written(exported, tmp_path, monkeypatch):
    folder, _, _ = exported
    model, tokenizer = (
        load_model(str(folder.parent / "model"), device="cpu", dtype="float32"),
        load_tokenizer(str(folder)),
    )

    def copied(model, state, path, *, context):
        return path.write_bytes((folder / "model.pte").read_bytes())

    monkeypatch.setattr("eckart.exporting.write_program", copied)
    assert export_pte(model, tokenizer, tmp_path / "same").agreement.value == 1.0
    with torch.no_grad():
        model.model.norm.weight[3] += 0.05
    with pytest.raises(ModelError, match="pte file of LlamaForCausalLM differs"):
        export_pte(model, tokenizer, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


@pytest.mark.slow
@needs_executorch
@pytest.mark.parametrize("name", [name for name in tiny_models.CAUSAL if name != "llama"])
def test_other_causal_models_become_programs_or_are_refused(name, tmp_path, may_refuse):
    with may_refuse(ModelError, "ExecuTorch"):
        found = export_pte(tiny_models.build(name).float(), tiny_models.tokenizer(), tmp_path / "out")
        assert found.agreement.value == 1.0


@pytest.mark.slow
@needs_executorch
def test_a_real_model_becomes_a_program(shared, tmp_path):
    model, tokenizer = load(str(shared / "models" / "stories260K"), device="cpu", dtype="float32")
    found = export_pte(model, tokenizer, tmp_path / "out")
    assert found.agreement.value == 1.0
    ids = tokenizer("Once upon a time").input_ids
    assert continued(tmp_path / "out" / "model.pte", ids, 40, read=128) == greedy(model, ids, 40)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--quantize", "int8"], "Only onnx"), (["--adapter", "adapter"], "Add it to the weights first")],
)
def test_what_a_program_cannot_hold_is_refused(tiny_llama_folder, tmp_path, program, options, words):
    result = program("export", tiny_llama_folder, "--to", "pte", "--out", tmp_path / "out", *options)
    assert result.status == 1
    assert words in result.err
    assert not (tmp_path / "out").exists()


def test_without_executorch_the_extra_to_install_is_named(monkeypatch):
    for name in ("executorch", "executorch.exir"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"pip install 'eckart\[pte\]'"):
        pte.check_installed()


def test_a_call_at_the_start_begins_anew_and_batches_are_replayed_in_turn(exported):
    folder, model, _ = exported
    prompts = torch.randint(4, 30, (3, 5), generator=torch.Generator().manual_seed(9))
    following = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        whole = model(torch.cat([prompts, following], 1)).logits.numpy()
    found = pte.replay(folder / "model.pte", prompts.numpy(), following.numpy())
    np.testing.assert_allclose(found, whole[:, 4:-1], rtol=1e-3, atol=1e-4)
