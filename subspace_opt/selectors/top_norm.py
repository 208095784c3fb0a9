"""The columns of largest norm (GRASS; the top-k selector of Subspace-Momentum)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from ..algebra import Basis, Dim, LowRank, Order, SelectorFlops, SelectorTraits, Slot, State, Step
from ..registry import register


@register
class TopNorm(LowRank):
    """The `rank` columns of largest norm, as coordinates: a basis of r indices (arXiv:2406.17660, arXiv:2411.07120).

    With the l1 norm these are the lines that Dion2 takes out of its momentum (arXiv:2512.16928).
    """

    kind: Literal["top_norm"] = "top_norm"
    every: PositiveInt | None = Field(200, description="Updates between refreshes.")
    ranking: Literal["l1", "l2"] = Field("l2", description="The norm that ranks the columns.")

    def limit(self, rows: Dim, cols: Dim) -> int:
        return cols.size

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"index": Slot((self.coords(rows, cols)[1],), dtype=torch.int64)}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["index"])

    def traits(self) -> SelectorTraits:
        return SelectorTraits(decomposes=False)

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        return SelectorFlops(project=0.0)  # columns are picked, not multiplied

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        size = x.abs().sum(-2) if self.ranking == "l1" else torch.linalg.vector_norm(x, dim=-2)
        return {"index": size.topk(state["index"].size(-1)).indices}, None
