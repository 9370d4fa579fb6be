"""Where recovery starts from: the best components of a low-rank layer, and the factors in which it is trained.

Notation: W is the dense weight, W' the product of a layer's factors, r its rank, C = E[x x^T] the second moments of its
inputs. Corrections follow from the SVD of (W - W') in one of two metrics: that of the weights, or that of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.dataflow import low_rank_layers
from eckart.errors import ModelError
from eckart.experts import FactoredExperts
from eckart.linear import STORAGES, FactoredLinear, LowRankLayer, PivotedLinear, RowBlockedLinear, SelectedLinear
from eckart.quantizer import LowRankConfig, replace_
from eckart.truncation import Spectrum, cut, decompose

SMALLEST = 1e-6
"""Directions of the inputs that are weaker than this share of the mean count as if they had it."""


def correction(weight: Tensor, base: Tensor, rank: int, moments: Tensor | None = None) -> Spectrum:
    """Compute the best correction of a given rank of an approximation.

    Args:
        weight: W, shape (out, in). Not modified.
        base: W', the same shape. Not modified.
        rank: Components of the correction, from 0 to `min(out, in)`.
        moments: C, shape (in, in), symmetric and not negative; without it, the metric is that of the weights.

    Returns:
        B with W' + U diag(S) Vh closest to W: in Frobenius norm, or in the mean squared error of the outputs. U is
        orthonormal; the rows of Vh are so in the metric. float64, on the device of `weight`.

    Source:
        Eckart & Young 1936; in the metric of the outputs QERA-exact, arXiv 2410.06040, which is also EoRA's optimum.
        We take the symmetric root of C and raise its smallest eigenvalues, where they invert a Cholesky factor.

    >>> found = correction(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([3.0, 0.0, 0.0])), 1)
    >>> (found.U * found.S @ found.Vh).diagonal().round()
    tensor([0., 2., 0.], dtype=torch.float64)
    """
    error = weight.double() - base.double()
    if rank == 0:
        out, into = error.shape
        return Spectrum(error.new_zeros(out, 0), error.new_zeros(0), error.new_zeros(0, into))
    if moments is None:
        return cut(decompose(error), rank)
    root, inverse = _roots(moments.to(error))
    found = cut(decompose(error @ root), rank)
    return Spectrum(found.U, found.S, found.Vh @ inverse)


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    floor = SMALLEST * values.clamp(min=0).mean()
    root = values.clamp(min=float(floor) or 1.0).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


@torch.no_grad()
def input_moments(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Measure the second moments of what enters some layers.

    Args:
        model: A causal language model in evaluation mode. Not modified.
        paths: Modules that take one tensor, of shape (..., in).
        batches: Token ids, each of shape (rows, tokens).

    Returns:
        Path -> C, shape (in, in), float64, on the model's device: the mean over tokens of x x^T. Paths of modules
        that were not called are missing.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            product = (x.T @ x).double()
            sums[path] = sums[path] + product if path in sums else product
            counts[path] = counts.get(path, 0) + len(x)

        return hook

    modules = {path: module for path, module in model.named_modules() if path in set(paths)}
    handles = [module.register_forward_pre_hook(keep(path)) for path, module in modules.items()]
    device = next(model.parameters()).device
    try:
        for batch in batches:
            model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / counts[path] for path, total in sums.items()}


def dense_weights(model: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """Find in a dense model the weights that a factored one approximates.

    Args:
        model: With low-rank layers.
        teacher: The model it was made from; layers of it may be low-rank themselves.

    Returns:
        Path of each low-rank layer of `model` -> the weight as that layer sees it: (out, in), or a stack for experts.

    Raises:
        ModelError: The two do not fit together.
    """
    config: Any = model.config
    stored = config.quantization_config.layers if isinstance(config.quantization_config, LowRankConfig) else {}
    found = {}
    for path, layer in low_rank_layers(model).items():
        weight = _weight_at(teacher, path)
        transposed = path in stored and stored[path].transposed and stored[path].storage != "experts"
        weight = weight.T if weight is not None and transposed else weight
        if weight is None or weight.shape != layer.dense().shape:
            raise ModelError(
                f"The teacher has no weight of shape {tuple(layer.dense().shape)} at {path}. Initialising from a "
                "teacher needs the model that was compressed. Give that model, or --init zero."
            )
        found[path] = weight
    return found


def _weight_at(teacher: nn.Module, path: str) -> Tensor | None:
    try:
        module: Any = teacher.get_submodule(path)
    except AttributeError:
        return dict(teacher.named_parameters()).get(path)
    return module.dense().detach() if isinstance(module, LowRankLayer) else getattr(module, "weight", None)


@torch.no_grad()
def initialise_(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    rank: int,
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the last components of every low-rank layer to the best correction of the others, at unchanged rank.

    A layer of rank r keeps its first r - q components, and the q others are the correction of these towards the dense
    weight. Where the layer holds the best components already, in the same metric, nothing changes but rounding.

    Args:
        model: Modified: its low-rank layers are replaced by layers of the same storage, rank, dtype and device. In a
            factored layer the correction lies in the last columns of `up` and rows of `down`.
        weights: From `dense_weights`. Not modified.
        rank: q; a layer of smaller rank is replaced whole.
        moments: From `input_moments`, at the paths of the layers; without it, the metric is that of the weights. Layers
            that are not in it, as experts, take that metric too.
    """
    for path, layer in low_rank_layers(model).items():
        new = _initialised(layer, weights[path].to(_device(layer)), rank, (moments or {}).get(path))
        replace_(model, {path: new})


