"""Training on windows of text: what is read, the steps, and the files from which a training that was killed goes on.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.distillation import Predictions, Shelf, divergence, predict
from eckart.encoding import context_length, prompt_tokens
from eckart.errors import EckartError, OutputError, TaskError
from eckart.recipe import RecoverSettings
from eckart.results import Measurement, perplexity
from eckart.scoring import LOSS_UNIT
from eckart.tasks import Task

HELD_OUT_WINDOWS, TEST_WINDOWS, MOMENT_WINDOWS = 64, 256, 128
"""Most windows that choose, that prove, and that input moments and block outputs are taken from."""
CHECKPOINT_SECONDS = 30.0
LOWEST_RATE = 0.1
"""Share of the learning rate that the cosine ends at."""
TIMED_STEPS = 3
STATE = "state.safetensors"


@dataclass(frozen=True)
class Windows:
    """A text as rows of tokens."""

    train: Tensor
    """Shape (n, window), int64, on the CPU; behind those of the text any that the teacher wrote."""
    held_out: Tensor
    test: Tensor
    sampled: int = 0
    """How many of `train`, the last ones, the teacher wrote."""


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


class Job:
    """What one training works with.

    Args:
        model: As for `eckart.recover`.
        tokenizer: Its tokenizer.
        text: As for `eckart.recover`.
        settings: As for `eckart.recover`.
        teacher: As for `eckart.recover`.
        state: As for `eckart.recover`.
        progress: As for `eckart.recover`.

    Raises:
        TaskError: The text does not fit, or several processes cannot share a batch.
    """

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
    return Windows(train, spread(held_out, HELD_OUT_WINDOWS), spread(test, TEST_WINDOWS))


def spread(windows: Tensor, most: int) -> Tensor:
    """Take so many windows at most, evenly spread.

    >>> spread(torch.arange(10), 3)
    tensor([0, 3, 6])
    """
    count = min(most, len(windows))
    return windows[torch.arange(count) * len(windows) // max(1, count)]


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


def mean_loss(losses: NDArray[np.float64], window: int) -> Measurement:
    """Average the losses of windows of equal length.

    Args:
        losses: Mean loss of each window in nats per token, shape (n,).
        window: Tokens of a window, of which all but the first are scored.

    Returns:
        The mean over tokens; its standard error takes windows as independent.
    """
    ratio = perplexity(losses, np.full(len(losses), window - 1))
    return Measurement(math.log(ratio.value), ratio.stderr / ratio.value, ratio.count, LOSS_UNIT)


def measured(losses: NDArray[np.float64], window: int) -> dict[str, Measurement]:
    """Sum up the losses of windows of equal length.

    Args:
        losses: As for `mean_loss`.
        window: As for `mean_loss`.

    Returns:
        `loss` and `perplexity`.
    """
    return {"loss": mean_loss(losses, window), "perplexity": perplexity(losses, np.full(len(losses), window - 1))}


class Training:
    """Training: its position, and what a file holds of it."""

    def __init__(self, job: Job, weights: Mapping[str, nn.Parameter]):
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
        kept = read_state(job, STATE)
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
        mean: Any = accelerator.reduce(total, reduction="mean")
        return float(mean)

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
            flat = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
            each = cross_entropy(*flat, reduction="none").view(len(ids), -1).mean(1)
            if settings.loss == "lm":
                return each.mean()
            distance = divergence(logits, self.predictions(rows, ids))
            if settings.loss == "kl":
                return distance
            # What the teacher wrote asks for its predictions, by the divergence without the noise of the draws.
            text = rows < len(job.windows.train) - job.windows.sampled
            return distance + settings.lm_weight * (each * text.to(each.device)).mean()

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
        windows, tokens = job.windows.train.shape
        shape, whole = (windows, tokens, k), k == vocabulary
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
        held_out = mean_loss(job.losses(job.model, job.windows.held_out), job.settings.window)
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
        taken = []
        for number in range(1 + TIMED_STEPS):
            started = time.perf_counter()
            self.accumulate(self.batch(number))
            self.optimizer.zero_grad()
            taken.append(time.perf_counter() - started)
        return sum(taken[1:]) / TIMED_STEPS  # the first one is slower

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
        write_state(self.job, STATE, tensors, facts)

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


def write_state(job: Job, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
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


def read_state(job: Job, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
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
            f"{path} is damaged: {error}. An interrupted recovery goes on from it. Remove the folder, and start again."
        ) from error
    if facts.pop("fingerprint", None) != job.fingerprint:
        raise OutputError(
            f"{job.state} holds a recovery with other settings, weights or text. It goes on with the same command "
            "only. Give that command, or choose another --out."
        )
    return tensors, facts
