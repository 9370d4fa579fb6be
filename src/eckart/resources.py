"""What a model costs to run: tokens a second, bytes on disk and in memory, and how far factors could help at best.

Notation: a side is one model of those compared. Prefill reads a prompt, decode writes one token after another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eckart.checkpoint import load_model, shards_of
from eckart.errors import EckartError, ModelError
from eckart.quantizer import sizes
from eckart.results import Spread, spread

BATCHES = (1, 8, 32)
PROMPT = 128
"""Tokens of a prompt, where the context has room for them."""
NEW_TOKENS = 16
REPEATS = 5
BYTES_BELOW = 32
"""Tokens in one pass below which reading the weights takes the time, and not multiplying by them."""
PROCESSES = 3
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Work:
    """What the matrix products and the attention of one pass take."""

    flops: int
    bytes: int
    """Read and written, each operand once."""


@dataclass(frozen=True)
class Pace:
    """How fast a side is in one phase."""

    tokens_per_second: Spread
    ratio: Spread
    """To the dense side, within each turn."""
    limit: float
    """What `ratio` could be at best: the dense side's work over its own."""
    limited_by: str
    """`bytes` or `flops`."""
    work: Work
    """Of one pass: of the whole prompt, or of one token of each sequence."""


@dataclass(frozen=True)
class Speed:
    """How fast a side is at one batch size."""

    side: str
    batch: int
    prefill: Pace
    decode: Pace | None
    """None for a model that does not generate."""


@dataclass(frozen=True)
class Memory:
    """What a side takes."""

    side: str
    disk: int
    """Bytes of its safetensors."""
    parameters: int
    """Bytes of its parameters, as loaded; tied ones once."""
    peak: Spread
    """Most bytes that were in memory in a fresh process which loads it and writes some tokens; mapped files count."""
    anonymous: Spread
    """Bytes in memory at the end that no file backs."""
    interpreter: Spread
    """Bytes in memory before it was loaded: Python and libraries."""
    device: Spread | None
    """Most bytes allocated on a GPU; None on a CPU."""


T = TypeVar("T")


def measure_speed(
    sides: Mapping[str, nn.Module],
    dense: str,
    *,
    batches: Sequence[int] = BATCHES,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Speed]:
    """Time prefill and decode of several models, taking turns, so that a busy machine slows all of them.

    All read the same random tokens, as many as `prompt_of` says, and write the same number greedily, by `generate`.

    Args:
        sides: Name -> model; of one vocabulary. Not modified.
        dense: The name of the one that ratios are to.
        batches: Sequences in a batch.
        prompt: Tokens of each, less where the context is shorter.
        new_tokens: That are generated, at least 2.
        repeats: Turns of each side, after one to warm up.
        seed: Of the tokens.
        progress: Called with a line before each batch size.

    Returns:
        For each batch size one entry a side; medians over the turns.

    """
    found = []
    for batch in batches:
        if progress is not None:
            progress(f"speed at batch {batch}")
        ids = _tokens(sides[dense], batch, prompt, new_tokens, seed)
        work = {name: count_work(model, ids) for name, model in sides.items()}
        turns: dict[str, list[list[float]]] = {name: [] for name in sides}
        for turn in range(repeats + 1):
            for name, model in sides.items():
                seconds = _timed(model, ids, new_tokens)
                if turn:  # the first warms up
                    turns[name].append(seconds)
        found += [_speed(name, dense, ids, work, turns) for name in sides]
    return found


def _speed(
    name: str, dense: str, ids: Tensor, work: Mapping[str, Sequence[Work]], turns: Mapping[str, list[list[float]]]
) -> Speed:
    batch, length = ids.shape
    prefill = _pace(
        batch * length,
        batch * length,
        work[name][0],
        work[dense][0],
        [seconds[0] for seconds in turns[name]],
        [seconds[0] for seconds in turns[dense]],
    )
    steps = len(turns[name][0]) - 1
    decode = None
    if steps:
        decode = _pace(
            batch,
            batch * steps,
            work[name][1],
            work[dense][1],
            [seconds[-1] - seconds[0] for seconds in turns[name]],
            [seconds[-1] - seconds[0] for seconds in turns[dense]],
        )
    return Speed(name, batch, prefill, decode)


def _pace(tokens: int, all_tokens: int, own: Work, dense: Work, after: list[float], before: list[float]) -> Pace:
    by_bytes = tokens < BYTES_BELOW
    return Pace(
        spread([all_tokens / seconds for seconds in after], "tokens/s"),
        spread([b / a for b, a in zip(before, after)], "ratio"),
        dense.bytes / own.bytes if by_bytes else dense.flops / own.flops,
        "bytes" if by_bytes else "flops",
        own,
    )


