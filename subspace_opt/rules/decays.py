"""Weight decay as a rule in `apply`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..algebra import Dim, State, Step, WeightRule, WeightTraits
from ..registry import register


@register
class Decay(WeightRule):
    """`W (1 - lr wd)`, before the update or after it (arXiv:1711.05101)."""

    kind: Literal["decay"] = "decay"
    when: Literal["before", "after"] = Field("before", description="Decay the weight before the update, or the updated weight.")

    def traits(self, rows: Dim, cols: Dim) -> WeightTraits:
        return WeightTraits(decays=True, elementwise=True, by_rows=True)

    def decayed(self, w: Tensor, u: Tensor, state: State, step: Step) -> Tensor:
        return w * (1 - step.lr * step.decay) if self.when == "before" else w

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        return after * (1 - step.lr * step.decay) if self.when == "after" else after


@register
class Cautious(WeightRule):
    """`W - lr wd W [W U >= 0]`: an entry decays only if the subtracted update does not push it away from 0 (arXiv:2510.12402)."""

    kind: Literal["cautious"] = "cautious"

    def traits(self, rows: Dim, cols: Dim) -> WeightTraits:
        return WeightTraits(decays=True, elementwise=True, by_rows=True)

    def decayed(self, w: Tensor, u: Tensor, state: State, step: Step) -> Tensor:
        agree = w.sign() * u.sign() >= 0  # the product of tiny numbers would underflow to 0
        return w - w * agree * (step.lr * step.decay)
