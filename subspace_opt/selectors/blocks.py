"""Whole parameters taken in turn (the block mode of FRUGAL, BAdam)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from ..algebra import Basis, Dim, Order, Selector, SelectorFlops, SelectorTraits, Slot, State, Step
from ..registry import register


@register
class Blocks(Selector):
    """The whole space for a `share` of the pipeline's parameters, {0} for the others, in turn (arXiv:2411.07837).

    Every parameter has its turn, so the plan gives state to each.
    """

    kind: Literal["blocks"] = "blocks"
    every: PositiveInt | None = Field(200, description="Length of a turn in updates.")
    share: float = Field(0.25, gt=0.0, le=1.0, description="Share of the parameters that are active at a time.")
    order: Literal["ascending", "descending"] = Field("ascending", description="Begin with the first parameter, or with the last.")

    def traits(self) -> SelectorTraits:
        return SelectorTraits(decomposes=False, gated=True, waits=True)

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, cols

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"active": Slot(())}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(gate=state["active"])

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        return SelectorFlops(project=0.0)  # a matrix is in the subspace as a whole, or not at all

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        assert step.position is not None  # the engine always gives it
        place, total = step.position[:, 0], step.position[:, 1]
        if self.order == "descending":
            place = total - 1 - place
        count = (self.share * total).round().clamp_min(1)
        turn = self.period(int(step.t))
        since = (place - turn * count) % total
        return {"active": (since < count).to(x.device, x.dtype)}, None
