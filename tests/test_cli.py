"""The command line, end to end, on a model of 4,432 parameters."""

import io
import itertools
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import torch
import typer
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny_models as tiny
from eckart import cli
from eckart.cli import app
from eckart.ledger import Ledger

FILES = ["plan.json", "recipe.yaml", "report.html", "results.json", "trials.sqlite"]
SMALL = ("--types", "mlp", "--rho", "0.1,0.5", "--split", "0.4")

# Every word of the command line. Adding, renaming or removing one is a promise kept or broken: do it on purpose.
COMMON = {"--device", "--dtype", "--debug"}
ENCODING = {"--normalize", "--batch-tokens", "--overlong", "--window", "--stride", "--seed", "--recipe", "--json"}
OPTIONS = {
    "demo": {"--out", "--strategy", "--json", "--debug"},
    "search": COMMON | ENCODING | {
        "model", "--task", "--text", "--objective", "--tolerance",
        "--out", "--strategy", "--select", "--shortlist", "--confidence", "--compose", "--beam",
        "--guard", "--blocks", "--clustering", "--cache-bytes", "--workers", "--ray",
        "--types", "--layers", "--rho", "--rank-rule", "--kind", "--basis", "--svd",
        "--niter", "--split", "--shuffle", "--no-shuffle", "--examples", "--dry-run",
        "--controls", "--no-controls", "--shots",
    },
    "evaluate": COMMON | ENCODING | {"model", "--task", "--text", "--plan", "--out", "--force", "--speed", "--memory"},
    "apply": COMMON | {"model", "plan", "--out", "--ratio", "--bytes", "--dense", "--portable", "--force", "--json"},
    "inspect": COMMON | ENCODING | {
        "model", "--out", "--checkpoints", "--dry-run", "--fast", "--layers", "--types", "--rho",
        "--task", "--text", "--tokens", "--top",
    },
    "compress": COMMON | {
        "model", "--out", "--calibration", "--ratio", "--bytes", "--latency", "--method", "--allocate", "--storage",
        "--elastic", "--no-elastic", "--neurons", "--no-neurons", "--sparse",
        "--floor", "--multiple", "--measure", "--task", "--task-weight", "--types", "--window", "--windows",
        "--batch-tokens", "--dry-run", "--json", "--recipe", "--seed",
    },
    "recover": {
        "model", "--out", "--data", "--teacher", "--method", "--loss", "--lm-weight", "--init", "--rank", "--bits",
        "--sampled", "--refine", "--steps", "--minutes", "--batch", "--batch-tokens", "--window", "--lr", "--schedule",
        "--precision", "--gradient-checkpointing", "--held-out", "--evaluations", "--patience", "--cache-bytes",
        "--adapter", "--no-adapter", "--device", "--dry-run", "--json", "--recipe", "--seed", "--debug",
    },
    "export": {"model", "--out", "--to", "--plan", "--adapter", "--quantize", "--force", "--json", "--seed", "--debug"},
    "run": {"model", "--prompt", "--tokens", "--temperature", "--top-p", "--seed", "--threads", "--json", "--debug"},
    "serve": COMMON | {"model", "--host", "--port"},
    "report": {"run", "--debug"},
}  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def comparable(results):
    """Without what a rerun or a resumed run may change."""
    results = {name: value for name, value in results.items() if name != "seconds"}
    results["trials"] = {name: value for name, value in results["trials"].items() if name != "examples"}
    return results


