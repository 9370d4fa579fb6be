"""Models out of the house: one ONNX file or ExecuTorch program for a device, a Hugging Face folder, a PEFT adapter.

Low-rank layers stay two products in the first two, so that what was saved is saved there, too; other formats hold
dense weights.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from eckart.checkpoint import (
    check_empty,
    load_model,
    load_tokenizer,
    new_folder,
    save,
    sentence_files,
    write_manifest,
)
from eckart.dataflow import low_rank_layers
from eckart.encoding import context_length
from eckart.errors import EckartError, ModelError, RecipeError
from eckart.onnx_graph import Quantize, quantize_, share_heads_, tidy_
from eckart.onnx_runner import FACTS, MODEL, SCHEMA_VERSION, Cache, OnnxModel, open_model, step
from eckart.peft_adapter import export_adapter, put_on_
from eckart.plan import read_plan
from eckart.pte import CONTEXT, PROGRAM, READ, check_installed, replay, write_program
from eckart.quantizer import sizes
from eckart.results import Measurement, environment, mean, to_json, write_text
from eckart.surgery import check_finite, weights_sha256

OPSET = 23
"""The first with an operator for attention, which takes a tenth off the time of a token."""
FORMATS = ("onnx", "dense", "peft", "gguf", "pte")
LARGEST_FILE = 2_000_000_000
"""Bytes that one protobuf message can hold, nearly; larger weights lie in a second file."""
CHECKED_TOKENS = 24
TOLERANCE = 1e-3
"""Largest difference of logits in float32, relative to the largest logit of all."""


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` or `export_pte` wrote."""

    folder: Path
    quantize: Quantize
    bytes: int
    """Of the model's file or files, without tokenizer and configuration."""
    dense_bytes: int
    """That the weights would take densely in float32."""
    agreement: Measurement
    """Share of greedy tokens that are PyTorch's, each after the same tokens; all of them without quantisation."""
    difference: float
    """Largest difference of logits, relative to the largest logit."""
    checked_with: tuple[str, ...]
    """What ran the file: onnxruntime, and onnxruntime-genai where it is installed; or executorch."""


def export_onnx(
    model: nn.Module, tokenizer: Any, folder: str | Path, *, quantize: Quantize = "none", seed: int = 0
) -> Exported:
    """Write a causal language model as one ONNX file with keys and values as inputs and outputs.

    Batch and length are free. onnxruntime runs it (`eckart run`, `eckart.onnx_runner`), and so does onnxruntime-genai.
    Before it appears, it continues two random prompts greedily, and has to give what PyTorch gives.

    Args:
        model: On the CPU, in float32; low-rank layers stay as they are, and LoRA adapters of PEFT (the model inside a
            `PeftModel`) two products beside each weight, in 8 bits where weights have fewer. Not modified.
        tokenizer: Written beside it.
        folder: Must not exist, or be empty. It appears whole or not at all, with `tokenizer.json`,
            `genai_config.json`, `eckart.json` and `SHA256SUMS`.
        quantize: Keep the weights of linear layers and embeddings as `int8`, `int4` or `int2`; see `eckart.onnx_graph`.
        seed: Of the prompts.

    Returns:
        Where it is, its size, and how it was checked.

    Raises:
        ModelError: The model is not causal, has more state than keys and values, or cannot be expressed in ONNX.
        OutputError: The folder cannot be written.
    """
    target = Path(folder)
    check_empty(target)
    state = cache_shapes(model)
    with new_folder(target) as temporary, torch.no_grad():
        size = _write_model(_graph(model, state), temporary / MODEL, quantize, _adapter_weights(model))
        tokenizer.save_pretrained(temporary)
        facts = _facts(model, tokenizer, state, quantize)
        write_text(temporary / FACTS, to_json(facts))
        write_text(temporary / "genai_config.json", to_json(_genai(model, tokenizer, state, facts)))
        found = _check(model, temporary, target, size, quantize, seed)
        checked = {"agreement": found.agreement, "difference": found.difference, "with": found.checked_with}
        write_text(temporary / FACTS, to_json(facts | {"bytes": size, "checked": checked}))
        write_manifest(temporary)
    return found


