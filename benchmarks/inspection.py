"""How much faster are edges and ranks than singular values by torch, and are they the same? Shapes of LLaMA 7B.

    OMP_NUM_THREADS=1 python benchmarks/inspection.py            # measure: some minutes a repeat
    python benchmarks/inspection.py --table                      # the saved results as Markdown

Weights are float32: Gaussian noise and a planted signal of rank 400, whose strengths are evenly spaced from 1.2 to 4
times the edge of the noise. `outlier` has one direction 40 times as strong as the edge besides, as some trained
weights do: there float32 does not do, and eckart takes float64. Both sides of a ratio are timed one after the other, on
the same matrix. (A script called inspect.py would hide Python's own module from all benchmarks.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eckart.noise import EDGES, RANK_RULES
from eckart.results import environment, to_json
from eckart.spectrum import fast_singular_values

RESULTS = Path(__file__).parent / "results" / "inspection.json"
SHAPES = ((4096, 4096), (4096, 11008))
RANK = 400
OUTLIERS = {"plain": (), "outlier": (40.0,)}


def planted(shape: tuple[int, int], outliers: tuple[float, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.cat([torch.tensor(outliers), torch.linspace(4, 1.2, RANK)])
    edge = 0.02 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    left, right = (torch.linalg.qr(torch.randn(side, len(strengths), generator=generator)).Q for side in shape)
    return 0.02 * torch.randn(shape, generator=generator) + (left * strengths * edge) @ right.mT


def timed(compute: Any, weight: torch.Tensor) -> tuple[float, Any]:
    """Seconds of this process's one thread: what others do on a busy machine counts little."""
    began = time.process_time()
    found = compute(weight)
    return time.process_time() - began, found


def measure(shape: tuple[int, int], name: str, seed: int) -> dict[str, Any]:
    weight = planted(shape, OUTLIERS[name], seed)
    fast, ours = timed(fast_singular_values, weight)
    slow, theirs = timed(torch.linalg.svdvals, weight)
    theirs = theirs.double()
    # The rules themselves are part of a scan.
    rules, ranks = timed(lambda values: {rule: find(values, shape) for rule, find in RANK_RULES.items()}, ours)
    edges = {rule: abs(find(ours, shape) / find(theirs, shape) - 1) for rule, find in EDGES.items()}
    found = {
        "shape": shape,
        "weight": name,
        "seed": seed,
        "seconds": {"svdvals": slow, "fast": fast, "rules": rules},
        "ratio": slow / (fast + rules),
        "ranks": ranks,
        "exact_ranks": {rule: find(theirs, shape) for rule, find in RANK_RULES.items()},
        "edge_error": max(edges.values()),
        "median_error": float((ours / theirs - 1).abs().median()),
    }
    print(to_json(found), flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | weight | svdvals, CPU s | fast values and rules, CPU s | ratio | ranks by mp, exact "
        "| worst rank error | worst edge error |",
        "| --- " * 8 + "|",
    ]
    for shape, name in dict.fromkeys((tuple(row["shape"]), row["weight"]) for row in rows):
        group = [row for row in rows if (tuple(row["shape"]), row["weight"]) == (shape, name)]
        slow = [row["seconds"]["svdvals"] for row in group]
        fast = [row["seconds"]["fast"] + row["seconds"]["rules"] for row in group]
        worst = max(
            abs(row["ranks"][rule] - exact) / max(1, exact)
            for row in group
            for rule, exact in row["exact_ranks"].items()
        )
        first, ratios = group[0], [row["ratio"] for row in group]
        lines.append(
            f"| {shape[0]}×{shape[1]} | {name} | {_spread(slow)} | {_spread(fast)} | {_spread(ratios)} "
            f"| {first['ranks']['mp']}, {first['exact_ranks']['mp']} | {100 * worst:.2f} % "
            f"| {100 * max(row['edge_error'] for row in group):.3f} % |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the saved results; measure nothing")
    parser.add_argument("--repeats", type=int, default=3, help="matrices of each kind")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        rows = []
        for seed, name, shape in itertools.product(range(options.repeats), OUTLIERS, SHAPES):
            rows.append(measure(shape, name, seed))
            RESULTS.write_text(to_json({"rows": rows, "environment": environment()}), encoding="utf-8")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
