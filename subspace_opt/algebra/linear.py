"""`Linear`: a matrix as an expression, computed when its entries are read. All fast paths of an update follow from three identities.

    a L(C, U) + b L(D, U) = L(a C + b D, U)        lifts from one basis are one lift
    a (b E) = (a b) E                              numbers are deferred to the update of the weight
    W - lr (D + L(C, U)) = addmm(W - lr D, C, U')  a lift is multiplied straight into the matrix it is added to

`L(C, U)` is the lift `P C U'` of coordinates. An expression is `number * factor * (weight * dense + sum of weighted lifts)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import linalg
from .core import Basis
from .projection import add_lift, lift, transposed


class Lift(NamedTuple):
    """`weight * P C U'`, kept as its coordinates `(B, k, r)` and its basis."""

    coords: Tensor
    basis: Basis
    weight: float = 1.0


class Sum:
    """`weight * dense + sum of lifts`, matrices `(B, rows, cols)`. Its value is computed once.

    `writable`: no other tensor shares the storage of `dense`, so the value may be written over it.
    """

    __slots__ = ("_value", "cols", "dense", "lifts", "rows", "weight", "writable")

    def __init__(
        self, rows: int, cols: int, dense: Tensor | None, weight: float, lifts: tuple[Lift, ...], *, writable: bool = False
    ) -> None:
        self.rows, self.cols, self.dense, self.weight, self.lifts, self.writable = rows, cols, dense, weight, lifts, writable
        self._value: Tensor | None = None

    @property
    def mT(self) -> Sum:  # noqa: N802 -- torch's name
        if self._value is not None:
            return Sum(self.cols, self.rows, self._value.mT, 1.0, (), writable=self.writable)
        lifts = tuple(Lift(c.mT, transposed(basis), weight) for c, basis, weight in self.lifts)
        return Sum(self.cols, self.rows, None if self.dense is None else self.dense.mT, self.weight, lifts, writable=self.writable)

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._computed()
            self.dense, self.weight, self.lifts = self._value, 1.0, ()
        return self._value

    def _computed(self) -> Tensor:
        out, own, writable = self.dense, self.weight, self.writable
        for coords, basis, weight in self.lifts:
            if out is None:
                out = lift(coords if weight == 1.0 else coords * weight, basis, self.rows, self.cols)
            else:
                out = add_lift(out, coords, basis, weight, own=own, in_place=writable)
            own, writable = 1.0, basis.left is not None or basis.right is not None
        assert out is not None
        self.writable = writable
        if own == 1.0:
            return out
        return out.mul_(own) if writable else out * own

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of which the sum is made."""
        if self.dense is not None:
            yield self.dense
        for coords, basis, _ in self.lifts:
            yield coords
            for side in (basis.left, basis.right):
                if isinstance(side, Tensor):
                    yield side
                elif side is not None:
                    yield from (factor for factor in side if isinstance(factor, Tensor))


