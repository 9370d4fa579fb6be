"""A recovery's folder: resumed, and filled so that results.json is there only when all the rest is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from eckart.checkpoint import check_empty, load_model, load_tokenizer, new_folder, save
from eckart.errors import EckartError
from eckart.quantizer import sizes
from eckart.recipe import RecoverSettings, write_recipe
from eckart.recovery import Recovery, forecast_recovery, recover
from eckart.report import finish_run
from eckart.results import SCHEMA_VERSION, environment, write_text
from eckart.surgery import check_finite, weights_sha256
from eckart.tasks import read_text
from eckart.training import Progress

STATE = "state"
"""Folder of what an unfinished recovery goes on from."""
TEXT_PASSAGES = 20
"""A text of fewer documents is cut into passages: some train, others choose and prove."""


def run_recover(
    source: str,
    data: Path,
    out: Path,
    settings: RecoverSettings,
    *,
    teacher: str | None = None,
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> Recovery:
    """Recover a factored model: write `model/`, `results.json`, `report.html`, `recipe.yaml`, and `adapter/` if asked.

    In several processes (`accelerate launch`), each trains on its share of every batch and the first one writes.

    Args:
        source: Folder of the factored model.
        data: Text to learn from; documents are separated by `<|endofdoc|>`, and a single one is cut into passages.
        out: New or empty folder, or one that holds an unfinished recovery with the same settings.
        settings: The recovery's settings.
        teacher: Folder or hub id of the model before compression.
        device: As for `eckart.load`.
        progress: Called after each step.

    Returns:
        What was measured.

    Raises:
        EckartError: Bad input; a folder made for the run is removed again if nothing was measured.
    """
    state = out / STATE
    if not recovery_begun(out):
        check_empty(out)
    text = read_text(data, passages=TEXT_PASSAGES)
    model, dense, tokenizer, device = _load_pair(source, teacher, settings, device)
    try:
        found = recover(model, tokenizer, text, settings, teacher=dense, state=state, progress=progress)
    except EckartError:
        if state.is_dir() and not any(state.iterdir()):
            state.rmdir()
            out.rmdir()
        raise
    if not PartialState().is_main_process:
        return found
    for half in [out / "model", out / "adapter", *out.glob(".model-*"), *out.glob(".adapter-*")]:
        shutil.rmtree(half, ignore_errors=True)  # of a life that was killed while it wrote
    if found.peft is not None:
        with new_folder(out / "adapter") as folder:
            found.peft.peft_config["default"].base_model_name_or_path = "../model"
            found.peft.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # peft's own is a form to be filled in
        found.peft.unload()
    save(model, out / "model", tokenizer)
    write_text(out / "recipe.yaml", write_recipe(settings))
    now, dense_size = sizes(model)
    finish_run(
        out,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "recover",
            "model": {
                "source": source,
                "architecture": type(model).__name__,
                "weights_sha256": weights_sha256(model),
                "parameters": now.parameters,
            },
            "teacher": teacher,
            "data": {"name": text.name, "documents": len(text.examples)} | found.facts["windows"],
            "test": found.test,
            "gain": found.gain,
            "teacher_gain": found.teacher_gain,
            "curve": found.curve,
            "best_step": found.best_step,
            "steps": found.steps,
            "stopped": found.stopped,
            "size": {"model": now, "dense": dense_size, "adapter": found.adapter, "trained": found.facts["trained"]},
            "cache_bytes": found.facts["cache_bytes"],
            "processes": found.facts["processes"],
            "warnings": _recovery_warnings(found),
            "seconds": found.facts["seconds"],
            "environment": environment(),
            "recipe": settings.model_dump(mode="json"),
        },
    )
    shutil.rmtree(state)
    return found


def recovery_begun(out: Path) -> bool:
    """Tell whether a folder holds a recovery that was interrupted.

    Args:
        out: The folder; it need not exist.

    Returns:
        Whether it does.
    """
    return (out / STATE).is_dir() and not (out / "results.json").exists()


def forecast_recover(
    source: str, data: Path, settings: RecoverSettings, *, teacher: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Say what a recovery would do and how long it would take, from a few steps that are not taken.

    Args:
        source: As for `run_recover`.
        data: As for `run_recover`.
        settings: As for `run_recover`.
        teacher: As for `run_recover`.
        device: As for `eckart.load`.

    Returns:
        As of `eckart.recovery.forecast_recovery`.

    Raises:
        EckartError: Bad input.
    """
    text = read_text(data, passages=TEXT_PASSAGES)
    model, dense, tokenizer, _ = _load_pair(source, teacher, settings, device)
    return forecast_recovery(model, tokenizer, text, settings, dense)


def _load_pair(source: str, teacher: str | None, settings: RecoverSettings, device: str) -> tuple[Any, Any, Any, str]:
    """Load a factored model, its teacher and its tokenizer, each process of several on its own device."""
    if device == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = load_model(source, device=device, dtype="stored")
    check_finite(model)
    dense = None if teacher is None else load_model(teacher, device=device, dtype=settings.precision)
    return model, dense, load_tokenizer(source), device


def _recovery_warnings(found: Recovery) -> list[str]:
    warnings = []
    if found.best_step == 0 and found.steps:
        warnings.append(
            "No step of the training lowered the loss on held-out text, so the factors are those it started from. "
            "Try a smaller learning rate or more text."
        )
    if found.gain.interval[1] > 0 and found.steps:
        warnings.append("On the windows that prove, the interval of the gain includes none: it may be chance.")
    return warnings
