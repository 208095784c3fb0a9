"""The sweep: which values to try next, as a pure function of the losses so far.

Values lie on a grid by factors of two around the spec's own value. One field is searched after the other, with all others held at their
best values. A search ends when the best value has a worse neighbour on each side, so a best value at the edge of the grid widens the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_VALUES = 12  # of one field; a range of 2^11

Point = tuple[int, ...]  # for each axis the power of two by which its value differs from the start


@dataclass(frozen=True)
class Axis:
    """One field that the sweep varies: the values `start * 2**k`, at most `most`."""

    field: str
    start: float
    most: float | None = None
    whole: bool = False

    def value(self, power: int) -> float:
        """The value at one place of the grid; an integer, at least 1, if the field takes integers."""
        value = self.start * 2.0**power
        return max(1, round(value)) if self.whole else value

    def holds(self, power: int) -> bool:
        """True if the value may be tried: it is at most `most`, and not the same integer as its neighbour's."""
        if self.most is not None and self.value(power) > self.most:
            return False
        return not self.whole or self.start * 2.0**power >= 1


@dataclass(frozen=True)
class Search:
    """The state of a sweep: points to run next, or the best point if there are none."""

    wanted: tuple[Point, ...]
    best: Point
    at_edge: tuple[str, ...]  # fields whose best value has no worse neighbour on one side, because the grid ends there


def search(axes: Sequence[Axis], tried: Mapping[Point, float]) -> Search:
    """The points to run next.

    Args:
        tried: The loss of each point that was run; infinity if the run diverged.
    """
    here: Point = (0,) * len(axes)
    if not axes:
        return Search((), here, ())
    order = [*range(len(axes)), *([0] if len(axes) > 1 else [])]  # the first field again, as the others may have moved its best value
    edges: dict[str, bool] = {}
    for index in order:
        wanted, here, edge = _line(axes[index], index, here, tried)
        if wanted:
            return Search(wanted, here, ())
        edges[axes[index].field] = edge
    return Search((), here, tuple(field for field, edge in edges.items() if edge))


def _line(axis: Axis, index: int, centre: Point, tried: Mapping[Point, float]) -> tuple[tuple[Point, ...], Point, bool]:
    """Search one field through `centre`: points to run, the best point, and whether it is at an edge that cannot be widened."""

    def at(power: int) -> Point:
        return (*centre[:index], power, *centre[index + 1 :])

    middle = centre[index]
    wanted = tuple(at(power) for power in (middle - 1, middle, middle + 1) if axis.holds(power) and at(power) not in tried)
    if wanted:
        return wanted, centre, False
    low = high = middle
    while at(low - 1) in tried:
        low -= 1
    while at(high + 1) in tried:
        high += 1
    best = min(range(low, high + 1), key=lambda power: (tried[at(power)], power))  # of equal losses the smallest value
    beyond = best - 1 if best == low else best + 1 if best == high else None
    if beyond is None:
        return (), at(best), False
    if axis.holds(beyond) and high - low + 1 < MOST_VALUES:
        return (at(beyond),), at(best), False
    return (), at(best), True
