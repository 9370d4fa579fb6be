"""How much of the quality that low rank costs comes back, in how much CPU time, and what initialisation is worth.

    OMP_NUM_THREADS=1 python benchmarks/recover.py SHARED [PART …]

SHARED holds models/ and text/; parts are `same`, `sampled`, `new`, `init`, `method`, `teacher` and `table`, by default
all of them. Models start from what `eckart compress` makes of them by default (`compress`), or are cut to an equal
share of every matrix by the closed form in the metric of outputs (`cut`; pivoted storage unless a part says
otherwise), then trained. Text for training and for measuring are different files. Each case is kept in a JSON file
beside this script when it is done, and is not measured again; `--keep DIR` also keeps what `compress` made, and a
training that was killed goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
import torch

import eckart
from eckart.dataflow import low_rank_layers
from eckart.factoring import factor_
from eckart.initialisation import dense_weights, initialise_, input_moments
from eckart.matrices import find_matrices, read, write
from eckart.monarch import block_errors, fit
from eckart.plan import Edit
from eckart.recipe import CompressSettings, RecoverSettings
from eckart.recovery import recover
from eckart.results import environment, paired_gain, perplexity, to_json, write_text
from eckart.training import make_windows, window_losses

RESULTS = Path(__file__).parent / "results"
WINDOW, TEST_WINDOWS, FIRST_WINDOWS = 256, 128, 64
KIND = {"stories260K": "tinystories", "pebble-7m": "books"}
STEPS = {"stories260K": 400, "pebble-7m": 120}
RATE = {"stories260K": 2e-3, "pebble-7m": 1e-3}
SAMPLED: tuple[tuple[str, float | str, dict[str, Any]], ...] = (
    ("stories260K", 0.8, {"sampled": 3072, "lm_weight": 1.5, "steps": 2000, "evaluations": 8}),
    ("stories260K", 0.8, {"sampled": 4096, "lm_weight": 2.0, "steps": 3600, "evaluations": 8}),
    ("stories260K", 0.5, {"sampled": 3072, "lm_weight": 1.5, "steps": 2000, "evaluations": 8}),
    ("pebble-7m", 0.5, {"sampled": 128, "lm_weight": 1.0, "steps": 80, "lr": 2e-4}),
    ("pebble-7m", 0.5, {"sampled": 128, "loss": "kl", "steps": 70, "lr": 2e-4}),
)
"""Cases of part `sampled`: model, share, settings."""


def edits_of(model: Any, budget: float | str, *, pivoted: bool = True) -> list[Edit]:
    """Every matrix in the blocks, at one share of its numbers, or at half of its smaller side."""
    edits = []
    for matrix in find_matrices(model):
        if matrix.layer is None or matrix.type in ("other", "qkv_proj"):
            continue
        rows, columns = matrix.shape
        total = rows + columns
        if budget == "half":
            rank = min(matrix.shape) // 2
        elif pivoted:
            rank = int((total - math.sqrt(total**2 - 4 * budget * rows * columns)) / 2)
        else:
            rank = int(budget * rows * columns / total)
        rho = rank / min(matrix.shape)
        edits.append(
            Edit(matrix=matrix.name, layer=matrix.layer, type=matrix.type, shape=matrix.shape, rho=rho, rank=rank)
        )
    return edits


class Case:
    """One model, its text, and the windows that judge."""

    def __init__(self, shared: Path, name: str, text: str):
        self.name = name
        self.dense, self.tokenizer = eckart.load(str(shared / "models" / name))
        self.text = eckart.read_text(shared / "text" / f"{text}_calibration.txt")
        judged = eckart.read_text(shared / "text" / f"{text}_validation.txt")
        whole = [self.tokenizer(example.prompt).input_ids for example in judged.examples]
        ids = torch.tensor([token for document in whole for token in document])
        rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        spread = rows[torch.arange(TEST_WINDOWS) * len(rows) // TEST_WINDOWS]
        self.judges = {"spread": spread, "first": rows[:FIRST_WINDOWS]}
        self.dense_losses = self.losses(self.dense)

    def losses(self, model: Any) -> dict[str, np.ndarray]:
        return {name: window_losses(model, windows.split(8)) for name, windows in self.judges.items()}

    def cut(self, shared: Path, budget: float | str, metric: str = "outputs", *, pivoted: bool = True) -> Any:
        """The dense model with factors: plain SVD, ASVD (alpha 0.5), or the closed form in the metric of outputs."""
        model, _ = eckart.load(str(shared / "models" / self.name))
        factor_(model, edits_of(model, budget, pivoted=pivoted), storage="pivoted" if pivoted else "factored")
        if metric != "weights":
            windows = make_windows(self.text, self.tokenizer, RecoverSettings(), None).train[:64]
            moments = input_moments(self.dense, list(low_rank_layers(model)), windows.split(8))
            if metric == "asvd":
                moments = {path: found.diagonal().sqrt().diag() for path, found in moments.items()}
            initialise_(model, dense_weights(model, self.dense), 10**6, moments)
        return model

    def compressed(self, shared: Path, ratio: float, **how: Any) -> Any:
        """What `eckart compress` makes of the dense model; by default as the command does."""
        settings = CompressSettings(ratio=ratio, **how)
        found = eckart.compress(self.dense, self.tokenizer, self.text, settings)
        model, _ = eckart.load(str(shared / "models" / self.name))
        factor_(model, found.plan, factors=found.factors, storage=settings.storage)
        return model

    def facts(self, model: Any) -> dict[str, Any]:
        """On windows spread over the file, and on its first ones."""
        found = self.dense_losses if model is self.dense else self.losses(model)
        facts = {
            name: {
                "perplexity": perplexity(losses, np.full(len(losses), WINDOW - 1)),
                "against_dense": paired_gain(self.dense_losses[name], losses, "nats/token"),
                "times_dense": math.exp(losses.mean() - self.dense_losses[name].mean()),
            }
            for name, losses in found.items()
        }
        size = sum(parameter.numel() for parameter in model.parameters())
        return facts["spread"] | {"parameters": size, "first": facts["first"]}

    def recovered(self, model: Any, state: Path | None = None, **settings: Any) -> dict[str, Any]:
        """Train a model, and measure it before and after."""
        chosen = RecoverSettings(
            **{"steps": STEPS[self.name], "lr": RATE[self.name], "evaluations": 4, "patience": None} | settings
        )
        before, started = self.facts(model), time.process_time()
        with TemporaryDirectory() as folder:  # the teacher's predictions are kept there
            place = state or Path(folder)
            found = recover(model, self.tokenizer, self.text, chosen, teacher=self.dense, state=place)
        return {
            "settings": chosen.model_dump(),
            "before": before,
            "after": self.facts(model),
            "trained": found.facts["trained"],
            "cpu_seconds": round(time.process_time() - started, 1),
            "seconds": found.facts["seconds"],
            "best_step": found.best_step,
            # Documents of the training text that took no part; not always of one style with the other file.
            "same_text": found.test | {"gain": found.gain, "against_dense": found.teacher_gain},
            "curve": [(p.step, round(p.epoch, 3), p.held_out.value, p.held_out.stderr) for p in found.curve],
        }


def same(shared: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Recovery on text of the same kind as the model's own."""
    for name, kind in KIND.items():
        for budget, start in ((0.8, "compress"), (0.5, "compress"), ("half", "cut"), (0.8, "cut")):

            def measure(name: str = name, kind: str = kind, budget: Any = budget, start: str = start) -> Any:
                case, began = Case(shared, name, kind), time.process_time()
                model = (case.compressed if start == "compress" else case.cut)(shared, budget)
                seconds = round(time.process_time() - began, 1)
                return {"dense": case.facts(case.dense), "start_cpu_seconds": seconds} | case.recovered(model)

            yield f"{name}, {kind}, {budget}, {start}", measure


