"""results.json -> report.html: one file that needs no network and runs nothing but its own scripts.

The report is a pure function of the JSON, so `eckart report RUN` redraws it years later. Python decides every
word and number here; the template lays them out, and its script only draws the plots.

Text from models and tasks is hostile until shown otherwise. Three fences keep it inert: jinja2 escapes all of
it, `plot_text` disarms what plotly would read as markup, and a content security policy made of script hashes
lets the browser run the report's own scripts and load nothing.

As in results.json, a gain is edited minus unedited whatever the metric: a negative gain in loss is an
improvement. Only the colours of the heat map turn that round.
"""

import base64
import hashlib
import html
import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template, UndefinedError
from markupsafe import Markup

from eckart.errors import EckartError
from eckart.results import SCHEMA_VERSION, read_json, to_json, write_text

Json = dict[str, Any]

TYPES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj", "fc_in", "fc_up", "fc_out")
METRICS = ("accuracy", "top5", "top10", "loss", "perplexity", "divergence")  # in the order of the tables
JUDGED = ("accuracy", "loss", "divergence")  # what a search may choose by
LOWER_IS_BETTER = {"loss", "perplexity", "divergence"}
OUTSIDE = "outside the blocks"
EVERY_RHO = "best ρ"  # the slice of the heat map that shows each cell at its best rho
EDITS_LISTED = 20
SETS_LISTED = 10  # each takes several lines
EDITS_NAMED = 6  # in one sentence; a longer plan is named in its table
EXAMPLES_OPEN = 5  # per direction; the others are folded
PROMPT_CHARACTERS = 600
HOVER_CHARACTERS = 56
LABEL_CHARACTERS = 32
MINUS, DASH, NARROW_SPACE, HARD_SPACE = "\u2212", "\u2013", "\u202f", "\u00a0"


def finish_run(out: Path, results: Mapping[str, Any]) -> None:
    """Write the report, then the results: a folder with `results.json` is a finished run.

    Args:
        out: The run's folder.
        results: What `results.json` will hold; measurements and dataclasses may be in it. Not modified.

    Raises:
        OutputError: They cannot be written.
    """
    text = to_json(results)
    write_text(out / "report.html", render(json.loads(text)))
    write_text(out / "results.json", text)


def write_report(run: Path) -> Path:
    """Draw `report.html` of a run from its `results.json`.

    The file appears at once or not at all: it is written beside its place and then moved there.

    Args:
        run: Folder of the run. Nothing in it but `results.json` is read.

    Returns:
        The path of `report.html`, inside `run`.

    Raises:
        EckartError: `results.json` is missing, is not JSON, or is not something a report can be drawn from.
        OutputError: `report.html` cannot be written there.
    """
    source, target = run / "results.json", run / "report.html"
    results = read_json(source)
    if not isinstance(results, dict):
        raise EckartError(
            f"{source} holds a {type(results).__name__}. Results are a JSON object. "
            f"Give the folder of a finished run; `eckart search MODEL --task T --out DIR` makes one."
        )
    try:
        page = render(results)
    except EckartError as error:
        raise EckartError(f"{source}: {error}") from error
    # A lone surrogate is legal in JSON and not in UTF-8.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def render(results: Json) -> str:
    """Return the report of `results` as one HTML document.

    Equal results give equal documents: there is no date in it and nothing is read but the template.

    Args:
        results: The content of a `results.json` of kind "search" or "evaluate". Not modified.

    Returns:
        HTML with all styles and scripts inside, about 5 MB where there are plots (plotly.js).

    Raises:
        EckartError: The kind or the schema version is unknown, or a field that the report needs is missing.
    """
    kind, version = results.get("kind"), results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise EckartError(
            f"these results have schema_version {version!r}. "
            f"This version of eckart draws schema_version {SCHEMA_VERSION}. "
            f"Run the verb again, or draw the report with the eckart that wrote them."
        )
    if not isinstance(kind, str) or kind not in PAGES:
        raise EckartError(
            f"these results are of kind {kind!r}. "
            f"A report can be drawn of {' or '.join(map(repr, PAGES))}. "
            f"Give the folder of a run that `eckart search` or `eckart evaluate` wrote."
        )
    return draw(results, *PAGES[kind])


def draw(results: Json, page: Callable[[Json], Json], template: str) -> str:
    """Fill a template with what a page shows, and with what every page does.

    Args:
        results: Of any kind and the current schema version; `model`, `warnings`, `recipe`, `environment` and `seconds`
            stand on every page. Not modified.
        page: Takes the results to what the template names besides.
        template: Of this package; extends `frame.html.j2`.

    Returns:
        HTML, as of `render`.

    Raises:
        EckartError: A field is missing or of another type.
    """
    kind = results.get("kind")
    try:
        return _template(template).render(**_frame(results) | page(results))
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise EckartError(
            f"these results of kind {kind!r} lack a field or hold one of the wrong type "
            f"({type(error).__name__}: {error}). "
            f"A report needs every field that this version's `eckart {kind}` writes. "
            f"Give that command again with another --out, or draw the report with the eckart that wrote them."
        ) from error


@cache
def _template(name: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_source)
    )
    environment.filters |= {
        "measurement": _measurement,
        "gain": _gain_and_span,
        "count": _count,
        "duration": _duration,
        "said": _said,
        "hash_source": _hash_source,
    }
    return environment.get_template(name)


def _source(name: str) -> str:
    return (files("eckart") / name).read_text(encoding="utf-8")


# Pages: what the template shows, by kind of results.


