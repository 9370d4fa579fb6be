import copy
import json
import math
import os
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eckart import report
from eckart.errors import EckartError, OutputError
from eckart.report import _measurement, _p_value, _span, plot_text, render, write_report

TYPES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out")
RHOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
NAMES = dict(zip(TYPES, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")))  # fmt: skip
HOSTILE = (
    "</script><script>window.injected = 1</script>",
    "<img src=x onerror=\"window.injected = 1\">",
    "<!--<script>",
    "\u2028\u2029",
    "<a href=\"javascript:window.injected=1\">%{x} $x$ &lt;b&gt; {{ 7 * 7 }}</a>",
    "\ud800",
)  # fmt: skip
CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM = CHROMIUM if CHROMIUM.exists() else Path(shutil.which("chromium") or "")


def measure(value, stderr, count, unit="fraction"):
    return {"value": value, "stderr": stderr, "count": count, "unit": unit}


def accuracy(value, count):
    value = min(max(value, 0.0), 1.0)
    return measure(value, math.sqrt(value * (1 - value) / count), count)


def loss(value, count):
    return measure(value, 0.9 / math.sqrt(count), count, "nats/token")


def edit_of(layer, kind, rho, stack="model.layers", shape=(512, 128)):
    rank = max(1, int(rho * min(shape) + 1e-9))
    return {
        "matrix": f"{stack}.{layer}.{NAMES[kind]}", "layer": layer, "type": kind, "shape": list(shape),
        "kind": "low_rank", "rho": rho, "rank": rank, "weighting": "none", "basis": "top", "blocks": 1,
        "stack": stack,
    }  # fmt: skip


def search_results(layers=5, stacks=("model.layers",), rhos=RHOS, seed=0):
    """A search as results.json holds it: late MLP cuts help, early and attention cuts hurt."""
    noise, validation, test = random.Random(seed), 80, 320
    grid = []
    for stack in stacks:
        for layer in range(layers):
            for kind in TYPES:
                for rho in rhos:
                    depth, cut = layer / max(1, layers - 1), (1 - rho) ** 2
                    size = {"fc_in": 0.52, "fc_up": 0.2, "fc_out": 0.1}.get(kind, -0.05)
                    help_ = size * (depth - 0.35) * cut
                    harm = 0.35 * (1 - depth) ** 2 * cut + 0.3 * (kind == "v_proj") * cut
                    gain = help_ - harm + noise.gauss(0, 0.012)
                    measured = {
                        "accuracy": accuracy(round((0.452 + gain) * validation) / validation, validation),
                        "loss": loss(2.31 - 1.4 * help_ + 6 * harm + noise.gauss(0, 0.02), validation),
                    }
                    grid.append({"edit": edit_of(layer, kind, rho, stack), "validation": measured, "stopped": None})
    best = max(grid, key=lambda t: (t["validation"]["accuracy"]["value"], -t["validation"]["loss"]["value"]))
    flipped = [flip(i, before=False) for i in range(14)] + [flip(i, before=True) for i in range(3)]
    rank = best["edit"]["rank"]
    return {
        "schema_version": 1,
        "kind": "search",
        "model": {
            "source": "models/stories260K", "architecture": "LlamaForCausalLM", "weights_sha256": "9f2c" * 16,
            "parameters": 1_032_448, "coverage": 0.936,
        },
        "task": {"name": "story_cloze", "kind": "choice", "validation": validation, "test": test},
        "baseline": {
            "validation": {"accuracy": accuracy(0.4625, validation), "loss": loss(2.31, validation)},
            "test": {"accuracy": accuracy(0.453125, test), "loss": loss(2.344, test)},
        },
        "best": {
            "plan": "plan.json",
            "edits": [best["edit"]],
            "cost": {"numbers": 640 * rank, "integers": 0, "flops": 1280 * rank},
            "validation": best["validation"],
            "test": {"accuracy": accuracy(0.734375, test), "loss": loss(1.871, test)},
            "test_gain": measure(0.28125, 0.029, test) | {"interval": [0.2244, 0.3381], "p_value": 3.2e-19},
            "test_loss_gain": measure(-0.473, 0.031, test, "nats/token") | {"interval": [-0.534, -0.412]},
        },
        "controls": {
            "majority": {"accuracy": accuracy(0.5156, test), "answer": "the second ending"},
            "random_basis": {"accuracy": accuracy(0.4406, test), "loss": loss(2.93, test)},
        },
        "trials": {
            "grid": len(grid), "evaluated": len(grid), "stopped": 0, "examples": len(grid) * validation,
            "prefix_cache_bytes": 24_891_904,
        },
        "grid": grid,
        "compositions": [],
        "spectrum": {
            "matrix": best["edit"]["matrix"], "rank": rank,
            "singular_values": [9.4 * math.exp(-i / 9) + 1.9 * (1 - i / 140) for i in range(128)],
        },
        "flipped": flipped,
        "warnings": [],
        "seconds": {"total": 41.27, "svd": 1.04, "forward": 36.9},
        "environment": {"eckart": "0.1.0", "torch": "2.13.0", "transformers": "5.20.0", "python": "3.12.3"},
        "recipe": {
            "model": "models/stories260K", "seed": 0, "device": "cpu", "dtype": "float32",
            "select": "accuracy",
            "search": {"strategy": "exhaustive", "types": list(TYPES), "layers": "all", "rho": list(rhos)},
            "task": {"name": "story_cloze", "split": 0.2, "normalize": "none"},
        },
    }  # fmt: skip


def flip(i, before):
    """One example that the edit moved; the longest is cut in the report."""
    who = ("Lily", "Tom", "Mia", "Ben", "Sam")[i % 5]
    prompt = f"{who} had a red ball. One day, {who} went to the park with the ball. " * (1 + i % 3)
    answers = (f"{who} played with the ball.", "The moon was made of cheese.")
    told = answers if before else answers[::-1]
    return {
        "prompt": prompt, "answer": answers[0], "before": told[0], "after": told[1], "correct_before": before,
        "correct_after": not before,
    }  # fmt: skip


def text_results():
    """A search on plain text: loss and perplexity, no accuracy."""
    results = search_results(layers=3, rhos=(0.1, 0.5, 0.9))
    results["task"] = {"name": "books", "kind": "text", "validation": 80, "test": 320}
    for trial in results["grid"]:
        del trial["validation"]["accuracy"]
    for split, count in (("validation", 80), ("test", 320)):
        before, after = measure(10.42, 0.31, count, "perplexity"), measure(9.98, 0.29, count, "perplexity")
        results["baseline"][split] = {"loss": loss(2.344, count), "perplexity": before}
        results["best"][split] = {"loss": loss(2.301, count), "perplexity": after}
    gain = measure(-0.043, 0.004, 320, "nats/token") | {"interval": [-0.051, -0.035]}
    results["best"] |= {"test_gain": None, "test_loss_gain": gain}
    results["controls"], results["flipped"] = {}, []
    return results


def empty_plan_results():
    """A search in which nothing beat the unedited model."""
    results = search_results(layers=2, rhos=(0.1, 0.9))
    results["best"] = {
        "plan": "plan.json", "edits": [], "cost": None, "validation": results["baseline"]["validation"],
        "test": results["baseline"]["test"], "test_gain": None, "test_loss_gain": None,
    }  # fmt: skip
    for trial in results["grid"]:
        low = min(trial["validation"]["accuracy"]["value"], 0.45)
        trial["validation"] = {"accuracy": accuracy(low, 80), "loss": loss(2.9 - low, 80)}
    results["spectrum"], results["flipped"] = None, []
    return results


def moe_results():
    """A search with two stacks, experts that share a cell, a matrix outside the blocks and a ruined loss."""
    results = search_results(layers=3, stacks=("encoder.block", "decoder.block"), rhos=(0.05, 0.2, 0.8))
    for expert in range(4):
        name = f"decoder.block.1.experts.gate_up_proj[{expert}]:fc_in"
        edit = edit_of(1, "fc_in", 0.2, "decoder.block") | {"matrix": name}
        measured = {"accuracy": accuracy(0.3 + 0.05 * expert, 80), "loss": loss(2.0, 80)}
        results["grid"].append({"edit": edit, "validation": measured, "stopped": None})
    outside = edit_of(0, "fc_in", 0.2) | {
        "matrix": "lm_head",
        "layer": None,
        "type": "lm_head",
        "stack": None,
    }
    ruined = {"accuracy": accuracy(0.0, 80), "loss": measure(math.nan, math.nan, 80, "nats/token")}
    results["grid"].append({"edit": outside, "validation": ruined, "stopped": None})
    return results


def evaluate_results():
    """An evaluation of two plans on two tasks, one of them not measured."""
    values = (
        ("none", "story_cloze", 0.45), ("runs/a/plan.json", "story_cloze", 0.73), ("none", "fever", 0.5),
        ("runs/b/plan.json", "fever", 0.49),
    )  # fmt: skip
    rows = [
        {"plan": plan, "task": task, "measurements": {"accuracy": accuracy(p, 320), "loss": loss(3 - p, 320)}}
        for plan, task, p in values
    ]
    return {
        "schema_version": 1, "kind": "evaluate", "model": search_results(layers=1)["model"], "rows": rows,
        "warnings": [], "seconds": {"total": 300.0}, "environment": {"eckart": "0.1.0"}, "recipe": {},
    }  # fmt: skip


def compared_results(**options):
    """A search with `--controls`."""
    results = search_results(**options)
    gain = measure(-0.0125, 0.021, 320) | {"interval": [-0.053, 0.028], "p_value": 0.62}
    loss_gain = measure(-0.21, 0.03, 320, "nats/token") | {"interval": [-0.27, -0.15], "p_value": None}
    for name, value, facts in (
        ("few_shot", 0.4406, {"shots": 5, "shortened": 12}),
        ("lora", 0.7219, {"trainable": 46_240, "modules": 35, "examples": 64, "held_out": 16, "epochs": 3}),
        ("int8", 0.4531, {"matrices": ["a.b"], "bytes": 11_264, "dense_bytes": 44_032}),
    ):
        measured = {"accuracy": accuracy(value, 320), "loss": loss(2.1, 320), "gain": gain, "loss_gain": loss_gain}
        results["controls"][name] = measured | facts | {"seconds": 1.5}
    return results


def composed_results(**options):
    """A race with sets of edits: three win together, most others were stopped, by a proof or by a test."""
    results = compared_results(**options)
    singles = [results["best"]["edits"][0], edit_of(0, "q_proj", 0.2), edit_of(0, "k_proj", 0.2)]
    proof = {"metric": "accuracy", "at_best": 0.7, "to_beat": 0.75, "p_value": None, "level": None, "looks": None}
    test = {"metric": "loss", "at_best": 2.9, "to_beat": 2.2, "p_value": 3.2e-6, "level": 1e-4, "looks": 3}
    for index, trial in enumerate(results["grid"]):
        if trial["edit"] not in singles:
            trial["stopped"] = test if index % 2 else proof
            trial["validation"] = {"accuracy": accuracy(0.05, 34), "loss": loss(2.9, 34)}
    sets = [(singles[:2], 0.75, None), (singles[::2], 0.7375, None), (singles, 0.775, None), (singles[1:], 0.5, proof)]
    for edits, value, stopped in sets:
        count = 34 if stopped else 80
        measured = {"accuracy": accuracy(value, count), "loss": loss(2.5 - value, count)}
        results["compositions"].append({"edits": edits, "validation": measured, "stopped": stopped})
    results["best"] |= {"edits": singles, "validation": results["compositions"][2]["validation"]}
    results["best"]["cost"] = {"numbers": 49_152, "integers": 512, "flops": 98_304}
    results["controls"]["int8"]["matrices"] = [edit["matrix"] for edit in singles]
    return results


def guided_results(**options):
    """A guided search: the best eight predicted edits of the grid were measured, one of them not to the end."""
    results = search_results(**options)
    results["recipe"]["strategy"] = "guided"
    start = results["baseline"]["validation"]["loss"]["value"]
    results["predictions"] = [
        {
            "edit": trial["edit"],
            # Sums that are not quite those of the loss, and in the measured order but for one.
            "loss_change": measure(2 * (trial["validation"]["loss"]["value"] - start) + 0.1, 0.02, 80, "nats/token"),
        }
        for trial in results["grid"]
    ]
    best = sorted(results["grid"], key=lambda trial: trial["validation"]["loss"]["value"])[:8]
    results["grid"] = [trial for trial in results["grid"] if trial in best]
    best[7]["stopped"] = {
        "metric": "accuracy", "at_best": 0.4, "to_beat": 0.45, "p_value": None, "level": None, "looks": None
    }  # fmt: skip
    first = next(p for p in results["predictions"] if p["edit"] == best[0]["edit"])
    first["loss_change"]["value"] = 3.0
    return results


def hostile_results():
    """Every text of a search replaced by something that would run, if anything let it."""
    results = moe_results()
    bad = "".join(HOSTILE)
    results["model"] |= {"source": bad, "architecture": bad, "weights_sha256": bad}
    results["task"] |= {"name": bad, "kind": bad}
    results["warnings"] = [bad]
    results["controls"]["majority"]["answer"] = bad
    results["environment"], results["recipe"], results["seconds"] = {bad: bad}, {bad: {bad: bad}}, {bad: 1.0}
    for example in results["flipped"]:
        example |= dict.fromkeys(("prompt", "answer", "before", "after"), bad)
    for edit in [*(trial["edit"] for trial in results["grid"]), *results["best"]["edits"]]:
        edit |= {"matrix": bad, "type": edit["type"] + HOSTILE[1], "stack": f"{edit['stack']}{HOSTILE[4]}"}
        edit["weighting"] = bad
    results["spectrum"]["matrix"] = results["best"]["plan"] = bad
    return results


def plain(text):
    """A text with single ordinary spaces."""
    return " ".join(text.split())


class Page(HTMLParser):
    """What a browser would see: visible text, tags, attributes, and the content of scripts."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.attributes, self.scripts, self.inside = [], [], [], [], []
        self.feed(page)
        self.words = plain(" ".join(self.text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag in ("script", "style"):
            self.inside.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def results():
    return search_results()


@pytest.fixture(scope="module")
def page(results):
    return Page(render(results))


def payload(page):
    """The data that the page hands to its script."""
    return next(json.loads(script) for script in page.scripts if script.startswith('{"'))


ALL = {
    "search": search_results, "text": text_results, "empty": empty_plan_results, "moe": moe_results,
    "evaluate": evaluate_results, "hostile": hostile_results, "compared": compared_results,
    "composed": composed_results,
    "guided": guided_results,
}  # fmt: skip


def test_a_search_report_has_every_section_in_order(page):
    titles = (
        "story_cloze on stories260K", "Before and after", "The plan", "Every edit", "How deep to cut", "What was cut",
        "The best edits on validation", "Controls", "Examples that changed", "Settings, versions, time",
    )  # fmt: skip
    places = [page.words.index(title, page.words.index("eckart search")) for title in titles]
    assert places == sorted(places)


def test_the_verdict_says_what_was_cut_the_gain_and_how_sure_it_is(page, results):
    (edit,) = results["best"]["edits"]
    assert (
        f"Cutting {edit['type']} of layer {edit['layer']} to rank {edit['rank']} of 128 (rho {edit['rho']}) "
        "raises test accuracy from 0.453 ± 0.028 to 0.734 ± 0.025 (gain +0.281, 95 % interval 0.22 to 0.34, "
        "exact McNemar p = 3.2 × 10⁻¹⁹) on 320 examples that took no part in choosing."
    ) in page.words


@pytest.mark.parametrize(
    ("interval", "words"),
    [((-0.01, 0.03), "the test does not confirm it"), ((-0.05, -0.01), "the test contradicts it")],
)
def test_a_gain_that_the_test_does_not_show_is_not_called_one(interval, words):
    results = search_results(layers=2)
    results["best"]["test_gain"] |= {"value": sum(interval) / 2, "interval": list(interval), "p_value": 0.31}
    page = Page(render(results))
    assert words in page.words
    assert "raises" not in page.words


def test_an_empty_plan_is_said_plainly_and_still_shows_the_grid():
    page = Page(render(empty_plan_results()))
    assert "None of the 28 edits tried beat the unedited model on validation, so the plan is" in page.words
    assert payload(page)["winners"] == []
    assert "What was cut" not in page.words


def test_a_text_task_speaks_of_loss_and_perplexity_only():
    page = Page(render(text_results()))
    assert "lowers test loss from 2.344 ± 0.050 to 2.301 ± 0.050 nats/token (change −0.043" in page.words
    assert "perplexity 10.42 ± 0.31 9.98 ± 0.29" in page.words
    assert "accuracy" not in page.words.split("Settings, versions")[0]  # the settings hold `select`
    assert payload(page)["metrics"] == ["loss"]


def test_every_measurement_of_the_winner_appears(page, results):
    for split in ("validation", "test"):
        for name in ("accuracy", "loss"):
            assert plain(_measurement(results["best"][split][name])) in page.words
            assert plain(_measurement(results["baseline"][split][name])) in page.words
    assert "−0.473 ± 0.031 −0.53 to −0.41" in page.words


def test_the_heat_map_holds_each_edit_once_and_the_winner_in_its_place(page, results):
    data, (edit,) = payload(page), results["best"]["edits"]
    shown = [i for matrix in data["cells"]["accuracy"][:-1] for row in matrix for i in row]
    assert sorted(shown) == list(range(len(results["grid"])))
    (won,) = data["winners"]
    assert data["start"] == won["rho"]
    assert (data["types"][won["column"]], data["rows"][won["row"]]["layer"]) == (edit["type"], edit["layer"])
    assert data["rhos"][won["rho"]] == f"{edit['rho']:g}"
    cell = data["edits"][data["cells"]["accuracy"][won["rho"]][won["row"]][won["column"]]]
    assert cell["accuracy"][0] == results["best"]["validation"]["accuracy"]["value"]


def test_the_best_slice_holds_the_best_of_all_rhos(page, results):
    data = payload(page)
    for metric, choose in (("accuracy", max), ("loss", min)):
        for row in range(5):
            for column, kind in enumerate(TYPES):
                values = [trial["validation"][metric]["value"] for trial in results["grid"]
                          if (trial["edit"]["layer"], trial["edit"]["type"]) == (row, kind)]  # fmt: skip
                assert data["edits"][data["cells"][metric][-1][row][column]][metric][0] == choose(values)


def test_stacks_experts_and_outer_matrices_keep_their_places():
    data = payload(Page(render(moe_results())))
    stacks = [row["stack"] for row in data["rows"]]
    assert stacks == ["encoder.block"] * 3 + ["decoder.block"] * 3 + ["outside the blocks"]
    assert data["types"] == [*TYPES, "lm_head"]
    cell = data["cells"]["loss"][data["rhos"].index("0.2")][4][TYPES.index("fc_in")]
    assert data["edits"][cell]["peers"] == 5
    outside = data["cells"]["loss"][data["rhos"].index("0.2")][6][7]
    assert data["edits"][outside]["loss"] == [None, None]


def stop_first(results, **proof):
    """Stop the first edit of the grid after 8 examples, all of them right."""
    results["grid"][0] |= {
        "validation": {"accuracy": accuracy(1.0, 8), "loss": loss(0.1, 8)},
        "stopped": {"metric": "accuracy", "at_best": 0.61, "to_beat": 0.62} | proof,
    }
    return results


PROOF = {"p_value": None, "level": None, "looks": None}


def test_an_edit_that_a_race_stopped_never_outranks_a_finished_one():
    page = Page(render(stop_first(search_results(layers=2, rhos=(0.1, 0.2)), **PROOF)))
    first = page.words.split("Matrix 1 ")[1][:40]
    assert not first.startswith("q_proj 0 0.1")
    data = payload(page)
    assert data["edits"][data["cells"]["accuracy"][-1][0][0]]["rho"] == "0.2"


def test_what_was_measured_on_a_part_of_the_examples_is_never_compared_with_all_of_them():
    page = Page(render(stop_first(search_results(layers=1, rhos=(0.1,)), **PROOF)))
    (point,) = [edit for edit in payload(page)["edits"] if "stopped" in edit]
    assert {"accuracy", "loss"}.isdisjoint(point)
    assert point["bound"] == {"accuracy": 0.61}
    assert "1.000" not in page.words
    assert payload(page)["limits"]["accuracy"] < 0.5  # the stopped edit's 1.000 does not stretch the colours
    assert "Grey edits were stopped early" in page.words


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        (PROOF, "stopped after 8 examples: accuracy at best 0.610, needs 0.620"),
        (PROOF | {"at_best": 0.6199, "to_beat": 0.6201}, "accuracy at best 0.6199, needs 0.6201"),
        (
            {"metric": "loss", "p_value": 3.2e-6, "level": 1e-4, "looks": 3},
            "loss 0.610 against 0.620 on these; p = 3.2 × 10⁻⁶, level 1.0 × 10⁻⁴, 3 looks",
        ),
    ],
)
def test_the_table_says_why_an_edit_was_stopped(proof, words):
    page = Page(render(stop_first(search_results(layers=1, rhos=(0.1, 0.2)), **proof)))
    assert words in page.words
    assert words in plain(next(edit["stopped"] for edit in payload(page)["edits"] if "stopped" in edit))


def test_the_report_says_what_was_tried_and_what_stopping_saved():
    # 277 of 280 edits and one of four sets were stopped after 34 of 80 examples.
    page = Page(render(composed_results()))
    assert "The search tried all 280 edits of the grid, and 4 sets of them." in page.words
    seen, most = 278 * 34 + (3 + 3) * 80, 284 * 80
    assert seen == sum(
        trial["validation"]["loss"]["count"]
        for trial in (*composed_results()["grid"], *composed_results()["compositions"])
    )
    assert (
        f"278 could not win or surely lost and were stopped early, so that {seen} of 22 720 examples were scored "
        f"({100 - 100 * seen / most:.0f} % saved). The prefix cache held at most 24.9 MB."
    ) in page.words
    guided = search_results(layers=1)
    guided["trials"]["grid"] = 270
    assert "The search tried the 56 of 270 edits that a gradient predicted to be best." in Page(render(guided)).words


def test_several_edits_are_all_named_in_the_headline_and_grow_in_the_table():
    results = composed_results()
    page = Page(render(results))
    first = results["best"]["edits"][0]
    assert page.words.split("Cutting ")[1].startswith(
        f"{first['type']} of layer {first['layer']} to rank {first['rank']} of 128 (rho {first['rho']:g}), "
        "q_proj of layer 0 to rank 25 of 128 (rho 0.2) and k_proj of layer 0 to rank 25 of 128 (rho 0.2) together "
        "raises test accuracy from 0.453"
    )
    table = page.words.split("The plan ")[1].split("Every edit")[0]
    best = results["grid"][[t["edit"] for t in results["grid"]].index(first)]["validation"]["accuracy"]["value"]
    gains = (best - 0.4625, 0.75 - best, 0.775 - 0.75)
    assert [table.index(f"{name} of layer") for name in (first["type"], "q_proj", "k_proj")] == sorted(
        table.index(f"{name} of layer") for name in (first["type"], "q_proj", "k_proj")
    )
    places = [table.index(f"{gain:+.3f}".replace("-", "−")) for gain in gains]
    assert places == sorted(places)
    assert "would take 49 152 numbers instead of 196 608 (25 %), and 512 integers for the order" in table
    assert "98 304 floating-point operations a token instead of 393 216" in table
    assert len(payload(page)["winners"]) == 3
    assert "the winner's 3 matrices rounded to int8" in page.words


def test_sets_of_edits_stand_in_a_table_of_their_own_best_first():
    page = Page(render(composed_results()))
    table = page.words.split("Edits together ")[1].split("Controls ")[0]
    assert table.startswith("All 4 sets of edits, by validation accuracy.")
    places = [table.index(text) for text in ("chosen 0.775", "0.750", "0.738", "accuracy at best 0.700, needs 0.750")]
    assert places == sorted(places)
    assert "Edits together" not in Page(render(search_results(layers=1))).words
    results = composed_results()
    results["compositions"] *= 10
    assert "The first 10 of 40 sets of edits" in Page(render(results)).words


def test_more_edits_than_a_sentence_holds_are_counted_there_and_named_in_the_plan():
    results = composed_results()
    results["best"]["edits"] = [trial["edit"] for trial in results["grid"][:7]]
    page = Page(render(results))
    assert "Cutting 7 matrices together raises" in page.words
    table = page.words.split("The plan ")[1].split("Every edit")[0]
    assert all(edit["matrix"] in table for edit in results["best"]["edits"])


def test_the_metric_that_select_names_leads():
    results = search_results()
    results["recipe"]["select"] = "loss"
    page = Page(render(results))
    assert "lowers test loss from 2.344" in page.words
    assert "Validation loss chose the plan" in page.words
    assert "The first 20 of 280 edits, by validation loss." in page.words
    least = min(trial["validation"]["loss"]["value"] for trial in results["grid"])
    assert f"{least:.3f}" in page.words.split("Matrix 1 ")[1][:60]


def test_a_guided_search_shows_predictions_against_what_was_measured_to_the_end():
    results = guided_results()
    page = Page(render(results))
    found = payload(page)["predicted"]
    measured = [trial for trial in results["grid"] if not trial["stopped"]]
    start = results["baseline"]["validation"]["loss"]["value"]
    assert [point["measured"] for point in found["points"]] == [
        trial["validation"]["loss"]["value"] - start for trial in measured
    ]
    values = {json.dumps(p["edit"]): p["loss_change"]["value"] for p in results["predictions"]}
    assert [point["predicted"] for point in found["points"]] == [values[json.dumps(t["edit"])] for t in measured]
    # Of seven in order the first was predicted to be the last: Spearman's 1 - 6·Σd²/(n³ - n), Σd² = 36 + 6.
    assert "the 7 edits that were measured" in page.words
    assert "Rank correlation +0.25" in page.words


@pytest.mark.parametrize("lacking", ["strategy", "loss", "predictions"])
def test_without_predictions_of_the_loss_the_report_has_none(lacking):
    results = guided_results()
    if lacking == "loss":
        del results["baseline"]["validation"]["loss"]
        results["grid"] = [t | {"validation": {"accuracy": t["validation"]["accuracy"]}} for t in results["grid"]]
    else:
        results["recipe"]["strategy"] = "race" if lacking == "strategy" else "guided"
        results["predictions"] = [] if lacking == "predictions" else results["predictions"]
    assert "Predicted and measured" not in Page(render(results)).words


def test_the_table_of_edits_says_that_it_shows_validation_numbers(page):
    assert "The first 20 of 280 edits, by validation accuracy. These are validation numbers" in page.words
    assert page.tags.count("tr") > 20


def test_a_winner_outside_the_first_twenty_is_listed_too():
    results = search_results()
    worst = min(results["grid"], key=lambda trial: trial["validation"]["accuracy"]["value"])
    results["best"]["edits"] = [worst["edit"]]
    assert "chosen" in Page(render(results)).words


def test_the_majority_and_random_components_stand_beside_the_winner(page):
    assert "one answer for every example (“the second ending”) 0.516 ± 0.028" in page.words
    assert "0.441 ± 0.028 2.930 ± 0.050" in page.words


@pytest.mark.parametrize("missing", ["majority", "random_basis", "both"])
def test_missing_controls_leave_the_rest_of_the_report(missing):
    results = search_results(layers=2)
    for name in ("majority", "random_basis") if missing == "both" else (missing,):
        del results["controls"][name]
    words = Page(render(results)).words
    assert ("None were measured" in words) == (missing == "both")
    assert ("Random basis" in words) == (missing == "majority")


def controls_of(results):
    return Page(render(results)).words.split(" Controls ")[1].split("Examples that changed")[0]


def test_every_control_stands_beside_the_winner():
    table = controls_of(compared_results())
    names = ("Unedited", "Edited", "Majority", "Random basis", "Few-shot", "LoRA", "int8")
    places = [table.index(f"{name} ") for name in names]
    assert places == sorted(places)
    assert "on the same 320 test examples" in table
    assert "0.734 ± 0.025 +0.281 (0.22 to 0.34) 1.871 ± 0.050 −0.473 (−0.53 to −0.41)" in table
    assert "5 validation examples in front of every prompt; 12 prompts had room for fewer" in table
    assert "0.441 ± 0.028 −0.013 (−0.05 to 0.03) 2.100 ± 0.050 −0.210 (−0.27 to −0.15)" in table
    assert "46 240 parameters trained on 64 validation examples; 16 more chose epoch 3" in table
    assert "the winner's matrix rounded to int8, not cut: 11 264 bytes for 44 032" in table


def test_a_control_that_is_missing_or_speaks_of_loss_only_leaves_the_others():
    results = text_results()
    results["controls"]["lora"] = compared_results(layers=1)["controls"]["lora"] | {"epochs": 0}
    del results["controls"]["lora"]["accuracy"], results["controls"]["lora"]["gain"]
    table = controls_of(results)
    assert "Accuracy" not in table
    assert "Few-shot" not in table
    assert "16 more chose no training 2.100 ± 0.050 −0.210 (−0.27 to −0.15)" in table
    results["best"]["edits"] = []
    assert "Edited" not in controls_of(results)


def test_numbers_that_are_not_finite_are_null_in_the_results_and_a_dash_in_the_report():
    results = search_results(layers=2)
    results["best"]["test"]["loss"] |= {"value": None, "stderr": None}
    results["best"]["test_loss_gain"] |= {"value": None, "stderr": None, "interval": [None, None]}
    results["grid"][0]["validation"]["loss"] |= {"value": None, "stderr": None}
    page = Page(render(results))
    assert "2.344 ± 0.050 – – ± – unknown" in page.words
    assert [None, None] in [edit["loss"] for edit in payload(page)["edits"]]


def test_flipped_examples_are_counted_in_both_directions(page):
    assert "14 became right, 3 became wrong" in page.words
    assert "9 more" in page.words
    assert "kept" not in page.words.split("Examples that changed")[1].split("Settings")[0]
    totals = search_results() | {"flip_counts": {"gained": 400, "lost": 3}}
    assert "400 became right, 3 became wrong" in Page(render(totals)).words
    assert "Became right (400, 14 kept)" in Page(render(totals)).words
    assert "Lily had a red ball." in page.words


def test_an_evaluation_is_a_table_of_plans_and_tasks():
    page = Page(render(evaluate_results()))
    assert "Evaluation of stories260K" in page.words
    assert "unedited accuracy 0.450 ± 0.028" in page.words
    assert "runs/a/plan.json accuracy 0.730 ± 0.025 +0.280" in page.words
    assert "5 min 0 s" in page.words
    assert "script" not in page.tags


@pytest.mark.parametrize("name", ALL)
def test_a_report_loads_nothing(name):
    page = Page(render(ALL[name]()))
    loads = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "formaction", "background"}
    assert [a for a in page.attributes if a[1] in loads] == []
    assert not {"link", "iframe", "object", "embed", "base", "img", "image", "form", "svg"} & set(page.tags)
    styles = "".join(script for script in page.scripts if script.startswith("\n:root"))
    assert styles
    assert not re.search(r"url\(|@import|https?:", styles)
    policy = next(value for _, key, value in page.attributes if key == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_hostile_text_is_shown_and_never_becomes_markup():
    calm, hostile = Page(render(moe_results())), Page(render(hostile_results()))
    assert hostile.tags.count("script") == calm.tags.count("script") == 4
    assert set(hostile.tags) == set(calm.tags) | {"b", "small"}  # a warning, an unusual weighting
    assert not [a for a in hostile.attributes if a[1].startswith("on")]
    assert HOSTILE[0] in hostile.words
    assert HOSTILE[1] in hostile.words


def test_hostile_text_reaches_plotly_without_tags():
    data = payload(Page(render(hostile_results())))
    texts = data["types"] + [row["stack"] for row in data["rows"]]
    texts += [text for edit in data["edits"] for text in (edit["matrix"], *edit["notes"])]
    assert any("&lt;img" in text for text in texts)
    assert not [text for text in texts if "<" in text]
    assert plot_text("a < b & <b>c</b>") == "a &lt; b &amp; &lt;b&gt;c&lt;/b&gt;"


def test_the_data_block_survives_the_html_parser():
    raw = render(hostile_results())
    block = raw.split('id="data">')[1].split("</script>")[0]
    assert not [character for character in "<>&\u2028\u2029" if character in block]
    assert "NaN" not in block


def test_equal_results_give_equal_reports_and_stay_untouched(results):
    before = copy.deepcopy(results)
    assert render(results) == render(before)
    assert results == before


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.5, "p = 0.500"), (0.0421, "p = 0.042"), (3.2e-9, "p = 3.2 × 10⁻⁹"), (0.0, "p < 10⁻⁹⁹")],
)
def test_small_p_values_are_powers_of_ten(p, text):
    assert plain(_p_value(p)) == text


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (measure(0.452, 0.0112, 80), "0.452 ± 0.011"),
        (measure(0.9991, 0.0002, 80), "0.9991 ± 0.0002"),
        (measure(1234.5, 3.4, 80, "tokens/s"), "1,234.5 ± 3.4"),
        (measure(5_000_000.0, None, 1, "bytes"), "5,000,000"),
        (measure(math.nan, math.nan, 80, "nats/token"), "nan"),
        (measure(math.inf, None, 80, "nats/token"), "inf"),
        (measure(1.0, 0.0, 80), "1.000 ± 0.000"),
        (None, "–"),
    ],
)
def test_a_measurement_has_as_many_digits_as_its_error_allows(measured, text):
    assert plain(_measurement(measured)) == text


def test_an_interval_near_zero_keeps_the_digits_that_tell_its_sign():
    assert _span(0.2244, 0.3381) == "0.22 to 0.34"
    assert _span(0.0031, 0.0512) == "0.003 to 0.051"
    assert _span(-0.051, -0.035) == "−0.051 to −0.035"


def test_a_report_is_written_whole_beside_its_results(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "report.html").write_text("old")
    target = write_report(tmp_path)
    assert target == tmp_path / "report.html"
    assert target.read_text(encoding="utf-8") == render(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_failed_write_leaves_the_old_report_and_no_litter(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(evaluate_results()))
    (tmp_path / "report.html").write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(hostile_results()))
    assert "became right" in write_report(tmp_path).read_text(encoding="utf-8")


# A search before several edits could win together: `best` had one edit or none.
OLD = json.dumps(
    {name: value for name, value in search_results(layers=1, rhos=(0.1,)).items() if name != "compositions"}
    | {"best": {"plan": "plan.json", "edit": None}}
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("\x00\xff", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "schema_version None"),
        ('{"schema_version": 2, "kind": "search"}', "schema_version 2"),
        ('{"schema_version": 1, "kind": "dance"}', "kind 'dance'"),
        ('{"schema_version": 1, "kind": ["search"]}', "kind \\['search'\\]"),
        ('{"schema_version": 1, "kind": "search"}', "lack a field"),
        (OLD, "lack a field.*KeyError: 'edits'.*another --out"),
        ('{"schema_version": 1, "kind": "evaluate", "rows": 3, "model": {}}', "lack a field"),
    ],
)
def test_bad_results_are_an_error_that_names_the_file_and_leave_no_report(tmp_path, content, words):
    if content is not None:
        (tmp_path / "results.json").write_text(content, encoding="latin-1")
    with pytest.raises(EckartError, match=words) as caught:
        write_report(tmp_path)
    assert str(tmp_path / "results.json") in str(caught.value)
    assert str(caught.value).count(". ") >= 1
    assert not (tmp_path / "report.html").exists()


def paths(value, path=()):
    """Every path into nested objects, lists by their first element."""
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from paths(value[0], (*path, 0))
    if path and isinstance(path[-1], str):
        yield path


@pytest.mark.parametrize("make", [search_results, evaluate_results, composed_results])
@pytest.mark.parametrize("bad", ["missing", None, "text", 7])
def test_a_damaged_field_gives_a_report_or_one_clear_error(monkeypatch, make, bad):
    monkeypatch.setattr(report, "plotly", lambda: "")
    results = make(**({} if make is evaluate_results else {"layers": 1, "rhos": (0.1,)}))
    for path in paths(results):
        damaged = copy.deepcopy(results)
        inside = damaged
        for key in path[:-1]:
            inside = inside[key]
        if bad == "missing":
            del inside[path[-1]]
        else:
            inside[path[-1]] = bad
        try:
            page = report.render(damaged)
        except EckartError:
            continue
        assert page.startswith("<!doctype html>")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.is_file():
        pytest.skip("needs chromium, which is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
        )
        yield chromium
        chromium.close()


@pytest.mark.parametrize("name", ["search", "hostile", "text", "evaluate", "compared", "composed", "guided"])
def test_a_browser_draws_the_report_fits_it_and_asks_for_nothing(browser, tmp_path, name):
    (tmp_path / "results.json").write_text(json.dumps(ALL[name]()))
    address = write_report(tmp_path).as_uri()
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(150)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("window.injected") is None
            for table in page.locator(".comparison").all() if name != "hostile" else ():
                box = table.bounding_box()
                assert box["x"] + box["width"] <= width
            if name == "evaluate":
                continue
            assert page.locator("#heat svg.main-svg").count() > 0
            # A second image holds the cells that were stopped early.
            assert page.locator("#heat .hm image").count() == (2 if name == "composed" else 1)
            assert page.locator("#lines .scatterlayer .trace").count() > 0
            assert page.locator("#predicted .points path").count() == (7 if name == "guided" else 0)
            box = page.locator("#heat svg.main-svg").first.bounding_box()
            assert box["width"] <= width
    if name != "evaluate":
        for choice in page.locator("#rho input, #metric input").all():
            choice.check(force=True)
        page.locator("#row").select_option(index=1)
        page.locator("#heat .nsewdrag").hover(position={"x": 60, "y": 20})
        page.locator("#heat .hoverlayer .hovertext").first.wait_for()
        assert "<img" in page.locator("#heat .hoverlayer").text_content() or name != "hostile"
    assert page.locator("img, iframe, a").count() == 0
    assert page.evaluate("window.injected") is None
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
