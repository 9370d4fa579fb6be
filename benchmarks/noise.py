"""Do rank rules find planted ranks, raise false alarms as often as stated, and fit the noise without bias?

    OMP_NUM_THREADS=1 python benchmarks/noise.py            # measure: about ten minutes on one core
    python benchmarks/noise.py --table                      # the saved results as Markdown

A weight is Gaussian noise of standard deviation 1 plus a signal of known rank in random directions, whose strengths are
evenly spaced in units of the edge of the noise, sqrt(N) + sqrt(M).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from eckart import noise
from eckart.results import environment, to_json
from eckart.spectrum import singular_values

RESULTS = Path(__file__).parent / "results" / "noise.json"
RULES = ("mp", "tw", "gavish-donoho", "bema", "laserrmt")
FITS = {"median": noise.fit_median, "bema": noise.fit_bema, "iterated": noise.fit}
RATIOS = (1.0, 0.5, 0.37, 0.25)
SMALLER = 256
SHARES = (0.02, 0.2, 0.4)
STRENGTHS = {"clear": (1.5, 4.0), "faint": (0.4, 1.5)}


def planted(shape: tuple[int, int], rank: int, strengths: tuple[float, float], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for side in shape)
    return weight + (left * torch.linspace(*strengths, rank) * edge) @ right.mT


def measure_case(shape: tuple[int, int], rank: int, strengths: tuple[float, float], trials: int) -> dict[str, object]:
    ranks = {rule: np.zeros(trials) for rule in RULES}
    sigmas = {name: np.zeros(trials) for name in FITS}
    for trial in range(trials):
        values = singular_values(planted(shape, rank, strengths, 1000 * rank + trial))
        for rule, found in ranks.items():
            found[trial] = noise.rank_by(rule, values, shape)
        for name, found in sigmas.items():
            found[trial] = FITS[name](values, shape).sigma
    root = math.sqrt(trials)
    # A weaker signal stays inside the bulk, and leaves no value that could be counted (Baik, Ben Arous & Peche).
    beta = min(shape) / max(shape)
    visible = int((torch.linspace(*strengths, rank) > beta**0.25 / (1 + math.sqrt(beta))).sum()) if rank else 0
    return {
        "shape": shape,
        "rank": rank,
        "visible": visible,
        "trials": trials,
        "ranks": {rule: [found.mean(), found.std(ddof=1) / root] for rule, found in ranks.items()},
        "false_alarms": {rule: float((found > 0).mean()) for rule, found in ranks.items()} if rank == 0 else None,
        "sigma_bias": {name: [found.mean() - 1, found.std(ddof=1) / root] for name, found in sigmas.items()},
    }


def table(results: dict[str, object]) -> str:
    cases = results["cases"]
    lines = ["| ratio | shape | trials | " + " | ".join(RULES) + " |", "| --- " * (3 + len(RULES)) + "|"]
    for case in cases:
        if case["rank"] == 0:
            shares, count = case["false_alarms"], case["trials"]
            cells = [f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / count):.1f} %" for p in map(shares.get, RULES)]
            lines.append(f"| {_ratio(case)} | {_shape(case)} | {count} | {' | '.join(cells)} |")
    lines += [
        "",
        "| ratio | signal | planted | visible | " + " | ".join(RULES) + " |",
        "| --- " * (4 + len(RULES)) + "|",
    ]
    for case in cases:
        if case["rank"]:
            cells = [_pm(*case["ranks"][rule]) for rule in RULES]
            planted_visible = f"{case['rank']} | {case['visible']}"
            lines.append(f"| {_ratio(case)} | {case['signal']} | {planted_visible} | {' | '.join(cells)} |")
    lines += ["", "| ratio | signal | planted | " + " | ".join(FITS) + " |", "| --- " * (3 + len(FITS)) + "|"]
    for case in cases:
        cells = [f"{100 * bias:+.1f} ± {100 * stderr:.1f} %" for bias, stderr in map(case["sigma_bias"].get, FITS)]
        lines.append(f"| {_ratio(case)} | {case['signal'] or '–'} | {case['rank']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(case) -> str:
    return f"{min(case['shape']) / max(case['shape']):.2g}"


def _shape(case) -> str:
    return "×".join(map(str, case["shape"]))


def _pm(value: float, stderr: float) -> str:
    return f"{value:.1f} ± {stderr:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the saved results; measure nothing")
    parser.add_argument("--trials", type=int, default=40, help="matrices with signal in each row of the table")
    parser.add_argument("--pure", type=int, default=1000, help="matrices of pure noise for each ratio")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    cases = []
    for ratio in RATIOS:
        shape = (SMALLER, round(SMALLER / ratio))
        cases.append(measure_case(shape, 0, (1.0, 1.0), options.pure) | {"signal": None})
        for name, strengths in STRENGTHS.items():
            for share in SHARES:
                rank = round(share * SMALLER)
                cases.append(measure_case(shape, rank, strengths, options.trials) | {"signal": name})
                print(cases[-1], flush=True)
    results = {"cases": cases, "environment": environment()}
    RESULTS.write_text(to_json(results), encoding="utf-8")
    print(table(json.loads(to_json(results))))


if __name__ == "__main__":
    main()
