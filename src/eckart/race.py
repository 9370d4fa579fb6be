"""Decide between edits, and stop those that cannot win, with the proof.

Two rules stop an edit. The exact one takes every example that is left to come out right and to cost no loss: what
loses even then cannot have won, so a race has the winner of an exhaustive search by construction. The statistical
one, only where a confidence is given, is a paired group-sequential test on randomly drawn stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from eckart.clustering import even_sizes
from eckart.encoding import Encoded
from eckart.plan import Edit
from eckart.results import Measurement
from eckart.scoring import BlockScores, Scores, assemble, summarize
from eckart.surgery import cost

Measurements = dict[str, Measurement]
Select = Literal["accuracy", "loss", "size"]
STAGE = 32
"""Fewest examples between two looks of the sequential test."""


@dataclass(frozen=True)
class Stopped:
    """Why a race did not go on with an edit."""

    metric: str
    """`accuracy`, `loss`, `divergence`, or `numbers` that are removed."""
    at_best: float
    """What the edit could still have reached on all examples, at best; for a test, its mean so far."""
    to_beat: float
    """What its rival had: on all examples, or for a test on the same ones."""
    p_value: float | None = None
    """Of the sequential test, one-sided; None where the proof is exact."""
    level: float | None = None
    """What the p-value had to reach: one minus the confidence, divided by the number of looks."""
    looks: int | None = None
    """How often the test may look at most."""


@dataclass(frozen=True)
class Trial:
    """One edit, or several together, and what they did on the examples that choose."""

    edits: tuple[Edit, ...]
    validation: Measurements
    """On the examples it was measured on: all of them, or those before it was stopped."""
    stopped: Stopped | None = None

    @property
    def rank(self) -> int:
        """Components kept, over all edits and their blocks of rows."""
        return sum(edit.rank * edit.blocks for edit in self.edits)


@dataclass(frozen=True)
class Rival:
    """What an edit has to beat, on all examples that choose."""

    edits: tuple[Edit, ...]
    measurements: Measurements
    scores: Scores


@dataclass(frozen=True)
class Rules:
    """How edits are judged."""

    select: Select
    """What the best edit is best at. `size`: it removes most numbers, and diverges by no more than `tolerance`."""
    tolerance: float = 0.0
    """Largest mean divergence from the unedited model, in nats per token, where `select` is `size`."""
    confidence: float | None = None
    """Of the sequential test, for each edit; None for exact proofs alone."""
    looks: tuple[int, ...] = ()
    """Numbers of blocks after which the test may look."""


def removed(edits: Sequence[Edit]) -> int:
    """Count the numbers that edits save once their matrices are kept as factors, or dense where that is less.

    Args:
        edits: Of different matrices. Blocks of rows count as equally large.

    Returns:
        The count.
    """
    found = 0
    for edit in edits:
        out, into = edit.shape
        found += out * into - cost(edit, even_sizes(out, edit.blocks)).numbers
    return found


def merit(edits: Sequence[Edit], found: Measurements, rules: Rules) -> tuple[float, float]:
    """Order candidates: the smaller tuple is the better one.

    Args:
        edits: The candidate; none for the unedited model.
        found: On all examples that choose.
        rules: What counts first. The other of accuracy and loss decides between equals; perplexity tasks have
            loss alone.

    Returns:
        A pair to compare; NaN counts as infinite.
    """
    loss = found["divergence" if rules.select == "size" else "loss"].value
    loss = math.inf if math.isnan(loss) else loss
    if rules.select == "size":
        return by_size(edits, loss, rules)
    accuracy = -found["accuracy"].value if "accuracy" in found else 0.0
    return (accuracy, loss) if rules.select == "accuracy" else (loss, accuracy)


def by_size(edits: Sequence[Edit], divergence: float, rules: Rules) -> tuple[float, float]:
    """Order candidates by what they save: the smaller tuple is the better one.

    Args:
        edits: The candidate.
        divergence: Measured or predicted, in nats per token.
        rules: Beyond their `tolerance` nothing is saved.

    Returns:
        A pair to compare.
    """
    return (-float(removed(edits)) if divergence <= rules.tolerance else 0.0, divergence)


def ranked(trials: Sequence[Trial], rules: Rules) -> list[Trial]:
    """Put trials in order, the best first; of equals the smallest rank, then the first.

    Args:
        trials: In the order of the grid. Stopped ones are left out: they cannot win.
        rules: What counts.

    Returns:
        Those scored to the end.
    """
    whole = [trial for trial in trials if trial.stopped is None]
    return sorted(whole, key=lambda trial: (*merit(trial.edits, trial.validation, rules), trial.rank))


def choose(trials: Sequence[Trial], baseline: Measurements, rules: Rules) -> Trial | None:
    """Pick the best trial, as `ranked` orders them.

    Args:
        trials: In the order of the grid.
        baseline: The unedited model on the same examples.
        rules: What counts.

    Returns:
        The winner, or None where none is better than the unedited model.
    """
    best = next(iter(ranked(trials, rules)), None)
    better = best is not None and merit(best.edits, best.validation, rules) < merit((), baseline, rules)
    return best if better else None


def strata_of(count: int, scores: Scores | None, *, confidence: float | None, seed: int) -> list[int] | None:
    """Say in which order examples should be scored so that a race can stop early.

    Exact proofs come soonest where the unedited model is wrong, then where it is least sure: most edits answer as
    it does, and one that mends nothing there is out. A sequential test needs random stages instead.

    Args:
        count: Number of examples.
        scores: Of the unedited model on all of them, where answers are right or wrong.
        confidence: Of the sequential test, or None.
        seed: Of the random stages.

    Returns:
        A stratum for every example, from 0; None where the order does not matter.
    """
    if confidence is not None:
        stages = max(1, min(10, count // STAGE))
        order = np.random.default_rng(seed).permutation(count)
        strata = np.empty(count, dtype=np.int64)
        strata[order] = np.arange(count) * stages // count
        return strata.tolist()
    if scores is None or scores.correct is None:
        return None
    # Few examples at first: against a strong rival they are enough.
    tenth = math.ceil(count / 10)
    strata = np.empty(count, dtype=np.int64)
    for first, is_right in ((0, False), (2, True)):
        group = np.flatnonzero(scores.correct == is_right)
        strata[group] = first + 1
        strata[group[np.argsort(-scores.loss[group], kind="stable")][:tenth]] = first
    return strata.tolist()


def stop(
    edits: tuple[Edit, ...], encoded: Encoded, found: Mapping[int, BlockScores], rival: Rival, rules: Rules
) -> Stopped | None:
    """Decide from some blocks whether an edit is out.

    Args:
        edits: The candidate.
        encoded: The examples that choose.
        found: Block index -> scores of the edit.
        rival: What it has to beat.
        rules: How.

    Returns:
        The proof, or None while the edit can still win, and once all blocks are scored.
    """
    if len(found) == len(encoded.blocks):
        return None
    scores = assemble(encoded, found)
    proof = cannot_win(edits, encoded, scores, rival, rules)
    if proof is None and rules.confidence is not None and len(found) in rules.looks:
        proof = surely_loses(encoded, scores, rival.scores, rules)
    return proof


def cannot_win(edits: tuple[Edit, ...], encoded: Encoded, scores: Scores, rival: Rival, rules: Rules) -> Stopped | None:
    """Prove from some examples that an edit cannot win on all of them.

    Every example that is left is taken to come out right and to cost no loss.

    Args:
        edits: The candidate.
        encoded: The examples that choose.
        scores: Of the candidate, on some of them.
        rival: The best edit before it, or the unedited model, on all of them.
        rules: What counts.

    Returns:
        The proof, or None while the edit can still win.
    """
    # Means are rounded; only a clear difference is a proof.
    margin = 1 + 1e-9
    least = _least_loss(encoded, scores)
    if rules.select == "size":
        if least > rules.tolerance * margin:
            return Stopped("divergence", least, rules.tolerance)
        ours, theirs = removed(edits), removed(rival.edits)
        return Stopped("numbers", ours, theirs) if ours < theirs else None
    too_lossy = least > rival.measurements["loss"].value * margin
    if scores.correct is not None and rules.select == "accuracy":
        right = int(scores.correct.sum()) + encoded.count - len(scores.correct)
        needed = round(rival.measurements["accuracy"].value * encoded.count)
        if right < needed:
            return Stopped("accuracy", right / encoded.count, rival.measurements["accuracy"].value)
        too_lossy = too_lossy and right == needed
    return Stopped("loss", least, rival.measurements["loss"].value) if too_lossy else None


def _least_loss(encoded: Encoded, scores: Scores) -> float:
    if scores.correct is not None:
        return float(scores.loss.sum() / encoded.count)
    tokens = np.array(encoded.tokens)
    return float((scores.loss * tokens[scores.examples]).sum() / tokens.sum())


def surely_loses(encoded: Encoded, scores: Scores, rival: Scores, rules: Rules) -> Stopped | None:
    """Test on the examples scored so far whether an edit is worse than its rival.

    Accuracy: the exact one-sided McNemar test. Loss: the one-sided paired t-test. At each of `looks` looks the
    level is (1 - confidence) / looks, so that an edit that is no worse is stopped at most that often, whatever
    look stops it (Bonferroni). Stages are drawn without replacement, for which both tests are conservative.

    Args:
        encoded: The examples that choose, in random stages.
        scores: Of the edit, on whole stages.
        rival: On all examples.
        rules: `confidence` and `looks`.

    Returns:
        The certificate, or None.

    Source:
        Group-sequential testing, Jennison & Turnbull 1999, chapter 2; McNemar 1947.
    """
    assert rules.confidence is not None
    level = (1 - rules.confidence) / max(1, len(rules.looks))
    at = scores.examples
    if rules.select == "accuracy" and scores.correct is not None and rival.correct is not None:
        p_value = _worse_of_two(rival.correct[at], scores.correct)
        metric, ours, theirs = "accuracy", scores.correct.mean(), rival.correct[at].mean()
    else:
        tokens = np.ones(encoded.count) if scores.correct is not None else np.array(encoded.tokens, dtype=np.float64)
        weights = tokens[at] / tokens[at].mean()
        p_value = _larger_mean((scores.loss - rival.loss[at]) * weights)
        metric, ours, theirs = "loss", (scores.loss * weights).mean(), (rival.loss[at] * weights).mean()
    if not p_value <= level:
        return None
    return Stopped(metric, float(ours), float(theirs), p_value, level, len(rules.looks))


def _worse_of_two(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Chance that a fair coin shows at most as many wins as `after` has where the two differ."""
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(special.bdtr(won, won + lost, 0.5))