def export_pte(model: nn.Module, tokenizer: Any, folder: str | Path, *, seed: int = 0) -> Exported:
    """Write a causal language model as one ExecuTorch program with its keys and values inside.

    Batch is 1 and the context the model's, but at most `pte.CONTEXT`. Before the program appears, ExecuTorch's runtime
    continues two random prompts greedily with it, one after the other, and has to give what PyTorch gives.

    Args:
        model: On the CPU, in float32; low-rank layers stay as they are. Not modified.
        tokenizer: Written beside it.
        folder: Must not exist, or be empty. It appears whole or not at all, with `tokenizer.json`, `eckart.json` and
            `SHA256SUMS`.
        seed: Of the prompts.

    Returns:
        Where it is, its size, and how it was checked.

    Raises:
        ModelError: ExecuTorch is not installed or cannot express it, or the model has more state than keys and values.
        OutputError: The folder cannot be written.
    """
    target = Path(folder)
    check_empty(target)
    check_installed()
    state = cache_shapes(model, "pte")
    context = min(context_length(model, tokenizer) or CONTEXT, CONTEXT)
    with new_folder(target) as temporary:
        with _quiet():
            size = write_program(model, state, temporary / PROGRAM, context=context)
        prompts, ids, logits = _continuations(model, context, seed)
        found = replay(temporary / PROGRAM, prompts, ids)
        agreement, difference = _compared(model, found, ids, logits, "pte")
        tokenizer.save_pretrained(temporary)
        names = {"inputs": ["input_ids", "cache_position"], "outputs": ["logits"]}
        limits = {"context": context, "read": min(READ, context)}
        checked = {"agreement": agreement, "difference": difference, "with": ["executorch"]}
        facts = _facts(model, tokenizer, state, "none") | names | limits | {"bytes": size, "checked": checked}
        write_text(temporary / FACTS, to_json(facts))
        write_manifest(temporary)
    return Exported(target, "none", size, _dense_bytes(model), agreement, difference, ("executorch",))


@dataclass(frozen=True)
class Outcome:
    """What `run_export` did."""

    facts: dict[str, Any]
    """For `--json`."""
    notes: tuple[str, ...] = ()
    """What should be known of it."""
    checked: Exported | None = None
    """Of `onnx` and `pte`."""


