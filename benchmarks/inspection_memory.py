"""How much memory and time does `eckart inspect` take for a checkpoint of LLaMA-7B's shapes?

    python benchmarks/inspection_memory.py            # makes two layers in shards, scans them, removes them
    python benchmarks/inspection_memory.py --table    # the saved result as Markdown

Weights are random with a planted signal of rank 64, in bfloat16. The scan is a process of its own, watched as in
`apply_memory.py`. The interpreter is the same for a model of as many layers that is sixteen times narrower. The bound
is three times the largest matrix, in float32, in which it is decomposed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from apply_memory import NARROWER, make_checkpoint, parse_options, watched
from eckart.checkpoint import shards_of
from eckart.results import to_json
from search import watch

RESULT = Path(__file__).parent / "results" / "inspection-memory.json"
WIDTH, LAYERS, ALL_LAYERS = 4096, 2, 32
LARGEST = WIDTH * (WIDTH * 11 // 4) * 4


def measure() -> dict[str, Any]:
    circumstances = watch("inspection_memory.py")
    options = parse_options(["--layers", str(LAYERS), "--planted", "64"])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name, width in (("interpreter", WIDTH // NARROWER), ("model", WIDTH)):
            make_checkpoint(root / name, width, options)
            found[name] = {"bytes": sum(path.stat().st_size for path in shards_of(str(root / name)))}
            for kind, extra in (("exact", ()), ("fast", ("--fast",))):
                out = root / f"{name}-{kind}"
                found[name][kind] = watched(["inspect", str(root / name), "--out", str(out), *extra])
                print(f"{name} {kind}: {found[name][kind]}", file=sys.stderr, flush=True)
    return found | {"largest": LARGEST} | circumstances()


def table() -> str:
    """Render the saved result as Markdown."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    head = ("scan", "checkpoint, MB", "peak, MB", "interpreter, MB", "rest / largest matrix", "s", "s for 32 layers")
    rows = [head, ("---",) * len(head)]
    for kind in ("exact", "fast"):
        model, narrow = result["model"][kind], result["interpreter"][kind]
        rest = (model["anonymous"] - narrow["anonymous"]) / result["largest"]
        work = (model["seconds"] - narrow["seconds"]) * ALL_LAYERS / LAYERS + narrow["seconds"]
        sizes = (result["model"]["bytes"], model["anonymous"], narrow["anonymous"])
        megabytes = [f"{size / 1e6:,.0f}" for size in sizes]
        rows.append((kind, *megabytes, f"**{rest:.2f}**", f"{model['seconds']:.0f}", f"{work:.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    if "--table" not in sys.argv:
        RESULT.write_text(to_json(measure()), encoding="utf-8")
    print(table())