@pytest.fixture(scope="module")
def searched(tiny_llama_folder, choice_task_file, tmp_path_factory):
    """The folder of a finished search with a winner, and what the program printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = succeed("search", tiny_llama_folder, "--task", choice_task_file, "--out", out, *SMALL)
    assert read(out, "plan.json")["edits"], "the tests below need a winner"
    return out, result


def test_the_words_of_every_verb_are_these():
    verbs = typer.main.get_command(app).commands
    found = {
        name: {word for p in verb.params for word in (*p.opts, *p.secondary_opts)} - {"--help"}
        for name, verb in verbs.items()
    }
    assert found == OPTIONS


def test_a_search_writes_its_five_files_and_nothing_else(searched):
    assert sorted(path.name for path in searched[0].iterdir()) == FILES


def test_a_search_names_its_winner_and_its_files(searched):
    out, result = searched
    assert read(out, "plan.json")["edits"][0]["matrix"] in result.stdout
    assert "report.html" in result.stdout
    assert "error" not in result.stderr


def test_the_card_of_an_applied_plan_tells_what_its_search_proved(searched, tiny_llama_folder, tmp_path):
    succeed("apply", tiny_llama_folder, searched[0], "--out", tmp_path)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    results = read(searched[0])
    before, after = results["baseline"]["test"]["accuracy"], results["best"]["test"]["accuracy"]
    assert f"| accuracy | {before['value']:.4g} ± {before['stderr']:.2g} | {after['value']:.4g} ± " in card
    assert f"{results['best']['test_gain']['interval'][0]:+.3g} to" in card
    assert f"{results['task']['test']} test examples" in card


def test_the_card_of_a_plan_tells_nothing_of_other_results_beside_it(searched, tiny_llama_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(searched[0], run)
    results = read(run)
    results["best"]["edits"][0]["rank"] += 1
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    succeed("apply", tiny_llama_folder, run, "--out", tmp_path)
    assert "Measured on" not in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [("--blocks", "3"), ("--blocks", "2,3", "--clustering", "subspaces")])
def test_blocks_of_rows_go_from_the_search_into_the_model(options, tiny_llama_folder, choice_task_file, tmp_path):
    out = tmp_path / "out"
    result = succeed("search", tiny_llama_folder, "--task", choice_task_file, "--out", out, *SMALL, *options)
    (edit,) = read(out, "plan.json")["edits"]
    assert edit["blocks"] in (2, 3)
    assert f"in each of {edit['blocks']} blocks of rows ({edit['clustering']})" in " ".join(result.stdout.split())
    rows = -(-edit["shape"][0] // edit["blocks"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"to rank {edit['rank']} of {min(rows, edit['shape'][1])} (rho" in page
    assert f"blocks {edit['blocks']}" in page
    cost = read(out)["best"]["cost"]
    assert cost["integers"] == (edit["shape"][0] if edit["clustering"] == "subspaces" else 0)
    assert cost["flops"] == 2 * cost["numbers"] > 0
    succeed("apply", tiny_llama_folder, out, "--dense", "--dtype", "float32", "--out", tmp_path / "edited")
    before = load_file(next(tiny_llama_folder.glob("*.safetensors")))
    after = load_file(next((tmp_path / "edited" / "model").glob("*.safetensors")))
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert changed == [f"{edit['matrix']}.weight"]


@pytest.mark.parametrize("options", [("--blocks", "x"), ("--blocks", "0"), ("--clustering", "rows"), ("--guard", "x")])
def test_a_wrong_block_clustering_or_guard_is_refused_by_name(options, tiny_llama_folder, choice_task_file, tmp_path):
    result = invoke("search", tiny_llama_folder, "--task", choice_task_file, "--out", tmp_path / "out", *options)
    assert result.exit_code in (1, 2)
    assert options[0].strip("-") in result.output


def measurements(tree, path=""):
    """Every object under a name that is a measurement's."""
    names = {"accuracy", "loss", "perplexity", "top5", "top10", "test_gain", "test_loss_gain"}
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from measurements(item, f"{path}/{index}")
    elif isinstance(tree, dict):
        for name, item in tree.items():
            if name in names:
                yield f"{path}/{name}", item
            else:
                yield from measurements(item, f"{path}/{name}")


