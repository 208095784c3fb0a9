"""The words of the algebra: dimensions, slots, bases, steps, and the two families, `Rule` and `Selector`.

Everything works on stacks of matrices `(B, rows, cols)` that never mix: row `b` of a result depends on row `b` of the inputs alone.
Selectors and rules see a right-hand (column) basis only; a pipeline that works on the row side is handed transposed matrices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PlainValidator, PositiveInt
from pydantic_core import PydanticCustomError
from torch import Tensor

from ..registry import Component

if TYPE_CHECKING:
    from .transport import Change

State = dict[str, Tensor]
Order = dict[str, Tensor]  # name of a coordinate dimension -> permutation (B, size) of its coordinates
Transport = Literal["keep", "reset", "project", "project_abs"]
Holds = Literal["signed", "unsigned", "basis"]
Constants = dict[str, Tensor]


class Dim(NamedTuple):
    """A named side of a slot.

    `eigen`: coordinates along it are those of an eigenbasis of the gradient's covariance. `modes`: the sizes of the dimensions that were
    joined in it, where that matters (a convolution's (in, kh, kw)).
    """

    name: str
    size: int
    eigen: bool = False
    modes: tuple[int, ...] = ()


class Slot(NamedTuple):
    """One tensor of state per matrix, `(B, *dims)`, declared once and used for allocation, plan, checkpoint and transport.

    `holds`: what a spec's `state_dtype` may make of it: numbers, numbers that are never negative, or a basis, which stays as it is.
    """

    dims: tuple[Dim, ...]
    transport: Transport = "keep"
    dtype: torch.dtype | None = None  # None: the dtype in which the matrix is computed
    holds: Holds = "signed"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)


# One side of a basis: columns `(B, side, r)`; picked coordinates, int64 `(B, r)`; a Kronecker product of square factors, one for each
# mode of the side, an int standing for the identity of that size; None is the identity.
Side = Tensor | tuple[Tensor | int, ...] | None


class Basis(NamedTuple):
    """Orthonormal columns on each side. `gate` `(B,)`, if given, is 0 for matrices whose subspace is {0} for now.

    `atoms` int64 `(B, r)`, if given, says which columns of one orthonormal table the right basis has: then what is kept in coordinates is
    moved and not multiplied.
    """

    left: Side = None
    right: Side = None
    gate: Tensor | None = None
    atoms: Tensor | None = None

    @property
    def alone(self) -> Tensor | None:
        """The right basis, dense or indices, where it is all there is."""
        return self.right if self.left is None and self.gate is None and isinstance(self.right, Tensor) else None


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
    in_place: bool = False  # rules may write their new state over the old, which nothing will ask for again
    spare: bool = False  # the signal is nobody else's: a rule may write its own over it
    decay: float = 0.0  # weight decay, where it is coupled to the gradient
    rows: Dim = Dim("rows", 0)  # the sides of the matrices, as oriented
    cols: Dim = Dim("cols", 0)
    position: Tensor | None = None  # int64 (B, 2): place of each matrix's parameter among those of its pipeline, and their number
    noise: Tensor | None = None  # standard normal, the shape that the selector's `draws` asks for
    inside: Coords | None = None  # for complement rules
    whole: Tensor | None = None  # for complement rules: the unsplit signal
    basis: Basis | None = None  # for complement rules: the basis in force
    inner: State = {}  # noqa: RUF012 -- never written to; for selectors: the inner rules' state, in coordinates of the old basis
    constants: Constants = {}  # noqa: RUF012 -- the selector's shared tables


def averaged(m: Tensor, x: Tensor, beta: float, step: Step) -> Tensor:
    """`beta M + (1 - beta) X`, in the place of M where the step allows it."""
    return m.lerp_(x, 1 - beta) if step.in_place else m.lerp(x, 1 - beta)


def averaged_square(v: Tensor, x: Tensor, beta: float, step: Step) -> Tensor:
    """`beta V + (1 - beta) X.X`, in the place of V where the step allows it."""
    return (v.mul_(beta) if step.in_place else v * beta).addcmul_(x, x, value=1 - beta)


class Rule(Component, family="rule"):
    """A stateful map on a stack of matrices that also sees the gradient in the same coordinates: `(x, g, s) -> (x', s')`."""

    scale_free: ClassVar[bool] = False  # the size of the output does not depend on the size of the input
    uses_grad: ClassVar[bool] = True  # `apply` reads `grad`
    silent: ClassVar[bool] = False  # the update is zero: the place need not be computed
    takes_whole: ClassVar[bool] = False  # as a complement, starts from the unsplit signal
    passes: ClassVar[bool] = False  # `apply` returns x as it is
    elementwise: ClassVar[bool] = False  # an entry depends on the same entry of signal, gradient and state alone, all of one shape

    def decomposes(self, rows: Dim, cols: Dim) -> bool:
        """Whether `apply` takes a decomposition, which may fail: its update is then looked at for NaN before anything is written."""
        return False

    def by_rows(self, rows: Dim, cols: Dim) -> bool:
        """Whether a row of the result, and of the state, hangs on the same row of signal, gradient and state alone."""
        return self.elementwise

    def multiplier(self, rows: int, cols: int, step: Step) -> float | None:
        """The number that `apply` multiplies the signal by, if that is all it does: the update of the weight then takes it along."""
        return None

    def measured(self, x: Tensor) -> Tensor | None:
        """The numbers `(B, 1, 1)` that `apply` multiplies these matrices by, if that is all it does, without doing it."""
        return None

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state kept for one matrix of `rows` x `cols`."""
        return {}

    def flops(self, rows: Dim, cols: Dim) -> float:
        """Floating-point operations of one update of one matrix, those of products and decompositions; 0 for what is entry by entry."""
        return 0.0

    @property
    def has_kernel(self) -> bool:
        """Whether `update_in_place` is there: `apply`, decay and update of a weight in one pass over memory."""
        return False

    def update_in_place(
        self, weights: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], t: int, lr: float | Tensor, decay: float
    ) -> None:
        """`W <- W (1 - lr decay) - lr apply(G)` for many weights of any shape, and their state, in place, at update `t` (1-based)."""
        raise NotImplementedError(f"'{type(self).__name__}' has no kernel")

    @abstractmethod
    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        """The new signal and the new state.

        Pure: inputs are not written to, but for `state` and `x` where `step.in_place`
        and `step.spare` allow it.
        """

    def transport(self, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        """The state after a refresh; by default slot by slot as declared."""
        return {name: change.carry(value, slots[name]) for name, value in state.items()}

    def untransmitted(self, before: State, after: State) -> tuple[Tensor, Tensor, float] | None:
        """With error feedback: coordinates in the old and in the new basis of a moment that a refresh cut, and the weight at which what it
        lost is fed back; None if nothing is."""
        return None


def _check_rank(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (0 < value < 1 or value == int(value) >= 1):
        raise PydanticCustomError("rank", "should be a number of columns, 1 or more, or a part of the short side between 0 and 1")
    return value if value < 1 else int(value)


Rank = Annotated[float, PlainValidator(_check_rank, json_schema_input_type=PositiveInt | Annotated[float, Field(gt=0, lt=1)])]


class Selector(Component, family="selector"):
    """Opens a subspace: a basis, kept in state, refreshed by its own schedule."""

    every: PositiveInt | None = Field(
        1, description="Updates between refreshes; null for none but the first and those asked for by `refresh_bases()`."
    )
    offset: NonNegativeInt | Literal["spread"] = Field(
        0,
        description="Refresh on update t when t = 1 or t - 1 + offset is a multiple of `every`; with `spread` the offset is drawn "
        "by the parameter's name, so that no step refreshes all.",
    )
    timing: Literal["before", "after"] = Field(
        "before", description="Refresh before the update is made, or after it (the first basis is always there before)."
    )
    source: Literal["gradient", "momentum", "weight"] = Field("gradient", description="The matrix from which the basis is taken.")
    decomposes: ClassVar[bool] = True  # a refresh takes a decomposition, which may fail; else it cannot fail

    def refreshes(self, t: int, turn: float = 0.0) -> bool:
        """Whether update `t` (1-based) refreshes the basis by schedule. `turn` in [0, 1): where in a period, with offset `spread`."""
        if t == 1 and not self.primes:
            return True
        return self.every is not None and t >= 1 and (t - 1 + self._offset(turn)) % self.every == 0

    def age(self, t: int, turn: float = 0.0) -> int:
        """Updates since the last refresh before or at update `t`, that update counted."""
        if self.every is None:
            return t
        return min((t - 1 + self._offset(turn)) % self.every, t - 1) + 1

    def _offset(self, turn: float) -> int:
        return int(turn * (self.every or 0)) if self.offset == "spread" else self.offset

    @property
    def primes(self) -> bool:
        """Whether the first gradient only sets the basis and makes no update; such a step is not counted."""
        return False

    @property
    def orthonormal(self) -> bool:
        """Whether the basis has orthonormal columns, so that what is left of a signal is orthogonal to the subspace."""
        return True

    @property
    def keeps_basis(self) -> bool:
        """Whether the basis of the update before is still there at a refresh, so that moments can be carried over by projection."""
        return True

    @property
    def gated(self) -> bool:
        """Whether the subspace may be {0} for some matrices, so that even a full basis has a complement."""
        return False

    def refresh_flops(self, rows: Dim, cols: Dim) -> float:
        """Floating-point operations of one refresh for one matrix."""
        return 0.0

    def observe_flops(self, rows: Dim, cols: Dim) -> float:
        """Floating-point operations of one `observe`."""
        return 0.0

    def project_flops(self, rows: Dim, cols: Dim) -> float:
        """Floating-point operations to project, or to lift, one matrix: by default a dense product for each side that has a basis."""
        k, r = self.coords(rows, cols)
        right = 2.0 * rows.size * cols.size * r.size if r != cols else 0.0
        left = 2.0 * rows.size * k.size * r.size if k != rows else 0.0
        return right + left

    @abstractmethod
    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        """The dimensions of the coordinates; a side without a basis keeps its own dimension."""

    @abstractmethod
    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state kept for one matrix of `rows` x `cols`."""

    @abstractmethod
    def basis(self, state: State, step: Step) -> Basis:
        """The basis in force."""

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        """Every update: what the source `x` and its coordinates `c` in the basis in force tell about the next refresh."""
        return state

    @abstractmethod
    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        """A new basis from the source `x` `(B, rows, cols)`, and where kept coordinates now stand; pure.

        Who has the coordinates of the source in the new basis may hand them on as `coords`, which is not kept: they are not computed again.
        """

    def constants(self, rows: Dim, cols: Dim) -> dict[str, Callable[[], Tensor]]:
        """Tables shared by all matrices of a shape, built once and never checkpointed."""
        return {}

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        """The shape of the normal draws that the refresh at update `t` needs for one matrix, `first` its first; None if none."""
        return None


class LowRank(Selector):
    """A selector with a column basis of a given rank."""

    rank: Rank = Field(
        128,
        description="Number of columns of the basis, clamped to the most there can be; a number below 1 is that part of the most.",
    )

    def limit(self, rows: Dim, cols: Dim) -> int:
        """The most columns that make sense: the rank of a gradient, which is where its singular vectors end."""
        return min(rows.size, cols.size)

    def columns(self, rows: Dim, cols: Dim) -> int:
        """The rank for one shape, clamped."""
        most = self.limit(rows, cols)
        return max(1, min(most, int(self.rank) if self.rank >= 1 else math.floor(self.rank * most + 0.5)))

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, Dim("rank", self.columns(rows, cols))

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"basis": Slot((cols, self.coords(rows, cols)[1]))}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["basis"])
