"""Final loss against a cost, with the Pareto front marked and a label at each point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...drawing import look
from ..statistics import Line, pareto_front
from ..words import shorten
from .svg import FAINT, INK, PAPER, Picture, render, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = {"width": 420, "height": 320}
_Box = tuple[float, float, float, float]  # left, bottom, right, top in points


@dataclass(frozen=True)
class Point:
    """One optimizer in the picture."""

    line: Line
    cost: float
    loss: float


def pareto_pictures(lines: Sequence[Line]) -> list[Picture]:
    """Loss against state bytes, and against the median step time. Optimizers without a finished run are left out."""
    shown = [line for line in lines if line.loss.count and line.costs]
    state = [Point(line, line.costs.measured_state_bytes / 2**20, line.loss.mean) for line in shown if line.costs]
    step = [Point(line, line.costs.step_median, line.loss.mean) for line in shown if line.costs and math.isfinite(line.costs.step_median)]
    panels = (("memory", "Loss against state", "optimizer state, MiB", state), ("speed", "Loss against step time", "median step, ms", step))
    return [_picture(name, title, xlabel, points) for name, title, xlabel, points in panels if points]


def _picture(name: str, title: str, xlabel: str, points: Sequence[Point]) -> Picture:
    front = [points[i] for i in pareto_front([(point.cost, point.loss) for point in points])]
    svg = render(name, lambda axes: _draw(axes, points, front, xlabel), **_SIZE, description=f"{title}; front: {_names(front)}")
    return Picture(title, svg, f"On the front, from the cheapest on: {_names(front)}.")


def _names(points: Iterable[Point]) -> str:
    return ", ".join(point.line.entry.label for point in points)


def _draw(axes: Axes, points: Sequence[Point], front: Sequence[Point], xlabel: str) -> None:
    axes.plot([p.cost for p in front], [p.loss for p in front], color=FAINT, linewidth=1.2, drawstyle="steps-post", zorder=1)
    for point in points:
        colour, half = series(point.line.number), point.line.loss.half
        is_front = point in front
        if math.isfinite(half):
            axes.errorbar(point.cost, point.loss, yerr=half, color=colour, linewidth=1, capsize=2, zorder=2)
        marker, face = look(point.line.number).marker, colour if is_front else PAPER
        axes.plot(point.cost, point.loss, marker=marker, markersize=9, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=3)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("final loss, nats per token")
    _scale(axes, [point.cost for point in points])
    axes.margins(0.16, 0.14)
    _label(axes, points, front)


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic scale if the costs span a factor of 8."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(6))
    if min(costs) > 0 and max(costs) / min(costs) > 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _label(axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Write each label at the nearest free place around its point; a thin line leads to a label that is not beside its point."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # places the axes, so that positions in points are known
    frame = axes.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    centres = [tuple(axes.transData.transform((point.cost, point.loss))) for point in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in centres] + [_bar(axes, point) for point in points] + _steps(axes, front)
    for point, (x, y) in sorted(zip(points, centres, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.text(0, 0, shorten(point.line.entry.label, 22), fontsize=11, color=INK)
        size = text.get_window_extent()
        text.remove()
        box = place((x, y), (size.width, size.height), taken, inside)
        taken.append(box)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        _write(axes, point, (middle[0] - x, middle[1] - y), is_far=_gap(box, (x, y)) > 14)


def _bar(axes: Axes, point: Point) -> _Box:
    """The box of the error bar of a point."""
    half = point.line.loss.half if math.isfinite(point.line.loss.half) else 0.0
    (x, low), (_, high) = (axes.transData.transform((point.cost, point.loss + sign * half)) for sign in (-1, 1))
    return (x - 3, low, x + 3, high)


def _steps(axes: Axes, front: Sequence[Point]) -> list[_Box]:
    """Thin boxes around the line of the front: across at the loss of a point, then down at the cost of the next."""
    at = [axes.transData.transform((point.cost, point.loss)) for point in front]
    boxes = []
    for (x, y), (next_x, next_y) in pairwise(at):
        boxes += [(x, y - 2, next_x, y + 2), (next_x - 2, next_y, next_x + 2, y)]
    return boxes


def _write(axes: Axes, point: Point, offset: tuple[float, float], *, is_far: bool) -> None:
    axes.annotate(
        shorten(point.line.entry.label, 22),
        (point.cost, point.loss),
        xytext=offset,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=11,
        color=INK,
        arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5} if is_far else None,
        zorder=4,
    )


def place(centre: tuple[float, float], size: tuple[float, float], taken: Sequence[_Box], inside: _Box) -> _Box:
    """The box of a label near `centre` that overlaps no box of `taken` and stays `inside`; the least overlapping one if none is free.

    All in points. Tries eight directions at growing distances.
    """
    best, least = (0.0, 0.0, 0.0, 0.0), math.inf
    for distance in (9, 14, 22, 32, 44, 60, 80, 104):
        for angle in (0, 180, 90, 270, 45, 135, 315, 225):
            box = _beside(centre, size, distance, math.radians(angle))
            overlap = sum(_overlap(box, other) for other in taken) + 4 * _outside(box, inside)
            if overlap < least:
                best, least = box, overlap
            if not overlap:
                return box
    return best


def _beside(centre: tuple[float, float], size: tuple[float, float], distance: float, angle: float) -> _Box:
    """A box of `size` whose nearest edge is `distance` from the centre in a direction."""
    across, up = math.cos(angle), math.sin(angle)
    x = centre[0] + across * distance + (size[0] / 2) * (round(across, 6) > 0) - (size[0] / 2) * (round(across, 6) < 0)
    y = centre[1] + up * distance + (size[1] / 2) * (round(up, 6) > 0) - (size[1] / 2) * (round(up, 6) < 0)
    return (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: _Box, inside: _Box) -> float:
    """The area of a box outside another."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, inside)


def _gap(box: _Box, centre: tuple[float, float]) -> float:
    """The distance between a box and a point outside it."""
    across = max(box[0] - centre[0], 0.0, centre[0] - box[2])
    up = max(box[1] - centre[1], 0.0, centre[1] - box[3])
    return math.hypot(across, up)
