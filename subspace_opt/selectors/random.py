"""A random subspace, drawn at every refresh from (seed, parameter name, step): the same on all ranks and after a resume."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, LowRank, Order, SelectorFlops, SelectorTraits, Slot, State, Step
from ..registry import register


@register
class Random(LowRank):
    """Random columns: `orthonormal` (uniform on the Stiefel manifold, arXiv:2410.11289), `gaussian` (entries N(0, 1/r), arXiv:2412.05270)
    or `coordinates` (r columns of the identity)."""

    kind: Literal["random"] = "random"
    every: PositiveInt | None = Field(200, description="Updates between refreshes.")
    draw: Literal["orthonormal", "gaussian", "coordinates"] = Field("orthonormal", description="The kind of random columns.")

    def limit(self, rows: Dim, cols: Dim) -> int:
        # More columns than a gradient's rank may be picked.
        return cols.size if self.draw == "coordinates" else super().limit(rows, cols)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        rank = self.coords(rows, cols)[1]
        return {"index": Slot((rank,), dtype=torch.int64)} if self.draw == "coordinates" else {"basis": Slot((cols, rank))}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["index" if self.draw == "coordinates" else "basis"])

    def traits(self) -> SelectorTraits:
        return SelectorTraits(orthonormal=self.draw != "gaussian", waits=True)

    def draws(self, rows: Dim, cols: Dim, t: int = 1, first: bool = True) -> tuple[int, ...] | None:
        return (cols.size,) if self.draw == "coordinates" else (cols.size, self.columns(rows, cols))

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        made = 4.0 * cols.size * self.columns(rows, cols) ** 2 if self.draw == "orthonormal" else 0.0
        return SelectorFlops(refresh=made, project=0.0 if self.draw == "coordinates" else None)

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        noise = step.noise
        assert noise is not None  # the engine draws what `draws` asks for
        if self.draw == "coordinates":
            return {"index": noise.topk(state["index"].size(-1)).indices}, None
        noise = noise.to(x.dtype)
        if self.draw == "gaussian":
            return {"basis": noise / math.sqrt(noise.size(-1))}, None
        return {"basis": linalg.orthonormal(noise)}, None
