"""Models on disk: load them safely, and write folders that appear whole or not at all.

A factored model is saved as transformers saves any; `eckart.quantizer` is what builds its layers when it is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn

from eckart.elastic import METHOD as ELASTIC
from eckart.elastic import ElasticConfig
from eckart.errors import EckartError, ModelError, OutputError, RankError
from eckart.mapping import MAPPED_FROM, has_memory, lent
from eckart.plan import Plan, write_plan
from eckart.portable import add_modeling
from eckart.quantizer import MODELING, LowRankConfig, sizes

_MAX_HEADER = 100_000_000  # the safetensors format's own limit
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = ("auto", "stored", "float32", "bfloat16", "float16", "float64")


def load(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    ratio: float | None = None,
    bytes: int | None = None,
    spill: Path | None = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or a Hugging Face id.

    Safetensors only: no pickle is opened and no remote code is run. The class is the one that the config
    names. The network is used only if `source` is an id and not a folder.

    Args:
        source: A folder, or an id such as `gpt2` or `owner/name`.
        device: `auto` (CUDA where there is one, else CPU), or a torch device.
        dtype: `stored`, `auto` (as stored, but on a CPU half precision is widened to float32), or a torch
            dtype's name.
        ratio: Of an elastic folder: kept fraction of the numbers of its matrices; by default the largest it holds.
        bytes: Of an elastic folder, in place of a ratio: most that the whole model takes as it is stored.
        spill: A folder on a disk. On a CPU all large weights are then mapped: those whose dtype is the stored one from
            the model's own files, others from files that the folder lends space to for as long as the model lives.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ModelError: There is no such model, its files are damaged, pickled or incomplete, it has no tokenizer, or
            it needs remote code, or it is not elastic and a ratio or bytes were given.
        RankError: An elastic folder holds no model of that size.
    """
    model = load_model(source, device=device, dtype=dtype, ratio=ratio, bytes=bytes, spill=spill)
    return model, load_tokenizer(source)


def load_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    ratio: float | None = None,
    bytes: int | None = None,
    spill: Path | None = None,
) -> Any:
    """Load a model as `load` does, without a tokenizer, which not every model has.

    Args:
        source: As for `load`.
        device: As for `load`.
        dtype: As for `load`.
        ratio: As for `load`.
        bytes: As for `load`.
        spill: As for `load`.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: As for `load`.
        RankError: As for `load`.
    """
    name, local, where = locate(source, device=device, dtype=dtype)
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if ratio is not None or bytes is not None:
            _ask(config, source, ratio=ratio, bytes=bytes)
        model, loaded = class_of(config).from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype, "auto"),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (ModelError, RankError):
        raise
    except Exception as error:  # from_pretrained raises OSError, ValueError, RuntimeError and safetensors' own
        raise ModelError(f"{source} could not be loaded: {_first_line(error)}. {_remedy(local)}") from error
    # Where peft is installed, transformers puts a checkpoint's adapter into the model unasked.
    if hasattr(model, "peft_config"):
        raise _has_adapter(source)
    # transformers would go on with random numbers in their place.
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} first. "
            f"A checkpoint holds every weight of the class that its config names. {_remedy(local)}"
        )
    wide = torch.promote_types(model.dtype, torch.float32) if dtype == "auto" and where.type == "cpu" else None
    if spill is not None and where.type == "cpu":
        _lend_(model, wide, spill)
    return model.to(where, wide).eval()


def _lend_(model: nn.Module, dtype: torch.dtype | None, folder: Path) -> None:
    """Move large weights to files that are mapped, one after the other, unless they lie in some already."""
    for parameter in model.parameters():
        weight = parameter.data.to(dtype if parameter.is_floating_point() else None)
        if has_memory(weight) and weight.nbytes >= MAPPED_FROM:
            parameter.data = lent({"weight": weight}, folder)["weight"]


