"""Scores are those of the model asked one sequence at a time. Oracles: brute force, and lm-eval."""

import json
import math

import numpy as np
import pytest
import torch

import tiny_models as tiny
from eckart.errors import TaskError
from eckart.scoring import (
    Scores,
    constant_answer,
    evaluate,
    generate,
    majority_control,
    matches,
    prepare,
    score,
    summarize,
)
from eckart.tasks import Example, make_task, read_task


def choice_task(count=12, choices=3, words=2, seed=0):
    examples = []
    for index in range(count):
        prompt = tiny.sentence(3 + (index * 5) % 9, seed + index)
        options = tuple(tiny.sentence(1 + (index + c) % words, seed + 100 * c + index + 1) for c in range(choices))
        if len(set(options)) == choices:
            examples.append(Example(prompt, index % choices, options))
    return make_task("choice", examples)


def log_likelihood(model, ids, start):
    """Sum of log p(token | all before it) over ids[start:], one full forward pass, float64 softmax."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    return sum(logp[place - 1, ids[place]].item() for place in range(start, len(ids)))


@pytest.mark.parametrize("normalize", ["none", "tokens"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_choices_are_scored_as_one_by_one(name, normalize):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(), choice_task()
    scores = score(model, tokenizer, prepare(model, tokenizer, task, batch_tokens=64), normalize=normalize)
    for index, example in enumerate(task.examples):
        start = len(tokenizer(example.prompt).input_ids)
        rows = [tokenizer(f"{example.prompt} {choice}").input_ids for choice in example.choices]
        sums = [log_likelihood(model, ids, start) for ids in rows]
        lengths = [len(ids) - start for ids in rows]
        marks = [s / n for s, n in zip(sums, lengths)] if normalize == "tokens" else sums
        pick = int(np.argmax(marks))
        assert scores.loss[index] == pytest.approx(-sums[example.answer] / lengths[example.answer], abs=1e-4)
        assert scores.prediction[index] == example.choices[pick]
        assert scores.correct[index] == (pick == example.answer)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "mixtral"])
def test_batching_does_not_move_numbers(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer(mask=True)
    task = choice_task()
    one = score(model, tokenizer, prepare(model, tokenizer, task, batch_tokens=1))
    many = score(model, tokenizer, prepare(model, tokenizer, task, batch_tokens=5000))
    np.testing.assert_allclose(one.loss, many.loss, atol=2e-5)
    assert one.prediction == many.prediction


def test_the_same_call_gives_the_same_bits():
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), choice_task()
    encoded = prepare(model, tokenizer, task)
    assert np.array_equal(score(model, tokenizer, encoded).loss, score(model, tokenizer, encoded).loss)


@pytest.mark.parametrize("name", tiny.MASKED)
def test_masked_models_fill_the_masks(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer(mask=True)
    task = make_task("m", [Example(f"w5 [MASK] w{6 + i} w7", 0, ("w8 w9", f"w{20 + i}")) for i in range(5)])
    scores = score(model, tokenizer, prepare(model, tokenizer, task))
    for index, example in enumerate(task.examples):
        ids = tokenizer(example.prompt.replace("[MASK]", "[MASK][MASK]".replace("][", "] ["))).input_ids
        assert ids[2:4] == [4, 4]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        assert scores.loss[index] == pytest.approx(-(logp[2, 8] + logp[3, 9]).item() / 2, abs=1e-4)


def test_an_encoder_decoder_scores_the_answer_given_the_prompt():
    model, tokenizer = tiny.build("t5"), tiny.tokenizer(eos=True)
    task = choice_task(6)
    scores = score(model, tokenizer, prepare(model, tokenizer, task))
    for index, example in enumerate(task.examples):
        targets = tokenizer(example.gold, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([tokenizer(example.prompt).input_ids]),
                decoder_input_ids=torch.tensor([[0, *targets[:-1]]]),
            ).logits[0]
        logp = torch.log_softmax(logits.double(), -1)
        expected = -sum(logp[place, token].item() for place, token in enumerate(targets)) / len(targets)
        assert scores.loss[index] == pytest.approx(expected, abs=1e-4)


def test_single_token_answers_are_right_when_they_are_the_argmax():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    prompts = [tiny.sentence(4 + i % 3, i) for i in range(30)]
    best, answers = [], []
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
        order = [int(token) for token in logits.argsort(descending=True) if token >= 5]
        best.append(int(logits.argmax()))
        answers.append(order[[0, 2, 8, 20][index % 4]])
    task = make_task("open", [Example(p, f"w{a}") for p, a in zip(prompts, answers)])
    encoded = prepare(model, tokenizer, task)
    assert encoded.single_token
    scores = score(model, tokenizer, encoded)
    assert scores.correct.tolist() == [b == a for b, a in zip(best, answers)]
    assert scores.prediction == tuple(tokenizer.decode([b]) for b in best)
    found = summarize(encoded, scores)
    assert found["accuracy"].value <= found["top5"].value <= found["top10"].value
    assert found["top10"].value >= 0.7
    assert found["accuracy"].count == 30


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_longer_answers_are_generated_greedily_and_matched_in_the_continuation_only(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer()
    prompt = tiny.sentence(6, 3)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    words = []
    decoder = torch.tensor([[0]])
    for _ in range(3):
        with torch.no_grad():
            if name == "t5":
                token = int(model(input_ids=ids, decoder_input_ids=decoder).logits[0, -1].argmax())
                decoder = torch.cat([decoder, torch.tensor([[token]])], 1)
            else:
                token = int(model(input_ids=ids).logits[0, -1].argmax())
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        words.append(tokenizer.decode([token]))
    (said,) = generate(model, tokenizer, [prompt], 3)
    assert (
        said.split()
        == [word for word in words if word not in ("<s>", "</s>", "<pad>", "<unk>", "[MASK]")][: len(said.split())]
    )
    inside = prompt.split()[1] + " " + prompt.split()[2]
    task = make_task("open", [Example(prompt, inside)])
    scores = score(model, tokenizer, prepare(model, tokenizer, task))
    (continuation,) = generate(model, tokenizer, [prompt], 7)
    assert scores.correct.tolist() == [inside in continuation]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("I know", "no", False),
        ("No, it is not", "no", True),
        ("the city of Paris.", "Paris", True),
        ("Parisian", "Paris", False),
        ("", "x", False),
        ("C++ it is", "C++", True),
    ],
)
def test_an_answer_matches_as_whole_words(text, answer, right):
    assert matches(text, answer) is right


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_rw"])
def test_perplexity_is_that_of_windows_run_one_by_one(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer()
    texts = [tiny.sentence(length, length) for length in (40, 9, 25)]
    task = make_task("text", [Example(text, None) for text in texts])
    found = evaluate(model, tokenizer, task, window=16, stride=16)
    total = count = 0
    for text in texts:
        ids = tokenizer(text).input_ids
        begin, done = 0, 1
        while done < len(ids):
            end = min(begin + 16, len(ids))
            total -= log_likelihood(model, ids[begin:end], done - begin)
            count += end - done
            begin, done = end - 1, end
    assert found["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["perplexity"].count == count
    assert found["loss"].value == pytest.approx(total / count, abs=1e-4)


def test_a_masked_model_has_no_perplexity():
    with pytest.raises(TaskError, match="not causal"):
        evaluate(tiny.build("bert"), tiny.tokenizer(mask=True), make_task("t", [Example("w5 w6", None)]))


def test_nearly_constant_answers_are_called_out():
    loss, index = np.zeros(20), np.arange(20)
    varied = Scores(index, loss, np.ones(20, bool), ("yes",) * 18 + ("no",) * 2)
    constant = Scores(index, loss, np.ones(20, bool), ("yes",) * 19 + ("no",))
    assert constant_answer(varied) is None
    assert constant_answer(constant) == ("yes", 0.95)
    assert constant_answer(Scores(index, loss)) is None


def test_the_majority_control_looks_at_labels_where_they_are_shared_and_at_places_otherwise():
    labels = [Example("p", index, ("yes", "no")[:: 1 - 2 * (number % 2)]) for number, index in enumerate([0, 1, 0, 0])]
    task = make_task("labels", labels)
    answer, accuracy = majority_control(task, task)
    assert answer == "yes"
    assert accuracy.value == 0.75
    cloze = make_task("cloze", [Example("p", 1, (f"a{i}", f"b{i}")) for i in range(4)])
    assert majority_control(cloze, cloze)[0] == "choice 1"
    assert majority_control(make_task("t", [Example("text", None)]), cloze) is None


LM_EVAL_TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.parametrize(
    ("model_name", "task_name"),
    [("stories260K", "story_continuation"), ("stories260K", "blimp_half"), ("pebble-7m", "book_cloze")],
)
@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_agree_with_lm_eval(shared, tmp_path, model_name, task_name):
    pytest.importorskip("lm_eval", reason="needs the 'eval' extra: make setup EXTRAS=dev,eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (shared / "tasks" / f"{task_name}.jsonl").read_text(encoding="utf-8").split("\n")[:40]
    path = tmp_path / "local.jsonl"
    # lm-eval joins with a space of its own; an empty prompt must have none there.
    path.write_text("\n".join(lines), encoding="utf-8")
    delimiter = 'target_delimiter: ""\n' if task_name == "blimp_half" else ""
    (tmp_path / "local.yaml").write_text(LM_EVAL_TASK.format(path=path) + delimiter, encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / model_name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model_name)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    task = read_task(path)
    encoded = prepare(model, tokenizer, task)
    scores = score(model, tokenizer, encoded)
    for sample in found["samples"]["local"]:
        index = sample["doc_id"]
        answer = json.loads(lines[index])["answer"]
        theirs = float(sample["filtered_resps"][answer][0])
        assert -scores.loss[index] * encoded.tokens[index] == pytest.approx(theirs, abs=1e-4)
        assert scores.correct[index] == bool(sample["acc"])
