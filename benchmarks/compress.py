"""Compress two models in every way, and measure what is left of them.

    python benchmarks/compress.py SHARED --model stories260K --draws 3
    python benchmarks/compress.py --table
    python benchmarks/compress.py SHARED --model minilm      # an encoder: benchmarks/compress_encoder.py

Every row is one way at one ratio on one draw of calibration windows: the first 64 windows of 256 tokens, the next 64,
and so on. Matrices are cut by rank alone without compensation, and budgets divided once; the last way is the default of
`eckart compress`, which also removes neurons and dimensions of heads, makes up for what a block lacks, and moves budget
between matrices afterwards. Perplexity is that of the first 64 windows of the validation text, and of 16 windows of the
other model's; accuracy that of the first 500 examples of a cloze task on text of the model's own kind.
Rows are written as they are made, and a second call makes those that are missing. Seconds are processor seconds of this
process, since the machine is shared; a row's are those of its own steps, and reading the text is a row of its own.
"""

import argparse
import copy
import dataclasses
import fcntl
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

import eckart
from eckart.calibration import each_expert, read_windows
from eckart.compression_steps import Steps, ranks_of
from eckart.dataflow import evaluating
from eckart.factoring import factor_
from eckart.matrices import find_matrices, read, write
from eckart.recipe import CompressSettings
from eckart.scoring import prepare, score, summarize
from eckart.spill import Spill
from eckart.tasks import read_task, read_text
from eckart.truncation import round_to_int8
from eckart.units import edits_of, find_units

RESULTS = Path(__file__).parent / "results"
TEXTS = {"stories260K": ("tinystories", "books"), "pebble-7m": ("books", "tinystories")}
TASKS, EXAMPLES = {"stories260K": "story_cloze", "pebble-7m": "book_cloze"}, 500
"""What accuracy is measured on."""
# method, allocations, storages; the first that fits a method reads the text for it.
WAYS = [
    ("svd", ["uniform"], ["factored", "pivoted"]),
    ("fwsvd", ["uniform"], ["pivoted"]),
    ("asvd", ["uniform"], ["factored", "pivoted"]),
    ("whiten", ["uniform"], ["factored", "pivoted"]),
    ("double", ["uniform", "tail", "measured"], ["factored", "pivoted"]),
    ("monarch", ["uniform"], ["factored"]),  # which it is neither of; its numbers are those of factors
    ("lowrank+sparse", ["uniform"], ["pivoted"]),
    ("propagated", ["auto"], ["factored"]),
    ("propagated", ["uniform", "auto"], ["pivoted"]),
    ("propagated", ["auto"], ["pivoted, default"]),
]
ROUNDED = [("int8", 8), ("int4", 4), ("int4, groups of 32", 4)]
MORE = ["sensitivity", "groups", "signed", "mp", "effective-rank"]
"""Other allocations, compared with `double` and pivoted storage."""


def round_(model, method: str, bits: int) -> float:
    """Round the matrices of a model; give the share of the bytes that they take in 16 bits."""
    numbers, taken = 0, 0.0
    units, _ = find_units(model, find_matrices(model), CompressSettings(ratio=0.5))
    for unit in units:
        for matrix in unit.matrices:
            weight = read(model, matrix)
            size = 32 if "groups" in method else weight.shape[1]
            size = size if weight.shape[1] % size == 0 else weight.shape[1]
            rows = weight.reshape(-1, size)
            if bits == 8:
                integers, scales = round_to_int8(rows)
            else:
                scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
                integers = (rows / scales).round().clamp(-7, 7)
            write(model, matrix, (integers * scales).reshape(weight.shape))
            numbers += weight.numel()
            taken += weight.numel() * bits / 8 + 2 * len(rows)
    return taken / (2 * numbers)


def measure(model, tokenizer, encoded, what="perplexity"):
    found = summarize(encoded, score(model, tokenizer, encoded))[what]
    return {"value": found.value, "stderr": found.stderr, "count": found.count}