def _ask(config: Any, source: str, **budget: Any) -> None:
    """Name the size that an elastic folder is to be loaded with."""
    described = getattr(config, "quantization_config", None)
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method != ELASTIC:
        raise ModelError(
            f"{source} is not elastic, so it has one size. A ratio or bytes choose what is read of a folder that "
            "`eckart compress --elastic` wrote. Leave them out, or compress the model first."
        )
    vars(config).update(budget)


def stored_dtype(source: str, model: Any) -> torch.dtype:
    """Tell in which dtype a model lies in its files.

    Args:
        source: Where it was loaded from.
        model: As loaded.

    Returns:
        What the config says, or the model's own where it says nothing.
    """
    name, local = resolve(source)
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    found = getattr(config, "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else model.dtype


def load_tokenizer(source: str) -> Any:
    """Load a model's tokenizer.

    Args:
        source: As for `load`.

    Returns:
        The tokenizer.

    Raises:
        ModelError: There is none.
    """
    name, local = resolve(source)
    problem = "it is empty"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        if tokenizer.vocab_size:
            return tokenizer
    except Exception as error:  # as from_pretrained of a model
        problem = _first_line(error)
    raise ModelError(
        f"{source} has no usable tokenizer: {problem}. A tokenizer.json lies beside the weights. "
        "Copy it from where the model came from."
    )


def locate(source: str, *, device: str = "auto", dtype: str = "auto") -> tuple[str, bool, torch.device]:
    """Check what can be checked before a model is loaded.

    Args:
        source: As for `load`.
        device: As for `load`.
        dtype: As for `load`.

    Returns:
        The name to load from, whether it is a folder, and the device.

    Raises:
        ModelError: `source` is no model, a damaged one, or an adapter; device or dtype are unknown.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown. Choose from {', '.join(_DTYPES)}. Change --dtype.")
    where = _device(device)
    name, local = resolve(source)
    if local:
        check_folder(Path(name))
    return name, local, where


def resolve(source: str) -> tuple[str, bool]:
    """Give the name to load from, and whether it is a folder.

    Args:
        source: As for `load`.

    Returns:
        The folder's path and True, or the hub id and False.

    Raises:
        ModelError: It is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder), True
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"{source} is not a folder. MODEL is a folder with config.json and safetensors, or a Hugging Face id "
            "such as gpt2 or owner/name. Check the path."
        )
    return source, False


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        torch.empty(0, device=device).cpu()  # the device 'meta' holds no numbers
        return device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"Device '{name}' cannot be used: {_first_line(error)}. Use cpu, cuda or cuda:N. Change --device."
        ) from None


def class_of(config: Any) -> Any:
    """Give the class that a config names, if transformers has it; else the causal model of its type.

    Args:
        config: Of a transformers model.

    Returns:
        A class with `from_pretrained` and `_from_config`.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _remedy(local: bool) -> str:
    if local:
        return "The folder should be as `save_pretrained` writes it. Download it again."
    return "A hub id needs the network or a filled cache. Check the name and the connection."


def check_folder(folder: Path) -> None:
    """Check a model folder before anything of it is loaded.

    Args:
        folder: As written by `save_pretrained`.

    Raises:
        ModelError: No config, an adapter, no safetensors, pickled weights only, a missing or damaged shard.
    """
    if (folder / "adapter_config.json").exists():
        raise _has_adapter(str(folder))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json. A model folder is as `save_pretrained` writes it. Check the path."
        )
    shards = _shards(folder)
    if not shards:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds pickled weights only ({pickles[0]}). eckart reads safetensors and never unpickles, "
                "since a pickle can run code. If you trust it, convert it once: in Python, "
                f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')."
            )
        raise ModelError(
            f"{folder} has no weights. A model folder holds model.safetensors, or shards and their index. "
            "Download it again."
        )
    for shard in shards:
        check_safetensors(folder / shard)


def _shards(folder: Path) -> list[str]:
    """The files that hold the weights; none where there is no safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    try:
        return sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error}. It maps weights to shards. Download it again.") from None


