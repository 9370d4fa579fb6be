"""Quantisation, low rank and both at equal bytes: perplexity and decoding speed of exported files, without torch.

    python benchmarks/quantisation.py MODEL CALIBRATION TEXT [--folder NAME=FACTORED ...]
    python benchmarks/quantisation.py --table

Compared, each as an exported file: the dense model in float32 and 8, 4 and 2 bits; mixtures of 8 and fewer bits, those
matrices in 8 that err most (chosen like ranks, by the errors in the metric of inputs and outputs); 4 and 2 bits with
low-rank corrections in 8 bits, in several metrics and ranks (`eckart recover --method repair` is that of both with 4
rounds); and the folders named (of `eckart compress`, `eckart recover`).
CALIBRATION is what the metrics are taken from. Perplexity is over windows of TEXT, the same for all. Results go to
benchmarks/results/quantisation-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from eckart.allocate import Curve, water_fill
from eckart.calibration import Moments, collect, read_windows
from eckart.checkpoint import load
from eckart.exporting import _adapter_weights, _facts, _graph, _write_model, cache_shapes
from eckart.matrices import Matrix, read, write
from eckart.onnx_graph import packed_bytes
from eckart.onnx_runner import FACTS, losses, open_model
from eckart.peft_adapter import put_on_, write_adapter
from eckart.recipe import RecoverSettings
from eckart.repairing import check_repairable, repair_weight, roots_of, round_weight
from eckart.results import paired_gain, perplexity, to_json
from eckart.tasks import read_text
from eckart.weighting import Root, diagonal_root, square_root
from export import WEIGHTS, measure
from search import watch

RESULTS = Path(__file__).parent / "results"
METRICS = ("weights", "diagonal", "inputs", "both")
"""Of a correction: SVD of the error alone; QERA-approx; QERA-exact, which is EoRA; inputs and outputs."""


@dataclass
class Side:
    """A model, and in how many bits its file is written."""

    name: str
    model: Any
    weights: tuple[str, ...]
    fine: list[Tensor] = field(default_factory=list)
    """Weights that stay at 8 bits."""
    half: bool = False
    """Weights are rounded to float16, which the file holds in float32; the bytes that they would take are counted."""


def sides(options: argparse.Namespace) -> Iterator[Side]:
    """What is compared, one at a time."""
    model, tokenizer = load(options.model, device="cpu", dtype="float32")
    windows = read_windows(read_text(options.calibration), tokenizer, length=options.window, count=options.read)
    linear = check_repairable(model, tokenizer, RecoverSettings(method="repair"))
    moments = collect(model, windows, linear)
    yield Side("dense", model, ("none", "int8", "int4", "int2"))
    yield Side("dense, fp16 (bytes counted)", model, ("none",), half=True)
    for entry in options.mixed:
        low, _, share = entry.partition(":")
        name = f"dense, {float(share):.0%} of the way from int{low} to int8"
        yield Side(name, model, (f"int{low}",), finer(model, linear, moments, int(low), float(share)))
    for entry in options.repair:
        bits, metric, rank, rounds = entry.split(":")
        yield repaired(options, linear, moments, int(bits), metric, int(rank), int(rounds))
    for name, _, folder in (entry.partition("=") for entry in options.folder):
        yield Side(name, load(folder, device="cpu", dtype="float32")[0], ("int8", "int4"))


def finer(model: Any, linear: list[Matrix], moments: Mapping[str, Moments], low: int, share: float) -> list[Tensor]:
    """The weights that get 8 bits where a share of the bytes between few bits and 8 may be spent."""
    curves = []
    for matrix in linear:
        left, right = roots_of(moments[matrix.name])
        assert left is not None
        weight = read(model, matrix)
        change = (left.before(right.after((weight - round_weight(weight, bits)).double())) for bits in (low, 8))
        errors = np.array([float(each.square().sum()) for each in change])
        costs = np.array([packed_bytes(matrix.shape, bits) for bits in (low, 8)], dtype=np.float64)
        curves.append(Curve(matrix.name, np.array([low, 8]), costs, errors))
    least, most = (sum(float(curve.costs[index]) for curve in curves) for index in (0, 1))
    choice = water_fill(curves, least + share * (most - least))
    return [model.get_parameter(matrix.parameter).detach() for matrix in linear if choice[matrix.name]]


def roots_in(metric: str, moments: Moments) -> tuple[Root | None, Root | None]:
    """The roots of the metric that a correction is found in."""
    if metric == "weights":
        return None, None
    if metric == "diagonal":
        return None, diagonal_root(moments.inputs.diagonal().sqrt())
    return (None, square_root(moments.inputs)) if metric == "inputs" else roots_of(moments)


def repaired(
    options: argparse.Namespace,
    linear: list[Matrix],
    moments: Mapping[str, Moments],
    bits: int,
    metric: str,
    rank: int,
    rounds: int,
) -> Side:
    """The model rounded, with a correction beside each weight."""
    model, _ = load(options.model, device="cpu", dtype="float32")
    pairs = {}
    for matrix in linear:
        left, right = roots_in(metric, moments[matrix.name])
        found = repair_weight(read(model, matrix), min(rank, matrix.rank), bits, left, right, rounds=rounds)
        write(model, matrix, found.rounded)
        pairs[matrix.name] = (found.up, found.down)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), pairs, base="")
        put_on_(model, folder)
    rounds_word = f", {rounds} rounds" if rounds > 1 else ""
    name = f"int{bits} + rank {rank}, metric of {metric}{rounds_word}"
    return Side(name, model, (f"int{bits}",), _adapter_weights(model))


def halve_(graph: Any) -> int:
    """Round weights to float16, and give the bytes that this would save."""
    saved = 0
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16).astype(np.float32), tensor.name))
            saved += array.nbytes // 2
    return saved


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
    _, tokenizer = load(options.model, device="cpu", dtype="float32")
    windows = windows_of(options.text, tokenizer, options)
    rows: list[dict[str, Any]] = []
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        before: Any = None
        proto: Any = None
        facts: dict[str, Any] = {}
        for side in sides(options):
            if side.model is not before:
                before, state = side.model, cache_shapes(side.model)
                with torch.no_grad():
                    proto = _graph(side.model, state)
                facts = _facts(side.model, tokenizer, state, "none")
            for how in side.weights:
                place = Path(temporary) / str(len(rows))
                place.mkdir()
                copy = onnx.ModelProto()
                copy.CopyFrom(proto)
                counted = halve_(copy.graph) if side.half else 0
                size = _write_model(copy, place / "model.onnx", how, side.fine)  # pyright: ignore[reportArgumentType]
                size -= counted
                (place / FACTS).write_text(to_json(facts))
                runner = open_model(place, threads=options.threads)
                each = [losses(runner, ids, window=options.window, stride=options.window).mean() for ids in windows]
                scores[place.name] = np.array(each)
                score = perplexity(np.array(each), np.full(len(windows), options.window - 1))
                row = {"model": side.name, "weights": WEIGHTS.get(how, how), "bytes": size, "perplexity": score}
                rows.append(row | {"place": place.name})
                print(f"{side.name} {how}: {size:,} bytes, {score}", file=sys.stderr, flush=True)
        turns = [
            {row["place"]: measure(Path(temporary) / row["place"], options)["decode_seconds"] for row in rows}
            for _ in range(options.repeats)
        ]
    for row in rows:
        place = row.pop("place")
        row["tokens_per_second"] = median(1 / turn[place] for turn in turns)
        row["speed_over_dense_fp32"] = median(turn["0"] / turn[place] for turn in turns)
        row["loss_over_dense"] = paired_gain(scores["0"], scores[place], "nats/token")
    # Names, not the places of this machine.
    named = {"model": Path(options.model).name, "text": options.text.name, "calibration": options.calibration.name}
    named["folder"] = [entry.partition("=")[0] for entry in options.folder]
    about = circumstances()
    about["command"] = " ".join(word.rpartition("/")[2] for word in about["command"].split())
    return {"kind": "quantisation", "options": vars(options) | named, "rows": rows, **about}


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{Path(found['options']['model']).name}, {found['options']['windows']} windows of "
        f"{found['options']['window']} tokens of {Path(found['options']['text']).name}:",
        "",
        "| model | weights | KB | perplexity | loss above dense fp32, nats/token, 95 % | tokens/s | × dense fp32 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found["rows"], key=lambda row: -row["bytes"]):
        score, gain = row["perplexity"], row["loss_over_dense"]
        cells = [
            row["model"],
            row["weights"],
            f"{row['bytes'] / 1e3:.0f}",
            f"{score['value']:.2f} ± {score['stderr']:.2f}",
            f"{gain['value']:+.4f} ({gain['interval'][0]:+.4f} to {gain['interval'][1]:+.4f})",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_over_dense_fp32']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the dense model")
    parser.add_argument("calibration", nargs="?", type=Path, help="documents separated by <|endofdoc|>")
    parser.add_argument("text", nargs="?", type=Path, help="others")
    parser.add_argument("--mixed", nargs="*", default=["4:0.25", "4:0.5", "4:0.75"], help="BITS:SHARE of the way to 8")
    parser.add_argument(
        "--repair",
        nargs="*",
        default=[
            *(f"4:{metric}:8:1" for metric in METRICS),
            *(f"4:both:{rank}:4" for rank in (4, 8, 16)),
            "2:both:16:4",
        ],
        help="BITS:METRIC:RANK:ROUNDS",
    )
    parser.add_argument("--folder", nargs="*", default=[], help="NAME=FOLDER of a factored model")
    parser.add_argument("--read", type=int, default=128, help="windows of CALIBRATION")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=32, help="tokens read before decoding")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded; their median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="keep saved rows that are not measured again")
    parser.add_argument("--table", action="store_true", help="print the tables of saved results")
    options = parser.parse_args()
    if not options.table:
        if options.model is None or options.calibration is None or options.text is None:
            parser.error("give a model and two texts")
        found = run(options)
        name = Path(options.model).name
        place = RESULTS / f"quantisation-{name}.json"
        if options.add:  # windows and dense model are the same, and differences to it are what is kept
            saved = json.loads(place.read_text(encoding="utf-8"))
            now = {(row["model"], row["weights"]) for row in found["rows"]}
            found["rows"] += [row for row in saved["rows"] if (row["model"], row["weights"]) not in now]
            found["earlier_commands"] = [*saved.get("earlier_commands", []), saved["command"]]
        place.write_text(to_json(found), encoding="utf-8")
    for path in sorted(RESULTS.glob("quantisation-*.json")):
        print(table(json.loads(path.read_text(encoding="utf-8"))), end="\n\n")


if __name__ == "__main__":
    main()
