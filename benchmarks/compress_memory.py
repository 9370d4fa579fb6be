"""How much memory does `eckart compress` take, against the model's size?

    python benchmarks/compress_memory.py SHARED     # two compressions, each a process of its own

Anonymous memory, looked at every 20 ms, as in benchmarks/apply_memory.py. The interpreter is what the same takes for
stories260K, which has no size to speak of, with one window of text.
"""

import argparse
import json
import tempfile
from pathlib import Path

from apply_memory import watched
from compress import RESULTS
from eckart.checkpoint import shards_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and text/")
    shared = parser.parse_args().shared
    found = {}
    for name, text, windows in (
        ("stories260K", "tinystories", 1),
        ("pebble-7m", "books", 16),
    ):
        model = str(shared / "models" / name)
        file = str(shared / "text" / f"{text}_calibration.txt")
        with tempfile.TemporaryDirectory() as place:
            out = str(Path(place) / "out")
            given = ["--calibration", file, "--ratio", "0.6", "--allocate", "uniform", "--windows", str(windows)]
            taken = watched(["compress", model, *given, "--out", out])
        taken["model"] = sum(path.stat().st_size for path in shards_of(model))
        found[f"{name}, {windows} windows"] = taken
        print(name, taken, flush=True)
    interpreter, *others = found.values()
    for each in others:
        each["above_interpreter"] = each["anonymous"] - interpreter["anonymous"]
        each["times_model"] = each["above_interpreter"] / each["model"]
    (RESULTS / "memory-compress.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
