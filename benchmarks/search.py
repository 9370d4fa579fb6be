"""How much faster is eckart's search than the LASER reference's loop? Both in one run, taking turns.

    python benchmarks/search.py              # measure the four pairs of PAIRS
    python benchmarks/search.py --table      # the saved results as Markdown

eckart's time is the whole call of `eckart.laser.search`. The reference loop (`reference_loop.py`) is too slow to
run whole: some examples are run at some edits, and scaled to all examples and all edits. Its decompositions are
timed for every edit of the grid. A ratio is formed within one repeat, so that a busy machine slows both sides.

The default takes 100 examples and 3 of the 8 rho, to end within a quarter of an hour on two cores. That favours
the reference: the proof on the test examples costs eckart the same however few edits went before it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import reference_loop
from eckart.checkpoint import load
from eckart.laser import SearchResult, Trial, choose, make_grid, search
from eckart.matrices import Matrix, find_matrices
from eckart.plan import Edit
from eckart.recipe import SearchSettings
from eckart.results import environment, to_json
from eckart.scoring import prepare, score, summarize
from eckart.surgery import applied
from eckart.tasks import Example, Task, make_task, read_task, split

RESULTS = Path(__file__).parent / "results"
PAIRS = (
    "stories260K:epistemic_reasoning",
    "stories260K:story_cloze",
    "pebble-7m:epistemic_reasoning",
    "pebble-7m:book_cloze",
)

Grid = Sequence[tuple[Matrix, list[Edit]]]


@dataclass(frozen=True)
class Case:
    """One model with one task and the grid to search."""

    model: Any
    tokenizer: Any
    task: Task
    settings: SearchSettings
    matrices: tuple[Matrix, ...]
    grid: Grid

    @property
    def edits(self) -> list[tuple[Matrix, Edit]]:
        """Every edit with its matrix, from the first layer to the last."""
        pairs = [(matrix, edit) for matrix, edits in self.grid for edit in edits]
        return sorted(pairs, key=lambda pair: pair[0].layer or 0)

    @property
    def layers(self) -> list[int]:
        return sorted({matrix.layer or 0 for matrix, _ in self.grid})

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples that choose, then those that prove."""
        validation, test = self.parts
        return validation.examples + test.examples

    @property
    def parts(self) -> tuple[Task, Task]:
        settings = self.settings
        return split(self.task, settings.split, seed=settings.seed, shuffle=settings.shuffle)


def open_case(pair: str, options: argparse.Namespace) -> Case:
    model_name, task_name = pair.split(":")
    model, tokenizer = load(str(options.shared / "models" / model_name), device="cpu")
    task = read_task(options.shared / "tasks" / f"{task_name}.jsonl")
    if task.kind != "choice":
        raise SystemExit(f"{task_name} has no choices. The reference loop scores choices. Take another task.")
    if options.examples_limit and options.examples_limit < len(task.examples):
        drawn = random.Random(options.seed).sample(task.examples, options.examples_limit)  # noqa: S311
        task = make_task(task.name, drawn)
    settings = SearchSettings(seed=options.seed, rho=options.rho, layers=options.layers)
    matrices = find_matrices(model)
    return Case(model, tokenizer, task, settings, matrices, make_grid(matrices, settings))


def time_search(case: Case) -> tuple[SearchResult, dict[str, Any]]:
    """Run eckart's search; a layer's time runs from the end of the layer before it.

    Layer 0's time includes tokenisation and the unedited model; the last entry is the proof on the test examples.
    """
    stamps: list[tuple[int, float]] = []
    started = time.perf_counter()
    result = search(
        case.model,
        case.tokenizer,
        case.task,
        case.settings,
        progress=lambda progress: stamps.append((progress.done, time.perf_counter())),
    )
    ended = time.perf_counter()
    layers, begin, done = {}, started, 0
    for layer in case.layers:
        done += sum((matrix.layer or 0) == layer for matrix, _ in case.edits)
        end = next(stamp for count, stamp in stamps if count >= done)
        layers[layer] = end - begin
        begin = end
    timings = {
        "seconds": ended - started,
        "layer_seconds": layers,
        "proof_seconds": ended - begin,
        "examples": result.facts["trials"]["examples"],
        "engine_seconds": result.facts["seconds"],
    }
    return result, timings


def time_reference(case: Case, *, examples: int, edits: int, seed: int) -> dict[str, Any]:
    """Run the reference loop on a sample, and all its decompositions; scale to the whole."""
    sample = case.examples[:examples]
    forwards = []
    for matrix, edit in sample_edits(case, edits, seed):
        with reference_loop.edited(case.model, matrix, edit.rank):
            started = time.perf_counter()
            reference_loop.answer_all(case.model, case.tokenizer, sample)
            forwards.append(_timing(edit, time.perf_counter() - started))
    decompositions = []
    for matrix, edit in case.edits:
        started = time.perf_counter()
        with reference_loop.edited(case.model, matrix, edit.rank):
            pass
        decompositions.append(_timing(edit, time.perf_counter() - started))
    a_pass = mean(timing["seconds"] for timing in forwards) / len(sample) * len(case.examples)
    layers = dict.fromkeys(case.layers, 0.0)
    for (matrix, _), timing in zip(case.edits, decompositions):
        layers[matrix.layer or 0] += a_pass + timing["seconds"]
    return {
        "seconds": sum(layers.values()),
        "layer_seconds": layers,
        "examples_per_second": len(case.examples) / a_pass,
        "sample_examples": len(sample),
        "sample_passes": forwards,
        "decompositions": decompositions,
    }


