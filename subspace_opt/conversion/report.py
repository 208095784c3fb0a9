"""The report of a conversion: for every slot of the new state whether it is exact, approximate, rebuilt or reset, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..spec.summary import html_table, plural

STATUSES = ("exact", "approximate", "rebuilt", "reset", "dropped")
HEAD = ("pipeline", "slot", "status", "parameters", "from", "why")


@dataclass(frozen=True)
class ReportRow:
    """One slot of one parameter.

    `status`: `exact`, the same average or tensor; `approximate`, computed from it under an assumption; `rebuilt`, made from other slots;
    `reset`, empty; `dropped`, an old slot that the new spec has no use for.
    """

    parameter: str
    pipeline: str  # "all -> matrix"
    slot: str
    status: str
    origin: str  # old slots
    why: str


@dataclass(frozen=True)
class Report:
    """All rows, and remarks on parameter groups. `str(report)` is a table with a line for slots that fared alike."""

    rows: tuple[ReportRow, ...]
    groups: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def counts(self) -> dict[str, int]:
        """The number of slots of all parameters by status."""
        return {status: sum(row.status == status for row in self.rows) for status in STATUSES}

    def table(self) -> list[tuple[str, ...]]:
        """A line of cells, as `HEAD`, for all parameters whose slot fared alike."""
        found: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            key = (row.pipeline, row.slot, row.status, row.origin, row.why)
            found[key] = found.get(key, 0) + 1
        return [
            (pipeline, slot, status, f"{count:,}", origin or "-", why) for (pipeline, slot, status, origin, why), count in found.items()
        ]

    def summary(self) -> str:
        """One line with the number of slots by status."""
        return (
            ", ".join(f"{count:,} {status}" for status, count in self.counts().items() if count) + f" of {plural(len(self.rows), 'slot')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"counts": self.counts(), "groups": list(self.groups), "slots": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [HEAD, *self.table()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        body = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*body, self.summary(), *self.groups])

    def __repr__(self) -> str:
        return f"Report({self.summary()})"

    def _repr_html_(self) -> str:
        return html_table(HEAD, self.table(), caption=self.summary(), note=" ".join(self.groups))