def _larger_mean(differences: NDArray[np.float64]) -> float:
    """One-sided p-value of Student's t-test that the mean is above zero; 1 where it has no answer."""
    count = len(differences)
    spread = float(differences.std(ddof=1)) if count > 1 else math.nan
    if not spread > 0 or not math.isfinite(spread):
        return 1.0
    return float(special.stdtr(count - 1, -differences.mean() / spread * math.sqrt(count)))


def trial_of(
    edits: tuple[Edit, ...], encoded: Encoded, found: Mapping[int, BlockScores], rival: Rival | None, rules: Rules
) -> Trial:
    """Sum up what was measured of an edit.

    Args:
        edits: What was tried.
        encoded: The examples that choose.
        found: Block index -> scores, up to the end or to where the race stopped.
        rival: What it had to beat; None where nothing is stopped.
        rules: How.

    Returns:
        The trial, with the proof if it was stopped.
    """
    proof = stop(edits, encoded, found, rival, rules) if rival else None
    return Trial(edits, measurements(encoded, assemble(encoded, found), rules), proof)


def measurements(encoded: Encoded, scores: Scores, rules: Rules) -> Measurements:
    """Turn scores into measurements.

    Args:
        encoded: What was scored.
        scores: Of it.
        rules: Where `select` is `size`, the scores are divergences from the unedited model.

    Returns:
        As `eckart.evaluate` does, or `divergence` in nats per token.
    """
    found = summarize(encoded, scores)
    return {"divergence": found["loss"]} if rules.select == "size" else found
