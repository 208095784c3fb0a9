"""Columns of a Walsh-Hadamard matrix as a subspace: a fixed orthonormal dictionary whose entries are +-1 up to scale.

For n columns the dictionary is block diagonal, with one Sylvester matrix for each power of two in the binary expansion
of n (n = 12: blocks of 8 and 4). It is orthonormal for every n; for a power of two it is the Walsh-Hadamard matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from subspace_opt import Basis, Dim, LowRank, Slot, State, Step, register
from subspace_opt.algebra import Order


@register
class Hadamard(LowRank):
    """The `rank` columns of H with the largest norm in `X H`. No other choice of columns captures more of X."""

    kind: Literal["hadamard"] = "hadamard"

    def constants(self, rows: Dim, cols: Dim) -> dict[str, Callable[[], Tensor]]:
        return {f"hadamard.{cols.size}": lambda: hadamard(cols.size)}  # one table for all layers of that width

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"index": Slot((self.coords(rows, cols)[1],), dtype=torch.int64)}

    def basis(self, state: State, step: Step) -> Basis:
        (table,) = step.constants.values()
        return Basis(right=table.mT[state["index"]].mT)  # (B, n, r)

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        (table,) = step.constants.values()
        energy = torch.linalg.vector_norm(x @ table, dim=-2)  # (B, n)
        # In ascending order, a column that stays selected keeps nearly its position.
        return {"index": energy.topk(state["index"].size(-1)).indices.sort().values}, None


def hadamard(n: int) -> Tensor:
    """The orthonormal dictionary for n columns, `(n, n)` in float64."""
    table: Tensor = torch.block_diag(*(sylvester(1 << k) for k in reversed(range(n.bit_length())) if n >> k & 1))
    return table


def sylvester(n: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix of a power of two, by H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.size(0) < n:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)]) / 2**0.5
    return h
