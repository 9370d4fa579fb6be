"""How much faster is a low-rank layer than the dense one? Both in one run, taking turns.

    python benchmarks/inference.py --threads 2         # shapes of LLaMA-7B, on the CPU
    python benchmarks/inference.py --device cuda       # the same there, as CUDA graphs
    python benchmarks/inference.py --model             # a whole Llama of random weights, dense and factored
    python benchmarks/inference.py --table             # the saved results as Markdown

A layer of a model finds its weights in memory and not in a cache, since all other layers ran in between. So each
side has copies of its layer, `--pool` MiB or more of them, and every call takes the next one. A ratio is formed
within one repeat, so that a busy machine slows both sides. The limit is what the layer could gain at best: dense
bytes over its own where reading the weights takes the time (fewer than `--bytes-below` tokens), dense operations
over its own elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eckart.checkpoint import load_model, save
from eckart.linear import STORAGES, LowRankLayer, arrange_
from eckart.quantizer import attach_, replace_, sizes, stored_as
from eckart.resources import measure_memory, measure_speed
from eckart.results import to_json
from eckart.truncation import rank_of
from search import spread, watch

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Side:
    """One layer to be timed: what runs a round of its calls, and what it costs."""

    run: Callable[[], Any]
    calls: int
    bytes: int
    flops: int


def make_layer(kind: str, shape: tuple[int, int], rank: int, where: dict[str, Any]) -> nn.Module:
    out, into = shape
    if kind == "dense":
        return nn.Linear(into, out, False, **where)
    layer = STORAGES[kind](into, out, rank, False, **where)
    if kind == "pivoted":
        # As `choose_rows` gives them: which rows is chance, each part is in ascending order.
        rows = torch.randperm(out)
        layer.order.copy_(torch.cat((rows[:rank].sort().values, rows[rank:].sort().values)).argsort())
    return arrange_(layer)


def make_copies(layer: nn.Module, pool: int) -> list[nn.Module]:
    """As many copies as fill the pool; each has its own memory."""

    size = sum(tensor.nbytes for tensor in layer.state_dict().values())
    return [layer, *(copy.deepcopy(layer) for _ in range(math.ceil(pool / size) - 1))]


def make_side(layer: nn.Module, x: torch.Tensor, options: argparse.Namespace) -> Side:
    copies = make_copies(layer, options.pool << 20)
    synchronize(x)
    began = time.perf_counter()
    for each in copies[:3]:
        each(x)
    synchronize(x)
    calls = max(3, math.ceil(options.seconds * min(3, len(copies)) / (time.perf_counter() - began)))
    if isinstance(layer, LowRankLayer):
        size, flops = layer.bytes, layer.flops(len(x))
    else:
        size, flops = layer.weight.nbytes, 2 * len(x) * layer.weight.numel()
    return Side(make_runner(copies, x, calls, graph=not options.no_graph), calls, size, flops)


def make_runner(copies: Sequence[nn.Module], x: torch.Tensor, calls: int, *, graph: bool) -> Callable[[], Any]:
    """Give a function that makes `calls` calls, going on with the copy where the last round stopped."""
    if x.is_cuda and graph:
        # One graph for all calls: what is left is the time of the kernels.
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            for layer in islice(cycle(copies), calls):
                layer(x)
        return recorded.replay
    endless = cycle(copies)

    def run() -> None:
        for layer in islice(endless, calls):
            layer(x)

    return run


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def time_round(side: Side, x: torch.Tensor) -> float:
    """Seconds of one call."""
    synchronize(x)
    began = time.perf_counter()
    side.run()
    synchronize(x)
    return (time.perf_counter() - began) / side.calls


@torch.inference_mode()
def measure(shape: tuple[int, int], dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure every batch, rho and storage of one shape."""
    circumstances = watch("inference.py")
    where = {"device": options.device, "dtype": DTYPES[dtype]}
    dense = make_layer("dense", shape, 0, where)
    rows = []
    for batch in options.batch:
        x = torch.randn(batch, shape[1]).to(**where)
        against = make_side(dense, x, options)
        for rho in options.rho:
            rank = rank_of(rho, shape)
            rank = min(min(shape), math.ceil(rank / options.multiple) * options.multiple)
            sides = {kind: make_side(make_layer(kind, shape, rank, where), x, options) for kind in STORAGES}
            times: dict[str, list[float]] = {kind: [] for kind in ("dense", *sides)}
            for side in (against, *sides.values()):
                side.run()
            for _ in range(options.repeats):
                for kind, side in {"dense": against, **sides}.items():
                    times[kind].append(time_round(side, x))
            for kind, side in sides.items():
                rows.append(compare(against, side, times["dense"], times[kind], batch, options))
                rows[-1] |= {"storage": kind, "batch": batch, "rho": rho, "rank": rank}
                print(f"{shape} {dtype} {describe(rows[-1])}", file=sys.stderr, flush=True)
    return {
        "shape": shape,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "rows": rows,
        "pool_mib": options.pool,
        **circumstances(),
    }


