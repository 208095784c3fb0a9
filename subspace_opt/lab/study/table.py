"""The rows of the comparison as text, for the page and for the console. All pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..report import readable_bytes
from .statistics import Line, Pairing
from .words import plus_minus, reached, side_and_wins, signed, values


@dataclass(frozen=True)
class Row:
    """One optimizer in words; `-` where there is no number."""

    label: str
    tuned: str
    loss: str
    to_best: str  # paired difference to the best
    to_best_seeds: str  # in how many seeds
    to_reference: str
    to_reference_seeds: str
    tokens: str  # to the reference's final loss, as a ratio
    seconds: str
    reached_seeds: str  # in how many seeds, unless in all or none
    planned: str
    measured: str
    median: str
    p95: str
    worst: str
    share: str


def row(line: Line, *, has_reference: bool) -> Row:
    """The row of an optimizer. `has_reference`: the study has an AdamW."""
    to_best, best_seeds = ("best", "") if line.to_best is None else _paired(line.to_best)
    is_reference = has_reference and line.to_reference is None
    if line.to_reference is not None:
        to_reference, seeds = _paired(line.to_reference)
    else:
        to_reference, seeds = ("reference" if is_reference else "-"), ""
    tokens, seconds = ("1", "1") if is_reference and line.loss.count else reached(line.reached)
    found = line.costs
    planned = "-" if found is None or found.planned_state_bytes is None else readable_bytes(found.planned_state_bytes)
    loss = plus_minus(line.loss) if line.loss.count or not line.diverged else "diverged"
    return Row(
        line.entry.label,
        values(line.entry.best),
        loss,
        to_best if line.loss.count or line.to_best is None else "-",
        best_seeds,
        to_reference,
        seeds,
        tokens,
        seconds,
        ""
        if line.reached is None or line.reached.reached in (0, line.reached.seeds)
        else f"in {line.reached.reached} of {line.reached.seeds}",
        planned,
        "-" if found is None else readable_bytes(found.measured_state_bytes),
        *(("-",) * 4 if found is None else (_ms(found.step_median), _ms(found.step_p95), _ms(found.step_worst), _percent(found.share))),
    )


def _paired(found: Pairing) -> tuple[str, str]:
    side, wins = side_and_wins(found)
    return signed(found.difference), f"{side} in {wins} of {len(found.seeds)}" if found.seeds else ""


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"
