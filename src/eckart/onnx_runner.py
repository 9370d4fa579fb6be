"""Generate and score with an exported ONNX file. onnxruntime, tokenizers and numpy only: a device needs no torch.

The folder is what `eckart.exporting` writes: `model.onnx` takes tokens, an attention mask and the keys and values of
the tokens before, and gives logits and the keys and values of all; `eckart.json` says what else has to be known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eckart.errors import ModelError, TaskError

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
FACTS = "eckart.json"
SCHEMA_VERSION = 1
CHUNK = 256
"""Most tokens of a prompt that are read at once: logits of all of them are held."""

Cache = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What `eckart.json` says and generating needs."""

    context: int | None
    """Most tokens that the model can read; None if nothing limits it."""
    start: int | None
    """The token that stands where nothing comes before."""
    eos: tuple[int, ...]
    """Tokens that end a text."""


@dataclass(frozen=True)
class OnnxModel:
    """An exported model, ready to run."""

    session: onnxruntime.InferenceSession
    facts: Facts
    tokenizer: Any
    """A `tokenizers.Tokenizer`, or None where none lies beside the file."""


def open_model(path: str | Path, *, threads: int | None = None) -> OnnxModel:
    """Open an exported model.

    Args:
        path: The folder, or `model.onnx` in it.
        threads: Of one operation; by default as many as the machine has cores.

    Returns:
        The model, on the CPU.

    Raises:
        ModelError: Something is missing or damaged, or onnxruntime is not installed.
    """
    path = Path(path)
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist. An exported model is a folder with {MODEL}, as `eckart export` writes it. "
            "Check the path, or export the model first."
        )
    facts = read_facts(file.with_name(FACTS))
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(
            "onnxruntime is not installed. An exported model needs it. Install it: pip install onnxruntime."
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each kind of damage, all direct children of Exception
        problem = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{file} cannot be opened: {problem}. `sha256sum --check SHA256SUMS` in its folder tells whether it is "
            "whole. Copy or export it again, and use an onnxruntime no older than the one it was checked with."
        ) from None
    names = {entry.name for entry in session.get_inputs()}
    if not {"input_ids", "attention_mask"} <= names or session.get_outputs()[0].name != "logits":
        raise ModelError(
            f"{file} takes {sorted(names)[:4]}. A model of `eckart export` takes input_ids and attention_mask and "
            "gives logits. Export it again."
        )
    return OnnxModel(session, facts, _read_tokenizer(file.with_name("tokenizer.json")))


def read_facts(path: Path) -> Facts:
    """Read `eckart.json`.

    Args:
        path: The file.

    Returns:
        What generating needs of it.

    Raises:
        ModelError: It is missing, or not what `eckart export` writes.
    """

    def token(value: Any) -> int:
        if type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"{value!r} is not a token or a length")
        return value

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {found['schema_version']!r}; this eckart reads {SCHEMA_VERSION}")
        context, start = (None if found[name] is None else token(found[name]) for name in ("context", "start"))
        return Facts(context, start, tuple(token(each) for each in found["eos"]))
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist. It lies beside {MODEL} and says how to use it. Copy the whole exported folder."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"{path} is not what `eckart export` writes: {problem}. It holds a schema version, context, start and "
            "eos. Export the model again."
        ) from None


def _read_tokenizer(path: Path) -> Any:
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelError(f"{path} cannot be read: {error}. It is a tokenizer of Hugging Face. Copy it again.") from None


def encode(model: OnnxModel, prompt: str) -> list[int]:
    """Turn a prompt into tokens.

    Args:
        model: The model.
        prompt: Any text; an empty one begins anew.

    Returns:
        At least one token, with what the tokenizer puts in front; an EOS that it appends is dropped.

    Raises:
        ModelError: There is no tokenizer.
        TaskError: The prompt is empty and the model has no token to begin with.
    """
    if model.tokenizer is None:
        raise ModelError(
            "There is no tokenizer.json beside the model. A prompt is text that has to become tokens. Copy it there."
        )
    ids: list[int] = model.tokenizer.encode(prompt).ids
    while ids and ids[-1] in model.facts.eos:
        ids.pop()
    if not ids and model.facts.start is not None:
        ids = [model.facts.start]
    if not ids:
        raise TaskError("The prompt is empty, and this model has no token to begin with. Give some text. Add words.")
    return ids


