"""How state moves on: moving averages, and state in coordinates after a refresh, which is kept, reset, permuted or projected."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linalg
from .core import Basis, Dim, Order, Slot, Step
from .projection import by_modes, picks


def averaged(m: Tensor, x: Tensor, beta: float, step: Step) -> Tensor:
    """`beta M + (1 - beta) X`, written over M if the step allows it."""
    return m.lerp_(x, 1 - beta) if step.in_place else m.lerp(x, 1 - beta)


def averaged_square(v: Tensor, x: Tensor, beta: float, step: Step) -> Tensor:
    """`beta V + (1 - beta) X.X`, written over V if the step allows it."""
    return (v.mul_(beta) if step.in_place else v * beta).addcmul_(x, x, value=1 - beta)


class Change(NamedTuple):
    """A refresh as the inner rules see it: old basis, new basis, and the new order of kept coordinates.

    `atoms`: for every new atom its index among the old atoms, and 1 if it is one of them; None unless both bases have atoms.
    """

    old: Basis
    new: Basis
    rows: Dim
    cols: Dim
    order: Order | None
    atoms: tuple[Tensor, Tensor] | None = None

    def sides(self, dim: Dim) -> tuple[Any, Any] | None:
        """Old and new basis of the side whose coordinates run along `dim`; None if nothing changes along it."""
        for own, old, new in ((self.cols, self.old.right, self.new.right), (self.rows, self.old.left, self.new.left)):
            if dim == own and old is not None and new is not None:
                return old, new
        return None

    def rotation(self, dim: Dim) -> Tensor | None:
        """`U_old' U_new` `(B, r_old, r_new)` of a coordinate dimension; None if nothing changes along `dim`."""
        both = self.sides(dim)
        if both is None:
            return None
        if isinstance(both[0], tuple):
            raise ValueError(f"coordinates along '{dim.name}' are those of a Kronecker product; `carry` rotates them factor by factor")
        return overlap(*both)

    def carry(self, value: Tensor, slot: Slot) -> Tensor:
        """One slot's value after the refresh, by its declared transport."""
        if slot.transport == "reset":
            return torch.zeros_like(value)
        if slot.transport == "keep":
            return self._permuted(value, slot)
        for axis, dim in enumerate(slot.dims, 1):
            if self.sides(dim) is not None:
                moved = value.movedim(axis, -1)  # (B, ..., r_old)
                rotated = self._rotated(moved.reshape(moved.size(0), -1, moved.size(-1)), dim)
                value = rotated.reshape(*moved.shape[:-1], rotated.size(-1)).movedim(-1, axis).contiguous()
        return value.abs() if slot.transport == "project_abs" else value

    def _permuted(self, value: Tensor, slot: Slot) -> Tensor:
        for axis, dim in enumerate(slot.dims, 1):
            order = None if self.order is None else self.order.get(dim.name)
            if order is not None:
                shape = [value.size(0)] + [1] * (value.dim() - 1)
                shape[axis] = dim.size
                value = value.gather(axis, order.view(shape).expand_as(value))
        return value

    def _rotated(self, flat: Tensor, dim: Dim) -> Tensor:
        """`C U_old' U_new` of coordinates `(B, k, r)` along a side, in the cheaper order of products."""
        both = self.sides(dim)
        if both is None:
            return flat
        old, new = both
        if dim == self.cols and self.atoms is not None:
            index, kept = self.atoms
            return flat.gather(-1, index.unsqueeze(-2).expand(-1, flat.size(-2), -1)).mul_(kept.unsqueeze(-2))
        if isinstance(old, tuple) and isinstance(new, tuple):
            return by_modes(by_modes(flat, old, transpose=True), new, transpose=False)
        dense = isinstance(old, Tensor) and isinstance(new, Tensor) and not picks(old)
        if dense and flat.size(-2) < old.size(-2) == old.size(-1):  # few coordinates and a square basis: U_old' U_new costs more
            return linalg.mm(linalg.mm(flat, old.mT), new)
        return linalg.mm(flat, overlap(old, new, flat.dtype))


def shared_atoms(old: Basis, new: Basis) -> tuple[Tensor, Tensor] | None:
    """For every new atom `(B, r)` its index among the old atoms, and whether it is one of them; None if a basis has no atoms."""
    if old.atoms is None or new.atoms is None:
        return None
    same = old.atoms.unsqueeze(-1) == new.atoms.unsqueeze(-2)  # (B, r_old, r_new)
    return same.to(torch.uint8).argmax(-2), same.any(-2)


def overlap(old: Tensor, new: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`U_old' U_new` of two bases of one side, `(B, r_old, r_new)`; for picked coordinates 0 or 1 in `dtype`."""
    if picks(old):
        return (old.unsqueeze(-1) == new.unsqueeze(-2)).to(dtype)
    return linalg.mm(old.mT, new)
