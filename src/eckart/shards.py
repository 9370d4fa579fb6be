"""Weights read one matrix at a time, from the files they are stored in, without the model ever being loaded.

A folder's safetensors are mapped into memory and only the pages of the matrix at hand are touched; of a hub id only the
bytes of that matrix are fetched. What transformers would do to a stored tensor on loading (rename it, stack experts,
join gate and up) is done to the matrix alone, and numbers that are stored with scales, or as eckart's factors, come
multiplied out.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from eckart.checkpoint import check_folder, resolve
from eckart.elastic import METHOD as ELASTIC
from eckart.errors import MatrixError, ModelError
from eckart.linear import LowRankLayer
from eckart.matrices import Matrix, coverage, output_embeddings, part_of
from eckart.quantizer import METHOD, LowRankConfig, StoredLayer, empty_layer
from eckart.skeleton import matrices_of, skeleton

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NARROW = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, where it lies."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: `BF16`, `F8_E4M3`."""
    file: str
    """Name of the shard."""
    key: str
    """Changes when the file, or the tensor's place in it, does."""


Reader = Callable[[Stored, "int | None"], Tensor]


@dataclass
class _Place:
    """Which stored tensors make up a parameter, and how."""

    sources: dict[str, list[Stored]] = field(default_factory=dict)
    """Pattern of the converter (or the name) -> tensors, experts in order."""
    converter: WeightConverter | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are still in their files."""

    source: str
    matrices: tuple[Matrix, ...]
    """As `eckart.find_matrices` would list them, wholes and parts, but for those in `skipped`."""
    skipped: Mapping[str, str]
    """Matrix or tensor -> why it cannot be read."""
    warnings: tuple[str, ...]
    """Sentences."""
    architecture: str
    parameters: int
    """Numbers stored, all tensors."""
    embeddings: tuple[str, ...]
    """Parameters that are the input embedding or the output head, as the loaded model names them."""
    coverage: float
    """Share of the weights of matrices that `matrices` hold; see `eckart.coverage`."""
    tensors: Mapping[str, Stored]
    _places: Mapping[str, _Place]
    _read: Reader
    _config: Any
    _model: Any = None

    def key(self, matrix: Matrix) -> str:
        """Name what a matrix's numbers depend on, without reading them.

        Args:
            matrix: One of `matrices`.

        Returns:
            64 hexadecimal digits, another where a file of it changed or the matrix is cut out otherwise.
        """
        stored = sorted(one.key for one in self._stored(matrix))
        return hashlib.sha256(repr((matrix, stored)).encode()).hexdigest()

    def read(self, matrix: Matrix) -> Tensor:
        """Read one matrix.

        Args:
            matrix: One of `matrices`.

        Returns:
            Shape (out, in), on the CPU, in the stored dtype, or float32 where that is narrower than 16 bits or the
            matrix is multiplied out of factors. Not to be written to: it may be a view of the mapped file.

        Raises:
            ModelError: The file is damaged or gone, or fetching fails.
        """
        tensor, expert = self._parameter(matrix.parameter, matrix.expert)
        if tuple(tensor.shape[-2:]) != _stored_shape(matrix, tensor):
            raise MatrixError(
                f"{matrix.name} is stored with shape {tuple(tensor.shape)}, and the config makes it {matrix.shape}. "
                "Both come from one folder. Download config.json and the weights again."
            )
        return part_of(tensor, replace(matrix, expert=expert))

    def _stored(self, matrix: Matrix) -> list[Stored]:
        """The tensors that a matrix is made of, scales and factors among them."""
        place = self._places[matrix.parameter]
        chosen = _of_expert(place, matrix.expert) if matrix.expert is not None else None
        found = [one for ones in (chosen or place.sources).values() for one in ones]
        return found + [s for one in found if (s := self._scale(one)) is not None]

    def _scale(self, stored: Stored) -> Stored | None:
        if stored.dtype not in _NARROW:
            return None
        return next((self.tensors[name] for s in _SCALES if (name := stored.name + s) in self.tensors), None)

    def _parameter(self, name: str, expert: int | None) -> tuple[Tensor, int | None]:
        """Give a parameter, or what holds one expert of it, and the expert's index in that."""
        place = self._places[name]
        layer = _layer_of(self._config, name)
        if layer is not None:
            return self._multiplied_out(place, layer, expert)
        if place.converter is None:
            (stored,) = next(iter(place.sources.values()))
            if expert is None:
                return self._numbers(stored), None
            return self._numbers(stored, expert)[None], 0
        sources = _of_expert(place, expert) if expert is not None else None
        converter = copy.deepcopy(place.converter)
        for pattern, ones in (sources or place.sources).items():
            for stored in ones:
                converter.add_tensor(name, stored.name, pattern, partial(self._numbers, stored))  # pyright: ignore[reportArgumentType]
        converted = converter.convert(name, model=self._model, config=self._config)
        found = converted[name]
        found = found[0] if isinstance(found, list) else found
        return found, 0 if sources else expert

    def _numbers(self, stored: Stored, index: int | None = None) -> Tensor:
        """One stored tensor, or one slice of it along the first axis, scales multiplied in."""
        tensor = self._read(stored, index)
        if stored.dtype not in _NARROW:
            return tensor
        tensor = tensor.float()
        scale = self._scale(stored)
        if scale is None:
            return tensor
        factors = self._read(scale, index if index is not None and len(scale.shape) == len(stored.shape) else None)
        return scaled_(tensor, factors.float(), _block_size(self._config))

    def _multiplied_out(self, place: _Place, stored: StoredLayer, expert: int | None) -> tuple[Tensor, int | None]:
        parts = {suffix: ones[0] for suffix, ones in place.sources.items()}
        if stored.storage == "experts":
            up, down = (self._read(parts[suffix], expert).float() for suffix in ("up", "down"))
            product = up @ down
            return (product.mT if stored.transposed else product)[None], 0
        layer: LowRankLayer = empty_layer(stored, bias=False)
        numbers = {suffix: self._read(one, None) for suffix, one in parts.items()}
        layer.load_state_dict(numbers, strict=False, assign=True)
        dense = layer.float().dense().detach()
        return (dense.mT if stored.transposed else dense), None


