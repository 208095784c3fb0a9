"""Why a pipeline cannot be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable

from ...algebra.frame import Frame
from ...algebra.pipeline import scheduled
from ...plan import Row
from ...registry import kind_of
from ..work import Options


def refuse_unfit(rows: Iterable[Row], options: Options) -> None:
    """Refuse a plan that `capturable=True` cannot keep its promise for.

    Raises:
        ValueError: The message names the option, or the parameter, its pipeline and the kind, and says what to do.
    """
    if options.nonfinite == "skip":
        raise ValueError(
            "capturable=True and nonfinite='skip': parameters of one stack would have different counts, which one graph cannot hold; use "
            "nonfinite='raise' or 'propagate'"
        )
    if options.rounding == "stochastic":
        raise ValueError("capturable=True and rounding='stochastic': a graph would repeat one draw; use rounding='nearest' or 'kahan'")
    for row in rows:
        for _, frame in row.splits:
            why = why_not(frame)
            if why is not None:
                raise ValueError(
                    f"capturable=True: '{row.entry.name}' has pipeline '{row.pipeline}', which cannot be captured: {why}. Choose another "
                    "kind or option, or build without capturable"
                )


def why_not(frame: Frame) -> str | None:
    """The reason why a step between refreshes cannot be captured, or why every step waits; None if it can."""
    found = [path for path, *_ in scheduled(frame.pipeline)]
    if found:
        return f"a graph would keep one value of '{found[0]}', which follows a schedule"
    for _, rule, rows, cols in frame.places():
        if rule.traits(rows, cols).waits:
            return f"rule '{kind_of(type(rule))}' waits for the device at every update, for a decomposition or a number"
    selector = frame.pipeline.selector
    if frame.opens and selector.every == 1 and frame.selector_traits.waits:
        return f"selector '{kind_of(type(selector))}' refreshes at every update and waits for the device each time"
    return None
