"""The words of the algebra: dimensions, slots, bases, steps, and the two families, `Rule` and `Selector`.

Everything works on stacks of matrices `(B, rows, cols)` that never mix: row `b` of a result depends on row `b` of the inputs alone.
Selectors and rules see a right-hand (column) basis only; a pipeline that works on the row side is handed transposed matrices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PlainValidator, PositiveInt
from pydantic_core import PydanticCustomError
from torch import Tensor

from . import linalg
from .registry import Component

State = dict[str, Tensor]
Order = dict[str, Tensor]  # name of a coordinate dimension -> permutation (B, size) of its coordinates
Transport = Literal["keep", "reset", "project", "project_abs"]
Constants = dict[str, Tensor]


class Dim(NamedTuple):
    """A named side of a slot. `eigen`: coordinates along it are those of an eigenbasis of the gradient's covariance."""

    name: str
    size: int
    eigen: bool = False


class Slot(NamedTuple):
    """One tensor of state per matrix, `(B, *dims)`, declared once and used for allocation, plan, checkpoint and transport."""

    dims: tuple[Dim, ...]
    transport: Transport = "keep"
    dtype: torch.dtype | None = None  # None: the dtype in which the matrix is computed

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)


class Basis(NamedTuple):
    """Orthonormal columns on each side, `(B, side, r)`, or picked coordinates, int64 `(B, r)`; None is the identity."""

    left: Tensor | None = None
    right: Tensor | None = None


class Coords(NamedTuple):
    """What happened inside the subspace: signal, gradient and update in coordinates, `(B, k, r)` each."""

    signal: Tensor
    grad: Tensor
    update: Tensor


class Step(NamedTuple):
    """What a rule or selector may know of the moment."""

    t: Tensor  # 0-d float64, 1-based count of applied updates
    age: Tensor  # 0-d float64, 1-based count of updates since the last refresh
    first: bool = False
    refresh: bool = False
    noise: Tensor | None = None  # standard normal, the shape that the selector's `draws` asks for
    inside: Coords | None = None  # for complement rules
    whole: Tensor | None = None  # for complement rules: the unsplit signal
    constants: Constants = {}  # the selector's shared tables


# ------------------------------------------------------------------------------------------------------- project and lift


def _picks(u: Tensor) -> bool:
    return u.dtype == torch.int64


def _project_right(x: Tensor, u: Tensor) -> Tensor:
    if _picks(u):
        return x.gather(-1, u.unsqueeze(-2).expand(-1, x.size(-2), -1))
    return linalg.mm(x, u)


def _lift_right(c: Tensor, u: Tensor, size: int) -> Tensor:
    if _picks(u):
        index = u.unsqueeze(-2).expand(-1, c.size(-2), -1)
        return c.new_zeros(*c.shape[:-1], size).scatter(-1, index, c)
    return linalg.mm(c, u.mT)


def project(x: Tensor, basis: Basis) -> Tensor:
    """Coordinates `P' X U` of a stack `(B, m, n)` in a basis."""
    if basis.right is not None:
        x = _project_right(x, basis.right)
    if basis.left is not None:
        x = _project_right(x.mT, basis.left).mT
    return x


def lift(c: Tensor, basis: Basis, rows: int, cols: int) -> Tensor:
    """`P C U'`, the matrices `(B, rows, cols)` with coordinates `c`."""
    if basis.left is not None:
        c = _lift_right(c.mT, basis.left, rows).mT
    if basis.right is not None:
        c = _lift_right(c, basis.right, cols)
    return c


def add_lift(y: Tensor, c: Tensor, basis: Basis, weight: float = 1.0) -> Tensor:
    """`Y + weight P C U'` in one product where the basis is dense and one-sided."""
    if basis.left is None and basis.right is not None and not _picks(basis.right):
        return linalg.addmm(y, c, basis.right.mT, alpha=weight)
    return y + weight * lift(c, basis, y.size(-2), y.size(-1))


# --------------------------------------------------------------------------------------------------------------- transport


