"""Weights read from their files one by one are those of the loaded model, and their types need no weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import eckart
import tiny_models
from eckart import shards
from eckart.errors import ModelError
from eckart.matrices import find_matrices, read
from eckart.shards import open_checkpoint, scaled_
from eckart.skeleton import matrices_of, skeleton

LAYOUTS = list(tiny_models.MODELS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny model once, in several shards, and give its folder."""
    folders = {}

    def folder_of(name, dtype=torch.float32):
        if (name, dtype) not in folders:
            folders[name, dtype] = tmp_path_factory.mktemp("models") / name
            model = tiny_models.build(name).to(dtype)
            model.save_pretrained(folders[name, dtype], max_shard_size="40KB")
        return folders[name, dtype]

    transformers.utils.logging.disable_progress_bar()
    return folder_of


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_and_types_need_no_weights_and_each_matrix_is_read_to_the_bit(saved, name):
    model, checkpoint = tiny_models.build(name), open_checkpoint(str(saved(name)))
    assert checkpoint.matrices == find_matrices(model)
    assert checkpoint.coverage == eckart.coverage(model, checkpoint.matrices)
    assert not checkpoint.skipped
    assert not checkpoint.warnings
    for matrix in checkpoint.matrices:
        assert torch.equal(checkpoint.read(matrix), read(model, matrix)), matrix.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is_stored(saved, dtype):
    model = tiny_models.build("phi3").to(dtype)
    checkpoint = open_checkpoint(str(saved("phi3", dtype)))
    for matrix in checkpoint.matrices:
        found = checkpoint.read(matrix)
        assert found.dtype == dtype
        assert torch.equal(found, read(model, matrix))


def test_a_deep_model_is_traced_through_one_block_of_each_kind(monkeypatch):
    from eckart import skeleton as module

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=40, num_attention_heads=4
    )
    counts = []
    trace = module.trace
    monkeypatch.setattr(
        module, "trace", lambda model, blocks, inputs: counts.append(len(blocks)) or trace(model, blocks, inputs)
    )
    matrices = matrices_of(skeleton(config))
    assert counts == [1]
    assert len(matrices) == 7 * 40
    assert {matrix.layer for matrix in matrices} == set(range(40))


def test_a_model_that_needs_all_of_its_blocks_is_traced_whole(monkeypatch):
    """A forward pass that asks for the last block by its index."""
    forward = transformers.LlamaModel.forward

    def last_is_there(self, *arguments, **named):
        assert self.layers[self.config.num_hidden_layers - 1] is not None
        return forward(self, *arguments, **named)

    monkeypatch.setattr(transformers.LlamaModel, "forward", last_is_there)
    config = tiny_models.MODELS["llama"][1]
    assert len(matrices_of(skeleton(config))) == 21


