"""A linear layer and an embedding whose weight is a tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .contraction import contract
from .factors import FactorError, factorize
from .trains import Rank, TensorTrain, decomposed

PARTS = 3  # factors of each side


class TTLinear(TensorTrain):
    """`x W' + b` with `W = reshape(G_1 D_1 G_2 ... G_N)`, the modes of the cores being `out_factors` and then `in_factors`.

    Input `(..., in_features)`, output `(..., out_features)`. The input is contracted with the cores in the order of the fewest operations.

    Args:
        rank, seed, tolerance, device, dtype: As in `TensorTrain`.
        bias: Add a bias, which starts at 0.
        out_factors, in_factors: Factors of the sides. Their product may exceed the side: the rest is padding. By default `factorize` finds
            them, in at most `parts` factors.
        pad: Allow the default factors to exceed the side, as a prime side needs.

    Raises:
        FactorError: A side is prime, and neither `pad` nor factors are given.
        ValueError: Factors whose product is smaller than their side; and as `TensorTrain`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Rank,
        *,
        seed: int,
        bias: bool = True,
        out_factors: Sequence[int] | None = None,
        in_factors: Sequence[int] | None = None,
        parts: int = PARTS,
        pad: bool = False,
        **options: Any,
    ) -> None:
        self.out_factors = _factors("out_features", out_features, out_factors, parts, pad=pad)
        self.in_factors = _factors("in_features", in_features, in_factors, parts, pad=pad)
        super().__init__((*self.out_factors, *self.in_factors), rank, (2 / (in_features + out_features)) ** 0.5, seed=seed, **options)
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(self.cores[0].new_zeros(out_features)) if bias else None)

    @property
    def dense_size(self) -> int:
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        count, outputs = len(self.modes), len(self.out_factors)
        rows = functional.pad(x, (0, math.prod(self.in_factors) - self.in_features)).reshape(-1, *self.in_factors)
        batch, ins = 2 * count, range(count + outputs, 2 * count)
        out = contract([rows, *self.tensors()], [(batch, *ins), *self.core_labels()], (batch, *range(count, count + outputs)))
        out = out.reshape(*x.shape[:-1], math.prod(self.out_factors))[..., : self.out_features]
        return out if self.bias is None else out + self.bias.to(out.dtype)  # under autocast, the products are in half precision

    def dense(self) -> Tensor:
        whole = self.contracted().reshape(math.prod(self.out_factors), -1)
        return whole[: self.out_features, : self.in_features]

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the best cores for a dense weight `(out_features, in_features)`, in the sense of `decomposed`; open all gates."""
        rows, cols = math.prod(self.out_factors), math.prod(self.in_factors)
        padded = functional.pad(weight.double(), (0, cols - self.in_features, 0, rows - self.out_features))
        self.set_cores(decomposed(padded.reshape(self.modes), self.ranks))


class TTEmbedding(TensorTrain):
    """Rows of a table `(num_embeddings, embedding_dim)` whose entries are products of cores at the digits of the index.

    Core i is `(r_(i-1), v_i, n_i, r_i)`, stored with `s_i = v_i n_i` (a tensor-train matrix). Input: whole numbers of any shape. Output:
    that shape with `embedding_dim` appended. Each index of a batch is computed once.

    Args:
        rank, seed, tolerance, device, dtype: As in `TensorTrain`.
        padding_idx: An index whose row is 0, as in `nn.Embedding`.
        row_factors, col_factors: The v_i and the n_i, equally many. Their products may exceed the sides. By default `factorize` finds
            them with `pad=True`; a row that no index names costs little.

    Raises:
        ValueError: Factors that are too small or not equally many; and as `TensorTrain`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: Rank,
        *,
        seed: int,
        padding_idx: int | None = None,
        row_factors: Sequence[int] | None = None,
        col_factors: Sequence[int] | None = None,
        parts: int = PARTS,
        **options: Any,
    ) -> None:
        rows = _factors("num_embeddings", num_embeddings, row_factors, parts, pad=True)
        cols = _factors("embedding_dim", embedding_dim, col_factors, parts, pad=True)
        if row_factors is not None and col_factors is not None and len(rows) != len(cols):
            raise ValueError(f"row_factors {rows} and col_factors {cols} must be equally many; a factor of 1 is allowed")
        count = max(len(rows), len(cols))
        self.row_factors, self.col_factors = ((1,) * (count - len(some)) + some for some in (rows, cols))
        super().__init__([v * n for v, n in zip(self.row_factors, self.col_factors, strict=True)], rank, 1.0, seed=seed, **options)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx

    @property
    def dense_size(self) -> int:
        return self.num_embeddings * self.embedding_dim

    def forward(self, index: Tensor) -> Tensor:
        """The rows of some indices.

        Raises:
            IndexError: An index is negative or not below `num_embeddings`.
        """
        distinct, place = torch.unique(index, return_inverse=True)
        if distinct.numel() and not 0 <= int(distinct[0]) <= int(distinct[-1]) < self.num_embeddings:
            raise IndexError(f"indices from {int(distinct[0])} to {int(distinct[-1])}; this table has {self.num_embeddings} rows")
        count, each = len(self.modes), distinct
        digits: list[Tensor] = []
        for v in reversed(self.row_factors):
            digits.insert(0, each % v)
            each = each // v
        batch, parts, labels = 2 * count, [], []
        for i, (core, own, digit) in enumerate(zip(self.tensors(), self.core_labels(), digits, strict=True)):
            axis = min(i, 1)  # of the mode; the first core has no dimension to its left
            parts.append(core.unflatten(axis, (self.row_factors[i], self.col_factors[i])).index_select(axis, digit))
            labels.append((*own[:axis], batch, *own[axis:]))
        rows = contract(parts, labels, (batch, *range(count, 2 * count))).reshape(distinct.numel(), math.prod(self.col_factors))
        if self.padding_idx is not None:
            rows = rows.masked_fill((distinct == self.padding_idx).unsqueeze(-1), 0.0)
        return rows[:, : self.embedding_dim][place]

    def dense(self) -> Tensor:
        count, whole = len(self.modes), self.contracted()
        pairs = whole.reshape([size for both in zip(self.row_factors, self.col_factors, strict=True) for size in both])
        table = pairs.permute(*range(0, 2 * count, 2), *range(1, 2 * count, 2)).reshape(math.prod(self.row_factors), -1)
        table = table[: self.num_embeddings, : self.embedding_dim]
        if self.padding_idx is None:
            return table
        is_padding = torch.arange(self.num_embeddings, device=table.device) == self.padding_idx
        return table.masked_fill(is_padding.unsqueeze(-1), 0.0)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the best cores for a dense table `(num_embeddings, embedding_dim)`, in the sense of `decomposed`; open all gates."""
        count, (rows, cols) = len(self.modes), (math.prod(self.row_factors), math.prod(self.col_factors))
        padded = functional.pad(weight.double(), (0, cols - self.embedding_dim, 0, rows - self.num_embeddings))
        apart = padded.reshape(*self.row_factors, *self.col_factors)
        pairs = apart.permute([axis for i in range(count) for axis in (i, count + i)])
        self.set_cores(decomposed(pairs.reshape(self.modes), self.ranks))


def _factors(name: str, size: int, given: Sequence[int] | None, parts: int, *, pad: bool) -> tuple[int, ...]:
    """The factors of a side: those given, checked, or those that `factorize` finds."""
    if given is None:
        try:
            return factorize(size, parts, pad=pad)
        except FactorError as error:
            raise FactorError(f"{name}: {error}") from None
    if math.prod(given) < size or min(given, default=0) < 1:
        raise ValueError(f"the factors {tuple(given)} have product {math.prod(given)}, and {name} is {size}; their product must reach it")
    return tuple(given)