def _search_page(results: Json) -> Json:
    """What the report of a search shows."""
    best, baseline = results["best"], results["baseline"]
    edits, select = best["edits"], _selected(results)
    trials = results["grid"]
    singles = [trial | {"edits": [trial["edit"]]} for trial in trials]
    plots = _plots(trials, baseline["validation"], edits, results.get("spectrum"), _predicted(results))
    return {
        "title": f"{results['task']['name']} on {_model_name(results['model'])}",
        "verdict": _verdict(results),
        "effort": _effort(results),
        "edits": edits,
        "select": select,
        "command": shlex.join(["eckart", "apply", results["model"]["source"], best["plan"], "--dense", "--out", "DIR"]),
        "comparison": _comparison(best, baseline),
        "plots": plots,
        "plotly": plotly() if plots else "",
        "layers": _layer_names(_rows(trials)),
        "cut": (results.get("spectrum") or {}).get("matrix"),
        "plan": _plan(results),
        "cost": _cost(best.get("cost"), edits),
        "ranking": _ranking(singles, baseline["validation"], edits, select, EDITS_LISTED),
        "sets": _ranking(results["compositions"], baseline["validation"], edits, select, SETS_LISTED),
        "controls": _controls(results),
        "flipped": _flipped(results.get("flipped") or [], results.get("flip_counts") or {}),
    }


def _evaluate_page(results: Json) -> Json:
    """What the report of an evaluation shows: plans down, tasks across."""
    rows = results["rows"]
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["plan"], row["task"]): row["measurements"] for row in rows}

    def cell(plan: str, task: str) -> list[Json]:
        """The measurements of one plan on one task, each with its distance from no plan."""
        before = found.get(("none", task), {}) if plan != "none" else {}
        return [
            {"name": name, "value": value, "change": _change(before[name], value) if name in before else ""}
            for name, value in _in_order(found.get((plan, task), {}))
        ]

    return {
        "title": f"Evaluation of {_model_name(results['model'])}",
        "verdict": "",
        "tasks": tasks,
        "table": [(plan, [cell(plan, task) for task in tasks]) for plan in plans],
        "compared": "none" in plans and len(plans) > 1,
        "speed": _paces(results.get("speed") or {}),
        "run": results.get("speed") or {},
        "memory": _takings(results.get("memory") or {}),
        "plots": None,
        "plotly": "",
    }


def _compress_page(results: Json) -> Json:
    """What the report of a compression shows: size and quality before and after, and who got which rank."""
    before, after = results["size"]["before"], results["size"]["after"]
    rows = []
    for row in results["quality"]:
        for name, value in _in_order(row["after"]):
            old = row["before"].get(name)
            rows.append(
                {"text": row["name"], "metric": name, "before": old, "after": value, "change": _change(old, value)}
            )
    types = [kind for kind in (*TYPES, "other") if any(m["type"] == kind for m in results["matrices"])]
    layers: dict[Any, dict[str, tuple[str, str]]] = {}
    for matrix in results["matrices"]:
        where = OUTSIDE if matrix["layer"] is None else matrix["layer"]
        largest = min(matrix["shape"])
        left = [f"{matrix[key]} {key}" for key in ("neurons", "dimensions") if matrix.get(key) is not None]
        text = "dense" if matrix["rank"] == largest and not left else f"{matrix['rank']} of {largest}"
        layers.setdefault(where, {})[matrix["type"]] = text, ", ".join(left)
    budget = results["budget"]
    return {
        "title": f"{_model_name(results['model'])}, compressed",
        "verdict": (
            f"The model takes {_count(after['bytes'])} bytes instead of {_count(before['bytes'])} "
            f"({100 * after['bytes'] / before['bytes']:.1f} %), its matrices "
            f"{100 * budget['spent'] / budget['dense']:.1f} % of their {budget['unit']}."
        ),
        "rows": rows,
        "elastic": results.get("elastic"),
        "allocations": results["allocations"],
        "rounds": results.get("rounds", []),
        "unit": results["allocations"][0]["divergence"]["unit"],
        "read": "windows" if "windows" in results["calibration"] else "sentences",
        "types": types,
        "layers": [(layer, [found.get(kind, (DASH, "")) for kind in types]) for layer, found in layers.items()],
        "roots": ", ".join(f"{how} ({count})" for how, count in sorted(results["roots"].items())),
        "plots": None,
        "plotly": "",
    }


def _paces(speed: Json) -> list[tuple[str, ...]]:
    """Rows of the table of speeds: plan, batch, phase, tokens a second, ratio to the dense model, what it could be."""
    rows = []
    for row in speed.get("rows") or []:
        for phase in ("prefill", "decode"):
            pace = row[phase]
            if pace:
                ratio = pace["ratio"]
                span = f"{ratio['value']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
                limit = f"{pace['limit']:.2f} by {pace['limited_by']}"
                tokens = _measurement(pace["tokens_per_second"])
                rows.append((_side(row["side"]), str(row["batch"]), phase, tokens, span, limit))
    return rows


def _takings(memory: Json) -> list[tuple[str, ...]]:
    """Rows of the table of memory: plan, on disk, parameters, most in memory, libraries."""
    rows = []
    for row in memory.get("rows") or []:
        process = (row[name]["value"] for name in ("peak", "interpreter"))
        rows.append((_side(row["side"]), *map(_bytes, (row["disk"], row["parameters"], *process))))
    return rows


def _side(name: str) -> str:
    return "unedited" if name == "none" else name


