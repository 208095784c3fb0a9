"""Shampoo: a matrix between inverse roots of the covariances of both sides."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, Slot, State, Step
from ..registry import register


@register
class Shampoo(Rule):
    """`L <- b L + w GG'; R <- b R + w G'G; L^-1/4 X R^-1/4`, with w = 1 - b, or 1 if b = 1 (arXiv:1802.09568).

    A root is taken of `L + eps max(lambda) I`. The roots are kept between recomputations. A side longer than `max_dim` has no covariance,
    and the only other side then has the power -1/2. The same bases as a subspace are selector `kron_eigen`; there a rule inside divides
    each coordinate by a second moment of its own, which is SOAP.
    """

    kind: Literal["shampoo"] = "shampoo"
    beta2: float = Field(0.95, ge=0.0, le=1.0, description="Decay rate of the covariances; 1 sums without forgetting.")
    every: PositiveInt = Field(10, description="Updates between recomputations of the roots.")
    eps: float = Field(1e-5, ge=0.0, lt=1.0, description="Added to all eigenvalues, as a share of the largest.")
    debias: bool = Field(True, description="Correct the bias of the covariances, if `beta2` is below 1.")
    max_dim: PositiveInt = Field(10000, description="The longest side that has a covariance.")

    def _sides(self, rows: Dim, cols: Dim) -> dict[str, Dim]:
        """The sides that have a covariance, by name."""
        return {name: dim for name, dim in (("left", rows), ("right", cols)) if dim.size <= self.max_dim}

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        out: dict[str, Slot] = {}
        for name, dim in self._sides(rows, cols).items():
            out |= {f"{name}_covariance": Slot((dim, dim), "project"), f"{name}_root": Slot((dim, dim), "project")}
        return out

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, decomposes=True, waits=True)

    def flops(self, rows: Dim, cols: Dim) -> float:
        sides = self._sides(rows, cols).values()
        return sum(4.0 * dim.size * rows.size * cols.size + 11.0 * dim.size**3 / self.every for dim in sides)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        new: State = {}
        sides = [name.removesuffix("_root") for name in state if name.endswith("_root")]
        anew = step.first or step.refresh or (int(step.t) - 1) % self.every == 0
        for name in sides:
            turned = grad if name == "left" else grad.mT
            weight = 1.0 - self.beta2 if self.beta2 < 1 else 1.0
            before = state[f"{name}_covariance"]
            p = linalg.symmetric(turned, turned.mT, before, beta=self.beta2, alpha=weight, in_place=step.in_place)
            root = self._inverse_root(p, 2 * len(sides), step) if anew else state[f"{name}_root"]
            new |= {f"{name}_covariance": p, f"{name}_root": root}
            x = linalg.mm(root, x) if name == "left" else linalg.mm(x, root)
        return x, new

    def _inverse_root(self, p: Tensor, power: int, step: Step) -> Tensor:
        """`(P / c + eps max(lambda) I)^(-1 / power)` for covariances P with bias c; 0 where an eigenvalue is only round-off."""
        values, vectors = linalg.eigh(p)
        if self.debias and self.beta2 < 1:
            values = values / (1 - self.beta2**step.t)
        top = values[..., :1]
        values = values + self.eps * top
        held = values > p.size(-1) * torch.finfo(p.dtype).eps * top
        inverse = torch.where(held, linalg.divisor(values) ** (-1.0 / power), 0.0)
        return linalg.mm(vectors * inverse.unsqueeze(-2), vectors.mT)
