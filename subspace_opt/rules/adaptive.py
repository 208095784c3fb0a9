"""Rules that act entry by entry with statistics of the gradient: Adam, sign."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..algebra import Dim, Rule, Slot, State, Step, Transport, averaged, averaged_square, linalg
from ..registry import register

FOREVER = 10**9  # updates after which beta^t is 0

Beta2 = Field(0.999, ge=0.0, lt=1.0, description="Part of the second moment that is kept at each update.")
Eps = Field(1e-8, ge=0.0, description="Added to the root of the second moment.")


def precondition(x: Tensor, v: Tensor, correction: Tensor | float, eps: float, eps_inside: bool) -> Tensor:
    """`X / (sqrt(V / correction) + eps)`, or `X / sqrt((V + eps) / correction)` with eps inside the root."""
    # In place where the tensor is our own: a pass over memory costs more than what it computes.
    if eps_inside:
        return x / (v + eps).div_(correction).sqrt_()
    root = v.sqrt()
    if not isinstance(correction, float) or correction != 1.0:
        root.div_(correction**0.5)
    return torch.div(x, root.add_(eps), out=root)


@register
class Adam(Rule):
    """`M <- b1 M + (1 - b1) X; V <- b2 V + (1 - b2) G.G; M^ / (sqrt(V^) + eps)` (arXiv:1412.6980).

    With `debias`, M^ = M / (1 - b1^t), V^ = V / (1 - b2^t); without it, M^ = M, V^ = V: a `debias` rule in `finish` then gives the
    form of Hugging Face and GaLore, where eps is not corrected.
    """

    scale_free: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    kind: Literal["adam"] = "adam"
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Part of the first moment that is kept; 0 keeps no first moment.")
    beta2: float = Beta2
    eps: float = Eps
    eps_inside: bool = Field(False, description="Add eps to the second moment before its root and its correction.")
    debias: bool = Field(True, description="Divide both moments by the sum of their weights.")
    on_refresh: Transport = Field("keep", description="What becomes of the moments when the subspace is refreshed.")
    on_refresh_sq: Transport | None = Field(None, description="The same for the second moment, if it is something else.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        second = self.on_refresh_sq or self.on_refresh
        if second == "project":
            second = "project_abs"  # it must stay positive
        slots = {"exp_avg": Slot((rows, cols), self.on_refresh), "exp_avg_sq": Slot((rows, cols), second, holds="unsigned")}
        return slots if self.beta1 else {"exp_avg_sq": slots["exp_avg_sq"]}

    @property
    def has_kernel(self) -> bool:
        return self.debias and self.beta1 > 0 and not self.eps_inside

    def update_in_place(
        self, weights: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], t: int, lr: float | Tensor, decay: float
    ) -> None:
        count = torch.full((), float(t), device=weights[0].device)
        torch._fused_adamw_(
            weights,
            grads,
            states["exp_avg"],
            states["exp_avg_sq"],
            [],
            [count] * len(weights),
            lr=lr,  # a number, or a tensor on the device
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        clock = step.age if self.on_refresh == "reset" else step.t
        if self._fits(x, grad, state):
            return self._in_one_pass(x, state, clock, step)
        new = {"exp_avg_sq": averaged_square(state["exp_avg_sq"], grad, self.beta2, step)}
        if self.beta1:
            x = new["exp_avg"] = averaged(state["exp_avg"], x, self.beta1, step)
        correction = 1 - self.beta2**clock if self.debias else 1.0
        out = precondition(x, new["exp_avg_sq"], correction, self.eps, self.eps_inside)
        if self.debias and self.beta1:
            out.div_(1 - self.beta1**clock)
        return out, new

    def _fits(self, x: Tensor, grad: Tensor, state: State) -> bool:
        """Whether PyTorch's fused kernel can make the update: it knows one signal."""
        plain = x is grad and x.device.type in linalg.FUSED and self.beta1 > 0 and not self.eps_inside
        return plain and all(v.dtype == x.dtype and v.is_contiguous() for v in (x, *state.values()))

    def _in_one_pass(self, x: Tensor, state: State, clock: Tensor, step: Step) -> tuple[Tensor, State]:
        """The update as what the kernel makes of a weight 0 with lr -1. Far out in time its bias correction is 1."""
        out = torch.zeros_like(x)
        new = state if step.in_place else {name: value.clone() for name, value in state.items()}
        self.update_in_place([out], [x], {name: [v] for name, v in new.items()}, int(clock) if self.debias else FOREVER, -1.0, 0.0)
        return out, new


@register
class Sign(Rule):
    """`sign(X)`; sign(0) = 0 (arXiv:1802.04434)."""

    uses_grad: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    kind: Literal["sign"] = "sign"

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x.sign(), {}


@register
class Power(Rule):
    """`sign(X) |X|^beta`: steepest descent under an l_p norm, beta = 1 / (p - 1); power(0) = 0 (PowerStep, arXiv:2605.10335)."""

    uses_grad: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True  # nearly: 1e-16 to the power 0.1 is 0.03
    elementwise: ClassVar[bool] = True
    kind: Literal["power"] = "power"
    beta: float = Field(0.1, gt=0.0, le=1.0, description="The exponent: 1 leaves the signal, towards 0 it tends to its sign.")

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x.abs().pow_(self.beta).copysign_(x), {}


@register
class Lion(Rule):
    """`sign(b1 M + (1 - b1) X)`, then `M <- b2 M + (1 - b2) X` (arXiv:2302.06675)."""

    scale_free: ClassVar[bool] = True
    uses_grad: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    kind: Literal["lion"] = "lion"
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Weight of the average in the update's direction.")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="Part of the average that is kept at each update.")
    on_refresh: Transport = Field("keep", description="What becomes of the average when the subspace is refreshed.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"exp_avg": Slot((rows, cols), self.on_refresh)}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        m = state["exp_avg"]
        out = x.lerp(m, self.beta1).sign()
        return out, {"exp_avg": averaged(m, x, self.beta2, step)}
