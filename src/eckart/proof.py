"""Prove a winner on the test examples: gains with their intervals, flipped answers, controls, and what to beware of.

However many edits were tried, the test examples are scored for three models only: the unedited one, the winner, and
the winner's cut with random components.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eckart.driver import Driver
from eckart.encoding import Encoded
from eckart.matrices import Matrix, by_name, read
from eckart.plan import Edit
from eckart.race import Measurements, Trial, measurements
from eckart.results import Gain, paired_gain
from eckart.scoring import LOSS_UNIT, Scores, constant_answer, majority_control
from eckart.surgery import Cost, clusters_of, cost, make_edit
from eckart.sweep import Candidate, Route
from eckart.tasks import Task

FLIPPED_SHOWN = 30


@dataclass(frozen=True)
class Flip:
    """A test example whose answer the winner turned from wrong to right or back."""

    prompt: str
    answer: str
    before: str
    after: str
    correct_before: bool
    correct_after: bool


@dataclass(frozen=True)
class Proof:
    """What the test examples say of a winner."""

    measured: dict[str, Measurements]
    """`baseline`, and where there is a winner `best` and perhaps `random_basis`."""
    scores: dict[str, Scores]
    """The same, example by example."""
    gain: Gain | None
    """Of accuracy; None for perplexity tasks or without a winner."""
    loss_gain: Gain | None
    """None without a winner, or where it is judged by its divergence."""
    flips: tuple[Flip, ...]
    flip_counts: dict[str, int]
    spectrum: dict[str, Any] | None
    """Singular values of the first matrix that the winner edits; None where that is cut in several blocks."""
    cost: Cost | None
    """What the edited matrices take as factors, together."""


def prove(
    driver: Driver, route: Route, model: nn.Module, matrices: Sequence[Matrix], winner: Trial | None, *, seed: int
) -> Proof:
    """Score the test examples, and compare winner and unedited model on them.

    Args:
        driver: Knows the part `test`.
        route: Of the model.
        model: The unedited model. Not modified.
        matrices: From `find_matrices(model)`.
        winner: What won on the examples that choose; None where nothing did.
        seed: Of random components and of the bootstrap.

    Returns:
        The proof.
    """
    candidates = _candidates(winner, matrices, seed)
    start = min((by_name(matrices, e.matrix) for e in winner.edits), key=route.place) if winner else None
    scores = dict(zip(candidates, driver.score("test", list(candidates.values()), start)))
    encoded = driver.parts["test"]
    measured = {name: measurements(encoded, found, driver.rules) for name, found in scores.items()}
    counts = {"gained": 0, "lost": 0}
    if winner is None:
        return Proof(measured, scores, None, None, (), counts, None, None)
    old, new = scores["baseline"], scores["best"]
    gain, flips = None, ()
    if old.correct is not None and new.correct is not None:
        gain = paired_gain(old.correct, new.correct, "fraction", seed=seed)
        counts = {"gained": int((new.correct & ~old.correct).sum()), "lost": int((old.correct & ~new.correct).sum())}
        flips = _flips(encoded.task, old, new)
    return Proof(
        measured,
        scores,
        gain,
        None if driver.rules.select == "size" else paired_gain(old.loss, new.loss, LOSS_UNIT, seed=seed),
        flips,
        counts,
        _spectrum(model, matrices, winner.edits[0]),
        _cost(model, matrices, winner.edits),
    )


def _spectrum(model: nn.Module, matrices: Sequence[Matrix], edit: Edit) -> dict[str, Any] | None:
    if edit.blocks > 1:
        return None  # the values of the whole matrix do not show where its blocks were cut
    values = torch.linalg.svdvals(read(model, by_name(matrices, edit.matrix)).float())
    return {"matrix": edit.matrix, "rank": edit.rank, "singular_values": values.tolist()}


def _cost(model: nn.Module, matrices: Sequence[Matrix], edits: Candidate) -> Cost:
    costs = []
    for edit in edits:
        weight = read(model, by_name(matrices, edit.matrix))
        costs.append(cost(edit, [len(rows) for rows in clusters_of(weight, edit)]))
    return Cost(*(sum(part) for part in zip(*((c.numbers, c.integers, c.flops) for c in costs))))


def _candidates(winner: Trial | None, matrices: Sequence[Matrix], seed: int) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {"baseline": ()}
    if winner is not None:
        found["best"] = winner.edits
        if all(_has_random_twin(edit) for edit in winner.edits):
            found["random_basis"] = tuple(_with_random_basis(edit, matrices, seed) for edit in winner.edits)
    return found


def _has_random_twin(edit: Edit) -> bool:
    # Random components of the whole matrix say nothing about components of blocks.
    return edit.kind == "low_rank" and edit.basis == "top" and edit.blocks == 1


def _with_random_basis(edit: Edit, matrices: Sequence[Matrix], seed: int) -> Edit:
    return make_edit(by_name(matrices, edit.matrix), edit.rho, basis="random", seed=seed)


def cheap_controls(validation: Task, test: Task, measured: Mapping[str, Measurements]) -> dict[str, dict[str, Any]]:
    """Give the controls that every search has: the commonest label, and random components in the winner's place.

    Args:
        validation: The examples that tell which label is commonest.
        test: The examples it is measured on.
        measured: Of the proof.

    Returns:
        Name -> measurements and facts.
    """
    found: dict[str, dict[str, Any]] = {}
    majority = majority_control(validation, test)
    if majority is not None:
        found["majority"] = {"accuracy": majority[1], "answer": majority[0]}
    if "random_basis" in measured:
        found["random_basis"] = dict(measured["random_basis"])
    return found


def _flips(task: Task, old: Scores, new: Scores) -> tuple[Flip, ...]:
    assert old.correct is not None
    assert new.correct is not None
    found = [
        Flip(e.prompt, e.gold, old.prediction[i], new.prediction[i], bool(old.correct[i]), bool(new.correct[i]))
        for i, e in enumerate(task.examples)
        if old.correct[i] != new.correct[i]
    ]
    gained = [flip for flip in found if flip.correct_after]
    lost = [flip for flip in found if flip.correct_before]
    # Losses are shown first where both must be shortened: they are what a user has to know.
    lost = lost[: FLIPPED_SHOWN // 2]
    return (*gained[: FLIPPED_SHOWN - len(lost)], *lost)


def warnings_of(
    parts: Mapping[str, Encoded], scores: Mapping[str, Scores], gain: Gain | None, exact: bool
) -> Iterator[str]:
    """Say what a reader of the results must know.

    Args:
        parts: The examples that choose and those that prove.
        scores: On the test examples.
        gain: Of accuracy.
        exact: The prefix cache gave the logits of the whole model.

    Yields:
        One sentence or two each.
    """
    if not exact:
        yield (
            "This model's blocks do not form a chain, so nothing before an edited block could be reused: "
            "the search ran the whole model for every edit."
        )
    for part, encoded in parts.items():
        if encoded.truncated:
            yield (
                f"{encoded.truncated} {part} examples were longer than the model's context; "
                "their first tokens were dropped."
            )
    for name, who in (("baseline", "unedited model"), ("best", "edited model")):
        constant = constant_answer(scores[name]) if name in scores else None
        if constant is not None:
            answer, share = constant
            yield (
                f"The {who} answers {answer!r} on {100 * share:.0f} % of the test examples: "
                "its accuracy measures how often that label is right, and says nothing of the model. Compare losses."
            )
    if gain is not None and gain.value == 0 and gain.stderr == 0:
        yield "The winner changes no right or wrong answer of the test examples; it was chosen by its loss."
    elif gain is not None and gain.interval[0] <= 0:
        low, high = gain.interval
        verdict = "the test examples contradict it" if high < 0 else "the test examples do not confirm it"
        yield (
            "The winner was better on the examples that chose it, but "
            f"{verdict}: 95 % interval of the gain in accuracy {low:+.3f} to {high:+.3f}."
        )
