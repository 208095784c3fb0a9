"""Elementwise rules: Adam, sign, powers, Lion."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Kernel, Rule, RuleTraits, Slot, State, Step, Transport, averaged, averaged_square
from ..registry import register

FOREVER = 10**9  # an update so late that beta^t is 0

Beta2 = Field(0.999, ge=0.0, lt=1.0, description="Decay rate of the second moment: the share of it that each update keeps.")
Eps = Field(1e-8, ge=0.0, description="Added to the root of the second moment.")
Amsgrad = Field(False, description="Divide by the root of the largest second moment so far, entry by entry (arXiv:1904.09237).")


def largest(before: Tensor, v: Tensor, step: Step) -> Tensor:
    """`max(V_max, V)` entry by entry, written over V_max if the step allows it."""
    return torch.maximum(before, v, out=before if step.in_place else None)


def precondition(x: Tensor, v: Tensor, correction: Tensor | float, eps: float, eps_inside: bool) -> Tensor:
    """`X / (sqrt(V / correction) + eps)`, or `X / sqrt((V + eps) / correction)` with eps inside the root."""
    # In place on its own temporaries: a pass over memory costs more than the arithmetic.
    if eps_inside:
        root = (v + eps).div_(correction).sqrt_()
        return linalg.quotient(x, root) if eps < linalg.SAFE else x / root
    root = v.sqrt()
    if not isinstance(correction, float) or correction != 1.0:
        root.div_(correction**0.5)
    return linalg.quotient(x, root.add_(eps)) if eps < linalg.SAFE else torch.div(x, root.add_(eps), out=root)


@register
class Adam(Rule):
    """`M <- b1 M + (1 - b1) X; V <- b2 V + (1 - b2) G.G; M^ / (sqrt(V^) + eps)` (arXiv:1412.6980).

    With `debias`, M^ = M / (1 - b1^t), V^ = V / (1 - b2^t); without it, M^ = M, V^ = V: a `debias` rule in `finish` then gives the
    form of Hugging Face and GaLore, where eps is not corrected. With `amsgrad`, V^ is made of `V_max <- max(V_max, V)` (arXiv:1904.09237).
    """

    kind: Literal["adam"] = "adam"
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay rate of the first moment; 0 keeps no first moment.")
    beta2: float = Beta2
    eps: float = Eps
    eps_inside: bool = Field(False, description="Add eps to the second moment before its root and its correction.")
    debias: bool = Field(True, description="Correct the bias of both moments: divide each by the sum of its weights.")
    amsgrad: bool = Amsgrad
    on_refresh: Transport = Field("keep", description="Transport of the moments when the subspace is refreshed.")
    on_refresh_sq: Transport | None = Field(None, description="Transport of the second moment, if it differs.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        second = self.on_refresh_sq or self.on_refresh
        if second == "project":
            second = "project_abs"  # it must stay positive
        square = Slot((rows, cols), second, holds="unsigned")
        slots = {"exp_avg": Slot((rows, cols), self.on_refresh)} if self.beta1 else {}
        slots["exp_avg_sq"] = square
        return {**slots, "max_exp_avg_sq": square} if self.amsgrad else slots

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, elementwise=True, by_rows=True)

    def kernel(self) -> Kernel | None:
        return self._update_in_place if self.debias and self.beta1 > 0 and self.eps >= linalg.SAFE and not self.eps_inside else None

    def _update_in_place(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: dict[str, list[Tensor]],
        t: int | Tensor,
        lr: float | Tensor,
        decay: float,
        blocked: Tensor | None = None,
    ) -> None:
        device = weights[0].device
        count = t.float() if isinstance(t, Tensor) else torch.full((), float(t), dtype=torch.float32, device=device)
        torch._fused_adamw_(
            weights,
            grads,
            states["exp_avg"],
            states["exp_avg_sq"],
            states.get("max_exp_avg_sq", []),
            [count] * len(weights),
            lr=lr,  # a number, or a tensor on the device
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=False,
            found_inf=blocked,
        )

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        clock = step.age if self.on_refresh == "reset" else step.t
        if self._fits(x, grad, state):
            return self._in_one_pass(x, state, clock, step)
        v = averaged_square(state["exp_avg_sq"], grad, self.beta2, step)
        new = {"exp_avg_sq": v}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = largest(state["max_exp_avg_sq"], v, step)
        if self.beta1:
            x = new["exp_avg"] = averaged(state["exp_avg"], x, self.beta1, step)
        correction = 1 - self.beta2**clock if self.debias else 1.0
        out = precondition(x, v, correction, self.eps, self.eps_inside)
        if self.debias and self.beta1:
            out.div_(1 - self.beta1**clock)
        return out, new

    def _fits(self, x: Tensor, grad: Tensor, state: State) -> bool:
        """True if PyTorch's fused kernel can make the update; the kernel takes one tensor as signal and gradient."""
        plain = x is grad and x.device.type in linalg.FUSED and self.beta1 > 0 and self.eps >= linalg.SAFE and not self.eps_inside
        return plain and all(v.dtype == x.dtype and v.is_contiguous() for v in (x, *state.values()))

    def _in_one_pass(self, x: Tensor, state: State, clock: Tensor, step: Step) -> tuple[Tensor, State]:
        """The change that the kernel makes to a weight of 0 with lr -1. Without `debias`, t is so late that the correction is 1."""
        out = torch.zeros_like(x)
        new = state if step.in_place else {name: value.clone() for name, value in state.items()}
        count = (clock if step.on_device else int(clock)) if self.debias else FOREVER
        self._update_in_place([out], [x], {name: [v] for name, v in new.items()}, count, -1.0, 0.0)
        return out, new


@register
class Sign(Rule):
    """`sign(X)`; sign(0) = 0 (arXiv:1802.04434)."""

    kind: Literal["sign"] = "sign"

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, reads_grad=False, elementwise=True, by_rows=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x.sign(), {}


@register
class Power(Rule):
    """`sign(X) |X|^beta`: steepest descent under an l_p norm, beta = 1 / (p - 1); power(0) = 0 (PowerStep, arXiv:2605.10335)."""

    kind: Literal["power"] = "power"
    beta: float = Field(0.1, gt=0.0, le=1.0, description="The exponent: 1 leaves the signal as it is; near 0 the result is the sign.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        # Nearly scale-free: 1e-16 to the power 0.1 is 0.03.
        return RuleTraits(scale_free=True, reads_grad=False, elementwise=True, by_rows=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x.abs().pow_(self.beta).copysign_(x), {}


@register
class Lion(Rule):
    """`sign(b1 M + (1 - b1) X)`, then `M <- b2 M + (1 - b2) X` (arXiv:2302.06675)."""

    kind: Literal["lion"] = "lion"
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Weight of the average in the update's direction.")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="Decay rate of the average: the share of it that each update keeps.")
    on_refresh: Transport = Field("keep", description="Transport of the average when the subspace is refreshed.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"exp_avg": Slot((rows, cols), self.on_refresh)}

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, reads_grad=False, elementwise=True, by_rows=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        m = state["exp_avg"]
        mixed = x.lerp(m, self.beta1)
        out = mixed.sign().masked_fill_(mixed.isnan(), torch.nan)  # the sign of NaN is 0
        return out, {"exp_avg": averaged(m, x, self.beta2, step)}
