"""Does surgery without labels help? LaserRMT's loop with its own threshold, with right ones, and with shrinkage.

    OMP_NUM_THREADS=1 python benchmarks/label_free.py       # about ten minutes on one core
    python benchmarks/label_free.py --table                 # the saved results as Markdown

Passages of a text choose the edits, other passages prove them, and a task that took no part tells whether a lower
perplexity means more right answers.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from eckart.checkpoint import load
from eckart.laser import search
from eckart.recipe import SearchSettings
from eckart.results import environment, paired_gain, to_json
from eckart.scoring import prepare, score, summarize
from eckart.surgery import applied
from eckart.tasks import Example, make_task, read_task, read_text

RESULTS = Path(__file__).parent / "results" / "label_free.json"
CASES = (
    ("stories260K", "tinystories_validation.txt", "story_cloze"),
    ("pebble-7m", "books_validation.txt", "book_cloze"),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "compatible: laserrmt": {"rank_rule": ("laserrmt",)},
    "corrected: mp": {"rank_rule": ("mp",)},
    "corrected: gavish-donoho": {"rank_rule": ("gavish-donoho",)},
    "shrinkage: mp": {"rank_rule": ("mp",), "kind": "shrink"},
    "shrinkage: gavish-donoho": {"rank_rule": ("gavish-donoho",), "kind": "shrink"},
}


def measure(model_name: str, text_name: str, task_name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, tokenizer = load(str(options.shared / "models" / model_name), device="cpu")
    text = read_text(options.shared / "text" / text_name, passages=options.passages)
    text = make_task(
        text.name, [Example(e.prompt[: options.characters], None) for e in text.examples[: options.passages]]
    )
    task = read_task(options.shared / "tasks" / f"{task_name}.jsonl")
    task = replace(task, examples=task.examples[: options.examples])
    encoded = prepare(model, tokenizer, task)
    before = score(model, tokenizer, encoded)
    rows = []
    for name, variant in VARIANTS.items():
        settings = SearchSettings(strategy="laserrmt", objective="perplexity", split=0.25, shortlist=15, **variant)
        began = time.perf_counter()
        found = search(model, tokenizer, text, settings)
        seconds = time.perf_counter() - began
        with applied(model, found.plan.edits):
            after = score(model, tokenizer, encoded)
        trials = (*found.trials, *found.compositions)
        rows.append(
            {
                "model": model_name,
                "text": text_name,
                "task": task_name,
                "variant": name,
                "tried": len(trials),
                "kept": [(e.matrix, e.rank, e.full_rank) for e in found.plan.edits],
                "passages": [found.facts["task"]["validation"], found.facts["task"]["test"]],
                "validation": [found.baseline["validation"]["perplexity"], found.best["validation"]["perplexity"]],
                "test": [found.baseline["test"]["perplexity"], found.best["test"]["perplexity"]],
                "loss_gain": found.loss_gain,
                "accuracy": [summarize(encoded, scores)["accuracy"] for scores in (before, after)],
                "gain": paired_gain(before.correct, after.correct, "fraction"),
                "seconds": seconds,
            }
        )
        print(to_json(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | variant | tried, kept | validation perplexity | test perplexity | change of test loss, 95 % | task "
        "| accuracy | change, 95 % |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        choose, prove = (" → ".join(f"{m['value']:.3f}" for m in row[part]) for part in ("validation", "test"))
        accuracy = " → ".join(f"{100 * m['value']:.1f} ± {100 * m['stderr']:.1f} %" for m in row["accuracy"])
        loss, gain = row["loss_gain"], row["gain"]
        change = "–" if loss is None else f"{loss['value']:+.4f} ({_interval(loss, 1, '.4f')})"
        lines.append(
            f"| {row['model']} | {row['variant']} | {row['tried']}, {len(row['kept'])} | {choose} | {prove} | {change} "
            f"| {row['task']} | {accuracy} | {100 * gain['value']:+.1f} % ({_interval(gain, 100, '.1f')}) |"
        )
    return "\n".join(lines)


def _interval(gain: dict[str, Any], scale: float, digits: str) -> str:
    return " to ".join(f"{scale * end:+{digits}}" for end in gain["interval"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the saved results; measure nothing")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with models, text and tasks")
    parser.add_argument("--passages", type=int, default=200, help="of the text: a quarter chooses, the others prove")
    parser.add_argument("--characters", type=int, default=600, help="of each passage: its beginning")
    parser.add_argument("--examples", type=int, default=300, help="of the task")
    options = parser.parse_args()
    if not options.table:
        rows = []
        for case in CASES:
            rows += measure(*case, options)
            RESULTS.write_text(to_json({"rows": rows, "environment": environment()}), encoding="utf-8")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
