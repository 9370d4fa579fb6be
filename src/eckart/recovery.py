"""Short training that wins back what low rank cost, at unchanged size: factors or LoRA, from several starts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.dataflow import evaluating, low_rank_layers
from eckart.distillation import keeps_cache, sample
from eckart.encoding import model_kind
from eckart.errors import ModelError
from eckart.initialisation import balance_, dense_weights, initialise_, input_moments, pivot_
from eckart.linear import FactoredLinear, PivotedLinear
from eckart.quantizer import Size, replace_
from eckart.recipe import RecoverSettings
from eckart.refinement import refine_block_, stacks_of
from eckart.results import Gain, Measurement, paired_gain
from eckart.scoring import LOSS_UNIT
from eckart.tasks import Task
from eckart.training import (
    CHECKPOINT_SECONDS,
    MOMENT_WINDOWS,
    TIMED_STEPS,
    Job,
    Point,
    Progress,
    Training,
    Windows,
    measured,
    planned_steps,
    read_state,
    spread,
    write_state,
)

START, SAMPLED = "start.safetensors", "sampled.safetensors"
BEGINNING = 16
"""One part in so many of a window that the teacher writes is text, and the rest its own."""
AT_ONCE = 16
"""Windows are written so many times as many at once as they are trained on: keys and values are about that much smaller
than what a backward pass needs."""


@dataclass(frozen=True)
class Recovery:
    """What came of a recovery."""

    curve: tuple[Point, ...]
    best_step: int
    """The step whose state was kept; 0 where training helped nothing."""
    steps: int
    """Steps that were planned."""
    stopped: bool
    """It ended early, since held-out loss rose."""
    test: dict[str, dict[str, Measurement]]
    """`before`, `after` and, with a teacher, `teacher` on the windows that prove: `loss` and `perplexity`."""
    gain: Gain
    """Loss after minus before, paired by windows; negative is better."""
    teacher_gain: Gain | None
    """Loss after minus the teacher's."""
    adapter: Size | None
    """Of the adapter that was left beside the model; None where all was merged."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For results.json."""
    peft: Any = None
    """The adapter as a `PeftModel` around the model, where it was not merged."""