def compare(
    dense: Side, side: Side, before: list[float], after: list[float], batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    by_bytes = batch < options.bytes_below
    return {
        "dense_ms": spread([1e3 * seconds for seconds in before]),
        "ms": spread([1e3 * seconds for seconds in after]),
        "ratio": spread([b / a for b, a in zip(before, after)]),
        "limit": dense.bytes / side.bytes if by_bytes else dense.flops / side.flops,
        "limited_by": "bytes" if by_bytes else "flops",
        "bytes": side.bytes,
        "dense_bytes": dense.bytes,
    }


def describe(row: dict[str, Any]) -> str:
    ratio = row["ratio"]["median"]
    return (
        f"batch {row['batch']} rho {row['rho']} {row['storage']}: {row['ms']['median']:.3f} ms, "
        f"ratio {ratio:.2f} of {row['limit']:.2f}"
    )


def save_models(folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Write a dense and a factored Llama."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        tie_word_embeddings=True,
        dtype=options.dtype[0],
    )
    model = LlamaForCausalLM(config).to(DTYPES[options.dtype[0]])
    save(model, folder / "dense")
    stored = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            shape = (linear.out_features, linear.in_features)
            rank = int(options.ratio * shape[0] * shape[1] / sum(shape))
            layer = make_layer("factored", shape, rank, {"device": "cpu", "dtype": linear.weight.dtype})
            stored[name] = stored_as(layer)
            replace_(model, {name: layer})
    attach_(model, stored, {})
    save(model, folder / "factored")
    return {name: str(folder / name) for name in ("dense", "factored")}


def measure_model(options: argparse.Namespace) -> dict[str, Any]:
    """Measure speed, memory and the time to load of a whole model."""
    circumstances = watch("inference.py")
    with tempfile.TemporaryDirectory() as place:
        sides = save_models(Path(place), options)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.repeats + 1):
            for name, folder in sides.items():
                began = time.perf_counter()
                model = load_model(folder, dtype="stored")
                if turn:
                    seconds[name].append(time.perf_counter() - began)
                del model
        models = {name: load_model(folder, dtype="stored") for name, folder in sides.items()}
        parameters = {name: sizes(model)[0] for name, model in models.items()}
        models["arranged"] = arrange_(load_model(sides["factored"], dtype="stored"))
        speed = measure_speed(models, "dense", batches=options.batch, repeats=options.repeats, progress=print)
        memory = [measure_memory(name, folder, dtype="stored") for name, folder in sides.items()]
    load = {"ms": {name: spread([1e3 * each for each in found]) for name, found in seconds.items()}}
    load["ratio"] = spread([b / a for b, a in zip(seconds["dense"], seconds["factored"])])
    about = {"dtype": options.dtype[0], "parameters": parameters, "speed": speed, "memory": memory, "load": load}
    return about | circumstances()


def model_table(folder: Path) -> str:
    """Render the saved results of whole models as Markdown."""
    rows = [
        ("model", "phase, batch", "side", "dense, tokens/s", "its tokens/s", "ratio [least, most]", "limit"),
        ("---",) * 7,
    ]
    notes = []
    for path in sorted(folder.glob("inference-model-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = f"{result['parameters']['dense']['parameters'] / 1e6:.0f} M, {result['dtype']}"
        dense = {row["batch"]: row for row in result["speed"] if row["side"] == "dense"}
        others = [row for row in result["speed"] if row["side"] != "dense"]
        for other, phase in itertools.product(others, ("prefill", "decode")):
            ratio = other[phase]["ratio"]
            cell = f"**{ratio['value']:.2f}** [{ratio['least']:.2f}, {ratio['most']:.2f}]"
            limit = f"{other[phase]['limit']:.2f} by {other[phase]['limited_by']}"
            paces = (f"{side[phase]['tokens_per_second']['value']:.4g}" for side in (dense[other["batch"]], other))
            rows.append((name, f"{phase}, {other['batch']}", other["side"], *paces, cell, limit))
        load, memory = result["load"], {row["side"]: row for row in result["memory"]}
        above = {side: row["peak"]["value"] - row["interpreter"]["value"] for side, row in memory.items()}
        own = memory["factored"]["parameters"]
        times = {side: load["ms"][side]["median"] for side in above}
        notes.append(
            f"{name}: loads in {times['factored']:.0f} ms, dense in {times['dense']:.0f} ms (dense / factored "
            f"{load['ratio']['median']:.2f}); takes {above['factored'] / 1e6:.0f} MB above Python and libraries, dense "
            f"{above['dense'] / 1e6:.0f} MB. That is {above['factored'] / own:.2f} times the {own / 1e6:.0f} MB of its "
            "parameters."
        )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes])


