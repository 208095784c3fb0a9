"""Bases that follow their source by one warm-started power iteration an update (LDAdam, Dion)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, LowRank, Order, SelectorFlops, SelectorTraits, Slot, State, Step, lift
from ..registry import register


@register
class PowerIteration(LowRank):
    """`U <- qr(B'(B U))`, `B = rho U M' / (1 - beta1^(t-1)) + (1 - rho) G` (arXiv:2410.16103); at first leading vectors of G.

    M is the first moment of the rule inside; with rho 0 the basis follows the source alone.
    """

    kind: Literal["power_iteration"] = "power_iteration"
    rho: float = Field(0.0, ge=0.0, lt=1.0, description="Share of the inner first moment in the matrix B.")
    beta1: float = Field(0.908, ge=0.0, lt=1.0, description="Decay rate of the inner first moment, to correct its bias.")
    method: Literal["power", "svd"] = Field("power", description="One power iteration from the previous basis, or an SVD of B.")
    init: linalg.Method = Field(
        "randomized", description="First basis: a thin SVD, eigh of the smaller Gram matrix, or one power iteration on random draws."
    )

    def traits(self) -> SelectorTraits:
        return SelectorTraits(waits=self.method == "svd")

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return (cols.size, self.columns(rows, cols)) if first and self.init == "randomized" else None

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        m, n, r = rows.size, cols.size, self.columns(rows, cols)
        mixed = 2.0 * m * n * r if self.rho else 0.0
        k, l = sorted((m, n))  # noqa: E741
        return SelectorFlops(refresh=mixed + (6.0 * l * k * k + 20.0 * k**3 if self.method == "svd" else 4.0 * m * n * r + 4.0 * n * r * r))

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        u = state["basis"]
        rank = u.size(-1)
        if step.first:
            return {"basis": linalg.leading_right(x, rank, self.init, step.noise)}, None
        if self.rho:
            if "exp_avg" not in step.inner:
                raise ValueError("`power_iteration` with rho > 0 needs a rule inside that keeps `exp_avg`")
            mean = lift(step.inner["exp_avg"], Basis(right=u), x.size(-2), x.size(-1)) / (1 - self.beta1 ** (step.t - 1))
            x = x.lerp(mean, self.rho)
        if self.method == "svd":
            return {"basis": linalg.leading_right(x, rank)}, None
        return {"basis": linalg.orthonormal(linalg.mm(linalg.mm(x, u).mT, x).mT)}, None


@register
class Dion(LowRank):
    """`P = qr(B'Q)`, the basis; `Q <- R / |R|` column by column, `R = B P` its coordinates (arXiv:2504.05295).

    The state is the warm start Q. Every update computes P from it. The first Q is drawn from N(0, 1).
    """

    kind: Literal["dion"] = "dion"
    every: Literal[1] = Field(1, description="Every update computes a new basis.")
    iterations: PositiveInt = Field(1, description="Power iterations per update.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the norm of a column of R.")

    def traits(self) -> SelectorTraits:
        return SelectorTraits(keeps_basis=False)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"warm_start": Slot((rows, self.coords(rows, cols)[1]))}

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return (rows.size, self.columns(rows, cols)) if first else None

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        m, n, r = rows.size, cols.size, self.columns(rows, cols)
        return SelectorFlops(refresh=self.iterations * (2.0 * m * n * r + 4.0 * n * r * r) + (self.iterations - 1) * 2.0 * m * n * r)

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["basis"])

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        q = state["warm_start"]
        if step.first:
            assert step.noise is not None  # the engine draws what `draws` asks for
            q = step.noise.to(x.dtype)
        basis = linalg.orthonormal(linalg.mm(q.mT, x).mT)
        for _ in range(self.iterations - 1):
            q = linalg.mm(x, basis)
            basis = linalg.orthonormal(linalg.mm(q.mT, x).mT)
        return {"warm_start": q, "basis": basis}, None

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        return {"warm_start": linalg.unit_columns(c, self.eps)}
