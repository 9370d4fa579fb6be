"""Elastic folders: every size is the dedicated checkpoint of that size, and no more is read than it needs."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import eckart
import tiny_models as tiny
from eckart import allocate
from eckart.calibration import read_windows
from eckart.compression import compress
from eckart.compression_steps import Steps
from eckart.dataflow import low_rank_layers
from eckart.elastic import ElasticConfig, ElasticPart, ElasticWeight, Slices, curves_of, size_at
from eckart.errors import ModelError, RankError, RecipeError
from eckart.experts import FactoredExperts
from eckart.factoring import factor_
from eckart.linear import RowBlockedLinear
from eckart.matrices import find_matrices, read
from eckart.quantizer import sizes
from eckart.recipe import CompressSettings, make_settings
from eckart.spill import Spill
from eckart.tasks import Example, make_task
from eckart.units import edits_of, find_units
from faults import killed_again_and_again

# Plain, transposed with biases, fused, fused and interleaved, experts, experts stored transposed.
NAMES = ["llama", "gpt2", "phi3", "falcon_grouped", "mixtral", "gpt_oss"]


def text(words=300):
    return make_task("text", [Example(tiny.sentence(words, 0), None)])


def settings(**given):
    return CompressSettings.model_validate(
        {"ratio": 0.9, "windows": 6, "measured": 2, "window": 16, "method": "double", "neurons": False, **given}
    )


def written(model, folder, shards="5GB", **given):
    found = compress(model, tiny.tokenizer(), text(), settings(elastic=True, **given))
    eckart.save(found.elastic(copy.deepcopy(model)), folder, tiny.tokenizer(), found.plan, max_shard_size=shards)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Elastic folders by layout, allocated by `tail`, which leaves some matrices dense at the largest ratio."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("elastic") / name
            assert written(tiny.build(name), made[name], allocate="tail").chosen == "tail"
        return made[name]

    return folder


def dedicated(model, **given):
    found = compress(model, tiny.tokenizer(), text(), settings(**given))
    factored = copy.deepcopy(model)
    factor_(factored, found.plan, factors=found.factors, storage=given.get("storage", "pivoted"))
    return found, factored


def loaded(folder, kind, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("ratio", [None, 0.6, 0.35])
@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_to_the_bit_the_dedicated_checkpoint_of_its_ratio(name, ratio, folders):
    model = tiny.build(name)
    found, expected = dedicated(model, allocate="tail", ratio=ratio or 0.9)
    assert found.chosen == "tail"
    options = {} if ratio is None else {"ratio": ratio}
    again = loaded(folders(name), type(model), **options)
    same_state(again, expected)
    assert again.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()


def test_some_of_these_weights_stay_dense_and_some_of_those_are_parts_of_fused_ones(folders):
    parts = [
        (name, part)
        for name in NAMES
        for weight in config_of(folders(name))["quantization_config"]["weights"].values()
        for part in weight["parts"]
    ]
    assert {part["dense"] for _, part in parts} == {True, False}
    assert any(part["dense"] for name, part in parts if name in ("phi3", "falcon_grouped"))
    assert any(part["dense"] for name, part in parts if name in ("mixtral", "gpt_oss"))


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "whiten"])
def test_every_method_that_cuts_at_once_and_both_storages_can_be_elastic(method, tmp_path):
    model = tiny.build("llama")
    given = {"method": method, "allocate": "uniform", "storage": "factored" if method == "asvd" else "pivoted"}
    written(model, tmp_path / "a", **given)
    _, expected = dedicated(model, ratio=0.5, **given)
    same_state(loaded(tmp_path / "a", type(model), ratio=0.5), expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_a_propagated_folder_is_to_the_bit_the_dedicated_checkpoint_at_its_anchors_and_close_between(name, tmp_path):
    model = tiny.build(name)
    given = {"method": "propagated", "allocate": "tail"}
    found = written(model, tmp_path / "a", **given)
    anchors = config_of(tmp_path / "a")["quantization_config"]["anchors"]
    assert anchors == found.facts["ratios"]
    assert anchors[:3] == [0.9, 0.8, 0.6]
    for ratio in anchors[::2]:
        _, expected = dedicated(model, ratio=ratio, **given)
        same_state(loaded(tmp_path / "a", type(model), ratio=ratio), expected)
    # Between two anchors: the components of the one above, at the ranks that the ratio gives.
    _, expected = dedicated(model, ratio=0.7, **given)
    again = loaded(tmp_path / "a", type(model), ratio=0.7)
    assert again.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    one, other = (tiny.output(name, each, **tiny.inputs(name)) for each in (again, expected))
    assert not torch.equal(one, other)
    _, cut_alone = dedicated(model, ratio=0.7, method="double", allocate="tail")
    original = tiny.output(name, model, **tiny.inputs(name))
    worst = tiny.output(name, cut_alone, **tiny.inputs(name))
    assert float((one - original).norm()) < 1.5 * float((worst - original).norm())


def test_bytes_are_served_by_the_anchor_above_what_they_keep(tmp_path):
    model = tiny.build("llama")
    written(model, tmp_path / "a", method="propagated", allocate="uniform")
    described = ElasticConfig.from_dict(config_of(tmp_path / "a")["quantization_config"])
    slices = Slices([str(tmp_path / "a" / "model.safetensors")])
    scales = [slices.read(f"{path}.elastic.{number}.scales") for path, number, _, _ in described.units()]
    whole = sum(p.nbytes for p in model.parameters())
    dense = sum(part.rows * weight.shape[1] for _, _, weight, part in described.units())
    for share in (0.9, 0.7, 0.5):
        size = size_at(described, scales, dtype=torch.float32, bytes=share * whole)
        kept = [
            rank * (part.rows + weight.shape[1] - rank)
            for rank, (_, _, weight, part) in zip(size.ranks, described.units())
        ]
        above = [anchor for anchor in described.anchors if anchor >= sum(kept) / dense]
        assert described.anchors[size.anchor] == above[-1]
        assert sizes(loaded(tmp_path / "a", type(model), bytes=int(share * whole)))[0].bytes <= share * whole


def test_measured_curves_are_scaled_at_loading_as_a_compression_scales_them(tmp_path):
    """Against the steps by hand, with the losses that the folder keeps."""
    model = tiny.build("llama")
    found = written(model, tmp_path / "a", allocate="measured")
    assert found.chosen == "measured"
    described = ElasticConfig.from_dict(config_of(tmp_path / "a")["quantization_config"])
    chosen = settings(allocate="measured")
    units, _ = find_units(model, find_matrices(model), chosen)
    windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
    steps = Steps(model, tiny.tokenizer(), chosen, windows, units, Spill(None), lambda _: None)
    curves = steps.curves()
    scaled = []
    for curve, (_, _, _, part) in zip(curves, described.units()):
        assert len(part.points) >= 2
        index = {int(rank): at for at, rank in enumerate(curve.ranks)}
        scaled.append(allocate.calibrated(curve, [(index[rank], loss) for rank, loss in part.points]))
    for ratio in (0.8, 0.45):
        choice = allocate.water_fill(scaled, ratio * sum(curve.costs[-1] for curve in curves), floor=chosen.floor)
        ranks = {curve.name: int(curve.ranks[choice[curve.name]]) for curve in curves}
        expected = copy.deepcopy(model)
        factor_(expected, edits_of(steps.units, ranks, chosen), factors=steps.factors(ranks), storage="pivoted")
        same_state(loaded(tmp_path / "a", type(model), ratio=ratio), expected)


def test_the_allocation_whose_divergences_are_least_over_all_ratios_is_kept():
    model = tiny.build("llama")
    found = compress(model, tiny.tokenizer(), text(), settings(elastic=True, allocate="auto"))
    products = {
        name: np.prod([value.value for key, value in found.divergence.items() if key.startswith(f"{name} at ")])
        for name in ("uniform", "tail", "measured")
    }
    assert found.chosen == min(products, key=lambda name: products[name])
    assert {row["allocation"] for row in found.to_results()["allocations"] if row["chosen"]} == {
        f"{found.chosen} at {ratio:g}" for ratio in found.facts["ratios"]
    }


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_bytes_give_what_a_compression_to_those_bytes_gives(share, folders):
    model = tiny.build("llama")
    whole = sum(p.nbytes for p in model.parameters())
    _, expected = dedicated(model, ratio=None, bytes=int(share * whole), allocate="tail")
    again = loaded(folders("llama"), type(model), bytes=int(share * whole))
    assert sizes(again)[0].bytes <= share * whole
    if share < 0.9:
        same_state(again, expected)


def test_more_bytes_than_the_largest_takes_give_the_largest(folders):
    model = tiny.build("llama")
    same_state(loaded(folders("llama"), type(model), bytes=10**9), loaded(folders("llama"), type(model)))


def test_what_is_loaded_at_a_rank_is_the_truncated_decomposition_and_smaller_ones_are_nested(tmp_path):
    """Of method svd, against torch.linalg: the first r components, for every r that is served."""
    model = tiny.build("llama")
    written(model, tmp_path / "a", method="svd", allocate="tail")
    weights = {m.name: read(model, m).double() for m in find_matrices(model) if m.type != "other"}
    ranks = {}
    for ratio in (0.9, 0.7, 0.4, 0.15):
        again = loaded(tmp_path / "a", type(model), ratio=ratio)
        for path, layer in low_rank_layers(again).items():
            U, S, Vh = torch.linalg.svd(weights[path], full_matrices=False)
            best = (U[:, : layer.rank] * S[: layer.rank]) @ Vh[: layer.rank]
            torch.testing.assert_close(layer.dense().double(), best, atol=2e-5, rtol=1e-4)
            assert layer.rank <= ranks.get(path, 10**9)
            ranks[path] = layer.rank
    assert len(ranks) > 15


@hypothesis_settings(max_examples=30)
@given(ratio=st.floats(0.12, 0.9))
def test_no_ratio_exceeds_its_budget_or_what_is_stored(ratio, folders):
    for name in ("llama", "mixtral"):
        described = ElasticConfig.from_dict(config_of(folders(name))["quantization_config"])
        slices = Slices([str(path) for path in folders(name).glob("*.safetensors")])
        scales = [slices.read(f"{path}.elastic.{number}.scales") for path, number, _, _ in described.units()]
        least = sum(
            (8 if weight.experts else 1) * (part.rows + weight.shape[1] - (not weight.experts)) * max(1, weight.experts)
            for _, _, weight, part in described.units()
        )
        dense = sum(part.rows * weight.shape[1] * max(1, weight.experts) for _, _, weight, part in described.units())
        if least > ratio * dense:
            with pytest.raises(RankError, match="too small"):
                size_at(described, scales, dtype=torch.float32, ratio=ratio)
            continue
        total = 0
        for rank, (_, _, weight, part) in zip(
            size_at(described, scales, dtype=torch.float32, ratio=ratio).ranks, described.units()
        ):
            if rank == min(part.rows, weight.shape[1]):
                assert part.dense
                total += part.rows * weight.shape[1] * max(1, weight.experts)
            elif weight.experts:
                assert rank <= part.components[0]
                total += FactoredExperts.rounded(rank) * (part.rows + weight.shape[1]) * weight.experts
            else:
                assert rank <= part.components[0]
                total += rank * (part.rows + weight.shape[1] - rank)
        assert total <= ratio * dense * (1 + 1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_no_more_is_read_than_the_size_needs(name, folders, monkeypatch):
    """Every number that leaves the files is counted, those that transformers reads and those that eckart does."""
    counted = {"eckart": 0, "transformers": 0}
    read_slice, copied = Slices.read, transformers.core_model_loading._materialize_copy

    def counting_read(self, key, count=None):
        tensor = read_slice(self, key, count)
        if ".components." in key or key.endswith(".dense"):
            counted["eckart"] += tensor.numel()
        return tensor

    def counting_copy(tensor, *arguments, **options):
        result = copied(tensor, *arguments, **options)
        counted["transformers"] += result.numel()
        return result

    monkeypatch.setattr(Slices, "read", counting_read)
    monkeypatch.setattr(transformers.core_model_loading, "_materialize_copy", counting_copy)
    model = tiny.build(name)
    for ratio in (0.9, 0.4):
        counted.update(eckart=0, transformers=0)
        again = loaded(folders(name), type(model), ratio=ratio)
        layers = low_rank_layers(again)
        described = ElasticConfig.from_dict(config_of(folders(name))["quantization_config"])
        expected, elsewhere = 0, again.state_dict()
        for path, weight in described.weights.items():
            elsewhere = {key: value for key, value in elsewhere.items() if not f"{key}.".startswith(f"{path}.")}
            layer = layers.get(path)
            if isinstance(layer, FactoredExperts):
                # Ranks are rounded up with zeros for the layer, and not on the disk.
                rank = int((layer.down.abs().amax((0, 2)) > 0).sum())
                expected += weight.experts * rank * sum(weight.shape)
            elif layer is None:
                expected += max(1, weight.experts) * weight.shape[0] * weight.shape[1]
            else:
                expected += numbers_read(layer)
        assert counted["eckart"] == expected
        assert counted["transformers"] == sum(value.numel() for value in _untied(again, elsewhere).values())


def numbers_read(layer):
    """Rows of components of a layer that is cut, entries of one that is not."""
    if isinstance(layer, RowBlockedLinear):
        return sum(map(numbers_read, layer.blocks))
    rank = getattr(layer, "rank", None)
    return layer.weight.numel() if rank is None else rank * (layer.out_features + layer.in_features)


def _untied(model, state):
    return {key: value for key, value in state.items() if key not in model.all_tied_weights_keys}


def test_a_fresh_process_loads_it_after_import_eckart_and_without_eckart_it_fails(folders):
    script = (
        "import sys\n{first}\nfrom transformers import AutoModelForCausalLM\n"
        "for given in ({{'ratio': 0.4}}, {{}}):\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **given)\n"
        "    print(sum(p.numel() for p in model.parameters()))"
    )

    def run(first):
        command = [sys.executable, "-c", script.format(first=first), str(folders("llama"))]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    done = run("import eckart")
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert small < large
    without = run("")
    assert without.returncode != 0
    assert "mismatched" in without.stderr


def test_a_loaded_size_is_saved_as_an_ordinary_factored_folder(folders, tmp_path):
    for name in ("llama", "mixtral", "gpt2"):
        again = loaded(folders(name), type(tiny.build(name)), ratio=0.5)
        again.save_pretrained(tmp_path / name)
        found = config_of(tmp_path / name)
        assert found["quantization_config"]["quant_method"] == "eckart"
        assert not {"ratio", "bytes"} & found.keys()
        same_state(loaded(tmp_path / name, type(again)), again)
        with pytest.raises(TypeError, match="ratio"):
            type(again).from_pretrained(tmp_path / name, ratio=0.4)
        dense = copy.deepcopy(again).dequantize()
        expected = tiny.output(name, again, **tiny.inputs(name))
        torch.testing.assert_close(tiny.output(name, dense, **tiny.inputs(name)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_shards_and_any_device_map_give_the_same(name, device_map, folders, tmp_path):
    model = tiny.build(name)
    written(model, tmp_path / "a", shards="20KB", allocate="tail")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    options = {"device_map": device_map}
    if device_map == "disk":
        places = {"model.layers.1": "disk", **{f"model.layers.{n}": "cpu" for n in (0, 2)}}
        places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    again = loaded(tmp_path / "a", type(model), ratio=0.5, **options)
    expected = loaded(folders(name), type(model), ratio=0.5)
    torch.testing.assert_close(
        tiny.output(name, again, **tiny.inputs(name)), tiny.output(name, expected, **tiny.inputs(name))
    )
    assert any(p.device.type == "meta" for p in again.parameters()) == (device_map == "disk")


def test_a_base_model_is_loaded_from_the_folder_of_one_with_a_head(folders):
    base = loaded_with_unexpected(folders("llama"), transformers.AutoModel, ratio=0.5)
    whole = loaded(folders("llama"), transformers.AutoModelForCausalLM, ratio=0.5)
    same_state(base, whole.model)


def loaded_with_unexpected(folder, kind, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model


def test_a_bfloat16_model_is_stored_in_bfloat16_and_gives_what_the_dedicated_one_does_but_for_rounding(tmp_path):
    model = tiny.build("llama").to(torch.bfloat16)
    written(model, tmp_path / "a", allocate="uniform")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert {t.dtype for key, t in tensors.items() if ".components." in key} == {torch.bfloat16}
    _, expected = dedicated(model, ratio=0.5, allocate="uniform")
    again = loaded(tmp_path / "a", type(model), ratio=0.5)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for path, layer in low_rank_layers(again).items():
        one, other = layer.dense().float(), low_rank_layers(expected)[path].dense().float()
        assert float((one - other).detach().norm() / other.detach().norm()) < 0.02
    wide = loaded(tmp_path / "a", type(model), ratio=0.5, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ratio": 0.95}, "up to 0.9"),
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": -1}, "above 0"),
        ({"ratio": float("nan")}, "no budget"),
        ({"ratio": "half"}, "no budget"),
        ({"ratio": True}, "no budget"),
        ({"ratio": 0.01}, "too small"),
        ({"bytes": 1000}, "too small"),
        ({"ratio": 0.5, "bytes": 10**6}, "Leave one out"),
    ],
)
def test_a_size_that_cannot_be_loaded_is_refused(given, words, folders):
    with pytest.raises(RankError, match=words):
        transformers.LlamaForCausalLM.from_pretrained(folders("llama"), **given)
    with pytest.raises(RankError, match=words):
        eckart.load(str(folders("llama")), **given)


def test_a_ratio_of_a_folder_that_is_not_elastic_is_refused(tiny_llama_folder):
    with pytest.raises(ModelError, match="not elastic"):
        eckart.load(str(tiny_llama_folder), ratio=0.5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ratio": 0.9, "method": "monarch"}, "are nested"),
        ({"latency": 0.9}, "goes with ratio"),
        ({"bytes": 10**6}, "goes with ratio"),
        ({"ratio": 0.9, "allocate": "groups"}, "uniform, tail or measured"),
    ],
)
def test_what_cannot_be_elastic_is_refused(given, words):
    with pytest.raises(RecipeError, match=words):
        make_settings(CompressSettings, {"elastic": True, **given})


def damaged(folder, target, change):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors, config = load_file(target / "model.safetensors"), config_of(target)
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


FIRST = "model.layers.0.mlp.down_proj"


def _drop(key):
    return lambda tensors, _: tensors.pop(key)


def _put(key, change):
    return lambda tensors, _: tensors.update({key: change(tensors[key]).contiguous()})


def _edit(change):
    return lambda _, config: change(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(f"{FIRST}.elastic.0.scales"), "missing"),
        (_drop(f"{FIRST}.elastic.0.components.0"), "missing"),
        (_put(f"{FIRST}.elastic.0.scales", lambda t: t[:-1]), "has shape"),
        (_put(f"{FIRST}.elastic.0.components.0", lambda t: t[:-1]), "has shape"),
        (_put(f"{FIRST}.elastic.0.components.0", lambda t: t[:, :-1]), "has shape"),
        (_put(f"{FIRST}.elastic.0.scales", lambda t: t * torch.nan), "not finite|are finite"),
        (_put(f"{FIRST}.elastic.0.scales", lambda t: -t), "negative"),
        (_edit(lambda c: c.update(schema_version=2)), "version"),
        (_edit(lambda c: c.update(surprise=1)), "surprise"),
        (_edit(lambda c: c.pop("ratio")), "not understood"),
        (_edit(lambda c: c.update(ratio=2)), "fractions"),
        (_edit(lambda c: c.update(storage="dense")), "storage"),
        (_edit(lambda c: c.update(allocation="groups")), "allocation"),
        (_edit(lambda c: c.update(weights=[])), "not understood"),
        (_edit(lambda c: c["weights"][FIRST].update(shape=[32, 47])), "has shape|layer stands|components"),
        (_edit(lambda c: c["weights"][FIRST]["parts"][0].update(unit=999)), "numbered"),
        (_edit(lambda c: c["weights"][FIRST]["parts"][0].update(rows=31)), "rows"),
        (_edit(lambda c: c["weights"][FIRST]["parts"][0].update(points=[[1]])), "pairs"),
    ],
)
def test_a_damaged_folder_is_refused_with_a_reason(change, words, folders, tmp_path):
    folder = damaged(folders("llama"), tmp_path / "a", change)
    with pytest.raises(ModelError, match=words):
        transformers.LlamaForCausalLM.from_pretrained(folder, ratio=0.5)
    with pytest.raises(ModelError, match=words):
        eckart.load(str(folder), ratio=0.5)


def test_rows_that_are_not_each_once_are_refused(folders, tmp_path):
    key = "transformer.h.0.self_attention.query_key_value.elastic.rows"
    folder = damaged(folders("falcon_grouped"), tmp_path / "a", _put(key, torch.zeros_like))
    with pytest.raises(ModelError, match="not every number once"):
        transformers.FalconForCausalLM.from_pretrained(folder, ratio=0.5)


def test_components_that_hold_nan_never_load_silently(folders, tmp_path):
    folder = damaged(
        folders("llama"),
        tmp_path / "a",
        _put(f"{FIRST}.elastic.0.components.0", lambda t: torch.full_like(t, torch.nan)),
    )
    with pytest.raises(Exception, match="(?i)converge|nan|conversion"):
        transformers.LlamaForCausalLM.from_pretrained(folder, ratio=0.5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["shape", "parts", "experts", "transposed", "bias", "ordered", "rows", "unit", "components", "dense", "points"]


@given(entry=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON | st.integers(0, 4)))
def test_an_entry_of_any_json_is_read_or_refused(entry):
    try:
        weight = ElasticWeight.from_json(entry)
    except ValueError:
        return
    assert all(size > 0 for shape in weight.tensors().values() for size in shape)


@given(data=st.data())
def test_a_description_with_one_field_changed_is_read_or_refused_as_model_error(data, may_refuse):
    sound = {
        "weights": {"a": {"shape": [4, 3], "parts": [{"rows": 4, "unit": 0, "components": [2], "dense": False}]}},
        "storage": "pivoted", "allocation": "tail", "floor": 0.3, "multiple": 1, "ratio": 0.9, "parameters": 12,
    }  # fmt: skip
    place = data.draw(st.sampled_from([sound, sound["weights"]["a"], sound["weights"]["a"]["parts"][0]]))
    place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=4))] = data.draw(JSON)
    with may_refuse(ModelError):
        found = ElasticConfig.from_dict(sound)
        assert ElasticConfig.from_dict(json.loads(json.dumps(found.to_dict()))).to_dict() == found.to_dict()


def test_an_entry_is_written_as_it_is_read():
    weight = ElasticWeight(
        (4, 3), (ElasticPart(3, 0, (2,), False, ((1, 0.5),)), ElasticPart(1)), bias=True, ordered=True
    )
    config = ElasticConfig({"a": weight}, "pivoted", "measured", 0.3, 1, 0.9, 12)
    again = ElasticConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.weights == {"a": weight}
    assert weight.tensors() == {
        "elastic.0.scales": (3,), "elastic.0.components.0": (2, 6), "elastic.1.dense": (1, 3),
        "elastic.bias": (4,), "elastic.rows": (4,),
    }  # fmt: skip


def test_curves_at_loading_are_those_of_the_compression(folders):
    for name in ("llama", "mixtral"):
        model = tiny.build(name)
        described = ElasticConfig.from_dict(config_of(folders(name))["quantization_config"])
        slices = Slices([str(folders(name) / "model.safetensors")])
        scales = [slices.read(f"{path}.elastic.{number}.scales") for path, number, _, _ in described.units()]
        units, _ = find_units(model, find_matrices(model), settings())
        windows = read_windows(text(), tiny.tokenizer(), length=16, count=6)
        steps = Steps(model, tiny.tokenizer(), settings(), windows, units, Spill(None), lambda _: None)
        for one, other in zip(curves_of(described, scales, dtype=torch.float32), steps.curves(), strict=True):
            assert all(
                np.array_equal(getattr(one, part), getattr(other, part)) for part in ("ranks", "costs", "errors")
            )


def test_a_killed_elastic_compression_goes_on_and_ends_with_the_same_folder(tmp_path):
    model = tiny.build("llama")
    chosen = settings(elastic=True, allocate="auto")
    expected = compress(model, tiny.tokenizer(), text(), chosen)
    found, kills = killed_again_and_again(
        lambda stop: compress(model, tiny.tokenizer(), text(), chosen, spill=tmp_path / "work", progress=stop), 12
    )
    assert kills >= 2
    assert found.divergence == expected.divergence
    for name, each in (("a", expected), ("b", found)):
        eckart.save(each.elastic(copy.deepcopy(model)), tmp_path / name, None, each.plan)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_the_program_writes_an_elastic_folder_and_one_size_of_it(program, tiny_llama_folder, tmp_path):
    from conftest import WORDS

    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 30), encoding="utf-8")
    out = tmp_path / "out"
    done = program(
        "compress", tiny_llama_folder, "--calibration", path, "--ratio", "0.9", "--elastic", "--window", "16",
        "--windows", "8", "--out", out,
    )  # fmt: skip
    assert done.status == 0, done.err
    results = json.loads((out / "results.json").read_text())
    served = results["elastic"]["served"]
    assert [row["ratio"] for row in served][:2] == [0.9, 0.8]
    sizes_served = [row["size"]["after"]["bytes"] for row in served]
    assert sizes_served == sorted(sizes_served, reverse=True)
    assert "elastic" in (out / "model" / "README.md").read_text()
    assert "elastic" in (out / "report.html").read_text().lower()
    assert not (out / "work").exists()
    small = program("apply", out / "model", "--ratio", "0.5", "--out", tmp_path / "small")
    assert small.status == 0, small.err
    model, tokenizer = eckart.load(str(tmp_path / "small" / "model"))
    same_state(model, eckart.load(str(out / "model"), ratio=0.5)[0])
    assert model.generate(**tokenizer("the ant", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    assert program("apply", out / "model", "--out", tmp_path / "none").status == 2
    assert program("apply", out / "model", out, "--ratio", "0.5", "--out", tmp_path / "none").status == 2
    refused = program("apply", tiny_llama_folder, "--ratio", "0.5", "--out", tmp_path / "none")
    assert refused.status == 1
    assert "not elastic" in refused.err
    inspected = program("inspect", out / "model", "--out", tmp_path / "none")
    assert inspected.status == 1
    assert "eckart apply MODEL --ratio" in inspected.err
    assert not (tmp_path / "none").exists()