def _recover_page(results: Json) -> Json:
    """What the report of a recovery shows."""
    test, gain, size = results["test"], results["gain"], results["size"]
    low, high = _interval(gain)
    rows = [
        (name, test[key], change)
        for name, key, change in (
            ("before", "before", None),
            ("recovered", "after", gain),
            ("teacher", "teacher", None),
        )
        if key in test
    ]
    against = results["teacher_gain"]
    times = f", {math.exp(against['value']):.3f} times the teacher's" if against else ""
    changed = "lowers" if high < 0 else "raises" if low > 0 else "does not surely change"
    verdict = (
        f"Recovery {changed} perplexity: from {_measurement(test['before']['perplexity'])} to "
        f"{_measurement(test['after']['perplexity'])}{times} (loss {_signed(gain['value'], 3)} nats/token, "
        f"95{HARD_SPACE}% interval {_span(low, high)}) on {_count(gain['count'])} windows that took no part in "
        "training or choosing."
    )
    adapter = size["adapter"]
    charged = f", and {_bytes(adapter['bytes'])} for the adapter beside it" if adapter else ""
    model, dense = size["model"], size["dense"]
    sampled = results["data"].get("sampled")
    own = f" and {_count(sampled)} that the teacher wrote" if sampled else ""
    return {
        "title": f"Recovery on {results['data']['name']}",
        "verdict": verdict,
        "effort": (
            f"{_count(size['trained'])} parameters were trained for {_count(results['curve'][-1]['step'])} steps "
            f"on {_count(results['data']['train'])} windows of text{own}; "
            f"step {_count(results['best_step'])} was best on held-out text and was kept"
            f"{', and training stopped early' if results['stopped'] else ''}. The model takes "
            f"{_bytes(model['bytes'])}{charged}; dense it would take {_bytes(dense['bytes'])}."
        ),
        "rows": rows,
        "against": against,
        "curve": _learning_curve(results["curve"], results["best_step"]),
        "points": results["curve"],
        "plots": None,
        "plotly": "",
    }


def _repair_page(results: Json) -> Json:
    """What the report of a repair shows."""
    test, gain, size = results["test"], results["gain"], results["bytes"]
    low, high = _interval(gain)
    bits = f"{results['bits']}{HARD_SPACE}bits"
    changed = "lowers" if high < 0 else "raises" if low > 0 else "does not surely change"
    whole = size["rounded"] + size["corrections"]
    return {
        "title": f"Repair on {results['data']['name']}",
        "verdict": (
            f"Repair {changed} the perplexity of the weights in {bits}: from "
            f"{_measurement(test['rounded']['perplexity'])} to {_measurement(test['after']['perplexity'])} (loss "
            f"{_signed(gain['value'], 3)} nats/token, 95{HARD_SPACE}% interval {_span(low, high)}), on "
            f"{_count(gain['count'])} windows that took no part. As it was, the model had "
            f"{_measurement(test['before']['perplexity'])}."
        ),
        "effort": (
            f"The weights take {_bytes(size['dense'])} as they were, {_bytes(size['rounded'])} rounded, and "
            f"{_bytes(whole)} with the corrections in 8{HARD_SPACE}bits. Nothing was trained."
        ),
        "rows": [
            ("as it was", test["before"], None),
            (f"in {bits}", test["rounded"], None),
            ("repaired", test["after"], gain),
        ],
        "against": results["dense_gain"],
        "matrices": [
            {**row, "left": row["error_repaired"] / row["error_rounded"] if row["error_rounded"] else 1.0}
            for row in results["matrices"]
        ],
        "plots": None,
        "plotly": "",
    }


def _learning_curve(points: list[Json], best: int) -> Json | None:
    """Coordinates of the held-out loss against the steps, in a box of 640 by 260."""
    shown = [p for p in points if _finite(p["held_out"]["value"]) and _finite(p["held_out"]["stderr"])]
    if len(shown) < 2:
        return None
    values, errors = ([p["held_out"][key] for p in shown] for key in ("value", "stderr"))
    top, bottom = (sign * max(sign * v + e for v, e in zip(values, errors)) for sign in (1, -1))
    last, height = shown[-1]["step"], top - bottom or 1.0

    def x(step: float) -> float:
        return round(52 + 576 * step / last, 1)

    def y(loss: float) -> float:
        return round(14 + 206 * (top - loss) / height, 1)

    upper = [f"{x(p['step'])},{y(v + e)}" for p, v, e in zip(shown, values, errors)]
    lower = [f"{x(p['step'])},{y(v - e)}" for p, v, e in zip(shown, values, errors)]
    ticks = [bottom + height * part / 4 for part in range(5)]
    kept = next((p for p in shown if p["step"] == best), shown[0])
    return {
        "line": " ".join(f"{x(p['step'])},{y(v)}" for p, v in zip(shown, values)),
        "band": " ".join([*upper, *reversed(lower)]),
        "dots": [
            (x(p["step"]), y(v), f"step {p['step']}: {_measurement(p['held_out'])}") for p, v in zip(shown, values)
        ],
        "best": (x(kept["step"]), y(kept["held_out"]["value"])),
        "losses": [(y(tick), _number(tick, 3)) for tick in ticks],
        "steps": [(x(part * last / 4), _count(part * last / 4)) for part in range(5)],
    }


PAGES = {
    "repair": (_repair_page, "repair.html.j2"),
    "recover": (_recover_page, "recover.html.j2"),
    "compress": (_compress_page, "compress.html.j2"),
    "search": (_search_page, "report.html.j2"),
    "evaluate": (_evaluate_page, "report.html.j2"),
}


def _frame(results: Json) -> Json:
    """What every report shows: the model, the warnings, how it was made."""
    model = results["model"]
    facts = [model["source"], model.get("architecture")]
    if model.get("parameters"):
        facts.append(f"{_count(model['parameters'])} parameters")
    if model.get("coverage") is not None:
        facts.append(f"{100 * model['coverage']:.4g} % of the weight matrices can be edited")
    task = results.get("task")
    if task:
        sizes = f"{_count(task['validation'])} validation and {_count(task['test'])} test examples"
        facts.append(f"{task['kind']} task, {sizes}" if task.get("kind") else sizes)
    return {
        "kind": results["kind"],
        "facts": [fact for fact in facts if fact],
        "warnings": results.get("warnings") or [],
        "weights": model.get("weights_sha256"),
        "settings": list(_flat(results.get("recipe") or {})),
        "environment": list(_flat(results.get("environment") or {})),
        "seconds": results.get("seconds") or {},
    }


# Sentences.