def sample_edits(case: Case, count: int, seed: int) -> list[tuple[Matrix, Edit]]:
    """Draw edits whose layers, then types, then rho differ as far as the grid allows."""
    left = list(case.edits)
    random.Random(seed).shuffle(left)  # noqa: S311
    drawn: list[tuple[Matrix, Edit]] = []

    def seen(pair: tuple[Matrix, Edit]) -> tuple[int, ...]:
        return tuple(
            sum(getattr(edit, name) == getattr(pair[1], name) for _, edit in drawn) for name in ("layer", "type", "rho")
        )

    for _ in range(min(count, len(left))):
        drawn.append(min(left, key=seen))
        left.remove(drawn[-1])
    return drawn


def compare_scores(case: Case, examples: int) -> dict[str, Any]:
    """Check on the unedited model that both sides score the same thing; not timed.

    The two rules for where an answer begins differ where its first token is a lone space.
    """
    sample = make_task(case.task.name, case.examples[:examples])
    encoded = prepare(case.model, case.tokenizer, sample)
    ours = score(case.model, case.tokenizer, encoded)
    theirs = reference_loop.answer_all(case.model, case.tokenizer, sample.examples)
    same = [
        answered.lengths[int(example.answer or 0)] == length
        for example, answered, length in zip(sample.examples, theirs, encoded.tokens)
    ]
    said = [example.choices[answered.pick] for example, answered in zip(sample.examples, theirs)]
    return {
        "examples": len(same),
        "same_answer_tokens": sum(same),
        "largest_loss_difference": max(
            (abs(a - b.loss) for a, b, equal in zip(ours.loss, theirs, same) if equal), default=None
        ),
        "same_prediction": sum(a == b for a, b in zip(ours.prediction, said)),
    }


def check_winner(case: Case, result: SearchResult) -> dict[str, Any]:
    """Search by brute force, the whole model for every edit, and compare with what eckart found."""
    validation, _ = case.parts
    started = time.perf_counter()
    encoded = prepare(case.model, case.tokenizer, validation, **case.settings.encoding)

    def measure() -> dict[str, Any]:
        scores = score(case.model, case.tokenizer, encoded, normalize=case.settings.normalize)
        return summarize(encoded, scores)

    baseline = measure()
    trials = []
    for edit in (edit for _, edits in case.grid for edit in edits):
        with applied(case.model, [edit], case.matrices):
            trials.append(Trial(edit, measure()))
    winner = choose(trials, baseline)
    differences = [abs(a.validation["loss"].value - b.validation["loss"].value) for a, b in zip(result.trials, trials)]
    return {
        "edits": len(trials),
        "same_winner": (winner.edit if winner else None) == winner_of(result),
        "winner": winner.edit if winner else None,
        "same_accuracies": sum(
            a.validation["accuracy"].value == b.validation["accuracy"].value for a, b in zip(result.trials, trials)
        ),
        "equal_losses": sum(difference == 0 for difference in differences),
        "largest_loss_difference": max(differences),
        "seconds": time.perf_counter() - started,
    }


def winner_of(result: SearchResult) -> Edit | None:
    return result.plan.edits[0] if result.plan.edits else None


