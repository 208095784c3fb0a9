"""`LowRank`: a selector with a column basis of a given rank."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, PlainValidator, PositiveInt
from pydantic_core import PydanticCustomError

from .core import Basis, Dim, Selector, Slot, State, Step


def _check_rank(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (0 < value < 1 or value == int(value) >= 1):
        raise PydanticCustomError("rank", "should be a number of columns, 1 or more, or a part of the short side between 0 and 1")
    return value if value < 1 else int(value)


Rank = Annotated[float, PlainValidator(_check_rank, json_schema_input_type=PositiveInt | Annotated[float, Field(gt=0, lt=1)])]


class LowRank(Selector):
    """A selector with a column basis of a given rank. Its subclasses need `refresh` alone, if they keep the basis in slot `basis`."""

    rank: Rank = Field(
        128, description="Number of columns of the basis, at most the short side; a number below 1 is that part of the largest rank."
    )

    def limit(self, rows: Dim, cols: Dim) -> int:
        """The largest useful rank: by default the largest rank that a gradient can have."""
        return min(rows.size, cols.size)

    def columns(self, rows: Dim, cols: Dim) -> int:
        """The rank for one shape, clamped to `limit`."""
        most = self.limit(rows, cols)
        return max(1, min(most, int(self.rank) if self.rank >= 1 else math.floor(self.rank * most + 0.5)))

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return rows, Dim("rank", self.columns(rows, cols))

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"basis": Slot((cols, self.coords(rows, cols)[1]))}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["basis"])
