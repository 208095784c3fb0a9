"""A basis that is itself trained, one optimizer step an update (Online Subspace Descent)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, LowRank, Order, SelectorFlops, SelectorTraits, Slot, State, Step
from ..registry import register


@register
class Learned(LowRank):
    """`U <- step of AdamW, SGD or Lion on |G^ U U' - G^|_F^2`, `G^ = G / |G|_F`, after each update (arXiv:2408.12857).

    The first basis holds leading right singular vectors of G. The columns are never orthonormalised again; the objective keeps them nearly
    orthonormal. With `base_lr`, the step has the rate `lr lr_t / base_lr` for weights that have the rate lr_t.
    """

    kind: Literal["learned"] = "learned"
    timing: Literal["before", "after"] = Field("after", description="Refresh after the update, or before it.")
    optimizer: Literal["adamw", "sgd", "lion"] = Field("adamw", description="The optimizer of the basis.")
    init: linalg.Method = Field(
        "randomized", description="First basis: a thin SVD, eigh of the smaller Gram matrix, or one power iteration on random draws."
    )
    lr: float = Field(0.005, ge=0.0, description="Learning rate of the basis.")
    base_lr: float | None = Field(
        None,
        gt=0.0,
        description="Learning rate of the weights at which the basis has `lr`. Its rate then follows theirs, in proportion; null: it is "
        "always `lr`.",
        examples=[0.01],
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW's or Lion's field of this name, for the basis.")
    beta2: float = Field(
        0.999, ge=0.0, lt=1.0, description="AdamW's or Lion's field of this name, for the basis; Lion's usual one is 0.99."
    )
    eps: float = Field(1e-8, ge=0.0, description="AdamW's field of this name, for the basis.")
    weight_decay: float = Field(0.01, ge=0.0, description="Weight decay of AdamW or Lion, on the basis; Lion's usual one is 0.")

    def traits(self) -> SelectorTraits:
        return SelectorTraits(orthonormal=False, reads_lr=self.base_lr is not None)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        slot = Slot((cols, self.coords(rows, cols)[1]))
        kept = {"adamw": ("basis", "exp_avg", "exp_avg_sq"), "lion": ("basis", "exp_avg"), "sgd": ("basis",)}
        return dict.fromkeys(kept[self.optimizer], slot)

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return (cols.size, self.columns(rows, cols)) if first and self.init == "randomized" else None

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        return SelectorFlops(refresh=10.0 * rows.size * cols.size * self.columns(rows, cols))

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        u = state["basis"]
        if step.first:
            return {**state, "basis": linalg.leading_right(x, u.size(-1), self.init, step.noise)}, None
        g = x / linalg.norm(x).clamp_min(torch.finfo(x.dtype).tiny)
        gu = linalg.mm(g, u)
        error = linalg.addmm(g, gu, u.mT, beta=-1.0)  # G^ U U' - G^
        slope = 2 * (linalg.mm(g.mT, linalg.mm(error, u)) + linalg.mm(error.mT, gu))
        # A full basis has nothing to learn, and AdamW would turn round-off into a full step.
        slope = slope * (linalg.norm(slope) > 64 * torch.finfo(x.dtype).eps)
        return self._moved(slope, state, step), None

    def _moved(self, slope: Tensor, state: State, step: Step) -> State:
        """The state after one step of the basis's optimizer along a slope."""
        u, lr = state["basis"], self.lr if self.base_lr is None else step.lr * (self.lr / self.base_lr)
        if self.optimizer == "sgd":
            return {"basis": u - lr * slope}
        if self.optimizer == "lion":
            direction = slope.lerp(state["exp_avg"], self.beta1).sign()
            m = state["exp_avg"].lerp(slope, 1 - self.beta2)
            return {"basis": u * (1 - lr * self.weight_decay) - lr * direction, "exp_avg": m}
        count = step.t - 1  # the first basis is not a step of AdamW
        m = state["exp_avg"].lerp(slope, 1 - self.beta1)
        v = state["exp_avg_sq"] * self.beta2 + slope * slope * (1 - self.beta2)
        root = (v / (1 - self.beta2**count)).sqrt() + self.eps
        mean = m / (1 - self.beta1**count)
        update = linalg.quotient(mean, root) if self.eps < linalg.SAFE else mean / root
        return {"basis": u * (1 - lr * self.weight_decay) - lr * update, "exp_avg": m, "exp_avg_sq": v}
