"""The weights of stacked experts as factors, in the place of the 3-D parameter that held them. torch only.

Expert modules of transformers index that parameter (in a loop over experts, or by the expert of each token) or hand
it to a grouped multiplication. All end in a product with a tensor, which is what is offered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.errors import MatrixError
from eckart.linear import LowRankLayer, bytes_stored, multiply
from eckart.truncation import Spectrum, cut, decompose


class FactoredExperts(LowRankLayer):
    """The weights of a stack of experts as factors, in the place of the 3-D parameter that held them.

    It can be indexed, transposed and multiplied like that parameter, so that the code around it need not know;
    each multiplication becomes two. Anything else raises.
    All experts have the largest of their ranks, rounded up to a multiple of 8 (what `grouped_mm` needs), and the
    difference is zeros: they are stored, counted and multiplied.

    Args:
        experts: Length of the stack.
        in_features: Of the input.
        out_features: Of the output.
        rank: From 1; rounded up.
        transposed: The parameter had shape (experts, in, out), not (experts, out, in).
        device: Of the factors; `meta` where they are loaded later.
        dtype: Of the factors.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, device, dtype)
        rank = self.rounded(rank)
        self.transposed = transposed
        self.down = nn.Parameter(torch.zeros(experts, rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(experts, out_features, rank, device=device, dtype=dtype))

    @classmethod
    def from_spectra(
        cls, spectra: Sequence[Spectrum], *, transposed: bool = False, dtype: torch.dtype | None = None
    ) -> FactoredExperts:
        """Store one decomposition for each expert.

        Args:
            spectra: What `cut` kept of each, of equal shape (out, in) and any ranks. Not modified.
            transposed: As above; the decompositions are of (out, in) all the same.
            dtype: Of the factors; by default that of `spectra`.

        Returns:
            The layer, on the device of `spectra`.
        """
        first = spectra[0]
        layer = cls(
            len(spectra),
            first.Vh.shape[1],
            first.U.shape[0],
            max(len(spectrum.S) for spectrum in spectra),
            transposed=transposed,
            device=first.U.device,
            dtype=dtype or first.U.dtype,
        )
        with torch.no_grad():
            for expert, spectrum in enumerate(spectra):
                root, rank = spectrum.S.sqrt(), len(spectrum.S)
                layer.down[expert, :rank] = root[:, None] * spectrum.Vh
                layer.up[expert, :, :rank] = spectrum.U * root
        return layer

    @classmethod
    def from_weight(cls, weight: Tensor, ranks: Sequence[int], *, transposed: bool = False) -> FactoredExperts:
        """Store the closest matrix of its rank for each expert.

        Args:
            weight: Shape (experts, out, in), or (experts, in, out) if `transposed`. Not modified.
            ranks: One for each expert, from 1 to `min(out, in)`.
            transposed: As above.

        Returns:
            The layer, in the dtype and on the device of `weight`.

        Raises:
            RankError: A rank is outside its range.
        """
        stack = weight.detach().mT if transposed else weight.detach()
        spectra = [cut(decompose(matrix), rank) for matrix, rank in zip(stack, ranks)]
        return cls.from_spectra(spectra, transposed=transposed, dtype=weight.dtype)

    @staticmethod
    def rounded(rank: int) -> int:
        """Give the next multiple of 8."""
        return -(-rank // 8) * 8

    def flops(self, tokens: int) -> int:
        """Give the operations of one forward pass.

        Args:
            tokens: Pairs of a token and an expert it is sent to.

        Returns:
            Two for every number of one expert's factors and pair.
        """
        return 2 * tokens * self.parameters_stored // len(self.down)

    def dense(self) -> Tensor:
        """Multiply the weight out."""
        weight = multiply(self.up, self.down)
        return weight.mT if self.transposed else weight

    def forward(self) -> Product:
        """Give the 3-D parameter that it stands for, not multiplied out."""
        return Product(self.down.mT, self.up.mT) if self.transposed else Product(self.up, self.down)

    @property
    def product(self) -> Product:
        """What `forward` gives; called as a module, so that hooks which bring offloaded weights back run."""
        return self()

    def __getitem__(self, index: Any) -> Product:
        return self.product[index]

    def transpose(self, first: int, second: int) -> Product:
        """Transpose each expert's weight, as a tensor's method does."""
        return self.product.transpose(first, second)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.down.dtype

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return self.down.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [argument.product if isinstance(argument, cls) else argument for argument in args]
        return Product.__torch_function__(func, types, args, kwargs)


class Product:
    """left @ right, to be multiplied by but never multiplied out.

    Args:
        left: Shape (..., rows, rank).
        right: Shape (..., rank, columns).
    """

    # By name, since transformers has a `grouped_mm` of its own and torch has two.
    MULTIPLICATIONS = (
        "linear",
        "matmul",
        "__matmul__",
        "mm",
        "bmm",
        "grouped_mm",
        "_grouped_mm",
        "grouped_mm_fallback",
    )

    def __init__(self, left: Tensor, right: Tensor):
        self.left, self.right = left, right

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return self.left.device

    def __getitem__(self, index: Any) -> Product:
        return Product(self.left[index], self.right[index])

    def transpose(self, first: int, second: int) -> Product:
        """Swap rows and columns."""
        assert {first % self.left.ndim, second % self.left.ndim} == {self.left.ndim - 2, self.left.ndim - 1}
        return Product(self.right.mT, self.left.mT)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name not in cls.MULTIPLICATIONS or sum(isinstance(argument, cls) for argument in args[:2]) != 1:
            raise MatrixError(
                f"'{name}' was called with a factored weight. It can be indexed, transposed and multiplied. "
                "Use its dense() there."
            )
        first, second, *rest = args
        if name == "linear":
            return func(func(first, second.right), second.left, *rest, **kwargs)
        if isinstance(second, cls):
            return func(func(first, second.left, *rest, **kwargs), second.right, *rest, **kwargs)
        return func(first.left, func(first.right, second, *rest, **kwargs), *rest, **kwargs)


def costs_at(
    ranks: NDArray[np.int64],
    shape: tuple[int, int],
    *,
    storage: Literal["factored", "pivoted"],
    dtype: torch.dtype,
    experts: int = 0,
    in_bytes: bool = False,
) -> NDArray[np.float64]:
    """Count what a matrix, or a stack of experts that share a rank, takes at every rank.

    Args:
        ranks: From 1 to the largest.
        shape: (out, in).
        storage: Of a matrix that is cut; experts are factored.
        dtype: Of the numbers.
        experts: How many; 0 for a matrix by itself.
        in_bytes: Count bytes, an order of rows among them; otherwise numbers, without it.

    Returns:
        At each rank; at the largest what the dense weight takes.
    """
    out, into = shape
    size = dtype.itemsize if in_bytes else 1

    def cost(rank: int) -> float:
        if rank == min(shape):
            return size * out * into * max(1, experts)
        if experts:
            return size * FactoredExperts.rounded(rank) * (out + into) * experts
        taken = bytes_stored(storage, shape, rank, dtype)
        order = 8 * out if storage == "pivoted" else 0
        return taken if in_bytes else (taken - order) / dtype.itemsize

    return np.array([cost(int(rank)) for rank in ranks], dtype=np.float64)
