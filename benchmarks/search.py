"""How much faster is eckart's search than the LASER reference's loop, and does it find as much? Ten pairs.

    python benchmarks/search.py --threads 2                 # measure the ten pairs of PAIRS
    python benchmarks/search.py --table                     # the saved results as Markdown

eckart's time is the whole call of `eckart.search`, proof on the test examples included. The reference loop
(`reference_loop.py`) is too slow to run whole: some examples are run at some edits, and scaled to all examples and
all edits. Its decompositions are timed for every edit of the grid. A ratio is formed within one repeat, so that a
busy machine slows both sides.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from scipy import stats

import reference_loop
from eckart.checkpoint import load
from eckart.laser import SearchResult, make_grid, search
from eckart.ledger import Ledger
from eckart.matrices import Matrix, find_matrices
from eckart.plan import Edit
from eckart.race import Rules, Trial, choose
from eckart.recipe import RHO, SearchSettings
from eckart.results import environment, to_json
from eckart.scoring import prepare, score, summarize
from eckart.surgery import applied
from eckart.tasks import Example, Task, make_task, read_task, split

RESULTS = Path(__file__).parent / "results"
PAIRS = (
    *(f"pebble-7m:{task}" for task in ("book_cloze", "story_cloze", "blimp_half", "epistemic_reasoning", "truthfulqa")),
    "stories260K:story_cloze",
    "stories260K:story_continuation",
    "stories260K:blimp_half",
    "stories260K:epistemic_reasoning",
    "stories260K:fever_paper_dev",
)
# Timed against the reference loop.
SEARCHES: dict[str, dict[str, Any]] = {"race": {"strategy": "race"}, "guided": {"strategy": "guided"}}
# Run once, for the quality of what they find.
VARIANTS: dict[str, dict[str, Any]] = {
    "guided, by loss": {"strategy": "guided", "select": "loss"},
    "guided, blocks 1, 2, 4": {"strategy": "guided", "blocks": (1, 2, 4)},
    "guided, 3 together": {"strategy": "guided", "compose": 3},
}

# Bounds of the prefix cache to try beside none.
CACHE_BYTES = (2**23, 2**21, 0)

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


def run_search(
    case: Case, settings: dict[str, Any], workers: int = 1, book: Ledger | None = None
) -> tuple[SearchResult, dict[str, Any]]:
    """Run one of eckart's searches, and time it."""
    book = book or Ledger(None, {})
    started = time.perf_counter()
    chosen = case.settings.model_copy(update=settings)
    result = search(case.model, case.tokenizer, case.task, chosen, ledger=lambda _: book, workers=workers)
    return result, {"seconds": time.perf_counter() - started, "of_that": result.facts["seconds"]}


def found_by(result: SearchResult) -> dict[str, Any]:
    """What a search found, and what it cost in examples."""
    return {
        "edits": [edit.model_dump(mode="json") for edit in result.plan.edits],
        "validation": result.best["validation"],
        "test": result.best["test"],
        "test_baseline": result.baseline["test"],
        "test_gain": result.gain,
        "test_loss_gain": result.loss_gain,
        "trials": result.facts["trials"],
        "spearman": spearman(result),
    }


def spearman(result: SearchResult) -> float | None:
    """Rank correlation of the predicted with the measured loss, over the edits that were scored to the end."""
    measured = {t.edits: t.validation["loss"].value for t in result.trials if t.stopped is None}
    pairs = [(p.total, measured[(p.edit,)]) for p in result.predictions if (p.edit,) in measured]
    return float(stats.spearmanr(*zip(*pairs)).statistic) if len(pairs) > 2 else None


