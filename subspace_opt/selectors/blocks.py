"""Whole parameters taken in turn (the block mode of FRUGAL, BAdam)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from ..algebra import Basis, Dim, Order, Selector, Slot, State, Step
from ..registry import register


@register
class Blocks(Selector):
    """The whole space for a `share` of the pipeline's parameters, {0} for the others, in turn (arXiv:2411.07837).

    State is laid out for every parameter, since each has its turn.
    """

    decomposes: ClassVar[bool] = False
    kind: Literal["blocks"] = "blocks"
    every: PositiveInt | None = Field(200, description="Updates for which a turn lasts.")
    share: float = Field(0.25, gt=0.0, le=1.0, description="Part of the parameters whose turn it is.")
    order: Literal["ascending", "descending"] = Field("ascending", description="From the first parameter on, or from the last.")

    @property
    def gated(self) -> bool:
        return True

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, cols

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"active": Slot(())}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(gate=state["active"])

    def project_flops(self, rows: Dim, cols: Dim) -> float:
        return 0.0  # all or nothing

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        assert step.position is not None  # the core tells every selector
        assert self.every is not None
        place, total = step.position[:, 0], step.position[:, 1]
        if self.order == "descending":
            place = total - 1 - place
        count = (self.share * total).round().clamp_min(1)
        turn = (int(step.t) - 1) // self.every
        since = (place - turn * count) % total
        return {"active": (since < count).to(x.device, x.dtype)}, None
