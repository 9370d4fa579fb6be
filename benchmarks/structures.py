"""How fast are monarch and sparse layers beside two factors of as many numbers? All in one run, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/structures.py          # --table prints what was saved

Each side has copies of its layer, `--pool` MiB or more of them, as in `inference.py`: weights come from memory. A
ratio is formed within one repeat: processor seconds of the two factors over those of the side. An entry of a sparse
layer counts as two numbers; a tenth of its numbers are entries, which stand anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.linear import STORAGES, arrange_
from eckart.monarch import MonarchLinear
from eckart.results import to_json
from eckart.sparse import SparseLinear, nonzeros_for
from inference import DTYPES, make_copies, make_layer
from search import spread, watch

RESULTS = Path(__file__).parent / "results"
SPARSE = 0.1


def sides_of(shape: tuple[int, int], share: float, where: dict[str, Any]) -> dict[str, nn.Module]:
    """Make layers that take a share of the dense numbers, each as nearly as its ranks allow, never more."""
    out, into = shape
    most = share * out * into
    width = int(most / (out + into))
    sides = {"dense": make_layer("dense", shape, 0, where), "factored": make_layer("factored", shape, width, where)}
    for grid in (2, 4):
        layer = MonarchLinear(into, out, grid, width // grid, False, **where)
        sides[f"monarch, grid {grid}"] = layer
    for storage in STORAGES:
        taken = {
            rank: rank * (out + into - (rank if storage == "pivoted" else 0))
            + 2 * nonzeros_for(shape, rank, SPARSE, storage)
            + out
            + 1
            for rank in range(1, min(shape))
        }
        rank = max(rank for rank, numbers in taken.items() if numbers <= most)
        count = nonzeros_for(shape, rank, SPARSE, storage)
        low: Any = make_layer(storage, shape, rank, where)
        layer = SparseLinear(low, count)
        places = torch.randperm(out * into)[:count].sort().values
        layer.columns.copy_(places % into)
        layer.starts.copy_(torch.searchsorted(places // into, torch.arange(out + 1)))
        sides[f"sparse, {storage}"] = arrange_(layer)
    with torch.no_grad():
        for layer in sides.values():
            for parameter in layer.parameters():
                parameter.normal_()
    return sides


@torch.inference_mode()
def measure(shape: tuple[int, int], dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    where = {"device": "cpu", "dtype": DTYPES[dtype]}
    rows = []
    for share in options.share:
        sides = sides_of(shape, share, where)
        pools = {name: cycle(make_copies(layer, options.pool)) for name, layer in sides.items()}
        for batch in options.batch:
            x = torch.randn(batch, shape[1]).to(**where)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            calls = dict.fromkeys(sides, 3)
            for turn in range(options.repeats + 1):
                for name, pool in pools.items():
                    began = time.process_time()
                    for layer in islice(pool, calls[name]):
                        layer(x)
                    each = (time.process_time() - began) / calls[name]
                    if turn:
                        seconds[name].append(each)
                    else:
                        calls[name] = max(3, int(options.seconds / max(each, 1e-6)))
            for name, layer in sides.items():
                size = sum(tensor.nbytes for tensor in layer.state_dict().values())
                row = {"shape": shape, "dtype": dtype, "share": share, "batch": batch, "side": name, "bytes": size}
                ratio = [a / b for a, b in zip(seconds["factored"], seconds[name])]
                rows.append(row | {"ms": spread([1e3 * s for s in seconds[name]]), "ratio": spread(ratio)})
                print(row, rows[-1]["ratio"]["median"], file=sys.stderr, flush=True)
    return rows


def table() -> None:
    found = json.loads((RESULTS / "structures.json").read_text(encoding="utf-8"))["rows"]
    sides = list(dict.fromkeys(row["side"] for row in found))
    print("| shape, dtype | share | batch | factored, ms | " + " | ".join(sides) + " |")
    print("|" + "---|" * (len(sides) + 4))
    keys = dict.fromkeys((tuple(row["shape"]), row["dtype"], row["share"], row["batch"]) for row in found)
    for shape, dtype, share, batch in keys:
        mine = {
            row["side"]: row
            for row in found
            if (tuple(row["shape"]), row["dtype"], row["share"], row["batch"]) == (shape, dtype, share, batch)
        }
        cells = [f"{r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}]" for r in (mine[s]["ratio"] for s in sides)]
        ms = f"{mine['factored']['ms']['median']:.3f}"
        print(f"| {shape[0]} x {shape[1]}, {dtype} | {share:g} | {batch} | {ms} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="OUT IN, may be repeated")
    parser.add_argument("--share", type=float, nargs="+", default=[0.6, 0.4], help="of the dense numbers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="tokens in one call")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=0.05, help="one turn takes about this long")
    parser.add_argument("--pool", type=int, default=64, help="MiB of copies of each layer")
    parser.add_argument("--table", action="store_true", help="print what was saved and measure nothing")
    options = parser.parse_args()
    if not options.table:
        torch.manual_seed(0)
        circumstances = watch("structures.py")
        rows = []
        for shape in options.shape or [[1024, 1024], [2048, 2048]]:
            for dtype in options.dtype:
                rows += measure((shape[0], shape[1]), dtype, options)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "structures.json").write_text(to_json({"rows": rows, **circumstances()}), encoding="utf-8")
    table()


if __name__ == "__main__":
    main()
