"""Does the damage of each matrix alone predict the damage of all together?

    python benchmarks/compress_additive.py SHARED --model stories260K    # or pebble-7m
    python benchmarks/compress_additive.py --table

Every matrix is cut alone to five ranks, those of the uniform allocation at 0.9 to 0.3 of the numbers, and its
divergence from the original measured on calibration windows (method `double`). Then all are cut at once: as uniform
has it at each of the five, and at random, each matrix to one of its five ranks; half of the random allocations have
any budget, half spend 0.6 within one per cent. Reported: rank correlation over allocations of the sum of the single
divergences with the divergence of all together, and with perplexity on validation windows; 95 % bootstrap intervals.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import eckart
from compress import RESULTS, TEXTS
from eckart import allocate
from eckart.calibration import each_expert, read_windows
from eckart.compression_steps import Steps, ranks_of
from eckart.dataflow import evaluating
from eckart.matrices import find_matrices
from eckart.recipe import CompressSettings
from eckart.scoring import score, summarize
from eckart.spill import Spill
from eckart.tasks import read_text
from eckart.units import find_units, replaced

LEVELS = (0.9, 0.75, 0.6, 0.45, 0.3)
RANDOM, BUDGET, TOLERANCE = 40, 0.6, 0.01


def measure(shared: Path, name: str) -> dict:
    started = time.process_time()
    model, tokenizer = eckart.load(str(shared / "models" / name))
    own, _ = TEXTS[name]

    def windows(part: str, count: int):
        return read_windows(read_text(shared / "text" / f"{own}_{part}.txt"), tokenizer, length=256, count=count)

    proving = windows("validation", 12)
    settings = CompressSettings(
        ratio=BUDGET, method="double", allocate="uniform", windows=32, measured=6, neurons=False
    )
    units, _ = find_units(model, find_matrices(model), settings)
    steps = Steps(model, tokenizer, settings, windows("calibration", 32), units, Spill(None), lambda _: None)
    generator = np.random.default_rng(0)
    rows = []
    with evaluating(model), each_expert(model):
        curves = steps.curves()
        dense = sum(float(curve.costs[-1]) for curve in curves)
        uniform = [allocate.uniform(curves, level * dense) for level in LEVELS]
        points = {key: dict(values) for key, values in steps.alone(curves, uniform).items()}
        allocations = [("uniform", choice) for choice in uniform]
        # A choice of levels with any mean, so that budgets differ; and by exchanges, one that spends the budget.
        while len(allocations) < len(LEVELS) + RANDOM:
            chances = generator.dirichlet(np.ones(len(LEVELS)))
            levels = generator.choice(len(LEVELS), size=len(curves), p=chances)
            choice = {curve.name: uniform[level][curve.name] for curve, level in zip(curves, levels)}
            equal = abs(allocate.cost_of(curves, choice) / dense - BUDGET) < TOLERANCE
            found = [kind for kind, _ in allocations]
            if equal and found.count("equal") < RANDOM // 2:
                allocations.append(("equal", choice))
            elif found.count("any") < RANDOM // 2:
                allocations.append(("any", choice))
        reference = steps.reference()
        for kind, choice in allocations:
            alone = sum(float(np.mean(points[key].get(index, [0.0]))) for key, index in choice.items())
            ranks = ranks_of(curves, choice)
            with replaced(model, (steps._weights(unit, ranks[unit.name]) for unit in steps.units), steps.work):
                together = float(np.mean(steps._divergence(reference)))
                perplexity = summarize(proving, score(model, tokenizer, proving))["perplexity"].value
            kept = allocate.cost_of(curves, choice) / dense
            rows.append({"kind": kind, "kept": kept, "sum": alone, "together": together, "perplexity": perplexity})
            print(json.dumps(rows[-1]), flush=True)
    return {"model": name, "matrices": len(units), "seconds": time.process_time() - started, "rows": rows}


def correlation(one: np.ndarray, other: np.ndarray) -> str:
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(one), size=len(one)) for _ in range(2000)]
    low, high = np.nanpercentile([spearmanr(one[each], other[each]).statistic for each in drawn], (2.5, 97.5))
    return f"{spearmanr(one, other).statistic:.2f} ({low:.2f} to {high:.2f})"


def table() -> None:
    print("| model | allocations | n | with the divergence together | with perplexity | together / sum, median |")
    print("|---|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("additive-*.json")):
        held = json.loads(path.read_text())
        for words, kinds in (("any budget", ("any", "uniform")), (f"all spend {BUDGET:g}", ("equal",))):
            rows = [row for row in held["rows"] if row["kind"] in kinds]
            alone, together, perplexity = (np.array([r[k] for r in rows]) for k in ("sum", "together", "perplexity"))
            cells = [correlation(alone, together), correlation(alone, perplexity), f"{np.median(together / alone):.2f}"]
            print(f"| {held['model']} | {words} | {len(rows)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", nargs="?", type=Path, help="folder with models/ and text/")
    parser.add_argument("--model", choices=TEXTS, default="stories260K")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    given = parser.parse_args()
    if given.table:
        table()
        return
    assert given.shared is not None, "give the folder with models/ and text/"
    found = measure(given.shared, given.model)
    (RESULTS / f"additive-{given.model}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
