"""An elastic folder beside dedicated checkpoints: bytes on disk, bytes read, time to load, perplexity.

    python benchmarks/elastic.py SHARED WORK --model stories260K     # and pebble-7m; WORK keeps the folders
    python benchmarks/elastic.py --table

The elastic folder is written once by `eckart compress --elastic --ratio 0.9`. Dedicated checkpoints of the same method
(without neurons) are compressed at each ratio with the same kind of allocation, calibrated there. Perplexity is
that of the first 64 windows of 256 tokens of the validation text. Loading is timed beside the dedicated folder of the
same size (`eckart apply --ratio`), in turns, in processor seconds. What is read is counted twice: bytes asked of the
files, and pages that the system read when another process loaded a file that was not in memory, and ran the model.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import eckart
from eckart.calibration import read_windows
from eckart.checkpoint import load_model
from eckart.compression import compress
from eckart.compression_run import run_compress
from eckart.elastic import Slices
from eckart.factoring import factor_
from eckart.quantizer import sizes
from eckart.recipe import CompressSettings
from eckart.run import run_apply
from eckart.scoring import score, summarize
from eckart.tasks import read_text

RESULTS = Path(__file__).parent / "results"
TEXTS = {"stories260K": "tinystories", "pebble-7m": "books"}
LARGEST = 0.9
ROUNDS = 7

LOAD = """
import sys, torch, eckart
from transformers import AutoModelForCausalLM
given = {"ratio": float(sys.argv[2])} if len(sys.argv) > 2 else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **given)
model(input_ids=torch.tensor([[1, 2, 3]]))
"""


def perplexity(model, tokenizer, windows) -> dict:
    found = summarize(windows, score(model, tokenizer, windows))["perplexity"]
    return {"value": found.value, "stderr": found.stderr, "count": found.count}


def bytes_asked(folder: Path, ratio: float) -> int:
    """Bytes that loading asks of the files: by eckart, and by transformers for the rest."""
    total = 0
    read, copied = Slices.read, transformers.core_model_loading._materialize_copy

    def counting_read(self, name, count=None):
        nonlocal total
        tensor = read(self, name, count)
        total += tensor.nbytes
        return tensor

    def counting_copy(tensor, *arguments, **options):
        nonlocal total
        total += tensor[...].nbytes
        return copied(tensor, *arguments, **options)

    Slices.read, transformers.core_model_loading._materialize_copy = counting_read, counting_copy
    try:
        load_model(str(folder), dtype="stored", ratio=ratio)
    finally:
        Slices.read, transformers.core_model_loading._materialize_copy = read, copied
    return total


def resident(path: Path) -> int:
    """Bytes of a file's pages that are in memory."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as held,
    ):
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(held))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
        return sum(page & 1 for page in found) * mmap.PAGESIZE