def _verdict(results: Json) -> str:
    """The outcome in one sentence, with its uncertainty."""
    best, before = results["best"], results["baseline"]["test"]
    edits, metric = best["edits"], _selected(results)
    if not edits:
        return (
            f"None of the {_count(len(results['grid']))} edits tried beat the unedited model on validation, "
            f"so the plan is empty and the model stays as it is, with a test {metric} of "
            f"{_measurement(before[metric])} on {_count(before[metric]['count'])} examples."
        )
    gain = best.get("test_gain") if metric == "accuracy" else best.get("test_loss_gain")
    after = best["test"][metric]
    if metric == "divergence":
        held = "within" if _finite(after["value"]) and after["value"] <= results["recipe"]["tolerance"] else "beyond"
        count, tolerance = _count(after["count"]), results["recipe"]["tolerance"]
        saved = sum(math.prod(edit["shape"]) for edit in edits) - best["cost"]["numbers"]
        return (
            f"{_cutting(edits)} saves {_count(saved)} numbers; on {count} test tokens the "
            f"model diverges from the unedited one by {_measurement(after)} nats/token, "
            f"{held} the tolerance of {tolerance:g}."
        )
    path = f"{_measurement(before[metric])} to {_measurement(after)}"
    unit = "" if metric == "accuracy" else " nats/token"
    if gain is None:
        return f"{_cutting(edits)} takes test {metric} from {path}{unit} on {_count(after['count'])} examples."
    low, high = _interval(gain)
    word = "gain" if metric == "accuracy" else "change"
    proof = f"{word} {_signed(gain['value'], 3)}, 95{HARD_SPACE}% interval {_span(low, high)}"
    if gain.get("p_value") is not None:
        proof += f", {'exact McNemar ' if metric == 'accuracy' else ''}{_p_value(gain['p_value'])}"
    held_out = f"({proof}) on {_count(gain['count'])} examples that took no part in choosing."
    subject = _cutting(edits)
    worst, most = sorted((-low, -high) if metric in LOWER_IS_BETTER else (low, high))
    if worst > 0:
        verb = "lowers" if metric in LOWER_IS_BETTER else "raises"
        return f"{subject} {verb} test {metric} from {path}{unit} {held_out}"
    outcome = "the test contradicts it" if most < 0 else "the test does not confirm it"
    return f"{subject} looked best on validation, but {outcome}: test {metric} goes from {path}{unit} {held_out}"


def _cutting(edits: list[Json]) -> str:
    """Edits as the subject of a sentence."""
    verbs = {
        {"low_rank": "Cutting", "zero": "Zeroing", "shrink": "Shrinking"}.get(edit["kind"], "Editing") for edit in edits
    }
    verb = verbs.pop() if len(verbs) == 1 else "Editing"
    if len(edits) > EDITS_NAMED:
        return f"{verb} {len(edits)} matrices together"
    *most, last = (f"{_where(edit)}{_how(edit)}" for edit in edits)
    return f"{verb} {', '.join(most)} and {last} together" if most else f"{verb} {last}"


def _how(edit: Json) -> str:
    """How deep, as the end of a phrase."""
    kind, rho = edit["kind"], _plain(edit.get("rho"))
    if kind == "zero":
        return ""
    settings = [f"rho {rho}", *(f"{key} {value}" for key, value in _unusual(edit))]
    if kind in ("low_rank", "shrink"):
        return f" to rank {_rank(edit)} ({', '.join(settings)})"
    return f" ({', '.join([f'kind {kind}', *settings])})"


def _where(edit: Json) -> str:
    """Type and layer in words; the stack only where it is not obvious from the model."""
    if edit["layer"] is None:
        return f"{edit['type']} ({edit['matrix']})"
    stack = edit.get("stack") or ""
    side = f" of {stack}" if stack.startswith(("encoder", "decoder")) else ""
    return f"{edit['type']} of layer {edit['layer']}{side}"


def _unusual(edit: Json) -> list[tuple[str, str]]:
    """The settings of an edit that differ from LASER's."""
    usual = {"weighting": "none", "basis": "top", "blocks": 1, "clustering": "contiguous", "rank_rule": None}
    return [(key, str(edit[key])) for key, default in usual.items() if edit.get(key, default) != default]


def _rank(edit: Json) -> str:
    rank = edit.get("rank")
    return DASH if rank is None else f"{_count(rank)} of {_count(_full_rank(edit))}"