def open_checkpoint(source: str) -> Checkpoint:
    """Find the matrices of a checkpoint, and where each is stored, without loading it.

    Reads the config, the headers of the shards, and no weight. The network is used only if `source` is a hub id.

    Args:
        source: A folder as `save_pretrained` writes it, or a hub id.

    Returns:
        The checkpoint.

    Raises:
        ModelError: There is no such model, or its files are damaged, pickled or incomplete.
    """
    name, local = resolve(source)
    config_file, tensors, read = _local(Path(name)) if local else _remote(name)
    parameters = sum(math.prod(one.shape) for one in tensors.values())
    try:
        config = transformers.AutoConfig.from_pretrained(
            config_file.parent, local_files_only=True, trust_remote_code=False
        )
        model = skeleton(config)
        matrices = matrices_of(model)
    except Exception as error:  # an unknown or remote architecture, or one that does not run on made-up weights
        return _by_shape(source, config_file, tensors, read, parameters, error)
    places = _places(model, config, tensors)
    skipped = {m.name: why for m in matrices if (why := _unreadable(m, places.get(m.parameter), config, tensors))}
    known = {one.name for place in places.values() for ones in place.sources.values() for one in ones}
    unknown = [
        one.name for one in tensors.values() if one.name not in known and len(one.shape) == 2 and _is_weight(one)
    ]
    warnings = []
    if skipped:
        first, why = next(iter(skipped.items()))
        warnings.append(f"{len(skipped)} matrices cannot be read and are left out, {first} first: {why}.")
    if unknown:
        warnings.append(
            f"{len(unknown)} stored tensors have no place in {type(model).__name__} and are left out, "
            f"{unknown[0]} first."
        )
    readable = tuple(m for m in matrices if m.name not in skipped)
    return Checkpoint(
        source=source,
        matrices=readable,
        skipped=skipped,
        warnings=tuple(warnings),
        architecture=type(model).__name__,
        parameters=parameters,
        embeddings=_embeddings(model),
        coverage=coverage(model, readable),
        tensors=tensors,
        _places=places,
        _read=read,
        _config=config,
        _model=model,
    )