def bytes_of_pages(folder: Path, ratio: float) -> int | None:
    """Bytes in memory of a copy of the weights' file after a process loaded it from the disk; None if it never left."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        copy = Path(shutil.copytree(folder, Path(place) / "copy"))
        path = copy / "model.safetensors"
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if resident(path):
            return None
        command = [sys.executable, "-c", LOAD, str(copy), str(ratio)]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
        return resident(path)


def seconds_to_load(sides: dict[str, tuple[Path, float | None]]) -> dict[str, dict]:
    taken = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, (folder, ratio) in sides.items():
            start = time.process_time()
            load_model(str(folder), dtype="stored", ratio=ratio)
            taken[name].append(time.process_time() - start)
    return {
        name: {"median": statistics.median(values), "quartiles": statistics.quantiles(values, n=4)[::2]}
        for name, values in taken.items()
    }


class Bench:
    def __init__(self, shared: Path, work: Path, name: str, allocate: str):
        self.shared, self.work, self.name, self.allocate = shared, work / name, name, allocate
        self.path = RESULTS / f"elastic-{name}.json"
        self.held = (
            json.loads(self.path.read_text()) if self.path.exists() else {"model": name, "rows": [], "folders": {}}
        )
        self.source = shared / "models" / name
        self.text = shared / "text" / f"{TEXTS[name]}_calibration.txt"
        self.model, self.tokenizer = eckart.load(str(self.source))
        validation = read_text(shared / "text" / f"{TEXTS[name]}_validation.txt")
        self.windows = read_windows(validation, self.tokenizer, length=256, count=64)

    def keep(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.held, indent=1))

    def has(self, **key) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.held["rows"])

    def add(self, row: dict) -> None:
        self.held["rows"].append(row)
        self.keep()
        print(json.dumps(row), flush=True)

    def folder(self, method: str) -> Path:
        out = self.work / method
        if not (out / "results.json").exists():
            start = time.process_time()
            settings = CompressSettings(ratio=LARGEST, method=method, allocate=self.allocate, elastic=True)
            results = run_compress(str(self.source), self.text, out, settings)
            self.held["folders"][method] = {
                "bytes": results["elastic"]["bytes"],
                "allocate": self.allocate,
                "dense": sum(path.stat().st_size for path in self.source.glob("*.safetensors")),
                "seconds": time.process_time() - start,
            }
            self.keep()
        return out / "model"

    def run(self, methods: list[str], ratios: list[float], dedicated: list[float]) -> None:
        for method in methods:
            folder = self.folder(method)
            for ratio in ratios:
                if not self.has(method=method, ratio=ratio, kind="elastic"):
                    self.elastic(folder, method, ratio)
                if ratio in dedicated and not self.has(method=method, ratio=ratio, kind="dedicated"):
                    self.dedicated(method, ratio)

    def elastic(self, folder: Path, method: str, ratio: float) -> None:
        model = load_model(str(folder), ratio=ratio)
        alone = self.work / f"{method}-{ratio:g}"
        if not alone.exists():
            run_apply(str(folder), None, alone, ratio=ratio)
        seconds = seconds_to_load({"elastic": (folder, ratio), "dedicated": (alone / "model", None)})
        self.add(
            {
                "kind": "elastic",
                "method": method,
                "ratio": ratio,
                "perplexity": perplexity(model, self.tokenizer, self.windows),
                "bytes": {
                    "model": sizes(load_model(str(folder), dtype="stored", ratio=ratio))[0].bytes,
                    "asked": bytes_asked(folder, ratio),
                    "pages": bytes_of_pages(folder, ratio),
                    "dedicated_file": (alone / "model" / "model.safetensors").stat().st_size,
                },
                "load_cpu_seconds": seconds,
            }
        )

    def dedicated(self, method: str, ratio: float) -> None:
        start = time.process_time()
        found = compress(
            self.model,
            self.tokenizer,
            read_text(self.text),
            CompressSettings(ratio=ratio, method=method, allocate=self.allocate, neurons=False),
        )
        small = load_model(str(self.source))
        factor_(small, found.plan, factors=found.factors, storage="pivoted")
        self.add(
            {
                "kind": "dedicated",
                "method": method,
                "ratio": ratio,
                "chosen": found.chosen,
                "perplexity": perplexity(small, self.tokenizer, self.windows),
                "seconds": time.process_time() - start,
            }
        )


def table() -> None:
    for path in sorted(RESULTS.glob("elastic-*.json")):
        held = json.loads(path.read_text())
        print(f"\n**{held['model']}**\n")
        for method, size in held["folders"].items():
            print(f"{method}: {size['bytes']:,} bytes; dense {size['dense']:,}; {size['seconds']:.0f} CPU s\n")
        print("| method | ratio | perplexity | dedicated | bytes of the model | asked | pages read ", end="")
        print("| CPU s to load | dedicated |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in held["rows"]:
            if row["kind"] != "elastic":
                continue
            same = [
                other["perplexity"]
                for other in held["rows"]
                if other["kind"] == "dedicated" and (other["method"], other["ratio"]) == (row["method"], row["ratio"])
            ]
            alone = f"{same[0]['value']:.2f} ± {same[0]['stderr']:.2f}" if same else "–"
            taken, size = row["load_cpu_seconds"], row["bytes"]
            pages = "–" if size["pages"] is None else f"{size['pages']:,}"
            timed = [
                f"{taken[side]['median']:.3f} ({taken[side]['quartiles'][0]:.3f}–{taken[side]['quartiles'][1]:.3f})"
                for side in ("elastic", "dedicated")
            ]
            found = row["perplexity"]
            print(
                f"| {row['method']} | {row['ratio']:g} | {found['value']:.2f} ± {found['stderr']:.2f} "
                f"| {alone} | {size['model']:,} | {size['asked']:,} | {pages} | {timed[0]} | {timed[1]} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", nargs="?", type=Path, help="folder with models/ and text/")
    parser.add_argument("work", nargs="?", type=Path, help="folder that keeps what is written")
    parser.add_argument("--model", choices=TEXTS, default="stories260K")
    parser.add_argument("--methods", default="double,propagated")
    parser.add_argument("--allocate", default="auto")
    parser.add_argument("--ratios", default="0.9,0.8,0.7,0.6,0.5,0.4")
    parser.add_argument(
        "--dedicated", default="0.9,0.8,0.7,0.6,0.5,0.4", help="of these, compressed by themselves, too"
    )
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured")
    given = parser.parse_args()
    if given.table:
        table()
        return
    assert given.shared is not None, "give the folder with models/ and text/"
    assert given.work is not None, "give a folder for what is written"
    torch.set_num_threads(1)
    numbers = [[float(word) for word in words.split(",") if word] for words in (given.ratios, given.dedicated)]
    Bench(given.shared, given.work, given.model, given.allocate).run(given.methods.split(","), *numbers)


if __name__ == "__main__":
    main()
