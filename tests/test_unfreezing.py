"""Spectrum's files: what axolotl and TRL scripts read from them is what was chosen."""

import json
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from eckart.errors import EckartError
from eckart.unfreezing import (
    SignalRatio,
    choose,
    module_type,
    read_ratios,
    read_unfrozen_parameters,
    unfrozen_parameters,
    write_ratios,
)

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
RATIOS = st.dictionaries(
    NAMES, st.builds(SignalRatio, st.none() | st.floats(allow_nan=False, allow_infinity=False), NAMES)
)


def trained(model, patterns):
    """What a script trains that freezes all but what matches: axolotl's rule, points being plain points."""
    compiled = [re.compile(pattern.replace(".", "\\.")) for pattern in patterns]
    return {name for name, _ in model.named_parameters() if any(p.match(name) for p in compiled)}


def test_the_list_trains_exactly_what_was_chosen_and_the_embeddings(tmp_path):
    model = tiny_models.build("qwen3_moe")
    modules = [n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim >= 2 and ".layers." in n]
    ratios = {name: SignalRatio(float(hash(name) % 97), module_type(name)) for name in modules}
    chosen = choose(ratios, 0.4)
    bare = [name for name, p in model.named_parameters() if p.ndim == 3]
    path = tmp_path / "unfrozen_parameters.yaml"
    path.write_text(unfrozen_parameters(chosen, always=["model.embed_tokens.weight"], bare=bare), encoding="utf-8")
    names = {name if name in bare else f"{name}.weight" for ones in chosen.values() for name in ones}
    patterns = read_unfrozen_parameters(path)
    assert trained(model, patterns) == names | {"model.embed_tokens.weight"}
    assert {n for n, _ in model.named_parameters() if any(re.match(p, n) for p in patterns)} == trained(model, patterns)
    assert "# self_attn.q_proj layers" in path.read_text(encoding="utf-8")


@given(ratios=RATIOS, top=st.floats(0.01, 1))
def test_of_each_type_the_share_with_the_highest_ratio_is_chosen(ratios, top):
    chosen = choose(ratios, top)
    for kind in {ratio.type for ratio in ratios.values()}:
        finite = [name for name, ratio in ratios.items() if ratio.type == kind and ratio.snr is not None]
        taken = chosen.get(kind, [])
        assert len(taken) == (max(1, math.floor(top * len(finite) + 1e-9)) if finite else 0)
        rest = [ratios[name].snr for name in finite if name not in taken]
        assert not taken or not rest or min(ratios[name].snr for name in taken) >= max(rest)


@given(ratios=RATIOS)
def test_ratios_come_back_as_they_were_written(ratios, tmp_path_factory):
    path = tmp_path_factory.mktemp("ratios") / "snr_results.json"
    path.write_text(write_ratios(ratios), encoding="utf-8")
    assert read_ratios(path) == ratios
    assert not {"Infinity", "NaN"} & set(re.findall(r"(?<=: )-?\w+", path.read_text(encoding="utf-8")))


def test_files_of_spectrum_with_infinities_are_read(tmp_path):
    path = tmp_path / "snr_results_model.json"
    path.write_text('{"model.layers.0.mlp.down_proj": {"snr": Infinity, "type": "mlp.down_proj"}, "lm_head": 0.5}')
    assert read_ratios(path) == {
        "model.layers.0.mlp.down_proj": SignalRatio(None, "mlp.down_proj"),
        "lm_head": SignalRatio(0.5, "lm_head"),
    }
    assert choose(read_ratios(path)) == {"lm_head": ["lm_head"]}


@given(names=st.lists(NAMES, max_size=5))
def test_any_name_makes_yaml_that_reads_back(names):
    text = unfrozen_parameters({"type": names})
    assert (yaml.safe_load(text)["unfrozen_parameters"] or []) == [f"^{name}.weight$" for name in names]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(content=st.binary(max_size=40) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_rubbish_is_refused_or_read(content, tmp_path_factory, may_refuse):
    path = tmp_path_factory.mktemp("rubbish") / "file"
    path.write_bytes(content)
    for read in (read_ratios, read_unfrozen_parameters):
        with may_refuse(EckartError, str(path)):
            read(path)


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(EckartError, match="--top"):
        choose({}, 0)
