"""Floating-point operations of a pipeline for one shape, from the costs that its rules and its selector declare."""

from __future__ import annotations

from ..algebra.frame import Frame


def flops(frame: Frame) -> tuple[float, float]:
    """Operations for one matrix: those of an update without a refresh, and those of the refresh alone."""
    p, selector, dims = frame.pipeline, frame.pipeline.selector, (frame.rows, frame.cols)
    rules = sum(rule.flops(rows, cols) for _, rule, rows, cols in frame.places())
    if not frame.opens:
        return rules, 0.0
    costs = selector.flops(*dims)
    own_signal = bool(p.momentum) or p.decay == "coupled"  # gradient and signal are projected separately
    lifts = frame.has_complement + (p.mix.inside > 0 and bool(p.inside)) + (p.feedback is not None)
    project = _dense_projection(frame) if costs.project is None else costs.project
    return rules + (1 + own_signal + lifts) * project + costs.observe, costs.refresh


def _dense_projection(frame: Frame) -> float:
    """A dense product for each side that has a basis."""
    (k, r), rows, cols = frame.inner, frame.rows, frame.cols
    right = 2.0 * rows.size * cols.size * r.size if r != cols else 0.0
    left = 2.0 * rows.size * k.size * r.size if k != rows else 0.0
    return right + left
