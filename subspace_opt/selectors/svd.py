"""The leading right singular vectors of the source (GaLore)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Dim, LowRank, Order, State, Step
from ..registry import register


@register
class Svd(LowRank):
    """`U` = the leading `rank` right singular vectors of the source, kept between refreshes (arXiv:2403.03507)."""

    kind: Literal["svd"] = "svd"
    every: PositiveInt = Field(200, description="Updates between refreshes.")
    method: Literal["exact", "gram", "randomized"] = Field(
        "exact",
        description="A thin SVD; eigh of the smaller Gram matrix (exact above sqrt(round-off), several times cheaper); or two "
        "power iterations on random draws (cheapest; captures about the same energy).",
    )
    oversample: PositiveInt = Field(8, description="Columns beyond the rank that `randomized` works with.")

    def draws(self, rows: Dim, cols: Dim) -> tuple[int, ...] | None:
        width = min(self.columns(rows, cols) + self.oversample, rows.size, cols.size)
        return (cols.size, width) if self.method == "randomized" else None

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return {"basis": linalg.leading_right(x, state["basis"].size(-1), self.method, step.noise)}, None
