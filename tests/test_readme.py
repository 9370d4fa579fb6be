"""What the README shows is what a user gets."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def part(name):
    return README.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]


def test_the_demo_prints_what_the_readme_shows(program, tmp_path):
    result = program("demo", "--out", tmp_path / "demo")
    assert result.status == 0, result.err
    printed = {line.strip() for line in result.out.splitlines()}
    shown = [line.strip() for line in part("demo output").strip().strip("`").splitlines() if line.strip()]
    assert len(shown) > 12
    for line in shown:
        # The time and the folder are the reader's own.
        if not re.match(r"Tried|Report:|Plan:", line):
            assert line in printed


def test_the_python_of_the_readme_runs(tiny_llama_folder, choice_task_file, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    block = block.replace("path/to/model", str(tiny_llama_folder)).replace("mine.jsonl", str(choice_task_file))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"(?:src|docs|scripts|benchmarks|tests)/[\w./-]*|\b[A-Z]+\.(?:md|cff)\b", README)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("target", ["setup", "demo", "demo-edge", "test", "check", "bench"])
def test_every_make_target_of_the_documents_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
