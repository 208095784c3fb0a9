"""Successive halving as pure functions: how many candidates a budget allows, and which survive a rung (arXiv:1502.07943).

A rung runs every candidate that is left for the same number of updates. A quarter of them go on to the next rung, with twice the updates
and with three learning rates each: the best so far and its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

KEPT = 4  # one of so many goes on
LONGER = 2  # times the updates of the rung before
RATES = 3  # learning rates of each candidate after the first rung
FINALISTS = 2


@dataclass(frozen=True)
class Rung:
    """Candidates, and the updates of each run."""

    count: int
    steps: int


def rungs(count: int, first_steps: int, last_steps: int) -> list[Rung]:
    """The rungs for `count` candidates, from `first_steps` updates up to at most `last_steps`."""
    found = [Rung(count, first_steps)]
    while found[-1].count > FINALISTS and found[-1].steps * LONGER <= last_steps:
        found.append(Rung(max(FINALISTS, math.ceil(found[-1].count / KEPT)), found[-1].steps * LONGER))
    return found


def updates(plan: list[Rung]) -> int:
    """The updates of all runs of all rungs."""
    return sum(rung.count * rung.steps * (RATES if number else 1) for number, rung in enumerate(plan))


def affordable(most: int, first_steps: int, last_steps: int, budget: float) -> int:
    """The largest number of candidates, at most `most`, whose rungs take at most `budget` updates; 0 if there is none."""
    return next((count for count in range(most, 0, -1) if updates(rungs(count, first_steps, last_steps)) <= budget), 0)


def survivors(losses: Mapping[str, float], count: int) -> list[str]:
    """The `count` names with the lowest finite losses, best first; of equal losses the first name."""
    finite = [name for name, loss in losses.items() if math.isfinite(loss)]
    return sorted(finite, key=lambda name: (losses[name], name))[:count]