def time_reference(case: Case, *, examples: int, edits: int, seed: int) -> dict[str, Any]:
    """Run the reference loop on a sample, and all its decompositions; scale to the whole."""
    sample = case.examples[:examples]
    forwards = []
    for matrix, edit in sample_edits(case, edits, seed):
        with reference_loop.edited(case.model, matrix, edit.rank):
            started = time.perf_counter()
            reference_loop.answer_all(case.model, case.tokenizer, sample)
            forwards.append(_timing(edit, time.perf_counter() - started))
    started = time.perf_counter()
    for matrix, edit in case.edits:
        with reference_loop.edited(case.model, matrix, edit.rank):
            pass
    decompositions = time.perf_counter() - started
    a_pass = mean(timing["seconds"] for timing in forwards) / len(sample) * len(case.examples)
    return {
        "seconds": a_pass * len(case.edits) + decompositions,
        "examples_per_second": len(case.examples) / a_pass,
        "sample_examples": len(sample),
        "sample_passes": forwards,
        "decomposition_seconds": decompositions,
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


def check_exhaustive(case: Case, race: SearchResult, book: Ledger) -> dict[str, Any]:
    """Let an exhaustive search go on where the race stopped its edits, and compare the winners."""
    result, timing = run_search(case, {"strategy": "exhaustive"}, book=book)
    assert result.facts["trials"]["stopped"] == 0
    return {
        "edits": len(result.trials),
        "stopped_by_race": race.facts["trials"]["stopped"],
        "same_winner": result.plan.edits == race.plan.edits,
        "seconds": timing["seconds"],
    }


def measure_cache(case: Case) -> list[dict[str, Any]]:
    """Search under several bounds of the prefix cache: what it held, what that cost, whether it changed anything."""
    rows, whole = [], None
    for bound in (None, *CACHE_BYTES):
        result, timing = run_search(case, {"strategy": "guided", "cache_bytes": bound})
        found = [(trial.edits, trial.validation) for trial in result.trials], result.best
        whole = whole or found
        peak = result.facts["trials"]["prefix_cache_bytes"]
        rows.append(
            {"cache_bytes": bound, "peak_bytes": peak, "seconds": timing["seconds"], "same_trials": found == whole}
        )
    return rows


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
            trials.append(Trial((edit,), measure()))
    winner = choose(trials, baseline, Rules("accuracy"))
    whole = [(a, b) for a, b in zip(result.trials, trials) if a.stopped is None]
    return {
        "edits": len(trials),
        "same_winner": (winner.edits if winner else ()) == result.plan.edits,
        "winner": winner.edits[0] if winner else None,
        "scored_to_the_end": len(whole),
        "same_accuracies": sum(a.validation["accuracy"].value == b.validation["accuracy"].value for a, b in whole),
        "largest_loss_difference": max(abs(a.validation["loss"].value - b.validation["loss"].value) for a, b in whole),
        "seconds": time.perf_counter() - started,
    }


def measure_pair(pair: str, options: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """Measure one model and task; eckart's searches and the reference take turns.

    Args:
        pair: MODEL:TASK.
        options: From the command line.
        before: Results of an earlier run, whose other searches are kept; each search has a reference of its own run.
    """
    circumstances = watch("search.py")
    case = open_case(pair, options)
    agreement = compare_scores(case, options.reference_examples)  # warms both sides up, too
    repeats: list[dict[str, Any]] = []
    results: dict[str, SearchResult] = {}
    books: dict[str, Ledger] = {}
    for repeat in range(options.repeats):
        timings: dict[str, Any] = {}
        for name in options.searches:
            # Starting a second process takes seconds, which only a long search wins back.
            workers = options.workers if name == "race" else 1
            books[name] = Ledger(None, {})
            results[name], timings[name] = run_search(case, SEARCHES[name], workers, books[name])
        reference = time_reference(
            case,
            examples=options.reference_examples,
            edits=options.reference_edits,
            seed=options.seed + repeat,
        )
        ratios = {name: reference["seconds"] / timing["seconds"] for name, timing in timings.items()}
        repeats.append({"searches": timings, "reference": reference, "ratios": ratios})
        said = ", ".join(f"{name} {timings[name]['seconds']:.1f} s ({ratio:.0f}x)" for name, ratio in ratios.items())
        print(
            f"{pair}, repeat {repeat + 1}: {said}, reference {reference['seconds']:.0f} s", file=sys.stderr, flush=True
        )
    if options.variants:
        for name, settings in VARIANTS.items():
            results[name], _ = run_search(case, settings)
    run = {
        **circumstances(),
        "reference_seconds": spread([r["reference"]["seconds"] for r in repeats]),
        "repeats": repeats,
    }
    timed = {
        name: {
            "seconds": spread([r["searches"][name]["seconds"] for r in repeats]),
            "ratio": spread([r["ratios"][name] for r in repeats]),
            "run": run,
        }
        for name in options.searches
    }
    return {
        "model": pair.split(":")[0],
        "task": case.task.name,
        "examples": {name: len(part.examples) for name, part in zip(("validation", "test"), case.parts)},
        "edits": len(case.edits),
        "settings": case.settings.model_dump(mode="json"),
        "searches": before.get("searches", {}) | timed,
        "found": before.get("found", {}) | {name: found_by(result) for name, result in results.items()},
        "agreement": agreement,
        "exhaustive": (
            check_exhaustive(case, results["race"], books["race"]) if "race" in results else before.get("exhaustive")
        ),
        "cache": measure_cache(case) if options.cache else before.get("cache"),
        "check": check_winner(case, results["race"]) if options.check_winner else before.get("check"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _timing(edit: Edit, seconds: float) -> dict[str, Any]:
    return {"matrix": edit.matrix, "rho": edit.rho, "rank": edit.rank, "seconds": seconds}


def watch(script: str) -> Callable[[], dict[str, Any]]:
    """Begin to watch a measurement; the result, called at its end, tells under what circumstances it was made."""
    began, load_before = datetime.now(timezone.utc), os.getloadavg()
    return lambda: {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch_threads": torch.get_num_threads(),
        "load_average": {"start": load_before, "end": os.getloadavg()},
        "environment": environment(),
    }


def git_commit() -> str:
    """The commit, with `+` where files that git knows were changed since."""
    where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **where).stdout.strip()  # noqa: S607
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **where).stdout.strip()  # noqa: S607
    return commit + ("+" if changed else "")


def table(folder: Path) -> str:
    """Render the saved results as Markdown: speed, then what was found; brackets hold the smallest and the largest."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("search-*.json"))]
    results = [result for result in found if "searches" in result]
    speed = ("Model", "Task", "Examples (choose + prove)", "Edits", "Reference, s (scaled)")
    speed += tuple(f"{name}, {what}" for name in SEARCHES for what in ("s", "ratio")) + (
        "Repeats × threads, race; guided",
        "Examples scored by race",
        "Winner of exhaustive",
        "Prefix cache, MiB",
    )
    names = sorted({name for result in results for name in result["found"]}, key=[*SEARCHES, *VARIANTS].index)
    quality = ("Model", "Task", "Unedited", *names)
    return "\n\n".join(
        (_markdown(speed, map(_speed, results)), _markdown(quality, (_quality(result, names) for result in results)))
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _speed(result: dict[str, Any]) -> tuple[str, ...]:
    examples = result["examples"]
    cells = [result["model"], result["task"], f"{examples['validation']} + {examples['test']}", str(result["edits"])]
    cells.append(_spread(result["searches"]["guided"]["run"]["reference_seconds"]))
    for name in SEARCHES:
        cells += [_spread(result["searches"][name]["seconds"]), _spread(result["searches"][name]["ratio"])]
    runs = [result["searches"][name]["run"] for name in SEARCHES]
    cells.append("; ".join(f"{len(run['repeats'])} × {run['torch_threads']}" for run in runs))
    # The unedited model is scored once on the examples that choose, and three models on those that prove.
    race = result["found"]["race"]
    proving = examples["validation"] + (3 if race["edits"] else 1) * examples["test"]
    share = (race["trials"]["examples"] - proving) / (result["edits"] * examples["validation"])
    exhaustive = result.get("exhaustive") or {}
    same = {True: "same", False: "another"}.get(exhaustive.get("same_winner"), "")
    return (*cells, f"{100 * share:.0f} %", same, f"{race['trials']['prefix_cache_bytes'] / 2**20:.0f}")


def _quality(result: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Test accuracy and loss of each search's winner."""
    before = result["found"]["race"]["test_baseline"]
    cells = [result["model"], result["task"], _accuracy_and_loss(before)]
    return (
        *cells,
        *(_accuracy_and_loss(result["found"][name]["test"]) if name in result["found"] else "" for name in names),
    )


def _accuracy_and_loss(found: dict[str, Any]) -> str:
    accuracy, loss = found["accuracy"], found["loss"]
    return f"{100 * accuracy['value']:.1f} ± {100 * accuracy['stderr']:.1f} %, {loss['value']:.3f}"


def _spread(values: dict[str, float]) -> str:
    digits = 1 if values["median"] < 100 else 0
    middle, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} [{low}, {high}]"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="eckart's search against the LASER reference's loop")
    add = parser.add_argument
    add("--pair", action="append", metavar="MODEL:TASK", help=f"may be repeated; default {' '.join(PAIRS)}")
    add("--shared", type=Path, default=Path("../shared"), help="folder that holds models/ and tasks/")
    add("--rho", type=_list_of(float), default=RHO, help="kept fractions, with commas between")
    add("--layers", type=_list_of(int), help="blocks to search, with commas between; default all")
    add("--examples-limit", type=int, default=500, help="examples drawn from the task; 0 takes all")
    add("--reference-examples", type=int, default=100, help="examples the reference loop runs at each sampled edit")
    add("--reference-edits", type=int, default=2, help="edits the reference loop runs in each repeat")
    add("--repeats", type=int, default=3, help="turns of either side")
    add("--workers", type=int, default=2, help="processes of the race, which share the threads")
    add("--searches", type=_list_of(str), default=tuple(SEARCHES), help="which of them to time, with commas between")
    add("--variants", action="store_true", help="also run the searches of VARIANTS once, for what they find")
    add("--cache", action="store_true", help="also run guided under bounds of the prefix cache")
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
            path = options.results / f"search-{pair.replace(':', '-')}.json"
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            result = measure_pair(pair, options, before)
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
