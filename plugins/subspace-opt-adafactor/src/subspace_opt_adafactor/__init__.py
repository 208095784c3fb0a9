"""Adafactor's second moment as a rule: one statistic for each row and one for each column, whose product approximates all entries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from subspace_opt import Dim, Rule, RuleTraits, Slot, State, Step, Transport, register


@register
class Adafactor(Rule):
    """`R <- b R + (1 - b) mean_j G_ij^2; C <- b C + (1 - b) mean_i G_ij^2; X_ij / sqrt(R_i C_j / mean R)` (arXiv:1804.04235).

    b is 1 - t^-decay. The approximation is exact if G.G has rank one, for example for
    a vector. The root mean square of the result is at most `clip`.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay: float = Field(0.8, gt=0.0, le=1.0, description="Update t keeps the share 1 - t^-decay of the statistics.")
    eps: float = Field(1e-30, gt=0.0, description="Added to every square.")
    clip: float | None = Field(1.0, gt=0.0, description="Largest root mean square of an update; null for none.")
    on_refresh: Transport = Field("keep", description="Transport of the statistics when the subspace is refreshed.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        carried: Transport = "project_abs" if self.on_refresh == "project" else self.on_refresh  # they must stay positive
        return {"row": Slot((rows,), carried), "col": Slot((cols,), carried)}

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        clock = step.age if self.on_refresh == "reset" else step.t
        weight = clock**-self.decay  # 1 at the first update: the statistics are averages and need no bias correction
        squares = grad.square() + self.eps  # (B, m, n)
        row = state["row"] + weight * (squares.mean(-1) - state["row"])  # (B, m)
        col = state["col"] + weight * (squares.mean(-2) - state["col"])  # (B, n)
        # Take the roots before the product: the product itself would underflow in single precision.
        out = x * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        if self.clip is not None:
            rms = out.square().mean((-2, -1), keepdim=True).sqrt()
            out = out / (rms / self.clip).clamp_min(1.0)
        return out, {"row": row, "col": col}
