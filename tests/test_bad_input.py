"""Every wrong input ends with status 1, one message that says what is wrong, and nothing half-written.

The program runs in a process of its own, so whatever any library prints is seen.
"""

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

TYPES = ("--types", "mlp", "--rho", "0.1,0.5", "--split", "0.4")


@pytest.fixture
def model(tiny_llama_folder, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


@pytest.fixture
def out(tmp_path):
    """A folder that does not exist; its parent holds nothing else."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture
def refuse(program, out):
    """Run the program, which must refuse with one message that holds these words and leave no trace."""

    def check(*arguments, facts):
        result = program(*arguments)
        assert result.status == 1, result
        assert result.out == ""
        assert "Traceback" not in result.err
        lines = result.err.strip().splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("error: ")
        missing = [fact for fact in facts if str(fact) not in lines[0]]
        assert not missing, lines[0]
        # What is wrong, what is allowed, what to do.
        assert lines[0].rstrip().count(". ") >= 1
        assert lines[0].endswith(".")
        if out.parent.exists():
            assert list(out.parent.iterdir()) == []
        return lines[0]

    return check


@pytest.fixture
def refuse_search(refuse, tiny_llama_folder, choice_task_file, out):
    """The same for a search whose options and files can be replaced."""

    def check(*more, facts, model=tiny_llama_folder, task=choice_task_file):
        return refuse("search", model, "--task", task, "--out", out, *more, facts=facts)

    return check


# Models


def an_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/other"}')
    return ["adapter_config.json", "merge_and_unload", folder]


def no_config(folder):
    (folder / "config.json").unlink()
    return ["no config.json", folder]


def config_not_json(folder):
    (folder / "config.json").write_text("{")
    return [folder]


def config_of_unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "dance", "architectures": ["Dance"]}))
    return [folder, "dance"]


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return ["no weights", folder, "model.safetensors"]


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return ["tokenizer", folder]


def cut_off(folder):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    return [path, size - 100, size, "damaged"]


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return [folder / "model.safetensors", "damaged"]


def longer_than_it_says(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    return [folder / "model.safetensors", "damaged"]


def corrupt_header(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 40)
    return [folder / "model.safetensors", "header"]


def huge_header(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**63 - 1))
    return [folder / "model.safetensors", 2**63 - 1]


def missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return ["model-00002-of-00002.safetensors is missing"]


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")
    return ["model.safetensors.index.json"]


def change(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, {"format": "pt"})


def a_nan(folder):
    change(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan))
    return ["model.layers.1.mlp.up_proj.weight", "NaN"]


def an_infinity(folder):
    change(folder, lambda weights: weights["model.layers.0.self_attn.q_proj.weight"].view(-1)[5].fill_(-torch.inf))
    return ["model.layers.0.self_attn.q_proj.weight", "infinity"]


def a_weight_is_missing(folder):
    change(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    return [folder, "model.layers.1.mlp.up_proj.weight"]


def a_weight_of_another_shape(folder):
    def edit(weights):
        weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)

    change(folder, edit)
    return [folder, "could not be loaded"]


@pytest.mark.parametrize("verb", ["search", "evaluate", "apply"])
@pytest.mark.parametrize(
    "damage",
    [
        an_adapter, no_config, config_not_json, config_of_unknown_type, no_weights, no_tokenizer, cut_off,
        empty_weights, longer_than_it_says, corrupt_header, huge_header, missing_shard, broken_index, a_nan,
        an_infinity, a_weight_is_missing, a_weight_of_another_shape,
    ],
)  # fmt: skip
def test_a_damaged_model_is_refused_by_every_verb(damage, verb, refuse, model, choice_task_file, plan, out):
    facts = damage(model)
    rest = {"apply": [plan(), "--dense"]}.get(verb, ["--task", choice_task_file])
    refuse(verb, model, *rest, "--out", out, facts=facts)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "none/at/all", "~/none-at-all"])
def test_a_model_folder_that_does_not_exist_is_refused(name, refuse_search):
    refuse_search(model=name, facts=[name, "not a folder"])


def test_a_hub_id_without_a_network_is_refused_with_the_id(refuse_search):
    refuse_search(model="nobody/none-at-all", facts=["nobody/none-at-all", "network"])


@pytest.mark.parametrize(
    ("option", "value", "facts"),
    [
        ("--dtype", "float3", ["float3", "float32"]),
        ("--device", "abacus", ["abacus", "--device"]),
        ("--device", "cuda:99", ["cuda:99"]),
        ("--device", "meta", ["meta"]),
    ],
)
def test_an_unknown_device_or_dtype_is_refused(option, value, facts, refuse_search):
    refuse_search(option, value, facts=facts)


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_with_a_hint_and_never_opened(name, refuse_search, model, tmp_path):
    marker = tmp_path / "marker"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Marker(marker)))
    refuse_search(model=model, facts=[name, "safetensors", "save_pretrained"])
    assert not marker.exists()
    pickle.loads((model / name).read_bytes()).close()
    assert marker.exists(), "the pickle would have made it"


@pytest.mark.parametrize("model_type", ["llama", "dance"])
def test_code_beside_a_model_is_never_run(model_type, program, model, choice_task_file, out, tmp_path):
    marker = tmp_path / "marker"
    (model / "dance.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )
    for name, auto_map in (
        ("config.json", {"AutoConfig": "dance.Config", "AutoModelForCausalLM": "dance.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "dance.Tokenizer"]}),
    ):
        fields = json.loads((model / name).read_text())
        if name == "config.json":
            fields |= {"model_type": model_type, "architectures": ["Model"]}
        (model / name).write_text(json.dumps(fields | {"auto_map": auto_map}))
    result = program("search", model, "--task", choice_task_file, "--out", out, *TYPES)
    assert not marker.exists()
    assert "Traceback" not in result.err
    if model_type == "dance":
        assert (result.status, out.exists()) == (1, False)
        assert "custom code" in result.err


# Tasks


def line(**fields):
    return json.dumps(fields)


GOOD = line(prompt="the cat is", choices=["red", "blue"], answer=0)
LONG = line(prompt="the cat " * 20, choices=["red", "blue"], answer=0)
HUGE = "9" * 5000
BAD_TASKS = {
    "empty": ("", ["no example"]),
    "blank": ("\n \n", ["no example"]),
    "not JSON": (f"{GOOD}\n{{'prompt'}}\n", ["line 2", "not JSON"]),
    "cut off": (f"{GOOD}\n\n{GOOD[:-4]}", ["line 3", "not JSON"]),
    "a list": ("[1, 2]", ["line 1", "not an object"]),
    "a number": ("7", ["line 1", "not an object"]),
    "unknown field": (line(prompt="a", answers=["b"]), ["line 1", "answers"]),
    "no prompt": (line(choices=["red", "blue"], answer=0), ["line 1", "prompt"]),
    "no answer": (line(prompt="the"), ["line 1", "answer"]),
    "an empty answer": (line(prompt="the", answer=" "), ["line 1", "answer"]),
    "answer too large": (f"{GOOD}\n{line(prompt='a', choices=['b', 'c'], answer=2)}", ["line 2", "2", "0 to 1"]),
    "answer negative": (line(prompt="a", choices=["b", "c"], answer=-1), ["line 1", "-1", "0 to 1"]),
    "answer true": (line(prompt="a", choices=["b", "c"], answer=True), ["line 1", "True", "0 to 1"]),
    "answer a float": (line(prompt="a", choices=["b", "c"], answer=1.0), ["line 1", "1.0"]),
    "answer a text": (line(prompt="a", choices=["b", "c"], answer="b"), ["line 1", "0 to 1"]),
    "answer huge": (f'{{"prompt": "a", "choices": ["b", "c"], "answer": {HUGE}}}', ["line 1"]),
    "one choice": (f"{GOOD}\n{line(prompt='a', choices=['b'], answer=0)}", ["line 2", "1 choice"]),
    "no choice": (line(prompt="a", choices=[], answer=0), ["line 1", "0 choice"]),
    "choices a text": (line(prompt="a", choices="bc", answer=0), ["line 1", "list"]),
    "an empty choice": (line(prompt="a", choices=["b", ""], answer=0), ["line 1", "not empty"]),
    "same choices": (f"{GOOD}\n{line(prompt='a', choices=['red', 'red'], answer=0)}", ["line 2", "'red'"]),
    "same tokens": (
        f"{GOOD}\n{GOOD}\n{line(prompt='a', choices=['lynx', 'red', 'puma'], answer=0)}",
        ["line 3", "'lynx'", "'puma'", "same tokens"],
    ),
    "mixed kinds": (f"{GOOD}\n{line(prompt='a', answer='b')}", ["line 2", "open", "choice"]),
    "group a number": (line(prompt="a", answer="b", group=3), ["line 1", "group"]),
    "text and prompt": (line(text="a", prompt="b"), ["line 1", "text"]),
    "deeply nested": ("[" * 100_000, ["line 1", "not JSON"]),
    "nested in a field": (
        f'{{"prompt": "a", "answer": {"[" * 20_000}{"]" * 20_000}}}',
        ["line 1"],
    ),
    "half a surrogate pair": ('{"prompt": "a \\ud800", "answer": "red"}', ["line 1", "surrogate"]),
    "one example": (GOOD, ["1 example"]),
    "too long": (f"{GOOD}\n{LONG}\n{LONG}\n{GOOD}", ["2 of", "32", "line 2", "41", "--overlong truncate"]),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_bad_task_is_refused_with_the_line(name, refuse_search, tmp_path):
    text, facts = BAD_TASKS[name]
    path = tmp_path / "task.jsonl"
    path.write_text(text, encoding="utf-8")
    # Unshuffled and with most examples choosing, so that all wrong ones are met in one part.
    options = ("--no-shuffle", "--split", "0.8")
    refuse_search(*options, task=path, facts=facts if name == "too long" else [*facts, "task"])


def test_a_task_that_is_missing_binary_or_a_folder_is_refused(refuse_search, tmp_path):
    refuse_search(task=tmp_path / "none.jsonl", facts=["none.jsonl does not exist"])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    refuse_search(task=tmp_path / "binary.jsonl", facts=["binary.jsonl", "UTF-8"])
    refuse_search(task=tmp_path, facts=[tmp_path])


def test_a_prompt_longer_than_the_context_is_shortened_if_asked(program, tiny_llama_folder, tmp_path, out):
    path = tmp_path / "task.jsonl"
    path.write_text(f"{GOOD}\n{LONG}\n{LONG}\n{GOOD}\n", encoding="utf-8")
    command = ("search", tiny_llama_folder, "--task", path, "--out", out, *TYPES, "--overlong", "truncate")
    result = program(*command)
    assert result.status == 0, result.err
    results = json.loads((out / "results.json").read_text())
    assert sum("longer than the model's context" in warning for warning in results["warnings"]) >= 1


def test_line_separators_and_byte_order_marks_are_text_not_errors(program, tiny_llama_folder, tmp_path):
    path = tmp_path / "task.jsonl"
    strange = json.dumps({"prompt": "the\u2028cat\u0085is\x0b", "choices": ["red", "blue"], "answer": 0})
    unescaped = strange.encode().decode("unicode_escape")
    text = f"\ufeff{GOOD}\r\n{unescaped.replace(chr(11), '')}\r\n{GOOD}"
    path.write_text(text, encoding="utf-8", newline="")
    result = program("evaluate", tiny_llama_folder, "--task", path, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["rows"][0]["measurements"]["accuracy"]["count"] == 3


@pytest.mark.parametrize("content", ["", " \n<|endofdoc|>\n "])
def test_an_empty_text_is_refused(content, refuse, tiny_llama_folder, tmp_path, out):
    path = tmp_path / "text.txt"
    path.write_text(content)
    refuse("evaluate", tiny_llama_folder, "--text", path, "--out", out, facts=["text.txt", "no example"])


def test_a_text_of_one_token_or_a_window_beyond_the_context_is_refused(
    refuse, tiny_llama_folder, text_file, tmp_path, out
):
    command = ("evaluate", tiny_llama_folder, "--out", out, "--text", text_file)
    refuse(*command, "--window", "33", facts=["33", "32"])
    refuse(*command, "--window", "8", "--stride", "9", facts=["9", "8"])


# Settings

BAD_SETTINGS = {
    "unknown type": (["--types", "fc_inn"], ["fc_inn", "fc_in"]),
    "absent type": (["--types", "other"], ["other", "fc_in"]),
    "no type": (["--types", ","], ["types"]),
    "layer too large": (["--layers", "2"], ["Layer 2", "0 to 1"]),
    "layer too negative": (["--layers=-3"], ["Layer -3", "0 to 1"]),
    "no layer": (["--layers", "1-0"], ["layers"]),
    "rho 0": (["--rho", "0"], ["rho", "0.0", "above 0"]),
    "rho negative": (["--rho=-0.5"], ["rho", "-0.5", "above 0"]),
    "rho 1.5": (["--rho", "0.1,1.5"], ["rho", "1.5", "at most 1"]),
    "rho nan": (["--rho", "nan"], ["rho", "nan"]),
    "rho inf": (["--rho", "inf"], ["rho", "inf"]),
    "no rho": (["--rho", ","], ["rho"]),
    "kind": (["--kind", "big"], ["kind", "big", "low_rank"]),
    "basis": (["--basis", "left"], ["basis", "left", "top"]),
    "svd": (["--svd", "fast"], ["svd", "fast", "exact"]),
    "split 0": (["--split", "0"], ["split", "0"]),
    "split 1": (["--split", "1"], ["split", "1"]),
    "split nan": (["--split", "nan"], ["split", "nan"]),
    "examples": (["--examples", "0"], ["examples", "0"]),
    "seed": (["--seed=-1"], ["seed", "-1"]),
    "batch": (["--batch-tokens", "0"], ["batch_tokens", "0"]),
    "normalize": (["--normalize", "bytes"], ["normalize", "bytes", "tokens"]),
    "overlong": (["--overlong", "ignore"], ["overlong", "ignore", "truncate"]),
    "lowrank bottom": (["--svd", "lowrank", "--basis", "bottom"], ["lowrank"]),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(name, refuse_search):
    options, facts = BAD_SETTINGS[name]
    refuse_search(*options, facts=facts)


@pytest.mark.parametrize("options", [["--svd", "lowrank", "--basis", "bottom"], ["--layers", "7"]])
def test_a_dry_run_refuses_what_a_search_would(options, refuse_search):
    refuse_search(*options, "--dry-run", facts=[])


BAD_RECIPES = {
    "unknown setting": ("rho: [0.1]\nrank: 3\n", ["rank", "rho"]),
    "out of range": ("rho: [2.0]\n", ["rho", "2.0"]),
    "a text for a list": ("types: mlp\n", ["types", "mlp"]),
    "not YAML": ("rho: [0.1\n", ["recipe.yaml"]),
    "tabs": ("rho:\n\t- 1\n", ["recipe.yaml"]),
    "a list": ("- rho\n", ["recipe.yaml"]),
    "a text": ("rho", ["recipe.yaml"]),
    "a number for a name": ("3: 4\n", ["3"]),
    "an impossible date": ("seed: 2001-99-99\n", ["recipe.yaml"]),
    "a Python object": ("seed: !!python/object/apply:os.getpid []\n", ["recipe.yaml"]),
    "deeply nested": ("[" * 1200, ["recipe.yaml"]),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_bad_recipe_is_refused(name, refuse_search, tmp_path):
    text, facts = BAD_RECIPES[name]
    (tmp_path / "recipe.yaml").write_text(text)
    refuse_search("--recipe", tmp_path / "recipe.yaml", facts=facts)


def test_a_recipe_that_is_missing_or_a_folder_is_refused(refuse_search, tmp_path):
    refuse_search("--recipe", tmp_path / "none.yaml", facts=["none.yaml"])
    refuse_search("--recipe", tmp_path, facts=[tmp_path])


# Plans


@pytest.fixture(scope="module")
def good_plan(program, tiny_llama_folder, choice_task_file, tmp_path_factory):
    """A plan that fits the tiny model."""
    out = tmp_path_factory.mktemp("plans") / "out"
    result = program("search", tiny_llama_folder, "--task", choice_task_file, "--out", out, *TYPES)
    assert result.status == 0, result.err
    plan = json.loads((out / "plan.json").read_text())
    assert plan["edits"], "the tests below need an edit"
    return plan


@pytest.fixture
def plan(good_plan, tmp_path):
    """Write the good plan with its first edit, or itself, changed."""

    def write(edit=None, **fields):
        changed = json.loads(json.dumps(good_plan)) | fields
        if edit is not None:
            changed["edits"][0] |= edit
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(changed))
        return path

    return write


BAD_PLANS = {
    "schema version 2": ({"schema_version": 2}, ["schema_version"]),
    "unknown field": ({"author": "me"}, ["author"]),
    "no model": ({"model": None}, ["model"]),
    "edits a number": ({"edits": 3}, ["edits"]),
    "unknown kind": ({"edit": {"kind": "big"}}, ["kind"]),
    "rank 0": ({"edit": {"rank": 0}}, ["rank 0"]),
    "rank beyond the shape": ({"edit": {"rank": 17}}, ["rank 17"]),
    "rho 1.5": ({"edit": {"rho": 1.5}}, ["rho"]),
    "rho nan": ({"edit": {"rho": float("nan")}}, ["rho"]),
    "an unknown matrix": (
        {"edit": {"matrix": "model.layers.0.mlp.up"}},
        ["'model.layers.0.mlp.up'", "model.layers.0.mlp.up_proj"],
    ),
    "another shape": ({"edit": {"shape": [48, 16]}}, ["(48, 16)"]),
    "half a surrogate pair": ({"edit": {"matrix": "\ud800"}}, ["plan.json", "surrogate"]),
    "a huge seed": ({"edit": {"basis": "random", "seed": 2**70}}, ["seed"]),
}


@pytest.mark.parametrize("name", BAD_PLANS)
@pytest.mark.parametrize("verb", ["apply", "evaluate"])
def test_a_bad_plan_is_refused(name, verb, refuse, plan, tiny_llama_folder, choice_task_file, out):
    fields, facts = BAD_PLANS[name]
    path = plan(**fields)
    rest = [path, "--dense"] if verb == "apply" else ["--plan", path, "--task", choice_task_file]
    refuse(verb, tiny_llama_folder, *rest, "--out", out, facts=facts)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ud800", "[" * 100_000, '{"edits": ' + HUGE + "}"])
def test_a_plan_that_is_no_object_is_refused(text, refuse, tiny_llama_folder, tmp_path, out):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refuse("apply", tiny_llama_folder, path, "--dense", "--out", out, facts=["plan.json"])


def test_a_plan_that_edits_a_matrix_twice_is_refused(refuse, plan, good_plan, tiny_llama_folder, out):
    path = plan(edits=good_plan["edits"] * 2)
    refuse("apply", tiny_llama_folder, path, "--dense", "--out", out, facts=["twice"])


def test_a_plan_that_does_not_exist_is_refused(refuse, tiny_llama_folder, tmp_path, out):
    for path in (tmp_path / "none.json", tmp_path):
        refuse("apply", tiny_llama_folder, path, "--dense", "--out", out, facts=["plan", "does not exist"])


# Output


@pytest.mark.parametrize("verb", ["search", "evaluate", "apply", "demo"])
@pytest.mark.parametrize("kind", ["a full folder", "a file", "below a file"])
def test_results_never_go_where_something_is(verb, kind, program, plan, tiny_llama_folder, choice_task_file, tmp_path):
    taken = tmp_path / "taken"
    if kind == "a full folder":
        # `apply` writes to a folder `model` inside.
        (taken / "model").mkdir(parents=True)
        (taken / "model" / "mine").write_text("precious")
    else:
        taken.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    out = taken / "out" if kind == "below a file" else taken
    model_and_more = {
        "search": [tiny_llama_folder, "--task", choice_task_file],
        "evaluate": [tiny_llama_folder, "--task", choice_task_file],
        "apply": [tiny_llama_folder, plan(), "--dense"],
        "demo": [],
    }
    result = program(verb, *model_and_more[verb], "--out", out)
    assert result.status == 1, result
    assert "error: " in result.err
    assert "Traceback" not in result.err
    assert "--out" in result.err
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "plan.json") == before


def test_a_folder_that_was_there_empty_stays_after_an_error(program, tiny_llama_folder, tmp_path, out):
    (tmp_path / "task.jsonl").write_text(f"{GOOD}\n{LONG}\n")
    out.mkdir()
    result = program("search", tiny_llama_folder, "--task", tmp_path / "task.jsonl", "--out", out)
    assert result.status == 1
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("largest", [1000, 6000, 30_000, 60_000, 1_000_000])
def test_a_search_on_a_full_disk_leaves_nothing_half_written_and_resumes(
    largest, program, good_plan, tiny_llama_folder, choice_task_file, out
):
    command = ("search", tiny_llama_folder, "--task", choice_task_file, "--out", out, *TYPES)
    result = program(*command, largest_file=largest)
    assert result.status == 1
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    assert "--out" in result.err or "Free space" in result.err
    left = {path.name for path in out.iterdir()} if out.exists() else set()
    assert left <= {"plan.json", "recipe.yaml", "trials.sqlite", "trials.sqlite-wal", "trials.sqlite-shm"}
    if "plan.json" in left:
        assert json.loads((out / "plan.json").read_text()) == good_plan
    result = program(*command)
    assert result.status == 0, result.err
    assert json.loads((out / "plan.json").read_text()) == good_plan


def test_evaluate_on_a_full_disk_leaves_no_results(program, tiny_llama_folder, choice_task_file, out):
    command = ("evaluate", tiny_llama_folder, "--task", choice_task_file, "--out", out)
    result = program(*command, largest_file=1000)
    assert (result.status, result.err.count("error: ")) == (1, 1)
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("dense", [["--dense"], []])
@pytest.mark.parametrize("largest", [1000, 10_000])
def test_apply_on_a_full_disk_leaves_nothing(largest, dense, program, plan, tiny_llama_folder, out):
    result = program("apply", tiny_llama_folder, plan(), *dense, "--out", out, largest_file=largest)
    assert result.status == 1
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert "could not be written" in result.err
    assert list(out.rglob("*")) == []


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"schema_version": 1, "kind": "search"}'])
def test_a_report_without_sound_results_is_refused(text, refuse, tmp_path, out):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    refuse("report", tmp_path, facts=["results.json"])
    assert not (tmp_path / "report.html").exists()
