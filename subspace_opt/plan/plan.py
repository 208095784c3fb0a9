"""The plan: one row for every parameter, totals, and their printed form. No tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch

from ..algebra import Drawn
from ..spec.summary import html_table, plural
from .rows import Row, adamw_bytes, said

MOST_ROWS = 200  # of a table in a notebook


@dataclass(frozen=True, repr=False)
class Plan:
    """All parameters in the optimizer's order. `str(plan)` is the full table, `repr(plan)` a summary."""

    rows: tuple[Row, ...]
    spec_name: str = ""
    by_name: dict[str, Row] = field(default_factory=dict, compare=False)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total_bytes(self) -> int:
        """Bytes of state of all parameters, once each has had a gradient."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes that torch.optim.AdamW would hold for the same parameters."""
        return sum(adamw_bytes(row.entry) for row in self.rows)

    @cached_property
    def constants(self) -> dict[str, int]:
        """Bytes of the tables that matrices share, by name and dtype. Checkpoints do not contain them."""
        out: dict[str, int] = {}
        for row in self.rows:
            for _, frame in row.splits:
                if not frame.opens:
                    continue
                for name, make in frame.pipeline.selector.constants(frame.rows, frame.cols).items():
                    key = f"{name} {row.compute_dtype}".replace("torch.", "")
                    if isinstance(make, Drawn):
                        out[key] = prod(make.shape) * row.compute_dtype.itemsize
                    elif key not in out:
                        # A tensor on the meta device has a size and takes no memory.
                        with torch.device("meta"):
                            out[key] = make().numel() * row.compute_dtype.itemsize
        return out

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "spec": self.spec_name,
            "state_bytes": self.total_bytes,
            "adamw_bytes": self.adamw_bytes,
            "constant_bytes": sum(self.constants.values()),
            "parameters": [row.to_dict() for row in self.rows],
        }

    @cached_property
    def by_pipeline(self) -> dict[str, list[Row]]:
        """The rows of every pipeline, in the order in which pipelines first occur."""
        out: dict[str, list[Row]] = {}
        for row in self.rows:
            out.setdefault(row.pipeline, []).append(row)
        return out

    def __repr__(self) -> str:
        parts = [f"{name}: {counts(rows)}" for name, rows in self.by_pipeline.items()]
        return "\n  ".join([f"Plan('{self.spec_name}', {self._totals}", *parts]) + ")"

    def _repr_html_(self) -> str:
        head, body = self._table()
        more = len(body) - MOST_ROWS
        note = f"{plural(more, 'more parameter')}; print(plan) shows all" if more > 0 else ""
        return html_table(head, body[:MOST_ROWS], caption=f"Plan of '{self.spec_name}', {self._totals}", note=note)

    @property
    def _totals(self) -> str:
        share = f", {self.total_bytes / self.adamw_bytes:.2f} x AdamW's" if self.adamw_bytes else ""
        return f"{plural(len(self.rows), 'parameter')}, {self.total_bytes:,} bytes of state{share}"

    def __str__(self) -> str:
        head, body = self._table()
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
        share = f" ({self.total_bytes / self.adamw_bytes:.2f} x AdamW's {self.adamw_bytes:,})" if self.adamw_bytes else ""
        return "\n".join([*lines, f"total state {self.total_bytes:,} bytes{share}"])

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and lines. The column `stored` is there if the spec has a `state_dtype`."""
        head: tuple[str, ...] = ("parameter", "shape", "role", "seen as", "pipeline", "rank", "lr x", "decay", "state", "why")
        body = [_cells(row) for row in self.rows]
        if any(row.stored for row in self.rows):
            head = (*head[:-1], "stored", head[-1])
            body = [(*line[:-1], said(row), line[-1]) for line, row in zip(body, self.rows, strict=True)]
        return head, body


def counts(rows: Sequence[Row]) -> str:
    """The numbers of parameters and matrices in some rows, and their bytes of state."""
    frozen = sum(row.entry.frozen for row in rows)
    said_frozen = f" ({frozen:,} frozen)" if frozen else ""
    matrices = plural(sum(row.matrices for row in rows), "matrix", "matrices")
    return f"{plural(len(rows), 'parameter')}{said_frozen}, {matrices}, {sum(row.state_bytes for row in rows):,} bytes of state"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.entry.name,
        "x".join(map(str, row.entry.shape)) or "scalar",
        row.role.name,
        str(row.view),
        row.pipeline + (" (frozen)" if row.entry.frozen else ""),
        "/".join(map(str, row.ranks)) or "-",
        f"{row.lr_scale:g}",
        f"{row.decay:g}",
        f"{row.state_bytes:,}",
        row.why,
    )
