"""inspect.json -> report.html: spectra with their noise, a map of every measure, what agrees with what, a timeline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eckart import noise
from eckart.errors import EckartError
from eckart.matrices import TYPES
from eckart.report import draw, plot_text, plotly
from eckart.results import SCHEMA_VERSION, read_json, write_text

Json = dict[str, Any]

OUTSIDE = "outside the blocks"
BINS = 44
SPECTRA_DRAWN = 600
"""Most matrices whose spectrum is in the page; of more, the first of each cell of the map."""
ROWS_LISTED = 400
SPREAD = 40
"""Measures whose values span more than this ratio are coloured by their logarithm."""
CHANCE = 0.05

# Measure -> (label, what it is, whether it is a change with a sign).
MEASURES: dict[str, tuple[str, str, bool]] = {
    "loss_cut": ("loss without it", "change of the loss, in nats/token, when this matrix alone is cut", True),
    "gradient": ("predicted loss", "first-order prediction of that change, from one backward pass", True),
    "fisher": ("Fisher", "second-order prediction of that change, in nats/token", False),
    "outliers": ("outliers", "largest activation that the matrix reads, over their root mean square", False),
    "attention_entropy": ("attention entropy", "of its layer's heads: 0 looks at one token, 1 at all alike", False),
    "sink_share": ("sink share", "attention of its layer's heads that falls on the first token", False),
    "head_loss": ("loss without a head", "mean change of the loss, in nats/token, when one head is ablated", True),
    "signal_share": ("signal rank", "share of the singular values above the Tracy-Widom edge", False),
    "signal_energy": ("signal energy", "share of the squared norm above the Tracy-Widom edge", False),
    "snr": ("signal / noise", "sum of the singular values above the edge over the sum of those below", False),
    "stable_rank": (
        "stable rank",
        "squared norm over the largest squared singular value, as a share of full rank",
        False,
    ),
    "effective_rank": (
        "effective rank",
        "exponential of the entropy of the singular values, as a share of full rank",
        False,
    ),
    "spectral_entropy": ("spectral entropy", "of the shares of energy, as a share of the most possible", False),
    "alpha": ("tail exponent α", "of the power law that fits the largest eigenvalues best; below 2 very heavy", False),
    "hill": ("Hill exponent", "of the largest tenth of the eigenvalues", False),
    "gap": ("largest gap", "largest ratio of neighbouring singular values in the upper half", False),
    "condition": ("condition", "largest singular value over the smallest", False),
    "norm": ("norm", "largest singular value", False),
}
RULES = {
    "tw": "Tracy\u2013Widom",
    "mp": "Marchenko\u2013Pastur",
    "gavish-donoho": "Gavish\u2013Donoho",
    "bema": "BEMA",
    "laserrmt": "LaserRMT",
    "energy": "90 % energy",
    "effective-rank": "effective rank",
}


def write_inspection_report(run: Path) -> Path:
    """Draw `report.html` of an inspection from its `inspect.json`.

    Args:
        run: Folder of the inspection. Nothing in it but `inspect.json` is read.

    Returns:
        The path of `report.html`, inside `run`.

    Raises:
        EckartError: `inspect.json` is missing, is not JSON, or is not something a report can be drawn from.
        OutputError: `report.html` cannot be written there.
    """
    source, target = run / "inspect.json", run / "report.html"
    try:
        page = render_inspection(read_json(source))
    except EckartError as error:
        raise EckartError(f"{source}: {error}") from error
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def render_inspection(results: Json) -> str:
    """Return the report of an inspection as one HTML document that loads nothing.

    Args:
        results: The content of an `inspect.json`. Not modified.

    Returns:
        HTML with all styles and scripts inside.

    Raises:
        EckartError: The kind or the schema version is unknown, or a field that the report needs is missing.
    """
    if not isinstance(results, dict) or (results.get("kind"), results.get("schema_version")) != (
        "inspect",
        SCHEMA_VERSION,
    ):
        raise EckartError(
            f"these are no results of kind 'inspect' and schema_version {SCHEMA_VERSION}. "
            "That is what this version of `eckart inspect` writes. Give the folder of an inspection."
        )
    return draw(results, _page, "inspection.html.j2")


def _page(results: Json) -> Json:
    rows = results["matrices"]
    plots = _plots(results)
    return {
        "title": f"What is signal in {_name(results['model']['source'])}",
        "verdict": _verdict(rows),
        "reading": _reading(results),
        "data": results["data"],
        "plots": plots,
        "plotly": plotly(),
        "rules": list(RULES.items()),
        "by_type": _by_type(rows),
        "listed": _listed(results),
        "total": len(rows),
        "measures": [(label, meaning) for name, (label, meaning, _) in MEASURES.items() if name in plots["values"]],
        "correlations": _correlations(results["correlations"]),
        "names": [row["matrix"] for row in plots_rows(rows)],
        "timeline": _timeline_words(results["timeline"]),
        "followed": [row["matrix"] for row in results["timeline"]["matrices"]] if results["timeline"] else [],
        "skipped": list((results.get("skipped") or {}).items()),
    }


# Sentences.


def _verdict(rows: list[Json]) -> str:
    """What the spectra say, in one sentence."""
    if not rows:
        return "There was no matrix to inspect."
    shares = [row["measures"]["signal_share"] or 0.0 for row in rows]
    energies = [row["measures"]["signal_energy"] or 0.0 for row in rows]
    empty = sum(share == 0 for share in shares)
    high, low = max(rows, key=_signal), min(rows, key=_signal)
    said = (
        f"Half of the {len(rows):,} matrices have {_percent(statistics.median(shares))} or more of their singular "
        f"values above what noise reaches, with {_percent(statistics.median(energies))} of the squared norm"
    )
    if empty:
        return f"{said}; {empty:,} cannot be told from noise."
    if high is low:
        return f"{said}."
    return f"{said}; from {_percent(_signal(low))} in {_where(low)} to {_percent(_signal(high))} in {_where(high)}."


def _signal(row: Json) -> float:
    return row["measures"]["signal_share"] or 0.0


def _reading(results: Json) -> str:
    said = (
        "Noise is fitted to the smaller singular values of each matrix by the Marchenko-Pastur law; a value above the "
        f"Tracy-Widom edge would come of noise in one matrix of {round(1 / CHANCE)}."
    )
    data = results["data"]
    if data:
        loss = data["loss"]
        said += (
            f" Importance was measured on {loss['count']:,} examples of {data['name']}, "
            f"on which the model's loss is {loss['value']:.3f} \u00b1 {loss['stderr'] or math.nan:.3f} nats/token."
        )
    return said


def _timeline_words(timeline: Json | None) -> str:
    if not timeline:
        return ""
    steps, passed = timeline["steps"], timeline["transitions"]
    first = sum(row["rank"][0] > 0 for row in timeline["matrices"])
    said = f"{len(steps)} checkpoints from step {steps[0]:,} to {steps[-1]:,}."
    if passed:
        said += (
            f" In {len(passed)} of {len(timeline['matrices'])} matrices a singular value left the bulk, "
            f"first in {passed[0]['matrix']} between steps {passed[0]['before']:,} and {passed[0]['step']:,}."
        )
    if first:
        said += f" {first} had one above the edge at the first checkpoint already."
    if not passed and not first:
        said += " No singular value left the bulk."
    return said


def _where(row: Json) -> str:
    return row["matrix"] if row["layer"] is None else f"{row['type']} of layer {row['layer']}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%"


# Tables.


def _by_type(rows: list[Json]) -> list[Json]:
    """One line a type: medians of the ranks, as shares of full rank."""
    found = []
    for kind in _types(rows):
        ones = [row for row in rows if row["type"] == kind]
        shapes = sorted({tuple(row["shape"]) for row in ones})
        found.append(
            {
                "type": kind,
                "count": len(ones),
                "shape": " \u00d7 ".join(map(str, shapes[0]))
                + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""),
                "ranks": [
                    _percent(statistics.median(row["ranks"][rule] / min(row["shape"]) for row in ones))
                    for rule in RULES
                ],
                "sigma": f"{statistics.median(row['sigma'] for row in ones):.3g}",
            }
        )
    return found


def _listed(results: Json) -> list[Json]:
    """Matrices as lines of the folded table: by the loss without them where that was measured, else by signal."""
    importance = results["importance"] or {}

    def weight(row: Json) -> float:
        loss = (importance.get(row["matrix"]) or {}).get("loss_cut") or {}
        value: float | None = loss.get("value")
        return _signal(row) if value is None else value

    rows = sorted(results["matrices"], key=weight, reverse=True)[:ROWS_LISTED]
    return [
        {
            "matrix": row["matrix"],
            "type": row["type"],
            "layer": row["layer"],
            "full": min(row["shape"]),
            "ranks": [row["ranks"][rule] for rule in RULES],
            "loss": (importance.get(row["matrix"]) or {}).get("loss_cut"),
        }
        for row in rows
    ]


def _correlations(pairs: list[Json]) -> list[Json]:
    """The pairs with the measured loss, or the strongest ones where there is none."""
    with_loss = [pair for pair in pairs if "loss_cut" in (pair["one"], pair["other"])]
    chosen = with_loss or sorted(pairs, key=lambda pair: -abs(pair["value"] or 0))[:12]
    return [
        {
            "one": _label(pair["one"]),
            "other": _label(pair["other"]),
            "value": _two(pair["value"]),
            "within": _two(pair["within"]),
            "count": pair["count"],
            "p": "\u2013" if pair["p_value"] is None else f"{pair['p_value']:.2g}",
        }
        for pair in sorted(chosen, key=lambda pair: -abs(pair["value"] or 0))
    ]


def _label(name: str) -> str:
    return MEASURES[name][0] if name in MEASURES else name


def _two(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:+.2f}".replace("-", "\u2212")


# Plots.


def plots_rows(rows: list[Json]) -> list[Json]:
    """Choose the matrices whose spectrum is drawn.

    Args:
        rows: All.

    Returns:
        All, or the first of every cell of the map where there are too many.
    """
    if len(rows) <= SPECTRA_DRAWN:
        return rows
    cells: dict[tuple[Any, ...], Json] = {}
    for row in rows:
        cells.setdefault((row["stack"], row["layer"], row["type"]), row)
    return list(cells.values())[:SPECTRA_DRAWN]


def _plots(results: Json) -> Json:
    rows = results["matrices"]
    types, places = _types(rows), _places(rows)
    values = _values(results)
    cells = {name: _cells(rows, values[name], places, types) for name in MEASURES if name in values}
    return {
        "types": [plot_text(kind) for kind in types],
        "rows": [plot_text(_place_name(place, places)) for place in places],
        "values": {name: {"cells": grid, **_scale(grid, MEASURES[name][2])} for name, grid in cells.items()},
        "order": list(cells),
        "labels": {name: MEASURES[name][0] for name in cells},
        "meanings": {name: MEASURES[name][1] for name in cells},
        "spectra": [_spectrum(row) for row in plots_rows(rows)],
        "where": [[places.index(_place(row)), types.index(row["type"])] for row in plots_rows(rows)],
        "rules": [[rule, label] for rule, label in RULES.items() if rule in noise.EDGES],
        "start": max(range(len(plots_rows(rows))), key=lambda i: _signal(plots_rows(rows)[i]), default=0),
        "agreement": _agreement(results["correlations"], list(cells)),
        "heads": _heads(results["heads"] or []),
        "timeline": _timeline(results["timeline"]),
    }


def _values(results: Json) -> dict[str, list[float | None]]:
    """Measure -> its value for each matrix; only those that some matrix has."""
    importance = results["importance"] or {}
    found: dict[str, list[float | None]] = {}
    for name in MEASURES:
        column = [
            row["measures"][name]
            if name in row["measures"]
            else ((importance.get(row["matrix"]) or {}).get(name) or {}).get("value")
            for row in results["matrices"]
        ]
        if any(value is not None for value in column):
            found[name] = column
    return found


def _cells(
    rows: list[Json], values: Iterable[float | None], places: list[tuple[str, Any]], types: list[str]
) -> list[list[float | None]]:
    """Mean over the matrices of a cell."""
    sums: dict[tuple[int, int], list[float]] = {}
    for row, value in zip(rows, values):
        if value is not None:
            sums.setdefault((places.index(_place(row)), types.index(row["type"])), []).append(value)
    return [
        [_short(statistics.fmean(sums[r, c])) if (r, c) in sums else None for c in range(len(types))]
        for r in range(len(places))
    ]


def _scale(grid: list[list[float | None]], signed: bool) -> Json:
    """How a measure is coloured: from where to where, and whether by its logarithm."""
    numbers = sorted(value for line in grid for value in line if value is not None)
    if signed:
        limit = max((abs(value) for value in numbers), default=1.0) or 1.0
        # A ruinous cut would otherwise fade all others to white.
        usual = statistics.median(abs(value) for value in numbers) * 4 if numbers else limit
        return {"signed": True, "log": False, "low": -min(limit, usual or limit), "high": min(limit, usual or limit)}
    low, high = (numbers[0], numbers[-1]) if numbers else (0.0, 1.0)
    return {
        "signed": False,
        "log": low > 0 and high / low > SPREAD,
        "low": low,
        "high": high if high > low else low + 1,
    }


def _spectrum(row: Json) -> Json:
    """Counts of singular values in bins of equal ratio, and how many of them the fitted noise would have there."""
    values = np.array([value for value in row["singular_values"] if value > 0])
    head = {
        "name": plot_text(row["matrix"]),
        "shape": row["shape"],
        "sigma": _short(row["sigma"]),
        "edges": {rule: _short(edge) for rule, edge in row["edges"].items()},
        "ranks": {rule: row["ranks"][rule] for rule in row["edges"]},
    }
    if not len(values):
        return head | {"bins": [], "counts": [], "noise": []}
    floor = max(values[-1] * 0.95, values[0] * 1e-4)
    bins = np.geomspace(floor, values[0] * 1.03, BINS + 1)
    counts, _ = np.histogram(np.maximum(values, floor), bins)
    return head | {
        "bins": [_short(value) for value in bins.tolist()],
        "counts": counts.tolist(),
        "noise": [_short(value) for value in _expected(row, bins).tolist()],
    }


def _expected(row: Json, bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that noise of the fitted size has in each bin, beside a signal of the Tracy-Widom rank."""
    signal = row["ranks"]["tw"]
    large, small = max(row["shape"]) - signal, min(row["shape"]) - signal
    if row["sigma"] <= 0 or small < 1:
        return np.zeros(len(bins) - 1)
    return small * np.diff(noise.cumulative(bins**2 / (large * row["sigma"] ** 2), small / large))


