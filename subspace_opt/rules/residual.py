"""Rules for the complement that look at what happened inside the subspace."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..algebra import Rule, State, Step, add_lift, lift, linalg, project
from ..registry import register


@register
class Whole(Rule):
    """`(1 - share) R + share X`, R what the subspace leaves of the signal X: with share 1 the unsplit signal (APOLLO)."""

    takes_whole: ClassVar[bool] = True
    uses_grad: ClassVar[bool] = False
    kind: Literal["whole"] = "whole"
    share: float = Field(1.0, ge=0.0, le=1.0, description="Part of what is inside the subspace that stays in the complement.")

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        whole = _given(step.whole, self)
        return (whole if self.share == 1.0 else x.lerp(whole, self.share)), {}


@register
class MatchInside(Rule):
    """`X_i |N_i| / (|R_i| + eps)`: scaled as the inner rule scaled its gradient R to its update N, by line or as a whole.

    Fira (arXiv:2410.01623) by line, APOLLO (arXiv:2412.05270) by line, APOLLO-Mini as a whole.
    """

    uses_grad: ClassVar[bool] = False
    kind: Literal["match_inside"] = "match_inside"
    per: Literal["line", "matrix"] = Field("line", description="One factor for each line of coordinates, or one for the matrix.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the norm of the gradient's coordinates.")

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        if step.inside is None:
            raise ValueError("`match_inside` belongs in `complement`, beside a rule `inside` a subspace")
        update, inner = step.inside.update, step.inside.grad
        if self.per == "matrix":
            return x * (linalg.norm(update) / (linalg.norm(inner) + self.eps)), {}
        return x * (update.norm(dim=-1, keepdim=True) / (inner.norm(dim=-1, keepdim=True) + self.eps)), {}


@register
class Confine(Rule):
    """`X - P P'X U U'` (core), or `(I - P P') X (I - U U')` (strict): nothing of the update in the subspace (arXiv:2504.07097).

    Rules such as Adam leave the complement although their signal lies in it; after them this brings the update back.
    """

    uses_grad: ClassVar[bool] = False
    kind: Literal["confine"] = "confine"
    mode: Literal["core", "strict"] = Field(
        "core", description="With a basis on both sides: keep out of the core that they share, or of each."
    )

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        basis = step.basis
        if basis is None:
            raise ValueError("`confine` belongs in `complement`, beside a selector that opens a subspace")
        if self.mode == "core" or basis.left is None or basis.right is None:
            return add_lift(x, project(x, basis), basis, -1.0), {}
        rows, cols = x.shape[-2:]
        for side in (basis._replace(left=None), basis._replace(right=None)):
            x = x - lift(project(x, side), side, rows, cols)
        return x, {}


def _given(whole: Tensor | None, rule: Whole) -> Tensor:
    if whole is None:
        raise ValueError(f"`{rule.kind}` belongs in `complement`, beside a selector that opens a subspace")
    return whole
