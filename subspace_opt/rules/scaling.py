"""Rules that change the size of an update and keep its direction."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, Slot, State, Step, linear
from ..algebra.linear import S
from ..registry import register


@register
class RmsNormalize(Rule):
    """`scale sqrt(mn) X / (|X|_F + eps)`: root mean square `scale` per entry."""

    kind: Literal["rms_normalize"] = "rms_normalize"
    scale: float = Field(1.0, gt=0.0, description="Root mean square of the result's entries.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the Frobenius norm.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, reads_grad=False, lazy=True, measures=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        return x * linalg.ratio(self.scale * math.sqrt(x.size(-2) * x.size(-1)), linear.norm(x), self.eps), {}


@register
class Scale(Rule):
    """`factor s(m, n) X`, with one of the published shape factors for an orthogonal update of an `(m, n)` weight.

    m and n are the sides of X. Inside a subspace these are the sides of the coordinates; `sides: weight` takes the sides of the weight.

    keller: sqrt(max(1, m/n)) (Jordan 2024); spectral: sqrt(m/n) (arXiv:2310.17813, Dion); moonshot: sqrt(max(m, n)), with factor 0.2
    the root mean square of AdamW (arXiv:2502.16982).
    """

    kind: Literal["scale"] = "scale"
    factor: float = Field(1.0, gt=0.0, description="A constant factor.")
    by: Literal["none", "keller", "spectral", "moonshot"] = Field("none", description="The shape factor s(m, n).")
    sides: Literal["signal", "weight"] = Field(
        "signal", description="m and n: the rows and columns of the signal, or those of the weight in its own orientation."
    )

    @model_validator(mode="after")
    def _has_a_factor_of_sides(self) -> Scale:
        if self.sides == "weight" and self.by == "none":
            raise ValueError("`sides: weight` has no effect without a shape factor; give `by`, or leave `sides` out")
        return self

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, lazy=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        sides = (x.size(-2), x.size(-1)) if self.sides == "signal" else _sides_of_weight(step)
        return x * (self.factor * self.shape_factor(*sides)), {}

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


def _sides_of_weight(step: Step) -> tuple[int, int]:
    rows, cols = step.rows.size, step.cols.size
    return (cols, rows) if step.turned else (rows, cols)


@register
class NormGrowth(Rule):
    """`X` limited to `gamma` times the norm of the previous result (the limiter of Fira, arXiv:2410.01623, there gamma 1.01).

    The first update passes unchanged, and so does an update after one of norm 0. If the previous norm is below `restart` times the present
    one, the limit is at least the norm of an update with root mean square 1. Otherwise gradients of practically 0 would hold the weight for
    thousands of updates, because the limit grows only by `gamma`. The authors' code has no restart.
    """

    kind: Literal["norm_growth"] = "norm_growth"
    gamma: float = Field(1.01, gt=1.0, description="The largest growth of the norm from one update to the next.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the norm of the previous update.")
    restart: float = Field(
        1e-3,
        ge=0.0,
        lt=1.0,
        description="Restart the limit if the previous norm is below this share of the present one; 0 never restarts it.",
    )

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"norm": Slot((), holds="unsigned")}

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, lazy=True, measures=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        size, before = linear.norm(x), state["norm"].view(-1, 1, 1)
        limit = (before + self.eps) * self.gamma
        anew = torch.maximum(limit, size.clamp_max(math.sqrt(x.size(-2) * x.size(-1))))
        limit = torch.where(before < self.restart * size, anew, limit)
        shrink = (limit / size).clamp_max(1.0).masked_fill(before == 0, 1.0)
        return x * shrink, {"norm": (size * shrink).view(-1)}


@register
class Debias(Rule):
    """`X sqrt(1 - beta2^t) / (1 - beta1^t)`: the bias correction of Adam on the whole update, as in Hugging Face's and GaLore's AdamW."""

    kind: Literal["debias"] = "debias"
    beta1: float | None = Field(None, ge=0.0, lt=1.0, description="Decay rate of the first moment; omitted: no correction.", examples=[0.9])
    beta2: float | None = Field(
        None, ge=0.0, lt=1.0, description="Decay rate of the second moment; omitted: no correction.", examples=[0.999]
    )

    @model_validator(mode="after")
    def _corrects_something(self) -> Debias:
        if self.beta1 is None and self.beta2 is None:
            raise ValueError("`debias` needs the beta1 or beta2 of the average that it corrects")
        return self

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, elementwise=True, by_rows=True, lazy=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        if step.on_device:
            return x * self._on_device(step.t), {}
        t = float(step.t)
        root = 1.0 if self.beta2 is None else math.sqrt(1 - self.beta2**t)
        return x * (root if self.beta1 is None else root / (1 - self.beta1**t)), {}

    def _on_device(self, t: Tensor) -> Tensor:
        """The factor as a 0-d tensor."""
        root = torch.ones_like(t) if self.beta2 is None else (1 - self.beta2**t).sqrt()
        return root if self.beta1 is None else root / (1 - self.beta1**t)
