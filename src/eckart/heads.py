"""Dimensions of heads: a basis of each in which the last can be missed best, and weights turned into it. Tensors only.

A dimension of a head is a row of the value weight and the columns of the output weight that read it: one column for
each query head that the key-value head serves. Attention mixes tokens, never the dimensions of a head, so any change
of basis R of them leaves the model as it is: V becomes R V, and the columns O of each of these query heads O R^-1. Here
R is a rotation, so that metrics turn as weights do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.weighting import square_root


def turning(weighted: Tensor, moment: Tensor, heads: int, size: int) -> Tensor:
    """Find the basis of each key-value head whose first dimensions can tell most of what the output weight reads.

    Args:
        weighted: R' O with R R' the metric of the outputs, shape (out, query heads * size), float64. Not modified.
        moment: Of what O reads, float64; that of a head is the mean over the query heads that it serves. Not modified.
        heads: Key-value heads; each serves as many neighbouring query heads.
        size: Dimensions of a head.

    Returns:
        Rotations, shape (heads, size, size), float64: the first r rows of each span what the best head of r dimensions
        gives, for every r.

    Source:
        The best rank r of O in the metric of its inputs, as for one matrix: of its decomposition O K = U S V' with
        K K' the moment, the head's dimensions are V' K^-1, made orthonormal from the first on.
    """
    found = []
    for parts in torch.arange(moment.shape[0], device=moment.device).view(heads, -1, size):
        root = square_root(torch.stack([moment[part][:, part] for part in parts]).mean(0))
        stacked = torch.cat([weighted[:, part] for part in parts])
        right = torch.linalg.svd(root.after(stacked), full_matrices=len(stacked) < size).Vh
        found.append(torch.linalg.qr(root.undone_after(right).T).Q.T)
    return torch.stack(found)


def turned(tensor: Tensor, turn: Tensor | None, *axes: int) -> Tensor:
    """Write a tensor in the basis of its heads.

    Args:
        tensor: Any floating dtype. Not modified.
        turn: R of each key-value head, shape (heads, size, size); None leaves the tensor as it is.
        axes: Which of the tensor's run over dimensions of heads, of key-value heads or of query heads.

    Returns:
        The same shape, in the dtype and on the device of `tensor`.

    >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> turned(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), swap, 1)
    tensor([[2., 1., 4., 3.]])
    """
    if turn is None:
        return tensor
    heads, size, _ = turn.shape
    for axis in axes:
        moved = tensor.movedim(axis, 0)
        served = moved.shape[0] // (heads * size)
        each = torch.einsum("gij,gqj...->gqi...", turn.to(tensor), moved.reshape(heads, served, size, *moved.shape[1:]))
        tensor = each.reshape(moved.shape).movedim(0, axis)
    return tensor


def columns_of(dimensions: Tensor, turn: Tensor | None, width: int) -> Tensor:
    """Give the columns of the output weight that read some dimensions.

    Args:
        dimensions: Rows of the value weight, shape (k,), int64.
        turn: As for `turned`; None where each row is read by the column of its number, as neurons are.
        width: Columns of the output weight.

    Returns:
        Shape (k, query heads that read each), int64.

    >>> columns_of(torch.tensor([1, 2]), torch.eye(2).expand(2, 2, 2), 8)
    tensor([[1, 3],
            [4, 6]])
    """
    if turn is None:
        return dimensions[:, None]
    heads, size, _ = turn.shape
    served = width // (heads * size)
    query = (dimensions // size * served)[:, None] + torch.arange(served, device=dimensions.device)
    return query * size + (dimensions % size)[:, None]
