"""What runs on a device: settings, files and text. Oracles: softmax by hand, the tokenizer's own decode."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="needs pip install 'eckart[export]'")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eckart.errors import ModelError, TaskError
from eckart.onnx_graph import BLOCKS, block_of, pack, packed_bytes, unpack
from eckart.onnx_runner import Facts, OnnxModel, choose, encode, generate, open_model, read_facts, text_of

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


def byte_tokenizer():
    """One token a byte, so that most characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def model_of(tokenizer, **facts):
    return OnnxModel(None, Facts(**{"context": 8, "start": 1, "eos": (2,)} | facts), tokenizer)


@given(st.text(max_size=20), st.text(max_size=20))
def test_pieces_of_text_together_are_the_text(prompt, added):
    tokenizer = byte_tokenizer()
    ids, new = tokenizer.encode(prompt).ids, tokenizer.encode(added).ids
    pieces = list(text_of(model_of(tokenizer), ids, iter(new)))
    assert "".join(pieces) == added
    # A character comes as soon as it is whole.
    assert len(pieces) >= len([c for c in added if c != "\N{REPLACEMENT CHARACTER}"]) - added.count("\ufffd")


def test_a_tokenizers_eos_is_dropped_and_an_empty_prompt_begins_anew():
    tokenizer = byte_tokenizer()
    letter = tokenizer.encode("a").ids[0]
    assert encode(model_of(tokenizer, eos=(letter,)), "ba") == tokenizer.encode("b").ids
    assert encode(model_of(tokenizer, start=7), "") == [7]
    with pytest.raises(TaskError, match="empty"):
        encode(model_of(tokenizer, start=None), "")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        encode(model_of(None), "a")


def test_temperature_zero_takes_the_likeliest_token():
    generator = np.random.default_rng(0)
    assert {choose(LOGITS, temperature=0, top_p=1, generator=generator) for _ in range(20)} == {1}


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.45, {1, 3}), (0.75, {1, 3, 2}), (1.0, {0, 1, 2, 3})])
def test_draws_are_from_the_fewest_tokens_that_reach_top_p(top_p, kept):
    generator = np.random.default_rng(0)
    assert {choose(LOGITS, temperature=1, top_p=top_p, generator=generator) for _ in range(300)} == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_softmax(temperature):
    generator = np.random.default_rng(1)
    draws = [choose(LOGITS, temperature=temperature, top_p=1, generator=generator) for _ in range(20_000)]
    weights = np.exp(LOGITS / temperature)
    np.testing.assert_allclose(np.bincount(draws) / 20_000, weights / weights.sum(), atol=0.015)


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"temperature": np.nan}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_outside_their_range_are_refused(setting):
    with pytest.raises(TaskError, match="temperature"):
        next(generate(model_of(None), [5], **setting))


def test_a_prompt_as_long_as_the_context_is_refused():
    with pytest.raises(TaskError, match="8 in all"):
        next(generate(model_of(None), list(range(8))))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    JSON | st.fixed_dictionaries({"schema_version": st.just(1) | JSON, "context": JSON, "start": JSON, "eos": JSON}),
)
def test_facts_of_any_content_are_read_or_refused(tmp_path_factory, may_refuse, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    with may_refuse(ModelError, "eckart export"):
        facts = read_facts(path)
        assert all(isinstance(token, int) for token in facts.eos)


@given(st.binary(max_size=200))
def test_a_damaged_file_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    (folder / "eckart.json").write_text('{"schema_version": 1, "context": 8, "start": 1, "eos": [2]}')
    with pytest.raises(ModelError, match=r"model\.onnx"):
        open_model(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="eckart export"):
        open_model(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"eckart\.json"):
        open_model(tmp_path / "model.onnx")


@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.sampled_from([(8, 128), (8, 32), (4, 32), (4, 16), (2, 32)]),
    st.integers(0, 99),
)
def test_rounded_weights_differ_by_no_more_than_their_step(count, entries, how, seed):
    bits, block = how
    rows = np.random.default_rng(seed).standard_normal((count, entries)).astype(np.float32)
    packed, scales = pack(rows, bits, block)
    zero = 2 ** (bits - 1)
    # The bytes read bit by bit, low ones first.
    integers = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*scales.shape, block, bits)
    values = ((integers * 2 ** np.arange(bits)).sum(-1).astype(np.float32) - zero) * scales[..., None]
    flat = values.reshape(count, -1)
    np.testing.assert_array_equal(unpack(packed, scales, bits), flat)
    steps = np.repeat(np.abs(scales), block, axis=1)[:, :entries]
    # Half a step, but one where the range ends a step short.
    assert (np.abs(flat[:, :entries] - rows) <= 1.001 * steps).all()
    inside = np.abs(rows) <= (zero - 1) * steps
    assert (np.abs(flat[:, :entries] - rows)[inside] <= 0.501 * steps[inside]).all()
    assert not flat[:, entries:].any()


@given(st.integers(1, 5000), st.sampled_from([8, 4, 2]), st.booleans())
def test_the_chosen_block_takes_the_fewest_bytes(entries, bits, table):
    sizes = {n: -(-entries // n) * (n * bits // 8 + 4) for n in BLOCKS[bits] if not table or entries % n == 0}
    found = block_of(entries, bits, table=table)
    assert sizes[found] == min(sizes.values()) if sizes else found is None
    if not table:
        rows = np.zeros((3, entries), np.float32)
        assert packed_bytes((3, entries), bits) == sum(part.nbytes for part in pack(rows, bits, found))