def shards_of(source: str) -> list[Path]:
    """List the safetensors files of a model.

    Args:
        source: As for `load`; a hub id must have been loaded before.

    Returns:
        Their paths.

    Raises:
        ModelError: There is no such folder, or its index is damaged.
    """
    name, local = resolve(source)
    folder = Path(name)
    if not local:
        from transformers.utils.hub import cached_file

        config = cached_file(name, "config.json", local_files_only=True)
        assert config is not None, "it was loaded"
        folder = Path(config).parent
    return [folder / shard for shard in _shards(folder)]


def beside(source: str, file: str) -> Path | None:
    """Find a file that may lie beside a model.

    Args:
        source: As for `load`.
        file: Its path in the folder, which does not lead out of it.

    Returns:
        Where it is, or None where there is none.

    Raises:
        ModelError: The path leads out of the folder, or `source` is no model.
    """
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise ModelError(
            f"{source} names a file outside its folder: {file}. A model's files lie in it. Correct modules.json."
        )
    name, local = resolve(source)
    if local:
        found = Path(name) / file
        return found if found.is_file() else None
    from transformers.utils.hub import cached_file

    cached = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if cached is None else Path(cached)


def sentence_modules(source: str) -> list[tuple[str, str]]:
    """List what sentence-transformers puts around a model.

    Args:
        source: As for `load`.

    Returns:
        (path in the folder, type) of each entry of modules.json; none where there is no such file.

    Raises:
        ModelError: The file is damaged.
    """
    file = beside(source, "modules.json")
    if file is None:
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [(str(entry["path"]), str(entry["type"])) for entry in found]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{file} is damaged: {_first_line(error)}. It lists modules with a path and a type. Download it again."
        ) from None


def sentence_files(source: str) -> dict[str, Path]:
    """List the files that make a model's folder one of sentence-transformers, the model's own left out.

    Args:
        source: As for `load`.

    Returns:
        Path in the folder -> where it is; none where the folder is not one of sentence-transformers.

    Raises:
        ModelError: modules.json is damaged, or a module's weights are pickled.
    """
    modules = [path for path, _ in sentence_modules(source) if path not in ("", ".")]
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"] if modules else []
    for path in modules:
        names += [f"{path}/config.json", f"{path}/model.safetensors"]
        if beside(source, f"{path}/pytorch_model.bin") and not beside(source, f"{path}/model.safetensors"):
            raise ModelError(
                f"{source} holds pickled weights only in {path}. eckart reads safetensors and never unpickles, since a "
                "pickle can run code. If you trust it, load and save it with sentence-transformers once."
            )
    return {name: found for name in names if (found := beside(source, name)) is not None}


def _has_adapter(source: str) -> ModelError:
    return ModelError(
        f"{source} holds an adapter (adapter_config.json) beside or instead of a model. eckart edits whole weights. "
        "Merge it first with peft's merge_and_unload() and save_pretrained(), or take the adapter's files away."
    )


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is whole: its header is sound and its length is what the header says.

    Args:
        path: The file.

    Raises:
        ModelError: It is missing, cut off or damaged.
    """

    def fail(problem: str) -> ModelError:
        return ModelError(
            f"{path} is damaged: {problem}. A safetensors file is a header and its tensors. Download it again."
        )

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(_MAX_HEADER, size - 8):
                raise fail(f"its header should have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        expected = 8 + length + max(ends, default=0)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing. The index names it. Download it again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise fail(f"its header cannot be read ({_first_line(error)})") from None
    if size != expected:
        raise fail(f"it has {size} bytes and should have {expected}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Fill a folder that appears whole or not at all.

    Args:
        target: Must not exist, or be an empty folder.

    Yields:
        A temporary folder beside `target`, renamed to it on success and removed on failure.

    Raises:
        OutputError: `target` is not empty, or the disk is full.
    """
    check_empty(target)
    temporary: Path | None = None
    try:
        temporary = _make_beside(target)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        temporary.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
        _sync(target.parent)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if is_full_disk(error) or (isinstance(error, OSError) and not isinstance(error, OutputError)):
            raise _cannot_write(target, error) from error
        raise


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Lend a folder on the disk that a folder will be written to.

    Args:
        target: What will be written; parents that are missing are made, and removed again if they stay empty.

    Yields:
        A new folder beside `target`, which is removed with what is in it.

    Raises:
        OutputError: The disk is full, or the folder cannot be made.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    temporary: Path | None = None
    try:
        temporary = _make_beside(target)
        yield temporary
    except BaseException as error:
        if is_full_disk(error) or (isinstance(error, OSError) and not isinstance(error, EckartError)):
            raise _cannot_write(target, error) from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def _make_beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))