def step(
    model: OnnxModel, ids: NDArray[np.int64], cache: Cache | None = None, mask: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], Cache]:
    """Read tokens that follow what is in the cache.

    Args:
        model: The model.
        ids: Shape (batch, tokens), tokens >= 1. Not modified.
        cache: From the step before; None at the beginning.
        mask: Shape (batch, all tokens so far and these): 0 where a token is padding, which may stand on the left only;
            by default nothing is.

    Returns:
        Logits, shape (batch, tokens, vocabulary), and the cache for the next step.
    """
    import onnxruntime

    def value(array: Any) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    places = [entry for entry in model.session.get_inputs() if entry.name not in ("input_ids", "attention_mask")]
    if cache is None:
        # (batch, heads, tokens, features)
        shapes = {entry.name: (len(ids), entry.shape[1], 0, entry.shape[3]) for entry in places}
        cache = {name: value(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    before = next(iter(cache.values())).shape()[2]
    if mask is None:
        mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
    names = [entry.name for entry in model.session.get_outputs()]
    feed = {**cache, "input_ids": value(ids), "attention_mask": value(mask)}
    logits, *present = model.session.run_with_ort_values(names, feed)
    return logits.numpy(), {entry.name: kept for entry, kept in zip(places, present)}


def generate(
    model: OnnxModel,
    ids: Sequence[int],
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue tokens, one at a time, until the text ends, or enough are there, or the context is full.

    Args:
        model: The model.
        ids: At least one.
        tokens: Most that are given.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_p: Draw from the likeliest tokens that together have this probability, `0 < top_p <= 1`.
        seed: Of the draws.

    Yields:
        Tokens; one that ends the text is not given.

    Raises:
        TaskError: The prompt is as long as the context or longer, or a setting is outside its range.
    """
    context = model.facts.context
    if context is not None and len(ids) >= context:
        raise TaskError(
            f"The prompt has {len(ids)} tokens. This model reads {context} in all, with what it generates. Shorten it."
        )
    if temperature < 0 or not 0 < top_p <= 1 or not np.isfinite(temperature):
        raise TaskError(
            f"temperature {temperature} and top_p {top_p} were given. A temperature is 0 or more, and 0 < top_p <= 1. "
            "Change them."
        )
    generator = np.random.default_rng(seed)
    logits, cache = _read(model, ids)
    room = tokens if context is None else min(tokens, context - len(ids))
    for index in range(room):
        token = choose(logits, temperature=temperature, top_p=top_p, generator=generator)
        if token in model.facts.eos:
            return
        yield token
        if index + 1 < room:
            after, cache = step(model, np.array([[token]]), cache)
            logits = after[0, -1]


def _read(model: OnnxModel, ids: Sequence[int]) -> tuple[NDArray[np.float32], Cache]:
    """Read a prompt in chunks, and give the logits of its last token."""
    logits, cache = np.zeros((1, 1, 1), np.float32), None
    for start in range(0, len(ids), CHUNK):
        logits, cache = step(model, np.array([ids[start : start + CHUNK]], np.int64), cache)
    assert cache is not None
    return logits[0, -1], cache


def choose(logits: NDArray[np.float32], *, temperature: float, top_p: float, generator: np.random.Generator) -> int:
    """Choose the next token.

    Args:
        logits: Shape (vocabulary,). Not modified.
        temperature: As for `generate`.
        top_p: As for `generate`.
        generator: Of the draw; not used at temperature 0.

    Returns:
        A token.

    >>> choose(np.array([0.0, 2.0, 1.0]), temperature=0, top_p=1, generator=np.random.default_rng(0))
    1
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    # The smallest set of likeliest tokens that reaches top_p: whatever lies after it had the whole of it before it.
    kept = order[: 1 + int(np.searchsorted(probabilities[order].cumsum(), top_p))]
    shares = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=shares))


def text_of(model: OnnxModel, ids: Sequence[int], new: Iterator[int]) -> Iterator[str]:
    """Turn generated tokens into text as they come.

    Args:
        model: The model.
        ids: The prompt's tokens.
        new: What follows.

    Yields:
        Pieces of text; together they are what the tokens add to the prompt's text. Bytes that form no character until
        the end give U+FFFD.
    """
    # Some decoders treat the first token otherwise, so a few tokens that were given already are always decoded, too.
    every = list(ids)[-8:]
    given = model.tokenizer.decode(every)
    for token in new:
        every.append(token)
        now = model.tokenizer.decode(every)
        if not now.endswith("\N{REPLACEMENT CHARACTER}") and now.startswith(given):
            yield now[len(given) :]
            every, given = every[-8:], model.tokenizer.decode(every[-8:])
    rest = model.tokenizer.decode(every)
    if len(rest) > len(given):
        yield rest[len(given) :]


def losses(model: OnnxModel, ids: Sequence[int], *, window: int, stride: int) -> NDArray[np.float64]:
    """Give the negative log-likelihood of a text's tokens, each scored once, in sliding windows.

    Args:
        model: The model.
        ids: Two or more.
        window: Most tokens that are read at once.
        stride: Tokens by which windows advance, `1 <= stride <= window`.

    Returns:
        Shape (len(ids) - 1,), in nats: of every token but the first.
    """
    found: list[NDArray[np.float64]] = []
    start, scored = 0, 1  # the first token has nothing before it
    while scored < len(ids):
        end = min(start + window, len(ids))
        logits = step(model, np.array([ids[start : end - 1]], np.int64))[0][0]
        targets = np.arange(scored, end)
        rows = logits[targets - start - 1].astype(np.float64)
        top = rows.max(-1, keepdims=True)
        normal = np.log(np.exp(rows - top).sum(-1)) + top[:, 0]
        found.append(normal - rows[np.arange(len(targets)), np.asarray(ids)[targets]])
        start, scored = min(start + stride, end - 1), end
    return np.concatenate(found)