def measure_pair(pair: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model and task; eckart and the reference take turns."""
    began, load_before = datetime.now(timezone.utc), os.getloadavg()
    case = open_case(pair, options)
    agreement = compare_scores(case, options.reference_examples)  # warms both sides up, too
    repeats, winners = [], []
    for repeat in range(options.repeats):
        result, ours = time_search(case)
        reference = time_reference(
            case,
            examples=options.reference_examples,
            edits=options.reference_edits,
            seed=options.seed + repeat,
        )
        repeats.append({"eckart": ours, "reference": reference, **ratios(ours, reference)})
        winners.append(winner_of(result))
        print(f"{pair}, repeat {repeat + 1}: {describe(repeats[-1])}", file=sys.stderr, flush=True)
    return {
        "model": pair.split(":")[0],
        "task": case.task.name,
        "examples": {name: len(part.examples) for name, part in zip(("validation", "test"), case.parts)},
        "edits": len(case.edits),
        "settings": case.settings.model_dump(mode="json"),
        "winner": winners[0],
        "winner_gain": result.gain,
        "same_winner_in_every_repeat": all(winner == winners[0] for winner in winners),
        "summary": summary(repeats),
        "agreement": agreement,
        "check": check_winner(case, result) if options.check_winner else None,
        "repeats": repeats,
        "command": shlex.join(["python", "benchmarks/search.py", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch_threads": torch.get_num_threads(),
        "load_average": {"start": load_before, "end": os.getloadavg()},
        "environment": environment(),
    }


def ratios(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    layers = {layer: reference["layer_seconds"][layer] / seconds for layer, seconds in ours["layer_seconds"].items()}
    return {"ratio": reference["seconds"] / ours["seconds"], "layer_ratios": layers}


def describe(repeat: dict[str, Any]) -> str:
    ours, reference = repeat["eckart"]["seconds"], repeat["reference"]["seconds"]
    return f"eckart {ours:.1f} s, reference {reference:.0f} s, ratio {repeat['ratio']:.1f}"


def summary(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats, with the smallest and the largest."""
    layers = repeats[0]["layer_ratios"]
    return {
        "eckart_seconds": spread([r["eckart"]["seconds"] for r in repeats]),
        "reference_seconds": spread([r["reference"]["seconds"] for r in repeats]),
        "ratio": spread([r["ratio"] for r in repeats]),
        "layer_ratios": {layer: spread([r["layer_ratios"][layer] for r in repeats]) for layer in layers},
        "eckart_examples_per_second": spread([r["eckart"]["examples"] / r["eckart"]["seconds"] for r in repeats]),
        "reference_examples_per_second": spread([r["reference"]["examples_per_second"] for r in repeats]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _timing(edit: Edit, seconds: float) -> dict[str, Any]:
    return {"matrix": edit.matrix, "rho": edit.rho, "rank": edit.rank, "seconds": seconds}


def git_commit() -> str:
    """The commit, with `+` where files that git knows were changed since."""
    where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **where).stdout.strip()  # noqa: S607
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **where).stdout.strip()  # noqa: S607
    return commit + ("+" if changed else "")


def table(folder: Path) -> str:
    """Render the saved results as a Markdown table; brackets hold the smallest and the largest."""
    head = (
        "Model",
        "Task",
        "Examples (choose + prove)",
        "Edits",
        "eckart, s",
        "Reference, s (scaled)",
        "Ratio",
        "Ratio, first to last layer",
        "Examples/s, eckart",
        "Examples/s, reference",
        "Winner",
    )
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("search-*.json"))]
    rows = [head, ("---",) * len(head), *(_row(result) for result in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    found, winner, examples = result["summary"], result["winner"], result["examples"]
    layers = [found["layer_ratios"][layer]["median"] for layer in sorted(found["layer_ratios"], key=int)]
    return (
        result["model"],
        result["task"],
        f"{examples['validation']} + {examples['test']}",
        str(result["edits"]),
        _spread(found["eckart_seconds"]),
        _spread(found["reference_seconds"]),
        _spread(found["ratio"]),
        " ".join(f"{ratio:.0f}" for ratio in layers),
        _spread(found["eckart_examples_per_second"]),
        _spread(found["reference_examples_per_second"]),
        f"`{winner['matrix']}` rank {winner['rank']}" if winner else "none",
    )


def _spread(values: dict[str, float]) -> str:
    digits = 1 if values["median"] < 100 else 0
    middle, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} [{low}, {high}]"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="eckart's search against the LASER reference's loop")
    add = parser.add_argument
    add("--pair", action="append", metavar="MODEL:TASK", help=f"may be repeated; default {' '.join(PAIRS)}")
    add("--shared", type=Path, default=Path("../shared"), help="folder that holds models/ and tasks/")
    add("--rho", type=_list_of(float), default=(0.01, 0.1, 0.6), help="kept fractions, with commas between")
    add("--layers", type=_list_of(int), help="blocks to search, with commas between; default all")
    add("--examples-limit", type=int, default=100, help="examples drawn from the task; 0 takes all")
    add("--reference-examples", type=int, default=200, help="examples the reference loop runs at each sampled edit")
    add("--reference-edits", type=int, default=2, help="edits the reference loop runs in each repeat")
    add("--repeats", type=int, default=3, help="turns of either side")
    add("--check-winner", action="store_true", help="repeat the search by brute force and compare")
    add("--threads", type=int, help="threads of torch; default torch's own")
    add("--seed", type=int, default=0)
    add("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    add("--table", action="store_true", help="print the saved results and measure nothing")
    return parser.parse_args(arguments)


def _list_of(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


def main() -> None:
    options = parse_options()
    if not options.table:
        if options.threads:
            torch.set_num_threads(options.threads)
        options.results.mkdir(parents=True, exist_ok=True)
        for pair in options.pair or PAIRS:
            result = measure_pair(pair, options)
            path = options.results / f"search-{result['model']}-{result['task']}.json"
            path.write_text(to_json(_plain(result)), encoding="utf-8")
    print(table(options.results))


def _plain(value: Any) -> Any:
    """Turn pydantic models inside results into dicts."""
    if isinstance(value, Edit):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main()
