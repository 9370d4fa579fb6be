"""Labelled examples: JSON Lines files, whose fields decide how an example is scored.

    {"prompt": "…", "choices": ["…", "…"], "answer": 0}   the choice with the highest log-likelihood
    {"prompt": "…", "answer": "text"}                     an open answer
    {"text": "…"}                                         perplexity

An optional "group" names a part of the task. Nothing here knows what a model is.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eckart.errors import TaskError

Kind = Literal["choice", "open", "text"]
PASSAGE = 2000
"""Characters of a passage of a long text."""


@dataclass(frozen=True)
class Example:
    """One labelled example."""

    prompt: str
    """What the model reads; the whole text for a perplexity task."""
    answer: int | str | None
    """Index into `choices`, the open answer, or None for a perplexity task."""
    choices: tuple[str, ...] = ()
    group: str | None = None
    line: int = 0
    """Line in the file, from 1; 0 where it came from elsewhere."""

    @property
    def gold(self) -> str:
        """The right answer as text."""
        return self.choices[self.answer] if isinstance(self.answer, int) else self.answer or ""


@dataclass(frozen=True)
class Task:
    """Examples of one kind, in the order of their file."""

    name: str
    kind: Kind
    examples: tuple[Example, ...]

    @property
    def sha256(self) -> str:
        """Hash of the contents, whatever the file was called."""
        lines = [[e.prompt, e.answer, list(e.choices), e.group] for e in self.examples]
        return hashlib.sha256(json.dumps([self.kind, lines]).encode()).hexdigest()


def read_task(path: str | Path) -> Task:
    """Read a task from a JSON Lines file.

    Args:
        path: The file, UTF-8; empty lines are skipped.

    Returns:
        The task, named after the file.

    Raises:
        TaskError: The file is missing or empty, or a line is wrong (its number is in the message).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TaskError(
            f"{path} does not exist. A task is a JSON Lines file with one example a line. Check the path."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}. A task is a UTF-8 text file. Check the path.") from None
    examples = []
    # Not splitlines(): it would break at U+2028 and other characters that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            examples.append(_parse(line, number, path.name))
    return make_task(path.stem, examples, source=path.name)