def scaled_(tensor: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """Multiply a tensor by scales that are stored for blocks of it.

    Args:
        tensor: Shape (…, rows, columns). Modified.
        scales: One for all, one for each row (shape (rows, 1)), or one for each block; leading axes as of `tensor`.
        block: Rows and columns of a block; by default those that divide the tensor most evenly.

    Returns:
        `tensor`.

    Raises:
        ModelError: The scales do not fit.

    >>> scaled_(torch.ones(3, 2), torch.tensor([[2.0], [3.0]]), (2, 2))
    tensor([[2., 2.],
            [2., 2.],
            [3., 3.]])
    """
    if scales.numel() == 1:
        return tensor.mul_(scales.reshape(()))
    if scales.ndim == 1:
        scales = scales[:, None]
    rows, columns = tensor.shape[-2:]
    down, across = scales.shape[-2:]
    high, wide = -(-rows // down), -(-columns // across)
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (down, across):
        high, wide = block
    if scales.ndim != tensor.ndim or (-(-rows // high), -(-columns // wide)) != (down, across):
        raise ModelError(
            f"Scales of shape {tuple(scales.shape)} do not fit a weight of shape {tuple(tensor.shape)}. "
            "There is one scale for all of it, for each row, or for each block of equal size. "
            "Download the folder again."
        )
    for index in range(down):
        row = scales[..., index : index + 1, :].repeat_interleave(wide, -1)[..., :columns]
        tensor[..., index * high : (index + 1) * high, :].mul_(row)
    return tensor


# Where the bytes are.


def _local(folder: Path) -> tuple[Path, dict[str, Stored], Reader]:
    check_folder(folder)
    index = folder / _INDEX
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Stored] = {}
    for shard in shards:
        path = folder / shard
        about = path.stat()
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors |= _entries(shard, header, f"{shard} {about.st_size} {about.st_mtime_ns}")

    def read(stored: Stored, part: int | None) -> Tensor:
        path = folder / stored.file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored.name) if part is None else file.get_slice(stored.name)[part]
        except Exception as error:  # OSError and safetensors' own
            raise ModelError(
                f"{stored.name} could not be read from {path}: {error}. The file was whole when the scan began. "
                "Leave it in its place and give the same command again."
            ) from error

    return folder / "config.json", tensors, read


def _remote(repository: str) -> tuple[Path, dict[str, Stored], Reader]:
    """Config and headers of a hub id, pinned to the commit of now; tensors are fetched as ranges of bytes."""
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().model_info(repository).sha
        config = Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=commit))
        files: Any = huggingface_hub.HfFileSystem()
        root = f"{repository}@{commit}"
        names = {Path(str(path)).name for path in files.ls(root, detail=False)}
        shards = ["model.safetensors"] if "model.safetensors" in names else []
        if _INDEX in names:
            shards = sorted(set(json.loads(files.cat_file(f"{root}/{_INDEX}"))["weight_map"].values()))
        if not shards:
            raise ModelError(
                f"{repository} has no safetensors. eckart reads no other format. Choose a model that has them."
            )
        tensors: dict[str, Stored] = {}
        starts: dict[str, tuple[int, int]] = {}
        for shard in shards:
            length = int.from_bytes(files.cat_file(f"{root}/{shard}", 0, 8), "little")
            header = json.loads(files.cat_file(f"{root}/{shard}", 8, 8 + length))
            tensors |= _entries(shard, header, f"{shard} {commit}")
            starts |= {
                name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            }
    except ModelError:
        raise
    except Exception as error:  # the hub client raises OSError, ValueError, httpx's and its own
        raise ModelError(
            f"{repository} could not be looked up: {str(error).splitlines()[0]}. "
            "A hub id needs the network. Check the name and the connection."
        ) from error

    @lru_cache(maxsize=1)  # the parts of one fused weight follow each other
    def fetched(name: str, part: int | None) -> Tensor:
        stored = tensors[name]
        start, end = starts[name]
        shape = stored.shape
        if part is not None:
            size = (end - start) // shape[0]
            start, end, shape = start + part * size, start + (part + 1) * size, shape[1:]
        try:
            numbers = bytearray(files.cat_file(f"{root}/{stored.file}", start, end))
        except Exception as error:
            raise ModelError(
                f"{name} could not be fetched from {repository}: {str(error).splitlines()[0]}. "
                "What is done is kept. Give the same command again."
            ) from error
        return torch.frombuffer(numbers, dtype=_DTYPES[stored.dtype]).reshape(shape)

    return config, tensors, lambda stored, part: fetched(stored.name, part)


