"""The plugin for vLLM, against the little of vLLM's interface that it uses; with vLLM installed, against vLLM.

What is faked here: base classes without behaviour and a register. Parameters are loaded as vLLM's loader does, by
`parameter.weight_loader(parameter, tensor, shard)`. Oracle: each part's own layer, before it was fused and divided.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import eckart
from eckart.errors import ModelError
from eckart.linear import FactoredLinear, PivotedLinear, RowBlockedLinear
from eckart.quantizer import stored_as

REAL = importlib.util.find_spec("vllm") is not None
QKV = ["q", "k", "v"]


class FakeLinear(nn.Module):
    """What the plugin reads of a vLLM layer."""

    def __init__(self, rank=0, out=0, bias=False, replicas=1):
        super().__init__()
        self.tp_rank, self.num_kv_head_replicas = rank, replicas
        self.bias = nn.Parameter(torch.zeros(out), requires_grad=False) if bias else None


@pytest.fixture
def plugin(monkeypatch):
    """Import the plugin anew with modules that stand for vLLM's."""
    path = "vllm.model_executor.layers"
    names = ["vllm", "vllm.model_executor", path, f"{path}.linear", f"{path}.quantization"]
    found = {name: ModuleType(name) for name in [*names, f"{path}.quantization.base_config"]}

    class Config:
        def __init__(self):
            self.packed_modules_mapping = {}

    registered = {}
    found[f"{path}.linear"].LinearBase = FakeLinear
    found[f"{path}.linear"].LinearMethodBase = object
    found[f"{path}.linear"].UnquantizedLinearMethod = type("UnquantizedLinearMethod", (), {})
    found[f"{path}.quantization.base_config"].QuantizationConfig = Config
    found[f"{path}.quantization"].register_quantization_config = lambda name: (
        lambda made: registered.update({name: made})
    )
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "eckart.vllm_plugin", raising=False)
    module = importlib.import_module("eckart.vllm_plugin")
    module.register()
    assert registered == {"eckart": module.VllmConfig}
    yield module
    sys.modules.pop("eckart.vllm_plugin", None)
    vars(eckart).pop("vllm_plugin", None)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_parts(bias):
    """q factored, k pivoted, v dense, all from 10 features."""
    biases = [normal(out, seed=out) if bias else None for out in (12, 8, 4)]
    dense = nn.Linear(10, 4, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(normal(4, 10, seed=7))
        if bias:
            dense.bias.copy_(biases[2])
    factored = FactoredLinear.from_weight(normal(12, 10), 3, bias=biases[0])
    return [factored, PivotedLinear.from_weight(normal(8, 10, seed=5), 5, bias=biases[1]), dense]


def config_of(plugin, layers, packed=None):
    """The plugin's config of layers under `block.`, as it comes from config.json."""
    stored = {f"block.{name}": stored_as(layer).to_json() for name, layer in layers.items()}
    stored = {name: entry for name, entry in stored.items() if entry["storage"] != "dense"}
    config = plugin.VllmConfig.from_config(
        {"quant_method": "eckart", "schema_version": 1, "layers": stored, "dense": {}}
    )
    config.packed_modules_mapping.update(packed or {})
    return config


def fill(layer, parts):
    """Load each part's tensors as vLLM does."""
    parameters = dict(layer.named_parameters())
    for shard, part in parts.items():
        for name, tensor in part.state_dict().items():
            if name == "bias":  # vLLM's own loader
                rows = layer.part_rows[shard]
                layer.bias.data[rows] = tensor[layer.share_of(shard, rows)]
            else:
                parameter = parameters[name]
                parameter.weight_loader(parameter, tensor, shard)


def fused(plugin, parts, *, bias=False, ranks=1, rank=0, replicas=1):
    """Build q, k and v as one layer of one device of several."""
    layers = dict(zip([f"{name}_proj" for name in QKV], parts))
    config = config_of(plugin, layers, {"qkv_proj": list(layers)})
    division = {"q": ranks, "k": ranks // replicas, "v": ranks // replicas}
    outs = [part.out_features // division[name] for name, part in zip(QKV, parts)]
    layer = FakeLinear(rank, sum(outs), bias, replicas)
    method = config.get_quant_method(layer, "block.qkv_proj")
    method.create_weights(layer, 10, outs, 10, sum(outs) * ranks, torch.float64, weight_loader=None)
    layer.part_rows = {name: part.rows for name, part in zip(QKV, method.parts)}

    def share_of(shard, rows):
        size, index = rows.stop - rows.start, rank // (replicas if shard in "kv" else 1)
        return slice(index * size, (index + 1) * size)

    layer.share_of = share_of
    fill(layer, dict(zip(QKV, parts)))
    return method, layer


@pytest.mark.parametrize("bias", [False, True])
def test_fused_parts_of_any_storage_and_rank_compute_what_each_did(plugin, bias):
    parts = three_parts(bias)
    method, layer = fused(plugin, parts, bias=bias)
    x = normal(2, 3, 10, seed=9)
    expected = torch.cat([part(x) for part in parts], -1)
    torch.testing.assert_close(method.apply(layer, x, layer.bias), expected)
    assert layer.down.weight.shape == (3 + 5, 10)
    assert sum(p.numel() for p in layer.parameters() if p.is_floating_point()) == (
        sum(p.numel() for part in parts for p in part.parameters())
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_outputs_of_several_devices_joined_are_those_of_one(plugin, replicas):
    parts = three_parts(True)
    x, ranks = normal(5, 10, seed=9), 4
    outputs = []
    for rank in range(ranks):
        method, layer = fused(plugin, parts, bias=True, ranks=ranks, rank=rank, replicas=replicas)
        y = method.apply(layer, x, layer.bias)
        outputs.append({name: y[:, rows] for name, rows in layer.part_rows.items()})
    for name, part in zip(QKV, parts):
        own = outputs if name == "q" else outputs[::replicas]
        torch.testing.assert_close(torch.cat([y[name] for y in own], -1), part(x))


@pytest.mark.parametrize("kind", [FactoredLinear, PivotedLinear])
def test_the_outputs_of_several_devices_that_divide_the_input_add_up(plugin, kind):
    part = kind.from_weight(normal(6, 12), 3)
    x, total = normal(5, 12, seed=9), 0
    for rank in range(3):
        layer = FakeLinear(rank)
        method = config_of(plugin, {"o_proj": part}).get_quant_method(layer, "block.o_proj")
        method.create_weights(layer, 4, [6], 12, 6, torch.float64, weight_loader=None)
        fill(layer, {None: part})
        total = total + method.apply(layer, x[:, rank * 4 : rank * 4 + 4])
    torch.testing.assert_close(total, part(x))


def test_a_removed_matrix_gives_zeros(plugin):
    part = FactoredLinear(10, 6, 0, bias=False, dtype=torch.float64)
    layer = FakeLinear()
    method = config_of(plugin, {"o_proj": part}).get_quant_method(layer, "block.o_proj")
    method.create_weights(layer, 10, [6], 10, 6, torch.float64)
    fill(layer, {None: part})
    assert torch.equal(method.apply(layer, normal(2, 10)), torch.zeros(2, 6, dtype=torch.float64))


def test_what_is_dense_is_left_to_vllm(plugin):
    config = config_of(plugin, {"o_proj": FactoredLinear(10, 6, 2)})
    assert type(config.get_quant_method(FakeLinear(), "block.gate_proj")).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.Embedding(3, 2), "block.embed") is None
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda d: {f"language.{name}": v for name, v in d.items()}))
    assert list(config.layers) == ["language.block.o_proj"]


def test_what_it_cannot_read_is_refused_with_a_way_out(plugin):
    blocked = RowBlockedLinear.from_weight(normal(12, 10), [2, 3], [range(6), range(6, 12)])
    with pytest.raises(ModelError, match=r"block\.qkv_proj is row_blocked.*--dense"):
        config_of(plugin, {"qkv_proj": blocked})
    config = config_of(plugin, {"lm_head": FactoredLinear(10, 6, 2)})
    with pytest.raises(ModelError, match="Embedding"):
        config.get_quant_method(nn.Embedding(3, 2), "block.lm_head")
    method = config.get_quant_method(FakeLinear(), "block.lm_head")
    with pytest.raises(ModelError, match="--dense"):
        method.create_weights(FakeLinear(), 10, [3, 3], 10, 6, torch.float64)
    _, layer = fused(plugin, three_parts(False))
    with pytest.raises(ModelError, match="in one"):
        layer.down.weight.weight_loader(layer.down.weight, normal(8, 10), None)
    with pytest.raises(ModelError, match="shape"):
        layer.down.weight.weight_loader(layer.down.weight, normal(2, 10), "q")


def test_only_the_plugin_imports_vllm_and_the_entry_point_names_it():
    source = Path(eckart.__file__).parent
    for path in source.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert any(name.split(".")[0] == "vllm" for name in named) == (path.stem == "vllm_plugin")
        assert path.stem == "vllm_plugin" or "eckart.vllm_plugin" not in named
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")
    project = tomllib.loads((source.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"eckart": "eckart.vllm_plugin:register"}


GREEDY = """
import sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2,
                gpu_memory_utilization=0.05, skip_tokenizer_init=True)
    ids = [int(word) for word in sys.argv[2].split()]
    found = model.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=12, detokenize=False))
    print("TOKENS", *found[0].outputs[0].token_ids)
"""


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="needs vLLM, with this eckart installed beside it for its entry point")
def test_vllm_generates_what_transformers_does(tmp_path):
    import transformers

    from eckart.checkpoint import save
    from eckart.factoring import factor_
    from eckart.matrices import find_matrices
    from eckart.surgery import make_edit

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, num_hidden_layers=3, max_position_embeddings=128, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    rho = {"q_proj": 0.1, "v_proj": 0.4, "fc_in": 0.2, "out_proj": 0.3, "fc_out": 0.2}
    edits = [make_edit(m, rho[m.type]) for m in find_matrices(model) if m.layer and m.type in rho]
    assert {layer.storage for layer in factor_(model, edits).layers.values()} == {"factored", "pivoted"}
    folder = save(model, tmp_path / "a")
    ids = list(range(5, 20))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 15:]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", GREEDY, str(folder), " ".join(map(str, ids))]
    said = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("TOKENS")]
    assert line.split()[1:] == [str(int(word)) for word in expected]
