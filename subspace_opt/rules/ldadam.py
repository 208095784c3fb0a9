"""LDAdam's Adam: both moments follow the subspace when it moves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from .. import linalg
from ..algebra import Change, Slot, State, Step, Transport
from ..registry import register
from .adaptive import Adam


@register
class LDAdam(Adam):
    """Adam whose moments are carried over a refresh by `C = U_old' U` (arXiv:2410.16103):

    `M <- M C;  V <- c2 |(V^ - M^.M^) (C.C) + (M^ C).(M^ C)|`, M^ and V^ debiased, c2 = 1 - b2^(t-1).

    The mean is carried exactly, and the variance as if the coordinates were independent.
    """

    kind: Literal["ldadam"] = "ldadam"  # type: ignore[assignment]
    on_refresh: Transport = Field("project", description="The moments follow the basis, by the formulas above.")

    @model_validator(mode="after")
    def _carries_every_moment(self) -> LDAdam:
        if self.amsgrad:
            raise ValueError("`amsgrad` has no formula for a moving subspace: leave it out, or use kind 'adam' with `on_refresh: project`")
        return self

    def transport(self, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        c = change.rotation(change.cols)
        if c is None:
            return state
        m, v = state["exp_avg"], state["exp_avg_sq"]
        before = (step.t - 1).clamp_min(1)
        correction = 1 - self.beta2**before
        mean = m / (1 - self.beta1**before)
        moved = linalg.mm(mean, c)
        spread = linalg.mm(v / correction - mean * mean, c * c)
        return {"exp_avg": linalg.mm(m, c), "exp_avg_sq": (spread + moved * moved).abs() * correction}

    def untransmitted(self, before: State, after: State) -> tuple[Tensor, Tensor, float] | None:
        return before["exp_avg"], after["exp_avg"], self.beta1 / (1 - self.beta1)