def _entries(shard: str, header: Mapping[str, Any], version: str) -> dict[str, Stored]:
    return {
        name: Stored(name, tuple(entry["shape"]), entry["dtype"], shard, f"{version} {name} {entry['data_offsets']}")
        for name, entry in header.items()
        if name != "__metadata__"
    }


# What becomes of a stored tensor.


def _places(model: Any, config: Any, tensors: Mapping[str, Stored]) -> dict[str, _Place]:
    """Assign stored tensors to the model's parameters, as transformers does on loading."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    places: dict[str, _Place] = {}
    for stored in sorted(tensors.values(), key=lambda one: dot_natural_key(one.name)):
        name, pattern = rename_source_key(stored.name, renamings, converters, model.base_model_prefix, parameters)
        if pattern is not None:
            converter = by_pattern[pattern]
            for target in _targets(name, converter):
                place = places.setdefault(target, _Place(converter=converter))
                place.sources.setdefault(pattern, []).append(stored)
        elif name in parameters:
            places[name] = _Place({stored.name: [stored]})
    for name in parameters:
        if _layer_of(config, name) is not None:
            path = name.removesuffix(".weight")
            inner = {one.name[len(path) + 1 :]: one for one in tensors.values() if one.name.startswith(f"{path}.")}
            places[name] = _Place({suffix: [one] for suffix, one in inner.items() if suffix not in ("weight", "bias")})
    return places


def _embeddings(model: Any) -> tuple[str, ...]:
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # it reads no tokens
        table = None
    modules = {id(found) for found in (output_embeddings(model), table) if found is not None}
    named = [path for path, module in model.named_modules() if id(module) in modules]
    return tuple(name for name, _ in model.named_parameters() if name.removesuffix(".weight") in named)


def _targets(name: str, converter: WeightConverter) -> list[str]:
    """The parameters that a converter makes of a tensor whose first one is `name`."""
    for target in converter.target_patterns:
        if target in name:
            return [name.replace(target, other) for other in converter.target_patterns]
    return [name]


def _of_expert(place: _Place, expert: int) -> dict[str, list[Stored]] | None:
    """The tensors of one expert, where a converter begins by stacking tensors of single experts."""
    if place.converter is None or not isinstance(place.converter.operations[0], MergeModulelist):
        return None
    return {pattern: [ones[expert]] for pattern, ones in place.sources.items()}


def _layer_of(config: Any, parameter: str) -> StoredLayer | None:
    """How eckart stored a parameter as factors; None if it did not."""
    found = _eckart_layers(config)
    return found.get(parameter.removesuffix(".weight"))


def _eckart_layers(config: Any) -> Mapping[str, StoredLayer]:
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == ELASTIC:
        raise ModelError(
            "The folder is elastic: its weights have no one size. What is inspected has one. Write a size of it by "
            "`eckart apply MODEL --ratio R --out DIR`, and inspect DIR/model."
        )
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
        stored = config.quantization_config = LowRankConfig(**stored)
    return stored.layers if isinstance(stored, LowRankConfig) else {}


def _block_size(config: Any) -> tuple[int, int] | None:
    stored = getattr(config, "quantization_config", None)
    size = stored.get("weight_block_size") if isinstance(stored, dict) else None
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _unreadable(matrix: Matrix, place: _Place | None, config: Any, tensors: Mapping[str, Stored]) -> str:
    """Why a matrix cannot be read; empty if it can."""
    if place is None or not place.sources:
        near = next((n for n in tensors if n.startswith(matrix.parameter.removesuffix("weight").rstrip("."))), None)
        return f"no tensor is stored for it{f' (but {near} is)' if near else ''}"
    if _layer_of(config, matrix.parameter) is not None:
        return ""
    stored = [one for ones in place.sources.values() for one in ones]
    strange = next((one.dtype for one in stored if one.dtype not in _DTYPES), None)
    return f"its numbers are stored as {strange}, which eckart does not read" if strange else ""


def _stored_shape(matrix: Matrix, tensor: Tensor) -> tuple[int, ...]:
    """The last two sizes that a matrix's parameter must have; of a part, only the inputs are known from the matrix."""
    out, into = matrix.shape
    if matrix.rows is not None:
        out = tensor.shape[-1] if matrix.transposed else tensor.shape[-2]
        needed = max(rows[-1] for rows in matrix.rows) + 1
        out = out if out >= needed else needed
    return (into, out) if matrix.transposed else (out, into)


