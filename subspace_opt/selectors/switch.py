"""One selector until an update, another from it on (GoLore: SVD, then random)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from ..algebra import Basis, Dim, Order, Refreshed, Selector, SelectorFlops, SelectorTraits, Slot, State, Step
from ..registry import register


@register
class Switch(Selector):
    """The bases of `first` at refreshes up to update `at`, those of `then` at later ones (arXiv:2410.11289).

    The switch has its own schedule, which replaces those of the two. Both must keep the same state.
    """

    kind: Literal["switch"] = "switch"
    every: PositiveInt | None = Field(200, description="Updates between refreshes.")
    at: PositiveInt = Field(description="The last update whose refresh uses `first`.", examples=[4])
    first: Selector = Field(description="The selector up to `at`.", examples=[{"kind": "svd", "rank": 2}])
    then: Selector = Field(description="The selector after `at`.", examples=[{"kind": "random", "rank": 2}])

    @model_validator(mode="after")
    def _alike(self) -> Switch:
        for m, n in ((6, 4), (4, 6)):
            sides = (Dim("rows", m), Dim("cols", n))
            if self.first.slots(*sides) != self.then.slots(*sides) or self.first.coords(*sides) != self.then.coords(*sides):
                raise ValueError("`first` and `then` must open subspaces of the same rank and keep the same state")
        return self

    def _now(self, t: int) -> Selector:
        return self.first if t <= self.at else self.then

    def traits(self) -> SelectorTraits:
        """The traits that both selectors have."""
        a, b = self.first.traits(), self.then.traits()
        if a.primes or b.primes or not (a.keeps_basis and b.keeps_basis):
            raise ValueError("`switch` takes selectors that keep their basis and do not prime")
        return SelectorTraits(
            decomposes=a.decomposes or b.decomposes,
            orthonormal=a.orthonormal and b.orthonormal,
            gated=a.gated or b.gated,
            waits=True,
        )

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return self.first.coords(rows, cols)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return self.first.slots(rows, cols)

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        a, b = self.first.flops(rows, cols), self.then.flops(rows, cols)
        return a._replace(refresh=max(a.refresh, b.refresh))

    def basis(self, state: State, step: Step) -> Basis:
        return self.first.basis(state, step)

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return self._now(t).draws(rows, cols, t, first)

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        if type(self.first).observe is Selector.observe and type(self.then).observe is Selector.observe:
            return state
        return self._now(int(step.t)).observe(x, c, state, step)

    def refresh(self, x: Tensor, state: State, step: Step) -> Refreshed | tuple[State, Order | None]:
        return self._now(int(step.t)).refresh(x, state, step)
