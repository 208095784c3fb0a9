"""The sweeps: one panel for each optimizer and tuned field, and the list of all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...drawing import look
from ..records import Entry, Record
from ..statistics import Line
from ..words import number, shorten
from .svg import ALERT, FAINT, INK, RULE, Picture, render, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = {"width": 280, "height": 215}


@dataclass(frozen=True)
class Tried:
    """The values of one field that a sweep tried."""

    field: str
    values: list[float]  # sorted
    best_loss: list[float]  # the lowest loss of a finished run with this value; nan if all diverged
    runs: list[tuple[int, float]]  # (position in `values`, loss) of each finished run
    diverged: list[int]  # positions in `values` at which a run diverged


def tried_values(entry: Entry, field: str) -> Tried:
    """What the sweep of an optimizer tried for one field."""
    mine = [record for record in entry.tried if field in record.values]
    values = sorted({record.values[field] for record in mine})
    finished = [(values.index(record.values[field]), record.loss) for record in mine if math.isfinite(record.loss)]
    lost = sorted({values.index(record.values[field]) for record in mine if not math.isfinite(record.loss)})
    lowest = [min((loss for at, loss in finished if at == position), default=math.nan) for position in range(len(values))]
    return Tried(field, values, lowest, finished, lost)


def swept_fields(entry: Entry) -> list[str]:
    """The fields that a sweep varied: those with a best value, or all of them if every run diverged and none is best."""
    names = list(dict.fromkeys(name for record in entry.tried for name in record.values))
    return [name for name in names if name in entry.best] or names


def sweep_pictures(lines: Sequence[Line]) -> list[Picture]:
    """One panel for each optimizer and tuned field, in the order of the ranking."""
    return [_picture(line, field, at) for line in lines for at, field in enumerate(swept_fields(line.entry))]


def _picture(line: Line, field: str, at: int) -> Picture:
    label, found, best = line.entry.label, tried_values(line.entry, field), line.entry.best.get(field)

    def draw(axes: Axes) -> None:
        _draw(axes, found, best, line.number, is_edge=field in line.entry.at_edge)

    svg = render(f"sweep-{line.number}-{at}", draw, **_SIZE, description=f"Sweep of {field} for {label}")
    return Picture(f"{shorten(label, 26)}: {field}", svg)


def _draw(axes: Axes, found: Tried, best: float | None, order: int, *, is_edge: bool) -> None:
    """The lowest loss for each value as a line, other runs as faint points; the area outside the tried values is grey."""
    colour, last = series(order), len(found.values) - 1
    for low, high in ((-0.8, -0.4), (last + 0.4, last + 0.8)):
        axes.axvspan(low, high, color=RULE, linewidth=0)
    for edge in {0, last}:
        axes.axvline(edge, color=FAINT, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    axes.plot(*_columns(found.runs), linestyle="none", marker=".", markersize=5, color=colour, alpha=0.45)
    kept = [(at, loss) for at, loss in enumerate(found.best_loss) if math.isfinite(loss)]
    axes.plot(*_columns(kept), color=colour, marker=look(order).marker, markersize=5)
    for at in found.diverged:
        axes.plot(at, 0.95, transform=axes.get_xaxis_transform(), marker="x", markersize=7, markeredgewidth=1.8, color=ALERT)
    if best in found.values and math.isfinite(found.best_loss[found.values.index(best)]):
        at = found.values.index(best)
        ring = ALERT if is_edge else INK
        axes.plot(at, found.best_loss[at], marker="o", markersize=12, markerfacecolor="none", markeredgecolor=ring, markeredgewidth=1.6)
    if not kept:
        axes.set_yticks([])
    axes.set_xlim(-0.8, last + 0.8)
    every = max(1, math.ceil(len(found.values) / 5))
    shown = range(len(found.values) - 1, -1, -every)
    axes.set_xticks(list(shown), [number(found.values[at]) for at in shown])
    axes.margins(y=0.2)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(found.field + (", best at the edge" if is_edge else ""), color=ALERT if is_edge else INK)
    axes.set_ylabel("nats per token")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [at for at, _ in points], [loss for _, loss in points]


def outcome(record: Record) -> str:
    """The result of a run in a list: its loss, or why it ended."""
    return f"{record.loss:.4f}" if math.isfinite(record.loss) else f"diverged: {record.reason}" if record.reason else "diverged"