class Bench:
    def __init__(self, shared: Path, name: str, draws: int, ratios: list[float], only: str | None):
        self.name, self.draws, self.ratios, self.only = name, draws, ratios, only
        self.path = RESULTS / f"compress-{name}.json"
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.model, self.tokenizer = eckart.load(str(shared / "models" / name))
        own, other = TEXTS[name]
        text = shared / "text"
        self.calibration = read_text(text / f"{own}_calibration.txt")
        self.inside = self.windows(read_text(text / f"{own}_validation.txt"), 64)
        self.outside = self.windows(read_text(text / f"{other}_validation.txt"), 16)
        task = read_task(shared / "tasks" / f"{TASKS[name]}.jsonl")
        few = dataclasses.replace(task, examples=task.examples[:EXAMPLES])
        self.cloze = prepare(self.model, self.tokenizer, few)

    def windows(self, task, count, first=0):
        return read_windows(task, self.tokenizer, length=256, count=count, first=first)

    def has(self, **key) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict) -> None:
        RESULTS.mkdir(exist_ok=True)
        # Several processes may work on one file, each on rows of its own.
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
            self.rows = [*held, row]
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"model": self.name, "rows": self.rows}, indent=1))
            part.replace(self.path)
        print(json.dumps(row), flush=True)

    def quality(self, model) -> dict:
        return {
            "inside": measure(model, self.tokenizer, self.inside),
            "outside": measure(model, self.tokenizer, self.outside),
            "accuracy": measure(model, self.tokenizer, self.cloze, "accuracy"),
        }

    def dense(self) -> None:
        if not self.has(method="dense"):
            self.add({"method": "dense", **self.quality(self.model)})
        for method, bits in ROUNDED:
            if self.has(method=method):
                continue
            small = copy.deepcopy(self.model)
            share = round_(small, method, bits)
            self.add({"method": method, "bytes": share, **self.quality(small)})

    def run(self) -> None:
        self.dense()
        for draw in range(self.draws):
            windows = self.windows(self.calibration, 64, 64 * draw)
            work: dict[str, Spill] = {}
            for ratio in self.ratios:
                for method, allocations, storages in WAYS:
                    for allocate in allocations:
                        for storage in storages:
                            self.row(windows, work, draw, ratio, method, allocate, storage)
                for allocate in MORE if self.only is None else ():
                    self.row(windows, work, draw, ratio, "double", allocate, "pivoted")

    def row(self, windows, work, draw, ratio, method, allocate, storage) -> None:
        key = {"draw": draw, "ratio": ratio, "method": method, "allocate": allocate, "storage": storage}
        if self.has(**key) or (self.only is not None and f"{method} {allocate} {storage}" != self.only):
            return
        default = storage.endswith("default")
        storage = storage.split(",")[0]
        settings = CompressSettings(ratio=ratio, method=method, allocate=allocate, storage=storage)
        if not default:
            settings = settings.model_copy(update={"neurons": False, "compensation": 0.0})
        units, _ = find_units(self.model, find_matrices(self.model), settings)
        spill = work.setdefault(f"{method}, {default}", Spill(None))
        steps = Steps(self.model, self.tokenizer, settings, windows, units, spill, lambda _: None)
        with evaluating(self.model), each_expert(self.model):
            start = time.process_time()
            fresh = spill.tensors(units[0].name) is None
            curves = steps.curves()
            read_seconds = time.process_time() - start
            if fresh and not self.has(draw=draw, method=method, allocate="reading"):
                self.add({"draw": draw, "method": method, "allocate": "reading", "seconds": read_seconds})
            start = time.process_time()
            chosen, choice, divergence = steps.choose(curves, steps.budget(curves))
            rounds = []
            if default:
                choice, factors, rounds = steps.iterate(curves, choice, steps.budget(curves))
            else:
                # The table shows every allocation as it is, not the better one of it and uniform.
                if allocate not in ("auto", "uniform") and chosen != allocate:
                    choice = steps.allocation(allocate, curves, steps.budget(curves))
                factors = steps.factors(ranks_of(curves, choice))
            ranks = ranks_of(curves, choice)
            seconds = time.process_time() - start
        small = copy.deepcopy(self.model)
        made = factor_(small, edits_of(steps.units, ranks, settings), factors=factors, storage=storage)
        spent = float(sum(curve.costs[choice[curve.name]] for curve in curves))
        self.add(
            {
                **key,
                "chosen": chosen,
                "divergence": {name: value.value for name, value in divergence.items()},
                "rounds": [value.value for value in rounds],
                "kept": spent / float(sum(curve.costs[-1] for curve in curves)),
                "parameters": made.after.parameters,
                **self.quality(small),
                "seconds": seconds,
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )


WIDTH, HIDDEN, BLOCKS, TOKENS = 4096, 11008, 32, 64 * 256
"""Of a 7 B Llama and its blocks, and of the text."""


READING = 3
"""Passes of one reading: forward, forward again a block at a time, and back for gradients."""
PASSES = READING + 2 * 5 + 2


def block_of_7b() -> dict:
    """Time the parts of compressing a block shaped as that of a 7 B Llama, at an eighth and a quarter; extrapolate.

    The parts, by the steps of `compress` with method `propagated`: moments of inputs and gradients; two decompositions
    in the metric of every matrix, one to allocate and one for the propagated inputs; moments of these inputs, twice,
    for both streams; passes: two forward and one for gradients to read, then twice forward for every one of four groups
    of matrices and to go on, and twice to find what is added to what. A pass is what its products take. Since not all
    moments fit, the text is read again, through every block, for each of their groups: a part of its own.
    """
    from eckart.weighting import decompose_weighted, square_root

    matrices = ((4, WIDTH, WIDTH), (2, HIDDEN, WIDTH), (1, WIDTH, HIDDEN))
    parts: dict[str, dict[int, float]] = {"decompositions": {}, "moments": {}, "passes": {}}
    for divisor in (8, 4):
        seconds = dict.fromkeys(parts, 0.0)
        few = 2048
        for count, out, into in ((count, out // divisor, into // divisor) for count, out, into in matrices):
            weight = torch.randn(out, into)
            x, g = torch.randn(few, into), torch.randn(few, out)
            start = time.process_time()
            inputs = (x.T @ x).double()
            of_inputs = time.process_time()
            gradients = (g.T @ g).double()
            of_gradients = time.process_time()
            # Query, key and value read the same, and so do gate and up: their inputs are summed once.
            shared = {4: 2, 2: 1, 1: 1}[count]
            seconds["moments"] += 3 * shared * (of_inputs - start) + count * (of_gradients - of_inputs)
            left, right = square_root(gradients, shrinkage=0.3), square_root(inputs, shrinkage=0.1)
            decompose_weighted(weight, left, right)
            seconds["decompositions"] += 2 * count * (time.process_time() - of_gradients)
            start = time.process_time()
            _ = x @ weight.T
            seconds["passes"] += PASSES * count * (time.process_time() - start)
        for part in ("moments", "passes"):
            seconds[part] *= TOKENS / few
        for part, value in seconds.items():
            parts[part][WIDTH // divisor] = value
    found: dict[str, dict] = {}
    for part, (small, large) in ((part, tuple(held.values())) for part, held in parts.items()):
        # Products of a fixed number of tokens grow by the square of the width; decompositions as they were seen to.
        power = float(np.log2(large / small)) if part == "decompositions" else 2.0
        found[part] = {"seconds": parts[part], "power": power, "extrapolated": large * 4**power}
    numbers = sum(count * (out**2 + into**2) for count, out, into in matrices)
    # A model in float32 lets so many bytes of moments be held at once as it takes itself.
    weights = sum(count * out * into for count, out, into in matrices)
    readings = -(-8 * numbers // (4 * weights))
    found["readings again"] = {"extrapolated": (readings - 1) * READING * found["passes"]["extrapolated"] / PASSES}
    return {
        **found,
        "extrapolated": sum(each["extrapolated"] for each in found.values()),
        "weights": weights,
        # What is summed in float64 for all matrices of the block.
        "moments_bytes": 8 * numbers,
        "readings": readings,
    }


def way_of(row: dict) -> tuple[str, str, str]:
    return row["method"], row["allocate"], row["storage"]


def percent(rows: list[dict]) -> str:
    """Accuracy over the draws of one way, with the standard error over examples of one."""
    values = [row["accuracy"] for row in rows if "accuracy" in row]
    if not values:
        return ""
    return f"{100 * np.mean([v['value'] for v in values]):.1f} ± {100 * np.mean([v['stderr'] for v in values]):.1f} %"


def table() -> None:
    for path in (RESULTS / f"compress-{name}.json" for name in TEXTS):
        held = json.loads(path.read_text())
        rows = held["rows"]
        print(f"\n**{held['model']}**\n")
        ratios = sorted({row["ratio"] for row in rows if "ratio" in row}, reverse=True)
        heads = [f"{ratio:g}" for ratio in ratios]
        last = f"elsewhere at {heads[-1]} | accuracy at {heads[-1]}"
        print("| method | allocation | storage | " + " | ".join(heads) + f" | {last} | CPU s |")
        print("|" + "---|" * (len(ratios) + 6))
        for row in rows:
            if row["method"] == "dense" or row["method"].startswith("int"):
                size = f"{row['bytes']:.3f} of 16 bits" if "bytes" in row else ""
                value = f"{row['inside']['value']:.2f} ± {row['inside']['stderr']:.2f}"
                print(
                    f"| {row['method']} | {size} | | "
                    + " | ".join([value] * len(ratios))
                    + f" | {row['outside']['value']:.0f} | {percent([row])} | |"
                )
        order = [(method, how, storage) for method, hows, storages in WAYS[:-1] for how in hows for storage in storages]
        order += [("double", how, "pivoted") for how in MORE]
        ways = {way_of(row) for row in rows if "storage" in row}
        default = ("propagated", "auto", "pivoted, default")
        ways = sorted(
            ways, key=lambda way: (way == default, way not in order, order.index(way) if way in order else way)
        )
        for way in ways:
            cells, seconds, outside = [], [], ""
            for ratio in ratios:
                same = [r for r in rows if r.get("ratio") == ratio and way_of(r) == way]
                values = np.array([r["inside"]["value"] for r in same])
                seconds += [r["seconds"] for r in same]
                if not len(values):
                    cells.append("–")
                    continue
                error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
                spread = f" ± {error:.2g}" if error is not None else ""
                cells.append(f"{values.mean():.4g}{spread} ({len(values)})")
                outside = f"{np.mean([r['outside']['value'] for r in same]):.4g}"
            right = percent([r for r in rows if r.get("ratio") == ratios[-1] and way_of(r) == way])
            print(
                f"| {' | '.join(way)} | " + " | ".join(cells) + f" | {outside} | {right} | {np.median(seconds):.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", nargs="?", type=Path, help="folder with models/ and text/")
    parser.add_argument("--model", choices=[*TEXTS, "minilm"], default="stories260K")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--ratios", default="0.9,0.8,0.6,0.4")
    parser.add_argument("--only", help="one way, such as 'propagated auto pivoted'")
    parser.add_argument("--block", action="store_true", help="time the decompositions of a large block")
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured")
    given = parser.parse_args()
    if given.table:
        table()
    elif given.block:
        found = block_of_7b()
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compress-block.json").write_text(json.dumps(found, indent=1))
        print(json.dumps(found))
    else:
        assert given.shared is not None, "give the folder with models/ and text/"
        ratios = [float(word) for word in given.ratios.split(",")]
        if given.model == "minilm":
            import compress_encoder

            compress_encoder.run(given.shared, ratios, given.only)
        else:
            Bench(given.shared, given.model, given.draws, ratios, given.only).run()


if __name__ == "__main__":
    main()
