"""Questions that fast paths ask of a pipeline for one shape. Tests compare each strategy with the plain frame."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

from ..algebra.core import Dim, Kernel, Rule, RuleTraits, Selector
from ..algebra.frame import Frame
from ..algebra.weight_rule import WeightTraits

A = TypeVar("A")


def _once(question: Callable[[Frame], A]) -> Callable[[Frame], A]:
    """Keep the answer with the frame."""

    @functools.wraps(question)
    def asked(frame: Frame) -> A:
        if question not in frame.memo:
            frame.memo[question] = question(frame)
        answer: A = frame.memo[question]
        return answer

    return asked


def _traits(frame: Frame) -> list[RuleTraits | WeightTraits]:
    return [rule.traits(rows, cols) for _, rule, rows, cols in frame.places()]


@_once
def is_elementwise(frame: Frame) -> bool:
    """True if every entry of a weight is updated by itself: a matrix may be cut anywhere, and ranks exchange nothing."""
    return frame.is_elementwise


@_once
def is_by_rows(frame: Frame) -> bool:
    """True if between refreshes every row of a weight is updated by itself: a tall matrix may be cut between rows."""
    p = frame.pipeline
    if frame.turned or p.feedback is not None or not all(traits.by_rows for traits in _traits(frame)):
        return False
    if not frame.opens:
        return True
    # The round-off test of a residual needs the whole matrix.
    guarded = frame.has_complement and any(rule.traits(frame.rows, frame.cols).scale_free for rule in p.complement)
    return has_fixed_basis(frame) and frame.inner[0] == frame.rows and p.selector.every != 1 and not guarded


@_once
def has_fixed_basis(frame: Frame) -> bool:
    """True if between refreshes the selector learns nothing, and its state is one basis of the columns."""
    selector = frame.pipeline.selector
    traits = selector.traits()
    still = type(selector).observe is Selector.observe and traits.keeps_basis and not traits.primes
    return still and set(selector.slots(frame.rows, frame.cols)) == {"basis"} and not traits.gated


@_once
def is_in_coordinates(frame: Frame) -> bool:
    """True if between refreshes an update needs only the gradient's coordinates and is a lift: ranks exchange coordinates alone."""
    p = frame.pipeline
    known = all(traits.lazy and not traits.measures for traits in (rule.traits(*frame.own) for rule in p.finish))
    lifted = frame.opens and not frame.has_complement and bool(p.inside) and p.mix.inside > 0 and known
    if not lifted or p.momentum or p.feedback is not None or p.decay == "coupled" or p.apply or decomposes(frame):
        return False
    return has_fixed_basis(frame) and frame.inner[0] == frame.rows and p.selector.every != 1 and p.selector.source == "gradient"


@_once
def decomposes(frame: Frame) -> bool:
    """True if a rule takes a decomposition at every update."""
    return any(traits.decomposes for traits in _traits(frame))


def fails_first(frame: Frame, *, refresh: bool) -> bool:
    """True if decompositions run before the rest of the update. The rest may then write over the state."""
    return not decomposes(frame) and (not refresh or frame.refreshes_first)


@_once
def fused(frame: Frame) -> tuple[str, Rule, Kernel] | None:
    """The rule that alone makes the update, with the key of its state and its kernel; None unless there is such a rule."""
    p = frame.pipeline
    alone = not (frame.opens or p.momentum or p.finish) and p.feedback is None and p.mix.complement == 1 and len(p.complement) == 1
    if not alone or p.decay != "before" or p.apply:
        return None
    kernel = p.complement[0].kernel()
    return None if kernel is None else ("complement", p.complement[0], kernel)


@_once
def can_be_blocked(frame: Frame) -> bool:
    """True if the kernel takes `blocked`, a flag on the device with which it changes nothing."""
    found = fused(frame)
    return found is not None and "blocked" in inspect.signature(found[2]).parameters


def part_of_rows(frame: Frame, key: str, first: int, beyond: int) -> slice | None:
    """The part of a slot's first dimension that belongs to rows `first` to `beyond` of a matrix; None if all rows share the slot."""
    dims, side = frame.slots[key].dims, frame.rows.size
    if key.startswith("selector."):
        return None
    if _is_rows(dims, frame.rows):
        return slice(first, beyond)
    each = side * frame.cols.size // dims[0].size  # entries that share a number, in row-major order
    return slice(first * frame.cols.size // each, beyond * frame.cols.size // each)


def _is_rows(dims: tuple[Dim, ...], rows: Dim) -> bool:
    return bool(dims) and dims[0] == rows