def run_export(
    source: str,
    to: str,
    out: Path,
    *,
    quantize: str = "none",
    plan_path: Path | None = None,
    adapter: Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> Outcome:
    """Write a model in another format.

    Args:
        source: Folder or hub id: dense, or factored by eckart.
        to: `onnx`, `dense` (a Hugging Face folder that plain transformers loads), `peft` (a plan as an adapter over the
            model), `gguf` (the dense folder that llama.cpp's converter reads), or `pte` (an ExecuTorch program).
        out: New or empty folder; it appears whole or not at all.
        quantize: Of `onnx`: `none`, `int8`, `int4` or `int2`.
        plan_path: Of `peft`: the plan's file, or the folder of a run.
        adapter: Folder of a LoRA adapter of PEFT on this model: beside the weights in `onnx`, added to them elsewhere.
        seed: Of the prompts that `onnx` and `pte` are checked with.
        force: Accept a plan made for other weights.

    Returns:
        What was written, and what should be known of it.

    Raises:
        RecipeError: A format or combination that does not exist.
        EckartError: The model cannot be loaded or exported.
    """
    if to not in FORMATS or quantize not in get_args(Quantize):
        raise RecipeError(
            f"--to {to} --quantize {quantize} is unknown. Formats are {', '.join(FORMATS)}; weights are "
            f"{', '.join(get_args(Quantize))}. Choose one of each."
        )
    if (quantize != "none" and to != "onnx") or (plan_path is not None) != (to == "peft"):
        raise RecipeError(
            f"--to {to} was given with --quantize {quantize} and {'a' if plan_path else 'no'} --plan. Only onnx can be "
            "quantised; peft takes a plan, and nothing else does. Correct it, or use eckart apply for a plan."
        )
    if adapter is not None and to == "peft":
        raise RecipeError(
            "--to peft was given with --adapter. It writes an adapter of a plan; one that exists needs no export. "
            "Leave --adapter out, or choose another format."
        )
    if adapter is not None and to == "pte":
        raise RecipeError(
            "--to pte was given with --adapter. A program holds a model without adapters. "
            "Add it to the weights first with --to dense, or use --to onnx."
        )
    check_empty(out)
    if to == "pte":
        check_installed()
    if to == "peft":
        assert plan_path is not None
        plan = read_plan(plan_path)
        written = export_adapter(load_model(source, device="cpu", dtype="float32"), plan, out, force=force)
        notes = (
            f"The adapter holds {written.numbers:,} numbers, and the {len(written.ranks)} weights that it changes "
            f"{written.dense_numbers:,}: what the plan removes has a high rank. eckart apply makes a smaller model.",
        )
        names = ("ranks", "numbers", "dense_numbers", "difference", "pointless")
        facts = {name: getattr(written, name) for name in names}
        return Outcome({"to": to, "out": out, **facts}, notes if written.pointless else ())
    model = load_model(source, device="cpu", dtype="float32" if to in ("onnx", "pte") else "stored")
    check_finite(model)
    adapted = None if adapter is None else put_on_(model, adapter)
    if to == "onnx":
        onnx = export_onnx(model, load_tokenizer(source), out, quantize=quantize, seed=seed)  # pyright: ignore[reportArgumentType]
        return Outcome({"to": to, "out": out, **vars(onnx)}, checked=onnx)
    if to == "pte":
        program = export_pte(model, load_tokenizer(source), out, seed=seed)
        return Outcome({"to": to, "out": out, **vars(program)}, checked=program)
    if adapted is not None:
        model = adapted.merge_and_unload()
    tokenizer = load_tokenizer(source) if model.main_input_name == "input_ids" else None
    factored = len(low_rank_layers(model))
    if factored:
        model.dequantize()
    save(model, out, tokenizer, files=sentence_files(source))
    notes = ()
    if to == "gguf":
        # The converter and its tables of tokenizers are no package; they come with llama.cpp.
        command = shlex.join(["python", "convert_hf_to_gguf.py", str(out), "--outfile", str(out / "model.gguf")])
        notes = (
            f"llama.cpp makes the GGUF file of this dense folder, with the script in its repository: {command}",
            *([f"GGUF has no low-rank layers: the {factored} factored weights are dense again."] if factored else []),
        )
    return Outcome({"to": to, "out": out, "dequantized": factored, "notes": notes}, notes)


def cache_shapes(model: nn.Module, to: str = "ONNX") -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Find out what a causal model keeps of the tokens it has read.

    Args:
        model: Any transformers model. Not modified.
        to: The format, for the error.

    Returns:
        For each layer the heads and features of keys, and those of values.

    Raises:
        ModelError: It is no causal language model, or keeps something else.
    """
    config: Any = getattr(model, "config", None)
    problem = None
    if getattr(model, "main_input_name", "") != "input_ids" or config.is_encoder_decoder:
        problem = "it does not continue text"
    elif next(model.parameters()).dtype != torch.float32 or next(model.parameters()).device.type != "cpu":
        problem = "its numbers are not float32 on the CPU (--dtype float32 --device cpu)"
    else:
        try:
            with torch.no_grad():
                given: Any = model(input_ids=torch.tensor([[5, 6, 7]]) % config.vocab_size, use_cache=True)
            layers = [(layer.keys.shape, layer.values.shape) for layer in given.past_key_values.layers]
            if all(len(shape) == 4 and shape[2] == 3 for pair in layers for shape in pair) and given.logits.ndim == 3:
                return [((k[1], k[3]), (v[1], v[3])) for k, v in layers]
            problem = "it keeps other state than keys and values"
        except (AttributeError, TypeError, ValueError) as error:
            problem = f"it keeps no keys and values ({str(error).splitlines()[0]})"
    raise ModelError(
        f"{type(model).__name__} cannot be exported to {to}: {problem}. Exported is a causal language model whose "
        "state is one tensor of keys and one of values a layer. Use --to dense for others."
    )


class _Stepper(nn.Module):
    """The model as the file sees it: plain tensors in, plain tensors out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.positioned = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        from transformers.cache_utils import DynamicCache

        # Without a config, so that layers with a sliding window keep everything and their mask does the rest.
        cache: Any = DynamicCache()
        for index, (keys, values) in enumerate(past):
            cache.update(keys, values, index)
        options = {}
        if self.positioned:
            # From the mask, so that padding on the left moves no token.
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        given = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **options
        )
        return (given.logits, *(t for layer in given.past_key_values.layers for t in (layer.keys, layer.values)))


def _names(layers: int) -> tuple[list[str], list[str]]:
    parts = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    return [f"past_key_values.{part}" for part in parts], [f"present.{part}" for part in parts]


