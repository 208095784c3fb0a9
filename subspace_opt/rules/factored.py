"""A second moment for each row and each column, whose product stands for that of an entry."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, Slot, State, Step, Transport
from ..registry import register


@register
class FactoredNorm(Rule):
    """`R <- b R + (1 - b) mean_j S_ij; C <- b C + (1 - b) mean_i S_ij; X_ij / sqrt(R_i C_j / mean R)`, S = G.G + eps (arXiv:1804.04235).

    b is `1 - t^-decay`, so the statistics are averages from the first update on, or the fixed number `beta2`. The product is exact if S has
    rank one, for example for a vector. In `subset_norm` each entry belongs to one statistic, here to two. Adafactor's limit on the size of
    the update is the rule `rms_clip`.
    """

    kind: Literal["factored_norm"] = "factored_norm"
    decay: float = Field(0.8, gt=0.0, le=1.0, description="Update t keeps the share 1 - t^-decay of the statistics.")
    beta2: float | None = Field(
        None, ge=0.0, lt=1.0, description="The share that every update keeps, in place of `decay`.", examples=[0.999]
    )
    eps: float = Field(1e-30, ge=0.0, description="Added to every square.")
    on_refresh: Transport = Field("keep", description="Transport of the statistics when the subspace is refreshed.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        carried: Transport = "project_abs" if self.on_refresh == "project" else self.on_refresh  # they must stay positive
        return {"row_sq": Slot((rows,), carried, holds="unsigned"), "col_sq": Slot((cols,), carried, holds="unsigned")}

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        clock = step.age if self.on_refresh == "reset" else step.t
        weight: float | Tensor = 1.0 - (self.beta2 or 0.0)
        if self.beta2 is None:
            weight = (clock**-self.decay).to(grad.dtype) if step.on_device else float(clock) ** -self.decay
        row = state["row_sq"].lerp(torch.linalg.vector_norm(grad, dim=-1).square().div_(grad.size(-1)).add_(self.eps), weight)
        col = state["col_sq"].lerp(grad.square().mean(-2).add_(self.eps), weight)
        # Roots before the product: the product of two small means would underflow in single precision.
        left = (row / linalg.divisor(row.mean(-1, keepdim=True))).sqrt_()
        out = x * linalg.ratio(1.0, left, 0.0).unsqueeze(-1)
        return out.mul_(linalg.ratio(1.0, col.sqrt(), 0.0).unsqueeze(-2)), {"row_sq": row, "col_sq": col}