def _device(layer: LowRankLayer) -> torch.device:
    return layer.weight.device


def _initialised(layer: Any, weight: Tensor, rank: int, moments: Tensor | None) -> nn.Module:
    if isinstance(layer, RowBlockedLinear):
        ends = [block.out_features for block in layer.blocks]
        inverse = None if layer.order is None else layer.order.argsort()
        rows = (weight if inverse is None else weight[inverse]).split(ends)
        blocks: Any = [_initialised(block, part, rank, moments) for block, part in zip(layer.blocks, rows)]
        return RowBlockedLinear(blocks, None if inverse is None else list(inverse.split(ends)))
    if isinstance(layer, SelectedLinear):
        # What the others carry cannot be made up for by a layer that does not read them.
        columns = layer.columns
        moments = None if moments is None else moments[columns][:, columns]
        inner: Any = _initialised(layer.inner, weight[:, columns], rank, moments)
        return SelectedLinear(inner, columns, layer.in_features)
    if isinstance(layer, FactoredExperts):
        stack = weight.mT if layer.transposed else weight
        now = layer.dense().mT if layer.transposed else layer.dense()
        # The ranks were padded to a multiple of 8, so that a rank may exceed what the weight can have.
        ranks = min(layer.down.shape[1], *stack.shape[1:])
        spectra = [merged(part, base, ranks, rank) for part, base in zip(stack, now)]
        return FactoredExperts.from_spectra(spectra, transposed=layer.transposed, dtype=layer.dtype)
    if not isinstance(layer, (FactoredLinear, PivotedLinear)) or layer.rank == 0:
        return layer
    found = merged(weight, layer.dense(), layer.rank, rank, moments)
    if isinstance(layer, PivotedLinear):
        # Its rows are chosen from orthonormal columns.
        found = cut(decompose(found.U * found.S @ found.Vh), layer.rank)
    storage = "pivoted" if isinstance(layer, PivotedLinear) else "factored"
    return STORAGES[storage].from_spectrum(found, bias=layer.bias, dtype=layer.down.weight.dtype)


def merged(weight: Tensor, base: Tensor, rank: int, replaced: int, moments: Tensor | None = None) -> Spectrum:
    """Keep the first components of an approximation and add the best correction, at unchanged rank.

    Args:
        weight: W, shape (out, in). Not modified.
        base: W', of rank `rank`. Not modified.
        rank: Of the result.
        replaced: Components that are given to the correction; all, if there are fewer.
        moments: As for `correction`; W' is cut in the same metric.

    Returns:
        `rank` components, those of the correction last; float64. Neither side is orthonormal.
    """
    replaced = min(replaced, rank)
    kept = correction(base, torch.zeros_like(base), rank - replaced, moments)
    added = correction(weight, kept.U * kept.S @ kept.Vh, replaced, moments)
    pairs = zip((kept.U, kept.S, kept.Vh), (added.U, added.S, added.Vh), (1, 0, 0))
    return Spectrum(*(torch.cat(pair, axis) for *pair, axis in pairs))


@torch.no_grad()
def balance_(model: nn.Module) -> dict[str, PivotedLinear]:
    """Hold every pivoted layer as two balanced factors, in which training is better conditioned.

    A step on the rows that a pivoted layer stores moves all others too, by coefficients of up to 1.1. The product of
    `up` and `down` is the same, and so is the set of matrices that the layer can reach; only the numbers differ, of
    which there are r^2 more while the model is trained.

    Args:
        model: Modified: its pivoted layers, also those in row-blocked ones, become factored layers of the same rank,
            dtype and device, sqrt(S) on each side.

    Returns:
        Path -> the pivoted layer that was there.
    """
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, PivotedLinear)}
    replace_(model, {path: _stored_as(layer, "factored") for path, layer in found.items()})
    return found


@torch.no_grad()
def pivot_(model: nn.Module, paths: Iterable[str]) -> None:
    """Store factored layers by rows again, after `balance_` and training.

    Args:
        model: Modified: layers at `paths` become pivoted layers of the same rank, dtype and device. Their rows are
            chosen anew.
        paths: Of factored layers of at least rank 1.
    """
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    replace_(model, {path: _stored_as(layer, "pivoted") for path, layer in layers.items()})


def _stored_as(layer: FactoredLinear | PivotedLinear, storage: Literal["factored", "pivoted"]) -> nn.Module:
    up, down = layer.up.weight.double(), layer.down.weight.double()
    if isinstance(layer, PivotedLinear):
        up = torch.cat((torch.eye(layer.rank).to(up), up))[layer.order]
    # The SVD of the product, through a matrix of r rows.
    Q, R = torch.linalg.qr(up)
    found = decompose(R @ down)
    spectrum = Spectrum(Q @ found.U, found.S, found.Vh)
    return STORAGES[storage].from_spectrum(spectrum, bias=layer.bias, dtype=layer.down.weight.dtype)
