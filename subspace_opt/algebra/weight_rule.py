"""`WeightRule`: the family of the last place, `apply`, whose rules see the weight as well as the update."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..registry import Component
from ..schedules import Scheduled
from .core import Dim, Slot, State, Step


class WeightError(ValueError):
    """A weight has no place in the set that a rule keeps it in; the message says what to do."""


class WeightTraits(NamedTuple):
    """The declarations of a weight rule. The defaults are safe. `decays` and `decomposes` change the result, the others only the speed."""

    decays: bool = False  # makes the weight decay, in place of the pipeline's `decay`; it then acts without an update too
    decomposes: bool = False  # takes a decomposition, which may fail: NaN in its result is then an error
    elementwise: bool = False  # an entry of a result depends on the same entry of weight, update and state, which have one shape
    by_rows: bool = False  # the same for rows
    waits: bool = False  # a map reads numbers, or takes an SVD or eigh, so a CUDA graph cannot hold it


class WeightRule(Scheduled, Component, family="weight_rule"):
    """How an update U meets a weight W: three maps on stacks `(B, rows, cols)`, each the identity unless a rule defines it.

        W <- decayed(W, U);    U <- scaled(U, W);    W' <- landed(W - lr U, W)

    W and U have the weight's own orientation and the dtype of computation; `step.lr` and `step.decay` are the learning rate and the weight
    decay. With several rules, each map runs for all of them in their order before the next map begins. Every map is pure, and row `b` of a
    result depends on row `b` of the inputs alone. A stateful rule declares `slots` and returns their new values from `observe`.
    """

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        """The state of one matrix of `rows` x `cols`."""
        return {}

    def observe(self, w: Tensor, u: Tensor, state: State, step: Step) -> State:
        """Return the new state, which the three maps then see, from the weight before its decay and the update before its scaling."""
        return state

    def decayed(self, w: Tensor, u: Tensor, state: State, step: Step) -> Tensor:
        """Return the weight after its decay."""
        return w

    def scaled(self, u: Tensor, w: Tensor, state: State, step: Step) -> Tensor:
        """Return the update that lr multiplies. `w`: the weight after its decay."""
        return u

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        """Return the new weight. `after`: `W - lr U`; `before`: the weight after its decay."""
        return after

    def traits(self, rows: Dim, cols: Dim) -> WeightTraits:
        """The traits for matrices of `rows` x `cols`."""
        return WeightTraits()

    def flops(self, rows: Dim, cols: Dim) -> float:
        """Floating-point operations of one update of one matrix: products and decompositions, without elementwise work."""
        return 0.0
