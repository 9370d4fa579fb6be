"""Every layout reads the same tokens before each scored one. Oracles: the masks followed by hand, and brute force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models as tiny
from eckart.encoding import arrange, encode
from eckart.layout import PASS_TOKENS, Row, Sequence_, lay_out, padded_tokens, runs_within
from eckart.prefix import run_block
from eckart.scoring import only_positions, prepare, rearrange, score
from eckart.tasks import Example, make_task

# Few different tokens, so that prompts and answers often begin alike.
TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=6).map(tuple)
EXAMPLES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4, unique=True)), min_size=1, max_size=9)


def sequences(examples):
    """Answers behind prompts: each token of an answer is predicted from all before it."""
    return [
        [
            Sequence_(Row((*prompt, *answer[:-1])), tuple(range(len(prompt) - 1, len(prompt + answer) - 1)), answer)
            for answer in answers
        ]
        for prompt, answers in examples
    ]


def seen(block, row, column):
    """The tokens that a position of the last pass looks at, itself included, by their positions in the text."""
    found = {}
    number = len(block.passes) - 1
    starts = np.cumsum([0, *(one.inputs["input_ids"].shape[1] for one in block.passes)])
    mask = block.inputs.get("attention_mask")
    looked = range(column + 1) if mask is None else mask[row, 0, column].nonzero()[:, 0].tolist()
    while number >= 0:
        one = block.passes[number]
        positions = one.inputs.get("position_ids")
        for place in looked:
            own = place - starts[number]
            if 0 <= own < one.inputs["input_ids"].shape[1]:
                at = int(own if positions is None else positions[row, own])
                assert at not in found
                found[at] = int(one.inputs["input_ids"][row, own])
        row = row if one.continues is None else int(one.continues[row])
        number -= 1
    assert sorted(found) == list(range(len(found)))
    return [found[at] for at in sorted(found)]


@given(EXAMPLES, st.sampled_from(["plain", "tree", "prompts", "prefixes"]), st.integers(1, 60), st.data())
@settings(max_examples=150, deadline=None)
def test_every_scored_token_is_predicted_from_its_own_text(examples, layout, batch_tokens, data):
    items = sequences(examples)
    strata = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=len(items), max_size=len(items)))
    blocks = lay_out(items, layout, kind="causal", pad=0, batch_tokens=batch_tokens, strata=strata)
    assert sorted(index for block in blocks for index in block.examples) == list(range(len(items)))
    for block in blocks:
        owned = [sequence for index in block.examples for sequence in items[index]]
        assert block.choices == tuple(len(items[index]) for index in block.examples)
        for number, sequence in enumerate(owned):
            mine = block.sequence == number
            assert block.target[mine].tolist() == list(sequence.targets)
            for position, place in zip(block.position[mine].tolist(), sequence.positions):
                text = seen(block, int(block.rows[position]), int(block.columns[position]))
                assert text == list(sequence.row.ids[: place + 1])
    if strata is not None:
        order = [[strata[index] for index in block.examples] for block in blocks]
        assert all(len(set(block)) == 1 for block in order)
        assert [block[0] for block in order] == sorted(block[0] for block in order)


@given(EXAMPLES, st.sampled_from(["tree", "prompts", "prefixes"]), st.integers(10, 60))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_no_larger_than_allowed_and_costs_what_was_foretold(examples, layout, batch_tokens):
    items = sequences(examples)
    blocks = lay_out(items, layout, kind="causal", pad=0, batch_tokens=batch_tokens)
    assert all(block.size <= batch_tokens or len(block.examples) == 1 for block in blocks)
    passes = {"tree": 1, "prompts": 2, "prefixes": 3}[layout]
    foretold = padded_tokens(items, layout, batch_tokens=batch_tokens)
    # A pass in which no row has a token is left out; up to one token of filling stands for an empty row.
    assert sum(block.size for block in blocks) <= foretold - PASS_TOKENS * passes * len(blocks)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.integers(60, 300))
@settings(max_examples=60, deadline=None)
def test_batches_are_cut_where_padding_and_passes_cost_least(lengths, batch_tokens):
    items = [[Sequence_(Row((index + 1,) * length), (length - 1,), (1,))] for index, length in enumerate(lengths)]
    ordered = sorted(lengths, reverse=True)
    best = None
    for count in range(len(ordered)):
        for cuts in combinations(range(1, len(ordered)), count):
            parts = [ordered[a:b] for a, b in zip((0, *cuts), (*cuts, len(ordered)))]
            if all(len(part) == 1 or len(part) * part[0] <= batch_tokens for part in parts):
                cost = sum(len(part) * part[0] + PASS_TOKENS for part in parts)
                best = cost if best is None else min(best, cost)
    assert padded_tokens(items, "plain", batch_tokens=batch_tokens) == best


@given(st.lists(st.integers(1, 20)), st.integers(1, 30))
def test_runs_keep_the_order_fit_and_are_as_long_as_they_can_be(sizes, most):
    runs = list(runs_within(sizes, lambda size: size, most))
    assert [size for run in runs for size in run] == sizes
    assert all(run and (len(run) == 1 or sum(run) <= most) for run in runs)
    assert all(sum(run) + after[0] > most for run, after in zip(runs, runs[1:]))


def test_what_prompts_have_in_common_is_read_once():
    items = sequences([((1,) * 20 + (n, n), [(7,), (8, 9)]) for n in range(2, 8)])
    (block,) = lay_out(items, "prefixes", kind="causal", pad=0, batch_tokens=2048)
    assert [tuple(one.inputs["input_ids"].shape) for one in block.passes] == [(1, 20), (6, 1), (6, 2)]
    assert block.passes[1].continues.tolist() == [0] * 6


def few_shot(count=10):
    """One long beginning for all, questions of several lengths, answers of one and two words."""
    head = tiny.sentence(30, 99)
    return make_task(
        "few_shot",
        [
            Example(f"{head} {tiny.sentence(2 + i % 3, i)}", i % 2, (tiny.sentence(2, i + 50), f"w{9 + i}"))
            for i in range(count)
        ],
    )


def pairs(count=10):
    """No prompts; two sentences that begin alike."""
    starts = [tiny.sentence(6, i) for i in range(count)]
    return make_task("pairs", [Example("", i % 2, (f"{s} w7", f"{s} w8 w9")) for i, s in enumerate(starts)])


def likelihoods_one_by_one(model, encoded):
    """Loss of the right answers, every sequence by itself in a plain pass, softmax in float64."""
    found = []
    for example, answers in zip(encoded.task.examples, encoded.sequences):
        sequence = answers[example.answer]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.row.ids])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        found.append(-np.mean([logp[at, token].item() for at, token in zip(sequence.positions, sequence.targets)]))
    return np.array(found)


# Windows of 8 tokens are shorter than these texts; ALiBi and the older families build masks of their own.
PLAIN = {"mistral", "gemma2", "gemma3", "falcon_rw", "bloom", "gpt_oss"}


@pytest.mark.parametrize(("make", "layout"), [(few_shot, "prefixes"), (pairs, "tree")])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_layouts_give_the_likelihoods_of_one_by_one_or_are_not_used(name, make, layout):
    model, tokenizer = tiny.build(name), tiny.tokenizer()
    encoded = prepare(model, tokenizer, make())
    if name not in PLAIN:
        assert encoded.layout == layout
    np.testing.assert_allclose(score(model, tokenizer, encoded).loss, likelihoods_one_by_one(model, encoded), atol=1e-4)


@pytest.mark.parametrize("layout", ["tree", "prompts", "prefixes"])
def test_the_layouts_agree_on_every_answer(layout):
    model, tokenizer = tiny.build("qwen3"), tiny.tokenizer()
    plain = prepare(model, tokenizer, few_shot(), batch_tokens=1)
    other = rearrange(model, arrange(plain, layout=layout, batch_tokens=200), [0] * plain.count)
    assert other.layout == layout
    found, expected = score(model, tokenizer, other), score(model, tokenizer, plain)
    np.testing.assert_allclose(found.loss, expected.loss, atol=1e-5)
    assert found.prediction == expected.prediction


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5"])
def test_strata_move_no_number(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer(mask=name == "bert")
    encoded = prepare(model, tokenizer, few_shot(), batch_tokens=150)
    plain = score(model, tokenizer, encoded)
    strata = [(7 * index) % 3 for index in range(encoded.count)]
    again = rearrange(model, encoded, strata)
    assert again.layout == encoded.layout
    order = [{strata[index] for index in block.examples} for block in again.blocks]
    assert all(len(members) == 1 for members in order)
    assert [min(members) for members in order] == sorted(min(members) for members in order)
    found = score(model, tokenizer, again)
    np.testing.assert_allclose(found.loss, plain.loss, atol=1e-5)
    assert found.prediction == plain.prediction


def test_windows_of_text_have_strata_too():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    task = make_task("text", [Example(tiny.sentence(length, length), None) for length in (40, 9, 25)])
    encoded = prepare(model, tokenizer, task, window=16, stride=16)
    again = rearrange(model, encoded, [index % 2 for index in range(encoded.count)])
    assert [index % 2 for block in again.blocks for index in block.examples] == sorted(
        index % 2 for index in range(encoded.count)
    )
    np.testing.assert_allclose(score(model, tokenizer, again).loss, score(model, tokenizer, encoded).loss, atol=1e-5)


def test_a_wrong_number_of_strata_is_refused():
    encoded = encode(few_shot(4), tiny.tokenizer(), "causal", context=None)
    with pytest.raises(ValueError, match="3 strata do not fit 4 examples"):
        arrange(encoded, strata=[0, 1, 2])


def test_gradients_flow_through_shared_prefixes():
    """The gradient of a weight early in the model, through all passes, is that of the plain layout."""
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    plain = encode(few_shot(), tokenizer, "causal", context=None)
    found = []
    for encoded in (plain, arrange(plain, layout="prefixes")):
        encoded = rearrange(model, encoded, [0] * plain.count)
        model.zero_grad()
        for block in encoded.blocks:
            with only_positions(model, block.rows, block.columns) as logits_of:
                logits = logits_of(run_block(model, block))
            logp = torch.log_softmax(logits, -1)[block.position, block.target]
            logp.sum().backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