def _full_rank(edit: Json) -> int:
    """The largest rank of a block of rows."""
    out, into = edit["shape"]
    return min(-(-out // (edit.get("blocks") or 1)), into)


def _effort(results: Json) -> str:
    """How much was tried, and what stopping early saved."""
    trials, each = results["trials"], results["task"]["validation"]
    singles, sets = len(results["grid"]), len(results["compositions"])
    tried = [*results["grid"], *results["compositions"]]
    what = f"all {_count(singles)} edits of the grid"
    if singles != trials["grid"]:
        what = f"the {_count(singles)} of {_count(trials['grid'])} edits that a gradient predicted to be best"
    said = [f"The search tried {what}{f', and {_count(sets)} sets of them' if sets else ''}."]
    stopped = sum(bool(trial["stopped"]) for trial in tried)
    if stopped:
        seen, most = sum(map(_seen, tried)), len(tried) * each
        by = "could not win" if all(_proved(trial["stopped"]) for trial in tried) else "could not win or surely lost"
        said.append(
            f"{_count(stopped)} {by} and were stopped early, so that {_count(seen)} of {_count(most)} examples "
            f"were scored ({100 * (1 - seen / most):.0f} % saved)."
        )
    if trials["prefix_cache_bytes"]:
        said.append(f"The prefix cache held at most {_bytes(trials['prefix_cache_bytes'])}.")
    return " ".join(said)


def _proved(stopped: Json | None) -> bool:
    return not stopped or stopped["p_value"] is None


def _seen(trial: Json) -> int:
    """Examples that an edit was measured on."""
    measured = trial["validation"]
    return measured[_main_metric(measured)]["count"]


def _reason(trial: Json) -> str:
    """Why a race did not go on with an edit."""
    stopped = trial["stopped"]
    if not stopped:
        return ""
    metric, reached, rival = stopped["metric"], stopped["at_best"], stopped["to_beat"]
    digits = next((n for n in (3, 4, 5) if _number(reached, n) != _number(rival, n)), 6)
    ours, theirs = _number(reached, digits), _number(rival, digits)
    after = f"stopped after {_count(_seen(trial))} examples"
    if not _proved(stopped):
        looks = f"{stopped['looks']} look{'s' if stopped['looks'] != 1 else ''}"
        test = f"{_p_value(stopped['p_value'])}, level {_power(stopped['level'])}, {looks}"
        return f"{after}: {metric} {ours} against {theirs} on these; {test}"
    return f"{after}: {metric} at best {ours}, needs {theirs}"


def _cost(cost: Json | None, edits: list[Json]) -> str:
    """What the winner would take as factors, against its dense matrices."""
    if not cost or not edits:
        return ""
    dense = sum(edit["shape"][0] * edit["shape"][1] for edit in edits)
    numbers = cost["numbers"]
    them = "the matrix" if len(edits) == 1 else "these matrices"
    if numbers >= dense:
        return f"Factors would save nothing: at so high a rank they take all {_count(dense)} numbers of {them}."
    order = f", and {_count(cost['integers'])} integers for the order of the rows" if cost["integers"] else ""
    return (
        f"Kept as factors, {them} would take {_count(numbers)} numbers instead of {_count(dense)}"
        f" ({100 * numbers / dense:.3g} %){order}, and {_count(cost['flops'])} floating-point operations a token "
        f"instead of {_count(2 * dense)}. eckart apply writes dense weights."
    )


# Tables.


def _comparison(best: Json, baseline: Json) -> list[tuple[str, list[Json]]]:
    """Rows of the before/after table; a change has an error only where it was measured in pairs."""
    tables = []
    for split in ("test", "validation"):
        after = (best.get(split) or {}) if best["edits"] else {}
        gains = {"accuracy": best.get("test_gain"), "loss": best.get("test_loss_gain")}
        rows = []
        for name, before in _in_order(baseline[split]):
            gain = gains.get(name) if split == "test" and name in after else None
            row = {"name": name, "before": before, "after": after.get(name)}
            if gain:
                row |= {"change": _gain(gain), "interval": _span(*_interval(gain))}
            else:
                row |= {"change": _change(before, after.get(name)), "interval": ""}
            rows.append(row)
        tables.append((split, rows))
    return tables


def _plan(results: Json) -> Json:
    """The edits of the plan in the order in which they were added, and what each added on validation."""
    select, before = _selected(results), results["baseline"]["validation"]
    metrics = [name for name in JUDGED if name in before]
    rows = []
    for edit, measured in _steps(results):
        cells = [(measured.get(name), _change(before.get(name), measured.get(name))) for name in metrics]
        rows.append({"name": _where(edit), "how": _how(edit).strip(), "matrix": edit["matrix"], "cells": cells})
        before = measured
    return {"rows": rows, "metrics": metrics, "select": select}


def _steps(results: Json) -> list[tuple[Json, Json]]:
    """The winner as it grew: each edit with the validation measurements of the set that it completes."""
    best, select = results["best"], _selected(results)
    tried = [trial | {"edits": [trial["edit"]]} for trial in results["grid"]] + results["compositions"]
    whole = sorted((trial for trial in tried if not trial["stopped"]), key=lambda t: _merit(t, select), reverse=True)
    left, measured, steps = best["edits"], best["validation"], []
    while len(left) > 1:
        parts = (t for t in whole if len(t["edits"]) == len(left) - 1 and all(edit in left for edit in t["edits"]))
        parent = next(parts, None)
        if parent is None:  # not from a search that this version made; the order is then the model's
            return [*((edit, {}) for edit in best["edits"][:-1]), (best["edits"][-1], best["validation"])]
        steps.append((next(edit for edit in left if edit not in parent["edits"]), measured))
        left, measured = parent["edits"], parent["validation"]
    return [*((edit, measured) for edit in left), *reversed(steps)]


def _ranking(trials: list[Json], baseline: Json, winner: list[Json], metric: str, most: int) -> Json:
    """The best edits, or sets of edits, by validation; the winner is always among them, and stopped ones are last."""
    ordered = sorted(trials, key=lambda trial: _merit(trial, metric), reverse=True)
    shown = ordered[:most]
    shown += [trial for trial in ordered[most:] if trial["edits"] == winner]
    # Top 5 and 10 stand in the first table; here they would push the rest off the page.
    metrics = [name for name in METRICS if name in baseline and not name.startswith("top")]
    return {
        "total": len(trials),
        "metrics": metrics,
        "metric": metric,
        "rows": [
            {
                "place": ordered.index(trial) + 1,
                "edits": [_line(edit) for edit in trial["edits"]],
                "measurements": trial["validation"],
                "gain": _change(baseline.get(metric), trial["validation"].get(metric)),
                "stopped": _reason(trial),
                "winner": trial["edits"] == winner,
            }
            for trial in shown
        ],
    }


def _line(edit: Json) -> Json:
    """An edit as a line of a table."""
    kind = [edit["kind"]] if edit["kind"] != "low_rank" else []
    rho = _plain(edit.get("rho"))
    return {
        "matrix": edit["matrix"],
        "type": edit["type"],
        "layer": DASH if edit["layer"] is None else edit["layer"],
        "rho": rho,
        "rank": _rank(edit),
        "notes": [f"{key} {value}" for key, value in _unusual(edit)] + kind,
        "words": _where(edit) + ("" if edit["kind"] == "zero" else f", ρ {rho}"),
    }


def _controls(results: Json) -> Json:
    """The winner between the unedited model and everything that it has to beat, on the same test examples."""
    controls, best, before = results.get("controls") or {}, results["best"], results["baseline"]["test"]
    rows = [{"name": "Unedited", "meaning": "the model as it came", "measured": before, "winner": False}]
    if best["edits"]:
        gains = {"gain": best.get("test_gain"), "loss_gain": best.get("test_loss_gain")}
        several = f"the {len(best['edits'])} edits of the plan together"
        meaning = several if len(best["edits"]) > 1 else _cutting(best["edits"])
        rows.append({"name": "Edited", "meaning": meaning, "measured": best["test"] | gains, "winner": True})
    rows += [
        {"name": name, "meaning": meaning(controls[key]), "measured": controls[key], "winner": False}
        for key, (name, meaning) in CONTROLS.items()
        if controls.get(key)
    ]
    metrics = [name for name in JUDGED if name in before]
    gain_names = {"accuracy": "gain", "loss": "loss_gain"}
    return {
        "measured": len(rows) > 1 + bool(best["edits"]),
        "paired": any(row["measured"].get(name) for row in rows for name in gain_names.values()),
        "count": results["task"]["test"],
        "metrics": metrics,
        "rows": [
            row
            | {"cells": [(row["measured"].get(name), row["measured"].get(gain_names.get(name))) for name in metrics]}
            for row in rows
        ],
    }


def _majority_meaning(facts: Json) -> str:
    said = f" (\u201c{facts['answer']}\u201d)" if facts.get("answer") is not None else ""
    return f"one answer for every example{said}"


def _random_meaning(facts: Json) -> str:
    return "the same matrices at the same ranks, keeping random directions instead of the strongest"


def _few_shot_meaning(facts: Json) -> str:
    shorter = f"; {_count(facts['shortened'])} prompts had room for fewer" if facts["shortened"] else ""
    return f"{_count(facts['shots'])} validation examples in front of every prompt{shorter}"


def _lora_meaning(facts: Json) -> str:
    training = f"{_count(facts['trainable'])} parameters trained on {_count(facts['examples'])} validation examples"
    kept = f"epoch {_count(facts['epochs'])}" if facts["epochs"] else "no training"
    return f"{training}; {_count(facts['held_out'])} more chose {kept}"


def _int8_meaning(facts: Json) -> str:
    count = len(facts["matrices"])
    what = "the winner's matrix" if count == 1 else f"the winner's {count} matrices"
    return f"{what} rounded to int8, not cut: {_count(facts['bytes'])} bytes for {_count(facts['dense_bytes'])}"


CONTROLS = {
    "majority": ("Majority", _majority_meaning),
    "random_basis": ("Random basis", _random_meaning),
    "few_shot": ("Few-shot", _few_shot_meaning),
    "lora": ("LoRA", _lora_meaning),
    "int8": ("int8", _int8_meaning),
}


def _flipped(examples: list[Json], totals: Json) -> list[Json]:
    """Test examples that became right or wrong: how many, and those that the results keep."""
    titles = {
        (False, True): ("Became right", "wrong before the edit, right after it", "gained"),
        (True, False): ("Became wrong", "right before the edit, wrong after it", "lost"),
    }
    groups = []
    for direction, (title, meaning, total) in titles.items():
        found = [
            example | {"prompt": _ending(example["prompt"], PROMPT_CHARACTERS)}
            for example in examples
            if (bool(example["correct_before"]), bool(example["correct_after"])) == direction
        ]
        if found:
            shown = {"open": found[:EXAMPLES_OPEN], "folded": found[EXAMPLES_OPEN:]}
            count = max(len(found), int(totals.get(total) or 0))
            groups.append({"title": title, "meaning": meaning, "count": count, "shown": len(found)} | shown)
    return groups


def _said(answer: object) -> str:
    """What a model or a task answered, visible even when it is nothing."""
    return DASH if answer is None else str(answer).strip() or "(empty)"


def _ending(text: str, characters: int) -> str:
    """The end of a text: it is what an answer continues, and what tells two matrices apart."""
    return text if len(text) <= characters else "\u2026" + text[-characters:]


# Plots: what the script in the template draws.


def _plots(
    trials: list[Json], baseline: Json, winner: list[Json], spectrum: Json | None, predicted: Json | None
) -> Json | None:
    """Data of the heat map, the lines, the predictions and the spectrum, every text made safe for plotly."""
    if not trials:
        return None
    metrics = [name for name in JUDGED if name in baseline and name in trials[0]["validation"]]
    rows = _rows(trials)
    seen = {trial["edit"]["type"] for trial in trials}
    types = sorted(seen, key=lambda name: (TYPES.index(name) if name in TYPES else len(TYPES), name))
    rhos = sorted({trial["edit"].get("rho") for trial in trials}, key=lambda rho: (rho is None, rho))
    places = [
        (rows.index(_row(edit)), types.index(edit["type"]), rhos.index(edit.get("rho")))
        for edit in (trial["edit"] for trial in trials)
    ]
    peers = Counter(places)
    used: dict[int, int] = {}  # index in trials -> index in the list sent to the page
    cells = {}
    for metric in metrics:
        merits = [_merit(trial | {"edits": [trial["edit"]]}, metric) for trial in trials]
        champions: dict[tuple[int, int, int], int] = {}
        for index, (row, column, rho) in enumerate(places):
            for key in ((row, column, rho), (row, column, len(rhos))):
                champion = champions.setdefault(key, index)
                if merits[index] > merits[champion]:
                    champions[key] = index
        send = {place: used.setdefault(index, len(used)) for place, index in champions.items()}
        cells[metric] = [
            [[send.get((row, column, rho)) for column in range(len(types))] for row in range(len(rows))]
            for rho in range(len(rhos) + 1)
        ]
    at = [places[i] for edit in winner for i, trial in enumerate(trials) if trial["edit"] == edit]
    whole = [trial for trial in trials if not trial["stopped"]]
    return {
        "metrics": metrics,
        "rows": [{"stack": plot_text(_ending(stack, LABEL_CHARACTERS)), "layer": layer} for stack, layer in rows],
        "types": [plot_text(_ending(name, LABEL_CHARACTERS)) for name in types],
        "series": [TYPES.index(name) if name in TYPES else i % len(TYPES) for i, name in enumerate(types)],
        "rhos": [*(_plain(rho) for rho in rhos), EVERY_RHO],
        "rho_values": rhos,
        "cells": cells,
        "edits": [_point(trials[index], peers[places[index]]) for index in used],
        "baseline": {metric: _pair(baseline[metric]) for metric in metrics},
        "limits": {metric: _limit(whole, baseline, metric) for metric in metrics},
        "winners": [{"row": row, "column": column, "rho": rho} for row, column, rho in at],
        "stopped": len(whole) < len(trials),
        "start": at[0][2] if len({rho for _, _, rho in at}) == 1 else len(rhos),
        "spectrum": _spectrum(spectrum, winner),
        "predicted": predicted,
    }


def _row(edit: Json) -> tuple[str, int | None]:
    """The row of the heat map that an edit belongs to."""
    return (OUTSIDE, None) if edit["layer"] is None else (edit.get("stack") or "", edit["layer"])


def _rows(trials: list[Json]) -> list[tuple[str, int | None]]:
    """Rows by stack, in the order of the model, then by layer; what is outside the blocks comes last."""
    found = list(dict.fromkeys(_row(trial["edit"]) for trial in trials))
    stacks = [stack for stack in dict.fromkeys(stack for stack, _ in found) if stack != OUTSIDE]
    inside = [row for row in found if row[1] is not None]
    outside = [row for row in found if row[1] is None]
    return [*sorted(inside, key=lambda row: (stacks.index(row[0]), row[1])), *outside]


def _layer_names(rows: list[tuple[str, int | None]]) -> list[str]:
    """Rows as the list of layers names them; the stack only where there are several."""
    several = len({stack for stack, layer in rows if layer is not None}) > 1
    names = (f"{stack}, layer {layer}" if several else f"layer {layer}" for stack, layer in rows)
    return [stack if layer is None else name for name, (stack, layer) in zip(names, rows)]


def _point(trial: Json, peers: int) -> Json:
    """One edit as the page needs it to write a hover."""
    edit, measured = trial["edit"], trial["validation"]
    point = {
        "matrix": plot_text(_ending(edit["matrix"], HOVER_CHARACTERS)),
        "rho": _plain(edit.get("rho")),
        "rank": _rank(edit),
        "notes": [plot_text(f"{key} {value}") for key, value in _unusual(edit)],
        "peers": peers,
        "count": _seen(trial),
    }
    if trial["stopped"]:
        # A part of the examples, and not a random one, is not to be compared with all of them.
        proved = _proved(trial["stopped"])
        bound = {trial["stopped"]["metric"]: trial["stopped"]["at_best"]} if proved else {}
        return point | {"stopped": plot_text(_reason(trial)), "bound": bound}
    return point | {name: _pair(value) for name, value in measured.items() if name in JUDGED}


def _limit(trials: list[Json], baseline: Json, metric: str) -> float:
    """The change at which the colours end: the best gain, unless most edits go further than that.

    A few ruinous edits would otherwise fade every gain to white.
    """
    start, sign = baseline[metric]["value"], -1 if metric in LOWER_IS_BETTER else 1
    values = (trial["validation"].get(metric, {}).get("value") for trial in trials)
    gains = [sign * (value - start) for value in values if _finite(value) and _finite(start)]
    return max([1e-6, *gains, statistics.median(map(abs, gains))] if gains else [1e-6])


def _predicted(results: Json) -> Json | None:
    """Predicted and measured changes of the loss, where a guided search measured at least three edits to the end."""
    before = results["baseline"]["validation"].get("loss")
    if (results.get("recipe") or {}).get("strategy") != "guided" or not before:
        return None
    predictions = results.get("predictions") or []
    expected = {json.dumps(p["edit"], sort_keys=True): p["loss_change"]["value"] for p in predictions}
    points = []
    for trial in results["grid"]:
        edit, after = trial["edit"], trial["validation"].get("loss")
        change = expected.get(json.dumps(edit, sort_keys=True))
        if trial["stopped"] or not after or not _finite(change) or not _finite(after["value"]):
            continue
        name = f"{_where(edit)}{_how(edit)}"
        points.append({"name": plot_text(name), "predicted": change, "measured": after["value"] - before["value"]})
    if len(points) < 3:
        return None
    from scipy import stats

    found: Any = stats.spearmanr([p["predicted"] for p in points], [p["measured"] for p in points])
    correlation = float(found.statistic)
    return {"points": points, "correlation": _signed(correlation, 2) if _finite(correlation) else ""}


def _spectrum(spectrum: Json | None, edits: list[Json]) -> Json | None:
    """Singular values that a logarithmic axis can show, and where they were cut."""
    values = [value for value in (spectrum or {}).get("singular_values", []) if _finite(value) and value > 0]
    if not spectrum or not values:
        return None
    total = sum(value * value for value in values)
    kept = sum(value * value for value in values[: spectrum["rank"]]) / total
    # Another basis or weighting does not keep the first singular values, so their share would mean nothing.
    edit = next((edit for edit in edits if edit["matrix"] == spectrum.get("matrix")), None)
    plain = edit is not None and edit["kind"] == "low_rank" and not _unusual(edit)
    return {
        "rank": spectrum["rank"],
        "full": len(values),
        "share": f"{100 * kept:.3g} %" if plain else "",
        "values": [float(f"{value:.5g}") for value in values],
    }


def plot_text(text: object) -> str:
    """Make a text one that plotly shows as it is: it reads tags, entities and TeX in labels, and this holds none.

    Args:
        text: Anything, from models and tasks too.

    Returns:
        The text with entities in the place of what plotly reads as markup.

    >>> plot_text("<b>$x$")
    '&lt;b&gt;&#36;x&#36;'
    """
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def plotly() -> Markup:
    """Give the source of plotly.js, from the installed package.

    Returns:
        JavaScript, about 5 MB.
    """
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("\r\n", "\n"))  # noqa: S704 the library itself, from the package


def _hash_source(script: str) -> Markup:
    """The content security policy's name for one inline script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")  # noqa: S704 base64 of a hash


# Numbers.


def _in_order(measurements: Json) -> list[tuple[str, Json]]:
    """Measurements in the order of the tables; unknown names come last, as given."""
    known = {name: measurements[name] for name in METRICS if name in measurements}
    return list((known | measurements).items())


def _main_metric(measurements: Json) -> str:
    return next((name for name in METRICS if name in measurements), "loss")


def _selected(results: Json) -> str:
    """The metric by which the search chose."""
    select, measured = (results.get("recipe") or {}).get("select"), results["baseline"]["validation"]
    return select if isinstance(select, str) and select in measured else _main_metric(measured)


def _merit(trial: Json, metric: str) -> tuple[float, ...]:
    """Sort key, the search's own: the metric, then the other one, then the smaller rank.

    What a race stopped comes after all others; of it, what lasted longest comes first.
    """
    if trial["stopped"]:
        return False, _seen(trial)

    def good(name: str) -> float:
        value = (trial["validation"].get(name) or {}).get("value")
        return -math.inf if not _finite(value) else -value if name in LOWER_IS_BETTER else value

    other = "loss" if metric == "accuracy" else "accuracy"
    return True, good(metric), good(other), -sum(edit.get("rank") or 0 for edit in trial["edits"])


def _interval(gain: Json) -> tuple[float, float]:
    """The 95 % interval of a gain, from its standard error where the results hold none; NaN if unknown."""
    if gain.get("interval"):
        low, high = gain["interval"]
    elif _finite(gain["value"]) and _finite(gain["stderr"]):
        low, high = gain["value"] - 1.96 * gain["stderr"], gain["value"] + 1.96 * gain["stderr"]
    else:
        low, high = None, None
    return low if _finite(low) else math.nan, high if _finite(high) else math.nan


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _pair(measured: Json) -> list[float | None]:
    """Value and standard error, with null for what JSON in a page cannot hold."""
    return [measured[key] if _finite(measured.get(key)) else None for key in ("value", "stderr")]


def _decimals(measured: Json) -> int:
    """Digits after the point: three for fractions and nats, otherwise two that the error has not touched."""
    error = measured.get("stderr")
    if measured.get("unit") in ("fraction", "nats/token"):
        return 4 if error and _finite(error) and error < 0.0005 else 3
    scale = error if error and _finite(error) else abs(measured["value"] or 1) / 100
    return max(0, min(4, 1 - math.floor(math.log10(scale)))) if scale and _finite(scale) else 0


def _number(value: object, decimals: int) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return DASH if value is None else str(value)
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def _error(measured: Json) -> str:
    return _number(measured.get("stderr"), _decimals(measured))


def _measurement(measured: Json | None) -> str:
    """A measurement with its standard error, as in "0.452 ± 0.011"."""
    if not measured:
        return DASH
    value = _number(measured["value"], _decimals(measured))
    return f"{value} ±{HARD_SPACE}{_error(measured)}" if _finite(measured.get("stderr")) else value


def _gain(gain: Json) -> str:
    """A measured difference with its sign and standard error."""
    return f"{_signed(gain['value'], _decimals(gain))} ±{HARD_SPACE}{_error(gain)}"


def _gain_and_span(gain: Json) -> str:
    """A gain with its 95 % interval, as in "+0.281 (0.22 to 0.34)"."""
    return f"{_signed(gain['value'], _decimals(gain))} ({_span(*_interval(gain))})"


def _signed(value: float, decimals: int) -> str:
    text = _number(value, decimals)
    return text if not _finite(value) or value < 0 else f"+{text}"


def _span(low: float, high: float) -> str:
    """An interval in as few digits as tell its ends apart."""
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    decimals = 2 if high - low >= 0.02 and abs(low) >= 0.005 and abs(high) >= 0.005 else 3
    return f"{_number(low, decimals)} to {_number(high, decimals)}"


def _change(before: Json | None, after: Json | None) -> str:
    """The difference of two measurements, signed."""
    if not before or not after or not _finite(before["value"]) or not _finite(after["value"]):
        return DASH
    return _signed(after["value"] - before["value"], _decimals(after))


def _p_value(p: float) -> str:
    """A p-value, as a power of ten where it is small.

    >>> _p_value(3.2e-9).split()
    ['p', '=', '3.2', '×', '10⁻⁹']
    """
    if p >= 0.001:
        text = f"p = {p:.3f}"
    elif p < 1e-99:
        text = f"p < 10{_superscript(-99)}"
    else:
        text = f"p = {_power(p)}"
    return text.replace(" ", HARD_SPACE)


def _power(value: float) -> str:
    """A small number as a power of ten."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{_superscript(int(exponent))}".replace(" ", HARD_SPACE)


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _plain(value: float | None) -> str:
    return DASH if value is None else f"{value:g}"


def _count(number: float) -> str:
    """A whole number, in groups of three."""
    return f"{number:,.0f}".replace(",", NARROW_SPACE) if abs(number) >= 10_000 else f"{number:.0f}"


def _bytes(number: float) -> str:
    """Memory in the unit that a person would say.

    >>> _bytes(24_891_904).split()
    ['24.9', 'MB']
    """
    power = 3 if number >= 1e9 else 2 if number >= 1e6 else 1
    return f"{number / 1000**power:.1f}{HARD_SPACE}{'kMG'[power - 1]}B"


def _duration(seconds: float) -> str:
    """Seconds in the units that a person would say."""
    if not _finite(seconds):
        return DASH
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _flat(settings: Json, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _model_name(model: Json) -> str:
    return model["source"].rstrip("/").rpartition("/")[2] or model["source"]