def _agreement(pairs: list[Json], names: list[str]) -> Json:
    """Correlations as a square, all and within types."""
    found: dict[tuple[str, str], Json] = {}
    for pair in pairs:
        found[pair["one"], pair["other"]] = found[pair["other"], pair["one"]] = pair
    kept = [name for name in names if any(name in key for key in found)]

    def square(field: str) -> list[list[float | None]]:
        return [
            [None if a == b else _short(pair[field]) if (pair := found.get((a, b))) else None for b in kept]
            for a in kept
        ]

    return {"names": [_label(name) for name in kept], "value": square("value"), "within": square("within")}


def _heads(heads: list[Json]) -> Json | None:
    if not heads:
        return None
    places = list(dict.fromkeys((head["stack"], head["layer"]) for head in heads))
    width = 1 + max(head["head"] for head in heads)
    grids: dict[str, list[list[float | None]]] = {}
    for name in ("loss_gain", "entropy", "sink_share"):
        if not any(head[name] for head in heads):
            continue
        grids[name] = [[None] * width for _ in places]
        for head in heads:
            value = (head[name] or {}).get("value")
            grids[name][places.index((head["stack"], head["layer"]))][head["head"]] = _short(value)
    labels = {"loss_gain": "loss without it", "entropy": "attention entropy", "sink_share": "sink share"}
    return {
        "rows": [plot_text(_place_name(place, places)) for place in places],
        "values": {name: {"cells": grid, **_scale(grid, name == "loss_gain")} for name, grid in grids.items()},
        "order": [[labels[name], name] for name in grids],
        "labels": {name: labels[name] for name in grids},
    }


