"""Tasks by name: files, the multiple-choice tasks of lm-eval, and CounterFact.

Only a name reaches the network: lm-eval fetches the data of its tasks from the hub, where CounterFact lies, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eckart.encoding import join
from eckart.errors import TaskError
from eckart.tasks import Example, Task, make_task, read_task

LM_EVAL = "lm-eval:"
COUNTERFACT = "counterfact"
# A copy of the file of rome.baulab.info, in two splits, as of one commit.
COUNTERFACT_ID = "azhx/counterfact"
COUNTERFACT_REVISION = "c01c413f856ee38f5c080c9fc5e87aff478e2ff9"


def open_task(name: str) -> Task:
    """Read a task from a JSON Lines file, or load one that has a name.

    Args:
        name: `lm-eval:NAME` (a task, group or tag of lm-eval, or the path of a YAML file that defines one),
            `counterfact`, or a path; a file called `counterfact` is `./counterfact`.

    Returns:
        The task.

    Raises:
        TaskError: There is no such task, it cannot be fetched, or it has no choices.
    """
    if name.startswith(LM_EVAL):
        return _lm_eval(name.removeprefix(LM_EVAL))
    if name == COUNTERFACT:
        return make_task(COUNTERFACT, counterfact_examples(_counterfact_rows()))
    return read_task(name)


def _lm_eval(name: str) -> Task:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(
            f"{LM_EVAL}{name} needs lm-eval, which cannot be imported ({error}). It is optional. "
            "pip install 'eckart[eval]'."
        ) from None
    try:
        # A file needs no index of lm-eval's thousands of tasks, which takes seconds.
        found = TaskManager(include_defaults=not Path(name).is_file()).load(name)["tasks"]
    except Exception as error:  # whatever lm-eval, datasets and the network raise
        raise TaskError(
            f"lm-eval could not load {name!r}: {type(error).__name__}: {error}. It takes the name of a task or a YAML "
            "file, and fetches most data from the hub. Check the name (lm-eval ls tasks) and the network."
        ) from error
    examples = [
        example
        for part, task in sorted(found.items())
        for example in lm_eval_examples(task, part if len(found) > 1 else None)
    ]
    return make_task(Path(name).stem, examples, source=f"{LM_EVAL}{name}")


def lm_eval_examples(task: Any, group: str | None = None) -> Iterator[Example]:
    """Turn the documents that lm-eval evaluates into examples.

    Args:
        task: A multiple-choice task of lm-eval. Its prompts hold as many worked examples as it asks for itself.
        group: What the examples are called where several tasks are one.

    Yields:
        One example a document, with the tokens that lm-eval scores.

    Raises:
        TaskError: The task is of another type, or its prompts differ between choices.
    """
    name, kind = task.config.task, task.config.output_type
    if kind != "multiple_choice" or task.multiple_input or task.multiple_target:
        what = f"is of type {kind}" if kind != "multiple_choice" else "has several prompts or right answers a question"
        raise TaskError(
            f"{LM_EVAL}{name} {what}. A task of choices has one prompt, and one right answer among several. "
            "Choose another task, or write its examples as JSON Lines."
        )
    for number, doc in enumerate(task.eval_docs):
        prompt = task.fewshot_context(doc, task.config.num_fewshot or 0)
        choices = tuple(_answer(prompt, task.config.target_delimiter, choice) for choice in task.doc_to_choice(doc))
        answer = task.doc_to_target(doc)
        if isinstance(answer, str):
            answer = task.doc_to_choice(doc).index(answer) if answer in task.doc_to_choice(doc) else -1
        if not isinstance(answer, int) or not 0 <= answer < len(choices) or len(choices) < 2:
            raise TaskError(
                f"{LM_EVAL}{name}, document {number}: the right answer is {answer!r} of {len(choices)} choices. "
                "It is the index or the text of one of two or more. Choose a split that has labels."
            )
        yield Example(prompt, answer, choices, group)


def _answer(prompt: str, delimiter: str, choice: str) -> str:
    """The choice as it is shown, if that joins the prompt as lm-eval joins them, else with the delimiter."""
    whole = delimiter + choice
    if "".join(join(prompt, choice)) == prompt + whole:
        return choice
    if "".join(join(prompt, whole)) == prompt + whole:
        return whole
    raise TaskError(
        f"lm-eval puts nothing between the prompt {prompt[-20:]!r} and the choice {choice!r}. eckart joins them by a "
        "space, unless either brings white space. Choose a task with another target_delimiter."
    )


def counterfact_examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Turn records of CounterFact into open questions.

    Args:
        rows: Records as in ROME's counterfact.json.

    Yields:
        The first question of each fact, with the true answer.

    Raises:
        TaskError: A record lacks its fields.

    Source:
        Meng et al., arXiv 2202.05262; as LASER uses it (arXiv 2312.13558), but without the two paraphrases of every
        question: with them, a fact could both choose and prove.
    """
    for number, row in enumerate(rows):
        try:
            rewrite = row["requested_rewrite"]
            prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
            answer = rewrite["target_true"]["str"].strip()
        except (KeyError, TypeError, AttributeError) as error:
            raise TaskError(
                f"CounterFact, record {number}: no prompt, subject or target_true ({error!r}). A record is as in "
                "counterfact.json of rome.baulab.info. Check where it came from."
            ) from None
        yield Example(prompt, answer, group=rewrite.get("relation_id"))


def _counterfact_rows() -> Iterator[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TaskError(
            f"{COUNTERFACT} needs datasets, which cannot be imported ({error}). It is optional. "
            "pip install 'eckart[eval]'."
        ) from None
    try:
        splits: Any = load_dataset(COUNTERFACT_ID, revision=COUNTERFACT_REVISION)
    except Exception as error:  # whatever datasets and the network raise
        raise TaskError(
            f"{COUNTERFACT} could not be fetched: {type(error).__name__}: {error}. It is the data set {COUNTERFACT_ID} "
            "on the hub. Check the network, or give a JSON Lines file."
        ) from error
    for name in sorted(splits):
        yield from splits[name]