def _cannot_write(target: Path, error: BaseException) -> OutputError:
    return OutputError(
        f"{target} could not be written: {_first_line(error)}. Nothing of it was kept. "
        "Free space there or choose another --out."
    )


def is_full_disk(error: BaseException) -> bool:
    """Tell whether an error means that a disk is full, whichever library raised it.

    Args:
        error: Any exception.

    Returns:
        Whether it does.
    """
    numbers = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in numbers) or any(
        os.strerror(number) in str(error) for number in numbers
    )


def check_empty(target: Path) -> None:
    """Refuse to write where something is.

    Args:
        target: A folder to be made.

    Raises:
        OutputError: It is a file, or a folder that is not empty.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OutputError(
            f"{target} is not empty. Results go into a new or empty folder, so that nothing is overwritten. "
            "Choose another --out, or remove it."
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MANIFEST = "SHA256SUMS"


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    plan: Plan | None = None,
    *,
    results: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    portable: bool = False,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Write a Hugging Face folder.

    Plain transformers loads it, if the model is dense. If it has low-rank layers, `import eckart` comes first;
    without it, loading fails with a message about mismatched sizes.

    Args:
        model: A transformers model, dense or factored. Not modified.
        folder: Must not exist, or be empty. It appears whole or not at all, with the SHA-256 of every file in
            `SHA256SUMS` (`sha256sum --check SHA256SUMS` compares them).
        tokenizer: Written beside the weights.
        plan: Written beside the weights as `plan.json`, and told in the model card.
        results: The results.json of the search that made the plan; what it proved is told in the card.
        max_shard_size: Of a safetensors file, in bytes or as `5GB`.
        portable: Put a modeling file beside factored weights, so that they load without eckart, too, where
            `from_pretrained` is given `trust_remote_code=True`.
        files: Path in the folder -> a file that is copied there, such as `sentence_files` of the original.

    Returns:
        The folder.

    Raises:
        OutputError: `folder` is not empty, or cannot be written.
    """
    saved: Any = model
    target = Path(folder)
    with new_folder(target) as temporary:
        saved.save_pretrained(temporary, max_shard_size=max_shard_size)
        portable = portable and isinstance(getattr(saved.config, "quantization_config", None), LowRankConfig)
        if portable:
            add_modeling(temporary, saved)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if plan is not None:
            write_plan(temporary / "plan.json", plan)
            card = model_card(plan, model, results=results, portable=portable)
            (temporary / "README.md").write_text(card, encoding="utf-8")
        for name, path in (files or {}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        write_manifest(temporary)
    return target


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder into it, as the program sha256sum does.

    Args:
        folder: Gets the file `SHA256SUMS`; folders in it are covered too.
    """
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
            lines.append(f"{digest.hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def model_card(
    plan: Plan, model: nn.Module | None = None, *, results: Mapping[str, Any] | None = None, portable: bool = False
) -> str:
    """Describe an edited model for those who find it.

    Args:
        plan: What was done to it.
        model: The edited model; if it has low-rank layers, the card tells its size and how to load it.
        results: As for `save`.
        portable: A modeling file lies beside it.

    Returns:
        Markdown with Hugging Face's metadata header.
    """

    def code(text: Any) -> str:
        return "`" + re.sub(r"[`|\s]+", " ", str(text)) + "`"

    rows = [f"| {code(e.matrix)} | {e.kind} | {e.rho:g} | {e.rank} of {min(e.shape)} | {e.basis} |" for e in plan.edits]
    base = yaml.safe_dump({"base_model": plan.model.source}).rstrip("\n")
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    size = _size_lines(model, config, portable) if model is not None and isinstance(config, LowRankConfig) else []
    size += _elastic_lines(config) if isinstance(config, ElasticConfig) else []
    command = shlex.join(["eckart", "apply", plan.model.source, "plan.json", *([] if size else ["--dense"])])
    if any(edit.weighting != "none" for edit in plan.edits) or isinstance(config, ElasticConfig):
        # The factors depend on a calibration text, which the plan does not hold.
        command = shlex.join(["eckart", "compress", plan.model.source, "--recipe", "recipe.yaml", "--calibration"])
        command += " TEXT"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            base,
            "tags: [eckart, low-rank, laser]",
            "---",
            "",
            "# Edited with eckart",
            "",
            f"{code(plan.model.source)} ({code(plan.model.architecture)}) with {len(plan.edits)} of its weight "
            f"matrices replaced by eckart {plan.made_by.eckart}. `plan.json` holds the plan; "
            f"SHA-256 of the original weights: {code(plan.model.weights_sha256)}.",
            "",
            f"Made again by {code(command + ' --out DIR')}.",
            "",
            *size,
            *_proved_lines(results),
            "| matrix | kind | rho | rank | basis |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


_PORTABLE = [
    f"Or without eckart, by the file `{MODELING}.py` beside the weights, which then runs on your machine: read it, and "
    "give `from_pretrained` the argument `trust_remote_code=True`.",
    "",
]


def _proved_lines(results: Mapping[str, Any] | None) -> list[str]:
    """What the test examples of a search said, as a table; nothing where there is no such search."""
    if results is None:
        return []
    rows = []
    gains = {"accuracy": results["best"].get("test_gain"), "loss": results["best"].get("test_loss_gain")}
    for name, before in results["baseline"]["test"].items():
        after, gain = results["best"]["test"].get(name), gains.get(name)
        numbers = [f"{m['value']:.4g} ± {m['stderr'] or 0:.2g}" if m else "" for m in (before, after)]
        change = f"{gain['value']:+.3g} ({gain['interval'][0]:+.3g} to {gain['interval'][1]:+.3g})" if gain else ""
        rows.append(f"| {name} | {numbers[0]} | {numbers[1]} | {change} |")
    count = results["task"]["test"]
    return [
        f"Measured on {count} test examples that did not choose the plan, with standard errors:",
        "",
        "| measure | unedited | edited | change, 95 % interval |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _elastic_lines(config: ElasticConfig) -> list[str]:
    """What the card of an elastic folder says besides."""
    return [
        f"This folder is elastic: it holds a model for every ratio up to {config.ratio:g}, and loading reads what the "
        "one that is asked for needs. The table below is that of the largest. Plain transformers cannot load it and "
        "says so; with `pip install eckart` it can:",
        "",
        "```python",
        "import eckart",
        "from transformers import AutoModel  # or the class for the task",
        "",
        'model = AutoModel.from_pretrained("this folder", ratio=0.5)  # or bytes=...',
        "```",
        "",
    ]


def _size_lines(model: nn.Module, config: LowRankConfig, portable: bool) -> list[str]:
    """What the card of a factored model says besides."""
    now, dense = sizes(model)
    stayed = [f"- `{name}` stayed dense: {reason}." for name, reason in config.dense.items()]
    return [
        f"Its {len(config.layers)} low-rank layers are stored as factors: {now.parameters:,} parameters "
        f"({now.bytes:,} bytes) in all, where the dense model has {dense.parameters:,} ({dense.bytes:,} bytes). "
        "Plain transformers cannot load it and says so; with `pip install eckart` it can:",
        "",
        "```python",
        "import eckart",
        "from transformers import AutoModel  # or the class for the task",
        "",
        'model = AutoModel.from_pretrained("this folder")',
        "dense = model.dequantize()  # where factors are not understood",
        "```",
        "",
        *(_PORTABLE if portable else []),
        *([*stayed, ""] if stayed else []),
    ]
