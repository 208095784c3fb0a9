"""The leading right singular vectors of the source (GaLore)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, LowRank, Order, Slot, State, Step
from ..registry import register


@register
class Svd(LowRank):
    """`U` = the leading `rank` right singular vectors of the source, kept between refreshes (arXiv:2403.03507).

    With `sides: both` also the left ones, `P`; coordinates are then the r x r core `P'GU`.
    """

    kind: Literal["svd"] = "svd"
    every: PositiveInt | None = Field(200, description="Updates between refreshes.")
    method: Literal["exact", "gram", "randomized"] = Field(
        "exact",
        description="A thin SVD; eigh of the smaller Gram matrix (exact above sqrt(round-off), several times cheaper); or two "
        "power iterations on random draws (cheapest; captures about the same energy).",
    )
    oversample: PositiveInt = Field(8, description="Columns beyond the rank that `randomized` works with.")
    sides: Literal["right", "both"] = Field("right", description="A basis for the columns, or one for each side.")

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        right = super().coords(rows, cols)[1]
        return (rows if self.sides == "right" else Dim("left_rank", right.size)), right

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        left, right = self.coords(rows, cols)
        slots = {"basis": Slot((cols, right))}
        return slots if self.sides == "right" else {**slots, "left_basis": Slot((rows, left))}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(left=state.get("left_basis"), right=state["basis"])

    def draws(self, rows: Dim, cols: Dim) -> tuple[int, ...] | None:
        width = min(self.columns(rows, cols) + self.oversample, rows.size, cols.size)
        return (cols.size, width) if self.method == "randomized" else None

    def refresh_flops(self, rows: Dim, cols: Dim) -> float:
        k, l = sorted((rows.size, cols.size))  # noqa: E741
        r = self.columns(rows, cols)
        match self.method:
            case "exact":
                return 6.0 * l * k * k + 20.0 * k**3
            case "gram":
                return 2.0 * l * k * k + 9.0 * k**3 + (2.0 * k * l * r if rows.size < cols.size else 0.0)
            case "randomized":
                return 12.0 * k * l * min(r + self.oversample, k)

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        u = linalg.leading_right(x, state["basis"].size(-1), self.method, step.noise)
        if self.sides == "right":
            return {"basis": u}, None
        # X U = P S: its columns are orthogonal, and P is what normalising them gives.
        return {"basis": u, "left_basis": linalg.orthonormal(linalg.mm(linalg.unit_peak(x), u))}, None
