"""SOAP: Adam in the eigenbasis of its coordinates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, Slot, State, Step, averaged_square
from ..registry import register
from .adaptive import Amsgrad, largest, precondition


@register
class Soap(Rule):
    """`V <- b2 V + (1 - b2) (G Q).(G Q); (X Q) / (sqrt(V^) + eps) Q'`, Q the eigenbasis of EMA(G'G) (arXiv:2409.11321).

    If the coordinates are eigen-coordinates already (selectors `eigen`, `kron_eigen`), Q = I and the rule keeps no covariance. Otherwise
    it keeps the r x r covariance, and Q follows it by one power iteration and a QR at each update.
    """

    kind: Literal["soap"] = "soap"
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="Decay rate of the second moment.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the root of the second moment.")
    eps_inside: bool = Field(False, description="Add eps to the second moment before its root and its correction.")
    debias: bool = Field(True, description="Correct the bias of the second moment.")
    amsgrad: bool = Amsgrad
    cov_beta: float = Field(0.95, ge=0.0, lt=1.0, description="Decay rate of the covariance, if the rule keeps one.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        slots = {"exp_avg_sq": Slot((rows, cols), holds="unsigned")}
        if self.amsgrad:
            slots["max_exp_avg_sq"] = slots["exp_avg_sq"]
        if not cols.eigen:
            slots["covariance"] = Slot((cols, cols), "project")
            slots["rotation"] = Slot((cols, Dim("eigen", cols.size)), "project", holds="basis")
        return slots

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, decomposes=not cols.eigen)

    def flops(self, rows: Dim, cols: Dim) -> float:
        m, r = rows.size, cols.size
        return 0.0 if cols.eigen else 8.0 * m * r * r + 14 / 3 * r**3

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        if "covariance" not in state:
            v, moments = self._second_moment(grad, state, step)
            return self._precondition(x, v, step), moments
        cov = linalg.addmm(state["covariance"], grad.mT, grad, beta=self.cov_beta, alpha=1 - self.cov_beta)
        if step.first:
            q = linalg.fix_signs(linalg.eigh(cov)[1])
        else:
            # A refresh of the subspace projects the rotation, which is then no longer orthonormal; the QR makes it so again. The ridge
            # keeps round-off from choosing the directions without covariance.
            ridge = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * 1e-6
            q = linalg.orthonormal(linalg.mm(cov, state["rotation"]) + ridge * state["rotation"])
        v, moments = self._second_moment(linalg.mm(grad, q), state, step)
        out = self._precondition(linalg.mm(x, q), v, step)
        return linalg.mm(out, q.mT), {**moments, "covariance": cov, "rotation": q}

    def _second_moment(self, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        """The second moment that divides, and the slots of the moments."""
        v = averaged_square(state["exp_avg_sq"], grad, self.beta2, step)
        if not self.amsgrad:
            return v, {"exp_avg_sq": v}
        top = largest(state["max_exp_avg_sq"], v, step)
        return top, {"exp_avg_sq": v, "max_exp_avg_sq": top}

    def _precondition(self, x: Tensor, v: Tensor, step: Step) -> Tensor:
        correction = 1 - self.beta2**step.t if self.debias else 1.0
        return precondition(x, v, correction, self.eps, self.eps_inside)
