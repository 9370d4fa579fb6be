"""How much memory does `eckart apply` take? Against a checkpoint of random weights that is many times larger.

    python benchmarks/apply_memory.py            # makes a Llama in shards, applies a plan twice, removes all of it
    python benchmarks/apply_memory.py --table    # the saved result as Markdown

Every application is a process of its own. What it takes is its anonymous memory, looked at every 20 ms: what a file
backs (the mapped checkpoint, the factors that were written already) the system can drop at any time. The interpreter
is what the same takes for a model of as many layers that is sixteen times narrower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.checkpoint import load_model, shards_of
from eckart.matrices import find_matrices, select
from eckart.plan import Plan, write_plan
from eckart.results import to_json
from eckart.surgery import make_edit, weights_sha256
from search import watch

RESULT = Path(__file__).parent / "results" / "apply-memory.json"
NARROWER = 16


def make_checkpoint(folder: Path, width: int, options: argparse.Namespace) -> None:
    """Write random weights, shard by shard, none of the model in memory but one shard."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > options.shard_mib << 20:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name]
            values = torch.ones(shape)
            if len(shape) > 1:
                values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
                left, right = (torch.randn(side, options.planted, generator=generator) for side in shape)
                values.addmm_(left, right.mT, alpha=4 / sum(shape))
            tensors[name] = values.bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def make_plan(source: Path, path: Path, options: argparse.Namespace) -> int:
    """Cut every matrix of some layers, spread over the model; say how many."""
    model = load_model(str(source), dtype="stored")
    layers = range(0, options.layers, options.layers // options.edited)
    edits = [make_edit(matrix, options.rho) for matrix in select(find_matrices(model), layers=layers)]
    about = {"source": "random", "architecture": "LlamaForCausalLM", "weights_sha256": weights_sha256(model)}
    made_by = {"eckart": "benchmark", "recipe": {}}
    write_plan(path, Plan.model_validate({"model": about, "edits": edits, "made_by": made_by}))
    return len(edits)


def apply(source: Path, plan: Path, out: Path, *extra: str) -> dict[str, float]:
    """Run `eckart apply` and watch its memory."""
    found = watched(["apply", str(source), str(plan), "--out", str(out), *extra])
    written = sum(path.stat().st_size for path in shards_of(str(out / "model")))
    shutil.rmtree(out)
    return found | {"written": written}


def watched(arguments: list[str]) -> dict[str, float]:
    """Run the program, and look at its memory every 20 ms."""
    command = [sys.executable, "-m", "eckart.cli", *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 this Python, this package
    most = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        for name in most:
            found = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name)]
            most[name] = max(most[name], *found, 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - began
    return {"anonymous": most["RssAnon"], "mapped": most["RssFile"], "seconds": seconds}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    circumstances = watch("apply_memory.py")
    found: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k not in ("folder", "table")}}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        root = Path(place)
        for name, width in (("interpreter", options.width // NARROWER), ("model", options.width)):
            source, plan = root / name, root / f"{name}.json"
            make_checkpoint(source, width, options)
            edits = make_plan(source, plan, options)
            shards = [path.stat().st_size for path in shards_of(str(source))]
            found[name] = {"bytes": sum(shards), "shards": len(shards), "edits": edits}
            for kind, extra in (("factored", ()), ("dense", ("--dense",))):
                found[name][kind] = apply(source, plan, root / "out", *extra)
                print(f"{name} {kind}: {found[name][kind]}", file=sys.stderr, flush=True)
    for kind in ("factored", "dense"):
        above = found["model"][kind]["anonymous"] - found["interpreter"][kind]["anonymous"]
        found["model"][kind] |= {"above_interpreter": above, "times": found["model"]["bytes"] / above}
    return found | circumstances()


def table() -> str:
    """Render the saved result as Markdown."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    model, narrow = result["model"], result["interpreter"]
    head = ("output", "checkpoint, MB", "shards", "written, MB", "peak, MB", "interpreter, MB", "checkpoint / rest")
    rows = [head, ("---",) * len(head)]
    for kind in ("factored", "dense"):
        found = model[kind]
        sizes = (model["bytes"], found["written"], found["anonymous"], narrow[kind]["anonymous"])
        checkpoint, written, peak, interpreter = (f"{size / 1e6:,.0f}" for size in sizes)
        rows.append((kind, checkpoint, str(model["shards"]), written, peak, interpreter, f"**{found['times']:.1f}**"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="memory of eckart apply")
    add = parser.add_argument
    add("--width", type=int, default=1024, help="of the hidden states")
    add("--layers", type=int, default=96)
    add("--edited", type=int, default=8, help="layers whose seven matrices are cut")
    add("--rho", type=float, default=0.1)
    add("--planted", type=int, default=0, help="rank of a signal in every matrix")
    add("--shard-mib", type=int, default=200)
    add("--folder", type=Path, help="of the temporary files; several GB")
    add("--table", action="store_true", help="print the saved result and measure nothing")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    if not options.table:
        RESULT.write_text(to_json(measure(options)), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
