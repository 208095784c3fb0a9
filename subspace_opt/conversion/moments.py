"""Averages of a gradient in coordinates of known bases, and their way from one basis to another.

All values have the weight's own orientation, `(B, m, n)`: coordinates `C` stand for `P C U'` with bases P `(B, m, k)` and U
`(B, n, r)`. None is the identity.

    mean      C' = P'^T (P C U^T) U'                    exact for the part of the mean that the bases hold
    squares   V' = (P'^T P).^2 V (U^T U').^2            as if the coordinates were uncorrelated

With both, the squares of the mean are carried exactly and only the variance is rotated by squares: `V' = rotated(V - M.M) + M'.M'`, the
formula of LDAdam (arXiv:2410.16103).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import linalg
from ..algebra.core import Basis, Side
from ..algebra.projection import project


@dataclass(frozen=True)
class Moment:
    """An average without bias, in coordinates of two bases."""

    value: Tensor  # (B, k, r)
    left: Tensor | None = None  # (B, m, k)
    right: Tensor | None = None  # (B, n, r)
    noise: float = 1.0  # the variance of the average of independent signals of variance 1
    decay: float = 0.0  # the share of the average that an update keeps
    name: str = ""  # the slot that held it

    @property
    def is_full(self) -> bool:
        """True if the entries are those of the matrix itself."""
        return self.left is None and self.right is None


def dense(side: Side, size: int, like: Tensor) -> Tensor | None:
    """A side of a basis as columns `(B, size, r)`; None for the identity."""
    if side is None:
        return None
    eye = torch.eye(size, dtype=like.dtype, device=like.device).expand(like.size(0), -1, -1)
    return side if isinstance(side, Tensor) and side.dtype != torch.int64 else project(eye, Basis(right=side))


def rotation(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`U_old' U_new` `(B, r_old, r_new)`; None if the two are the same tensor, or both the identity."""
    if old is new:
        return None
    if old is None:
        return new
    return old.mT if new is None else linalg.mm(old.mT, new)


