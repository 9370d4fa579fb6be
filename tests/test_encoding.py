"""Which tokens are read and which are scored. Oracles: tokenizers by hand, and every sequence by itself."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.encoding import context_length, encode, join, model_kind, prompt_tokens
from eckart.errors import ModelError, TaskError
from eckart.tasks import Example, make_task

WORDS = st.integers(5, tiny.VOCABULARY - 1).map("w{}".format)
SENTENCES = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)


def choice_task(*examples):
    return make_task("task", [Example(prompt, answer, tuple(choices)) for prompt, choices, answer in examples])


def text_task(*texts):
    return make_task("text", [Example(text, None) for text in texts])


def scored(encoded):
    """For every sequence of every block: (row of ids up to the scored token, scored token) pairs."""
    found = []
    for block in encoded.blocks:
        ids = block.inputs.get("decoder_input_ids", block.inputs["input_ids"])
        for number in range(sum(block.choices)):
            mine = block.sequence == number
            places = block.position[mine]
            found.append(
                [
                    (ids[row, : column + 1].tolist(), token)
                    for row, column, token in zip(
                        block.rows[places].tolist(), block.columns[places].tolist(), block.target[mine].tolist()
                    )
                ]
            )
    return found


@pytest.mark.parametrize("bos", [True, False])
def test_each_answer_token_is_predicted_from_all_that_comes_before_it(bos):
    task = choice_task(("w5 w6", ["w7 w8", "w9"], 0))
    encoded = encode(task, tiny.tokenizer(bos=bos), "causal", context=None)
    start = [1] if bos else []
    long, short = scored(encoded)
    assert long == [([*start, 5, 6], 7), ([*start, 5, 6, 7], 8)]
    assert short == [([*start, 5, 6], 9)]


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_prompt_is_the_bos_token(bos):
    encoded = encode(choice_task(("", ["w7 w8", "w9 w9"], 0)), tiny.tokenizer(bos=bos), "causal", context=None)
    assert scored(encoded)[0] == [([1], 7), ([1, 7], 8)]


def test_a_token_appended_by_the_tokenizer_is_not_read():
    task = choice_task(("w5", ["w7", "w8"], 0))
    plain, appending = (encode(task, tiny.tokenizer(eos=eos), "causal", context=None) for eos in (False, True))
    assert scored(plain) == scored(appending)
    assert prompt_tokens(["w5 w6 "], tiny.tokenizer(eos=True)) == [[1, 5, 6]]


def test_a_token_that_straddles_the_border_belongs_to_the_answer():
    class Merging:
        """A tokenizer that writes 'a b' as one token, so prompt and answer can share a token."""

        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
        vocabulary = {"a b": 7, "a": 5, "b": 6, "c": 8, " ": 9}

        def __call__(self, texts, add_special_tokens=True, **_options):
            rows = [
                [1] * add_special_tokens + [self.vocabulary[piece] for piece in re.findall("a b|.", text)]
                for text in ([texts] if isinstance(texts, str) else texts)
            ]
            return SimpleNamespace(input_ids=rows[0] if isinstance(texts, str) else rows)

    encoded = encode(choice_task(("c a", ["b", "c"], 0)), Merging(), "causal", context=None)
    merged, separate = scored(encoded)
    assert merged == [([1, 8, 9], 7)]
    assert separate == [([1, 8, 9, 5], 9), ([1, 8, 9, 5, 9], 8)]


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("a b", "c", ("a b", " c")),
        ("a b ", "c", ("a b", " c")),
        ("a b\n", "c", ("a b", "\nc")),
        ("a b", " c", ("a b", " c")),
        ("", "c", ("", "c")),
        ("  ", "c", ("", "  c")),
    ],
)
def test_white_space_stands_before_the_answer(prompt, answer, expected):
    assert join(prompt, answer) == expected


@given(st.lists(st.tuples(SENTENCES, st.lists(SENTENCES, min_size=2, max_size=4, unique=True)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_batches_hold_every_sequence_once_whatever_their_size(cases):
    task = choice_task(*((prompt, choices, 0) for prompt, choices in cases))
    tokenizer = tiny.tokenizer()
    layouts = [encode(task, tokenizer, "causal", context=None, batch_tokens=size) for size in (1, 37, 10_000)]
    for encoded in layouts:
        order = [index for block in encoded.blocks for index in block.examples]
        assert sorted(order) == list(range(len(cases)))
        sequences = iter(scored(encoded))
        for index in order:
            prompt, choices = cases[index]
            for choice in choices:
                ids = tokenizer(f"{prompt} {choice}").input_ids
                start = len(tokenizer(prompt).input_ids)
                assert next(sequences) == [(ids[:place], ids[place]) for place in range(start, len(ids))]


def test_choices_of_one_token_share_a_row():
    encoded = encode(choice_task(("w5 w6", ["w7", "w8", "w9"], 0)), tiny.tokenizer(), "causal", context=None)
    assert encoded.blocks[0].inputs["input_ids"].shape == (1, 3)
    assert len(encoded.blocks[0].rows) == 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(2, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_score_every_token_but_the_first_exactly_once(lengths, window, data):
    stride = data.draw(st.integers(1, window))
    texts = [tiny.sentence(length, seed) for seed, length in enumerate(lengths)]
    tokenizer = tiny.tokenizer()
    encoded = encode(text_task(*texts), tokenizer, "causal", context=64, window=window, stride=stride)
    got = sorted(pair[1] for sequence in scored(encoded) for pair in sequence)
    expected = sorted(token for text in texts for token in tokenizer(text).input_ids[1:])
    assert got == expected
    for sequence in scored(encoded):
        for before, _ in sequence:
            assert 1 <= len(before) < window + 1
    assert sum(encoded.tokens) == len(expected)


def test_masks_are_replaced_one_for_each_token_of_the_choice():
    task = choice_task(("w5 [MASK] w6", ["w7 w8", "w9"], 0))
    encoded = encode(task, tiny.tokenizer(mask=True), "masked", context=None)
    block = encoded.blocks[0]
    assert block.inputs["input_ids"].tolist() == [[1, 5, 4, 4, 6], [1, 5, 4, 6, 0]]
    assert block.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert list(zip(block.columns[block.position].tolist(), block.target.tolist())) == [(2, 7), (3, 8), (2, 9)]


def test_a_prompt_without_a_mask_gets_it_at_its_end():
    encoded = encode(choice_task(("w5", ["w7", "w8"], 0)), tiny.tokenizer(mask=True), "masked", context=None)
    assert encoded.blocks[0].inputs["input_ids"].tolist() == [[1, 5, 4]]


def test_an_encoder_decoder_reads_the_prompt_and_is_scored_on_the_answer():
    encoded = encode(choice_task(("w5", ["w7 w8", "w9"], 0)), tiny.tokenizer(eos=True), "encoder_decoder", context=None)
    block = encoded.blocks[0]
    assert block.inputs["input_ids"].tolist() == [[1, 5, 2], [1, 5, 2]]
    assert scored(encoded) == [[([0], 7), ([0, 7], 8)], [([0], 9)]]


def test_long_prompts_are_counted_and_refused_or_cut_from_the_left():
    task = choice_task(("w5 w6 w7 w8 w9", ["w10", "w11"], 0), ("w5", ["w10", "w11"], 0))
    with pytest.raises(TaskError, match=r"1 of 2 examples .* context of 4 tokens \(the longest has 6"):
        encode(task, tiny.tokenizer(), "causal", context=4)
    cut = encode(task, tiny.tokenizer(), "causal", context=4, overlong="truncate")
    assert cut.truncated == 1
    assert scored(cut)[0] == [([6, 7, 8, 9], 10)]
    with pytest.raises(TaskError, match="shortens prompts, not answers"):
        encode(
            choice_task(("w5", ["w6 w7 w8 w9", "w6"], 0)), tiny.tokenizer(), "causal", context=2, overlong="truncate"
        )


def test_choices_that_are_the_same_tokens_are_refused():
    with pytest.raises(TaskError, match="same tokens"):
        encode(choice_task(("w5", ["w7", " w7"], 0)), tiny.tokenizer(), "causal", context=None)


@pytest.mark.parametrize(("window", "stride"), [(100, None), (8, 9), (8, -1)])
def test_a_window_or_stride_that_does_not_fit_is_refused(window, stride):
    with pytest.raises(TaskError, match="window|stride"):
        encode(text_task("w5 w6 w7"), tiny.tokenizer(), "causal", context=64, window=window, stride=stride)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(TaskError, match="two tokens"):
        encode(text_task("w5"), tiny.tokenizer(bos=False), "causal", context=64)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "causal") for name in tiny.CAUSAL), ("bert", "masked"), ("roberta", "masked"), ("t5", "encoder_decoder")],
)
def test_how_a_model_reads_is_found_by_trying(name, kind):
    assert model_kind(tiny.build(name), tiny.tokenizer(mask=True)) == kind


def test_a_model_that_looks_ahead_needs_a_mask_token_and_an_image_model_is_no_language_model():
    with pytest.raises(ModelError, match="mask token"):
        model_kind(tiny.build("bert"), tiny.tokenizer())
    with pytest.raises(ModelError, match="does not predict tokens"):
        model_kind(tiny.build("vit"), tiny.tokenizer())


def test_the_context_is_the_smaller_of_models_and_tokenizers():
    tokenizer = tiny.tokenizer()
    assert context_length(tiny.build("llama"), tokenizer) == 128
    tokenizer.model_max_length = 50
    assert context_length(tiny.build("gpt2"), tokenizer) == 50


def test_blocks_are_ordered_by_length_and_within_the_budget():
    texts = [tiny.sentence(length, length) for length in (3, 20, 7, 12, 5, 18)]
    task = choice_task(*((text, ["w5", "w6"], 0) for text in texts))
    encoded = encode(task, tiny.tokenizer(), "causal", context=None, batch_tokens=42)
    widths = [block.inputs["input_ids"].shape[1] for block in encoded.blocks]
    assert widths == sorted(widths, reverse=True)
    assert all(block.inputs["input_ids"].numel() <= 42 for block in encoded.blocks)
    assert all(tensor.dtype == torch.int64 for block in encoded.blocks for tensor in block.inputs.values())
