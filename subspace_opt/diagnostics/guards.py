"""Guards that fired: skipped gradients and failed decompositions by count, clamped ranks by plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..algebra.frame import Frame


@dataclass
class GuardCounts:
    """Events since the last sample, by parameter. It reads the optimizer's counters after every step, without an operation."""

    events: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # the optimizer's counters when they were last read
    failures: dict[str, int] = field(default_factory=dict)

    def start(self, optimizer: Any) -> None:
        """Forget earlier events."""
        self.events, self.skipped, self.failures = {}, dict(optimizer.skipped), dict(optimizer.failures)

    def count(self, optimizer: Any) -> None:
        """Add the events of one step. `failures` counts those in a row, so a new count is a new failure."""
        if optimizer.skipped != self.skipped:
            for name, total in optimizer.skipped.items():
                self._add(name, "skipped_gradients", total - self.skipped.get(name, 0))
            self.skipped = dict(optimizer.skipped)
        if optimizer.failures != self.failures:
            for name, row in optimizer.failures.items():
                self._add(name, "failed_decompositions", int(row != self.failures.get(name, 0)))
            self.failures = dict(optimizer.failures)

    def _add(self, name: str, event: str, number: int) -> None:
        if number > 0:
            events = self.events.setdefault(name, {})
            events[event] = events.get(event, 0) + number

    def taken(self) -> dict[str, dict[str, int]]:
        """The events since the last call."""
        events, self.events = self.events, {}
        return events


def asked_rank(frame: Frame) -> int | None:
    """The rank that the spec asks for, if the plan had to clamp it; else None."""
    selector: Any = frame.pipeline.selector
    while hasattr(selector, "first"):  # `switch` holds two selectors of one rank
        selector = selector.first
    rank = getattr(selector, "rank", None)
    if rank is None or rank < 1 or frame.rank is None:
        return None
    return int(rank) if rank > min(frame.inner[1].size, frame.cols.size) else None
