"""The leading eigenvectors of the gradient's covariance, tracked by one warm-started power iteration a refresh (COSMOS)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, LowRank, Order, Rank, SelectorFlops, Slot, State, Step
from ..registry import register


@register
class Eigen(LowRank):
    """`U <- qr(beta U S + (1 - beta) G'(G U)); S <- beta T'S T + (1 - beta)(GU)'(GU), T = U_old' U` (arXiv:2502.17410).

    `U S U'` replaces the covariance EMA(G'G), restricted to the subspace, so the n x n covariance is never formed. The first basis holds
    the first gradient's leading right singular vectors.
    """

    kind: Literal["eigen"] = "eigen"
    rank: Rank = Field(64, description="Number of columns, at most the short side; a number below 1 is that part of the short side.")
    beta: float = Field(0.95, ge=0.0, lt=1.0, description="Decay rate of the covariance.")
    init: Literal["gram", "exact", "randomized"] = Field(
        "gram",
        description="First basis: eigh of the smaller Gram matrix, a thin SVD, or a randomized range (cheapest, approximate).",
    )

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, Dim("rank", self.columns(rows, cols), eigen=True)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        rank = self.coords(rows, cols)[1]
        return {"basis": Slot((cols, rank)), "covariance": Slot((rank, rank))}

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        m, n, r = rows.size, cols.size, self.columns(rows, cols)
        return SelectorFlops(refresh=4.0 * m * n * r + 8.0 * n * r * r + 8 / 3 * r**3, observe=2.0 * m * r * r)

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return (cols.size, self.columns(rows, cols)) if first and self.init == "randomized" else None

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        cov = linalg.addmm(state["covariance"], c.mT, c, beta=self.beta, alpha=1 - self.beta)
        return {"basis": state["basis"], "covariance": cov}

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        u, s = state["basis"], state["covariance"]
        if step.first:
            return {"basis": linalg.leading_right(x, u.size(-1), self.init, step.noise), "covariance": s}, None
        moved = linalg.mm(linalg.mm(x, u).mT, x).mT  # G'(G U), column-major: no large matrix is read across its rows
        new = linalg.orthonormal(linalg.addmm(moved, u, s, beta=1 - self.beta, alpha=self.beta))
        turn = linalg.mm(u.mT, new)
        return {"basis": new, "covariance": linalg.mm(linalg.mm(turn.mT, s), turn)}, None
