"""Low-rank surgery on transformers: find the matrix to cut, prove the gain, ship the model.

import eckart
model, tokenizer = eckart.load("path/to/model")
found = eckart.search(model, tokenizer, eckart.read_task("mine.jsonl"))
eckart.factor_(model, found.plan)
eckart.save(model, "out/model", tokenizer)
"""

import importlib
from typing import TYPE_CHECKING, Any

from eckart import registration

registration.register_when_imported()

# torch and transformers take seconds to import; they are imported when a name is first used.
_HOMES = {
    "load": "checkpoint",
    "save": "checkpoint",
    "Compression": "compression",
    "compress": "compression",
    "EckartError": "errors",
    "arrange_": "linear",
    "Factoring": "factoring",
    "factor_": "factoring",
    "evaluate": "scoring",
    "Matrix": "matrices",
    "coverage": "matrices",
    "find_matrices": "matrices",
    "read": "matrices",
    "select": "matrices",
    "write": "matrices",
    "Edit": "plan",
    "Plan": "plan",
    "read_plan": "plan",
    "write_plan": "plan",
    "InspectSettings": "recipe",
    "SearchSettings": "recipe",
    "SpectrumCallback": "dynamics",
    "run_inspect": "inspection",
    "read_inspection": "spectra",
    "CompressSettings": "recipe",
    "RecoverSettings": "recipe",
    "Recovery": "recovery",
    "Repair": "repairing",
    "repair": "repairing",
    "recover": "recovery",
    "write_report": "report",
    "Measurement": "results",
    "SearchResult": "laser",
    "search": "laser",
    "open_task": "sources",
    "applied": "surgery",
    "apply_": "surgery",
    "check_plan": "surgery",
    "make_edit": "surgery",
    "make_edit_by_rule": "surgery",
    "Example": "tasks",
    "Task": "tasks",
    "make_task": "tasks",
    "read_task": "tasks",
    "read_text": "tasks",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from eckart.checkpoint import load as load
    from eckart.checkpoint import save as save
    from eckart.compression import Compression as Compression
    from eckart.compression import compress as compress
    from eckart.dynamics import SpectrumCallback as SpectrumCallback
    from eckart.errors import EckartError as EckartError
    from eckart.factoring import Factoring as Factoring
    from eckart.factoring import factor_ as factor_
    from eckart.inspection import run_inspect as run_inspect
    from eckart.laser import SearchResult as SearchResult
    from eckart.laser import search as search
    from eckart.linear import arrange_ as arrange_
    from eckart.matrices import Matrix as Matrix
    from eckart.matrices import coverage as coverage
    from eckart.matrices import find_matrices as find_matrices
    from eckart.matrices import read as read
    from eckart.matrices import select as select
    from eckart.matrices import write as write
    from eckart.plan import Edit as Edit
    from eckart.plan import Plan as Plan
    from eckart.plan import read_plan as read_plan
    from eckart.plan import write_plan as write_plan
    from eckart.recipe import CompressSettings as CompressSettings
    from eckart.recipe import InspectSettings as InspectSettings
    from eckart.recipe import RecoverSettings as RecoverSettings
    from eckart.recipe import SearchSettings as SearchSettings
    from eckart.recovery import Recovery as Recovery
    from eckart.recovery import recover as recover
    from eckart.repairing import Repair as Repair
    from eckart.repairing import repair as repair
    from eckart.report import write_report as write_report
    from eckart.results import Measurement as Measurement
    from eckart.scoring import evaluate as evaluate
    from eckart.sources import open_task as open_task
    from eckart.spectra import read_inspection as read_inspection
    from eckart.surgery import applied as applied
    from eckart.surgery import apply_ as apply_
    from eckart.surgery import check_plan as check_plan
    from eckart.surgery import make_edit as make_edit
    from eckart.surgery import make_edit_by_rule as make_edit_by_rule
    from eckart.tasks import Example as Example
    from eckart.tasks import Task as Task
    from eckart.tasks import make_task as make_task
    from eckart.tasks import read_task as read_task
    from eckart.tasks import read_text as read_text


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eckart' has no attribute '{name}'")
    return getattr(importlib.import_module(f"eckart.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
