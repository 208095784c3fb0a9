"""The leading right singular vectors of the source (GaLore)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, LowRank, Refreshed, SelectorFlops, SelectorTraits, Slot, State, Step
from ..registry import register


@register
class Svd(LowRank):
    """`U` = the leading `rank` right singular vectors of the source, kept between refreshes (arXiv:2403.03507).

    With `sides: both` it keeps the left ones `P` too; coordinates are then the r x r core `P'GU`.
    """

    kind: Literal["svd"] = "svd"
    every: PositiveInt | None = Field(200, description="Updates between refreshes.")
    method: linalg.Method = Field(
        "randomized",
        description="A thin SVD; eigh of the smaller Gram matrix (exact above sqrt(round-off), several times cheaper); or power iterations "
        "from the previous basis and some random draws (cheapest; captures 0.99 of the possible energy if the spectrum decays).",
    )
    oversample: PositiveInt = Field(8, description="Additional columns that `randomized` works with.")
    iterations: PositiveInt = Field(1, description="Power iterations of `randomized` at a refresh.")
    sides: Literal["right", "both"] = Field("right", description="A basis of the columns, or one for each side.")

    def traits(self) -> SelectorTraits:
        return SelectorTraits(waits=True)

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        right = super().coords(rows, cols)[1]
        return (rows if self.sides == "right" else Dim("left_rank", right.size)), right

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        left, right = self.coords(rows, cols)
        slots = {"basis": Slot((cols, right))}
        return slots if self.sides == "right" else {**slots, "left_basis": Slot((rows, left))}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(left=state.get("left_basis"), right=state["basis"])

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        if self.method != "randomized":
            return None
        width = min(self.columns(rows, cols) + self.oversample, rows.size, cols.size)
        return cols.size, width if self._afresh(first) else width - self.columns(rows, cols)

    def _afresh(self, first: bool) -> bool:
        """True if power iterations start from draws alone: for the first basis, and for weights, which hardly change between refreshes."""
        return first or self.source == "weight"

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        return SelectorFlops(refresh=self._refresh_flops(rows, cols))

    def _refresh_flops(self, rows: Dim, cols: Dim) -> float:
        k, l = sorted((rows.size, cols.size))  # noqa: E741
        r = self.columns(rows, cols)
        match self.method:
            case "exact":
                return 6.0 * l * k * k + 20.0 * k**3
            case "gram":
                return 2.0 * l * k * k + 9.0 * k**3 + (2.0 * k * l * r if rows.size < cols.size else 0.0)
            case "randomized":
                width = min(r + self.oversample, k)
                return (4.0 * self.iterations + 2) * k * l * width + self.iterations * 4.0 * cols.size * width**2

    def refresh(self, x: Tensor, state: State, step: Step) -> Refreshed:
        old = state["basis"]
        if step.noise is not None:  # the present directions, and some new ones
            start = step.noise if self._afresh(step.first) else torch.cat([old, step.noise.to(old.dtype)], dim=-1)
            u, c = linalg.sketched_right(x, old.size(-1), start, self.iterations)
            if self.sides == "right":
                return Refreshed({"basis": u}, coords=c)
        else:
            u = linalg.leading_right(x, old.size(-1), self.method)
            if self.sides == "right":
                return Refreshed({"basis": u})
        # The columns of X U = P S are orthogonal; normalised, they are P.
        return Refreshed({"basis": u, "left_basis": linalg.orthonormal(linalg.mm(linalg.unit(x), u))})
