"""Rules for the complement that read signal, update or basis of the subspace."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, State, Step, add_lift, lift, project
from ..algebra.linear import Linear, S
from ..registry import register


@register
class Whole(Rule):
    """`(1 - share) R + share X`, R the residual of the signal X: with share 1 the whole signal (APOLLO)."""

    kind: Literal["whole"] = "whole"
    share: float = Field(1.0, ge=0.0, le=1.0, description="Share of the signal's part inside the subspace that the complement keeps.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(takes_whole=True, reads_grad=False, lazy=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        if step.whole is None:
            raise ValueError("`whole` belongs in `complement`, beside a selector that opens a subspace")
        whole = Linear.of(step.whole) if isinstance(x, Linear) else step.whole
        return (whole if self.share == 1.0 else x * (1.0 - self.share) + whole * self.share), {}


@register
class MatchInside(Rule):
    """`X_i |N_i| / (|R_i| + eps)`: the inner rule scaled its gradient R to its update N, and X gets the same scale, by line or as a whole.

    Fira (arXiv:2410.01623) by line, APOLLO (arXiv:2412.05270) by line, APOLLO-Mini as a whole.
    """

    kind: Literal["match_inside"] = "match_inside"
    per: Literal["line", "matrix"] = Field("line", description="One factor for each line of coordinates, or one for the matrix.")
    eps: float = Field(1e-8, ge=0.0, description="Added to the norm of the gradient's coordinates.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        if step.inside is None:
            raise ValueError("`match_inside` belongs in `complement`, beside a rule `inside` a subspace")
        update, inner = step.inside.update, step.inside.grad
        if self.per == "matrix":
            return x * linalg.ratio(linalg.norm(update), linalg.norm(inner), self.eps), {}
        return x * linalg.ratio(update.norm(dim=-1, keepdim=True), inner.norm(dim=-1, keepdim=True), self.eps), {}


@register
class Confine(Rule):
    """`X - P P'X U U'` (core), or `(I - P P') X (I - U U')` (strict): the part of the update outside the subspace (arXiv:2504.07097).

    An elementwise rule such as Adam maps a residual to an update that has a part in the subspace. After it, this rule removes that part.
    """

    kind: Literal["confine"] = "confine"
    mode: Literal["core", "strict"] = Field(
        "core", description="With a basis on both sides: remove the part in their common core, or the part in either."
    )

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False)

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
