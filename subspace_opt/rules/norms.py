"""Rules in `apply` that tie the size of an update, or of a weight, to the weight's Frobenius norm."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Slot, State, Step, WeightError, WeightRule
from ..registry import register


@register
class Relative(WeightRule):
    """`U |W|_F / |U|_F`, W after its decay: lr is the relative change of the weight (arXiv:1708.03888). 0 where a norm is at most `eps`."""

    kind: Literal["relative"] = "relative"
    eps: float = Field(1e-15, ge=0.0, description="Norms up to this number count as 0, and the update is then 0.")

    def scaled(self, u: Tensor, w: Tensor, state: State, step: Step) -> Tensor:
        size, own = linalg.norm(w), linalg.norm(u)
        return u * (linalg.ratio(size, own, 0.0) * ((size > self.eps) & (own > self.eps)))


@register
class Hyperball(WeightRule):
    """`U <- U R / |U|_F`, then `W' <- R (W - lr U) / |W - lr U|_F`: update and weight keep one norm R (arXiv:2606.16899).

    lr is then about the angle by which the weight turns. With `radius: start`, R is the norm of each matrix at its first update, kept as
    state.

    Raises:
        WeightError: with `radius: start`, a weight is 0 at its first update.
    """

    kind: Literal["hyperball"] = "hyperball"
    radius: Literal["start"] | Annotated[float, Field(gt=0.0)] = Field(
        "start", description="The norm R: a number, or `start` for the norm that each matrix has at its first update."
    )

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"radius": Slot((), holds="unsigned")} if self.radius == "start" else {}

    def observe(self, w: Tensor, u: Tensor, state: State, step: Step) -> State:
        if self.radius != "start":
            return state
        start = linalg.norm(w).view(-1)
        if step.first and not w.is_meta and bool((start == 0).any()):
            raise WeightError(
                "`hyperball` keeps the norm that a weight has at its first update, and it is 0; initialise the weight, give a `radius`, or "
                "send the weight to another pipeline"
            )
        return {"radius": torch.where(state["radius"] > 0, state["radius"], start)}

    def scaled(self, u: Tensor, w: Tensor, state: State, step: Step) -> Tensor:
        return u * linalg.ratio(self._radius(u, state), linalg.norm(u), 0.0)

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        return after * linalg.ratio(self._radius(after, state), linalg.norm(after), 0.0)

    def _radius(self, like: Tensor, state: State) -> Tensor | float:
        return state["radius"].view(-1, 1, 1) if self.radius == "start" else self.radius


@register
class RadialBrake(WeightRule):
    """`W'` scaled to norm `n0 + s (n1 - n0)`: n0 and n1 are the norms before and after the update, s is `outward` or `inward`.

    n0 is that of the weight after its decay. The rule is that of NVIDIA's Emerging-Optimizers.
    """

    kind: Literal["radial_brake"] = "radial_brake"
    outward: float = Field(0.5, ge=0.0, description="The share of a growth of the norm that is kept.")
    inward: float = Field(1.0, ge=0.0, le=1.0, description="The share of a decrease of the norm that is kept.")

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        start, end = linalg.norm(before), linalg.norm(after)
        change = end - start
        size = start + torch.where(change > 0, change * self.outward, change * self.inward)
        return after * linalg.ratio(size, end, 0.0)
