"""What a run tells: events while it goes, a `Result` when it ends.

Plain data: a command line renders them, a test compares them, `log.jsonl` keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["finished", "interrupted"]
Curve = tuple[tuple[int, float], ...]  # (step, loss in nats per byte)


@dataclass(frozen=True, slots=True)
class Started:
    """A run begins, or goes on after `step` updates."""

    run: str
    step: int
    steps: int
    parameters: int
    state_bytes: int | None  # planned; None where the optimizer has no plan
    device: str
    corpus: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """One update is done; `loss` was measured before it, in nats per byte."""

    run: str
    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_second: float
    eta_seconds: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The validation loss after `step` updates, in nats per byte."""

    run: str
    step: int
    loss: float

    @property
    def bits_per_byte(self) -> float:
        """The same loss in bits."""
        return self.loss / math.log(2)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint stands complete under its name."""

    run: str
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A run is over, or was asked to stop and has saved."""

    run: str
    step: int
    status: Status
    seconds: float


Event = Started | Stepped | Evaluated | Saved | Ended
OnEvent = Callable[[Event], None]


def record(event: Event) -> dict[str, Any]:
    """An event as one JSON object."""
    extra = {"bits_per_byte": event.bits_per_byte} if isinstance(event, Evaluated) else {}
    return {"event": type(event).__name__.lower(), **asdict(event), **extra}


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to. Times are of this process alone: a resumed run counts from where it went on."""

    run: str
    status: Status
    step: int
    parameters: int
    lr: float  # the peak
    train: Curve
    validation: Curve
    planned_state_bytes: int | None
    measured_state_bytes: int
    optimizer_ms: float  # median of `optimizer.step()`
    mean_optimizer_ms: float  # beside the median it shows what rare, dear steps cost
    step_ms: float  # median of a whole update: forward, backward, clipping, optimizer
    tokens_per_second: float  # at the median

    @property
    def validation_loss(self) -> float:
        """The last one, in nats per byte; nan before the first."""
        return self.validation[-1][1] if self.validation else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss in bits."""
        return self.validation_loss / math.log(2)