class Change(NamedTuple):
    """A refresh, as the inner rules see it: old and new basis, and the order in which kept coordinates now stand."""

    old: Basis
    new: Basis
    rows: Dim
    cols: Dim
    order: Order | None

    def rotation(self, dim: Dim) -> Tensor | None:
        """`U_old' U_new` `(B, r_old, r_new)` of a coordinate dimension; None where nothing changes along `dim`."""
        if dim == self.cols and self.old.right is not None and self.new.right is not None:
            return overlap(self.old.right, self.new.right)
        if dim == self.rows and self.old.left is not None and self.new.left is not None:
            return overlap(self.old.left, self.new.left)
        return None

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
            c = self.rotation(dim)
            if c is not None:
                moved = value.movedim(axis, -1)  # (B, ..., r_old)
                flat = moved.reshape(moved.size(0), -1, moved.size(-1))
                value = linalg.mm(flat, c.to(value.dtype)).reshape(*moved.shape[:-1], c.size(-1)).movedim(-1, axis)
        return value.abs() if slot.transport == "project_abs" else value


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """`U_old' U_new` of two bases of one side, `(B, r_old, r_new)`."""
    if _picks(old):
        return (old.unsqueeze(-1) == new.unsqueeze(-2)).to(torch.get_default_dtype())
    return linalg.mm(old.mT, new)


# ---------------------------------------------------------------------------------------------------------------- families


class Rule(Component, family="rule"):
    """A stateful map on a stack of matrices that also sees the gradient in the same coordinates: `(x, g, s) -> (x', s')`."""

    scale_free: ClassVar[bool] = False  # the size of the output does not depend on the size of the input
    uses_grad: ClassVar[bool] = True  # `apply` reads `grad`
    silent: ClassVar[bool] = False  # the update is zero: the place need not be computed

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state kept for one matrix of `rows` x `cols`."""
        return {}

    @abstractmethod
    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        """The new signal and the new state; pure: inputs are not written to."""

    def transport(self, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        """The state after a refresh; by default slot by slot as declared."""
        return {name: change.carry(value, slots[name]) for name, value in state.items()}


def _check_rank(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (0 < value < 1 or value == int(value) >= 1):
        raise PydanticCustomError("rank", "should be a number of columns, 1 or more, or a part of the short side between 0 and 1")
    return value if value < 1 else int(value)


Rank = Annotated[
    float, PlainValidator(_check_rank, json_schema_input_type=PositiveInt | Annotated[float, Field(gt=0, lt=1)])
]


class Selector(Component, family="selector"):
    """Opens a subspace: a basis, kept in state, refreshed by its own schedule."""

    every: PositiveInt = Field(1, description="Updates between refreshes.")
    offset: NonNegativeInt = Field(
        0, description="Refresh on update t when t = 1 or t - 1 + offset is a multiple of `every`."
    )
    timing: Literal["before", "after"] = Field(
        "before",
        description="Refresh before the update is made, or after it; with `after`, the first gradient only primes the basis.",
    )
    source: Literal["gradient", "momentum", "weight"] = Field(
        "gradient", description="The matrix from which the basis is taken."
    )

    def refreshes(self, t: int) -> bool:
        """Whether update `t` (1-based) refreshes the basis."""
        return t == 1 or (t - 1 + self.offset) % self.every == 0

    def age(self, t: int) -> int:
        """Updates since the last refresh before or at update `t`, that update counted."""
        since = (t - 1 + self.offset) % self.every
        return min(since, t - 1) + 1

    @abstractmethod
    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        """The dimensions of the coordinates; a side without a basis keeps its own dimension."""

    @abstractmethod
    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state kept for one matrix of `rows` x `cols`."""

    @abstractmethod
    def basis(self, state: State, constants: Constants) -> Basis:
        """The basis in force."""

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        """Every update: what the source `x` and its coordinates `c` in the basis in force tell about the next refresh."""
        return state

    @abstractmethod
    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        """A new basis from the source `x` `(B, rows, cols)`, and where kept coordinates now stand; pure."""

    def constants(self, rows: Dim, cols: Dim) -> dict[str, Callable[[], Tensor]]:
        """Tables shared by all matrices of a shape, built once and never checkpointed."""
        return {}

    def draws(self, rows: Dim, cols: Dim) -> tuple[int, ...] | None:
        """The shape of the normal draws that a refresh needs for one matrix; None if none."""
        return None


class LowRank(Selector):
    """A selector with a column basis of a given rank."""

    rank: Rank = Field(
        128,
        description="Number of columns of the basis, clamped to the short side; a number below 1 is that part of the short side.",
    )

    def columns(self, rows: Dim, cols: Dim) -> int:
        """The rank for one shape: clamped to the short side, at least 1."""
        short = min(rows.size, cols.size)
        return max(1, min(short, int(self.rank) if self.rank >= 1 else math.floor(self.rank * short + 0.5)))

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, Dim("rank", self.columns(rows, cols))

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"basis": Slot((cols, self.coords(rows, cols)[1]))}

    def basis(self, state: State, constants: Constants) -> Basis:
        return Basis(right=state["basis"])
