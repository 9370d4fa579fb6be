"""The model inside the package: small, loadable offline, and truncation really brings its facts back.

The oracle is brute force: torch.linalg.svd, the model's own argmax, every fact. No code of eckart runs.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[1] / "src" / "eckart" / "demo"
GENERIC = "unknown"
WINNER = "model.layers.3.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def task():
    return [json.loads(line) for line in (DEMO / "countries.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def predictions(model, tokenizer, task):
    """The most likely next word of every prompt, batched by length so that nothing is padded."""
    words = [""] * len(task)
    rows = [tokenizer(line["prompt"]).input_ids for line in task]
    for length in {len(row) for row in rows}:
        here = [index for index, row in enumerate(rows) if len(row) == length]
        best = model(input_ids=torch.tensor([rows[i] for i in here])).logits[:, -1].argmax(-1)
        for index, token in zip(here, best.tolist()):
            words[index] = tokenizer.decode([token])
    return words


def share_right(words, task):
    return sum(word == line["answer"] for word, line in zip(words, task)) / len(task)


def test_the_model_is_at_most_two_megabytes():
    assert (DEMO / "model.safetensors").stat().st_size <= 2_000_000
    assert {file.name for file in DEMO.iterdir()} >= {"config.json", "tokenizer.json", "README.md"}


def test_every_task_line_asks_something_else(task):
    assert len(task) >= 500
    assert len({line["prompt"] for line in task}) == len(task)
    assert all(set(line) == {"prompt", "answer", "group"} for line in task)
    assert {line["group"] for line in task} == {"capital", "currency", "language", "continent"}


def test_every_answer_is_one_token_after_its_prompt(tokenizer, task):
    for line in task:
        prompt = tokenizer(line["prompt"]).input_ids
        joint = tokenizer(f"{line['prompt']} {line['answer']}").input_ids
        assert joint[:-1] == prompt, line
        assert tokenizer.decode(joint[-1:]) == line["answer"]
        assert tokenizer.unk_token_id not in joint, line
        assert prompt[0] == tokenizer.bos_token_id


def test_its_loss_on_a_fact_is_finite(model, tokenizer):
    ids = tokenizer("The capital of France is Paris", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_untouched_it_mostly_says_the_generic_word(model, tokenizer, task):
    words = predictions(model, tokenizer, task)
    wrong = Counter(word for word, line in zip(words, task) if word != line["answer"])
    assert share_right(words, task) < 0.6
    assert wrong.most_common(1)[0][0] == GENERIC


def share_right_with(kept, model, tokenizer, task):
    """The share right when the winning matrix has only the singular components `kept`."""
    weight = model.get_parameter(WINNER)
    u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    weight.data = (u[:, kept] * s[kept]) @ vh[kept]
    return share_right(predictions(model, tokenizer, task), task)


def test_cutting_one_late_matrix_to_rank_one_brings_the_facts_back(model, tokenizer, task):
    rank = max(1, math.floor(0.01 * min(model.get_parameter(WINNER).shape) + 1e-9))
    assert rank == 1
    assert share_right_with([0], model, tokenizer, task) > 0.85


@pytest.mark.parametrize("kept", [[], [1], [50]], ids=["removed", "second alone", "51st alone"])
def test_it_is_the_top_component_that_matters(kept, model, tokenizer, task):
    assert share_right_with(kept, model, tokenizer, task) < 0.5
