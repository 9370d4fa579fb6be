"""Spectra over a training: where singular values leave the bulk of noise, checkpoint after checkpoint.

A matrix begins as noise, with no singular value above the Tracy-Widom edge. What is learned shows as outliers that
leave the bulk (the transition of Baik, Ben Arous & Peche 2005). A matrix whose rank above the edge was 0 and is not any
more has passed it; the step is known as far as checkpoints are apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from eckart.errors import EckartError, ModelError
from eckart.inspection_report import render_inspection
from eckart.matrices import Matrix, find_matrices, read, select
from eckart.results import to_json, write_text
from eckart.spectra import RESULTS, Inspected, inspect_matrix, results_of

LARGEST = 5
"""Singular values of each matrix that a timeline keeps."""
FOLLOWED = ("stable_rank", "effective_rank", "signal_energy", "alpha", "norm")
"""Measures that a timeline keeps."""

Moment = tuple[int, Sequence[Inspected]]
"""A step of the training and the matrices as they were then."""


@dataclass(frozen=True)
class Transition:
    """A matrix whose first singular value left the bulk."""

    matrix: str
    step: int
    """The first one at which a value was above the edge."""
    before: int
    """The last one at which none was."""


def checkpoint_folders(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Find the checkpoints of a training.

    Args:
        paths: Folders of checkpoints, or folders of folders as `transformers.Trainer` writes them.

    Returns:
        The folders that hold a model, in order of their steps.

    Raises:
        ModelError: A path holds none, or the step of one is not known.
    """
    found: list[Path] = []
    for path in paths:
        inner = [path] if (path / "config.json").is_file() else []
        if not inner and path.is_dir():
            inner = [child for child in path.iterdir() if (child / "config.json").is_file()]
        if not inner:
            raise ModelError(
                f"{path} holds no checkpoint. A checkpoint is a folder with config.json and safetensors, such as "
                "checkpoint-100, or a folder of such folders. Check the path."
            )
        found += inner
    return tuple(sorted(found, key=step_of))


def step_of(folder: Path) -> int:
    """Give the training step of a checkpoint: of its `trainer_state.json`, else the last number of its name.

    Args:
        folder: Such as `checkpoint-100`.

    Returns:
        The step.

    Raises:
        ModelError: Neither tells.
    """
    state = folder / "trainer_state.json"
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        if isinstance(step, int):
            return step
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    numbers = re.findall(r"\d+", folder.resolve().name)
    if not numbers:
        raise ModelError(
            f"The training step of {folder} is not known. It has no trainer_state.json and no number in its name. "
            "Rename it to checkpoint-STEP."
        )
    return int(numbers[-1])


def transitions(moments: Sequence[Moment]) -> tuple[Transition, ...]:
    """Find the matrices whose rank above the Tracy-Widom edge rose from 0.

    Args:
        moments: In order of steps.

    Returns:
        One entry a matrix that passed, in the order of the steps and of the model. A rank that falls back to 0 later
        does not count twice.
    """
    found: dict[str, Transition] = {}
    empty: dict[str, int] = {}
    for step, rows in moments:
        for row in rows:
            if row.ranks["tw"] == 0:
                empty.setdefault(row.matrix, step)
                empty[row.matrix] = step if row.matrix not in found else empty[row.matrix]
            elif row.matrix in empty and row.matrix not in found:
                found[row.matrix] = Transition(row.matrix, step, empty[row.matrix])
    return tuple(found.values())


def timeline_of(moments: Sequence[Moment]) -> dict[str, Any]:
    """Write the spectra of a training as `inspect.json` has them.

    Args:
        moments: In order of steps, all with the same matrices in the same order.

    Returns:
        `steps`, `matrices` (each with its largest values, edge, rank and measures at every step), `transitions`.

    Raises:
        EckartError: The matrices differ.
    """
    names = [[row.matrix for row in rows] for _, rows in moments]
    if any(one != names[0] for one in names):
        raise EckartError(
            "The checkpoints have different matrices. Those of one training have the same ones. "
            "Give checkpoints of one training."
        )
    matrices = []
    for index, first in enumerate(moments[0][1]):
        rows = [found[index] for _, found in moments]
        matrices.append(
            {
                "matrix": first.matrix,
                "layer": first.layer,
                "type": first.type,
                "stack": first.stack,
                "largest": [list(row.singular_values[:LARGEST]) for row in rows],
                "edge": [row.edges["tw"] for row in rows],
                "rank": [row.ranks["tw"] for row in rows],
                "measures": {name: [row.measures[name] for row in rows] for name in FOLLOWED},
            }
        )
    return {
        "steps": [step for step, _ in moments],
        "matrices": matrices,
        "transitions": transitions(moments),
    }


class SpectrumCallback(transformers.TrainerCallback):
    """Follows the spectra of a model while `transformers.Trainer` trains it.

    Measures before the first step, every `every` steps and at the end, in the training process: a singular value
    decomposition of every matrix each time. At the end `inspect.json` and `report.html` are in `out`.

    Args:
        out: Folder for the results; made if it is missing.
        every: Steps between measurements; None measures when the trainer saves.
        types: Types of matrix, as for `eckart inspect`.
        layers: Blocks, as for `eckart inspect`.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        every: int | None = None,
        types: Sequence[str] = ("all",),
        layers: Sequence[int] | None = None,
    ):
        if every is not None and every < 1:
            raise EckartError(f"every = {every} steps. It is 1 or more, or None to measure at saves. Change it.")
        self.out, self.every = Path(out), every
        self.types, self.layers = tuple(types), None if layers is None else tuple(layers)
        self.moments: list[tuple[int, tuple[Inspected, ...]]] = []
        """What was measured so far: (step, matrices)."""
        self._matrices: tuple[Matrix, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the matrices, and measure them as they are."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._matrices = select(find_matrices(model), types=self.types, layers=self.layers)
        self._measure(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure every so many steps."""
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(model, state)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure with every checkpoint, unless steps are counted."""
        if self.every is None:
            self._measure(model, state)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the result and write what was found."""
        self._measure(model, state)
        if not state.is_world_process_zero:
            return
        results = results_of(
            self.moments[-1][1],
            source=getattr(model.config, "_name_or_path", "") or type(model).__name__,
            architecture=type(model).__name__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            recipe={"every": self.every, "types": self.types, "layers": self.layers},
            timeline=timeline_of(self.moments),
        )
        write_text(self.out / "report.html", render_inspection(results))
        write_text(self.out / RESULTS, to_json(results))

    def _measure(self, model: Any, state: Any) -> None:
        if self.moments and self.moments[-1][0] == state.global_step:
            return
        rows = tuple(inspect_matrix(read(model, matrix), matrix) for matrix in self._matrices)
        self.moments.append((state.global_step, rows))