def table(folder: Path) -> str:
    """Render the saved results as Markdown: median ratio [least, most] / limit, the part of it reached in bold."""
    blocks = []
    for path in sorted(folder.glob("inference-layer-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result["rows"]
        batches = sorted({row["batch"] for row in rows})
        head = ("rho", "rank", "storage", *(f"batch {batch}" for batch in batches))
        lines = [head, ("---",) * len(head)]
        for rho, rank, storage in dict.fromkeys((row["rho"], row["rank"], row["storage"]) for row in rows):
            found = {r["batch"]: r for r in rows if (r["rho"], r["storage"]) == (rho, storage)}
            lines.append((str(rho), str(rank), storage, *(_cell(found[batch]) for batch in batches)))
        out, into = result["shape"]
        title = f"{out} x {into}, {result['dtype']}, {result['device']}, {result['torch_threads']} thread(s)"
        dense = {row["batch"]: row["dense_ms"]["median"] for row in rows}
        title += "; dense " + ", ".join(f"{dense[batch]:.2f} ms at batch {batch}" for batch in batches)
        blocks.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(blocks)


def _cell(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    part = ratio["median"] / row["limit"]
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}] / {row['limit']:.2f} = **{part:.2f}**"


def summary(folder: Path, cache: float) -> str:
    """How often the goals were met over all saved rows."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("inference-layer-*.json"))]
    rows = [row for result in results for row in result["rows"]]
    parts = [row["ratio"]["median"] / row["limit"] for row in rows if row["bytes"] > cache * 2**20]
    # The default of `eckart.linear.cheapest_storage`; above it dense stays.
    chosen = [row for row in rows if row["bytes"] < 0.9 * row["dense_bytes"]]
    slower = sum(row["ratio"]["median"] < 1 for row in chosen)
    return (
        f"{sum(part >= 0.9 for part in parts)} of {len(parts)} layers of more than {cache:g} MiB reach 0.9 of the "
        f"limit (median {median(parts):.2f}); {slower} of {len(chosen)} layers of less than 0.9 of the dense bytes are "
        "slower than dense."
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="low-rank layers against dense ones")
    add = parser.add_argument
    add("--shape", type=_shape, action="append", help="OUTxIN, may be repeated; default those of LLaMA-7B")
    add("--dtype", type=_list_of(str), default=("bfloat16", "float32"), help=f"of {', '.join(DTYPES)}")
    add("--batch", type=_list_of(int), default=(1, 8, 128), help="tokens in one call")
    add("--rho", type=_list_of(float), default=(0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9))
    add("--multiple", type=int, default=1, help="round ranks up to a multiple of this")
    add("--device", default="cpu")
    add("--threads", type=int, help="threads of torch; default torch's own")
    add("--repeats", type=int, default=7, help="turns of each side")
    add("--seconds", type=float, default=0.1, help="one turn takes about this long")
    add("--pool", type=int, default=128, help="MiB of copies of each layer; several times the largest cache")
    add("--bytes-below", type=int, default=32, help="tokens below which the limit is that of bytes")
    add(
        "--cache", type=float, default=32, help="MiB of the largest cache; smaller layers do not count in the last line"
    )
    add("--model", action="store_true", help="measure a whole model, of the first --dtype")
    add("--width", type=int, default=768, help="of a whole model's hidden states")
    add("--layers", type=int, default=12, help="of a whole model")
    add("--vocabulary", type=int, default=8192, help="of a whole model")
    add("--ratio", type=float, default=0.5, help="of the numbers that a whole model's factors keep")
    add("--no-graph", action="store_true", help="on CUDA, launch every kernel from Python")
    add("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    add("--table", action="store_true", help="print the saved results and measure nothing")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int]:
    out, into = text.split("x")
    return int(out), int(into)


def _list_of(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


def main() -> None:
    options = parse_options()
    if not options.table:
        torch.manual_seed(0)
        if options.threads:
            torch.set_num_threads(options.threads)
        options.results.mkdir(parents=True, exist_ok=True)
        if options.model:
            path = options.results / f"inference-model-cpu-{options.dtype[0]}.json"
            path.write_text(to_json(measure_model(options)), encoding="utf-8")
        for shape in () if options.model else options.shape or ((4096, 4096), (11008, 4096), (4096, 11008)):
            for dtype in options.dtype:
                result = measure(shape, dtype, options)
                device = options.device.partition(":")[0]
                path = options.results / f"inference-layer-{device}-{dtype}-{shape[0]}x{shape[1]}.json"
                path.write_text(to_json(result), encoding="utf-8")
    print(model_table(options.results), end="\n\n")
    print(table(options.results))
    print(f"\n{summary(options.results, options.cache)}")


if __name__ == "__main__":
    main()
