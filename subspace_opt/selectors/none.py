"""No subspace: the signal is all complement."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..algebra import Basis, Dim, Order, Selector, Slot, State, Step
from ..registry import register


@register
class NoSelector(Selector):
    """The subspace {0}: every signal goes whole to `complement`."""

    kind: Literal["none"] = "none"

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, Dim("rank", 0)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis()

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return state, None
