"""Quantisation, low rank and both at equal bytes: perplexity and decoding speed of exported files, without torch.

    python benchmarks/quantisation.py MODEL TEXT [--folder NAME=FACTORED ...]
    python benchmarks/quantisation.py --table

MODEL dense, cut by plain SVD to each `--ratio` of the numbers of its matrices (as pivoted rows, every matrix alike),
and the factored folders named, each in float32, int8 and int4. Perplexity is over windows of TEXT, the same for all.
Results go to benchmarks/results/quantisation-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch

from eckart.checkpoint import load
from eckart.exporting import _facts, _graph, _write_model, cache_shapes
from eckart.factoring import factor_
from eckart.matrices import find_matrices
from eckart.onnx_runner import FACTS, losses, open_model
from eckart.results import paired_gain, perplexity, to_json
from eckart.surgery import make_edit
from export import WEIGHTS, measure
from search import watch

RESULTS = Path(__file__).parent / "results"


def cut_(model: Any, ratio: float) -> None:
    """Plain SVD of every matrix of the blocks, to the rank whose pivoted rows hold `ratio` of its numbers."""
    edits = []
    for matrix in find_matrices(model):
        if matrix.layer is not None and not matrix.whole and matrix.type != "other":
            out, into = matrix.shape
            rank = (out + into - ((out + into) ** 2 - 4 * ratio * out * into) ** 0.5) / 2
            edits.append(make_edit(matrix, max(1, int(rank)) / min(out, into)))
    factor_(model, edits, at_most=1.0)


def windows_of(text: Path, tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    found: list[list[int]] = []
    for document in text.read_text(encoding="utf-8").split("<|endofdoc|>"):
        ids = tokenizer(document.strip(), verbose=False).input_ids
        parts = [ids[start : start + options.window] for start in range(0, len(ids), options.window)]
        found += [part for part in parts if len(part) == options.window]
    # Evenly over the text.
    return found[:: max(1, len(found) // options.windows)][: options.windows]


def run(options: argparse.Namespace) -> dict[str, Any]:
    circumstances = watch("quantisation.py")
    sources: dict[str, tuple[str, float | None]] = {"dense": (options.model, None)}
    sources |= {f"SVD {ratio:g}": (options.model, ratio) for ratio in options.ratio}
    sources |= {name: (folder, None) for name, _, folder in (entry.partition("=") for entry in options.folder)}
    rows: list[dict[str, Any]] = []
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (folder, ratio) in sources.items():
            model, tokenizer = load(folder, device="cpu", dtype="float32")
            windows = windows_of(options.text, tokenizer, options)
            if ratio is not None:
                cut_(model, ratio)
            state = cache_shapes(model)
            with torch.no_grad():
                proto = _graph(model, state)
            facts = _facts(model, tokenizer, state, "none")
            for how, word in WEIGHTS.items():
                place = Path(temporary) / f"{name}-{word}"
                place.mkdir()
                copy = onnx.ModelProto()
                copy.CopyFrom(proto)
                size = _write_model(copy, place / "model.onnx", how)  # pyright: ignore[reportArgumentType]
                (place / FACTS).write_text(to_json(facts))
                runner = open_model(place, threads=options.threads)
                each = [losses(runner, ids, window=options.window, stride=options.window).mean() for ids in windows]
                scores[place.name] = np.array(each)
                counts = np.full(len(windows), options.window - 1)
                row = {"model": name, "weights": word, "bytes": size, "perplexity": perplexity(np.array(each), counts)}
                rows.append(row | {"place": place.name})
                print(f"{place.name}: {size:,} bytes, {row['perplexity']}", file=sys.stderr, flush=True)
        turns = [
            {row["place"]: measure(Path(temporary) / row["place"], options)["decode_seconds"] for row in rows}
            for _ in range(options.repeats)
        ]
    for row in rows:
        place = row.pop("place")
        row["tokens_per_second"] = median(1 / turn[place] for turn in turns)
        row["speed_over_dense_fp32"] = median(turn["dense-fp32"] / turn[place] for turn in turns)
        row["loss_over_dense_int8"] = paired_gain(scores["dense-int8"], scores[place], "nats/token")
    # Names, not the places of this machine.
    named = {"model": Path(options.model).name, "text": options.text.name, "folder": sorted(sources)}
    about = circumstances()
    about["command"] = " ".join(word.rpartition("/")[2] for word in about["command"].split())
    return {"kind": "quantisation", "options": vars(options) | named, "rows": rows, **about}


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{Path(found['options']['model']).name}, {found['options']['windows']} windows of "
        f"{found['options']['window']} tokens of {Path(found['options']['text']).name}:",
        "",
        "| model | weights | KB | perplexity | loss above dense int8, nats/token, 95 % | tokens/s | × dense fp32 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found["rows"], key=lambda row: -row["bytes"]):
        score, gain = row["perplexity"], row["loss_over_dense_int8"]
        cells = [
            row["model"],
            row["weights"],
            f"{row['bytes'] / 1e3:.0f}",
            f"{score['value']:.2f} ± {score['stderr']:.2f}",
            f"{gain['value']:+.3f} ({gain['interval'][0]:+.3f} to {gain['interval'][1]:+.3f})",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_over_dense_fp32']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the dense model")
    parser.add_argument("text", nargs="?", type=Path, help="documents separated by <|endofdoc|>")
    parser.add_argument("--ratio", type=float, nargs="*", default=[0.8, 0.5], help="for plain SVD")
    parser.add_argument("--folder", nargs="*", default=[], help="NAME=FOLDER of a factored model")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--prompt", type=int, default=32, help="tokens read before decoding")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded; their median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the tables of saved results")
    options = parser.parse_args()
    if not options.table:
        if options.model is None or options.text is None:
            parser.error("give a model and a text")
        found = run(options)
        name = Path(options.model).name
        (RESULTS / f"quantisation-{name}.json").write_text(to_json(found), encoding="utf-8")
    for path in sorted(RESULTS.glob("quantisation-*.json")):
        print(table(json.loads(path.read_text(encoding="utf-8"))), end="\n\n")


if __name__ == "__main__":
    main()
