"""What users would do instead, measured fairly. Oracles: texts and tokens made by hand, plain forward passes, loops."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import eckart.controls as controls_module
import tiny_models as tiny
from eckart.cli import app
from eckart.controls import adapted, few_shot, int8, linear_modules, lora, measure_controls
from eckart.laser import search
from eckart.matrices import by_name, find_matrices, read, write
from eckart.recipe import SearchSettings
from eckart.results import to_json
from eckart.scoring import evaluate, prepare, score
from eckart.surgery import make_edit, weights_sha256
from eckart.tasks import Example, make_task, split
from eckart.truncation import round_to_int8

SETTINGS = SearchSettings(shots=2, controls=True)


def word(number):
    """One of the words w6 … w96, so never the right answer."""
    return f"w{6 + number % 91}"


def choices(count=12, seed=0):
    """Examples of two or three words to choose from, of which w5 is always right: something to learn."""
    found = []
    for index in range(count):
        wrong = (word(seed + 7 * index), f"{word(seed + 5 * index)} {word(seed + 3 * index)}")[: 1 + index % 2]
        answer = index % (len(wrong) + 1)
        found.append(
            Example(tiny.sentence(4 + index % 3, seed + index), answer, (*wrong[:answer], "w5", *wrong[answer:]))
        )
    return make_task("choices", found)


def opened(count=12, seed=0, words=1):
    """Examples with an open answer of so many words, the same for all."""
    answer = " ".join(f"w{5 + i}" for i in range(words))
    return make_task("open", [Example(tiny.sentence(4 + i % 3, seed + i), answer) for i in range(count)])


def texts(count=8, seed=0):
    """Texts that count up from different words."""
    found = [" ".join(f"w{5 + (seed + 3 * i + j) % 40}" for j in range(20 + i)) for i in range(count)]
    return make_task("texts", [Example(text, None) for text in found])


def parts(task, model, tokenizer, **options):
    validation, test = split(task, 0.5, seed=0)
    return validation, prepare(model, tokenizer, test, **options)


def state_of(model):
    """Everything that a control might leave behind."""
    modules = list(model.named_modules())
    return (
        weights_sha256(model),
        [(name, id(module), type(module), module.training, sorted(vars(module))) for name, module in modules],
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in modules],
        model.config.to_dict(),
    )


def log_likelihoods(model, ids, targets):
    """Log-probabilities of tokens at the end of a row, from one plain forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logits[-len(targets) :].gather(1, torch.tensor(targets)[:, None])[:, 0]


def ids_of(text):
    """Tokens of the word-level tokenizer, by hand."""
    return [1, *(int(word[1:]) for word in text.split())]


def test_worked_examples_stand_before_every_prompt_two_line_breaks_apart():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(choices(), model, tokenizer)
    control = few_shot(model, tokenizer, validation, encoded, SETTINGS)
    prompts = [example.prompt for example in control.encoded.task.examples]
    head = prompts[0].removesuffix(encoded.task.examples[0].prompt)
    assert prompts == [head + example.prompt for example in encoded.task.examples]
    shown = head.split("\n\n")
    assert len(shown) == 3
    assert shown[2] == ""
    assert shown[0] != shown[1]
    assert set(shown[:2]) <= {f"{example.prompt} {example.gold}" for example in validation.examples}
    assert control.facts == {"shots": 2, "shortened": 0}


def test_few_shot_scores_are_those_of_plain_passes_over_hand_made_tokens():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(choices(), model, tokenizer)
    control = few_shot(model, tokenizer, validation, encoded, SETTINGS)
    for index, example in enumerate(control.encoded.task.examples):
        before = ids_of(example.prompt)
        found = []
        for choice, sequence in zip(example.choices, control.encoded.sequences[index]):
            answer = [int(word[1:]) for word in choice.split()]
            assert list(sequence.row.ids) == [*before, *answer][:-1]
            assert list(sequence.positions) == [len(before) - 1 + i for i in range(len(answer))]
            assert list(sequence.targets) == answer
            found.append(log_likelihoods(model, [*before, *answer], answer))
        sums = [float(values.sum()) for values in found]
        assert control.scores.correct[index] == (int(np.argmax(sums)) == example.answer)
        assert control.scores.loss[index] == pytest.approx(-float(found[example.answer].mean()), abs=1e-5)