def rotated(moment: Moment, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The coordinates of a mean in other bases: what was lifted to the whole space and projected."""
    value, across, down = moment.value, rotation(moment.right, right), rotation(moment.left, left)
    value = value if across is None else linalg.mm(value, across)
    return value if down is None else linalg.mm(down.mT, value)


def share_kept(moment: Moment, left: Tensor | None, right: Tensor | None) -> float:
    """The smallest share of a new direction that the old bases hold: 1 if no direction of the new bases is new."""
    turns = [turn for turn in (rotation(moment.left, left), rotation(moment.right, right)) if turn is not None]
    return min((float(turn.square().sum(-2).min()) for turn in turns), default=1.0)


def squares(moment: Moment, mean: Moment | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The second moments in other bases, all above 0 where the old ones are.

    Args:
        mean: The mean in the same coordinates. Without it all of the second moment is rotated by squares.
    """
    if mean is None or mean.left is not moment.left or mean.right is not moment.right:
        return _by_squares(moment.value, moment, left, right)
    spread = (moment.value - mean.value.square()).clamp_min(0.0)
    return _by_squares(spread, moment, left, right) + rotated(mean, left, right).square()


def _by_squares(value: Tensor, moment: Moment, left: Tensor | None, right: Tensor | None) -> Tensor:
    value = _one_side(value, rotation(moment.right, right))
    return _one_side(value.mT, rotation(moment.left, left)).mT


def _one_side(value: Tensor, turn: Tensor | None) -> Tensor:
    """`V (R.R)`, and for the part of a new direction that no old one holds the second moments of the weakest old direction.

    Old bases lead: directions that they left out have less energy. Without this part the second moment of a new direction would be 0, and
    its first updates would be divided by nearly 0.
    """
    if turn is None:
        return value
    shares = turn.square()  # (B, r_old, r_new)
    missing = (1 - shares.sum(-2)).clamp_min(0.0)
    missing = missing * (missing > 1e-5)  # round-off
    by_column = value.mean(-2)  # (B, r_old)
    weakest = by_column.amin(-1, keepdim=True) / linalg.divisor(by_column.mean(-1, keepdim=True))
    typical = value.mean(-1) * weakest  # (B, k)
    return linalg.mm(value, shares) + typical.unsqueeze(-1) * missing.unsqueeze(-2)


def full(moment: Moment, value: Tensor) -> Moment:
    """The moment with entries of the matrix itself."""
    return replace(moment, value=value, left=None, right=None)


def from_energy(mean: Moment) -> Moment:
    """Second moments from a mean of gradients that are mostly noise: `row energy x column energy / energy`, divided by `mean.noise`.

    Entries of a mean may be near 0 by chance, so each entry takes the mean of its row and of its column (arXiv:1804.04235).
    """
    return replace(mean, value=factored(mean.value.square()) / mean.noise)


def factored(squared: Tensor) -> Tensor:
    """The matrices of rank one with the same sums of rows and columns."""
    rows, cols = squared.sum(-1, keepdim=True), squared.sum(-2, keepdim=True)
    return rows * cols / linalg.divisor(squared.sum((-2, -1), keepdim=True))


@dataclass(frozen=True)
class Known:
    """All that a saved state tells about the gradients of some matrices of one shape."""

    mean: Moment | None = None
    square: Moment | None = None
    covariances: tuple[tuple[str, Tensor | None, Tensor], ...] = ()  # side, basis (None: the identity), covariance in it

    @property
    def energies(self) -> Moment | None:
        """Second moments: those that were kept, or an estimate from the mean."""
        if self.square is not None:
            return self.square
        return None if self.mean is None else from_energy(self.mean)

    @property
    def own_mean(self) -> Moment | None:
        """The mean, if it has the coordinates of the second moments."""
        if self.mean is None or self.square is None:
            return self.mean
        return replace(
            self.mean, value=rotated(self.mean, self.square.left, self.square.right), left=self.square.left, right=self.square.right
        )

    def squared(self, left: Tensor | None, right: Tensor | None) -> Tensor | None:
        """Second moments in the given bases."""
        energies = self.energies
        return None if energies is None else squares(energies, self.own_mean, left, right)

    def typical(self, rows: int, cols: int) -> Tensor | None:
        """One matrix `(B, rows, cols)` in place of a gradient: the direction of the mean, the energy of the second moments."""
        squared = self.squared(None, None)
        if squared is None:
            return None
        signal = rotated(self.mean, None, None) if self.mean is not None else _with_signs(squared.sqrt())
        energy, own = squared.sum((-2, -1), keepdim=True), signal.square().sum((-2, -1), keepdim=True)
        return signal * (energy / linalg.divisor(own)).sqrt()

    def rows_along(self, side: str) -> Tensor | None:
        """Rows `X` `(B, p, n)` whose `X'X` is the gradient's covariance along a side, for selectors that see nothing else."""
        for own, basis, covariance in self.covariances:
            if own == side:
                return self._from_covariance(side, basis, covariance)
        energies, mean = self.energies, self.own_mean
        if energies is None:
            return None
        value, signal = energies.value, None if mean is None else mean.value
        basis = energies.right if side == "right" else energies.left
        value, signal = (value, signal) if side == "right" else (value.mT, None if signal is None else signal.mT)
        spread = value if signal is None else (value - signal.square()).clamp_min(0.0)
        rows = torch.diag_embed(spread.sum(-2).sqrt())
        rows = rows if signal is None else torch.cat([signal, rows], dim=-2)
        return rows if basis is None else linalg.mm(rows, basis.mT)

    def _from_covariance(self, side: str, basis: Tensor | None, covariance: Tensor) -> Tensor:
        """The square root of a covariance, and below it the mean outside its basis, weaker than all directions of the basis."""
        values, vectors = linalg.eigh((covariance + covariance.mT) / 2)
        root = values.sqrt().unsqueeze(-1) * vectors.mT
        if basis is None:
            return root
        rows = linalg.mm(root, basis.mT)
        if self.mean is None:
            return rows
        mean = rotated(self.mean, None, None)
        mean = mean if side == "right" else mean.mT
        rest = mean - linalg.mm(linalg.mm(mean, basis), basis.mT)
        size = torch.linalg.matrix_norm(rest, keepdim=True)
        weakest = values.amin(-1).sqrt()[:, None, None]
        return torch.cat([rows, rest * (weakest / linalg.divisor(size))], dim=-2)


def _with_signs(x: Tensor) -> Tensor:
    """The matrix with fixed random signs, so that its columns are nearly orthogonal."""
    draws = torch.randn(x.shape[-2:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * draws.sign().to(x.device, x.dtype)


def is_known(moment: Moment | None) -> bool:
    """True if a moment is there and is not 0."""
    return moment is not None and math.isfinite(float(moment.value.abs().sum())) and bool(moment.value.any())
