"""Between a matrix and its coordinates: `project`, `lift`, and a lift that is added to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from . import linalg
from .core import Basis


def _picks(u: Tensor) -> bool:
    return u.dtype == torch.int64


def _project_right(x: Tensor, u: Tensor | tuple[Tensor | int, ...]) -> Tensor:
    if isinstance(u, tuple):
        return _by_modes(x, u, transpose=False)
    if _picks(u):
        return x.gather(-1, u.unsqueeze(-2).expand(-1, x.size(-2), -1))
    return linalg.mm(x, u)


def _lift_right(c: Tensor, u: Tensor | tuple[Tensor | int, ...], size: int) -> Tensor:
    if isinstance(u, tuple):
        return _by_modes(c, u, transpose=True)
    if _picks(u):
        index = u.unsqueeze(-2).expand(-1, c.size(-2), -1)
        return c.new_zeros(*c.shape[:-1], size).scatter(-1, index, c)
    return linalg.mm(c, u.mT)


def _by_modes(x: Tensor, factors: tuple[Tensor | int, ...], transpose: bool) -> Tensor:
    """`X (Q_1 x Q_2 x ...)`, factor by factor, without the product."""
    sizes = [f if isinstance(f, int) else f.size(-1) for f in factors]
    y = x.reshape(*x.shape[:-1], *sizes)  # (B, m, n_1, n_2, ...)
    for i, factor in enumerate(factors):
        if isinstance(factor, Tensor):
            q = factor.mT if transpose else factor
            moved = y.movedim(2 + i, -1)
            flat = linalg.mm(moved.reshape(x.size(0), -1, sizes[i]), q)
            y = flat.reshape(moved.shape).movedim(-1, 2 + i)
    return y.reshape(x.shape)


def _gated(c: Tensor, basis: Basis) -> Tensor:
    return c if basis.gate is None else c * basis.gate.to(c.dtype)[:, None, None]


def project(x: Tensor, basis: Basis) -> Tensor:
    """Coordinates `P' X U` of a stack `(B, m, n)` in a basis."""
    if basis.right is not None:
        x = _project_right(x, basis.right)
    if isinstance(basis.left, Tensor) and not _picks(basis.left):
        x = linalg.mm(basis.left.mT, x)  # and not the transpose of X' P, whose layout would slow down all that follows
    elif basis.left is not None:
        x = _project_right(x.mT, basis.left).mT
    return _gated(x, basis)


def lift(c: Tensor, basis: Basis, rows: int, cols: int, *, turned: bool = False) -> Tensor:
    """`P C U'`, the matrices `(B, rows, cols)` with coordinates `c`; `turned`: laid out by columns, if that costs nothing."""
    if turned and basis.left is None and basis.gate is None and isinstance(basis.right, Tensor) and not _picks(basis.right):
        return linalg.mm(basis.right, c.mT).mT
    if isinstance(basis.left, Tensor) and not _picks(basis.left):
        c = linalg.mm(basis.left, c)
    elif basis.left is not None:
        c = _lift_right(c.mT, basis.left, rows).mT
    if basis.right is not None:
        c = _lift_right(c, basis.right, cols)
    return _gated(c, basis)


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether what is written to one tensor may show in the other."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def add_lift(y: Tensor, c: Tensor, basis: Basis, weight: float = 1.0, *, own: float = 1.0, in_place: bool = False) -> Tensor:
    """`own Y + weight P C U'`, in one product where the basis is dense and one-sided; `in_place`: Y is needed no longer."""
    u = basis.alone
    if u is not None and not _picks(u):
        return linalg.addmm(y, c, u.mT, beta=own, alpha=weight, in_place=in_place)
    if own != 1.0:
        y = y * own
    return y.add(lift(c, basis, y.size(-2), y.size(-1)), alpha=weight)