def sampled(shared: Path, keep: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Recovery on the text and on windows that the dense model writes."""
    for name, budget, settings in SAMPLED:

        def measure(name: str = name, budget: float | str = budget, settings: Any = settings) -> Any:
            case, start = Case(shared, name, KIND[name]), keep / f"{name}-{budget}"
            if isinstance(budget, str):
                model, seconds = case.cut(shared, budget), 0.0
            else:
                model, seconds = kept(start, lambda: case.compressed(shared, budget), case)
            facts = {"dense": case.facts(case.dense), "start_cpu_seconds": seconds}
            return facts | case.recovered(model, start.with_name(f"{start.name}-{settings['steps']}"), **settings)

        yield f"{name}, {KIND[name]}, {budget}, {settings['steps']} steps", measure


def kept(folder: Path, make: Callable[[], Any], case: Case) -> tuple[Any, float]:
    """A model with factors and the CPU seconds it took to make, from a folder if it is there."""
    began, note = time.process_time(), folder.with_name(f"{folder.name}.json")
    if not note.exists():
        eckart.save(make(), folder, case.tokenizer)
        write_text(note, to_json(round(time.process_time() - began, 1)))
    return eckart.load(str(folder))[0], json.loads(note.read_text())


def new(shared: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Recovery on a kind of text that is new to the model: by its tokens alone."""
    for name, kind in (("stories260K", "books"), ("pebble-7m", "tinystories")):
        for budget in (0.8, "half"):

            def measure(name: str = name, kind: str = kind, budget: float | str = budget) -> Any:
                case = Case(shared, name, kind)
                return {"dense": case.facts(case.dense)} | case.recovered(case.cut(shared, budget), loss="lm")

            yield f"{name}, {kind}, {budget}", measure


def init(shared: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """LoRA of rank 8 on the factors of an ASVD at half of the smaller side, from each initialisation; three seeds."""
    for kind in ("tinystories", "books"):
        for start in ("zero", "residual", "output-residual"):
            for seed in range(3):

                def measure(kind: str = kind, start: str = start, seed: int = seed) -> Any:
                    case = Case(shared, "stories260K", kind)
                    model = case.cut(shared, "half", "asvd", pivoted=False)
                    loss = "lm" if kind == "books" else "both"
                    options = {"steps": 60, "evaluations": 6, "lr": 5e-3, "rank": 8}
                    return case.recovered(model, method="lora", init=start, seed=seed, loss=loss, **options)

                yield f"stories260K, {kind}, {start}, seed {seed}", measure


def method(shared: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Factors against LoRA merged at equal bytes, in as many steps; LoRA at three learning rates."""
    for way, rate, rank in (("factors", 2e-3, 8), ("lora", 5e-3, 8), ("lora", 1e-2, 8), ("lora", 5e-3, 16)):

        def measure(way: str = way, rate: float = rate, rank: int = rank) -> Any:
            case = Case(shared, "stories260K", "tinystories")
            return case.recovered(case.cut(shared, 0.8), method=way, lr=rate, rank=rank, steps=120)

        yield f"stories260K, 0.8, {way}, rate {rate}, rank {rank}", measure


def teacher(shared: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """How many of the teacher's predictions have to be kept."""
    for top in (8, 64, None):

        def measure(top: int | None = top) -> Any:
            case = Case(shared, "stories260K", "tinystories")
            return case.recovered(case.cut(shared, 0.8), teacher_top=top, loss="kl", steps=120)

        yield f"stories260K, 0.8, top {top or 'all'}", measure


def table(shared: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What can be done without training at rank = half of the smaller side, factored. Its trained rows are `init`'s."""

    def monarch(case: Case) -> Any:
        model, _ = eckart.load(str(shared / "models" / case.name))
        ranks = {edit.matrix: edit.rank for edit in edits_of(model, "half")}
        for matrix in find_matrices(model):
            if matrix.name in ranks:
                weight, width = read(model, matrix), ranks[matrix.name]
                grid = int(block_errors(weight)[1][width])
                write(model, matrix, fit(weight, grid, width // grid).dense())
        return model

    def corrected(case: Case, moments: bool) -> Any:
        model = case.cut(shared, "half", "asvd", pivoted=False)
        windows = make_windows(case.text, case.tokenizer, RecoverSettings(), None).train[:64]
        seen = input_moments(case.dense, list(low_rank_layers(model)), windows.split(8)) if moments else None
        initialise_(model, dense_weights(model, case.dense), 8, seen)
        return model

    def allocated(case: Case, **how: Any) -> Any:
        edits = edits_of(case.dense, "half")
        share = sum(edit.rank * sum(edit.shape) for edit in edits) / sum(math.prod(edit.shape) for edit in edits)
        return case.compressed(shared, share, **how)

    ways: dict[str, Callable[[Case], Any]] = {
        "dense": lambda case: case.dense,
        "svd": lambda case: case.cut(shared, "half", "weights", pivoted=False),
        "asvd": lambda case: case.cut(shared, "half", "asvd", pivoted=False),
        "monarch": monarch,
        "asvd, sensitivity": lambda case: allocated(
            case, method="asvd", allocate="sensitivity", storage="factored", windows=16
        ),
        "asvd, correction": lambda case: corrected(case, moments=False),
        "asvd, correction of outputs": lambda case: corrected(case, moments=True),
        "outputs": lambda case: case.cut(shared, "half", pivoted=False),
        "compress": allocated,
        "compress, monarch": lambda case: allocated(case, method="monarch"),
    }
    for name, kind in KIND.items():
        for way, make in ways.items():

            def measure(name: str = name, kind: str = kind, make: Callable[[Case], Any] = make) -> Any:
                case = Case(shared, name, kind)
                return {"after": case.facts(make(case))}

            yield f"{name}, {kind}, {way}", measure


PARTS = {
    "same": same,
    "sampled": sampled,
    "new": new,
    "init": init,
    "method": method,
    "teacher": teacher,
    "table": table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--keep", type=Path, default=Path(gettempdir()) / "eckart-recover", help="as told above")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        path = RESULTS / f"recover-{part}.json"
        found = json.loads(path.read_text()) if path.exists() else {"environment": environment(), "cases": {}}
        folders = (options.shared, options.keep) if part == "sampled" else (options.shared,)
        for name, measure in PARTS[part](*folders):
            if name not in found["cases"] and options.only in name:
                found["cases"][name] = measure()
                write_text(path, to_json(found))
                print(part, name, json.loads(to_json(found["cases"][name]["after"]["perplexity"])), flush=True)


if __name__ == "__main__":
    main()