def _timeline(timeline: Json | None) -> Json | None:
    if not timeline:
        return None
    rows = timeline["matrices"]
    passed = {one["matrix"]: one["step"] for one in timeline["transitions"]}
    types, places = _types(rows), _places(rows)
    grid: list[list[float | None]] = [[None] * len(types) for _ in places]
    for row in rows:
        r, c = places.index(_place(row)), types.index(row["type"])
        step = passed.get(row["matrix"])
        if step is not None:
            grid[r][c] = min(step, grid[r][c] or step)
    return {
        "steps": timeline["steps"],
        "types": [plot_text(kind) for kind in types],
        "rows": [plot_text(_place_name(place, places)) for place in places],
        "passed": grid,
        "matrices": [
            {
                "name": plot_text(row["matrix"]),
                "largest": [[_short(value) for value in ones] for ones in row["largest"]],
                "edge": [_short(value) for value in row["edge"]],
                "rank": row["rank"],
                "step": passed.get(row["matrix"]),
            }
            for row in rows
        ],
        "start": next((i for i, row in enumerate(rows) if row["matrix"] in passed), 0),
    }


def _types(rows: list[Json]) -> list[str]:
    seen = {row["type"] for row in rows}
    return sorted(seen, key=lambda kind: (TYPES.index(kind) if kind in TYPES else len(TYPES), kind))


def _place(row: Json) -> tuple[str, Any]:
    return (OUTSIDE, None) if row["layer"] is None else (row["stack"], row["layer"])


def _places(rows: list[Json]) -> list[tuple[str, Any]]:
    found = list(dict.fromkeys(map(_place, rows)))
    return [place for place in found if place[1] is not None] + [place for place in found if place[1] is None]


def _place_name(place: tuple[str, Any], places: list[tuple[str, Any]]) -> str:
    stack, layer = place
    if layer is None:
        return "other"
    return f"{stack.split('.')[0]} {layer}" if len({one for one, n in places if n is not None}) > 1 else str(layer)


def _short(value: float | None) -> float | None:
    """Digits that a plot can show."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _name(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2] or source
