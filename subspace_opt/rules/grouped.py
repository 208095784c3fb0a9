"""Rules with statistics shared by groups of entries: subsets, columns, the whole matrix."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, Slot, State, Step, linear
from ..algebra.linear import S
from ..registry import register


@register
class SubsetNorm(Rule):
    """`S_i <- b2 S_i + (1 - b2) |G_i|^2` for every subset i of entries; `X_j / (sqrt(S_i) + eps)` for j in i (arXiv:2411.07120).

    A subset is a line along the short side, so there is one statistic for each row or column of the long side; or it is a run of entries in
    row-major order. With `beta2: 1` squares are summed as in AdaGrad. In `finish` the rule divides the whole update.
    """

    kind: Literal["subset_norm"] = "subset_norm"
    subsets: Literal["lines"] | int = Field(
        "lines",
        description="`lines` along the short side; a size k, reduced to a divisor of the number of entries; -k for sqrt(entries) / k.",
    )
    beta2: float = Field(0.999, ge=0.0, le=1.0, description="Decay rate of the statistic; 1 sums without forgetting.")
    eps: float = Field(1e-6, ge=0.0, description="Added to the root of the statistic.")
    reduce: Literal["sum", "mean"] = Field("sum", description="Sum or mean of a subset's squares; the paper and its code sum.")

    @field_validator("subsets")
    @classmethod
    def _a_size(cls, value: str | int) -> str | int:
        if value == 0:
            raise ValueError("a subset of size 0 has no norm; give `lines`, a size, or minus a part of sqrt(entries)")
        return value

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        if self.subsets == "lines":
            return {"exp_avg_sq": Slot((rows if rows.size >= cols.size else cols,), holds="unsigned")}
        entries = rows.size * cols.size
        return {"exp_avg_sq": Slot((Dim("subsets", entries // self.subset_size(entries)),), holds="unsigned")}

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        lines = self.subsets == "lines"
        by_rows = rows.size >= cols.size if lines else cols.size % self.subset_size(rows.size * cols.size) == 0
        return RuleTraits(scale_free=True, by_rows=by_rows)

    def subset_size(self, entries: int) -> int:
        """Entries of a subset: the largest divisor of `entries` that is at most the size in the spec."""
        assert isinstance(self.subsets, int)
        asked = self.subsets if self.subsets > 0 else int(math.sqrt(entries) / -self.subsets)
        return next(k for k in range(max(1, min(asked, entries)), 0, -1) if entries % k == 0)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        b, m, n = x.shape
        if self.subsets == "lines":
            size, dim = (n, -1) if state["exp_avg_sq"].size(-1) == m else (m, -2)  # x may be some rows of the matrix
            # Along rows a norm reads memory once; down columns it is 10x slower than squares that are written and summed.
            squares = torch.linalg.vector_norm(grad, dim=-1).square() if dim == -1 else grad.square().sum(-2)
        else:
            size = self.subset_size(m * n)
            squares = grad.reshape(b, -1, size).square().sum(-1)
        if self.reduce == "mean":
            squares.div_(size)
        before = state["exp_avg_sq"]
        s = before.mul_(self.beta2) if step.in_place else before * self.beta2
        s.add_(squares.mul_(1 - self.beta2) if self.beta2 < 1 else squares)
        root = s.sqrt().add_(self.eps)
        if self.subsets == "lines":
            root = root.unsqueeze(dim)
            return self._divided(x, root, step), {"exp_avg_sq": s}
        return self._divided(x.reshape(b, -1, size), root.unsqueeze(-1), step).reshape(b, m, n), {"exp_avg_sq": s}

    def _divided(self, x: Tensor, root: Tensor, step: Step) -> Tensor:
        if self.eps < linalg.SAFE:
            return linalg.quotient(x, root)
        return x.div_(root) if step.spare else x / root


@register
class ColumnNormalize(Rule):
    """`X_j / (|X_j| + eps)` for every column j (the right factor of Dion, arXiv:2504.05295)."""

    kind: Literal["column_normalize"] = "column_normalize"
    eps: float = Field(1e-8, ge=0.0, description="Added to the norm of a column.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, reads_grad=False)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return linalg.unit_columns(x, self.eps), {}


@register
class RmsClip(Rule):
    """`X min(1, limit / rms(X))`: the root mean square of an entry is at most `limit`."""

    kind: Literal["rms_clip"] = "rms_clip"
    limit: float = Field(1.0, gt=0.0, description="Largest root mean square.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, lazy=True, measures=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        rms = linear.norm(x) / math.sqrt(x.size(-2) * x.size(-1))
        return x * (self.limit / rms.clamp_min(self.limit)), {}