def read_text(path: str | Path, separator: str = "<|endofdoc|>", *, passages: int = 1) -> Task:
    """Read a plain text file as a perplexity task.

    Args:
        path: The file, UTF-8.
        separator: Documents are separated by this string.
        passages: Fewest examples that are wanted; with fewer documents, each is cut at line ends into passages of
            about `PASSAGE` characters.

    Returns:
        A task of kind `text`, one example a document.

    Raises:
        TaskError: The file is missing, unreadable or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}. --text takes a UTF-8 text file. Check the path.") from None
    documents = [part.strip() for part in text.split(separator) if part.strip()]
    if len(documents) < passages:
        documents = [passage for document in documents for passage in _passages(document)]
    return make_task(path.stem, [Example(document, None) for document in documents], source=path.name)


def _passages(document: str) -> list[str]:
    found = [""]
    for line in document.splitlines(keepends=True):
        if len(found[-1]) + len(line) > PASSAGE and found[-1].strip():
            found.append("")
        found[-1] += line
    return [passage.strip() for passage in found if passage.strip()]


def make_task(name: str, examples: Iterable[Example], source: str | None = None) -> Task:
    """Check that examples belong together and make a task of them.

    Args:
        name: The task's name.
        examples: All with choices, all with an open answer, or all text.
        source: How errors refer to where they came from; `name` by default.

    Returns:
        The task.

    Raises:
        TaskError: There is none, or kinds are mixed.

    >>> make_task("capitals", [Example("The capital of France is", "Paris")]).kind
    'open'
    """
    examples = tuple(examples)
    source = source or name
    if not examples:
        raise TaskError(f"{source} holds no example. A task needs at least one line. Check the file.")
    kinds: list[Kind] = [_kind(example) for example in examples]
    for example, kind in zip(examples, kinds):
        if kind != kinds[0]:
            raise TaskError(
                f"{source}, line {example.line}: a '{kind}' example follows '{kinds[0]}' examples. "
                "A task has one kind. Put them into two files."
            )
    return Task(name, kinds[0], examples)


def split(
    task: Task, fraction: float = 0.2, *, seed: int = 0, shuffle: bool = True, examples: int | None = None
) -> tuple[Task, Task]:
    """Divide a task into the examples that choose and the examples that prove.

    Args:
        task: At least two examples.
        fraction: Share that chooses, `0 < fraction < 1`; at least one example, and at least one is left.
        seed: Of the shuffle.
        shuffle: Shuffle before dividing.
        examples: Use at most this many to choose, and all the others to prove.

    Returns:
        (validation, test), which share no example.

    Raises:
        TaskError: `fraction` or `examples` is out of range, or the task has one example.
    """
    if not 0 < fraction < 1:
        raise TaskError(f"split {fraction} is not a share. It lies between 0 and 1, both excluded. Change --split.")
    if examples is not None and examples < 1:
        raise TaskError(f"{examples} examples cannot choose. At least one is needed. Change --examples.")
    total = len(task.examples)
    if total < 2:
        raise TaskError(f"{task.name} has {total} example. Choosing and proving need one each at least. Add examples.")
    order = list(range(total))
    if shuffle:
        random.Random(seed).shuffle(order)  # noqa: S311 - not for secrets
    chosen = min(max(1, round(total * fraction)), total - 1)
    if examples is not None:
        chosen = min(chosen, examples)
    parts = ([task.examples[i] for i in order[:chosen]], [task.examples[i] for i in order[chosen:]])
    return Task(task.name, task.kind, tuple(parts[0])), Task(task.name, task.kind, tuple(parts[1]))


def majority_answer(task: Task) -> str | int | None:
    """Find the answer that is right most often, as a control that looks at no prompt.

    Args:
        task: The examples that choose.

    Returns:
        A label's text where all examples share their choices (or answers are open), else an index; None for
        perplexity tasks.
    """
    if task.kind == "text":
        return None
    same_choices = len({frozenset(example.choices) for example in task.examples}) == 1
    answers: Sequence[Any] = [e.gold if same_choices else e.answer for e in task.examples]
    return Counter(answers).most_common(1)[0][0]


def _kind(example: Example) -> Kind:
    if example.choices:
        return "choice"
    return "text" if example.answer is None else "open"


def _parse(line: str, number: int, source: str) -> Example:
    def fail(problem: str, allowed: str, remedy: str) -> TaskError:
        return TaskError(f"{source}, line {number}: {problem}. {allowed}. {remedy}.")

    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise fail(f"not JSON ({error})", "Each line is one JSON object", "Correct the line") from None
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise fail("half of a surrogate pair", "Text is Unicode", "Correct the escape") from None
    if not isinstance(fields, dict):
        raise fail("not an object", 'A line looks like {"prompt": …, "answer": …}', "Correct the line")
    known = {"prompt", "choices", "answer", "text", "group"}
    if unknown := sorted(set(fields) - known):
        raise fail(f"unknown field {unknown[0]!r}", f"Fields are {', '.join(sorted(known))}", "Remove or rename it")
    group = fields.get("group")
    if group is not None and not isinstance(group, str):
        raise fail("group is not text", "A group is a name", "Correct the line")
    if "text" in fields:
        text = fields["text"]
        if not isinstance(text, str) or not text.strip() or set(fields) - {"text", "group"}:
            raise fail("a text example has other fields or no text", 'It is {"text": "…"}', "Correct the line")
        return Example(text, None, (), group, number)
    prompt, answer, choices = fields.get("prompt"), fields.get("answer"), fields.get("choices")
    if not isinstance(prompt, str):
        raise fail("no prompt", "prompt is a text (it may be empty where there are choices)", "Correct the line")
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            raise fail("no answer", "Without choices, answer is a text that is not empty", "Correct the line")
        return Example(prompt, answer, (), group, number)
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise fail("choices are not texts", "choices is a list of texts that are not empty", "Correct the line")
    if len(choices) < 2:
        raise fail(f"{len(choices)} choice", "A choice is between two or more", "Add choices, or make it open")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise fail(
            f"answer {answer!r} is out of range",
            f"answer is an index from 0 to {len(choices) - 1}",
            "Correct it",
        )
    return Example(prompt, answer, tuple(choices), group, number)
