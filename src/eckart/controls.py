"""What else could one do? The winner beside what users would try instead, on the same test examples.

Few-shot prompts and LoRA get exactly the examples that chose the winner; int8 keeps the winner's matrix whole and
rounds it. Nothing here learns from a test example: they are read only to be scored.
"""

from __future__ import annotations

import hashlib
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from eckart.dataflow import evaluating
from eckart.encoding import Encoded, ModelKind, context_length, encode, join, model_kind
from eckart.errors import EckartError
from eckart.matrices import Matrix, by_name, read, write
from eckart.plan import Edit
from eckart.prefix import run_block
from eckart.recipe import SearchSettings
from eckart.results import paired_gain
from eckart.scoring import LOSS_UNIT, Scores, only_positions, prepare, score, summarize
from eckart.tasks import Example, Task
from eckart.truncation import round_to_int8

SEPARATOR = "\n\n"
GENERATED = 5  # tokens that an open answer may take beyond the longest right one, as `scoring` generates
RANK, ALPHA = 8, 16
EPOCHS = 10
BATCH = 8
# A control that was not tuned flatters the winner. Both are tried, from the same start.
LEARNING_RATES = (2e-4, 2e-3)
HELD_OUT = 0.2
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Control:
    """What was measured of one control."""

    encoded: Encoded
    """The test examples as they were scored."""
    scores: Scores
    facts: dict[str, Any] = field(default_factory=dict)
    """How it was made, for results.json."""


