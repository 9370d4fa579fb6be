"""Tasks: what is read is what was written, the split is a partition, and no bytes at all break the reader."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eckart.errors import TaskError
from eckart.tasks import Example, Task, majority_answer, make_task, read_task, read_text, split

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
# No lone surrogates: they cannot be written as UTF-8.
words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
solid = words.filter(str.strip)
choice_lines = st.lists(solid, min_size=2, max_size=5).flatmap(
    lambda choices: st.fixed_dictionaries(
        {"prompt": words, "choices": st.just(choices), "answer": st.integers(0, len(choices) - 1)},
        optional={"group": words},
    )
)
open_lines = st.fixed_dictionaries({"prompt": words, "answer": solid}, optional={"group": words})
text_lines = st.fixed_dictionaries({"text": solid}, optional={"group": words})
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["prompt", "choices", "answer", "text", "group", "more"])


@files
@given(
    lines=st.one_of(*(st.lists(kind, min_size=1, max_size=8) for kind in (choice_lines, open_lines, text_lines))),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_what_is_read_is_what_was_written(lines, ascii_only, end, tmp_path):
    path = tmp_path / "task.jsonl"
    text = end.join(json.dumps(line, ensure_ascii=ascii_only) for line in lines)
    path.write_bytes(text.encode())
    task = read_task(path)
    assert task.name == "task"
    assert task.kind == ("text" if "text" in lines[0] else "choice" if "choices" in lines[0] else "open")
    assert len(task.examples) == len(lines)
    for example, line in zip(task.examples, lines):
        assert example.prompt == line.get("prompt", line.get("text"))
        assert example.answer == line.get("answer")
        assert list(example.choices) == line.get("choices", [])
        assert example.group == line.get("group")
        answer = line.get("answer", "")
        assert example.gold == (line["choices"][answer] if "choices" in line else answer)


@files
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_task_or_a_task_error(content, may_refuse, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_bytes(content)
    for reader in (read_task, read_text):
        with may_refuse(TaskError, "task.jsonl"):
            assert reader(path).examples


@files
@given(lines=st.lists(st.dictionaries(FIELDS, anything, max_size=4) | anything, max_size=3))
def test_any_json_is_a_task_or_an_error_that_names_the_line(lines, may_refuse, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with may_refuse(TaskError, "line " if lines else "no example"):
        read_task(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(character, tmp_path):
    path = tmp_path / "task.jsonl"
    escaped = json.dumps({"prompt": f"a{character}b", "answer": "c"})
    raw = escaped if character in "\x0b\x0c\x1c" else json.dumps(json.loads(escaped), ensure_ascii=False)
    path.write_text(f"{raw}\n{escaped}", encoding="utf-8")
    assert [example.prompt for example in read_task(path).examples] == [f"a{character}b"] * 2


@pytest.mark.parametrize("lines", [[b'{"text": "a"}'], [b"plain text"]])
def test_a_byte_order_mark_is_not_text(lines, tmp_path):
    path = tmp_path / "task"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0])
    reader = read_task if lines[0].startswith(b"{") else read_text
    assert reader(path).examples[0].prompt in ("a", "plain text")


@given(
    total=st.integers(2, 60),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31 - 1),
    shuffle=st.booleans(),
    most=st.none() | st.integers(1, 70),
)
def test_a_split_is_a_partition(total, fraction, seed, shuffle, most):
    task = make_task("t", [Example(f"{i}", "a") for i in range(total)])
    chosen, proving = split(task, fraction, seed=seed, shuffle=shuffle, examples=most)
    assert chosen.examples
    assert proving.examples
    found = [int(example.prompt) for part in (chosen, proving) for example in part.examples]
    assert sorted(found) == list(range(total))
    if not shuffle:
        assert found == list(range(total))
    assert len(chosen.examples) <= (most or total)
    if most is None:
        assert abs(len(chosen.examples) - fraction * total) <= 1
    assert (chosen, proving) == split(task, fraction, seed=seed, shuffle=shuffle, examples=most)


def test_another_seed_shuffles_otherwise():
    task = make_task("t", [Example(f"{i}", "a") for i in range(50)])
    assert len({split(task, seed=seed)[0].examples for seed in range(10)}) == 10


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.1, float("nan")])
def test_a_split_outside_its_range_is_refused(fraction):
    with pytest.raises(TaskError, match="split"):
        split(make_task("t", [Example("a", "b")] * 3), fraction)


def test_a_split_needs_two_examples_and_one_that_chooses():
    with pytest.raises(TaskError, match="1 example"):
        split(make_task("t", [Example("a", "b")]))
    with pytest.raises(TaskError, match="0 examples"):
        split(make_task("t", [Example("a", "b")] * 3), examples=0)


def test_the_hash_depends_on_the_contents_and_on_nothing_else(tmp_path):
    lines = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}, {"prompt": "d", "choices": ["b", "c"], "answer": 1}]

    def digest(lines, name="one.jsonl", blank=""):
        (tmp_path / name).write_text(blank + "\n".join(json.dumps(line) for line in lines))
        return read_task(tmp_path / name).sha256

    same = digest(lines)
    assert digest(lines, "two.jsonl", "\n\n") == same
    changed = [
        lines[::-1],
        lines[:1],
        [lines[0] | {"prompt": "b"}, lines[1]],
        [lines[0] | {"answer": 1}, lines[1]],
        [lines[0] | {"choices": ["b", "d"]}, lines[1]],
        [lines[0] | {"group": "g"}, lines[1]],
    ]
    digests = {digest(other) for other in changed}
    assert len(digests) == len(changed)
    assert same not in digests


def test_documents_of_a_text_are_its_examples(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n<|endofdoc|>\n\n<|endofdoc|>three ", encoding="utf-8")
    task = read_text(path)
    assert task.kind == "text"
    assert [example.prompt for example in task.examples] == ["one\ntwo", "three"]
    assert [example.prompt for example in read_text(path, "\n\n").examples] == [
        "one\ntwo\n<|endofdoc|>",
        "<|endofdoc|>three",
    ]


def test_kinds_do_not_mix():
    with pytest.raises(TaskError, match="'open' example follows 'choice'"):
        make_task("t", [Example("a", 0, ("b", "c")), Example("a", "b")])


@given(answers=st.lists(st.sampled_from("abc"), min_size=1))
def test_the_majority_answer_is_the_commonest(answers):
    counts = Counter(answers)
    found = majority_answer(Task("t", "open", tuple(Example("p", answer) for answer in answers)))
    assert counts[found] == max(counts.values())


def test_the_majority_answer_is_a_label_where_labels_are_shared_and_an_index_elsewhere():
    shared = [Example("p", 0, ("yes", "no")), Example("q", 1, ("no", "yes")), Example("r", 1, ("yes", "no"))]
    assert majority_answer(make_task("t", shared)) == "yes"
    distinct = [Example("p", 1, ("a", "b")), Example("q", 1, ("c", "d")), Example("r", 0, ("e", "f"))]
    assert majority_answer(make_task("t", distinct)) == 1
    assert majority_answer(make_task("t", [Example("p", None)])) is None
