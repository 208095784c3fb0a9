"""The selector's state under the new spec: the old one, or one made from all that the old state tells about the gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.core import Refreshed, Selector, State, Step
from ..algebra.frame import Frame
from ..algebra.projection import project
from ..algebra.shaped import part
from ..registry import kind_of
from .moments import Known
from .responses import UPDATES, Response, degree_of, fitted
from .source import Blocks, ConversionError, own_sides

Sides = tuple[Tensor | None, Tensor | None]


class NewBasis(NamedTuple):
    """The selector's slots, the bases in the weight's own orientation, and how they came about."""

    state: State
    sides: Sides | None  # None: the basis is made anew at every update and not kept
    status: str
    why: str
    origin: str = ""


def is_same_basis(old: Blocks, new: Blocks) -> bool:
    """True if the old selector's state serves the new one: the same kind, slots, tables and orientation."""
    a, b = old.frame, new.frame
    mine, other = a.pipeline.selector, b.pipeline.selector
    sizes = (a.rows, a.cols, a.turned) == (b.rows, b.cols, b.turned) and a.opens
    alike = kind_of(type(mine)) == kind_of(type(other)) and mine.slots(a.rows, a.cols) == other.slots(b.rows, b.cols)
    return sizes and alike and mine.constants(a.rows, a.cols).keys() == other.constants(b.rows, b.cols).keys()


def make_basis(new: Blocks, old: Blocks | None, known: Known, weight: Tensor | None, like: Tensor) -> NewBasis | None:
    """The selector's state for some matrices; None if nothing is known about their gradients.

    Args:
        old: The same matrices under the old spec; None if it cuts the parameter into others.
        weight: The weights `(B, m, n)`, for selectors that look at them.
        like: A tensor with the stack's size, dtype and device.
    """
    frame = new.frame
    if old is not None and is_same_basis(old, new):
        state = part("selector", old.state)
        sides = None
        if frame.selector_traits.keeps_basis:
            sides = old.sides()
        return NewBasis(state, sides, "exact", "same selector and same sizes: its state is kept")
    source = _source(new, known, weight)
    if source is None:
        return None
    state = _selected(new, source, like)
    sides = None
    if frame.selector_traits.keeps_basis:
        sides = own_sides(frame, state, new.step(like.device), like)
    return NewBasis(state, sides, "rebuilt", *_why(new, known))


def _why(new: Blocks, known: Known) -> tuple[str, str]:
    """The reason for the report, and the old slots that gave the basis."""
    selector = new.frame.pipeline.selector
    first = f"first basis of '{kind_of(type(selector))}'"
    if selector.source == "weight":
        return f"{first}, from the weights", ""
    if known.covariances and not _sees_rows(new.frame):
        return f"{first}, from the old covariance", ""
    return f"{first}, from these averages", " + ".join(m.name for m in (known.mean, known.square) if m is not None)


def _source(new: Blocks, known: Known, weight: Tensor | None) -> Tensor | None:
    """The matrices from which the new selector takes its basis, in the working orientation."""
    frame = new.frame
    rows, cols = (dim.size for dim in frame.own)
    if frame.pipeline.selector.source == "weight":
        if weight is None or weight.is_meta:
            raise ConversionError(
                f"'{new.row.entry.name}': selector '{kind_of(type(frame.pipeline.selector))}' takes its basis from the weights, and the "
                "given model has none; give the model with its weights"
            )
        return weight.mT if frame.turned else weight
    if not _sees_rows(frame):
        return known.rows_along("left" if frame.turned else "right")
    typical = known.typical(rows, cols)
    return typical if typical is None or not frame.turned else typical.mT


def _sees_rows(frame: Frame) -> bool:
    """True if the selector has state or a basis along the rows too, so that the number of rows matters."""
    slots = frame.pipeline.selector.slots(frame.rows, frame.cols).values()
    along = any(dim.name.startswith("rows") or dim == frame.rows for slot in slots for dim in slot.dims)
    return frame.inner[0] != frame.rows or along


def _selected(new: Blocks, x: Tensor, like: Tensor) -> State:
    """The state after a first refresh from `x`, and as if `x` had been the gradient of all updates so far."""
    frame, selector = new.frame, new.frame.pipeline.selector
    slots = selector.slots(frame.rows, frame.cols)
    empty = {name: x.new_zeros(x.size(0), *slot.shape, dtype=slot.dtype or x.dtype) for name, slot in slots.items()}
    n = max(new.count, 1)
    last = n - selector.age(n, new.row.turn) + 1  # the update of the last refresh on schedule
    step = new.step(like.device, count=max(last - (not frame.primes), 0))
    if frame.primes:  # the first gradient enters the covariances before there is a basis
        c = x.new_zeros(x.size(0), *(dim.size for dim in frame.inner))
        seen = _observed(selector, x, c, empty, step._replace(refresh=False), new)
        return Refreshed(*selector.refresh(x, seen, step)).state
    state = Refreshed(*selector.refresh(x, empty, step)).state
    if not frame.selector_traits.keeps_basis:
        return selector.observe(x, project(x, selector.basis(state, step)), state, step)
    c = project(x, selector.basis(state, step))
    return _observed(selector, x, c, state, step._replace(refresh=False, first=False), new)


def _observed(selector: Selector, x: Tensor, c: Tensor, state: State, step: Step, new: Blocks) -> State:
    """The state if `x` had been the source at all updates so far: slots quadratic in it take the weight of these updates."""
    before = dict(state)
    start = 0 if new.frame.primes else 1
    once = selector.observe(x, c, before, _at(step, start))
    changed = [name for name in once if once[name] is not before.get(name) and once[name].is_floating_point()]
    zero = {**before, **{name: torch.zeros_like(once[name]) for name in changed}}
    plain, doubled = (_series(selector, size, x, c, zero, changed, step, start) for size in (1.0, 2.0))
    out = dict(once)
    for name in changed:
        values, more = plain[name], doubled[name]
        degree = degree_of(values, more)
        found = fitted(values, degree) if degree == 2 else Response(0)
        if found.degree == 2:
            first = selector.observe(x, c, zero, _at(step, start))[name]
            out[name] = first * (found.weight(new.count + new.frame.primes) / found.first)
    return out


def _series(
    selector: Selector, size: float, x: Tensor, c: Tensor, zero: State, names: list[str], step: Step, start: int
) -> dict[str, list[float]]:
    """The sums of the absolute entries of some slots after each of a few updates with one source."""
    found: dict[str, list[float]] = {name: [] for name in names}
    state = zero
    for t in range(start, start + UPDATES):
        state = selector.observe(size * x, size * c, state, _at(step, t))
        for name in names:
            found[name].append(float(state[name].double().abs().sum()))
    return found


def _at(step: Step, t: int) -> Step:
    return step._replace(t=torch.tensor(float(t), dtype=torch.float64))
