"""How much memory does `eckart compress` take, against the model's size?

    python benchmarks/compress_memory.py SHARED                 # three compressions, each a process of its own
    PYTHONPATH=OLD/src python benchmarks/compress_memory.py SHARED --name before     # the same by another checkout
    python benchmarks/compress_memory.py --table

Anonymous memory, looked at every 20 ms, as in benchmarks/apply_memory.py. The interpreter is what the same takes for
stories260K, which has no size to speak of, with one window of text. The random model is a Llama in bfloat16, whose
weights are widened to float32; its tokens are the commonest words of the text. Moments are those that are held at once.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apply_memory import watched
from compress import RESULTS
from eckart.calibration import STATISTICS_BYTES, moments_bytes
from eckart.checkpoint import load_model, shards_of
from eckart.matrices import find_matrices, partition

RESULT = RESULTS / "memory-compress.json"
RUNS = (("stories260K", "tinystories", 1), ("pebble-7m", "books", 16), ("random", "books", 8))


def make_random(folder: Path, text: Path, layers: int) -> str:
    """Write a Llama with random weights."""
    words = Counter(word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.read_text("utf-8")))
    known = {word: number for number, (word, _) in enumerate(words.most_common(2047), 1)} | {"<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return str(folder)


def measure(shared: Path, layers: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, text, windows in RUNS:
            file = shared / "text" / f"{text}_calibration.txt"
            source = str(shared / "models" / name) if name != "random" else ""
            source = source or make_random(Path(place) / name, file, layers)
            given = ["--calibration", str(file), "--ratio", "0.6", "--allocate", "uniform", "--windows", str(windows)]
            before = os.times()
            taken = watched(["compress", source, *given, "--out", str(Path(place) / f"out-{name}")])
            after = os.times()
            model = load_model(source)
            shapes = [matrix.shape for matrix in partition(find_matrices(model))]
            blocks = [p.nbytes for n, p in model.named_parameters() if ".layers.0." in n]
            taken |= {
                "cpu_seconds": sum(after[2:4]) - sum(before[2:4]),
                "stored": sum(path.stat().st_size for path in shards_of(source)),
                "model": sum(parameter.nbytes for parameter in model.parameters()),
                "block": sum(blocks),
                "moments": min(STATISTICS_BYTES, moments_bytes(partition(find_matrices(model)))),
                "largest": max(8 * (out**2 + into**2) for out, into in shapes),
            }
            found[f"{name}, {windows} windows"] = taken
            print(name, taken, flush=True)
    interpreter, *others = found.values()
    for each in others:
        each["above_interpreter"] = each["anonymous"] - interpreter["anonymous"]
    return found


def table() -> str:
    """Render the saved results as Markdown."""
    lines = [
        "| model | code | in float32, MB | moments, MB | peak above the interpreter, MB | less moments | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for code, runs in json.loads(RESULT.read_text(encoding="utf-8")).items():
        for name, each in runs.items():
            if "above_interpreter" in each:
                above, moments = each["above_interpreter"] / 1e6, each["moments"] / 1e6
                sizes = f"{each['model'] / 1e6:.0f} | {moments:.0f} | {above:.0f} | {above - moments:.0f}"
                lines.append(f"| {name} | {code} | {sizes} | {each['cpu_seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, nargs="?", help="folder with models/ and text/")
    parser.add_argument("--name", default="now", help="of the code, in the results")
    parser.add_argument("--layers", type=int, default=24, help="of the random model")
    parser.add_argument("--table", action="store_true", help="print the saved results and measure nothing")
    options = parser.parse_args()
    if not options.table:
        runs = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        runs[options.name] = measure(options.shared, options.layers)
        RESULT.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