def measure_controls(
    model: nn.Module,
    tokenizer: Any,
    validation: Task,
    encoded_test: Encoded,
    edits: Sequence[Edit],
    matrices: Sequence[Matrix],
    settings: SearchSettings,
    *,
    baseline: Scores | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Measure few-shot prompts, LoRA and int8 on the test examples.

    A control that cannot be measured is left out with a warning; it never stops a search that is done.

    Args:
        model: The unedited model. Changed meanwhile; as before, to the bit, afterwards.
        tokenizer: Its tokenizer.
        validation: The examples that chose the winner; the only ones that a control may learn from.
        encoded_test: The examples that prove, from `prepare`.
        edits: The winner's, whose matrices int8 rounds; none where nothing won.
        matrices: From `find_matrices(model)`.
        settings: The search's; `shots`, `seed`, `normalize` and how examples are encoded count here.
        baseline: What the unedited model did on `encoded_test`, for paired gains.
        progress: Called with the name of each control before it is measured.

    Returns:
        By name: the measurements of `eckart.evaluate`, `gain` and `loss_gain` against `baseline`, `seconds`, and
        the control's own facts; and the warnings.
    """
    makers: dict[str, Callable[[], Control | str]] = {
        "few_shot": lambda: few_shot(model, tokenizer, validation, encoded_test, settings),
        "lora": lambda: lora(model, tokenizer, validation, encoded_test, matrices, settings),
        "int8": lambda: int8(model, tokenizer, encoded_test, edits, matrices, settings),
    }
    found: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    for name, make in makers.items():
        if progress is not None:
            progress(f"control {name}")
        started = time.perf_counter()
        try:
            with evaluating(model), torch.inference_mode():
                control = make()
        except (EckartError, RuntimeError) as error:  # RuntimeError: memory ran out, above all
            control = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(control, str):
            missing.append(f"The control {name.replace('_', ' ')} was not measured: {control}")
            continue
        measured = summarize(control.encoded, control.scores)
        found[name] = measured | _gains(baseline, control.scores, settings.seed) | control.facts
        found[name]["seconds"] = round(time.perf_counter() - started, 3)
    return found, tuple(missing)


def _gains(before: Scores | None, after: Scores, seed: int) -> dict[str, Any]:
    if before is None:
        return {}
    found = {"loss_gain": paired_gain(before.loss, after.loss, LOSS_UNIT, seed=seed)}
    if before.correct is not None and after.correct is not None:
        found["gain"] = paired_gain(before.correct, after.correct, "fraction", seed=seed)
    return found


def few_shot(
    model: nn.Module, tokenizer: Any, validation: Task, encoded_test: Encoded, settings: SearchSettings
) -> Control | str:
    """Score the test examples behind worked examples from validation.

    The same examples, in the same order, stand before every prompt: prompt and right answer joined as `join` does
    (in a masked model's prompt the answer fills the mask), then one empty line. A prompt that has no room for all
    of them gets the first ones.

    Args:
        model: A language model in evaluation mode. Not modified.
        tokenizer: Its tokenizer.
        validation: Where the worked examples come from.
        encoded_test: The test examples.
        settings: `shots` worked examples at most, chosen by `seed`.

    Returns:
        The control, with `shots` and how many prompts were `shortened`; or why there is none.
    """
    task = encoded_test.task
    if task.kind == "text":
        return "a text has no prompt to put examples in front of."
    if any(not example.prompt.strip() for example in (*validation.examples, *task.examples)):
        return "examples without a prompt cannot be shown as question and answer."
    count = min(settings.shots, len(validation.examples))
    chosen = random.Random(settings.seed).sample(validation.examples, count)  # noqa: S311 - not for secrets
    shown = [demonstration(example, tokenizer.mask_token) for example in chosen]
    used = _shots_that_fit(model, tokenizer, encoded_test, shown)
    if not any(used):
        return "no worked example fits the model's context beside a prompt."
    examples = tuple(_behind(shown[:shots], example) for shots, example in zip(used, task.examples))
    encoded = prepare(model, tokenizer, Task(task.name, task.kind, examples), **settings.encoding)
    scores = score(model, tokenizer, encoded, normalize=settings.normalize)
    return Control(encoded, scores, {"shots": count, "shortened": sum(n < count for n in used)})


def demonstration(example: Example, mask: str | None = None) -> str:
    """Write an example with its right answer.

    Args:
        example: With a prompt and an answer.
        mask: The tokenizer's mask token, which the answer replaces where the prompt holds it.

    Returns:
        The text.

    >>> demonstration(Example("The capital is", "Paris"))
    'The capital is Paris'
    >>> demonstration(Example("[MASK] is wet.", 1, ("Sand", "Rain")), "[MASK]")
    'Rain is wet.'
    """
    if mask is not None and mask in example.prompt:
        return example.prompt.replace(mask, example.gold.strip(), 1)
    return "".join(join(example.prompt, example.gold))


def _behind(shown: Sequence[str], example: Example) -> Example:
    return replace(example, prompt=SEPARATOR.join([*shown, example.prompt]))


def _shots_that_fit(model: nn.Module, tokenizer: Any, encoded_test: Encoded, shown: Sequence[str]) -> list[int]:
    """For each test example, how many worked examples the model's context has room for."""
    task, kind = encoded_test.task, encoded_test.model_kind
    context = context_length(model, tokenizer)
    used = [0] * len(task.examples)
    if context is None:
        return [len(shown)] * len(used)
    generates = task.kind == "open" and not encoded_test.single_token and kind == "causal"
    answer = max(encoded_test.tokens) + GENERATED if generates else 0
    for shots in range(len(shown), 0, -1):
        left = [index for index, found in enumerate(used) if not found]
        if not left:
            break
        tried = tuple(_behind(shown[:shots], task.examples[index]) for index in left)
        encoded = _encode(model, tokenizer, Task(task.name, task.kind, tried), kind, context=None)
        for index, sequences in zip(left, encoded.sequences):
            longest = max(max(len(s.row.ids), len(s.row.decoder_ids)) for s in sequences)
            if max(longest, sequences[0].positions[0] + 1 + answer) <= context:
                used[index] = shots
    return used


def lora(
    model: nn.Module,
    tokenizer: Any,
    validation: Task,
    encoded_test: Encoded,
    matrices: Sequence[Matrix],
    settings: SearchSettings,
) -> Control | str:
    """Score the test examples with a LoRA adapter that was trained on validation.

    Args:
        model: As for `adapted`.
        tokenizer: Its tokenizer.
        validation: As for `adapted`.
        encoded_test: The test examples; only scored.
        matrices: As for `adapted`.
        settings: As for `adapted`.

    Returns:
        The control, with the facts that `adapted` gives; or why there is none.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        return "it needs the package peft. Install it with: pip install 'eckart[recover]'"
    if len(validation.examples) < 2:
        return "it trains on some of the examples that choose and picks the epoch on others, so it needs two."
    if not linear_modules(model, matrices):
        return "none of the model's matrices is the whole weight of a linear layer."
    with adapted(model, tokenizer, validation, matrices, settings) as facts:
        return Control(encoded_test, score(model, tokenizer, encoded_test, normalize=settings.normalize), facts)


def linear_modules(model: nn.Module, matrices: Sequence[Matrix]) -> list[str]:
    """List the linear layers that hold a model's matrices, as PEFT wants them named.

    Args:
        model: The model. Not modified.
        matrices: From `find_matrices(model)`.

    Returns:
        Paths of modules, without routers and heads, and without stacked experts, which are no modules.
    """
    paths = dict.fromkeys(
        matrix.parameter.removesuffix(".weight")
        for matrix in matrices
        if matrix.parameter.endswith(".weight") and matrix.layer is not None and matrix.type != "other"
    )
    return [path for path in paths if isinstance(model.get_submodule(path), (nn.Linear, Conv1D))]


@contextmanager
def adapted(
    model: nn.Module, tokenizer: Any, validation: Task, matrices: Sequence[Matrix], settings: SearchSettings
) -> Iterator[dict[str, Any]]:
    """Train a LoRA adapter on validation examples and leave it in the model for a while.

    The loss is that of the right answer at the positions that `score` reads. A share of the examples, `HELD_OUT`,
    is held out: on it the learning rate and the epoch are chosen, the untrained adapter among them.

    Args:
        model: A language model; trained in evaluation mode, so without dropout. Afterwards the same modules,
            weights and `requires_grad` flags as before.
        tokenizer: Its tokenizer.
        validation: At least two examples.
        matrices: From `find_matrices(model)`; the linear layers that hold them are adapted.
        settings: `seed` decides the start, the held-out share and the order; also how examples are encoded.

    Yields:
        Facts for results.json: `trainable` parameters, `modules`, `examples` trained on, `held_out`, `epochs` of
        the chosen state (0 where no training helped), `adapter_sha256`, and the `recipe`.

    Source:
        LoRA, arXiv 2106.09685, as the package peft implements it.
    """
    import peft

    options = settings.encoding
    examples = random.Random(settings.seed).sample(validation.examples, len(validation.examples))  # noqa: S311
    held = max(1, round(HELD_OUT * len(examples)))
    kind = model_kind(model, tokenizer)
    learn, check = examples[held:], _encode_answers(model, tokenizer, validation, examples[:held], kind, options)
    paths = linear_modules(model, matrices)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=paths)
    modules = {path: model.get_submodule(path) for path in paths}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft says what it does with GPT-2's transposed weights
                torch.manual_seed(settings.seed)
                peft.LoraModel(model, config, "control")
            weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
            for weight in weights.values():
                weight.data = weight.data.float()  # a small step would be rounded away in half precision
            start = {name: weight.detach().clone() for name, weight in weights.items()}
            best, chosen, epochs, rate = _loss_of(model, check), start, 0, None
            for tried in LEARNING_RATES:
                _restore(weights, start)
                batches = _batches(model, tokenizer, validation, learn, kind, options, settings.seed)
                for epoch, loss in enumerate(_train(model, weights, tried, batches, check), 1):
                    if loss < best:
                        best, epochs, rate = loss, epoch, tried
                        chosen = {name: weight.detach().clone() for name, weight in weights.items()}
            _restore(weights, chosen)
            yield {
                "trainable": sum(weight.numel() for weight in weights.values()),
                "modules": len(paths),
                "examples": len(learn),
                "held_out": held,
                "epochs": epochs,
                "adapter_sha256": _sha256(chosen),
                "recipe": {
                    "rank": RANK,
                    "alpha": ALPHA,
                    "learning_rate": rate,
                    "learning_rates": list(LEARNING_RATES),
                    "epochs": EPOCHS,
                    "batch": BATCH,
                    "peft": peft.__version__,
                },
            }
        finally:
            for path, module in modules.items():
                model.set_submodule(path, module)
            for name in set(vars(model)) - attributes:
                delattr(model, name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _train(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    rate: float,
    batches: Callable[[], Iterator[Encoded]],
    check: Encoded,
) -> Iterator[float]:
    """Train epoch after epoch, and give the loss on what was held out after each."""
    optimizer = torch.optim.AdamW(weights.values(), lr=rate)
    for _ in range(EPOCHS):
        for batch in batches():
            optimizer.zero_grad()
            for loss in _losses(model, batch):
                loss.backward()
            nn.utils.clip_grad_norm_(weights.values(), LARGEST_GRADIENT)
            optimizer.step()
        yield _loss_of(model, check)


def _batches(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    kind: ModelKind,
    options: dict[str, Any],
    seed: int,
) -> Callable[[], Iterator[Encoded]]:
    """Give a function that yields the batches of the next epoch; every epoch has its own order."""
    generator = random.Random(seed)  # noqa: S311 - not for secrets

    def epoch() -> Iterator[Encoded]:
        order = generator.sample(examples, len(examples))
        for start in range(0, len(order), BATCH):
            yield _encode_answers(model, tokenizer, task, order[start : start + BATCH], kind, options)

    return epoch


def _encode_answers(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    kind: ModelKind,
    options: dict[str, Any],
) -> Encoded:
    """Encode only the right answers, at the positions where they are scored."""
    if task.kind == "text":
        only = Task(task.name, "text", tuple(examples))
    else:
        only = Task(task.name, "open", tuple(replace(e, answer=e.gold, choices=()) for e in examples))
    return _encode(model, tokenizer, only, kind, context=context_length(model, tokenizer), **options)


def _encode(model: nn.Module, tokenizer: Any, task: Task, kind: ModelKind, **options: Any) -> Encoded:
    """Encode in the plain layout, on the CPU, with tensors that may take part in a backward pass."""
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None) or 0
    with torch.inference_mode(False):
        return encode(task, tokenizer, kind, decoder_start=start, **options)


def _losses(model: nn.Module, encoded: Encoded) -> Iterator[Tensor]:
    """For each block, its share of the mean loss: a mean over answers of their mean over tokens, or over all tokens."""
    device = next(model.parameters()).device
    for block in encoded.blocks:
        block = block.mapped(lambda tensor: tensor.to(device))
        with only_positions(model, block.rows, block.columns) as logits_of:
            logits = logits_of(run_block(model, block)).float()
        tokens = cross_entropy(logits[block.position], block.target, reduction="none")
        if encoded.task.kind == "text":
            yield tokens.sum() / sum(encoded.tokens)
        else:
            lengths = torch.tensor([encoded.tokens[index] for index in block.examples], device=device)
            yield (tokens / lengths[block.sequence]).sum() / encoded.count


def _loss_of(model: nn.Module, encoded: Encoded) -> float:
    with torch.no_grad():
        return sum(float(loss) for loss in _losses(model, encoded))


@torch.no_grad()
def _restore(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])


def _sha256(values: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(name.encode() + np.ascontiguousarray(value.float().cpu().numpy()).tobytes())
    return digest.hexdigest()


def int8(
    model: nn.Module,
    tokenizer: Any,
    encoded_test: Encoded,
    edits: Sequence[Edit],
    matrices: Sequence[Matrix],
    settings: SearchSettings,
) -> Control | str:
    """Score the test examples with the winner's matrices rounded to int8 in place of the cuts.

    Args:
        model: The unedited model. Its matrices are replaced meanwhile; as before, to the bit, afterwards.
        tokenizer: Its tokenizer.
        encoded_test: The test examples.
        edits: The winner's, or none.
        matrices: From `find_matrices(model)`.
        settings: `normalize` counts.

    Returns:
        The control, with the `bytes` that the int8 numbers and their scales take and those of the dense matrices;
        or why there is none.
    """
    if not edits:
        return "no edit won, so there is no matrix to round in its place."
    chosen = [by_name(matrices, edit.matrix) for edit in edits]
    originals = [read(model, matrix) for matrix in chosen]
    held = {"bytes": 0, "dense_bytes": sum(original.nbytes for original in originals)}
    try:
        for matrix, original in zip(chosen, originals):
            numbers, scales = round_to_int8(original)
            held["bytes"] += numbers.nbytes + scales.nbytes
            write(model, matrix, numbers * scales)
        scores = score(model, tokenizer, encoded_test, normalize=settings.normalize)
    finally:
        for matrix, original in zip(chosen, originals):
            write(model, matrix, original)
    return Control(encoded_test, scores, {"matrices": [matrix.name for matrix in chosen]} | held)
