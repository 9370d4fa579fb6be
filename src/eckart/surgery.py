"""Plan, check, apply: put a plan's edits into a model, for good or for a while."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart import noise, truncation
from eckart.clustering import (
    Cluster,
    contiguous,
    decompose_clusters,
    even_sizes,
    factored_numbers,
    subspaces,
    truncate_clusters,
)
from eckart.errors import MatrixError, ModelError, PlanError, RankError
from eckart.matrices import Matrix, by_name, find_matrices, read, write
from eckart.plan import STRUCTURES, Edit, Plan
from eckart.truncation import Basis, Spectrum


def make_edit(
    matrix: Matrix,
    rho: float,
    *,
    kind: str = "low_rank",
    basis: Basis = "top",
    svd: str = "exact",
    niter: int = 2,
    seed: int = 0,
    blocks: int = 1,
    clustering: str = "contiguous",
) -> Edit:
    """Describe what should replace a matrix.

    Args:
        matrix: Which one.
        rho: Kept fraction of the largest rank of a block, `0 < rho <= 1`; ignored where kind is `zero`.
        kind: `low_rank`, `zero` or `magnitude`.
        basis: Which singular components stay.
        svd: `exact`, or `lowrank` to mimic the LASER reference.
        niter: Subspace iterations of `lowrank`.
        seed: Of the run; random choices get one of their own for each matrix.
        blocks: Parts of the rows that are each cut by themselves, `1 <= blocks <= out`; ignored where clustering is
            `heads`, which makes one of every attention head.
        clustering: Which rows form a block: `contiguous`, `heads` or `subspaces`.

    Returns:
        The edit.

    Raises:
        RankError: `rho` or `blocks` is outside its range.
        MatrixError: `heads` of a matrix whose rows are not known to be heads.
    """
    if clustering == "heads":
        blocks = _heads_of(matrix)
    clustering = clustering if blocks > 1 else "contiguous"
    largest = even_sizes(matrix.shape[0], blocks)[0]
    rank = {"zero": 0, "magnitude": matrix.rank}.get(kind)
    if rank is None:
        rank = truncation.rank_of(rho, (largest, matrix.shape[1]))
    seeded = basis == "random" or svd == "lowrank" or clustering == "subspaces"
    return Edit.model_validate(
        {
            "matrix": matrix.name,
            "layer": matrix.layer,
            "type": matrix.type,
            "shape": matrix.shape,
            "kind": kind,
            "rho": 0.0 if kind == "zero" else rho,
            "rank": rank,
            "basis": basis,
            "svd": svd,
            "niter": niter,
            "seed": truncation.seed_for(seed, matrix.name) if seeded else 0,
            "stack": matrix.stack,
            "blocks": blocks,
            "clustering": clustering,
        }
    )


def make_edit_by_rule(
    matrix: Matrix, values: Tensor, rule: str, *, kind: str = "low_rank", basis: Basis = "top", seed: int = 0
) -> Edit:
    """Describe what should replace a matrix, at the rank that a rule finds in its singular values.

    Where a rule sees noise alone, one component stays, as for the smallest rho; kind `zero` removes a matrix.

    Args:
        matrix: Which one.
        values: All its singular values, as from `eckart.spectrum.singular_values`.
        rule: One of `eckart.noise.RANK_RULES`.
        kind: `low_rank`; or `shrink`, which replaces the values that stay by the optimal estimate of the signal's.
        basis: Which singular components stay.
        seed: Of the run; a random basis gets one of its own for each matrix.

    Returns:
        The edit; its rho is the share of the largest rank that the rule came to.

    Raises:
        SpectrumError: There is no such rule, or the values are not those of the matrix.
        RankError: Another kind, or `shrink` by a rule that fits no noise.
    """
    if kind not in ("low_rank", "shrink"):
        raise RankError(
            f"kind {kind!r} has no rank for rule {rule!r} to choose. Rules are for kinds low_rank and shrink. "
            "Leave the rule out."
        )
    if kind == "shrink" and rule not in noise.FITS:
        raise RankError(
            f"Rule {rule!r} fits no noise to shrink by. Rules that do are {', '.join(noise.FITS)}. Choose one of them."
        )
    rank = max(1, noise.rank_by(rule, values, matrix.shape))
    sigma = None
    if kind == "shrink":
        sigma = noise.FITS[rule](values, matrix.shape).sigma
        if sigma == 0:  # nothing to shrink by
            kind, sigma = "low_rank", None
        else:
            # What shrinks to nothing is not kept.
            rank = min(rank, max(1, int((noise.shrink(values, matrix.shape, sigma=sigma) > 0).sum())))
    edit = make_edit(matrix, rank / matrix.rank, basis=basis, seed=seed)
    return Edit.model_validate(edit.model_dump() | {"kind": kind, "rank_rule": rule, "noise": sigma})


def _heads_of(matrix: Matrix) -> int:
    if matrix.heads is None:
        raise MatrixError(
            f"{matrix.name} (type {matrix.type}) has no rows that are known to be attention heads. "
            "Clustering 'heads' is for types q_proj, k_proj and v_proj; the heads of out_proj lie in its columns. "
            "Restrict --types to these, or use --blocks with clustering 'contiguous' or 'subspaces'."
        )
    return matrix.heads


def clusters_of(weight: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    """Find the blocks of rows that an edit cuts each by itself.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified; read for `subspaces` only.
        edit: A low-rank edit of it.

    Returns:
        Row indices of every block, ascending, int64, on the CPU.
    """
    if edit.clustering == "subspaces":
        return subspaces(weight, edit.blocks, edit.rank, seed=edit.seed)
    return contiguous(edit.shape[0], edit.blocks)


def decomposition(weight: Tensor, edit: Edit) -> tuple[Cluster, ...]:
    """Decompose what an edit cuts: the blocks of rows, or the one that is the whole weight.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.
        edit: An edit of it, of any kind.

    Returns:
        One cluster a block; it serves every edit of the weight with the same `decomposition_key`.
    """
    return decompose_clusters(weight, clusters_of(weight, edit))


def decomposition_key(edit: Edit) -> tuple[int, ...]:
    """Name what the decomposition for an edit depends on, besides the weight.

    Args:
        edit: Any edit.

    Returns:
        Equal for edits of one matrix that share a decomposition: all ranks do, but those of `subspaces`.
    """
    return (edit.blocks, edit.rank, edit.seed) if edit.clustering == "subspaces" else (edit.blocks,)


def replacement(weight: Tensor, edit: Edit, clusters: Sequence[Cluster] | None = None) -> Tensor:
    """Compute what an edit puts in the place of a weight.

    Args:
        weight: Shape (out, in), any floating dtype and device. Not modified.
        edit: The edit.
        clusters: From `decomposition`, where the caller has it already.

    Returns:
        Shape (out, in); low rank comes in float32 or better, the others in the dtype of `weight`.
    """
    if edit.kind == "zero":
        return torch.zeros_like(weight)
    if edit.kind == "magnitude":
        return truncation.magnitude(weight, edit.rho)
    if edit.svd == "lowrank":
        approximate = truncation.decompose_approximately(weight, edit.rank, niter=edit.niter, seed=edit.seed)
        return truncation.dense(approximate)
    if edit.kind == "low_rank" and edit.rank == edit.full_rank:
        return weight.clone()
    clusters = clusters or decomposition(weight, edit)
    if edit.blocks == 1:
        return truncation.dense(components(clusters[0].spectrum, edit))
    return truncate_clusters(clusters, edit.rank)


def components(spectrum: Spectrum, edit: Edit) -> Spectrum:
    """Give the components that stay of a matrix, or of one of its blocks, with the values that they have then.

    Args:
        spectrum: The exact decomposition. Not modified.
        edit: Its edit, low rank or shrink.

    Returns:
        At most as many components as the edit's rank.
    """
    kept = truncation.cut(spectrum, min(edit.rank, len(spectrum.S)), basis=edit.basis, seed=edit.seed)
    if edit.kind != "shrink":
        return kept
    shrunk = noise.shrink(spectrum.S, edit.shape, sigma=edit.noise)
    return Spectrum(kept.U, shrunk[: edit.rank], kept.Vh)


@dataclass(frozen=True)
class Cost:
    """What an edited matrix takes once every block is kept as two factors, or dense where that is less."""

    numbers: int
    integers: int
    """The order of the rows: `out` of them for `subspaces`, whose blocks are not in order; else none."""
    flops: int
    """Floating-point operations for one token: a multiplication and an addition for each of the numbers."""


def cost(edit: Edit, sizes: Sequence[int] | None = None) -> Cost:
    """Count what an edited matrix takes in memory and in operations.

    Args:
        edit: Any edit.
        sizes: Rows of every block, as of `clusters_of`; needed for `subspaces`, whose blocks differ in size.

    Returns:
        The counts; `magnitude` counts as dense.

    Raises:
        PlanError: `sizes` is missing or does not fit.
    """
    out, into = edit.shape
    if sizes is None and edit.clustering != "subspaces":
        sizes = even_sizes(out, edit.blocks)
    if sizes is None or len(sizes) != edit.blocks or sum(sizes) != out:
        raise PlanError(
            f"{edit.matrix} was given block sizes {sizes}. It has {edit.blocks} blocks with {out} rows in all. "
            "Pass the sizes of eckart.surgery.clusters_of(weight, edit)."
        )
    numbers = 0 if edit.kind == "zero" else factored_numbers(sizes, into, edit.rank)
    return Cost(numbers, out if edit.clustering == "subspaces" else 0, 2 * numbers)


def check_plan(
    model: nn.Module,
    plan: Plan | Sequence[Edit],
    matrices: Sequence[Matrix] | None = None,
    *,
    force: bool = False,
    factors: Collection[str] = (),
) -> list[tuple[Matrix, Edit]]:
    """Match a plan's edits to a model's matrices, before anything is computed.

    Args:
        model: The model. Not modified.
        plan: A plan, whose model must be this one, or bare edits.
        matrices: From `find_matrices(model)`, where the caller has them.
        force: Accept other weights than the plan was made for.
        factors: Matrices whose factors the caller has.

    Returns:
        Each edit with its matrix.

    Raises:
        PlanError: Other weights, an edit whose shape differs, two edits that overlap, or an edit whose weighting
            needs factors that the caller does not have.
        MatrixError: A matrix that the model does not have.
    """
    if isinstance(plan, Plan) and not force:
        actual = weights_sha256(model)
        if plan.model.weights_sha256 != actual:
            raise PlanError(
                f"The plan was made for weights {plan.model.weights_sha256} ({plan.model.source}), and this model's "
                f"are {actual}. A plan fits the weights it was made for, at the same --dtype. "
                "Give that model, or pass --force to apply it all the same."
            )
    edits = plan.edits if isinstance(plan, Plan) else plan
    matrices = find_matrices(model) if matrices is None else matrices
    pairs = [(by_name(matrices, edit.matrix), edit) for edit in edits]
    for matrix, edit in pairs:
        if matrix.shape != edit.shape:
            raise PlanError(
                f"The plan has {matrix.name} with shape {edit.shape}; in this model it is {matrix.shape}. "
                "Shapes are (out, in). The plan was made for another model."
            )
    for edit in edits:
        if (edit.weighting != "none" or edit.kind in STRUCTURES) and edit.matrix not in factors:
            how = f"weighting '{edit.weighting}'" if edit.kind == "low_rank" else f"kind '{edit.kind}'"
            raise PlanError(
                f"The plan cuts {edit.matrix} by {how}, which depends on a calibration text. "
                "A plan holds no numbers, so weights alone cannot make it again. "
                "Use the folder model/ that `eckart compress` wrote beside the plan, or run compress again."
            )
    wholes = {(matrix.parameter, matrix.expert) for matrix, _ in pairs if matrix.whole}
    for matrix, _ in pairs:
        if not matrix.whole and (matrix.parameter, matrix.expert) in wholes:
            raise PlanError(
                f"The plan edits {matrix.name} and the fused weight that holds it. One of the two edits would be lost. "
                "Keep the whole or its parts."
            )
    return pairs


def apply_(
    model: nn.Module,
    plan: Plan | Sequence[Edit],
    matrices: Sequence[Matrix] | None = None,
    *,
    force: bool = False,
) -> nn.Module:
    """Put a plan's edits into a model, in place.

    Decompositions run in float32 or better; the result is stored in the model's dtype.

    Args:
        model: Modified: the matrices that the plan names.
        plan: A plan made for this model, or bare edits.
        matrices: From `find_matrices(model)`, where the caller has them.
        force: Accept other weights than the plan was made for.

    Returns:
        `model`.

    Raises:
        PlanError: The plan does not fit; the model is untouched then.
    """
    for matrix, edit in check_plan(model, plan, matrices, force=force):
        write(model, matrix, replacement(read(model, matrix), edit))
    return model


@contextmanager
def applied(
    model: nn.Module,
    plan: Plan | Sequence[Edit],
    matrices: Sequence[Matrix] | None = None,
    *,
    force: bool = False,
) -> Iterator[nn.Module]:
    """Put a plan's edits into a model for a while; on leaving, its weights are what they were, to the bit.

    Args:
        model: Modified inside the `with` block only.
        plan: A plan made for this model, or bare edits.
        matrices: From `find_matrices(model)`, where the caller has them.
        force: Accept other weights than the plan was made for.

    Yields:
        `model`.

    Raises:
        PlanError: The plan does not fit.
    """
    pairs = check_plan(model, plan, matrices, force=force)
    originals = [(matrix, read(model, matrix)) for matrix, _ in pairs]
    try:
        for (matrix, edit), (_, weight) in zip(pairs, originals):
            write(model, matrix, replacement(weight, edit))
        yield model
    finally:
        for matrix, weight in originals:
            write(model, matrix, weight)


def weights_sha256(model: nn.Module) -> str:
    """Hash the values of all parameters.

    Values, not bytes: a bfloat16 checkpoint loaded as float32 has the same hash, since that loses nothing.

    Args:
        model: Any model. Not modified.

    Returns:
        64 hexadecimal digits; names and shapes count too.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().flatten()
        for start in range(0, values.numel(), 1 << 24):
            part = values[start : start + (1 << 24)].to("cpu", torch.promote_types(values.dtype, torch.float32))
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinity in its weights.

    Args:
        model: Any model. Not modified.

    Raises:
        ModelError: Names the first such weights.
    """
    bad = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ModelError(
            f"{', '.join(bad[:3])}{more} hold NaN or infinity. A weight must be finite. "
            "Download the checkpoint again, or load it in a wider --dtype."
        )