class Linear:
    """An expression for matrices `(B, rows, cols)`; immutable."""

    __slots__ = ("factor", "number", "sum")

    def __init__(self, terms: Sum, factor: float = 1.0, number: Tensor | None = None) -> None:
        self.sum, self.factor, self.number = terms, factor, number

    @staticmethod
    def of(x: Tensor) -> Linear:
        """The expression of one dense matrix."""
        return Linear(Sum(x.size(-2), x.size(-1), x, 1.0, ()))

    @staticmethod
    def lifted(coords: Tensor, basis: Basis, rows: int, cols: int) -> Linear:
        """`P C U'`."""
        return Linear(Sum(rows, cols, None, 1.0, (Lift(coords, basis),)))

    def unless_shared(self, *others: Tensor) -> Linear:
        """The same expression, whose value may be written over its dense matrix unless that shares its storage with one of `others`."""
        s = self.sum
        if s.dense is None or any(same_storage(s.dense, other) for other in others):
            return self
        return Linear(Sum(s.rows, s.cols, s.dense, s.weight, s.lifts, writable=True), self.factor, self.number)

    @property
    def shape(self) -> tuple[int, int, int]:
        s = self.sum
        return (s.lifts[0].coords if s.dense is None else s.dense).size(0), s.rows, s.cols

    def size(self, dim: int) -> int:
        return self.sum.cols if dim == -1 else self.sum.rows if dim == -2 else self.shape[dim]

    @property
    def mT(self) -> Linear:  # noqa: N802 -- torch's name
        return Linear(self.sum.mT, self.factor, self.number)

    def __mul__(self, number: float | Tensor) -> Linear:
        """Times a float, or times one number for each matrix, `(B, 1, 1)`."""
        if isinstance(number, Tensor):
            return Linear(self.sum, self.factor, number if self.number is None else self.number * number)
        return Linear(self.sum, self.factor * number, self.number)

    __rmul__ = __mul__

    def __neg__(self) -> Linear:
        return self * -1.0

    def __add__(self, other: Linear | Tensor) -> Linear:
        a, b = self._spread(), (Linear.of(other) if isinstance(other, Tensor) else other)._spread()
        lifts = list(a.lifts)
        for new in b.lifts:
            same = next((i for i, old in enumerate(lifts) if old.basis is new.basis), None)
            if same is None:
                lifts.append(new)
            else:
                lifts[same] = _merged(lifts[same], new)
        dense, weight, writable = _added(a, b)
        return Linear(Sum(a.rows, a.cols, dense, weight, tuple(lifts), writable=writable))

    def __sub__(self, other: Linear | Tensor) -> Linear:
        return self + (Linear.of(other) if isinstance(other, Tensor) else other) * -1.0

    def _spread(self) -> Sum:
        """The sum with the factor multiplied into the weights of its terms, and the number into its entries."""
        if self.number is not None:
            x = self.dense()
            return Sum(x.size(-2), x.size(-1), x, 1.0, (), writable=True)
        s, f = self.sum, self.factor
        if f == 1.0:
            return s
        lifts = tuple(part._replace(weight=part.weight * f) for part in s.lifts)
        return Sum(s.rows, s.cols, s.dense, s.weight * f, lifts, writable=s.writable)

    def dense(self) -> Tensor:
        """The entries `(B, rows, cols)`."""
        out = self.sum.value()
        if self.factor != 1.0:
            out = out * self.factor
        return out if self.number is None else out * self.number

    def norm(self) -> Tensor:
        """Frobenius norm of every matrix, `(B, 1, 1)`; deferred numbers cost no pass over the entries."""
        size = linalg.norm(self.sum.value()) * abs(self.factor)
        return size if self.number is None else size * self.number.abs()

    def is_finite(self, known: Tensor) -> bool:
        """True if every tensor of the expression is finite. Waits for the device.

        It skips a dense matrix with the storage of `known`, which is finite. On a CPU it skips bases, which are searched when they are
        made.
        """
        return all(linalg.all_finite(x) for x in self.unknown(known, skip_bases=known.device.type == "cpu"))

    def unknown(self, known: Tensor, *, skip_bases: bool = False) -> list[Tensor]:
        """The tensors of the expression without a dense matrix that has the storage of `known`, and without bases if `skip_bases`."""
        s, numbers = self.sum, [] if self.number is None else [self.number]
        dense = [] if s.dense is None or same_storage(s.dense, known) else [s.dense]
        coords = [part.coords for part in s.lifts]
        bases = [] if skip_bases else [x for x in s.tensors() if x is not s.dense and not any(x is c for c in coords)]
        return [*dense, *coords, *bases, *numbers]


S = TypeVar("S", Tensor, Linear)  # the signal of a lazy rule


def norm(x: Tensor | Linear) -> Tensor:
    """Frobenius norm of every matrix of a tensor or an expression, `(B, 1, 1)`."""
    return x.norm() if isinstance(x, Linear) else linalg.norm(x)


def same_storage(a: Tensor, b: Tensor) -> bool:
    """True if a write to one tensor may show in the other."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _merged(a: Lift, b: Lift) -> Lift:
    """The sum of two lifts from one basis."""
    first = a.coords if a.weight == 1.0 else a.coords * a.weight
    return Lift(torch.add(first, b.coords, alpha=b.weight), a.basis)


def _added(a: Sum, b: Sum) -> tuple[Tensor | None, float, bool]:
    """The dense part of a sum of two sums, its weight, and whether it may be overwritten."""
    if a.dense is None or b.dense is None:
        one = b if a.dense is None else a
        return one.dense, one.weight, one.writable
    if a.dense is b.dense:
        return a.dense, a.weight + b.weight, False
    first = a.dense if a.weight == 1.0 else a.dense * a.weight
    return torch.add(first, b.dense, alpha=b.weight), 1.0, True