@pytest.mark.parametrize("words", [1, 3])
def test_open_answers_are_scored_behind_worked_examples_too(words):
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(opened(words=words), model, tokenizer)
    control = few_shot(model, tokenizer, validation, encoded, SETTINGS)
    assert control.encoded.single_token == (words == 1)
    for index, example in enumerate(control.encoded.task.examples):
        before, answer = ids_of(example.prompt), [int(word[1:]) for word in example.answer.split()]
        loss = -float(log_likelihoods(model, [*before, *answer], answer).mean())
        assert control.scores.loss[index] == pytest.approx(loss, abs=1e-5)
        ids = list(before)
        for _ in range(words if words == 1 else words + 5):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        said = tokenizer.decode(ids[len(before) :], skip_special_tokens=True).strip()
        assert control.scores.prediction[index] == said


@pytest.mark.parametrize("words", [1, 3])
def test_a_prompt_gets_as_many_worked_examples_as_fit_the_context(words):
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    context = model.config.max_position_embeddings
    examples = [Example(tiny.sentence(20, i), tiny.sentence(words, 50 + i)) for i in range(12)]
    examples += [Example(tiny.sentence(20 * i, i), tiny.sentence(words, 90 + i)) for i in range(1, 7)]
    task = make_task("open", examples)
    validation = make_task("open", task.examples[:12])
    encoded = prepare(model, tokenizer, make_task("open", task.examples[12:]))
    control = few_shot(model, tokenizer, validation, encoded, SETTINGS.model_copy(update={"shots": 4}))
    one = 20 + words
    # One row lacks the last token of its answer; an answer of several words may be continued by five more.
    extra = words - 1 if words == 1 else words + 5
    for before, after in zip(encoded.task.examples, control.encoded.task.examples):
        room = context - 1 - len(before.prompt.split()) - extra
        assert after.prompt.count("\n\n") == min(4, max(0, room // one)), len(before.prompt.split())
    assert control.facts["shortened"] == sum(e.prompt.count("\n\n") < 4 for e in control.encoded.task.examples)
    assert 0 < control.facts["shortened"] < 6


def test_without_room_for_a_worked_example_there_is_no_few_shot_control():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    _, encoded = parts(opened(), model, tokenizer)
    long = make_task("open", [Example(tiny.sentence(126, 1), "w9")] * 2)
    assert "fits" in few_shot(model, tokenizer, long, encoded, SETTINGS)


@pytest.mark.parametrize(
    "task", [texts(), make_task("bare", [Example("", i % 2, ("w5 w6", "w7 w8")) for i in range(4)])]
)
def test_tasks_without_prompts_have_no_few_shot_control(task):
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(task, model, tokenizer)
    assert "prompt" in few_shot(model, tokenizer, validation, encoded, SETTINGS)


def test_a_masked_model_is_shown_answers_in_the_place_of_the_mask():
    model, tokenizer = tiny.build("bert"), tiny.tokenizer(mask=True)
    task = make_task("masks", [Example(f"w9 [MASK] w{10 + i}", i % 2, ("w20", "w30")) for i in range(8)])
    validation, encoded = parts(task, model, tokenizer)
    control = few_shot(model, tokenizer, validation, encoded, SETTINGS)
    golds = {f"w9 {example.gold} {example.prompt.split()[-1]}" for example in validation.examples}
    for example in control.encoded.task.examples:
        *shown, asked = example.prompt.split("\n\n")
        assert set(shown) <= golds
        assert len(shown) == 2
        assert asked.split()[1] == "[MASK]"


def test_worked_examples_are_chosen_by_the_seed():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(choices(24), model, tokenizer)

    def prompt(seed):
        settings = SETTINGS.model_copy(update={"seed": seed})
        return few_shot(model, tokenizer, validation, encoded, settings).encoded.task.examples[0].prompt

    assert prompt(0) == prompt(0)
    assert len({prompt(seed) for seed in range(5)}) > 1


def test_linear_layers_are_found_by_what_they_do_and_not_by_name():
    def found(name):
        model = tiny.build(name)
        return linear_modules(model, find_matrices(model))

    assert len(found("llama")) == 3 * 7
    assert len(found("gpt2")) == 3 * 4  # fused query, key and value are one layer
    experts = tiny.build("mixtral")
    assert set(found("mixtral")) == {
        name for name, module in experts.named_modules() if isinstance(module, torch.nn.Linear) and "self_attn" in name
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon", "gpt_oss", "bert", "t5"])
def test_lora_lowers_the_loss_it_trains_on_and_leaves_the_model_to_the_bit(name):
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    model, tokenizer = tiny.build(name), tiny.tokenizer(mask=True)
    task, matrices = choices(16), find_matrices(model)
    before = state_of(model)
    untrained = evaluate(model, tokenizer, task)["loss"].value
    with adapted(model, tokenizer, task, matrices, SETTINGS) as facts:
        assert evaluate(model, tokenizer, task)["loss"].value < untrained
        trained = [p for n, p in model.named_parameters() if "lora_" in n]
        assert facts["trainable"] == sum(p.numel() for p in trained)
        assert facts["modules"] == len(linear_modules_of_adapter(model)) > 0
    assert (facts["examples"], facts["held_out"]) == (13, 3)
    assert 0 < facts["epochs"] <= facts["recipe"]["epochs"]
    assert state_of(model) == before
    assert evaluate(model, tokenizer, task)["loss"].value == untrained


def linear_modules_of_adapter(model):
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("make", [texts, opened])
def test_lora_trains_on_texts_and_open_answers_too(make):
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), make()
    untrained = evaluate(model, tokenizer, task)["loss"].value
    with adapted(model, tokenizer, task, find_matrices(model), SETTINGS):
        assert evaluate(model, tokenizer, task)["loss"].value < untrained


def test_a_half_precision_model_is_adapted_and_left_as_it_was():
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    model, tokenizer, task = tiny.build("llama").bfloat16(), tiny.tokenizer(), choices(16)
    before = state_of(model)
    untrained = evaluate(model, tokenizer, task)["loss"].value
    with adapted(model, tokenizer, task, find_matrices(model), SETTINGS):
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        assert evaluate(model, tokenizer, task)["loss"].value < untrained
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("name", "make"),
    [("llama", choices), ("llama", opened), ("llama", texts), ("bert", choices), ("t5", choices)],
)
def test_the_loss_that_lora_trains_on_is_the_loss_that_is_scored(name, make):
    model, tokenizer, task = tiny.build(name), tiny.tokenizer(mask=True), make()
    kind = controls_module.model_kind(model, tokenizer)
    options = SearchSettings(batch_tokens=40, window=8 if make is texts else None).encoding
    encoded = controls_module._encode_answers(model, tokenizer, task, task.examples, kind, options)
    assert len(encoded.blocks) > 1
    expected = evaluate(model, tokenizer, task, **options)["loss"].value
    assert controls_module._loss_of(model, encoded) == pytest.approx(expected, abs=1e-5)


def test_a_poisoned_test_set_changes_nothing_of_the_adapter():
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    matrices = find_matrices(model)
    validation, encoded = parts(choices(16), model, tokenizer)
    poison = make_task("poison", [Example(e.prompt, 0, ("w5", "w6 w7")) for e in choices(30, seed=99).examples])

    def facts(validation, encoded):
        found, _ = measure_controls(model, tokenizer, validation, encoded, (), matrices, SETTINGS)
        return found["lora"]

    clean = facts(validation, encoded)
    poisoned = facts(validation, prepare(model, tokenizer, poison))
    assert clean["adapter_sha256"] == poisoned["adapter_sha256"]
    assert clean["loss"].value != poisoned["loss"].value
    assert clean["adapter_sha256"] != facts(choices(16, seed=7), encoded)["adapter_sha256"]


def test_training_that_does_not_help_on_held_out_examples_is_thrown_away(monkeypatch):
    pytest.importorskip("peft", reason="needs the extra 'recover'")

    def spoil(_model, weights, *_arguments):
        for loss in (math.inf, math.nan):
            with torch.no_grad():
                for weight in weights.values():
                    weight.add_(1)
            yield loss

    monkeypatch.setattr(controls_module, "_train", spoil)
    model, tokenizer, task = tiny.build("llama"), tiny.tokenizer(), choices(16)
    encoded = prepare(model, tokenizer, task)
    before = score(model, tokenizer, encoded)
    with adapted(model, tokenizer, task, find_matrices(model), SETTINGS) as facts:
        assert facts["epochs"] == 0
        assert facts["recipe"]["learning_rate"] is None
        assert score(model, tokenizer, encoded).loss == pytest.approx(before.loss, abs=1e-6)


@pytest.mark.parametrize("after", [0, 1, 9])
def test_a_training_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch, after):
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    model, tokenizer = tiny.build("gpt2"), tiny.tokenizer()
    before, run, left = state_of(model), controls_module.run_block, [after]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(controls_module, "run_block", interrupted)
    manager = adapted(model, tokenizer, choices(16), find_matrices(model), SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        manager.__enter__()
    assert state_of(model) == before


def test_lora_is_absent_with_a_reason_where_it_cannot_be_trained(monkeypatch):
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    matrices = find_matrices(model)
    validation, encoded = parts(choices(4), model, tokenizer)
    one = make_task("one", validation.examples[:1])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert "eckart[recover]" in lora(model, tokenizer, validation, encoded, matrices, SETTINGS)
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    assert "two" in lora(model, tokenizer, one, encoded, matrices, SETTINGS)
    assert "linear layer" in lora(model, tokenizer, validation, encoded, [], SETTINGS)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_every_number_goes_to_the_nearest_of_its_rows_255_levels(out, into, seed, size, empty):
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(out, into, generator=generator)
    if empty:
        weight[0] = 0
    numbers, scales = round_to_int8(weight)
    assert (numbers.dtype, scales.shape) == (torch.int8, (out, 1))
    for i in range(out):
        largest = max(abs(float(x)) for x in weight[i])
        step = largest / 127
        for j in range(into):
            value, given_back = float(weight[i, j]), float(numbers[i, j]) * float(scales[i])
            nearest = min(abs(value - level * step) for level in range(-127, 128))
            assert abs(value - given_back) <= nearest + 1e-6 * largest
        assert largest == 0 or numbers[i].abs().max() == 127


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_int8_is_the_rounded_matrix_in_the_place_of_the_cut(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer()
    _, encoded = parts(choices(), model, tokenizer)
    matrices = find_matrices(model)
    before = state_of(model)
    kind = "v_proj" if name == "gpt2" else "fc_in"
    edit = make_edit(next(m for m in matrices if m.type == kind), 0.2)
    control = int8(model, tokenizer, encoded, (edit,), matrices, SETTINGS)
    assert state_of(model) == before
    matrix = by_name(matrices, edit.matrix)
    original = read(model, matrix)
    rounded = original.clone()
    for row in rounded:
        step = float(row.abs().max()) / 127
        for j in range(len(row)):
            row[j] = round(float(row[j]) / step) * step
    write(model, matrix, rounded)
    expected = score(model, tokenizer, encoded)
    write(model, matrix, original)
    assert control.scores.loss == pytest.approx(expected.loss, abs=1e-5)
    assert control.scores.loss != pytest.approx(score(model, tokenizer, encoded).loss, abs=1e-7)
    out, into = matrix.shape
    assert control.facts == {"matrices": [matrix.name], "bytes": out * into + 4 * out, "dense_bytes": 4 * out * into}


def test_gains_are_paired_with_the_unedited_model():
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(choices(40), model, tokenizer)
    matrices = find_matrices(model)
    edit = make_edit(matrices[0], 0.2)
    baseline = score(model, tokenizer, encoded)
    said = []
    found, missing = measure_controls(
        model, tokenizer, validation, encoded, (edit,), matrices, SETTINGS, baseline=baseline, progress=said.append
    )
    assert said == ["control few_shot", "control lora", "control int8"]
    expected = few_shot(model, tokenizer, validation, encoded, SETTINGS).scores
    change = found["few_shot"]["gain"]
    assert change.value == pytest.approx(np.mean(expected.correct.astype(float) - baseline.correct))
    assert change.count == 20
    assert change.p_value is not None
    assert found["few_shot"]["loss_gain"].value == pytest.approx(np.mean(expected.loss - baseline.loss))
    assert found["few_shot"]["accuracy"].value == expected.correct.mean()
    assert {"few_shot", "int8"} <= found.keys()
    assert len(missing) == 3 - len(found)


def test_a_control_that_fails_is_a_warning_and_stops_nothing(monkeypatch):
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    validation, encoded = parts(texts(), model, tokenizer)
    before = state_of(model)

    def out_of_memory(*_arguments):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(controls_module, "lora", out_of_memory)
    found, missing = measure_controls(model, tokenizer, validation, encoded, (), find_matrices(model), SETTINGS)
    assert found == {}
    assert [line.split(" was")[0] for line in missing] == [
        "The control few shot",
        "The control lora",
        "The control int8",
    ]
    assert "no memory is left" in missing[1]
    assert state_of(model) == before


def test_a_search_with_controls_finds_the_same_winner_and_says_more():
    task = choices(24)
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    before = state_of(model)
    plain = search(model, tokenizer, task, SearchSettings(types=("mlp",), rho=(0.1, 0.5), split=0.5))
    more = search(model, tokenizer, task, SearchSettings(types=("mlp",), rho=(0.1, 0.5), split=0.5, controls=True))
    assert more.plan.edits == plain.plan.edits
    assert more.trials == plain.trials
    assert plain.controls.items() <= more.controls.items()
    assert "few_shot" in more.controls
    assert not {"few_shot", "lora", "int8"} & plain.controls.keys()
    assert state_of(model) == before


def test_the_program_prints_and_writes_every_control(tiny_llama_folder, choice_task_file, tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    words = ["--types", "mlp", "--rho", "0.1,0.5", "--split", "0.4", "--controls", "--shots", "1"]
    arguments = ["search", tiny_llama_folder, "--task", choice_task_file, *words]

    def run(out):
        result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        results = json.loads((tmp_path / out / "results.json").read_text())
        return result.stdout, results

    said, results = run("a")
    for name in ("few shot", "lora", "int8"):
        assert any(line.strip().startswith(name) for line in said.splitlines()), said
    found = results["controls"]
    assert found["few_shot"]["shots"] == 1
    for name in ("few_shot", "lora", "int8"):
        assert {"value", "stderr", "count", "unit"} <= found[name]["accuracy"].keys()
        assert found[name]["gain"]["count"] == results["task"]["test"]
        assert math.isfinite(found[name].pop("seconds"))
    again = run("b")[1]["controls"]
    for name in ("few_shot", "lora", "int8"):
        again[name].pop("seconds")
    assert again == found
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Few-shot" in page
    assert "int8" in page
    assert to_json(found)


def test_a_real_model_gets_every_control_and_is_left_as_it_was(shared):
    pytest.importorskip("peft", reason="needs the extra 'recover'")
    from eckart.checkpoint import load
    from eckart.tasks import read_task

    model, tokenizer = load(str(shared / "models" / "stories260K"))
    task = make_task("cloze", read_task(shared / "tasks" / "story_cloze.jsonl").examples[:24])
    validation, encoded = parts(task, model, tokenizer)
    before = state_of(model)
    baseline = score(model, tokenizer, encoded)
    edit = make_edit(find_matrices(model)[3], 0.2)
    found, missing = measure_controls(
        model, tokenizer, validation, encoded, (edit,), find_matrices(model), SearchSettings(), baseline=baseline
    )
    assert missing == ()
    assert list(found) == ["few_shot", "lora", "int8"]
    assert abs(found["int8"]["loss_gain"].value) < 0.01
    assert state_of(model) == before
