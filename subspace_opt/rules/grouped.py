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

Shape = Literal["lines", "rows", "columns", "entries", "matrix"]


@register
class SubsetNorm(Rule):
    """`S_i <- b2 S_i + (1 - b2) |Y_i|^2` for every subset i of entries; `X_j / (sqrt(S_i) + eps)` for j in i (arXiv:2411.07120).

    Y is the gradient, or with `of: signal` the signal X itself: after `orthogonalize` these are the second moments of NorMuon (`lines` or
    `rows`, arXiv:2510.05491) and AdaMuon (`entries`, arXiv:2507.11005); NAMO divides by the size of the gradient (`matrix`,
    arXiv:2602.17080). With `beta2: 1` squares are summed as in AdaGrad. In `finish` the rule divides the whole update.
    """

    kind: Literal["subset_norm"] = "subset_norm"
    subsets: Shape | int = Field(
        "lines",
        description="`lines` along the short side; each of the `rows`, `columns` or `entries`, or the whole `matrix`; a size k of runs in "
        "row-major order, reduced to a divisor of the number of entries; -k for sqrt(entries) / k.",
    )
    of: Literal["gradient", "signal"] = Field("gradient", description="The matrix Y whose squares the statistic averages.")
    beta2: float = Field(0.999, ge=0.0, le=1.0, description="Decay rate of the statistic; 1 sums without forgetting.")
    eps: float = Field(1e-6, ge=0.0, description="Added to the root of the statistic.")
    eps_floor: bool = Field(False, description="Divide by the root of max(statistic, eps) instead of root + eps.")
    reduce: Literal["sum", "mean"] = Field("sum", description="Sum or mean of a subset's squares; the paper and its code sum.")
    keep_idle: bool = Field(False, description="Leave the statistic of a subset of zeros as it is, instead of letting it decay.")
    keep_norm: bool = Field(False, description="Scale the result to the Frobenius norm that the signal had.")

    @field_validator("subsets")
    @classmethod
    def _a_size(cls, value: str | int) -> str | int:
        if value == 0:
            raise ValueError("a subset of size 0 has no norm; give `lines`, a size, or minus a part of sqrt(entries)")
        return value

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"exp_avg_sq": Slot(self._statistics(rows, cols), holds="unsigned")}

    def _statistics(self, rows: Dim, cols: Dim) -> tuple[Dim, ...]:
        """The dimensions of the statistic."""
        match self.subsets:
            case "lines":
                return (rows if rows.size >= cols.size else cols,)
            case "rows":
                return (rows,)
            case "columns":
                return (cols,)
            case "entries":
                return rows, cols
            case "matrix":
                return ()
        entries = rows.size * cols.size
        return (Dim("subsets", entries // self.subset_size(entries)),)

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        if isinstance(self.subsets, int):
            by_rows = cols.size % self.subset_size(rows.size * cols.size) == 0
        else:
            by_rows = self.subsets in ("rows", "entries") or (self.subsets == "lines" and rows.size >= cols.size)
        return RuleTraits(
            scale_free=True,
            reads_grad=self.of == "gradient",
            elementwise=self.subsets == "entries" and not self.keep_norm,
            by_rows=by_rows and not self.keep_norm,
        )

    def subset_size(self, entries: int) -> int:
        """Entries of a subset: the largest divisor of `entries` that is at most the size in the spec."""
        assert isinstance(self.subsets, int)
        asked = self.subsets if self.subsets > 0 else int(math.sqrt(entries) / -self.subsets)
        return next(k for k in range(max(1, min(asked, entries)), 0, -1) if entries % k == 0)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        before, size = state["exp_avg_sq"], linalg.norm(x) if self.keep_norm else None
        squares = self._squares(grad if self.of == "gradient" else x, before)
        s = self._averaged(before, squares, step)
        root = s.clamp_min(self.eps).sqrt_() if self.eps_floor else s.sqrt().add_(self.eps)
        if isinstance(self.subsets, int):
            shape, x = x.shape, x.reshape(x.size(0), root.size(-1), -1)
            out = self._divided(x, root.unsqueeze(-1), step).reshape(shape)
        else:
            out = self._divided(x, _broadcast(root, self._axis(x, root)), step)
        return (out if size is None else self._resized(out, size)), {"exp_avg_sq": s}

    def _averaged(self, before: Tensor, squares: Tensor, step: Step) -> Tensor:
        if self.keep_idle and self.beta2 < 1:
            weight = (squares > 0).to(squares.dtype).mul_(1 - self.beta2)
            return before.lerp_(squares, weight) if step.in_place else before.lerp(squares, weight)
        s = before.mul_(self.beta2) if step.in_place else before * self.beta2
        return s.add_(squares.mul_(1 - self.beta2) if self.beta2 < 1 else squares)

    def _axis(self, x: Tensor, statistic: Tensor) -> int | None:
        """The dimension of `x` along which a subset lies: -1 for rows, -2 for columns, 0 for the whole matrix, None for an entry."""
        match self.subsets:
            case "lines":
                return -1 if statistic.size(-1) == x.size(-2) else -2  # x may be some rows of the matrix
            case "rows":
                return -1
            case "columns":
                return -2
        return None if self.subsets == "entries" else 0

    def _squares(self, y: Tensor, statistic: Tensor) -> Tensor:
        """The sum or mean of the squares of each subset, in the shape of the statistic."""
        if isinstance(self.subsets, int):
            squares, size = y.reshape(*statistic.shape, -1).square().sum(-1), y[0].numel() // statistic.size(-1)
        else:
            axis = self._axis(y, statistic)
            if axis is None:
                return y.square()
            size = y[0].numel() if axis == 0 else y.size(axis)
            # Along rows a norm reads memory once; down columns it is 10x slower than squares that are written and summed.
            if axis == 0:
                squares = linalg.norm(y).square().view(-1)
            else:
                squares = torch.linalg.vector_norm(y, dim=-1).square() if axis == -1 else y.square().sum(-2)
        return squares.div_(size) if self.reduce == "mean" else squares

    def _divided(self, x: Tensor, root: Tensor, step: Step) -> Tensor:
        if self.eps < linalg.SAFE:
            return linalg.quotient(x, root)
        return x.div_(root) if step.spare else x / root

    def _resized(self, out: Tensor, size: Tensor) -> Tensor:
        """A matrix of norm `size` in the direction of `out`."""
        if self.eps < linalg.SAFE:
            return out * linalg.ratio(size, linalg.norm(out), self.eps)
        return out.mul_(size / linalg.norm(out).clamp_min(self.eps))


def _broadcast(root: Tensor, axis: int | None) -> Tensor:
    """A divisor for each entry, from one for each subset along `axis`."""
    if axis is None:
        return root
    return root.view(-1, 1, 1) if axis == 0 else root.unsqueeze(axis)


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
        return linear.times(x, self.limit / rms.clamp_min(self.limit)), {}
