"""Compress: the best model under a budget, in closed form, from a calibration text.

What is decomposed, divided and cut, and in what order, is in `eckart.compression_steps`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eckart import allocate
from eckart.calibration import each_expert, read_windows
from eckart.compression_steps import (
    MEASURED_AT,
    PROBED,
    ROUNDS,
    SENSITIVITY_SHARES,
    Report,
    Steps,
    ranks_of,
    vocabulary_of,
)
from eckart.dataflow import evaluating
from eckart.elastic_folder import ratios_of
from eckart.embedding import Pooling, embeds, read_sentences
from eckart.encoding import Encoded, context_length, encode, model_kind, right_answers
from eckart.errors import RecipeError
from eckart.factoring import Factors
from eckart.matrices import coverage, find_matrices
from eckart.plan import MadeBy, Plan, PlannedModel
from eckart.recipe import CompressSettings
from eckart.results import SCHEMA_VERSION, Measurement, mean
from eckart.scoring import rearrange
from eckart.spill import Spill
from eckart.surgery import check_finite, weights_sha256
from eckart.tasks import Task
from eckart.units import described, edits_of, find_units, told

WINDOW = 256
"""Tokens of a window, unless told otherwise."""
PREDICTED_BYTES = 2**28
"""Most bytes that the predictions of a batch of windows take, unless those of one window take more."""


@dataclass(frozen=True)
class Compression:
    """What `compress` made: a plan and the factors that go with it."""

    plan: Plan
    factors: dict[str, Factors]
    """By the matrix's name; `eckart.factor_(model, plan, factors=…)` puts them into the model."""
    divergence: dict[str, Measurement]
    """From the original model, on calibration windows, of every allocation that was tried."""
    chosen: str
    """The allocation that was."""
    facts: dict[str, Any] = field(repr=False)
    """`model`, `calibration`, `budget`, `matrices` and more of results.json."""
    elastic: Callable[..., nn.Module] | None = field(default=None, repr=False)
    """With `settings.elastic`, in the place of `factors`: takes the original model (and `spill`, a folder), and makes
    it, in place, what `eckart.save` writes as an elastic folder. The plan is then that of the largest ratio."""

    def to_results(self) -> dict[str, Any]:
        """Give what results.json says of a compression before it is measured.

        Returns:
            A tree of dicts, lists and measurements.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "compress",
            **self.facts,
            "allocations": [
                {"allocation": name, "divergence": value, "chosen": name.split(" at ")[0] == self.chosen}
                for name, value in self.divergence.items()
            ],
            "warnings": [f"{name} stays dense: {reason}." for name, reason in self.facts["stayed_dense"].items()],
            "recipe": self.plan.made_by.recipe,
        }


def compress(
    model: nn.Module,
    tokenizer: Any,
    calibration: Task,
    settings: CompressSettings,
    *,
    task: Task | None = None,
    pooling: Pooling | None = None,
    source: str = "",
    stored: torch.dtype | None = None,
    spill: Path | None = None,
    progress: Report | None = None,
) -> Compression:
    """Find the factors that stay closest to a model under a budget.

    Args:
        model: A language model, or an encoder of text without a head, in evaluation mode. As before, to the bit, when
            this returns.
        tokenizer: Its tokenizer.
        calibration: A task of kind `text`.
        settings: The budget, and how.
        task: Examples whose right answers the model should stay good at, too: the gradients of their loss, and the
            inputs they give, take a share in the metrics (`settings.task_weight`).
        pooling: Of an encoder: how an embedding is made of its hidden states; by default their mean. The calibration
            text is then read in sentences, and what is kept is their embeddings, not predictions.
        source: Where the model came from, for the plan.
        stored: Dtype in which it will be kept, in which a budget of bytes counts; by default the model's.
        spill: Folder for what is finished; a second call with the same arguments goes on from there. On a CPU cut
            weights and factors lie on its disk, too. By default everything is held in memory.
        progress: Called before every part of the work.

    Returns:
        The plan, its factors, and what was measured.

    Raises:
        ModelError: A weight or a statistic is not finite, or the model neither predicts nor embeds a text.
        RankError: The budget is too small.
        RecipeError: The settings ask for a loss, which an encoder does not have.
        TaskError: The text is too short.
    """
    started = time.perf_counter()
    check_finite(model)
    matrices = find_matrices(model)
    units, blocked = find_units(model, matrices, settings)
    pooling = pooling_for(model, settings, pooling)
    windows = read_calibration(model, tokenizer, calibration, settings, pooling)
    work = Spill(spill)
    work.check(
        {
            "weights": weights_sha256(model),
            "text": calibration.sha256,
            "task": None if task is None else task.sha256,
            "settings": json.loads(settings.model_dump_json()),
            "pooling": None if pooling is None else [*pooling.modes],
            "eckart": version("eckart"),
        }
    )
    tell = progress or (lambda _: None)
    encoded = None if task is None else encode_plain(model, tokenizer, task, settings)
    run = Steps(model, tokenizer, settings, windows, units, work, tell, stored, encoded, pooling)
    with evaluating(model), each_expert(model):
        curves = run.curves()
        budget = run.budget(curves)
        allocate.check_budget(curves, budget)
        elastic, factors, rounds = None, {}, []
        if settings.elastic:
            config, elastic, ranks, divergence = run.elastic(curves)
            chosen = config.allocation
            choice = {curve.name: curve.at(ranks[curve.name]) for curve in curves}
        else:
            chosen, choice, divergence = run.choose(curves, budget)
            choice, factors, rounds = run.iterate(curves, choice, budget)
            ranks = ranks_of(curves, choice)
    edits = edits_of(run.units, ranks, settings)
    plan = Plan(
        model=PlannedModel(source=source, architecture=type(model).__name__, weights_sha256=work.about["weights"]),
        edits=edits,
        made_by=MadeBy(eckart=version("eckart"), recipe=settings.model_dump(mode="json")),
    )
    by_name = {curve.name: curve for curve in curves}
    facts = {
        "model": {
            "source": source,
            "architecture": type(model).__name__,
            "weights_sha256": work.about["weights"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "coverage": coverage(model, matrices),
        },
        "calibration": {
            "name": calibration.name,
            "windows" if pooling is None else "sentences": windows.count,
            "tokens": sum(windows.tokens),
        },
        "budget": {
            "unit": settings.unit,
            "allowed": budget,
            "spent": allocate.cost_of(curves, choice),
            "dense": float(sum(curve.costs[-1] for curve in curves)),
        },
        "matrices": [row for unit in run.units for row in described(unit, ranks[unit.name], by_name[unit.name])],
        "rounds": rounds,
        "stayed_dense": blocked,
        "ratios": ratios_of(settings.ratio or 1.0, curves) if settings.elastic else [],
        "roots": run.roots,
        "seconds": {"compress": time.perf_counter() - started},
    }
    return Compression(plan, factors, divergence, chosen, facts, elastic)


def encode_plain(model: nn.Module, tokenizer: Any, task: Task, settings: CompressSettings) -> Encoded:
    """Encode the right answers of a task, each in a row of its own, on the model's device.

    Args:
        model: Not modified.
        tokenizer: Its tokenizer.
        task: Of any kind.
        settings: How it is encoded.

    Returns:
        The examples in blocks.
    """
    kind = model_kind(model, tokenizer)
    found = encode(task, tokenizer, kind, context=context_length(model, tokenizer), **settings.encoding)
    right = right_answers(found, found.count)
    # No batch of two lengths, so that no padding takes part in what weights see.
    return rearrange(model, right, [len(item[0].row.ids) for item in right.sequences])


def pooling_for(model: nn.Module, settings: CompressSettings, given: Pooling | None = None) -> Pooling | None:
    """Find out whether a compression keeps a model's embeddings, and how they are made.

    Args:
        model: In evaluation mode. Not modified.
        settings: Checked, since an encoder has no loss.
        given: How, if it is known; by default the mean.

    Returns:
        None for a language model.

    Raises:
        ModelError: The model neither predicts nor embeds a text.
        RecipeError: The settings ask for a loss of an encoder.
    """
    if not embeds(model):
        return None
    if settings.allocate == "signed":
        raise RecipeError(
            f"allocate = 'signed' goes by the loss of a text, and {type(model).__name__} has none. "
            "An encoder's budget is divided by any other allocation. Change --allocate."
        )
    return given or Pooling()


def read_calibration(
    model: nn.Module,
    tokenizer: Any,
    text: Task,
    settings: CompressSettings,
    pooling: Pooling | None,
    *,
    first: int = 0,
    most: int | None = None,
) -> Encoded:
    """Read a text as a compression does: in windows, or for an encoder in sentences of as many tokens together.

    Args:
        model: Not modified.
        tokenizer: Its tokenizer.
        text: Of kind `text`.
        settings: How much is read.
        pooling: From `pooling_for`.
        first: Windows, or tokens in the place of so many, that are skipped.
        most: Windows or sentences at most; by default as the settings say.

    Returns:
        The windows or sentences, on the CPU.

    Raises:
        TaskError: The text is too short.
    """
    length, batch = settings.window or WINDOW, settings.batch_tokens
    if pooling is None:
        batch = min(batch, max(length, PREDICTED_BYTES // (4 * vocabulary_of(model))))
        masked = model_kind(model, tokenizer) == "masked"
        count = most or settings.windows
        return read_windows(text, tokenizer, length=length, count=count, first=first, batch_tokens=batch, masked=masked)
    tokens = (most or settings.windows) * length
    return read_sentences(
        text, model, tokenizer, tokens=tokens, length=length, first=first * length, most=most, batch_tokens=batch
    )


def forecast(
    model: nn.Module,
    tokenizer: Any,
    calibration: Task,
    settings: CompressSettings,
    *,
    pooling: Pooling | None = None,
    stored: torch.dtype | None = None,
    spill: Path | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Say what a compression would do, before it is done: each matrix alone at its uniform share, time and memory.

    Args:
        model: As for `compress`. As before when this returns.
        tokenizer: Its tokenizer.
        calibration: As for `compress`.
        settings: As for `compress`.
        pooling: As for `compress`.
        stored: As for `compress`.
        spill: A folder for what the forecast itself computes. By default that is held in memory.
        progress: As for `compress`.

    Returns:
        `matrices` with the divergence each causes alone, the worst first; what all cause together and the sum of the
        single ones; `stays_dense`; forecast `seconds`, and `bytes` of memory of the program with a folder to spill to:
        the peak of what the system cannot drop, which weights that are mapped from files are not.

    Raises:
        EckartError: As for `compress`.
    """
    check_finite(model)
    units, blocked = find_units(model, find_matrices(model), settings)
    pooling = pooling_for(model, settings, pooling)
    windows = read_calibration(model, tokenizer, calibration, settings, pooling)
    tell = progress or (lambda _: None)
    steps = Steps(model, tokenizer, settings, windows, units, Spill(spill), tell, stored, pooling=pooling)
    clock = [time.perf_counter()]
    with evaluating(model), each_expert(model):
        curves = steps.curves()
        budget = steps.budget(curves)
        allocate.check_budget(curves, budget)
        choice = allocate.uniform(curves, budget)
        clock.append(time.perf_counter())
        reference = steps.reference()
        clock.append(time.perf_counter())
        points = steps.alone(curves, [choice])
        clock.append(time.perf_counter())
        together = mean(np.array(steps.divergence_of(curves, choice, reference)), steps.divergence_unit)
    reading, a_few, measuring = np.diff(clock)
    forward = a_few * windows.count / steps.few.count
    rows = []
    for unit, curve in zip(steps.units, curves):
        values = dict(points[unit.name]).get(choice[unit.name])
        rows.append(
            {
                "matrix": unit.name,
                **told(unit, int(curve.ranks[choice[unit.name]])),
                "cost": float(curve.costs[choice[unit.name]]),
                "divergence": None if values is None else mean(np.array(values), steps.divergence_unit),
            }
        )
    rows.sort(key=lambda row: -row["divergence"].value if row["divergence"] else 0.0)
    trials = {"auto": len(MEASURED_AT), "measured": len(MEASURED_AT), "sensitivity": len(SENSITIVITY_SHARES)}
    # Both streams read a block once for each of about four groups of matrices in it, and once to go on.
    cutting = 10 * forward + 0.5 * reading if settings.method == "propagated" else 0.0
    rounds = ROUNDS if settings.allocate == "auto" and not settings.elastic else 0
    return {
        "budget": {"unit": settings.unit, "allowed": budget, "dense": sum(float(curve.costs[-1]) for curve in curves)},
        "matrices": rows,
        "sum_of_single_divergences": float(sum(row["divergence"].value for row in rows if row["divergence"])),
        "divergence_together": together,
        "stays_dense": blocked,
        "seconds": float(
            reading
            + (trials.get(settings.allocate, 0) + rounds * len(PROBED)) * measuring
            + (3 + rounds) * a_few
            + (1 + rounds) * cutting
        ),
        "bytes": steps.most_bytes(),
    }
