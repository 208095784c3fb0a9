"""Columns of a fixed cosine dictionary, chosen by their share of the source (DCT-AdamW, Trion; arXiv:2505.17967)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, Drawn, LowRank, Order, SelectorFlops, SelectorTraits, Slot, State, Step
from ..linalg import dct
from ..registry import register


@register
class Fft(LowRank):
    """The `rank` atoms of the DCT table T whose columns of `X T` have the largest norm; the state is their r indices.

    With `dictionary: random`, T is one random orthogonal matrix for each width, uniform, drawn from the optimizer's seed.
    """

    kind: Literal["fft"] = "fft"
    dictionary: Literal["dct2", "dct3", "random"] = Field(
        "dct2",
        description="The transform whose atoms are the columns; `random`: a random orthogonal matrix, the same for an optimizer's seed.",
    )
    ranking: Literal["l1", "l2"] = Field(
        "l2", description="Norm that ranks the columns; l2 captures the most energy, l1 is the authors' choice."
    )
    weighted: bool = Field(False, description="Multiply the l1 norm of each column by the l1 norm of its atom.")
    transform: Literal["table", "fft"] = Field(
        "table",
        description="Rank by a product with the n x n table (one for all layers of that width) or by an FFT, without the table.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Fft:
        if self.dictionary == "random" and self.transform == "fft":
            raise ValueError("a random dictionary has no fast transform; use `transform: table`")
        if self.weighted and self.ranking == "l2":
            raise ValueError("`weighted` has no effect with `ranking: l2`, because all atoms have l2 norm 1; use `ranking: l1`")
        return self

    def limit(self, rows: Dim, cols: Dim) -> int:
        return cols.size

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"index": Slot((self.coords(rows, cols)[1],), dtype=torch.int64)}

    def constants(self, rows: Dim, cols: Dim) -> dict[str, Callable[[], Tensor]]:
        n, kind = cols.size, self.dictionary
        if kind == "random":
            return {f"random.{n}": Drawn((n, n), lambda noise: linalg.orthonormal(noise.unsqueeze(0))[0])}
        if self.transform == "table":
            return {f"{kind}.{n}": lambda: dct.dct_table(n, kind)}
        sizes = {f"{kind} sizes.{n}": lambda: dct.dct_sizes(n, kind)} if self.weighted else {}
        return {f"cosines.{n}": lambda: dct.cosines(n), **sizes}

    def traits(self) -> SelectorTraits:
        return SelectorTraits(decomposes=False)

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        m, n = rows.size, cols.size
        return SelectorFlops(refresh=2.0 * m * n * n if self.transform == "table" else 5.0 * m * n * math.log2(max(n, 2)))

    def basis(self, state: State, step: Step) -> Basis:
        table, *_ = step.constants.values()
        index = state["index"]
        if self.transform == "fft" and self.dictionary != "random":
            return Basis(right=dct.dct_atoms(index, table, self.dictionary), atoms=index)
        picked = table.index_select(1, index[0]).unsqueeze(0) if index.size(0) == 1 else table.mT[index].mT
        return Basis(right=picked, atoms=index)  # (B, n, r)

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        table, *sizes = step.constants.values()
        rank = state["index"].size(-1)
        if self.transform == "fft" and self.dictionary != "random":
            weights = self._weights(dct.dct(x, self.dictionary))
            chosen = (weights * sizes[0] if self.weighted else weights).topk(rank).indices
        elif _rounding_pays(x, rank):
            chosen = self._chosen_roughly(x, table, rank)
        else:
            chosen = self._weights(x @ table, table).topk(rank).indices
        # In ascending order a column that stays selected keeps nearly its place.
        return {"index": chosen.sort().values}, None

    def _weights(self, s: Tensor, atoms: Tensor | None = None) -> Tensor:
        """The norms `(B, n)` that rank the columns; with `weighted`, times the norms of the atoms `(n, n)`."""
        if self.ranking == "l1":
            size = s.abs().sum(-2, dtype=torch.promote_types(s.dtype, torch.float32))  # several times faster than vector_norm(ord=1)
            return size * atoms.abs().sum(-2) if self.weighted and atoms is not None else size
        length: Tensor = torch.linalg.vector_norm(s, dim=-2, dtype=torch.promote_types(s.dtype, torch.float32))
        return length

    def _chosen_roughly(self, x: Tensor, table: Tensor, rank: int) -> Tensor:
        """The same columns for one matrix. Columns that bfloat16 cannot tell from the last selected one are ranked again in full."""
        rough = self._weights(x[0].bfloat16() @ table.bfloat16(), table)  # (n,)
        edge = rough.topk(rank + 1).values[-2:].mean()
        # Rounding changes an entry by at most the part 2^-9; norms of hundreds of entries change by a tenth of that.
        doubt = 2**-9 * (edge + rough.square().mean().sqrt())
        sure = (rough > edge + doubt).nonzero()[:, 0]
        unsure = ((rough - edge).abs() <= doubt).nonzero()[:, 0]
        if not rank <= sure.numel() + unsure.numel():  # NaN or infinity
            return self._weights(x @ table, table).topk(rank).indices
        atoms = table.index_select(1, unsure)
        exact = self._weights(x[0] @ atoms, atoms)
        return torch.cat([sure, unsure[exact.topk(rank - sure.numel()).indices]]).unsqueeze(0)


def _rounding_pays(x: Tensor, rank: int) -> bool:
    """True if bfloat16 is so much faster here that ranking some columns twice pays."""
    alone = x.size(0) == 1 and x.device.type == "cpu" and x.dtype == torch.float32
    return alone and min(x.shape[-2:]) >= 256 and rank < x.size(-1) and linalg.cpu_has_bfloat16()
