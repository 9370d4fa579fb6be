"""How much memory does `eckart compress` take, against the model's size?

    python benchmarks/compress_memory.py SHARED                 # three compressions, each a process of its own
    python benchmarks/compress_memory.py SHARED --name before --code OLD/src     # the same by another checkout
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
from eckart.checkpoint import load, shards_of
from eckart.compression import read_calibration
from eckart.compression_steps import Steps
from eckart.matrices import find_matrices
from eckart.recipe import CompressSettings
from eckart.spill import Spill
from eckart.tasks import read_text
from eckart.units import find_units

RESULT = RESULTS / "memory-compress.json"
# Model, text, windows that are read, and more. Of the random model no quality is measured: its text ends with them.
RUNS = (
    ("stories260K", "tinystories", 1, ()),
    ("pebble-7m", "books", 16, ()),
    ("random", "books", 4, ("--method", "double", "--no-neurons")),
)


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


def facts(source: str, text: Path, settings: CompressSettings) -> dict[str, float]:
    """What a model and its moments take, and what a forecast says."""
    with tempfile.TemporaryDirectory() as lending:
        model, tokenizer = load(source, spill=Path(lending))
    units, _ = find_units(model, find_matrices(model), settings)
    windows = read_calibration(model, tokenizer, read_text(text), settings, None)
    steps = Steps(model, tokenizer, settings, windows, units, Spill(None), lambda _: None)
    matrices = [matrix for unit in units for matrix in unit.matrices]
    return {
        "stored": sum(path.stat().st_size for path in shards_of(source)),
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "block": sum(p.nbytes for n, p in model.named_parameters() if ".layers.0." in n),
        "moments": min(STATISTICS_BYTES, moments_bytes(matrices)),
        "largest": max(moments_bytes([matrix]) for matrix in matrices),
        "forecast": steps.most_bytes(),
    }


def measure(shared: Path, options: argparse.Namespace) -> None:
    runs = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    found = runs.setdefault(options.name, {})
    for name, text, windows, more in RUNS:
        if options.only not in (None, name):
            continue
        file = shared / "text" / f"{text}_calibration.txt"
        with tempfile.TemporaryDirectory() as place:
            source = str(shared / "models" / name)
            if name == "random":
                source = make_random(Path(place) / name, file, options.layers)
                words = file.read_text("utf-8").split()[: 256 * windows]
                file = Path(place) / "text.txt"
                file.write_text(" ".join(words), "utf-8")
            given = ["--calibration", str(file), "--ratio", "0.6", "--allocate", "uniform", "--windows", str(windows)]
            given += more
            before = os.times()
            taken = watched(["compress", source, *given, "--out", str(Path(place) / f"out-{name}")])
            after = os.times()
            taken["cpu_seconds"] = sum(after[2:4]) - sum(before[2:4])
            taken |= facts(source, file, CompressSettings(ratio=0.6, windows=windows))
        print(name, taken, flush=True)
        found[f"{name}, {windows} windows"] = taken
        RESULT.write_text(json.dumps(runs, indent=1), encoding="utf-8")


def table() -> str:
    """Render the saved results as Markdown."""
    lines = [
        "| model | code | in float32, MB | moments, MB | peak, MB | above the interpreter | less moments | forecast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for code, runs in json.loads(RESULT.read_text(encoding="utf-8")).items():
        interpreter = min(each["anonymous"] for each in runs.values())
        for name, each in runs.items():
            sizes = (each["model"], each["moments"], each["anonymous"], each["anonymous"] - interpreter)
            said = f"{each['forecast'] / 1e6:.0f}" if "forecast" in each else "–"
            cells = " | ".join(f"{size / 1e6:.0f}" for size in (*sizes, sizes[3] - each["moments"]))
            lines.append(f"| {name} | {code} | {cells} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, nargs="?", help="folder with models/ and text/")
    parser.add_argument("--name", default="now", help="of the code, in the results")
    parser.add_argument("--code", help="folder that the measured processes import eckart from")
    parser.add_argument("--only", choices=[run[0] for run in RUNS], help="measure this model alone")
    parser.add_argument("--layers", type=int, default=24, help="of the random model")
    parser.add_argument("--table", action="store_true", help="print the saved results and measure nothing")
    options = parser.parse_args()
    if options.code:
        os.environ["PYTHONPATH"] = options.code
    if not options.table:
        measure(options.shared, options)
    print(table())


if __name__ == "__main__":
    main()
