"""Rules that change the size of an update and not its direction."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..algebra import Dim, Rule, Slot, State, Step, linalg
from ..registry import register


@register
class RmsNormalize(Rule):
    """`scale sqrt(mn) X / (|X|_F + eps)`: root mean square `scale` per entry."""

    uses_grad: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    kind: Literal["rms_normalize"] = "rms_normalize"
    scale: float = Field(1.0, gt=0.0, description="Root mean square of the result's entries.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the Frobenius norm.")

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x * self.measured(x), {}

    def measured(self, x: Tensor) -> Tensor:
        size = linalg.norm(x) + self.eps
        factor = self.scale * math.sqrt(x.size(-2) * x.size(-1)) / size
        return torch.where(size > 0, factor, torch.zeros_like(size))  # with eps 0, too: 0 stays 0


@register
class Scale(Rule):
    """`factor s(m, n) X`, with one of the published shape factors for an orthogonal update of an `(m, n)` weight.

    keller: sqrt(max(1, m/n)) (Jordan 2024); spectral: sqrt(m/n) (arXiv:2310.17813, Dion); moonshot: sqrt(max(m, n)), with factor 0.2
    the root mean square of AdamW (arXiv:2502.16982).
    """

    uses_grad: ClassVar[bool] = False
    kind: Literal["scale"] = "scale"
    factor: float = Field(1.0, gt=0.0, description="A constant.")
    by: Literal["none", "keller", "spectral", "moonshot"] = Field("none", description="The shape factor s(m, n).")

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x * self.multiplier(x.size(-2), x.size(-1), step), {}

    def multiplier(self, rows: int, cols: int, step: Step) -> float:
        return self.factor * self.shape_factor(rows, cols)

    def shape_factor(self, m: int, n: int) -> float:
        """s(m, n) for a weight of m rows (outputs) and n columns (inputs)."""
        match self.by:
            case "keller":
                return math.sqrt(max(1.0, m / n))
            case "spectral":
                return math.sqrt(m / n)
            case "moonshot":
                return math.sqrt(max(m, n))
            case "none":
                return 1.0


@register
class NormGrowth(Rule):
    """`X` held to `gamma` times the norm it had at the update before (the limiter of Fira, arXiv:2410.01623, there gamma 1.01).

    The first update, and one after an update of norm 0, passes.
    """

    uses_grad: ClassVar[bool] = False
    kind: Literal["norm_growth"] = "norm_growth"
    gamma: float = Field(1.01, gt=1.0, description="The most by which the norm may grow from one update to the next.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the norm of the update before.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"norm": Slot((), holds="unsigned")}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        size, before = linalg.norm(x), state["norm"][:, None, None]
        growth = (size / (before + self.eps)).clamp_min(self.gamma) / self.gamma
        growth = torch.where(before > 0, growth, torch.ones_like(growth))
        return x / growth, {"norm": (size / growth)[:, 0, 0]}


@register
class Debias(Rule):
    """`X sqrt(1 - beta2^t) / (1 - beta1^t)`: the bias correction of Adam on the whole update, as in Hugging Face's and GaLore's AdamW."""

    uses_grad: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    kind: Literal["debias"] = "debias"
    beta1: float | None = Field(None, ge=0.0, lt=1.0, description="That of the first moment; omitted, it is not corrected.", examples=[0.9])
    beta2: float | None = Field(
        None, ge=0.0, lt=1.0, description="That of the second moment; omitted, it is not corrected.", examples=[0.999]
    )

    @model_validator(mode="after")
    def _corrects_something(self) -> Debias:
        if self.beta1 is None and self.beta2 is None:
            raise ValueError("`debias` needs the beta1 or beta2 of the average that it corrects")
        return self

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x * self.multiplier(x.size(-2), x.size(-1), step), {}

    def multiplier(self, rows: int, cols: int, step: Step) -> float:
        t = float(step.t)
        root = 1.0 if self.beta2 is None else math.sqrt(1 - self.beta2**t)
        return root if self.beta1 is None else root / (1 - self.beta1**t)
