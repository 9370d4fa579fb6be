"""What a compressed model can still do, and what `--task` changes: accuracy on tasks of its own domain and of others.

    python benchmarks/compress_task.py SHARED --model stories260K     # or pebble-7m
    python benchmarks/compress_task.py --table

`default` rows are the default of `eckart compress` at each ratio. `task` rows cut with the uniform allocation, on 32
windows, with and without a task in the metrics, so that they differ in nothing else: a fifth of the task takes part,
600 of the others prove. Gains are paired with the row of the same calibration and ratio without a task. Rows are
written as they are made, and a second call makes those that are missing. Seconds are processor seconds.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import eckart
from compress import RESULTS
from eckart.calibration import each_expert, read_windows
from eckart.compression import encode_plain
from eckart.compression_steps import Steps, ranks_of
from eckart.dataflow import evaluating
from eckart.factoring import factor_
from eckart.matrices import find_matrices
from eckart.recipe import CompressSettings
from eckart.results import paired_gain
from eckart.scoring import prepare, score, summarize
from eckart.spill import Spill
from eckart.tasks import make_task, read_task, read_text, split
from eckart.units import edits_of, find_units

# Domain, and its task; the other domain, and its task.
DOMAINS = {"stories260K": ("tinystories", "story_cloze"), "pebble-7m": ("books", "book_cloze")}
OTHERS = {"tinystories": ("books", "book_cloze"), "books": ("tinystories", "story_cloze")}
PROVING, ELSEWHERE = 600, 400
WEIGHTS = (None, 0.25, 0.5, 0.75)


class Bench:
    def __init__(self, shared: Path, name: str):
        self.path = RESULTS / f"task-compress-{name}.json"
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.name, self.shared = name, shared
        self.model, self.tokenizer = eckart.load(str(shared / "models" / name))
        self.domain, self.task = DOMAINS[name]
        other, other_task = OTHERS[self.domain]
        self.choosing, proving = split(read_task(shared / "tasks" / f"{self.task}.jsonl"))
        away = read_task(shared / "tasks" / f"{other_task}.jsonl")
        grammar = read_task(shared / "tasks" / "blimp_half.jsonl")
        step = len(grammar.examples) // ELSEWHERE
        tasks = [
            make_task(self.task, proving.examples[:PROVING]),
            make_task(other_task, away.examples[:ELSEWHERE]),
            make_task("blimp_half", grammar.examples[::step]),
        ]
        self.measured = {task.name: prepare(self.model, self.tokenizer, task) for task in tasks}
        for text in (self.domain, other):
            self.measured[text] = self.windows(f"{text}_validation.txt", 16)

    def windows(self, file: str, count: int):
        return read_windows(read_text(self.shared / "text" / file), self.tokenizer, length=256, count=count)

    def quality(self, model) -> dict:
        found = {}
        for name, encoded in self.measured.items():
            scores = score(model, self.tokenizer, encoded)
            found[name] = {measure: asdict(value) for measure, value in summarize(encoded, scores).items()}
            # For paired gains, in full.
            found[name]["losses"] = [round(float(value), 5) for value in scores.loss]
            found[name]["right"] = None if scores.correct is None else [int(right) for right in scores.correct]
        return found

    def add(self, row: dict) -> None:
        self.rows.append(row)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"model": self.name, "task": self.task, "rows": self.rows}))
        part.replace(self.path)
        print(json.dumps({key: value for key, value in row.items() if key != "quality"}), flush=True)

    def has(self, key: dict) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def cut(self, key: dict, settings: CompressSettings, windows, work: Spill, task) -> None:
        if self.has(key):
            return
        started = time.process_time()
        units, _ = find_units(self.model, find_matrices(self.model), settings)
        steps = Steps(self.model, self.tokenizer, settings, windows, units, work, lambda _: None, task=task)
        with evaluating(self.model), each_expert(self.model):
            curves = steps.curves()
            chosen, choice, _ = steps.choose(curves, steps.budget(curves))
            choice, factors, _ = steps.iterate(curves, choice, steps.budget(curves))
            ranks = ranks_of(curves, choice)
        seconds = time.process_time() - started
        small = copy.deepcopy(self.model)
        factor_(small, edits_of(steps.units, ranks, settings), factors=factors, storage="pivoted")
        self.add({**key, "chosen": chosen, "seconds": seconds, "quality": self.quality(small)})

    def tasks(self, texts: list[str], ratios: list[float]) -> None:
        if not self.has({"kind": "original"}):
            self.add({"kind": "original", "quality": self.quality(self.model)})
        for text in texts:
            windows = self.windows(f"{text}_calibration.txt", 32)
            for weight in WEIGHTS:
                work = Spill(None)
                for ratio in ratios:
                    key = {"kind": "task", "calibration": text, "ratio": ratio, "weight": weight}
                    given = {"ratio": ratio, "windows": 32, "allocate": "uniform", "neurons": False}
                    given["task_weight"] = weight or 0.0
                    settings = CompressSettings.model_validate(given)
                    task = None
                    if weight is not None:
                        task = encode_plain(self.model, self.tokenizer, self.choosing, settings)
                    self.cut(key, settings, windows, work, task)

    def default(self, ratios: list[float]) -> None:
        windows, work = self.windows(f"{self.domain}_calibration.txt", 64), Spill(None)
        for ratio in ratios:
            key = {"kind": "default", "calibration": self.domain, "ratio": ratio}
            self.cut(key, CompressSettings(ratio=ratio), windows, work, None)


def number(found: dict, percent: bool = False) -> str:
    scale = 100 if percent else 1
    return f"{scale * found['value']:.{1 if percent else 2}f} ± {scale * found['stderr']:.{1 if percent else 2}f}"


def table() -> None:
    for name, (domain, own) in DOMAINS.items():
        path = RESULTS / f"task-compress-{name}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())["rows"]
        other, away = OTHERS[domain]
        measures = [own, away, "blimp_half"]
        print(f"\n**{name}**\n\n| default at | " + " | ".join(measures) + f" | perplexity of {domain} | of {other} |")
        print("|---|---|---|---|---|---|")
        for row in sorted(rows, key=lambda row: -row.get("ratio", 1.0)):
            if row["kind"] in ("original", "default"):
                cells = [number(row["quality"][task]["accuracy"], True) for task in measures]
                cells += [number(row["quality"][text]["perplexity"]) for text in (domain, other)]
                print(f"| {row.get('ratio', 'original')} | " + " | ".join(cells) + " |")
        heads = [f"{own}, accuracy", f"{own}, loss", *(f"{task}, loss" for task in measures[1:]), domain, other]
        print("\n| calibrated on | ratio | weight of the task | " + " | ".join(heads) + " |")
        print("|" + "---|" * (3 + len(heads)))
        plain = {(r["calibration"], r["ratio"]): r for r in rows if r["kind"] == "task" and r["weight"] is None}
        for row in (row for row in rows if row["kind"] == "task"):
            before = plain[row["calibration"], row["ratio"]]["quality"]
            cells = []
            for measure, task in (
                ("right", own),
                *(("losses", each) for each in (own, away, "blimp_half", domain, other)),
            ):
                unit = "fraction" if measure == "right" else "nats/token"
                if row["weight"] is None:
                    found = row["quality"][task]["accuracy" if measure == "right" else "loss"]
                    cells.append(number(found, measure == "right"))
                else:
                    gain = paired_gain(before[task][measure], row["quality"][task][measure], unit)
                    scale, digits = (100, 1) if measure == "right" else (1, 3)
                    low, high = (scale * bound for bound in gain.interval)
                    cells.append(f"{scale * gain.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")
            weight = "none" if row["weight"] is None else f"{row['weight']:g}"
            print(f"| {row['calibration']} | {row['ratio']} | {weight} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", nargs="?", type=Path, help="folder with models/, tasks/ and text/")
    parser.add_argument("--model", choices=DOMAINS, default="stories260K")
    parser.add_argument("--only", choices=("task", "default"), help="rows of one kind")
    parser.add_argument("--ratios", default="0.9,0.8,0.6,0.4", help="of the default rows")
    parser.add_argument("--texts", help="calibration texts of the task rows: tinystories,books")
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured")
    given = parser.parse_args()
    if given.table:
        table()
        return
    assert given.shared is not None, "give the folder with models/, tasks/ and text/"
    bench = Bench(given.shared, given.model)
    if given.only != "default":
        texts = [bench.domain, OTHERS[bench.domain][0]] if given.texts is None else given.texts.split(",")
        bench.tasks(texts, [0.6, 0.4])
    if given.only != "task":
        bench.default([float(word) for word in given.ratios.split(",")])


if __name__ == "__main__":
    main()
