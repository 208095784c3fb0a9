"""What becomes of state in coordinates when the basis changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import linalg
from .core import Basis, Dim, Order, Slot
from .projection import _by_modes, _picks


class Change(NamedTuple):
    """A refresh, as the inner rules see it: old and new basis, and the order in which kept coordinates now stand."""

    old: Basis
    new: Basis
    rows: Dim
    cols: Dim
    order: Order | None
    places: tuple[Tensor, Tensor] | None = None  # where each new atom stands among the old, and whether it does; where both have atoms

    def sides(self, dim: Dim) -> tuple[Any, Any] | None:
        """Old and new basis of the side whose coordinates run along `dim`; None where nothing changes along it."""
        for own, old, new in ((self.cols, self.old.right, self.new.right), (self.rows, self.old.left, self.new.left)):
            if dim == own and old is not None and new is not None:
                return old, new
        return None

    def rotation(self, dim: Dim) -> Tensor | None:
        """`U_old' U_new` `(B, r_old, r_new)` of a coordinate dimension; None where nothing changes along `dim`."""
        both = self.sides(dim)
        if both is None:
            return None
        if isinstance(both[0], tuple):
            raise ValueError(f"coordinates along '{dim.name}' are those of a Kronecker product; `carry` turns them factor by factor")
        return overlap(*both)

    def _turned(self, flat: Tensor, dim: Dim) -> Tensor:
        """`C U_old' U_new` of coordinates `(B, k, r)` along a side, by the cheaper association."""
        both = self.sides(dim)
        if both is None:
            return flat
        old, new = both
        if dim == self.cols and self.places is not None:
            place, kept = self.places
            there = flat.gather(-1, place.unsqueeze(-2).expand(-1, flat.size(-2), -1))
            return there.mul_(kept.unsqueeze(-2))
        if isinstance(old, tuple) and isinstance(new, tuple):
            return _by_modes(_by_modes(flat, old, transpose=True), new, transpose=False)
        dense = isinstance(old, Tensor) and isinstance(new, Tensor) and not _picks(old)
        if dense and flat.size(-2) < old.size(-2) == old.size(-1):  # few coordinates and a square basis: no need of U_old' U_new
            return linalg.mm(linalg.mm(flat, old.mT), new)
        return linalg.mm(flat, overlap(old, new).to(flat.dtype))

    def carry(self, value: Tensor, slot: Slot) -> Tensor:
        """One slot's value after the refresh, by its declared transport."""
        if slot.transport == "reset":
            return torch.zeros_like(value)
        if slot.transport == "keep":
            for axis, dim in enumerate(slot.dims, 1):
                order = None if self.order is None else self.order.get(dim.name)
                if order is not None:
                    shape = [value.size(0)] + [1] * (value.dim() - 1)
                    shape[axis] = dim.size
                    value = value.gather(axis, order.view(shape).expand_as(value))
            return value
        for axis, dim in enumerate(slot.dims, 1):
            if self.sides(dim) is not None:
                moved = value.movedim(axis, -1)  # (B, ..., r_old)
                turned = self._turned(moved.reshape(moved.size(0), -1, moved.size(-1)), dim)
                value = turned.reshape(*moved.shape[:-1], turned.size(-1)).movedim(-1, axis).contiguous()
        return value.abs() if slot.transport == "project_abs" else value


def places(old: Basis, new: Basis) -> tuple[Tensor, Tensor] | None:
    """Where each of the new atoms `(B, r)` stands among the old, and whether it does; None where a basis has none."""
    if old.atoms is None or new.atoms is None:
        return None
    same = old.atoms.unsqueeze(-1) == new.atoms.unsqueeze(-2)  # (B, r_old, r_new)
    return same.to(torch.uint8).argmax(-2), same.any(-2)


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """`U_old' U_new` of two bases of one side, `(B, r_old, r_new)`."""
    if _picks(old):
        return (old.unsqueeze(-1) == new.unsqueeze(-2)).to(torch.get_default_dtype())
    return linalg.mm(old.mT, new)
