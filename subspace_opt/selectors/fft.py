"""Columns of a fixed cosine dictionary, chosen by their share of the source (DCT-AdamW, Trion; arXiv:2505.17967)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, LowRank, Order, Slot, State, Step
from ..registry import register


@register
class Fft(LowRank):
    """The `rank` atoms of the DCT whose coefficients in `X T` have the largest norm down the rows; state is their r indices."""

    kind: Literal["fft"] = "fft"
    dictionary: Literal["dct2", "dct3"] = Field("dct2", description="Which transform's atoms are the columns.")
    ranking: Literal["l1", "l2"] = Field(
        "l2", description="Norm by which columns are ranked; l2 captures the most energy, l1 is the authors' choice."
    )
    transform: Literal["table", "fft"] = Field(
        "table",
        description="Rank by a product with the n x n table (one for all layers of that width) or by an FFT, without the table.",
    )

    def limit(self, rows: Dim, cols: Dim) -> int:
        return cols.size

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"index": Slot((self.coords(rows, cols)[1],), dtype=torch.int64)}

    def constants(self, rows: Dim, cols: Dim) -> dict[str, Callable[[], Tensor]]:
        n = cols.size
        if self.transform == "table":
            return {f"{self.dictionary}.{n}": lambda: linalg.dct_table(n, self.dictionary)}
        return {f"cosines.{n}": lambda: linalg.cosines(n)}

    def refresh_flops(self, rows: Dim, cols: Dim) -> float:
        m, n = rows.size, cols.size
        return 2.0 * m * n * n if self.transform == "table" else 5.0 * m * n * math.log2(max(n, 2))

    def basis(self, state: State, step: Step) -> Basis:
        (table,) = step.constants.values()
        if self.transform == "table":
            return Basis(right=table.mT[state["index"]].mT)  # (B, n, r)
        return Basis(right=linalg.dct_atoms(state["index"], table, self.dictionary))

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        (table,) = step.constants.values()
        s = x @ table if self.transform == "table" else linalg.dct(x, self.dictionary)
        weight = torch.linalg.vector_norm(s, ord=1 if self.ranking == "l1" else 2, dim=-2)  # (B, n)
        # In ascending order a column that stays selected moves little in position.
        return {"index": weight.topk(state["index"].size(-1)).indices.sort().values}, None