@pytest.mark.parametrize("task", ["choice_task_file", "open_task_file", "text_file"])
def test_every_measurement_has_a_value_an_error_a_count_and_a_unit(task, tiny_llama_folder, request, tmp_path):
    path = request.getfixturevalue(task)
    option = "--text" if task == "text_file" else "--task"
    succeed("evaluate", tiny_llama_folder, option, path, "--out", tmp_path / "out")
    trees = [read(tmp_path / "out")]
    if option == "--task":
        succeed("search", tiny_llama_folder, "--task", path, "--out", tmp_path / "search", *SMALL)
        trees.append(read(tmp_path / "search"))
    found = [pair for tree in trees for pair in measurements(tree)]
    assert found
    for place, item in found:
        assert item is None or {"value", "stderr", "count", "unit"} <= set(item), place
        if item is not None:
            assert isinstance(item["value"], float), place
            assert isinstance(item["stderr"], float), place
            assert item["stderr"] >= 0, place
            assert item["count"] >= 1, place
            assert item["unit"] in {"fraction", "nats/token", "per token"}, place


def test_the_same_command_gives_the_same_results(searched, tiny_llama_folder, choice_task_file, tmp_path):
    succeed("search", tiny_llama_folder, "--task", choice_task_file, "--out", tmp_path / "again", *SMALL)
    first, second = read(searched[0]), read(tmp_path / "again")
    del first["seconds"], second["seconds"]
    assert first == second
    for name in ("plan.json", "recipe.yaml"):
        assert (searched[0] / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_recipe_that_a_search_writes_gives_the_same_search(searched, tiny_llama_folder, choice_task_file, tmp_path):
    recipe = searched[0] / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["rho"] == [0.1, 0.5]
    command = ("search", tiny_llama_folder, "--task", choice_task_file, "--recipe", recipe)
    succeed(*command, "--out", tmp_path / "again")
    assert comparable(read(tmp_path / "again")) == comparable(read(searched[0]))


def test_json_on_stdout_is_the_results_file_and_nothing_else(tiny_llama_folder, open_task_file, tmp_path):
    command = ("search", tiny_llama_folder, "--task", open_task_file, "--out", tmp_path / "out", *SMALL, "--json")
    assert json.loads(succeed(*command).stdout) == read(tmp_path / "out")
    command = ("evaluate", tiny_llama_folder, "--task", open_task_file, "--out", tmp_path / "other", "--json")
    assert json.loads(succeed(*command).stdout) == read(tmp_path / "other")


@pytest.mark.parametrize("json_too", [False, True])
def test_a_dry_run_counts_the_grid_and_writes_nothing(json_too, tiny_llama_folder, choice_task_file, tmp_path):
    command = ("search", tiny_llama_folder, "--task", choice_task_file, "--out", tmp_path / "out", *SMALL, "--dry-run")
    stdout = succeed(*command, *["--json"] * json_too).stdout
    if json_too:
        forecast = json.loads(stdout)
        # Two layers of three MLP matrices, two ranks each; 32 examples of which 0.4 choose.
        assert (forecast["matrices"], forecast["edits"]) == (6, 12)
        assert (forecast["validation_examples"], forecast["test_examples"]) == (13, 19)
    else:
        assert "edits  12" in stdout
    assert list(tmp_path.iterdir()) == []


def test_the_grid_covers_every_layer_type_and_rank_once(searched):
    edits = [trial["edit"] for trial in read(searched[0])["grid"]]
    found = sorted((e["layer"], e["type"], e["rank"]) for e in edits)
    # 24 x 16 matrices: rho 0.1 keeps 1 of 16, rho 0.5 keeps 8.
    assert found == sorted(itertools.product((0, 1), ("fc_in", "fc_up", "fc_out"), (1, 8)))


def test_layers_may_be_listed_ranged_and_counted_from_the_last(tiny_llama_folder, choice_task_file, tmp_path):
    layers = {}
    for words in ("0", "-1", "0-1", "0,1"):
        out = tmp_path / words
        succeed("search", tiny_llama_folder, "--task", choice_task_file, "--out", out, *SMALL, f"--layers={words}")
        layers[words] = {trial["edit"]["layer"] for trial in read(out)["grid"]}
    assert layers == {"0": {0}, "-1": {1}, "0-1": {0, 1}, "0,1": {0, 1}}


@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_interrupted_search_says_how_to_go_on_and_ends_as_if_undisturbed(
    after, searched, tiny_llama_folder, choice_task_file, tmp_path, monkeypatch
):
    out = tmp_path / "my run"  # a space: the command must be quoted
    command = ["search", str(tiny_llama_folder), "--task", str(choice_task_file), "--out", str(out), *SMALL]
    add, calls = Ledger.add, itertools.count()

    def interrupted(*arguments):
        if next(calls) == after:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", interrupted)
        patch.setattr(sys, "argv", ["eckart", *command])
        result = invoke(*command)
    assert result.exit_code == 130
    assert f"--out '{out}' --types mlp" in result.stderr
    assert "eckart search" in result.stderr
    assert not (out / "results.json").exists()
    resumed = succeed(*command)
    assert ("Resuming" in resumed.stderr) == (after > 0)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert comparable(read(out)) == comparable(read(searched[0]))


def test_a_resumed_search_measures_only_what_is_missing(
    searched, tiny_llama_folder, choice_task_file, tmp_path, monkeypatch
):
    command = ("search", tiny_llama_folder, "--task", choice_task_file, "--out", tmp_path / "out", *SMALL)
    add, calls = Ledger.add, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", interrupted)
        assert invoke(*command).exit_code == 130
    with closing(sqlite3.connect(tmp_path / "out" / "trials.sqlite")) as book:
        rows = book.execute("SELECT scores FROM trials WHERE part != 'order'").fetchall()
    recorded = sum(len(json.loads(scores)["loss"]) for (scores,) in rows)
    succeed(*command)
    whole, resumed = (read(folder)["trials"]["examples"] for folder in (searched[0], tmp_path / "out"))
    assert recorded == whole - resumed > 0


def test_a_killed_search_is_resumed_and_ends_as_if_undisturbed(
    program, searched, tiny_llama_folder, choice_task_file, tmp_path
):
    command = ("search", tiny_llama_folder, "--task", choice_task_file, "--out", tmp_path / "out", *SMALL)
    assert program(*command, die_after=4).status == -9
    assert not (tmp_path / "out" / "results.json").exists()
    assert "Resuming" in succeed(*command).stderr
    assert comparable(read(tmp_path / "out")) == comparable(read(searched[0]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


@pytest.fixture
def unfinished(searched, tmp_path):
    """A folder with the ledger alone, as a killed search leaves it."""
    out = tmp_path / "unfinished"
    out.mkdir()
    shutil.copy(searched[0] / "trials.sqlite", out)
    return out


def test_resuming_with_other_settings_is_refused(unfinished, tiny_llama_folder, choice_task_file):
    command = ("search", tiny_llama_folder, "--task", choice_task_file, "--out", unfinished, *SMALL)
    result = invoke(*command, "--seed", "1")
    assert result.exit_code == 1
    assert "another recipe" in result.stderr
    assert '"seed": 0' in result.stderr
    assert '"seed": 1' in result.stderr
    assert [path.name for path in unfinished.iterdir()] == ["trials.sqlite"]
    succeed(*command)


def test_resuming_with_another_task_or_model_is_refused(
    unfinished, tiny_llama_folder, choice_task_file, open_task_file, other_weights
):
    result = invoke("search", tiny_llama_folder, "--task", open_task_file, "--out", unfinished, *SMALL)
    assert (result.exit_code, "another task" in result.stderr) == (1, True)
    result = invoke("search", other_weights, "--task", choice_task_file, "--out", unfinished, *SMALL)
    assert (result.exit_code, "another weights" in result.stderr) == (1, True)


@pytest.fixture(scope="module")
def other_weights(tiny_llama_folder, tmp_path_factory):
    """The tiny Llama with one number changed."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_llama_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_applied_plan_is_the_svd_cut_of_one_weight_and_leaves_the_others_alone(
    dtype, tiny_llama_folder, choice_task_file, tmp_path
):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(source)
    succeed("search", source, "--task", choice_task_file, "--out", tmp_path / "run", *SMALL)
    (edit,) = read(tmp_path / "run", "plan.json")["edits"]
    succeed("apply", source, tmp_path / "run", "--dense", "--out", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out" / "model"))
    changed = f"{edit['matrix']}.weight"
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [changed]
    assert after[changed].dtype == dtype
    u, s, vh = torch.linalg.svd(before[changed].double(), full_matrices=False)
    rank = edit["rank"]
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(after[changed].double(), expected, rtol=tolerance, atol=tolerance * s[0].item())


def test_plain_transformers_loads_an_applied_plan(searched, tiny_llama_folder, tmp_path):
    result = succeed("apply", tiny_llama_folder, searched[0] / "plan.json", "--dense", "--out", tmp_path / "out")
    folder = tmp_path / "out" / "model"
    assert "out/model" in result.stdout.replace("\n", "")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tokenizer("the cat").input_ids == AutoTokenizer.from_pretrained(tiny_llama_folder)("the cat").input_ids
    assert torch.isfinite(model(**tokenizer("the cat lives", return_tensors="pt")).logits).all()
    assert read(folder, "plan.json") == read(searched[0], "plan.json")
    assert read(searched[0], "plan.json")["edits"][0]["matrix"] in (folder / "README.md").read_text()


def test_a_plan_measured_in_memory_and_applied_on_disk_gives_the_same_numbers(
    searched, tiny_llama_folder, choice_task_file, tmp_path
):
    succeed("apply", tiny_llama_folder, searched[0], "--dense", "--out", tmp_path / "out")
    task = ("--task", choice_task_file, "--json")
    planned = json.loads(succeed("evaluate", tiny_llama_folder, "--plan", searched[0], *task).stdout)
    applied = json.loads(succeed("evaluate", tmp_path / "out" / "model", *task).stdout)
    assert planned["rows"][1]["measurements"] == applied["rows"][0]["measurements"]


def test_a_plan_for_other_weights_is_refused_with_both_hashes_unless_forced(
    searched, tiny_llama_folder, other_weights, choice_task_file, tmp_path
):
    command = ("apply", other_weights, searched[0], "--dense", "--out", tmp_path / "out")
    result = invoke(*command)
    succeed("search", other_weights, "--task", choice_task_file, "--out", tmp_path / "run", *SMALL)
    hashes = [read(folder)["model"]["weights_sha256"] for folder in (searched[0], tmp_path / "run")]
    assert result.exit_code == 1
    assert hashes[0] != hashes[1]
    assert all(digest in result.stderr for digest in hashes)
    assert "--force" in result.stderr
    assert not (tmp_path / "out").exists()
    succeed(*command, "--force")
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_evaluate_measures_every_task_without_and_with_every_plan(
    searched, tiny_llama_folder, choice_task_file, open_task_file, text_file, tmp_path
):
    tasks = ("--task", choice_task_file, "--task", open_task_file, "--text", text_file)
    out = tmp_path / "out"
    result = succeed("evaluate", tiny_llama_folder, *tasks, "--plan", searched[0], "--out", out)
    results = read(out)
    names = [task.stem for task in (choice_task_file, open_task_file, text_file)]
    assert [(row["plan"], row["task"]) for row in results["rows"]] == [
        (plan, name) for plan in ("none", str(searched[0])) for name in names
    ]
    assert all(result.stdout.count(name) == 2 for name in names)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    changed = [row["measurements"]["loss"]["value"] for row in results["rows"]]
    assert changed[:3] != changed[3:]


def test_evaluate_without_out_prints_and_writes_nothing(tiny_llama_folder, choice_task_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "accuracy" in succeed("evaluate", tiny_llama_folder, "--task", choice_task_file).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_drawn_again_byte_by_byte_from_the_results_alone(searched, tmp_path):
    shutil.copy(searched[0] / "results.json", tmp_path)
    result = succeed("report", tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (searched[0] / "report.html").read_bytes()
    assert result.stdout.strip() == str(tmp_path / "report.html")


@pytest.mark.parametrize(
    "words",
    [
        ["search"],
        ["search", "model", "--task", "t"],
        ["dance"],
        ["search", "model", "--task", "t", "--out", "o", "--dance"],
        ["search", "model", "--task", "t", "--out", "o", "--split", "some"],
        ["search", "model", "--task", "t", "--out", "o", "--layers", "first"],
        ["search", "model", "--task", "t", "--out", "o", "--layers", "1-"],
        ["search", "model", "--task", "t", "--out", "o", "--rho", "half"],
        ["evaluate", "model"],
        ["apply", "model", "--out", "o"],
    ],
)
def test_wrong_usage_exits_with_2_and_one_message(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr
    assert result.stderr.count("Error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_came_from(tmp_path, choice_task_file):
    command = ("search", tmp_path / "none", "--task", choice_task_file, "--out", tmp_path / "out")
    assert isinstance(invoke(*command).exception, SystemExit)
    assert type(invoke(*command, "--debug").exception).__name__ == "ModelError"


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in OPTIONS)])
def test_help_exits_with_0_and_lists_every_option(verb):
    stdout = succeed(*verb, "--help").stdout
    assert all(word in stdout for word in (OPTIONS[verb[0]] if verb else OPTIONS) if word.islower())


def test_paths_are_printed_whole_so_that_other_programs_can_use_them(searched, tiny_llama_folder, tmp_path):
    long = tmp_path / ("a long name " * 12).strip()
    shutil.copytree(searched[0], long)
    assert succeed("report", long).stdout == f"{long / 'report.html'}\n"
    assert (
        str(long / "out" / "model")
        in succeed("apply", tiny_llama_folder, long, "--dense", "--out", long / "out").stdout
    )


def test_the_demo_finds_a_cut_that_brings_the_facts_back_and_shows_it(tmp_path):
    stdout = succeed("demo", "--out", tmp_path / "out").stdout
    results = read(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert results["best"]["test_gain"]["interval"][0] > 0.5
    (edit,) = results["best"]["edits"]
    assert f"Best edit: {edit['matrix']} (fc_in) to rank 1 of 96" in stdout
    assert all(flip["prompt"] for flip in results["flipped"])
    assert sum(flip["prompt"] in stdout for flip in results["flipped"]) == 5


def test_several_edits_are_printed_one_a_line_with_what_was_stopped(tiny_llama_folder, choice_task_file, tmp_path):
    out = tmp_path / "out"
    grid = ("--types", "all", "--rho", "0.1,0.3,0.5,0.7", "--split", "0.4", "--select", "loss")
    options = ("--strategy", "guided", "--compose", "3", "--beam", "2")
    stdout = succeed("search", tiny_llama_folder, "--task", choice_task_file, "--out", out, *grid, *options).stdout
    results = read(out)
    edits = read(out, "plan.json")["edits"]
    assert len(edits) > 1, "the test needs edits that win together"
    assert results["best"]["edits"] == edits
    sets, trials = results["compositions"], results["trials"]
    said = " ".join(stdout.split())
    assert f"Predicted {trials['grid']} edits, tried 16 and {len(sets)} sets of them on 13 examples in" in said
    assert trials["stopped"] == sum(bool(trial["stopped"]) for trial in (*results["grid"], *sets))
    assert (f"{trials['stopped']} could not win, and were stopped early." in said) == (trials["stopped"] > 0)
    lines = stdout.split(f"Best edits, {len(edits)} together:\n")[1].splitlines()
    for line, edit in zip(lines, edits):
        assert line.strip().startswith(f"{edit['matrix']} ({edit['type']}) to rank {edit['rank']} of ")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(edit["matrix"] in page for edit in edits)
    assert "Edits together" in page


@pytest.mark.parametrize("width", [80, 120])
def test_the_progress_fits_one_line_and_gives_way_at_its_end_only(width, tiny_llama_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(cli.search, "errors", Console(stderr=True, width=width, force_terminal=True, highlight=False))

    class Recorded(cli.search.Progress):
        def update(self, task, **fields):
            super().update(task, **fields)
            screen = Console(width=width, file=io.StringIO(), force_terminal=False)
            screen.print(self.get_renderable())
            shown.append(screen.file.getvalue().rstrip("\n"))

    monkeypatch.setattr(cli.search, "Progress", Recorded)
    path = tmp_path / "task.jsonl"
    line = {"prompt": "the ant lives in the", "choices": ["house", "field"], "answer": 0}
    path.write_text("\n".join(json.dumps(line | {"answer": n % 2}) for n in range(40)), encoding="utf-8")
    edits = ("--types", "all", "--rho", "0.1,0.5", "--compose", "2", "--select", "loss")
    succeed("search", tiny_llama_folder, "--task", path, "--out", tmp_path / "out", *edits)
    assert shown
    assert all("\n" not in line and len(line) <= width for line in shown)
    for stage in ("searching", "composing", "proving"):
        assert any(line.startswith(stage) for line in shown), stage
    assert any("/28 edits" in line for line in shown)
    assert any(re.search(r"\d/\d+ sets", line) for line in shown)
    assert any("best accuracy" in line for line in shown)


def test_the_program_starts_as_a_module_too():
    ran = subprocess.run([sys.executable, "-m", "eckart.cli", "--help"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "search" in ran.stdout


@pytest.mark.parametrize("verb", ["evaluate", "search"])
def test_control_characters_and_markup_of_a_task_do_not_reach_the_terminal(program, tiny_llama_folder, tmp_path, verb):
    path = tmp_path / "\x1b[31m[bold]evil.jsonl"
    line = {"prompt": "the ant lives in the", "choices": ["house", "field"], "answer": 0}
    path.write_text("\n".join(json.dumps(line) for _ in range(6)), encoding="utf-8")
    out = ("--out", tmp_path / "\x1b[31m[bold]out")
    grid = ("--types", "fc_in", "--rho", "0.5") if verb == "search" else ()
    result = program(verb, tiny_llama_folder, "--task", path, *out, *grid)
    assert result.status == 0, result.err
    assert "\x1b" not in result.out + result.err
    assert "[bold]" in result.out + result.err


def test_a_text_without_labels_is_searched_by_perplexity_and_by_agreement(tiny_llama_folder, tmp_path):
    text = tmp_path / "plain.txt"
    text.write_text("\n".join(tiny.sentence(20, i) for i in range(400)), encoding="utf-8")
    options = ("--text", text, "--types", "mlp", "--rho", "0.1,0.5", "--window", "32", "--strategy", "guided")
    result = succeed("search", tiny_llama_folder, *options, "--out", tmp_path / "by_perplexity")
    assert read(tmp_path / "by_perplexity")["recipe"]["objective"] == "perplexity"
    assert "perplexity" in result.stdout
    agreement = ("--objective", "agreement", "--tolerance", "0.5", "--compose", "2")
    succeed("search", tiny_llama_folder, *options, *agreement, "--out", tmp_path / "by_agreement")
    found = read(tmp_path / "by_agreement")
    assert found["best"]["edits"]
    assert found["best"]["validation"]["divergence"]["value"] <= 0.5
    page = (tmp_path / "by_agreement" / "report.html").read_text(encoding="utf-8")
    assert "within the tolerance of 0.5" in page or "beyond the tolerance of 0.5" in page
    assert found["task"]["validation"] + found["task"]["test"] >= 20


def test_a_search_needs_a_task_or_a_text_and_not_both(tiny_llama_folder, choice_task_file, text_file, tmp_path):
    for given in ((), ("--task", choice_task_file, "--text", text_file)):
        result = invoke("search", tiny_llama_folder, *given, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "--text" in result.output
