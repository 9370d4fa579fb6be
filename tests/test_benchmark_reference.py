import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_models
from eckart.matrices import find_matrices
from eckart.scoring import prepare, score
from eckart.tasks import Example, make_task

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reference_loop = load_script("reference_loop")


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(3, tiny_models.VOCABULARY)}
    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "<unk>": 2, **words}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def task():
    drawn = random.Random(0)

    def text(length):
        return " ".join(f"w{drawn.randrange(3, tiny_models.VOCABULARY)}" for _ in range(length))

    return make_task(
        "words",
        [
            Example(text(drawn.randint(2, 9)), i % 3, tuple(text(length) for length in (1, drawn.randint(1, 3), 2)))
            for i in range(30)
        ],
    )


@pytest.fixture
def model():
    return tiny_models.build("llama")


def test_at_full_rank_the_reference_loop_scores_as_eckart_does(model, tokenizer, task):
    encoded = prepare(model, tokenizer, task)
    expected = score(model, tokenizer, encoded)
    for matrix in find_matrices(model)[::5]:
        with reference_loop.edited(model, matrix, matrix.rank):
            answered = reference_loop.answer_all(model, tokenizer, task.examples)
        assert [a.loss for a in answered] == pytest.approx(list(expected.loss), abs=1e-4)
        assert tuple(e.choices[a.pick] for e, a in zip(task.examples, answered)) == expected.prediction


def test_answers_have_the_length_of_their_tokens(model, tokenizer, task):
    answered = reference_loop.answer_all(model, tokenizer, task.examples[:5])
    for example, found in zip(task.examples, answered):
        assert found.lengths == tuple(len(choice.split()) for choice in example.choices)


def test_a_cut_changes_the_scores_and_is_undone(model, tokenizer, task):
    matrix = find_matrices(model)[0]
    before = {name: value.clone() for name, value in model.named_parameters()}
    whole = reference_loop.answer_all(model, tokenizer, task.examples[:5])
    with reference_loop.edited(model, matrix, 1):
        assert torch.linalg.matrix_rank(model.get_parameter(matrix.parameter)) == 1
        assert reference_loop.answer_all(model, tokenizer, task.examples[:5]) != whole
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_answer_that_the_tokens_do_not_spell_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="No ending of the tokens reads 'unheard'"):
        reference_loop.answer_all(model, tokenizer, [Example("w3 w4", 0, ("unheard", "w5"))])


def test_the_benchmark_measures_checks_and_renders(model, tokenizer, task, monkeypatch, tmp_path):
    benchmark = load_script("search")
    monkeypatch.setattr(benchmark, "load", lambda *_args, **_options: (model, tokenizer))
    monkeypatch.setattr(benchmark, "read_task", lambda _path: task)
    arguments = ["--rho", "0.1,0.5", "--reference-examples", "4", "--reference-edits", "4"]
    arguments += ["--repeats", "2", "--workers", "1", "--cache"]
    monkeypatch.setattr(
        sys, "argv", ["search.py", "--pair", "tiny:words", "--check-winner", "--results", str(tmp_path), *arguments]
    )
    benchmark.main()
    found = benchmark.json.loads((tmp_path / "search-tiny-words.json").read_text())
    assert found["edits"] == 3 * 7 * 2
    assert found["check"]["same_winner"]
    assert found["check"]["same_accuracies"] == found["check"]["scored_to_the_end"] > 0
    assert found["check"]["largest_loss_difference"] < 1e-5
    assert found["exhaustive"]["same_winner"]
    assert found["exhaustive"]["edits"] == found["edits"]
    for row in found["cache"]:
        assert row["same_trials"]
        assert row["cache_bytes"] is None or row["peak_bytes"] <= row["cache_bytes"]
    assert found["agreement"]["same_answer_tokens"] == found["agreement"]["same_prediction"] == 4
    repeats = found["searches"]["race"]["run"]["repeats"]
    passes = [[timing["matrix"] for timing in repeat["reference"]["sample_passes"]] for repeat in repeats]
    assert passes[0] != passes[1]
    assert {name.split(".")[2] for name in passes[0]} == {"0", "1", "2"}
    for repeat in repeats:
        for name, ratio in repeat["ratios"].items():
            assert ratio == pytest.approx(repeat["reference"]["seconds"] / repeat["searches"][name]["seconds"])
    trials = found["found"]["race"]["trials"]
    assert trials["evaluated"] + trials["stopped"] == trials["grid"]
    assert "| tiny | words | 6 + 24 | 42 |" in benchmark.table(tmp_path)
