"""The interface for plugin authors: dimensions, slots, bases, steps, and the two families `Rule` and `Selector`.

Everything works on stacks of matrices `(B, rows, cols)`. The matrices of a stack are independent: row `b` of a result depends on row `b`
of the inputs alone. Rules and selectors see a right-hand (column) basis only; a pipeline with `orient: left` gives them transposes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, dtype

from ..registry import Component, refuse_former
from ..schedules import Scheduled, last_refresh

if TYPE_CHECKING:
    from .transport import Change

State = dict[str, Tensor]
Order = dict[str, Tensor]  # name of a coordinate dimension -> permutation (B, size) of its coordinates
Transport = Literal["keep", "reset", "project", "project_abs"]
Holds = Literal["signed", "unsigned", "basis"]
Constants = dict[str, Tensor]


class Dim(NamedTuple):
    """A named side of a slot.

    `eigen`: coordinates along this side are those of an eigenbasis of the gradient's covariance. `modes`: the sizes of the dimensions that
    a view joined into this side, such as (in, kh, kw) of a convolution; empty if it joined none.
    """

    name: str
    size: int
    eigen: bool = False
    modes: tuple[int, ...] = ()


class Slot(NamedTuple):
    """One tensor of state per matrix, `(B, *dims)`. The declaration serves allocation, plan, checkpoint, sharding and transport.

    `holds`: signed numbers, numbers that are never negative, or a basis. `state_dtype` of a spec never changes how a basis is stored.
    """

    dims: tuple[Dim, ...]
    transport: Transport = "keep"
    dtype: dtype | None = None  # None: the dtype in which the matrix is computed
    holds: Holds = "signed"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)


# One side of a basis: columns `(B, side, r)`; picked coordinates, int64 `(B, r)`; a Kronecker product of square factors, one for each
# mode of the side, where an int stands for the identity of that size; None is the identity.
Side = Tensor | tuple[Tensor | int, ...] | None


class Basis(NamedTuple):
    """Orthonormal columns on each side.

    `gate` `(B,)`: 0 for matrices whose subspace is {0} at present, else 1. `atoms` int64 `(B, r)`: the columns that the right basis has of
    one orthonormal table; with it, a refresh permutes coordinates instead of multiplying them.
    """

    left: Side = None
    right: Side = None
    gate: Tensor | None = None
    atoms: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """A table that is made from standard normal draws. They depend on the optimizer's seed and the table's name alone.

    `make` turns draws of `shape`, float64 on the CPU, into a table of the same shape. A call without an optimizer takes fixed draws.
    """

    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]

    def __call__(self, generator: torch.Generator | None = None) -> Tensor:
        fixed = torch.Generator().manual_seed(0) if generator is None else generator
        return self.make(torch.randn(self.shape, generator=fixed, dtype=torch.float64, device="cpu"))


class Coords(NamedTuple):
    """Signal, gradient and update inside the subspace, in coordinates, `(B, k, r)` each."""

    signal: Tensor
    grad: Tensor
    update: Tensor


class Step(NamedTuple):
    """The context of an update that rules and selectors may use."""

    t: Tensor  # 0-d float64, 1-based count of applied updates
    age: Tensor  # 0-d float64, 1-based count of updates since the last refresh
    first: bool = False
    refresh: bool = False
    in_place: bool = False  # a rule may write its new state over the old
    spare: bool = False  # no other tensor shares the signal's storage: a rule may write its result over it
    on_device: bool = False  # t and age are on the device: reading them would wait, and a captured step could not do it
    decay: float | Tensor = 0.0  # weight decay; a 0-d tensor in a compiled update
    lr: float | Tensor = 1.0  # learning rate, if a selector or a rule in `apply` reads it; a tensor is 0-d or (B, 1, 1)
    rows: Dim = Dim("rows", 0)  # the sides of the matrices in the working orientation
    cols: Dim = Dim("cols", 0)
    turned: bool = False  # the working orientation is the transpose of the weight's own
    position: Tensor | None = None  # int64 (B, 2): index of each matrix's parameter within its pipeline, and the number of these
    noise: Tensor | None = None  # standard normal draws of the shape that the selector's `draws` asks for
    inside: Coords | None = None  # for complement rules
    whole: Tensor | None = None  # for complement rules: the signal before the split
    basis: Basis | None = None  # for complement rules: the basis in force
    inner: State = {}  # noqa: RUF012 -- never written to; for selectors: the inner rules' state, in coordinates of the old basis
    constants: Constants = {}  # noqa: RUF012 -- the selector's shared tables


# ------------------------------------------------------------------------------------------------------------------- rules


class RuleTraits(NamedTuple):
    """The declarations of a rule about its `apply`: three that change the result, then those for speed. Every default is safe."""

    scale_free: bool = False  # the size of the output does not depend on the size of the input
    takes_whole: bool = False  # as the first rule of a complement, it starts from `step.whole`, not from the residual
    decomposes: bool = False  # `apply` takes a decomposition, which may fail: NaN in its result is then an error
    reads_grad: bool = True  # `apply` reads `grad`
    elementwise: bool = False  # an entry depends on the same entry of signal, gradient and state, which have one shape
    by_rows: bool = False  # a row of the result and of the state depends on the same row of signal, gradient and state
    lazy: bool = False  # `apply` only adds and multiplies by numbers, so it takes and returns a `Linear` expression as well as a tensor
    measures: bool = False  # a lazy rule whose numbers depend on the entries of its signal
    silent: bool = False  # the update is 0, and the place is not computed
    waits: bool = False  # `apply` reads numbers, or takes an SVD or eigh, so a CUDA graph cannot hold it
    host_clock: bool = False  # `apply` reads `step.t` or `step.age` as a Python number: torch.compile would compile every update anew


# Class attributes of earlier versions, and the trait that replaces each.
_FORMER = {
    "scale_free": "scale_free",
    "uses_grad": "reads_grad",
    "silent": "silent",
    "takes_whole": "takes_whole",
    "passes": "lazy",
    "elementwise": "elementwise",
    "decomposes": "decomposes",
    "by_rows": "by_rows",
    "multiplier": "lazy",
    "measured": "lazy",
    "has_kernel": "kernel",
}


class Rule(Scheduled, Component, family="rule"):
    """A stateful map on a stack of matrices that also sees the gradient in the same coordinates: `(x, g, s) -> (x', s')`.

    A rule is written with `slots` and `apply`. Everything else has a safe default.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        declared = "declare it in `traits`: def traits(self, rows, cols): return RuleTraits({}=...)"
        refuse_former(cls, _FORMER, "an attribute of a rule", declared)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state of one matrix of `rows` x `cols`."""
        return {}

    @abstractmethod
    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        """Return the new signal `(B, rows, cols)` and the new state.

        Pure: it writes to no input, except over `state` if `step.in_place` and over `x` if `step.spare`.
        """

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        """The traits of `apply` for matrices of `rows` x `cols`."""
        return RuleTraits()

    def flops(self, rows: Dim, cols: Dim) -> float:
        """Floating-point operations of one update of one matrix: products and decompositions, without elementwise work."""
        return 0.0

    def transport(self, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        """Return the state after a refresh; by default slot by slot, as declared."""
        return {name: change.carry(value, slots[name]) for name, value in state.items()}

    def untransmitted(self, before: State, after: State) -> tuple[Tensor, Tensor, float] | None:
        """With error feedback: a moment that the refresh projected, whose loss is fed back.

        Returns:
            The moment in coordinates of the old and of the new basis, and the weight of the loss; None if nothing is fed back.
        """
        return None

    def kernel(self) -> Kernel | None:
        """A kernel that makes `apply`, the decay and the update of weights in one pass over memory; None if there is none."""
        return None


# `W <- W (1 - lr decay) - lr apply(G)` in place, for many weights of any shape and their state. Arguments: (weights, gradients, state by
# slot, t, lr, decay), t the 1-based number of the update. With a keyword `blocked`, 1.0 on the device, the kernel changes nothing.
Kernel = Callable[..., None]


# --------------------------------------------------------------------------------------------------------------- selectors


class SelectorTraits(NamedTuple):
    """The declarations of a selector. The defaults fit a selector that keeps an orthonormal basis in its state."""

    decomposes: bool = True  # a refresh takes a decomposition, which may fail; False: it cannot fail
    orthonormal: bool = True  # the basis has orthonormal columns, so the residual is orthogonal to the subspace
    keeps_basis: bool = True  # the basis of the previous update is still known at a refresh, so moments can be projected
    gated: bool = False  # the subspace may be {0} for some matrices, so even a full basis has a complement
    primes: bool = False  # the first gradient only sets the basis: it makes no update and is not counted
    reads_lr: bool = False  # a refresh reads `step.lr`, the learning rate of the weights
    waits: bool = False  # a refresh reads numbers, draws, or takes an SVD or eigh, so a CUDA graph cannot hold it
    host_clock: bool = False  # `observe` or `refresh` reads `step.t` or `step.age` as a Python number, as in `RuleTraits`


class SelectorFlops(NamedTuple):
    """Floating-point operations for one matrix."""

    refresh: float = 0.0
    observe: float = 0.0
    project: float | None = None  # to project or to lift; None: a dense product for each side that has a basis


class Refreshed(NamedTuple):
    """The result of a refresh. `refresh` may also return a pair `(state, order)`."""

    state: State
    order: Order | None = None  # the places of kept coordinates in the new basis; None: unchanged
    coords: Tensor | None = None  # the coordinates of the source in the new basis, if the refresh has computed them


class Selector(Scheduled, Component, family="selector"):
    """Opens a subspace: a basis, kept in state, refreshed by its own schedule.

    A selector is written with `coords`, `slots`, `basis` and `refresh`. Everything else has a safe default.
    """

    every: PositiveInt | None = Field(
        1, description="Updates between refreshes; null: only the first one and those requested by `refresh_bases()`."
    )
    offset: NonNegativeInt | Literal["spread"] = Field(
        0,
        description="Refresh on update t if t = 1 or t - 1 + offset is a multiple of `every`; `spread` derives the offset from the "
        "parameter's name, so that refreshes are spread over the steps.",
    )
    timing: Literal["before", "after"] = Field(
        "before", description="Refresh before the update is made, or after it. The first basis always comes before the first update."
    )
    source: Literal["gradient", "momentum", "weight"] = Field("gradient", description="The matrix from which the basis is taken.")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        traits = {name: name for name in ("decomposes", "orthonormal", "keeps_basis", "gated", "primes")}
        declared = "declare it in `traits`: def traits(self): return SelectorTraits({}=...)"
        refuse_former(cls, traits, "an attribute of a selector", declared)
        costs = {f"{name}_flops": name for name in ("refresh", "observe", "project")}
        returned = "return it from `flops`: def flops(self, rows, cols): return SelectorFlops({}=...)"
        refuse_former(cls, costs, "a method of a selector", returned)

    @abstractmethod
    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        """The dimensions of the coordinates. A side without a basis keeps its own dimension."""

    @abstractmethod
    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state of one matrix of `rows` x `cols`."""

    @abstractmethod
    def basis(self, state: State, step: Step) -> Basis:
        """The basis in force."""

    @abstractmethod
    def refresh(self, x: Tensor, state: State, step: Step) -> Refreshed | tuple[State, Order | None]:
        """A new basis from the source `x` `(B, rows, cols)`; pure."""

    def traits(self) -> SelectorTraits:
        """The traits of this selector."""
        return SelectorTraits()

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        """Return the slots that change at every update, from the source `x` and its coordinates `c` in the basis in force."""
        return state

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        """The shape of the normal draws for one matrix that the refresh at update `t` needs; None if it needs none.

        `first`: it is the first refresh of the matrix.
        """
        return None

    def constants(self, rows: Dim, cols: Dim) -> dict[str, Callable[[], Tensor]]:
        """Tables shared by all matrices of a shape, made once and never saved in a checkpoint: a function for each, or a `Drawn`."""
        return {}

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        """Floating-point operations for one matrix of `rows` x `cols`."""
        return SelectorFlops()

    # The schedule: the same for all selectors.

    def refreshes(self, t: int, turn: float = 0.0) -> bool:
        """True if the schedule refreshes the basis at update `t` (1-based).

        `turn` in [0, 1): the parameter's place in a period, for offset `spread`. See `last_refresh` if `every` follows a schedule.
        """
        if t == 1 and not self.traits().primes:
            return True
        if "every" in self.schedules:
            return t >= 1 and last_refresh(self.schedules["every"], self.offset_of(turn), t)[0] == t
        return self.every is not None and t >= 1 and (t - 1 + self.offset_of(turn)) % self.every == 0

    def age(self, t: int, turn: float = 0.0) -> int:
        """Updates since the last scheduled refresh at or before update `t`, including update `t`."""
        if "every" in self.schedules:
            return t - max(last_refresh(self.schedules["every"], self.offset_of(turn), t)[0], 1) + 1
        if self.every is None:
            return t
        return min((t - 1 + self.offset_of(turn)) % self.every, t - 1) + 1

    def period(self, t: int) -> int:
        """The number of whole periods before update `t`; 0 in the first period."""
        if "every" in self.schedules:
            (first, _), (_, index) = (last_refresh(self.schedules["every"], self.offset_of(0.0), at) for at in (1, t))
            return max(index - (first < 1), 0)
        return 0 if self.every is None else (t - 1) // self.every

    def offset_of(self, turn: float) -> int:
        """The offset of a parameter whose place in a period is `turn`."""
        return int(turn * (self.every or 0)) if self.offset == "spread" else self.offset