def count_work(model: nn.Module, ids: Tensor) -> list[Work]:
    """Count what a pass over a prompt takes, and one over the next token.

    Args:
        model: A model that reads tokens. Not modified.
        ids: Shape (batch, tokens), on its device.

    Returns:
        Of the prompt, and of one more token of each sequence where the model generates.
    """
    with _Counter() as counter:
        seen = [Work(0, 0), *_run(model, ids, 2, lambda: Work(counter.flops, counter.bytes))]
    return [Work(b.flops - a.flops, b.bytes - a.bytes) for a, b in zip(seen, seen[1:])]


class _Counter(TorchDispatchMode):
    """Adds up operations and bytes. torch's own counter leaves out attention on a CPU, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name.startswith("_scaled_dot_product"):
            query, key, value = args[:3]
            scores = query[..., 0].numel() * key.shape[-2]
            self._add(2 * scores * (query.shape[-1] + value.shape[-1]), query, key, value, out[0])
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self._add(2 * left.numel() * right.shape[-1], *args, out)
        elif name == "_grouped_mm":
            left, right = args[:2]
            ends = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())  # an expert without a token is not read
            self._add(2 * left.numel() * right.shape[-1], left, right[:used], out)
        return out

    def _add(self, flops: int, *tensors: Tensor) -> None:
        self.flops += flops
        self.bytes += sum(tensor.nbytes for tensor in tensors)


def prompt_of(model: Any, prompt: int = PROMPT, new_tokens: int = NEW_TOKENS) -> int:
    """Say how many tokens a prompt has.

    Args:
        model: A model that reads tokens. Not modified.
        prompt: As many,
        new_tokens: unless the context would have no room for these, too.

    Returns:
        At least 1.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return prompt if context is None else max(1, min(prompt, context - new_tokens))


def _tokens(model: Any, batch: int, prompt: int, new_tokens: int, seed: int) -> Tensor:
    """Make up prompts."""
    size = (batch, prompt_of(model, prompt, new_tokens))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, size, generator=generator)
    return ids.to(next(model.parameters()).device)


def _timed(model: nn.Module, ids: Tensor, new_tokens: int) -> list[float]:
    """Seconds from the start to each new token."""

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    began = now()
    return [at - began for at in _run(model, ids, new_tokens, now)]


@torch.no_grad()
def _run(model: Any, ids: Tensor, new_tokens: int, look: Callable[[], T]) -> list[T]:
    """Generate, and look after each token; a model that does not generate reads its input once."""
    from transformers import StoppingCriteriaList

    if not model.can_generate():
        model(input_ids=ids)
        return [look()]
    seen: list[T] = []

    def after_token(input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        seen.append(look())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    criteria: Any = [after_token]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    return seen


def measure_memory(
    side: str, source: str, *, device: str = "auto", dtype: str = "auto", processes: int = PROCESSES
) -> Memory:
    """Measure what a model takes on disk, and in fresh processes that load it and write a few tokens.

    Args:
        side: Its name.
        source: Folder or hub id.
        device: As for `eckart.load`.
        dtype: As for `eckart.load`.
        processes: One after another.

    Returns:
        Medians over the processes.

    Raises:
        ModelError: It cannot be loaded.
    """
    found = [_in_process(source, device, dtype) for _ in range(processes)]

    def over(name: str) -> Spread:
        return spread([each[name] for each in found], "bytes")

    return Memory(
        side,
        sum(path.stat().st_size for path in shards_of(source)),
        found[0]["parameters"],
        over("peak"),
        over("anonymous"),
        over("interpreter"),
        over("device") if "device" in found[0] else None,
    )


def check_measurable(model: nn.Module, *, memory: bool) -> None:
    """Refuse before anything is measured.

    Args:
        model: What is to be measured. Not modified.
        memory: Whether its memory is, too.

    Raises:
        ModelError: It does not read tokens.
        EckartError: The system does not tell what a process takes.
    """
    reads = getattr(model, "main_input_name", None)
    if reads != "input_ids":
        raise ModelError(
            f"{type(model).__name__} reads '{reads}', not tokens. Speed and memory are measured on models that read "
            "tokens. Leave --speed and --memory out."
        )
    if memory and not _STATUS.is_file():
        raise EckartError(
            f"This system has no {_STATUS}. Memory is measured on Linux, which has one. Leave --memory out."
        )


def _in_process(source: str, device: str, dtype: str) -> dict[str, int]:
    script = "import sys; from eckart.resources import _tell; _tell(*sys.argv[1:])"
    command = [sys.executable, "-c", script, source, device, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 this Python, this package
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(
            f"{source} could not be run in a process of its own: {problem}. "
            "Its memory is that of a process which loads it and writes a few tokens. Check that it loads."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _tell(source: str, device: str, dtype: str) -> None:
    """What the process does whose memory is measured."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here: imports had their own
    found = {"interpreter": _status("VmHWM")}
    model = load_model(source, device=device, dtype=dtype)
    _run(model, _tokens(model, 1, PROMPT, NEW_TOKENS, 0), NEW_TOKENS, lambda: None)
    found |= {"peak": _status("VmHWM"), "anonymous": _status("RssAnon"), "parameters": sizes(model)[0].bytes}
    if model.device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