def recover(
    model: nn.Module,
    tokenizer: Any,
    text: Task,
    settings: RecoverSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    state: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Recovery:
    """Train the factors of a model on text, at unchanged rank.

    The state with the lowest held-out loss is kept, the untrained one among them, so that a recovery does not make
    the held-out loss worse.

    Args:
        model: A causal language model with low-rank layers. Modified: its factors; size, dtypes and storage stay.
        tokenizer: Its tokenizer.
        text: Documents; at least three windows of tokens.
        settings: How; by default as the command line does.
        teacher: The model before compression. Needed for loss `kl` and `both`, for every initialisation but
            `zero`, and to write windows (`sampled`). Not modified.
        state: Folder for what resuming needs. Where it holds an unfinished recovery with the same settings, weights
            and text, that goes on. None keeps nothing, and computes the teacher's predictions again in each epoch.
        progress: Called after each step.

    Returns:
        What was measured. The windows of `test` took no part in training or choosing.

    Raises:
        ModelError: The model is not causal or has no low-rank layers, or the teacher does not fit.
        TaskError: The text is too short, or a window longer than the context.
        OutputError: `state` holds another recovery, or cannot be written.

    Source:
        Distillation: Hinton et al. 2015, arXiv 1503.02531. Training both factors after truncation, and LoRA on each
        of them: SVD-LLM, arXiv 2403.07378. Initialisations: `eckart.initialisation`.
    """
    settings = settings or RecoverSettings()
    check(model, tokenizer, settings, teacher)
    job = Job(model, tokenizer, text, settings, teacher, state, progress)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    given: dict[str, PivotedLinear] = {}
    try:
        with evaluating(model), evaluating(teacher) if teacher is not None else nullcontext():
            return _recover(job, dtypes, given)
    except BaseException:
        replace_(model, given)
        raise
    finally:
        for name, parameter in _named(model):
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
            parameter.requires_grad_(flags.get(name, False))
            parameter.grad = None


def _counts(windows: Windows) -> dict[str, int]:
    return {name: len(getattr(windows, name)) for name in ("train", "held_out", "test")}


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names they have without adapters."""
    for name, parameter in model.named_parameters():
        yield name.replace(".base_layer.", "."), parameter


def check(model: nn.Module, tokenizer: Any, settings: RecoverSettings, teacher: nn.Module | None) -> None:
    """Check that a model can be recovered, before anything is computed.

    Args:
        model: As for `recover`.
        tokenizer: Its tokenizer.
        settings: As for `recover`.
        teacher: As for `recover`.

    Raises:
        ModelError: It cannot, or not with this teacher.
    """
    if not low_rank_layers(model):
        raise ModelError(
            f"{type(model).__name__} has no low-rank layers. Recovery trains the factors of a compressed model. "
            "Give the model/ folder that eckart compress or eckart apply wrote."
        )
    if model_kind(model, tokenizer) != "causal":
        raise ModelError(
            f"{type(model).__name__} does not predict the next token. Recovery learns from text by predicting it. "
            "Recover a causal language model."
        )
    needs = {
        f"loss '{settings.loss}'": settings.loss != "lm",
        f"init '{settings.init}'": settings.init != "zero",
        f"sampled {settings.sampled}": settings.sampled > 0,
    }
    asked = next((setting for setting, needed in needs.items() if needed), None)
    if teacher is None and asked is not None:
        raise ModelError(
            f"There is no teacher, and {asked} needs one. A teacher is the model before it was compressed. "
            "Give --teacher MODEL, or --loss lm with --init zero and --sampled 0."
        )
    if teacher is not None and settings.sampled and not keeps_cache(teacher):
        raise ModelError(
            f"The teacher, a {type(teacher).__name__}, keeps no keys and values of what it read. Without them, every "
            "token that it writes would cost a reading of the whole window. Leave --sampled out."
        )
    if teacher is not None and (settings.loss != "lm" or settings.sampled):
        ours, theirs = (int(m.config.get_text_config().vocab_size) for m in (model, teacher))  # pyright: ignore
        if ours != theirs:
            raise ModelError(
                f"The teacher has a vocabulary of {theirs} tokens and the model one of {ours}. The model learns its "
                "predictions token by token. Give the model that was compressed, or --loss lm with --sampled 0."
            )
    if settings.method == "lora":
        try:
            import peft  # noqa: F401
        except ImportError:
            raise ModelError(
                "Method 'lora' needs the package peft, which is not installed. Method 'factors' needs nothing more. "
                "Install it with: pip install 'eckart[recover]'"
            ) from None
        if not _inner_linears(model):
            raise ModelError(
                f"No low-rank layer of {type(model).__name__} holds linear layers, as those of experts do not. LoRA "
                "adapts linear layers. Use --method factors."
            )


def _recover(job: Job, dtypes: Mapping[str, torch.dtype], given: dict[str, PivotedLinear]) -> Recovery:
    settings, model, teacher = job.settings, job.model, job.teacher
    started = time.perf_counter()
    for module in (model, teacher):
        for parameter in module.parameters() if module is not None else ():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(getattr(torch, settings.precision))
    for parameter in factors_of(model).values():
        parameter.data = parameter.data.float()  # a small step would be rounded away in half precision
    losses = _started(job, given)
    windows, sampling = job.windows, 0.0
    if settings.sampled:
        written, sampling = _written(job)
        job.windows = replace(windows, train=torch.cat((windows.train, written)), sampled=len(written))
    adapter = _adapted(job) if settings.method == "lora" else None
    trained = (
        factors_of(model)
        if adapter is None
        else {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    )
    for weight in trained.values():
        weight.requires_grad_(True)
    trained_numbers = sum(weight.numel() for weight in trained.values())
    run = Training(job, trained)
    prepared = time.perf_counter()
    with _checkpointing(model, settings.gradient_checkpointing):
        run.train()
    run.keep_best()
    if run.best_step or settings.refine or settings.init != "zero":
        pivot_(model, given)
    else:
        replace_(model, given)
    if adapter is not None and not settings.adapter:
        adapter.merge_and_unload()
        adapter = None
    for name, parameter in _named(model):  # what is measured is what is saved
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype)).to(parameter.dtype)
    after = job.losses(model, job.windows.test)
    before, theirs = losses["before"], losses.get("teacher")
    test = {name: measured(found, settings.window) for name, found in (losses | {"after": after}).items()}
    seconds = run.seconds | {"prepare": prepared - started, "sample": sampling}
    return Recovery(
        curve=tuple(run.curve),
        best_step=run.best_step,
        steps=run.steps,
        stopped=run.stopped,
        test=test,
        gain=paired_gain(before, after, LOSS_UNIT, seed=settings.seed),
        teacher_gain=None if theirs is None else paired_gain(theirs, after, LOSS_UNIT, seed=settings.seed),
        adapter=None if adapter is None else Size(trained_numbers, 4 * trained_numbers),
        facts={
            "windows": _counts(windows) | {"sampled": settings.sampled},
            "trained": trained_numbers,
            "cache_bytes": run.cache_bytes,
            "processes": job.accelerator.num_processes,
            "seconds": seconds,
        },
        peft=adapter,
    )


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """List what recovery trains: the factors of every low-rank layer, not its bias.

    Args:
        model: A model with low-rank layers. Not modified.

    Returns:
        Parameter's name -> parameter, in the model's order.
    """
    return {
        f"{path}.{name}": parameter
        for path, layer in low_rank_layers(model).items()
        for name, parameter in layer.named_parameters()
        if parameter.ndim >= 2 and parameter.numel()
    }


def _inner_linears(model: nn.Module) -> list[str]:
    """The linear layers inside low-rank ones, by name."""
    return [
        f"{path}.{name}"
        for path, layer in low_rank_layers(model).items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel()
    ]


# Before training: measure, initialise, refine, which lies in one file afterwards; and let the teacher write.


def _started(job: Job, given: dict[str, PivotedLinear]) -> dict[str, NDArray[np.float64]]:
    """Bring the model to where training starts; give its losses and the teacher's on the windows that prove.

    Pivoted layers whose factors are to be trained move into `given`, and balanced ones into their places.
    """
    settings, model, teacher = job.settings, job.model, job.teacher
    stacks = stacks_of(model) if settings.refine else []
    kept = read_state(job, START)
    losses: dict[str, NDArray[np.float64]] = {}
    if kept is None:
        losses["before"] = job.losses(model, job.windows.test)
        if teacher is not None:
            losses["teacher"] = job.losses(teacher, job.windows.test)
    if settings.method == "factors":
        given.update(balance_(model))
    if kept is None:
        if settings.init != "zero":
            assert teacher is not None
            job.progress(Progress("initialising", 0, 1))
            chosen = job.chunks(spread(job.windows.train, MOMENT_WINDOWS))
            paths = list(low_rank_layers(model))
            moments = input_moments(teacher, paths, chosen) if settings.init == "output-residual" else None
            initialise_(model, dense_weights(model, teacher), settings.rank, moments)
        done = 0
        write_state(job, START, _layer_tensors(model), {"refined": 0, "losses": _listed(losses)})
    else:
        tensors, facts = kept
        for path, layer in low_rank_layers(model).items():
            layer.load_state_dict({name: tensors[f"{path}.{name}"] for name in layer.state_dict()})
        losses = {name: np.array(values) for name, values in facts["losses"].items()}
        done = facts["refined"]
    blocks = [block for stack in stacks for block in stack]
    for number, block in enumerate(blocks[done:], done):
        assert teacher is not None
        job.progress(Progress("refining", number, len(blocks)))
        windows = spread(job.windows.train, MOMENT_WINDOWS)
        refine_block_(model, teacher, block, windows, settings, seed=settings.seed + number)
        write_state(job, START, _layer_tensors(model), {"refined": number + 1, "losses": _listed(losses)})
    return losses


def _beginnings(job: Job) -> Sequence[Tensor]:
    """What windows begin with that the teacher will write, divided into those that it writes at once.

    They come from training windows alone, none taken again before all others were.
    """
    settings, text = job.settings, job.windows.train
    generator = torch.Generator().manual_seed(settings.seed)
    passes = -(-settings.sampled // len(text))
    order = torch.cat([torch.randperm(len(text), generator=generator) for _ in range(passes)])[: settings.sampled]
    at_once = max(1, AT_ONCE * settings.batch_tokens // settings.window)
    return text[order, : max(1, settings.window // BEGINNING)].split(at_once)


def _written(job: Job) -> tuple[Tensor, float]:
    """Windows that the teacher wrote, on the CPU, and the seconds it took; of several processes, the first asks it."""
    assert job.teacher is not None
    chunks, device = _beginnings(job), next(job.teacher.parameters()).device
    writes = job.state is None or job.accelerator.is_main_process
    if not writes:
        job.accelerator.wait_for_everyone()
    kept = read_state(job, SAMPLED)
    parts, facts = ([], {"chunks": 0, "seconds": 0.0}) if kept is None else ([kept[0]["windows"].long()], kept[1])
    saved = looked = time.perf_counter()
    for number in range(facts["chunks"], len(chunks)):
        job.progress(Progress("sampling", sum(map(len, chunks[:number])), job.settings.sampled))
        seed = job.settings.seed * 1_000_003 + number
        with job.autocast:
            parts.append(sample(job.teacher, chunks[number].to(device), job.settings.window, seed=seed).cpu())
        now = time.perf_counter()
        facts = {"chunks": number + 1, "seconds": facts["seconds"] + now - looked}
        looked = now
        if number + 1 == len(chunks) or now - saved > CHECKPOINT_SECONDS:
            write_state(job, SAMPLED, {"windows": torch.cat(parts).int()}, facts)
            saved = now
    if writes:
        job.accelerator.wait_for_everyone()
    return torch.cat(parts), facts["seconds"]


def _listed(losses: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {name: found.tolist() for name, found in losses.items()}


def _layer_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, layer in low_rank_layers(model).items()
        for name, tensor in layer.state_dict().items()
    }


def _adapted(job: Job) -> Any:
    """Put LoRA adapters on the linear layers inside low-rank ones."""
    import peft

    settings, model = job.settings, job.model
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.0, target_modules=_inner_linears(model)
    )
    devices = [job.device] if job.device.type == "cuda" else []
    named: Any = model
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(settings.seed)
        adapter = peft.get_peft_model(named, config)
    if settings.init != "zero":
        for layer in low_rank_layers(model).values():
            _adapt_last_(layer, settings.rank)
    return adapter


@torch.no_grad()
def _adapt_last_(layer: nn.Module, rank: int) -> None:
    """Let the adapters of a factored layer begin with its last components, which `initialise_` made.

    They add nothing yet, since one matrix of each pair is zero; the other selects these columns of `up` or rows of
    `down`. A pivoted layer's factors have no last components, and keep the usual start.
    """
    if not isinstance(layer, FactoredLinear):
        return
    up, down = (getattr(layer, name) for name in ("up", "down"))
    size = min(rank, down.out_features)
    last = torch.eye(size, device=layer.weight.device)
    up.lora_A["default"].weight.zero_()[:size, -size:] = last
    down.lora_B["default"].weight.zero_()[-size:, :size] = last
    down.lora_A["default"].weight.zero_()


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Compute activations again in the backward pass, without the dropout of training mode."""
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"{type(model).__name__} does not support gradient checkpointing in transformers. It saves memory and "
            "changes no result. Leave --gradient-checkpointing out."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames these two, from version to version
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    holders = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in holders:
        module.training = True  # of this module alone, not of the attention or dropout in it
    try:
        yield
    finally:
        for module in holders:
            module.training = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_disable()


def forecast_recovery(
    model: nn.Module, tokenizer: Any, text: Task, settings: RecoverSettings, teacher: nn.Module | None = None
) -> dict[str, Any]:
    """Say what a recovery would do and take, from a few steps that are measured and not taken.

    Args:
        model: As for `recover`. Afterwards as before.
        tokenizer: Its tokenizer.
        text: As for `recover`.
        settings: As for `recover`.
        teacher: As for `recover`.

    Returns:
        Windows, steps, epochs, parameters that are trained, forecast seconds, and bytes of weights and optimizer.

    Raises:
        EckartError: As `recover` would.
    """
    check(model, tokenizer, settings, teacher)
    job = Job(model, tokenizer, text, settings, teacher)
    given = balance_(model) if settings.method == "factors" else {}
    weights = factors_of(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), evaluating(teacher) if teacher is not None else nullcontext():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            writing = _writing_time(job) if settings.sampled else 0.0
            run = Training.__new__(Training)
            run.job, run.weights = job, weights
            optimizer = torch.optim.AdamW(weights.values())
            run.student, run.optimizer = job.accelerator.prepare(model, optimizer)
            each = run.time()
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None
            job.accelerator.free_memory()
            replace_(model, given)
    steps = settings.steps if settings.minutes is None else planned_steps(settings, each, len(job.windows.held_out))
    looks = (1 + settings.evaluations) * len(job.windows.held_out) / settings.batch / 3
    epoch_steps = max(1, (len(job.windows.train) + settings.sampled) // settings.batch)
    trained = sum(weight.numel() for weight in weights.values())
    held = sum(parameter.nbytes for module in (model, teacher) if module for parameter in module.parameters())
    return {
        "windows": _counts(job.windows) | {"sampled": settings.sampled},
        "steps": steps,
        "epochs": round(steps / epoch_steps, 2),
        "factor_parameters": trained,
        "seconds": round(writing + each * (steps + looks), 1),
        "bytes": held + 4 * 4 * trained,  # gradients, two moments, the best state
    }


def _writing_time(job: Job) -> float:
    """Forecast the seconds in which the teacher writes its windows, from the first tokens of the first ones."""
    assert job.teacher is not None
    chunks = _beginnings(job)
    ids, wanted = chunks[0].to(next(job.teacher.parameters()).device), job.settings.window - chunks[0].shape[1]
    taken = []
    for tokens in (1, 1, 1 + TIMED_STEPS):  # the first one is slower
        started = time.perf_counter()
        with job.autocast:
            sample(job.teacher, ids, ids.shape[1] + tokens)
        taken.append(time.perf_counter() - started)
    return len(chunks) * (taken[1] + (wanted - 1) * (taken[2] - taken[1]) / TIMED_STEPS)