def brute_force_dequantized(weight, scales, block):
    found = np.empty(weight.shape, dtype=np.float32)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            found[i, j] = weight[i, j] * scales[i // block[0], j // block[1]]
    return found


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), high=st.integers(1, 4), wide=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_block_scales_multiply_their_block(rows, columns, high, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scales = torch.rand(-(-rows // high), -(-columns // wide), generator=generator) + 0.5
    expected = brute_force_dequantized(weight.numpy(), scales.numpy(), (high, wide))
    assert np.array_equal(scaled_(weight.clone(), scales, (high, wide)).numpy(), expected)


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="do not fit"):
        scaled_(torch.ones(8, 8), torch.ones(5, 8))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_fp8_weights_come_multiplied_with_their_block_scales(saved, tmp_path, name):
    folder = shutil.copytree(saved(name), tmp_path / "fp8")
    block, expected = (16, 24), {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key, tensor in list(tensors.items()):
            if tensor.ndim == 2 and ".layers." in key and "gate.weight" not in key:
                generator = torch.Generator().manual_seed(len(key))
                size = [-(-tensor.shape[0] // block[0]), -(-tensor.shape[1] // block[1])]
                scales = torch.rand(size, generator=generator) + 0.5
                tensors[key] = tensor.to(torch.float8_e4m3fn)
                tensors[f"{key}_scale_inv"] = scales
                expected[key] = brute_force_dequantized(tensors[key].float().numpy(), scales.numpy(), block)
        save_file(tensors, path, metadata={"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        content = json.loads(index.read_text())
        content["weight_map"] |= {f"{key}_scale_inv": content["weight_map"][key] for key in expected}
        index.write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    assert {m.name for m in checkpoint.matrices} == {m.name for m in find_matrices(tiny_models.build(name))}
    found = {matrix.name: checkpoint.read(matrix).numpy() for matrix in checkpoint.matrices}
    if name == "llama":
        assert expected
        for key, numbers in expected.items():
            assert np.array_equal(found[key.removesuffix(".weight")], numbers)
    else:
        # Two stored experts make one row-fused parameter; w1 is the gate, w3 goes up and w2 down.
        stored = "model.layers.1.block_sparse_moe.experts.2.{}.weight"
        module = "model.layers.1.mlp.experts.{}"
        assert np.array_equal(found[module.format("gate_up_proj[2]:fc_in")], expected[stored.format("w1")])
        assert np.array_equal(found[module.format("gate_up_proj[2]:fc_up")], expected[stored.format("w3")])
        assert np.array_equal(found[module.format("down_proj[2]")], expected[stored.format("w2")])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_factored_folder_is_read_as_the_dense_product(tmp_path, name):
    model = tiny_models.build(name)
    edits = [
        eckart.make_edit(m, 0.2) for m in find_matrices(model) if m.layer == 1 and not m.whole and ":" not in m.name
    ]
    assert eckart.factor_(model, edits).layers
    eckart.save(model, tmp_path / "factored")
    checkpoint = open_checkpoint(str(tmp_path / "factored"))
    dense = model.dequantize()
    for matrix in checkpoint.matrices:
        assert torch.allclose(checkpoint.read(matrix), read(dense, matrix), atol=1e-6), matrix.name


def test_an_unknown_architecture_is_listed_by_names_and_shapes_and_says_so(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "strange")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "never_heard_of", "architectures": ["NeverHeardOf"]}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.NeverHeardOf"}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    known = find_matrices(tiny_models.build("llama"))
    assert {(m.name, m.shape, m.layer) for m in checkpoint.matrices} == {(m.name, m.shape, m.layer) for m in known}
    assert {matrix.type for matrix in checkpoint.matrices} == {"other"}
    assert "'other'" in checkpoint.warnings[0]
    assert checkpoint.read(checkpoint.matrices[0]).shape == checkpoint.matrices[0].shape


def test_a_weight_stored_in_integers_is_left_out_and_the_warning_says_why(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "int8")
    name = "model.layers.1.mlp.down_proj.weight"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = tensors[name].to(torch.int8)
            save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert list(checkpoint.skipped) == ["model.layers.1.mlp.down_proj"]
    assert len(checkpoint.matrices) == 20
    assert "I8" in checkpoint.warnings[0]


def test_a_key_stays_until_the_file_changes(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "copy")
    first = open_checkpoint(str(folder))
    keys = [first.key(matrix) for matrix in first.matrices]
    assert len(set(keys)) == len(keys)
    again = open_checkpoint(str(folder))
    assert [again.key(matrix) for matrix in again.matrices] == keys
    for path in folder.glob("*.safetensors"):
        tensors = {key: 2 * tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    changed = open_checkpoint(str(folder))
    assert not {changed.key(matrix) for matrix in changed.matrices} & set(keys)


class FakeHub:
    """A hub that is a folder, and remembers which bytes were asked for."""

    def __init__(self, folder):
        self.folder, self.ranges = folder, []

    def model_info(self, _repository):
        return type("Info", (), {"sha": "abc"})

    def hf_hub_download(self, _repository, name, revision):
        assert revision == "abc"
        return str(self.folder / name)

    def ls(self, root, detail):
        assert root == "owner/name@abc"
        assert detail is False
        return [f"{root}/{path.name}" for path in self.folder.iterdir()]

    def cat_file(self, path, start=None, end=None):
        content = (self.folder / Path(path).name).read_bytes()
        if start is not None:
            self.ranges.append((path, start, end))
        return content[start:end]


@pytest.fixture
def hub(monkeypatch, saved):
    import huggingface_hub

    fake = FakeHub(saved("mixtral"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def test_of_a_hub_id_only_the_bytes_of_the_matrix_are_fetched(hub):
    checkpoint = open_checkpoint("owner/name")
    model = tiny_models.build("mixtral")
    assert checkpoint.matrices == find_matrices(model)
    headers = len(hub.ranges)
    assert all(end - start < 20_000 for _, start, end in hub.ranges)
    for matrix in checkpoint.matrices:
        hub.ranges.clear()
        assert torch.equal(checkpoint.read(matrix), read(model, matrix))
        fetched = sum(end - start for _, start, end in hub.ranges)
        assert fetched <= 4 * 2 * matrix.shape[0] * matrix.shape[1]  # a half of a fused weight comes with the other
    assert headers


def test_a_hub_that_fails_is_one_clear_error(hub, monkeypatch):
    def broken(*_arguments, **_named):
        raise OSError("no route to host\nmore")

    checkpoint = open_checkpoint("owner/name")
    monkeypatch.setattr(hub, "cat_file", broken)
    with pytest.raises(ModelError, match="no route to host. What is done is kept"):
        checkpoint.read(checkpoint.matrices[0])
    with pytest.raises(ModelError, match="could not be looked up"):
        open_checkpoint("owner/name")


def test_a_shard_that_vanishes_is_one_clear_error(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "gone")
    checkpoint = open_checkpoint(str(folder))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match="could not be read"):
        checkpoint.read(checkpoint.matrices[0])


@given(content=st.binary(max_size=64) | st.text(max_size=40).map(str.encode))
def test_a_config_of_rubbish_is_refused(content, saved, tmp_path_factory, may_refuse):
    folder = tmp_path_factory.mktemp("rubbish")
    for path in saved("llama").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(content)
    with may_refuse(eckart.EckartError):
        open_checkpoint(str(folder))


def test_reading_does_not_load_the_rest(saved, monkeypatch):
    asked = []
    opened = shards.safe_open

    class Watched:
        def __init__(self, *arguments, **named):
            self.file = opened(*arguments, **named)

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            asked.append(name)
            return self.inner.get_tensor(name)

        def get_slice(self, name):
            asked.append(name)
            return self.inner.get_slice(name)

    monkeypatch.setattr(shards, "safe_open", Watched)
    checkpoint = open_checkpoint(str(saved("mixtral")))
    assert not asked
    matrix = next(m for m in checkpoint.matrices if m.expert == 3 and m.type == "fc_out")
    checkpoint.read(matrix)
    assert asked == ["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
