"""Short training that wins back what low rank cost, at unchanged size.

Text is divided into windows of equal length: most train, some are held out and choose the state that is kept, and
others, which took no part in either, prove. Every random choice follows from the seed and the step, and nothing else
is random (models train without dropout), so that training can stop anywhere and go on from a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.dataflow import evaluating, low_rank_layers
from eckart.distillation import Predictions, Shelf, divergence, predict
from eckart.encoding import context_length, model_kind, prompt_tokens
from eckart.errors import EckartError, ModelError, OutputError, TaskError
from eckart.initialisation import dense_weights, initialise_, input_moments
from eckart.linear import FactoredLinear, PivotedLinear
from eckart.quantizer import Size, sizes
from eckart.recipe import RecoverSettings
from eckart.refinement import refine_block_, stacks_of
from eckart.results import Gain, Measurement, paired_gain, perplexity
from eckart.scoring import LOSS_UNIT
from eckart.tasks import Task

HELD_OUT_WINDOWS, TEST_WINDOWS, MOMENT_WINDOWS = 64, 256, 128
"""Most windows that choose, that prove, and that input moments and block outputs are taken from."""
CHECKPOINT_SECONDS = 30.0
LOWEST_RATE = 0.1
"""Share of the learning rate that the cosine ends at."""
TIMED_STEPS = 3
START, STATE = "start.safetensors", "state.safetensors"


@dataclass(frozen=True)
class Windows:
    """A text as rows of tokens."""

    train: Tensor
    """Shape (n, window), int64, on the CPU."""
    held_out: Tensor
    test: Tensor


@dataclass(frozen=True)
class Point:
    """One point of the learning curve."""

    step: int
    epoch: float
    train_loss: float | None
    """Mean of what was minimised since the last point."""
    held_out: Measurement
    """Mean loss on held-out windows, in nats per token."""
    seconds: float
    """Of training so far, in all lives of the run."""


@dataclass(frozen=True)
class Progress:
    """How far a recovery is."""

    stage: str
    done: int
    total: int
    held_out: Measurement | None = None


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
    size: Size
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
        teacher: The model before compression. Needed for loss `kl` and `both` and for every initialisation but
            `zero`. Not modified.
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
    job = _Job(model, tokenizer, text, settings, teacher, state, progress)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with evaluating(model), evaluating(teacher) if teacher is not None else nullcontext():
            return _recover(job, dtypes)
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
            parameter.grad = None


class _Job:
    """What one recovery works with, checked."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: Task,
        settings: RecoverSettings,
        teacher: nn.Module | None,
        state: Path | None = None,
        progress: Callable[[Progress], None] | None = None,
    ):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        check(model, tokenizer, settings, teacher)
        self.model, self.teacher, self.settings, self.state = model, teacher, settings, state
        self.progress = progress or (lambda _: None)
        self.windows = make_windows(text, tokenizer, settings, context_length(model, tokenizer))
        self.device = next(model.parameters()).device
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # experts that no token was sent to
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[unused])
        count = self.accelerator.num_processes
        if settings.batch % count:
            raise TaskError(
                f"A batch of {settings.batch} windows cannot be shared equally by {count} processes. Each process "
                f"trains on as many windows as the others. Make --batch a multiple of {count}."
            )
        if state is not None and self.accelerator.is_main_process:
            state.mkdir(parents=True, exist_ok=True)
        self.fingerprint = _fingerprint(model, teacher, self.windows, settings)

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over the training windows; what does not fill a batch waits for another order."""
        return max(1, len(self.windows.train) // self.settings.batch)

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """Half precision for products, if it was asked for."""
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def chunks(self, rows: Tensor) -> Sequence[Tensor]:
        """Divide windows, or their indices, into what is read at once."""
        return rows.split(max(1, self.settings.batch_tokens // self.settings.window))

    def losses(self, model: nn.Module, windows: Tensor) -> NDArray[np.float64]:
        """Mean loss of each window."""
        return window_losses(model, self.chunks(windows), self.autocast)


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
    if teacher is None and (settings.loss != "lm" or settings.init != "zero"):
        asked = f"loss '{settings.loss}'" if settings.loss != "lm" else f"init '{settings.init}'"
        raise ModelError(
            f"There is no teacher, and {asked} needs one. A teacher is the model before it was compressed. "
            "Give --teacher MODEL, or --loss lm with --init zero."
        )
    if teacher is not None and settings.loss != "lm":
        ours, theirs = (int(m.config.get_text_config().vocab_size) for m in (model, teacher))  # pyright: ignore
        if ours != theirs:
            raise ModelError(
                f"The teacher has a vocabulary of {theirs} tokens and the model one of {ours}. Predictions are compared "
                "token by token. Give the model that was compressed, or --loss lm."
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


def make_windows(text: Task, tokenizer: Any, settings: RecoverSettings, context: int | None) -> Windows:
    """Tokenise documents and cut them into windows that train, choose and prove, none of which share a document.

    Documents are shuffled and joined; the last, incomplete window of each part is dropped.

    Args:
        text: The documents.
        tokenizer: A transformers tokenizer; the special tokens that it puts in front stay.
        settings: `window`, `held_out` (the share that chooses, and again that proves) and `seed`.
        context: Longest window that the model reads; None for no limit.

    Returns:
        The windows, on the CPU.

    Raises:
        TaskError: The text is too short, is no text, or a window does not fit.
    """
    if text.kind != "text":
        raise TaskError(
            f"{text.name} holds labelled examples. Recovery learns from text. Give a text file, or lines with 'text'."
        )
    if context is not None and settings.window > context:
        raise TaskError(
            f"A window of {settings.window} tokens does not fit the model. Its context is {context} tokens. "
            "Use a shorter --window."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # documents are longer than a context, and are cut here
        found = prompt_tokens([example.prompt for example in text.examples], tokenizer)
    order = random.Random(settings.seed).sample(found, len(found))  # noqa: S311 - not for secrets
    wanted = max(settings.window, settings.held_out * sum(map(len, found)))
    parts: list[list[int]] = [[], [], []]
    for document in order:
        part = next((part for part in parts[:2] if len(part) < wanted), parts[2])
        part.extend(document)
    rows = [torch.tensor(part[: len(part) // settings.window * settings.window]) for part in parts]
    held_out, test, train = (part.long().reshape(-1, settings.window) for part in rows)
    if not len(train):
        raise TaskError(
            f"{text.name} has {len(found)} documents of {sum(map(len, found))} tokens, too few. Training, choosing and "
            f"proving need documents of at least {settings.window} tokens each. Give more text, or a shorter --window."
        )
    return Windows(train, _spread(held_out, HELD_OUT_WINDOWS), _spread(test, TEST_WINDOWS))


def _spread(windows: Tensor, most: int) -> Tensor:
    return windows[torch.arange(min(most, len(windows))) * len(windows) // min(most, len(windows))]


@torch.no_grad()
def window_losses(
    model: nn.Module, batches: Sequence[Tensor], autocast: AbstractContextManager[Any] | None = None
) -> NDArray[np.float64]:
    """Measure how well a model predicts windows of text.

    Args:
        model: A causal language model in evaluation mode. Not modified.
        batches: Token ids, each of shape (windows, tokens).
        autocast: Context to run in.

    Returns:
        Mean loss of each window over all its tokens but the first, in nats per token.
    """
    called: Any = model
    device = next(model.parameters()).device
    found = []
    for ids in batches:
        ids = ids.to(device)
        with autocast or nullcontext():
            logits = called(input_ids=ids, use_cache=False).logits
        losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        found.append(losses.double().mean(1).cpu().numpy())
    return np.concatenate(found)


def _measured(losses: NDArray[np.float64], window: int) -> dict[str, Measurement]:
    ratio = perplexity(losses, np.full(len(losses), window - 1))
    return {"loss": _loss(losses, window), "perplexity": ratio}


def _loss(losses: NDArray[np.float64], window: int) -> Measurement:
    ratio = perplexity(losses, np.full(len(losses), window - 1))
    return Measurement(math.log(ratio.value), ratio.stderr / ratio.value, ratio.count, LOSS_UNIT)


def _recover(job: _Job, dtypes: Mapping[str, torch.dtype]) -> Recovery:
    settings, model, teacher = job.settings, job.model, job.teacher
    started = time.perf_counter()
    for module in (model, teacher):
        for parameter in module.parameters() if module is not None else ():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(getattr(torch, settings.precision))
    for parameter in factors_of(model).values():
        parameter.data = parameter.data.float()  # a small step would be rounded away in half precision
    losses = _started(job)
    adapter = _adapted(job) if settings.method == "lora" else None
    trained = (
        factors_of(model)
        if adapter is None
        else {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    )
    for weight in trained.values():
        weight.requires_grad_(True)
    run = _Run(job, trained)
    prepared = time.perf_counter()
    with _checkpointing(model, settings.gradient_checkpointing):
        run.train()
    run.keep_best()
    size, _ = sizes(model)
    charged = None
    if adapter is not None and settings.adapter:
        charged = Size(sum(w.numel() for w in trained.values()), sum(w.nbytes for w in trained.values()))
        size = Size(size.parameters - charged.parameters, size.bytes - charged.bytes)
    elif adapter is not None:
        adapter.merge_and_unload()
        adapter = None
    for name, parameter in model.named_parameters():  # what is measured is what is saved
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype)).to(parameter.dtype)
    after = job.losses(model, job.windows.test)
    before, theirs = losses["before"], losses.get("teacher")
    test = {name: _measured(found, settings.window) for name, found in (losses | {"after": after}).items()}
    seconds = run.seconds | {"prepare": prepared - started}
    return Recovery(
        curve=tuple(run.curve),
        best_step=run.best_step,
        steps=run.steps,
        stopped=run.stopped,
        test=test,
        gain=paired_gain(before, after, LOSS_UNIT, seed=settings.seed),
        teacher_gain=None if theirs is None else paired_gain(theirs, after, LOSS_UNIT, seed=settings.seed),
        size=size if adapter is not None else _size_at(model, dtypes),
        adapter=charged,
        facts={
            "windows": {name: len(getattr(job.windows, name)) for name in ("train", "held_out", "test")},
            "trained": sum(weight.numel() for weight in trained.values()),
            "cache_bytes": run.cache_bytes,
            "processes": job.accelerator.num_processes,
            "seconds": seconds,
        },
        peft=adapter,
    )


def _size_at(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Size:
    now, _ = sizes(model)
    widened = sum(p.numel() * (p.itemsize - dtypes.get(n, p.dtype).itemsize) for n, p in model.named_parameters())
    return Size(now.parameters, now.bytes - widened)


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


# Before training: measure, initialise, refine. All of it lies in one file afterwards.


def _started(job: _Job) -> dict[str, NDArray[np.float64]]:
    """Bring the model to where training starts; give the losses on the windows that prove, before and of the teacher."""
    settings, model, teacher = job.settings, job.model, job.teacher
    stacks = stacks_of(model) if settings.refine else []
    kept = _read(job, START)
    if kept is None:
        losses = {"before": job.losses(model, job.windows.test)}
        if teacher is not None:
            losses["teacher"] = job.losses(teacher, job.windows.test)
        if settings.init != "zero":
            assert teacher is not None
            job.progress(Progress("initialising", 0, 1))
            chosen = job.chunks(_spread(job.windows.train, MOMENT_WINDOWS))
            paths = list(low_rank_layers(model))
            moments = input_moments(teacher, paths, chosen) if settings.init == "output-residual" else None
            initialise_(model, dense_weights(model, teacher), settings.rank, moments)
        done = 0
        _write(job, START, _layer_tensors(model), {"refined": 0, "losses": _listed(losses)})
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
        windows = _spread(job.windows.train, MOMENT_WINDOWS)
        refine_block_(model, teacher, block, windows, settings, seed=settings.seed + number)
        _write(job, START, _layer_tensors(model), {"refined": number + 1, "losses": _listed(losses)})
    return losses


def _listed(losses: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {name: found.tolist() for name, found in losses.items()}


def _layer_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, layer in low_rank_layers(model).items()
        for name, tensor in layer.state_dict().items()
    }


def _adapted(job: _Job) -> Any:
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
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    holders = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in holders:
        module.training = True  # of this module alone, not of the attention or dropout in it
    try:
        yield
    finally:
        for module in holders:
            module.training = False
        model.gradient_checkpointing_disable()


class _Run:
    """Training: its position, and what a file holds of it."""

    def __init__(self, job: _Job, weights: Mapping[str, nn.Parameter]):
        self.job, self.weights = job, dict(weights)
        settings = job.settings
        self.step, self.curve, self.stopped = 0, [], False
        self.summed = [0.0, 0]
        self.best_step, self.best_loss = 0, math.inf
        self.best = self._copies()
        self.seconds = {"train": 0.0, "teacher": 0.0}
        self.cache_bytes = 0
        optimizer = torch.optim.AdamW(self.weights.values(), lr=settings.lr, weight_decay=0.0)
        self.student, self.optimizer = job.accelerator.prepare(job.model, optimizer)
        kept = _read(job, STATE)
        if kept is not None:
            self._load(*kept)
        else:
            self.steps = settings.steps
            if settings.minutes is not None:
                self.steps = planned_steps(settings, self.time(), len(job.windows.held_out))
            self.evaluate(None)
            self.save()
        self.shelf = self._shelf()

    @property
    def every(self) -> int:
        """Steps between two looks at the held-out windows."""
        return max(1, -(-self.steps // self.job.settings.evaluations))

    def train(self) -> None:
        """Train to the end."""
        saved, looked = time.perf_counter(), time.perf_counter()
        while self.step < self.steps and not self.stopped:
            loss = self.descend()
            self.step += 1
            self.summed = [self.summed[0] + loss, self.summed[1] + 1]
            look = self.step % self.every == 0 or self.step == self.steps
            now = time.perf_counter()
            self.seconds["train"] += now - looked
            looked = now
            if look:
                self.evaluate(self.summed[0] / self.summed[1])
                self.summed = [0.0, 0]
            if look or now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.perf_counter()
            self.job.progress(Progress("training", self.step, self.steps, self.curve[-1].held_out))

    def descend(self) -> float:
        """Take one step of AdamW; give the loss before it."""
        settings, accelerator = self.job.settings, self.job.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * rate_at(self.step, self.steps, settings)
        total = self.accumulate(self.batch(self.step))
        accelerator.clip_grad_norm_(self.weights.values(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(accelerator.reduce(total, reduction="mean"))

    def accumulate(self, rows: Tensor) -> Tensor:
        """Add up gradients over the windows of this process."""
        job = self.job
        total = torch.zeros((), device=job.device)
        chunks = job.chunks(rows)
        for number, part in enumerate(chunks):
            last = number == len(chunks) - 1
            with nullcontext() if last else job.accelerator.no_sync(self.student), job.autocast:
                loss = self.loss(part) * (len(part) / len(rows))
            with nullcontext() if last else job.accelerator.no_sync(self.student):
                job.accelerator.backward(loss)
            total += loss.detach()
        return total

    def loss(self, rows: Tensor) -> Tensor:
        """What is minimised, for some training windows."""
        job, settings = self.job, self.job.settings
        ids = job.windows.train[rows].to(job.device)
        student: Any = self.student
        logits = student(input_ids=ids, use_cache=False).logits
        with torch.autocast(job.device.type, enabled=False):
            modelled = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            if settings.loss == "lm":
                return modelled
            distance = divergence(logits, self.predictions(rows, ids))
            return distance if settings.loss == "kl" else distance + settings.lm_weight * modelled

    def predictions(self, rows: Tensor, ids: Tensor) -> Predictions:
        """The teacher's, from the shelf or computed again."""
        assert self.job.teacher is not None
        if self.shelf is not None:
            return self.shelf.read(rows, self.job.device)
        with self.job.autocast:
            return predict(self.job.teacher, ids)

    def batch(self, step: int) -> Tensor:
        """Indices of the windows of one step that this process trains on."""
        settings, accelerator = self.job.settings, self.job.accelerator
        epoch, position = divmod(step, self.job.epoch_steps)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.job.windows.train), generator=generator)
        rows = order[position * settings.batch : (position + 1) * settings.batch]
        if len(rows) < settings.batch:  # fewer windows than a batch: some come twice
            rows = order.repeat(-(-settings.batch // len(order)))[: settings.batch]
        return rows[accelerator.process_index :: accelerator.num_processes]

    def _shelf(self) -> Shelf | None:
        """Lay the teacher's predictions down, where they are needed again and fit."""
        job, settings = self.job, self.job.settings
        if job.teacher is None or settings.loss == "lm" or job.state is None or self.steps <= job.epoch_steps:
            return None
        vocabulary = _vocabulary(job.teacher)
        k = min(settings.teacher_top or vocabulary, vocabulary)
        shape, whole = (*job.windows.train.shape, k), k == vocabulary
        if Shelf.bytes(shape, whole=whole) > settings.cache_bytes:
            return None
        self.cache_bytes = Shelf.bytes(shape, whole=whole)
        shelf = Shelf(job.state, shape, whole=whole)
        if not shelf.filled and job.accelerator.is_main_process:
            started = time.perf_counter()
            job.progress(Progress("asking the teacher", 0, 1))
            device = next(job.teacher.parameters()).device
            with job.autocast:
                top = None if whole else k
                shelf.fill(predict(job.teacher, ids.to(device), top) for ids in job.chunks(job.windows.train))
            self.seconds["teacher"] += time.perf_counter() - started
        job.accelerator.wait_for_everyone()
        return shelf

    def evaluate(self, train_loss: float | None) -> None:
        """Look at the held-out windows, and keep the state if it is the best."""
        job = self.job
        held_out = _loss(job.losses(job.model, job.windows.held_out), job.settings.window)
        epoch = self.step / job.epoch_steps
        self.curve.append(Point(self.step, epoch, train_loss, held_out, self.seconds["train"]))
        if held_out.value < self.best_loss:
            self.best_step, self.best_loss, self.best = self.step, held_out.value, self._copies()
        later = sum(point.step > self.best_step for point in self.curve)
        patience = job.settings.patience
        # A loss that is not finite cannot come back.
        self.stopped = (patience is not None and later >= patience) or not math.isfinite(held_out.value)

    @torch.no_grad()
    def keep_best(self) -> None:
        """Go back to the best state."""
        for name, weight in self.weights.items():
            weight.copy_(self.best[name])
        self.job.accelerator.free_memory()

    def time(self) -> float:
        """Measure a step, without taking it."""
        self.steps, self.shelf = 1, None
        for number in range(1 + TIMED_STEPS):  # the first one is slower
            if number == 1:
                started = time.perf_counter()
            self.accumulate(self.batch(number))
            self.optimizer.zero_grad()
        return (time.perf_counter() - started) / TIMED_STEPS

    def _copies(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def save(self) -> None:
        """Write all that resuming needs."""
        tensors = {f"now.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        moments = self.optimizer.state
        for name, weight in self.weights.items():
            tensors |= {f"{key}.{name}": moments[weight][key] for key in moments.get(weight, ())}
        facts = {
            "step": self.step,
            "steps": self.steps,
            "curve": [
                [p.step, p.epoch, p.train_loss, p.held_out.value, p.held_out.stderr, p.held_out.count, p.seconds]
                for p in self.curve
            ],
            "stopped": self.stopped,
            "summed": self.summed,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "seconds": self.seconds,
        }
        _write(self.job, STATE, tensors, facts)

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.step, self.steps, self.stopped = facts["step"], facts["steps"], facts["stopped"]
        self.summed, self.seconds = facts["summed"], facts["seconds"]
        self.best_step, self.best_loss = facts["best_step"], facts["best_loss"]
        self.curve = [
            Point(step, epoch, train, Measurement(value, error, count, LOSS_UNIT), seconds)
            for step, epoch, train, value, error, count, seconds in facts["curve"]
        ]
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"now.{name}"])
            self.best[name].copy_(tensors[f"best.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:
                place = weight.device
                self.optimizer.state[weight] = {
                    key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else place) for key in keys
                }


def rate_at(step: int, steps: int, settings: RecoverSettings) -> float:
    """Give the share of the learning rate at a step: a rise over the warm-up, then a cosine or a line down.

    Args:
        step: From 0 to `steps` - 1.
        steps: Of the whole training.
        settings: `schedule` and `warmup`.

    Returns:
        Above 0, at most 1; a cosine ends near `LOWEST_RATE`, a line near 0.

    >>> [round(rate_at(step, 10, RecoverSettings(warmup=0.2)), 2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.13]
    """
    rise = math.ceil(settings.warmup * steps)
    if step < rise:
        return (step + 1) / rise
    part = (step - rise) / max(1, steps - rise)
    if settings.schedule == "linear":
        return 1 - part
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * part)) / 2


def planned_steps(settings: RecoverSettings, seconds: float, held_out: int) -> int:
    """Turn minutes into steps, so that the schedule is known and a resumed run ends as an undisturbed one.

    Args:
        settings: `minutes`, `evaluations` and `batch`.
        seconds: Of one step, measured.
        held_out: Windows that each evaluation reads; a forward pass takes a third of a step.

    Returns:
        At least one step.
    """
    assert settings.minutes is not None
    looks = settings.evaluations * seconds / 3 * held_out / settings.batch
    return max(1, int((60 * settings.minutes - looks) / seconds))


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
    job = _Job(model, tokenizer, text, settings, teacher)
    weights = factors_of(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            run = _Run.__new__(_Run)
            run.job, run.weights = job, weights
            optimizer = torch.optim.AdamW(weights.values())
            run.student, run.optimizer = job.accelerator.prepare(model, optimizer)
            each = run.time()
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None
            job.accelerator.free_memory()
    steps = settings.steps if settings.minutes is None else planned_steps(settings, each, len(job.windows.held_out))
    looks = (1 + settings.evaluations) * len(job.windows.held_out) / settings.batch / 3
    trained = sum(weight.numel() for weight in weights.values())
    held = sum(parameter.nbytes for module in (model, teacher) if module for parameter in module.parameters())
    return {
        "windows": {name: len(getattr(job.windows, name)) for name in ("train", "held_out", "test")},
        "steps": steps,
        "epochs": round(steps / job.epoch_steps, 2),
        "factor_parameters": trained,
        "seconds": round(each * (steps + looks), 1),
        "bytes": held + 4 * 4 * trained,  # gradients, two moments, the best state
    }


# Files: tensors in safetensors, facts as JSON in its header.


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _fingerprint(model: nn.Module, teacher: nn.Module | None, windows: Windows, settings: RecoverSettings) -> str:
    digest = hashlib.sha256(settings.model_dump_json().encode() + torch.__version__.encode())
    for part in (windows.train, windows.held_out, windows.test):
        digest.update(part.numpy().tobytes())
    for module in (model, teacher):
        for name, parameter in module.named_parameters() if module is not None else ():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(job: _Job, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace a file of the state, whole or not at all."""
    if job.state is None or not job.accelerator.is_main_process:
        return
    header = {"eckart": json.dumps({"fingerprint": job.fingerprint, **facts})}
    path, part = job.state / name, job.state / f".{name}.part"
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part, header)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:  # OSError, or safetensors' own
        with suppress(OSError):
            part.unlink()
        raise OutputError(
            f"{path} could not be written: {error}. What was saved before is still there. "
            "Free space there and give the same command again."
        ) from error


def _read(job: _Job, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a file of the state, if it is there and of this recovery."""
    if job.state is None or not (job.state / name).is_file():
        return None
    path = job.state / name
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["eckart"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    except Exception as error:  # OSError, ValueError, KeyError, or safetensors' own
        raise EckartError(
            f"{path} is damaged: {error}. It is what an interrupted recovery goes on from. Remove the folder, and start again."
        ) from error
    if facts.pop("fingerprint", None) != job.fingerprint:
        raise OutputError(
            f"{job.state} holds a recovery with other settings, weights or text. It goes on with the same command only. "
            "Give that command, or choose another --out."
        )
    return tensors, facts
