"""Loss against updates, tokens and time, and captured energy against updates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...drawing import look
from ..records import Points, Record
from ..statistics import Line
from .svg import INK, Picture, render, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = {"width": 370, "height": 280}


@dataclass(frozen=True)
class Band:
    """The mean, lowest and highest value over seeds at each update that all of them have."""

    updates: list[int]
    seconds: list[float]  # mean over seeds
    mean: list[float]
    low: list[float]
    high: list[float]


def band(records: Sequence[Record], points: str = "validation") -> Band:
    """The band of the finished records. `points` names a field of `Record`."""
    curves = [dict(getattr(record, points)) for record in records if record.status == "finished" and getattr(record, points)]
    updates = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[update] for curve in curves] for update in updates]
    clocks = [dict(zip(dict(r.validation), r.seconds_at, strict=False)) for r in records if r.status == "finished"]
    seconds = [statistics.fmean(clock.get(update, math.nan) for clock in clocks) for update in updates]
    return Band(updates, seconds, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def loss_pictures(lines: Sequence[Line]) -> list[Picture]:
    """Loss against updates, its second half enlarged, and loss against time. Tokens share the first picture if all updates have as many."""
    bands = [(line, band(line.entry.finals)) for line in lines if line.loss.count]
    if not bands:
        return []
    rates = {record.tokens_per_step for line in lines for record in line.entry.finals}
    per_update = rates.pop() if len(rates) == 1 else None
    clock = max((b.seconds[-1] for _, b in bands if math.isfinite(b.seconds[-1])), default=0.0)
    unit, scale = ("minutes", 60) if clock > 600 else ("seconds", 1)

    def by_updates(axes: Axes) -> None:
        _plot(axes, bands, [[float(u) for u in b.updates] for _, b in bands], "update", log=True)
        _diverged(axes, lines)
        if per_update is not None:
            _tokens_above(axes, per_update)

    def enlarged(axes: Axes) -> None:
        _plot(axes, bands, [[float(u) for u in b.updates] for _, b in bands], "update", log=False)
        _zoom(axes, [b for _, b in bands])

    def by_time(axes: Axes) -> None:
        _plot(axes, bands, [[s / scale for s in b.seconds] for _, b in bands], f"{unit} of training", log=True)

    def by_tokens(axes: Axes) -> None:
        rate = [line.entry.finals[0].tokens_per_step for line, _ in bands]
        _plot(axes, bands, [[float(u * r) for u in b.updates] for r, (_, b) in zip(rate, bands, strict=True)], "tokens", log=True)

    what = "Validation loss against"
    pictures = [
        Picture("Loss against updates and tokens", render("updates", by_updates, **_SIZE, description=f"{what} updates and tokens")),
        Picture("The second half, enlarged", render("enlarged", enlarged, **_SIZE, description=f"{what} updates, second half")),
        Picture("Loss against time", render("time", by_time, **_SIZE, description=f"{what} time of training")),
    ]
    if per_update is None:
        pictures.append(Picture("Loss against tokens", render("tokens", by_tokens, **_SIZE, description=f"{what} tokens")))
    return pictures


def energy_picture(lines: Sequence[Line]) -> Picture | None:
    """The share of the gradient's energy inside the subspace over updates; None if no run has recorded it."""
    bands = [(line, band(line.entry.finals, "captured_energy")) for line in lines]
    bands = [(line, found) for line, found in bands if found.updates]
    if not bands:
        return None

    def draw(axes: Axes) -> None:
        _plot(axes, bands, [[float(u) for u in b.updates] for _, b in bands], "update", log=False)
        axes.set_ylabel("share of the gradient's energy")
        axes.set_ylim(0, 1.02)

    return Picture("Captured energy", render("energy", draw, **_SIZE, description="Captured energy against updates"))


def _plot(axes: Axes, bands: Sequence[tuple[Line, Band]], xs: Sequence[list[float]], xlabel: str, *, log: bool) -> None:
    """Draw the mean of each optimizer as a line, and the range over seeds as a band. The best is drawn last, on top."""
    from matplotlib.ticker import MaxNLocator

    for (line, found), x in reversed(list(zip(bands, xs, strict=True))):
        style, colour = look(line.number), series(line.number)
        axes.fill_between(x, found.low, found.high, color=colour, alpha=0.16, linewidth=0)
        every = max(1, len(x) // 6)
        axes.plot(x, found.mean, color=colour, linestyle=style.dash, marker=style.marker, markersize=5, markevery=(len(x) % every, every))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)
    if log:
        _logarithmic(axes, [found for _, found in bands])


def _logarithmic(axes: Axes, bands: Sequence[Band]) -> None:
    """A logarithmic scale: all runs fall steeply at first and differ at the end."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if min(min(found.low) for found in bands) <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _zoom(axes: Axes, bands: Sequence[Band]) -> None:
    """Limit the axes to the second half of the best curve; curves far above the median end are cut off."""
    last = max(found.updates[-1] for found in bands)
    ends = sorted(found.mean[-1] for found in bands)
    best = min(bands, key=lambda found: found.mean[-1])
    start = max((value for update, value in zip(best.updates, best.high, strict=True) if update >= last / 2), default=ends[0])
    cap = max(start, ends[0] + 3 * (ends[len(ends) // 2] - ends[0]))
    shown = [(lo, hi) for f in bands for u, lo, hi in zip(f.updates, f.low, f.high, strict=True) if u >= last / 2 and lo <= cap]
    low, high = min(lo for lo, _ in shown), min(max(hi for _, hi in shown), cap)
    margin = 0.06 * (high - low) or 0.01
    axes.set_xlim(last / 2, last * 1.01)
    axes.set_ylim(low - margin, high + margin)


def _diverged(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw each diverged run as a thin line that ends in a cross."""
    for line in lines:
        for record in line.entry.finals:
            kept = finite(record.validation)
            if record.status == "diverged" and kept:
                axes.plot(*zip(*kept, strict=True), color=series(line.number), linewidth=0.8)
                axes.plot(*kept[-1], color=series(line.number), marker="x", markersize=8, markeredgewidth=2)


def finite(points: Points) -> list[tuple[int, float]]:
    """The points whose value is finite."""
    return [(update, value) for update, value in points if math.isfinite(value)]


def _tokens_above(axes: Axes, per_update: int) -> None:
    """A second scale at the top: tokens."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    def tokens(updates: Any) -> Any:
        return updates * per_update

    def updates(count: Any) -> Any:
        return count / per_update

    top = axes.secondary_xaxis("top", functions=(tokens, updates))
    top.xaxis.set_major_locator(MaxNLocator(5))
    top.xaxis.set_major_formatter(EngFormatter(sep=" "))
    top.set_xlabel("tokens", color=INK, labelpad=6)
