"""Exported ONNX files of a random-weight Llama of 100 M parameters: bytes, decoding speed and memory, without torch.

    python benchmarks/export.py                # writes benchmarks/results/export.json
    python benchmarks/export.py --table        # prints its tables

Compared are the dense model and low-rank ones at the same share of the numbers of all linear layers but the head, as
two factors and as pivoted rows, each in float32, int8 and int4. Every measurement is a process of its own that imports
onnxruntime and numpy and says whether it imported torch; files take turns, and a ratio is formed within one turn.
Seconds are processor seconds of the process, which on one thread are those of an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from torch import nn

from eckart.exporting import _graph, _write_model, cache_shapes
from eckart.linear import STORAGES
from eckart.onnx_runner import FACTS
from eckart.results import to_json
from search import spread, watch

RESULT = Path(__file__).parent / "results" / "export.json"
WEIGHTS = {"none": "fp32", "int8": "int8", "int4": "int4"}

# Reads a prompt, then decodes; peak memory is that of the whole process.
CHILD = """
import json, re, sys, time
from eckart.onnx_runner import open_model, step
import numpy as np
folder, prompt, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
began = time.process_time()
model = open_model(folder, threads=threads)
opened = time.process_time() - began
ids = (np.arange(prompt)[None] * 7 + 5) % 1000
step(model, ids[:, :2])
began = time.process_time()
logits, cache = step(model, ids)
read = time.process_time() - began
seconds = []
for _ in range(tokens):
    now = logits[:, -1].argmax(-1)[:, None]
    began = time.process_time()
    logits, cache = step(model, now, cache)
    seconds.append(time.process_time() - began)
print(json.dumps({
    "decode_seconds": float(np.median(seconds)), "prompt_seconds": read, "open_seconds": opened,
    # Not getrusage, whose peak is also that of the process it was forked from.
    "peak_bytes": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]),
    "imported": sorted({"torch", "transformers", "onnx"} & sys.modules.keys()),
}))
"""


def make_model(storage: str, ratio: float, options: argparse.Namespace) -> Any:
    """A Llama whose linear layers, but for the head, are dense or of random factors with `ratio` of the numbers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    if storage == "dense":
        return model
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            out, into = module.weight.shape
            numbers = ratio * out * into
            total = out + into
            # r (m + n) numbers, or r (m + n) - r^2.
            rank = numbers / total if storage == "factored" else (total - (total**2 - 4 * numbers) ** 0.5) / 2
            parent, _, name = path.rpartition(".")
            layer = STORAGES[storage](into, out, int(rank), False)
            if storage == "pivoted":
                layer.order.copy_(torch.randperm(out))
            setattr(model.model.get_submodule(parent), name, layer)
    return model


def write_files(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Export every model once and quantise copies of its graph, as `export_onnx` does."""
    found: dict[str, dict[str, Any]] = {}
    for storage in ("dense", "factored", "pivoted"):
        model = make_model(storage, options.ratio, options)
        with torch.no_grad():
            proto = _graph(model, cache_shapes(model))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        for how, word in WEIGHTS.items():
            copy = onnx.ModelProto()
            copy.CopyFrom(proto)
            place = folder / f"{storage}-{word}"
            place.mkdir()
            size = _write_model(copy, place / "model.onnx", how)  # pyright: ignore[reportArgumentType]
            facts = {"schema_version": 1, "context": 2048, "start": 1, "eos": []}
            (place / FACTS).write_text(json.dumps(facts))
            found[place.name] = {"storage": storage, "weights": word, "bytes": size, "parameters": parameters}
            print(f"{place.name}: {size:,} bytes", file=sys.stderr, flush=True)
    return found


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, folder, options.prompt, options.tokens, options.threads]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)  # noqa: S603
    return json.loads(done.stdout)


def run(options: argparse.Namespace) -> dict[str, Any]:
    circumstances = watch("export.py")
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(Path(temporary), options)
        turns: list[dict[str, dict[str, Any]]] = []
        for turn in range(options.repeats):
            turns.append({name: measure(Path(temporary) / name, options) for name in files})
            print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr, flush=True)
    rows = []
    for name, facts in files.items():
        row: dict[str, Any] = {"name": name, **facts, "imported": turns[0][name]["imported"]}
        for field in ("decode_seconds", "prompt_seconds", "open_seconds", "peak_bytes"):
            row[field] = spread([turn[name][field] for turn in turns])
        for word in ("fp32", "int8"):
            base = f"dense-{word}"
            ratios = [turn[base]["decode_seconds"] / turn[name]["decode_seconds"] for turn in turns]
            row[f"speed_over_{base}"] = spread(ratios)
            row[f"bytes_over_{base}"] = facts["bytes"] / files[base]["bytes"]
        rows.append(row)
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "table")}
    return {"kind": "export", "options": kept, "rows": rows, "turns": turns, **circumstances()}


def table(found: dict[str, Any]) -> str:
    def cell(value: dict[str, float], scale: float, digits: int) -> str:
        low, middle, high = (f"{scale * value[key]:.{digits}f}" for key in ("min", "median", "max"))
        return f"{middle} [{low}, {high}]"

    lines = [
        "| weights | MB | of dense fp32 | ms a token | tokens/s | × dense fp32 | × dense int8 | ms for the prompt "
        "| peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        decode = row["decode_seconds"]
        cells = [
            f"{row['storage']} {row['weights']}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes_over_dense-fp32']:.3f}",
            cell(decode, 1e3, 2),
            f"{1 / decode['median']:.0f}",
            cell(row["speed_over_dense-fp32"], 1, 2),
            cell(row["speed_over_dense-int8"], 1, 2),
            cell(row["prompt_seconds"], 1e3, 0),
            cell(row["peak_bytes"], 1 / 2**20, 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the numbers of the linear layers")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64, help="tokens read before decoding")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded; their median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the tables of saved results")
    options = parser.parse_args()
    if not options.table:
        found = run(options)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(to_json(found), encoding="utf-8")
    print(table(json.loads(options.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