def _graph(model: nn.Module, state: Sequence[Any]) -> Any:
    """Express a model in ONNX."""
    free: Any = torch.export.Dim.DYNAMIC
    past = [tuple(torch.zeros(2, heads, 5, size) for heads, size in pair) for pair in state]
    arguments = (torch.full((2, 3), 5), torch.ones(2, 8, dtype=torch.int64), past)
    shapes = ({0: free, 1: free}, {0: free, 1: free}, [({0: free, 2: free},) * 2 for _ in state])
    inputs, outputs = _names(len(state))
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                _Stepper(model).eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=["input_ids", "attention_mask", *inputs],
                output_names=["logits", *outputs],
                verbose=False,
            )
        proto = program.model_proto
    except ImportError as error:
        raise ModelError(
            f"{error.name} is not installed. Exporting to ONNX needs it. Install it: pip install 'eckart[export]'."
        ) from None
    except Exception as error:  # whatever torch.export, the decompositions and onnxscript raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(
            f"{type(model).__name__} cannot be expressed in ONNX by torch {torch.__version__}: "
            f"{str(cause).strip().splitlines()[0]} Its operations all need a counterpart there. "
            "Use --to dense, or another version of torch."
        ) from error
    tidy_(proto.graph)
    share_heads_(proto.graph)
    for entry in (*proto.graph.input, *proto.graph.output):
        # The exporter's own names say nothing.
        lengths = {"input_ids": (1, "length"), "attention_mask": (1, "total"), "logits": (1, "length")}
        place, word = lengths.get(entry.name, (2, "past" if entry.name.startswith("past") else "total"))
        entry.type.tensor_type.shape.dim[0].dim_param = "batch"
        entry.type.tensor_type.shape.dim[place].dim_param = word
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters from printing; they warn of packages that are not there and of names of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _adapter_weights(model: nn.Module) -> list[Tensor]:
    """What adapters of PEFT add to a model."""
    return [weight.detach() for name, weight in model.named_parameters() if ".lora_" in name]


def _write_model(proto: Any, path: Path, quantize: Quantize, fine: Sequence[Tensor] = ()) -> int:
    """Write the file, two of them where one cannot hold the weights; give their bytes."""
    import onnx
    from onnx import numpy_helper

    # The exporter renames the weights that it turns, so that they are known by what they hold.
    contents = {array.tobytes() for weight in fine for array in (weight.numpy(), weight.numpy().T)}
    held = proto.graph.initializer if fine else ()
    quantize_(proto, quantize, {t.name for t in held if numpy_helper.to_array(t).tobytes() in contents})
    proto.producer_name, proto.doc_string = "eckart", ""
    del proto.metadata_props[:]
    options: dict[str, Any] = {}
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > LARGEST_FILE:
        options = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": f"{MODEL}.data"}
    onnx.save_model(proto, str(path), **options)
    return sum(file.stat().st_size for file in path.parent.glob(f"{MODEL}*"))


def _facts(model: Any, tokenizer: Any, state: Sequence[Any], quantize: Quantize) -> dict[str, Any]:
    """What `eckart.json` says, but for the check."""
    inputs, outputs = _names(len(state))
    text: Any = model.config.get_text_config()
    ends = [getattr(getattr(model, "generation_config", None), "eos_token_id", None), text.eos_token_id]
    ends = next((end for end in (*ends, tokenizer.eos_token_id) if end is not None), [])
    starts = (tokenizer.bos_token_id, text.bos_token_id, tokenizer.eos_token_id)
    return {
        "schema_version": SCHEMA_VERSION,
        "context": context_length(model, tokenizer),
        "vocabulary": text.vocab_size,
        "start": next((start for start in starts if start is not None), None),
        "eos": [ends] if isinstance(ends, int) else list(ends),
        "quantize": quantize,
        "inputs": ["input_ids", "attention_mask", *inputs],
        "outputs": ["logits", *outputs],
        "cache": [{"key": {"heads": k[0], "size": k[1]}, "value": {"heads": v[0], "size": v[1]}} for k, v in state],
        "source": {
            "architecture": type(model).__name__,
            "weights_sha256": weights_sha256(model),
            "low_rank_layers": len(low_rank_layers(model)),
        },
        "made_by": environment(),
    }


