"""Between a matrix and its coordinates: `project`, `lift`, and a lift that is added to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import linalg
from .core import Basis, Side


def picks(u: Side) -> bool:
    """True for a side that picks coordinates by index."""
    return isinstance(u, Tensor) and u.dtype == torch.int64


def one_sided(basis: Basis) -> bool:
    """True for a basis of columns, or of picked coordinates, on one side only and without a gate."""
    sides = [u for u in (basis.left, basis.right) if u is not None]
    return basis.gate is None and len(sides) == 1 and isinstance(sides[0], Tensor)


def transposed(basis: Basis) -> Basis:
    """The basis of the transposed matrices."""
    return Basis(basis.right, basis.left, basis.gate)


def by_modes(x: Tensor, factors: tuple[Tensor | int, ...], *, transpose: bool) -> Tensor:
    """`X (Q_1 x Q_2 x ...)`, or with the transposed factors: factor by factor, without forming the Kronecker product."""
    sizes = [f if isinstance(f, int) else f.size(-1) for f in factors]
    y = x.reshape(*x.shape[:-1], *sizes)  # (B, m, n_1, n_2, ...)
    for i, factor in enumerate(factors):
        if isinstance(factor, Tensor):
            q = factor.mT if transpose else factor
            moved = y.movedim(2 + i, -1)
            flat = linalg.mm(moved.reshape(x.size(0), -1, sizes[i]), q)
            y = flat.reshape(moved.shape).movedim(-1, 2 + i)
    return y.reshape(x.shape)


def project(x: Tensor, basis: Basis) -> Tensor:
    """Coordinates `P' X U` of a stack `(B, m, n)` in a basis."""
    if basis.right is not None:
        x = _project_right(x, basis.right)
    if isinstance(basis.left, Tensor) and not picks(basis.left):
        x = linalg.mm(basis.left.mT, x)  # not (X' P)': its column-major layout would slow down later operations
    elif basis.left is not None:
        x = _project_right(x.mT, basis.left).mT
    return _gated(x, basis)


def lift(c: Tensor, basis: Basis, rows: int, cols: int) -> Tensor:
    """`P C U'`: the matrices `(B, rows, cols)` that have coordinates `c` and no part outside the subspace."""
    if isinstance(basis.left, Tensor) and not picks(basis.left):
        c = linalg.mm(basis.left, c)
    elif basis.left is not None:
        c = _lift_right(c.mT, basis.left, rows).mT
    if basis.right is not None:
        c = _lift_right(c, basis.right, cols)
    return _gated(c, basis)


def add_lift(y: Tensor, c: Tensor, basis: Basis, weight: float = 1.0, *, own: float = 1.0, in_place: bool = False) -> Tensor:
    """`own Y + weight P C U'`; one product if the basis is dense and one-sided. `in_place`: the result may be written over Y."""
    if one_sided(basis) and not picks(basis.left) and not picks(basis.right):
        a, b = (c, basis.right.mT) if isinstance(basis.right, Tensor) else (basis.left, c)
        assert isinstance(a, Tensor)
        return linalg.addmm(y, a, b, beta=own, alpha=weight, in_place=in_place)
    lifted = lift(c, basis, y.size(-2), y.size(-1))
    if in_place:
        return (y if own == 1.0 else y.mul_(own)).add_(lifted, alpha=weight)
    return (y if own == 1.0 else y * own).add(lifted, alpha=weight)


def _project_right(x: Tensor, u: Tensor | tuple[Tensor | int, ...]) -> Tensor:
    if isinstance(u, tuple):
        return by_modes(x, u, transpose=False)
    if picks(u):
        return x.gather(-1, u.unsqueeze(-2).expand(-1, x.size(-2), -1))
    return linalg.mm(x, u)


def _lift_right(c: Tensor, u: Tensor | tuple[Tensor | int, ...], size: int) -> Tensor:
    if isinstance(u, tuple):
        return by_modes(c, u, transpose=True)
    if picks(u):
        index = u.unsqueeze(-2).expand(-1, c.size(-2), -1)
        return c.new_zeros(*c.shape[:-1], size).scatter(-1, index, c)
    return linalg.mm(c, u.mT)


def _gated(c: Tensor, basis: Basis) -> Tensor:
    return c if basis.gate is None else c * basis.gate.to(c.dtype)[:, None, None]