def _is_weight(stored: Stored) -> bool:
    return stored.dtype in _DTYPES and min(stored.shape) > 1 and not stored.name.endswith(_SCALES)


def _by_shape(
    source: str, config_file: Path, tensors: dict[str, Stored], read: Reader, parameters: int, problem: Exception
) -> Checkpoint:
    """List matrices by the names and shapes of what is stored, where the config says no more."""
    reason = (str(problem).strip() or type(problem).__name__).split("\n")[0].rstrip(".")
    cannot = ModelError(
        f"{source} cannot be inspected: {reason}. A model's folder has a sound config.json and weights beside it. "
        "Download it again."
    )
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        vocabulary, (architecture, *_) = raw.get("vocab_size"), raw.get("architectures") or ["unknown"]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise cannot from problem
    matrices, places = [], {}
    for stored in tensors.values():
        if len(stored.shape) not in (2, 3) or not _is_weight(stored) or vocabulary in stored.shape:
            continue
        places[stored.name] = _Place({stored.name: [stored]})
        place = re.match(r"(.*?)\.(\d+)\.", stored.name)
        stack, layer = (place[1], int(place[2])) if place else ("", None)
        base, (out, into) = stored.name.removesuffix(".weight"), stored.shape[-2:]
        experts: Iterable[int | None] = range(stored.shape[0]) if len(stored.shape) == 3 else [None]
        matrices += [
            Matrix(
                base if expert is None else f"{base}[{expert}]",
                stored.name,
                (out, into),
                stack=stack,
                layer=layer,
                type="other",
                expert=expert,
            )
            for expert in experts
        ]
    if not matrices:
        raise cannot from problem
    held = sum(math.prod(tensors[name].shape) for name in places)
    return Checkpoint(
        source=source,
        matrices=tuple(matrices),
        skipped={},
        warnings=(
            f"The types of this model's matrices are unknown, and all are called 'other': {reason}. "
            "Matrices are told by the names and shapes of what is stored; weights may be transposed or fused.",
        ),
        architecture=str(architecture),
        parameters=parameters,
        embeddings=(),
        coverage=held / max(1, sum(math.prod(one.shape) for one in tensors.values() if len(one.shape) in (2, 3))),
        tensors=tensors,
        _places=places,
        _read=read,
        _config=None,
    )