def _genai(model: Any, tokenizer: Any, state: Sequence[Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai reads."""
    text: Any = model.config.get_text_config()
    (heads, size), _ = state[0]
    context = facts["context"] or 2048
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": size,
        "hidden_size": text.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": len(state),
        "num_key_value_heads": heads,
    }
    eos = facts["eos"] or [facts["start"] or 0]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return {
        "model": {
            "bos_token_id": facts["start"] or 0,
            "context_length": context,
            "decoder": decoder,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "type": "decoder",
            "vocab_size": text.vocab_size,
        },
        # The cache grows, as the file has it, instead of lying in a buffer of the full length.
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }


def _check(model: Any, written: Path, target: Path, size: int, quantize: Quantize, seed: int) -> Exported:
    """Compare what a file says with what the model says."""
    exported = open_model(written, threads=1)
    prompts, ids, logits = _continuations(model, exported.facts.context or 64, seed)
    found = _replayed(exported, prompts.numpy(), ids)
    agreement, difference = _compared(model, found, ids, logits, "ONNX", exact=quantize == "none")
    runners = ["onnxruntime"]
    if _genai_agrees(written, prompts.numpy(), exported, ids.shape[1]):
        runners.append("onnxruntime-genai")
    return Exported(target, quantize, size, _dense_bytes(model), agreement, difference, tuple(runners))


def _dense_bytes(model: Any) -> int:
    """What the weights would take densely in float32."""
    return 4 * (sizes(model)[1].parameters - sum(weight.numel() for weight in _adapter_weights(model)))


def _continuations(model: Any, context: int, seed: int) -> tuple[Tensor, Any, Any]:
    """Two random prompts, how PyTorch continues them greedily, and its logits."""
    length = max(1, min(8, context // 2))
    steps = max(1, min(CHECKED_TOKENS, context - length))
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.config.get_text_config().vocab_size, (2, length), generator=generator)
    return prompts, *_greedy(model, prompts, steps)


def _compared(
    model: Any, found: Any, ids: Any, logits: Any, to: str, *, exact: bool = True
) -> tuple[Measurement, float]:
    """Agreement and difference of a file's logits; where it holds the very weights, they have to be the model's."""
    difference = float(np.abs(found - logits).max() / np.abs(logits).max())
    same = found.argmax(-1) == ids
    # A tie within rounding is no difference.
    chosen, best = (np.take_along_axis(logits, i[..., None], -1)[..., 0] for i in (found.argmax(-1), ids))
    # Not a number is no agreement.
    close = difference <= TOLERANCE and (best - chosen <= TOLERANCE * np.abs(logits).max()).all()
    if exact and not close:
        raise ModelError(
            f"The {to} file of {type(model).__name__} differs from the model: its logits by {difference:.2g} of the "
            f"largest, {int((~same).sum())} of {same.size} greedy tokens. It may differ by {TOLERANCE} at most. "
            "Nothing was written; use --to dense, or another version of torch or of what runs the file."
        )
    return mean(same.reshape(-1), "fraction"), difference


def _greedy(model: Any, prompts: Tensor, steps: int) -> tuple[Any, Any]:
    """Continue prompts greedily, shape (n, length), in PyTorch: tokens (n, steps) and logits (n, steps, vocabulary)."""
    from transformers.cache_utils import DynamicCache

    ids, logits, cache, now = [], [], DynamicCache(), prompts
    with torch.inference_mode():
        for _ in range(steps):
            given = model(input_ids=now, past_key_values=cache, use_cache=True)
            logits.append(given.logits[:, -1].float().numpy())
            now = given.logits[:, -1].argmax(-1, keepdim=True)
            ids.append(now[:, 0].numpy())
    return np.stack(ids, 1), np.stack(logits, 1)


def _replayed(exported: OnnxModel, prompts: Any, ids: Any) -> Any:
    """Logits of a file after the same tokens, one step at a time."""
    found, now = [], prompts
    cache: Cache | None = None
    for index in range(ids.shape[1]):
        logits, cache = step(exported, now, cache)
        found.append(logits[:, -1])
        now = ids[:, index : index + 1]
    return np.stack(found, 1)


def _genai_agrees(folder: Path, prompts: Any, exported: OnnxModel, steps: int) -> bool:
    """Let onnxruntime-genai continue the prompts; False where it is not installed.

    Raises:
        ModelError: It gives other tokens than onnxruntime.
    """
    try:
        import onnxruntime_genai
    except ImportError:
        return False
    genai: Any = onnxruntime_genai
    try:
        model = genai.Model(str(folder))
        for prompt in prompts:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(prompt.astype(np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            theirs = list(generator.get_sequence(0))[len(prompt) :]
            ours, cache, now = [], None, prompt[None]
            for _ in theirs:
                logits, cache = step(exported, now, cache)
                now = logits[:, -1].argmax(-1)[:, None]
                ours.append(int(now[0, 0]))
            if theirs != ours:
                raise ModelError(
                    f"onnxruntime-genai continues {prompt.tolist()} with {theirs}, onnxruntime with {ours}. "
                    "Both should give the same. Use other versions of them, or take onnxruntime-genai away."
                )
    except EckartError:
        raise
    except Exception as error:  # genai raises RuntimeError and its own
        raise ModelError(
            f"onnxruntime-genai cannot run the exported file: {str(error).splitlines()[0]}. It should. "
            "Use another version of it, or take it away."
        ) from error
    return True
