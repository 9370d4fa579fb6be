"""Several edits together: greedy and beam search over the best single ones, or one after the other in a given order."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.driver import Driver
from eckart.matrices import Matrix, by_name, overlap
from eckart.plan import Edit
from eckart.race import Rival, Trial, merit, ranked
from eckart.sweep import Candidate, Route, key_of


def compose(
    driver: Driver,
    route: Route,
    matrices: Sequence[Matrix],
    singles: Sequence[Trial],
    baseline: Rival,
    *,
    most: int,
    pool: int,
    beam: int,
) -> list[Trial]:
    """Add edits to the best ones, one a round, for as long as the validation examples improve.

    Args:
        driver: Knows the part `validation`.
        route: Of the model.
        matrices: From `find_matrices`.
        singles: Single edits, measured. Stopped ones take no part.
        baseline: The unedited model.
        most: Most edits together, 2 or more.
        pool: How many of the best single edits may be added.
        beam: How many sets go on to the next round; 1 is greedy.

    Returns:
        Every set that was tried, with two edits or more. One that was stopped is no better than the sets it would
        have had to improve on.
    """
    rules = driver.rules

    def improves(trial: Trial, on: Trial | Rival) -> bool:
        before = on.validation if isinstance(on, Trial) else on.measurements
        return merit(trial.edits, trial.validation, rules) < merit(on.edits, before, rules)

    best = ranked(singles, rules)[:pool]
    parents = [trial for trial in best if improves(trial, baseline)][:beam]
    tried: list[Trial] = []
    for _ in range(most - 1):
        origins: dict[str, tuple[Candidate, Trial]] = {}
        for parent in parents:
            for single in best:
                joined = _join(route, matrices, parent.edits, single.edits[0])
                if joined is not None:
                    origins.setdefault(key_of(joined), (joined, parent))
        if not origins:
            break
        # A set must improve on the one it grew from; the last parent is the easiest to beat.
        trials = driver.try_all(
            _groups(route, matrices, [joined for joined, _ in origins.values()]),
            baseline.measurements,
            driver.rival(parents[-1]),
            stage="composing",
            best=parents[0],
        )
        tried.extend(trials)
        parents = [trial for trial in ranked(trials, rules) if improves(trial, origins[key_of(trial.edits)][1])][:beam]
        if not parents:
            break
    return tried


def accumulate(
    driver: Driver, route: Route, matrices: Sequence[Matrix], candidates: Sequence[Edit], baseline: Rival
) -> list[Trial]:
    """Try edits one after the other, on top of those that stayed; each stays that improves the validation examples.

    Args:
        driver: Knows the part `validation`.
        route: Of the model.
        matrices: From `find_matrices`.
        candidates: In the order in which they are tried. One that meets an edit that stayed is left out.
        baseline: The unedited model.

    Returns:
        Every set that was tried, the first of one edit; one that did not improve on the set before it may be stopped.

    Source:
        The loop of LaserRMT (rmt_laser_snr.py). Differs: text of its own proves the result, a tie is no improvement,
        and a set that cannot improve any more is stopped.
    """
    kept, rival = None, baseline
    tried: list[Trial] = []
    for number, edit in enumerate(candidates):
        joined = _join(route, matrices, rival.edits, edit)
        if joined is None:
            continue
        (trial,) = driver.try_all(
            _groups(route, matrices, [joined]),
            baseline.measurements,
            rival,
            best=kept,
            later=len(candidates) - number - 1,
        )
        tried.append(trial)
        better = merit(joined, trial.validation, driver.rules) < merit(rival.edits, rival.measurements, driver.rules)
        if trial.stopped is None and better:
            kept, rival = trial, driver.rival(trial)
    return tried


def _join(route: Route, matrices: Sequence[Matrix], edits: Candidate, more: Edit) -> Candidate | None:
    """Add an edit, in the order of execution; None where it meets one that is there."""
    matrix = by_name(matrices, more.matrix)
    if any(overlap(matrix, by_name(matrices, edit.matrix)) for edit in edits):
        return None
    return tuple(sorted((*edits, more), key=lambda edit: (*route.place(by_name(matrices, edit.matrix)), edit.matrix)))


def _groups(
    route: Route, matrices: Sequence[Matrix], candidates: Sequence[Candidate]
) -> list[tuple[Matrix, list[Candidate]]]:
    """Put candidates together by the first matrix that they change."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate[0].matrix, []).append(candidate)
    found = [(by_name(matrices, name), group) for name, group in groups.items()]
    return sorted(found, key=lambda item: route.place(item[0]))
