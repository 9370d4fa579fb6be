"""Tasks by name. Offline: lm-eval reads a YAML task of these tests, CounterFact's records are made up."""

import json
import sys
from types import SimpleNamespace

import pytest

import tiny_models as tiny
from eckart.encoding import encode
from eckart.errors import TaskError
from eckart.sources import COUNTERFACT_ID, counterfact_examples, open_task
from eckart.tasks import read_task

DOCUMENTS = [
    {"question": "w3 w4 w5", "options": ["w6", "w7 w8"], "label": 1},
    {"question": "w9 w10", "options": ["w11", "w12", "w13"], "label": 0},
]
YAML = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
description: "{description}"
doc_to_text: "{text}"
doc_to_target: label
doc_to_choice: "{{{{options}}}}"
target_delimiter: "{delimiter}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "words.jsonl"

    def write(documents=DOCUMENTS, kind="multiple_choice", text="{{question}}", description="", delimiter=" "):
        data.write_text("\n".join(map(json.dumps, documents)))
        path = tmp_path / "words.yaml"
        path.write_text(YAML.format(data=data, kind=kind, text=text, description=description, delimiter=delimiter))
        return path

    return write


def requests(path):
    """The pairs of context and continuation that lm-eval itself would score."""
    from lm_eval.tasks import TaskManager

    (task,) = TaskManager(include_defaults=False).load(str(path))["tasks"].values()
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize(
    "options",
    [{}, {"description": "w1 w2 "}, {"text": "{{question}}\\n", "delimiter": ""}, {"text": "Q: {{question}} A:"}],
)
def test_an_lm_eval_task_gives_the_tokens_that_lm_eval_scores(lm_eval, options):
    path = lm_eval(**options)
    task = open_task(f"lm-eval:{path}")
    assert task.kind == "choice"
    assert [example.answer for example in task.examples] == [1, 0]
    tokenizer = tiny.tokenizer()
    encoded = encode(task, tokenizer, "causal", context=None)
    found = [(s.row.ids[: s.positions[0] + 1], s.targets) for item in encoded.sequences for s in item]
    for (ids, targets), (context, continuation) in zip(found, requests(path), strict=True):
        whole = tokenizer(context + continuation).input_ids
        assert ids + targets == tuple(whole)
        assert len(targets) == len(tokenizer(continuation, add_special_tokens=False).input_ids)


def test_an_answer_may_be_the_text_of_a_choice(lm_eval):
    path = lm_eval([DOCUMENTS[0] | {"label": "w7 w8"}])
    assert open_task(f"lm-eval:{path}").examples[0].gold == "w7 w8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "generate_until"}, "of type generate_until"),
        ({"documents": [DOCUMENTS[0] | {"label": "w9"}]}, "document 0"),
        ({"documents": [DOCUMENTS[0], DOCUMENTS[1] | {"label": 7}]}, "document 1"),
        ({"delimiter": ""}, "puts nothing between"),
    ],
)
def test_an_lm_eval_task_that_is_none_of_choices_is_refused(lm_eval, options, message):
    with pytest.raises(TaskError, match=message):
        open_task(f"lm-eval:{lm_eval(**options)}")


def test_a_name_that_lm_eval_does_not_know_is_refused(lm_eval, tmp_path):
    with pytest.raises(TaskError, match="could not load"):
        open_task(f"lm-eval:{tmp_path / 'missing.yaml'}")


@pytest.mark.parametrize(("name", "module"), [("lm-eval:arc_easy", "lm_eval.tasks"), ("counterfact", "datasets")])
def test_what_is_not_installed_is_said_with_the_extra_that_brings_it(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TaskError, match=r"pip install 'eckart\[eval\]'"):
        open_task(name)


def record(prompt, subject, answer):
    target = {"str": answer, "id": "Q1"}
    rewrite = {"prompt": prompt, "subject": subject, "target_true": target, "relation_id": "P1", "target_new": target}
    return {"requested_rewrite": rewrite, "paraphrase_prompts": [f"Someone said. {subject} speaks"]}


RECORDS = [record("The mother tongue of {} is", "Danielle {Darrieux}", " French"), record("{} plays", "Mario", "tuba")]


def test_a_record_of_counterfact_is_its_first_question_with_the_true_answer():
    first, second = counterfact_examples(RECORDS)
    assert (first.prompt, first.gold, first.group) == (
        "The mother tongue of Danielle {Darrieux} is",
        "French",
        "P1",
    )
    assert (second.prompt, second.gold, second.choices) == ("Mario plays", "tuba", ())


@pytest.mark.parametrize("broken", [{}, {"requested_rewrite": None}, {"requested_rewrite": {"prompt": 3}}])
def test_a_record_without_its_fields_is_refused_with_its_number(broken):
    with pytest.raises(TaskError, match="record 1"):
        list(counterfact_examples([RECORDS[0], broken]))


def test_counterfact_is_both_splits_of_its_data_set_at_one_commit(monkeypatch):
    asked = []

    def load_dataset(name, revision):
        asked.append((name, len(revision)))
        return {"train": RECORDS[:1], "test": RECORDS[1:]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = open_task("counterfact")
    assert asked == [(COUNTERFACT_ID, 40)]
    assert (task.name, task.kind) == ("counterfact", "open")
    assert [example.gold for example in task.examples] == ["tuba", "French"]


def test_a_task_that_cannot_be_fetched_is_an_error_of_the_task(monkeypatch):
    def load_dataset(*_args, **_options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TaskError, match="no route"):
        open_task("counterfact")


def test_any_other_name_is_a_file(choice_task_file):
    assert open_task(str(choice_task_file)) == read_task(choice_task_file)
