"""One selector until an update, another from it on (GoLore: SVD, then random)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from ..algebra import Basis, Dim, Order, Selector, Slot, State, Step
from ..registry import register


@register
class Switch(Selector):
    """The bases of `first` at refreshes up to update `at`, those of `then` at later ones (arXiv:2410.11289).

    The schedule is that of the switch; both must keep the same state.
    """

    kind: Literal["switch"] = "switch"
    every: PositiveInt | None = Field(200, description="Updates between refreshes.")
    at: PositiveInt = Field(description="The last update at which `first` gives the basis.", examples=[4])
    first: Selector = Field(description="The selector to begin with.", examples=[{"kind": "svd", "rank": 2}])
    then: Selector = Field(description="The selector to go on with.", examples=[{"kind": "random", "rank": 2}])

    @model_validator(mode="after")
    def _alike(self) -> Switch:
        for m, n in ((6, 4), (4, 6)):
            sides = (Dim("rows", m), Dim("cols", n))
            if self.first.slots(*sides) != self.then.slots(*sides) or self.first.coords(*sides) != self.then.coords(*sides):
                raise ValueError("`first` and `then` must open subspaces of the same rank and keep the same state")
        return self

    def _now(self, t: int) -> Selector:
        return self.first if t <= self.at else self.then

    @property
    def orthonormal(self) -> bool:
        return self.first.orthonormal and self.then.orthonormal

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return self.first.coords(rows, cols)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return self.first.slots(rows, cols)

    def refresh_flops(self, rows: Dim, cols: Dim) -> float:
        return max(self.first.refresh_flops(rows, cols), self.then.refresh_flops(rows, cols))

    def project_flops(self, rows: Dim, cols: Dim) -> float:
        return self.first.project_flops(rows, cols)

    def basis(self, state: State, step: Step) -> Basis:
        return self.first.basis(state, step)

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return self._now(t).draws(rows, cols, t, first)

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        return self._now(int(step.t)).observe(x, c, state, step)

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return self._now(int(step.t)).refresh(x, state, step)
