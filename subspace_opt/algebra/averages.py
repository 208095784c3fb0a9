"""Moving averages, in place if the step allows it."""

from __future__ import annotations

from torch import Tensor

from .core import Step


def averaged(m: Tensor, x: Tensor, beta: float, step: Step) -> Tensor:
    """`beta M + (1 - beta) X`, written over M if the step allows it."""
    return m.lerp_(x, 1 - beta) if step.in_place else m.lerp(x, 1 - beta)


def averaged_square(v: Tensor, x: Tensor, beta: float, step: Step) -> Tensor:
    """`beta V + (1 - beta) X.X`, written over V if the step allows it."""
    return (v.mul_(beta) if step.in_place else v * beta).addcmul_(x, x, value=1 - beta)
