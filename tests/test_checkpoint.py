"""Checkpoints: what is saved is what is loaded, folders appear whole or not at all, and damage is found unread."""

import json
import os
import shutil
import struct

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

import tiny_models as tiny
from eckart.checkpoint import (
    check_folder,
    check_safetensors,
    is_full_disk,
    load,
    load_model,
    model_card,
    new_folder,
)
from eckart.checkpoint import save as save_model
from eckart.errors import ModelError, OutputError
from eckart.mapping import has_memory
from eckart.matrices import find_matrices, partition, read
from eckart.plan import Edit, MadeBy, Plan, PlannedModel, write_plan
from eckart.run import run_apply
from eckart.surgery import make_edit, weights_sha256

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
WHOLE = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]


def accepted(path):
    """Whether our check accepts a file; it must raise nothing but ModelError."""
    try:
        check_safetensors(path)
    except ModelError:
        return False
    return True


def opened(path):
    """Whether the safetensors library itself opens it."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def test_a_file_as_safetensors_writes_it_is_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (WHOLE, save({}), save({"empty": torch.zeros(0, 3)})):
        path.write_bytes(content)
        assert opened(path)
        assert accepted(path)


@files
@given(content=st.binary(max_size=100))
@example(content=b"")
@example(content=struct.pack("<Q", 2) + b"{}")
@example(content=struct.pack("<Q", 2) + b"[]")
@example(content=struct.pack("<Q", 2**64 - 1))
def test_any_bytes_are_whole_or_a_model_error(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    accepted(path)


@files
@given(size=st.integers(0, len(WHOLE) + 20))
def test_a_file_of_any_other_length_is_damaged(size, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((WHOLE + b"\0" * 20)[:size])
    assert accepted(path) == opened(path) == (size == len(WHOLE))


@files
@given(data=st.data())
def test_a_file_with_changed_bytes_is_whole_or_a_model_error(data, tmp_path):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + LENGTH - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    accepted(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
entries = st.fixed_dictionaries({}, optional={"dtype": values, "shape": values, "data_offsets": values})


@files
@given(header=values | st.dictionaries(st.text(max_size=3), entries | values, max_size=3))
def test_a_header_of_any_json_is_whole_or_a_model_error(header, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    accepted(path)


@files
@example(index={"weight_map": {"": ""}})
@example(index={"weight_map": {"a": "\0"}})
@given(index=values | st.fixed_dictionaries({"weight_map": values}))
def test_an_index_of_any_json_is_whole_or_a_model_error(index, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError):
        check_folder(tmp_path)


def test_shards_are_checked_each(tiny_llama_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    check_folder(tmp_path)
    with shards[1].open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=shards[1].name):
        check_folder(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name} is missing"):
        check_folder(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tiny_llama_folder, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = {"a": "../elsewhere.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError):
        load(str(folder))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "mixtral", "bert", "t5"])
def test_saved_and_loaded_is_equal_to_the_bit(name, tiny_llama_folder, tmp_path):
    model = tiny.build(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_folder)
    folder = save_model(model, tmp_path / "out", tokenizer)
    loaded, again = load(str(folder), dtype="stored")
    assert type(loaded) is type(model)
    assert not loaded.training
    expected = dict(model.named_parameters())
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tied_weights_stay_tied(tiny_llama_folder, tmp_path):
    model, tokenizer = load(str(tiny_llama_folder))
    folder = save_model(model, tmp_path / "out", tokenizer)
    loaded, _ = load(str(folder))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert load_file(folder / "model.safetensors").keys() == load_file(tiny_llama_folder / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        (torch.bfloat16, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float64, "auto", torch.float64),
        (torch.bfloat16, "stored", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float64", torch.float64),
    ],
)
def test_half_precision_is_widened_on_a_cpu_unless_asked_otherwise(stored, asked, found, tiny_llama_folder, tmp_path):
    model, tokenizer = load(str(tiny_llama_folder), device="cpu")
    folder = save_model(model.to(stored), tmp_path / "out", tokenizer)
    loaded, _ = load(str(folder), device="cpu", dtype=asked)
    assert {parameter.dtype for parameter in loaded.parameters()} == {found}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_weights_that_a_folder_lends_space_to_are_the_same_and_mapped(name, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.checkpoint.MAPPED_FROM", 0)
    tiny.build(name).to(stored).save_pretrained(tmp_path / "model")
    lending = tmp_path / "lending"
    lending.mkdir()
    plain, found = load_model(str(tmp_path / "model")), load_model(str(tmp_path / "model"), spill=lending)
    tied = [len(dict(model.named_parameters())) for model in (plain, found)]
    assert tied[0] == tied[1]
    for (key, weight), (other, lent) in zip(plain.state_dict().items(), found.state_dict().items(), strict=True):
        assert key == other
        assert weight.dtype == lent.dtype
        assert torch.equal(weight, lent)
    assert not any(has_memory(parameter) for parameter in found.parameters())
    assert not any(lending.iterdir())


def test_a_checkpoint_without_the_head_that_its_config_names_is_refused(tiny_llama_folder, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelError, match=r"score\.weight"):
        load(str(folder))


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as temporary:
        assert not target.exists()
        (temporary / "a").write_text("a")
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_text("c")
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["a", "b", "b/c"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, os.strerror(28))])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_fails_is_not_there(error, there, tmp_path):
    target = tmp_path / "out"
    if there:
        target.mkdir()
    expected = OutputError if isinstance(error, OSError) else type(error)

    def fill(folder):
        (folder / "a").write_text("a")
        raise error

    with pytest.raises(expected), new_folder(target) as temporary:
        fill(temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there
    assert not there or list(target.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="not empty"), new_folder(tmp_path):
        pytest.fail("entered")
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (SafetensorError(f"Error while serializing: I/O error: {os.strerror(28)} (os error 28)"), True),
        (OSError(2, "No such file"), False),
        (ValueError("x"), False),
    ],
)
def test_a_full_disk_is_known_by_any_library_s_error(error, full):
    assert is_full_disk(error) == full


@files
@example(source="\x85", matrix="a|b")
@example(source="\xa0", matrix="`\n| a")
@example(source="\U0001f600: [", matrix="")
@given(source=st.text(st.characters(codec="utf-8"), max_size=30), matrix=st.text(max_size=30))
def test_no_name_breaks_out_of_a_model_card(source, matrix):
    edit = Edit(matrix=matrix, layer=0, type="fc_in", shape=(4, 4), rho=0.5, rank=2)
    planned = PlannedModel(source=source, architecture="A", weights_sha256="0")
    card = model_card(Plan(model=planned, edits=(edit,), made_by=MadeBy(eckart="0.1.0")))
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == source
    rows = [line for line in body.split("\n") if line.startswith("|")]
    assert len(rows) == 3
    assert {row.count("|") for row in rows} == {6}


@pytest.mark.parametrize("name", ["vit", "decision_transformer"])
def test_models_that_read_no_tokens_are_edited_and_saved_without_a_tokenizer(name, tmp_path):
    model = tiny.build(name)
    model.save_pretrained(tmp_path / "original")
    loaded = load_model(str(tmp_path / "original"))
    matrices = find_matrices(loaded)
    matrix = next(m for m in matrices if m.type == "fc_out" and m.layer == 1)
    planned = PlannedModel(source="x", architecture="y", weights_sha256=weights_sha256(loaded))
    plan = Plan(model=planned, edits=(make_edit(matrix, 0.25),), made_by=MadeBy(eckart="0"))
    write_plan(tmp_path / "plan.json", plan)
    folder, _ = run_apply(str(tmp_path / "original"), tmp_path / "plan.json", tmp_path / "out", dense=True)
    edited = type(model).from_pretrained(folder)
    weight = read(model, matrix)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, min(weight.shape) // 4)
    torch.testing.assert_close(read(edited, matrix), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5, rtol=1e-4)
    for other in partition(matrices):
        if other != matrix:
            assert torch.equal(read(edited, other), read(model, other))
