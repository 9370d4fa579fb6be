"""Imports point one way, and the package's promises about imports hold. Read from the source, by AST."""

import ast
import subprocess
import sys
from pathlib import Path

import eckart

SOURCE = Path(eckart.__file__).parent
# A module may import modules of its own line or of lines above it, without cycles.
LAYERS = [
    {"errors", "registration", "mapping"},
    {"truncation", "results", "layout", "allocate"},
    {"clustering", "spectrum", "noise", "weighting"},
    {"heads"},
    {"neurons"},
    {"onnx_graph", "onnx_runner"},
    {"linear"},
    {"experts", "monarch", "sparse"},
    {"dataflow"},
    {"quantizer"},
    {"portable", "vllm_plugin", "elastic"},
    {"matrices", "plan", "tasks"},
    {"surgery", "encoding"},
    {"factoring", "initialisation", "distillation"},
    {"prefix", "recipe", "sources"},
    {"scoring", "checkpoint", "report", "refinement"},
    {"resources", "embedding"},
    {"skeleton"},
    {"shards"},
    {"spectra", "inspection_report", "unfreezing"},
    {"pte", "peft_adapter", "exporting"},
    {"ledger", "spill"},
    {"race", "sensitivity", "controls", "training", "calibration"},
    {"propagation", "units", "structures", "elastic_folder"},
    {"compression_steps"},
    {"compression"},
    {"recovery", "repairing"},
    {"sweep"},
    {"importance", "dynamics"},
    {"crew"},
    {"cluster", "processes"},
    {"driver"},
    {"composition", "proof"},
    {"laser"},
    {"run", "server", "compression_run", "recovery_run", "repair_run"},
    {"inspection"},
    {"cli"},
]
HEAVY_IN_CLI = {"torch", "transformers"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "eckart" else [node.module]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def inner(module: str) -> set[str]:
    """Modules of the package that one imports; a folder is one module."""
    path = SOURCE / module
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return {name.split(".")[1] for file in files for name in imports(file) if name.startswith("eckart.")} - {module}


def modules() -> set[str]:
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    return {path.stem for path in SOURCE.glob("*.py")} - {"__init__"} | folders


def test_every_module_has_a_layer():
    assert modules() == set().union(*LAYERS)


def test_imports_point_up_the_list_only():
    for depth, layer in enumerate(LAYERS):
        allowed = set().union(*LAYERS[: depth + 1])
        for module in layer:
            forbidden = inner(module) - allowed
            assert not forbidden, f"{module} imports {forbidden}: move the function down, not the import up"


def test_there_is_no_import_cycle():
    graph = {module: inner(module) for module in modules()}
    done: set[str] = set()
    while graph.keys() - done:
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"these import each other: {sorted(graph.keys() - done)}"
        done |= ready


def test_tensor_modules_do_not_know_what_a_model_is():
    assert not inner("truncation") - {"errors"}
    assert not inner("clustering") - {"errors", "truncation"}
    assert not (inner("linear") | inner("experts")) - {"errors", "truncation", "linear"}
    assert not (inner("spectrum") | inner("noise")) - {"errors"}
    for module in ("truncation", "clustering", "spectrum", "noise", "linear", "experts"):
        assert not any("transformers" in name for name in imports(SOURCE / f"{module}.py"))


def test_the_command_line_starts_without_torch():
    for path in (SOURCE / "cli").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY_IN_CLI
    script = "import sys, eckart.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_device_needs_neither_torch_nor_transformers_to_run_an_exported_model():
    script = (
        "import sys, eckart, eckart.onnx_runner, eckart.onnx_graph, eckart.cli.run;"
        "sys.exit(bool({'torch', 'transformers', 'pydantic', 'onnx'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_whatever_is_imported_first_transformers_knows_every_kind_of_folder():
    """The quantizer may be what imports transformers, and half done when transformers' table is there."""
    for first in ("import eckart.factoring", "import eckart; from transformers import AutoModel"):
        script = f"{first}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; import sys;"
        script += "sys.exit(not {'eckart', 'eckart_elastic'} <= known.keys())"
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_no_module_has_a_name_that_says_nothing():
    assert not {path.stem for path in SOURCE.rglob("*.py")} & {"utils", "helpers", "common", "base"}


def test_every_public_name_can_be_imported_and_is_typed():
    declared = {
        alias.asname
        for node in ast.walk(ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("eckart.")
        for alias in node.names
    }
    assert declared == set(eckart.__all__)
    for name in eckart.__all__:
        assert getattr(eckart, name).__doc__, name


def test_no_module_hides_a_public_function():
    """`eckart.search` must stay the function, whichever modules were imported before."""
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not modules & set(eckart.__all__)
